// A CUDA block on one CPU thread: what tests see of the emulator.
//
// Every CUDA thread is a fiber. Fibers change only where threads of a block wait for each other (barriers,
// warp collectives), in an order that the test chooses; blocks run one after another. Kernels are the shipped
// .cu files compiled as C++20 with STATECORE_EMULATED; language.h is the part of CUDA C++ that they use.
//
// What it finds always: deadlock, threads that spin for ever, barriers and collectives that diverge, lanes
// missing from a mask, accesses outside buffers of alloc_global(), misaligned vector accesses, results that
// depend on the order of threads (tests compare them) and use of unset shared memory (it is filled with NaN).
// Instructions beyond CUDA C++ (matrix products, copies in the background) are in instructions.h.
//
// What it finds in addition where race_check.cpp is linked and the kernel is compiled with -fsanitize=thread:
// data races, accesses outside shared arrays, reads of unset shared memory, accesses to what an asynchronous
// copy is still writing, and blocks that touch what another block writes. What it cannot show: registers,
// occupancy, time, and the rounding of approximate instructions. What it does not run: clusters, and blocks
// that wait for one another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt/language.h"

namespace simt {

// Thrown out of launch() for whatever is found.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { kForward, kReverse, kRandom };

// When asynchronous work (copies to shared memory) takes effect: as late as is allowed, the destination NaN
// meanwhile; at once, which shows buffers that are refilled too soon; or each by the toss of a coin.
enum class Async { kLate, kEarly, kRandom };

struct Schedule {
  Order order = Order::kForward;  // in which threads that could run do run
  uint64_t seed = 1;              // of kRandom
  Async async = Async::kLate;
  // CPU seconds without a barrier passed or a thread done, after which the running thread is said to wait for
  // something that will not come.
  double patience = 30;
};
Schedule& schedule();

// The GPU that is emulated, as host code sees it when it chooses kernels.
struct Device {
  int arch = 80;  // 10 x major + minor compute capability
  int multiprocessors = 132;
};
Device& device();
constexpr uint32_t kSharedBytes = 227 * 1024;  // of a block at most, as on sm_90

// Runs thread() for every thread of every block.
void launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            const std::function<void()>& thread);

void note_launch(const void* kernel, dim3 block, size_t dynamic_shared_bytes);  // see launches.cpp

// What kernels have done since it was last asked.
struct Counters {
  uint64_t mma = 0, ldmatrix = 0, wgmma = 0;
  uint64_t ldmatrix_conflicts = 0;    // rows of 16 bytes that had to wait for another of their 8x8 matrix
  std::vector<std::string> launches;  // names of kernels
};
Counters take_counters();

// ---- memory
// The array of the running block that `key` stands for: created, unset, by the first thread to ask.
void* shared_array(const void* key, size_t bytes);
void* dynamic_shared();  // as many bytes as the launch asked for, aligned to 1024

// Global memory for tests, set to NaN: it ends against a page that nobody may touch, up to the rounding of
// its size to 16.
void* alloc_global(size_t bytes, const char* name);
void free_global(void*);

// With race_check.cpp: from here on no two blocks may write one element of the buffer, or one read what
// another writes. Without: does nothing.
void watch_blocks(const void* buffer, size_t bytes, const char* name);
void forget_blocks();  // what they have touched, before the next launch
bool checks_races();

}  // namespace simt
