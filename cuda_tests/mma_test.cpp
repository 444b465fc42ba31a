// csrc/common/mma.cuh on the emulator: products of operands from every source and in every element type
// against float64, and the asynchronous copies that fill tiles.

#include "common/mma.cuh"

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

namespace {

using statecore::launch;
using statecore::to_float;

constexpr int kM = 16, kN = 16, kK = 64;  // of the product; tiles are 64 wide
constexpr int kThreads = 32;

enum class Source { kTile, kTransposedTile, kAccumulators, kSplitAccumulators, kScaled, kParts };
enum class Bug {
  kNone,
  kNoWait,         // one of two cp.async groups is not waited for
  kNoBarrier,      // no barrier after waiting, for the copies of other lanes
  kEarlyRefill,    // a tile is refilled before it has been read
  kWrongLayout,    // b is loaded as if it were transposed
  kDivergentWarp,  // only half of the warp loads an operand
};

__device__ float scale_of(int k) { return 1.0f / float(3 + k); }

template <class T>
struct Problem {
  const T *a, *b;  // [kM, kK] and [kK, kN], each in the layout that `source` and `b_transposed` imply
  const float* c;  // [kM, kK] float32, for the sources that start from float32 values
  float* d;        // [kM, kN]
  Source source;
  bool b_transposed;
  int valid_rows, valid_width;  // of the tile that holds a
  Bug bug;

  __device__ bool a_transposed() const { return source == Source::kTransposedTile; }
  __device__ bool uses_accumulators() const {
    return source == Source::kAccumulators || source == Source::kSplitAccumulators;
  }
};

template <class T>
using Tile = statecore::Tile<T, kK>;

template <class T>
__device__ void load_tiles(const Problem<T>& p, unsigned char* a_tile, unsigned char* b_tile) {
  using namespace statecore;
  load_tile<T, kK, kK, kThreads>(a_tile, p.a, p.a_transposed() ? kM : kK, p.valid_rows, p.valid_width);
  cp_async_commit();
  load_tile<T, kK, kK, kThreads>(b_tile, p.b, p.b_transposed ? kN : kK, p.b_transposed ? kK : kN,
                                 p.b_transposed ? kN : kK);
  cp_async_commit();
  if (p.bug == Bug::kNoWait)
    cp_async_wait<1>();
  else
    cp_async_wait<0>();
  if (p.bug != Bug::kNoBarrier) __syncthreads();
  if (p.bug == Bug::kEarlyRefill) {
    load_tile<T, kK, kK, kThreads>(a_tile, p.a, kK, 0, 0);
    cp_async_commit();
  }
}

// Stores c in both parts, as operand b of a c^T.
template <class T>
__device__ void store_c_parts(const Problem<T>& p, unsigned char* parts) {
  using namespace statecore;
  for (int n = 0; n < kK; n += 8)
    for (int i = 0; i < 4; i += 2) {
      const int row = accumulator_row(i), column = n + accumulator_column(i);
      store_parts(::Tile<T>{}, parts, ::Tile<T>::bytes(kM), row, column, p.c[row * kK + column],
                  p.c[row * kK + column + 1]);
    }
  __syncthreads();
}

template <class T>
__device__ void load_b(const Problem<T>& p, const unsigned char* b_tile, int k,
                       statecore::OperandB<T> (&b)[2]) {
  using statecore::load_operand;
  if (p.bug == Bug::kDivergentWarp && threadIdx.x >= 16)
    __syncwarp();
  else if (p.b_transposed || p.bug == Bug::kWrongLayout)
    load_operand<true>(b, Tile<T>{}, b_tile, k, 0);
  else
    load_operand<false>(b, Tile<T>{}, b_tile, 0, k);
}

// The operand from the source under test, as `a` or, with more precision, as `split`.
template <class T>
__device__ void load_a(const Problem<T>& p, const unsigned char* a_tile, int k, statecore::OperandA<T>& a,
                       statecore::SplitA<T>& split) {
  using namespace statecore;
  if (p.uses_accumulators()) {
    float tiles[kMmaK<T> / 8][4];
    for (int n = 0; n < kMmaK<T> / 8; ++n)
      for (int i = 0; i < 4; ++i)
        tiles[n][i] = p.c[accumulator_row(i) * kK + k + 8 * n + accumulator_column(i)];
    pack_accumulators<T>(a, tiles);
    pack_accumulators<T>(split, tiles);
  } else if (p.a_transposed()) {
    load_operand<true>(a, ::Tile<T>{}, a_tile, k, 0);
  } else {
    load_operand<false>(a, ::Tile<T>{}, a_tile, 0, k);
  }
  if (p.source == Source::kScaled) split = scale_columns(a, [&](int i) { return scale_of(k + i); });
}

template <class T>
__global__ void multiply_kernel(Problem<T> p) {
  using namespace statecore;
  using Tile = ::Tile<T>;
  STATECORE_DYNAMIC_SHARED(shared);
  unsigned char *a_tile = shared, *b_tile = a_tile + Tile::bytes(kK), *parts = b_tile + Tile::bytes(kK);
  load_tiles(p, a_tile, b_tile);
  if (p.source == Source::kParts) store_c_parts(p, parts);

  float d[2][4] = {};
  for (int k = 0; k < kK; k += kMmaK<T>) {
    OperandB<T> b[2];
    OperandA<T> a;
    SplitA<T> split;
    load_b(p, b_tile, k, b);
    load_a(p, a_tile, k, a, split);
    if (p.source == Source::kParts) {
      for (int part = 0; part < kParts<T>; ++part) {
        OperandB<T> c[2];
        load_operand<false>(c, Tile{}, parts + part * Tile::bytes(kM), 0, k);
        for (int n = 0; n < 2; ++n) mma(d[n], a, c[n]);
      }
      continue;
    }
    const bool precise = p.source == Source::kSplitAccumulators || p.source == Source::kScaled;
    for (int n = 0; n < 2; ++n) {
      if (precise)
        mma(d[n], split, b[n]);
      else
        mma(d[n], a, b[n]);
    }
  }
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i) p.d[accumulator_row(i) * kN + 8 * n + accumulator_column(i)] = d[n][i];
}

int failures = 0;

void expect(bool right, const std::string& what) {
  if (!right) ++failures, std::printf("FAILED: %s\n", what.c_str());
}

template <class T>
T* alloc(size_t count, const char* name) {
  return static_cast<T*>(simt::alloc_global(count * sizeof(T), name));
}

// The product in float64, element (m, n).
template <class T>
double expected(const Problem<T>& p, int m, int n) {
  double sum = 0;
  for (int k = 0; k < kK; ++k) {
    const float left = to_float(p.a_transposed() ? p.a[k * kM + m] : p.a[m * kK + k]);
    const float right = to_float(p.b_transposed ? p.b[k * kN + n] : p.b[n * kK + k]);
    switch (p.source) {
      case Source::kTile:
      case Source::kTransposedTile: sum += double(left) * right; break;
      case Source::kAccumulators:
      case Source::kSplitAccumulators: sum += double(p.c[m * kK + k]) * right; break;
      case Source::kScaled: sum += double(left) * right / (3 + k); break;
      case Source::kParts: sum += double(left) * p.c[n * kK + k]; break;
    }
  }
  return sum;
}

struct Outcome {
  double error = 0;     // relative
  std::string message;  // of the emulator's error, or empty
};

template <class T>
Outcome run(Source source, bool b_transposed, Bug bug) {
  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  T *a = alloc<T>(kK * kK, "a"), *b = alloc<T>(kK * kN, "b");
  float *c = alloc<float>(kM * kK, "c"), *d = alloc<float>(kM * kN, "d");
  for (int i = 0; i < kM * kK; ++i) statecore::set(a[i], normal(generator)), c[i] = normal(generator);
  for (int i = 0; i < kK * kN; ++i) statecore::set(b[i], normal(generator));
  const bool a_transposed = source == Source::kTransposedTile;
  const Problem<T> p{a, b, c, d, source, b_transposed, a_transposed ? kK : kM, a_transposed ? kM : kK, bug};
  Outcome outcome;
  try {
    launch("multiply", multiply_kernel<T>, {dim3(1), dim3(kThreads), size_t(Tile<T>::bytes(2 * kK + 2 * kM))},
           nullptr, p);
  } catch (const simt::Error& error) {
    outcome.message = error.what();
  }
  double largest = 0;
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) {
      const double wanted = expected(p, m, n), difference = std::abs(d[m * kN + n] - wanted);
      outcome.error = std::isnan(difference) ? INFINITY : std::max(outcome.error, difference);
      largest = std::max(largest, std::abs(wanted));
    }
  outcome.error /= largest;
  for (void* buffer :
       {static_cast<void*>(a), static_cast<void*>(b), static_cast<void*>(c), static_cast<void*>(d)})
    simt::free_global(buffer);
  return outcome;
}

template <class T>
void test_products(const char* type) {
  for (Source source : {Source::kTile, Source::kTransposedTile, Source::kAccumulators,
                        Source::kSplitAccumulators, Source::kScaled, Source::kParts})
    for (bool b_transposed : {false, true}) {
      const Outcome outcome = run<T>(source, b_transposed, Bug::kNone);
      const double tolerance = source == Source::kAccumulators && sizeof(T) == 2        ? 4e-3
                               : source >= Source::kSplitAccumulators && sizeof(T) == 2 ? 2e-5
                                                                                        : 1e-6;
      expect(outcome.message.empty() && outcome.error < tolerance,
             std::string(type) + ", source " + std::to_string(int(source)) + ", error " +
                 std::to_string(outcome.error) + " " + outcome.message);
    }
}

void test_planted_bugs() {
  for (simt::Async async : {simt::Async::kLate, simt::Async::kEarly, simt::Async::kRandom}) {
    simt::schedule().async = async;
    const auto run_with = [](Bug bug) { return run<__nv_bfloat16>(Source::kTile, false, bug); };
    for (Bug bug : {Bug::kNoWait, Bug::kNoBarrier, Bug::kEarlyRefill}) {
      const Outcome outcome = run_with(bug);
      const std::string name = "planted bug " + std::to_string(int(bug)) + ": " + outcome.message;
      if (simt::checks_races())
        expect(
            outcome.message.find(bug == Bug::kNoBarrier ? "race" : "an asynchronous copy is still writing") !=
                std::string::npos,
            name);
      else if (bug == Bug::kNoWait ? async == simt::Async::kLate
                                   : bug == Bug::kEarlyRefill && async == simt::Async::kEarly)
        expect(outcome.error > 0.1, name);
    }
    expect(run_with(Bug::kWrongLayout).error > 0.1,
           "an operand loaded in the wrong layout gives wrong results");
    const std::string message = run_with(Bug::kDivergentWarp).message;
    expect(message.find("divergent warp") != std::string::npos, "divergent warp: " + message);
  }
  simt::schedule().async = simt::Async::kLate;
}

// ---- named barriers: warps 1 and 2 produce numbers, and warp 0 waits for them

enum class HandOver { kCorrect, kWrongCount, kNoWait, kMissingArrival };

__global__ void hand_over_kernel(float* out, HandOver variant) {
  using namespace statecore;
  STATECORE_SHARED(float, numbers, 96);
  const int thread = threadIdx.x;
  if (thread >= 32) {
    numbers[thread] = float(thread);
    if (variant != HandOver::kMissingArrival || thread < 64) named_barrier_arrive(1, 96);
    return;
  }
  if (variant == HandOver::kNoWait)
    named_barrier_arrive(1, 96);
  else
    named_barrier_sync(1, variant == HandOver::kWrongCount ? 64 : 96);
  out[thread] = numbers[thread + 32] + numbers[thread + 64];
}

void test_hand_over(HandOver variant) {
  float* out = alloc<float>(32, "out");
  std::string message;
  try {
    launch("hand_over", hand_over_kernel, {dim3(1), dim3(96)}, nullptr, out, variant);
  } catch (const simt::Error& error) {
    message = error.what();
  }
  const bool right = out[5] == 37 + 69;
  const auto reports = [&](const char* text) { return message.find(text) != std::string::npos; };
  switch (variant) {
    case HandOver::kCorrect: expect(right && message.empty(), "named barrier: " + message); break;
    case HandOver::kWrongCount: expect(reports("is waited at by"), "wrong thread count: " + message); break;
    case HandOver::kMissingArrival: expect(reports("deadlock"), "missing arrival: " + message); break;
    case HandOver::kNoWait:
      if (simt::checks_races())
        expect(reports("race") || reports("uninitialised"), "no wait at a named barrier: " + message);
      else if (simt::schedule().order == simt::Order::kForward)  // in other orders warp 0 may run late enough
        expect(!right, "no wait at a named barrier gives wrong results");
  }
  simt::free_global(out);
}

void test_named_barriers() {
  for (auto order : {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom}) {
    simt::schedule().order = order;
    for (HandOver variant :
         {HandOver::kCorrect, HandOver::kWrongCount, HandOver::kNoWait, HandOver::kMissingArrival})
      test_hand_over(variant);
  }
  simt::schedule().order = simt::Order::kForward;
}

// ---- bank conflicts of ldmatrix

// Unswizzled rows of 128 bytes: the same column of eight rows is in the same banks.
__global__ void load_unswizzled_kernel(uint32_t* out) {
  using namespace statecore;
  STATECORE_SHARED(uint32_t, tile, 32 * 32);
  for (int i = 0; i < 32; ++i) tile[i * 32 + threadIdx.x] = 0;
  __syncthreads();
  uint32_t r[4];
  ldmatrix<false>(r, shared_address(tile) + threadIdx.x * 128);
  out[threadIdx.x] = r[0];
}

void test_bank_conflicts() {
  uint32_t* out = alloc<uint32_t>(32, "out");
  simt::take_counters();
  launch("load_unswizzled", load_unswizzled_kernel, {dim3(1), dim3(32)}, nullptr, out);
  const simt::Counters counters = simt::take_counters();
  expect(counters.ldmatrix == 4 && counters.ldmatrix_conflicts == 4 * 7,
         "unswizzled tiles have bank conflicts");
  simt::free_global(out);
}

void test_no_bank_conflicts() {
  simt::take_counters();
  run<__nv_bfloat16>(Source::kTransposedTile, true, Bug::kNone);
  const simt::Counters counters = simt::take_counters();
  expect(counters.ldmatrix > 0 && counters.ldmatrix_conflicts == 0, "swizzled tiles have no bank conflicts");
}

}  // namespace

int main() {
  for (auto order : {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom})
    for (auto async : {simt::Async::kLate, simt::Async::kEarly, simt::Async::kRandom}) {
      simt::schedule() = {order, 3, async};
      test_products<__nv_bfloat16>("bfloat16");
      test_products<__half>("float16");
      test_products<float>("float32");
    }
  test_planted_bugs();
  test_named_barriers();
  test_no_bank_conflicts();
  test_bank_conflicts();
  std::printf("%s: %d failures\n", simt::checks_races() ? "checked" : "plain", failures);
  return failures != 0;
}
