// Decay inside a chunk of a sweep. G_i is the sum of log2 e^g over the chunk's tokens up to i, g = log_decay.
#pragma once

#include "common/mma.cuh"

namespace statecore {

constexpr float kLog2E = 1.4426950408889634f;

// In shared memory, for the tokens of a chunk.
template <int kTokens>
struct SweepDecay {
  float2 cumulative[kTokens];  // G_i as high + low: it is large, but differences of neighbours are small
  float write[kTokens];        // weight of what goes into the state: e^{G_last - G_i}, in reverse e^{G_i}
  float read[kTokens];         // weight of what is read from it: e^{G_i}, in reverse e^{G_last - G_i}
  float total;                 // e^{G_last}, of the state itself
};

// Sum of two numbers that are given as high + low, exact to about 2^-48.
__device__ __forceinline__ float2 compensated_sum(float2 a, float2 b) {
  const float sum = a.x + b.x, from_b = sum - a.x;
  const float error = (a.x - (sum - from_b)) + (b.x - from_b);
  return make_float2(sum, a.y + b.y + error);
}
__device__ __forceinline__ float compensated_difference(float2 a, float2 b) {
  return (a.x - b.x) + (a.y - b.y);
}

// A warp's prefix scan over a chunk. Lane l has the tokens kPerLane l, kPerLane l + 1, ...; log2_decay is
// log2 of the factor that each of them applies to the state.
template <int kPerLane>
__device__ __forceinline__ void scan_decay(const float (&log2_decay)[kPerLane], bool reverse,
                                           SweepDecay<32 * kPerLane>& decay) {
  const int lane = lane_index();
  float2 sums[kPerLane];
  sums[0] = make_float2(log2_decay[0], 0);
#pragma unroll
  for (int i = 1; i < kPerLane; ++i) sums[i] = compensated_sum(sums[i - 1], make_float2(log2_decay[i], 0));
  float2 inclusive = sums[kPerLane - 1];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float2 before = make_float2(__shfl_up_sync(0xffffffffu, inclusive.x, distance),
                                      __shfl_up_sync(0xffffffffu, inclusive.y, distance));
    if (lane >= distance) inclusive = compensated_sum(before, inclusive);
  }
  const float2 last =
      make_float2(__shfl_sync(0xffffffffu, inclusive.x, 31), __shfl_sync(0xffffffffu, inclusive.y, 31));
  float2 exclusive =
      make_float2(__shfl_up_sync(0xffffffffu, inclusive.x, 1), __shfl_up_sync(0xffffffffu, inclusive.y, 1));
  if (lane == 0) exclusive = make_float2(0, 0);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int token = kPerLane * lane + i;
    const float2 sum = compensated_sum(exclusive, sums[i]);
    const float from_start = exp2_approx(sum.x + sum.y);
    const float to_end = exp2_approx(compensated_difference(last, sum));
    decay.cumulative[token] = sum;
    decay.write[token] = reverse ? from_start : to_end;
    decay.read[token] = reverse ? to_end : from_start;
  }
  if (lane == 0) decay.total = exp2_approx(last.x + last.y);
}

}  // namespace statecore
