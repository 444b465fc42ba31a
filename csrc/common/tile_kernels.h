// The small dense-tile routines that every CPU backend is made of: what an operator does to a tile is
// said in the operator's own file, how a tile is multiplied, converted or exponentiated is said here.
//
// A tile is a row-major block of Real (float, or double for double inputs) in scratch memory, with
// leading dimension `ld` from tile_ld(). Columns beyond the logical width up to padded(width) exist
// and are finite, so that routines may compute on whole vectors; load() and load_transposed() zero them.
//
// Each instruction set implements the same table in a translation unit of its own (tile_kernels_*.cpp,
// all from tile_kernels_impl.h); tile_kernels() picks one when it is first called: the best that the
// processor has, or the lower one named by STATECORE_CPU_ISA (portable, avx2, avx512).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace statecore {

constexpr int kTilePad = 16;  // columns are padded to this many elements: one AVX-512 vector of float

constexpr int padded(int width) { return (width + kTilePad - 1) / kTilePad * kTilePad; }

// One vector more than needed, because rows a power of two apart fall into the same few sets of the L1 cache.
constexpr int tile_ld(int width) { return padded(width) + kTilePad; }

template <class Real>
struct TileKernels {
  // c[m, n] = a[m, k] b[k, n], added to c if `accumulate`. Element (i, p) of a is a[i * a_row + p * a_col]:
  // a transposed operand costs nothing. n is rounded up to padded(n). Sums run over p in order.
  void (*matmul)(int m, int n, int k, const Real* a, int64_t a_row, int64_t a_col, const Real* b, int64_t ldb,
                 Real* c, int64_t ldc, bool accumulate);

  // dst[rows, cols] = factor * src; rows of src are src_stride elements apart.
  void (*load)(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Real factor, Real* dst,
               int64_t ld);

  // dst[cols, rows] = factor * src^T.
  void (*load_transposed)(DType dtype, const void* src, int64_t src_stride, int rows, int cols, Real factor,
                          Real* dst, int64_t ld);

  // dst[rows, cols] = src, rounded to nearest even; rows of dst are dst_stride elements apart.
  void (*store)(DType dtype, void* dst, int64_t dst_stride, int rows, int cols, const Real* src, int64_t ld);

  // Row i of x[rows, cols] *= factor[i].
  void (*scale_rows)(int rows, int cols, const Real* factor, Real* x, int64_t ld);

  // out[i, j] = x[i, j] * y[i, j].
  void (*multiply)(int rows, int cols, const Real* x, int64_t ldx, const Real* y, int64_t ldy, Real* out,
                   int64_t ldo);

  // y[i] = a * y[i] + b * x[i], i < n.
  void (*axpby)(int64_t n, Real a, Real* y, Real b, const Real* x);

  // out[i] = sum_j x[i, j] y[i, j].
  void (*dot_rows)(int rows, int cols, const Real* x, int64_t ldx, const Real* y, int64_t ldy, Real* out);

  // Softmax runs down the columns (a query is a column, a key a row): no sums across a vector. The arrays
  // of one value a column have padded(cols) elements.

  // One block of an online softmax. With m = max(col_max, max of the column of s): s <- exp(s - m),
  // correction <- exp(col_max - m), col_sum <- col_sum * correction + sum of the column, col_max <- m.
  // s may hold -inf (invisible); a column that has seen nothing but -inf keeps col_max = -inf, col_sum = 0.
  void (*softmax_block)(int rows, int cols, Real* s, int64_t ld, Real* col_max, Real* col_sum,
                        Real* correction);

  // s[i, j] <- exp(s[i, j] - shift[j]); s = -inf or shift = +inf gives 0.
  void (*exp_shifted)(int rows, int cols, Real* s, int64_t ld, const Real* shift);

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

const char* cpu_isa();  // name of the instruction set in use

}  // namespace statecore
