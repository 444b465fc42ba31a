// Which thread of a block runs next, and how a launch ends.

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <random>
#include <sstream>
#include <utility>

#include "simt/block.h"

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024, kPage = 4096;

// One launch at a time: its state is global.
Schedule chosen;
Counters counted;
Device emulated;
std::mt19937_64 generator;
const std::function<void()>* thread_body;
std::string error;
Fiber scheduler;
Block* block;
ThreadState* current;
std::deque<ThreadState*> ready;
std::vector<char*> stacks;  // kept for later launches

char* stack(size_t i) {
  while (stacks.size() <= i) {
    void* memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error("no memory for the stacks of a block");
    mprotect(memory, kPage, PROT_NONE);  // below: an overflow must not reach the next stack
    stacks.push_back(static_cast<char*>(memory) + kPage);
  }
  return stacks[i];
}

void switch_to(ThreadState* next) {  // null: the scheduler
  Fiber& from = current ? *current : scheduler;
  current = next;
  switch_fiber(from, next ? *next : scheduler);
}

ThreadState* next_ready() {
  constexpr uint64_t kLandings = 8;  // one in so many steps of a random schedule
  if (chosen.order == Order::kRandom && !block->bulk_loads.empty() && generator() % kLandings == 0)
    land_bulk_load();
  while (ready.empty() && land_bulk_load()) {
  }
  if (ready.empty()) return nullptr;  // all done, or a deadlock
  if (chosen.order == Order::kRandom) std::swap(ready.front(), ready[generator() % ready.size()]);
  ThreadState* next = chosen.order == Order::kReverse ? ready.back() : ready.front();
  chosen.order == Order::kReverse ? ready.pop_back() : ready.pop_front();
  return next;
}

void run_thread() {
  try {
    (*thread_body)();
  } catch (const std::exception& exception) {
    fail(std::string("exception: ") + exception.what());
  }
  finish_stores(*current);
  finish_products(*current);
  current->done = true;
  leave_block(*current);
  switch_to(next_ready());
  std::abort();  // a thread that is done is not resumed
}

std::string waiting_threads() {
  std::ostringstream text;
  text << block->kernel << ": deadlock, " << block->alive << " threads wait:";
  std::vector<const ThreadState*> shown;  // one for each line
  for (const ThreadState& t : block->threads) {
    const auto same = [&](const ThreadState* other) {
      return other->where.line() == t.where.line() && other->waits_for == t.waits_for;
    };
    if (t.done || shown.size() == 4 || std::any_of(shown.begin(), shown.end(), same)) continue;
    shown.push_back(&t);
    text << " [thread " << t.id.index << " in " << t.waits_in << ", " << line_text(t.where)
         << (t.waits_for ? ": " + missing_text(*t.waits_for) : "") << "]";
  }
  return text.str();
}

void run_block(const char* kernel, dim3 grid, dim3 size, size_t dynamic_shared_bytes, uint32_t index) {
  Block b{};
  b.kernel = kernel;
  b.index = index;
  b.alive = size.x * size.y * size.z;
  make_dynamic_shared(b, dynamic_shared_bytes);
  b.threads.resize(b.alive);
  b.warps.resize((b.alive + 31) / 32);
  block = &b;
  current = nullptr;
  ready.clear();
  error.clear();
  for (uint32_t t = 0; t < b.alive; ++t) {
    ThreadState& thread = b.threads[t];
    thread.id = {.thread = {t % size.x, t / size.x % size.y, t / size.x / size.y},
                 .block = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y},
                 .block_size = size,
                 .grid_size = grid,
                 .index = t,
                 .lane = t % 32,
                 .warp = t / 32};
    b.warps[t / 32].lanes |= 1u << t % 32;
    // Tops are staggered, or the hot lines of all stacks would share a few sets of the cache.
    start(thread, stack(t), kStackBytes - t * 320 % kPage, run_thread);
    ready.push_back(&thread);
  }
  start_checks();
  switch_to(next_ready());
  if (error.empty() && b.alive > 0) error = waiting_threads();
  block = nullptr;
  if (!error.empty()) throw Error(error);
}

}  // namespace

Schedule& schedule() { return chosen; }
Device& device() { return emulated; }
Block* running_block() { return block; }
ThreadState* running_thread() { return current; }
const Thread& this_thread() { return current->id; }

void launch(const char* kernel, dim3 grid, dim3 size, size_t dynamic_shared_bytes,
            const std::function<void()>& thread) {
  const uint64_t threads = uint64_t(size.x) * size.y * size.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024) throw Error(std::string(kernel) + ": a block has 1 to 1024 threads");
  if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
    throw Error(std::string(kernel) + ": the grid is empty or too large");
  generator.seed(chosen.seed);
  counted.launches.emplace_back(kernel);
  thread_body = &thread;
  for (uint64_t i = 0; i < blocks; ++i) run_block(kernel, grid, size, dynamic_shared_bytes, uint32_t(i));
}

uint64_t toss() { return generator(); }

bool takes_effect_at_once() {
  return chosen.async == Async::kEarly || (chosen.async == Async::kRandom && generator() % 2);
}

Counters& counters() { return counted; }
Counters take_counters() { return std::exchange(counted, {}); }

void make_ready(ThreadState& thread) { ready.push_back(&thread); }

void wait_here(const char* what, const Where& where) {
  current->waits_in = what;
  current->where = where;
  ThreadState* next = next_ready();
  if (next != current) switch_to(next);
}

// ---- errors: the launch ends, threads are abandoned where they stand
void fail(const std::string& message) {
  const uint3 b = current->id.block, t = current->id.thread;
  std::ostringstream text;
  text << block->kernel << " block (" << b.x << "," << b.y << "," << b.z << ") thread (" << t.x << "," << t.y
       << "," << t.z << "): " << message;
  error = text.str();
  switch_to(nullptr);
  std::abort();  // not resumed
}

std::string line_text(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

void fail(const Where& where, const std::string& message) { fail(line_text(where) + ": " + message); }

}  // namespace simt
