// Shared by the forward and backward kernels: tiles between global and shared memory, products of tiles, and
// which of a tile's rows are valid or visible.
#pragma once

#include "common/mma.cuh"
#include "segment_attention/segment_plan.cuh"

namespace statecore {

constexpr int kWarps = 4, kThreads = 32 * kWarps;  // per block: a warp has 16 rows of a tile
constexpr double kLog2e = 1.4426950408889634;
constexpr float kLn2 = 0.693147181f;
constexpr float kInfinity = __builtin_inff();

// Kernels are compiled for widths padded to 128 and, for 16-bit elements, whose speed matters, to 64.
template <class T>
constexpr bool kHasNarrowKernels = sizeof(T) == 2;

inline bool is_narrow(const SegmentAttentionInputs& p) { return p.key_width <= 64 && p.value_width <= 64; }

// One head of one row of the batch: [T, D].
template <class T>
struct RowsView {
  const T* data;
  int64_t stride;
  int width;
};

template <class T>
__device__ __forceinline__ RowsView<T> rows_of(const HeadsView& x, int batch, int head, int64_t width) {
  return {static_cast<const T*>(x.data) + x.offset(batch, 0, head), x.time, int(width)};
}

// ---- tiles in shared memory
// Starts copying kRows rows from `first` on. Rows that are not valid(row) become zeros, whatever memory
// holds: probability 0 times NaN would still be NaN.
template <int kRows, int kWidth, class T, class Valid>
__device__ __forceinline__ void load_rows(unsigned char* tile, const RowsView<T>& rows, int64_t first,
                                          const Valid& valid) {
  using Tile = Tile<T, kWidth>;
  constexpr int kPerPiece = 16 / int(sizeof(T));
  static_assert(kRows * Tile::kVectorsPerRow % kThreads == 0, "threads share the tile evenly");
  const uint32_t base = shared_address(tile);
  const int column = int(threadIdx.x) % Tile::kVectorsPerRow * kPerPiece;
  static_assert(kThreads % Tile::kVectorsPerRow == 0, "a thread stays in its column");
  const bool in_width = column < rows.width;
  constexpr int kRowsAtOnce = kThreads / Tile::kVectorsPerRow;
  const int first_row = int(threadIdx.x) / Tile::kVectorsPerRow;
  const T* from = rows.data + (first + first_row) * rows.stride + column;
#pragma unroll
  for (int row = 0; row < kRows; row += kRowsAtOnce, from += kRowsAtOnce * rows.stride) {
    const bool copied = in_width && valid(row + first_row);
    cp_async(base + Tile::offset(row + first_row, column), copied ? from : rows.data, !copied);
  }
}

// Stores the rows of a warp's 16 rows of accumulators for which stored(row of the tile) holds, as float32.
template <int kColumns, class Stored>
__device__ __forceinline__ void store_rows(float* first_row, int64_t stride, int width, int warp_row,
                                           const float (&x)[kColumns][4], const Stored& stored) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp_row + accumulator_row(2 * i);
    if (!stored(row)) continue;
    float* to = first_row + row * stride + accumulator_column(0);
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
      if (8 * n < width) *reinterpret_cast<float2*>(to + 8 * n) = make_float2(x[n][2 * i], x[n][2 * i + 1]);
  }
}

// The same rounded to T, by way of the same rows of `tile`, which only this warp uses, into whole lines.
template <int kColumns, class T, class Stored>
__device__ __forceinline__ void store_rows(T* first_row, int64_t stride, int width, int warp_row,
                                           const float (&x)[kColumns][4], const Stored& stored,
                                           unsigned char* tile) {
  if constexpr (sizeof(T) == 4) {
    store_rows(first_row, stride, width, warp_row, x, stored);
  } else {
    using Tile = Tile<T, 8 * kColumns>;
    __syncwarp();  // lanes may still read operands from there
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        store_pair(Tile{}, tile, warp_row + accumulator_row(2 * i), 8 * n + accumulator_column(0),
                   x[n][2 * i], x[n][2 * i + 1]);
    __syncwarp();
    for (int piece = lane_index(); piece < 16 * Tile::kVectorsPerRow; piece += 32) {
      const int row = warp_row + piece / Tile::kVectorsPerRow, column = piece % Tile::kVectorsPerRow * 8;
      if (stored(row) && column < width)
        *reinterpret_cast<uint4*>(first_row + row * stride + column) =
            *reinterpret_cast<const uint4*>(tile + Tile::offset(row, column));
    }
  }
}

// ---- products
// The left operand of x = rows other^T: 16 rows of a tile. In registers, or read again for every product.
template <class T, int kWidth, bool kInRegisters>
class RowOperands {
 public:
  __device__ __forceinline__ RowOperands(const unsigned char* tile, int row) : tile_(tile), row_(row) {}

  // Once the tile has landed.
  __device__ __forceinline__ void load_registers() {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int d = 0; d < kDepths; ++d)
        load_operand<false>(a_[d], Tile<T, kWidth>{}, tile_, row_, d * kMmaK<T>);
    }
  }

  // x[:, n] += rows other[n, :]^T, for kOthers rows of another tile.
  template <int kOthers>
  __device__ __forceinline__ void multiply(float (&x)[kOthers / 8][4], const unsigned char* other) const {
#pragma unroll(kInRegisters ? kDepths : 1)
    for (int d = 0; d < kDepths; ++d) {
      OperandA<T> a;
      if constexpr (kInRegisters)
        a = a_[d];
      else
        load_operand<false>(a, Tile<T, kWidth>{}, tile_, row_, d * kMmaK<T>);
#pragma unroll
      for (int n = 0; n < kOthers / 16; ++n) {
        OperandB<T> b[2];
        load_operand<false>(b, Tile<T, kWidth>{}, other, 16 * n, d * kMmaK<T>);
        mma(x[2 * n], a, b[0]);
        mma(x[2 * n + 1], a, b[1]);
      }
    }
  }

 private:
  static constexpr int kDepths = kWidth / kMmaK<T>;
  const unsigned char* tile_;
  int row_;
  OperandA<T> a_[kInRegisters ? kDepths : 1];
};

// sums += a rows, for kRows rows of a tile of T and 8 kColumns of its columns from `column` on. As Operand =
// OperandA<T>, a is rounded to T; as SplitA<T> it is not, for twice the products.
template <class Operand, class T, int kWidth, int kRows, int kColumns>
__device__ __forceinline__ void accumulate_product(float (&sums)[kColumns][4], const float (&a)[kRows / 8][4],
                                                   const unsigned char* rows, int column = 0) {
#pragma unroll
  for (int d = 0; d < kRows / kMmaK<T>; ++d) {
    Operand operand;
    pack_accumulators<T>(operand, &a[d * kMmaK<T> / 8]);
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      OperandB<T> b[2];
      load_operand<true>(b, Tile<T, kWidth>{}, rows, d * kMmaK<T>, column + 16 * n);
      mma(sums[2 * n], operand, b[0]);
      mma(sums[2 * n + 1], operand, b[1]);
    }
  }
}

// ---- which rows are valid or visible
// Predicate: token first + i is a query of the tile and not padding.
__device__ __forceinline__ auto valid_queries(const DevicePlan& plan, const TokenTile& tile, int first,
                                              const int32_t* visible_end) {
  const bool all = tile.end - tile.begin == kTileTokens && tile.begin >= plan.first_query && tile.min_end > 0;
  const int tile_end = tile.end, first_query = plan.first_query;
  return [=](int i) {
    return all || (first + i < tile_end && first + i >= first_query && visible_end[first + i] > 0);
  };
}

// Predicate: key first + i of the k_block is visible to some query of the m_block.
__device__ __forceinline__ auto visible_keys(const TokenTile& queries, const TokenTile& keys, int first,
                                             const int32_t* visible_end) {
  const bool all = keys.end - keys.begin == kTileTokens && keys.min_end > queries.begin;
  const int keys_end = keys.end, first_query = queries.begin;
  return [=](int i) { return all || (first + i < keys_end && visible_end[first + i] > first_query); };
}

// Whether every key is visible to every query, so that no mask is needed.
__device__ __forceinline__ bool fully_visible(const TokenTile& queries, const TokenTile& keys) {
  return keys.end - keys.begin == kTileTokens && keys.end <= queries.begin + 1 && keys.min_end >= queries.end;
}

// The keys that an m_block visits, kKeys at a time: k_blocks of the prompt, then from its first step on.
template <int kKeys>
class KeyIterator {
 public:
  __device__ __forceinline__ KeyIterator(const DevicePlan& plan, const TokenTile& queries, int m_block)
      : prompt_end_(queries.prompt_end), own_begin_(queries.own_begin), last_(m_block) {
    k_block_ = queries.prompt_begin < prompt_end_ ? queries.prompt_begin : own_begin_;
    keys = plan.tile[min(k_block_, last_)];
  }
  __device__ __forceinline__ bool done() const { return k_block_ > last_; }
  __device__ __forceinline__ int first_key() const { return keys.begin + offset_; }
  __device__ __forceinline__ void advance(const DevicePlan& plan) {
    offset_ += kKeys;
    if (offset_ < kTileTokens) return;
    offset_ = 0;
    k_block_ = k_block_ + 1 == prompt_end_ ? own_begin_ : k_block_ + 1;
    keys = plan.tile[min(k_block_, last_)];
  }

  TokenTile keys;  // the current k_block

 private:
  int prompt_end_, own_begin_, last_, k_block_, offset_ = 0;
};

}  // namespace statecore
