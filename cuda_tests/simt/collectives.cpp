// Where threads meet: the block's barrier, and collectives of a warp, in which the last lane to come does the
// work for all.

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

// What each has done is before what each does next.
void order_all(const std::vector<ThreadState*>& threads) {
  Clock clock;
  for (ThreadState* thread : threads) publish(*thread, clock);
  for (ThreadState* thread : threads) observe(*thread, clock);
}

void release_barrier(Block& block) {
  ++running.progress;
  order_all(block.at_barrier);
  make_ready(block.at_barrier);
  block.at_barrier.clear();
}

// The one that some of these lanes are on their way into, or a free one.
Meeting& meeting_of(Warp& warp, uint32_t mask) {
  Meeting* free = nullptr;
  for (const auto& meeting : warp.meetings) {
    if (meeting->mask & mask) return *meeting;
    if (meeting->mask == 0) free = meeting.get();
  }
  return free ? *free : *warp.meetings.emplace_back(std::make_unique<Meeting>());
}

constexpr char kWarpBarrier[] = "__syncwarp", kShuffle[] = "a shuffle", kVote[] = "a vote",
               kElect[] = "elect_one";

}  // namespace

void meet(const char* what, uint32_t mask, void* argument, const Where& where, void (*work)(const Meeting&)) {
  ThreadState& self = *running_thread();
  Warp& warp = running_block()->warps[self.id.warp];
  const uint32_t own = 1u << self.id.lane;
  mask &= warp.lanes;  // the last warp of a block may be short
  if (!(mask & own)) fail(where, std::string(what) + ": the calling lane is not in the mask " + hex(mask));
  if (mask & warp.returned)
    fail(where, std::string(what) + ": the mask " + hex(mask) + " names lanes that have returned");

  Meeting& meeting = meeting_of(warp, mask);
  if (meeting.mask == 0) {
    meeting.mask = mask;
    meeting.arrived = 0;
    meeting.what = what;
    meeting.where = where;
    std::fill(meeting.thread, meeting.thread + 32, nullptr);
  }
  if (meeting.mask != mask)
    fail(where, std::string(what) + ": the mask " + hex(mask) + " overlaps the mask " + hex(meeting.mask) +
                    " that other lanes wait with at " + line_text(meeting.where));
  if (meeting.what != what || meeting.where.line() != where.line())
    fail(where, std::string("divergent warp: one lane is in ") + what + ", others wait in " + meeting.what +
                    " at " + line_text(meeting.where));
  meeting.arrived |= own;
  meeting.argument[self.id.lane] = argument;
  meeting.thread[self.id.lane] = &self;
  if (meeting.arrived != mask) return wait_here(what, where);

  work(meeting);
  meeting.mask = 0;
  make_ready(meeting.thread);
  wait_here(what, where);  // the last to come is not always the first to go on
}

void block_barrier(const Where& where) {
  Block& block = *running_block();
  if (!block.at_barrier.empty() && block.at_barrier[0]->where.line() != where.line())
    fail(where, "divergent __syncthreads: other threads of the block wait at " +
                    line_text(block.at_barrier[0]->where));
  block.at_barrier.push_back(running_thread());
  running_thread()->where = where;
  if (block.at_barrier.size() == block.alive) release_barrier(block);
  wait_here("__syncthreads", where);
}

// A barrier does not wait for threads that have returned; a warp's collective does, for ever.
void leave_block(ThreadState& thread) {
  Block& block = *running_block();
  Warp& warp = block.warps[thread.id.warp];
  --block.alive;
  ++running.progress;
  warp.returned |= 1u << thread.id.lane;
  for (const auto& meeting : warp.meetings)
    if (meeting->mask >> thread.id.lane & 1)
      fail(meeting->where, std::string("a lane returned while its warp waits for it in ") + meeting->what);
  if (!block.at_barrier.empty() && block.at_barrier.size() == block.alive) release_barrier(block);
}

void named_barrier(unsigned id, unsigned threads, bool waits, const Where& where) {
  if (id > 15 || threads % 32 != 0 || threads == 0)
    fail(where, "a named barrier has a number up to 15 and whole warps of threads");
  NamedBarrier& barrier = running_block()->named_barriers[id];
  ThreadState& self = *running_thread();
  if (barrier.arrived == 0) barrier.expected = threads;
  if (barrier.expected != threads)
    fail(where, "barrier " + std::to_string(id) + " is waited at by " + std::to_string(barrier.expected) +
                    " threads elsewhere, by " + std::to_string(threads) + " here");
  publish(self, barrier.clock);
  if (waits) barrier.waiting.push_back(&self);
  if (++barrier.arrived == barrier.expected) {
    for (ThreadState* thread : barrier.waiting) observe(*thread, barrier.clock);
    make_ready(barrier.waiting);
    ++running.progress;
    barrier = {};
  }
  if (waits) wait_here("a named barrier", where);
}

void warp_barrier(uint32_t mask, const Where& where) {
  meet(kWarpBarrier, mask, nullptr, where, [](const Meeting& meeting) {
    std::vector<ThreadState*> threads;
    for (int lane = 0; lane < 32; ++lane)
      if (meeting.mask >> lane & 1) threads.push_back(meeting.thread[lane]);
    order_all(threads);
  });
}

// Shuffles and votes order no memory accesses: CUDA does not promise it.
uint32_t exchange(uint32_t mask, uint32_t value, int from_lane, const Where& where) {
  struct Argument {
    uint32_t in, out;
    int from;
  } argument{value, 0, from_lane};
  meet(kShuffle, mask, &argument, where, [](const Meeting& meeting) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(meeting.mask >> lane & 1)) continue;
      auto& to = *static_cast<Argument*>(meeting.argument[lane]);
      if (!(meeting.mask >> to.from & 1))
        fail(meeting.where, "a shuffle reads lane " + std::to_string(to.from) + ", which does not take part");
      to.out = static_cast<Argument*>(meeting.argument[to.from])->in;
    }
  });
  return argument.out;
}

bool elect_one(const Where& where) {
  meet(kElect, 0xffffffffu, nullptr, where, [](const Meeting&) {});
  return running_thread()->id.lane == 0;
}

uint32_t vote(uint32_t mask, bool yes, const Where& where) {
  struct Argument {
    bool in;
    uint32_t out;
  } argument{yes, 0};
  meet(kVote, mask, &argument, where, [](const Meeting& meeting) {
    uint32_t result = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (meeting.mask >> lane & 1 && static_cast<Argument*>(meeting.argument[lane])->in)
        result |= 1u << lane;
    for (int lane = 0; lane < 32; ++lane)
      if (meeting.mask >> lane & 1) static_cast<Argument*>(meeting.argument[lane])->out = result;
  });
  return argument.out;
}

}  // namespace simt
