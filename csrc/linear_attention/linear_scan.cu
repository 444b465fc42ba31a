// The scan is sequential over the splits of a sequence and parallel in everything else: a thread has 4
// elements of all kinds of a head's states, and loads them for kLoadsAhead splits at once.
#include "common/elements.cuh"
#include "linear_attention/linear_scan.h"
#include "linear_attention/linear_splits.cuh"

namespace statecore {
namespace {

constexpr int kThreads = 64;  // sizes of states are multiples of 4 * kThreads

__device__ __forceinline__ float4 scaled(float factor, float4 x) {
  return make_float4(factor * x.x, factor * x.y, factor * x.z, factor * x.w);
}
__device__ __forceinline__ float4 fma4(float factor, float4 x, float4 sum) {
  return make_float4(fmaf(factor, x.x, sum.x), fmaf(factor, x.y, sum.y), fmaf(factor, x.z, sum.z),
                     fmaf(factor, x.w, sum.w));
}

__global__ void __launch_bounds__(kThreads) scan_splits_kernel(SplitScan p) {
  constexpr int kKinds = 3, kLoadsAhead = 4;
  const int64_t blocks_per_state = p.state_size / (4 * kThreads);
  const int64_t sequence_head = blockIdx.x / blocks_per_state;
  const int64_t n = sequence_head / p.heads, head = sequence_head % p.heads;
  const int64_t offset = (blockIdx.x % blocks_per_state * kThreads + threadIdx.x) * 4;
  const TokenRange tokens = sequence_tokens(p.splits, n);
  const int64_t first = first_split(p.splits, n, tokens);
  const int count = split_count(p.splits, tokens);
  const auto state = [&](float* states, int64_t rows, int kind, int64_t row) {
    return reinterpret_cast<float4*>(states + ((kind * rows + row) * p.heads + head) * p.state_size + offset);
  };
  const auto split = [&](int i) { return first + (p.reverse ? count - 1 - i : i); };

  float4 x[kKinds] = {};
  if (p.initial)
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind)
      if (kind < p.states)
        x[kind] =
            scaled(p.initial_factor, *state(const_cast<float*>(p.initial), p.splits.sequences, kind, n));

  for (int i = 0; i < count; i += kLoadsAhead) {
    float4 next[kLoadsAhead][kKinds] = {};  // local states, then the states behind these splits
#pragma unroll
    for (int a = 0; a < kLoadsAhead; ++a)
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind)
        if (i + a < count && kind < p.states)
          next[a][kind] = *state(p.split_states, p.splits.capacity, kind, split(i + a));
#pragma unroll
    for (int a = 0; a < kLoadsAhead; ++a) {
      if (i + a >= count) break;
      const float* m = p.transitions + (split(i + a) * p.heads + head) * 9;
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind) {
        if (kind >= p.states) break;
        *state(p.split_states, p.splits.capacity, kind, split(i + a)) = x[kind];
#pragma unroll
        for (int from = 0; from < kKinds; ++from)
          if (from < p.states) next[a][kind] = fma4(m[3 * kind + from], x[from], next[a][kind]);
      }
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind) x[kind] = next[a][kind];
    }
  }

  if (p.final)
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind)
      if (kind < p.states) *state(p.final, p.splits.sequences, kind, n) = scaled(p.final_factor, x[kind]);
}

}  // namespace

void launch_split_scan(const SplitScan& p, void* stream) {
  const int64_t blocks = p.splits.sequences * p.heads * (p.state_size / (4 * kThreads));
  if (blocks == 0) return;
  launch("scan_splits", scan_splits_kernel,
         {dim3(checked_blocks("linear attention", blocks)), dim3(kThreads)}, stream, p);
}

}  // namespace statecore
