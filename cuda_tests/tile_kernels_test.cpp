// Tile kernels of the instruction set named by STATECORE_CPU_ISA against plain loops in double.
// Exit code: 0 all right, 1 something is wrong (printed), 77 this machine lacks the instruction set.

#include "common/tile_kernels.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

using namespace statecore;

namespace {

int failures = 0;
std::mt19937 generator(7);

template <class Real>
std::vector<Real> random_tile(int64_t size, Real spread = 1) {
  std::normal_distribution<double> normal(0, double(spread));
  std::vector<Real> x(size);
  for (Real& value : x) value = Real(normal(generator));
  return x;
}

void expect_near(const char* what, double got, double wanted, double tolerance) {
  if (std::abs(got - wanted) <= tolerance || (std::isnan(got) && std::isnan(wanted)) || got == wanted) return;
  if (++failures <= 20) std::printf("%s: got %.9g, wanted %.9g\n", what, got, wanted);
}

template <class Real>
void test_matmul() {
  const double tolerance = std::is_same_v<Real, float> ? 2e-4 : 1e-11;
  for (int m : {1, 2, 5, 7, 8, 13, 64})
    for (int n : {1, 16, 17, 40, 128})
      for (int k : {0, 1, 3, 64, 100})
        for (bool transposed : {false, true})
          for (bool accumulate : {false, true}) {
            const int64_t lda = tile_ld(transposed ? m : k), ldb = tile_ld(n);
            const auto a = random_tile<Real>((transposed ? k : m) * lda + 1),
                       b = random_tile<Real>(k * ldb + 1);
            auto c = random_tile<Real>(m * ldb);
            const auto before = c;
            const int64_t a_row = transposed ? 1 : lda, a_col = transposed ? lda : 1;
            tile_kernels<Real>().matmul(m, n, k, a.data(), a_row, a_col, b.data(), ldb, c.data(), ldb,
                                        accumulate);
            for (int i = 0; i < m; ++i) {
              for (int j = 0; j < n; ++j) {
                double sum = accumulate ? double(before[i * ldb + j]) : 0;
                for (int p = 0; p < k; ++p) sum += double(a[i * a_row + p * a_col]) * double(b[p * ldb + j]);
                expect_near("matmul", double(c[i * ldb + j]), sum, tolerance);
              }
              for (int64_t j = padded(n); j < ldb; ++j)
                expect_near("matmul leaves the rest alone", double(c[i * ldb + j]),
                            double(before[i * ldb + j]), 0);
            }
          }
}

// Every 16-bit pattern survives load and store; values between two of them round to the even one.
void test_conversions() {
  const auto& kernels = tile_kernels<float>();
  std::vector<uint16_t> all(1 << 16), back(1 << 16);
  for (int i = 0; i < 1 << 16; ++i) all[i] = uint16_t(i);
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    std::vector<float> wide(1 << 16);
    kernels.load(dtype, all.data(), 1 << 16, 1, 1 << 16, 1.f, wide.data(), 1 << 16);
    kernels.store(dtype, back.data(), 1 << 16, 1, 1 << 16, wide.data(), 1 << 16);
    for (int i = 0; i < 1 << 16; ++i)
      if (!std::isnan(wide[i])) expect_near("16-bit round trip", back[i], all[i], 0);
    std::vector<float> again(1 << 16);
    kernels.load(dtype, back.data(), 1 << 16, 1, 1 << 16, 1.f, again.data(), 1 << 16);
    for (int i = 0; i < 1 << 16; ++i) expect_near("NaN stays NaN", again[i], wide[i], 0);
    for (int i = 0; i < 0x7b00; ++i) {
      if (!std::isfinite(wide[i]) || !std::isfinite(wide[i + 1])) continue;
      float middle = float((double(wide[i]) + double(wide[i + 1])) / 2);
      uint16_t rounded;
      kernels.store(dtype, &rounded, 1, 1, 1, &middle, 1);
      expect_near("rounds to even", rounded, i % 2 ? i + 1 : i, 0);
    }
  }
}

template <class Real>
void test_load_transposed() {
  const int rows = 37, cols = 21;
  const auto src = random_tile<float>(rows * 50);
  const int64_t ld = tile_ld(rows);
  std::vector<Real> dst(cols * ld, Real(9));
  tile_kernels<Real>().load_transposed(DType::kFloat32, src.data(), 50, rows, cols, Real(2), dst.data(), ld);
  for (int j = 0; j < cols; ++j)
    for (int i = 0; i < padded(rows); ++i)
      expect_near("load_transposed", double(dst[j * ld + i]), i < rows ? 2 * double(src[i * 50 + j]) : 0, 0);
}

template <class Real>
void test_softmax() {
  const double tolerance = std::is_same_v<Real, float> ? 1e-6 : 1e-14;
  const int rows = 19, blocks = 3, cols = 21;
  const int64_t ld = tile_ld(cols);
  const Real inf = std::numeric_limits<Real>::infinity();
  auto s = random_tile<Real>(blocks * rows * ld, Real(20));
  for (int i = 0; i < rows; ++i) s[i * ld] = -inf;               // column 0: nothing in the first block
  for (int i = 0; i < blocks * rows; ++i) s[i * ld + 4] = -inf;  // column 4: nothing at all
  const auto scores = s;
  std::vector<Real> col_max(padded(cols), -inf), col_sum(padded(cols), 0), correction(padded(cols));
  std::vector<double> running(cols, 0);
  for (int b = 0; b < blocks; ++b) {
    tile_kernels<Real>().softmax_block(rows, cols, s.data() + b * rows * ld, ld, col_max.data(),
                                       col_sum.data(), correction.data());
    for (int j = 0; j < cols; ++j) {
      running[j] *= double(correction[j]);
      for (int i = 0; i < rows; ++i) running[j] += double(s[(b * rows + i) * ld + j]);
    }
  }
  for (int j = 0; j < cols; ++j) {
    double top = -INFINITY, sum = 0;
    for (int i = 0; i < blocks * rows; ++i) top = std::max(top, double(scores[i * ld + j]));
    for (int i = 0; i < blocks * rows; ++i) sum += j == 4 ? 0 : std::exp(double(scores[i * ld + j]) - top);
    expect_near("softmax max", double(col_max[j]), top, 0);
    expect_near("softmax sum", double(col_sum[j]), sum, tolerance * sum);
    expect_near("softmax weights", running[j], sum, tolerance * sum);
  }
  std::vector<Real> shift(padded(cols), Real(60));
  shift[3] = inf;
  auto p = scores;
  tile_kernels<Real>().exp_shifted(rows, cols, p.data(), ld, shift.data());
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) {
      const double wanted = std::exp(double(scores[i * ld + j] - shift[j]));
      expect_near("exp_shifted", double(p[i * ld + j]), wanted, tolerance * wanted + 1e-37);
    }
}

template <class Real>
void test_elementwise() {
  const double tolerance = std::is_same_v<Real, float> ? 2e-6 : 1e-14;
  const int rows = 3, cols = 33;
  const int64_t ld = tile_ld(cols);
  const auto x = random_tile<Real>(rows * ld), y = random_tile<Real>(rows * ld);
  const auto factor = random_tile<Real>(rows), delta = random_tile<Real>(padded(cols));
  auto out = x;
  std::vector<Real> dots(rows);
  tile_kernels<Real>().gated_add(rows, cols, out.data(), y.data(), x.data(), ld);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) {
      const double gate = double(x[i * ld + j]);
      expect_near("gated_add", double(out[i * ld + j]), double(y[i * ld + j]) + gate / (1 + std::exp(-gate)),
                  tolerance);
    }
  out = x;
  tile_kernels<Real>().scale_rows(rows, cols, factor.data(), out.data(), ld);
  for (int i = 0; i < rows; ++i)
    expect_near("scale_rows", double(out[i * ld]), double(factor[i] * x[i * ld]), tolerance);
  out = y;
  tile_kernels<Real>().softmax_backward(rows, cols, x.data(), out.data(), ld, delta.data());
  for (int i = 0; i < rows; ++i)
    expect_near("softmax_backward", double(out[i * ld + 7]),
                double(x[i * ld + 7]) * (double(y[i * ld + 7]) - double(delta[7])), tolerance);
  std::vector<Real> padded_x(rows * ld, 0), padded_y(rows * ld, 0);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) padded_x[i * ld + j] = x[i * ld + j], padded_y[i * ld + j] = y[i * ld + j];
  tile_kernels<Real>().dot_rows(rows, cols, padded_x.data(), ld, padded_y.data(), ld, dots.data());
  for (int i = 0; i < rows; ++i) {
    double sum = 0;
    for (int j = 0; j < cols; ++j) sum += double(x[i * ld + j]) * double(y[i * ld + j]);
    expect_near("dot_rows", double(dots[i]), sum, 20 * tolerance);
  }
}

template <class Real>
void test_multiply() {
  const int rows = 5, cols = 21;
  const int64_t ldx = tile_ld(cols), ldo = ldx + kTilePad;
  const auto x = random_tile<Real>(rows * ldx), y = random_tile<Real>(rows * ldx);
  for (int64_t ldy : {ldx, int64_t(0)}) {  // 0: one row for all
    std::vector<Real> out(rows * ldo, Real(9));
    tile_kernels<Real>().multiply(rows, cols, x.data(), ldx, y.data(), ldy, out.data(), ldo);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < cols; ++j)
        expect_near("multiply", double(out[i * ldo + j]), double(x[i * ldx + j] * y[i * ldy + j]), 0);
      for (int64_t j = padded(cols); j < ldo; ++j)
        expect_near("multiply leaves the rest alone", double(out[i * ldo + j]), 9, 0);
    }
  }
}

// Nothing beyond the dense arrays may be touched: they are as long as they must be, and sanitizers watch.
template <class Real>
void test_update_read() {
  const double tolerance = std::is_same_v<Real, float> ? 1e-5 : 1e-13;
  for (int rows : {1, 8, 13})
    for (int cols : {1, 16, 17, 70, 128})
      for (int queries : {1, 3}) {
        auto state = random_tile<Real>(rows * cols);
        const auto before = state, k = random_tile<Real>(rows), v = random_tile<Real>(cols);
        const auto q = random_tile<Real>(queries * rows);
        std::vector<Real> out(queries * cols, Real(9));
        tile_kernels<Real>().update_read(rows, cols, Real(0.5), k.data(), v.data(), state.data(), queries,
                                         q.data(), out.data());
        std::vector<double> sum(queries * cols, 0);
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < cols; ++j) {
            const double wanted = 0.5 * double(before[i * cols + j]) + double(k[i]) * double(v[j]);
            expect_near("update_read state", double(state[i * cols + j]), wanted, tolerance);
            for (int g = 0; g < queries; ++g) sum[g * cols + j] += double(q[g * rows + i]) * wanted;
          }
        for (int x = 0; x < queries * cols; ++x)
          expect_near("update_read out", double(out[x]), sum[x], tolerance);
      }
}

template <class Real>
void test_all() {
  test_matmul<Real>();
  test_load_transposed<Real>();
  test_softmax<Real>();
  test_elementwise<Real>();
  test_multiply<Real>();
  test_update_read<Real>();
}

}  // namespace

int main() {
  try {
    std::printf("instruction set: %s\n", cpu_isa());
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 77;
  }
  test_all<float>();
  test_all<double>();
  test_conversions();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
