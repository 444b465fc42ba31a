#include "linear_attention/linear_plan.h"

#include <algorithm>

namespace statecore {
namespace {

constexpr int32_t kPadding = -1;  // step id

// Where sequences times key heads are fewer than this, threads can share the splits of a sequence. It must
// not depend on the number of threads: local states change the rounding.
constexpr int64_t kFewTasks = 16;
constexpr int64_t kSplitTokens = 256;

void plan_sequence(const LinearAttentionInputs& p, int64_t n, int chunk_length, LinearPlan& plan) {
  const int64_t row = p.cu_seqlens ? 0 : n;
  const int64_t begin = p.cu_seqlens ? p.cu_seqlens[n] : 0;
  const int64_t end = p.cu_seqlens ? p.cu_seqlens[n + 1] : p.tokens;
  const int32_t* step_ids = p.step_ids ? p.step_ids + row * p.ids_batch : nullptr;
  const int64_t first_split = plan.splits.size();
  int32_t last = p.initial_step ? p.initial_step[n] : kNoStep;
  int64_t split_tokens = 0;
  for (int64_t t = begin; t < end;) {
    const int32_t step = step_ids ? step_ids[t] : 0;
    const int64_t limit = std::min<int64_t>(end, t + chunk_length);
    int64_t next = step_ids ? t + 1 : limit;
    while (next < limit && step_ids[next] == step) ++next;
    const bool padding = step == kPadding;
    const bool ends_step = !padding && last != kNoStep && step > last;
    if (t == begin || ends_step || (plan.has_local_states && split_tokens >= kSplitTokens)) {
      const int64_t chunk = plan.chunks.size();
      plan.splits.push_back({{chunk, chunk}, ends_step ? last : kNoStep});
      split_tokens = 0;
    }
    plan.chunks.push_back({t, int32_t(next - t), padding});
    plan.splits.back().chunks.end = plan.chunks.size();
    split_tokens += next - t;
    if (!padding) last = step;
    t = next;
  }
  plan.sequences.push_back({row, {first_split, int64_t(plan.splits.size())}});
}

}  // namespace

LinearPlan plan_linear(const LinearAttentionInputs& p, int chunk_length) {
  LinearPlan plan;
  plan.has_local_states = p.sequences * p.key_heads < kFewTasks && p.tokens > 2 * kSplitTokens;
  plan.sequences.reserve(p.sequences);
  plan.chunks.reserve(p.batch * p.tokens / chunk_length + p.sequences);
  for (int64_t n = 0; n < p.sequences; ++n) plan_sequence(p, n, chunk_length, plan);
  return plan;
}

int64_t state_multiply_adds(const LinearAttentionInputs& p) {
  return p.batch * p.tokens * (p.query_heads + p.value_heads) * p.key_width * p.value_width;
}

}  // namespace statecore
