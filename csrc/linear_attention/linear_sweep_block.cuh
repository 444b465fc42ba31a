// A block of a sweep, whatever multiplies in it: which part of the state it has, where that comes from and
// goes to, decay, ends of steps, and how results leave. Both sweeps use it: linear_sweep.cu, which multiplies
// with mma.sync, and linear_sweep_sm90.cu.
//
// A block owns kSweepValues columns of the state of one item in one segment, transposed in registers of four
// warps: rows are values, 16 a warp, columns are keys; results are transposed in the same way.
#pragma once

#include <type_traits>

#include "common/mma.cuh"
#include "linear_attention/linear_sweep.cuh"

namespace statecore {

constexpr int kSweepThreads = 128, kSweepWarps = kSweepThreads / 32;

// ---- decay: weights of a chunk's tokens; G_i is the sum of log2 e^g over the tokens up to i
template <int kChunk>
struct ChunkDecay {
  float2 sum[kChunk];      // G_i as high + low: it is large, but differences of neighbours are small
  float to_state[kChunk];  // of what goes into the state: e^{G_last - G_i}, in reverse e^{G_i}
  float of_state[kChunk];  // of what is read from it: e^{G_i}, in reverse e^{G_last - G_i}
  float total;             // e^{G_last}
};

// high + low of a sum that is exact to about 2^-48.
__device__ __forceinline__ float2 plus(float2 a, float2 b) {
  const float sum = a.x + b.x, from_b = sum - a.x;
  const float error = (a.x - (sum - from_b)) + (b.x - from_b);
  return make_float2(sum, a.y + b.y + error);
}
__device__ __forceinline__ float difference(float2 a, float2 b) { return (a.x - b.x) + (a.y - b.y); }

// By one warp, whose lane l has the tokens kOwn l, kOwn l + 1, ..., and log2 of what each leaves of the
// state.
template <int kOwn>
__device__ __forceinline__ void store_decays(const float (&log_decays)[kOwn], bool reverse,
                                             ChunkDecay<32 * kOwn>& to) {
  const int lane = lane_index();
  float2 sums[kOwn];
  sums[0] = make_float2(log_decays[0], 0);
#pragma unroll
  for (int i = 1; i < kOwn; ++i) sums[i] = plus(sums[i - 1], make_float2(log_decays[i], 0));
  float2 until = sums[kOwn - 1];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float2 before = make_float2(__shfl_up_sync(0xffffffffu, until.x, distance),
                                      __shfl_up_sync(0xffffffffu, until.y, distance));
    if (lane >= distance) until = plus(before, until);
  }
  const float2 last =
      make_float2(__shfl_sync(0xffffffffu, until.x, 31), __shfl_sync(0xffffffffu, until.y, 31));
  float2 before =
      make_float2(__shfl_up_sync(0xffffffffu, until.x, 1), __shfl_up_sync(0xffffffffu, until.y, 1));
  if (lane == 0) before = make_float2(0, 0);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int token = kOwn * lane + i;
    const float2 sum = plus(before, sums[i]);
    const float from_start = exp2_approx(sum.x + sum.y), to_end = exp2_approx(difference(last, sum));
    to.sum[token] = sum;
    to.to_state[token] = reverse ? from_start : to_end;
    to.of_state[token] = reverse ? to_end : from_start;
  }
  if (lane == 0) to.total = exp2_approx(last.x + last.y);
}

// ---- numbers of any size as float16: rows are multiplied by a power of two that brings their largest
// element to 2^14, and what is computed with them is divided by it. Both are exact.
constexpr int kLargestExponent = 127 + 14;
__device__ __forceinline__ int range_exponent(float largest) {  // biased; below 2^-40 nothing is gained
  return max(int(__float_as_uint(largest) >> 23 & 255u), 127 - 40);
}
__device__ __forceinline__ float into_range(int exponent) {
  return __uint_as_float(uint32_t(127 + kLargestExponent - exponent) << 23);
}
__device__ __forceinline__ float out_of_range(int exponent) {
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

// ---- y = segment + sigmoid(gate) x
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1, 1 + exp2_approx(-kLog2E * x)); }

// For 16 bytes of T.
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
template <class T, int kKeyWidth>
struct SweepBlock {
  static constexpr int kChunk = sizeof(T) == 2 ? 64 : 32;
  static constexpr int kOwn = kChunk / 32;  // tokens of a lane, where a warp has a chunk
  using State = float[kKeyWidth / 8][4];    // accumulators; of a thread
  using Out = float[kChunk / 8][4];         // columns are tokens

  const Sweep& p;
  int item, first_value, values;  // columns of the state
  Span span;

  __device__ __forceinline__ explicit SweepBlock(const Sweep& p) : p(p) {
    const int slices = (p.value_width + kSweepValues - 1) / kSweepValues;
    item = int(blockIdx.x) / slices % p.items;
    first_value = int(blockIdx.x) % slices * kSweepValues;
    values = min(p.value_width - first_value, kSweepValues);
    span = span_of(p.segments, slot(), kChunk);
  }

  // Of the segment. opaque(), in this struct: what is needed once a chunk or less is not held in registers.
  __device__ __forceinline__ int slot() const {
    return opaque(int(blockIdx.x)) / ((p.value_width + kSweepValues - 1) / kSweepValues * p.items);
  }

  __device__ __forceinline__ bool has_out() const { return p.out || p.out_float; }
  __device__ __forceinline__ bool decaying() const { return p.log_decay.data != nullptr; }

  __device__ __forceinline__ SweptChunk chunk_at(int i) const {  // in the order of the sweep
    return chunk_of(span, p.reverse ? span.chunks - 1 - i : i, kChunk);
  }
  __device__ __forceinline__ const T* rows_of(const HeadsView& x, int head, int token) const {
    return static_cast<const T*>(x.data) + opaque(span.row) * x.batch + int64_t(token) * x.time +
           head * x.head;
  }
  // Of [B * T, items, value_width].
  __device__ __forceinline__ int64_t at_out(const SweptChunk& chunk, int token, int value) const {
    const int64_t row = int64_t(opaque(span.row)) * p.segments.tokens + chunk.begin + token;
    return (row * p.items + item) * p.value_width + first_value + value;
  }

  __device__ __forceinline__ void load_decays(const SweptChunk& chunk, float (&log_decays)[kOwn]) const {
    const float* from = static_cast<const float*>(p.log_decay.data) +
                        int64_t(opaque(span.row)) * p.log_decay.batch +
                        opaque(item) / p.log_decay.shared * p.log_decay.head;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int token = kOwn * lane_index() + i;
      const float x =
          token < chunk.length ? from[int64_t(chunk.begin + token) * p.log_decay.time] * kLog2E : 0;
      log_decays[i] = x < -300 ? -300 : x;  // 2^-300 is 0, and differences to -inf are no numbers
    }
  }

  // -- states; the first is in registers, start and prompt of steps are in p.step_states
  __device__ __forceinline__ float* at_state(const SweepStates& states, int kind) const {
    return states.data + kind * states.kind + int64_t(slot()) * states.slot +
           int64_t(item / states.shared) * states.head;
  }
  template <class Body>
  __device__ __forceinline__ void each_element(const SweepStates& states, const Body& body) const {
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
  __device__ static __forceinline__ int in_step_state(int n, int i) { return (n * 4 + i) * kSweepThreads; }

  __device__ __forceinline__ void load_states(State& state) const {
    const float* initial = p.initial.data ? at_state(p.initial, 0) : nullptr;
    each_element(p.initial, [&](int n, int i, bool valid, int at) {
      state[n][i] = initial && valid ? initial[at] * p.initial.factor : 0;
    });
    if (p.states != 3) return;
    for (int kind = 1; kind < 3; ++kind) {
      const float* from = initial ? at_state(p.initial, kind) : nullptr;
      float* to = step_state(kind);
      each_element(p.initial, [&](int n, int i, bool valid, int at) {
        to[in_step_state(n, i)] = from && valid ? from[at] * p.initial.factor : 0;
      });
    }
  }

  __device__ __forceinline__ void store_states(const State& state) const {
    if (!p.final.data || item % p.final.shared != 0) return;
    for (int kind = 0; kind < p.states; ++kind) {
      float* to = at_state(p.final, kind);
      const float* from = kind > 0 ? step_state(kind) : nullptr;
      each_element(p.final, [&](int n, int i, bool valid, int at) {
        if (valid) to[at] = (kind == 0 ? state[n][i] : from[in_step_state(n, i)]) * p.final.factor;
      });
    }
  }

  // Thread 0 keeps account of what the segment makes of the state before it.
  __device__ __forceinline__ void begin_transition(float* transition) const {
    if (p.transition && threadIdx.x == 0)
      for (int i = 0; i < 9; ++i) transition[i] = i % 4 == 0 ? 1 : 0;
  }
  __device__ __forceinline__ void store_transition(const float* transition) const {
    if (!p.transition || threadIdx.x != 0 || first_value != 0) return;
    float* to = p.transition + (int64_t(slot()) * p.items + item) * 9;
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
          end.apply_reverse(state[n][i], start[in_step_state(n, i)], prompt[in_step_state(n, i)]);
    } else {
#pragma unroll
      for (int n = 0; n < kKeyWidth / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          end.apply(state[n][i], start[in_step_state(n, i)], prompt[in_step_state(n, i)]);
    }
    if (p.transition && threadIdx.x == 0)
      for (int i = 0; i < 3; ++i) {
        if (p.reverse)
          end.apply_reverse(transition[i], transition[3 + i], transition[6 + i]);
        else
          end.apply(transition[i], transition[3 + i], transition[6 + i]);
      }
  }

  // -- results
  __device__ __forceinline__ void store_zeros(const SweptChunk& chunk) const {
    if (!has_out()) return;
    for (int i = int(threadIdx.x); i < chunk.length * values; i += kSweepThreads) {
      const int64_t to = at_out(chunk, i / values, i % values);
      if (p.out) set(static_cast<T*>(p.out)[to], 0);
      if (p.gated_out) set(static_cast<T*>(p.gated_out)[to], 0);
      if (p.out_float) p.out_float[to] = 0;
    }
  }

  // A warp has 16 columns of a tile [token, value] for itself, in which results turn from columns into rows.
  // Lanes have 16 bytes of a row each.
  using Values = Tile<T, kSweepValues>;
  static constexpr int kPerLane = 16 / int(sizeof(T)), kLanesOfRow = 16 / kPerLane;

  __device__ __forceinline__ void store_products(const SweptChunk& chunk, const Out& out,
                                                 unsigned char* tile) const {
    const int lane = opaque(lane_index()), warp = int(threadIdx.x) / 32;
    if (!p.products || 16 * warp >= values) return;
    const int value = 16 * warp + lane % kLanesOfRow * kPerLane;
    __syncwarp();
#pragma unroll 1
    for (int token = lane / kLanesOfRow; token < chunk.length; token += 32 / kLanesOfRow)
      *reinterpret_cast<uint4*>(tile + Values::offset(token, value)) = *reinterpret_cast<const uint4*>(
          rows_of(p.partner, item * p.group / p.partner.shared, chunk.begin + token) + first_value + value);
    __syncwarp();
    float* const to = p.products +
                      ((int64_t(first_value / 16 + warp) * p.batch + opaque(span.row)) * p.items + item) *
                          p.segments.tokens +
                      chunk.begin;
    const int first_token = opaque(accumulator_column(0)), first_row = opaque(16 * warp + accumulator_row(0));
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int token = 8 * n + first_token + odd;
        const auto partner = [&](int row) {
          return to_float(*reinterpret_cast<const T*>(tile + Values::offset(token, row)));
        };
        float sum = 0;
        if (token < chunk.length)
          sum = out[n][odd] * partner(first_row) + out[n][odd + 2] * partner(first_row + 8);
#pragma unroll
        for (int rows = 4; rows < 32; rows *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, rows);
        if (lane < 4 && token < chunk.length) to[token] = sum;
      }
    __syncwarp();
  }

  // Out of the tile.
  __device__ __forceinline__ void store_rows(const SweptChunk& chunk, const unsigned char* tile) const {
    const int lane = opaque(lane_index());
    const int value = 16 * (int(threadIdx.x) / 32) + lane % kLanesOfRow * kPerLane;
    if (value >= values) return;
#pragma unroll 1
    for (int token = lane / kLanesOfRow; token < chunk.length; token += 32 / kLanesOfRow) {
      const uint4 x = *reinterpret_cast<const uint4*>(tile + Values::offset(token, value));
      const int64_t to = at_out(chunk, token, value);
      __stcs(reinterpret_cast<uint4*>(static_cast<T*>(p.out) + to), x);
      if (!p.gated_out) continue;
      const T* gate = rows_of(p.gate, item, chunk.begin + token) + first_value + value;
      const T* segment = static_cast<const T*>(p.segment_out) + to;
      __stcs(reinterpret_cast<uint4*>(static_cast<T*>(p.gated_out) + to),
             gated(T{}, x, *reinterpret_cast<const uint4*>(gate), *reinterpret_cast<const uint4*>(segment)));
    }
  }

  // From registers: a store covers 32 bytes of each of 4 tokens.
  __device__ __forceinline__ void store_floats(const SweptChunk& chunk, const Out& out) const {
    const int first_token = opaque(accumulator_column(0));
    const int first_row = opaque(16 * (int(threadIdx.x) / 32) + accumulator_row(0));
    const int64_t time = opaque(int64_t(p.items) * p.value_width);
    float* const to = p.out_float + at_out(chunk, 0, 0);
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
