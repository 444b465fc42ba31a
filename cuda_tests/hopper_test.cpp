// csrc/common/hopper.cuh on the emulator: the product of hopper_gemm.cuh in all its ways, whatever the order
// of threads and the delay of asynchronous work; and each planted bug, which must be found.

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
  bool right = true;
  std::string found;
};

// Small integers, whose sums are exact.
template <class T, Operands kOperands, Bug kBug = Bug::kNone>
Outcome run() {
  constexpr bool kAMnMajor = kOperands == Operands::kMnMajor;
  constexpr bool kBMnMajor = kAMnMajor || kOperands == Operands::kARegisters;
  std::mt19937 generator(7);
  Buffer<T> a(kM * kDepth, "a"), b(kN * kDepth, "b"), c(kValidRows * kN, "c");
  for (int i = 0; i < kM * kDepth; ++i) statecore::set(a.data[i], float(int(generator() % 5) - 2));
  for (int i = 0; i < kN * kDepth; ++i) statecore::set(b.data[i], float(int(generator() % 5) - 2));
  Outcome outcome;
  try {
    hopper_gemm::run<T, kOperands, kBug>(a.data, b.data, c.data, kDepth, kValidRows, nullptr);
  } catch (const simt::Error& error) {
    outcome.found = error.what();
  }
  for (int m = 0; m < kValidRows; ++m)
    for (int n = 0; n < kN; ++n) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k)
        sum += statecore::to_float(a.data[kAMnMajor ? k * kM + m : m * kDepth + k]) *
               statecore::to_float(b.data[kBMnMajor ? k * kN + n : n * kDepth + k]);
      T rounded;
      statecore::set(rounded, sum);
      outcome.right &= c.data[m * kN + n].bits == rounded.bits;
    }
  return outcome;
}

// f() for every order of threads and every delay.
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
    expect(outcome.found.empty() && outcome.right, name + schedule + ": " + outcome.found);
  });
}

// How a bug shows: in this many of the nine schedules by its message or, without one, by a wrong result.
struct Expected {
  const char *plain, *checked;  // part of the message; null: anything
  int plain_times = 9, checked_times = 9;
};

template <Operands kOperands, Bug kBug>
void test_bug(const char* name, const Expected& expected) {
  const char* message = simt::checks_races() ? expected.checked : expected.plain;
  int times = 0;
  std::string others;
  in_all_schedules([&](const std::string& schedule) {
    const Outcome outcome = run<__half, kOperands, kBug>();
    const bool caught =
        message ? outcome.found.find(message) != std::string::npos : !outcome.right || !outcome.found.empty();
    times += caught;
    if (!caught) others += "\n  " + schedule + (outcome.right ? " right " : " wrong ") + outcome.found;
  });
  const int wanted = simt::checks_races() ? expected.checked_times : expected.plain_times;
  expect(times >= wanted, std::string(name) + ": caught " + std::to_string(times) + " times of " +
                              std::to_string(wanted) + others);
}

void test_bugs() {
  test_bug<Operands::kKMajor, Bug::kNoInitBarrier>("kNoInitBarrier", {"never initialised", nullptr, 6});
  test_bug<Operands::kKMajor, Bug::kNoInitFence>("kNoInitFence", {"without a fence", "without a fence"});
  test_bug<Operands::kKMajor, Bug::kIgnoreEmpty>("kIgnoreEmpty", {nullptr, nullptr});
  test_bug<Operands::kKMajor, Bug::kEarlyRelease>("kEarlyRelease", {nullptr, nullptr, 6});
  test_bug<Operands::kKMajor, Bug::kLateRelease>("kLateRelease", {"deadlock", "deadlock"});
  test_bug<Operands::kAStored, Bug::kNoProxyFence>("kNoProxyFence", {nullptr, "no fence_proxy_async", 0});
  test_bug<Operands::kKMajor, Bug::kFewBytes>("kFewBytes", {nullptr, nullptr});
  test_bug<Operands::kKMajor, Bug::kManyBytes>("kManyBytes", {"and 16 bytes", "and 16 bytes"});
  test_bug<Operands::kKMajor, Bug::kTwoArrivals>("kTwoArrivals", {nullptr, nullptr});
  test_bug<Operands::kKMajor, Bug::kUnusedLoad>("kUnusedLoad", {"on their way", "on their way", 1, 1});
  test_bug<Operands::kKMajor, Bug::kWrongStride>("kWrongStride", {nullptr, nullptr});
  test_bug<Operands::kKMajor, Bug::kWrongMajor>("kWrongMajor", {nullptr, nullptr});
  test_bug<Operands::kKMajor, Bug::kTouchedSums>("kTouchedSums", {nullptr, nullptr});
  test_bug<Operands::kKMajor, Bug::kNoProductFence>("kNoProductFence", {"no wgmma_fence", "no wgmma_fence"});
  test_bug<Operands::kKMajor, Bug::kOneWarpMissing>("kOneWarpMissing",
                                                    {"different numbers", "different numbers"});
  test_bug<Operands::kKMajor, Bug::kEarlyStore>("kEarlyStore", {nullptr, "race", 0});
  test_bug<Operands::kKMajor, Bug::kNoStoreFence>("kNoStoreFence", {nullptr, "no fence_proxy_async", 0});
  test_bug<Operands::kKMajor, Bug::kEarlyOverwrite>("kEarlyOverwrite", {nullptr, "race", 3});
  test_bug<Operands::kKMajor, Bug::kStoreNotWaited>("kStoreNotWaited", {"bulk_wait_read", "bulk_wait_read"});
}

}  // namespace

int main() {
  test_product<__half, Operands::kKMajor>("K-major");
  test_product<__half, Operands::kMnMajor>("MN-major");
  test_product<__half, Operands::kARegisters>("a in registers");
  test_product<__nv_bfloat16, Operands::kKMajor>("K-major, bfloat16");
  test_product<__half, Operands::kAStored>("a stored by threads");
  test_bugs();
  std::printf("%s: %d failures\n", simt::checks_races() ? "checked" : "plain", failures);
  return failures != 0;
}
