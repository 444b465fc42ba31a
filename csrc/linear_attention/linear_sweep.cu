// The sweep of linear_sweep.h: one kernel for the forward of linear attention and, with other operands, for
// the gradients of q, k and v. State-stationary: S stays in registers from the first token to the last, so
// that memory traffic is q, k, v and the results, each once.
//
// A block of 4 warps owns 64 values (columns) of one item's state in one segment, as S^T [64 x Dk] in float32
// accumulators: a warp has 16 rows. It takes the segment in chunks of C = 64 tokens (32 in float32). With G_i
// the sum of log_decay over the chunk's tokens up to i (in reverse, the weights are those of going back):
//
//   1. P = q k^T, a warp 16 rows of it; masked and weighted e^{G_i - G_j} in registers; to shared memory
//   2. out^T  = S^T q^T, columns times e^{G_i}; S^T straight from the accumulators
//   3. out^T += v^T P^T,  S^T = e^{G_last} S^T + (v^T weighted e^{G_last - G_j}) k,  sharing v^T's fragments
//   4. out^T, times a factor, through shared memory into rows, 16 bytes a lane
//
// Precision. P, S and weighted v are float32 numbers that enter products of 16-bit operands: they are split
// into a rounded part and the rest, and multiplied in two parts. What is left is the rounding of results. A
// bfloat16 holds any such number; for float16, rows of S^T and P are multiplied by powers of two first.
// Differences of G come from sums in two floats; masks come before exponentials; log_decay of -inf counts as
// 2^-300, which is 0.
//
// Shared memory, in the order of the pointers: two stages of q [C x Dk], k [C x Dk] and v [C x 64], filled by
// cp.async for the next chunk while this one is computed; the parts of P [C x C]; G and weights of two
// chunks, made by warp 0 a chunk ahead. Two barriers a chunk:
//
//   A, at its start    the stage has landed, and nobody reads the other stage, P, or the older weights
//   B, after 2.        P is complete; before it P is written, after it P is read
//
// The columns of v that a warp reads, 16 to each, are read by no other: after 3. they serve it as the place
// where its results turn from columns into rows (and, for the gradient of log_decay, where the rows lie that
// the results are multiplied by).
//
// Registers are what is scarce: 64 for S, 32 for out, 32 for P. here() keeps the compiler from holding
// addresses and indices over the loop as well.
//
// Calculated for an H200 (4.3 TB/s, 790 TFLOP/s; nothing here has run on a GPU), 16-bit elements, Dk = Dv =
// 128, no decay:
//
//   registers, shared memory:   255, nothing spilled; 99 KiB (float32 86 KiB), with Dk <= 64 67 KiB (54 KiB)
//   blocks an SM:               2, limited by both; 8 warps
//   FLOPs a chunk and block:    0.66 M P (blocks of 16x16 that nobody sees are left out), 2.10 M S^T q^T,
//                               0.66 M v^T P^T, 1.05 M v^T k (2.10 M with decay): 140 k a token and head
//   bytes a token and head:     1024; q and k are read by two blocks, the second time from L2
//   B 8, 16 heads, T 8192:      1.07 GB, 250 us; 146 GFLOP, 185 us; 256 blocks for 264 places
//   B 1, 12/2 heads, T 32768:   235 MB, 55 us; 55 GFLOP, 70 us; 384 blocks, each a segment of 2048 tokens.
//                               The sweep before it for what segments add: 34 MB, 8 us
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "common/mma.cuh"
#include "linear_attention/linear_sweep.cuh"

namespace statecore {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

template <class T, int kKeyWidth>
struct Shape {
  static constexpr int kChunk = sizeof(T) == 2 ? 64 : 32;
  using Keys = Tile<T, kKeyWidth>;
  using Values = Tile<T, kSweepValues>;
  using Scores = Tile<T, kChunk>;  // [token of the result, token of the operand], in kParts
  static constexpr int kKeyBytes = Keys::bytes(kChunk), kValueBytes = Values::bytes(kChunk);
  static constexpr int kStageBytes = 2 * kKeyBytes + kValueBytes;
  static constexpr int kPartBytes = Scores::bytes(kChunk);
  static constexpr int kSharedBytes = 2 * kStageBytes + kParts<T> * kPartBytes;
  // Warps share the scores 16 rows each, and where there are fewer rows also the columns.
  static constexpr int kWarpsDown = kChunk / 16, kScoreColumns = kChunk / (kWarps / kWarpsDown);
};

// Weights of a chunk's tokens with decay; G_i is the sum of log2 e^g over the tokens up to i.
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

// Numbers of any size as float16: rows are multiplied by a power of two that brings their largest element to
// 2^14, and what is computed with them is divided by it. Both are exact.
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

// The largest of the four lanes that share rows of accumulators.
__device__ __forceinline__ float largest_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1, 1 + exp2_approx(-kLog2E * x)); }

// segment + sigmoid(gate) x, for 16 bytes of T.
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

template <class T, int kKeyWidth>
__global__ void __launch_bounds__(kThreads, 2) sweep(Sweep p) {
  using S = Shape<T, kKeyWidth>;
  using Keys = typename S::Keys;
  using Values = typename S::Values;
  using Scores = typename S::Scores;
  constexpr int kChunk = S::kChunk, kDepth = kMmaDepth<T>;
  constexpr bool kNarrowRange = std::is_same_v<T, __half>;
  STATECORE_DYNAMIC_SHARED(shared);
  STATECORE_SHARED(ChunkDecay<kChunk>, decays, 2);
  STATECORE_SHARED(int, score_exponents, kChunk);
  STATECORE_SHARED(float, transition, 9);
  unsigned char* const scores = shared + 2 * S::kStageBytes;

  // ---- who we are: 64 columns of the state of one item in one segment
  const int slices = (p.value_width + kSweepValues - 1) / kSweepValues;
  const auto slot = [&] { return here(int(blockIdx.x)) / (slices * p.items); };  // of the segment
  const int item = int(blockIdx.x) / slices % p.items;
  const int first_value = int(blockIdx.x) % slices * kSweepValues;
  const int values = min(p.value_width - first_value, kSweepValues);
  const Span span = span_of(p.segments, slot(), kChunk);
  if (span.sequence < 0) return;
  const int thread = int(threadIdx.x), warp = warp_uniform(thread / 32), lane = lane_index();
  const bool has_out = p.out || p.out_float, decaying = p.log_decay.data != nullptr;

  // ---- the state: rows are values, 16 a warp, columns are keys
  float state[kKeyWidth / 8][4];
  const auto at_state = [&](const SweepStates& states, int kind) {
    return states.data + kind * states.kind + int64_t(slot()) * states.slot +
           int64_t(item / states.shared) * states.head;
  };
  const auto each_element = [&](const SweepStates& states, const auto& body) {
#pragma unroll
    for (int n = 0; n < kKeyWidth / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int value = first_value + 16 * warp + accumulator_row(i), key = 8 * n + accumulator_column(i);
        body(n, i, value < p.value_width && key < p.key_width, value * states.value + key * states.key);
      }
  };
  const float* initial = p.initial.data ? at_state(p.initial, 0) : nullptr;
  each_element(p.initial, [&](int n, int i, bool valid, int at) {
    state[n][i] = initial && valid ? initial[at] * p.initial.factor : 0;
  });
  // start and prompt of this thread's elements
  const auto other_state = [&](int kind) {
    return p.step_states + (int64_t(here(int(blockIdx.x))) * 2 + kind - 1) * (kSweepValues * kKeyWidth) +
           thread;
  };
  const auto own = [](int n, int i) { return (n * 4 + i) * kThreads; };
  if (p.states == 3)
    for (int kind = 1; kind < 3; ++kind) {
      const float* from = initial ? at_state(p.initial, kind) : nullptr;
      float* to = other_state(kind);
      each_element(p.initial, [&](int n, int i, bool valid, int at) {
        to[own(n, i)] = from && valid ? from[at] * p.initial.factor : 0;
      });
    }
  if (p.transition && thread == 0)
    for (int i = 0; i < 9; ++i) transition[i] = i % 4 == 0 ? 1 : 0;

  const auto end_step = [&](int32_t step) {
    const StepEnd end(step, p.alpha, p.alphas);
    float *const start_state = other_state(1), *const prompt_state = other_state(2);
    if (p.reverse) {
#pragma unroll
      for (int n = 0; n < kKeyWidth / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          end.apply_reverse(state[n][i], start_state[own(n, i)], prompt_state[own(n, i)]);
    } else {
#pragma unroll
      for (int n = 0; n < kKeyWidth / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) end.apply(state[n][i], start_state[own(n, i)], prompt_state[own(n, i)]);
    }
    if (p.transition && thread == 0)
      for (int i = 0; i < 3; ++i) {
        if (p.reverse)
          end.apply_reverse(transition[i], transition[3 + i], transition[6 + i]);
        else
          end.apply(transition[i], transition[3 + i], transition[6 + i]);
      }
  };

  // ---- copies to shared memory
  const auto chunk_at = [&](int i) {  // in the order of the sweep
    return chunk_of(span, p.reverse ? span.chunks - 1 - i : i, kChunk);
  };
  const auto rows_of = [&](const HeadsView& x, int head, int token) {
    return static_cast<const T*>(x.data) + here(span.row) * x.batch + int64_t(token) * x.time + head * x.head;
  };
  const auto load_chunk = [&](const SweptChunk& chunk, int g, unsigned char* stage) {
    if (chunk.ended != kPaddingChunk) {
      const int head = item * p.group + g;
      if (has_out)
        load_tile<T, kChunk, kKeyWidth, kThreads>(stage, rows_of(p.q, head / p.q.shared, chunk.begin),
                                                  here(p.q.time), chunk.length, p.key_width);
      load_tile<T, kChunk, kKeyWidth, kThreads>(stage + S::kKeyBytes,
                                                rows_of(p.k, head / p.k.shared, chunk.begin), here(p.k.time),
                                                chunk.length, p.key_width);
      load_tile<T, kChunk, kSweepValues, kThreads>(stage + 2 * S::kKeyBytes,
                                                   rows_of(p.v, head / p.v.shared, chunk.begin) + first_value,
                                                   here(p.v.time), p.adds_nothing ? 0 : chunk.length, values);
    }
    cp_async_commit();
  };

  // ---- decay weights of a chunk, by one warp; lane l has tokens kOwn l, kOwn l + 1, ...
  constexpr int kOwn = kChunk / 32;
  const auto load_decays = [&](const SweptChunk& chunk, float (&log_decays)[kOwn]) {
    const float* from = static_cast<const float*>(p.log_decay.data) +
                        int64_t(here(span.row)) * p.log_decay.batch +
                        here(item) / p.log_decay.shared * p.log_decay.head;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int token = kOwn * lane + i;
      const float x =
          token < chunk.length ? from[int64_t(chunk.begin + token) * p.log_decay.time] * kLog2E : 0;
      log_decays[i] = x < -300 ? -300 : x;  // 2^-300 is 0, and differences to -inf are no numbers
    }
  };
  const auto store_decays = [&](const float (&log_decays)[kOwn], ChunkDecay<kChunk>& to) {
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
      to.to_state[token] = p.reverse ? from_start : to_end;
      to.of_state[token] = p.reverse ? to_end : from_start;
    }
    if (lane == 0) to.total = exp2_approx(last.x + last.y);
  };

  // ---- over the chunks and, in each, over the virtual heads
  SweptChunk chunk{}, next{};
  if (span.chunks > 0) {
    chunk = chunk_at(0);
    load_chunk(chunk, 0, shared);
    if (decaying && warp == 0) {
      float log_decays[kOwn];
      load_decays(chunk, log_decays);
      store_decays(log_decays, decays[0]);
    }
  }
  float out[kChunk / 8][4];       // rows are values, as in the state, columns are tokens
  int32_t ended = kNothingEnded;  // of the present chunk
  for (int c = 0, at = 0;; ++c, chunk = next) {
    const int32_t left = ended;
    ended = c < span.chunks ? chunk.ended : kNothingEnded;
    const int32_t ends_here = p.reverse ? left : ended;
    if (ends_here >= 0) end_step(ends_here);
    if (c == span.chunks) break;
    const bool last_chunk = c + 1 == span.chunks;
    if (!last_chunk) next = chunk_at(c + 1);
    const ChunkDecay<kChunk>& decay = decays[c % 2];
    for (int g = 0; g < p.group; ++g, at ^= 1) {
      unsigned char* const stage = shared + at * S::kStageBytes;
      const unsigned char *const q = stage, *const k = stage + S::kKeyBytes;
      unsigned char* const v = stage + 2 * S::kKeyBytes;
      const bool last_head = g + 1 == p.group;
      // Of this lane's accumulators. Everything that is computed from these would else fill registers.
      const int first_row = here(accumulator_row(0)), first_column = here(accumulator_column(0));
      const auto row_of = [&](int i) { return first_row + i / 2 * 8; };
      const auto column_of = [&](int i) { return first_column + i % 2; };

      // This stage has landed; the other one, the scores and the older decays are no longer read.
      cp_async_wait<0>();
      __syncthreads();
      if (!last_head || !last_chunk) {
        // Member by member: a reference to one of the two would put both on the stack.
        const SweptChunk loaded{last_head ? next.begin : chunk.begin, last_head ? next.length : chunk.length,
                                last_head ? next.ended : chunk.ended};
        load_chunk(loaded, last_head ? 0 : g + 1, shared + (at ^ 1) * S::kStageBytes);
      }
      const bool prepares_decay = decaying && warp == 0 && last_head && !last_chunk;
      float next_log_decays[kOwn];
      if (prepares_decay) load_decays(next, next_log_decays);

      const int64_t first_token =
          int64_t(here(span.row)) * p.segments.tokens + chunk.begin;  // of [B * T, items, value_width]
      const auto at_out = [&](int token, int value) {
        return ((first_token + token) * p.items + item) * p.value_width + first_value + value;
      };

      if (chunk.ended == kPaddingChunk) {
        if (has_out && last_head)
          for (int i = thread; i < chunk.length * values; i += kThreads) {
            const int64_t to = at_out(i / values, i % values);
            if (p.out) set(static_cast<T*>(p.out)[to], 0);
            if (p.gated_out) set(static_cast<T*>(p.gated_out)[to], 0);
            if (p.out_float) p.out_float[to] = 0;
          }
        continue;
      }

      if (has_out) {
        // ---- scores of the tokens that a token sees: those up to it, in reverse those from it on
        const int score_row = warp % S::kWarpsDown * 16,
                  score_column = warp / S::kWarpsDown * S::kScoreColumns;
        float score[S::kScoreColumns / 8][4] = {};
        const auto unseen = [&](int row, int column) {  // blocks of 16 rows and columns
          return p.reverse ? column < row : column > row;
        };
#pragma unroll 1
        for (int depth = 0; depth < kKeyWidth; depth += kDepth) {
          OperandA<T> a;
          load<false>(a, Keys{}, q, score_row, depth);
#pragma unroll
          for (int n = 0; n < S::kScoreColumns; n += 16) {
            if (unseen(score_row, score_column + n)) continue;
            OperandB<T> b[2];
            load<false>(b, Keys{}, k, score_column + n, depth);
            mma(score[n / 8], a, b[0]);
            mma(score[n / 8 + 1], a, b[1]);
          }
        }
        const auto each_score = [&](const auto& body) {
#pragma unroll
          for (int n = 0; n < S::kScoreColumns / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int row = score_row + row_of(i);
              const int column = score_column + 8 * n + column_of(i);
              body(score[n][i], row, column, p.reverse ? column >= row : column <= row);
            }
        };
        if (decaying)
          each_score([&](float& x, int row, int column, bool seen) {
            const float log = difference(decay.sum[row], decay.sum[column]);
            x *= exp2_approx(seen ? (p.reverse ? -log : log) : 0);
          });
        each_score([](float& x, int, int, bool seen) { x = seen ? x : 0; });
        if constexpr (kNarrowRange) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float largest = 0;
#pragma unroll
            for (int n = 0; n < S::kScoreColumns / 8; ++n)
              largest = fmaxf(largest, fmaxf(fabsf(score[n][2 * half]), fabsf(score[n][2 * half + 1])));
            const int exponent = range_exponent(largest_of_row(largest));
            const float factor = into_range(exponent);
#pragma unroll
            for (int n = 0; n < S::kScoreColumns / 8; ++n)
              score[n][2 * half] *= factor, score[n][2 * half + 1] *= factor;
            if (lane % 4 == 0) score_exponents[score_row + row_of(2 * half)] = exponent;
          }
        }
#pragma unroll
        for (int n = 0; n < S::kScoreColumns / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; i += 2)
            store_parts(Scores{}, scores, S::kPartBytes, score_row + row_of(i),
                        score_column + 8 * n + column_of(i), score[n][i], score[n][i + 1]);

        // ---- out^T = S^T q^T, before the state changes
        if (g == 0) {
#pragma unroll
          for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] = 0;
          int exponents[2];
          if constexpr (kNarrowRange) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float largest = 0;
#pragma unroll
              for (int n = 0; n < kKeyWidth / 8; ++n)
                largest = fmaxf(largest, fmaxf(fabsf(state[n][2 * half]), fabsf(state[n][2 * half + 1])));
              exponents[half] = range_exponent(largest_of_row(largest));
            }
          }
#pragma unroll
          for (int depth = 0; depth < kKeyWidth; depth += kDepth) {
            SplitA<T> a;
            if constexpr (kNarrowRange) {
              float scaled_state[kDepth / 8][4];
#pragma unroll
              for (int n = 0; n < kDepth / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                  scaled_state[n][i] = state[depth / 8 + n][i] * into_range(exponents[i / 2]);
              from_accumulators<T>(a, scaled_state);
            } else {
              from_accumulators<T>(a, state + depth / 8);
            }
#pragma unroll
            for (int n = 0; n < kChunk; n += 16) {
              OperandB<T> b[2];
              load<false>(b, Keys{}, q, n, depth);
              mma(out[n / 8], a, b[0]);
              mma(out[n / 8 + 1], a, b[1]);
            }
          }
          if constexpr (kNarrowRange) {
#pragma unroll
            for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) out[n][i] *= out_of_range(exponents[i / 2]);
          }
          if (decaying) {
#pragma unroll
            for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) out[n][i] *= decay.of_state[8 * n + column_of(i)];
          }
        }
        __syncthreads();  // scores are complete
        if constexpr (kNarrowRange) {
#pragma unroll
          for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] *= into_range(score_exponents[8 * n + column_of(i)]);
        }
      }

      // ---- out^T += v^T scores^T, S^T = e^{G_last} S^T + v^T k, sharing v^T
      if (decaying && g == 0) {
#pragma unroll
        for (int n = 0; n < kKeyWidth / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) state[n][i] *= decay.total;
        if (p.transition && thread == 0) transition[0] *= decay.total;
      }
#pragma unroll 1
      for (int depth = 0; depth < kChunk; depth += kDepth) {
        OperandA<T> a;
        load<true>(a, Values{}, v, depth, 16 * warp);
        if (has_out) {
#pragma unroll
          for (int n = 0; n < kChunk; n += 16) {
            if (p.reverse ? depth + kDepth <= n : depth >= n + 16) continue;  // not seen
#pragma unroll
            for (int part = 0; part < kParts<T>; ++part) {
              OperandB<T> b[2];
              load<false>(b, Scores{}, scores + part * S::kPartBytes, n, depth);
              mma(out[n / 8], a, b[0]);
              mma(out[n / 8 + 1], a, b[1]);
            }
          }
        }
        const auto add_to_state = [&](const auto& a) {
#pragma unroll
          for (int n = 0; n < kKeyWidth; n += 16) {
            OperandB<T> b[2];
            load<true>(b, Keys{}, k, depth, n);
            mma(state[n / 8], a, b[0]);
            mma(state[n / 8 + 1], a, b[1]);
          }
        };
        if (decaying)
          add_to_state(scaled(a, [&](int i) { return decay.to_state[depth + i]; }));
        else
          add_to_state(a);
      }
      if (prepares_decay) store_decays(next_log_decays, decays[(c + 1) % 2]);
      if (!has_out) continue;
      if constexpr (kNarrowRange) {
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[n][i] *= out_of_range(score_exponents[8 * n + column_of(i)]);
      }
      if (!last_head) continue;

      // ---- results to memory
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] *= p.out_factor;

      // They turn from columns into rows in the columns of v that this warp alone has read. Lanes have 16
      // bytes of a row each.
      constexpr int kLanesOfRow = 16 * int(sizeof(T)) / 16, kRowsAtOnce = 32 / kLanesOfRow;
      const int own_row = lane / kLanesOfRow,
                own_value = 16 * warp + lane % kLanesOfRow * (16 / int(sizeof(T)));
      const auto at_v = [&](int n, int i) {
        return reinterpret_cast<T*>(v + Values::offset(8 * n + column_of(i), 16 * warp + row_of(i)));
      };
      __syncwarp();
      if (p.products && 16 * warp < values) {
#pragma unroll 1
        for (int row = own_row; row < chunk.length; row += kRowsAtOnce)
          *reinterpret_cast<uint4*>(v + Values::offset(row, own_value)) = *reinterpret_cast<const uint4*>(
              rows_of(p.partner, item * p.group / p.partner.shared, chunk.begin + row) + first_value +
              own_value);
        __syncwarp();
        float* const to = p.products +
                          ((int64_t(first_value / 16 + warp) * p.batch + here(span.row)) * p.items + item) *
                              p.segments.tokens +
                          chunk.begin;
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            const int token = 8 * n + column_of(odd);
            float sum = 0;
            if (token < chunk.length)
              sum = out[n][odd] * to_float(*at_v(n, odd)) + out[n][odd + 2] * to_float(*at_v(n, odd + 2));
#pragma unroll
            for (int rows = 4; rows < 32; rows *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, rows);
            if (lane < 4 && token < chunk.length) to[token] = sum;
          }
        __syncwarp();
      }
      if (p.out_float) {
        // A store covers 32 bytes of each of 4 tokens.
        const int64_t time = here(int64_t(p.items) * p.value_width);
        float* const to = p.out_float + at_out(0, 0);
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int token = 8 * n + column_of(i), value = 16 * warp + row_of(i);
            if (token < chunk.length && value < values) to[token * time + value] = out[n][i];
          }
        continue;
      }
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) set(*at_v(n, i), out[n][i]);
      __syncwarp();
      if (own_value >= values) continue;
#pragma unroll 1
      for (int row = own_row; row < chunk.length; row += kRowsAtOnce) {
        const uint4 x = *reinterpret_cast<const uint4*>(v + Values::offset(row, own_value));
        const int64_t to = at_out(row, own_value);
        __stcs(reinterpret_cast<uint4*>(static_cast<T*>(p.out) + to), x);
        if (!p.gated_out) continue;
        const T* gate = rows_of(p.gate, item, chunk.begin + row) + first_value + own_value;
        const T* segment = static_cast<const T*>(p.segment_out) + to;
        __stcs(
            reinterpret_cast<uint4*>(static_cast<T*>(p.gated_out) + to),
            gated(T{}, x, *reinterpret_cast<const uint4*>(gate), *reinterpret_cast<const uint4*>(segment)));
      }
    }
  }

  // ---- the state to memory
  if (p.final.data && item % p.final.shared == 0)
    for (int kind = 0; kind < p.states; ++kind) {
      float* to = at_state(p.final, kind);
      const float* from = kind > 0 ? other_state(kind) : nullptr;
      each_element(p.final, [&](int n, int i, bool valid, int at) {
        if (valid) to[at] = (kind == 0 ? state[n][i] : from[own(n, i)]) * p.final.factor;
      });
    }
  if (p.transition && thread == 0 && first_value == 0) {
    float* to = p.transition + (int64_t(slot()) * p.items + item) * 9;
    for (int i = 0; i < 9; ++i) to[i] = transition[i];
  }
}

template <class T, int kKeyWidth>
void launch_sweep(const Sweep& p, int64_t blocks, void* stream) {
  launch("linear_sweep", sweep<T, kKeyWidth>,
         {dim3(unsigned(blocks)), dim3(kThreads), size_t(Shape<T, kKeyWidth>::kSharedBytes)}, stream, p);
}

template <class T>
void launch_sweep(const Sweep& p, int64_t blocks, void* stream) {
  p.key_width <= 64 ? launch_sweep<T, 64>(p, blocks, stream) : launch_sweep<T, 128>(p, blocks, stream);
}

int64_t block_count(const Sweep& p) {
  return p.segments.slots * p.items * ((p.value_width + kSweepValues - 1) / kSweepValues);
}

}  // namespace

int64_t sweep_step_floats(const Sweep& p) {
  return p.states == 3 ? block_count(p) * 2 * kSweepValues * (p.key_width <= 64 ? 64 : 128) : 0;
}

void launch_sweep(const Sweep& p, void* stream) {
  const int64_t blocks = block_count(p);
  if (blocks == 0) return;
  if (blocks > INT32_MAX)
    throw std::runtime_error("statecore: linear attention has too many sequences and heads for one launch");
  switch (p.dtype) {
    case DType::kFloat32: return launch_sweep<float>(p, blocks, stream);
    case DType::kBFloat16: return launch_sweep<__nv_bfloat16>(p, blocks, stream);
    case DType::kFloat16: return launch_sweep<__half>(p, blocks, stream);
    case DType::kFloat64: throw std::runtime_error("statecore: linear attention on CUDA takes no float64");
  }
}

}  // namespace statecore
