// Online softmax over scores in accumulators of 16 rows per warp (mma.cuh), of which a lane holds two: shared
// by the forward kernels, whichever instructions they multiply with.
#pragma once

#include "common/mma.cuh"
#include "segment_attention/segment_tiles.cuh"

namespace statecore {

// Sum over the 4 lanes that share a row of accumulators.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Sets the scores of keys that a row's token does not see to -inf. visible_ends(column) are those of the keys
// first_key + column and first_key + column + 1.
template <int kTiles, class VisibleEnds>
__device__ __forceinline__ void mask_scores(float (&scores)[kTiles][4], int first_key, const int (&token)[2],
                                            const VisibleEnds& visible_ends) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int column = 8 * n + accumulator_column(0), key = first_key + column;
    const int2 end = visible_ends(column);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (key > token[i] || token[i] >= end.x) scores[n][2 * i] = -kInfinity;
      if (key + 1 > token[i] || token[i] >= end.y) scores[n][2 * i + 1] = -kInfinity;
    }
  }
}

class Softmax {
 public:
  // scale_log2 takes scores to log2 units. It is positive: the maximum is taken of unscaled scores, and the
  // scale is part of the exponent's multiply-add.
  __device__ __forceinline__ explicit Softmax(float scale_log2) : scale_log2_(scale_log2) {}

  // Turns the scores of a k_block into probabilities relative to row_max, which may grow: rescale[i] corrects
  // what was summed before.
  template <int kTiles>
  __device__ __forceinline__ void online_softmax(float (&scores)[kTiles][4], float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float row_max = row_max_[i];
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        row_max = fmaxf(row_max, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
      row_max = quad_max(row_max);
      const float shift = row_max == -kInfinity ? 0 : row_max * scale_log2_;  // -inf: all keys masked so far
      rescale[i] = exp2_approx(row_max_[i] * scale_log2_ - shift);
      row_max_[i] = row_max;
      row_sum_[i] *= rescale[i];
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = scores[n][2 * i + j];
          x = exp2_approx(x * scale_log2_ - shift);
          row_sum_[i] += x;
        }
    }
  }

  template <int kTiles>
  __device__ static __forceinline__ void rescale_o(float (&o)[kTiles][4], const float (&rescale)[2]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[n][i] *= rescale[i / 2];
  }

  // Divides row i of O by its row_sum and returns its lse; 0 and -inf where the row is padding.
  template <int kTiles>
  __device__ __forceinline__ float finalize(int i, bool valid, float (&o)[kTiles][4]) const {
    const float row_sum = quad_sum(row_sum_[i]), inverse = 1 / row_sum;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) o[n][2 * i + j] = valid ? o[n][2 * i + j] * inverse : 0;
    return valid ? (row_max_[i] * scale_log2_ + log2f(row_sum)) * kLn2 : -kInfinity;
  }

 private:
  float scale_log2_;
  float row_max_[2] = {-kInfinity, -kInfinity};  // of unscaled scores
  float row_sum_[2] = {0, 0};                    // over the lane's columns
};

}  // namespace statecore
