// Decay on the CPU: inside a chunk, over a split, and of the running state of a value head.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "linear_attention/linear_tiles.h"

namespace statecore {

// ---- decay of one value head

constexpr double kResetDecay = -1e5;  // stands for log_decay = -inf: exp gives 0, and sums of it stay finite

// Sum of log_decay over tokens [begin, begin + length) of a head; the running sum in `sums`, unless null.
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

// The weights of a chunk, with G the running sum of log_decay.
template <class Real>
class DecayTile {
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

// ---- the running state of one value head inside a split

// carry.h: updated in place, or kept as decay * base + local.
template <class Real>
class RunningState {
 public:
  // local null: base is the state itself.
  void begin(int64_t size, Real* base, Real* local) {
    size_ = size, base_ = base, local_ = local, log_decay_ = 0, untouched_ = true;
    if (local) std::fill_n(local, size_, Real(0));
  }
  // The state, computed in `memory` unless base is the state itself.
  const Real* value(Real* memory) const {
    if (!local_ || untouched_) return base_;
    kernels_->axpby(size_, Real(std::exp(log_decay_)), base_, 1, local_, memory);
    return memory;
  }
  // What the next tokens are added to, after the state has decayed by exp(log_decay).
  Real* decayed(double log_decay) {
    Real* x = local_ ? local_ : base_;
    if (log_decay != 0) kernels_->axpby(size_, Real(std::exp(log_decay)), x, 0, x, x);
    log_decay_ += log_decay;
    untouched_ = false;
    return x;
  }

 private:
  const TileKernels<Real>* kernels_ = &tile_kernels<Real>();
  int64_t size_ = 0;
  Real* base_ = nullptr;
  Real* local_ = nullptr;
  double log_decay_ = 0;
  bool untouched_ = true;
};

// Sum of log_decay over a split.
template <class Real>
double split_log_decay(const LinearAttentionInputs& p, const LinearPlan& plan, const CarrySplit& split,
                       int64_t row, int64_t head) {
  double total = 0;
  for (int64_t c = split.chunks.begin; p.log_decay.data && c < split.chunks.end; ++c)
    total += log_decay_sum<Real>(p, row, plan.chunks[c].begin, plan.chunks[c].length, head);
  return total;
}

// Base behind a split.
template <class Real>
void add_local_state(int64_t size, double log_decay, Real* base, const Real* local) {
  tile_kernels<Real>().axpby(size, Real(std::exp(log_decay)), base, 1, local, base);
}

}  // namespace statecore
