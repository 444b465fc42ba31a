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
  constexpr int kRowsAtOnce = kThreads / Tile::kPieces;
  const int first_row = int(threadIdx.x) / Tile::kPieces;
  const T* from = rows.first + (first + first_row) * rows.stride + column;
#pragma unroll
  for (int row = 0; row < kRows; row += kRowsAtOnce, from += kRowsAtOnce * rows.stride) {
    const bool valid = inside && keep(row + first_row);
    cp_async(base + Tile::offset(row + first_row, column), valid ? from : rows.first, !valid);
  }
}

// The way of a tile of queries through the keys, kKeys at a time: tiles with the prompt, then those of its own
// steps up to itself.
template <int kKeys>
class KeySteps {
 public:
  __device__ __forceinline__ KeySteps(const DevicePlan& plan, const TokenTile& queries, int number)
      : prompt_end_(queries.prompt_end), own_begin_(queries.own_begin), last_(number) {
    tile_ = queries.prompt_begin < prompt_end_ ? queries.prompt_begin : own_begin_;
    keys = plan.tile[min(tile_, last_)];
  }
  __device__ __forceinline__ bool done() const { return tile_ > last_; }
  __device__ __forceinline__ int first_key() const { return keys.begin + part_; }
  __device__ __forceinline__ void advance(const DevicePlan& plan) {
    part_ += kKeys;
    if (part_ < kTileTokens) return;
    part_ = 0;
    tile_ = tile_ + 1 == prompt_end_ ? own_begin_ : tile_ + 1;
    keys = plan.tile[min(tile_, last_)];
  }

  TokenTile keys;  // the tile that the step belongs to

 private:
  int prompt_end_, own_begin_, last_, tile_, part_ = 0;
};

// Whether every query of the one tile sees every key of the other.
__device__ __forceinline__ bool all_visible(const TokenTile& queries, const TokenTile& keys) {
  return keys.end - keys.begin == kTileTokens && keys.end <= queries.begin + 1 && keys.min_end >= queries.end;
}

// Whether some query of the tile sees key first + i of the other; most tiles need not look.
__device__ __forceinline__ auto seen_by_somebody(const TokenTile& queries, const TokenTile& keys, int first,
                                                 const int32_t* visible_end) {
  const bool all = keys.end - keys.begin == kTileTokens && keys.min_end > queries.begin;
  const int behind = keys.end, from = queries.begin;
  return [=](int i) { return all || (first + i < behind && visible_end[first + i] > from); };
}

}  // namespace statecore
