// Forward: for each tile of queries an online softmax over the blocks of keys that the plan names. Scores
// stand keys by rows, so that K is read as it lies and only the queries are transposed, once a tile.
//
// A place for more: a decoding step has one item a key head and sequence. Where those are fewer than the
// threads, the keys of a tile could be cut into fixed ranges whose (out, max, sum) are merged in order.

#include <cmath>

#include "segment_attention/segment_tiles.h"

namespace statecore {
namespace {

// Up to this many rows (a decoding step), scores are dot products: a product of whole vectors of rows would
// be mostly padding.
constexpr int kFewRows = 2;

template <class Real>
class ForwardWorker {
 public:
  ForwardWorker(const SegmentAttentionParams& params, const SegmentPlan& plan)
      : p_(params),
        plan_(plan),
        tiles_(params, plan),
        rows_(plan.max_rows()),
        key_width_(int(params.key_width)),
        value_width_(int(params.value_width)),
        q_(make_scratch<Real>(int64_t(rows_) * tile_ld(key_width_))),
        q_transposed_(make_scratch<Real>(int64_t(key_width_) * tile_ld(rows_))),
        k_(make_scratch<Real>(int64_t(kBlockKeys) * tile_ld(key_width_))),
        v_(make_scratch<Real>(int64_t(kBlockKeys) * tile_ld(value_width_))),
        scores_(make_scratch<Real>(int64_t(kBlockKeys) * tile_ld(rows_))),
        out_(make_scratch<Real>(int64_t(rows_) * tile_ld(value_width_))),
        row_max_(make_scratch<Real>(padded(rows_))),
        row_sum_(make_scratch<Real>(padded(rows_))),
        correction_(make_scratch<Real>(padded(rows_))) {
    // score_few_rows() leaves the padding alone.
    std::fill_n(scores_.get(), int64_t(kBlockKeys) * tile_ld(rows_), Real(0));
  }

  void operator()(int64_t item) {
    // The last tiles of a sequence see the most: they come first, and the small ones fill the gaps.
    const QueryTile& tile = plan_.tiles[plan_.tiles.size() - 1 - item / p_.kv_heads];
    const int64_t kv_head = item % p_.kv_heads;
    const int rows = plan_.rows(tile), ldq = tile_ld(key_width_), ldo = tile_ld(value_width_);
    const TensorView q{p_.q, p_.dtype, p_.q_batch, p_.q_time, p_.q_head};
    tiles_.load_queries(q, tile, kv_head, key_width_, Real(p_.scale), q_.get(), ldq);
    tiles_.transpose(q_.get(), ldq, rows, key_width_, q_transposed_.get(), tile_ld(rows_));
    std::fill_n(row_max_.get(), padded(rows), Real(-__builtin_inf()));
    std::fill_n(row_sum_.get(), padded(rows), Real(0));
    std::fill_n(out_.get(), int64_t(rows) * ldo, Real(0));
    for_each_key_block(plan_, tile, [&](const KeyBlock& block) { attend(tile, block, kv_head); });
    finish(tile, kv_head);
  }

 private:
  void attend(const QueryTile& tile, const KeyBlock& block, int64_t kv_head) {
    const int ldv = tile_ld(value_width_), lds = tile_ld(rows_);
    const int first = block.row_begin, columns = block.row_end - first;
    const int rows = std::min(block.row_end, plan_.rows(tile)) - first;
    Real* scores = scores_.get() + first;
    const Tile<Real> k = tiles_.load_keys({p_.k, p_.dtype, p_.k_batch, p_.k_time, p_.k_head}, tile, block,
                                          kv_head, key_width_, k_.get());
    if (plan_.rows(tile) <= kFewRows)
      score_few_rows(k, block.keys, plan_.rows(tile));
    else
      kernels_.matmul(block.keys, columns, key_width_, k.data, k.ld, 1, q_transposed_.get() + first, lds,
                      scores, lds, false);
    hide_invisible(plan_, tile, block, scores_.get(), lds);
    kernels_.softmax_block(block.keys, columns, scores, lds, row_max_.get() + first, row_sum_.get() + first,
                           correction_.get() + first);
    Real* out = out_.get() + int64_t(first) * ldv;
    kernels_.scale_rows(rows, value_width_, correction_.get() + first, out, ldv);
    const Tile<Real> v = tiles_.load_keys({p_.v, p_.dtype, p_.v_batch, p_.v_time, p_.v_head}, tile, block,
                                          kv_head, value_width_, v_.get());
    kernels_.matmul(rows, value_width_, block.keys, scores, 1, lds, v.data, v.ld, out, ldv, true);
  }

  void score_few_rows(const Tile<Real>& k, int keys, int rows) {
    for (int row = 0; row < rows; ++row) {
      kernels_.dot_rows(keys, key_width_, k.data, k.ld, q_.get() + int64_t(row) * tile_ld(key_width_), 0,
                        column_);
      for (int j = 0; j < keys; ++j) scores_[int64_t(j) * tile_ld(rows_) + row] = column_[j];
    }
  }

  void finish(const QueryTile& tile, int64_t kv_head) {
    const int rows = plan_.rows(tile), ldo = tile_ld(value_width_);
    Real* lse = static_cast<Real*>(p_.lse);
    for (int row = 0; row < rows; ++row) {
      const bool hidden = tiles_.hidden(tile, row);
      lse[tiles_.lse_index(tile, kv_head, row, p_.kv_heads, p_.queries)] =
          hidden ? Real(-__builtin_inf()) : row_max_[row] + std::log(row_sum_[row]);
      row_sum_[row] = hidden ? Real(0) : 1 / row_sum_[row];
    }
    kernels_.scale_rows(rows, value_width_, row_sum_.get(), out_.get(), ldo);
    for (int row = 0; row < rows; ++row)
      if (tiles_.hidden(tile, row)) std::fill_n(out_.get() + int64_t(row) * ldo, value_width_, Real(0));
    const TensorView out = contiguous_view(p_.out, p_.out_dtype, p_.queries, p_.query_heads, p_.value_width);
    tiles_.store_queries(out, tile, kv_head, value_width_, out_.get(), ldo);
  }

  const TileKernels<Real>& kernels_ = tile_kernels<Real>();
  const SegmentAttentionParams& p_;
  const SegmentPlan& plan_;
  const SegmentTiles<Real> tiles_;
  const int rows_, key_width_, value_width_;
  Scratch<Real> q_, q_transposed_, k_, v_, scores_, out_, row_max_, row_sum_, correction_;
  Real column_[kBlockKeys];
};

template <class Real>
void forward(const SegmentAttentionParams& params) {
  const SegmentPlan plan = plan_segments(params);
  parallel_items(int64_t(plan.tiles.size()) * params.kv_heads, plan.multiply_adds(params),
                 [&] { return ForwardWorker<Real>(params, plan); });
}

}  // namespace

void segment_attention_cpu(const SegmentAttentionParams& params) {
  params.dtype == DType::kFloat64 ? forward<double>(params) : forward<float>(params);
}

}  // namespace statecore
