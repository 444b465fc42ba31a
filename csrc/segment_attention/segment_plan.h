// The mask as ranges of keys: made once per call in O(batch * tokens), shared by all heads.
//
// Ids do not decrease within a sequence, so key j is visible to a contiguous range of queries, [j,
// visible_end[j]): up to the end of the sequence for a key of the prompt, up to the end of its step for any
// other, empty for padding. A tile of queries therefore sees two ranges of keys, one in the prompt and one in
// its own steps, and the tokens in between are never read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/range.h"
#include "common/tile_kernels.h"
#include "segment_attention/segment_attention.h"

namespace statecore {

constexpr int kBlockKeys = 64;
constexpr double kLog2e = 1.4426950408889634;  // scores are in log2 units

// Consecutive queries of one sequence. All positions are indices of keys in a row of the batch.
struct QueryTile {
  int64_t batch;
  Range tokens;
  Range prompt;  // keys of the prompt that they may see
  Range own;     // keys of their own steps
};

struct Sequence {
  int64_t batch;
  Range keys;
  Range tiles;
};

struct SegmentPlan {
  int group;        // query heads per key head
  int tile_tokens;  // tokens of a full tile
  int64_t keys;
  std::vector<QueryTile> tiles;
  std::vector<Sequence> sequences;
  std::vector<int64_t> visible_end;  // [B, Tk]

  // A tile's rows are its tokens times the query heads of a group (innermost), which share keys and values.
  int rows(const QueryTile& tile) const { return int(tile.tokens.size()) * group; }
  int max_rows() const { return tile_tokens * group; }
  int64_t keys_of(const QueryTile& tile) const { return tile.prompt.size() + tile.own.size(); }
  int64_t multiply_adds(const SegmentAttentionInputs& inputs) const;  // of the forward, about
  const int64_t* visible_end_of(const QueryTile& tile) const {
    return visible_end.data() + tile.batch * keys;
  }
};

SegmentPlan plan_segments(const SegmentAttentionInputs& inputs);

// A block of keys, and the rows of a tile that may see some of them (whole vectors).
struct KeyBlock {
  int64_t begin;
  int keys;
  int row_begin, row_end;
};

template <class F>
void for_each_key_block(const SegmentPlan& plan, const QueryTile& tile, const F& f) {
  const int64_t* visible_end = plan.visible_end_of(tile);
  for (const Range& range : {tile.prompt, tile.own})
    for (int64_t begin = range.begin; begin < range.end; begin += kBlockKeys) {
      const int64_t end = std::min(begin + kBlockKeys, range.end);
      const int64_t max_visible_end = *std::max_element(visible_end + begin, visible_end + end);
      const Range queries{std::max(begin, tile.tokens.begin), std::min(max_visible_end, tile.tokens.end)};
      if (queries.size() <= 0) continue;
      const int row_begin = int(queries.begin - tile.tokens.begin) * plan.group / kTilePad * kTilePad;
      const int row_end = padded(int(queries.end - tile.tokens.begin) * plan.group);
      f(KeyBlock{begin, int(end - begin), row_begin, row_end});
    }
}

// scores [keys, rows]: -inf where the key is not visible to the row.
template <class Real>
void mask_scores(const SegmentPlan& plan, const QueryTile& tile, const KeyBlock& block, Real* scores,
                 int64_t ld) {
  const int64_t* visible_end = plan.visible_end_of(tile) + block.begin;
  const int64_t row_begin = block.row_begin, row_end = block.row_end;
  for (int j = 0; j < block.keys; ++j) {
    const int64_t visible_row_begin = (block.begin + j - tile.tokens.begin) * plan.group;
    const int64_t visible_row_end = (visible_end[j] - tile.tokens.begin) * plan.group;
    const int64_t first = std::clamp(visible_row_begin, row_begin, row_end);
    const int64_t last = std::clamp(visible_row_end, first, row_end);
    Real* row = scores + j * ld;
    std::fill(row + row_begin, row + first, Real(-__builtin_inf()));
    std::fill(row + last, row + row_end, Real(-__builtin_inf()));
  }
}

}  // namespace statecore
