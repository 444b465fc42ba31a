// Chunked linear attention, backward, in two sweeps that store no states of chunks. Forwards, the same as
// linear_attention_cpu.cpp with (dO, v, k) in the place of (q, k, v) and the state transposed gives dq. In
// reverse, with R the gradient of the state after a chunk:
//
//   dv_j = exp(G_last - G_j) k_j R   + sum_{i >= j} exp(G_i - G_j) scale (q_i . k_j) dO_i
//   dk_j = exp(G_last - G_j) v_j R^T + sum_{i >= j} exp(G_i - G_j) scale (dO_i . v_j) q_i
//   R   <- exp(G_last) R + sum_i exp(G_i) scale q_i^T dO_i
//
// The gradient of log_decay_t is a sum over all pairs of tokens j < t <= i, the pair sum of t, of
//
//   exp(G_i - G_j) scale (q_i . k_j) (dO_i . v_j)
//
// with the initial state as an earliest j and the gradient of the final state as a latest i. Pairs within one
// chunk are summed there. The sum over all other pairs, going backwards, grows at t by what q_t reads,
// <q_t, dq_t> through the state, and shrinks by what k_t and v_t have written, <k_t, dk_t> = <v_t, dv_t>
// through the state. Because the two kinds are kept apart, nothing large has to cancel where the decay is
// strong. The sum starts from <S, dS> of the final state.
//
// A head block is one key head with all the heads that share it, or some key heads where value heads are not
// grouped.

#include <algorithm>
#include <array>
#include <vector>

#include "common/ceil_div.h"
#include "common/huge_pages.h"
#include "linear_attention/carry.h"
#include "linear_attention/linear_attention.h"
#include "linear_attention/linear_decay.h"
#include "linear_attention/linear_tiles.h"
#include "linear_attention/step_end.h"

namespace statecore {
namespace {

constexpr int64_t kMaxBlockHeads = 4;  // key heads whose states stay in the L2 cache beside their tiles

// One call, shared by both sweeps and all threads.
template <class Operand>
struct BackwardCall {
  using Real = RealOf<Operand>;

  BackwardCall(const LinearAttentionBackwardParams& params)
      : p(params),
        plan(plan_linear(params, kChunk<Operand>)),
        pair_sum(has_decay ? p.batch * p.tokens * p.value_heads : 0),
        split_pair_sum(has_decay ? plan.splits.size() * p.value_heads : 0),
        final_pair_sum(has_decay ? p.sequences * p.value_heads : 0) {}

  // For the gradient of log_decay: the pair sum of token t, over pairs within its split. Until the reverse
  // sweep it holds what q_t reads.
  double& pair_sum_at(int64_t row, int64_t t, int64_t head) {
    return pair_sum[(row * p.tokens + t) * p.value_heads + head];
  }
  double& split_pair_sum_at(int64_t split, int64_t head) {
    return split_pair_sum[split * p.value_heads + head];
  }

  const LinearAttentionBackwardParams& p;
  const LinearPlan plan;
  const bool has_decay = p.log_decay.data != nullptr;
  const int dk = int(p.key_width), dv = int(p.value_width);
  const int64_t k_ld = tile_ld(dk), v_ld = tile_ld(dv);
  const int64_t query_group = p.query_heads / p.key_heads, value_group = p.value_heads / p.key_heads;
  // Key heads of a block. Results do not depend on it, so that it may depend on the number of threads.
  const int64_t block_heads =
      value_group > 1 ? 1
                      : std::clamp<int64_t>(p.sequences * p.key_heads / thread_count(), 1, kMaxBlockHeads);
  const int64_t head_blocks = ceil_div(p.key_heads, block_heads);
  const HeadsView grad_q = contiguous_heads(p.grad_q, p.tokens, p.query_heads, dk);
  const HeadsView grad_k = contiguous_heads(p.grad_k, p.tokens, p.key_heads, dk);
  const HeadsView grad_v = contiguous_heads(p.grad_v, p.tokens, p.value_heads, dv);
  std::vector<double> pair_sum, split_pair_sum, final_pair_sum;
};

// What both sweeps have: a head block, tiles, and the sum of a tile over the value heads of a group.
template <class Operand>
class GradientSweep {
 public:
  using Real = RealOf<Operand>;

  GradientSweep(BackwardCall<Operand>& call, int64_t head_size) : call_(call), head_size_(head_size) {}

  int64_t head_blocks() const { return call_.head_blocks; }
  int64_t states() const { return p_.states; }
  int64_t state_size() const { return call_.block_heads * call_.value_group * head_size_; }

  void select(int64_t task) {
    n_ = task / call_.head_blocks;
    row_ = call_.plan.sequences[n_].row;
    first_key_ = task % call_.head_blocks * call_.block_heads;
    key_heads_ = std::min(call_.block_heads, p_.key_heads - first_key_);
  }

 protected:
  void begin(Real* base, Real* local) {
    for (int64_t h = 0; h < value_heads(); ++h)
      state_[h].begin(head_size_, base ? base + h * head_size_ : nullptr,
                      local ? local + h * head_size_ : nullptr);
  }

  void add_local_states(const CarrySplit& split, Real* base, const Real* local) {
    if (!local) return;
    for (int64_t h = 0; h < value_heads(); ++h)
      add_local_state(head_size_, split_log_decay<Real>(p_, call_.plan, split, row_, value_head(h)),
                      base + h * head_size_, local + h * head_size_);
  }

  // Stores the sum of `tile` over the value heads of the group, which come in order.
  void add_and_store(const HeadsView& to, int64_t head, const TokenChunk& chunk, int64_t h,
                     const Real* tile) {
    const Real* sum = tile;
    if (call_.value_group > 1) {
      sum = group_sum_.get();
      if (first_of_group(h))
        std::copy_n(tile, chunk.length * call_.k_ld, group_sum_.get());
      else
        tiles_.axpby(chunk.length * call_.k_ld, 1, sum, 1, tile, group_sum_.get());
    }
    if (first_of_group(h + 1))
      tiles_.store(p_.dtype, writable(rows_of(to, chunk, head)), to.time, chunk.length, call_.dk, sum,
                   call_.k_ld);
  }

  const void* rows_of(const HeadsView& x, const TokenChunk& chunk, int64_t head) const {
    return head_at(x, p_.dtype, row_, chunk.begin, head);
  }
  void load_real(const HeadsView& x, const TokenChunk& chunk, int64_t head, int width, Real* tile,
                 int64_t ld) {
    tiles_.load(p_.dtype, rows_of(x, chunk, head), x.time, chunk.length, width, tile, ld);
  }
  // Heads are counted within the block: value heads h, key heads key_of(h), query heads query_of(h, g), and
  // out_of(h, g), which read what h holds. first_... is where those of the block begin.
  int64_t value_heads() const { return key_heads_ * call_.value_group; }
  int64_t query_heads() const { return key_heads_ * call_.query_group; }
  int64_t key_of(int64_t h) const { return h / call_.value_group; }
  int64_t query_of(int64_t h, int64_t g) const { return key_of(h) * call_.query_group + g; }
  int64_t out_of(int64_t h, int64_t g) const { return std::max(h, query_of(h, g)); }
  int64_t first_value() const { return first_key_ * call_.value_group; }
  int64_t first_query() const { return first_key_ * call_.query_group; }
  int64_t first_out() const { return std::max(first_value(), first_query()); }
  int64_t value_head(int64_t h) const { return first_value() + h; }
  bool first_of_group(int64_t h) const { return h % call_.value_group == 0; }

  static constexpr DType kReal = OperandTraits<Real>::kDType;
  static constexpr int kLength = kChunk<Operand>, kTransposedLd = tile_ld(kLength);
  BackwardCall<Operand>& call_;
  const LinearAttentionBackwardParams& p_ = call_.p;
  const TileKernels<Real>& tiles_ = tile_kernels<Real>();
  const int dk_ = call_.dk, dv_ = call_.dv;
  const int64_t head_size_;
  const Real* alpha_ = static_cast<const Real*>(p_.alpha);
  const Real scale_ = Real(p_.scale);
  const int64_t max_values_ = call_.block_heads * call_.value_group;  // heads of a block, at most
  const int64_t max_queries_ = call_.block_heads * call_.query_group;
  std::vector<RunningState<Real>> state_ = std::vector<RunningState<Real>>(max_values_);
  Scratch<Real> running_ = make_scratch<Real>(call_.plan.has_local_states ? head_size_ : 0);
  Scratch<Real> group_sum_ = make_scratch<Real>(call_.value_group > 1 ? kLength * call_.k_ld : 0);
  HeadTiles<Operand> k_{call_.block_heads, dk_}, v_{max_values_, dv_};
  HeadTiles<Operand> grad_out_{std::max(max_values_, max_queries_), dv_};
  Scratch<Operand> v_transposed_ = make_scratch<Operand>(depth<Operand>(dv_) * kTransposedLd);
  LowerTriangle<Operand> grad_scores_;
  DecayTile<Real> decay_;
  int64_t n_ = 0, first_key_ = 0, key_heads_ = 0, row_ = 0;
};

// Forwards: dq; zeros for padding; for the gradient of log_decay <q, dq> through the state, and <S, dS> of
// the final state. The state is transposed: [Dv, Dk].
template <class Operand>
class QueryGradientSweep : public GradientSweep<Operand> {
 public:
  using Base = GradientSweep<Operand>;
  using Real = RealOf<Operand>;
  static constexpr bool kReverse = false;

  explicit QueryGradientSweep(BackwardCall<Operand>& call) : Base(call, call.dv * call.k_ld) {}

  void start(Real* base) {
    for (int64_t s = 0; s < p_.states; ++s)
      for (int64_t h = 0; h < this->value_heads(); ++h) {
        Real* to = base + s * this->state_size() + h * head_size_;
        if (p_.initial_states)
          tiles_.load_transposed(kReal, state_at<Real>(p_, p_.initial_states, s, n_, this->value_head(h)),
                                 dv_, dk_, dv_, to, call_.k_ld);
        else
          std::fill_n(to, head_size_, Real(0));
      }
  }

  void enter(const CarrySplit& split, Real* base) {
    const int64_t size = this->state_size();
    if (split.ended_step != kNoStep)
      end_step(size, split.ended_step, alpha_, p_.alphas, base, base + size, base + 2 * size);
  }

  void add(const CarrySplit& split, Real* local) {
    this->begin(nullptr, local);
    for_each_chunk(split, [&](const TokenChunk& chunk) {
      k_.load_columns(p_.k, p_.dtype, row_, chunk, first_key_, key_heads_);
      v_.load_columns(p_.v, p_.dtype, row_, chunk, this->first_value(), this->value_heads());
      for (int64_t h = 0; h < this->value_heads(); ++h) {
        if (call_.has_decay) decay_.set(p_, row_, chunk, this->value_head(h));
        update_state(chunk, h);
      }
    });
  }

  void run(const CarrySplit& split, Real* base, Real* local) {
    this->begin(base, local);
    for_each_chunk(split, [&](const TokenChunk& chunk) {
      k_.load_columns(p_.k, p_.dtype, row_, chunk, first_key_, key_heads_);
      v_.load_rows(p_.v, p_.dtype, row_, chunk, this->first_value(), this->value_heads());
      grad_out_.load_rows(p_.grad_out, p_.dtype, row_, chunk, this->first_out(),
                          std::max(this->value_heads(), this->query_heads()));
      for (int64_t h = 0; h < this->value_heads(); ++h) {
        v_.pack_columns(h, chunk.length);
        v_.transpose(h, chunk.length, v_transposed_.get(), Base::kTransposedLd);
        if (call_.has_decay) decay_.set(p_, row_, chunk, this->value_head(h));
        const Packed<Operand> state =
            state_packing_.columns(state_[h].value(running_.get()), call_.k_ld, dv_, dk_);
        for (int64_t g = 0; g < call_.query_group; ++g) compute_grad_q(chunk, h, g, state);
        update_state(chunk, h);
      }
    });
  }

  void leave(const CarrySplit& split, Real* base, const Real* local) {
    this->add_local_states(split, base, local);
  }

  void finish(const Real* base) {
    for (int64_t h = 0; call_.has_decay && h < this->value_heads(); ++h) {
      const Real* grad = state_at<Real>(p_, p_.grad_final_states, 0, n_, this->value_head(h));
      double product = 0;
      for (int i = 0; i < dk_; ++i)
        for (int j = 0; j < dv_; ++j)
          product += double(grad[i * dv_ + j]) * double(base[h * head_size_ + j * call_.k_ld + i]);
      call_.final_pair_sum[n_ * p_.value_heads + this->value_head(h)] = product;
    }
  }

 private:
  // f(chunk), except of padding, whose gradients are 0.
  template <class F>
  void for_each_chunk(const CarrySplit& split, const F& f) {
    for (int64_t c = split.chunks.begin; c < split.chunks.end; ++c) {
      const TokenChunk& chunk = call_.plan.chunks[c];
      if (!chunk.padding) {
        f(chunk);
        continue;
      }
      for (int64_t i = 0; i < this->query_heads(); ++i)
        zero_rows(call_.grad_q, p_.dtype, row_, chunk, this->first_query() + i, dk_);
      for (int64_t i = 0; i < key_heads_; ++i)
        zero_rows(call_.grad_k, p_.dtype, row_, chunk, first_key_ + i, dk_);
      for (int64_t h = 0; h < this->value_heads(); ++h)
        zero_rows(call_.grad_v, p_.dtype, row_, chunk, this->value_head(h), dv_);
    }
  }

  void compute_grad_q(const TokenChunk& chunk, int64_t h, int64_t g, Packed<Operand> state) {
    const int length = chunk.length;
    const Packed<Operand> grad_out = grad_out_.rows(this->out_of(h, g));
    Real* grad_q = grad_q_tile_.get();
    grad_scores_.product(length, dv_, scale_, grad_out, {v_transposed_.get(), Base::kTransposedLd});
    multiply(length, dk_, dv_, scale_, as_is(grad_out), state, grad_q, call_.k_ld, false);
    if (call_.has_decay) {
      tiles_.scale_rows(length, dk_, decay_.from_start(), grad_q, call_.k_ld);
      grad_scores_.set_weighted(length, decay_.weights(), decay_.kLd, grad_scores_);
      save_read_dots(chunk, h, g);
    }
    grad_scores_.multiply_add(length, dk_, k_.columns(this->key_of(h)), grad_q, call_.k_ld);
    this->add_and_store(call_.grad_q, this->first_query() + this->query_of(h, g), chunk, h, grad_q);
  }

  void save_read_dots(const TokenChunk& chunk, int64_t h, int64_t g) {
    std::array<Real, kMaxChunk> products;
    this->load_real(p_.q, chunk, this->first_query() + this->query_of(h, g), dk_, real_tile_.get(),
                    call_.k_ld);
    tiles_.dot_rows(chunk.length, dk_, real_tile_.get(), call_.k_ld, grad_q_tile_.get(), call_.k_ld,
                    products.data());
    for (int i = 0; i < chunk.length; ++i) {
      double& saved = call_.pair_sum_at(row_, chunk.begin + i, this->value_head(h));
      saved = g == 0 ? double(products[i]) : saved + double(products[i]);
    }
  }

  void update_state(const TokenChunk& chunk, int64_t h) {
    const int length = chunk.length;
    Real* state = state_[h].decayed(call_.has_decay ? decay_.log_total() : 0);
    if (call_.has_decay) {
      this->load_real(p_.k, chunk, first_key_ + this->key_of(h), dk_, real_tile_.get(), call_.k_ld);
      tiles_.scale_rows(length, dk_, decay_.to_end(), real_tile_.get(), call_.k_ld);
      multiply(dv_, dk_, length, Real(1), transposed(v_.columns(h)),
               real_packing_.columns(real_tile_.get(), call_.k_ld, length, dk_), state, call_.k_ld, true);
    } else {
      multiply(dv_, dk_, length, Real(1), transposed(v_.columns(h)), k_.columns(this->key_of(h)), state,
               call_.k_ld, true);
    }
  }

  using Base::alpha_, Base::call_, Base::decay_, Base::dk_, Base::dv_, Base::grad_out_, Base::grad_scores_;
  using Base::first_key_, Base::head_size_, Base::k_, Base::key_heads_, Base::kReal, Base::n_, Base::p_,
      Base::row_, Base::running_;
  using Base::scale_, Base::state_, Base::tiles_, Base::v_, Base::v_transposed_;
  Scratch<Real> grad_q_tile_ = make_scratch<Real>(Base::kLength * call_.k_ld);
  Scratch<Real> real_tile_ = make_scratch<Real>(Base::kLength * call_.k_ld);
  ResultPacking<Operand> state_packing_{dv_, dk_};
  ResultPacking<Operand> real_packing_{Base::kLength, dk_};
};

// In reverse: dk, dv, pair sums within splits, and the gradients of the initial states. The state is R:
// [Dk, Dv].
template <class Operand>
class KeyValueGradientSweep : public GradientSweep<Operand> {
 public:
  using Base = GradientSweep<Operand>;
  using Real = RealOf<Operand>;
  static constexpr bool kReverse = true;

  explicit KeyValueGradientSweep(BackwardCall<Operand>& call) : Base(call, call.dk * call.v_ld) {}

  void start(Real* base) {
    for (int64_t s = 0; s < p_.states; ++s)
      for (int64_t h = 0; h < this->value_heads(); ++h)
        tiles_.load(kReal, state_at<Real>(p_, p_.grad_final_states, s, n_, this->value_head(h)), dv_, dk_,
                    dv_, base + s * this->state_size() + h * head_size_, call_.v_ld);
  }

  void enter(const CarrySplit&, Real*) {}

  void add(const CarrySplit& split, Real* local) {
    this->begin(nullptr, local);
    for_each_chunk(split, [&](const TokenChunk& chunk) {
      q_.load_columns(p_.q, p_.dtype, row_, chunk, this->first_query(), this->query_heads());
      grad_out_.load_columns(p_.grad_out, p_.dtype, row_, chunk, this->first_out(), out_heads());
      for (int64_t h = 0; h < this->value_heads(); ++h) {
        if (call_.has_decay) decay_.set(p_, row_, chunk, this->value_head(h));
        Real* state = state_[h].decayed(call_.has_decay ? decay_.log_total() : 0);
        for (int64_t g = 0; g < call_.query_group; ++g) update_state(chunk, h, g, state);
      }
    });
  }

  void run(const CarrySplit& split, Real* base, Real* local) {
    this->begin(base, local);
    std::fill(pair_sum_.begin(), pair_sum_.end(), 0.0);
    for_each_chunk(split, [&](const TokenChunk& chunk) {
      const int length = chunk.length;
      q_.load_rows(p_.q, p_.dtype, row_, chunk, this->first_query(), this->query_heads());
      k_.load_rows(p_.k, p_.dtype, row_, chunk, first_key_, key_heads_);
      v_.load_rows(p_.v, p_.dtype, row_, chunk, this->first_value(), this->value_heads());
      grad_out_.load_rows(p_.grad_out, p_.dtype, row_, chunk, this->first_out(), out_heads());
      for (int64_t h = 0; h < this->value_heads(); ++h) {
        if (this->first_of_group(h))
          k_.transpose(this->key_of(h), length, k_transposed_.get(), Base::kTransposedLd);
        v_.transpose(h, length, v_transposed_.get(), Base::kTransposedLd);
        if (call_.has_decay) decay_.set(p_, row_, chunk, this->value_head(h));
        grads_through_state(chunk, h);
        Real* state = state_[h].decayed(call_.has_decay ? decay_.log_total() : 0);
        for (int64_t g = 0; g < call_.query_group; ++g) {
          grads_inside_chunk(chunk, h, g);
          update_state(chunk, h, g, state);
        }
        tiles_.store(p_.dtype, writable(this->rows_of(call_.grad_v, chunk, this->value_head(h))),
                     call_.grad_v.time, length, dv_, grad_v_tile_.get(), call_.v_ld);
        this->add_and_store(call_.grad_k, first_key_ + this->key_of(h), chunk, h, grad_k_tile_.get());
        if (call_.has_decay) save_pair_sums(chunk, h);
      }
    });
    for (int64_t h = 0; call_.has_decay && h < this->value_heads(); ++h)
      call_.split_pair_sum_at(&split - call_.plan.splits.data(), this->value_head(h)) = pair_sum_[h];
  }

  void leave(const CarrySplit& split, Real* base, const Real* local) {
    this->add_local_states(split, base, local);
    const int64_t size = this->state_size();
    if (split.ended_step != kNoStep)
      end_step_backward(size, split.ended_step, alpha_, p_.alphas, base, base + size, base + 2 * size);
  }

  void finish(const Real* base) {
    if (!p_.grad_initial_states) return;
    for (int64_t s = 0; s < p_.states; ++s)
      for (int64_t h = 0; h < this->value_heads(); ++h)
        tiles_.store(kReal, state_at<Real>(p_, p_.grad_initial_states, s, n_, this->value_head(h)), dv_, dk_,
                     dv_, base + s * this->state_size() + h * head_size_, call_.v_ld);
  }

 private:
  template <class F>
  void for_each_chunk(const CarrySplit& split, const F& f) {
    for (int64_t c = split.chunks.end - 1; c >= split.chunks.begin; --c)
      if (!call_.plan.chunks[c].padding) f(call_.plan.chunks[c]);
  }

  int64_t out_heads() const { return std::max(this->value_heads(), this->query_heads()); }

  // dk and dv through the state after the chunk. dk comes out transposed, which needs no transposed state.
  void grads_through_state(const TokenChunk& chunk, int64_t h) {
    const int length = chunk.length;
    const Real* after = state_[h].value(running_.get());
    multiply(length, dv_, dk_, Real(1), as_is(k_.rows(this->key_of(h))),
             state_packing_.columns(after, call_.v_ld, dk_, dv_), grad_v_tile_.get(), call_.v_ld, false);
    multiply(dk_, length, dv_, Real(1), as_is(state_packing_.rows(after, call_.v_ld, dk_, dv_)),
             Packed<Operand>{v_transposed_.get(), Base::kTransposedLd}, grad_k_transposed_.get(),
             Base::kTransposedLd, false);
    tiles_.load_transposed(kReal, grad_k_transposed_.get(), Base::kTransposedLd, dk_, length,
                           grad_k_tile_.get(), call_.k_ld);
    if (!call_.has_decay) return;
    tiles_.scale_rows(length, dv_, decay_.to_end(), grad_v_tile_.get(), call_.v_ld);
    tiles_.scale_rows(length, dk_, decay_.to_end(), grad_k_tile_.get(), call_.k_ld);
    this->load_real(p_.v, chunk, this->value_head(h), dv_, real_tile_.get(), call_.v_ld);
    tiles_.dot_rows(length, dv_, real_tile_.get(), call_.v_ld, grad_v_tile_.get(), call_.v_ld,
                    write_dots_.data());
    chunk_pair_sum_.fill(0);
  }

  void grads_inside_chunk(const TokenChunk& chunk, int64_t h, int64_t g) {
    const int length = chunk.length;
    const int64_t query = this->query_of(h, g), out = this->out_of(h, g);
    if (this->first_of_group(h)) {
      q_.pack_columns(query, length);
      scores_.product(length, dk_, scale_, q_.rows(query), {k_transposed_.get(), Base::kTransposedLd});
    }
    grad_out_.pack_columns(out, length);
    grad_scores_.product(length, dv_, Real(1), grad_out_.rows(out),
                         {v_transposed_.get(), Base::kTransposedLd});
    LowerTriangle<Operand>* scores = &scores_;
    if (call_.has_decay) {
      decayed_scores_.set_weighted(length, decay_.weights(), decay_.kLd, scores_);
      grad_scores_.set_weighted(length, decay_.weights(), decay_.kLd, grad_scores_);
      scores = &decayed_scores_;
      add_chunk_pair_sums(length);
    }
    scores->multiply_add_transposed(length, dv_, 1, grad_out_.columns(out), grad_v_tile_.get(), call_.v_ld);
    grad_scores_.multiply_add_transposed(length, dk_, scale_, q_.columns(query), grad_k_tile_.get(),
                                         call_.k_ld);
  }

  void update_state(const TokenChunk& chunk, int64_t h, int64_t g, Real* state) {
    const int length = chunk.length;
    const int64_t out = this->out_of(h, g);
    const Left<Operand> queries = transposed(q_.columns(this->query_of(h, g)));
    if (call_.has_decay) {
      this->load_real(p_.grad_out, chunk, this->first_out() + out, dv_, real_tile_.get(), call_.v_ld);
      tiles_.scale_rows(length, dv_, decay_.from_start(), real_tile_.get(), call_.v_ld);
      multiply(dk_, dv_, length, scale_, queries,
               real_packing_.columns(real_tile_.get(), call_.v_ld, length, dv_), state, call_.v_ld, true);
    } else {
      multiply(dk_, dv_, length, scale_, queries, grad_out_.columns(out), state, call_.v_ld, true);
    }
  }

  void add_chunk_pair_sums(int length) {
    for (int i = 0; i < length; ++i)
      for (int j = 0; j < i; ++j) {
        const double pair = double(scores_.row(i)[j]) * double(grad_scores_.row(i)[j]);
        chunk_pair_sum_[i] += pair;
        chunk_pair_sum_[j] -= pair;
      }
  }

  void save_pair_sums(const TokenChunk& chunk, int64_t h) {
    double inside = 0;
    for (int i = chunk.length - 1; i >= 0; --i) {
      double& pair_sum = call_.pair_sum_at(row_, chunk.begin + i, this->value_head(h));
      pair_sum_[h] += pair_sum - double(write_dots_[i]);
      inside += chunk_pair_sum_[i];
      pair_sum = pair_sum_[h] + inside;
    }
  }

  using Base::alpha_, Base::call_, Base::decay_, Base::dk_, Base::dv_, Base::grad_out_, Base::grad_scores_;
  using Base::first_key_, Base::head_size_, Base::k_, Base::key_heads_, Base::kReal, Base::n_, Base::p_,
      Base::row_;
  using Base::running_, Base::scale_, Base::state_, Base::tiles_, Base::v_, Base::v_transposed_;
  HeadTiles<Operand> q_{Base::max_queries_, dk_};
  Scratch<Operand> k_transposed_ = make_scratch<Operand>(depth<Operand>(dk_) * Base::kTransposedLd);
  Scratch<Real> grad_k_transposed_ = make_scratch<Real>(dk_ * Base::kTransposedLd);
  Scratch<Real> grad_k_tile_ = make_scratch<Real>(Base::kLength * call_.k_ld);
  Scratch<Real> grad_v_tile_ = make_scratch<Real>(Base::kLength * call_.v_ld);
  Scratch<Real> real_tile_ = make_scratch<Real>(Base::kLength * call_.v_ld);
  LowerTriangle<Operand> scores_, decayed_scores_;
  ResultPacking<Operand> state_packing_{dk_, dv_};
  ResultPacking<Operand> real_packing_{Base::kLength, dv_};
  std::array<Real, kMaxChunk> write_dots_;
  std::array<double, kMaxChunk> chunk_pair_sum_;
  // Of the current token, over pairs of tokens of different chunks.
  std::vector<double> pair_sum_ = std::vector<double>(Base::max_values_);
};

// From pair sums within splits to the gradient of log_decay.
template <class Operand>
void store_decay_gradients(BackwardCall<Operand>& call) {
  const LinearAttentionBackwardParams& p = call.p;
  using Real = RealOf<Operand>;
  parallel_for(p.sequences * p.value_heads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / p.value_heads, head = task % p.value_heads;
      const LinearSequence& sequence = call.plan.sequences[n];
      double later = call.final_pair_sum[task];
      for (int64_t s = sequence.splits.end - 1; s >= sequence.splits.begin; --s) {
        const Range& chunks = call.plan.splits[s].chunks;
        for (int64_t c = chunks.begin; c < chunks.end; ++c)
          for (int64_t t = call.plan.chunks[c].begin;
               t < call.plan.chunks[c].begin + call.plan.chunks[c].length; ++t)
            static_cast<Real*>(p.grad_log_decay)[(sequence.row * p.tokens + t) * p.value_heads + head] =
                Real(later + call.pair_sum_at(sequence.row, t, head));
        later += call.split_pair_sum_at(s, head);
      }
    }
  });
}

template <class Operand>
void backward(const LinearAttentionBackwardParams& p) {
  BackwardCall<Operand> call(p);
  using Real = RealOf<Operand>;
  const int64_t work = state_multiply_adds(p);
  carry<Real>(call.plan, call.head_blocks, work, [&] { return QueryGradientSweep<Operand>(call); });
  carry<Real>(call.plan, call.head_blocks, work, [&] { return KeyValueGradientSweep<Operand>(call); });
  if (call.has_decay) store_decay_gradients(call);
}

}  // namespace

void linear_attention_backward_cpu(const LinearAttentionBackwardParams& p) {
  const int64_t row_bytes = p.batch * p.tokens * element_bytes(p.dtype);
  prefer_huge_pages(p.grad_q, row_bytes * p.query_heads * p.key_width);
  prefer_huge_pages(p.grad_k, row_bytes * p.key_heads * p.key_width);
  prefer_huge_pages(p.grad_v, row_bytes * p.value_heads * p.value_width);
  if (p.dtype == DType::kFloat64) return backward<double>(p);
  // The gradient of log_decay is a sum of differences, which products of rounded states would drown.
  const bool pairs = p.dtype == DType::kBFloat16 && has_bfloat16_products() && !p.log_decay.data;
  if (pairs) return backward<BFloat16Pair>(p);
  backward<float>(p);
}

}  // namespace statecore
