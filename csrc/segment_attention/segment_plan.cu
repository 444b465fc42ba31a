// One warp per tile, two tokens per lane, in two passes: each tile first summarises its own ids, then reads
// the summaries of its neighbours. A search ends at the first tile with another id, so it costs a warp one
// load of 16 bytes per 64 tokens of its step and prompt, negligible next to attending to them.
//
// Padding may be anywhere: only valid tokens are considered, and tiles of padding are skipped.
#include <algorithm>
#include <stdexcept>

#include "common/ceil_div.h"
#include "segment_attention/segment_plan.cuh"

namespace statecore {
namespace {

constexpr int kWarps = 4;
constexpr int kNone = INT32_MAX;
constexpr uint32_t kAllLanes = 0xffffffffu;

// Where a tile lies, and the tiles [tiles_begin, tiles_end) of its sequence.
struct TilePosition {
  int batch, begin, end, sequence_end;
  int tiles_begin, tiles_end;
};

__device__ __forceinline__ TilePosition position_of(const DevicePlan& plan, int tile) {
  if (!plan.cu_seqlens) {
    const int batch = tile / plan.tiles_per_row, first = batch * plan.tiles_per_row;
    const int begin = (tile - first) * kTileTokens;
    return {batch, begin, min(begin + kTileTokens, plan.keys), plan.keys, first, first + plan.tiles_per_row};
  }
  if (plan.sequences == 0) return {0, 0, 0, 0, tile, tile};
  int sequence = 0, sequence_limit = plan.sequences;
  while (sequence_limit - sequence > 1) {
    const int middle = sequence + (sequence_limit - sequence) / 2;
    const bool at_or_before = plan.cu_seqlens[middle] / kTileTokens + middle <= tile;
    (at_or_before ? sequence : sequence_limit) = middle;
  }
  const int sequence_begin = min(max(plan.cu_seqlens[sequence], 0), plan.keys);
  const int sequence_end = min(max(plan.cu_seqlens[sequence + 1], sequence_begin), plan.keys);
  const int tiles_begin = min(sequence_begin / kTileTokens + sequence, tile);
  const int length = sequence_end - sequence_begin;
  const int used = ceil_div(length, kTileTokens), index = tile - tiles_begin;
  if (index >= used) return {0, 0, 0, 0, tile, tile};
  const int begin = sequence_begin + index * kTileTokens;
  return {0,
          begin,
          min(begin + kTileTokens, sequence_end),
          sequence_end,
          tiles_begin,
          min(tiles_begin + used, plan.tiles)};
}

// ---- a warp's 64 tokens: lane l holds token l in x and token l + 32 in y
__device__ __forceinline__ int2 load_ids(const DevicePlan& plan, const TilePosition& position, int lane) {
  const int32_t* ids = plan.step_ids + position.batch * plan.ids_batch + position.begin;
  const int tokens = position.end - position.begin;
  return make_int2(lane < tokens ? ids[lane] : -1, lane + 32 < tokens ? ids[lane + 32] : -1);
}

__device__ __forceinline__ uint64_t ballot(bool x, bool y) {
  const uint64_t low = __ballot_sync(kAllLanes, x), high = __ballot_sync(kAllLanes, y);
  return low | high << 32;
}

__device__ __forceinline__ int lowest_bit(uint64_t mask) { return __ffsll((long long)mask) - 1; }
__device__ __forceinline__ int highest_bit(uint64_t mask) { return 63 - __clzll((long long)mask); }

__device__ __forceinline__ int of_token(int2 value, int token) {
  const int x = __shfl_sync(kAllLanes, value.x, token), y = __shfl_sync(kAllLanes, value.y, token);
  return token < 32 ? x : y;
}

__device__ __forceinline__ int warp_min(int x) {
  for (int distance = 16; distance > 0; distance /= 2) x = min(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}
__device__ __forceinline__ int warp_max(int x) { return -warp_min(-x); }

// Calls visit(tile, its ids) for `count` tiles from `from` on, forwards (stride 1) or backwards (-1), each by
// one lane, until one returns true: the answer does not lie beyond it. Some tiles beyond it are visited too.
template <class Visit>
__device__ __forceinline__ void search(const DevicePlan& plan, int from, int count, int stride, int lane,
                                       const Visit& visit) {
  constexpr int kLoadsInFlight = 4;
  for (int done = 0; done < count; done += 32 * kLoadsInFlight) {
    TileIds ids[kLoadsInFlight];
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const int at = done + 32 * i + lane;
      ids[i] = at < count ? plan.ids[from + at * stride] : TileIds{kNone, 0, -1, 0};
    }
    bool found = false;
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i)
      if (ids[i].last >= 0) found |= visit(from + (done + 32 * i + lane) * stride, ids[i]);
    if (__ballot_sync(kAllLanes, found)) break;
  }
}

// ---- pass 1
__global__ void __launch_bounds__(32 * kWarps) summarize_tiles_kernel(DevicePlan plan) {
  const int tile = int(blockIdx.x * kWarps + threadIdx.x / 32), lane = int(threadIdx.x % 32);
  if (tile >= plan.tiles) return;
  const TilePosition position = position_of(plan, tile);
  const int2 ids = load_ids(plan, position, lane);
  const uint64_t valid = ballot(ids.x >= 0, ids.y >= 0);
  TileIds result{kNone, 0, -1, 0};
  if (valid) {
    result.first = of_token(ids, lowest_bit(valid));
    result.first_end = position.begin + highest_bit(ballot(ids.x == result.first, ids.y == result.first)) + 1;
    result.last = of_token(ids, highest_bit(valid));
  }
  if (lane == 0) plan.ids[tile] = result;
}

// ---- pass 2
__global__ void __launch_bounds__(32 * kWarps) plan_tiles_kernel(DevicePlan plan) {
  const int index = int(blockIdx.x * kWarps + threadIdx.x / 32), lane = int(threadIdx.x % 32);
  if (index >= plan.tiles) return;
  const TilePosition position = position_of(plan, index);
  const int2 ids = load_ids(plan, position, lane);
  const uint64_t valid = ballot(ids.x >= 0, ids.y >= 0);
  TokenTile tile{position.batch, position.begin, position.end, 0, 0, index, index, index + 1};
  const int first = valid ? of_token(ids, lowest_bit(valid)) : -1;
  const int last = valid ? of_token(ids, highest_bit(valid)) : -1;

  // ---- the tiles of the prompt, the tile where the first step starts, the token where the last one ends
  if (valid) {
    int begin = position.tiles_end, end = position.tiles_begin;
    search(plan, position.tiles_begin, index + 1 - position.tiles_begin, 1, lane,
           [&](int at, const TileIds& other) {
             if (other.first == 0) begin = min(begin, at), end = max(end, at + 1);
             return other.first > 0;
           });
    tile.prompt_end = warp_max(end);
    tile.prompt_begin = min(warp_min(begin), tile.prompt_end);

    int own_begin = index;
    if (first > 0)
      search(plan, index - 1, index - position.tiles_begin, -1, lane, [&](int at, const TileIds& other) {
        if (other.last == first) own_begin = min(own_begin, at);
        return other.last < first;
      });
    tile.own_begin = max(warp_min(own_begin), tile.prompt_end);
  }
  int last_end = valid ? position.begin + highest_bit(valid) + 1 : 0;
  if (last > 0) {
    search(plan, index + 1, position.tiles_end - index - 1, 1, lane, [&](int, const TileIds& other) {
      if (other.first == last) last_end = max(last_end, other.first_end);
      return other.first > last;
    });
    last_end = warp_max(last_end);
  }

  // ---- visible_end of every token
  int ends[2];
  bool is_end[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = lane + 32 * i, id = i ? ids.y : ids.x;
    const uint64_t later = valid & ~((uint64_t(2) << token) - 1);
    const int next_id = of_token(ids, later ? lowest_bit(later) : 0);
    is_end[i] = id >= 0 && (!later || next_id != id);
  }
  const uint64_t step_ends = ballot(is_end[0], is_end[1]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = lane + 32 * i, id = i ? ids.y : ids.x;
    if (id < 0)
      ends[i] = 0;
    else if (id == 0)
      ends[i] = position.sequence_end;
    else if (id == last)
      ends[i] = last_end;
    else
      ends[i] = position.begin + token + lowest_bit(step_ends >> token) + 1;
    if (position.begin + token < position.end)
      plan.visible_end[int64_t(position.batch) * plan.keys + position.begin + token] = ends[i];
  }
  const int tokens = position.end - position.begin;
  tile.min_end = warp_min(min(lane < tokens ? ends[0] : kNone, lane + 32 < tokens ? ends[1] : kNone));
  tile.max_end = warp_max(max(ends[0], ends[1]));
  if (lane == 0) plan.tile[index] = tile;
}

}  // namespace

DevicePlan device_plan(const SegmentAttentionInputs& p, ScratchAllocator& scratch) {
  DevicePlan plan{};
  const int64_t tiles_per_row = ceil_div<int64_t>(p.keys, kTileTokens);
  const int64_t tiles = p.cu_seqlens ? p.keys / kTileTokens + p.sequences : p.batch * tiles_per_row;
  if (p.keys > INT32_MAX - kTileTokens || tiles > INT32_MAX / 2)
    throw std::runtime_error("statecore: segment_attention takes less than 2^31 tokens on CUDA");
  plan.keys = int32_t(p.keys), plan.first_query = int32_t(p.keys - p.queries);
  plan.sequences = int32_t(p.sequences), plan.cu_seqlens = p.cu_seqlens;
  plan.step_ids = p.step_ids, plan.ids_batch = p.ids_batch;
  plan.tiles = int32_t(tiles), plan.tiles_per_row = int32_t(tiles_per_row);
  plan.query_tiles_per_row = int32_t(tiles_per_row - plan.first_query / kTileTokens);
  plan.visible_end = scratch.take<int32_t>(p.batch * p.keys);
  plan.ids = scratch.take<TileIds>(tiles);
  plan.tile = scratch.take<TokenTile>(tiles);
  return plan;
}

void make_plan(const DevicePlan& plan, void* stream) {
  if (plan.tiles == 0) return;
  const LaunchConfig config{dim3(unsigned(ceil_div(plan.tiles, kWarps))), dim3(32 * kWarps)};
  launch("segment_plan_ids", summarize_tiles_kernel, config, stream, plan);
  launch("segment_plan_tiles", plan_tiles_kernel, config, stream, plan);
}

}  // namespace statecore
