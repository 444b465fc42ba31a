// Tiles packed as operands of matrix products (tile_kernels.h). For real operands every form is the tile
// itself; bfloat16 pairs are packed along the contraction dimension, so that a tile has two forms:
//
//   rows      pairs along each row, to be contracted over columns
//   columns   pairs down each column, to be contracted over rows
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/scratch.h"
#include "common/tile_kernels.h"

namespace statecore {

template <class Operand>
constexpr bool kIsReal = std::is_same_v<Operand, RealOf<Operand>>;

template <class Operand>
struct Packed {
  const Operand* data;
  int64_t ld;
};

// The left-hand side of a product: operand (i, p) is data[i * row + p * col].
template <class Operand>
struct Left {
  const Operand* data;
  int64_t row, col;
};

template <class Operand>
Left<Operand> as_is(Packed<Operand> x) {  // x in rows form, for x * b
  return {x.data, x.ld, 1};
}
template <class Operand>
Left<Operand> transposed(Packed<Operand> x) {  // x in columns form, for x^T * b
  return {x.data, 1, x.ld};
}

// c[m, n] (+)= factor * a[m, k] b[k, n], with b in columns form, or in rows form and transposed.
template <class Operand>
void multiply(int m, int n, int k, RealOf<Operand> factor, Left<Operand> a, Packed<Operand> b,
              RealOf<Operand>* c, int64_t ldc, bool accumulate) {
  product_kernels<Operand>().matmul(m, n, depth<Operand>(k), factor, a.data, a.row, a.col, b.data, b.ld, c,
                                    ldc, accumulate);
}

// A tile of up to [max_rows, max_cols] elements of a tensor, in either form or both.
template <class Operand>
class OperandTile {
 public:
  OperandTile(int max_rows, int max_cols)
      : rows_ld_(tile_ld(depth<Operand>(max_cols))),
        columns_ld_(tile_ld(max_cols)),
        rows_(make_scratch<Operand>(max_rows * rows_ld_)),
        columns_(make_scratch<Operand>(kIsReal<Operand> ? 0 : depth<Operand>(max_rows) * columns_ld_)) {}

  void load_rows(DType dtype, const void* src, int64_t stride, int rows, int cols) {
    kernels_.pack_rows(dtype, src, stride, rows, cols, rows_.get(), rows_ld_);
  }
  void load_columns(DType dtype, const void* src, int64_t stride, int rows, int cols) {
    if constexpr (kIsReal<Operand>)
      load_rows(dtype, src, stride, rows, cols);
    else
      kernels_.pack_columns(dtype, src, stride, rows, cols, columns_.get(), columns_ld_);
  }
  void load(DType dtype, const void* src, int64_t stride, int rows, int cols) {
    load_rows(dtype, src, stride, rows, cols);
    pack_columns(rows, cols);
  }
  void pack_columns(int rows, int cols) { columns_of(this->rows(), rows, cols); }
  // The columns form of x, which is in rows form, in this tile or another.
  Packed<Operand> columns_of(Packed<Operand> x, int rows, int cols) {
    if constexpr (kIsReal<Operand>) return x;
    kernels_.pack_columns(OperandTraits<Operand>::kDType, x.data, x.ld * OperandTraits<Operand>::kPackFactor,
                          rows, cols, columns_.get(), columns_ld_);
    return {columns_.get(), columns_ld_};
  }
  // dst[depth(cols), rows] = rows()^T.
  void transpose(int rows, int cols, Operand* dst, int64_t ld) const {
    kernels_.pack_transposed(OperandTraits<Operand>::kDType, rows_.get(),
                             rows_ld_ * OperandTraits<Operand>::kPackFactor, rows, cols, dst, ld);
  }

  // Zero a row after load_rows() or load_columns(), respectively.
  void clear_row(int row, int cols) { std::fill_n(mutable_row(row), depth<Operand>(cols), Operand{}); }
  void clear_row_of_columns(int row, int cols) {
    if constexpr (kIsReal<Operand>) {
      clear_row(row, cols);
    } else {
      Operand* pairs = columns_.get() + row / 2 * columns_ld_;
      for (int j = 0; j < cols; ++j) (row % 2 ? pairs[j].second : pairs[j].first) = 0;
    }
  }

  Operand* mutable_row(int row) { return rows_.get() + row * rows_ld_; }
  int64_t row_stride() const { return rows_ld_; }
  Packed<Operand> rows() const { return {rows_.get(), rows_ld_}; }
  Packed<Operand> columns() const {
    if constexpr (kIsReal<Operand>)
      return rows();
    else
      return {columns_.get(), columns_ld_};
  }

 private:
  const ProductKernels<Operand>& kernels_ = product_kernels<Operand>();
  int64_t rows_ld_, columns_ld_;
  Scratch<Operand> rows_, columns_;
};

// Packs results of products as operands of further products. Real operands are used in place.
template <class Operand>
class ResultPacking {
 public:
  using Real = RealOf<Operand>;

  ResultPacking(int max_rows, int max_cols)
      : rows_ld_(tile_ld(depth<Operand>(max_cols))),
        columns_ld_(tile_ld(max_cols)),
        memory_(make_scratch<Operand>(
            kIsReal<Operand> ? 0 : std::max(max_rows * rows_ld_, depth<Operand>(max_rows) * columns_ld_))) {}

  // The result is valid until the next call.
  Packed<Operand> rows(const Real* x, int64_t ld, int rows, int cols) {
    if constexpr (kIsReal<Operand>)
      return {x, ld};
    else {
      kernels_.pack_rows(DType::kFloat32, x, ld, rows, cols, memory_.get(), rows_ld_);
      return {memory_.get(), rows_ld_};
    }
  }
  Packed<Operand> columns(const Real* x, int64_t ld, int rows, int cols) {
    if constexpr (kIsReal<Operand>)
      return {x, ld};
    else {
      kernels_.pack_columns(DType::kFloat32, x, ld, rows, cols, memory_.get(), columns_ld_);
      return {memory_.get(), columns_ld_};
    }
  }

 private:
  const ProductKernels<Operand>& kernels_ = product_kernels<Operand>();
  int64_t rows_ld_, columns_ld_;
  Scratch<Operand> memory_;
};

}  // namespace statecore
