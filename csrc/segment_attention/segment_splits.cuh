// How the gradients of keys are divided among blocks. A k_block is visible to few queries if it belongs to a
// step, and to all later ones if it contains prompt tokens. k_blocks with much work are therefore split into
// parts of equal length, and their partial sums are added afterwards, in order: bitwise reproducible, and no
// block waits for another. The device decides how many splits there are; their bound follows from shapes.
#pragma once

#include "segment_attention/segment_plan.cuh"

namespace statecore {

// Work is counted in pairs of an m_block and a query head: unit h * n + i is the i-th of the n m_blocks to
// which the k_block may be visible, for head h of the group.
struct alignas(16) KeySplit {
  int32_t k_block;
  int32_t begin, end;  // of its work
  int32_t partial;     // index of its partial sums; -1: the k_block has one split, which writes the results
};

// A k_block with several splits.
struct alignas(16) SplitKBlock {
  int32_t k_block, first_partial, splits;
  int32_t unused;
};

struct DeviceSplits {
  int32_t group;   // query heads per key head
  int32_t target;  // number of splits that is about enough to keep a GPU busy
  int32_t max_splits, max_split_k_blocks, max_partials;
  int32_t* counts;  // splits, split k_blocks
  KeySplit* split;
  SplitKBlock* split_k_block;
};

DeviceSplits device_splits(const SegmentAttentionInputs& inputs, const DevicePlan& plan,
                           ScratchAllocator& scratch);

// Computes what `splits` points to, after make_plan() on the same stream.
void make_splits(const DevicePlan& plan, const DeviceSplits& splits, void* stream);

// The m_blocks [x, y) to which a k_block may be visible.
__device__ __forceinline__ int2 m_blocks_of(const DevicePlan& plan, int k_block, const TokenTile& keys) {
  if (keys.max_end == 0 || plan.first_query >= plan.keys) return make_int2(k_block, k_block);
  const int end = k_block + (keys.max_end - 1 - keys.begin) / kTileTokens + 1;
  const int row_begin = plan.cu_seqlens ? 0 : k_block / plan.tiles_per_row * plan.tiles_per_row;
  const int begin = max(k_block, row_begin + plan.first_query / kTileTokens);
  return make_int2(begin, max(begin, min(end, plan.tiles)));
}

}  // namespace statecore
