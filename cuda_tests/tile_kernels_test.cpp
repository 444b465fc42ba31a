// The tile kernels of the instruction set STATECORE_CPU_ISA against plain loops in double. Exit code 77: the
// processor lacks the instruction set.

#include "common/tile_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "common/operands.h"

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

void expect_near(const char* what, double got, double expected, double tolerance) {
  if (std::abs(got - expected) <= tolerance || (std::isnan(got) && std::isnan(expected)) || got == expected)
    return;
  if (++failures <= 20) std::printf("%s: got %.9g, expected %.9g\n", what, got, expected);
}

// Values that packing does not round, so that every kind of operand has the same expected products.
template <class Operand>
std::vector<RealOf<Operand>> random_operands(int64_t size) {
  auto x = random_tile<RealOf<Operand>>(size);
  if constexpr (!kIsReal<Operand>) {
    std::vector<uint16_t> rounded(size);
    tile_kernels<float>().store(DType::kBFloat16, rounded.data(), 0, 1, int(size), x.data(), 0);
    std::vector<float> padded_x(padded(int(size)));
    tile_kernels<float>().load(DType::kBFloat16, rounded.data(), 0, 1, int(size), padded_x.data(), 0);
    std::copy_n(padded_x.begin(), size, x.begin());
  }
  return x;
}

template <class Real>
std::vector<Real> transpose(const std::vector<Real>& x, int rows, int cols) {
  std::vector<Real> result(rows * cols);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) result[j * rows + i] = x[i * cols + j];
  return result;
}

struct ProductCase {
  int m, n, k;
  bool a_columns;     // a is packed in columns form, from a^T
  bool b_transposed;  // b is packed in rows form, from b^T, and transposed
  bool accumulate;
};

template <class Operand>
void test_product(const ProductCase& c) {
  using Real = RealOf<Operand>;
  const double tolerance = sizeof(Real) == 4 ? 2e-4 : 1e-11;
  const DType real = OperandTraits<Real>::kDType;
  const auto& [m, n, k, a_columns, b_transposed, accumulate] = c;
  const auto a = random_operands<Operand>(m * k), b = random_operands<Operand>(k * n);
  OperandTile<Operand> left(std::max(m, k) + 1, std::max(m, k) + 1), right(k + 1, n), right_rows(n, k + 1);
  if (a_columns)
    left.load_columns(real, transpose(a, m, k).data(), m, k, m);
  else
    left.load_rows(real, a.data(), k, m, k);
  std::vector<Operand> transposed_b((depth<Operand>(k) + 1) * tile_ld(n));
  if (b_transposed) {
    right_rows.load_rows(real, transpose(b, k, n).data(), k, n, k);
    right_rows.transpose(n, k, transposed_b.data(), tile_ld(n));
  } else {
    right.load_columns(real, b.data(), n, k, n);
  }
  const int64_t ldc = tile_ld(n);
  auto result = random_tile<Real>(m * ldc);
  const auto before = result;
  multiply(m, n, k, Real(0.5), a_columns ? transposed(left.columns()) : as_is(left.rows()),
           b_transposed ? Packed<Operand>{transposed_b.data(), tile_ld(n)} : right.columns(), result.data(),
           ldc, accumulate);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = accumulate ? double(before[i * ldc + j]) : 0;
      for (int p = 0; p < k; ++p) sum += 0.5 * double(a[i * k + p]) * double(b[p * n + j]);
      expect_near("product", double(result[i * ldc + j]), sum, tolerance);
    }
    for (int64_t j = padded(n); j < ldc; ++j)
      expect_near("product beyond the padding", double(result[i * ldc + j]), double(before[i * ldc + j]), 0);
  }
}

template <class Operand>
void test_products() {
  for (int m : {1, 2, 5, 7, 8, 13, 64})
    for (int n : {1, 16, 17, 40, 128})
      for (int k : {0, 1, 3, 64, 101})
        for (bool a_columns : {false, true})
          for (bool b_transposed : {false, true})
            for (bool accumulate : {false, true})
              test_product<Operand>({m, n, k, a_columns, b_transposed, accumulate});
}

// Packing rounds to nearest, the columns form made from rows equals the one made from the source, and cleared
// rows are zero.
void test_pairs() {
  const int rows = 7, cols = 37;
  const auto x = random_tile<float>(rows * cols, 3.f);
  OperandTile<BFloat16Pair> tile(rows, cols), other(rows, cols);
  tile.load(DType::kFloat32, x.data(), cols, rows, cols);
  other.load_columns(DType::kFloat32, x.data(), cols, rows, cols);
  const auto at = [&](const Packed<BFloat16Pair>& columns, int i, int j) {
    const BFloat16Pair pair = columns.data[i / 2 * columns.ld + j];
    return i % 2 ? pair.second : pair.first;
  };
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) {
      uint16_t expected;
      tile_kernels<float>().store(DType::kBFloat16, &expected, 0, 1, 1, &x[i * cols + j], 0);
      const BFloat16Pair pair = tile.rows().data[i * tile.rows().ld + j / 2];
      expect_near("packed rows", j % 2 ? pair.second : pair.first, expected, 0);
      expect_near("packed columns", at(tile.columns(), i, j), expected, 0);
      expect_near("columns packed from the source", at(other.columns(), i, j), expected, 0);
    }
  for (int j = 0; j < cols; ++j)
    expect_near("missing second half of a pair", at(tile.columns(), rows, j), 0, 0);
  other.clear_row_of_columns(2, cols);
  for (int j = 0; j < cols; ++j) {
    expect_near("cleared row", at(other.columns(), 2, j), 0, 0);
    expect_near("other row of its pair", at(other.columns(), 3, j), at(tile.columns(), 3, j), 0);
  }
}

// Every 16-bit pattern survives load and store, and midpoints between two of them round to the even one.
void test_conversions() {
  const auto& kernels = tile_kernels<float>();
  std::vector<uint16_t> all(1 << 16), back(1 << 16);
  for (int i = 0; i < 1 << 16; ++i) all[i] = uint16_t(i);
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    std::vector<float> wide(1 << 16);
    kernels.load(dtype, all.data(), 1 << 16, 1, 1 << 16, wide.data(), 1 << 16);
    kernels.store(dtype, back.data(), 1 << 16, 1, 1 << 16, wide.data(), 1 << 16);
    for (int i = 0; i < 1 << 16; ++i)
      if (!std::isnan(wide[i])) expect_near("16-bit round trip", back[i], all[i], 0);
    std::vector<float> again(1 << 16);
    kernels.load(dtype, back.data(), 1 << 16, 1, 1 << 16, again.data(), 1 << 16);
    for (int i = 0; i < 1 << 16; ++i) expect_near("NaN stays NaN", again[i], wide[i], 0);
    for (int i = 0; i < 0x7b00; ++i) {
      if (!std::isfinite(wide[i]) || !std::isfinite(wide[i + 1])) continue;
      const std::vector<float> middle(
          33, float((double(wide[i]) + double(wide[i + 1])) / 2));  // full vectors and a remainder
      std::vector<uint16_t> rounded(33);
      kernels.store(dtype, rounded.data(), 33, 1, 33, middle.data(), 33);
      for (uint16_t x : rounded) expect_near("rounds to even", x, i % 2 ? i + 1 : i, 0);
    }
  }
}

template <class Real>
void test_load_transposed() {
  const int rows = 37, cols = 21;
  const auto src = random_tile<float>(rows * 50);
  const int64_t ld = tile_ld(rows);
  std::vector<Real> dst(cols * ld, Real(9));
  tile_kernels<Real>().load_transposed(DType::kFloat32, src.data(), 50, rows, cols, dst.data(), ld);
  for (int j = 0; j < cols; ++j)
    for (int i = 0; i < padded(rows); ++i)
      expect_near("load_transposed", double(dst[j * ld + i]), i < rows ? double(src[i * 50 + j]) : 0, 0);
}

double to_double(float p) { return p; }
double to_double(double p) { return p; }
double to_double(uint16_t p) { return double(__builtin_bit_cast(float, uint32_t(p) << 16)); }

// Probability (i, j) of a tile packed for contraction over rows.
template <class Operand>
double probability(const std::vector<Operand>& p, int64_t ld, int i, int j) {
  if constexpr (kIsReal<Operand>)
    return to_double(p[i * ld + j]);
  else
    return to_double(i % 2 ? p[i / 2 * ld + j].second : p[i / 2 * ld + j].first);
}

template <class Operand>
void test_softmax() {
  using Real = RealOf<Operand>;
  const double tolerance = sizeof(Real) == 4 ? 1e-6 : 1e-14;
  const double rounding = kIsReal<Operand> ? tolerance : 4e-3;  // of a probability
  const int keys = 19, blocks = 3, queries = 85;
  const int64_t ld = tile_ld(queries);
  const Real inf = std::numeric_limits<Real>::infinity();
  auto s = random_tile<Real>(blocks * keys * ld, Real(20));
  for (int i = 0; i < keys; ++i) s[i * ld] = -inf;               // query 0: all keys of block 0 are masked
  for (int i = 0; i < blocks * keys; ++i) s[i * ld + 4] = -inf;  // query 4: all keys are masked
  const auto scores = s;
  std::vector<Operand> p(depth<Operand>(keys) * ld);
  std::vector<Real> row_max(padded(queries), -inf), row_sum(padded(queries), 0), rescale(padded(queries));
  std::vector<double> running(queries, 0);
  for (int block = 0; block < blocks; ++block) {
    product_kernels<Operand>().softmax_block(keys, queries, s.data() + block * keys * ld, ld, p.data(), ld,
                                             row_max.data(), row_sum.data(), rescale.data());
    for (int j = 0; j < queries; ++j) {
      running[j] *= double(rescale[j]);
      for (int i = 0; i < keys; ++i) {
        const Real shifted = scores[(block * keys + i) * ld + j] - row_max[j];  // rounded as in the kernel
        const double expected = std::isnan(shifted) ? 0 : std::exp2(double(shifted));
        expect_near("softmax probability", probability(p, ld, i, j), expected, rounding * expected + 1e-37);
        running[j] += expected;
      }
    }
  }
  for (int j = 0; j < queries; ++j) {
    double max = -INFINITY, sum = 0;
    for (int i = 0; i < blocks * keys; ++i) max = std::max(max, double(scores[i * ld + j]));
    for (int i = 0; i < blocks * keys; ++i) sum += j == 4 ? 0 : std::exp2(double(scores[i * ld + j]) - max);
    expect_near("softmax row_max", double(row_max[j]), max, 0);
    expect_near("softmax row_sum", double(row_sum[j]), sum, tolerance * sum);
    expect_near("softmax rescaled sum", running[j], sum, tolerance * sum);
  }
}

template <class Real>
void test_exponentials() {
  const double tolerance = sizeof(Real) == 4 ? 1e-6 : 1e-14;
  const int rows = 19, cols = 21;
  const int64_t ld = tile_ld(cols);
  const Real inf = std::numeric_limits<Real>::infinity();
  const auto scores = random_tile<Real>(rows * ld, Real(20));
  std::vector<Real> shift(padded(cols), Real(60));
  shift[3] = inf;
  auto p = scores;
  tile_kernels<Real>().exp2_shifted(rows, cols, p.data(), ld, shift.data());
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) {
      const double expected = std::exp2(double(scores[i * ld + j] - shift[j]));
      expect_near("exp2_shifted", double(p[i * ld + j]), expected, tolerance * expected + 1e-37);
    }
  auto x = scores;
  for (Real& value : x) value = -std::abs(value);
  x[5] = -inf;
  const auto before = x;
  tile_kernels<Real>().exponential(rows, cols, x.data(), ld);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) {
      const double expected = std::exp(double(before[i * ld + j]));
      expect_near("exponential", double(x[i * ld + j]), expected, tolerance * expected + 1e-37);
    }
}

template <class Real>
void test_elementwise() {
  const double tolerance = std::is_same_v<Real, float> ? 2e-6 : 1e-14;
  const int rows = 3, cols = 33;
  const int64_t ld = tile_ld(cols);
  const auto x = random_tile<Real>(rows * ld), y = random_tile<Real>(rows * ld);
  const auto factor = random_tile<Real>(rows), delta = random_tile<Real>(padded(cols));
  auto out = x, gates = x;
  std::vector<Real> dots(rows);
  gates[0] = -1e30, gates[1] = -1000, gates[2] = -100, gates[3] = -88, gates[ld] = 100, gates[ld + 1] = 1e30;
  tile_kernels<Real>().gated_add(rows, cols, out.data(), y.data(), gates.data(), ld);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) {
      const int64_t at = i * ld + j;
      expect_near("gated_add", double(out[at]),
                  double(y[at]) + double(x[at]) / (1 + std::exp(-double(gates[at]))), tolerance);
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
  for (int64_t ldy : {ldx, int64_t(0)}) {  // 0: the same row for all
    std::vector<Real> out(rows * ldo, Real(9));
    tile_kernels<Real>().multiply(rows, cols, x.data(), ldx, y.data(), ldy, out.data(), ldo);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < cols; ++j)
        expect_near("multiply", double(out[i * ldo + j]), double(x[i * ldx + j] * y[i * ldy + j]), 0);
      for (int64_t j = padded(cols); j < ldo; ++j)
        expect_near("multiply beyond the padding", double(out[i * ldo + j]), 9, 0);
    }
  }
}

// The arrays are exactly as long as they must be, so that sanitizers find accesses beyond them.
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
            const double expected = 0.5 * double(before[i * cols + j]) + double(k[i]) * double(v[j]);
            expect_near("update_read state", double(state[i * cols + j]), expected, tolerance);
            for (int g = 0; g < queries; ++g) sum[g * cols + j] += double(q[g * rows + i]) * expected;
          }
        for (int x = 0; x < queries * cols; ++x)
          expect_near("update_read out", double(out[x]), sum[x], tolerance);
      }
}

template <class Real>
void test_all() {
  test_products<Real>();
  test_load_transposed<Real>();
  test_softmax<Real>();
  test_exponentials<Real>();
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
  if (has_bfloat16_products()) {
    test_products<BFloat16Pair>();
    test_softmax<BFloat16Pair>();
    test_pairs();
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
