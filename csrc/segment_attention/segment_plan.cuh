// Who sees whom, on the device: made once a call by two small kernels, in integers, and shared by all heads.
//
// Tokens are cut into tiles: 64 consecutive tokens of one sequence, the first at its beginning. A tile is
// both a tile of queries and a block of keys, so that tile numbers are all that passes between the two sides.
// Ids do not decrease inside a sequence, so key j is visible to queries [j, visible_end[j]), and a tile of
// queries visits two runs of tiles of keys: those with the prompt, and those from the beginning of its first
// step up to itself. What those hold besides is hidden by the mask, j <= i < visible_end[j].
//
// Numbers come from shapes alone: sequence n of packed ones, which begins at token c, owns the tiles from
// c / 64 + n on. That leaves a tile unused here and there (begin == end), for which blocks return at once.
//
// Ids that do decrease and cu_seqlens that are none give other results, but no access out of bounds.
#pragma once

#include "common/cuda.cuh"
#include "common/cuda_scratch.h"
#include "segment_attention/segment_attention.h"

namespace statecore {

constexpr int kTileTokens = 64;

// Positions are keys of a row of the batch; queries are the last of them.
struct alignas(16) TokenTile {
  int32_t row, begin, end;
  int32_t min_end, max_end;          // of visible_end, over the tile; 0 where it has a hole
  int32_t prompt_begin, prompt_end;  // tiles of keys with prompt tokens, up to the tile itself
  int32_t own_begin;                 // first of the other tiles; the last is the tile itself
};

// What a tile's neighbours ask about the ids >= 0 in it.
struct alignas(16) TileIds {
  int32_t first, first_end;  // the smallest id (none: INT32_MAX), and the position behind its last token
  int32_t last;              // the largest (none: -1)
  int32_t unused;
};

struct DevicePlan {
  int32_t keys, first_query;  // of a row
  int32_t sequences;
  const int32_t* cu_seqlens;  // or null: every row of the batch is one sequence
  const int32_t* step_ids;
  int64_t ids_row;
  int32_t tiles, row_tiles;  // in all; in a row where rows are sequences
  int32_t query_row_tiles;   // of them, those with queries, which come last

  int32_t* visible_end;  // [B, Tk]; 0 where there is nobody
  TileIds* ids;          // [tiles]
  TokenTile* tile;       // [tiles]

  // Tiles with queries, counted so that those that see most come first.
  __device__ __forceinline__ int query_tile(int i) const {
    if (cu_seqlens) return tiles - 1 - i;
    const int rows = tiles / row_tiles;
    return i % rows * row_tiles + row_tiles - 1 - i / rows;
  }
};

// 5 bytes a token and 48 a sequence.
DevicePlan device_plan(const SegmentAttentionParams& params, ScratchAllocator& scratch);

// How many tiles have queries.
inline int64_t query_tiles(const SegmentAttentionParams& p, const DevicePlan& plan) {
  if (p.queries == 0) return 0;
  return p.cu_seqlens ? plan.tiles : p.batch * plan.query_row_tiles;
}

// Fills in what `plan` points to.
void make_plan(const DevicePlan& plan, void* stream);

}  // namespace statecore
