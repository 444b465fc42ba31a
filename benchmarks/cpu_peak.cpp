// The most floating-point operations per second that this machine's cores can do, on data that never leaves
// the registers.
//
//     cpu_peak THREADS      prints "float32 <operations per second>" and, with avx512_bf16, "bfloat16 <...>"
//
// float32: fused multiply-adds; bfloat16: vdpbf16ps, pairs of products summed into float32. All threads run
// at once.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr int kChains = 12;  // independent sums; latency times throughput is at most 10 on every core so far
constexpr int kIterations = 1 << 24;
constexpr int kRepeats = 5;

#if defined(__AVX512F__)
using Vector = __m512;
Vector fill(float x) { return _mm512_set1_ps(x); }
Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__FMA__)
using Vector = __m256;
Vector fill(float x) { return _mm256_set1_ps(x); }
Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
#else
#error "neither AVX-512 nor FMA"
#endif

// Keeps a value in a register and hides what it is from the compiler.
template <class T>
void opaque(T& x) {
  asm volatile("" : "+v"(x));
}

double float32_operations() {
  Vector sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = fill(float(i));
  Vector a = fill(0.9999f), b = fill(1e-4f);
  opaque(a), opaque(b);
  for (int n = 0; n < kIterations; ++n)
    for (int i = 0; i < kChains; ++i) sums[i] = multiply_add(sums[i], a, b);
  for (auto& sum : sums) opaque(sum);
  return 2.0 * sizeof(Vector) / sizeof(float) * kChains * kIterations;
}

#if defined(__AVX512BF16__)
double bfloat16_operations() {
  __m512 sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_ps(float(i));
  __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.01f), _mm512_set1_ps(-0.02f)), b = a;
  opaque(a), opaque(b);
  for (int n = 0; n < kIterations; ++n)
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
  for (auto& sum : sums) opaque(sum);
  return 2.0 * 32 * kChains * kIterations;
}
#endif

// Operations per second of all threads together, the best of several repeats.
double rate(double (*operations)(), int threads) {
  double best = 0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    std::atomic<int> waiting{threads};
    std::vector<double> done(threads);
    std::vector<std::chrono::steady_clock::time_point> begin(threads), end(threads);
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t)
      workers.emplace_back([&, t] {
        --waiting;
        while (waiting) std::this_thread::yield();
        begin[t] = std::chrono::steady_clock::now();
        done[t] = operations();
        end[t] = std::chrono::steady_clock::now();
      });
    for (auto& worker : workers) worker.join();
    const std::chrono::duration<double> wall =
        *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end());
    double total = 0;
    for (double one : done) total += one;
    best = std::max(best, total / wall.count());
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  std::printf("float32 %.0f\n", rate(float32_operations, threads));
#if defined(__AVX512BF16__)
  std::printf("bfloat16 %.0f\n", rate(bfloat16_operations, threads));
#endif
}
