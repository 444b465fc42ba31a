#include <algorithm>
#include <stdexcept>

#include "common/ceil_div.h"
#include "segment_attention/segment_splits.cuh"

namespace statecore {
namespace {

constexpr int kScanThreads = 256;
constexpr int64_t kMinSplitWork = 8;    // shorter splits are not worth the traffic of partial sums
constexpr int64_t kTargetBlocks = 528;  // four per SM of an H200

// Sum of x over the threads before this one; *total: over all threads.
__device__ __forceinline__ int64_t exclusive_sum(int64_t x, int64_t* shared, int64_t* total) {
  const int thread = int(threadIdx.x);
  __syncthreads();  // the previous sums have been read
  shared[thread] = x;
  for (int distance = 1; distance < kScanThreads; distance *= 2) {
    __syncthreads();
    const int64_t other = thread >= distance ? shared[thread - distance] : 0;
    __syncthreads();
    shared[thread] += other;
  }
  __syncthreads();
  *total = shared[kScanThreads - 1];
  return shared[thread] - x;
}

// One block, whose threads have some consecutive tiles each: a million tokens are only 64 tiles per thread.
__global__ void __launch_bounds__(kScanThreads) split_keys_kernel(DevicePlan plan, DeviceSplits splits) {
  STATECORE_SHARED(int64_t, shared, kScanThreads);
  const int share = ceil_div(plan.tiles, kScanThreads);
  const int begin = min(int(threadIdx.x) * share, plan.tiles), end = min(begin + share, plan.tiles);
  const auto work_of = [&](int k_block) {
    const int2 m_blocks = m_blocks_of(plan, k_block, plan.tile[k_block]);
    return (m_blocks.y - m_blocks.x) * splits.group;
  };
  const auto splits_of = [&](int work, int64_t length) { return int(ceil_div<int64_t>(work, length)); };

  // ---- length of a split
  int64_t work = 0, total_work;
  for (int k_block = begin; k_block < end; ++k_block) work += work_of(k_block);
  exclusive_sum(work, shared, &total_work);
  const int64_t length = max(kMinSplitWork, ceil_div<int64_t>(total_work, splits.target));

  // ---- counts, of used tiles only
  int64_t unsplit = 0, split = 0, partials = 0;
  for (int k_block = begin; k_block < end; ++k_block) {
    const int n = splits_of(work_of(k_block), length);
    if (n > 1)
      ++split, partials += n;
    else
      unsplit += plan.tile[k_block].begin < plan.tile[k_block].end;
  }
  int64_t total_unsplit, total_split, total_partials;
  unsplit = exclusive_sum(unsplit, shared, &total_unsplit);
  split = exclusive_sum(split, shared, &total_split);
  partials = exclusive_sum(partials, shared, &total_partials);

  // ---- longest first: the splits of split k_blocks, then the other k_blocks
  for (int k_block = begin; k_block < end; ++k_block) {
    const int tile_work = work_of(k_block), n = splits_of(tile_work, length);
    if (n > 1) {
      splits.split_k_block[split++] = {k_block, int(partials), n, 0};
      for (int i = 0; i < n; ++i, ++partials)
        splits.split[partials] = {k_block, int(i * length), min(int((i + 1) * length), tile_work),
                                  int(partials)};
    } else if (plan.tile[k_block].begin < plan.tile[k_block].end) {
      splits.split[total_partials + unsplit++] = {k_block, 0, tile_work, -1};
    }
  }
  if (threadIdx.x == 0) {
    splits.counts[0] = int(total_partials + total_unsplit);
    splits.counts[1] = int(total_split);
  }
}

}  // namespace

DeviceSplits device_splits(const SegmentAttentionInputs& p, const DevicePlan& plan,
                           ScratchAllocator& scratch) {
  DeviceSplits splits{};
  splits.group = int32_t(p.query_heads / p.kv_heads);
  const int64_t target = ceil_div(kTargetBlocks, p.kv_heads);
  // A k_block is split where it has more work than the length of a split, so there are fewer than 2 * target
  // partial sums, and few where there is little work at all.
  const int64_t tiles_per_row = p.cu_seqlens ? plan.tiles : plan.tiles_per_row;
  const int64_t max_work = plan.tiles * tiles_per_row * splits.group;
  const int64_t max_partials = std::min(2 * target, 2 * max_work / kMinSplitWork);
  if (max_work / kMinSplitWork > INT32_MAX)
    throw std::runtime_error("statecore: segment_attention_backward has too many tokens for one launch");
  splits.target = int32_t(target);
  splits.max_partials = int32_t(max_partials), splits.max_split_k_blocks = int32_t(max_partials / 2);
  splits.max_splits = int32_t(max_partials + plan.tiles);
  splits.counts = scratch.take<int32_t>(2);
  splits.split = scratch.take<KeySplit>(splits.max_splits);
  splits.split_k_block = scratch.take<SplitKBlock>(splits.max_split_k_blocks);
  return splits;
}

void make_splits(const DevicePlan& plan, const DeviceSplits& splits, void* stream) {
  if (plan.tiles > 0)
    launch("segment_splits", split_keys_kernel, {dim3(1), dim3(kScanThreads)}, stream, plan, splits);
}

}  // namespace statecore
