// Plans splits and chunks where only the device knows where sequences or steps end.
//
// One block per sequence, which it reads once, in tiles of 4096 tokens. Chunks begin where the step id
// changes and every chunk_length tokens from there. A chunk needs three scans: a prefix maximum for the last
// change before a token, a prefix maximum of ids for the step that ends (padding, of id -1, may lie between),
// and a prefix sum for the chunk's number.
#include "common/ceil_div.h"
#include "linear_attention/linear_splits.cuh"

namespace statecore {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kTokensPerThread = 8;

// Exclusive scan over the threads of the block, which begins with `identity`; `total` is op over all of them.
// `warp_totals` may be used again after the next barrier.
template <class Op>
__device__ int block_exclusive_scan(int x, int identity, const Op& op, int* warp_totals, int& total) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const auto warp_inclusive_scan = [&](int y) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, y, distance);
      if (lane >= distance) y = op(before, y);
    }
    return y;
  };
  const int inclusive = warp_inclusive_scan(x);
  if (lane == 31) warp_totals[warp] = inclusive;
  __syncthreads();
  const int warps = warp_inclusive_scan(lane < kWarps ? warp_totals[lane] : identity);
  total = __shfl_sync(0xffffffffu, warps, 31);
  const int before_warp = __shfl_sync(0xffffffffu, warps, max(warp - 1, 0));
  const int before_lane = __shfl_up_sync(0xffffffffu, inclusive, 1);
  const int exclusive = lane > 0 ? before_lane : identity;
  return warp > 0 ? op(before_warp, exclusive) : exclusive;
}

__global__ void __launch_bounds__(kThreads) plan_splits_kernel(SplitPlan p) {
  STATECORE_SHARED(int, last_changes, kWarps);
  STATECORE_SHARED(int, largest_ids, kWarps);
  STATECORE_SHARED(int, counts, kWarps);
  const Splits& s = p.splits;
  const int64_t n = blockIdx.x;
  const int thread = int(threadIdx.x);
  const TokenRange tokens = sequence_tokens(s, n);

  // ---- splits, and the unused indices between this sequence's and the next one's
  PlannedSplit* const splits = p.planned_splits + first_split(s, n, tokens);
  const int count = split_count(s, tokens);
  const int64_t next_first =
      n + 1 == s.sequences ? s.capacity : first_split(s, n + 1, sequence_tokens(s, n + 1));
  for (int64_t i = thread; i < next_first - first_split(s, n, tokens); i += kThreads) {
    const int64_t begin = tokens.begin + i * s.length;
    const int64_t end = s.length == 0 ? tokens.end : min(begin + s.length, int64_t(tokens.end));
    splits[i] = {i < count ? int32_t(n) : -1, int32_t(begin), int32_t(end), 0, 0};
  }
  if (!p.planned_chunks) return;
  __syncthreads();

  // ---- chunks
  const int32_t* step_ids = p.step_ids + (s.cu_seqlens ? 0 : n) * p.ids_batch;
  PlannedChunk* const chunks = p.planned_chunks + first_planned_chunk(s, n, tokens);
  // Over the tiles before this one: where the id changed last, the largest id, chunks so far.
  int change = tokens.begin, last_id = p.initial_step ? p.initial_step[n] : kNoStep, written = 0;
  for (int64_t tile = tokens.begin; tile < tokens.end; tile += kTokensPerThread * kThreads) {
    const int64_t first = tile + kTokensPerThread * thread;
    int32_t id[kTokensPerThread],
        before = first > tokens.begin && first < tokens.end ? step_ids[first - 1] : -1;
    uint32_t changes = 0, begins = 0;  // a bit per token
    int last_change = -1, largest = -1;
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      id[i] = first + i < tokens.end ? step_ids[first + i] : -1;
      largest = max(largest, id[i]);
      if (first + i >= tokens.end) continue;
      if (first + i == tokens.begin || id[i] != (i ? id[i - 1] : before))
        changes |= 1u << i, last_change = int(first + i);
    }
    const auto larger = [](int a, int b) { return max(a, b); };
    int tile_change, tile_id, tile_chunks;
    int from = max(block_exclusive_scan(last_change, -1, larger, last_changes, tile_change), change);
    int last = max(block_exclusive_scan(largest, -1, larger, largest_ids, tile_id), last_id);
    change = max(tile_change, change), last_id = max(tile_id, last_id);
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      if (first + i >= tokens.end) continue;
      if (changes >> i & 1u) from = int(first + i);
      if ((first + i - from) % p.chunk_length == 0) begins |= 1u << i;
    }
    const auto sum = [](int a, int b) { return a + b; };
    int at = written + block_exclusive_scan(__popc(begins), 0, sum, counts, tile_chunks);
    written += tile_chunks;
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      const int64_t token = first + i;
      if (token >= tokens.end) continue;
      if (s.length > 0 && (token - tokens.begin) % s.length == 0) {
        const int64_t split = (token - tokens.begin) / s.length;
        splits[split].first_chunk = at;
        if (split > 0) splits[split - 1].end_chunk = at;
      }
      if (!(begins >> i & 1u)) continue;
      int32_t ended_step = id[i] == -1 ? kPaddingChunk : kNoStep;
      if (last >= 0 && id[i] > last) ended_step = last;
      last = max(last, id[i]);
      chunks[at++] = {int32_t(token), ended_step};
    }
  }
  if (thread == 0) {
    chunks[written] = {tokens.end, kNoStep};
    if (count > 0) splits[count - 1].end_chunk = written;
  }
}

}  // namespace

SplitPlan make_split_plan(const LinearAttentionInputs& p, int32_t split_length, ScratchAllocator& allocator) {
  SplitPlan plan{};
  Splits& s = plan.splits;
  s.sequences = s.capacity = p.sequences;
  s.tokens = p.tokens;
  s.cu_seqlens = p.cu_seqlens;
  s.length = split_length;
  if (s.length > 0)
    s.capacity = p.cu_seqlens ? p.tokens / s.length + p.sequences
                              : p.sequences * ceil_div<int64_t>(p.tokens, s.length);
  if (p.step_ids || (p.cu_seqlens && s.length > 0))
    s.planned = plan.planned_splits = allocator.take<PlannedSplit>(s.capacity);
  if (p.step_ids) {
    s.chunks = plan.planned_chunks = allocator.take<PlannedChunk>(p.batch * p.tokens + p.sequences);
    plan.chunk_length = sweep_chunk_length(element_bytes(p.dtype));
    plan.step_ids = p.step_ids, plan.ids_batch = p.ids_batch;
    plan.initial_step = p.initial_step;
  }
  return plan;
}

void launch_split_plan(const SplitPlan& plan, void* stream) {
  if (!plan.planned_splits || plan.splits.sequences == 0) return;
  launch("plan_splits", plan_splits_kernel, {dim3(unsigned(plan.splits.sequences)), dim3(kThreads)}, stream,
         plan);
}

}  // namespace statecore
