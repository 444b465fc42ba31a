#include "segment_attention/segment_plan.h"

namespace statecore {
namespace {

// Rows of a tile: enough to hide the cost of fetching a block of keys, few enough to stay in the L2 cache.
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

  const int64_t tile_begin = plan.tiles.size();
  int64_t step_begin = key_begin, t = key_begin;
  step = 0;
  const auto skip_to = [&](int64_t end) {
    for (; t < end; ++t)
      if (ids[t] > 0 && ids[t] != step) {
        step = ids[t];
        step_begin = t;
      }
  };
  for (int64_t begin = std::max(key_begin, query_begin); begin < key_end; begin += plan.tile_tokens) {
    const int64_t end = std::min(begin + plan.tile_tokens, key_end);
    int64_t own_begin = end;
    int64_t last = begin;
    for (int64_t i = begin; i < end; ++i) {
      if (ids[i] < 0) continue;
      last = i + 1;
      if (ids[i] == 0 || own_begin < end) continue;
      skip_to(i + 1);
      own_begin = step_begin;
    }
    skip_to(end);
    plan.tiles.push_back({.batch = batch,
                          .tokens = {begin, end},
                          .prompt = {std::min(prompt_begin, last), std::min(prompt_end, last)},
                          .own = {std::min(own_begin, last), last}});
  }
  plan.sequences.push_back({batch, {key_begin, key_end}, {tile_begin, int64_t(plan.tiles.size())}});
}

}  // namespace

SegmentPlan plan_segments(const SegmentAttentionParams& p) {
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

double SegmentPlan::work(const SegmentAttentionParams& p) const {
  double pairs = 0;
  for (const QueryTile& tile : tiles) pairs += double(rows(tile)) * double(keys_of(tile));
  return pairs * double(p.kv_heads) * double(p.key_width + p.value_width);
}

}  // namespace statecore
