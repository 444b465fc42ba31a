// Work tiles, their schedule and the shared memory of kernels for sm_90a whose consumer warpgroups own
// queries: the forward, and a place for a backward of the queries.
//
// A work tile is an m_block and one head: what a consumer warpgroup computes at a time. The two consumer
// warpgroups of a block share the k_blocks that the producer loads, so work is scheduled in pairs. The work
// tiles of two neighbouring m_blocks and of all heads that read the same keys are numbered, heads first, and
// paired in this order. If the number of these heads is even, both work tiles of a pair have the same m_block
// and visit the same k_blocks. If it is odd, one of these pairs has two m_blocks, and a warpgroup skips the
// k_blocks that only the other one visits.
//
// Scheduling is static and persistent: there are as many blocks as SMs, and block b computes the pairs b, b +
// blocks, ... No pair depends on another, so results are bitwise reproducible.
#pragma once

#include "common/ceil_div.h"
#include "common/pipeline_sm90.cuh"
#include "segment_attention/segment_tiles.cuh"

namespace statecore {

static_assert(kTileTokens == kTmaTileRows, "TMA loads one tile of tokens at a time");

constexpr int kConsumerWarpgroups = 2;
constexpr int kKvStages = 4;  // k_blocks in flight or in use
constexpr int kNoKBlock = INT32_MAX;

// ---- what the producer tells the consumers, besides the tiles
// Queries [begin, end) of a row of the batch for one head; none if begin == end.
struct alignas(16) WorkTile {
  int32_t batch, begin, end, head;
};
struct WorkMessage {
  WorkTile tile[kConsumerWarpgroups];
  bool done;  // no work is left
};

enum KBlockFlags : uint32_t {
  kVisited = 1,  // shifted by the warpgroup's index: it visits the k_block
  kMasked = 4,   // shifted likewise: it needs the mask
  kMore = 16,    // the pair has another k_block
};
struct alignas(16) KBlockMessage {
  int32_t begin;  // position of its first key
  uint32_t flags;
  uint64_t masked_rows;  // bit i: key begin + i is visible to no query of the pair
};

// ---- scheduling
// The k_blocks that an m_block visits.
struct KBlockRange {
  int prompt_begin, prompt_end, own_begin, last;

  // The first one from k_block on; kNoKBlock if there is none.
  __device__ __forceinline__ int from(int k_block) const {
    if (k_block < prompt_end && prompt_begin < prompt_end) return max(k_block, prompt_begin);
    k_block = max(k_block, own_begin);
    return k_block <= last ? k_block : kNoKBlock;
  }
};

// m_block `which` of a pair of neighbours, in the order of DevicePlan::query_tile(). -1: a row with an odd
// number of m_blocks lacks the second one of its last pair.
__device__ __forceinline__ int m_block_of_pair(const DevicePlan& plan, int pair, int which) {
  if (plan.cu_seqlens) return plan.tiles - 1 - 2 * pair - which;
  const int rows = plan.tiles / plan.tiles_per_row;
  const int tile = plan.tiles_per_row - 1 - pair / rows * 2 - which;
  return tile < plan.tiles_per_row - plan.query_tiles_per_row ? -1 : pair % rows * plan.tiles_per_row + tile;
}

// Number of pairs of work tiles.
inline int64_t work_pairs(const SegmentAttentionInputs& p, const DevicePlan& plan) {
  const int64_t m_block_pairs =
      p.cu_seqlens ? ceil_div(plan.tiles, 2) : p.batch * ceil_div(plan.query_tiles_per_row, 2);
  return m_block_pairs * p.query_heads;
}

// A pair of work tiles as the producer sees it.
struct WorkPair {
  int kv_head;
  int head[kConsumerWarpgroups];
  TokenTile queries[kConsumerWarpgroups];
  KBlockRange k_blocks[kConsumerWarpgroups];
  bool visits_any[kConsumerWarpgroups];
  int first_k_block;

  __device__ __forceinline__ WorkPair(const DevicePlan& plan, int pair, int kv_heads, int group) {
    const int m_block_pair = pair / kv_heads / group, first = pair / kv_heads % group * 2;
    kv_head = pair % kv_heads;
#pragma unroll
    for (int w = 0; w < kConsumerWarpgroups; ++w) {
      const int m_block = m_block_of_pair(plan, m_block_pair, (first + w) / group);
      head[w] = kv_head * group + (first + w) % group;
      queries[w] = m_block < 0 ? TokenTile{0, 0, 0, 0, 0, 0, 0, 1} : plan.tile[m_block];
      k_blocks[w] = {queries[w].prompt_begin, queries[w].prompt_end, queries[w].own_begin, max(m_block, 0)};
      visits_any[w] = k_blocks[w].from(0) != kNoKBlock;
    }
    first_k_block = visits_any[0] || visits_any[1] ? k_block_from(0) : 0;
  }

  __device__ __forceinline__ bool empty() const {
    return queries[0].begin == queries[0].end && queries[1].begin == queries[1].end;
  }

  // The first k_block from this one on that either work tile visits; kNoKBlock if there is none.
  __device__ __forceinline__ int k_block_from(int k_block) const {
    return min(k_blocks[0].from(k_block), k_blocks[1].from(k_block));
  }

  // kVisited and kMasked of both warpgroups, and the first query of those that visit. A work tile without
  // k_blocks (no queries, or only padding) visits the pair's first one, so that every consumer has one.
  __device__ __forceinline__ uint32_t flags_of(int k_block, const TokenTile& keys, int* first_query) const {
    uint32_t flags = 0;
    *first_query = INT32_MAX;
#pragma unroll
    for (int w = 0; w < kConsumerWarpgroups; ++w)
      if (k_blocks[w].from(k_block) == k_block) {
        flags |= kVisited << w | (fully_visible(queries[w], keys) ? 0 : kMasked << w);
        *first_query = min(*first_query, queries[w].begin);
      } else if (!visits_any[w] && k_block == first_k_block) {
        flags |= kVisited << w;
      }
    return flags;
  }

  __device__ __forceinline__ WorkTile work_tile(int w) const {
    return {queries[w].batch, queries[w].begin, queries[w].end, head[w]};
  }
};

// ---- shared memory: tiles of Q and O per consumer warpgroup, stages of K and V, the messages, and mbarriers
template <int kWidth>
struct SharedMemory {
  static constexpr int kTileBytes = kTmaTileBytes<kWidth>;
  static constexpr int kBytes = (2 * kConsumerWarpgroups + 2 * kKvStages) * kTileBytes;  // of tiles
  static constexpr int kVisibleEnds = kKvStages * kTileTokens, kBarriers = 2 + 4 * kKvStages;

  unsigned char* tiles;
  WorkMessage* work;
  KBlockMessage* k_blocks;  // [kKvStages]
  int32_t* visible_end;     // [kKvStages][kTileTokens], of masked k_blocks
  uint32_t barriers;

  __device__ __forceinline__ unsigned char* q(int warpgroup) const { return tiles + warpgroup * kTileBytes; }
  __device__ __forceinline__ unsigned char* o(int warpgroup) const {
    return tiles + (kConsumerWarpgroups + warpgroup) * kTileBytes;
  }
  __device__ __forceinline__ unsigned char* k(int stage) const {
    return tiles + (2 * kConsumerWarpgroups + 2 * stage) * kTileBytes;
  }
  __device__ __forceinline__ unsigned char* v(int stage) const { return k(stage) + kTileBytes; }

  // `work` and Q of both warpgroups
  __device__ __forceinline__ uint32_t work_full() const { return barriers; }
  __device__ __forceinline__ uint32_t work_empty() const { return barriers + 8; }
  // Per stage: K with k_blocks and visible_end; V as loaded; V with masked rows zeroed; all of them read
  __device__ __forceinline__ uint32_t k_full(int stage) const { return barriers + 16 + 32 * stage; }
  __device__ __forceinline__ uint32_t v_full(int stage) const { return k_full(stage) + 8; }
  __device__ __forceinline__ uint32_t v_masked(int stage) const { return k_full(stage) + 16; }
  __device__ __forceinline__ uint32_t kv_empty(int stage) const { return k_full(stage) + 24; }

  // By one thread, before a __syncthreads(). `work` is read by the consumer warps and the one that masks V.
  __device__ __forceinline__ void init_barriers() const {
    constexpr int kConsumerWarps = 4 * kConsumerWarpgroups;
    mbarrier_init(work_full(), 1);
    mbarrier_init(work_empty(), kConsumerWarps + 1);
    for (int stage = 0; stage < kKvStages; ++stage) {
      mbarrier_init(k_full(stage), 1);
      mbarrier_init(v_full(stage), 1);
      mbarrier_init(v_masked(stage), 1);
      mbarrier_init(kv_empty(stage), kConsumerWarps);
    }
    fence_mbarrier_init();
  }
};

}  // namespace statecore
