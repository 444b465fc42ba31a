// The dense-tile routines that all CPU backends are built from: products, conversions, exponentials and the
// like. What an operator computes with its tiles is in the operator's own file.
//
// A tile is a row-major matrix in scratch memory with leading dimension `ld` from tile_ld(). Products produce
// tiles of Real: float, or double for double inputs. They consume tiles of Operand:
//
//   float, double   plain numbers
//   BFloat16Pair    two bfloat16 that are adjacent along the contraction dimension, for processors that
//                   multiply such pairs and accumulate in float32 (AVX-512-BF16)
//
// The columns between the logical width and padded(width) exist and are finite, so that routines can work on
// whole vectors; every routine that fills a tile zeroes them.
//
// Each instruction set implements the same tables in its own translation unit (tile_kernels_*.cpp, all of
// which include tile_kernels_impl.h). The first use selects the best one that the processor supports, or the
// one named by STATECORE_CPU_ISA (portable, avx2, avx512, avx512_bf16).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace statecore {

constexpr int kTilePad = 16;  // widths are padded to a multiple of this: one AVX-512 vector of float

constexpr int padded(int width) { return (width + kTilePad - 1) / kTilePad * kTilePad; }

// One vector more than needed, because rows a power of two apart would fall into the same few L1 cache sets.
constexpr int tile_ld(int width) { return padded(width) + kTilePad; }

struct BFloat16Pair {
  uint16_t first, second;
};

template <class Operand>
struct OperandTraits {
  using Real = Operand;
  static constexpr DType kDType = sizeof(Operand) == 8 ? DType::kFloat64 : DType::kFloat32;
  static constexpr int kPackFactor = 1;  // numbers per operand
};
template <>
struct OperandTraits<BFloat16Pair> {
  using Real = float;
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr int kPackFactor = 2;
};

template <class Operand>
using RealOf = typename OperandTraits<Operand>::Real;

// Number of operands that hold n numbers along the contraction dimension; a missing second half is zero.
template <class Operand>
constexpr int depth(int n) {
  return (n + OperandTraits<Operand>::kPackFactor - 1) / OperandTraits<Operand>::kPackFactor;
}

// Products, and packing of their operands. Sources of packing are tensors or tiles of `dtype` with rows
// src_stride elements apart; values are rounded to nearest even.
template <class Operand>
struct ProductKernels {
  using Real = RealOf<Operand>;

  // c[i, j] = factor * sum_p a[i, p] b[p, j] for i < m, j < padded(n), p < depth, added to c if `accumulate`.
  // Operand (i, p) of a is a[i * a_row + p * a_col], so that a transposed a costs nothing.
  void (*matmul)(int m, int n, int depth, Real factor, const Operand* a, int64_t a_row, int64_t a_col,
                 const Operand* b, int64_t ldb, Real* c, int64_t ldc, bool accumulate);

  // dst[rows, depth(cols)]: src[rows, cols] packed for contraction over its columns.
  void (*pack_rows)(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Operand* dst,
                    int64_t ld);

  // dst[depth(rows), cols]: src[rows, cols] packed for contraction over its rows.
  void (*pack_columns)(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Operand* dst,
                       int64_t ld);

  // dst[depth(cols), rows]: src^T, packed for contraction over the columns of src[rows, cols].
  void (*pack_transposed)(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Operand* dst,
                          int64_t ld);

  // One block of an online softmax, on the transposed scores s[keys, queries]: every query is a column, so
  // that no reduction crosses the lanes of a vector. row_max, row_sum and rescale have one value per query (a
  // row of QK^T), padded(queries) in total. Scores have been multiplied by log2(e).
  //
  // With m = max(row_max, maximum of s over the keys): p <- 2^(s - m), packed for contraction over the keys;
  // rescale <- 2^(row_max - m); row_sum <- row_sum * rescale + sum of the unrounded p; row_max <- m. Masked
  // scores are -inf; a query with no visible key so far keeps row_max = -inf and row_sum = 0. s is clobbered.
  // p may alias s if Operand is Real.
  void (*softmax_block)(int keys, int queries, Real* s, int64_t ld, Operand* p, int64_t ldp, Real* row_max,
                        Real* row_sum, Real* rescale);
};

// Everything between products.
template <class Real>
struct TileKernels {
  // dst[rows, cols] = src, with rows of src src_stride elements apart.
  void (*load)(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Real* dst, int64_t ld);

  // dst[cols, rows] = src^T.
  void (*load_transposed)(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Real* dst,
                          int64_t ld);

  // dst[rows, cols] = src, rounded to nearest even, with rows of dst dst_stride elements apart.
  void (*store)(DType dtype, void* dst, int64_t dst_stride, int rows, int cols, const Real* src, int64_t ld);

  // x[i, j] *= factor[i].
  void (*scale_rows)(int rows, int cols, const Real* factor, Real* x, int64_t ld);

  // out[i, j] = x[i, j] * y[i, j].
  void (*multiply)(int rows, int cols, const Real* x, int64_t ldx, const Real* y, int64_t ldy, Real* out,
                   int64_t ldo);

  // out[i] = a * x[i] + b * y[i] for i < n; out may alias x or y.
  void (*axpby)(int64_t n, Real a, const Real* x, Real b, const Real* y, Real* out);

  // out[i] = sum_j x[i, j] y[i, j].
  void (*dot_rows)(int rows, int cols, const Real* x, int64_t ldx, const Real* y, int64_t ldy, Real* out);

  // x[i, j] <- exp(x[i, j]) for x <= 0; 0 for -inf.
  void (*exponential)(int rows, int cols, Real* x, int64_t ld);

  // s[i, j] <- 2^(s[i, j] - shift[j]); 0 if s is -inf or shift is +inf.
  void (*exp2_shifted)(int rows, int cols, Real* s, int64_t ld, const Real* shift);

  // ds[i, j] <- p[i, j] * (ds[i, j] - delta[j]): on entry ds is dP, the gradient of the probabilities.
  void (*softmax_backward)(int rows, int cols, const Real* p, Real* ds, int64_t ld, const Real* delta);

  // out[i, j] <- base[i, j] + sigmoid(gate[i, j]) * out[i, j].
  void (*gated_add)(int rows, int cols, Real* out, const Real* base, const Real* gate, int64_t ld);

  // state <- decay * state + k^T v, then out = q state, in one pass over the state. All arrays are dense and
  // not padded: state[rows, cols], k[rows], v[cols], q[queries, rows], out[queries, cols].
  void (*update_read)(int rows, int cols, Real decay, const Real* k, const Real* v, Real* state, int queries,
                      const Real* q, Real* out);
};

template <class Real>
const TileKernels<Real>& tile_kernels();  // instantiated for float and double

template <class Operand>
const ProductKernels<Operand>& product_kernels();  // float, double; BFloat16Pair if has_bfloat16_products()

bool has_bfloat16_products();

const char* cpu_isa();  // the name of the instruction set in use

}  // namespace statecore
