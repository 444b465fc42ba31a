// The running block, as the files of the emulator share it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/simt.h"

namespace simt {

// Vector clock: how much of each thread's past is ordered before now. One entry a thread.
using Clock = std::vector<uint32_t>;

struct ThreadState : Fiber {
  Thread id{};
  bool done = false;
  const char* waits_in = nullptr;  // a barrier or collective
  Where where{};
  Clock clock;
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

struct Block {
  const char* kernel;
  uint32_t index;  // in the grid
  std::vector<ThreadState> threads;
  std::vector<Warp> warps;
  size_t alive;
  std::vector<ThreadState*> at_barrier;
  std::vector<SharedArray> shared;
};

Block* running_block();         // null outside of launch()
ThreadState* running_thread();  // null in the scheduler
unsigned char* arena();

[[noreturn]] void fail(const std::string& message);  // ends the launch, from a thread
[[noreturn]] void fail(const Where& where, const std::string& message);
std::string line_text(const Where& where);

void wait_here(const char* what, const Where& where);  // until make_ready()
void make_ready(ThreadState& thread);
void leave_block(ThreadState& thread);  // it has returned: what waited for it alone goes on, or is wrong

// ---- checks of shared memory (race_check.cpp)
void start_checks();                               // of a block
void order_all(const std::vector<ThreadState*>&);  // what each has done is before what each does next

}  // namespace simt
