// The sweep of linear_sweep.h: one kernel for the forward of linear attention and, with other operands, for
// the gradients of q, k and v. State-stationary: S stays in registers from the first token to the last, so
// that memory traffic is q, k, v and the results, each once. 16-bit elements on an H200 are swept by
// linear_sweep_sm90.cu; what both do around their products is in linear_sweep_block.cuh.
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
// Registers are what is scarce: 64 for S, 32 for out, 32 for P. opaque() keeps the compiler from holding
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
//   B 1, 12/2 heads, T 32768:   235 MB, 55 us; 55 GFLOP, 70 us; 768 blocks, each a segment of 1024 tokens.
//                               The sweep before it for what segments add: 34 MB, 8 us
#include <algorithm>
#include <stdexcept>

#include "linear_attention/linear_sweep_block.cuh"

namespace statecore {
namespace {

constexpr int kThreads = kSweepThreads;

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
  static constexpr int kWarpsDown = kChunk / 16, kScoreColumns = kChunk / (kSweepWarps / kWarpsDown);
};

template <class T, int kKeyWidth>
__global__ void __launch_bounds__(kThreads, 2) sweep(Sweep p) {
  using S = Shape<T, kKeyWidth>;
  using Keys = typename S::Keys;
  using Values = typename S::Values;
  using Scores = typename S::Scores;
  constexpr int kChunk = S::kChunk, kDepth = kMmaK<T>;
  constexpr bool kNarrowRange = std::is_same_v<T, __half>;
  STATECORE_DYNAMIC_SHARED(shared);
  STATECORE_SHARED(ChunkDecay<kChunk>, decays, 2);
  STATECORE_SHARED(int, score_exponents, kChunk);
  STATECORE_SHARED(float, transition, 9);
  unsigned char* const scores = shared + 2 * S::kStageBytes;

  const SweepBlock<T, kKeyWidth> block(p);
  const Span& span = block.span;
  if (span.sequence < 0) return;
  const int thread = int(threadIdx.x), warp = warp_uniform(thread / 32), lane = lane_index();
  const bool has_out = block.has_out(), decaying = block.decaying();
  float state[kKeyWidth / 8][4];
  block.load_states(state);
  block.begin_transition(transition);

  // ---- copies to shared memory
  const auto load_chunk = [&](const SweptChunk& chunk, int g, unsigned char* stage) {
    if (chunk.ended != kPaddingChunk) {
      const int head = block.item * p.group + g;
      if (has_out)
        load_tile<T, kChunk, kKeyWidth, kThreads>(stage, block.rows_of(p.q, head / p.q.shared, chunk.begin),
                                                  opaque(p.q.time), chunk.length, p.key_width);
      load_tile<T, kChunk, kKeyWidth, kThreads>(stage + S::kKeyBytes,
                                                block.rows_of(p.k, head / p.k.shared, chunk.begin),
                                                opaque(p.k.time), chunk.length, p.key_width);
      load_tile<T, kChunk, kSweepValues, kThreads>(
          stage + 2 * S::kKeyBytes, block.rows_of(p.v, head / p.v.shared, chunk.begin) + block.first_value,
          opaque(p.v.time), p.adds_nothing ? 0 : chunk.length, block.values);
    }
    cp_async_commit();
  };

  // ---- over the chunks and, in each, over the virtual heads
  SweptChunk chunk{}, next{};
  if (span.chunks > 0) {
    chunk = block.chunk_at(0);
    load_chunk(chunk, 0, shared);
    if (decaying && warp == 0) {
      float log_decays[kChunk / 32];
      block.load_decays(chunk, log_decays);
      store_decays(log_decays, p.reverse, decays[0]);
    }
  }
  float out[kChunk / 8][4];       // rows are values, as in the state, columns are tokens
  int32_t ended = kNothingEnded;  // of the present chunk
  for (int c = 0, at = 0;; ++c, chunk = next) {
    const int32_t left = ended;
    ended = c < span.chunks ? chunk.ended : kNothingEnded;
    const int32_t ends_here = p.reverse ? left : ended;
    if (ends_here >= 0) block.end_step(ends_here, state, transition);
    if (c == span.chunks) break;
    const bool last_chunk = c + 1 == span.chunks;
    if (!last_chunk) next = block.chunk_at(c + 1);
    const ChunkDecay<kChunk>& decay = decays[c % 2];
    for (int g = 0; g < p.group; ++g, at ^= 1) {
      unsigned char* const stage = shared + at * S::kStageBytes;
      const unsigned char *const q = stage, *const k = stage + S::kKeyBytes;
      unsigned char* const v = stage + 2 * S::kKeyBytes;
      const bool last_head = g + 1 == p.group;
      // Of this lane's accumulators. Everything that is computed from these would else fill registers.
      const int first_row = opaque(accumulator_row(0)), first_column = opaque(accumulator_column(0));
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
      float next_log_decays[kChunk / 32] = {};
      if (prepares_decay) block.load_decays(next, next_log_decays);

      if (chunk.ended == kPaddingChunk) {
        if (last_head) block.store_zeros(chunk);
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
            const int exponent = row_exponent(score, half);
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
      if (prepares_decay) store_decays(next_log_decays, p.reverse, decays[(c + 1) % 2]);
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

      // The columns of v that this warp alone has read are where they turn from columns into rows.
      block.store_products(chunk, out, v);
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

  block.store_states(state);
  block.store_transition(transition);
}

template <class T, int kKeyWidth>
void launch_sweep(const Sweep& p, unsigned blocks, void* stream) {
  launch("linear_sweep", sweep<T, kKeyWidth>,
         {dim3(blocks), dim3(kThreads), size_t(Shape<T, kKeyWidth>::kSharedBytes)}, stream, p);
}

template <class T>
void launch_sweep(const Sweep& p, unsigned blocks, void* stream) {
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
  const unsigned blocks = checked_blocks("linear attention", block_count(p));
  if (blocks == 0) return;
  if (runs_on_sm90(p)) return launch_sweep_sm90(p, blocks, stream);
  switch (p.dtype) {
    case DType::kFloat32: return launch_sweep<float>(p, blocks, stream);
    case DType::kBFloat16: return launch_sweep<__nv_bfloat16>(p, blocks, stream);
    case DType::kFloat16: return launch_sweep<__half>(p, blocks, stream);
    case DType::kFloat64: throw std::runtime_error("statecore: linear attention on CUDA takes no float64");
  }
}

}  // namespace statecore
