// csrc/common/hopper.cuh on the emulator: hopper_gemm.cuh with all kinds of operands must be correct under
// every schedule of threads and asynchronous operations, and every planted bug must be caught.

#include <cstdio>
#include <random>
#include <string>

#include "hopper_gemm.cuh"

namespace {

using hopper_gemm::Bug;
using hopper_gemm::kM;
using hopper_gemm::kN;
using hopper_gemm::Operands;

constexpr int kDepth = 5 * 64 + 24, kValidRows = 50;

int failures = 0;

void expect(bool right, const std::string& what) {
  if (!right) ++failures, std::printf("FAILED: %s\n", what.c_str());
}

template <class T>
struct Buffer {
  T* data;
  Buffer(size_t count, const char* name)
      : data(static_cast<T*>(simt::alloc_global(count * sizeof(T), name))) {}
  ~Buffer() { simt::free_global(data); }
};

struct Outcome {
  bool right = true;    // the results
  std::string message;  // of the emulator's error, or empty
};

// Inputs are small integers, whose sums are exact.
template <class T, Operands kOperands, Bug kBug = Bug::kNone>
Outcome run() {
  std::mt19937 generator(7);
  Buffer<T> a(kM * kDepth, "a"), b(kN * kDepth, "b"), c(kValidRows * kN, "c");
  for (int i = 0; i < kM * kDepth; ++i) statecore::set(a.data[i], float(int(generator() % 5) - 2));
  for (int i = 0; i < kN * kDepth; ++i) statecore::set(b.data[i], float(int(generator() % 5) - 2));
  Outcome outcome;
  try {
    hopper_gemm::run<T, kOperands, kBug>(a.data, b.data, c.data, kDepth, kValidRows, nullptr);
  } catch (const simt::Error& error) {
    outcome.message = error.what();
  }
  for (int m = 0; m < kValidRows; ++m)
    for (int n = 0; n < kN; ++n) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k)
        sum += statecore::to_float(a.data[hopper_gemm::kAMnMajor<kOperands> ? k * kM + m : m * kDepth + k]) *
               statecore::to_float(b.data[hopper_gemm::kBMnMajor<kOperands> ? k * kN + n : n * kDepth + k]);
      T rounded;
      statecore::set(rounded, sum);
      outcome.right &= c.data[m * kN + n].bits == rounded.bits;
    }
  return outcome;
}

// f() for every order of threads and timing of asynchronous operations.
template <class F>
void in_all_schedules(const F& f) {
  for (auto order : {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom})
    for (auto async : {simt::Async::kLate, simt::Async::kEarly, simt::Async::kRandom}) {
      simt::schedule() = {order, 3, async};
      f(" (order " + std::to_string(int(order)) + ", async " + std::to_string(int(async)) + ")");
    }
}

template <class T, Operands kOperands>
void test_product(const char* name) {
  in_all_schedules([&](const std::string& schedule) {
    const Outcome outcome = run<T, kOperands>();
    expect(outcome.message.empty() && outcome.right, name + schedule + ": " + outcome.message);
  });
}

// How a bug must be caught in the plain and the checked build: by which message, and in at least how many of
// the nine schedules.
struct Expected {
  const char *plain, *checked;  // part of the message; null: any message or wrong results
  int plain_times = 9, checked_times = 9;
};

template <Operands kOperands, Bug kBug>
void test_bug(const char* name, const Expected& expected) {
  const char* expected_message = simt::checks_races() ? expected.checked : expected.plain;
  int times = 0;
  std::string others;
  in_all_schedules([&](const std::string& schedule) {
    const Outcome outcome = run<__half, kOperands, kBug>();
    const bool caught = expected_message ? outcome.message.find(expected_message) != std::string::npos
                                         : !outcome.right || !outcome.message.empty();
    times += caught;
    if (!caught) others += "\n  " + schedule + (outcome.right ? " right " : " wrong ") + outcome.message;
  });
  const int expected_times = simt::checks_races() ? expected.checked_times : expected.plain_times;
  expect(times >= expected_times, std::string("planted bug ") + name + ": must be reported in " +
                                      std::to_string(expected_times) + " schedules, but was in " +
                                      std::to_string(times) + others);
}

void test_planted_bugs() {
  test_bug<Operands::kKMajor, Bug::kNoInitBarrier>("kNoInitBarrier", {"never initialised", nullptr, 6});
  test_bug<Operands::kKMajor, Bug::kNoInitFence>("kNoInitFence", {"without a fence", "without a fence"});
  test_bug<Operands::kKMajor, Bug::kIgnoreEmpty>("kIgnoreEmpty", {nullptr, nullptr});
  test_bug<Operands::kKMajor, Bug::kEarlyRelease>("kEarlyRelease", {nullptr, nullptr, 6});
  test_bug<Operands::kKMajor, Bug::kNoRelease>("kNoRelease", {"deadlock", "deadlock"});
  test_bug<Operands::kAStored, Bug::kNoProxyFence>("kNoProxyFence", {nullptr, "no fence_proxy_async", 0});
  test_bug<Operands::kKMajor, Bug::kFewBytes>("kFewBytes", {nullptr, nullptr});
  test_bug<Operands::kKMajor, Bug::kManyBytes>("kManyBytes", {"and 16 bytes", "and 16 bytes"});
  test_bug<Operands::kKMajor, Bug::kTwoArrivals>("kTwoArrivals", {nullptr, nullptr});
  test_bug<Operands::kKMajor, Bug::kUnusedLoad>("kUnusedLoad", {"on their way", "on their way", 1, 1});
  test_bug<Operands::kKMajor, Bug::kWrongStride>("kWrongStride", {nullptr, nullptr});
  test_bug<Operands::kKMajor, Bug::kWrongMajor>("kWrongMajor", {nullptr, nullptr});
  test_bug<Operands::kKMajor, Bug::kEarlyRead>("kEarlyRead", {nullptr, nullptr});
  test_bug<Operands::kKMajor, Bug::kNoWgmmaFence>("kNoWgmmaFence", {"no wgmma_fence", "no wgmma_fence"});
  test_bug<Operands::kKMajor, Bug::kOneWarpMissing>("kOneWarpMissing",
                                                    {"different numbers", "different numbers"});
  test_bug<Operands::kKMajor, Bug::kEarlyStore>("kEarlyStore", {nullptr, "race", 0});
  test_bug<Operands::kKMajor, Bug::kNoStoreFence>("kNoStoreFence", {nullptr, "no fence_proxy_async", 0});
  test_bug<Operands::kKMajor, Bug::kEarlyOverwrite>("kEarlyOverwrite", {nullptr, "race", 3});
  test_bug<Operands::kKMajor, Bug::kNoStoreWait>("kNoStoreWait", {"bulk_wait_read", "bulk_wait_read"});
}

}  // namespace

int main() {
  test_product<__half, Operands::kKMajor>("K-major");
  test_product<__half, Operands::kMnMajor>("MN-major");
  test_product<__half, Operands::kARegisters>("a in registers");
  test_product<__nv_bfloat16, Operands::kKMajor>("K-major, bfloat16");
  test_product<__half, Operands::kAStored>("a stored by threads");
  test_planted_bugs();
  std::printf("%s: %d failures\n", simt::checks_races() ? "checked" : "plain", failures);
  return failures != 0;
}
