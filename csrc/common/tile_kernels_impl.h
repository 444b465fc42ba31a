// The one implementation of tile_kernels.h, written on GCC / Clang vector extensions and compiled once
// per instruction set by the tile_kernels_<isa>.cpp files, which define STATECORE_VECTOR_BYTES and
// STATECORE_ISA before they include it. Everything lives in an unnamed namespace and calls nothing
// inline from the standard library, so no code of a higher instruction set can be shared by the linker.
#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/tile_kernels.h"
#include "common/tile_kernels_isa.h"

namespace statecore {
namespace {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(STATECORE_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Bits __attribute__((vector_size(STATECORE_VECTOR_BYTES), aligned(4), may_alias));
  using Integer = int32_t;
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(STATECORE_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Bits __attribute__((vector_size(STATECORE_VECTOR_BYTES), aligned(8), may_alias));
  using Integer = int64_t;
};
template <class T>
using Vec = typename VectorOf<T>::Type;
template <class T>
constexpr int kLanes = STATECORE_VECTOR_BYTES / int(sizeof(T));

template <class T>
Vec<T> load_vec(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
void store_vec(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}

constexpr float kInf = __builtin_inff();

// ---- exponential -----------------------------------------------------------------------------------

// exp(x) for x <= 88: 2^n * p(r), x = n ln 2 + r, |r| <= ln(2) / 2; relative error below 2e-7. Arguments
// under -87 (-inf among them) give 0 exactly, so that an invisible key never leaks in.
Vec<float> exp_vec(Vec<float> x) {
  using V = Vec<float>;
  using Bits = VectorOf<float>::Bits;
  const V clamped = x < -87.f ? V{} - 87.f : x;
  const V magic = V{} + 12582912.f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  const V shifted = clamped * 1.44269504f + magic;
  const V n = shifted - magic;
  const V r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  V p = V{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const Bits power = (reinterpret_cast<const Bits&>(shifted) << 23) + (127 << 23);
  const V result = p * reinterpret_cast<const V&>(power);
  return x < -87.f ? V{} : result;
}

// double is the type of gradient checks: right to the last bits, speed does not matter.
Vec<double> exp_vec(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// ---- conversions -----------------------------------------------------------------------------------

float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
uint32_t float_to_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

float bf16_to_float(uint16_t x) { return bits_to_float(uint32_t(x) << 16); }

uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);  // NaN stays NaN
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#if defined(__F16C__)
float f16_to_float(uint16_t x) { return _cvtsh_ss(x); }
uint16_t float_to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
float f16_to_float(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Scaling by 2^112 puts the exponent right and normalises subnormal halves on the way.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000u)));
}

uint16_t float_to_f16(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Subnormal half: adding 0.5 makes the float adder round to multiples of 2^-24.
    return uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13));
}
#endif

// One type a storage format; `of` reads an element as Real, `from` rounds a Real to it.
struct AsFloat32 {
  using Storage = float;
  static float of(float x) { return x; }
  static float from(float x) { return x; }
};
struct AsFloat64 {
  using Storage = double;
  static double of(double x) { return x; }
  static double from(double x) { return x; }
};
struct AsBFloat16 {
  using Storage = uint16_t;
  static float of(uint16_t x) { return bf16_to_float(x); }
  static uint16_t from(float x) { return float_to_bf16(x); }
};
struct AsFloat16 {
  using Storage = uint16_t;
  static float of(uint16_t x) { return f16_to_float(x); }
  static uint16_t from(float x) { return float_to_f16(x); }
};

template <class F>
void with_format(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(AsFloat32{});
    case DType::kFloat64: return f(AsFloat64{});
    case DType::kBFloat16: return f(AsBFloat16{});
    case DType::kFloat16: return f(AsFloat16{});
  }
}

template <class Real>
void load(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Real factor, Real* dst,
          int64_t ld) {
  with_format(dtype, [&](auto format) {
    using Format = decltype(format);
    for (int i = 0; i < rows; ++i) {
      const auto* from = static_cast<const typename Format::Storage*>(src) + i * src_stride;
      Real* to = dst + i * ld;
      for (int j = 0; j < cols; ++j) to[j] = factor * Real(Format::of(from[j]));
      for (int j = cols; j < padded(cols); ++j) to[j] = 0;
    }
  });
}

// dst = src^T for 4 x 4 elements.
template <class Real>
inline void transpose_quad(const Real* src, int64_t src_ld, Real* dst, int64_t ld) {
  typedef Real Quad __attribute__((vector_size(4 * sizeof(Real)), aligned(sizeof(Real)), may_alias));
#if defined(__clang__)
#define STATECORE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
  typedef typename VectorOf<Real>::Integer Lanes __attribute__((vector_size(4 * sizeof(Real))));
#define STATECORE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Lanes{__VA_ARGS__})
#endif
  const Quad row0 = *reinterpret_cast<const Quad*>(src), row1 = *reinterpret_cast<const Quad*>(src + src_ld);
  const Quad row2 = *reinterpret_cast<const Quad*>(src + 2 * src_ld);
  const Quad row3 = *reinterpret_cast<const Quad*>(src + 3 * src_ld);
  const Quad low01 = STATECORE_SHUFFLE(row0, row1, 0, 4, 1, 5);
  const Quad high01 = STATECORE_SHUFFLE(row0, row1, 2, 6, 3, 7);
  const Quad low23 = STATECORE_SHUFFLE(row2, row3, 0, 4, 1, 5);
  const Quad high23 = STATECORE_SHUFFLE(row2, row3, 2, 6, 3, 7);
  *reinterpret_cast<Quad*>(dst) = STATECORE_SHUFFLE(low01, low23, 0, 1, 4, 5);
  *reinterpret_cast<Quad*>(dst + ld) = STATECORE_SHUFFLE(low01, low23, 2, 3, 6, 7);
  *reinterpret_cast<Quad*>(dst + 2 * ld) = STATECORE_SHUFFLE(high01, high23, 0, 1, 4, 5);
  *reinterpret_cast<Quad*>(dst + 3 * ld) = STATECORE_SHUFFLE(high01, high23, 2, 3, 6, 7);
#undef STATECORE_SHUFFLE
}

template <class Real>
void load_transposed(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Real factor,
                     Real* dst, int64_t ld) {
  constexpr int kRows = kTilePad, kCols = 128, kLd = tile_ld(kCols);
  Real block[kRows *
             kLd];  // rows are read along, converted, and transposed from here; zero below the last one
  const int64_t element = element_bytes(dtype);
  for (int i0 = 0; i0 < rows; i0 += kRows)
    for (int j0 = 0; j0 < cols; j0 += kCols) {
      const int height = rows - i0 < kRows ? rows - i0 : kRows, width = cols - j0 < kCols ? cols - j0 : kCols;
      load(dtype, static_cast<const char*>(src) + (i0 * src_stride + j0) * element, src_stride, height, width,
           factor, block, kLd);
      for (int i = height * kLd; i < kRows * kLd; ++i) block[i] = 0;
      Real* corner = dst + j0 * ld + i0;
      int j = 0;
      for (; j + 4 <= width; j += 4)
        for (int i = 0; i < kRows; i += 4) transpose_quad(block + i * kLd + j, kLd, corner + j * ld + i, ld);
      for (; j < width; ++j)
        for (int i = 0; i < kRows; ++i) corner[j * ld + i] = block[i * kLd + j];
    }
}

template <class Real>
void store(DType dtype, void* dst, int64_t dst_stride, int rows, int cols, const Real* src, int64_t ld) {
  with_format(dtype, [&](auto format) {
    using Format = decltype(format);
    for (int i = 0; i < rows; ++i) {
      auto* to = static_cast<typename Format::Storage*>(dst) + i * dst_stride;
      const Real* from = src + i * ld;
      for (int j = 0; j < cols; ++j) to[j] = Format::from(from[j]);
    }
  });
}

// ---- matrix product --------------------------------------------------------------------------------

// Accumulators of one register block: kBlockRows x 2 vectors. 16 of AVX-512's 32 registers hide the
// latency of two FMA units; AVX2 and SSE have 16 registers in all.
constexpr int kBlockRows = STATECORE_VECTOR_BYTES == 64 ? 8 : STATECORE_VECTOR_BYTES == 32 ? 6 : 4;

template <class Real, int Rows, int Vectors>
inline void matmul_block(int k, const Real* a, int64_t a_row, int64_t a_col, const Real* b, int64_t ldb,
                         Real* c, int64_t ldc, bool accumulate) {
  constexpr int kWidth = kLanes<Real>;
  Vec<Real> sum[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v)
      sum[i][v] = accumulate ? load_vec(c + i * ldc + v * kWidth) : Vec<Real>{};
  for (int p = 0; p < k; ++p) {
    Vec<Real> row[Vectors];
    for (int v = 0; v < Vectors; ++v) row[v] = load_vec(b + p * ldb + v * kWidth);
    for (int i = 0; i < Rows; ++i) {
      const Real x = a[i * a_row + p * a_col];
      for (int v = 0; v < Vectors; ++v) sum[i][v] += x * row[v];
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v) store_vec(c + i * ldc + v * kWidth, sum[i][v]);
}

template <class Real, int Rows, int Vectors>
inline void matmul_rows(int m, int k, const Real* a, int64_t a_row, int64_t a_col, const Real* b, int64_t ldb,
                        Real* c, int64_t ldc, bool accumulate) {
  int i = 0;
  for (; i + Rows <= m; i += Rows)
    matmul_block<Real, Rows, Vectors>(k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, accumulate);
  if constexpr (Rows > 1)
    matmul_rows<Real, Rows / 2, Vectors>(m - i, k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc,
                                         accumulate);
}

template <class Real>
void matmul(int m, int n, int k, const Real* a, int64_t a_row, int64_t a_col, const Real* b, int64_t ldb,
            Real* c, int64_t ldc, bool accumulate) {
  constexpr int kWidth = kLanes<Real>;
  int j = 0;
  for (; j + 2 * kWidth <= padded(n); j += 2 * kWidth)
    matmul_rows<Real, kBlockRows, 2>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate);
  for (; j < padded(n); j += kWidth)
    matmul_rows<Real, kBlockRows, 1>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate);
}

// ---- element-wise ----------------------------------------------------------------------------------

template <class Real>
void scale_rows(int rows, int cols, const Real* factor, Real* x, int64_t ld) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < padded(cols); ++j) x[i * ld + j] *= factor[i];
}

template <class Real>
void multiply(int rows, int cols, const Real* x, int64_t ldx, const Real* y, int64_t ldy, Real* out,
              int64_t ldo) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < padded(cols); j += kLanes<Real>)
      store_vec(out + i * ldo + j, load_vec(x + i * ldx + j) * load_vec(y + i * ldy + j));
}

template <class Real>
void axpby(int64_t n, Real a, Real* y, Real b, const Real* x) {
  for (int64_t i = 0; i < n; ++i) y[i] = a * y[i] + b * x[i];
}

template <int N, class Real>
Real sum_pairwise(const Real* x) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    Real half[N / 2];
    for (int i = 0; i < N / 2; ++i) half[i] = x[i] + x[i + N / 2];
    return sum_pairwise<N / 2>(half);
  }
}

template <class Real>
Real sum_lanes(Vec<Real> v) {
  Real x[kLanes<Real>];
  store_vec(x, v);
  return sum_pairwise<kLanes<Real>>(x);
}

template <class Real>
void dot_rows(int rows, int cols, const Real* x, int64_t ldx, const Real* y, int64_t ldy, Real* out) {
  for (int i = 0; i < rows; ++i) {
    Vec<Real> sum{};
    for (int j = 0; j < padded(cols); j += kLanes<Real>)
      sum += load_vec(x + i * ldx + j) * load_vec(y + i * ldy + j);
    out[i] = sum_lanes<Real>(sum);
  }
}

template <class Real>
void softmax_block(int rows, int cols, Real* s, int64_t ld, Real* col_max, Real* col_sum, Real* correction) {
  for (int j = 0; j < padded(cols); j += kLanes<Real>) {
    const Vec<Real> before = load_vec(col_max + j);
    Vec<Real> top = before;
    for (int i = 0; i < rows; ++i) {
      const Vec<Real> x = load_vec(s + i * ld + j);
      top = x > top ? x : top;
    }
    const Vec<Real> shift = top == Real(-kInf) ? Vec<Real>{} : top;
    Vec<Real> sum{};
    for (int i = 0; i < rows; ++i) {
      const Vec<Real> p = exp_vec(load_vec(s + i * ld + j) - shift);
      store_vec(s + i * ld + j, p);
      sum += p;
    }
    const Vec<Real> factor = exp_vec(before - shift);
    store_vec(col_max + j, top);
    store_vec(correction + j, factor);
    store_vec(col_sum + j, load_vec(col_sum + j) * factor + sum);
  }
}

template <class Real>
void exp_shifted(int rows, int cols, Real* s, int64_t ld, const Real* shift) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < padded(cols); j += kLanes<Real>)
      store_vec(s + i * ld + j, exp_vec(load_vec(s + i * ld + j) - load_vec(shift + j)));
}

template <class Real>
void softmax_backward(int rows, int cols, const Real* p, Real* ds, int64_t ld, const Real* delta) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < padded(cols); ++j) ds[i * ld + j] = p[i * ld + j] * (ds[i * ld + j] - delta[j]);
}

template <class Real>
void gated_add(int rows, int cols, Real* out, const Real* base, const Real* gate, int64_t ld) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < padded(cols); j += kLanes<Real>) {
      const int64_t at = i * ld + j;
      const Vec<Real> sigmoid = 1 / (1 + exp_vec(-load_vec(gate + at)));
      store_vec(out + at, load_vec(base + at) + sigmoid * load_vec(out + at));
    }
}

// ---- decoding --------------------------------------------------------------------------------------

// out[0, Vectors) (+)= q state for `rows` rows of the state, `cols` apart.
template <class Real, int Vectors>
inline void read_rows(int rows, int cols, const Real* q, const Real* state, Real* out, bool accumulate) {
  constexpr int kWidth = kLanes<Real>;
  Vec<Real> sum[Vectors];
  for (int x = 0; x < Vectors; ++x) sum[x] = accumulate ? load_vec(out + x * kWidth) : Vec<Real>{};
  for (int i = 0; i < rows; ++i)
    for (int x = 0; x < Vectors; ++x) sum[x] += q[i] * load_vec(state + int64_t(i) * cols + x * kWidth);
  for (int x = 0; x < Vectors; ++x) store_vec(out + x * kWidth, sum[x]);
}

template <class Real>
void update_read(int rows, int cols, Real decay, const Real* k, const Real* v, Real* state, int queries,
                 const Real* q, Real* out) {
  constexpr int kWidth = kLanes<Real>;
  constexpr int kRows = 8;  // rows that are read again for every query while the L1 cache holds them
  for (int i0 = 0; i0 < rows; i0 += kRows) {
    const int block = i0 + kRows < rows ? kRows : rows - i0;
    Real* s = state + int64_t(i0) * cols;
    for (int i = 0; i < block; ++i, s += cols) {
      int j = 0;
      for (; j + kWidth <= cols; j += kWidth)
        store_vec(s + j, decay * load_vec(s + j) + k[i0 + i] * load_vec(v + j));
      for (; j < cols; ++j) s[j] = decay * s[j] + k[i0 + i] * v[j];
    }
    s = state + int64_t(i0) * cols;
    for (int g = 0; g < queries; ++g) {
      const Real* query = q + int64_t(g) * rows + i0;
      Real* o = out + int64_t(g) * cols;
      int j = 0;
      for (; j + 4 * kWidth <= cols; j += 4 * kWidth)
        read_rows<Real, 4>(block, cols, query, s + j, o + j, i0 > 0);
      for (; j + kWidth <= cols; j += kWidth) read_rows<Real, 1>(block, cols, query, s + j, o + j, i0 > 0);
      for (; j < cols; ++j) {
        Real sum = i0 > 0 ? o[j] : Real(0);
        for (int i = 0; i < block; ++i) sum += query[i] * s[int64_t(i) * cols + j];
        o[j] = sum;
      }
    }
  }
}

template <class Real>
constexpr TileKernels<Real> kTable{
    .matmul = matmul<Real>,
    .load = load<Real>,
    .load_transposed = load_transposed<Real>,
    .store = store<Real>,
    .scale_rows = scale_rows<Real>,
    .multiply = multiply<Real>,
    .axpby = axpby<Real>,
    .dot_rows = dot_rows<Real>,
    .softmax_block = softmax_block<Real>,
    .exp_shifted = exp_shifted<Real>,
    .softmax_backward = softmax_backward<Real>,
    .gated_add = gated_add<Real>,
    .update_read = update_read<Real>,
};

}  // namespace

const TileKernels<float>& STATECORE_ISA::float_kernels() { return kTable<float>; }
const TileKernels<double>& STATECORE_ISA::double_kernels() { return kTable<double>; }

}  // namespace statecore
