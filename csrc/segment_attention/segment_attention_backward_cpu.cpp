// Backward: P is recomputed from lse, one tile of queries at a time:
//
//   dV += P^T dO,  dS = P (dO V^T - delta),  dQ = scale dS K,  dK += scale dS^T Q,
//   delta = rowsum(dO O) - dlse.
//
// Tiles of a sequence accumulate into the same keys. A work tile is therefore a split, a run of consecutive
// tiles of a sequence, and a key head: it has accumulators of its own, and where a sequence has several
// splits their sums are then added in order. How sequences are split depends on shapes and ids only, so no
// result depends on the number of threads.

#include "common/ceil_div.h"
#include "common/huge_pages.h"
#include "segment_attention/segment_tiles.h"

namespace statecore {
namespace {

// Sequences are split until there are about this many work tiles for threads to share.
constexpr int64_t kMinWorkTiles = 16;

// Consecutive tiles of a sequence and the keys they see. Its accumulators hold the prompt's keys first.
struct Split {
  Range tiles;
  Range prompt{}, own{};
  int64_t offset = 0;  // of its accumulators among the shared ones, in keys

  int64_t keys() const { return prompt.size() + own.size(); }
  int64_t row_of(int64_t key) const {
    return key < prompt.end ? key - prompt.begin : prompt.size() + key - own.begin;
  }
};

// The splits of a sequence. A single one accumulates in memory of its thread, several in shared memory.
struct SplitSequence {
  Sequence sequence;
  Range splits;

  bool shared() const { return splits.size() > 1; }
};

struct SplitPlan {
  std::vector<Split> splits;
  std::vector<SplitSequence> sequences;
  std::vector<int64_t> sequence_of;  // [splits]
  int64_t shared_keys = 0;           // of all splits of shared sequences
  int64_t max_local_keys = 0;        // of any other split
};

void extend(Range& range, const Range& by) {
  if (by.size() == 0) return;
  range = range.size() == 0 ? by : Range{std::min(range.begin, by.begin), std::max(range.end, by.end)};
}

SplitPlan plan_splits(const SegmentPlan& plan, int64_t kv_heads) {
  int64_t total_keys = 0;
  for (const QueryTile& tile : plan.tiles) total_keys += plan.keys_of(tile);
  const int64_t total_work = std::max<int64_t>(total_keys * kv_heads, 1);

  SplitPlan result;
  for (const Sequence& sequence : plan.sequences) {
    int64_t sequence_work = 0, done = 0;
    for (int64_t t = sequence.tiles.begin; t < sequence.tiles.end; ++t)
      sequence_work += plan.keys_of(plan.tiles[t]);
    const int64_t splits = std::max<int64_t>(ceil_div(sequence_work * kMinWorkTiles, total_work), 1);
    const int64_t first_split = result.splits.size();
    result.splits.push_back({.tiles = {sequence.tiles.begin, sequence.tiles.begin}});
    for (int64_t t = sequence.tiles.begin; t < sequence.tiles.end; ++t) {
      const int64_t begun = result.splits.size() - first_split;
      if (done * splits >= sequence_work * begun && done > 0) result.splits.push_back({.tiles = {t, t}});
      Split& split = result.splits.back();
      split.tiles.end = t + 1;
      extend(split.prompt, plan.tiles[t].prompt);
      extend(split.own, plan.tiles[t].own);
      done += plan.keys_of(plan.tiles[t]);
    }
    result.sequences.push_back({sequence, {first_split, int64_t(result.splits.size())}});
    for (int64_t s = first_split; s < int64_t(result.splits.size()); ++s) {
      Split& split = result.splits[s];
      result.sequence_of.push_back(result.sequences.size() - 1);
      if (result.sequences.back().shared()) {
        split.offset = result.shared_keys;
        result.shared_keys += split.keys();
      } else {
        result.max_local_keys = std::max(result.max_local_keys, split.keys());
      }
    }
  }
  return result;
}

// Sums of dK and dV for some keys, rows tile_ld(width) apart.
template <class Real>
struct KeyGradients {
  Real* k;
  Real* v;
};

// What the threads of one call share.
template <class Real>
struct BackwardCall {
  explicit BackwardCall(const SegmentAttentionBackwardParams& params)
      : p(params),
        plan(plan_segments(p)),
        splits(plan_splits(plan, p.kv_heads)),
        shared_k(make_scratch<Real>(splits.shared_keys * p.kv_heads * ldk)),
        shared_v(make_scratch<Real>(splits.shared_keys * p.kv_heads * ldv)) {}

  KeyGradients<Real> shared(const Split& split, int64_t kv_head) const {
    const int64_t row = kv_head * splits.shared_keys + split.offset;
    return {shared_k.get() + row * ldk, shared_v.get() + row * ldv};
  }

  const SegmentAttentionBackwardParams& p;
  const SegmentPlan plan;
  const SplitPlan splits;
  const int key_width = int(p.key_width), value_width = int(p.value_width);
  const int ldk = tile_ld(key_width), ldv = tile_ld(value_width);
  const Scratch<Real> shared_k, shared_v;
};

template <class Real>
class KeyGradientWriter {
 public:
  explicit KeyGradientWriter(const BackwardCall<Real>& call)
      : call_(call),
        k_(make_scratch<Real>(int64_t(kBlockKeys) * call.ldk)),
        v_(make_scratch<Real>(int64_t(kBlockKeys) * call.ldv)) {}

  // Stores the gradients of up to a block of keys: the sum of gradients_of(split) over the splits.
  template <class GradientsOf>
  void write(const SplitSequence& sequence, Range keys, int64_t kv_head, const GradientsOf& gradients_of) {
    std::fill_n(k_.get(), kBlockKeys * call_.ldk, Real(0));
    std::fill_n(v_.get(), kBlockKeys * call_.ldv, Real(0));
    for (int64_t s = sequence.splits.begin; s < sequence.splits.end; ++s) {
      const Split& split = call_.splits.splits[s];
      for (const Range& range : {split.prompt, split.own}) {
        const Range both{std::max(keys.begin, range.begin), std::min(keys.end, range.end)};
        if (both.size() <= 0) continue;
        const KeyGradients<Real> from = gradients_of(split);
        const int64_t row = split.row_of(both.begin), to = both.begin - keys.begin;
        Real *k = k_.get() + to * call_.ldk, *v = v_.get() + to * call_.ldv;
        kernels_.axpby(both.size() * call_.ldk, 1, k, 1, from.k + row * call_.ldk, k);
        kernels_.axpby(both.size() * call_.ldv, 1, v, 1, from.v + row * call_.ldv, v);
      }
    }
    store(call_.p.grad_k, sequence.sequence.batch, keys, kv_head, call_.key_width, k_.get(), call_.ldk);
    store(call_.p.grad_v, sequence.sequence.batch, keys, kv_head, call_.value_width, v_.get(), call_.ldv);
  }

 private:
  void store(void* result, int64_t batch, Range keys, int64_t kv_head, int width, const Real* src,
             int64_t ld) {
    const TensorView x{contiguous_heads(result, call_.p.keys, call_.p.kv_heads, width), call_.p.dtype};
    kernels_.store(x.dtype, x.mutable_at(batch, keys.begin, kv_head), x.time, int(keys.size()), width, src,
                   ld);
  }

  const TileKernels<Real>& kernels_ = tile_kernels<Real>();
  const BackwardCall<Real>& call_;
  Scratch<Real> k_, v_;
};

Range key_block(const Sequence& sequence, int64_t block) {
  const int64_t begin = sequence.keys.begin + block * kBlockKeys;
  return {begin, std::min(begin + kBlockKeys, sequence.keys.end)};
}

int64_t key_blocks(const Sequence& sequence) { return ceil_div<int64_t>(sequence.keys.size(), kBlockKeys); }

template <class Operand>
class BackwardWorker {
 public:
  using Real = RealOf<Operand>;

  explicit BackwardWorker(const BackwardCall<Real>& call)
      : call_(call), tiles_(call.p, call.plan), writer_(call) {}

  // A work tile: a split and a key head.
  void operator()(int64_t work) {
    // As in the forward, the last tiles cost most and come first.
    const int64_t s = call_.splits.splits.size() - 1 - work / call_.p.kv_heads;
    const int64_t kv_head = work % call_.p.kv_heads;
    const Split& split = call_.splits.splits[s];
    const SplitSequence& sequence = call_.splits.sequences[call_.splits.sequence_of[s]];
    const KeyGradients<Real> sums =
        sequence.shared() ? call_.shared(split, kv_head) : KeyGradients<Real>{local_k_.get(), local_v_.get()};
    std::fill_n(sums.k, split.keys() * call_.ldk, Real(0));
    std::fill_n(sums.v, split.keys() * call_.ldv, Real(0));
    for (int64_t t = split.tiles.begin; t < split.tiles.end; ++t) {
      const QueryTile& tile = call_.plan.tiles[t];
      load(tile, kv_head);
      for_each_key_block(call_.plan, tile, [&](const KeyBlock& block) {
        const int64_t row = split.row_of(block.begin);
        attend(tile, block, kv_head, {sums.k + row * call_.ldk, sums.v + row * call_.ldv});
      });
      store(tile, kv_head);
    }
    if (sequence.shared()) return;
    for (int64_t block = 0; block < key_blocks(sequence.sequence); ++block)
      writer_.write(sequence, key_block(sequence.sequence, block), kv_head,
                    [&](const Split&) { return sums; });
  }

 private:
  void load(const QueryTile& tile, int64_t kv_head) {
    const SegmentAttentionBackwardParams& p = call_.p;
    const int rows = call_.plan.rows(tile);
    const int64_t ldv = call_.ldv;
    const TensorView q{p.q, p.dtype}, grad_out{p.grad_out, p.dtype};
    const TensorView out{contiguous_heads(p.out, p.queries, p.query_heads, p.value_width), p.dtype};
    tiles_.load_queries(q, tile, kv_head, call_.key_width, q_);
    q_.pack_columns(rows, call_.key_width);
    q_.transpose(rows, call_.key_width, q_transposed_.get(), lds_);
    tiles_.load_queries(grad_out, tile, kv_head, call_.value_width, grad_out_);
    grad_out_.pack_columns(rows, call_.value_width);
    grad_out_.transpose(rows, call_.value_width, grad_out_transposed_.get(), lds_);
    std::fill_n(grad_q_.get(), rows * call_.ldk, Real(0));

    tiles_.load_queries(grad_out, tile, kv_head, call_.value_width, real_grad_out_.get(), ldv);
    tiles_.load_queries(out, tile, kv_head, call_.value_width, out_.get(), ldv);
    kernels_.dot_rows(rows, call_.value_width, real_grad_out_.get(), ldv, out_.get(), ldv, delta_.get());
    const Real* lse = static_cast<const Real*>(p.lse);
    const Real* grad_lse = static_cast<const Real*>(p.grad_lse);
    for (int row = 0; row < padded(rows); ++row) {
      if (row >= rows || tiles_.is_padding(tile, row)) {
        lse_log2_[row] = Real(__builtin_inf());  // P = 0 without any mask
        delta_[row] = 0;
        continue;
      }
      const int64_t at = tiles_.lse_index(tile, kv_head, row, p.kv_heads, p.queries);
      lse_log2_[row] = lse[at] * Real(kLog2e);
      if (grad_lse) delta_[row] -= grad_lse[at];
    }
  }

  void attend(const QueryTile& tile, const KeyBlock& block, int64_t kv_head, const KeyGradients<Real>& sums) {
    const SegmentAttentionBackwardParams& p = call_.p;
    const int key_width = call_.key_width, value_width = call_.value_width;
    const int64_t first = block.row_begin, ldk = call_.ldk, ldv = call_.ldv;
    const int columns = block.row_end - block.row_begin;
    const int rows = std::min(block.row_end, call_.plan.rows(tile)) - block.row_begin;
    const Packed<Operand> k = tiles_.key_rows({p.k, p.dtype}, tile, block, kv_head, key_width, k_);
    const Packed<Operand> v = tiles_.key_rows({p.v, p.dtype}, tile, block, kv_head, value_width, v_);
    const int64_t operands = depth<Operand>(int(first));  // packed queries before the first

    // P^T = 2^(scale K Q^T - lse), dV += P^T dO
    Real* probabilities = probabilities_.get() + first;
    multiply(block.keys, columns, key_width, Real(p.scale * kLog2e), as_is(k),
             Packed<Operand>{q_transposed_.get() + first, lds_}, probabilities, lds_, false);
    mask_scores(call_.plan, tile, block, probabilities_.get(), lds_);
    kernels_.exp2_shifted(block.keys, columns, probabilities, lds_, lse_log2_.get() + first);
    const Packed<Operand> grad_out = grad_out_.columns(), q = q_.columns();
    multiply(block.keys, value_width, rows, Real(1),
             as_is(packing_.rows(probabilities, lds_, block.keys, rows)),
             Packed<Operand>{grad_out.data + operands * grad_out.ld, grad_out.ld}, sums.v, ldv, true);

    // dS^T = P^T (V dO^T - delta), dK += scale dS^T Q, dQ += scale dS K
    Real* grad_scores = grad_scores_.get() + first;
    multiply(block.keys, columns, value_width, Real(1), as_is(v),
             Packed<Operand>{grad_out_transposed_.get() + first, lds_}, grad_scores, lds_, false);
    kernels_.softmax_backward(block.keys, columns, probabilities, grad_scores, lds_, delta_.get() + first);
    multiply(block.keys, key_width, rows, Real(p.scale),
             as_is(packing_.rows(grad_scores, lds_, block.keys, rows)),
             Packed<Operand>{q.data + operands * q.ld, q.ld}, sums.k, ldk, true);
    multiply(rows, key_width, block.keys, Real(p.scale),
             transposed(packing_.columns(grad_scores, lds_, block.keys, rows)),
             k_.columns_of(k, block.keys, key_width), grad_q_.get() + first * ldk, ldk, true);
  }

  void store(const QueryTile& tile, int64_t kv_head) {
    const SegmentAttentionBackwardParams& p = call_.p;
    const TensorView x{contiguous_heads(p.grad_q, p.queries, p.query_heads, p.key_width), p.dtype};
    tiles_.store_queries(x, tile, kv_head, call_.key_width, grad_q_.get(), call_.ldk);
  }

  const TileKernels<Real>& kernels_ = tile_kernels<Real>();
  const BackwardCall<Real>& call_;
  const SegmentTiles<Operand> tiles_;
  KeyGradientWriter<Real> writer_;
  const int rows_ = call_.plan.max_rows();
  const int64_t lds_ = tile_ld(rows_);
  OperandTile<Operand> q_{rows_, call_.key_width}, grad_out_{rows_, call_.value_width};
  OperandTile<Operand> k_{kBlockKeys, call_.key_width}, v_{kBlockKeys, call_.value_width};
  Scratch<Operand> q_transposed_ = make_scratch<Operand>(depth<Operand>(call_.key_width) * lds_);
  Scratch<Operand> grad_out_transposed_ = make_scratch<Operand>(depth<Operand>(call_.value_width) * lds_);
  Scratch<Real> grad_q_ = make_scratch<Real>(rows_ * call_.ldk), out_ = make_scratch<Real>(rows_ * call_.ldv);
  Scratch<Real> real_grad_out_ = make_scratch<Real>(rows_ * call_.ldv);
  Scratch<Real> probabilities_ = make_scratch<Real>(kBlockKeys * lds_);
  Scratch<Real> grad_scores_ = make_scratch<Real>(kBlockKeys * lds_);
  ResultPacking<Operand> packing_{kBlockKeys, rows_};
  Scratch<Real> lse_log2_ = make_scratch<Real>(padded(rows_)), delta_ = make_scratch<Real>(padded(rows_));
  Scratch<Real> local_k_ = make_scratch<Real>(call_.splits.max_local_keys * call_.ldk);
  Scratch<Real> local_v_ = make_scratch<Real>(call_.splits.max_local_keys * call_.ldv);
};

template <class Operand>
void backward(const SegmentAttentionBackwardParams& params) {
  using Real = RealOf<Operand>;
  const BackwardCall<Real> call(params);
  const int64_t kv_heads = params.kv_heads;
  parallel_work_tiles(int64_t(call.splits.splits.size()) * kv_heads, 2 * call.plan.multiply_adds(params),
                      [&] { return BackwardWorker<Operand>(call); });
  for (const SplitSequence& sequence : call.splits.sequences) {
    if (!sequence.shared()) continue;
    parallel_for(key_blocks(sequence.sequence) * kv_heads, [&](int64_t begin, int64_t end) {
      KeyGradientWriter<Real> writer(call);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t kv_head = i % kv_heads;
        writer.write(sequence, key_block(sequence.sequence, i / kv_heads), kv_head,
                     [&](const Split& split) { return call.shared(split, kv_head); });
      }
    });
  }
}

}  // namespace

void segment_attention_backward_cpu(const SegmentAttentionBackwardParams& p) {
  const DType dtype = p.dtype;
  const int64_t key_bytes = p.batch * p.keys * p.kv_heads * element_bytes(dtype);
  prefer_huge_pages(p.grad_q, p.batch * p.queries * p.query_heads * p.key_width * element_bytes(dtype));
  prefer_huge_pages(p.grad_k, key_bytes * p.key_width);
  prefer_huge_pages(p.grad_v, key_bytes * p.value_width);
  if (dtype == DType::kFloat64) return backward<double>(p);
  if (dtype == DType::kBFloat16 && has_bfloat16_products()) return backward<BFloat16Pair>(p);
  backward<float>(p);
}

}  // namespace statecore
