// csrc/common/mma.cuh on the emulator: products of operands from every source, in the three element types,
// against sums in float64; and the asynchronous copies that fill tiles.

#include "common/mma.cuh"

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

namespace {

using statecore::launch;
using statecore::to_float;

constexpr int kM = 16, kN = 16, kK = 64;  // of the product; rows of tiles have 64 elements
constexpr int kThreads = 32;

enum class Source { kTile, kTransposedTile, kAccumulators, kSplitAccumulators, kScaled, kParts };
enum class Bug {
  kNone,
  kNoWait,       // one of two groups of copies is not waited for
  kNoBarrier,    // ... nor are the other lanes' copies
  kEarlyRefill,  // a tile is refilled before it has been read
  kWrongOrder,   // b is read transposed where it is not
  kDivergence,   // half of the warp loads an operand
};

__device__ float weight_of(int k) { return 1.0f / float(3 + k); }

template <class T>
struct Problem {
  const T *a, *b;  // [kM, kK] and [kK, kN], each in the orientation that `source` reads
  const float* c;  // [kM, kK] float32, of the sources that start from float32
  float* d;        // [kM, kN]
  Source source;
  bool b_transposed;
  int valid_rows, valid_width;  // of the tile that a comes from
  Bug bug;
};

template <class T>
__global__ void multiply(Problem<T> p) {
  using namespace statecore;
  using Tile = Tile<T, kK>;
  STATECORE_DYNAMIC_SHARED(shared);
  unsigned char *a_tile = shared, *b_tile = a_tile + Tile::bytes(kK), *parts = b_tile + Tile::bytes(kK);
  const bool a_transposed = p.source == Source::kTransposedTile;
  load_tile<T, kK, kK, kThreads>(a_tile, p.a, a_transposed ? kM : kK, p.valid_rows, p.valid_width);
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

  constexpr int kDepth = kMmaK<T>;
  if (p.source == Source::kParts) {  // c^T as the operand b of d^T = a c^T, from a tile of both parts
    for (int m = 0; m < kM; m += 16)
      for (int n = 0; n < kK; n += 8)
        for (int i = 0; i < 4; i += 2) {
          const int row = m + accumulator_row(i), column = n + accumulator_column(i);
          store_parts(Tile{}, parts, Tile::bytes(kM), row, column, p.c[row * kK + column],
                      p.c[row * kK + column + 1]);
        }
    __syncthreads();
  }

  float sums[2][4] = {};
  for (int k = 0; k < kK; k += kDepth) {
    OperandB<T> b[2];
    if (p.bug == Bug::kDivergence && threadIdx.x >= 16)
      __syncwarp();
    else if (p.b_transposed || p.bug == Bug::kWrongOrder)
      load<true>(b, Tile{}, b_tile, k, 0);
    else
      load<false>(b, Tile{}, b_tile, 0, k);
    OperandA<T> a;
    SplitA<T> split;
    if (p.source == Source::kAccumulators || p.source == Source::kSplitAccumulators) {
      float tiles[kDepth / 8][4];
      for (int n = 0; n < kDepth / 8; ++n)
        for (int i = 0; i < 4; ++i)
          tiles[n][i] = p.c[accumulator_row(i) * kK + k + 8 * n + accumulator_column(i)];
      from_accumulators<T>(a, tiles);
      from_accumulators<T>(split, tiles);
    } else if (a_transposed) {
      load<true>(a, Tile{}, a_tile, k, 0);
    } else {
      load<false>(a, Tile{}, a_tile, 0, k);
    }
    if (p.source == Source::kScaled) split = scaled(a, [&](int deep) { return weight_of(k + deep); });
    if (p.source == Source::kParts) {
      for (int part = 0; part < kParts<T>; ++part) {
        OperandB<T> c[2];
        load<false>(c, Tile{}, parts + part * Tile::bytes(kM), 0, k);
        for (int n = 0; n < 2; ++n) mma(sums[n], a, c[n]);
      }
      continue;
    }
    const bool precise = p.source == Source::kSplitAccumulators || p.source == Source::kScaled;
    for (int n = 0; n < 2; ++n) {
      if (precise)
        mma(sums[n], split, b[n]);
      else
        mma(sums[n], a, b[n]);
    }
  }
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i) p.d[accumulator_row(i) * kN + 8 * n + accumulator_column(i)] = sums[n][i];
}

int failures = 0;

void expect(bool right, const std::string& what) {
  if (!right) ++failures, std::printf("FAILED: %s\n", what.c_str());
}

template <class T>
T* alloc(size_t count, const char* name) {
  return static_cast<T*>(simt::alloc_global(count * sizeof(T), name));
}

// Relative error of the product, or what the emulator found.
template <class T>
double error_of(Source source, bool b_transposed, Bug bug, std::string& found) {
  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  T *a = alloc<T>(kK * kK, "a"), *b = alloc<T>(kK * kN, "b");
  float *c = alloc<float>(kM * kK, "c"), *d = alloc<float>(kM * kN, "d");
  for (int i = 0; i < kM * kK; ++i) statecore::set(a[i], normal(generator)), c[i] = normal(generator);
  for (int i = 0; i < kK * kN; ++i) statecore::set(b[i], normal(generator));
  const bool a_transposed = source == Source::kTransposedTile;
  found.clear();
  try {
    launch("multiply", multiply<T>,
           {dim3(1), dim3(kThreads), size_t(statecore::Tile<T, kK>::bytes(2 * kK + 2 * kM))}, nullptr,
           Problem<T>{a, b, c, d, source, b_transposed, a_transposed ? kK : kM, a_transposed ? kM : kK, bug});
  } catch (const simt::Error& error) {
    found = error.what();
  }
  double difference = 0, size = 0;
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) {
      double sum = 0;
      for (int k = 0; k < kK; ++k) {
        const float left = to_float(a_transposed ? a[k * kM + m] : a[m * kK + k]);
        const float right = to_float(b_transposed ? b[k * kN + n] : b[n * kK + k]);
        switch (source) {
          case Source::kTile:
          case Source::kTransposedTile: sum += double(left) * right; break;
          case Source::kAccumulators:
          case Source::kSplitAccumulators: sum += double(c[m * kK + k]) * right; break;
          case Source::kScaled: sum += double(left) * right / (3 + k); break;
          case Source::kParts: sum += double(left) * c[n * kK + k]; break;
        }
      }
      const double off = std::abs(d[m * kN + n] - sum);
      difference = std::isnan(off) ? INFINITY : std::max(difference, off);
      size = std::max(size, std::abs(sum));
    }
  for (void* buffer :
       {static_cast<void*>(a), static_cast<void*>(b), static_cast<void*>(c), static_cast<void*>(d)})
    simt::free_global(buffer);
  return difference / size;
}

template <class T>
void test_products(const char* type) {
  for (Source source : {Source::kTile, Source::kTransposedTile, Source::kAccumulators,
                        Source::kSplitAccumulators, Source::kScaled, Source::kParts})
    for (bool b_transposed : {false, true}) {
      std::string found;
      const double error = error_of<T>(source, b_transposed, Bug::kNone, found);
      const double allowed = source == Source::kAccumulators && sizeof(T) == 2        ? 4e-3
                             : source >= Source::kSplitAccumulators && sizeof(T) == 2 ? 2e-5
                                                                                      : 1e-6;
      expect(found.empty() && error < allowed, std::string(type) + ", source " + std::to_string(int(source)) +
                                                   ", error " + std::to_string(error) + " " + found);
    }
}

void test_planted_bugs() {
  for (simt::Async async : {simt::Async::kLate, simt::Async::kEarly, simt::Async::kRandom}) {
    simt::schedule().async = async;
    const auto run = [](Bug bug, std::string& found) {
      return error_of<__nv_bfloat16>(Source::kTile, false, bug, found);
    };
    std::string found;
    for (Bug bug : {Bug::kNoWait, Bug::kNoBarrier, Bug::kEarlyRefill}) {
      const double error = run(bug, found);
      const std::string name = "bug " + std::to_string(int(bug)) + ": " + found;
      if (simt::checks_races())
        expect(found.find(bug == Bug::kNoBarrier ? "race" : "an asynchronous copy is still writing") !=
                   std::string::npos,
               name);
      else if (bug == Bug::kNoWait ? async == simt::Async::kLate
                                   : bug == Bug::kEarlyRefill && async == simt::Async::kEarly)
        expect(error > 0.1, name);
    }
    expect(run(Bug::kWrongOrder, found) > 0.1, "a wrong order of an operand shows in the result");
    run(Bug::kDivergence, found);
    expect(found.find("divergent warp") != std::string::npos, "divergence: " + found);
  }
  simt::schedule().async = simt::Async::kLate;
}

// Numbers go from warps 1 and 2 to warp 0 through a barrier at which only warp 0 waits.
enum class HandOver { kRight, kWrongCount, kNoWait, kOneMissing };

__global__ void hand_over(float* out, HandOver bug) {
  using namespace statecore;
  STATECORE_SHARED(float, numbers, 96);
  const int thread = threadIdx.x;
  if (thread >= 32) {
    numbers[thread] = float(thread);
    if (bug != HandOver::kOneMissing || thread < 64) named_barrier_arrive(1, 96);
    return;
  }
  if (bug == HandOver::kNoWait)
    named_barrier_arrive(1, 96);
  else
    named_barrier_sync(1, bug == HandOver::kWrongCount ? 64 : 96);
  out[thread] = numbers[thread + 32] + numbers[thread + 64];
}

void test_named_barriers() {
  for (auto order : {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom}) {
    simt::schedule().order = order;
    for (HandOver bug : {HandOver::kRight, HandOver::kWrongCount, HandOver::kNoWait, HandOver::kOneMissing}) {
      float* out = alloc<float>(32, "out");
      std::string found;
      try {
        launch("hand_over", hand_over, {dim3(1), dim3(96)}, nullptr, out, bug);
      } catch (const simt::Error& error) {
        found = error.what();
      }
      const bool right = out[5] == 37 + 69;
      const char* message = bug == HandOver::kWrongCount   ? "is waited at by"
                            : bug == HandOver::kOneMissing ? "deadlock"
                                                           : "race";
      // Without checks, a thread that does not wait may come late enough.
      if (bug == HandOver::kRight)
        expect(right && found.empty(), "a named barrier: " + found);
      else if (bug != HandOver::kNoWait)
        expect(found.find(message) != std::string::npos, "named barrier: " + found);
      else if (simt::checks_races())
        expect(found.find(message) != std::string::npos || found.find("uninitialised") != std::string::npos,
               "nobody waits at a named barrier: " + found);
      else if (order == simt::Order::kForward)
        expect(!right, "nobody waits at a named barrier");
      simt::free_global(out);
    }
  }
  simt::schedule().order = simt::Order::kForward;
}

// Rows of 128 bytes that are not swizzled: the same columns of eight rows lie in the same banks.
__global__ void load_unswizzled(uint32_t* out) {
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
  launch("load_unswizzled", load_unswizzled, {dim3(1), dim3(32)}, nullptr, out);
  const simt::Counters counters = simt::take_counters();
  expect(counters.ldmatrix == 4 && counters.ldmatrix_conflicts == 4 * 7, "unswizzled tiles have conflicts");
  simt::free_global(out);
}

void test_no_bank_conflicts() {
  simt::take_counters();
  std::string found;
  error_of<__nv_bfloat16>(Source::kTransposedTile, true, Bug::kNone, found);
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
