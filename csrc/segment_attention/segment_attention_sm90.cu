// The forward for GPUs with the instructions of sm_90a: TMA copies, wgmma multiplies, warpgroups have roles.
//
// Work. A unit is a tile of 64 queries and one head: the work of a warpgroup. Two multiply in a block and
// share the tiles of 64 keys and values that come along; so the units of a pair of neighbouring tiles and of
// the heads that read the same keys are counted, heads first, and taken two at a time. With an even number of
// such heads both have the same tile of queries and visit the same keys. With an odd number this is so for
// all but one item of each pair of tiles, where a warpgroup steps over keys that the other one alone visits.
// There are as many blocks as SMs, and block b does items b, b + blocks, ...: the next queries and keys are
// on their way while results are written. No item depends on another, whence the same bits on every run.
//
// Roles, of 384 threads:
//   warps 0-3, 4-7  multiply, 224 registers a thread
//   warp 8          the producer: walks the plan, starts all copies and tells the others what they are for;
//                   56 registers, as have the next ones
//   warp 9          hides values that no query of the item may see, which may be anything, NaN too: where
//                   there are any, it sets them to 0 between their landing and their use
//   warps 10, 11    return
//
// Shared memory for widths padded to 128 (64): 192 (96) KB and 2 KB of messages. Each line ends its life as
// said, and is then filled anew.
//   2 x 16 (8) KB  queries; until all warps have them in registers, at the beginning of the item
//   2 x 16 (8) KB  results of a warpgroup, 16 rows a warp on their way to whole lines of global memory
//   4 x 32 (16) KB stages: keys and values of a tile; until both warpgroups have multiplied with the values,
//                  or stepped over
//
// A warpgroup keeps two products in flight:
//   S = Q K_0^T; weights of S
//   for the next tiles:   issue S = Q K_j^T, then O += weights V_{j-1}
//                         wait for S; new weights, while the tensor cores are at O; wait for O
//   O += weights V_last
// and issues the first product of the next item before it writes the results of this one.
//
// Q and the weights are operands in registers: from shared memory Q alone would take the products of 64 keys
// to the 128 bytes a clock that it delivers. O is rescaled only where a row's highest score has grown.
//
// Costs of a unit and a tile of keys, width 128: 2.1 MFLOP in 8 + 4 wgmma, which take the tensor cores 512
// clocks, and 4096 exponentials, which take 256 beside them. So in 1024 clocks both warpgroups are through
// with the 32 KB of a tile: 32 bytes a clock and SM from L2. What a warpgroup does not hide itself is the
// first softmax of an item and most of its results; the other one does, as far as they are apart.
//
// Calculated for an H200 from 790 TFLOP/s and 4.3 TB/s (nothing here has run on a GPU), bfloat16, widths of
// 128, 32768 tokens, a prompt of 256, steps of 384; tiles cost 7 % beside what is visible:
//
//   12 query heads, 2 of k and v:  3072 items,  45,792 tiles:  96 GFLOP, 122 us; 235 MB, 55 us
//   28 and 4:                      7168 items, 106,848 tiles: 224 GFLOP, 284 us; 537 MB, 125 us
#include <algorithm>

#include "common/cuda_device.h"
#include "common/pipeline_sm90.cuh"
#include "segment_attention/segment_attention_sm90.h"
#include "segment_attention/segment_softmax.cuh"

namespace statecore {
namespace {

constexpr int kGroups = 2;  // warpgroups that multiply; behind them comes that of the producer
constexpr int kBlockThreads = 128 * (kGroups + 1);
constexpr int kStages = 4;  // tiles of keys and of values on their way or in use
static_assert(kTileTokens == kTmaTileRows, "TMA loads a token tile at a time");
constexpr int kVisibleEnds = kStages * kTileTokens;
constexpr int kNoTile = INT32_MAX;

// ---- what the producer tells the others beside the tiles
// Queries [begin, end) of a row of the batch for one head: the work of a warpgroup. None if begin == end.
struct alignas(16) Unit {
  int32_t row, begin, end, head;
};
struct Item {
  Unit unit[kGroups];
  bool over;  // there is none any more
};
enum : uint32_t { kVisited = 1, kMasked = 4, kMore = 16 };  // the first two shifted by the warpgroup
struct alignas(16) KeyTile {
  int32_t begin;    // position of its first key
  uint32_t flags;   // who visits it, for whom some of it is hidden, whether the item has a next one
  uint64_t hidden;  // rows that no visitor may see
};

// Shared memory. Tiles are panels of 64 columns, one behind the other.
template <int kWidth>
struct Shared {
  static constexpr int kTileBytes = kTmaTileBytes<kWidth>;
  static constexpr int kBytes = (2 * kGroups + 2 * kStages) * kTileBytes;

  unsigned char* tiles;
  Item* item;
  KeyTile* key_tiles;    // [kStages]
  int32_t* visible_end;  // [kStages][64], of tiles that are masked for somebody
  uint32_t barriers;

  __device__ __forceinline__ unsigned char* queries(int group) const { return tiles + group * kTileBytes; }
  __device__ __forceinline__ unsigned char* results(int group) const {
    return tiles + (kGroups + group) * kTileBytes;
  }
  __device__ __forceinline__ unsigned char* keys(int stage) const {
    return tiles + (2 * kGroups + 2 * stage) * kTileBytes;
  }
  __device__ __forceinline__ unsigned char* values(int stage) const { return keys(stage) + kTileBytes; }

  __device__ __forceinline__ uint32_t queries_landed() const { return barriers; }
  __device__ __forceinline__ uint32_t queries_read() const { return barriers + 8; }
  __device__ __forceinline__ uint32_t keys_landed(int stage) const { return barriers + 16 + 32 * stage; }
  __device__ __forceinline__ uint32_t values_landed(int stage) const { return keys_landed(stage) + 8; }
  __device__ __forceinline__ uint32_t values_ready(int stage) const { return keys_landed(stage) + 16; }
  __device__ __forceinline__ uint32_t stage_free(int stage) const { return keys_landed(stage) + 24; }
};
constexpr int kBarriers = 2 + 4 * kStages;

// ---- which tiles
// Query tiles come in pairs of neighbours, those that see most first. -1: the last pair of a row lacks one.
__device__ __forceinline__ int tile_of_pair(const DevicePlan& plan, int pair, int which) {
  if (plan.cu_seqlens) return plan.tiles - 1 - 2 * pair - which;
  const int rows = plan.tiles / plan.row_tiles;
  const int tile = plan.row_tiles - 1 - pair / rows * 2 - which;
  return tile < plan.row_tiles - plan.query_row_tiles ? -1 : pair % rows * plan.row_tiles + tile;
}

int64_t pairs_of_tiles(const SegmentAttentionParams& p, const DevicePlan& plan) {
  return p.cu_seqlens ? (plan.tiles + 1) / 2 : p.batch * ((plan.query_row_tiles + 1) / 2);
}

// The tiles of keys that a tile of queries visits.
struct Visits {
  int prompt_begin, prompt_end, own_begin, last;

  // The first one from `tile` on.
  __device__ __forceinline__ int from(int tile) const {
    if (tile < prompt_end && prompt_begin < prompt_end) return max(tile, prompt_begin);
    tile = max(tile, own_begin);
    return tile <= last ? tile : kNoTile;
  }
};

// ---- the producer: a warp that decides and copies
template <int kWidth>
__device__ __forceinline__ void produce(const Shared<kWidth>& shared, const TensorMap& q, const TensorMap& k,
                                        const TensorMap& v, const SegmentAttentionParams& p,
                                        const DevicePlan& plan, int items) {
  constexpr int kTileBytes = Shared<kWidth>::kTileBytes;
  const int lane = lane_index(), kv_heads = int(p.kv_heads), heads = int(p.query_heads) / kv_heads;
  PipelineState<kStages> pipe;
  unsigned parity = 1;
  for (int item = int(blockIdx.x); item < items; item += int(gridDim.x)) {
    // ---- an item is two of the 2 x heads units of a pair of tiles
    const int kv_head = item % kv_heads, pair = item / kv_heads / heads, first = item / kv_heads % heads * 2;
    TokenTile queries[kGroups];
    Visits visits[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int number = tile_of_pair(plan, pair, (first + g) / heads);
      queries[g] = number < 0 ? TokenTile{0, 0, 0, 0, 0, 0, 0, 1} : plan.tile[number];
      visits[g] = {queries[g].prompt_begin, queries[g].prompt_end, queries[g].own_begin, max(number, 0)};
    }
    if (queries[0].begin == queries[0].end && queries[1].begin == queries[1].end) continue;
    // Units that see nobody, where there are no queries or only holes, go along with the first tile.
    const bool sees[kGroups] = {visits[0].from(0) != kNoTile, visits[1].from(0) != kNoTile};
    const auto visited_from = [&](int tile) { return min(visits[0].from(tile), visits[1].from(tile)); };
    const int first_tile = sees[0] || sees[1] ? visited_from(0) : 0;

    int tile = first_tile;
    TokenTile keys = plan.tile[min(tile, plan.tiles - 1)];
    mbarrier_wait(shared.queries_read(), parity);
    parity ^= 1;
    __syncwarp();
    if (lane == 0) {
      shared.item->over = false;
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
        shared.item->unit[g] = {queries[g].row, queries[g].begin, queries[g].end,
                                kv_head * heads + (first + g) % heads};
      mbarrier_arrive_expect_tx(shared.queries_landed(), kGroups * kTileBytes);
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
        tma_load_tile<kWidth>(
            shared_address(shared.queries(g)), q,
            {0, kv_head * heads + (first + g) % heads, queries[g].begin - plan.first_query, queries[g].row},
            shared.queries_landed());
    }

    while (tile != kNoTile) {
      uint32_t flags = 0;
      int first_query = kNoTile;
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
        if (visits[g].from(tile) == tile) {
          flags |= kVisited << g | (all_visible(queries[g], keys) ? 0 : kMasked << g);
          first_query = min(first_query, queries[g].begin);
        } else if (!sees[g] && tile == first_tile) {
          flags |= kVisited << g;
        }
      tile = visited_from(tile + 1);
      if (tile != kNoTile) flags |= kMore;
      const TokenTile next = plan.tile[min(tile, plan.tiles - 1)];
      const bool masked = flags & (kMasked | kMasked << 1);
      int ends[2] = {};
      if (masked)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = keys.begin + lane + 32 * i;
          if (key < keys.end) ends[i] = plan.visible_end[int64_t(keys.row) * plan.keys + key];
        }

      mbarrier_wait(shared.stage_free(pipe.stage), pipe.phase ^ 1);
      __syncwarp();  // no lane still waits when lane 0 starts the next phase
      if (lane == 0) {
        mbarrier_expect_tx(shared.keys_landed(pipe.stage), kTileBytes);
        tma_load_tile<kWidth>(shared_address(shared.keys(pipe.stage)), k, {0, kv_head, keys.begin, keys.row},
                              shared.keys_landed(pipe.stage));
        mbarrier_expect_tx(shared.values_landed(pipe.stage), kTileBytes);
        tma_load_tile<kWidth>(shared_address(shared.values(pipe.stage)), v,
                              {0, kv_head, keys.begin, keys.row}, shared.values_landed(pipe.stage));
      }
      uint64_t hidden = 0;
      if (masked) {
        const uint32_t low = __ballot_sync(0xffffffffu, ends[0] <= first_query);
        hidden = low | uint64_t(__ballot_sync(0xffffffffu, ends[1] <= first_query)) << 32;
        shared.visible_end[pipe.stage * kTileTokens + lane] = ends[0];
        shared.visible_end[pipe.stage * kTileTokens + lane + 32] = ends[1];
      }
      if (lane == 0) shared.key_tiles[pipe.stage] = {keys.begin, flags, hidden};
      __syncwarp();
      keys = next;
      if (lane == 0) {
        mbarrier_arrive(shared.keys_landed(pipe.stage));
        mbarrier_arrive(shared.values_landed(pipe.stage));
      }
      pipe.advance();
    }
  }
  mbarrier_wait(shared.queries_read(), parity);
  if (lane == 0) {
    shared.item->over = true;
    mbarrier_arrive(shared.queries_landed());
  }
}

// ---- a warp that makes values good: a weight of 0 times NaN would be NaN
template <int kWidth>
__device__ __forceinline__ void hide_values(const Shared<kWidth>& shared) {
  constexpr int kPieces = kWidth / 8;
  const int lane = lane_index();
  PipelineState<kStages> pipe;
  for (unsigned parity = 0;; parity ^= 1) {
    mbarrier_wait(shared.queries_landed(), parity);
    const bool over = shared.item->over;
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared.queries_read());
    if (over) return;
    for (bool more = true; more; pipe.advance()) {
      mbarrier_wait(shared.values_landed(pipe.stage), pipe.phase);
      const KeyTile keys = shared.key_tiles[pipe.stage];
      more = keys.flags & kMore;
      if (keys.hidden) {
        unsigned char* values = shared.values(pipe.stage);
#pragma unroll 4
        for (int i = lane; i < kTileTokens * kPieces; i += 32) {
          const int row = i / kPieces, piece = i % kPieces;
          if (keys.hidden >> row & 1)
            *reinterpret_cast<uint4*>(values + piece / 8 * kPanelBytes + row * 128 + piece % 8 * 16) =
                make_uint4(0, 0, 0, 0);
        }
        fence_proxy_async();
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.values_ready(pipe.stage));
    }
  }
}

// ---- a warpgroup that multiplies
template <class T, int kWidth>
__device__ __forceinline__ void attend(const Shared<kWidth>& shared, const SegmentAttentionParams& p,
                                       const DevicePlan& plan) {
  constexpr int kDepths = kWidth / 16;
  const int lane = lane_index(), group = int(threadIdx.x) / 128;
  const int warp_row = int(threadIdx.x) % 128 / 32 * 16;
  const float scale = float(p.scale * kLog2e);
  const auto release = [&](int stage) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared.stage_free(stage));
  };

  // ---- what belongs to a unit: queries as operands, scores and weights of a tile, sums so far
  Unit unit{0, 0, 0, 0};
  int token[2];   // of this lane's two rows
  bool there[2];  // whether that is somebody
  OperandA<T> q[kDepths], weights[kTileTokens / 16];
  float score[kTileTokens / 8][4], out[kWidth / 8][4];
  Softmax softmax(scale);
  float row_lse[2];

  // The next tile that this warpgroup visits: its keys are there. The others are released unseen.
  PipelineState<kStages> pipe;
  KeyTile keys;
  bool more;
  const auto find = [&] {
    while (more) {
      mbarrier_wait(shared.keys_landed(pipe.stage), pipe.phase);
      keys = shared.key_tiles[pipe.stage];
      more = keys.flags & kMore;
      if (keys.flags & kVisited << group) return true;
      release(pipe.stage);
      pipe.advance();
    }
    return false;
  };
  const auto multiply_keys = [&] {
    wgmma_fence_operand(flat(score));
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kDepths; ++d)
      wgmma<T, kTileTokens>(flat(score), q[d].r,
                            k_major(shared_address(shared.keys(pipe.stage)), kPanelBytes, 0, 16 * d), d > 0);
    wgmma_commit();
  };
  const auto multiply_values = [&](const PipelineState<kStages>& of) {
    mbarrier_wait(shared.values_ready(of.stage), of.phase);
    wgmma_fence_operand(flat(out));
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kTileTokens / 16; ++d)
      wgmma<T, kWidth, Major::kMN>(flat(out), weights[d].r,
                                   mn_major(shared_address(shared.values(of.stage)), kPanelBytes, 0, 16 * d),
                                   true);
    wgmma_commit();
  };
  const auto finish_values = [&](const PipelineState<kStages>& of) {
    wgmma_wait<0>();
    wgmma_fence_operand(flat(out));
    release(of.stage);
  };
  const auto weigh = [&](float (&keeps)[2]) {
    wgmma_fence_operand(flat(score));
    const int32_t* ends = shared.visible_end + pipe.stage * kTileTokens;
    if (keys.flags & kMasked << group)
      hide_scores(score, keys.begin, token,
                  [&](int column) { return *reinterpret_cast<const int2*>(ends + column); });
    softmax.weigh(score, keeps);
    wgmma_fence_operand(flat(score));
  };
  const auto round_weights = [&] {
#pragma unroll
    for (int d = 0; d < kTileTokens / 16; ++d) from_accumulators<T>(weights[d], &score[2 * d]);
  };
  const auto write_results = [&] {
    const auto inside = [&](int row) {
      return unit.begin + row < unit.end && unit.begin + row >= plan.first_query;
    };
    float* const lse = static_cast<float*>(p.lse) + (unit.row * p.query_heads + unit.head) * p.queries;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (lane % 4 == 0 && inside(token[i] - unit.begin)) lse[token[i] - plan.first_query] = row_lse[i];
    const int64_t stride = p.query_heads * p.value_width, first_row = unit.begin - plan.first_query;
    const int64_t first = (unit.row * p.queries + first_row) * stride + unit.head * p.value_width;
    if (p.out_dtype == p.dtype)
      store_rows(static_cast<T*>(p.out) + first, stride, int(p.value_width), warp_row, out, inside,
                 shared.results(group));
    else
      store_rows(static_cast<float*>(p.out) + first, stride, int(p.value_width), warp_row, out, inside);
  };

  for (unsigned parity = 0;; parity ^= 1) {
    mbarrier_wait(shared.queries_landed(), parity);
    if (shared.item->over) break;
    const Unit next = shared.item->unit[group];
#pragma unroll
    for (int d = 0; d < kDepths; ++d)
      load<false>(q[d], Tile<T, 64>{}, shared.queries(group) + d / 4 * kPanelBytes, warp_row, d % 4 * 16);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared.queries_read());
    more = true;
    find();
    multiply_keys();
    // The results of the unit before, while the tensor cores are at the first scores of this one.
    if (__ballot_sync(0xffffffffu, unit.begin < unit.end)) write_results();

    unit = next;
    softmax = Softmax(scale);
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      token[i] = unit.begin + warp_row + accumulator_row(2 * i);
      there[i] = token[i] < unit.end && plan.visible_end[int64_t(unit.row) * plan.keys + token[i]] > 0;
    }

    float keeps[2];
    wgmma_wait<0>();
    weigh(keeps);
    round_weights();
    PipelineState<kStages> values = pipe;
    pipe.advance();
    while (find()) {
      multiply_keys();
      multiply_values(values);
      wgmma_wait<1>();
      weigh(keeps);
      // Before the wait there must be a branch: the compiler moves it up over anything else, and the product
      // of values would no longer hide the exponentials.
      if (__ballot_sync(0xffffffffu, keeps[0] != 1 || keeps[1] != 1)) {
        finish_values(values);
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[n][i] *= keeps[i / 2];
      } else {
        finish_values(values);
      }
      round_weights();
      values = pipe;
      pipe.advance();
    }
    multiply_values(values);
    finish_values(values);
    // Here: what a product has written can only be read while none is in flight.
#pragma unroll
    for (int i = 0; i < 2; ++i) row_lse[i] = softmax.finish(i, there[i], out);
  }
  if (unit.begin < unit.end) write_results();
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kBlockThreads, 1)
    segment_forward_sm90(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                         const __grid_constant__ TensorMap v,
                         const __grid_constant__ SegmentAttentionParams p,
                         const __grid_constant__ DevicePlan plan, int items) {
#if defined(STATECORE_SM90A)
  STATECORE_DYNAMIC_SHARED(tiles);
  STATECORE_SHARED(uint64_t, barriers, kBarriers);
  STATECORE_SHARED(Item, item, 1);
  STATECORE_SHARED(KeyTile, key_tiles, kStages);
  STATECORE_SHARED(int32_t, visible_end, kVisibleEnds);
  const Shared<kWidth> shared{tiles, item, key_tiles, visible_end, shared_address(barriers)};
  if (threadIdx.x == 0) {
    mbarrier_init(shared.queries_landed(), 1);
    mbarrier_init(shared.queries_read(), 4 * kGroups + 1);
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(shared.keys_landed(stage), 1);
      mbarrier_init(shared.values_landed(stage), 1);
      mbarrier_init(shared.values_ready(stage), 1);
      mbarrier_init(shared.stage_free(stage), 4 * kGroups);
    }
    fence_mbarrier_init();
    prefetch_tensor_map(q), prefetch_tensor_map(k), prefetch_tensor_map(v);
  }
  __syncthreads();
  if (threadIdx.x >= 128 * kGroups) {
    warpgroup_reg_dealloc<56>();
    const int warp = int(threadIdx.x) / 32 - 4 * kGroups;
    if (warp == 0)
      produce(shared, q, k, v, p, plan, items);
    else if (warp == 1)
      hide_values(shared);
  } else {
    warpgroup_reg_alloc<224>();
    attend<T>(shared, p, plan);
  }
#endif
}

template <class T, int kWidth>
void launch_forward(const SegmentAttentionParams& p, const DevicePlan& plan, void* stream) {
  const unsigned items = checked_blocks("segment_attention", pairs_of_tiles(p, plan) * p.query_heads);
  const unsigned blocks = std::min(items, unsigned(current_cuda_device().multiprocessors));
  launch("segment_attention_sm90", segment_forward_sm90<T, kWidth>,
         {dim3(blocks), dim3(kBlockThreads), size_t(Shared<kWidth>::kBytes)}, stream,
         heads_tensor_map<T>(HeadsView{p.q, p.q_batch, p.q_time, p.q_head}, p.batch, p.queries, p.query_heads,
                             p.key_width),
         heads_tensor_map<T>(HeadsView{p.k, p.k_batch, p.k_time, p.k_head}, p.batch, p.keys, p.kv_heads,
                             p.key_width),
         heads_tensor_map<T>(HeadsView{p.v, p.v_batch, p.v_time, p.v_head}, p.batch, p.keys, p.kv_heads,
                             p.value_width),
         p, plan, int(items));
}

template <class T>
void launch_forward(const SegmentAttentionParams& p, const DevicePlan& plan, void* stream) {
  is_narrow(p) ? launch_forward<T, 64>(p, plan, stream) : launch_forward<T, 128>(p, plan, stream);
}

}  // namespace

bool segment_attention_sm90_takes(const SegmentAttentionParams& p) {
  return current_cuda_device().arch == 90 && p.scale > 0 &&
         (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) &&
         tma_addressable(HeadsView{p.q, p.q_batch, p.q_time, p.q_head}, p.batch, p.queries, p.query_heads) &&
         tma_addressable(HeadsView{p.k, p.k_batch, p.k_time, p.k_head}, p.batch, p.keys, p.kv_heads) &&
         tma_addressable(HeadsView{p.v, p.v_batch, p.v_time, p.v_head}, p.batch, p.keys, p.kv_heads);
}

void segment_attention_sm90(const SegmentAttentionParams& p, const DevicePlan& plan, void* stream) {
  p.dtype == DType::kBFloat16 ? launch_forward<__nv_bfloat16>(p, plan, stream)
                              : launch_forward<__half>(p, plan, stream);
}

}  // namespace statecore
