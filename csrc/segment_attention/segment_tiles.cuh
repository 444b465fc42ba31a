// What the forward and backward kernels share: tiles from global to shared memory, and who is hidden.
#pragma once

#include "common/mma.cuh"
#include "segment_attention/segment_plan.cuh"

namespace statecore {

constexpr int kWarps = 4, kThreads = 32 * kWarps;  // of a block: 16 rows of a tile to a warp
constexpr double kLog2e = 1.4426950408889634;
constexpr float kLn2 = 0.693147181f;
constexpr float kInfinity = __builtin_inff();

// Kernels exist for widths padded to 128 and, of 16-bit elements, whose speed counts, to 64.
template <class T>
constexpr bool kHasNarrowKernels = sizeof(T) == 2;

inline bool is_narrow(const SegmentAttentionParams& p) { return p.key_width <= 64 && p.value_width <= 64; }

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

// Which rows of a tile are queries with somebody there.
__device__ __forceinline__ auto query_rows(const DevicePlan& plan, const TokenTile& tile, int first,
                                           const int32_t* visible_end) {
  const bool all = tile.end - tile.begin == kTileTokens && tile.begin >= plan.first_query && tile.min_end > 0;
  const int behind = tile.end, first_query = plan.first_query;
  return [=](int i) {
    return all || (first + i < behind && first + i >= first_query && visible_end[first + i] > 0);
  };
}

// Operands of 16 rows of a tile, over its whole width: in registers if kHeld, or read again each time.
template <class T, int kWidth, bool kHeld>
class RowOperands {
 public:
  __device__ __forceinline__ RowOperands(const unsigned char* tile, int row) : tile_(tile), row_(row) {}
  // Once the tile is there.
  __device__ __forceinline__ void hold() {
    if constexpr (kHeld) {
#pragma unroll
      for (int d = 0; d < kDepths; ++d) load<false>(held_[d], Tile<T, kWidth>{}, tile_, row_, d * kMmaK<T>);
    }
  }

  // x[:, n] += rows other[n, :]^T, for kOthers rows of another tile.
  template <int kOthers>
  __device__ __forceinline__ void multiply(float (&x)[kOthers / 8][4], const unsigned char* other) const {
#pragma unroll(kHeld ? kDepths : 1)
    for (int d = 0; d < kDepths; ++d) {
      OperandA<T> a;
      if constexpr (kHeld)
        a = held_[d];
      else
        load<false>(a, Tile<T, kWidth>{}, tile_, row_, d * kMmaK<T>);
#pragma unroll
      for (int n = 0; n < kOthers / 16; ++n) {
        OperandB<T> b[2];
        load<false>(b, Tile<T, kWidth>{}, other, 16 * n, d * kMmaK<T>);
        mma(x[2 * n], a, b[0]);
        mma(x[2 * n + 1], a, b[1]);
      }
    }
  }

 private:
  static constexpr int kDepths = kWidth / kMmaK<T>;
  const unsigned char* tile_;
  int row_;
  OperandA<T> held_[kHeld ? kDepths : 1];
};

// sums += weights rows, for kRows rows of a tile of T and 8 kColumns columns from `column` on. As OperandA<T>
// weights are rounded, as SplitA<T> not, for twice the products.
template <class Weights, class T, int kWidth, int kRows, int kColumns>
__device__ __forceinline__ void add_weighted_rows(float (&sums)[kColumns][4],
                                                  const float (&weights)[kRows / 8][4],
                                                  const unsigned char* rows, int column = 0) {
#pragma unroll
  for (int d = 0; d < kRows / kMmaK<T>; ++d) {
    Weights a;
    from_accumulators<T>(a, &weights[d * kMmaK<T> / 8]);
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      OperandB<T> b[2];
      load<true>(b, Tile<T, kWidth>{}, rows, d * kMmaK<T>, column + 16 * n);
      mma(sums[2 * n], a, b[0]);
      mma(sums[2 * n + 1], a, b[1]);
    }
  }
}

// A warp's 16 rows of accumulators to rows of global memory, those that keep(row of the tile) names, as
// float32 ...
template <int kColumns, class Keep>
__device__ __forceinline__ void store_rows(float* first_row, int64_t stride, int width, int warp_row,
                                           const float (&x)[kColumns][4], const Keep& keep) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp_row + accumulator_row(2 * i);
    if (!keep(row)) continue;
    float* to = first_row + row * stride + accumulator_column(0);
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
      if (8 * n < width) *reinterpret_cast<float2*>(to + 8 * n) = make_float2(x[n][2 * i], x[n][2 * i + 1]);
  }
}

// ... or rounded to T, by way of the same rows of a tile, which this warp alone uses.
template <int kColumns, class T, class Keep>
__device__ __forceinline__ void store_rows(T* first_row, int64_t stride, int width, int warp_row,
                                           const float (&x)[kColumns][4], const Keep& keep,
                                           unsigned char* tile) {
  if constexpr (sizeof(T) == 4) {
    store_rows(first_row, stride, width, warp_row, x, keep);
  } else {
    using Tile = Tile<T, 8 * kColumns>;
    __syncwarp();  // lanes may still read the operands that lay there
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        store_pair(Tile{}, tile, warp_row + accumulator_row(2 * i), 8 * n + accumulator_column(0),
                   x[n][2 * i], x[n][2 * i + 1]);
    __syncwarp();
    for (int piece = lane_index(); piece < 16 * Tile::kPieces; piece += 32) {
      const int row = warp_row + piece / Tile::kPieces, column = piece % Tile::kPieces * 8;
      if (keep(row) && column < width)
        *reinterpret_cast<uint4*>(first_row + row * stride + column) =
            *reinterpret_cast<const uint4*>(tile + Tile::offset(row, column));
    }
  }
}

// The way of a tile of queries through the keys, kKeys at a time: tiles with the prompt, then those of its
// own steps up to itself.
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
