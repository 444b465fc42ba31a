// The sweep of linear_sweep.h: one kernel for the forward of linear attention and, with other operands, for
// the gradients of q, k and v. State-stationary: S stays in registers from a split's first token to its last,
// so that memory traffic is q, k, v and the results, each once. On an H200 linear_sweep_sm90.cu sweeps 16-bit
// elements; what both do besides their products is in linear_sweep_block.cuh.
//
// A block of 4 warps has 64 values (columns) of one head's state in one split, as S^T [64 x Dk] in float32
// accumulators: 16 rows per warp. It takes the split in chunks of C = 64 tokens (32 in float32). With G_i the
// sum of log_decay over the chunk's tokens up to i (in reverse, the weights are those of going back):
//
//   1. P = q k^T, 16 rows per warp; masked and weighted by e^{G_i - G_j} in registers; to shared memory
//   2. out^T  = S^T q^T, columns times e^{G_i}; S^T straight from the accumulators
//   3. out^T += v^T P^T,  S^T = e^{G_last} S^T + (v^T weighted e^{G_last - G_j}) k,  sharing v^T's fragments
//   4. out^T, times a factor, through shared memory into rows, 16 bytes per lane
//
// Precision. P, S and weighted v are float32 numbers that enter products of 16-bit operands: each is split
// into a rounded part and the remainder, and both parts are multiplied. The only error left is the rounding
// of results. A bfloat16 covers the range of any such number; for float16, rows of S^T and P are multiplied
// by powers of two first. Differences of G come from sums in two floats; masks are applied before
// exponentials; log_decay of -inf counts as 2^-300, which is 0.
//
// Shared memory, in the order of the pointers: two stages of q [C x Dk], k [C x Dk] and v [C x 64], which
// cp.async fills for the next chunk while this one is computed; the parts of P [C x C]; G and weights of two
// chunks, which warp 0 computes a chunk ahead. Two barriers per chunk:
//
//   A, at its start    the stage has landed; the other stage, P and the older weights may be overwritten
//   B, after 2.        P is complete: written before, read after
//
// A warp reads 16 columns of v that no other warp reads. After 3. it transposes its results there (and, for
// the gradient of log_decay, loads there the rows that they are multiplied by).
//
// Registers are the scarce resource: 64 for S, 32 for out, 32 for P. opaque() keeps the compiler from
// hoisting addresses and indices out of the loop.
//
// Calculated for an H200 (4.3 TB/s, 790 TFLOP/s; nothing here has run on a GPU), 16-bit elements, Dk = Dv =
// 128, no decay:
//
//   registers, shared memory:   255, nothing spilled; 99 KiB (float32 86 KiB), with Dk <= 64 67 KiB (54 KiB)
//   blocks per SM:              2, limited by both; 8 warps
//   FLOPs per chunk and block:  0.66 M P (blocks of 16x16 above the mask are left out), 2.10 M S^T q^T,
//                               0.66 M v^T P^T, 1.05 M v^T k (2.10 M with decay): 140 k per token and head
//   bytes per token and head:   1024; q and k are read by two blocks, the second time from L2
//   B 8, 16 heads, T 8192:      1.07 GB, 250 us; 146 GFLOP, 185 us; 256 blocks, one wave of 264
//   B 1, 12/2 heads, T 32768:   235 MB, 55 us; 55 GFLOP, 70 us; 768 blocks, each a split of 1024 tokens.
//                               The sweep for local states before it: 34 MB, 8 us
#include <algorithm>
#include <stdexcept>

#include "linear_attention/linear_sweep_block.cuh"

namespace statecore {
namespace {

constexpr int kThreads = kSweepThreads;

template <class T, int kKeyWidth>
struct SharedLayout {
  static constexpr int kChunk = sweep_chunk_length(sizeof(T));
  using Keys = Tile<T, kKeyWidth>;
  using Values = Tile<T, kSweepValues>;
  using Scores = Tile<T, kChunk>;  // P [token of the result, token of the operand], in kParts
  static constexpr int kKeyBytes = Keys::bytes(kChunk), kValueBytes = Values::bytes(kChunk);
  static constexpr int kStageBytes = 2 * kKeyBytes + kValueBytes;
  static constexpr int kPartBytes = Scores::bytes(kChunk);
  static constexpr int kBytes = 2 * kStageBytes + kParts<T> * kPartBytes;
  // Warps divide the rows of P among them, 16 each, and where there are too few rows also the columns.
  static constexpr int kWarpsDown = kChunk / 16, kScoreColumns = kChunk / (kSweepWarps / kWarpsDown);
};

template <class T, int kKeyWidth>
__global__ void __launch_bounds__(kThreads, 2) linear_sweep_kernel(SweepParams p) {
  using L = SharedLayout<T, kKeyWidth>;
  using Keys = typename L::Keys;
  using Values = typename L::Values;
  using Scores = typename L::Scores;
  constexpr int kChunk = L::kChunk, kDepth = kMmaK<T>;
  constexpr bool kNarrowRange = std::is_same_v<T, __half>;
  STATECORE_DYNAMIC_SHARED(shared);
  STATECORE_SHARED(SweepDecay<kChunk>, decays, 2);
  STATECORE_SHARED(int, score_exponents, kChunk);
  STATECORE_SHARED(float, transition, 9);
  unsigned char* const scores = shared + 2 * L::kStageBytes;

  const SweepBlock<T, kKeyWidth> block(p);
  const Split& split = block.split;
  if (split.sequence < 0) return;
  const int thread = int(threadIdx.x), warp = warp_uniform(thread / 32), lane = lane_index();
  const bool has_out = block.has_out(), has_decay = block.has_decay();

  const auto load_stage = [&](const SweepChunk& chunk, int g, unsigned char* stage) {
    if (chunk.ended_step != kPaddingChunk) {
      const int head = block.state_head * p.group + g;
      if (has_out)
        load_tile<T, kChunk, kKeyWidth, kThreads>(stage,
                                                  block.rows_of(p.q, head / p.q.head_divisor, chunk.begin),
                                                  opaque(p.q.time), chunk.length, p.key_width);
      load_tile<T, kChunk, kKeyWidth, kThreads>(stage + L::kKeyBytes,
                                                block.rows_of(p.k, head / p.k.head_divisor, chunk.begin),
                                                opaque(p.k.time), chunk.length, p.key_width);
      load_tile<T, kChunk, kSweepValues, kThreads>(
          stage + 2 * L::kKeyBytes,
          block.rows_of(p.v, head / p.v.head_divisor, chunk.begin) + block.first_value, opaque(p.v.time),
          p.zero_v ? 0 : chunk.length, block.values);
    }
    cp_async_commit();
  };

  // ---- prologue: the state, the first chunk
  float state[kKeyWidth / 8][4];
  block.load_states(state);
  block.init_transition(transition);
  SweepChunk chunk{}, next{};
  if (split.chunks > 0) {
    chunk = block.chunk_at(0);
    load_stage(chunk, 0, shared);
    if (has_decay && warp == 0) {
      float log2_decay[kChunk / 32];
      block.load_log2_decay(chunk, log2_decay);
      scan_decay(log2_decay, p.reverse, decays[0]);
    }
  }

  // ---- mainloop: over the chunks and, in each, over the virtual heads
  float out[kChunk / 8][4];      // rows are values, as in the state, columns are tokens
  int32_t ended_step = kNoStep;  // of this chunk
  for (int c = 0, stage_index = 0;; ++c, chunk = next) {
    const int32_t left_step = ended_step;
    ended_step = c < split.chunks ? chunk.ended_step : kNoStep;
    const int32_t ends_here = p.reverse ? left_step : ended_step;
    if (ends_here >= 0) block.end_step(ends_here, state, transition);
    if (c == split.chunks) break;
    const bool last_chunk = c + 1 == split.chunks;
    if (!last_chunk) next = block.chunk_at(c + 1);
    const SweepDecay<kChunk>& decay = decays[c % 2];
    for (int g = 0; g < p.group; ++g, stage_index ^= 1) {
      unsigned char* const stage = shared + stage_index * L::kStageBytes;
      const unsigned char *const q = stage, *const k = stage + L::kKeyBytes;
      unsigned char* const v = stage + 2 * L::kKeyBytes;
      const bool last_head = g + 1 == p.group;
      // Of this lane's accumulators. Opaque, or all that is computed from these would fill registers.
      const int first_row = opaque(accumulator_row(0)), first_column = opaque(accumulator_column(0));
      const auto row_of = [&](int i) { return first_row + i / 2 * 8; };
      const auto column_of = [&](int i) { return first_column + i % 2; };

      // Barrier A: this stage has landed; the other one, P and the older decay may be overwritten.
      cp_async_wait<0>();
      __syncthreads();
      if (!last_head || !last_chunk) {
        // Member by member: a reference to one of the two would put both on the stack.
        const SweepChunk loaded{last_head ? next.begin : chunk.begin, last_head ? next.length : chunk.length,
                                last_head ? next.ended_step : chunk.ended_step};
        load_stage(loaded, last_head ? 0 : g + 1, shared + (stage_index ^ 1) * L::kStageBytes);
      }
      const bool scans_next_decay = has_decay && warp == 0 && last_head && !last_chunk;
      float next_log2_decay[kChunk / 32] = {};
      if (scans_next_decay) block.load_log2_decay(next, next_log2_decay);

      if (chunk.ended_step == kPaddingChunk) {
        if (last_head) block.store_zeros(chunk);
        continue;
      }

      if (has_out) {
        // ---- P = q k^T over the tokens up to the row's, in reverse over those from it on
        const int score_row = warp % L::kWarpsDown * 16,
                  score_column = warp / L::kWarpsDown * L::kScoreColumns;
        float score[L::kScoreColumns / 8][4] = {};
        const auto fully_masked = [&](int row, int column) {  // a block of 16 rows and columns
          return p.reverse ? column < row : column > row;
        };
#pragma unroll 1
        for (int depth = 0; depth < kKeyWidth; depth += kDepth) {
          OperandA<T> a;
          load_operand<false>(a, Keys{}, q, score_row, depth);
#pragma unroll
          for (int n = 0; n < L::kScoreColumns; n += 16) {
            if (fully_masked(score_row, score_column + n)) continue;
            OperandB<T> b[2];
            load_operand<false>(b, Keys{}, k, score_column + n, depth);
            mma(score[n / 8], a, b[0]);
            mma(score[n / 8 + 1], a, b[1]);
          }
        }

        // ---- decay and mask; P to shared memory
        const auto for_each_score = [&](const auto& body) {
#pragma unroll
          for (int n = 0; n < L::kScoreColumns / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int row = score_row + row_of(i);
              const int column = score_column + 8 * n + column_of(i);
              body(score[n][i], row, column, p.reverse ? column >= row : column <= row);
            }
        };
        if (has_decay)
          for_each_score([&](float& x, int row, int column, bool visible) {
            const float log2 = compensated_difference(decay.cumulative[row], decay.cumulative[column]);
            x *= exp2_approx(visible ? (p.reverse ? -log2 : log2) : 0);
          });
        for_each_score([](float& x, int, int, bool visible) { x = visible ? x : 0; });
        if constexpr (kNarrowRange) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int exponent = row_exponent(score, half);
            const float factor = range_scale(exponent);
#pragma unroll
            for (int n = 0; n < L::kScoreColumns / 8; ++n)
              score[n][2 * half] *= factor, score[n][2 * half + 1] *= factor;
            if (lane % 4 == 0) score_exponents[score_row + row_of(2 * half)] = exponent;
          }
        }
#pragma unroll
        for (int n = 0; n < L::kScoreColumns / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; i += 2)
            store_parts(Scores{}, scores, L::kPartBytes, score_row + row_of(i),
                        score_column + 8 * n + column_of(i), score[n][i], score[n][i + 1]);

        // ---- out^T = S^T q^T, before the state changes
        if (g == 0) {
#pragma unroll
          for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] = 0;
          int exponents[2];
          if constexpr (kNarrowRange)
            exponents[0] = row_exponent(state, 0), exponents[1] = row_exponent(state, 1);
#pragma unroll
          for (int depth = 0; depth < kKeyWidth; depth += kDepth) {
            SplitA<T> a;
            if constexpr (kNarrowRange) {
              float scaled_state[kDepth / 8][4];
#pragma unroll
              for (int n = 0; n < kDepth / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                  scaled_state[n][i] = state[depth / 8 + n][i] * range_scale(exponents[i / 2]);
              pack_accumulators<T>(a, scaled_state);
            } else {
              pack_accumulators<T>(a, state + depth / 8);
            }
#pragma unroll
            for (int n = 0; n < kChunk; n += 16) {
              OperandB<T> b[2];
              load_operand<false>(b, Keys{}, q, n, depth);
              mma(out[n / 8], a, b[0]);
              mma(out[n / 8 + 1], a, b[1]);
            }
          }
          if constexpr (kNarrowRange) {
#pragma unroll
            for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) out[n][i] *= range_unscale(exponents[i / 2]);
          }
          if (has_decay) {
#pragma unroll
            for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) out[n][i] *= decay.read[8 * n + column_of(i)];
          }
        }

        // Barrier B: P is complete.
        __syncthreads();
        if constexpr (kNarrowRange) {
#pragma unroll
          for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] *= range_scale(score_exponents[8 * n + column_of(i)]);
        }
      }

      // ---- out^T += v^T P^T, S^T = e^{G_last} S^T + v^T k, sharing v^T
      if (has_decay && g == 0) {
#pragma unroll
        for (int n = 0; n < kKeyWidth / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) state[n][i] *= decay.total;
        if (p.transitions && thread == 0) transition[0] *= decay.total;
      }
#pragma unroll 1
      for (int depth = 0; depth < kChunk; depth += kDepth) {
        OperandA<T> a;
        load_operand<true>(a, Values{}, v, depth, 16 * warp);
        if (has_out) {
#pragma unroll
          for (int n = 0; n < kChunk; n += 16) {
            if (p.reverse ? depth + kDepth <= n : depth >= n + 16) continue;  // fully masked
#pragma unroll
            for (int part = 0; part < kParts<T>; ++part) {
              OperandB<T> b[2];
              load_operand<false>(b, Scores{}, scores + part * L::kPartBytes, n, depth);
              mma(out[n / 8], a, b[0]);
              mma(out[n / 8 + 1], a, b[1]);
            }
          }
        }
        const auto add_to_state = [&](const auto& a) {
#pragma unroll
          for (int n = 0; n < kKeyWidth; n += 16) {
            OperandB<T> b[2];
            load_operand<true>(b, Keys{}, k, depth, n);
            mma(state[n / 8], a, b[0]);
            mma(state[n / 8 + 1], a, b[1]);
          }
        };
        if (has_decay)
          add_to_state(scale_columns(a, [&](int i) { return decay.write[depth + i]; }));
        else
          add_to_state(a);
      }
      if (scans_next_decay) scan_decay(next_log2_decay, p.reverse, decays[(c + 1) % 2]);
      if (!has_out) continue;
      if constexpr (kNarrowRange) {
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[n][i] *= range_unscale(score_exponents[8 * n + column_of(i)]);
      }
      if (!last_head) continue;

      // ---- the chunk's results, transposed in the columns of v that only this warp reads
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] *= p.out_factor;
      block.store_row_dots(chunk, out, v);
      if (p.out_float) {
        block.store_floats(chunk, out);
        continue;
      }
      __syncwarp();
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          set(*reinterpret_cast<T*>(v + Values::offset(8 * n + column_of(i), 16 * warp + row_of(i))),
              out[n][i]);
      __syncwarp();
      block.store_rows(chunk, v);
    }
  }

  // ---- epilogue: the final state
  block.store_states(state);
  block.store_transition(transition);
}

template <class T, int kKeyWidth>
void launch_sweep(const SweepParams& p, unsigned blocks, void* stream) {
  launch("linear_sweep", linear_sweep_kernel<T, kKeyWidth>,
         {dim3(blocks), dim3(kThreads), size_t(SharedLayout<T, kKeyWidth>::kBytes)}, stream, p);
}

template <class T>
void launch_sweep(const SweepParams& p, unsigned blocks, void* stream) {
  padded_key_width(p.key_width) == 64 ? launch_sweep<T, 64>(p, blocks, stream)
                                      : launch_sweep<T, 128>(p, blocks, stream);
}

}  // namespace

void linear_sweep(const SweepParams& p, void* stream) {
  const unsigned blocks = checked_blocks("linear attention", sweep_blocks(p));
  if (blocks == 0) return;
  switch (p.dtype) {
    case DType::kFloat32: return launch_sweep<float>(p, blocks, stream);
    case DType::kBFloat16: return launch_sweep<__nv_bfloat16>(p, blocks, stream);
    case DType::kFloat16: return launch_sweep<__half>(p, blocks, stream);
    case DType::kFloat64: throw std::runtime_error("statecore: linear attention on CUDA takes no float64");
  }
}

}  // namespace statecore
