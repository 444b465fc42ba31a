#include "common/cuda_device.h"
#include "common/hopper.cuh"
#include "linear_attention/linear_sweep_block.cuh"

namespace statecore {
namespace {

constexpr int kThreads = 2 * kSweepThreads;  // a warpgroup that multiplies, and one of which a warp loads
constexpr int kMathRegisters = 224, kLoadRegisters = 32;
constexpr int kStages = 2, kChunk = 64, kPanelBytes = 64 * 128;
constexpr unsigned kSweepBarrier = 1;  // of the warps that multiply

using Panel = Tile<__half, 64>;

struct Beside {
  uint64_t full[kStages], empty[kStages];
  SweptChunk chunks[kStages];
  ChunkDecay<kChunk> decays[kStages];
  int score_exponents[kChunk];
  float transition[9];
};

// Of dynamic shared memory, in bytes.
template <int kKeyWidth>
struct Layout {
  static constexpr int kKeyBytes = kKeyWidth / 64 * kPanelBytes;
  static constexpr int kStageBytes = 2 * kKeyBytes + kPanelBytes;  // q, k, v
  static constexpr int kScores = kStages * kStageBytes;            // rounded, then the rest
  static constexpr int kOut = kScores + 2 * kPanelBytes;
  static constexpr int kBeside = kOut + kPanelBytes;
  static constexpr int kBytes = kBeside + int(sizeof(Beside));
};

// Accumulators as wgmma wants them.
template <int kTiles>
__device__ __forceinline__ float (&flat(float (&x)[kTiles][4]))[4 * kTiles] {
  return reinterpret_cast<float (&)[4 * kTiles]>(x);
}

template <class T, int kKeyWidth, bool kDecays>
__global__ void __launch_bounds__(kThreads, 2)
    sweep_sm90(const __grid_constant__ Sweep p, const __grid_constant__ TensorMap q_map,
               const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map) {
#if defined(STATECORE_SM90A)
  using L = Layout<kKeyWidth>;
  using Block = SweepBlock<T, kKeyWidth>;
  constexpr bool kNarrowRange = std::is_same_v<T, __half>;
  STATECORE_DYNAMIC_SHARED(shared);
  Beside& beside = *reinterpret_cast<Beside*>(shared + L::kBeside);
  const uint32_t base = shared_address(shared);
  const uint32_t full = shared_address(beside.full), empty = shared_address(beside.empty);

  const Block block(p);
  const Span& span = block.span;
  if (span.sequence < 0) return;
  const int thread = int(threadIdx.x), warp = warp_uniform(thread / 32), lane = lane_index();
  const bool has_out = block.has_out();
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full + 8 * stage, 1);
      mbarrier_init(empty + 8 * stage, kSweepWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  // ---- the producer
  if (warp >= kSweepWarps) {
    lower_registers<kLoadRegisters>();
    if (warp > kSweepWarps) return;
    float log_decays[Block::kOwn] = {};
    if (kDecays && span.chunks > 0) block.load_decays(block.chunk_at(0), log_decays);
    int loads = 0;
    for (int c = 0; c < span.chunks; ++c) {
      const SweptChunk chunk = block.chunk_at(c);
      const bool padding = chunk.ended == kPaddingChunk;  // of which nothing is loaded
      for (int g = 0; g < (padding ? 1 : p.group); ++g, ++loads) {
        const int stage = loads % kStages, head = block.item * p.group + g;
        const uint32_t q = base + stage * L::kStageBytes, k = q + L::kKeyBytes, v = k + L::kKeyBytes;
        const uint32_t barrier = full + 8 * stage;
        mbarrier_wait(empty + 8 * stage, (loads / kStages & 1) ^ 1);
        if (lane == 0) {
          beside.chunks[stage] = chunk;
          if (!padding) {
            mbarrier_expect(barrier, has_out ? L::kStageBytes : L::kStageBytes - L::kKeyBytes);
#pragma unroll
            for (int key = 0; key < kKeyWidth; key += 64) {
              const uint32_t panel = key / 64 * kPanelBytes;
              if (has_out)
                tma_load(q + panel, q_map, {key, head / p.q.shared, chunk.begin, span.row}, barrier);
              tma_load(k + panel, k_map, {key, head / p.k.shared, chunk.begin, span.row}, barrier);
            }
            tma_load(v, v_map, {block.first_value, head / p.v.shared, chunk.begin, span.row}, barrier);
          }
        }
        if constexpr (kDecays) store_decays(log_decays, p.reverse, beside.decays[stage]);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(barrier);
      }
      if (kDecays && c + 1 < span.chunks) block.load_decays(block.chunk_at(c + 1), log_decays);
    }
  } else {
    // ---- the four warps that multiply
    raise_registers<kMathRegisters>();
    const auto own_barrier = [] { named_barrier_sync(kSweepBarrier, kSweepThreads); };
    typename Block::State state;
    typename Block::Out out;
    block.load_states(state);
    block.begin_transition(beside.transition);
    // The lane's row of the warp's 16 values of 16 tokens in a panel [token, value], for transposed 8x8
    // matrices.
    const auto own_values = [&] {
      const int own = here(lane);
      return Panel::offset(own % 8 + own / 16 * 8, 16 * warp + own / 8 % 2 * 8);
    };
    int loads = 0;
    for (int c = 0; c < span.chunks; ++c)
      for (int g = 0; g < p.group; ++g, ++loads) {
        const int stage = loads % kStages;
        const uint32_t q = base + stage * L::kStageBytes, k = q + L::kKeyBytes, v = k + L::kKeyBytes;
        const ChunkDecay<kChunk>& decay = beside.decays[stage];
        const bool first_head = g == 0, last_head = g + 1 == p.group;
        const auto release = [&] {
          __syncwarp();
          if (lane == 0) mbarrier_arrive(empty + 8 * stage);
        };
        mbarrier_wait(full + 8 * stage, loads / kStages & 1);
        const SweptChunk chunk{warp_uniform(beside.chunks[stage].begin),
                               warp_uniform(beside.chunks[stage].length),
                               warp_uniform(beside.chunks[stage].ended)};
        if (chunk.ended == kPaddingChunk) {
          release();
          block.store_zeros(chunk);
          ++loads;
          break;
        }
        if (!kDecays && !p.reverse && first_head && chunk.ended >= 0)
          block.end_step(chunk.ended, state, beside.transition);

        // Rows of the stage that are no tokens of the chunk, but others': beyond the tensor TMA has put
        // zeros.
        const bool has_others = chunk.length < kChunk && chunk.begin + chunk.length < p.segments.tokens;
        const auto hide_others = [&] {
          unsigned char* const k_panels = shared + stage * L::kStageBytes + L::kKeyBytes;
          const auto zero_rest = [&](unsigned char* panel, int length) {
            for (int at = length * 128 + int(threadIdx.x) * 16; at < kPanelBytes; at += kSweepThreads * 16)
              *reinterpret_cast<uint4*>(panel + at) = make_uint4(0, 0, 0, 0);
          };
          if (has_others) {
#pragma unroll
            for (int key = 0; key < kKeyWidth; key += 64)
              zero_rest(k_panels + key / 64 * kPanelBytes, chunk.length);
          }
          if (has_others || p.adds_nothing)
            zero_rest(k_panels + L::kKeyBytes, p.adds_nothing ? 0 : chunk.length);
          fence_proxy_async();
        };

        // ---- scores = q k^T, masked and with decay, in two parts to shared memory; meanwhile out^T = S^T
        // q^T. For the first head, and without the second part for the others: no branch may end while
        // products write the same registers in one of its arms.
        const auto make_scores = [&](auto reads_state) {
          SplitA<T> a[4];
          [[maybe_unused]] int exponents[2];
          const auto to_operands = [&](int begin) {  // 64 keys of the state
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int n = begin / 8 + 2 * i;
              if constexpr (kNarrowRange) {
                float scaled_state[2][4];
#pragma unroll
                for (int j = 0; j < 8; ++j)
                  scaled_state[j / 4][j % 4] = state[n + j / 4][j % 4] * into_range(exponents[j % 4 / 2]);
                from_accumulators<T>(a[i], scaled_state);
              } else {
                from_accumulators<T>(a[i], state + n);
              }
            }
          };
          const auto read_state = [&](int begin) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const uint64_t b = k_major(q, kPanelBytes, 0, begin + 16 * i);
              wgmma<T, kChunk>(flat(out), a[i].low.r, b, begin + i > 0);
              wgmma<T, kChunk>(flat(out), a[i].high.r, b, true);
            }
            wgmma_commit();
          };
          if constexpr (reads_state) {
            if constexpr (kNarrowRange)
              exponents[0] = row_exponent(state, 0), exponents[1] = row_exponent(state, 1);
            to_operands(0);
            wgmma_settle(flat(out));
          }
          float scores[kChunk / 8][4];
          wgmma_settle(flat(scores));
          wgmma_fence();
#pragma unroll
          for (int depth = 0; depth < kKeyWidth; depth += 16)
            wgmma<T, kChunk>(flat(scores), k_major(q, kPanelBytes, 0, depth),
                             k_major(k, kPanelBytes, 0, depth), depth > 0);
          wgmma_commit();
          if constexpr (reads_state) read_state(0);
          wgmma_wait<reads_state ? 1 : 0>();
          wgmma_settle(flat(scores));
          own_barrier();
          if (has_others || p.adds_nothing) hide_others();

          const int first_row = 16 * warp + here(lane) / 4, first_column = here(lane) % 4 * 2;
          const auto each_score = [&](const auto& body) {
#pragma unroll
            for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) body(scores[n][i], i / 2, 8 * n + first_column + i % 2);
          };
          int first_seen[2], last_seen[2];  // of the thread's two rows
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            first_seen[half] = p.reverse ? first_row + 8 * half : 0;
            last_seen[half] = p.reverse ? chunk.length - 1 : first_row + 8 * half;
          }
          if constexpr (kDecays) {
            const float2 sums[2] = {decay.sum[first_row], decay.sum[first_row + 8]};
            each_score([&](float& x, int half, int column) {
              const float log = difference(sums[half], decay.sum[column]);
              const bool seen = column >= first_seen[half] && column <= last_seen[half];
              x *= exp2_approx(seen ? (p.reverse ? -log : log) : 0);
            });
          }
          each_score([&](float& x, int half, int column) {
            x = column >= first_seen[half] && column <= last_seen[half] ? x : 0;
          });
          if constexpr (kNarrowRange) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int exponent = row_exponent(scores, half);
              const float factor = into_range(exponent);
#pragma unroll
              for (int n = 0; n < kChunk / 8; ++n)
                scores[n][2 * half] *= factor, scores[n][2 * half + 1] *= factor;
              if (lane % 4 == 0) beside.score_exponents[first_row + 8 * half] = exponent;
            }
          }
          const int own = here(lane), store_row = 16 * warp + own % 16, store_column = own / 16 * 8;
#pragma unroll
          for (int n = 0; n < kChunk / 8; n += 2) {
            SplitA<T> parts;
            from_accumulators<T>(parts, scores + n);
            const uint32_t to = base + L::kScores + Panel::offset(store_row, 8 * n + store_column);
            stmatrix<false>(to, parts.high.r);
            stmatrix<false>(to + kPanelBytes, parts.low.r);
          }
          fence_proxy_async();
          if constexpr (reads_state) {
            wgmma_wait<0>();
            wgmma_settle(flat(out));
            if constexpr (kKeyWidth == 128) {
              to_operands(64);
              wgmma_settle(flat(out));
              wgmma_fence();
              read_state(64);
              wgmma_wait<0>();
              wgmma_settle(flat(out));
            }
            if constexpr (kNarrowRange) {
#pragma unroll
              for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) out[n][i] *= out_of_range(exponents[i / 2]);
            }
            if constexpr (kDecays) {
#pragma unroll
              for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) out[n][i] *= decay.of_state[8 * n + first_column + i % 2];
            }
          }
          own_barrier();
        };

        if (has_out) {
          first_head ? make_scores(std::true_type{}) : make_scores(std::false_type{});
          const int first_column = here(lane) % 4 * 2;
          const auto scale_tokens = [&](const auto& factor) {
#pragma unroll
            for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i)
                out[n][i] *= factor(beside.score_exponents[8 * n + first_column + i % 2]);
          };
          if constexpr (kNarrowRange) scale_tokens(into_range);

          // ---- out^T += v^T scores^T
          wgmma_settle(flat(out));
          wgmma_fence();
#pragma unroll
          for (int depth = 0; depth < kChunk; depth += 16)
#pragma unroll
            for (int part = 0; part < 2; ++part)
              wgmma<T, kChunk, Major::kMN>(
                  flat(out), mn_major(v, kPanelBytes, 0, depth),
                  k_major(base + L::kScores + part * kPanelBytes, kPanelBytes, 0, depth), true);
          wgmma_commit();
          wgmma_wait<0>();
          wgmma_settle(flat(out));
          if constexpr (kNarrowRange) scale_tokens(out_of_range);
        } else if (has_others || p.adds_nothing) {
          hide_others();
          own_barrier();
        }

        // ---- S^T = e^{G_last} S^T + v^T k
        if constexpr (kDecays) {
          if (first_head) {
#pragma unroll
            for (int n = 0; n < kKeyWidth / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) state[n][i] *= decay.total;
            if (p.transition && thread == 0) beside.transition[0] *= decay.total;
          }
          SplitA<T> a[kChunk / 16];
          const int own = own_values();
#pragma unroll
          for (int i = 0; i < kChunk / 16; ++i) {
            OperandA<T> unscaled;
            ldmatrix<true>(unscaled.r, v + own + 16 * i * 128);
            a[i] = scaled(unscaled, [&](int token) { return decay.to_state[16 * i + token]; });
          }
          wgmma_settle(flat(state));
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < kChunk / 16; ++i) {
            const uint64_t b = mn_major(k, kPanelBytes, 0, 16 * i);
            wgmma<T, kKeyWidth, Major::kMN>(flat(state), a[i].low.r, b, true);
            wgmma<T, kKeyWidth, Major::kMN>(flat(state), a[i].high.r, b, true);
          }
          wgmma_commit();
        } else {
          wgmma_settle(flat(state));
          wgmma_fence();
#pragma unroll
          for (int depth = 0; depth < kChunk; depth += 16)
            wgmma<T, kKeyWidth, Major::kMN, Major::kMN>(flat(state), mn_major(v, kPanelBytes, 0, depth),
                                                        mn_major(k, kPanelBytes, 0, depth), true);
          wgmma_commit();
        }

        if (has_out && last_head) {
#pragma unroll
          for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] *= p.out_factor;
          if (p.out) {
            __syncwarp();
            const int own = own_values();
#pragma unroll
            for (int n = 0; n < kChunk / 8; n += 2) {
              OperandA<T> rounded;
              from_accumulators<T>(rounded, out + n);
              stmatrix<true>(base + L::kOut + own + 8 * n * 128, rounded.r);
            }
            __syncwarp();
            block.store_rows(chunk, shared + L::kOut);
          } else {
            block.store_floats(chunk, out);
          }
        }
        wgmma_wait<0>();
        wgmma_settle(flat(state));
        release();
        if (kDecays && has_out && last_head) block.store_products(chunk, out, shared + L::kOut);
        if (!kDecays && p.reverse && last_head && chunk.ended >= 0)
          block.end_step(chunk.ended, state, beside.transition);
      }

    block.store_states(state);
    block.store_transition(beside.transition);
  }
#endif
}

template <class T, int kKeyWidth>
void launch_sweep(const Sweep& p, int64_t blocks, void* stream) {
  const auto map = [&](const SweepOperand& x, int64_t width) {
    const int64_t heads = int64_t(p.items) * p.group / x.shared;
    return make_tensor_map(static_cast<const T*>(x.data), {width, heads, p.segments.tokens, p.batch},
                           {x.head, x.time, x.batch}, {64, 1, kChunk, 1});
  };
  const TensorMap k = map(p.k, p.key_width), v = map(p.v, p.value_width);
  const bool has_out = p.out || p.out_float;
  launch("linear_sweep_sm90",
         p.log_decay.data ? sweep_sm90<T, kKeyWidth, true> : sweep_sm90<T, kKeyWidth, false>,
         {dim3(unsigned(blocks)), dim3(kThreads), size_t(Layout<kKeyWidth>::kBytes)}, stream, p,
         has_out ? map(p.q, p.key_width) : k, k, v);
}

template <class T>
void launch_sweep(const Sweep& p, int64_t blocks, void* stream) {
  p.key_width <= 64 ? launch_sweep<T, 64>(p, blocks, stream) : launch_sweep<T, 128>(p, blocks, stream);
}

}  // namespace

bool runs_on_sm90(const Sweep& p) {
  // TMA takes no strides of 0, which expanded tensors have, and no empty tensors.
  const auto fits = [](const SweepOperand& x) {
    return !x.data || (x.head > 0 && x.time > 0 && x.batch > 0);
  };
  return (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && p.segments.tokens > 0 && fits(p.q) &&
         fits(p.k) && fits(p.v) && current_cuda_device().arch == 90;
}

void launch_sweep_sm90(const Sweep& p, int64_t blocks, void* stream) {
  p.dtype == DType::kBFloat16 ? launch_sweep<__nv_bfloat16>(p, blocks, stream)
                              : launch_sweep<__half>(p, blocks, stream);
}

}  // namespace statecore
