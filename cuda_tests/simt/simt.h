// An emulator of CUDA on one CPU thread: the interface for tests.
//
// Every CUDA thread is a fiber. Fibers switch only where threads wait for each other (barriers, warp-level
// collectives), in an order that the test chooses; blocks run one after another. Kernels are the shipped .cu
// files, compiled as C++20 with STATECORE_EMULATED; language.h is the subset of CUDA C++ that they use, and
// instructions.h declares the PTX instructions.
//
// Always detected: deadlocks and livelocks, divergent barriers and collectives, lanes missing from a mask,
// accesses outside the buffers of alloc_global(), misaligned vector accesses, results that depend on the
// order of threads (tests compare them), and use of uninitialised shared memory (which is poisoned with NaN).
//
// Also detected if race_check.cpp is linked and the kernel is compiled with -fsanitize=thread: data races,
// accesses outside shared arrays, reads of uninitialised shared memory, accesses to memory that an
// asynchronous copy is still writing, and blocks that access what another block writes.
//
// Not modelled: registers, occupancy, time, and the rounding of approximate instructions. Not supported:
// clusters, and blocks that wait for one another.
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

// Thrown by launch() for every error that is detected.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { kForward, kReverse, kRandom };

// When asynchronous operations take effect. kLate: as late as they may, with the destination poisoned until
// then. kEarly: when they are issued, which exposes buffers that are refilled too early. kRandom: either.
enum class Async { kLate, kEarly, kRandom };

struct Schedule {
  Order order = Order::kForward;  // in which runnable threads run
  uint64_t seed = 1;              // for kRandom
  Async async = Async::kLate;
  // Livelock timeout: CPU seconds in which no barrier completes and no thread exits.
  double timeout = 30;
};
Schedule& schedule();

// Properties of the emulated GPU, which host code queries.
struct Device {
  int arch = 80;  // 10 * major + minor compute capability
  int multiprocessors = 132;
};
Device& device();
constexpr uint32_t kSharedBytes = 227 * 1024;  // maximum per block, as on sm_90

// Runs thread() for every thread of every block.
void launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            const std::function<void()>& thread);

void record_launch(const void* kernel, dim3 block, size_t dynamic_shared_bytes);  // see launches.cpp

// What kernels have executed since the last take_counters().
struct Counters {
  uint64_t mma = 0, ldmatrix = 0, wgmma = 0;
  uint64_t ldmatrix_conflicts = 0;    // rows with a bank conflict within their 8x8 matrix
  std::vector<std::string> launches;  // names of kernels
};
Counters take_counters();

// ---- memory

// The shared array of the running block that `key` identifies; uninitialised. The first thread to
// ask creates it.
void* shared_array(const void* key, size_t bytes);
void* dynamic_shared();  // of the size given at launch, aligned to 1024 bytes

// Global memory for tests, poisoned with NaN. It ends at a guard page, except that its size is rounded up to
// a multiple of 16 bytes.
void* alloc_global(size_t bytes, const char* name);
void free_global(void*);

// With race_check.cpp: from now on it is an error if two blocks write the same element of the buffer, or if
// one reads what another writes. Otherwise does nothing.
void watch_blocks(const void* buffer, size_t bytes, const char* name);
void forget_blocks();  // stops watching all buffers
bool checks_races();

}  // namespace simt
