// The sweep of linear_sweep.h for sm_90a and 16-bit elements: what linear_sweep.cu does, which says how and
// with what precision, with products of warpgroups (wgmma) on tiles that TMA brings.
//
// A block owns 64 values (columns) of one item's state in one segment, S^T [64 x Dk] in float32 accumulators.
// It is a producer warp, in a warpgroup that has given its registers away, and a warpgroup that multiplies:
// 16 rows of everything a warp. The producer goes over the chunks of 64 tokens and the virtual heads, at most
// two ahead, and the others follow it through the two stages:
//
//   1. P = q k^T, and queued behind it out^T = S^T q^T for the first 64 keys, S^T split into two parts in
//      registers; P is masked and weighted meanwhile, split, and stored
//   2. out^T += S^T q^T for the other keys; columns times e^{G_i}
//   3. out^T += v^T P^T
//   4. S^T = e^{G_last} S^T + v^T k, with decay from registers, where v^T is weighted and split; meanwhile
//      out^T goes through shared memory into rows and to global memory
//
// Products that are in flight together and the waits between them are such that ptxas sees no branch end with
// accumulators in flight that one of its arms has named, and no accumulator of an earlier product read while
// others are in flight: it would serialise all of them. Hence kDecays, and two copies of 1.
//
// Shared memory: two stages of q, k [64 x Dk] and v [64 x 64], 8 KiB panels of 64 columns as TMA swizzles
// them; the two parts of P [64 x 64]; out [64 x 64]. Who may write what, and from when on:
//
//   q, k, v, chunk, weights   the producer, once each of the four warps has released the stage, after 4.;
//                             they are full when its arrival and the bytes of q, k, v have come
//   rows of k and v that are  the four warps, after barrier A, before B: TMA loads 64 rows, the last of which
//   not the chunk's           may be other sequences', or not numbers. Beyond the tensor it has put zeros
//   P                         each warp its 16 rows, after A, when all have waited for 3. of the chunk
//   before;
//                             B says that it is complete
//   out                       each warp 16 columns, for itself
//
// A and B are barriers of the four warps; with B, fence_proxy_async shows to wgmma what threads have stored.
// A barrier's n-th phase has parity n % 2: round r of a stage waits for full with r % 2 and, to fill it, for
// empty with (r + 1) % 2, which in round 0 a fresh barrier has behind it.
//
// Next to nothing of the next chunk starts before 4. is done: a stage is released as early as can be, so that
// loads are in flight, and the other block of the SM fills the gaps.
//
// Calculated for an H200 (4.3 TB/s, 790 TFLOP/s; nothing here has run on a GPU), Dk = Dv = 128, no decay
// [with decay]:
//
//   registers, shared memory:  224 a thread that multiplies, 32 another, nothing spilled; 107 KiB, with
//                              Dk <= 64 75 KiB
//   blocks an SM:              2, limited by registers
//   a chunk of a block:        P 1.05 MFLOP, 256 clocks; S^T q^T in two parts 2.10, 512; v^T P^T in two parts
//                              1.05, 256; v^T k 1.05, 256 [2.10, 512]: 1280 [1536] clocks, 164 k [197 k] FLOP
//                              a token and head
//   a chunk of an SM's two:    64 KiB, 2.0 us, against 10.5 [12.6] MFLOP, 1.75 [2.1] us
//   B 8, 16 heads, T 8192:     1.07 GB, 250 us; 172 [206] GFLOP, 217 [261] us; 256 blocks for 264 places
//   B 1, 12/2 heads, T 32768:  235 MB, 55 us; 64 [77] GFLOP, 82 [98] us; 768 blocks of 1024 tokens
#include "common/cuda_device.h"
#include "common/hopper.cuh"
#include "linear_attention/linear_sweep_block.cuh"

namespace statecore {
namespace {

constexpr int kThreads = 2 * kSweepThreads;
constexpr int kMathRegisters = 224, kLoadRegisters = 32;
constexpr int kStages = 2, kChunk = 64, kPanelBytes = 64 * 128;
constexpr unsigned kSweepBarrier = 1;  // of the warps that multiply: A and B

using Panel = Tile<__half, 64>;

// What lies behind the tiles.
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
    fence_mbarrier_init();
  }
  __syncthreads();

  // ---- the producer
  if (warp >= kSweepWarps) {
    warpgroup_reg_dealloc<kLoadRegisters>();
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
            mbarrier_expect_tx(barrier, has_out ? L::kStageBytes : L::kStageBytes - L::kKeyBytes);
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
    warpgroup_reg_alloc<kMathRegisters>();
    const auto own_barrier = [] { named_barrier_sync(kSweepBarrier, kSweepThreads); };
    typename Block::State state;
    typename Block::Out out;
    block.load_states(state);
    block.begin_transition(beside.transition);
    // In a panel [token, value], the lane's address for four transposed matrices: 16 tokens, the warp's
    // values.
    const auto own_values = [&] {
      const int own = opaque(lane);
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

        // Has the stage rows of tokens that are not the chunk's?
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

        // ---- scores = q k^T, masked and with decay, to shared memory; for the first head out^T = S^T q^T
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
            wgmma_fence_operand(flat(out));
          }
          float scores[kChunk / 8][4];
          wgmma_fence_operand(flat(scores));
          wgmma_fence();
#pragma unroll
          for (int depth = 0; depth < kKeyWidth; depth += 16)
            wgmma<T, kChunk>(flat(scores), k_major(q, kPanelBytes, 0, depth),
                             k_major(k, kPanelBytes, 0, depth), depth > 0);
          wgmma_commit();
          if constexpr (reads_state) read_state(0);
          wgmma_wait<reads_state ? 1 : 0>();
          wgmma_fence_operand(flat(scores));
          own_barrier();  // A
          if (has_others || p.adds_nothing) hide_others();

          const int first_row = 16 * warp + opaque(lane) / 4, first_column = opaque(lane) % 4 * 2;
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
          const int own = opaque(lane), store_row = 16 * warp + own % 16, store_column = own / 16 * 8;
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
            wgmma_fence_operand(flat(out));
            if constexpr (kKeyWidth == 128) {
              to_operands(64);
              wgmma_fence_operand(flat(out));
              wgmma_fence();
              read_state(64);
              wgmma_wait<0>();
              wgmma_fence_operand(flat(out));
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
          own_barrier();  // B
        };

        if (has_out) {
          first_head ? make_scores(std::true_type{}) : make_scores(std::false_type{});
          const int first_column = opaque(lane) % 4 * 2;
          const auto scale_tokens = [&](const auto& factor) {
#pragma unroll
            for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i)
                out[n][i] *= factor(beside.score_exponents[8 * n + first_column + i % 2]);
          };
          if constexpr (kNarrowRange) scale_tokens(into_range);

          // ---- out^T += v^T scores^T
          wgmma_fence_operand(flat(out));
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
          wgmma_fence_operand(flat(out));
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
          wgmma_fence_operand(flat(state));
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < kChunk / 16; ++i) {
            const uint64_t b = mn_major(k, kPanelBytes, 0, 16 * i);
            wgmma<T, kKeyWidth, Major::kMN>(flat(state), a[i].low.r, b, true);
            wgmma<T, kKeyWidth, Major::kMN>(flat(state), a[i].high.r, b, true);
          }
          wgmma_commit();
        } else {
          wgmma_fence_operand(flat(state));
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
        wgmma_fence_operand(flat(state));
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
void launch_sweep(const Sweep& p, unsigned blocks, void* stream) {
  const auto map = [&](const SweepOperand& x, int64_t width) {
    const int64_t heads = int64_t(p.items) * p.group / x.shared;
    return make_tensor_map(static_cast<const T*>(x.data), {width, heads, p.segments.tokens, p.batch},
                           {x.head, x.time, x.batch}, {64, 1, kChunk, 1});
  };
  const TensorMap k = map(p.k, p.key_width), v = map(p.v, p.value_width);
  const bool has_out = p.out || p.out_float;
  launch("linear_sweep_sm90",
         p.log_decay.data ? sweep_sm90<T, kKeyWidth, true> : sweep_sm90<T, kKeyWidth, false>,
         {dim3(blocks), dim3(kThreads), size_t(Layout<kKeyWidth>::kBytes)}, stream, p,
         has_out ? map(p.q, p.key_width) : k, k, v);
}

template <class T>
void launch_sweep(const Sweep& p, unsigned blocks, void* stream) {
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

void launch_sweep_sm90(const Sweep& p, unsigned blocks, void* stream) {
  p.dtype == DType::kBFloat16 ? launch_sweep<__nv_bfloat16>(p, blocks, stream)
                              : launch_sweep<__half>(p, blocks, stream);
}

}  // namespace statecore
