// Chunked linear attention. A sequence is cut into chunks of up to kChunk tokens, and at every end of a step.
// With G the running sum of log_decay inside a chunk (0 without decay) and S the state before it:
//
//   out_i = scale (exp(G_i) q_i S + sum_{j <= i} exp(G_i - G_j) (q_i . k_j) v_j)
//   S    <- exp(G_last) S + sum_j exp(G_last - G_j) k_j^T v_j
//
// Backward in two sweeps that store no state a chunk. Forwards, the same with (dO, v, k) in the place of
// (q, k, v) and the state transposed gives dq. Backwards, with R the gradient of the state after a chunk:
//
//   dv_j = exp(G_last - G_j) k_j R   + sum_{i >= j} exp(G_i - G_j) scale (q_i . k_j) dO_i
//   dk_j = exp(G_last - G_j) v_j R^T + sum_{i >= j} exp(G_i - G_j) scale (dO_i . v_j) q_i
//   R   <- exp(G_last) R + sum_i exp(G_i) scale q_i^T dO_i
//
// A work item is one sequence and one key head with the heads that share it, done whole by one thread:
// results do not depend on the number of threads. A group of query heads (GQA) shares one state; a group of
// value heads (GVA) shares the scores q k^T.

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tile_kernels.h"
#include "linear_attention/linear_attention.h"
#include "linear_attention/step_end.h"

namespace statecore {
namespace {

constexpr int kChunk = 32;  // longer chunks spend more on the triangle, shorter ones more on the state
constexpr int kSquareLd = tile_ld(kChunk);
constexpr int kBand = 16;             // rows of a lower triangle that are multiplied at once
constexpr int kValueBlock = 4;        // value heads of a group (GVA) that one forward item takes
constexpr int32_t kPadding = -1;      // step id of a token that is not there
constexpr int32_t kNoStep = -1;       // no step ends here
constexpr double kResetDecay = -1e5;  // stands for log_decay = -inf: exp gives 0, and sums of it stay finite

// ---- which tokens are computed together --------------------------------------------------------------

struct Chunk {
  int64_t begin;   // first token of the row
  int32_t length;  // tokens, all of one step
  bool padding;
  int32_t ended;  // the step that ends before this chunk, or kNoStep
};

struct Sequence {
  int64_t row;                       // of the batch
  int64_t chunks_begin, chunks_end;  // of Plan::chunks
};

struct Plan {
  std::vector<Chunk> chunks;
  std::vector<Sequence> sequences;
};

Plan make_plan(const LinearAttentionInputs& p) {
  Plan plan;
  plan.sequences.reserve(p.sequences);
  plan.chunks.reserve(p.batch * p.tokens / kChunk + p.sequences);
  for (int64_t n = 0; n < p.sequences; ++n) {
    const int64_t row = p.cu_seqlens ? 0 : n;
    const int64_t begin = p.cu_seqlens ? p.cu_seqlens[n] : 0;
    const int64_t end = p.cu_seqlens ? p.cu_seqlens[n + 1] : p.tokens;
    const int32_t* ids = p.step_ids ? p.step_ids + row * p.ids_batch : nullptr;
    const int64_t first = plan.chunks.size();
    int32_t last = p.initial_step ? p.initial_step[n] : kNoStep;
    for (int64_t t = begin; t < end;) {
      const int32_t step = ids ? ids[t] : 0;
      const int64_t limit = std::min<int64_t>(end, t + kChunk);
      int64_t next = ids ? t + 1 : limit;
      while (next < limit && ids[next] == step) ++next;
      const bool padding = step == kPadding;
      const bool ends = !padding && last != kNoStep && step > last;
      plan.chunks.push_back({t, int32_t(next - t), padding, ends ? last : kNoStep});
      if (!padding) last = step;
      t = next;
    }
    plan.sequences.push_back({row, first, int64_t(plan.chunks.size())});
  }
  return plan;
}

// Of the state alone, which every token and head at least reads and writes.
int64_t multiply_adds(const LinearAttentionInputs& p) {
  return p.batch * p.tokens * (p.query_heads + p.value_heads) * p.key_width * p.value_width;
}

// ---- addresses -----------------------------------------------------------------------------------------

const void* head_at(const HeadsView& x, DType dtype, int64_t row, int64_t t, int64_t head) {
  return static_cast<const char*>(x.data) +
         (row * x.batch + t * x.time + head * x.head) * element_bytes(dtype);
}

HeadsView dense(const void* data, int64_t tokens, int64_t heads, int64_t width) {
  return {data, tokens * heads * width, heads * width, width};
}

void* writable(const void* p) { return const_cast<void*>(p); }

// Rows [begin, begin + length) of one head of a dense result.
void zero_rows(const HeadsView& x, DType dtype, int64_t row, const Chunk& chunk, int64_t head,
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

// ---- lower triangles -----------------------------------------------------------------------------------

// x[i, j] = sum_d a[i, d] b[d, j] for j <= i, and 0 for the other j of the band of i: a[length, depth],
// b[depth, length], leading dimensions of b and x kSquareLd.
template <class Real>
void lower_product(const TileKernels<Real>& kernels, int length, int depth, const Real* a, int64_t lda,
                   const Real* b, Real* x) {
  for (int i0 = 0; i0 < length; i0 += kBand) {
    const int rows = std::min(kBand, length - i0);
    Real* band = x + i0 * kSquareLd;
    kernels.matmul(rows, i0 + rows, depth, a + i0 * lda, lda, 1, b, kSquareLd, band, kSquareLd, false);
    for (int i = 0; i < rows; ++i)
      std::fill(band + i * kSquareLd + i0 + i + 1, band + i * kSquareLd + i0 + rows, Real(0));
  }
}

// out[i, :] += sum_{j <= i} x[i, j] b[j, :]
template <class Real>
void add_lower_times(const TileKernels<Real>& kernels, int length, int width, const Real* x, const Real* b,
                     Real* out, int64_t ld) {
  for (int i0 = 0; i0 < length; i0 += kBand) {
    const int rows = std::min(kBand, length - i0);
    kernels.matmul(rows, width, i0 + rows, x + i0 * kSquareLd, kSquareLd, 1, b, ld, out + i0 * ld, ld, true);
  }
}

// out[j, :] += sum_{i >= j} x[i, j] b[i, :]
template <class Real>
void add_lower_transposed_times(const TileKernels<Real>& kernels, int length, int width, const Real* x,
                                const Real* b, Real* out, int64_t ld) {
  for (int j0 = 0; j0 < length; j0 += kBand) {
    const int rows = std::min(kBand, length - j0);
    kernels.matmul(rows, width, length - j0, x + j0 * kSquareLd + j0, 1, kSquareLd, b + j0 * ld, ld,
                   out + j0 * ld, ld, true);
  }
}

// ---- decay of one value head inside a chunk --------------------------------------------------------------

template <class Real>
class ChunkDecay {
 public:
  explicit ChunkDecay(const TileKernels<Real>& kernels)
      : kernels_(kernels), memory_(zeroed<Real>((kChunk + 4) * kSquareLd)) {}

  void set(const LinearAttentionInputs& p, int64_t row, const Chunk& chunk, int64_t head) {
    constexpr Real kInf = std::numeric_limits<Real>::infinity();
    length_ = chunk.length;
    std::array<double, kChunk> sum;
    double total = 0;
    for (int i = 0; i < length_; ++i) {
      const Real log_decay =
          *static_cast<const Real*>(head_at(p.log_decay, state_dtype(p.dtype), row, chunk.begin + i, head));
      sum[i] = total += log_decay < kResetDecay ? kResetDecay : double(log_decay);
    }
    // Differences are taken in double and masked before exp: they lose nothing and cannot overflow.
    for (int i = 0; i < length_; ++i) {
      Real* weight = memory_.get() + i * kSquareLd;
      for (int j = 0; j <= i; ++j) weight[j] = Real(sum[i] - sum[j]);
      std::fill(weight + i + 1, weight + length_, -kInf);
      row_of(kFromStart)[i] = Real(sum[i]);
      row_of(kToEnd)[i] = Real(total - sum[i]);
    }
    kernels_.exp_shifted(length_, length_, memory_.get(), kSquareLd, row_of(kNothing));
    kernels_.exp_shifted(2, length_, row_of(kFromStart), kSquareLd, row_of(kNothing));
  }

  const Real* from_start() const { return row_of(kFromStart); }  // exp(G_i)
  const Real* to_end() const { return row_of(kToEnd); }          // exp(G_last - G_j)

  // out[i, j] = exp(G_i - G_j) x[i, j]; both are 0 above the diagonal.
  void apply_lower(const Real* x, Real* out) const {
    for (int i0 = 0; i0 < length_; i0 += kBand) {
      const int rows = std::min(kBand, length_ - i0), at = i0 * kSquareLd;
      kernels_.multiply(rows, i0 + rows, memory_.get() + at, kSquareLd, x + at, kSquareLd, out + at,
                        kSquareLd);
    }
  }

  // state[rows, cols] *= exp(G_last)
  void apply_whole(int rows, int cols, Real* state, int64_t ld) const {
    const Real factor = from_start()[length_ - 1];
    std::array<Real, kBand> factors;
    factors.fill(factor);
    for (int i0 = 0; i0 < rows; i0 += kBand)
      kernels_.scale_rows(std::min(kBand, rows - i0), cols, factors.data(), state + i0 * ld, ld);
  }

  static DType state_dtype(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

 private:
  enum Row { kFromStart = kChunk, kToEnd, kNothing };
  Real* row_of(Row row) const { return memory_.get() + row * kSquareLd; }

  const TileKernels<Real>& kernels_;
  Scratch<Real> memory_;  // the weights exp(G_i - G_j), then one row each of Row
  int length_ = 0;
};

// ---- forward -------------------------------------------------------------------------------------------

template <class Real>
void forward(const LinearAttentionParams& p) {
  const auto& kernels = tile_kernels<Real>();
  const Plan plan = make_plan(p);
  const int dk = int(p.key_width), dv = int(p.value_width);
  const int64_t k_ld = tile_ld(dk), v_ld = tile_ld(dv), state_size = dk * v_ld;
  const int64_t query_group = p.query_heads / p.key_heads, value_group = p.value_heads / p.key_heads;
  const int64_t out_heads = std::max(p.query_heads, p.value_heads);
  const int64_t blocks = (value_group + kValueBlock - 1) / kValueBlock;
  const DType real = ChunkDecay<Real>::state_dtype(p.dtype);
  const HeadsView out = dense(p.out, p.tokens, out_heads, dv);
  const HeadsView segment_out = dense(p.segment_out, p.tokens, out_heads, dv);
  const HeadsView gated_out = dense(p.gated_out, p.tokens, out_heads, dv);
  const Real* alpha = static_cast<const Real*>(p.alpha);

  parallel_for(p.sequences * p.key_heads * blocks, multiply_adds(p), [&](int64_t begin, int64_t end) {
    const auto k_tile = make_scratch<Real>(dk * kSquareLd);  // transposed
    const auto q_tile = make_scratch<Real>(kChunk * k_ld);
    const auto v_tile = make_scratch<Real>(kChunk * v_ld), out_tile = make_scratch<Real>(kChunk * v_ld);
    const auto base_tile = make_scratch<Real>(p.gated_out ? kChunk * v_ld : 0);
    const auto gate_tile = make_scratch<Real>(p.gated_out ? kChunk * v_ld : 0);
    const auto scores = make_scratch<Real>(kChunk * kSquareLd),
               decayed = make_scratch<Real>(kChunk * kSquareLd);
    const auto states = zeroed<Real>(std::min<int64_t>(value_group, kValueBlock) * p.states * state_size);
    ChunkDecay<Real> decay(kernels);

    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % blocks, key_head = item / blocks % p.key_heads,
                    n = item / blocks / p.key_heads;
      const int64_t first_value = key_head * value_group + block * kValueBlock;
      const int64_t end_value = std::min((key_head + 1) * value_group, first_value + kValueBlock);
      const auto state = [&](int64_t value_head, int64_t which) {
        return states.get() + ((value_head - first_value) * p.states + which) * state_size;
      };
      const Sequence& sequence = plan.sequences[n];
      const int64_t row = sequence.row;

      for (int64_t h = first_value; h < end_value; ++h)
        for (int64_t s = 0; s < p.states; ++s)
          if (p.initial_states)
            kernels.load(real, state_at<Real>(p, p.initial_states, s, n, h), dv, dk, dv, 1, state(h, s),
                         v_ld);
          else
            std::fill_n(state(h, s), state_size, Real(0));

      for (int64_t c = sequence.chunks_begin; c < sequence.chunks_end; ++c) {
        const Chunk& chunk = plan.chunks[c];
        const int length = chunk.length;
        const auto rows_of = [&](const HeadsView& x, int64_t head) {
          return head_at(x, p.dtype, row, chunk.begin, head);
        };
        if (chunk.padding) {
          for (int64_t g = 0; g < query_group; ++g) {
            zero_rows(out, p.dtype, row, chunk, key_head * query_group + g, dv);
            if (p.gated_out) zero_rows(gated_out, p.dtype, row, chunk, key_head * query_group + g, dv);
          }
          continue;
        }
        if (chunk.ended != kNoStep)
          end_step(state_size, chunk.ended, alpha, p.alphas, state(first_value, 0), state(first_value, 1),
                   state(first_value, 2));

        kernels.load_transposed(p.dtype, rows_of(p.k, key_head), p.k.time, length, dk, 1, k_tile.get(),
                                kSquareLd);
        for (int64_t h = first_value; h < end_value; ++h) {
          Real* running = state(h, 0);
          kernels.load(p.dtype, rows_of(p.v, h), p.v.time, length, dv, 1, v_tile.get(), v_ld);
          if (p.log_decay.data) decay.set(p, row, chunk, h);
          for (int64_t g = 0; g < query_group; ++g) {
            const int64_t query_head = key_head * query_group + g;
            if (h == first_value) {
              kernels.load(p.dtype, rows_of(p.q, query_head), p.q.time, length, dk, Real(p.scale),
                           q_tile.get(), k_ld);
              lower_product(kernels, length, dk, q_tile.get(), k_ld, k_tile.get(), scores.get());
            }
            const Real* weights = scores.get();
            kernels.matmul(length, dv, dk, q_tile.get(), k_ld, 1, running, v_ld, out_tile.get(), v_ld, false);
            if (p.log_decay.data) {
              kernels.scale_rows(length, dv, decay.from_start(), out_tile.get(), v_ld);
              decay.apply_lower(scores.get(), decayed.get());
              weights = decayed.get();
            }
            add_lower_times(kernels, length, dv, weights, v_tile.get(), out_tile.get(), v_ld);

            const int64_t out_head = std::max(h, query_head);
            kernels.store(p.dtype, writable(rows_of(out, out_head)), out.time, length, dv, out_tile.get(),
                          v_ld);
            if (p.gated_out) {
              kernels.load(p.dtype, rows_of(segment_out, out_head), segment_out.time, length, dv, 1,
                           base_tile.get(), v_ld);
              kernels.load(p.dtype, rows_of(p.gate, out_head), p.gate.time, length, dv, 1, gate_tile.get(),
                           v_ld);
              kernels.gated_add(length, dv, out_tile.get(), base_tile.get(), gate_tile.get(), v_ld);
              kernels.store(p.dtype, writable(rows_of(gated_out, out_head)), gated_out.time, length, dv,
                            out_tile.get(), v_ld);
            }
          }
          if (p.log_decay.data) {
            kernels.scale_rows(length, dv, decay.to_end(), v_tile.get(), v_ld);
            decay.apply_whole(dk, dv, running, v_ld);
          }
          kernels.matmul(dk, dv, length, k_tile.get(), kSquareLd, 1, v_tile.get(), v_ld, running, v_ld, true);
        }
      }

      for (int64_t h = first_value; h < end_value; ++h)
        for (int64_t s = 0; s < p.states; ++s)
          kernels.store(real, state_at<Real>(p, p.final_states, s, n, h), dv, dk, dv, state(h, s), v_ld);
    }
  });
}

// ---- backward ------------------------------------------------------------------------------------------

// The two sweeps of one thread: its tiles, and what both know of the problem.
template <class Real>
class Backward {
 public:
  Backward(const LinearAttentionBackwardParams& p, const Plan& plan)
      : p_(p),
        plan_(plan),
        grad_q_(dense(p.grad_q, p.tokens, p.query_heads, p.key_width)),
        grad_k_(dense(p.grad_k, p.tokens, p.key_heads, p.key_width)),
        grad_v_(dense(p.grad_v, p.tokens, p.value_heads, p.value_width)),
        k_tile_(make_scratch<Real>(std::max<int64_t>(dk_ * kSquareLd, kChunk * k_ld_))),
        v_transposed_(make_scratch<Real>(dv_ * kSquareLd)),
        v_tile_(make_scratch<Real>(kChunk * v_ld_)),
        q_tile_(make_scratch<Real>(kChunk * k_ld_)),
        grad_out_tile_(make_scratch<Real>(kChunk * v_ld_)),
        grad_v_tile_(make_scratch<Real>(kChunk * v_ld_)),
        grad_key_tile_(make_scratch<Real>(kChunk * k_ld_)),
        grad_key_sum_(make_scratch<Real>(kChunk * k_ld_)),
        grad_k_transposed_(make_scratch<Real>(dk_ * kSquareLd)),
        scores_(make_scratch<Real>(kChunk * kSquareLd)),
        decayed_(make_scratch<Real>(kChunk * kSquareLd)),
        grad_scores_(make_scratch<Real>(kChunk * kSquareLd)),
        states_(zeroed<Real>(value_group_ * p.states * state_size_)),
        flow_(value_group_),
        decay_(kernels_) {}

  void run(int64_t n, int64_t key_head) {
    n_ = n;
    key_head_ = key_head;
    row_ = plan_.sequences[n].row;
    sweep_forwards();
    sweep_backwards();
  }

 private:
  // dq, zeros for padding; for the decays <q, dq> through the state, and <S, dS> of the final state.
  void sweep_forwards() {
    for (int64_t h = 0; h < value_group_; ++h)
      for (int64_t s = 0; s < p_.states; ++s)
        if (p_.initial_states)
          kernels_.load_transposed(real_, state_at<Real>(p_, p_.initial_states, s, n_, value_head(h)), dv_,
                                   dk_, dv_, 1, state(h, s), k_ld_);
        else
          std::fill_n(state(h, s), state_size_, Real(0));

    const Sequence& sequence = plan_.sequences[n_];
    for (int64_t c = sequence.chunks_begin; c < sequence.chunks_end; ++c) {
      const Chunk& chunk = plan_.chunks[c];
      const int length = chunk.length;
      if (chunk.padding) {
        zero_gradients(chunk);
        continue;
      }
      if (chunk.ended != kNoStep)
        end_step(state_size_, chunk.ended, alpha_, p_.alphas, state(0, 0), state(0, 1), state(0, 2));

      load(p_.k, key_head_, chunk, dk_, 1, k_tile_.get(), k_ld_);
      for (int64_t h = 0; h < value_group_; ++h) {
        load_transposed(p_.v, value_head(h), chunk, dv_, v_transposed_.get());
        if (decays_) decay_.set(p_, row_, chunk, value_head(h));
        for (int64_t g = 0; g < query_group_; ++g) {
          load(p_.grad_out, std::max(value_head(h), query_head(g)), chunk, dv_, Real(p_.scale),
               grad_out_tile_.get(), v_ld_);
          lower_product(kernels_, length, dv_, grad_out_tile_.get(), v_ld_, v_transposed_.get(),
                        grad_scores_.get());
          kernels_.matmul(length, dk_, dv_, grad_out_tile_.get(), v_ld_, 1, state(h, 0), k_ld_,
                          grad_key_tile_.get(), k_ld_, false);
          if (decays_) {
            kernels_.scale_rows(length, dk_, decay_.from_start(), grad_key_tile_.get(), k_ld_);
            decay_.apply_lower(grad_scores_.get(), grad_scores_.get());
            load(p_.q, query_head(g), chunk, dk_, 1, q_tile_.get(), k_ld_);
            save_read_products(chunk, h, g);
          }
          add_lower_times(kernels_, length, dk_, grad_scores_.get(), k_tile_.get(), grad_key_tile_.get(),
                          k_ld_);
          add_and_store(grad_q_, query_head(g), chunk, h);
        }
        if (decays_) {
          kernels_.multiply(dv_, length, v_transposed_.get(), kSquareLd, decay_.to_end(), 0,
                            v_transposed_.get(), kSquareLd);
          decay_.apply_whole(dv_, dk_, state(h, 0), k_ld_);
        }
        kernels_.matmul(dv_, dk_, length, v_transposed_.get(), kSquareLd, 1, k_tile_.get(), k_ld_,
                        state(h, 0), k_ld_, true);
      }
    }
    if (decays_)
      for (int64_t h = 0; h < value_group_; ++h) {
        const Real* grad = state_at<Real>(p_, p_.grad_final_states, 0, n_, value_head(h));
        double product = 0;
        for (int i = 0; i < dk_; ++i)
          for (int j = 0; j < dv_; ++j)
            product += double(grad[i * dv_ + j]) * double(state(h, 0)[j * k_ld_ + i]);
        flow_[h] = product;
      }
  }

  // dk, dv, d log_decay and the gradients of the initial states.
  void sweep_backwards() {
    for (int64_t h = 0; h < value_group_; ++h)
      for (int64_t s = 0; s < p_.states; ++s)
        kernels_.load(real_, state_at<Real>(p_, p_.grad_final_states, s, n_, value_head(h)), dv_, dk_, dv_, 1,
                      state(h, s), v_ld_);

    const Sequence& sequence = plan_.sequences[n_];
    for (int64_t c = sequence.chunks_end - 1; c >= sequence.chunks_begin; --c) {
      const Chunk& chunk = plan_.chunks[c];
      const int length = chunk.length;
      if (chunk.padding) continue;
      load_transposed(p_.k, key_head_, chunk, dk_, k_tile_.get());
      for (int64_t h = 0; h < value_group_; ++h) {
        Real* after = state(h, 0);
        load_transposed(p_.v, value_head(h), chunk, dv_, v_transposed_.get());

        // Through the state after the chunk. dk comes out transposed, which needs no transposed state.
        kernels_.matmul(length, dv_, dk_, k_tile_.get(), 1, kSquareLd, after, v_ld_, grad_v_tile_.get(),
                        v_ld_, false);
        kernels_.matmul(dk_, length, dv_, after, v_ld_, 1, v_transposed_.get(), kSquareLd,
                        grad_k_transposed_.get(), kSquareLd, false);
        kernels_.load_transposed(real_, grad_k_transposed_.get(), kSquareLd, dk_, length, 1,
                                 grad_key_tile_.get(), k_ld_);
        if (decays_) {
          decay_.set(p_, row_, chunk, value_head(h));
          kernels_.scale_rows(length, dv_, decay_.to_end(), grad_v_tile_.get(), v_ld_);
          kernels_.scale_rows(length, dk_, decay_.to_end(), grad_key_tile_.get(), k_ld_);
          decay_.apply_whole(dk_, dv_, after, v_ld_);
          load(p_.v, value_head(h), chunk, dv_, 1, v_tile_.get(), v_ld_);
          kernels_.dot_rows(length, dv_, v_tile_.get(), v_ld_, grad_v_tile_.get(), v_ld_,
                            write_products_.data());
          chunk_flow_.fill(0);
        }

        // Inside the chunk.
        for (int64_t g = 0; g < query_group_; ++g) {
          if (h == 0) {
            load(p_.q, query_head(g), chunk, dk_, Real(p_.scale), q_tile_.get(), k_ld_);
            lower_product(kernels_, length, dk_, q_tile_.get(), k_ld_, k_tile_.get(), scores_.get());
          }
          load(p_.grad_out, std::max(value_head(h), query_head(g)), chunk, dv_, 1, grad_out_tile_.get(),
               v_ld_);
          lower_product(kernels_, length, dv_, grad_out_tile_.get(), v_ld_, v_transposed_.get(),
                        grad_scores_.get());
          const Real* weights = scores_.get();
          if (decays_) {
            decay_.apply_lower(scores_.get(), decayed_.get());
            decay_.apply_lower(grad_scores_.get(), grad_scores_.get());
            weights = decayed_.get();
            add_chunk_flow(length);
          }
          add_lower_transposed_times(kernels_, length, dv_, weights, grad_out_tile_.get(), grad_v_tile_.get(),
                                     v_ld_);
          add_lower_transposed_times(kernels_, length, dk_, grad_scores_.get(), q_tile_.get(),
                                     grad_key_tile_.get(), k_ld_);
          if (decays_) kernels_.scale_rows(length, dv_, decay_.from_start(), grad_out_tile_.get(), v_ld_);
          kernels_.matmul(dk_, dv_, length, q_tile_.get(), 1, k_ld_, grad_out_tile_.get(), v_ld_, after,
                          v_ld_, true);
        }
        kernels_.store(p_.dtype, writable(head_at(grad_v_, p_.dtype, row_, chunk.begin, value_head(h))),
                       grad_v_.time, length, dv_, grad_v_tile_.get(), v_ld_);
        add_and_store(grad_k_, key_head_, chunk, h);
        if (decays_) store_grad_decay(chunk, h);
      }
      if (chunk.ended != kNoStep)
        end_step_backward(state_size_, chunk.ended, alpha_, p_.alphas, state(0, 0), state(0, 1), state(0, 2));
    }

    if (p_.grad_initial_states)
      for (int64_t h = 0; h < value_group_; ++h)
        for (int64_t s = 0; s < p_.states; ++s)
          kernels_.store(real_, state_at<Real>(p_, p_.grad_initial_states, s, n_, value_head(h)), dv_, dk_,
                         dv_, state(h, s), v_ld_);
  }

  // The gradient of log_decay_t is the sum over all pairs j < t <= i of
  //
  //   exp(G_i - G_j) scale (q_i . k_j) (dO_i . v_j)
  //
  // with the initial state as an earliest j and the gradient of the final state as a latest i. Pairs inside
  // one chunk are summed there (add_chunk_flow). The sum over the others, going backwards, grows at t by what
  // q_t reads, <q_t, dq_t> through the state, and shrinks by what k_t and v_t have written, <k_t, dk_t> =
  // <v_t, dv_t> through the state. Kept apart, the two kinds leave nothing large to cancel where the decay is
  // strong.
  void save_read_products(const Chunk& chunk, int64_t h, int64_t g) {
    kernels_.dot_rows(chunk.length, dk_, q_tile_.get(), k_ld_, grad_key_tile_.get(), k_ld_,
                      read_products_.data());
    for (int i = 0; i < chunk.length; ++i) {
      Real& saved = grad_decay(chunk, i, h);
      saved = g == 0 ? read_products_[i] : saved + read_products_[i];
    }
  }

  void add_chunk_flow(int length) {
    for (int i = 0; i < length; ++i)
      for (int j = 0; j < i; ++j) {
        const double pair = double(scores_[i * kSquareLd + j]) * double(grad_scores_[i * kSquareLd + j]);
        chunk_flow_[i] += pair;
        chunk_flow_[j] -= pair;
      }
  }

  void store_grad_decay(const Chunk& chunk, int64_t h) {
    double inside = 0;
    for (int i = chunk.length - 1; i >= 0; --i) {
      Real& grad = grad_decay(chunk, i, h);
      flow_[h] += double(grad) - double(write_products_[i]);
      inside += chunk_flow_[i];
      grad = Real(flow_[h] + inside);
    }
  }

  Real& grad_decay(const Chunk& chunk, int i, int64_t h) const {
    return static_cast<Real*>(
        p_.grad_log_decay)[(row_ * p_.tokens + chunk.begin + i) * p_.value_heads + value_head(h)];
  }

  // Stores the sum of grad_key_tile_ over the value heads of the group, which come in order.
  void add_and_store(const HeadsView& to, int64_t head, const Chunk& chunk, int64_t h) {
    const Real* sum = grad_key_tile_.get();
    if (value_group_ > 1) {
      const int64_t size = chunk.length * k_ld_;
      if (h == 0)
        std::copy_n(grad_key_tile_.get(), size, grad_key_sum_.get());
      else
        kernels_.axpby(size, 1, grad_key_sum_.get(), 1, grad_key_tile_.get());
      sum = grad_key_sum_.get();
    }
    if (h == value_group_ - 1)
      kernels_.store(p_.dtype, writable(head_at(to, p_.dtype, row_, chunk.begin, head)), to.time,
                     chunk.length, dk_, sum, k_ld_);
  }

  void zero_gradients(const Chunk& chunk) {
    for (int64_t g = 0; g < query_group_; ++g) zero_rows(grad_q_, p_.dtype, row_, chunk, query_head(g), dk_);
    zero_rows(grad_k_, p_.dtype, row_, chunk, key_head_, dk_);
    zero_rows(grad_v_, p_.dtype, row_, chunk, key_head_, dv_);
  }

  void load(const HeadsView& x, int64_t head, const Chunk& chunk, int width, Real factor, Real* tile,
            int64_t ld) {
    kernels_.load(p_.dtype, head_at(x, p_.dtype, row_, chunk.begin, head), x.time, chunk.length, width,
                  factor, tile, ld);
  }

  void load_transposed(const HeadsView& x, int64_t head, const Chunk& chunk, int width, Real* tile) {
    kernels_.load_transposed(p_.dtype, head_at(x, p_.dtype, row_, chunk.begin, head), x.time, chunk.length,
                             width, 1, tile, kSquareLd);
  }

  int64_t value_head(int64_t h) const { return key_head_ * value_group_ + h; }
  int64_t query_head(int64_t g) const { return key_head_ * query_group_ + g; }
  Real* state(int64_t h, int64_t which) const {
    return states_.get() + (h * p_.states + which) * state_size_;
  }

  const LinearAttentionBackwardParams& p_;
  const Plan& plan_;
  const TileKernels<Real>& kernels_ = tile_kernels<Real>();
  const DType real_ = ChunkDecay<Real>::state_dtype(p_.dtype);
  const bool decays_ = p_.log_decay.data != nullptr;
  const Real* alpha_ = static_cast<const Real*>(p_.alpha);
  const int dk_ = int(p_.key_width), dv_ = int(p_.value_width);
  const int64_t k_ld_ = tile_ld(dk_), v_ld_ = tile_ld(dv_);
  const int64_t state_size_ = std::max(dk_ * v_ld_, dv_* k_ld_);  // stored either way round
  const int64_t query_group_ = p_.query_heads / p_.key_heads, value_group_ = p_.value_heads / p_.key_heads;
  const HeadsView grad_q_, grad_k_, grad_v_;
  const Scratch<Real> k_tile_, v_transposed_, v_tile_, q_tile_, grad_out_tile_, grad_v_tile_;
  const Scratch<Real> grad_key_tile_, grad_key_sum_;  // of dq in one sweep, of dk in the other
  const Scratch<Real> grad_k_transposed_, scores_, decayed_, grad_scores_, states_;
  std::array<Real, kChunk> read_products_, write_products_;
  std::array<double, kChunk> chunk_flow_;
  std::vector<double> flow_;  // a value head: the sum over what crosses the present border of two chunks
  ChunkDecay<Real> decay_;
  int64_t n_ = 0, key_head_ = 0, row_ = 0;
};

template <class Real>
void backward(const LinearAttentionBackwardParams& p) {
  const Plan plan = make_plan(p);
  parallel_for(p.sequences * p.key_heads, multiply_adds(p), [&](int64_t begin, int64_t end) {
    Backward<Real> sweeps(p, plan);
    for (int64_t item = begin; item < end; ++item) sweeps.run(item / p.key_heads, item % p.key_heads);
  });
}

}  // namespace

void linear_attention_cpu(const LinearAttentionParams& p) {
  p.dtype == DType::kFloat64 ? forward<double>(p) : forward<float>(p);
}

void linear_attention_backward_cpu(const LinearAttentionBackwardParams& p) {
  p.dtype == DType::kFloat64 ? backward<double>(p) : backward<float>(p);
}

}  // namespace statecore
