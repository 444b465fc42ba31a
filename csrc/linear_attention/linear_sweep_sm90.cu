// The sweep of linear_sweep.h for sm_90a and 16-bit elements: what linear_sweep.cu does, which says how and
// with what precision, with products of warpgroups (wgmma) on tiles that TMA loads.
//
// A block has 64 values (columns) of one head's state in one split, S^T [64 x Dk] in float32 accumulators. It
// consists of a producer warp, in a warpgroup that has given its registers away, and a consumer warpgroup,
// each of whose warps has 16 rows of everything. The producer goes over the chunks of 64 tokens and the
// virtual heads, at most two ahead; the consumers follow it through the two stages:
//
//   1. P = q k^T, and queued behind it out^T = S^T q^T for the first 64 keys, S^T split into two parts in
//      registers; meanwhile P is masked, weighted, split and stored
//   2. out^T += S^T q^T for the other keys; columns times e^{G_i}
//   3. out^T += v^T P^T
//   4. S^T = e^{G_last} S^T + v^T k, with decay from registers, where v^T is weighted and split; meanwhile
//      out^T goes through shared memory into rows and to global memory
//
// ptxas serialises all wgmma where a branch ends with accumulators in flight that one of its arms has named,
// or where accumulators of an earlier product are read while others are in flight. Which products are in
// flight together, and the waits between them, avoid both. Hence kHasDecay, and two copies of 1.
//
// Shared memory: two stages of q, k [64 x Dk] and v [64 x 64], as panels of 64 columns (8 KiB), swizzled by
// TMA; the two parts of P [64 x 64]; out [64 x 64]. Who may write what, and when:
//
//   q, k, v, chunk, decay     the producer, once each of the four consumer warps has released the stage,
//                             after 4.; a stage is full when the producer has arrived and the bytes of q, k,
//                             v have landed
//   tail rows of k and v      the consumers, between barriers A and B: TMA loads 64 rows, and those past the
//                             chunk's end may belong to other sequences, or be NaN. Beyond the tensor it has
//                             put zeros
//   P                         each consumer warp its 16 rows, after A, when all have waited for 3. of the
//                             chunk before; B says that it is complete
//   out                       each consumer warp its 16 columns
//
// A and B are barriers of the consumers; with B, fence_proxy_async shows to wgmma what threads have stored.
//
// Almost nothing of the next chunk starts before 4. is done: a stage is released as early as possible, so
// that loads are in flight, and the other block of the SM fills the gaps.
//
// Calculated for an H200 (4.3 TB/s, 790 TFLOP/s; nothing here has run on a GPU), Dk = Dv = 128, no decay
// [with decay]:
//
//   registers, shared memory:  224 per consumer thread, 32 per other thread, nothing spilled; 107 KiB, with
//                              Dk <= 64 75 KiB
//   blocks per SM:             2, limited by registers
//   per chunk of a block:      P 1.05 MFLOP, 256 clocks; S^T q^T in two parts 2.10, 512; v^T P^T in two parts
//                              1.05, 256; v^T k 1.05, 256 [2.10, 512]: 1280 [1536] clocks, 164 k [197 k] FLOP
//                              per token and head
//   per chunk of an SM's two:  64 KiB, 2.0 us, against 10.5 [12.6] MFLOP, 1.75 [2.1] us
//   B 8, 16 heads, T 8192:     1.07 GB, 250 us; 172 [206] GFLOP, 217 [261] us; 256 blocks, one wave of 264
//   B 1, 12/2 heads, T 32768:  235 MB, 55 us; 64 [77] GFLOP, 82 [98] us; 768 blocks of 1024 tokens
#include "common/cuda_device.h"
#include "common/pipeline_sm90.cuh"
#include "linear_attention/linear_sweep_block.cuh"
#include "linear_attention/linear_sweep_sm90.h"

namespace statecore {
namespace {

constexpr int kThreads = 2 * kSweepThreads;  // consumer warpgroup, then the producer's
constexpr int kConsumerRegisters = 224, kProducerRegisters = 32;
constexpr int kStages = 2, kChunk = sweep_chunk_length(2);
static_assert(kChunk == kTmaTileRows && kSweepValues == kPanelColumns);
constexpr unsigned kConsumerBarrier = 1;  // A and B

using Panel = Tile<__half, kPanelColumns>;

// Shared memory behind the tiles.
struct SharedStorage {
  uint64_t full[kStages], empty[kStages];
  SweepChunk chunks[kStages];
  SweepDecay<kChunk> decays[kStages];
  int score_exponents[kChunk];
  float transition[9];
};

// Offsets in bytes.
template <int kKeyWidth>
struct SharedLayout {
  static constexpr int kKeyBytes = kTmaTileBytes<kKeyWidth>;
  static constexpr int kStageBytes = 2 * kKeyBytes + kPanelBytes;  // q, k, v
  static constexpr int kScores = kStages * kStageBytes;            // P: rounded, then the remainder
  static constexpr int kOut = kScores + 2 * kPanelBytes;
  static constexpr int kStorage = kOut + kPanelBytes;
  static constexpr int kBytes = kStorage + int(sizeof(SharedStorage));
};

// ---- the producer warp
template <class T, int kKeyWidth, bool kHasDecay>
__device__ __forceinline__ void produce(const SweepBlock<T, kKeyWidth>& block, uint32_t base,
                                        SharedStorage& storage, const TensorMap& q_map,
                                        const TensorMap& k_map, const TensorMap& v_map) {
  using L = SharedLayout<kKeyWidth>;
  const SweepParams& p = block.p;
  const Split& split = block.split;
  const uint32_t full = shared_address(storage.full), empty = shared_address(storage.empty);
  const int lane = lane_index();
  float log2_decay[SweepBlock<T, kKeyWidth>::kTokensPerLane] = {};
  if (kHasDecay && split.chunks > 0) block.load_log2_decay(block.chunk_at(0), log2_decay);
  PipelineState<kStages> pipe;
  for (int c = 0; c < split.chunks; ++c) {
    const SweepChunk chunk = block.chunk_at(c);
    const bool padding = chunk.ended_step == kPaddingChunk;  // nothing to load
    for (int g = 0; g < (padding ? 1 : p.group); ++g, pipe.advance()) {
      const int head = block.state_head * p.group + g;
      const uint32_t q = base + pipe.stage * L::kStageBytes, k = q + L::kKeyBytes, v = k + L::kKeyBytes;
      const uint32_t barrier = full + 8 * pipe.stage;
      mbarrier_wait(empty + 8 * pipe.stage, pipe.phase ^ 1);
      if (lane == 0) {
        storage.chunks[pipe.stage] = chunk;
        if (!padding) {
          mbarrier_expect_tx(barrier, block.has_out() ? L::kStageBytes : L::kStageBytes - L::kKeyBytes);
          if (block.has_out())
            tma_load_tile<kKeyWidth>(q, q_map, {0, head / p.q.head_divisor, chunk.begin, split.row}, barrier);
          tma_load_tile<kKeyWidth>(k, k_map, {0, head / p.k.head_divisor, chunk.begin, split.row}, barrier);
          tma_load_tile<kSweepValues>(
              v, v_map, {block.first_value, head / p.v.head_divisor, chunk.begin, split.row}, barrier);
        }
      }
      if constexpr (kHasDecay) scan_decay(log2_decay, p.reverse, storage.decays[pipe.stage]);
      warp_arrive(barrier);
    }
    if (kHasDecay && c + 1 < split.chunks) block.load_log2_decay(block.chunk_at(c + 1), log2_decay);
  }
}

// ---- the consumer warpgroup
template <class T, int kKeyWidth, bool kHasDecay>
struct Consumer {
  using L = SharedLayout<kKeyWidth>;
  using Block = SweepBlock<T, kKeyWidth>;
  static constexpr bool kNarrowRange = std::is_same_v<T, __half>;

  // A full stage.
  struct Stage {
    uint32_t q, k, v;
    unsigned char* k_panels;  // v behind them
    SweepChunk chunk;
    const SweepDecay<kChunk>& decay;
    bool has_tail;  // rows past the chunk's end that are not zeros
  };

  const Block& block;
  const SweepParams& p;
  unsigned char* const shared;
  const uint32_t base;
  SharedStorage& storage;
  typename Block::State state;
  typename Block::Out out;

  __device__ __forceinline__ Consumer(const Block& block, unsigned char* shared, SharedStorage& storage)
      : block(block), p(block.p), shared(shared), base(shared_address(shared)), storage(storage) {}

  __device__ __forceinline__ static int warp() { return warp_uniform(int(threadIdx.x) / 32); }
  __device__ __forceinline__ static void barrier() { named_barrier_sync(kConsumerBarrier, kSweepThreads); }

  // In a panel [token, value], the lane's address for four transposed matrices: 16 tokens, the warp's values.
  __device__ __forceinline__ static int transposed_offset() {
    const int lane = opaque(lane_index());
    return Panel::offset(lane % 8 + lane / 16 * 8, 16 * warp() + lane / 8 % 2 * 8);
  }

  __device__ __forceinline__ void zero_tail_rows(const Stage& stage) {
    const auto zero_from = [&](unsigned char* panel, int row) {
      for (int at = row * 128 + int(threadIdx.x) * 16; at < kPanelBytes; at += kSweepThreads * 16)
        *reinterpret_cast<uint4*>(panel + at) = make_uint4(0, 0, 0, 0);
    };
    if (stage.has_tail) {
#pragma unroll
      for (int key = 0; key < kKeyWidth; key += kPanelColumns)
        zero_from(stage.k_panels + key / kPanelColumns * kPanelBytes, stage.chunk.length);
    }
    if (stage.has_tail || p.zero_v)
      zero_from(stage.k_panels + L::kKeyBytes, p.zero_v ? 0 : stage.chunk.length);
    fence_proxy_async();
  }

  // 64 keys of the state as operands.
  __device__ __forceinline__ void state_operands(SplitA<T> (&a)[4], int begin, const int (&exponents)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = begin / 8 + 2 * i;
      if constexpr (kNarrowRange) {
        float scaled_state[2][4];
#pragma unroll
        for (int j = 0; j < 8; ++j)
          scaled_state[j / 4][j % 4] = state[n + j / 4][j % 4] * range_scale(exponents[j % 4 / 2]);
        pack_accumulators<T>(a[i], scaled_state);
      } else {
        pack_accumulators<T>(a[i], state + n);
      }
    }
  }

  // out^T (+)= S^T q^T over 64 keys.
  __device__ __forceinline__ void read_state(const SplitA<T> (&a)[4], const Stage& stage, int begin) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint64_t b = k_major_descriptor(stage.q, kPanelBytes, 0, begin + 16 * i);
      wgmma<T, kChunk>(flatten(out), a[i].low.r, b, begin + i > 0);
      wgmma<T, kChunk>(flatten(out), a[i].high.r, b, true);
    }
    wgmma_commit();
  }

  // 1. and 2.: P = q k^T, masked and with decay, to shared memory; for the first head out^T = S^T q^T.
  template <bool kReadsState>
  __device__ __forceinline__ void compute_scores(const Stage& stage) {
    SplitA<T> a[4];
    [[maybe_unused]] int exponents[2];
    if constexpr (kReadsState) {
      if constexpr (kNarrowRange)
        exponents[0] = row_exponent(state, 0), exponents[1] = row_exponent(state, 1);
      state_operands(a, 0, exponents);
      wgmma_fence_operand(flatten(out));
    }
    float scores[kChunk / 8][4];
    wgmma_fence_operand(flatten(scores));
    wgmma_fence();
#pragma unroll
    for (int depth = 0; depth < kKeyWidth; depth += 16)
      wgmma<T, kChunk>(flatten(scores), k_major_descriptor(stage.q, kPanelBytes, 0, depth),
                       k_major_descriptor(stage.k, kPanelBytes, 0, depth), depth > 0);
    wgmma_commit();
    if constexpr (kReadsState) read_state(a, stage, 0);
    wgmma_wait<kReadsState ? 1 : 0>();
    wgmma_fence_operand(flatten(scores));
    barrier();  // A
    if (stage.has_tail || p.zero_v) zero_tail_rows(stage);

    const int lane = lane_index();
    const int first_row = 16 * warp() + opaque(lane) / 4, first_column = opaque(lane) % 4 * 2;
    const auto for_each_score = [&](const auto& body) {
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) body(scores[n][i], i / 2, 8 * n + first_column + i % 2);
    };
    int first_visible[2], last_visible[2];  // to the thread's two rows
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      first_visible[half] = p.reverse ? first_row + 8 * half : 0;
      last_visible[half] = p.reverse ? stage.chunk.length - 1 : first_row + 8 * half;
    }
    const auto visible = [&](int half, int column) {
      return column >= first_visible[half] && column <= last_visible[half];
    };
    if constexpr (kHasDecay) {
      const float2 sums[2] = {stage.decay.cumulative[first_row], stage.decay.cumulative[first_row + 8]};
      for_each_score([&](float& x, int half, int column) {
        const float log2 = compensated_difference(sums[half], stage.decay.cumulative[column]);
        x *= exp2_approx(visible(half, column) ? (p.reverse ? -log2 : log2) : 0);
      });
    }
    for_each_score([&](float& x, int half, int column) { x = visible(half, column) ? x : 0; });
    if constexpr (kNarrowRange) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int exponent = row_exponent(scores, half);
        const float factor = range_scale(exponent);
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n) scores[n][2 * half] *= factor, scores[n][2 * half + 1] *= factor;
        if (lane % 4 == 0) storage.score_exponents[first_row + 8 * half] = exponent;
      }
    }
    const int store_lane = opaque(lane);
    const int store_row = 16 * warp() + store_lane % 16, store_column = store_lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < kChunk / 8; n += 2) {
      SplitA<T> parts;
      pack_accumulators<T>(parts, scores + n);
      const uint32_t to = base + L::kScores + Panel::offset(store_row, 8 * n + store_column);
      stmatrix<false>(to, parts.high.r);
      stmatrix<false>(to + kPanelBytes, parts.low.r);
    }
    fence_proxy_async();

    if constexpr (kReadsState) {
      wgmma_wait<0>();
      wgmma_fence_operand(flatten(out));
      if constexpr (kKeyWidth == 128) {
        state_operands(a, 64, exponents);
        wgmma_fence_operand(flatten(out));
        wgmma_fence();
        read_state(a, stage, 64);
        wgmma_wait<0>();
        wgmma_fence_operand(flatten(out));
      }
      if constexpr (kNarrowRange) {
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[n][i] *= range_unscale(exponents[i / 2]);
      }
      if constexpr (kHasDecay) {
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[n][i] *= stage.decay.read[8 * n + first_column + i % 2];
      }
    }
    barrier();  // B
  }

  // 3.: out^T += v^T P^T
  __device__ __forceinline__ void add_values(const Stage& stage) {
    const int first_column = opaque(lane_index()) % 4 * 2;
    const auto scale_tokens = [&](const auto& factor) {
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          out[n][i] *= factor(storage.score_exponents[8 * n + first_column + i % 2]);
    };
    if constexpr (kNarrowRange) scale_tokens(range_scale);
    wgmma_fence_operand(flatten(out));
    wgmma_fence();
#pragma unroll
    for (int depth = 0; depth < kChunk; depth += 16)
#pragma unroll
      for (int part = 0; part < 2; ++part)
        wgmma<T, kChunk, Major::kMN>(
            flatten(out), mn_major_descriptor(stage.v, kPanelBytes, 0, depth),
            k_major_descriptor(base + L::kScores + part * kPanelBytes, kPanelBytes, 0, depth), true);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_fence_operand(flatten(out));
    if constexpr (kNarrowRange) scale_tokens(range_unscale);
  }

  // 4.: S^T = e^{G_last} S^T + v^T k, in flight on return.
  __device__ __forceinline__ void update_state(const Stage& stage, bool first_head) {
    if constexpr (kHasDecay) {
      if (first_head) {
#pragma unroll
        for (int n = 0; n < kKeyWidth / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) state[n][i] *= stage.decay.total;
        if (p.transitions && threadIdx.x == 0) storage.transition[0] *= stage.decay.total;
      }
      SplitA<T> a[kChunk / 16];
      const int offset = transposed_offset();
#pragma unroll
      for (int i = 0; i < kChunk / 16; ++i) {
        OperandA<T> unscaled;
        ldmatrix<true>(unscaled.r, stage.v + offset + 16 * i * 128);
        a[i] = scale_columns(unscaled, [&](int token) { return stage.decay.write[16 * i + token]; });
      }
      wgmma_fence_operand(flatten(state));
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kChunk / 16; ++i) {
        const uint64_t b = mn_major_descriptor(stage.k, kPanelBytes, 0, 16 * i);
        wgmma<T, kKeyWidth, Major::kMN>(flatten(state), a[i].low.r, b, true);
        wgmma<T, kKeyWidth, Major::kMN>(flatten(state), a[i].high.r, b, true);
      }
      wgmma_commit();
    } else {
      wgmma_fence_operand(flatten(state));
      wgmma_fence();
#pragma unroll
      for (int depth = 0; depth < kChunk; depth += 16)
        wgmma<T, kKeyWidth, Major::kMN, Major::kMN>(
            flatten(state), mn_major_descriptor(stage.v, kPanelBytes, 0, depth),
            mn_major_descriptor(stage.k, kPanelBytes, 0, depth), true);
      wgmma_commit();
    }
  }

  // The chunk's results, while 4. is in flight.
  __device__ __forceinline__ void store_out(const Stage& stage) {
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] *= p.out_factor;
    if (p.out) {
      __syncwarp();
      const int offset = transposed_offset();
#pragma unroll
      for (int n = 0; n < kChunk / 8; n += 2) {
        OperandA<T> rounded;
        pack_accumulators<T>(rounded, out + n);
        stmatrix<true>(base + L::kOut + offset + 8 * n * 128, rounded.r);
      }
      __syncwarp();
      block.store_rows(stage.chunk, shared + L::kOut);
    } else {
      block.store_floats(stage.chunk, out);
    }
  }

  __device__ __forceinline__ void run() {
    const uint32_t full = shared_address(storage.full), empty = shared_address(storage.empty);

    // ---- prologue
    block.load_states(state);
    block.init_transition(storage.transition);

    // ---- mainloop
    PipelineState<kStages> pipe;
    for (int c = 0; c < block.split.chunks; ++c)
      for (int g = 0; g < p.group; ++g, pipe.advance()) {
        const bool first_head = g == 0, last_head = g + 1 == p.group;
        mbarrier_wait(full + 8 * pipe.stage, pipe.phase);
        const SweepChunk chunk{warp_uniform(storage.chunks[pipe.stage].begin),
                               warp_uniform(storage.chunks[pipe.stage].length),
                               warp_uniform(storage.chunks[pipe.stage].ended_step)};
        if (chunk.ended_step == kPaddingChunk) {
          warp_arrive(empty + 8 * pipe.stage);
          block.store_zeros(chunk);
          pipe.advance();
          break;
        }
        if (!kHasDecay && !p.reverse && first_head && chunk.ended_step >= 0)
          block.end_step(chunk.ended_step, state, storage.transition);

        const int offset = pipe.stage * L::kStageBytes;
        const Stage stage{base + offset,
                          base + offset + L::kKeyBytes,
                          base + offset + 2 * L::kKeyBytes,
                          shared + offset + L::kKeyBytes,
                          chunk,
                          storage.decays[pipe.stage],
                          chunk.length < kChunk && chunk.begin + chunk.length < p.splits.tokens};
        if (block.has_out()) {
          first_head ? compute_scores<true>(stage) : compute_scores<false>(stage);
          add_values(stage);
        } else if (stage.has_tail || p.zero_v) {
          zero_tail_rows(stage);
          barrier();
        }
        update_state(stage, first_head);
        if (block.has_out() && last_head) store_out(stage);
        wgmma_wait<0>();
        wgmma_fence_operand(flatten(state));
        warp_arrive(empty + 8 * pipe.stage);
        if (kHasDecay && block.has_out() && last_head) block.store_row_dots(chunk, out, shared + L::kOut);

        if (!kHasDecay && p.reverse && last_head && chunk.ended_step >= 0)
          block.end_step(chunk.ended_step, state, storage.transition);
      }

    // ---- epilogue
    block.store_states(state);
    block.store_transition(storage.transition);
  }
};

template <class T, int kKeyWidth, bool kHasDecay>
__global__ void __launch_bounds__(kThreads, 2)
    linear_sweep_sm90_kernel(const __grid_constant__ SweepParams p, const __grid_constant__ TensorMap q_map,
                             const __grid_constant__ TensorMap k_map,
                             const __grid_constant__ TensorMap v_map) {
#if defined(STATECORE_SM90A)
  STATECORE_DYNAMIC_SHARED(shared);
  SharedStorage& storage = *reinterpret_cast<SharedStorage*>(shared + SharedLayout<kKeyWidth>::kStorage);
  const SweepBlock<T, kKeyWidth> block(p);
  if (block.split.sequence < 0) return;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(shared_address(&storage.full[stage]), 1);
      mbarrier_init(shared_address(&storage.empty[stage]), kSweepWarps);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  const int warp = warp_uniform(int(threadIdx.x) / 32);
  if (warp >= kSweepWarps) {
    warpgroup_reg_dealloc<kProducerRegisters>();
    if (warp == kSweepWarps)
      produce<T, kKeyWidth, kHasDecay>(block, shared_address(shared), storage, q_map, k_map, v_map);
  } else {
    warpgroup_reg_alloc<kConsumerRegisters>();
    Consumer<T, kKeyWidth, kHasDecay>(block, shared, storage).run();
  }
#endif
}

template <class T, int kKeyWidth>
void launch_sweep(const SweepParams& p, unsigned blocks, void* stream) {
  const auto map = [&](const SweepOperand& x, int64_t width) {
    const int64_t heads = int64_t(p.state_heads) * p.group / x.head_divisor;
    return heads_tensor_map<T>(x, p.batch, p.splits.tokens, heads, width);
  };
  const TensorMap k = map(p.k, p.key_width), v = map(p.v, p.value_width);
  const bool has_out = p.out || p.out_float;
  launch("linear_sweep_sm90",
         p.log_decay.data ? linear_sweep_sm90_kernel<T, kKeyWidth, true>
                          : linear_sweep_sm90_kernel<T, kKeyWidth, false>,
         {dim3(blocks), dim3(kThreads), size_t(SharedLayout<kKeyWidth>::kBytes)}, stream, p,
         has_out ? map(p.q, p.key_width) : k, k, v);
}

template <class T>
void launch_sweep(const SweepParams& p, unsigned blocks, void* stream) {
  padded_key_width(p.key_width) == 64 ? launch_sweep<T, 64>(p, blocks, stream)
                                      : launch_sweep<T, 128>(p, blocks, stream);
}

}  // namespace

bool linear_sweep_sm90_supports(const SweepParams& p) {
  const auto addressable = [&](const SweepOperand& x) {
    const int64_t heads = int64_t(p.state_heads) * p.group / x.head_divisor;
    return !x.data || tma_addressable(x, p.batch, p.splits.tokens, heads);
  };
  // TMA takes no empty tensors.
  return (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && p.splits.tokens > 0 &&
         addressable(p.q) && addressable(p.k) && addressable(p.v) && current_cuda_device().arch == 90;
}

void linear_sweep_sm90(const SweepParams& p, void* stream) {
  const unsigned blocks = checked_blocks("linear attention", sweep_blocks(p));
  if (blocks == 0) return;
  p.dtype == DType::kBFloat16 ? launch_sweep<__nv_bfloat16>(p, blocks, stream)
                              : launch_sweep<__half>(p, blocks, stream);
}

}  // namespace statecore
