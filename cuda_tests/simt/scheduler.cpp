// The scheduler: which thread of a block runs next, and how launches end.

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <random>
#include <span>
#include <sstream>
#include <utility>

#include "simt/block.h"

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024, kPage = 4096;

// There is only one launch at a time, so its state is global.
Schedule current_schedule;
Counters current_counters;
Device current_device;
std::mt19937_64 generator;
const std::function<void()>* thread_body;
std::string error;
Fiber scheduler;
std::vector<char*> stacks;  // kept for later launches

// Runnable threads. Threads that become runnable together go to the end that is popped first, so that their
// warp continues: in forward and reverse order, a warp runs as far as it can before the next one starts.
class ReadyQueue {
 public:
  bool empty() const { return begin_ == end_; }
  size_t size() const { return end_ - begin_; }
  void clear() { begin_ = end_ = kSize; }
  void push_front(ThreadState* thread) { at(--begin_) = thread; }
  void push_back(ThreadState* thread) { at(end_++) = thread; }
  ThreadState* pop_front() { return at(begin_++); }
  ThreadState* pop_back() { return at(--end_); }
  ThreadState* pop(size_t i) {
    std::swap(at(begin_ + i), at(begin_));
    return pop_front();
  }

 private:
  static constexpr size_t kSize = 1024;  // maximum threads per block
  ThreadState*& at(size_t i) { return threads_[i % kSize]; }
  ThreadState* threads_[kSize];
  size_t begin_ = kSize, end_ = kSize;
} ready;

char* stack(size_t i) {
  while (stacks.size() <= i) {
    void* memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error("out of memory for the stacks of a block");
    mprotect(memory, kPage, PROT_NONE);  // guard page: an overflow must not reach the next stack
    stacks.push_back(static_cast<char*>(memory) + kPage);
  }
  return stacks[i];
}

void switch_to(ThreadState* next) {  // null: the scheduler
  Fiber& from = running.thread ? *running.thread : scheduler;
  running.thread = next;
  this_thread = next ? &next->id : nullptr;
  switch_fiber(from, next ? *next : scheduler);
}

ThreadState* next_ready() {
  constexpr uint64_t kSwitchesPerLoad = 8;  // on average, in a random schedule
  if (current_schedule.order == Order::kRandom && !running.block->pending_bulk_loads.empty() &&
      generator() % kSwitchesPerLoad == 0)
    complete_bulk_load();
  while (ready.empty() && complete_bulk_load()) {
  }
  if (ready.empty()) return nullptr;  // all threads have exited, or a deadlock
  switch (current_schedule.order) {
    case Order::kForward: return ready.pop_front();
    case Order::kReverse: return ready.pop_back();
    case Order::kRandom: return ready.pop(generator() % ready.size());
  }
  return nullptr;
}

void run_thread() {
  try {
    (*thread_body)();
  } catch (const std::exception& exception) {
    fail(std::string("exception: ") + exception.what());
  }
  finish_stores(*running.thread);
  check_no_wgmma_in_flight(*running.thread);
  running.thread->exited = true;
  thread_exited(*running.thread);
  switch_to(next_ready());
  std::abort();  // exited threads are not resumed
}

std::string waiting_threads() {
  std::ostringstream text;
  text << running.block->kernel << ": deadlock, " << running.block->live_threads << " threads wait:";
  std::vector<const ThreadState*> shown;  // one per source line
  for (const ThreadState& t : running.block->threads) {
    const auto same = [&](const ThreadState* other) {
      return other->where.line() == t.where.line() && other->waiting_for == t.waiting_for;
    };
    if (t.exited || shown.size() == 4 || std::any_of(shown.begin(), shown.end(), same)) continue;
    shown.push_back(&t);
    text << " [thread " << t.id.index << " in " << t.waiting_in << ", " << line_text(t.where)
         << (t.waiting_for ? ": " + pending_text(*t.waiting_for) : "") << "]";
  }
  return text.str();
}

void run_block(const char* kernel, dim3 grid, dim3 size, size_t dynamic_shared_bytes, uint32_t index) {
  Block b{};
  b.kernel = kernel;
  b.index = index;
  b.live_threads = size.x * size.y * size.z;
  make_dynamic_shared(b, dynamic_shared_bytes);
  b.threads.resize(b.live_threads);
  b.warps.resize((b.live_threads + 31) / 32);
  running.block = &b;
  running.thread = nullptr;
  ready.clear();
  error.clear();
  for (uint32_t t = 0; t < b.live_threads; ++t) {
    ThreadState& thread = b.threads[t];
    thread.id = {.thread = {t % size.x, t / size.x % size.y, t / size.x / size.y},
                 .block = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y},
                 .block_size = size,
                 .grid_size = grid,
                 .index = t,
                 .lane = t % 32,
                 .warp = t / 32};
    b.warps[t / 32].lanes |= 1u << t % 32;
    // Stack tops are staggered: otherwise the hot lines of all stacks would share a few cache sets.
    start(thread, stack(t), kStackBytes - t * 320 % kPage, run_thread);
    ready.push_back(&thread);
  }
  begin_block_checks();
  switch_to(next_ready());
  if (error.empty() && b.live_threads > 0) error = waiting_threads();
  running.block = nullptr;
  if (!error.empty()) throw Error(error);
}

}  // namespace

Schedule& schedule() { return current_schedule; }
Device& device() { return current_device; }
Running running;
const Thread* this_thread;

void launch(const char* kernel, dim3 grid, dim3 size, size_t dynamic_shared_bytes,
            const std::function<void()>& thread) {
  const uint64_t threads = uint64_t(size.x) * size.y * size.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024) throw Error(std::string(kernel) + ": a block has 1 to 1024 threads");
  if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
    throw Error(std::string(kernel) + ": the grid is empty or too large");
  generator.seed(current_schedule.seed);
  current_counters.launches.emplace_back(kernel);
  thread_body = &thread;
  const Watchdog watchdog(current_schedule.timeout);
  for (uint64_t i = 0; i < blocks; ++i) run_block(kernel, grid, size, dynamic_shared_bytes, uint32_t(i));
}

uint64_t random_bits() { return generator(); }

bool completes_immediately() {
  return current_schedule.async == Async::kEarly ||
         (current_schedule.async == Async::kRandom && generator() % 2);
}

Counters& counters() { return current_counters; }
Counters take_counters() { return std::exchange(current_counters, {}); }

void make_runnable(std::span<ThreadState* const> threads) {
  if (current_schedule.order == Order::kForward) {
    for (size_t i = threads.size(); i-- > 0;)
      if (threads[i]) ready.push_front(threads[i]);
  } else {
    for (ThreadState* thread : threads)
      if (thread) ready.push_back(thread);
  }
}

void suspend(const char* name, const Where& where) {
  running.thread->waiting_in = name;
  running.thread->where = where;
  ThreadState* next = next_ready();
  if (next != running.thread) switch_to(next);
}

// ---- errors end the launch; threads are abandoned where they are
void fail(const std::string& message) {
  const uint3 b = running.thread->id.block, t = running.thread->id.thread;
  std::ostringstream text;
  text << running.block->kernel << " block (" << b.x << "," << b.y << "," << b.z << ") thread (" << t.x << ","
       << t.y << "," << t.z << "): " << message;
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
