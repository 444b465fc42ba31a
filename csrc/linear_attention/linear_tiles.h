// What the forward and the backward of chunked linear attention share: where tiles lie, lower triangles,
// decay.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "common/operands.h"
#include "common/scratch.h"
#include "common/tile_kernels.h"
#include "linear_attention/linear_plan.h"

namespace statecore {

// Tokens of a chunk. Longer chunks spend more on the triangle, shorter ones more on packing and updating the
// state.
template <class Operand>
constexpr int kChunk = kIsReal<Operand> ? 32 : 48;
constexpr int kMaxChunk = std::max(kChunk<float>, kChunk<BFloat16Pair>);
constexpr int kBand = 16;  // rows of a lower triangle that are multiplied at once

// ---- addresses -----------------------------------------------------------------------------------------

inline const void* head_at(const HeadsView& x, DType dtype, int64_t row, int64_t t, int64_t head) {
  return static_cast<const char*>(x.data) +
         (row * x.batch + t * x.time + head * x.head) * element_bytes(dtype);
}

inline HeadsView dense(const void* data, int64_t tokens, int64_t heads, int64_t width) {
  return {data, tokens * heads * width, heads * width, width};
}

inline void* writable(const void* p) { return const_cast<void*>(p); }

// The chunk's rows of one head of a dense result.
inline void zero_rows(const HeadsView& x, DType dtype, int64_t row, const TokenChunk& chunk, int64_t head,
                      int64_t width) {
  for (int64_t t = chunk.begin; t < chunk.begin + chunk.length; ++t) {
    char* to = static_cast<char*>(writable(head_at(x, dtype, row, t, head)));
    std::fill_n(to, width * element_bytes(dtype), char(0));
  }
}

// State `which` (running, step start, prompt) of sequence n and value head h in a [states, N, Hv, Dk, Dv]
// tensor.
template <class Real, class Pointer>
auto state_at(const LinearAttentionInputs& p, Pointer* states, int64_t which, int64_t n, int64_t h) {
  using Element = std::conditional_t<std::is_const_v<Pointer>, const Real, Real>;
  return static_cast<Element*>(states) +
         ((which * p.sequences + n) * p.value_heads + h) * p.key_width * p.value_width;
}

template <class Real>
Scratch<Real> zeroed(int64_t elements) {
  Scratch<Real> memory = make_scratch<Real>(elements);
  std::fill_n(memory.get(), elements, Real(0));
  return memory;
}

// A chunk of several heads, loaded together: where they lie side by side, memory is read in longer runs.
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
      kernels_.pack_columns(kDType, rows(i).data, rows_ld_ * kSummands, length, width_,
                            columns_.get() + i * columns_offset_, columns_ld_);
  }
  void transpose(int64_t i, int length, Operand* dst, int64_t ld) const {
    kernels_.pack_transposed(kDType, rows(i).data, rows_ld_ * kSummands, length, width_, dst, ld);
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
  static constexpr int kSummands = OperandTraits<Operand>::kSummands;
  using Pack = decltype(ProductKernels<Operand>::pack_rows);

  void load(const HeadsView& x, DType dtype, int64_t row, const TokenChunk& chunk, int64_t first,
            int64_t heads, Pack pack, Operand* dst, int64_t offset, int64_t ld) const {
    const bool together = x.head == width_ && width_ % (kTilePad * kSummands) == 0;
    for (int64_t i = 0; i < heads; i += together ? heads : 1)
      pack(dtype, head_at(x, dtype, row, chunk.begin, first + i), x.time, chunk.length,
           together ? int(heads) * width_ : width_, dst + i * offset, ld);
  }

  const ProductKernels<Operand>& kernels_ = product_kernels<Operand>();
  int width_;
  int64_t rows_offset_, columns_offset_, rows_ld_, columns_ld_;
  Scratch<Operand> rows_, columns_;
};

// ---- lower triangles -----------------------------------------------------------------------------------

// Scores of the tokens of a chunk with each other, [i, j] for j <= i; the rest is 0 in the 16 rows around the
// diagonal and undefined above them.
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
  void weigh(int length, const Real* weights, int64_t ld, const LowerTriangle& x) {
    for (int i0 = 0; i0 < length; i0 += kBand) {
      const int rows = std::min(kBand, length - i0);
      kernels_.multiply(rows, i0 + rows, weights + i0 * ld, ld, x.row(i0), kLd, row(i0), kLd);
    }
  }

  // out[i, :] += sum_{j <= i} [i, j] b[j, :]; b in columns form.
  void add_times(int length, int width, Packed<Operand> b, Real* out, int64_t ld) {
    for (int i0 = 0; i0 < length; i0 += kBand) {
      const int rows = std::min(kBand, length - i0);
      multiply(rows, width, i0 + rows, Real(1), as_is(packing_.rows(row(i0), kLd, rows, i0 + rows)), b,
               out + i0 * ld, ld, true);
    }
  }

  // out[j, :] += factor * sum_{i >= j} [i, j] b[i, :]; b in columns form.
  void add_transposed_times(int length, int width, Real factor, Packed<Operand> b, Real* out, int64_t ld) {
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

// ---- sums over tokens ------------------------------------------------------------------------------------

// state[m, n] (+)= factor * a^T x, summed over the tokens of a chunk: a in columns form, x real numbers that
// must not be rounded, so pairs of bfloat16 take them in two parts. x is used up.
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

// ---- decay of one value head -----------------------------------------------------------------------------

constexpr double kResetDecay = -1e5;  // stands for log_decay = -inf: exp gives 0, and sums of it stay finite

// Sum of log_decay over tokens [begin, begin + length) of a head, after each of them in sums if there is
// such.
template <class Real>
double log_decay_sum(const LinearAttentionInputs& p, int64_t row, int64_t begin, int length, int64_t head,
                     double* sums = nullptr) {
  const DType real = OperandTraits<Real>::kDType;
  double total = 0;
  for (int i = 0; i < length; ++i) {
    const Real x = *static_cast<const Real*>(head_at(p.log_decay, real, row, begin + i, head));
    total += x < kResetDecay ? kResetDecay : double(x);
    if (sums) sums[i] = total;
  }
  return total;
}

// Inside a chunk, with G the running sum of log_decay.
template <class Real>
class ChunkDecay {
 public:
  void set(const LinearAttentionInputs& p, int64_t row, const TokenChunk& chunk, int64_t head) {
    constexpr Real kInf = std::numeric_limits<Real>::infinity();
    const int length = chunk.length;
    std::array<double, kMaxChunk> sum;
    const double total = log_decay_sum<Real>(p, row, chunk.begin, length, head, sum.data());
    // Differences are taken in double and masked before exp: they lose nothing and cannot overflow.
    for (int i = 0; i < length; ++i) {
      Real* weight = row_of(i);
      for (int j = 0; j <= i; ++j) weight[j] = Real(sum[i] - sum[j]);
      std::fill(weight + i + 1, weight + length, -kInf);
      row_of(kFromStart)[i] = Real(sum[i]);
      row_of(kToEnd)[i] = Real(total - sum[i]);
    }
    kernels_.exponential(length, length, memory_.get(), kLd);
    kernels_.exponential(2, length, row_of(kFromStart), kLd);
    total_ = total;
  }

  double log_total() const { return total_; }                    // G_last
  const Real* from_start() const { return row_of(kFromStart); }  // exp(G_i)
  const Real* to_end() const { return row_of(kToEnd); }          // exp(G_last - G_j)
  const Real* weights() const { return memory_.get(); }          // [i, j]: exp(G_i - G_j), 0 for j > i
  static constexpr int64_t kLd = tile_ld(kMaxChunk);

 private:
  enum Row { kFromStart = kMaxChunk, kToEnd };
  Real* row_of(int row) const { return memory_.get() + row * kLd; }

  const TileKernels<Real>& kernels_ = tile_kernels<Real>();
  Scratch<Real> memory_ = zeroed<Real>((kMaxChunk + 2) * kLd);
  double total_ = 0;
};

// ---- the running state of one value head inside a segment ------------------------------------------------

// carry.h: in place, or as decay * base + sums.
template <class Real>
class RunningState {
 public:
  // sums null: base is the state itself.
  void begin(int64_t size, Real* base, Real* sums) {
    size_ = size, base_ = base, sums_ = sums, log_decay_ = 0, untouched_ = true;
    if (sums) std::fill_n(sums, size_, Real(0));
  }
  // The state itself, in `memory` if it is a sum.
  const Real* value(Real* memory) const {
    if (!sums_ || untouched_) return base_;
    kernels_->axpby(size_, Real(std::exp(log_decay_)), base_, 1, sums_, memory);
    return memory;
  }
  // What contributions are added to, after everything has decayed by exp(log_decay).
  Real* decayed(double log_decay) {
    Real* x = sums_ ? sums_ : base_;
    if (log_decay != 0) kernels_->axpby(size_, Real(std::exp(log_decay)), x, 0, x, x);
    log_decay_ += log_decay;
    untouched_ = false;
    return x;
  }

 private:
  const TileKernels<Real>* kernels_ = &tile_kernels<Real>();
  int64_t size_ = 0;
  Real* base_ = nullptr;
  Real* sums_ = nullptr;
  double log_decay_ = 0;
  bool untouched_ = true;
};

// Of a whole segment.
template <class Real>
double segment_log_decay(const LinearAttentionInputs& p, const LinearPlan& plan, const CarrySegment& segment,
                         int64_t row, int64_t head) {
  double total = 0;
  for (int64_t c = segment.chunks.begin; p.log_decay.data && c < segment.chunks.end; ++c)
    total += log_decay_sum<Real>(p, row, plan.chunks[c].begin, plan.chunks[c].length, head);
  return total;
}

// Base after a segment that was summed apart.
template <class Real>
void add_segment(int64_t size, double log_decay, Real* base, const Real* sums) {
  tile_kernels<Real>().axpby(size, Real(std::exp(log_decay)), base, 1, sums, base);
}

}  // namespace statecore
