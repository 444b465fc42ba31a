// Tests of the emulator: it must report every planted bug, in every order of threads, and run the same
// kernels without bugs. Built twice: with the plain emulator and with race detection.

#include <cstdio>
#include <string>
#include <vector>

#include "common/cuda.cuh"

namespace {

using statecore::launch;
constexpr int kThreads = 96;  // three warps

// Bugs planted in a block-wide sum, one at a time.
enum class Bug {
  kNone,
  kNoBarrier,         // partial sums are read before all warps have written theirs
  kNoSecondBarrier,   // partial sums are overwritten before all warps have read them
  kUninitialised,     // reads one partial sum too many
  kSharedOverrun,     // writes beyond the partial sums
  kDivergentBarrier,  // one warp waits at another __syncthreads
  kMissingLanes,      // half of a warp shuffles with a full mask
  kExitedLanes,       // the other half of the warp has exited
  kDivergentWarp,     // lanes wait in different collectives
  kGlobalOverrun,     // writes beyond the results
  kMisaligned,        // a misaligned 16-byte store
  kBlocksOverlap,     // both blocks write the same result
  kOverlappingMasks,  // lanes shuffle with overlapping masks
};

__global__ void sum_kernel(const float* in, float* out, Bug bug) {
  STATECORE_SHARED(float, partial, kThreads / 32);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  for (int round = 0; round < 2; ++round) {
    float x = in[(blockIdx.x * 2 + round) * kThreads + thread];
    if (bug == Bug::kMissingLanes && lane >= 16)
      x = 0;
    else if (bug == Bug::kExitedLanes && lane >= 16 && warp == 1)
      return;
    else
      for (int distance = 1; distance < (bug == Bug::kMissingLanes ? 2 : 32); distance *= 2)
        x += __shfl_xor_sync(0xffffffffu, x, distance);
    if (bug == Bug::kDivergentWarp) {
      if (lane < 7)
        x += __shfl_xor_sync(0xffffffffu, x, 1);
      else
        __syncwarp();
    }
    if (bug == Bug::kOverlappingMasks) {
      if (warp > 0)
        __syncthreads();
      else
        x += __shfl_xor_sync(lane == 3 ? 0x8u : 0xffffffffu, x, 0);
    }
    if (lane == 0) partial[warp + (bug == Bug::kSharedOverrun)] = x;
    if (bug == Bug::kDivergentBarrier && warp == 1)
      __syncthreads();
    else if (bug != Bug::kNoBarrier)
      __syncthreads();
    float total = 0;
    for (int i = 0; i < kThreads / 32 + (bug == Bug::kUninitialised); ++i) total += partial[i];
    if (bug != Bug::kNoSecondBarrier) __syncthreads();
    const int result = (bug == Bug::kBlocksOverlap ? 0 : 2 * blockIdx.x) + round;
    if (thread == 0) out[result + (bug == Bug::kGlobalOverrun ? 4 : 0)] = total;
    if (thread == 0 && bug == Bug::kMisaligned)
      __stcs(reinterpret_cast<float4*>(out + 1), make_float4(0, 0, 0, 0));
  }
}

// Reads uninitialised shared memory within the bounds of the array.
__global__ void read_uninitialised_kernel(float* out) {
  STATECORE_SHARED(float, x, 4);
  if (threadIdx.x == 0) x[0] = 1;
  __syncthreads();
  out[0] = x[0] + x[1];
}

// A warp spins on a flag that nothing sets.
__global__ void spin_kernel(float* out) {
  STATECORE_SHARED(float, flag, 1);
  if (threadIdx.x == 0) *flag = 0;
  __syncthreads();
  if (threadIdx.x / 32 == 1) {
    while (*const_cast<volatile float*>(flag) == 0) __syncwarp();
    out[threadIdx.x % 32] = *flag;
  }
}

int failures = 0;

void expect(bool right, const std::string& what) {
  if (!right) ++failures, std::printf("FAILED: %s\n", what.c_str());
}

// Runs it and returns the error, or "".
template <class Run>
std::string error_of(const Run& run) {
  try {
    run();
    return "";
  } catch (const simt::Error& error) {
    return error.what();
  }
}

constexpr unsigned kBlocks = 2;

struct SumCase {
  float* in = static_cast<float*>(simt::alloc_global(kBlocks * 2 * kThreads * sizeof(float), "in"));
  float* out = static_cast<float*>(simt::alloc_global(kBlocks * 2 * sizeof(float), "out"));

  SumCase() {
    for (unsigned i = 0; i < kBlocks * 2 * kThreads; ++i) in[i] = float(i);
    simt::forget_blocks();
    simt::watch_blocks(out, kBlocks * 2 * sizeof(float), "out");
  }
  ~SumCase() {
    simt::free_global(in);
    simt::free_global(out);
  }
  std::string run(Bug bug) {
    return error_of(
        [&] { launch("sum", sum_kernel, {dim3(kBlocks), dim3(kThreads)}, nullptr, in, out, bug); });
  }
  bool right() const {
    for (unsigned i = 0; i < kBlocks * 2; ++i)
      if (out[i] != float(kThreads * kThreads) * i + kThreads * (kThreads - 1) / 2.0f) return false;
    return true;
  }
};

struct PlantedBug {
  Bug bug;
  const char *plain, *checked;  // part of the error; null: the plain build does not always report it
};

void test_planted_bugs() {
  const std::vector<PlantedBug> all{
      {Bug::kNoBarrier, nullptr, "read of uninitialised shared memory"},
      {Bug::kNoSecondBarrier, nullptr, "race: write not ordered after a read"},
      {Bug::kUninitialised, nullptr, "shared read out of bounds"},
      {Bug::kSharedOverrun, nullptr, "shared write out of bounds"},
      {Bug::kDivergentBarrier, "divergent __syncthreads", "divergent __syncthreads"},
      {Bug::kMissingLanes, "simt_test.cpp", "simt_test.cpp"},
      {Bug::kExitedLanes, "return", "return"},
      {Bug::kDivergentWarp, "divergent warp", "divergent warp"},
      {Bug::kGlobalOverrun, "access outside global buffer out, at byte 16",
       "access outside global buffer out, at byte 16"},
      {Bug::kMisaligned, "an access of 16 bytes is not aligned", "an access of 16 bytes is not aligned"},
      {Bug::kBlocksOverlap, nullptr, "two blocks write one element of out"},
      {Bug::kOverlappingMasks, "overlaps the mask", "overlaps the mask"},
  };
  for (const auto& [bug, plain, checked] : all) {
    const char* expected = simt::checks_races() ? checked : plain;
    SumCase sum_case;
    const std::string message = sum_case.run(bug);
    if (expected)
      expect(message.find(expected) != std::string::npos, "planted bug " + std::to_string(int(bug)) +
                                                              ": must report \"" + expected + "\", got \"" +
                                                              message + "\"");
  }
}

void test_uninitialised_shared_memory() {
  const std::string message = error_of([] {
    float* out = static_cast<float*>(simt::alloc_global(sizeof(float), "out"));
    launch("read_uninitialised", read_uninitialised_kernel, {dim3(1), dim3(32)}, nullptr, out);
    expect(std::isnan(out[0]), "uninitialised shared memory is poisoned");
    simt::free_global(out);
  });
  if (simt::checks_races())
    expect(message.find("read of uninitialised shared memory") != std::string::npos,
           "uninitialised: " + message);
  else
    expect(message.empty(), "uninitialised: " + message);
}

// Even without race detection, a missing barrier must give wrong sums in some order of threads.
void test_orders_expose_a_missing_barrier() {
  int wrong = 0;
  for (auto order : {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom}) {
    simt::schedule().order = order;
    SumCase sum_case;
    const std::string message = sum_case.run(Bug::kNoBarrier);
    wrong += !message.empty() || !sum_case.right();
  }
  expect(wrong > 0, "one of three orders must expose a missing barrier");
}

void test_correct_kernel() {
  for (uint64_t seed = 1; seed <= 5; ++seed)
    for (auto order : {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom}) {
      simt::schedule() = {order, seed};
      SumCase sum_case;
      const std::string message = sum_case.run(Bug::kNone);
      expect(message.empty() && sum_case.right(), "kernel without bugs: " + message);
    }
}

void test_livelock() {
  float* out = static_cast<float*>(simt::alloc_global(32 * sizeof(float), "out"));
  simt::schedule().timeout = 0.2;
  const std::string message =
      error_of([&] { launch("spin", spin_kernel, {dim3(1), dim3(64)}, nullptr, out); });
  expect(message.find("livelock") != std::string::npos, "a spinning warp: " + message);
  simt::schedule().timeout = simt::Schedule{}.timeout;
  simt::free_global(out);
}

void test_conversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const __nv_bfloat16 b{uint16_t(bits)};
    const __half h{uint16_t(bits)};
    if (!std::isnan(__bfloat162float(b)))
      expect(__float2bfloat16_rn(__bfloat162float(b)).bits == bits, "bfloat16 round trip");
    if (!std::isnan(__half2float(h)))
      expect(__float2half_rn(__half2float(h)).bits == bits, "float16 round trip");
  }
  expect(__bfloat162float(__float2bfloat16_rn(1 + 3.0f / 256)) == 1 + 4.0f / 256,
         "bfloat16 rounds ties to even");
}

}  // namespace

int main() {
  for (auto order : {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom}) {
    simt::schedule().order = order;
    test_planted_bugs();
    test_uninitialised_shared_memory();
  }
  test_orders_expose_a_missing_barrier();
  test_correct_kernel();
  test_livelock();
  test_conversions();
  std::printf("%s: %d failures\n", simt::checks_races() ? "checked" : "plain", failures);
  return failures != 0;
}
