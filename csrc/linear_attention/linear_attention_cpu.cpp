// Chunked linear attention, forward. With G the running sum of log_decay inside a chunk (0 without decay) and
// S the state before it:
//
//   out_i = scale (exp(G_i) q_i S + sum_{j <= i} exp(G_i - G_j) (q_i . k_j) v_j)
//   S    <- exp(G_last) S + sum_j exp(G_last - G_j) k_j^T v_j
//
// A group of query heads (GQA) shares one state, a group of value heads (GVA) shares the scores q k^T.

#include <algorithm>

#include "common/ceil_div.h"
#include "common/huge_pages.h"
#include "linear_attention/carry.h"
#include "linear_attention/linear_attention.h"
#include "linear_attention/linear_decay.h"
#include "linear_attention/linear_tiles.h"
#include "linear_attention/step_end.h"

namespace statecore {
namespace {

constexpr int64_t kMaxBlockHeads = 4;  // value heads whose states stay in the L2 cache beside their tiles

// A head block is some value heads that a thread computes together: those of some key heads, or some of one
// key head (GVA). Results do not depend on which ones, so that they may depend on the number of threads.
struct HeadBlocks {
  HeadBlocks(const LinearAttentionInputs& p, int64_t threads) : group(p.value_heads / p.key_heads) {
    if (group > 1) {
      heads = std::min(group, kMaxBlockHeads);
      per_group = ceil_div(group, heads);
      count = p.key_heads * per_group;
    } else {
      heads = std::clamp<int64_t>(p.sequences * p.key_heads / threads, 1, kMaxBlockHeads);
      count = ceil_div(p.key_heads, heads);
    }
  }
  // Value heads of a block; of the last one some may not exist.
  Range operator[](int64_t block) const {
    if (group == 1) return {block * heads, std::min(block * heads + heads, count * heads)};
    const int64_t key_head = block / per_group, begin = key_head * group + block % per_group * heads;
    return {begin, std::min(begin + heads, (key_head + 1) * group)};
  }

  int64_t group, heads, per_group = 1, count;
};

template <class Operand>
class ForwardSweep {
 public:
  using Real = RealOf<Operand>;
  static constexpr bool kReverse = false;

  ForwardSweep(const LinearAttentionParams& p, const LinearPlan& plan, const HeadBlocks& head_blocks)
      : p_(p), plan_(plan), head_blocks_(head_blocks) {}

  int64_t head_blocks() const { return head_blocks_.count; }
  int64_t states() const { return p_.states; }
  int64_t state_size() const { return head_blocks_.heads * head_size_; }

  void select(int64_t task) {
    n_ = task / head_blocks_.count;
    row_ = plan_.sequences[n_].row;
    const Range heads = head_blocks_[task % head_blocks_.count];
    first_value_ = heads.begin, end_value_ = std::min(heads.end, p_.value_heads);
    first_key_ = first_value_ / value_group_, end_key_ = (end_value_ - 1) / value_group_ + 1;
  }

  void start(Real* base) {
    for (int64_t s = 0; s < p_.states; ++s)
      for (int64_t h = first_value_; h < end_value_; ++h) {
        Real* to = state_of(base + s * state_size(), h);
        if (p_.initial_states)
          tiles_.load(kReal, state_at<Real>(p_, p_.initial_states, s, n_, h), dv_, dk_, dv_, to, v_ld_);
        else
          std::fill_n(to, head_size_, Real(0));
      }
  }

  void enter(const CarrySplit& split, Real* base) {
    if (split.ended_step != kNoStep)
      end_step(state_size(), split.ended_step, static_cast<const Real*>(p_.alpha), p_.alphas, base,
               base + state_size(), base + 2 * state_size());
  }

  void add(const CarrySplit& split, Real* local) {
    for (int64_t h = first_value_; h < end_value_; ++h)
      state_[h - first_value_].begin(head_size_, nullptr, state_of(local, h));
    for_each_chunk(split, [&](const TokenChunk& chunk) {
      k_.load_columns(p_.k, p_.dtype, row_, chunk, first_key_, end_key_ - first_key_);
      v_.load_columns(p_.v, p_.dtype, row_, chunk, first_value_, end_value_ - first_value_);
      for (int64_t h = first_value_; h < end_value_; ++h) {
        if (has_decay_) decay_.set(p_, row_, chunk, h);
        update_state(chunk, h);
      }
    });
  }

  void run(const CarrySplit& split, Real* base, Real* local) {
    for (int64_t h = first_value_; h < end_value_; ++h)
      state_[h - first_value_].begin(head_size_, state_of(base, h), local ? state_of(local, h) : nullptr);
    for_each_chunk(split, [&](const TokenChunk& chunk) {
      q_.load_rows(p_.q, p_.dtype, row_, chunk, first_key_ * query_group_,
                   (end_key_ - first_key_) * query_group_);
      k_.load_rows(p_.k, p_.dtype, row_, chunk, first_key_, end_key_ - first_key_);
      v_.load_columns(p_.v, p_.dtype, row_, chunk, first_value_, end_value_ - first_value_);
      for (int64_t h = first_value_; h < end_value_; ++h) {
        if (h == first_value_ || value_group_ == 1) {
          k_.pack_columns(key_of(h), chunk.length);
          k_.transpose(key_of(h), chunk.length, k_transposed_.get(), kTransposedLd);
        }
        if (has_decay_) decay_.set(p_, row_, chunk, h);
        const Packed<Operand> state =
            state_packing_.columns(state_[h - first_value_].value(running_.get()), v_ld_, dk_, dv_);
        for (int64_t g = 0; g < query_group_; ++g) compute_out(chunk, h, key_of(h) * query_group_ + g, state);
        update_state(chunk, h);
      }
    });
  }

  void leave(const CarrySplit& split, Real* base, const Real* local) {
    if (!local) return;
    for (int64_t h = first_value_; h < end_value_; ++h)
      add_local_state(head_size_, split_log_decay<Real>(p_, plan_, split, row_, h), state_of(base, h),
                      state_of(local, h));
  }

  void finish(const Real* base) {
    for (int64_t s = 0; s < p_.states; ++s)
      for (int64_t h = first_value_; h < end_value_; ++h)
        tiles_.store(kReal, state_at<Real>(p_, p_.final_states, s, n_, h), dv_, dk_, dv_,
                     state_of(base + s * state_size(), h), v_ld_);
  }

 private:
  // f(chunk), except of padding, whose results are 0.
  template <class F>
  void for_each_chunk(const CarrySplit& split, const F& f) {
    for (int64_t c = split.chunks.begin; c < split.chunks.end; ++c) {
      const TokenChunk& chunk = plan_.chunks[c];
      if (!chunk.padding) {
        f(chunk);
        continue;
      }
      for (int64_t head = first_key_ * query_group_; head < end_key_ * query_group_; ++head) {
        zero_rows(out_, p_.dtype, row_, chunk, head, dv_);
        if (p_.gated_out) zero_rows(gated_out_, p_.dtype, row_, chunk, head, dv_);
      }
    }
  }

  // Results of the block's i-th query head for value head h. Value heads of a group reuse its scores.
  void compute_out(const TokenChunk& chunk, int64_t h, int64_t i, Packed<Operand> state) {
    const int length = chunk.length;
    const Real scale = Real(p_.scale);
    const int64_t head = std::max(h, first_key_ * query_group_ + i);
    Real* out = out_tile_.get();
    if (h == first_value_ || value_group_ == 1)
      scores_.product(length, dk_, scale, q_.rows(i), {k_transposed_.get(), kTransposedLd});
    multiply(length, dv_, dk_, scale, as_is(q_.rows(i)), state, out, v_ld_, false);
    LowerTriangle<Operand>* scores = &scores_;
    if (has_decay_) {
      tiles_.scale_rows(length, dv_, decay_.from_start(), out, v_ld_);
      decayed_scores_.set_weighted(length, decay_.weights(), decay_.kLd, scores_);
      scores = &decayed_scores_;
    }
    scores->multiply_add(length, dv_, v_.columns(h - first_value_), out, v_ld_);
    tiles_.store(p_.dtype, writable(rows_of(out_, chunk, head)), out_.time, length, dv_, out, v_ld_);
    if (!p_.gated_out) return;
    tiles_.load(p_.dtype, rows_of(segment_out_, chunk, head), segment_out_.time, length, dv_,
                segment_out_tile_.get(), v_ld_);
    tiles_.load(p_.dtype, rows_of(p_.gate, chunk, head), p_.gate.time, length, dv_, gate_tile_.get(), v_ld_);
    tiles_.gated_add(length, dv_, out, segment_out_tile_.get(), gate_tile_.get(), v_ld_);
    tiles_.store(p_.dtype, writable(rows_of(gated_out_, chunk, head)), gated_out_.time, length, dv_, out,
                 v_ld_);
  }

  void update_state(const TokenChunk& chunk, int64_t h) {
    const int length = chunk.length;
    Real* state = state_[h - first_value_].decayed(has_decay_ ? decay_.log_total() : 0);
    if (has_decay_) {
      tiles_.load(p_.dtype, rows_of(p_.v, chunk, h), p_.v.time, length, dv_, out_tile_.get(), v_ld_);
      tiles_.scale_rows(length, dv_, decay_.to_end(), out_tile_.get(), v_ld_);
      exact_sum_.add(dk_, dv_, length, 1, k_.columns(key_of(h)), out_tile_.get(), v_ld_, state, v_ld_);
    } else {
      multiply(dk_, dv_, length, Real(1), transposed(k_.columns(key_of(h))), v_.columns(h - first_value_),
               state, v_ld_, true);
    }
  }

  int64_t key_of(int64_t h) const { return h / value_group_ - first_key_; }  // within the block
  const void* rows_of(const HeadsView& x, const TokenChunk& chunk, int64_t head) const {
    return head_at(x, p_.dtype, row_, chunk.begin, head);
  }
  template <class T>
  T* state_of(T* states, int64_t h) const {
    return states + (h - first_value_) * head_size_;
  }

  static constexpr DType kReal = OperandTraits<Real>::kDType;
  static constexpr int kLength = kChunk<Operand>, kTransposedLd = tile_ld(kLength);
  const LinearAttentionParams& p_;
  const LinearPlan& plan_;
  const HeadBlocks& head_blocks_;
  const TileKernels<Real>& tiles_ = tile_kernels<Real>();
  const bool has_decay_ = p_.log_decay.data != nullptr;
  const int dk_ = int(p_.key_width), dv_ = int(p_.value_width);
  const int64_t v_ld_ = tile_ld(dv_), head_size_ = dk_ * v_ld_;
  const int64_t query_group_ = p_.query_heads / p_.key_heads, value_group_ = p_.value_heads / p_.key_heads;
  const int64_t out_heads_ = std::max(p_.query_heads, p_.value_heads);
  const HeadsView out_ = contiguous_heads(p_.out, p_.tokens, out_heads_, dv_);
  const HeadsView segment_out_ = contiguous_heads(p_.segment_out, p_.tokens, out_heads_, dv_);
  const HeadsView gated_out_ = contiguous_heads(p_.gated_out, p_.tokens, out_heads_, dv_);
  const int64_t key_heads_ = value_group_ == 1 ? head_blocks_.heads : 1;  // of a block, at most
  HeadTiles<Operand> q_{key_heads_ * query_group_, dk_}, k_{key_heads_, dk_}, v_{head_blocks_.heads, dv_};
  Scratch<Operand> k_transposed_ = make_scratch<Operand>(depth<Operand>(dk_) * kTransposedLd);
  Scratch<Real> out_tile_ = make_scratch<Real>(kLength * v_ld_);
  Scratch<Real> segment_out_tile_ = make_scratch<Real>(p_.gated_out ? kLength * v_ld_ : 0);
  Scratch<Real> gate_tile_ = make_scratch<Real>(p_.gated_out ? kLength * v_ld_ : 0);
  LowerTriangle<Operand> scores_, decayed_scores_;
  ResultPacking<Operand> state_packing_{dk_, dv_};
  ExactSum<Operand> exact_sum_{kLength, dv_};
  DecayTile<Real> decay_;
  std::array<RunningState<Real>, kMaxBlockHeads> state_;
  Scratch<Real> running_ = make_scratch<Real>(plan_.has_local_states ? head_size_ : 0);
  int64_t n_ = 0, row_ = 0, first_key_ = 0, end_key_ = 0, first_value_ = 0, end_value_ = 0;
};

template <class Operand>
void forward(const LinearAttentionParams& p) {
  const LinearPlan plan = plan_linear(p, kChunk<Operand>);
  const HeadBlocks head_blocks(p, thread_count());
  carry<RealOf<Operand>>(plan, head_blocks.count, state_multiply_adds(p),
                         [&] { return ForwardSweep<Operand>(p, plan, head_blocks); });
}

}  // namespace

void linear_attention_cpu(const LinearAttentionParams& p) {
  const int64_t out_bytes =
      p.batch * p.tokens * std::max(p.query_heads, p.value_heads) * p.value_width * element_bytes(p.dtype);
  prefer_huge_pages(p.out, out_bytes);
  if (p.gated_out) prefer_huge_pages(p.gated_out, out_bytes);
  if (p.dtype == DType::kFloat64) return forward<double>(p);
  if (p.dtype == DType::kBFloat16 && has_bfloat16_products()) return forward<BFloat16Pair>(p);
  forward<float>(p);
}

}  // namespace statecore
