// Chunked linear attention, backward, in two sweeps that store no state a chunk. Forwards, the same as
// linear_attention_cpu.cpp with (dO, v, k) in the place of (q, k, v) and the state transposed gives dq.
// Backwards, with R the gradient of the state after a chunk:
//
//   dv_j = exp(G_last - G_j) k_j R   + sum_{i >= j} exp(G_i - G_j) scale (q_i . k_j) dO_i
//   dk_j = exp(G_last - G_j) v_j R^T + sum_{i >= j} exp(G_i - G_j) scale (dO_i . v_j) q_i
//   R   <- exp(G_last) R + sum_i exp(G_i) scale q_i^T dO_i
//
// The gradient of log_decay_t is the sum over all pairs j < t <= i of
//
//   exp(G_i - G_j) scale (q_i . k_j) (dO_i . v_j)
//
// with the initial state as an earliest j and the gradient of the final state as a latest i. Pairs inside one
// chunk are summed there. The sum over the others, going backwards, grows at t by what q_t reads, <q_t, dq_t>
// through the state, and shrinks by what k_t and v_t have written, <k_t, dk_t> = <v_t, dv_t> through the
// state. Kept apart, the two kinds leave nothing large to cancel where the decay is strong. It starts from
// <S, dS> of the final state.
//
// A unit is one key head with all the heads that share it, or some key heads where nothing is shared by value
// heads.

#include <algorithm>

#include "common/huge_pages.h"
#include "linear_attention/carry.h"
#include "linear_attention/linear_attention.h"
#include "linear_attention/linear_tiles.h"
#include "linear_attention/step_end.h"

namespace statecore {
namespace {

constexpr int64_t kUnitHeads = 4;  // key heads whose states stay in the L2 cache beside their tiles

// What both sweeps of all threads know of one call.
template <class Operand>
struct Call {
  using Real = RealOf<Operand>;

  Call(const LinearAttentionBackwardParams& params)
      : p(params),
        plan(plan_linear(params, kChunk<Operand>)),
        flow(decays ? p.batch * p.tokens * p.value_heads : 0),
        segment_flow(decays ? plan.segments.size() * p.value_heads : 0),
        final_flow(decays ? p.sequences * p.value_heads : 0) {}

  // Of the gradient of log_decay: what flows over token t, from inside its segment only.
  double& flow_at(int64_t row, int64_t t, int64_t head) {
    return flow[(row * p.tokens + t) * p.value_heads + head];
  }
  double& segment_flow_at(int64_t segment, int64_t head) {
    return segment_flow[segment * p.value_heads + head];
  }

  const LinearAttentionBackwardParams& p;
  const LinearPlan plan;
  const bool decays = p.log_decay.data != nullptr;
  const int dk = int(p.key_width), dv = int(p.value_width);
  const int64_t k_ld = tile_ld(dk), v_ld = tile_ld(dv);
  const int64_t query_group = p.query_heads / p.key_heads, value_group = p.value_heads / p.key_heads;
  // Key heads of a unit: without influence on results, so that it may depend on the number of threads.
  const int64_t unit_heads =
      value_group > 1 ? 1 : std::clamp<int64_t>(p.sequences * p.key_heads / thread_count(), 1, kUnitHeads);
  const int64_t units = (p.key_heads + unit_heads - 1) / unit_heads;
  const HeadsView grad_q = dense(p.grad_q, p.tokens, p.query_heads, dk);
  const HeadsView grad_k = dense(p.grad_k, p.tokens, p.key_heads, dk);
  const HeadsView grad_v = dense(p.grad_v, p.tokens, p.value_heads, dv);
  std::vector<double> flow, segment_flow, final_flow;
};

// What both sweeps have: a unit, tiles, and the sum of a tile over the value heads of a group.
template <class Operand>
class Sweep {
 public:
  using Real = RealOf<Operand>;

  Sweep(Call<Operand>& call, int64_t head_size) : call_(call), head_size_(head_size) {}

  int64_t units() const { return call_.units; }
  int64_t states() const { return p_.states; }
  int64_t state_size() const { return call_.unit_heads * call_.value_group * head_size_; }

  void select(int64_t item) {
    n_ = item / call_.units;
    row_ = call_.plan.sequences[n_].row;
    first_key_ = item % call_.units * call_.unit_heads;
    key_heads_ = std::min(call_.unit_heads, p_.key_heads - first_key_);
  }

 protected:
  void begin(Real* base, Real* sums) {
    for (int64_t h = 0; h < value_heads(); ++h)
      state_[h].begin(head_size_, base ? base + h * head_size_ : nullptr,
                      sums ? sums + h * head_size_ : nullptr);
  }

  void add_segments(const CarrySegment& segment, Real* base, const Real* sums) {
    if (!sums) return;
    for (int64_t h = 0; h < value_heads(); ++h)
      add_segment(head_size_, segment_log_decay<Real>(p_, call_.plan, segment, row_, value_head(h)),
                  base + h * head_size_, sums + h * head_size_);
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
  // Heads are counted within the unit: value heads h, key heads key_of(h), query heads query_of(h, g), and
  // out_of(h, g), which read what h holds. first_... is where those of the unit begin.
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
  Call<Operand>& call_;
  const LinearAttentionBackwardParams& p_ = call_.p;
  const TileKernels<Real>& tiles_ = tile_kernels<Real>();
  const int dk_ = call_.dk, dv_ = call_.dv;
  const int64_t head_size_;
  const Real* alpha_ = static_cast<const Real*>(p_.alpha);
  const Real scale_ = Real(p_.scale);
  const int64_t max_values_ = call_.unit_heads * call_.value_group;  // heads of a unit, at most
  const int64_t max_queries_ = call_.unit_heads * call_.query_group;
  std::vector<RunningState<Real>> state_ = std::vector<RunningState<Real>>(max_values_);
  Scratch<Real> running_ = make_scratch<Real>(call_.plan.summed ? head_size_ : 0);
  Scratch<Real> group_sum_ = make_scratch<Real>(call_.value_group > 1 ? kLength * call_.k_ld : 0);
  HeadTiles<Operand> k_{call_.unit_heads, dk_}, v_{max_values_, dv_};
  HeadTiles<Operand> grad_out_{std::max(max_values_, max_queries_), dv_};
  Scratch<Operand> v_transposed_ = make_scratch<Operand>(depth<Operand>(dv_) * kTransposedLd);
  LowerTriangle<Operand> grad_scores_;
  ChunkDecay<Real> decay_;
  int64_t n_ = 0, first_key_ = 0, key_heads_ = 0, row_ = 0;
};

// dq, zeros for padding; for the decays what q reads through the state, and <S, dS> of the final state. The
// state is transposed: [Dv, Dk].
template <class Operand>
class ForwardsSweep : public Sweep<Operand> {
 public:
  using Base = Sweep<Operand>;
  using Real = RealOf<Operand>;
  static constexpr bool kBackwards = false;

  explicit ForwardsSweep(Call<Operand>& call) : Base(call, call.dv * call.k_ld) {}

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

  void enter(const CarrySegment& segment, Real* base) {
    const int64_t size = this->state_size();
    if (segment.ended != kNoStep)
      end_step(size, segment.ended, alpha_, p_.alphas, base, base + size, base + 2 * size);
  }

  void add(const CarrySegment& segment, Real* sums) {
    this->begin(nullptr, sums);
    each_chunk(segment, [&](const TokenChunk& chunk) {
      k_.load_columns(p_.k, p_.dtype, row_, chunk, first_key_, key_heads_);
      v_.load_columns(p_.v, p_.dtype, row_, chunk, this->first_value(), this->value_heads());
      for (int64_t h = 0; h < this->value_heads(); ++h) {
        if (call_.decays) decay_.set(p_, row_, chunk, this->value_head(h));
        absorb(chunk, h);
      }
    });
  }

  void run(const CarrySegment& segment, Real* base, Real* sums) {
    this->begin(base, sums);
    each_chunk(segment, [&](const TokenChunk& chunk) {
      k_.load_columns(p_.k, p_.dtype, row_, chunk, first_key_, key_heads_);
      v_.load_rows(p_.v, p_.dtype, row_, chunk, this->first_value(), this->value_heads());
      grad_out_.load_rows(p_.grad_out, p_.dtype, row_, chunk, this->first_out(),
                          std::max(this->value_heads(), this->query_heads()));
      for (int64_t h = 0; h < this->value_heads(); ++h) {
        v_.pack_columns(h, chunk.length);
        v_.transpose(h, chunk.length, v_transposed_.get(), Base::kTransposedLd);
        if (call_.decays) decay_.set(p_, row_, chunk, this->value_head(h));
        const Packed<Operand> state =
            state_packing_.columns(state_[h].value(running_.get()), call_.k_ld, dv_, dk_);
        for (int64_t g = 0; g < call_.query_group; ++g) attend(chunk, h, g, state);
        absorb(chunk, h);
      }
    });
  }

  void leave(const CarrySegment& segment, Real* base, const Real* sums) {
    this->add_segments(segment, base, sums);
  }

  void finish(const Real* base) {
    for (int64_t h = 0; call_.decays && h < this->value_heads(); ++h) {
      const Real* grad = state_at<Real>(p_, p_.grad_final_states, 0, n_, this->value_head(h));
      double product = 0;
      for (int i = 0; i < dk_; ++i)
        for (int j = 0; j < dv_; ++j)
          product += double(grad[i * dv_ + j]) * double(base[h * head_size_ + j * call_.k_ld + i]);
      call_.final_flow[n_ * p_.value_heads + this->value_head(h)] = product;
    }
  }

 private:
  // f(chunk) where there are tokens; gradients of padding are 0.
  template <class F>
  void each_chunk(const CarrySegment& segment, const F& f) {
    for (int64_t c = segment.chunks.begin; c < segment.chunks.end; ++c) {
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

  void attend(const TokenChunk& chunk, int64_t h, int64_t g, Packed<Operand> state) {
    const int length = chunk.length;
    const Packed<Operand> grad_out = grad_out_.rows(this->out_of(h, g));
    Real* grad_q = grad_q_tile_.get();
    grad_scores_.product(length, dv_, scale_, grad_out, {v_transposed_.get(), Base::kTransposedLd});
    multiply(length, dk_, dv_, scale_, as_is(grad_out), state, grad_q, call_.k_ld, false);
    if (call_.decays) {
      tiles_.scale_rows(length, dk_, decay_.from_start(), grad_q, call_.k_ld);
      grad_scores_.weigh(length, decay_.weights(), decay_.kLd, grad_scores_);
      save_reads(chunk, h, g);
    }
    grad_scores_.add_times(length, dk_, k_.columns(this->key_of(h)), grad_q, call_.k_ld);
    this->add_and_store(call_.grad_q, this->first_query() + this->query_of(h, g), chunk, h, grad_q);
  }

  void save_reads(const TokenChunk& chunk, int64_t h, int64_t g) {
    std::array<Real, kMaxChunk> products;
    this->load_real(p_.q, chunk, this->first_query() + this->query_of(h, g), dk_, real_tile_.get(),
                    call_.k_ld);
    tiles_.dot_rows(chunk.length, dk_, real_tile_.get(), call_.k_ld, grad_q_tile_.get(), call_.k_ld,
                    products.data());
    for (int i = 0; i < chunk.length; ++i) {
      double& saved = call_.flow_at(row_, chunk.begin + i, this->value_head(h));
      saved = g == 0 ? double(products[i]) : saved + double(products[i]);
    }
  }

  void absorb(const TokenChunk& chunk, int64_t h) {
    const int length = chunk.length;
    Real* state = state_[h].decayed(call_.decays ? decay_.log_total() : 0);
    if (call_.decays) {
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

// dk, dv, the decays' flow inside segments, and the gradients of the initial states. The state is R: [Dk,
// Dv].
template <class Operand>
class BackwardsSweep : public Sweep<Operand> {
 public:
  using Base = Sweep<Operand>;
  using Real = RealOf<Operand>;
  static constexpr bool kBackwards = true;

  explicit BackwardsSweep(Call<Operand>& call) : Base(call, call.dk * call.v_ld) {}

  void start(Real* base) {
    for (int64_t s = 0; s < p_.states; ++s)
      for (int64_t h = 0; h < this->value_heads(); ++h)
        tiles_.load(kReal, state_at<Real>(p_, p_.grad_final_states, s, n_, this->value_head(h)), dv_, dk_,
                    dv_, base + s * this->state_size() + h * head_size_, call_.v_ld);
  }

  void enter(const CarrySegment&, Real*) {}

  void add(const CarrySegment& segment, Real* sums) {
    this->begin(nullptr, sums);
    each_chunk(segment, [&](const TokenChunk& chunk) {
      q_.load_columns(p_.q, p_.dtype, row_, chunk, this->first_query(), this->query_heads());
      grad_out_.load_columns(p_.grad_out, p_.dtype, row_, chunk, this->first_out(), out_heads());
      for (int64_t h = 0; h < this->value_heads(); ++h) {
        if (call_.decays) decay_.set(p_, row_, chunk, this->value_head(h));
        Real* sum = state_[h].decayed(call_.decays ? decay_.log_total() : 0);
        for (int64_t g = 0; g < call_.query_group; ++g) absorb(chunk, h, g, sum);
      }
    });
  }

  void run(const CarrySegment& segment, Real* base, Real* sums) {
    this->begin(base, sums);
    std::fill(flow_.begin(), flow_.end(), 0.0);
    each_chunk(segment, [&](const TokenChunk& chunk) {
      const int length = chunk.length;
      q_.load_rows(p_.q, p_.dtype, row_, chunk, this->first_query(), this->query_heads());
      k_.load_rows(p_.k, p_.dtype, row_, chunk, first_key_, key_heads_);
      v_.load_rows(p_.v, p_.dtype, row_, chunk, this->first_value(), this->value_heads());
      grad_out_.load_rows(p_.grad_out, p_.dtype, row_, chunk, this->first_out(), out_heads());
      for (int64_t h = 0; h < this->value_heads(); ++h) {
        if (this->first_of_group(h))
          k_.transpose(this->key_of(h), length, k_transposed_.get(), Base::kTransposedLd);
        v_.transpose(h, length, v_transposed_.get(), Base::kTransposedLd);
        if (call_.decays) decay_.set(p_, row_, chunk, this->value_head(h));
        through_state(chunk, h);
        Real* sum = state_[h].decayed(call_.decays ? decay_.log_total() : 0);
        for (int64_t g = 0; g < call_.query_group; ++g) {
          inside_chunk(chunk, h, g);
          absorb(chunk, h, g, sum);
        }
        tiles_.store(p_.dtype, writable(this->rows_of(call_.grad_v, chunk, this->value_head(h))),
                     call_.grad_v.time, length, dv_, grad_v_tile_.get(), call_.v_ld);
        this->add_and_store(call_.grad_k, first_key_ + this->key_of(h), chunk, h, grad_k_tile_.get());
        if (call_.decays) save_flow(chunk, h);
      }
    });
    for (int64_t h = 0; call_.decays && h < this->value_heads(); ++h)
      call_.segment_flow_at(&segment - call_.plan.segments.data(), this->value_head(h)) = flow_[h];
  }

  void leave(const CarrySegment& segment, Real* base, const Real* sums) {
    this->add_segments(segment, base, sums);
    const int64_t size = this->state_size();
    if (segment.ended != kNoStep)
      end_step_backward(size, segment.ended, alpha_, p_.alphas, base, base + size, base + 2 * size);
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
  void each_chunk(const CarrySegment& segment, const F& f) {
    for (int64_t c = segment.chunks.end - 1; c >= segment.chunks.begin; --c)
      if (!call_.plan.chunks[c].padding) f(call_.plan.chunks[c]);
  }

  int64_t out_heads() const { return std::max(this->value_heads(), this->query_heads()); }

  // dk and dv through the state after the chunk. dk comes out transposed, which needs no transposed state.
  void through_state(const TokenChunk& chunk, int64_t h) {
    const int length = chunk.length;
    const Real* after = state_[h].value(running_.get());
    multiply(length, dv_, dk_, Real(1), as_is(k_.rows(this->key_of(h))),
             state_packing_.columns(after, call_.v_ld, dk_, dv_), grad_v_tile_.get(), call_.v_ld, false);
    multiply(dk_, length, dv_, Real(1), as_is(state_packing_.rows(after, call_.v_ld, dk_, dv_)),
             Packed<Operand>{v_transposed_.get(), Base::kTransposedLd}, grad_k_transposed_.get(),
             Base::kTransposedLd, false);
    tiles_.load_transposed(kReal, grad_k_transposed_.get(), Base::kTransposedLd, dk_, length,
                           grad_k_tile_.get(), call_.k_ld);
    if (!call_.decays) return;
    tiles_.scale_rows(length, dv_, decay_.to_end(), grad_v_tile_.get(), call_.v_ld);
    tiles_.scale_rows(length, dk_, decay_.to_end(), grad_k_tile_.get(), call_.k_ld);
    this->load_real(p_.v, chunk, this->value_head(h), dv_, real_tile_.get(), call_.v_ld);
    tiles_.dot_rows(length, dv_, real_tile_.get(), call_.v_ld, grad_v_tile_.get(), call_.v_ld,
                    writes_.data());
    chunk_flow_.fill(0);
  }

  void inside_chunk(const TokenChunk& chunk, int64_t h, int64_t g) {
    const int length = chunk.length;
    const int64_t query = this->query_of(h, g), out = this->out_of(h, g);
    if (this->first_of_group(h)) {
      q_.pack_columns(query, length);
      scores_.product(length, dk_, scale_, q_.rows(query), {k_transposed_.get(), Base::kTransposedLd});
    }
    grad_out_.pack_columns(out, length);
    grad_scores_.product(length, dv_, Real(1), grad_out_.rows(out),
                         {v_transposed_.get(), Base::kTransposedLd});
    LowerTriangle<Operand>* weights = &scores_;
    if (call_.decays) {
      decayed_.weigh(length, decay_.weights(), decay_.kLd, scores_);
      grad_scores_.weigh(length, decay_.weights(), decay_.kLd, grad_scores_);
      weights = &decayed_;
      add_chunk_flow(length);
    }
    weights->add_transposed_times(length, dv_, 1, grad_out_.columns(out), grad_v_tile_.get(), call_.v_ld);
    grad_scores_.add_transposed_times(length, dk_, scale_, q_.columns(query), grad_k_tile_.get(), call_.k_ld);
  }

  void absorb(const TokenChunk& chunk, int64_t h, int64_t g, Real* sum) {
    const int length = chunk.length;
    const int64_t out = this->out_of(h, g);
    const Left<Operand> queries = transposed(q_.columns(this->query_of(h, g)));
    if (call_.decays) {
      this->load_real(p_.grad_out, chunk, this->first_out() + out, dv_, real_tile_.get(), call_.v_ld);
      tiles_.scale_rows(length, dv_, decay_.from_start(), real_tile_.get(), call_.v_ld);
      multiply(dk_, dv_, length, scale_, queries,
               real_packing_.columns(real_tile_.get(), call_.v_ld, length, dv_), sum, call_.v_ld, true);
    } else {
      multiply(dk_, dv_, length, scale_, queries, grad_out_.columns(out), sum, call_.v_ld, true);
    }
  }

  void add_chunk_flow(int length) {
    for (int i = 0; i < length; ++i)
      for (int j = 0; j < i; ++j) {
        const double pair = double(scores_.row(i)[j]) * double(grad_scores_.row(i)[j]);
        chunk_flow_[i] += pair;
        chunk_flow_[j] -= pair;
      }
  }

  void save_flow(const TokenChunk& chunk, int64_t h) {
    double inside = 0;
    for (int i = chunk.length - 1; i >= 0; --i) {
      double& flow = call_.flow_at(row_, chunk.begin + i, this->value_head(h));
      flow_[h] += flow - double(writes_[i]);
      inside += chunk_flow_[i];
      flow = flow_[h] + inside;
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
  LowerTriangle<Operand> scores_, decayed_;
  ResultPacking<Operand> state_packing_{dk_, dv_};
  ResultPacking<Operand> real_packing_{Base::kLength, dv_};
  std::array<Real, kMaxChunk> writes_;
  std::array<double, kMaxChunk> chunk_flow_;
  std::vector<double> flow_ =
      std::vector<double>(Base::max_values_);  // over the present border of two chunks
};

// From flows inside segments to the gradient of log_decay.
template <class Operand>
void store_decay_gradients(Call<Operand>& call) {
  const LinearAttentionBackwardParams& p = call.p;
  using Real = RealOf<Operand>;
  parallel_for(p.sequences * p.value_heads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / p.value_heads, head = item % p.value_heads;
      const LinearSequence& sequence = call.plan.sequences[n];
      double later = call.final_flow[item];
      for (int64_t s = sequence.segments.end - 1; s >= sequence.segments.begin; --s) {
        const Range& chunks = call.plan.segments[s].chunks;
        for (int64_t c = chunks.begin; c < chunks.end; ++c)
          for (int64_t t = call.plan.chunks[c].begin;
               t < call.plan.chunks[c].begin + call.plan.chunks[c].length; ++t)
            static_cast<Real*>(p.grad_log_decay)[(sequence.row * p.tokens + t) * p.value_heads + head] =
                Real(later + call.flow_at(sequence.row, t, head));
        later += call.segment_flow_at(s, head);
      }
    }
  });
}

template <class Operand>
void backward(const LinearAttentionBackwardParams& p) {
  Call<Operand> call(p);
  using Real = RealOf<Operand>;
  const int64_t work = state_multiply_adds(p);
  carry<Real>(call.plan, call.units, work, [&] { return ForwardsSweep<Operand>(call); });
  carry<Real>(call.plan, call.units, work, [&] { return BackwardsSweep<Operand>(call); });
  if (call.decays) store_decay_gradients(call);
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
