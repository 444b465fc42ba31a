// The emulator itself: kernels with one planted bug each must be caught, and named, in every order of
// threads; the same kernels without it must run. Compiled twice: the plain emulator, and the one that checks
// accesses.

#include <cstdio>
#include <string>
#include <vector>

#include "common/cuda.cuh"

namespace {

using statecore::launch;
constexpr int kThreads = 96;  // three warps

// The sum over a block of what its threads bring, one bug at a time.
enum class Bug {
  kNone,
  kNoBarrier,         // sums are read before all warps have written theirs
  kNoSecondBarrier,   // ... and overwritten before all warps have read them
  kUnset,             // one sum too many is read
  kSharedOverrun,     // one sum too many is written
  kDivergentBarrier,  // some threads wait at another barrier
  kMissingLanes,      // half a warp shuffles in the name of all
  kLanesGone,         // ... the other half has returned
  kDivergentWarp,     // lanes meet in two places
  kGlobalOverrun,     // one element behind the result
  kMisaligned,        // a 16-byte store to an odd element
  kBlocksOverlap,     // two blocks write one result
  kBarrierForSome,    // a barrier that most threads never reach, and never return from
};

__global__ void sum(const float* in, float* out, Bug bug) {
  STATECORE_SHARED(float, sums, kThreads / 32);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  for (int round = 0; round < 2; ++round) {
    float x = in[(blockIdx.x * 2 + round) * kThreads + thread];
    if (bug == Bug::kMissingLanes && lane >= 16)
      x = 0;
    else if (bug == Bug::kLanesGone && lane >= 16 && warp == 1)
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
    if (bug == Bug::kBarrierForSome) {
      if (warp > 0)
        __syncthreads();
      else
        x += __shfl_xor_sync(lane == 3 ? 0x8u : 0xffffffffu, x, 0);
    }
    if (lane == 0) sums[warp + (bug == Bug::kSharedOverrun)] = x;
    if (bug == Bug::kDivergentBarrier && warp == 1)
      __syncthreads();
    else if (bug != Bug::kNoBarrier)
      __syncthreads();
    float total = 0;
    for (int i = 0; i < kThreads / 32 + (bug == Bug::kUnset); ++i) total += sums[i];
    if (bug != Bug::kNoSecondBarrier) __syncthreads();
    const int result = (bug == Bug::kBlocksOverlap ? 0 : 2 * blockIdx.x) + round;
    if (thread == 0) out[result + (bug == Bug::kGlobalOverrun ? 4 : 0)] = total;
    if (thread == 0 && bug == Bug::kMisaligned)
      __stcs(reinterpret_cast<float4*>(out + 1), make_float4(0, 0, 0, 0));
  }
}

// Shared memory that was never written, inside its array.
__global__ void read_unset(float* out) {
  STATECORE_SHARED(float, x, 4);
  if (threadIdx.x == 0) x[0] = 1;
  __syncthreads();
  out[0] = x[0] + x[1];
}

// A warp spins until another one has written.
__global__ void spin(float* out) {
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

// Runs it, and returns what was found.
template <class Run>
std::string found(const Run& run) {
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
    return found([&] { launch("sum", sum, {dim3(kBlocks), dim3(kThreads)}, nullptr, in, out, bug); });
  }
  bool right() const {
    for (unsigned i = 0; i < kBlocks * 2; ++i)
      if (out[i] != float(kThreads * kThreads) * i + kThreads * (kThreads - 1) / 2.0f) return false;
    return true;
  }
};

struct Planted {
  Bug bug;
  const char *plain, *checked;  // part of the message; null: not always found in the plain build
};

void test_planted_bugs() {
  const std::vector<Planted> all{
      {Bug::kNoBarrier, nullptr, "read of uninitialised shared memory"},
      {Bug::kNoSecondBarrier, nullptr, "race: write not ordered after a read"},
      {Bug::kUnset, nullptr, "shared read out of bounds"},
      {Bug::kSharedOverrun, nullptr, "shared write out of bounds"},
      {Bug::kDivergentBarrier, "divergent __syncthreads", "divergent __syncthreads"},
      {Bug::kMissingLanes, "simt_test.cpp", "simt_test.cpp"},
      {Bug::kLanesGone, "return", "return"},
      {Bug::kDivergentWarp, "divergent warp", "divergent warp"},
      {Bug::kGlobalOverrun, "access outside global buffer out, at byte 16",
       "access outside global buffer out, at byte 16"},
      {Bug::kMisaligned, "an access of 16 bytes is not aligned", "an access of 16 bytes is not aligned"},
      {Bug::kBlocksOverlap, nullptr, "two blocks write one element of out"},
      {Bug::kBarrierForSome, "overlaps the mask", "overlaps the mask"},
  };
  for (const auto& [bug, plain, checked] : all) {
    const char* wanted = simt::checks_races() ? checked : plain;
    SumCase sum_case;
    const std::string message = sum_case.run(bug);
    if (wanted)
      expect(message.find(wanted) != std::string::npos,
             "bug " + std::to_string(int(bug)) + " should be \"" + wanted + "\", got \"" + message + "\"");
  }
  const std::string message = found([] {
    float* out = static_cast<float*>(simt::alloc_global(sizeof(float), "out"));
    launch("read_unset", read_unset, {dim3(1), dim3(32)}, nullptr, out);
    expect(std::isnan(out[0]), "unset shared memory is NaN");
    simt::free_global(out);
  });
  if (simt::checks_races())
    expect(message.find("read of uninitialised shared memory") != std::string::npos, "unset: " + message);
  else
    expect(message.empty(), "unset: " + message);
}

// A missing barrier gives different sums in different orders even where accesses are not looked at.
void test_orders_show_a_missing_barrier() {
  int wrong = 0;
  for (auto order : {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom}) {
    simt::schedule().order = order;
    SumCase sum_case;
    const std::string message = sum_case.run(Bug::kNoBarrier);
    wrong += !message.empty() || !sum_case.right();
  }
  expect(wrong > 0, "a missing barrier shows in one of three orders");
}

void test_correct_kernel() {
  for (uint64_t seed = 1; seed <= 5; ++seed)
    for (auto order : {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom}) {
      simt::schedule() = {order, seed};
      SumCase sum_case;
      const std::string message = sum_case.run(Bug::kNone);
      expect(message.empty() && sum_case.right(), "the correct kernel: " + message);
    }
}

void test_livelock() {
  float* out = static_cast<float*>(simt::alloc_global(32 * sizeof(float), "out"));
  simt::schedule().timeout = 0.2;
  const std::string message = found([&] { launch("spin", spin, {dim3(1), dim3(64)}, nullptr, out); });
  expect(message.find("livelock") != std::string::npos, "a warp that spins: " + message);
  simt::schedule().timeout = simt::Schedule{}.timeout;
  simt::free_global(out);
}

void test_conversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const __nv_bfloat16 b{uint16_t(bits)};
    const __half h{uint16_t(bits)};
    if (!std::isnan(__bfloat162float(b)))
      expect(__float2bfloat16_rn(__bfloat162float(b)).bits == bits, "bfloat16 there and back");
    if (!std::isnan(__half2float(h)))
      expect(__float2half_rn(__half2float(h)).bits == bits, "float16 there and back");
  }
  expect(__bfloat162float(__float2bfloat16_rn(1 + 3.0f / 256)) == 1 + 4.0f / 256, "bfloat16 ties go to even");
}

}  // namespace

int main() {
  for (auto order : {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom}) {
    simt::schedule().order = order;
    test_planted_bugs();
  }
  test_orders_show_a_missing_barrier();
  test_correct_kernel();
  test_livelock();
  test_conversions();
  std::printf("%s: %d failures\n", simt::checks_races() ? "checked" : "plain", failures);
  return failures != 0;
}
