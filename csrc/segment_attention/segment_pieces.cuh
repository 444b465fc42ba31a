// How the gradients of keys are divided among blocks. A tile of keys is seen by few queries if it belongs to
// a step, and by all that follow if it has a prompt, so tiles with much work are cut into pieces of equal
// length, whose sums are added up afterwards, in order: the same bits on every run, and no sum that waits for
// another. How many pieces there are is decided on the device; how many there can be, by shapes alone.
#pragma once

#include "segment_attention/segment_plan.cuh"

namespace statecore {

// Work is counted in pairs of a tile of queries and a query head: number h * n + i is the i-th of the n tiles
// of queries that may see the keys, of head h of the group.
struct alignas(16) Piece {
  int32_t tile;        // of keys
  int32_t begin, end;  // of its work
  int32_t sums;        // number of the partial sums, or -1: these are all, and go to the results
};

struct alignas(16) CutTile {
  int32_t tile, first_sums, pieces;
  int32_t unused;
};

struct DevicePieces {
  int32_t group;   // query heads to a key head
  int32_t wanted;  // pieces that are about enough to keep a GPU busy
  int32_t max_pieces, max_cuts, max_sums;
  int32_t* counts;  // pieces, cut tiles
  Piece* piece;
  CutTile* cut;
};

DevicePieces device_pieces(const SegmentAttentionParams& params, const DevicePlan& plan,
                           ScratchAllocator& scratch);

// Fills in what `pieces` points to; the plan is made.
void make_pieces(const DevicePlan& plan, const DevicePieces& pieces, void* stream);

// The tiles of queries that may see a tile of keys: [begin, end).
__device__ __forceinline__ int2 seeing_tiles(const DevicePlan& plan, int number, const TokenTile& keys) {
  if (keys.max_end == 0 || plan.first_query >= plan.keys) return make_int2(number, number);
  const int end = number + (keys.max_end - 1 - keys.begin) / kTileTokens + 1;
  const int row_begin = plan.cu_seqlens ? 0 : number / plan.row_tiles * plan.row_tiles;
  const int begin = max(number, row_begin + plan.first_query / kTileTokens);
  return make_int2(begin, max(begin, min(end, plan.tiles)));
}

}  // namespace statecore
