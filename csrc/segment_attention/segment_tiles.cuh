// What the forward and backward kernels share: tiles from global to shared memory, and who is hidden.
#pragma once

#include "common/mma.cuh"
#include "segment_attention/segment_plan.cuh"

namespace statecore {

constexpr int kWarps = 4, kThreads = 32 * kWarps;  // of a block: 16 rows of a tile to a warp
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kInfinity = __builtin_inff();

// Where the rows of a [B, T, H, D] tensor lie for one row of the batch and one head.
template <class T>
struct Rows {
  const T* first;
  int64_t stride;
  int width;
};

template <class T>
__device__ __forceinline__ Rows<T> rows_of(const void* x, int64_t batch, int64_t time, int64_t head,
                                           int row_of_batch, int head_of_row, int64_t width) {
  return {static_cast<const T*>(x) + row_of_batch * batch + head_of_row * head, time, int(width)};
}

// Starts copying kRows rows from `first` on to a tile in shared memory. Rows that keep() refuses become
// zeros, whatever lies there: a product with weight 0 would still spread NaN.
template <int kRows, int kWidth, class T, class Keep>
__device__ __forceinline__ void load_rows(unsigned char* tile, const Rows<T>& rows, int64_t first,
                                          const Keep& keep) {
  using Tile = Tile<T, kWidth>;
  constexpr int kPerPiece = 16 / int(sizeof(T));
  static_assert(kRows * Tile::kPieces % kThreads == 0, "threads share the tile evenly");
  const uint32_t base = shared_address(tile);
  const int column = int(threadIdx.x) % Tile::kPieces * kPerPiece;
  static_assert(kThreads % Tile::kPieces == 0, "a thread stays in its column");
  const bool inside = column < rows.width;
  const T* from = rows.first + first * rows.stride + column;
#pragma unroll
  for (int i = 0; i < kRows * Tile::kPieces / kThreads; ++i) {
    const int row = i * (kThreads / Tile::kPieces) + int(threadIdx.x) / Tile::kPieces;
    const bool valid = inside && keep(row);
    cp_async(base + Tile::offset(row, column), valid ? from + row * rows.stride : rows.first, !valid);
  }
}

// Tiles of keys that a tile of queries visits: prompt, then own steps up to itself.
struct KeyTiles {
  int prompt_end, own_begin, last;

  __device__ __forceinline__ KeyTiles(const TokenTile& queries, int number)
      : prompt_end(queries.prompt_end), own_begin(queries.own_begin), last(number) {}
  __device__ __forceinline__ int first(const TokenTile& queries) const {
    return queries.prompt_begin < prompt_end ? queries.prompt_begin : own_begin;
  }
  __device__ __forceinline__ int after(int tile) const { return tile + 1 == prompt_end ? own_begin : tile + 1; }
};

// Whether every query of the one tile sees every key of the other.
__device__ __forceinline__ bool all_visible(const TokenTile& queries, const TokenTile& keys) {
  return keys.end - keys.begin == kTileTokens && keys.end <= queries.begin + 1 && keys.min_end >= queries.end;
}

// Whether some query of the tile sees each key of the other, so that none needs to be looked at on loading.
__device__ __forceinline__ bool none_hidden(const TokenTile& queries, const TokenTile& keys) {
  return keys.end - keys.begin == kTileTokens && keys.min_end > queries.begin;
}

}  // namespace statecore
