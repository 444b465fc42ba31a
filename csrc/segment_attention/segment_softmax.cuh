// The softmax of rows of scores that come block by block, in the registers of a warp: what the forward
// kernels share whatever multiplies. Scores, weights and sums of values are accumulators of 16 rows
// (mma.cuh), of which a lane has two.
#pragma once

#include "common/mma.cuh"
#include "segment_attention/segment_tiles.cuh"

namespace statecore {

// Of the 4 lanes that share a row of accumulators.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Hides keys that come after a row's token or whose step it does not belong to. ends(column) says up to which
// token the keys first_key + column and + column + 1 are seen.
template <int kTiles, class Ends>
__device__ __forceinline__ void hide_scores(float (&score)[kTiles][4], int first_key, const int (&token)[2],
                                            const Ends& ends) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int column = 8 * n + accumulator_column(0), key = first_key + column;
    const int2 end = ends(column);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (key > token[i] || token[i] >= end.x) score[n][2 * i] = -kInfinity;
      if (key + 1 > token[i] || token[i] >= end.y) score[n][2 * i + 1] = -kInfinity;
    }
  }
}

class Softmax {
 public:
  // `scale` turns scores into units of ln 2. Positive: the highest score is looked for before it is applied,
  // as part of the exponent's multiply-add.
  __device__ __forceinline__ explicit Softmax(float scale) : scale_(scale) {}

  // Scores become weights; what has been summed before them is worth keeps[row] beside them.
  template <int kTiles>
  __device__ __forceinline__ void weigh(float (&score)[kTiles][4], float (&keeps)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float highest = top_[i];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) highest = fmaxf(highest, fmaxf(score[n][2 * i], score[n][2 * i + 1]));
      highest = quad_max(highest);
      const float shift = highest == -kInfinity ? 0 : highest * scale_;  // who has seen nobody yet
      keeps[i] = exp2_approx(top_[i] * scale_ - shift);
      top_[i] = highest;
      sum_[i] *= keeps[i];
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& weight = score[n][2 * i + j];
          weight = exp2_approx(weight * scale_ - shift);
          sum_[i] += weight;
        }
    }
  }

  // Weighted sums of values of row i become the result, 0 where nobody is there; returns the row's lse.
  template <int kTiles>
  __device__ __forceinline__ float finish(int i, bool there, float (&out)[kTiles][4]) const {
    const float total = quad_sum(sum_[i]), factor = 1 / total;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) out[n][2 * i + j] = there ? out[n][2 * i + j] * factor : 0;
    return there ? (top_[i] * scale_ + log2f(total)) * kLn2 : -kInfinity;
  }

 private:
  float scale_;
  float top_[2] = {-kInfinity, -kInfinity};  // the highest score so far, without scale
  float sum_[2] = {0, 0};                    // of weights in this lane's columns
};

}  // namespace statecore
