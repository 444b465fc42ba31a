// Where kernels find splits and their chunks (linear_splits.h).
#pragma once

#include "common/cuda.cuh"
#include "linear_attention/linear_splits.h"

namespace statecore {

struct TokenRange {
  int32_t begin, end;
};

// Tokens of sequence n. Invalid offsets lead to wrong results, but never outside the row.
__device__ __forceinline__ TokenRange sequence_tokens(const Splits& s, int64_t n) {
  if (!s.cu_seqlens) return {0, int32_t(s.tokens)};
  const int32_t begin = min(max(s.cu_seqlens[n], 0), int32_t(s.tokens));
  return {begin, min(max(s.cu_seqlens[n + 1], begin), int32_t(s.tokens))};
}

// Index of sequence n's first split. Packed sequences need no prefix sum over their numbers of splits: with
// L the length of a split, ceil((end - begin) / L) indices fit between floor(begin / L) + n and the next
// sequence's floor(end / L) + n + 1.
__device__ __forceinline__ int64_t first_split(const Splits& s, int64_t n, TokenRange tokens) {
  if (s.length == 0) return n;
  return s.cu_seqlens ? tokens.begin / s.length + n : n * ((s.tokens + s.length - 1) / s.length);
}

__device__ __forceinline__ int32_t split_count(const Splits& s, TokenRange tokens) {
  if (s.length == 0) return 1;
  return int32_t((int64_t(tokens.end) - tokens.begin + s.length - 1) / s.length);
}

// Index of sequence n's first planned chunk: it has at most one per token, and one that marks the end.
__device__ __forceinline__ int64_t first_planned_chunk(const Splits& s, int64_t n, TokenRange tokens) {
  return (s.cu_seqlens ? 0 : n * s.tokens) + tokens.begin + n;
}

// x, which is the same in all lanes. The shuffle tells the compiler so: branches on it do not count as
// divergent.
__device__ __forceinline__ int32_t warp_uniform(int32_t x) { return __shfl_sync(0xffffffffu, x, 0); }

// A split as its block sees it.
struct Split {
  int32_t sequence, row;        // sequence -1: the index is unused
  int32_t begin, end;           // tokens of the row
  const PlannedChunk* planned;  // or null
  int32_t chunks;
};

__device__ __forceinline__ Split load_split(const Splits& s, int index, int chunk_length) {
  Split split{};
  if (s.planned) {
    const PlannedSplit planned = s.planned[index];
    split.sequence = planned.sequence, split.begin = planned.begin, split.end = planned.end;
    if (split.sequence >= 0 && s.chunks) {
      split.planned = s.chunks + first_planned_chunk(s, split.sequence, sequence_tokens(s, split.sequence)) +
                      planned.first_chunk;
      split.chunks = planned.end_chunk - planned.first_chunk;
    }
  } else if (s.length == 0) {
    const TokenRange tokens = sequence_tokens(s, index);
    split.sequence = index, split.begin = tokens.begin, split.end = tokens.end;
  } else {
    const int per_row = int((s.tokens + s.length - 1) / s.length);
    split.sequence = index / per_row;
    split.begin = index % per_row * s.length;
    split.end = int32_t(min(split.begin + int64_t(s.length), s.tokens));
  }
  split.row = s.cu_seqlens ? 0 : split.sequence;
  if (!split.planned) split.chunks = (split.end - split.begin + chunk_length - 1) / chunk_length;
  split.chunks = warp_uniform(split.chunks);
  return split;
}

struct SweepChunk {
  int32_t begin, length;
  int32_t ended_step;  // as in PlannedChunk
};

// Chunk i of the split, in the order of tokens.
__device__ __forceinline__ SweepChunk load_chunk(const Split& split, int i, int chunk_length) {
  if (split.planned) {
    const PlannedChunk planned = split.planned[i];
    return {planned.begin, split.planned[i + 1].begin - planned.begin, warp_uniform(planned.ended_step)};
  }
  const int32_t begin = split.begin + i * chunk_length;
  return {begin, min(chunk_length, split.end - begin), kNoStep};
}

}  // namespace statecore
