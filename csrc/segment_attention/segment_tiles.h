// Tiles of queries and keys between tensors and scratch memory, for the CPU's forward and backward.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "common/operands.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tile_kernels.h"
#include "segment_attention/segment_plan.h"

namespace statecore {

// HeadsView of known element type.
struct TensorView : HeadsView {
  DType dtype;

  const void* at(int64_t b, int64_t t, int64_t h) const {
    return static_cast<const char*>(data) + offset(b, t, h) * element_bytes(dtype);
  }
  void* mutable_at(int64_t b, int64_t t, int64_t h) const { return const_cast<void*>(at(b, t, h)); }
};

template <class Operand>
class SegmentTiles {
 public:
  using Real = RealOf<Operand>;

  SegmentTiles(const SegmentAttentionInputs& inputs, const SegmentPlan& plan)
      : plan_(plan), first_query_(inputs.keys - inputs.queries) {}

  bool is_padding(const QueryTile& tile, int row) const {
    return plan_.visible_end_of(tile)[tile.tokens.begin + row / plan_.group] == 0;
  }

  // dst.rows() [rows, width] = the tile's rows of x; zeros for padding, whatever x holds there.
  void load_queries(const TensorView& x, const QueryTile& tile, int64_t kv_head, int width,
                    OperandTile<Operand>& dst) const {
    for (int g = 0; g < plan_.group; ++g)
      products_.pack_rows(x.dtype, query_at(x, tile, kv_head, g), x.time, int(tile.tokens.size()), width,
                          dst.mutable_row(g), dst.row_stride() * plan_.group);
    for (int row = 0; row < plan_.rows(tile); ++row)
      if (is_padding(tile, row)) std::fill_n(dst.mutable_row(row), depth<Operand>(width), Operand{});
  }

  // The same as real numbers.
  void load_queries(const TensorView& x, const QueryTile& tile, int64_t kv_head, int width, Real* dst,
                    int64_t ld) const {
    for (int g = 0; g < plan_.group; ++g)
      tiles_.load(x.dtype, query_at(x, tile, kv_head, g), x.time, int(tile.tokens.size()), width,
                  dst + g * ld, ld * plan_.group);
    for (int row = 0; row < plan_.rows(tile); ++row)
      if (is_padding(tile, row)) std::fill_n(dst + row * ld, width, Real(0));
  }

  void store_queries(const TensorView& x, const QueryTile& tile, int64_t kv_head, int width, const Real* src,
                     int64_t ld) const {
    for (int g = 0; g < plan_.group; ++g)
      tiles_.store(x.dtype, const_cast<void*>(query_at(x, tile, kv_head, g)), x.time, int(tile.tokens.size()),
                   width, src + g * ld, ld * plan_.group);
  }

  // The block's rows of x [keys, width], in `scratch`, or in place where that is as fast. Padding rows are
  // zeros: a cache may hold anything there, and 0 * NaN would poison the sums.
  Packed<Operand> key_rows(const TensorView& x, const QueryTile& tile, const KeyBlock& block, int64_t kv_head,
                           int width, OperandTile<Operand>& scratch) const {
    const void* source = x.at(tile.batch, block.begin, kv_head);
    if (usable_in_place(x, tile, width) && !has_padding(tile, block))
      return {static_cast<const Operand*>(source), x.time / OperandTraits<Operand>::kPackFactor};
    scratch.load_rows(x.dtype, source, x.time, block.keys, width);
    zero_padding(tile, block, scratch, width, /*rows=*/true);
    return scratch.rows();
  }

  // ... in columns form.
  Packed<Operand> key_columns(const TensorView& x, const QueryTile& tile, const KeyBlock& block,
                              int64_t kv_head, int width, OperandTile<Operand>& scratch) const {
    if constexpr (kIsReal<Operand>) {
      return key_rows(x, tile, block, kv_head, width, scratch);
    } else {
      scratch.load_columns(x.dtype, x.at(tile.batch, block.begin, kv_head), x.time, block.keys, width);
      zero_padding(tile, block, scratch, width, /*rows=*/false);
      return scratch.columns();
    }
  }

  // Of a tile's row in a contiguous [B, Hq, Tq].
  int64_t lse_index(const QueryTile& tile, int64_t kv_head, int row, int64_t kv_heads,
                    int64_t queries) const {
    const int64_t head = kv_head * plan_.group + row % plan_.group;
    const int64_t time = tile.tokens.begin - first_query_ + row / plan_.group;
    return (tile.batch * kv_heads * plan_.group + head) * queries + time;
  }

 private:
  const void* query_at(const TensorView& x, const QueryTile& tile, int64_t kv_head, int g) const {
    return x.at(tile.batch, tile.tokens.begin - first_query_, kv_head * plan_.group + g);
  }

  // A copy, whose lines lie together, pays off when the tile has many rows that read it.
  bool usable_in_place(const TensorView& x, const QueryTile& tile, int width) const {
    constexpr int kPackFactor = OperandTraits<Operand>::kPackFactor;
    return x.dtype == OperandTraits<Operand>::kDType && width % (kTilePad * kPackFactor) == 0 &&
           x.time % kPackFactor == 0 && plan_.rows(tile) <= kTilePad;
  }

  bool has_padding(const QueryTile& tile, const KeyBlock& block) const {
    const int64_t* visible_end = plan_.visible_end_of(tile) + block.begin;
    return std::find(visible_end, visible_end + block.keys, 0) != visible_end + block.keys;
  }

  void zero_padding(const QueryTile& tile, const KeyBlock& block, OperandTile<Operand>& x, int width,
                    bool rows) const {
    const int64_t* visible_end = plan_.visible_end_of(tile) + block.begin;
    for (int j = 0; j < block.keys; ++j)
      if (visible_end[j] == 0) rows ? x.clear_row(j, width) : x.clear_row_of_columns(j, width);
  }

  const ProductKernels<Operand>& products_ = product_kernels<Operand>();
  const TileKernels<Real>& tiles_ = tile_kernels<Real>();
  const SegmentPlan& plan_;
  int64_t first_query_;
};

// Runs make_worker() once per thread, and its result on every work tile of [0, n). Threads take the next one
// when they are free: costs differ too much for equal shares. Results do not depend on who computes them.
template <class MakeWorker>
void parallel_work_tiles(int64_t n, int64_t multiply_adds, const MakeWorker& make_worker) {
  const int64_t threads = std::min(n, 1 + multiply_adds / kWorthSharing);
  std::atomic<int64_t> next{0};
  parallel_for(threads, [&](int64_t, int64_t) {
    auto worker = make_worker();
    for (int64_t work; (work = next.fetch_add(1, std::memory_order_relaxed)) < n;) worker(work);
  });
}

}  // namespace statecore
