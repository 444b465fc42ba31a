// The small dense-tile routines that every CPU backend is made of: what an operator does to a tile is
// said in the operator's own file, how a tile is multiplied, converted or exponentiated is said here.
//
// A tile is a row-major block in scratch memory with leading dimension `ld` from tile_ld(). Results of
// products are tiles of Real: float, or double for double inputs. What enters a product is a tile of Operand:
//
//   float, double    the numbers themselves
//   BFloat16Pair     two bfloat16 that are neighbours along the dimension that is summed over, for processors
//   that
//                    multiply and add such pairs with float32 accumulation (AVX-512-BF16)
//
// Columns beyond the logical width up to padded(width) exist and are finite, so that routines may compute on
// whole vectors; whatever fills a tile zeroes them.
//
// Each instruction set implements the same tables in a translation unit of its own (tile_kernels_*.cpp, all
// from tile_kernels_impl.h); one is picked when a table is first asked for: the best that the processor has,
// or the lower one named by STATECORE_CPU_ISA (portable, avx2, avx512, avx512_bf16).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace statecore {

constexpr int kTilePad = 16;  // columns are padded to this many elements: one AVX-512 vector of float

constexpr int padded(int width) { return (width + kTilePad - 1) / kTilePad * kTilePad; }

// One vector more than needed, because rows a power of two apart fall into the same few sets of the L1 cache.
constexpr int tile_ld(int width) { return padded(width) + kTilePad; }

struct BFloat16Pair {
  uint16_t first, second;
};

template <class Operand>
struct OperandTraits {
  using Real = Operand;
  static constexpr DType kDType = sizeof(Operand) == 8 ? DType::kFloat64 : DType::kFloat32;
  static constexpr int kSummands = 1;  // numbers in an operand
};
template <>
struct OperandTraits<BFloat16Pair> {
  using Real = float;
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr int kSummands = 2;
};

template <class Operand>
using RealOf = typename OperandTraits<Operand>::Real;

// Operands that `n` numbers along the summed dimension fill; the last one may be half empty (zero).
template <class Operand>
constexpr int depth(int n) {
  return (n + OperandTraits<Operand>::kSummands - 1) / OperandTraits<Operand>::kSummands;
}

// Products and what enters them. Sources are tensors or tiles of `dtype`, rows src_stride elements apart, and
// are rounded to nearest even.
template <class Operand>
struct ProductKernels {
  using Real = RealOf<Operand>;

  // c[m, n] = factor * sum_p a[i, p] b[p, j] over p < depth, added to c if `accumulate`. Operand (i, p) of a
  // is a[i * a_row + p * a_col]: a transposed operand costs nothing. n is rounded up to padded(n).
  void (*matmul)(int m, int n, int depth, Real factor, const Operand* a, int64_t a_row, int64_t a_col,
                 const Operand* b, int64_t ldb, Real* c, int64_t ldc, bool accumulate);

  // dst[rows, depth(cols)], to be summed along the columns of src[rows, cols].
  void (*pack_rows)(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Operand* dst,
                    int64_t ld);

  // dst[depth(rows), cols], to be summed down the rows of src[rows, cols].
  void (*pack_columns)(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Operand* dst,
                       int64_t ld);

  // dst[depth(cols), rows]: src^T, to be summed along the columns of src[rows, cols].
  void (*pack_transposed)(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Operand* dst,
                          int64_t ld);

  // Softmax runs down the columns (a query is a column, a key a row): no sums across a vector. The arrays of
  // one value a column have padded(cols) elements. Scores are in units of ln 2.
  //
  // One block of an online softmax. With m = max(col_max, max of the column of s): p <- 2^(s - m), packed to
  // be summed down its rows; correction <- 2^(col_max - m), col_sum <- col_sum * correction + sum of the
  // column of p before rounding, col_max <- m. s may hold -inf (invisible) and is left undefined; p may be s
  // where Operand is Real. A column that has seen nothing but -inf keeps col_max = -inf, col_sum = 0.
  void (*softmax_block)(int rows, int cols, Real* s, int64_t ld, Operand* p, int64_t ldp, Real* col_max,
                        Real* col_sum, Real* correction);
};

// Everything that happens between products.
template <class Real>
struct TileKernels {
  // dst[rows, cols] = src; rows of src are src_stride elements apart.
  void (*load)(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Real* dst, int64_t ld);

  // dst[cols, rows] = src^T.
  void (*load_transposed)(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Real* dst,
                          int64_t ld);

  // dst[rows, cols] = src, rounded to nearest even; rows of dst are dst_stride elements apart.
  void (*store)(DType dtype, void* dst, int64_t dst_stride, int rows, int cols, const Real* src, int64_t ld);

  // Row i of x[rows, cols] *= factor[i].
  void (*scale_rows)(int rows, int cols, const Real* factor, Real* x, int64_t ld);

  // out[i, j] = x[i, j] * y[i, j].
  void (*multiply)(int rows, int cols, const Real* x, int64_t ldx, const Real* y, int64_t ldy, Real* out,
                   int64_t ldo);

  // out[i] = a * x[i] + b * y[i], i < n; out may be x or y.
  void (*axpby)(int64_t n, Real a, const Real* x, Real b, const Real* y, Real* out);

  // out[i] = sum_j x[i, j] y[i, j].
  void (*dot_rows)(int rows, int cols, const Real* x, int64_t ldx, const Real* y, int64_t ldy, Real* out);

  // x[i, j] <- exp(x[i, j]) for x <= 0; -inf gives 0.
  void (*exponential)(int rows, int cols, Real* x, int64_t ld);

  // s[i, j] <- 2^(s[i, j] - shift[j]); s = -inf or shift = +inf gives 0.
  void (*exp2_shifted)(int rows, int cols, Real* s, int64_t ld, const Real* shift);

  // ds[i, j] <- p[i, j] * (ds[i, j] - delta[j]): the gradient through a softmax.
  void (*softmax_backward)(int rows, int cols, const Real* p, Real* ds, int64_t ld, const Real* delta);

  // out[i, j] <- base[i, j] + sigmoid(gate[i, j]) * out[i, j].
  void (*gated_add)(int rows, int cols, Real* out, const Real* base, const Real* gate, int64_t ld);

  // state <- decay * state + k^T v, then out = q state, in one pass over the state. Here nothing is padded:
  // state[rows, cols] is dense, k[rows], v[cols], q[queries, rows], out[queries, cols].
  void (*update_read)(int rows, int cols, Real decay, const Real* k, const Real* v, Real* state, int queries,
                      const Real* q, Real* out);
};

template <class Real>
const TileKernels<Real>& tile_kernels();  // instantiated for float and double

template <class Operand>
const ProductKernels<Operand>& product_kernels();  // float, double, and BFloat16Pair where it exists

bool has_bfloat16_products();

const char* cpu_isa();  // name of the instruction set in use

}  // namespace statecore
