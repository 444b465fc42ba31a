// The mask on the device: made once per call by two small kernels, in integers, and shared by all heads.
//
// Tokens are divided into tiles of 64 consecutive tokens of one sequence, the first of which starts where the
// sequence does. A tile is both an m_block (queries) and a k_block (keys), so one index serves both.
//
// Ids do not decrease within a sequence, so key j is visible to the queries [j, visible_end[j]), and an
// m_block visits two runs of k_blocks: those that contain prompt tokens, and those from the start of its
// first step up to itself. Whatever else these contain is masked: j <= i < visible_end[j].
//
// Tile indices follow from shapes alone: packed sequence n, which starts at token c, owns the tiles from c /
// 64 + n on. That leaves a few tiles unused (begin == end), for which blocks return at once.
//
// Decreasing ids or an invalid cu_seqlens give wrong results, but no access out of bounds.
#pragma once

#include "common/cuda.cuh"
#include "common/cuda_scratch.h"
#include "segment_attention/segment_attention.h"

namespace statecore {

constexpr int kTileTokens = 64;

// Positions are keys of a row of the batch; the queries are the last of them.
struct alignas(16) TokenTile {
  int32_t batch, begin, end;
  int32_t min_end, max_end;          // of visible_end over the tile; min_end is 0 where the tile has padding
  int32_t prompt_begin, prompt_end;  // k_blocks with prompt tokens, up to the tile itself
  int32_t own_begin;                 // first k_block of its own steps; the last is the tile itself
};

// The ids of a tile's valid tokens, as far as other tiles of the sequence need them.
struct alignas(16) TileIds {
  int32_t first;      // smallest id; INT32_MAX if all tokens are padding
  int32_t first_end;  // position after the last token with that id
  int32_t last;       // largest id; -1 if all tokens are padding
  int32_t unused;
};

struct DevicePlan {
  int32_t keys, first_query;  // of a row
  int32_t sequences;
  const int32_t* cu_seqlens;  // or null: every row of the batch is one sequence
  const int32_t* step_ids;
  int64_t ids_batch;
  int32_t tiles;                               // in all
  int32_t tiles_per_row, query_tiles_per_row;  // without cu_seqlens; the tiles with queries come last

  int32_t* visible_end;  // [B, Tk]; 0 for padding
  TileIds* ids;          // [tiles]
  TokenTile* tile;       // [tiles]

  // Tiles with queries in launch order: those that see most come first.
  __device__ __forceinline__ int query_tile(int i) const {
    if (cu_seqlens) return tiles - 1 - i;
    const int rows = tiles / tiles_per_row;
    return i % rows * tiles_per_row + tiles_per_row - 1 - i / rows;
  }
};

// Takes 5 bytes per token and 48 per sequence.
DevicePlan device_plan(const SegmentAttentionInputs& inputs, ScratchAllocator& scratch);

// Number of tiles with queries.
inline int64_t query_tiles(const SegmentAttentionInputs& p, const DevicePlan& plan) {
  if (p.queries == 0) return 0;
  return p.cu_seqlens ? plan.tiles : p.batch * plan.query_tiles_per_row;
}

// Computes what `plan` points to.
void make_plan(const DevicePlan& plan, void* stream);

}  // namespace statecore
