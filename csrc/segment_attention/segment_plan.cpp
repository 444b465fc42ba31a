#include "segment_attention/segment_plan.h"

namespace statecore {
namespace {

// Rows of a tile: enough to amortise loading a block of keys, few enough to stay in the L2 cache.
constexpr int kTileRows = 256;

void plan_sequence(const int32_t* ids, int64_t batch, int64_t key_begin, int64_t key_end, int64_t query_begin,
                   SegmentPlan& plan) {
  int64_t* visible_end = plan.visible_end.data() + batch * plan.keys;
  int64_t step_end = key_end, prompt_begin = key_end, prompt_end = key_end;
  int32_t step = 0;
  for (int64_t t = key_end - 1; t >= key_begin; --t) {
    if (ids[t] > 0 && ids[t] != step) {
      step = ids[t];
      step_end = t + 1;
    }
    if (ids[t] == 0) {
      if (prompt_begin == key_end) prompt_end = t + 1;
      prompt_begin = t;
    }
    visible_end[t] = ids[t] < 0 ? 0 : ids[t] == 0 ? key_end : step_end;
  }

  const int64_t first_tile = plan.tiles.size(), first_query = std::max(key_begin, query_begin);
  int64_t step_begin = key_begin;
  step = 0;
  for (int64_t t = key_begin; t < key_end; ++t) {
    if (ids[t] > 0 && ids[t] != step) {
      step = ids[t];
      step_begin = t;
    }
    if (t < first_query) continue;
    if ((t - first_query) % plan.tile_tokens == 0)
      plan.tiles.push_back({batch, {t, std::min(t + plan.tile_tokens, key_end)}, {t, t}, {t, t}});
    if (ids[t] < 0) continue;
    QueryTile& tile = plan.tiles.back();
    tile.prompt = {std::min(prompt_begin, t + 1), std::min(prompt_end, t + 1)};
    if (ids[t] > 0) tile.own = {tile.own.size() == 0 ? step_begin : tile.own.begin, t + 1};
  }
  plan.sequences.push_back({batch, {key_begin, key_end}, {first_tile, int64_t(plan.tiles.size())}});
}

}  // namespace

SegmentPlan plan_segments(const SegmentAttentionInputs& p) {
  SegmentPlan plan;
  plan.group = int(p.query_heads / p.kv_heads);
  plan.tile_tokens = int(std::clamp<int64_t>(kTileRows / plan.group, 1, std::max<int64_t>(p.queries, 1)));
  plan.keys = p.keys;
  plan.visible_end.resize(p.batch * p.keys);
  for (int64_t n = 0; n < p.sequences; ++n) {
    if (p.cu_seqlens)
      plan_sequence(p.step_ids, 0, p.cu_seqlens[n], p.cu_seqlens[n + 1], 0, plan);
    else
      plan_sequence(p.step_ids + n * p.ids_batch, n, 0, p.keys, p.keys - p.queries, plan);
  }
  return plan;
}

int64_t SegmentPlan::multiply_adds(const SegmentAttentionInputs& p) const {
  int64_t pairs = 0;
  for (const QueryTile& tile : tiles) pairs += rows(tile) * keys_of(tile);
  return pairs * p.kv_heads * (p.key_width + p.value_width);
}

}  // namespace statecore
