// One block per sequence and value head: a suffix sum over its tokens, in float64, in tiles of 2048 from the
// last to the first.
#include "common/cuda.cuh"
#include "linear_attention/linear_decay_gradient.h"
#include "linear_attention/linear_splits.cuh"

namespace statecore {
namespace {

constexpr int kThreads = 256, kGroupThreads = 16, kGroups = kThreads / kGroupThreads;
constexpr int kTokensPerThread = 8, kTileTokens = kTokensPerThread * kThreads;

// Sum over the threads behind this one; `total` is that over all threads.
__device__ double block_exclusive_suffix_sum(double x, double* values, double* group_sums, double& total) {
  const int thread = int(threadIdx.x);
  __syncthreads();  // the last call has read `values`
  values[thread] = x;
  __syncthreads();
  if (thread < kGroups) {
    double sum = 0;
    for (int i = 0; i < kGroupThreads; ++i) sum += values[thread * kGroupThreads + i];
    group_sums[thread] = sum;
  }
  __syncthreads();
  double suffix = 0;
  total = 0;
  for (int i = kGroups - 1; i >= 0; --i) {
    total += group_sums[i];
    if (i > thread / kGroupThreads) suffix += group_sums[i];
  }
  for (int i = (thread / kGroupThreads + 1) * kGroupThreads - 1; i > thread; --i) suffix += values[i];
  return suffix;
}

__global__ void __launch_bounds__(kThreads, 2) decay_gradient_kernel(DecayGradient p) {
  STATECORE_SHARED(double, values, kThreads);
  STATECORE_SHARED(double, group_sums, kGroups);
  const int64_t n = blockIdx.x / unsigned(p.heads), head = blockIdx.x % unsigned(p.heads);
  const int64_t row = p.splits.cu_seqlens ? 0 : n, time = p.splits.tokens;
  const int thread = int(threadIdx.x);
  const TokenRange tokens = sequence_tokens(p.splits, n);

  double later = 0;  // <S, dS>, and the sum over the tiles behind this one
  {
    double product = 0;
    const int64_t at = (n * p.heads + head) * p.state_size;
    for (int64_t i = thread; i < p.state_size; i += kThreads)
      product += double(p.final_states[at + i]) * double(p.grad_final_states[at + i]);
    block_exclusive_suffix_sum(product, values, group_sums, later);
  }
  const int64_t tiles = (int64_t(tokens.end) - tokens.begin + kTileTokens - 1) / kTileTokens;
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t first = tokens.begin + tile * kTileTokens + kTokensPerThread * thread;
    double suffix[kTokensPerThread], sum = 0;  // within the thread, the token itself included
#pragma unroll
    for (int i = kTokensPerThread - 1; i >= 0; --i) {
      const int64_t token = first + i;
      if (token < tokens.end) {
        for (int block = 0; block < p.column_blocks; ++block) {
          const int64_t row_head = (block * p.batch + row) * p.heads + head;
          for (int g = 0; g < p.query_group; ++g)
            sum += double(p.q_dots[(row_head * p.query_group + g) * time + token]);
          sum -= double(p.k_dots[row_head * time + token]);
        }
      }
      suffix[i] = sum;
    }
    double tile_sum;
    const double behind = later + block_exclusive_suffix_sum(sum, values, group_sums, tile_sum);
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i)
      if (first + i < tokens.end)
        p.gradient[(row * time + first + i) * p.heads + head] = float(behind + suffix[i]);
    later += tile_sum;
  }
}

}  // namespace

void launch_decay_gradient(const DecayGradient& p, void* stream) {
  if (p.splits.sequences == 0) return;
  launch("decay_gradient", decay_gradient_kernel,
         {dim3(checked_blocks("linear attention", p.splits.sequences * p.heads)), dim3(kThreads)}, stream, p);
}

}  // namespace statecore
