// Barriers of the block, and warp-level collectives, in which the last lane to arrive does the work for all.

#include <cstdio>

#include "simt/block.h"
#include "simt/instructions.h"

namespace simt {
namespace {

std::string hex(uint32_t mask) {
  char text[9];
  std::snprintf(text, sizeof text, "%08x", mask);
  return text;
}

// Orders everything these threads have done before everything they will do.
void synchronise(const std::vector<ThreadState*>& threads) {
  Clock clock;
  for (ThreadState* thread : threads) release(*thread, clock);
  for (ThreadState* thread : threads) acquire(*thread, clock);
}

void complete_syncthreads(Block& block) {
  ++running.progress;
  synchronise(block.at_syncthreads);
  make_runnable(block.at_syncthreads);
  block.at_syncthreads.clear();
}

// The collective that some of these lanes are waiting in, or an unused one.
Collective& find_collective(Warp& warp, uint32_t mask) {
  Collective* unused = nullptr;
  for (const auto& collective : warp.collectives) {
    if (collective->mask & mask) return *collective;
    if (collective->mask == 0) unused = collective.get();
  }
  return unused ? *unused : *warp.collectives.emplace_back(std::make_unique<Collective>());
}

constexpr char kSyncwarp[] = "__syncwarp", kShuffle[] = "a shuffle", kBallot[] = "a vote",
               kElect[] = "elect_one";

}  // namespace

void run_collective(const char* name, uint32_t mask, void* argument, const Where& where,
                    void (*complete)(const Collective&)) {
  ThreadState& self = *running_thread();
  Warp& warp = running_block()->warps[self.id.warp];
  const uint32_t own = 1u << self.id.lane;
  mask &= warp.lanes;  // the last warp of a block may be partial
  if (!(mask & own)) fail(where, std::string(name) + ": the calling lane is not in the mask " + hex(mask));
  if (mask & warp.exited)
    fail(where, std::string(name) + ": the mask " + hex(mask) + " names lanes that have returned");

  Collective& collective = find_collective(warp, mask);
  if (collective.mask == 0) {
    collective.mask = mask;
    collective.arrived = 0;
    collective.name = name;
    collective.where = where;
    std::fill(collective.thread, collective.thread + 32, nullptr);
  }
  if (collective.mask != mask)
    fail(where, std::string(name) + ": the mask " + hex(mask) + " overlaps the mask " + hex(collective.mask) +
                    " with which other lanes wait at " + line_text(collective.where));
  if (collective.name != name || collective.where.line() != where.line())
    fail(where, std::string("divergent warp: one lane is in ") + name + ", others wait in " +
                    collective.name + " at " + line_text(collective.where));
  collective.arrived |= own;
  collective.argument[self.id.lane] = argument;
  collective.thread[self.id.lane] = &self;
  if (collective.arrived != mask) return suspend(name, where);

  complete(collective);
  collective.mask = 0;
  make_runnable(collective.thread);
  suspend(name, where);  // the last lane to arrive is not always the first to continue
}

void syncthreads(const Where& where) {
  Block& block = *running_block();
  if (!block.at_syncthreads.empty() && block.at_syncthreads[0]->where.line() != where.line())
    fail(where, "divergent __syncthreads: other threads of the block wait at " +
                    line_text(block.at_syncthreads[0]->where));
  block.at_syncthreads.push_back(running_thread());
  running_thread()->where = where;
  if (block.at_syncthreads.size() == block.live_threads) complete_syncthreads(block);
  suspend("__syncthreads", where);
}

// __syncthreads does not wait for threads that have exited, but a warp-level collective would wait forever.
void thread_exited(ThreadState& thread) {
  Block& block = *running_block();
  Warp& warp = block.warps[thread.id.warp];
  --block.live_threads;
  ++running.progress;
  warp.exited |= 1u << thread.id.lane;
  for (const auto& collective : warp.collectives)
    if (collective->mask >> thread.id.lane & 1)
      fail(collective->where,
           std::string("a lane returned while its warp waits for it in ") + collective->name);
  if (!block.at_syncthreads.empty() && block.at_syncthreads.size() == block.live_threads)
    complete_syncthreads(block);
}

namespace {

void arrive(unsigned id, unsigned threads, bool wait, const Where& where) {
  if (id > 15 || threads % 32 != 0 || threads == 0)
    fail(where, "a named barrier has an id up to 15 and a thread count that is a multiple of 32");
  NamedBarrier& barrier = running_block()->named_barriers[id];
  ThreadState& self = *running_thread();
  if (barrier.arrived == 0) barrier.expected = threads;
  if (barrier.expected != threads)
    fail(where, "named barrier " + std::to_string(id) + " is waited at by " +
                    std::to_string(barrier.expected) + " threads elsewhere, but by " +
                    std::to_string(threads) + " here");
  release(self, barrier.clock);
  if (wait) barrier.waiting.push_back(&self);
  if (++barrier.arrived == barrier.expected) {
    for (ThreadState* thread : barrier.waiting) acquire(*thread, barrier.clock);
    make_runnable(barrier.waiting);
    ++running.progress;
    barrier = {};
  }
}

}  // namespace

void named_barrier_sync(unsigned id, unsigned threads, const Where& where) {
  arrive(id, threads, true, where);
  suspend("a named barrier", where);
}

void named_barrier_arrive(unsigned id, unsigned threads, const Where& where) {
  arrive(id, threads, false, where);
}

void syncwarp(uint32_t mask, const Where& where) {
  run_collective(kSyncwarp, mask, nullptr, where, [](const Collective& collective) {
    std::vector<ThreadState*> threads;
    for (int lane = 0; lane < 32; ++lane)
      if (collective.mask >> lane & 1) threads.push_back(collective.thread[lane]);
    synchronise(threads);
  });
}

// Shuffles and votes do not order memory accesses: CUDA does not guarantee it.
uint32_t shuffle(uint32_t mask, uint32_t value, int from_lane, const Where& where) {
  struct Argument {
    uint32_t in, out;
    int from_lane;
  } argument{value, 0, from_lane};
  run_collective(kShuffle, mask, &argument, where, [](const Collective& collective) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(collective.mask >> lane & 1)) continue;
      auto& to = *static_cast<Argument*>(collective.argument[lane]);
      if (!(collective.mask >> to.from_lane & 1))
        fail(collective.where,
             "a shuffle reads lane " + std::to_string(to.from_lane) + ", which is not in the mask");
      to.out = static_cast<Argument*>(collective.argument[to.from_lane])->in;
    }
  });
  return argument.out;
}

bool elect_one(const Where& where) {
  run_collective(kElect, 0xffffffffu, nullptr, where, [](const Collective&) {});
  return running_thread()->id.lane == 0;
}

uint32_t ballot(uint32_t mask, bool predicate, const Where& where) {
  struct Argument {
    bool in;
    uint32_t out;
  } argument{predicate, 0};
  run_collective(kBallot, mask, &argument, where, [](const Collective& collective) {
    uint32_t result = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (collective.mask >> lane & 1 && static_cast<Argument*>(collective.argument[lane])->in)
        result |= 1u << lane;
    for (int lane = 0; lane < 32; ++lane)
      if (collective.mask >> lane & 1) static_cast<Argument*>(collective.argument[lane])->out = result;
  });
  return argument.out;
}

}  // namespace simt
