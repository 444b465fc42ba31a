// The forward for GPUs with the instructions of sm_90a: TMA loads, wgmma products, specialised warps.
//
// A work tile is 64 queries of one head. A block of 384 threads computes two of them at a time, which share
// the k_blocks of 64 keys and values (segment_work_sm90.cuh). Blocks are persistent, one per SM: the next
// queries and keys are in flight during an epilogue.
//
// Roles:
//   warps 0-3, 4-7  consumer warpgroups, 224 registers per thread
//   warp 8          producer: walks the plan, issues all loads, tells the consumers what they are for; 56
//                   registers per thread, like warps 9-11
//   warp 9          zeroes V rows that no query of the pair sees, after they have landed and before they are
//                   used: they may hold anything, and 0 * NaN would poison O
//   warps 10, 11    exit
//
// Shared memory for widths padded to 128 (64): 192 (96) KB of tiles, and 2 KB of messages.
//   2 x 16 (8) KB   Q; may be refilled once all consumer warps have it in registers, early in a work tile
//   2 x 16 (8) KB   O: 16 rows per warp, on their way to whole lines of global memory
//   4 x 32 (16) KB  stages of K and V; empty once both warpgroups have finished P V, or skipped the k_block
//
// A consumer warpgroup keeps two products in flight:
//   S = Q K_0^T; softmax
//   mainloop:     issue S = Q K_j^T, then O += P V_{j-1}
//                 wait for S; softmax, while the tensor cores compute P V; wait for O
//   O += P V_last
// and issues the first product of the next work tile before it stores the results of this one.
//
// Q and P are operands in registers: from shared memory, Q alone would take the products of 64 keys to the
// 128 bytes per clock that it delivers. O is rescaled only where a row_max has grown.
//
// Cost of a work tile and a k_block, width 128: 2.1 MFLOP in 8 + 4 wgmma, which take the tensor cores 512
// clocks, and 4096 exponentials, which take 256 at the same time. So both warpgroups finish the 32 KB of a
// k_block in 1024 clocks: 32 bytes per clock and SM from L2. A warpgroup does not overlap the first softmax
// of a work tile and most of its epilogue with products of its own; the other warpgroup's products fill these
// gaps as far as the two are staggered.
//
// Calculated for an H200 from 790 TFLOP/s and 4.3 TB/s (nothing here has run on a GPU), bfloat16, widths of
// 128, 32768 tokens, a prompt of 256, steps of 384; tiles cost 7 % on top of what is visible:
//
//   12 query heads, 2 of k and v:  3072 pairs,  45,792 k_blocks:  96 GFLOP, 122 us; 235 MB, 55 us
//   28 and 4:                      7168 pairs, 106,848 k_blocks: 224 GFLOP, 284 us; 537 MB, 125 us
#include <algorithm>

#include "common/cuda_device.h"
#include "segment_attention/segment_attention_sm90.h"
#include "segment_attention/segment_softmax.cuh"
#include "segment_attention/segment_work_sm90.cuh"

namespace statecore {
namespace {

constexpr int kBlockThreads = 128 * (kConsumerWarpgroups + 1);  // the last warpgroup is the producer's
constexpr int kConsumerRegisters = 224, kProducerRegisters = 56;

using WorkState = PipelineState<1>;  // of `work` and Q
using KvState = PipelineState<kKvStages>;

// ---- producer warp: issues all loads
template <int kWidth>
__device__ __forceinline__ void produce(const SharedMemory<kWidth>& shared, const TensorMap& q,
                                        const TensorMap& k, const TensorMap& v,
                                        const SegmentAttentionParams& p, const DevicePlan& plan, int pairs) {
  constexpr int kTileBytes = SharedMemory<kWidth>::kTileBytes;
  const int lane = lane_index(), kv_heads = int(p.kv_heads), group = int(p.query_heads) / kv_heads;
  KvState kv;
  WorkState work_state;
  for (int pair = int(blockIdx.x); pair < pairs; pair += int(gridDim.x)) {
    const WorkPair work(plan, pair, kv_heads, group);
    if (work.empty()) continue;

    // ---- work tiles and Q
    int k_block = work.first_k_block;
    TokenTile keys = plan.tile[min(k_block, plan.tiles - 1)];
    mbarrier_wait(shared.work_empty(), work_state.phase ^ 1);
    work_state.advance();
    __syncwarp();
    if (lane == 0) {
      shared.work->done = false;
#pragma unroll
      for (int w = 0; w < kConsumerWarpgroups; ++w) shared.work->tile[w] = work.work_tile(w);
      mbarrier_arrive_expect_tx(shared.work_full(), kConsumerWarpgroups * kTileBytes);
#pragma unroll
      for (int w = 0; w < kConsumerWarpgroups; ++w)
        tma_load_tile<kWidth>(
            shared_address(shared.q(w)), q,
            {0, work.head[w], work.queries[w].begin - plan.first_query, work.queries[w].batch},
            shared.work_full());
    }

    // ---- k_blocks
    while (k_block != kNoKBlock) {
      int first_query;
      uint32_t flags = work.flags_of(k_block, keys, &first_query);
      k_block = work.k_block_from(k_block + 1);
      if (k_block != kNoKBlock) flags |= kMore;
      const TokenTile next_keys = plan.tile[min(k_block, plan.tiles - 1)];
      const bool masked = flags & (kMasked | kMasked << 1);
      int visible_end[2] = {};  // of two keys per lane
      if (masked)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = keys.begin + lane + 32 * i;
          if (key < keys.end) visible_end[i] = plan.visible_end[int64_t(keys.batch) * plan.keys + key];
        }

      mbarrier_wait(shared.kv_empty(kv.stage), kv.phase ^ 1);
      __syncwarp();  // all lanes have seen the phase end before lane 0 starts the next one
      if (lane == 0) {
        const int at[4] = {0, work.kv_head, keys.begin, keys.batch};
        mbarrier_expect_tx(shared.k_full(kv.stage), kTileBytes);
        tma_load_tile<kWidth>(shared_address(shared.k(kv.stage)), k, at, shared.k_full(kv.stage));
        mbarrier_expect_tx(shared.v_full(kv.stage), kTileBytes);
        tma_load_tile<kWidth>(shared_address(shared.v(kv.stage)), v, at, shared.v_full(kv.stage));
      }
      uint64_t masked_rows = 0;
      if (masked) {
        const uint32_t low = __ballot_sync(0xffffffffu, visible_end[0] <= first_query);
        masked_rows = low | uint64_t(__ballot_sync(0xffffffffu, visible_end[1] <= first_query)) << 32;
        shared.visible_end[kv.stage * kTileTokens + lane] = visible_end[0];
        shared.visible_end[kv.stage * kTileTokens + lane + 32] = visible_end[1];
      }
      if (lane == 0) shared.k_blocks[kv.stage] = {keys.begin, flags, masked_rows};
      __syncwarp();
      keys = next_keys;
      if (lane == 0) {
        mbarrier_arrive(shared.k_full(kv.stage));
        mbarrier_arrive(shared.v_full(kv.stage));
      }
      kv.advance();
    }
  }
  mbarrier_wait(shared.work_empty(), work_state.phase ^ 1);
  if (lane == 0) {
    shared.work->done = true;
    mbarrier_arrive(shared.work_full());
  }
}

// ---- masking warp: zeroes masked V rows, since 0 * NaN would poison O
template <int kWidth>
__device__ __forceinline__ void mask_values(const SharedMemory<kWidth>& shared) {
  constexpr int kPieces = kWidth / 8;  // of 16 bytes, per row
  const int lane = lane_index();
  KvState kv;
  for (WorkState work_state;; work_state.advance()) {
    mbarrier_wait(shared.work_full(), work_state.phase);
    const bool done = shared.work->done;
    warp_arrive(shared.work_empty());
    if (done) return;
    for (bool more = true; more; kv.advance()) {
      mbarrier_wait(shared.v_full(kv.stage), kv.phase);
      const KBlockMessage keys = shared.k_blocks[kv.stage];
      more = keys.flags & kMore;
      if (keys.masked_rows) {
        unsigned char* v = shared.v(kv.stage);
#pragma unroll 4
        for (int i = lane; i < kTileTokens * kPieces; i += 32) {
          const int row = i / kPieces, piece = i % kPieces;
          if (keys.masked_rows >> row & 1)
            *reinterpret_cast<uint4*>(v + piece / 8 * kPanelBytes + row * 128 + piece % 8 * 16) =
                make_uint4(0, 0, 0, 0);
        }
        fence_proxy_async();
      }
      warp_arrive(shared.v_masked(kv.stage));
    }
  }
}

// ---- consumer warpgroup
// Stores a finalized work tile. `token` and `lse` are those of the lane's two rows.
template <class T, int kWidth>
__device__ __forceinline__ void store_results(const SegmentAttentionParams& p, const DevicePlan& plan,
                                              const WorkTile& work, const int (&token)[2],
                                              const float (&out)[kWidth / 8][4], const float (&lse)[2],
                                              unsigned char* o_tile) {
  const auto is_query_row = [&](int row) {
    return work.begin + row < work.end && work.begin + row >= plan.first_query;
  };
  float* const to_lse = static_cast<float*>(p.lse) + (work.batch * p.query_heads + work.head) * p.queries;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (lane_index() % 4 == 0 && is_query_row(token[i] - work.begin))
      to_lse[token[i] - plan.first_query] = lse[i];
  const int warp_row = int(threadIdx.x) % 128 / 32 * 16;
  const int64_t stride = p.query_heads * p.value_width, first_row = work.begin - plan.first_query;
  const int64_t first = (work.batch * p.queries + first_row) * stride + work.head * p.value_width;
  if (p.out_dtype == p.dtype)
    store_rows(static_cast<T*>(p.out) + first, stride, int(p.value_width), warp_row, out, is_query_row,
               o_tile);
  else
    store_rows(static_cast<float*>(p.out) + first, stride, int(p.value_width), warp_row, out, is_query_row);
}

template <class T, int kWidth>
__device__ __forceinline__ void consume(const SharedMemory<kWidth>& shared, const SegmentAttentionParams& p,
                                        const DevicePlan& plan) {
  constexpr int kDepths = kWidth / 16;
  const int warpgroup = int(threadIdx.x) / 128;
  const int warp_row = int(threadIdx.x) % 128 / 32 * 16;
  const float scale_log2 = float(p.scale * kLog2e);

  // ---- state of a work tile
  WorkTile work{0, 0, 0, 0};
  int token[2];   // of the lane's two rows
  bool valid[2];  // not padding
  OperandA<T> q[kDepths], probabilities[kTileTokens / 16];
  float scores[kTileTokens / 8][4], out[kWidth / 8][4];
  Softmax softmax(scale_log2);
  float lse[2];

  // Waits for K of the next k_block that this warpgroup visits; releases those that it skips.
  KvState kv;
  KBlockMessage keys;
  bool more;
  const auto next_k_block = [&] {
    while (more) {
      mbarrier_wait(shared.k_full(kv.stage), kv.phase);
      keys = shared.k_blocks[kv.stage];
      more = keys.flags & kMore;
      if (keys.flags & kVisited << warpgroup) return true;
      warp_arrive(shared.kv_empty(kv.stage));
      kv.advance();
    }
    return false;
  };
  const auto issue_qk = [&] {
    wgmma_fence_operand(flatten(scores));
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kDepths; ++d)
      wgmma<T, kTileTokens>(flatten(scores), q[d].r,
                            k_major_descriptor(shared_address(shared.k(kv.stage)), kPanelBytes, 0, 16 * d),
                            d > 0);
    wgmma_commit();
  };
  const auto issue_pv = [&](const KvState& of) {
    mbarrier_wait(shared.v_masked(of.stage), of.phase);
    wgmma_fence_operand(flatten(out));
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kTileTokens / 16; ++d)
      wgmma<T, kWidth, Major::kMN>(
          flatten(out), probabilities[d].r,
          mn_major_descriptor(shared_address(shared.v(of.stage)), kPanelBytes, 0, 16 * d), true);
    wgmma_commit();
  };
  const auto wait_pv = [&](const KvState& of) {
    wgmma_wait<0>();
    wgmma_fence_operand(flatten(out));
    warp_arrive(shared.kv_empty(of.stage));
  };
  const auto mask_and_softmax = [&](float (&rescale)[2]) {
    wgmma_fence_operand(flatten(scores));
    const int32_t* visible_end = shared.visible_end + kv.stage * kTileTokens;
    if (keys.flags & kMasked << warpgroup)
      mask_scores(scores, keys.begin, token,
                  [&](int column) { return *reinterpret_cast<const int2*>(visible_end + column); });
    softmax.online_softmax(scores, rescale);
    wgmma_fence_operand(flatten(scores));
  };
  const auto round_probabilities = [&] {
#pragma unroll
    for (int d = 0; d < kTileTokens / 16; ++d) pack_accumulators<T>(probabilities[d], &scores[2 * d]);
  };

  for (WorkState work_state;; work_state.advance()) {
    mbarrier_wait(shared.work_full(), work_state.phase);
    if (shared.work->done) break;

    // ---- prologue: Q to registers, S of the first k_block
    const WorkTile next_work = shared.work->tile[warpgroup];
#pragma unroll
    for (int d = 0; d < kDepths; ++d)
      load_operand<false>(q[d], Tile<T, 64>{}, shared.q(warpgroup) + d / 4 * kPanelBytes, warp_row,
                          d % 4 * 16);
    warp_arrive(shared.work_empty());
    more = true;
    next_k_block();
    issue_qk();
    // Meanwhile the previous work tile's results. The ballot makes the branch uniform.
    if (__ballot_sync(0xffffffffu, work.begin < work.end))
      store_results<T, kWidth>(p, plan, work, token, out, lse, shared.o(warpgroup));

    work = next_work;
    softmax = Softmax(scale_log2);
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      token[i] = work.begin + warp_row + accumulator_row(2 * i);
      valid[i] = token[i] < work.end && plan.visible_end[int64_t(work.batch) * plan.keys + token[i]] > 0;
    }

    float rescale[2];
    wgmma_wait<0>();
    mask_and_softmax(rescale);
    round_probabilities();
    KvState v_state = kv;  // of the probabilities
    kv.advance();

    // ---- mainloop
    while (next_k_block()) {
      issue_qk();
      issue_pv(v_state);
      wgmma_wait<1>();
      mask_and_softmax(rescale);
      // The wait must follow a branch: the compiler moves it up over anything else, and the exponentials
      // would no longer overlap P V.
      if (__ballot_sync(0xffffffffu, rescale[0] != 1 || rescale[1] != 1)) {
        wait_pv(v_state);
        Softmax::rescale_o(out, rescale);
      } else {
        wait_pv(v_state);
      }
      round_probabilities();
      v_state = kv;
      kv.advance();
    }

    // ---- epilogue; the results are stored during the next prologue
    issue_pv(v_state);
    wait_pv(v_state);
    // Not in store_results(): accumulators can only be read while no product is in flight.
#pragma unroll
    for (int i = 0; i < 2; ++i) lse[i] = softmax.finalize(i, valid[i], out);
  }
  if (work.begin < work.end) store_results<T, kWidth>(p, plan, work, token, out, lse, shared.o(warpgroup));
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kBlockThreads, 1)
    segment_forward_sm90_kernel(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                                const __grid_constant__ TensorMap v,
                                const __grid_constant__ SegmentAttentionParams p,
                                const __grid_constant__ DevicePlan plan, int pairs) {
#if defined(STATECORE_SM90A)
  STATECORE_DYNAMIC_SHARED(tiles);
  STATECORE_SHARED(uint64_t, barriers, SharedMemory<kWidth>::kBarriers);
  STATECORE_SHARED(WorkMessage, work, 1);
  STATECORE_SHARED(KBlockMessage, k_blocks, kKvStages);
  STATECORE_SHARED(int32_t, visible_end, SharedMemory<kWidth>::kVisibleEnds);
  const SharedMemory<kWidth> shared{tiles, work, k_blocks, visible_end, shared_address(barriers)};
  if (threadIdx.x == 0) {
    shared.init_barriers();
    prefetch_tensor_map(q), prefetch_tensor_map(k), prefetch_tensor_map(v);
  }
  __syncthreads();
  if (threadIdx.x >= 128 * kConsumerWarpgroups) {
    warpgroup_reg_dealloc<kProducerRegisters>();
    const int warp = int(threadIdx.x) / 32 - 4 * kConsumerWarpgroups;
    if (warp == 0)
      produce(shared, q, k, v, p, plan, pairs);
    else if (warp == 1)
      mask_values(shared);
  } else {
    warpgroup_reg_alloc<kConsumerRegisters>();
    consume<T>(shared, p, plan);
  }
#endif
}

template <class T, int kWidth>
void launch_forward(const SegmentAttentionParams& p, const DevicePlan& plan, void* stream) {
  const unsigned pairs = checked_blocks("segment_attention", work_pairs(p, plan));
  const unsigned blocks = std::min(pairs, unsigned(current_cuda_device().multiprocessors));
  launch("segment_attention_sm90", segment_forward_sm90_kernel<T, kWidth>,
         {dim3(blocks), dim3(kBlockThreads), size_t(SharedMemory<kWidth>::kBytes)}, stream,
         heads_tensor_map<T>(p.q, p.batch, p.queries, p.query_heads, p.key_width),
         heads_tensor_map<T>(p.k, p.batch, p.keys, p.kv_heads, p.key_width),
         heads_tensor_map<T>(p.v, p.batch, p.keys, p.kv_heads, p.value_width), p, plan, int(pairs));
}

template <class T>
void launch_forward(const SegmentAttentionParams& p, const DevicePlan& plan, void* stream) {
  is_narrow(p) ? launch_forward<T, 64>(p, plan, stream) : launch_forward<T, 128>(p, plan, stream);
}

}  // namespace

bool segment_attention_sm90_supports(const SegmentAttentionParams& p) {
  return current_cuda_device().arch == 90 && p.scale > 0 &&
         (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) &&
         tma_addressable(p.q, p.batch, p.queries, p.query_heads) &&
         tma_addressable(p.k, p.batch, p.keys, p.kv_heads) &&
         tma_addressable(p.v, p.batch, p.keys, p.kv_heads);
}

void segment_attention_sm90(const SegmentAttentionParams& p, const DevicePlan& plan, void* stream) {
  p.dtype == DType::kBFloat16 ? launch_forward<__nv_bfloat16>(p, plan, stream)
                              : launch_forward<__half>(p, plan, stream);
}

}  // namespace statecore
