// Forward: for each tile of queries an online softmax over the blocks of keys that the plan names. Scores are
// transposed, S^T = K Q^T: K keeps its layout, and only the queries are transposed, once per tile.
//
// Room for improvement: decoding one token has one work tile per key head and sequence. Where threads
// outnumber them, the keys of a tile could be split into ranges whose (out, row_max, row_sum) are merged in
// order.

#include <cmath>

#include "common/huge_pages.h"
#include "segment_attention/segment_tiles.h"

namespace statecore {
namespace {

// Up to this many rows (decoding), scores are dot products: vectors of rows would be mostly padding.
constexpr int kFewRows = 2;

template <class Operand>
class ForwardWorker {
 public:
  using Real = RealOf<Operand>;

  ForwardWorker(const SegmentAttentionParams& params, const SegmentPlan& plan)
      : p_(params), plan_(plan), tiles_(params, plan) {
    // score_few_rows() leaves the padding alone.
    std::fill_n(scores_.get(), kBlockKeys * lds_, Real(0));
  }

  // A work tile: a tile of queries and a key head.
  void operator()(int64_t work) {
    // The last tiles of a sequence see the most: they come first, and the small ones fill the gaps.
    const QueryTile& tile = plan_.tiles[plan_.tiles.size() - 1 - work / p_.kv_heads];
    const int64_t kv_head = work % p_.kv_heads;
    const int rows = plan_.rows(tile);
    tiles_.load_queries({p_.q, p_.dtype}, tile, kv_head, key_width_, q_);
    q_.transpose(rows, key_width_, q_transposed_.get(), lds_);
    std::fill_n(row_max_.get(), padded(rows), Real(-__builtin_inf()));
    std::fill_n(row_sum_.get(), padded(rows), Real(0));
    std::fill_n(out_.get(), rows * ldo_, Real(0));
    for_each_key_block(plan_, tile, [&](const KeyBlock& block) { attend(tile, block, kv_head); });
    finalize(tile, kv_head);
  }

 private:
  void attend(const QueryTile& tile, const KeyBlock& block, int64_t kv_head) {
    const int first = block.row_begin, columns = block.row_end - first;
    const int rows = std::min(block.row_end, plan_.rows(tile)) - first;

    // S^T = scale K Q^T, in log2 units
    Real* scores = scores_.get() + first;
    const Packed<Operand> k = tiles_.key_rows({p_.k, p_.dtype}, tile, block, kv_head, key_width_, k_);
    const Real scale_log2 = Real(p_.scale * kLog2e);
    if (kIsReal<Operand> && plan_.rows(tile) <= kFewRows)
      score_few_rows(k, block.keys, plan_.rows(tile), scale_log2);
    else
      multiply(block.keys, columns, key_width_, scale_log2, as_is(k),
               Packed<Operand>{q_transposed_.get() + first, lds_}, scores, lds_, false);
    mask_scores(plan_, tile, block, scores_.get(), lds_);

    // O = rescale O + P V
    Operand* probabilities;
    if constexpr (kIsReal<Operand>)
      probabilities = scores;
    else
      probabilities = probabilities_.get();
    product_kernels<Operand>().softmax_block(block.keys, columns, scores, lds_, probabilities, lds_,
                                             row_max_.get() + first, row_sum_.get() + first,
                                             rescale_.get() + first);
    Real* out = out_.get() + first * ldo_;
    kernels_.scale_rows(rows, value_width_, rescale_.get() + first, out, ldo_);
    const Packed<Operand> v = tiles_.key_columns({p_.v, p_.dtype}, tile, block, kv_head, value_width_, v_);
    multiply(rows, value_width_, block.keys, Real(1), transposed(Packed<Operand>{probabilities, lds_}), v,
             out, ldo_, true);
  }

  void score_few_rows(Packed<Operand> k, int keys, int rows, Real scale_log2) {
    if constexpr (kIsReal<Operand>)
      for (int row = 0; row < rows; ++row) {
        kernels_.dot_rows(keys, key_width_, k.data, k.ld, q_.mutable_row(row), 0, column_);
        for (int j = 0; j < keys; ++j) scores_[j * lds_ + row] = scale_log2 * column_[j];
      }
  }

  // Divides O by row_sum and stores it, and lse; 0 and -inf for padding.
  void finalize(const QueryTile& tile, int64_t kv_head) {
    const int rows = plan_.rows(tile);
    Real* lse = static_cast<Real*>(p_.lse);
    for (int row = 0; row < rows; ++row) {
      const bool padding = tiles_.is_padding(tile, row);
      lse[tiles_.lse_index(tile, kv_head, row, p_.kv_heads, p_.queries)] =
          padding ? Real(-__builtin_inf()) : row_max_[row] / Real(kLog2e) + std::log(row_sum_[row]);
      row_sum_[row] = padding ? Real(0) : 1 / row_sum_[row];
    }
    kernels_.scale_rows(rows, value_width_, row_sum_.get(), out_.get(), ldo_);
    for (int row = 0; row < rows; ++row)
      if (tiles_.is_padding(tile, row)) std::fill_n(out_.get() + row * ldo_, value_width_, Real(0));
    const TensorView out{contiguous_heads(p_.out, p_.queries, p_.query_heads, p_.value_width), p_.out_dtype};
    tiles_.store_queries(out, tile, kv_head, value_width_, out_.get(), ldo_);
  }

  const TileKernels<Real>& kernels_ = tile_kernels<Real>();
  const SegmentAttentionParams& p_;
  const SegmentPlan& plan_;
  const SegmentTiles<Operand> tiles_;
  const int rows_ = plan_.max_rows(), key_width_ = int(p_.key_width), value_width_ = int(p_.value_width);
  const int64_t lds_ = tile_ld(rows_), ldo_ = tile_ld(value_width_);
  OperandTile<Operand> q_{rows_, key_width_}, k_{kBlockKeys, key_width_}, v_{kBlockKeys, value_width_};
  Scratch<Operand> q_transposed_ = make_scratch<Operand>(depth<Operand>(key_width_) * lds_);
  Scratch<Real> scores_ = make_scratch<Real>(kBlockKeys * lds_);
  Scratch<Operand> probabilities_ =
      make_scratch<Operand>(kIsReal<Operand> ? 0 : depth<Operand>(kBlockKeys) * lds_);
  Scratch<Real> out_ = make_scratch<Real>(rows_ * ldo_);
  Scratch<Real> row_max_ = make_scratch<Real>(padded(rows_)), row_sum_ = make_scratch<Real>(padded(rows_));
  Scratch<Real> rescale_ = make_scratch<Real>(padded(rows_));
  Real column_[kBlockKeys];
};

template <class Operand>
void forward(const SegmentAttentionParams& params, const SegmentPlan& plan) {
  parallel_work_tiles(int64_t(plan.tiles.size()) * params.kv_heads, plan.multiply_adds(params),
                      [&] { return ForwardWorker<Operand>(params, plan); });
}

}  // namespace

void segment_attention_cpu(const SegmentAttentionParams& params) {
  prefer_huge_pages(params.out, params.batch * params.queries * params.query_heads * params.value_width *
                                    element_bytes(params.out_dtype));
  const SegmentPlan plan = plan_segments(params);
  if (params.dtype == DType::kFloat64)
    forward<double>(params, plan);
  else if (params.dtype == DType::kBFloat16 && has_bfloat16_products() && plan.max_rows() > kFewRows)
    forward<BFloat16Pair>(params, plan);
  else
    forward<float>(params, plan);
}

}  // namespace statecore
