// Tiles of the forward and the backward of chunked linear attention on the CPU: where they are in tensors,
// chunks of several heads, lower triangles, sums over tokens.
#pragma once

#include <algorithm>

#include "common/operands.h"
#include "common/scratch.h"
#include "common/tile_kernels.h"
#include "linear_attention/linear_plan.h"

namespace statecore {

// Tokens of a chunk, at most. Longer chunks spend more on the triangle, shorter ones more on packing and
// updating the state.
template <class Operand>
constexpr int kChunk = kIsReal<Operand> ? 32 : 48;
constexpr int kMaxChunk = std::max(kChunk<float>, kChunk<BFloat16Pair>);
constexpr int kBand = 16;  // rows of a lower triangle that are multiplied together

// ---- addresses

inline const void* head_at(const HeadsView& x, DType dtype, int64_t row, int64_t t, int64_t head) {
  return static_cast<const char*>(x.data) + x.offset(row, t, head) * element_bytes(dtype);
}

inline void* writable(const void* p) { return const_cast<void*>(p); }

// The chunk's rows of one head of a result.
inline void zero_rows(const HeadsView& x, DType dtype, int64_t row, const TokenChunk& chunk, int64_t head,
                      int64_t width) {
  for (int64_t t = chunk.begin; t < chunk.begin + chunk.length; ++t) {
    char* to = static_cast<char*>(writable(head_at(x, dtype, row, t, head)));
    std::fill_n(to, width * element_bytes(dtype), char(0));
  }
}

// In a tensor [states, N, Hv, Dk, Dv]; kinds are running, start, prompt.
template <class Real, class Pointer>
auto state_at(const LinearAttentionInputs& p, Pointer* states, int64_t kind, int64_t n, int64_t h) {
  using Element = std::conditional_t<std::is_const_v<Pointer>, const Real, Real>;
  return static_cast<Element*>(states) +
         ((kind * p.sequences + n) * p.value_heads + h) * p.key_width * p.value_width;
}

template <class Real>
Scratch<Real> zeroed(int64_t elements) {
  Scratch<Real> memory = make_scratch<Real>(elements);
  std::fill_n(memory.get(), elements, Real(0));
  return memory;
}

// A chunk of several heads, loaded together: where heads are adjacent, memory is read in longer runs.
template <class Operand>
class HeadTiles {
 public:
  HeadTiles(int64_t heads, int width)
      : width_(width),
        rows_offset_(padded(depth<Operand>(width))),
        columns_offset_(padded(width)),
        rows_ld_(tile_ld(heads * rows_offset_)),
        columns_ld_(tile_ld(heads * columns_offset_)),
        rows_(make_scratch<Operand>(kChunk<Operand> * rows_ld_)),
        columns_(
            make_scratch<Operand>(kIsReal<Operand> ? 0 : depth<Operand>(kChunk<Operand>) * columns_ld_)) {}

  void load_rows(const HeadsView& x, DType dtype, int64_t row, const TokenChunk& chunk, int64_t first,
                 int64_t heads) {
    load(x, dtype, row, chunk, first, heads, kernels_.pack_rows, rows_.get(), rows_offset_, rows_ld_);
  }
  void load_columns(const HeadsView& x, DType dtype, int64_t row, const TokenChunk& chunk, int64_t first,
                    int64_t heads) {
    if constexpr (kIsReal<Operand>)
      load_rows(x, dtype, row, chunk, first, heads);
    else
      load(x, dtype, row, chunk, first, heads, kernels_.pack_columns, columns_.get(), columns_offset_,
           columns_ld_);
  }
  // columns() of the i-th of the heads that load_rows() took, from its rows().
  void pack_columns(int64_t i, int length) {
    if constexpr (!kIsReal<Operand>)
      kernels_.pack_columns(kDType, rows(i).data, rows_ld_ * kPackFactor, length, width_,
                            columns_.get() + i * columns_offset_, columns_ld_);
  }
  void transpose(int64_t i, int length, Operand* dst, int64_t ld) const {
    kernels_.pack_transposed(kDType, rows(i).data, rows_ld_ * kPackFactor, length, width_, dst, ld);
  }

  Packed<Operand> rows(int64_t i) const { return {rows_.get() + i * rows_offset_, rows_ld_}; }
  Packed<Operand> columns(int64_t i) const {
    if constexpr (kIsReal<Operand>)
      return rows(i);
    else
      return {columns_.get() + i * columns_offset_, columns_ld_};
  }

 private:
  static constexpr DType kDType = OperandTraits<Operand>::kDType;
  static constexpr int kPackFactor = OperandTraits<Operand>::kPackFactor;
  using Pack = decltype(ProductKernels<Operand>::pack_rows);

  void load(const HeadsView& x, DType dtype, int64_t row, const TokenChunk& chunk, int64_t first,
            int64_t heads, Pack pack, Operand* dst, int64_t offset, int64_t ld) const {
    const bool together = x.head == width_ && width_ % (kTilePad * kPackFactor) == 0;
    for (int64_t i = 0; i < heads; i += together ? heads : 1)
      pack(dtype, head_at(x, dtype, row, chunk.begin, first + i), x.time, chunk.length,
           together ? int(heads) * width_ : width_, dst + i * offset, ld);
  }

  const ProductKernels<Operand>& kernels_ = product_kernels<Operand>();
  int width_;
  int64_t rows_offset_, columns_offset_, rows_ld_, columns_ld_;
  Scratch<Operand> rows_, columns_;
};

// ---- lower triangles

// Scores of the tokens of a chunk with each other, [i, j] for j <= i. Above the diagonal they are 0 within
// kBand x kBand blocks that contain it, undefined elsewhere.
template <class Operand>
class LowerTriangle {
 public:
  using Real = RealOf<Operand>;
  static constexpr int kLd = tile_ld(kChunk<Operand>);

  // [i, j] = factor * sum_d a[i, d] b[j, d]; a in rows form, b transposed.
  void product(int length, int width, Real factor, Packed<Operand> a, Packed<Operand> b) {
    for (int i0 = 0; i0 < length; i0 += kBand) {
      const int rows = std::min(kBand, length - i0);
      Real* band = row(i0);
      multiply(rows, i0 + rows, width, factor, as_is(Packed<Operand>{a.data + i0 * a.ld, a.ld}), b, band, kLd,
               false);
      for (int i = 0; i < rows; ++i)
        std::fill(band + i * kLd + i0 + i + 1, band + i * kLd + i0 + rows, Real(0));
    }
  }

  // [i, j] = weights[i, j] * x[i, j]
  void set_weighted(int length, const Real* weights, int64_t ld, const LowerTriangle& x) {
    for (int i0 = 0; i0 < length; i0 += kBand) {
      const int rows = std::min(kBand, length - i0);
      kernels_.multiply(rows, i0 + rows, weights + i0 * ld, ld, x.row(i0), kLd, row(i0), kLd);
    }
  }

  // out[i, :] += sum_{j <= i} [i, j] b[j, :]; b in columns form.
  void multiply_add(int length, int width, Packed<Operand> b, Real* out, int64_t ld) {
    for (int i0 = 0; i0 < length; i0 += kBand) {
      const int rows = std::min(kBand, length - i0);
      multiply(rows, width, i0 + rows, Real(1), as_is(packing_.rows(row(i0), kLd, rows, i0 + rows)), b,
               out + i0 * ld, ld, true);
    }
  }

  // out[j, :] += factor * sum_{i >= j} [i, j] b[i, :]; b in columns form.
  void multiply_add_transposed(int length, int width, Real factor, Packed<Operand> b, Real* out, int64_t ld) {
    for (int j0 = 0; j0 < length; j0 += kBand) {
      const int rows = std::min(kBand, length - j0);
      const Packed<Operand> below{b.data + depth<Operand>(j0) * b.ld, b.ld};
      multiply(rows, width, length - j0, factor,
               transposed(packing_.columns(row(j0) + j0, kLd, length - j0, rows)), below, out + j0 * ld, ld,
               true);
    }
  }

  Real* row(int i) const { return memory_.get() + i * kLd; }

 private:
  const TileKernels<Real>& kernels_ = tile_kernels<Real>();
  Scratch<Real> memory_ = make_scratch<Real>(kChunk<Operand> * kLd);
  ResultPacking<Operand> packing_{kChunk<Operand>, kChunk<Operand>};
};

// ---- sums over tokens

// state[m, n] += factor * a^T x, summed over the tokens of a chunk: a in columns form, x real numbers that
// must not be rounded, so that pairs of bfloat16 take them in two parts. Overwrites x.
template <class Operand>
class ExactSum {
 public:
  using Real = RealOf<Operand>;

  ExactSum(int max_rows, int max_cols)
      : ld_(tile_ld(max_cols)),
        packing_(max_rows, max_cols),
        rounded_(make_scratch<Real>(kIsReal<Operand> ? 0 : max_rows * ld_)),
        low_(make_scratch<uint16_t>(kIsReal<Operand> ? 0 : max_cols)) {}

  void add(int m, int n, int tokens, Real factor, Packed<Operand> a, Real* x, int64_t ldx, Real* state,
           int64_t ld) {
    multiply(m, n, tokens, factor, transposed(a), packing_.columns(x, ldx, tokens, n), state, ld, true);
    if constexpr (!kIsReal<Operand>) {
      for (int i = 0; i < tokens; ++i) {
        kernels_.store(DType::kBFloat16, low_.get(), 0, 1, n, x + i * ldx, 0);
        kernels_.load(DType::kBFloat16, low_.get(), 0, 1, n, rounded_.get() + i * ld_, 0);
        kernels_.axpby(n, 1, x + i * ldx, -1, rounded_.get() + i * ld_, x + i * ldx);
      }
      multiply(m, n, tokens, factor, transposed(a), packing_.columns(x, ldx, tokens, n), state, ld, true);
    }
  }

 private:
  const TileKernels<Real>& kernels_ = tile_kernels<Real>();
  int64_t ld_;
  ResultPacking<Operand> packing_;
  Scratch<Real> rounded_;
  Scratch<uint16_t> low_;
};

}  // namespace statecore
