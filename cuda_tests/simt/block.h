// The running block, as the files of the emulator share it.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/simt.h"

namespace simt {

// Vector clock: how much of each thread's past is ordered before now. One entry a thread.
using Clock = std::vector<uint32_t>;

// A copy that the thread has issued and not yet waited for.
struct AsyncCopy {
  uint32_t begin, bytes;         // in the arena
  std::function<void()> finish;  // empty: has taken effect
};

struct ThreadState : Fiber {
  Thread id{};
  bool done = false;
  const char* waits_in = nullptr;  // a barrier or collective
  Where where{};
  Clock clock;
  std::vector<AsyncCopy> open_copies;                   // of no group yet
  std::deque<std::vector<AsyncCopy>> committed_copies;  // oldest group first
};

// Lanes of a warp on their way into one collective.
struct Meeting {
  uint32_t mask, arrived;
  const char* what;
  Where where;
  void* argument[32];
  ThreadState* thread[32];
};

struct Warp {
  uint32_t lanes = 0, returned = 0;
  std::vector<std::unique_ptr<Meeting>> meetings;
};

struct SharedArray {
  const void* key;
  uint32_t begin, end;  // in the arena
};

// Threads at one of the block's numbered barriers.
struct NamedBarrier {
  unsigned expected = 0, arrived = 0;
  Clock clock;  // of those who have come
  std::vector<ThreadState*> waiting;
};

struct Block {
  const char* kernel;
  uint32_t index;  // in the grid
  std::vector<ThreadState> threads;
  std::vector<Warp> warps;
  size_t alive;
  std::vector<ThreadState*> at_barrier;
  std::vector<SharedArray> shared;
  uint32_t dynamic_begin = 0;
  std::map<unsigned, NamedBarrier> named_barriers;
};

constexpr uint32_t kArenaBytes = 256 * 1024;  // the shared memory of a block, with gaps between arrays

Block* running_block();         // null outside of launch()
ThreadState* running_thread();  // null in the scheduler
unsigned char* arena();

[[noreturn]] void fail(const std::string& message);  // ends the launch, from a thread
[[noreturn]] void fail(const Where& where, const std::string& message);
std::string line_text(const Where& where);

// Lanes of `mask` meet; the last to come calls work(meeting) for all. `what` is compared by its address.
void meet(const char* what, uint32_t mask, void* argument, const Where& where, void (*work)(const Meeting&));

uint64_t toss();              // a random number of the schedule
bool takes_effect_at_once();  // the next asynchronous operation, by the schedule
Counters& counters();

void wait_here(const char* what, const Where& where);  // until make_ready()
void make_ready(ThreadState& thread);
void leave_block(ThreadState& thread);  // it has returned: what waited for it alone goes on, or is wrong

// ---- shared memory by address: an offset in the arena
void make_dynamic_shared(Block& block, size_t bytes);
uint32_t address_of(const void* shared, const Where& where);
unsigned char* at_address(uint32_t address, size_t bytes, size_t alignment, const Where& where);

// ---- checks of shared memory (race_check.cpp; nothing in the plain build)
void start_checks();  // of a block
// What `thread` has done is before whatever observes the clock later.
void publish(ThreadState& thread, Clock& clock);
void observe(ThreadState& thread, const Clock& clock);
// Accesses by instructions, in the name of a thread.
void check_read(const ThreadState& thread, uint32_t address, uint32_t bytes, const Where& where);
void check_write(const ThreadState& thread, uint32_t address, uint32_t bytes, const Where& where);
// Nobody may touch these bytes until the asynchronous copy that writes them has been waited for.
void start_writing(uint32_t address, uint32_t bytes, const Where& where);
void finish_writing(uint32_t address, uint32_t bytes);

}  // namespace simt
