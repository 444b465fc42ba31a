// What kernels on plans of linear_sweep.h have in common: where segments and chunks are, what the end of a
// step does.
#pragma once

#include "common/cuda.cuh"
#include "linear_attention/linear_sweep.h"
#include "linear_attention/step_end.h"

namespace statecore {

constexpr float kLog2E = 1.4426950408889634f;

struct TokenRange {
  int32_t begin, end;
};

// Tokens of sequence n. Wrong offsets lead to wrong results, but nowhere outside of the row.
__device__ __forceinline__ TokenRange sequence_tokens(const Segments& s, int64_t n) {
  if (!s.cu_seqlens) return {0, int32_t(s.tokens)};
  const int32_t begin = min(max(s.cu_seqlens[n], 0), int32_t(s.tokens));
  return {begin, min(max(s.cu_seqlens[n + 1], begin), int32_t(s.tokens))};
}

// The first slot of sequence n. Packed sequences are numbered without adding up what their segments are: from
// floor(begin / L) + n on there is room for ceil((end - begin) / L) before floor(end / L) + n + 1.
__device__ __forceinline__ int64_t first_slot(const Segments& s, int64_t n, TokenRange tokens) {
  if (s.length == 0) return n;
  return s.cu_seqlens ? tokens.begin / s.length + n : n * ((s.tokens + s.length - 1) / s.length);
}

__device__ __forceinline__ int32_t segment_count(const Segments& s, TokenRange tokens) {
  if (s.length == 0) return 1;
  return int32_t((int64_t(tokens.end) - tokens.begin + s.length - 1) / s.length);
}

// Planned chunks of sequence n lie from here on: at most one a token, and one that says where the last ends.
__device__ __forceinline__ int64_t first_chunk_of(const Segments& s, int64_t n, TokenRange tokens) {
  return (s.cu_seqlens ? 0 : n * s.tokens) + tokens.begin + n;
}

// x, which all lanes have: said in a way that the compiler sees, so that branches on it do not count as
// divergent.
__device__ __forceinline__ int32_t warp_uniform(int32_t x) { return __shfl_sync(0xffffffffu, x, 0); }

// Segment and chunks of a slot.
struct Span {
  int32_t sequence, row;        // sequence -1: there is nothing
  int32_t begin, end;           // tokens of the row
  const PlannedChunk* planned;  // or null
  int32_t chunks;
};

__device__ __forceinline__ Span span_of(const Segments& s, int slot, int chunk) {
  Span span{};
  if (s.planned) {
    const PlannedSegment segment = s.planned[slot];
    span.sequence = segment.sequence, span.begin = segment.begin, span.end = segment.end;
    if (span.sequence >= 0 && s.chunks) {
      span.planned = s.chunks + first_chunk_of(s, span.sequence, sequence_tokens(s, span.sequence)) +
                     segment.first_chunk;
      span.chunks = segment.end_chunk - segment.first_chunk;
    }
  } else if (s.length == 0) {
    const TokenRange tokens = sequence_tokens(s, slot);
    span.sequence = slot, span.begin = tokens.begin, span.end = tokens.end;
  } else {
    const int segments = int((s.tokens + s.length - 1) / s.length);
    span.sequence = slot / segments;
    span.begin = slot % segments * s.length;
    span.end = int32_t(min(span.begin + int64_t(s.length), s.tokens));
  }
  span.row = s.cu_seqlens ? 0 : span.sequence;
  if (!span.planned) span.chunks = (span.end - span.begin + chunk - 1) / chunk;
  span.chunks = warp_uniform(span.chunks);
  return span;
}

struct SweptChunk {
  int32_t begin, length;
  int32_t ended;
};

// The i-th chunk in the order of tokens.
__device__ __forceinline__ SweptChunk chunk_of(const Span& span, int i, int chunk) {
  if (span.planned) {
    const PlannedChunk planned = span.planned[i];
    return {planned.begin, span.planned[i + 1].begin - planned.begin, warp_uniform(planned.ended)};
  }
  const int32_t begin = span.begin + i * chunk;
  return {begin, min(chunk, span.end - begin), kNothingEnded};
}

// The end of a step as a matrix on (running, start, prompt), see step_end.h; reverse is its transpose, on
// their gradients.
struct StepEnd {
  float own, start, prompt;
  bool copies_prompt;

  __device__ StepEnd(int32_t step, const float* alpha, int64_t alphas) {
    const float strength = correction_strength(step, alpha, alphas);
    const float mean = strength != 0 ? __fdividef(strength, float(step - 1)) : 0;
    own = 1 - strength, start = strength, prompt = mean;
    copies_prompt = step == 0;
  }
  __device__ __forceinline__ void apply(float& r, float& s, float& p) const {
    if (start != 0) r = s + own * (r - s) + prompt * (s - p);
    s = r;
    if (copies_prompt) p = r;
  }
  __device__ __forceinline__ void apply_reverse(float& r, float& s, float& p) const {
    const float both = r + s;
    r = own * both;
    s = (start + prompt) * both;
    p -= prompt * both;
    if (copies_prompt) r += p, p = 0;
  }
};

// ---- host: linear_sweep_sm90.cu
bool runs_on_sm90(const Sweep& sweep);  // on the current GPU
void launch_sweep_sm90(const Sweep& sweep, unsigned blocks, void* stream);

}  // namespace statecore
