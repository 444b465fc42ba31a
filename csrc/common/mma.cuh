// Warp-level matrix products on tensor cores, d[16, 8n] += a[16, k] b[k, 8n], with one interface for three
// element types. bfloat16 and float16 are multiplied as they are. float is 3xTF32: every value is split into
// two tf32 numbers, high and low, of 11 bits each, and the sum of three products has an error of about 2^-21.
//
// Operands are loaded from tiles in shared memory, row- or column-major, or converted from accumulators. To
// keep the precision of float32 values in 16-bit operands, SplitA holds their rounded part and the remainder.
//
// Register layouts, with g = lane / 4 and t = lane % 4:
//   16x8 accumulators   rows g and g + 8, columns 2t and 2t + 1, as float[4] in row-major order
//   operands            the same rows (of a) or columns (of b) and, of every 8 consecutive k, 2t and 2t + 1.
//                       The PTX manual orders k of tf32 operands differently: here k is permuted, in a and b
//                       alike, which leaves the product unchanged.
#pragma once

#include "common/ptx.cuh"

namespace statecore {

template <class T>
constexpr int kMmaK = sizeof(T) == 2 ? 16 : 8;

__device__ __forceinline__ int lane_index() { return int(threadIdx.x) % 32; }

// The position of element i of this lane's accumulator in its 16x8 tile.
__device__ __forceinline__ int accumulator_row(int i) { return lane_index() / 4 + i / 2 * 8; }
__device__ __forceinline__ int accumulator_column(int i) { return lane_index() % 4 * 2 + i % 2; }

// The maximum over the 4 lanes that share a row of accumulators.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// ---- tiles in shared memory

// Rows of kWidth elements. The 16-byte vectors of a row are swizzled: permuted by the row index, so that the
// same column of eight consecutive rows falls into different banks. Tiles are aligned to 128 bytes.
template <class T, int kWidth>
struct Tile {
  static constexpr int kRowBytes = kWidth * int(sizeof(T)), kVectorsPerRow = kRowBytes / 16;
  static_assert(kVectorsPerRow >= 4 && (kVectorsPerRow & (kVectorsPerRow - 1)) == 0,
                "rows have 64, 128, 256 or 512 bytes");

  static constexpr int bytes(int rows) { return rows * kRowBytes; }

  // Byte offset from the start of the tile.
  __device__ static __forceinline__ int offset(int row, int column) {
    const int byte = column * int(sizeof(T)), swizzle = kVectorsPerRow == 4 ? row / 2 & 3 : row & 7;
    return row * kRowBytes + (byte ^ swizzle * 16);
  }
};

// Starts an asynchronous copy of rows [0, valid_rows) and columns [0, valid_width) from global memory to a
// [kRows, kWidth] tile, whose other elements are zero-filled. valid_width is a multiple of 16, and rows are
// aligned to 16 bytes. All kThreads threads must call it, and then cp_async_wait() and a barrier.
template <class T, int kRows, int kWidth, int kThreads>
__device__ __forceinline__ void load_tile(unsigned char* tile, const T* first_row, int64_t row_stride,
                                          int valid_rows, int valid_width) {
  using Tile = Tile<T, kWidth>;
  constexpr int kPerVector = 16 / int(sizeof(T));
  static_assert(kRows * Tile::kVectorsPerRow % kThreads == 0, "the tile is divided evenly among the threads");
  const uint32_t base = shared_address(tile);
  const int thread = opaque(int(threadIdx.x) % kThreads);
#pragma unroll
  for (int i = 0; i < kRows * Tile::kVectorsPerRow / kThreads; ++i) {
    const int vector = i * kThreads + thread;
    const int row = vector / Tile::kVectorsPerRow, column = vector % Tile::kVectorsPerRow * kPerVector;
    const bool valid = row < valid_rows && column < valid_width;
    cp_async(base + Tile::offset(row, column), valid ? first_row + row * row_stride + column : first_row,
             !valid);
  }
}

// ---- operands
template <class T>
struct OperandA {
  uint32_t r[4];
};
template <class T>
struct OperandB {
  uint32_t r[2];
};
// high + low, with about twice the precision of OperandA.
template <class T>
struct SplitA {
  OperandA<T> high, low;
};
template <>
struct OperandA<float> {
  uint32_t high[4], low[4];
};
template <>
struct OperandB<float> {
  uint32_t high[2], low[2];
};
template <>
struct SplitA<float> : OperandA<float> {};

// x = high + low; tensor cores read the 11 leading bits of each.
__device__ __forceinline__ void split_tf32(float x, uint32_t& high, uint32_t& low) {
  high = __float_as_uint(x) & 0xffffe000u;
  low = __float_as_uint(x - __uint_as_float(high));
}

template <class T>
__device__ __forceinline__ void split_pair(float x, float y, uint32_t& high, uint32_t& low) {
  high = pack<T>(x, y);
  const float2 rounded = unpack<T>(high);
  low = pack<T>(x - rounded.x, y - rounded.y);
}

// a[m][k] = tile[row + m][column + k], or with kTransposed tile[row + k][column + m].
template <bool kTransposed, class T, int kWidth>
__device__ __forceinline__ void load_operand(OperandA<T>& a, Tile<T, kWidth>, const unsigned char* tile,
                                             int row, int column) {
  const int lane = sizeof(T) == 2 ? lane_index() : opaque(lane_index());
  if constexpr (sizeof(T) == 2) {
    // The four matrices: rows 0-7 and rows 8-15 at k = 0, then at k = 8.
    const int m = lane % 8 + lane / 8 % 2 * 8, k = lane / 16 * 8;
    const int at_row = kTransposed ? row + lane % 8 + k : row + m;
    const int at_column = kTransposed ? column + lane / 8 % 2 * 8 : column + k;
    ldmatrix<kTransposed>(a.r, shared_address(tile) + Tile<T, kWidth>::offset(at_row, at_column));
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int m = lane / 4 + 8 * i, k = lane % 4 * 2;
      float2 x;
      if constexpr (kTransposed) {
        x.x = *reinterpret_cast<const float*>(tile + Tile<T, kWidth>::offset(row + k, column + m));
        x.y = *reinterpret_cast<const float*>(tile + Tile<T, kWidth>::offset(row + k + 1, column + m));
      } else {
        x = *reinterpret_cast<const float2*>(tile + Tile<T, kWidth>::offset(row + m, column + k));
      }
      split_tf32(x.x, a.high[i], a.low[i]);
      split_tf32(x.y, a.high[i + 2], a.low[i + 2]);
    }
  }
}

// Two adjacent operands of 8 columns each: b[k][n] = tile[row + n][column + k], or with kTransposed
// tile[row + k][column + n].
template <bool kTransposed, class T, int kWidth>
__device__ __forceinline__ void load_operand(OperandB<T> (&b)[2], Tile<T, kWidth>, const unsigned char* tile,
                                             int row, int column) {
  const int lane = sizeof(T) == 2 ? lane_index() : opaque(lane_index());
  if constexpr (sizeof(T) == 2) {
    // The four matrices: columns 0-7 at k = 0 and k = 8, then columns 8-15.
    const int k = lane / 8 % 2 * 8, n = lane / 16 * 8;
    const int at_row = row + lane % 8 + (kTransposed ? k : n);
    const int at_column = column + (kTransposed ? n : k);
    uint32_t r[4];
    ldmatrix<kTransposed>(r, shared_address(tile) + Tile<T, kWidth>::offset(at_row, at_column));
    b[0].r[0] = r[0], b[0].r[1] = r[1], b[1].r[0] = r[2], b[1].r[1] = r[3];
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = lane / 4 + 8 * i, k = lane % 4 * 2;
      float2 x;
      if constexpr (kTransposed) {
        x.x = *reinterpret_cast<const float*>(tile + Tile<T, kWidth>::offset(row + k, column + n));
        x.y = *reinterpret_cast<const float*>(tile + Tile<T, kWidth>::offset(row + k + 1, column + n));
      } else {
        x = *reinterpret_cast<const float2*>(tile + Tile<T, kWidth>::offset(row + n, column + k));
      }
      split_tf32(x.x, b[i].high[0], b[i].low[0]);
      split_tf32(x.y, b[i].high[1], b[i].low[1]);
    }
  }
}

// Converts kMmaK<T> columns of accumulators to an operand with that k: one 16x8 tile for float; two for
// 16-bit elements, with rounding.
template <class T>
__device__ __forceinline__ void pack_accumulators(OperandA<T>& a, const float (*tiles)[4]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a.r[i] = pack<T>(tiles[i / 2][i % 2 * 2], tiles[i / 2][i % 2 * 2 + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) split_tf32(tiles[0][i % 2 * 2 + i / 2], a.high[i], a.low[i]);
  }
}

// The same without rounding.
template <class T>
__device__ __forceinline__ void pack_accumulators(SplitA<T>& a, const float (*tiles)[4]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      split_pair<T>(tiles[i / 2][i % 2 * 2], tiles[i / 2][i % 2 * 2 + 1], a.high.r[i], a.low.r[i]);
  } else {
    pack_accumulators(static_cast<OperandA<float>&>(a), tiles);
  }
}

// a[m][k] * factor(k) for k in [0, kMmaK<T>).
template <class T, class Factor>
__device__ __forceinline__ SplitA<T> scale_columns(const OperandA<T>& a, const Factor& factor) {
  SplitA<T> product;
  const int k = lane_index() % 4 * 2;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<T>(a.r[i]);
      const int first = k + i / 2 * 8;
      split_pair<T>(x.x * factor(first), x.y * factor(first + 1), product.high.r[i], product.low.r[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = __uint_as_float(a.high[i]) + __uint_as_float(a.low[i]);
      split_tf32(x * factor(k + i / 2), product.high[i], product.low[i]);
    }
  }
  return product;
}

// ---- products
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const OperandA<T>& a,
                                    const OperandB<T>& b STATECORE_WHERE) {
  if constexpr (sizeof(T) == 2) {
    mma_m16n8k16(T{}, d, a.r, b.r STATECORE_PASS_WHERE);
  } else {
    mma_m16n8k8_tf32(d, a.low, b.high STATECORE_PASS_WHERE);
    mma_m16n8k8_tf32(d, a.high, b.low STATECORE_PASS_WHERE);
    mma_m16n8k8_tf32(d, a.high, b.high STATECORE_PASS_WHERE);
  }
}

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const SplitA<T>& a, const OperandB<T>& b STATECORE_WHERE) {
  if constexpr (sizeof(T) == 2) {
    mma(d, a.low, b STATECORE_PASS_WHERE);
    mma(d, a.high, b STATECORE_PASS_WHERE);
  } else {
    mma(d, static_cast<const OperandA<float>&>(a), b STATECORE_PASS_WHERE);
  }
}

// ---- float32 values in tiles of T: for 16-bit elements two tiles, one of rounded values, one of remainders
template <class T>
constexpr int kParts = sizeof(T) == 2 ? 2 : 1;

// Stores x and y to columns `column` (even) and column + 1 of a row. The second tile starts part_bytes
// after the first.
template <class T, int kWidth>
__device__ __forceinline__ void store_parts(Tile<T, kWidth>, unsigned char* tile, int part_bytes, int row,
                                            int column, float x, float y) {
  unsigned char* at = tile + Tile<T, kWidth>::offset(row, column);
  if constexpr (sizeof(T) == 2) {
    uint32_t high, low;
    split_pair<T>(x, y, high, low);
    *reinterpret_cast<uint32_t*>(at) = high;
    *reinterpret_cast<uint32_t*>(at + part_bytes) = low;
  } else {
    *reinterpret_cast<float2*>(at) = make_float2(x, y);
  }
}

// Stores x and y, rounded to T, to columns `column` (even) and column + 1 of a row.
template <class T, int kWidth>
__device__ __forceinline__ void store_pair(Tile<T, kWidth>, unsigned char* tile, int row, int column, float x,
                                           float y) {
  unsigned char* at = tile + Tile<T, kWidth>::offset(row, column);
  if constexpr (sizeof(T) == 2)
    *reinterpret_cast<uint32_t*>(at) = pack<T>(x, y);
  else
    *reinterpret_cast<float2*>(at) = make_float2(x, y);
}

}  // namespace statecore
