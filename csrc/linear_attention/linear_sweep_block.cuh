// What a block of a sweep does besides its products, shared by linear_sweep.cu (mma.sync) and
// linear_sweep_sm90.cu (wgmma): its part of the state, where that is loaded from and stored to, decay, ends
// of steps, and the epilogues that store results.
//
// A block has kSweepValues columns of the state of one state head in one split, transposed in the registers
// of four warps: rows are values, 16 per warp, columns are keys. Results are transposed in the same way.
#pragma once

#include <type_traits>

#include "common/mma.cuh"
#include "linear_attention/linear_decay.cuh"
#include "linear_attention/linear_splits.cuh"
#include "linear_attention/linear_sweep.h"

namespace statecore {

constexpr int kSweepThreads = 128, kSweepWarps = kSweepThreads / 32;

// ---- float32 numbers of any size as float16: rows are multiplied by a power of two that brings their
// largest element to 2^14, and what is computed with them is divided by it. Both are exact.
constexpr int kLargestExponent = 127 + 14;  // biased, as all exponents here

__device__ __forceinline__ int range_exponent(float largest) {  // below 2^-40 nothing is gained
  return max(int(__float_as_uint(largest) >> 23 & 255u), 127 - 40);
}
__device__ __forceinline__ float range_scale(int exponent) {
  return __uint_as_float(uint32_t(127 + kLargestExponent - exponent) << 23);
}
__device__ __forceinline__ float range_unscale(int exponent) {
  return __uint_as_float(uint32_t(exponent - kLargestExponent + 127) << 23);
}

// Of rows g (half 0) and g + 8 (half 1) of accumulators, which four lanes share.
template <int kTiles>
__device__ __forceinline__ int row_exponent(const float (&x)[kTiles][4], int half) {
  float largest = 0;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    largest = fmaxf(largest, fmaxf(fabsf(x[n][2 * half]), fabsf(x[n][2 * half + 1])));
  return range_exponent(quad_max(largest));
}

// ---- the end of a step as a matrix on (running, start, prompt), see step_end.h; reverse is its transpose,
// on their gradients
struct StepEnd {
  float raw_weight, strength, momentum;
  bool ends_prompt;

  __device__ StepEnd(int32_t step, const float* alpha, int64_t alphas)
      : strength(correction_strength(step, alpha, alphas)) {
    raw_weight = 1 - strength;
    momentum = strength != 0 ? __fdividef(strength, float(step - 1)) : 0;
    ends_prompt = step == 0;
  }
  __device__ __forceinline__ void apply(float& running, float& start, float& prompt) const {
    if (strength != 0) running = corrected(running, start, prompt, raw_weight, momentum);
    start = running;
    if (ends_prompt) prompt = running;
  }
  __device__ __forceinline__ void apply_reverse(float& running, float& start, float& prompt) const {
    const float grad = running + start;
    running = raw_weight * grad;
    start = (strength + momentum) * grad;
    prompt -= momentum * grad;
    if (ends_prompt) running += prompt, prompt = 0;
  }
};

// ---- the gate of mixed attention: segment + sigmoid(gate) x, for 16 bytes of T
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1, 1 + exp2_approx(-kLog2E * x)); }

template <class T>
__device__ __forceinline__ uint4 gated(T, uint4 x, uint4 gate, uint4 segment) {
  const auto word = [](uint32_t x, uint32_t gate, uint32_t segment) {
    if constexpr (sizeof(T) == 4) {
      return __float_as_uint(__uint_as_float(segment) + sigmoid(__uint_as_float(gate)) * __uint_as_float(x));
    } else {
      const float2 a = unpack<T>(x), g = unpack<T>(gate), s = unpack<T>(segment);
      return pack<T>(s.x + sigmoid(g.x) * a.x, s.y + sigmoid(g.y) * a.y);
    }
  };
  return make_uint4(word(x.x, gate.x, segment.x), word(x.y, gate.y, segment.y), word(x.z, gate.z, segment.z),
                    word(x.w, gate.w, segment.w));
}

// ---- the block
// opaque() keeps values that are needed once per chunk or less from occupying registers throughout.
template <class T, int kKeyWidth>
struct SweepBlock {
  static constexpr int kChunk = sweep_chunk_length(sizeof(T));
  static constexpr int kTokensPerLane = kChunk / 32;  // where a warp goes over a chunk
  using State = float[kKeyWidth / 8][4];              // a thread's accumulators
  using Out = float[kChunk / 8][4];                   // columns are tokens

  const SweepParams& p;
  int state_head, first_value, values;  // `values` columns of the state from first_value on
  Split split;

  __device__ __forceinline__ explicit SweepBlock(const SweepParams& p) : p(p) {
    const int tiles = value_tiles(p.value_width);
    state_head = int(blockIdx.x) / tiles % p.state_heads;
    first_value = int(blockIdx.x) % tiles * kSweepValues;
    values = min(p.value_width - first_value, kSweepValues);
    split = load_split(p.splits, split_index(), kChunk);
  }

  __device__ __forceinline__ int split_index() const {
    return opaque(int(blockIdx.x)) / (value_tiles(p.value_width) * p.state_heads);
  }
  __device__ __forceinline__ bool has_out() const { return p.out || p.out_float; }
  __device__ __forceinline__ bool has_decay() const { return p.log_decay.data != nullptr; }

  __device__ __forceinline__ SweepChunk chunk_at(int i) const {  // in the order of the sweep
    return load_chunk(split, p.reverse ? split.chunks - 1 - i : i, kChunk);
  }
  __device__ __forceinline__ const T* rows_of(const HeadsView& x, int head, int token) const {
    return static_cast<const T*>(x.data) + opaque(split.row) * x.batch + int64_t(token) * x.time +
           head * x.head;
  }
  // Index into [B * T, state_heads, value_width].
  __device__ __forceinline__ int64_t out_index(const SweepChunk& chunk, int token, int value) const {
    const int64_t row = int64_t(opaque(split.row)) * p.splits.tokens + chunk.begin + token;
    return (row * p.state_heads + state_head) * p.value_width + first_value + value;
  }

  // The input of scan_decay().
  __device__ __forceinline__ void load_log2_decay(const SweepChunk& chunk,
                                                  float (&log2_decay)[kTokensPerLane]) const {
    const float* from = static_cast<const float*>(p.log_decay.data) +
                        int64_t(opaque(split.row)) * p.log_decay.batch +
                        opaque(state_head) / p.log_decay.head_divisor * p.log_decay.head;
#pragma unroll
    for (int i = 0; i < kTokensPerLane; ++i) {
      const int token = kTokensPerLane * lane_index() + i;
      const float x =
          token < chunk.length ? from[int64_t(chunk.begin + token) * p.log_decay.time] * kLog2E : 0;
      log2_decay[i] = x < -300 ? -300 : x;  // 2^-300 is 0, and differences to -inf would be NaN
    }
  }

  // -- states: the running one is in registers, start and prompt are in p.step_states
  __device__ __forceinline__ float* state_pointer(const SweepStates& states, int kind) const {
    return states.data + kind * states.kind + int64_t(split_index()) * states.split +
           int64_t(state_head / states.head_divisor) * states.head;
  }
  template <class Body>
  __device__ __forceinline__ void for_each_element(const SweepStates& states, const Body& body) const {
    const int first_row = opaque(first_value + 16 * (int(threadIdx.x) / 32) + accumulator_row(0));
    const int first_column = opaque(accumulator_column(0));
#pragma unroll
    for (int n = 0; n < kKeyWidth / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int value = first_row + i / 2 * 8, key = 8 * n + first_column + i % 2;
        body(n, i, value < p.value_width && key < p.key_width, value * states.value + key * states.key);
      }
  }
  __device__ __forceinline__ float* step_state(int kind) const {
    return p.step_states + (int64_t(opaque(int(blockIdx.x))) * 2 + kind - 1) * (kSweepValues * kKeyWidth) +
           threadIdx.x;
  }
  __device__ static __forceinline__ int step_state_index(int n, int i) { return (n * 4 + i) * kSweepThreads; }

  __device__ __forceinline__ void load_states(State& state) const {
    const float* initial = p.initial.data ? state_pointer(p.initial, 0) : nullptr;
    for_each_element(p.initial, [&](int n, int i, bool valid, int at) {
      state[n][i] = initial && valid ? initial[at] * p.initial.factor : 0;
    });
    if (p.states != 3) return;
    for (int kind = 1; kind < 3; ++kind) {
      const float* from = initial ? state_pointer(p.initial, kind) : nullptr;
      float* to = step_state(kind);
      for_each_element(p.initial, [&](int n, int i, bool valid, int at) {
        to[step_state_index(n, i)] = from && valid ? from[at] * p.initial.factor : 0;
      });
    }
  }

  __device__ __forceinline__ void store_states(const State& state) const {
    if (!p.final.data || state_head % p.final.head_divisor != 0) return;
    for (int kind = 0; kind < p.states; ++kind) {
      float* to = state_pointer(p.final, kind);
      const float* from = kind > 0 ? step_state(kind) : nullptr;
      for_each_element(p.final, [&](int n, int i, bool valid, int at) {
        if (valid) to[at] = (kind == 0 ? state[n][i] : from[step_state_index(n, i)]) * p.final.factor;
      });
    }
  }

  // Thread 0 accumulates the split's transition.
  __device__ __forceinline__ void init_transition(float* transition) const {
    if (p.transitions && threadIdx.x == 0)
      for (int i = 0; i < 9; ++i) transition[i] = i % 4 == 0 ? 1 : 0;
  }
  __device__ __forceinline__ void store_transition(const float* transition) const {
    if (!p.transitions || threadIdx.x != 0 || first_value != 0) return;
    float* to = p.transitions + (int64_t(split_index()) * p.state_heads + state_head) * 9;
    for (int i = 0; i < 9; ++i) to[i] = transition[i];
  }

  __device__ __forceinline__ void end_step(int32_t step, State& state, float* transition) const {
    const StepEnd end(step, p.alpha, p.alphas);
    float *const start = step_state(1), *const prompt = step_state(2);
    if (p.reverse) {
#pragma unroll
      for (int n = 0; n < kKeyWidth / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          end.apply_reverse(state[n][i], start[step_state_index(n, i)], prompt[step_state_index(n, i)]);
    } else {
#pragma unroll
      for (int n = 0; n < kKeyWidth / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          end.apply(state[n][i], start[step_state_index(n, i)], prompt[step_state_index(n, i)]);
    }
    if (p.transitions && threadIdx.x == 0)
      for (int i = 0; i < 3; ++i) {
        if (p.reverse)
          end.apply_reverse(transition[i], transition[3 + i], transition[6 + i]);
        else
          end.apply(transition[i], transition[3 + i], transition[6 + i]);
      }
  }

  // -- epilogues
  // A warp has 16 columns of a tile [token, value] to itself, in which results are transposed into rows.
  // Lanes have 16 bytes of a row each.
  using Values = Tile<T, kSweepValues>;
  static constexpr int kElementsPerLane = 16 / int(sizeof(T)), kLanesPerRow = 16 / kElementsPerLane;

  // Results of padding.
  __device__ __forceinline__ void store_zeros(const SweepChunk& chunk) const {
    if (!has_out()) return;
    for (int i = int(threadIdx.x); i < chunk.length * values; i += kSweepThreads) {
      const int64_t to = out_index(chunk, i / values, i % values);
      if (p.out) set(static_cast<T*>(p.out)[to], 0);
      if (p.gated_out) set(static_cast<T*>(p.gated_out)[to], 0);
      if (p.out_float) p.out_float[to] = 0;
    }
  }

  // p.row_dots. The rows of dot_operand pass through the tile.
  __device__ __forceinline__ void store_row_dots(const SweepChunk& chunk, const Out& out,
                                                 unsigned char* tile) const {
    const int lane = opaque(lane_index()), warp = int(threadIdx.x) / 32;
    if (!p.row_dots || 16 * warp >= values) return;
    const int value = 16 * warp + lane % kLanesPerRow * kElementsPerLane;
    __syncwarp();
#pragma unroll 1
    for (int token = lane / kLanesPerRow; token < chunk.length; token += 32 / kLanesPerRow)
      *reinterpret_cast<uint4*>(tile + Values::offset(token, value)) = *reinterpret_cast<const uint4*>(
          rows_of(p.dot_operand, state_head * p.group / p.dot_operand.head_divisor, chunk.begin + token) +
          first_value + value);
    __syncwarp();
    float* const to =
        p.row_dots +
        ((int64_t(first_value / 16 + warp) * p.batch + opaque(split.row)) * p.state_heads + state_head) *
            p.splits.tokens +
        chunk.begin;
    const int first_token = opaque(accumulator_column(0)), first_row = opaque(16 * warp + accumulator_row(0));
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int token = 8 * n + first_token + odd;
        const auto operand = [&](int row) {
          return to_float(*reinterpret_cast<const T*>(tile + Values::offset(token, row)));
        };
        float sum = 0;
        if (token < chunk.length)
          sum = out[n][odd] * operand(first_row) + out[n][odd + 2] * operand(first_row + 8);
#pragma unroll
        for (int rows = 4; rows < 32; rows *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, rows);
        if (lane < 4 && token < chunk.length) to[token] = sum;
      }
    __syncwarp();
  }

  // p.out and p.gated_out, from the tile.
  __device__ __forceinline__ void store_rows(const SweepChunk& chunk, const unsigned char* tile) const {
    const int lane = opaque(lane_index());
    const int value = 16 * (int(threadIdx.x) / 32) + lane % kLanesPerRow * kElementsPerLane;
    if (value >= values) return;
#pragma unroll 1
    for (int token = lane / kLanesPerRow; token < chunk.length; token += 32 / kLanesPerRow) {
      const uint4 x = *reinterpret_cast<const uint4*>(tile + Values::offset(token, value));
      const int64_t to = out_index(chunk, token, value);
      __stcs(reinterpret_cast<uint4*>(static_cast<T*>(p.out) + to), x);
      if (!p.gated_out) continue;
      const T* gate = rows_of(p.gate, state_head, chunk.begin + token) + first_value + value;
      const T* segment = static_cast<const T*>(p.segment_out) + to;
      __stcs(reinterpret_cast<uint4*>(static_cast<T*>(p.gated_out) + to),
             gated(T{}, x, *reinterpret_cast<const uint4*>(gate), *reinterpret_cast<const uint4*>(segment)));
    }
  }

  // p.out_float, from registers: a store covers 32 bytes of each of 4 tokens.
  __device__ __forceinline__ void store_floats(const SweepChunk& chunk, const Out& out) const {
    const int first_token = opaque(accumulator_column(0));
    const int first_row = opaque(16 * (int(threadIdx.x) / 32) + accumulator_row(0));
    const int64_t time = opaque(int64_t(p.state_heads) * p.value_width);
    float* const to = p.out_float + out_index(chunk, 0, 0);
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * n + first_token + i % 2, value = first_row + i / 2 * 8;
        if (token < chunk.length && value < values) to[token * time + value] = out[n][i];
      }
  }
};

}  // namespace statecore
