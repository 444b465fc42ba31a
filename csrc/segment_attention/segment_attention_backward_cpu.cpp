// Backward: P is recomputed from lse, tile of queries by tile of queries,
//
//   dV += P^T dO,  dS = P (dO V^T - delta),  dQ = scale dS K,  dK += scale dS^T Q,
//   delta = rowsum(dO O) - dlse.
//
// Tiles share the keys they add to. A work item is a key head and a run of consecutive tiles of a sequence;
// it adds in order into accumulators of its own, and where a sequence is several runs their sums are then
// added in order. How sequences are cut into runs depends on shapes and ids only, so no result depends on the
// number of threads.

#include "common/huge_pages.h"
#include "segment_attention/segment_tiles.h"

namespace statecore {
namespace {

// Sequences are cut into runs until there are about this many items for threads to share.
constexpr int64_t kMinimumItems = 16;

// Consecutive tiles of a sequence and the keys they see. Its accumulators hold the prompt's keys, then the
// others.
struct Run {
  Range tiles;
  Range prompt{}, own{};
  int64_t offset = 0;  // where its accumulators start among those of all runs, in keys

  int64_t keys() const { return prompt.size() + own.size(); }
  int64_t row_of(int64_t key) const {
    return key < prompt.end ? key - prompt.begin : prompt.size() + key - own.begin;
  }
};

// The runs of a sequence. A sequence of one run has no place among the shared accumulators.
struct SequenceRuns {
  Sequence sequence;
  Range runs;

  bool shared() const { return runs.size() > 1; }
};

struct RunPlan {
  std::vector<Run> runs;
  std::vector<SequenceRuns> sequences;
  std::vector<int64_t> sequence_of;  // [runs]
  int64_t shared_keys = 0;           // of all runs of shared sequences
  int64_t longest_alone = 0;         // keys of the longest other run
};

void extend(Range& range, const Range& by) {
  if (by.size() == 0) return;
  range = range.size() == 0 ? by : Range{std::min(range.begin, by.begin), std::max(range.end, by.end)};
}

RunPlan plan_runs(const SegmentPlan& plan, int64_t kv_heads) {
  int64_t total = 0;
  for (const QueryTile& tile : plan.tiles) total += plan.keys_of(tile);
  const int64_t items_total = std::max<int64_t>(total * kv_heads, 1);

  RunPlan result;
  for (const Sequence& sequence : plan.sequences) {
    int64_t whole = 0, seen = 0;
    for (int64_t t = sequence.tiles.begin; t < sequence.tiles.end; ++t) whole += plan.keys_of(plan.tiles[t]);
    const int64_t pieces = std::max<int64_t>((whole * kMinimumItems + items_total - 1) / items_total, 1);
    const int64_t first_run = result.runs.size();
    result.runs.push_back({.tiles = {sequence.tiles.begin, sequence.tiles.begin}});
    for (int64_t t = sequence.tiles.begin; t < sequence.tiles.end; ++t) {
      const int64_t piece = result.runs.size() - first_run;
      if (seen * pieces >= whole * piece && seen > 0) result.runs.push_back({.tiles = {t, t}});
      Run& run = result.runs.back();
      run.tiles.end = t + 1;
      extend(run.prompt, plan.tiles[t].prompt);
      extend(run.own, plan.tiles[t].own);
      seen += plan.keys_of(plan.tiles[t]);
    }
    result.sequences.push_back({sequence, {first_run, int64_t(result.runs.size())}});
    for (int64_t r = first_run; r < int64_t(result.runs.size()); ++r) {
      Run& run = result.runs[r];
      result.sequence_of.push_back(result.sequences.size() - 1);
      if (result.sequences.back().shared()) {
        run.offset = result.shared_keys;
        result.shared_keys += run.keys();
      } else {
        result.longest_alone = std::max(result.longest_alone, run.keys());
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

// What all threads of one call look at.
template <class Real>
struct Call {
  explicit Call(const SegmentAttentionBackwardParams& params)
      : b(params),
        p(params.forward),
        plan(plan_segments(p)),
        runs(plan_runs(plan, p.kv_heads)),
        shared_k(make_scratch<Real>(runs.shared_keys * p.kv_heads * ldk)),
        shared_v(make_scratch<Real>(runs.shared_keys * p.kv_heads * ldv)) {}

  KeyGradients<Real> shared(const Run& run, int64_t kv_head) const {
    const int64_t row = kv_head * runs.shared_keys + run.offset;
    return {shared_k.get() + row * ldk, shared_v.get() + row * ldv};
  }

  const SegmentAttentionBackwardParams& b;
  const SegmentAttentionParams& p;
  const SegmentPlan plan;
  const RunPlan runs;
  const int key_width = int(p.key_width), value_width = int(p.value_width);
  const int ldk = tile_ld(key_width), ldv = tile_ld(value_width);
  const Scratch<Real> shared_k, shared_v;
};

template <class Real>
class KeyGradientWriter {
 public:
  explicit KeyGradientWriter(const Call<Real>& call)
      : call_(call),
        k_(make_scratch<Real>(int64_t(kBlockKeys) * call.ldk)),
        v_(make_scratch<Real>(int64_t(kBlockKeys) * call.ldv)) {}

  // Stores keys [begin, end) of a sequence, at most a block: the sum over its runs of gradients_of(run).
  template <class GradientsOf>
  void write(const SequenceRuns& sequence, Range keys, int64_t kv_head, const GradientsOf& gradients_of) {
    std::fill_n(k_.get(), kBlockKeys * call_.ldk, Real(0));
    std::fill_n(v_.get(), kBlockKeys * call_.ldv, Real(0));
    for (int64_t r = sequence.runs.begin; r < sequence.runs.end; ++r) {
      const Run& run = call_.runs.runs[r];
      for (const Range& range : {run.prompt, run.own}) {
        const Range both{std::max(keys.begin, range.begin), std::min(keys.end, range.end)};
        if (both.size() <= 0) continue;
        const KeyGradients<Real> from = gradients_of(run);
        const int64_t row = run.row_of(both.begin), to = both.begin - keys.begin;
        Real *k = k_.get() + to * call_.ldk, *v = v_.get() + to * call_.ldv;
        kernels_.axpby(both.size() * call_.ldk, 1, k, 1, from.k + row * call_.ldk, k);
        kernels_.axpby(both.size() * call_.ldv, 1, v, 1, from.v + row * call_.ldv, v);
      }
    }
    store(call_.b.grad_k, sequence.sequence.batch, keys, kv_head, call_.key_width, k_.get(), call_.ldk);
    store(call_.b.grad_v, sequence.sequence.batch, keys, kv_head, call_.value_width, v_.get(), call_.ldv);
  }

 private:
  void store(void* result, int64_t batch, Range keys, int64_t kv_head, int width, const Real* src,
             int64_t ld) {
    const TensorView x = contiguous_view(result, call_.p.dtype, call_.p.keys, call_.p.kv_heads, width);
    kernels_.store(x.dtype, x.mutable_at(batch, keys.begin, kv_head), x.time_stride, int(keys.size()), width,
                   src, ld);
  }

  const TileKernels<Real>& kernels_ = tile_kernels<Real>();
  const Call<Real>& call_;
  Scratch<Real> k_, v_;
};

Range key_block(const Sequence& sequence, int64_t block) {
  const int64_t begin = sequence.keys.begin + block * kBlockKeys;
  return {begin, std::min(begin + kBlockKeys, sequence.keys.end)};
}

int64_t key_blocks(const Sequence& sequence) { return (sequence.keys.size() + kBlockKeys - 1) / kBlockKeys; }

template <class Operand>
class RunWorker {
 public:
  using Real = RealOf<Operand>;

  explicit RunWorker(const Call<Real>& call) : call_(call), tiles_(call.p, call.plan), writer_(call) {}

  void operator()(int64_t item) {
    // As in the forward, what comes last costs most and is begun first.
    const int64_t r = call_.runs.runs.size() - 1 - item / call_.p.kv_heads, kv_head = item % call_.p.kv_heads;
    const Run& run = call_.runs.runs[r];
    const SequenceRuns& sequence = call_.runs.sequences[call_.runs.sequence_of[r]];
    const KeyGradients<Real> sums =
        sequence.shared() ? call_.shared(run, kv_head) : KeyGradients<Real>{alone_k_.get(), alone_v_.get()};
    std::fill_n(sums.k, run.keys() * call_.ldk, Real(0));
    std::fill_n(sums.v, run.keys() * call_.ldv, Real(0));
    for (int64_t t = run.tiles.begin; t < run.tiles.end; ++t) {
      const QueryTile& tile = call_.plan.tiles[t];
      load(tile, kv_head);
      for_each_key_block(call_.plan, tile, [&](const KeyBlock& block) {
        const int64_t row = run.row_of(block.begin);
        attend(tile, block, kv_head, {sums.k + row * call_.ldk, sums.v + row * call_.ldv});
      });
      store(tile, kv_head);
    }
    if (sequence.shared()) return;
    for (int64_t block = 0; block < key_blocks(sequence.sequence); ++block)
      writer_.write(sequence, key_block(sequence.sequence, block), kv_head, [&](const Run&) { return sums; });
  }

 private:
  void load(const QueryTile& tile, int64_t kv_head) {
    const SegmentAttentionParams& p = call_.p;
    const SegmentAttentionBackwardParams& b = call_.b;
    const int rows = call_.plan.rows(tile);
    const int64_t ldv = call_.ldv;
    const TensorView q{p.q, p.dtype, p.q_batch, p.q_time, p.q_head};
    const TensorView grad_out{b.grad_out, p.dtype, b.grad_out_batch, b.grad_out_time, b.grad_out_head};
    const TensorView out = contiguous_view(p.out, p.dtype, p.queries, p.query_heads, p.value_width);
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
    const Real* grad_lse = static_cast<const Real*>(b.grad_lse);
    for (int row = 0; row < padded(rows); ++row) {
      if (row >= rows || tiles_.hidden(tile, row)) {
        lse_[row] = Real(__builtin_inf());  // P = 0 without any mask
        delta_[row] = 0;
        continue;
      }
      const int64_t at = tiles_.lse_index(tile, kv_head, row, p.kv_heads, p.queries);
      lse_[row] = lse[at] * Real(kLog2e);
      if (grad_lse) delta_[row] -= grad_lse[at];
    }
  }

  void attend(const QueryTile& tile, const KeyBlock& block, int64_t kv_head, const KeyGradients<Real>& sums) {
    const SegmentAttentionParams& p = call_.p;
    const int key_width = call_.key_width, value_width = call_.value_width;
    const int64_t first = block.row_begin, ldk = call_.ldk, ldv = call_.ldv;
    const int columns = block.row_end - block.row_begin;
    const int rows = std::min(block.row_end, call_.plan.rows(tile)) - block.row_begin;
    const TensorView keys{p.k, p.dtype, p.k_batch, p.k_time, p.k_head};
    const Packed<Operand> k = tiles_.key_rows(keys, tile, block, kv_head, key_width, k_);
    const Packed<Operand> v =
        tiles_.key_rows({p.v, p.dtype, p.v_batch, p.v_time, p.v_head}, tile, block, kv_head, value_width, v_);
    const int64_t operands = depth<Operand>(int(first));  // packed queries before the first

    Real* weights = p_.get() + first;
    multiply(block.keys, columns, key_width, Real(p.scale * kLog2e), as_is(k),
             Packed<Operand>{q_transposed_.get() + first, lds_}, weights, lds_, false);
    hide_invisible(call_.plan, tile, block, p_.get(), lds_);
    kernels_.exp2_shifted(block.keys, columns, weights, lds_, lse_.get() + first);
    const Packed<Operand> grad_out = grad_out_.columns(), q = q_.columns();
    multiply(block.keys, value_width, rows, Real(1), as_is(packing_.rows(weights, lds_, block.keys, rows)),
             Packed<Operand>{grad_out.data + operands * grad_out.ld, grad_out.ld}, sums.v, ldv, true);

    Real* ds = ds_.get() + first;
    multiply(block.keys, columns, value_width, Real(1), as_is(v),
             Packed<Operand>{grad_out_transposed_.get() + first, lds_}, ds, lds_, false);
    kernels_.softmax_backward(block.keys, columns, weights, ds, lds_, delta_.get() + first);
    multiply(block.keys, key_width, rows, Real(p.scale), as_is(packing_.rows(ds, lds_, block.keys, rows)),
             Packed<Operand>{q.data + operands * q.ld, q.ld}, sums.k, ldk, true);
    multiply(rows, key_width, block.keys, Real(p.scale),
             transposed(packing_.columns(ds, lds_, block.keys, rows)),
             k_.columns_of(k, block.keys, key_width), grad_q_.get() + first * ldk, ldk, true);
  }

  void store(const QueryTile& tile, int64_t kv_head) {
    const SegmentAttentionParams& p = call_.p;
    const TensorView x = contiguous_view(call_.b.grad_q, p.dtype, p.queries, p.query_heads, p.key_width);
    tiles_.store_queries(x, tile, kv_head, call_.key_width, grad_q_.get(), call_.ldk);
  }

  const TileKernels<Real>& kernels_ = tile_kernels<Real>();
  const Call<Real>& call_;
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
  Scratch<Real> p_ = make_scratch<Real>(kBlockKeys * lds_), ds_ = make_scratch<Real>(kBlockKeys * lds_);
  ResultPacking<Operand> packing_{kBlockKeys, rows_};
  Scratch<Real> lse_ = make_scratch<Real>(padded(rows_)), delta_ = make_scratch<Real>(padded(rows_));
  Scratch<Real> alone_k_ = make_scratch<Real>(call_.runs.longest_alone * call_.ldk);
  Scratch<Real> alone_v_ = make_scratch<Real>(call_.runs.longest_alone * call_.ldv);
};

template <class Operand>
void backward(const SegmentAttentionBackwardParams& params) {
  using Real = RealOf<Operand>;
  const Call<Real> call(params);
  const int64_t kv_heads = params.forward.kv_heads;
  parallel_items(int64_t(call.runs.runs.size()) * kv_heads, 2 * call.plan.multiply_adds(params.forward),
                 [&] { return RunWorker<Operand>(call); });
  for (const SequenceRuns& sequence : call.runs.sequences) {
    if (!sequence.shared()) continue;
    parallel_for(key_blocks(sequence.sequence) * kv_heads, [&](int64_t begin, int64_t end) {
      KeyGradientWriter<Real> writer(call);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t kv_head = i % kv_heads;
        writer.write(sequence, key_block(sequence.sequence, i / kv_heads), kv_head,
                     [&](const Run& run) { return call.shared(run, kv_head); });
      }
    });
  }
}

}  // namespace

void segment_attention_backward_cpu(const SegmentAttentionBackwardParams& params) {
  const SegmentAttentionParams& p = params.forward;
  const DType dtype = p.dtype;
  const int64_t key_bytes = p.batch * p.keys * p.kv_heads * element_bytes(dtype);
  prefer_huge_pages(params.grad_q, p.batch * p.queries * p.query_heads * p.key_width * element_bytes(dtype));
  prefer_huge_pages(params.grad_k, key_bytes * p.key_width);
  prefer_huge_pages(params.grad_v, key_bytes * p.value_width);
  if (dtype == DType::kFloat64) return backward<double>(params);
  if (dtype == DType::kBFloat16 && has_bfloat16_products()) return backward<BFloat16Pair>(params);
  backward<float>(params);
}

}  // namespace statecore
