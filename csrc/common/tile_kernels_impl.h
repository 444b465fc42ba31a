// The implementation of tile_kernels.h, in GCC / Clang vector extensions, compiled once per instruction set
// by the tile_kernels_<isa>.cpp files, which define STATECORE_VECTOR_BYTES and STATECORE_ISA and include it.
//
// Everything is in an unnamed namespace and calls no inline function of the standard library: the linker
// could otherwise pick the copy that was compiled for a higher instruction set.
#include <cstdint>

#if defined(__AVX2__)
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
  typedef uint32_t Unsigned __attribute__((vector_size(STATECORE_VECTOR_BYTES), aligned(4), may_alias));
  typedef uint16_t Halves __attribute__((vector_size(STATECORE_VECTOR_BYTES / 2), aligned(2), may_alias));
  using Integer = int32_t;
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(STATECORE_VECTOR_BYTES), aligned(8), may_alias));
  using Integer = int64_t;
};
template <class T>
using Vec = typename VectorOf<T>::Type;
using Bits = VectorOf<float>::Bits;
using Unsigned = VectorOf<float>::Unsigned;
using Halves = VectorOf<float>::Halves;
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
template <class To, class From>
To bit_cast(const From& from) {
  return __builtin_bit_cast(To, from);
}

constexpr float kInf = __builtin_inff();

// ---- exponential -----------------------------------------------------------------------------------

// exp(x) for x <= 88 as 2^n * p(r) with x = n ln 2 + r, |r| <= ln(2) / 2; relative error below 2e-7. Exactly
// 0 for x < -87, so that masked keys (-inf) contribute nothing.
Vec<float> exp_vec(Vec<float> x) {
  using V = Vec<float>;
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
  const V power = bit_cast<V>((bit_cast<Bits>(shifted) << 23) + (127 << 23));
  return x < -87.f ? V{} : p * power;
}

// 2^x for x <= 127 with relative error below 2e-7; exactly 0 for x < -126, including -inf.
Vec<float> exp2_vec(Vec<float> x) {
  using V = Vec<float>;
#if defined(__AVX512F__)
  const V n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const V clamped = x < -126.f ? V{} - 126.f : x;
  const V magic = V{} + 12582912.f;
  const V shifted = clamped + magic;
  const V n = shifted - magic;
#endif
  const V r = x - n;  // in [-1/2, 1/2]
  V p = V{} + 1.3276471519e-3f;
  p = p * r + 9.6755413307e-3f;
  p = p * r + 5.5507132750e-2f;
  p = p * r + 2.4022119724e-1f;
  p = p * r + 6.9314696706e-1f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, V{} - 126.f, _CMP_NLT_UQ), p, n);
#else
  const V power = bit_cast<V>((bit_cast<Bits>(shifted) << 23) + (127 << 23));
  return x < -126.f ? V{} : p * power;
#endif
}

// double is for gradient checks: accurate to the last bits, not fast.
Vec<double> exp_vec(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
Vec<double> exp2_vec(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp2(x[i]);
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
  // Scaling by 2^112 rebiases the exponent and normalises subnormal halves.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000u)));
}

uint16_t float_to_f16(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65536 or more: infinity
  if (magnitude < 0x38800000u) {
    // Subnormal half: adding 0.5 makes the float adder round to multiples of 2^-24.
    return uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13));
}
#endif

// One type per storage format: of() reads an element, from() rounds to one, load() and store() convert
// vectors of float.
struct AsFloat32 {
  using Storage = float;
  static float of(float x) { return x; }
  static float from(float x) { return x; }
  static Vec<float> load(const float* p) { return load_vec(p); }
  static void store(float* p, Vec<float> x) { store_vec(p, x); }
};
struct AsFloat64 {
  using Storage = double;
  static double of(double x) { return x; }
  static double from(double x) { return x; }
  static Vec<float> load(const double* p) {
    Vec<float> x;
    for (int i = 0; i < kLanes<float>; ++i) x[i] = float(p[i]);
    return x;
  }
  static void store(double* p, Vec<float> x) {
    for (int i = 0; i < kLanes<float>; ++i) p[i] = x[i];
  }
};
struct AsBFloat16 {
  using Storage = uint16_t;
  static float of(uint16_t x) { return bf16_to_float(x); }
  static uint16_t from(float x) { return float_to_bf16(x); }
  static Vec<float> load(const uint16_t* p) {
    const Halves halves = *reinterpret_cast<const Halves*>(p);
    return bit_cast<Vec<float>>(__builtin_convertvector(halves, Unsigned) << 16);
  }
  static void store(uint16_t* p, Vec<float> x) {
    const Unsigned bits = bit_cast<Unsigned>(x);
    const Unsigned rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const Unsigned nan = bits >> 16 | 0x40u;  // NaN stays NaN
    const Unsigned result = (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
    *reinterpret_cast<Halves*>(p) = __builtin_convertvector(result, Halves);
  }
};
struct AsFloat16 {
  using Storage = uint16_t;
  static float of(uint16_t x) { return f16_to_float(x); }
  static uint16_t from(float x) { return float_to_f16(x); }
#if STATECORE_VECTOR_BYTES == 64
  static Vec<float> load(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(uint16_t* p, Vec<float> x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
#elif STATECORE_VECTOR_BYTES == 32
  static Vec<float> load(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(uint16_t* p, Vec<float> x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static Vec<float> load(const uint16_t* p) {
    Vec<float> x;
    for (int i = 0; i < kLanes<float>; ++i) x[i] = of(p[i]);
    return x;
  }
  static void store(uint16_t* p, Vec<float> x) {
    for (int i = 0; i < kLanes<float>; ++i) p[i] = from(x[i]);
  }
#endif
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

// The stride between rows of a tensor is too large for the hardware prefetcher, so loops over rows prefetch
// this many rows ahead, which also covers the first rows of the next tile.
constexpr int kRowsAhead = 8;

inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(row) + line);
}

// Rows have functions of their own because vector stores may alias anything that a lambda captures.
template <class Format, class Real>
inline void load_row(const typename Format::Storage* src, int cols, Real* dst) {
  int j = 0;
  if constexpr (sizeof(Real) == sizeof(float))
    for (; j + kLanes<float> <= cols; j += kLanes<float>) store_vec(dst + j, Format::load(src + j));
  for (; j < cols; ++j) dst[j] = Real(Format::of(src[j]));
  for (; j < padded(cols); ++j) dst[j] = 0;
}

template <class Format, class Real>
inline void store_row(const Real* src, int cols, typename Format::Storage* dst) {
  int j = 0;
  if constexpr (sizeof(Real) == sizeof(float))
    for (; j + kLanes<float> <= cols; j += kLanes<float>) Format::store(dst + j, load_vec(src + j));
  for (; j < cols; ++j) dst[j] = Format::from(src[j]);
}

template <class Real>
void load(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Real* dst, int64_t ld) {
  with_format(dtype, [=](auto format) {
    using Format = decltype(format);
    const auto* from = static_cast<const typename Format::Storage*>(src);
    for (int i = 0; i < rows; ++i) {
      prefetch_row(from + (i + kRowsAhead) * src_stride, cols * sizeof(*from));
      load_row<Format>(from + i * src_stride, cols, dst + i * ld);
    }
  });
}

template <class Real>
void store(DType dtype, void* dst, int64_t dst_stride, int rows, int cols, const Real* src, int64_t ld) {
  with_format(dtype, [=](auto format) {
    using Format = decltype(format);
    auto* to = static_cast<typename Format::Storage*>(dst);
    for (int i = 0; i < rows; ++i) store_row<Format>(src + i * ld, cols, to + i * dst_stride);
  });
}

// ---- operands ----------------------------------------------------------------------------------------

// Real operands are not packed.
template <class Real>
struct Packing {
  static void rows(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Real* dst,
                   int64_t ld) {
    load(dtype, src, src_stride, rows, cols, dst, ld);
  }
  static void columns(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Real* dst,
                      int64_t ld) {
    load(dtype, src, src_stride, rows, cols, dst, ld);
  }
};

#if defined(__AVX512BF16__)
// The pairs (even[j], odd[j]), rounded.
Bits pair_up(Vec<float> even, Vec<float> odd) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return bit_cast<Bits>(
      _mm512_permutexvar_epi16(interleave, bit_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even))));
}

template <class Format>
Bits load_pairs(const typename Format::Storage* even, const typename Format::Storage* odd) {
  return pair_up(Format::load(even), Format::load(odd));
}
template <>
Bits load_pairs<AsBFloat16>(const uint16_t* even, const uint16_t* odd) {
  const Unsigned low = __builtin_convertvector(*reinterpret_cast<const Halves*>(even), Unsigned);
  const Unsigned high = __builtin_convertvector(*reinterpret_cast<const Halves*>(odd), Unsigned);
  return bit_cast<Bits>(low | high << 16);
}

template <>
struct Packing<BFloat16Pair> {
  static constexpr int kWidth = kLanes<float>;

  static void rows(DType dtype, const void* src, int64_t src_stride, int rows, int cols, BFloat16Pair* dst,
                   int64_t ld) {
    for (int i = 0; i < rows; ++i) {
      uint16_t* to = reinterpret_cast<uint16_t*>(dst + i * ld);
      prefetch_row(static_cast<const char*>(src) + (i + kRowsAhead) * src_stride * element_bytes(dtype),
                   cols * element_bytes(dtype));
      if (dtype == DType::kBFloat16)
        row(static_cast<const uint16_t*>(src) + i * src_stride, cols, to);
      else
        row(static_cast<const float*>(src) + i * src_stride, cols, to);
      for (int j = cols; j < 2 * padded(depth<BFloat16Pair>(cols)); ++j) to[j] = 0;
    }
  }

  static void columns(DType dtype, const void* src, int64_t src_stride, int rows, int cols, BFloat16Pair* dst,
                      int64_t ld) {
    with_format(dtype, [=](auto format) {
      using Format = decltype(format);
      const auto* from = static_cast<const typename Format::Storage*>(src);
      for (int i = 0; i + 1 < rows; i += 2) {
        prefetch_row(from + (i + kRowsAhead) * src_stride, cols * sizeof(*from));
        prefetch_row(from + (i + 1 + kRowsAhead) * src_stride, cols * sizeof(*from));
        two_rows<Format>(from + i * src_stride, from + (i + 1) * src_stride, cols, dst + i / 2 * ld);
      }
      if (rows % 2) last_row<Format>(from + (rows - 1) * src_stride, cols, dst + rows / 2 * ld);
    });
  }

 private:
  static void row(const uint16_t* src, int cols, uint16_t* dst) {
    int j = 0;
    for (; j + 2 * kWidth <= cols; j += 2 * kWidth)
      _mm512_storeu_si512(dst + j, _mm512_loadu_si512(reinterpret_cast<const __m512i*>(src + j)));
    for (; j < cols; ++j) dst[j] = src[j];
  }
  static void row(const float* src, int cols, uint16_t* dst) {
    int j = 0;
    for (; j + 2 * kWidth <= cols; j += 2 * kWidth)
      _mm512_storeu_si512(
          dst + j, bit_cast<__m512i>(_mm512_cvtne2ps_pbh(load_vec(src + j + kWidth), load_vec(src + j))));
    for (; j < cols; ++j) dst[j] = float_to_bf16(src[j]);
  }

  template <class Format>
  static void two_rows(const typename Format::Storage* even, const typename Format::Storage* odd, int cols,
                       BFloat16Pair* dst) {
    int j = 0;
    for (; j + kWidth <= cols; j += kWidth)
      *reinterpret_cast<Bits*>(dst + j) = load_pairs<Format>(even + j, odd + j);
    for (; j < cols; ++j)
      dst[j] = {float_to_bf16(float(Format::of(even[j]))), float_to_bf16(float(Format::of(odd[j])))};
    for (; j < padded(cols); ++j) dst[j] = {0, 0};
  }
  template <class Format>
  static void last_row(const typename Format::Storage* even, int cols, BFloat16Pair* dst) {
    int j = 0;
    for (; j < cols; ++j) dst[j] = {float_to_bf16(float(Format::of(even[j]))), 0};
    for (; j < padded(cols); ++j) dst[j] = {0, 0};
  }
};
#endif

// dst = src^T for 4 x 4 elements.
template <class Element>
inline void transpose_quad(const Element* src, int64_t src_ld, Element* dst, int64_t ld) {
  typedef Element Quad __attribute__((vector_size(4 * sizeof(Element)), aligned(sizeof(Element)), may_alias));
#if defined(__clang__)
#define STATECORE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
  typedef typename VectorOf<Element>::Integer Lanes __attribute__((vector_size(4 * sizeof(Element))));
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

// Operands are moved whole: a BFloat16Pair as if it were a float.
template <class Operand>
void pack_transposed(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Operand* dst,
                     int64_t ld) {
  using Element = RealOf<Operand>;
  static_assert(sizeof(Element) == sizeof(Operand));
  constexpr int kRows = kTilePad, kCols = 128, kLd = tile_ld(kCols);
  Operand block[kRows * kLd];  // rows are packed here, then transposed
  const Element* from = reinterpret_cast<const Element*>(block);
  for (int i0 = 0; i0 < rows; i0 += kRows)
    for (int j0 = 0; j0 < cols; j0 += kCols) {
      const int height = rows - i0 < kRows ? rows - i0 : kRows, width = cols - j0 < kCols ? cols - j0 : kCols;
      const char* corner_src = static_cast<const char*>(src) + (i0 * src_stride + j0) * element_bytes(dtype);
      Packing<Operand>::rows(dtype, corner_src, src_stride, height, width, block, kLd);
      for (int i = height * kLd; i < kRows * kLd; ++i) block[i] = Operand{};
      Operand* corner = dst + depth<Operand>(j0) * ld + i0;
      const int operands = depth<Operand>(width);
      int j = 0;
      for (; j + 4 <= operands; j += 4)
        for (int i = 0; i < kRows; i += 4)
          transpose_quad(from + i * kLd + j, kLd, reinterpret_cast<Element*>(corner + j * ld + i), ld);
      for (; j < operands; ++j)
        for (int i = 0; i < kRows; ++i) corner[j * ld + i] = block[i * kLd + j];
    }
}

template <class Real>
void load_transposed(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Real* dst,
                     int64_t ld) {
  pack_transposed<Real>(dtype, src, src_stride, rows, cols, dst, ld);
}

// ---- matrix product --------------------------------------------------------------------------------

// A register block has kBlockRows rows of two vectors, or twice as many rows of one vector. 16 accumulators
// of AVX-512's 32 registers hide the latency of two FMA units; AVX2 and SSE have 16 registers in total.
constexpr int kBlockRows = STATECORE_VECTOR_BYTES == 64 ? 8 : STATECORE_VECTOR_BYTES == 32 ? 6 : 4;

// sum + x * row, with x broadcast.
template <class Real>
inline Vec<Real> multiply_add(Vec<Real> sum, Real x, const Real* row) {
  return sum + x * load_vec(row);
}
#if defined(__AVX512BF16__)
inline Vec<float> multiply_add(Vec<float> sum, BFloat16Pair x, const BFloat16Pair* row) {
  const Bits pairs = *reinterpret_cast<const Bits*>(row), broadcast = Bits{} + bit_cast<int32_t>(x);
  // Not the intrinsic: GCC 12 would copy every accumulator to another register and back around each use.
  asm("vdpbf16ps %1, %2, %0" : "+v"(sum) : "v"(pairs), "v"(broadcast));
  return sum;
}
#endif

template <class Operand, int Rows, int Vectors>
inline void matmul_block(int depth, RealOf<Operand> factor, const Operand* a, int64_t a_row, int64_t a_col,
                         const Operand* b, int64_t ldb, RealOf<Operand>* c, int64_t ldc, bool accumulate) {
  using Real = RealOf<Operand>;
  constexpr int kWidth = kLanes<Real>;
  Vec<Real> sum[Rows][Vectors] = {};
  for (int p = 0; p < depth; ++p)
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v)
        sum[i][v] = multiply_add(sum[i][v], a[i * a_row + p * a_col], b + p * ldb + v * kWidth);
  // Without explicit unrolling the accumulators would go through the stack here.
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      Real* to = c + i * ldc + v * kWidth;
      const Vec<Real> before = accumulate ? load_vec(to) : Vec<Real>{};
      store_vec(to, before + factor * sum[i][v]);
    }
}

template <class Operand, int Rows, int Vectors>
inline void matmul_rows(int m, int depth, RealOf<Operand> factor, const Operand* a, int64_t a_row,
                        int64_t a_col, const Operand* b, int64_t ldb, RealOf<Operand>* c, int64_t ldc,
                        bool accumulate) {
  int i = 0;
  for (; i + Rows <= m; i += Rows)
    matmul_block<Operand, Rows, Vectors>(depth, factor, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc,
                                         accumulate);
  if constexpr (Rows > 1)
    matmul_rows<Operand, Rows / 2, Vectors>(m - i, depth, factor, a + i * a_row, a_row, a_col, b, ldb,
                                            c + i * ldc, ldc, accumulate);
}

template <class Operand>
void matmul(int m, int n, int depth, RealOf<Operand> factor, const Operand* a, int64_t a_row, int64_t a_col,
            const Operand* b, int64_t ldb, RealOf<Operand>* c, int64_t ldc, bool accumulate) {
  constexpr int kWidth = kLanes<RealOf<Operand>>;
  int j = 0;
  for (; j + 2 * kWidth <= padded(n); j += 2 * kWidth)
    matmul_rows<Operand, kBlockRows, 2>(m, depth, factor, a, a_row, a_col, b + j, ldb, c + j, ldc,
                                        accumulate);
  for (; j < padded(n); j += kWidth)
    matmul_rows<Operand, 2 * kBlockRows, 1>(m, depth, factor, a, a_row, a_col, b + j, ldb, c + j, ldc,
                                            accumulate);
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
void axpby(int64_t n, Real a, const Real* x, Real b, const Real* y, Real* out) {
  int64_t i = 0;
  for (; i + kLanes<Real> <= n; i += kLanes<Real>)
    store_vec(out + i, a * load_vec(x + i) + b * load_vec(y + i));
  for (; i < n; ++i) out[i] = a * x[i] + b * y[i];
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
Vec<Real> max_vec(Vec<Real> x, Vec<Real> y) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == sizeof(float)) return _mm512_max_ps(x, y);
#endif
  return x > y ? x : y;
}

// Stores rows i and i + 1 (if `both`) of p, packed for contraction over rows.
template <class Real>
void store_probabilities(Real* p, int64_t ld, int i, Vec<Real> even, Vec<Real> odd, bool both) {
  store_vec(p + i * ld, even);
  if (both) store_vec(p + (i + 1) * ld, odd);
}
#if defined(__AVX512BF16__)
void store_probabilities(BFloat16Pair* p, int64_t ld, int i, Vec<float> even, Vec<float> odd, bool) {
  *reinterpret_cast<Bits*>(p + i / 2 * ld) = pair_up(even, odd);
}
#endif

// softmax_block for Vectors vectors of queries.
template <class Operand, int Vectors>
inline void softmax_strip(int keys, const RealOf<Operand>* s, int64_t ld, Operand* p, int64_t ldp,
                          RealOf<Operand>* row_max, RealOf<Operand>* row_sum, RealOf<Operand>* rescale) {
  using Real = RealOf<Operand>;
  constexpr int kWidth = kLanes<Real>;
  Vec<Real> new_max[Vectors], shift[Vectors], sum[Vectors] = {};
  for (int v = 0; v < Vectors; ++v) new_max[v] = load_vec(row_max + v * kWidth);
  for (int i = 0; i < keys; ++i)
    for (int v = 0; v < Vectors; ++v)
      new_max[v] = max_vec<Real>(load_vec(s + i * ld + v * kWidth), new_max[v]);
  for (int v = 0; v < Vectors; ++v) shift[v] = new_max[v] == Real(-kInf) ? Vec<Real>{} : new_max[v];
  for (int i = 0; i < keys; i += 2) {
    const bool both = i + 1 < keys;
    for (int v = 0; v < Vectors; ++v) {
      const Vec<Real> even = exp2_vec(load_vec(s + i * ld + v * kWidth) - shift[v]);
      const Vec<Real> odd = both ? exp2_vec(load_vec(s + (i + 1) * ld + v * kWidth) - shift[v]) : Vec<Real>{};
      sum[v] += even + odd;
      store_probabilities(p + v * kWidth, ldp, i, even, odd, both);
    }
  }
  for (int v = 0; v < Vectors; ++v) {
    const int j = v * kWidth;
    const Vec<Real> factor = exp2_vec(load_vec(row_max + j) - shift[v]);
    store_vec(row_max + j, new_max[v]);
    store_vec(rescale + j, factor);
    store_vec(row_sum + j, load_vec(row_sum + j) * factor + sum[v]);
  }
}

template <class Operand>
void softmax_block(int keys, int queries, RealOf<Operand>* s, int64_t ld, Operand* p, int64_t ldp,
                   RealOf<Operand>* row_max, RealOf<Operand>* row_sum, RealOf<Operand>* rescale) {
  constexpr int kWidth = kLanes<RealOf<Operand>>;
  int j = 0;
  for (; j + 4 * kWidth <= padded(queries); j += 4 * kWidth)
    softmax_strip<Operand, 4>(keys, s + j, ld, p + j, ldp, row_max + j, row_sum + j, rescale + j);
  for (; j < padded(queries); j += kWidth)
    softmax_strip<Operand, 1>(keys, s + j, ld, p + j, ldp, row_max + j, row_sum + j, rescale + j);
}

template <class Real>
void exponential(int rows, int cols, Real* x, int64_t ld) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < padded(cols); j += kLanes<Real>)
      store_vec(x + i * ld + j, exp_vec(load_vec(x + i * ld + j)));
}

template <class Real>
void exp2_shifted(int rows, int cols, Real* s, int64_t ld, const Real* shift) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < padded(cols); j += kLanes<Real>)
      store_vec(s + i * ld + j, exp2_vec(load_vec(s + i * ld + j) - load_vec(shift + j)));
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
      const Vec<Real> x = load_vec(gate + at);
      const Vec<Real> e = exp_vec(x > 0 ? -x : x);  // exp_vec would overflow for large positive arguments
      const Vec<Real> sigmoid = (x > 0 ? Vec<Real>{} + 1 : e) / (1 + e);
      store_vec(out + at, load_vec(base + at) + sigmoid * load_vec(out + at));
    }
}

// ---- decoding --------------------------------------------------------------------------------------

constexpr int kStateAhead = 32;  // prefetch distance in rows; past the end it reaches into the next state

// out[g] (+)= q[g] state for some rows and Vectors vectors of columns of the state, read once for all Queries
// queries. With `Update`, state <- decay * state + k^T v first.
template <class Real, bool Update, int Queries, int Vectors>
inline void read_block(int rows, int cols, Real decay, const Real* k, const Real* v, const Real* q, int q_ld,
                       Real* state, Real* out, bool accumulate) {
  constexpr int kWidth = kLanes<Real>;
  Vec<Real> sum[Queries][Vectors] = {}, value[Vectors];
  for (int x = 0; x < Vectors; ++x) value[x] = Update ? load_vec(v + x * kWidth) : Vec<Real>{};
  for (int i = 0; i < rows; ++i) {
    Real* row = state + int64_t(i) * cols;
    Vec<Real> s[Vectors];
#pragma GCC unroll 4
    for (int x = 0; x < Vectors; ++x) {
      s[x] = load_vec(row + x * kWidth);
      if constexpr (Update) {
        __builtin_prefetch(row + x * kWidth + kStateAhead * cols, 1);
        s[x] = decay * s[x] + k[i] * value[x];
        store_vec(row + x * kWidth, s[x]);
      }
    }
#pragma GCC unroll 3
    for (int g = 0; g < Queries; ++g)
#pragma GCC unroll 4
      for (int x = 0; x < Vectors; ++x) sum[g][x] += q[g * q_ld + i] * s[x];
  }
#pragma GCC unroll 3
  for (int g = 0; g < Queries; ++g)
#pragma GCC unroll 4
    for (int x = 0; x < Vectors; ++x) {
      Real* to = out + int64_t(g) * cols + x * kWidth;
      store_vec(to, accumulate ? load_vec(to) + sum[g][x] : sum[g][x]);
    }
}

// The same for all columns.
template <class Real, bool Update, int Queries>
inline void read_rows(int rows, int cols, Real decay, const Real* k, const Real* v, const Real* q, int q_ld,
                      Real* state, Real* out, bool accumulate) {
  constexpr int kWidth = kLanes<Real>, kVectors = STATECORE_VECTOR_BYTES == 64 ? 4 : 2;
  int j = 0;
  for (; j + kVectors * kWidth <= cols; j += kVectors * kWidth)
    read_block<Real, Update, Queries, kVectors>(rows, cols, decay, k, v + j, q, q_ld, state + j, out + j,
                                                accumulate);
  for (; j + kWidth <= cols; j += kWidth)
    read_block<Real, Update, Queries, 1>(rows, cols, decay, k, v + j, q, q_ld, state + j, out + j,
                                         accumulate);
  for (; j < cols; ++j) {
    for (int i = 0; Update && i < rows; ++i) {
      Real& s = state[int64_t(i) * cols + j];
      s = decay * s + k[i] * v[j];
    }
    for (int g = 0; g < Queries; ++g) {
      Real sum = accumulate ? out[int64_t(g) * cols + j] : Real(0);
      for (int i = 0; i < rows; ++i) sum += q[g * q_ld + i] * state[int64_t(i) * cols + j];
      out[int64_t(g) * cols + j] = sum;
    }
  }
}

template <class Real>
void update_read(int rows, int cols, Real decay, const Real* k, const Real* v, Real* state, int queries,
                 const Real* q, Real* out) {
  constexpr int kRows = 16;    // few enough to stay in the L1 cache for all queries
  constexpr int kQueries = 3;  // per pass over these rows
  for (int i0 = 0; i0 < rows; i0 += kRows) {
    const int block = i0 + kRows < rows ? kRows : rows - i0;
    Real* s = state + int64_t(i0) * cols;
    int g = queries < kQueries ? 1 : kQueries;
    if (g == 1)
      read_rows<Real, true, 1>(block, cols, decay, k + i0, v, q + i0, rows, s, out, i0 > 0);
    else
      read_rows<Real, true, kQueries>(block, cols, decay, k + i0, v, q + i0, rows, s, out, i0 > 0);
    for (; g + kQueries <= queries; g += kQueries)
      read_rows<Real, false, kQueries>(block, cols, decay, k + i0, v, q + int64_t(g) * rows + i0, rows, s,
                                       out + int64_t(g) * cols, i0 > 0);
    for (; g < queries; ++g)
      read_rows<Real, false, 1>(block, cols, decay, k + i0, v, q + int64_t(g) * rows + i0, rows, s,
                                out + int64_t(g) * cols, i0 > 0);
  }
}

template <class Operand>
constexpr ProductKernels<Operand> kProducts{
    .matmul = matmul<Operand>,
    .pack_rows = Packing<Operand>::rows,
    .pack_columns = Packing<Operand>::columns,
    .pack_transposed = pack_transposed<Operand>,
    .softmax_block = softmax_block<Operand>,
};

template <class Real>
constexpr TileKernels<Real> kTiles{
    .load = load<Real>,
    .load_transposed = load_transposed<Real>,
    .store = store<Real>,
    .scale_rows = scale_rows<Real>,
    .multiply = multiply<Real>,
    .axpby = axpby<Real>,
    .dot_rows = dot_rows<Real>,
    .exponential = exponential<Real>,
    .exp2_shifted = exp2_shifted<Real>,
    .softmax_backward = softmax_backward<Real>,
    .gated_add = gated_add<Real>,
    .update_read = update_read<Real>,
};

}  // namespace

extern const IsaKernels STATECORE_ISA;
const IsaKernels STATECORE_ISA{
    .float_tiles = &kTiles<float>,
    .double_tiles = &kTiles<double>,
    .float_products = &kProducts<float>,
    .double_products = &kProducts<double>,
#if defined(__AVX512BF16__)
    .bfloat16_products = &kProducts<BFloat16Pair>,
#endif
};

}  // namespace statecore
