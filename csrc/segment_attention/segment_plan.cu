// A warp to a tile, two tokens to a lane, in two passes: each tile looks at its own ids, then at what its
// neighbours have said of theirs. Looking ends at the first tile with another id, so that it costs a warp one
// load of 16 bytes for each 64 tokens of its step and prompt, next to nothing beside attention to them.
//
// Holes may lie anywhere: every question is asked of the tokens that are there, and tiles without any are
// passed over.
#include <algorithm>
#include <stdexcept>

#include "segment_attention/segment_plan.cuh"

namespace statecore {
namespace {

constexpr int kWarps = 4;
constexpr int kNobody = INT32_MAX;
constexpr uint32_t kAllLanes = 0xffffffffu;

// Where a tile lies, and the tiles [tiles_begin, tiles_end) of its sequence.
struct Place {
  int row, begin, end, sequence_end;
  int tiles_begin, tiles_end;
};

__device__ __forceinline__ Place place_of(const DevicePlan& plan, int tile) {
  if (!plan.cu_seqlens) {
    const int row = tile / plan.row_tiles, first = row * plan.row_tiles;
    const int begin = (tile - first) * kTileTokens;
    return {row, begin, min(begin + kTileTokens, plan.keys), plan.keys, first, first + plan.row_tiles};
  }
  if (plan.sequences == 0) return {0, 0, 0, 0, tile, tile};
  int sequence = 0, behind = plan.sequences;
  while (behind - sequence > 1) {
    const int middle = sequence + (behind - sequence) / 2;
    const bool here = plan.cu_seqlens[middle] / kTileTokens + middle <= tile;
    (here ? sequence : behind) = middle;
  }
  const int sequence_begin = min(max(plan.cu_seqlens[sequence], 0), plan.keys);
  const int sequence_end = min(max(plan.cu_seqlens[sequence + 1], sequence_begin), plan.keys);
  const int tiles_begin = min(sequence_begin / kTileTokens + sequence, tile);
  const int length = sequence_end - sequence_begin;
  const int used = (length + kTileTokens - 1) / kTileTokens, index = tile - tiles_begin;
  if (index >= used) return {0, 0, 0, 0, tile, tile};
  const int begin = sequence_begin + index * kTileTokens;
  return {0,
          begin,
          min(begin + kTileTokens, sequence_end),
          sequence_end,
          tiles_begin,
          min(tiles_begin + used, plan.tiles)};
}

// ---- a warp's 64 tokens: lane l has number l in x and number l + 32 in y
__device__ __forceinline__ int2 ids_of(const DevicePlan& plan, const Place& place, int lane) {
  const int32_t* ids = plan.step_ids + place.row * plan.ids_row + place.begin;
  const int tokens = place.end - place.begin;
  return make_int2(lane < tokens ? ids[lane] : -1, lane + 32 < tokens ? ids[lane + 32] : -1);
}

__device__ __forceinline__ uint64_t vote(bool x, bool y) {
  const uint64_t low = __ballot_sync(kAllLanes, x), high = __ballot_sync(kAllLanes, y);
  return low | high << 32;
}

__device__ __forceinline__ int lowest(uint64_t mask) { return __ffsll((long long)mask) - 1; }
__device__ __forceinline__ int highest(uint64_t mask) { return 63 - __clzll((long long)mask); }

__device__ __forceinline__ int of_token(int2 value, int token) {
  const int x = __shfl_sync(kAllLanes, value.x, token), y = __shfl_sync(kAllLanes, value.y, token);
  return token < 32 ? x : y;
}

__device__ __forceinline__ int warp_min(int x) {
  for (int distance = 16; distance > 0; distance /= 2) x = min(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}
__device__ __forceinline__ int warp_max(int x) { return -warp_min(-x); }

// Calls visit(tile, its ids) for the tiles from `from` on, in steps of `step` (1 or -1), to `count` of them,
// some to each lane, until it returns true: the answer does not lie further on. That may be late.
template <class Visit>
__device__ __forceinline__ void search(const DevicePlan& plan, int from, int count, int step, int lane,
                                       const Visit& visit) {
  constexpr int kInFlight = 4;
  for (int done = 0; done < count; done += 32 * kInFlight) {
    TileIds ids[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int at = done + 32 * i + lane;
      ids[i] = at < count ? plan.ids[from + at * step] : TileIds{kNobody, 0, -1, 0};
    }
    bool over = false;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (ids[i].last >= 0) over |= visit(from + (done + 32 * i + lane) * step, ids[i]);
    if (__ballot_sync(kAllLanes, over)) break;
  }
}

// ---- pass 1
__global__ void __launch_bounds__(32 * kWarps) summarize_tiles(DevicePlan plan) {
  const int tile = int(blockIdx.x * kWarps + threadIdx.x / 32), lane = int(threadIdx.x % 32);
  if (tile >= plan.tiles) return;
  const Place place = place_of(plan, tile);
  const int2 ids = ids_of(plan, place, lane);
  const uint64_t somebody = vote(ids.x >= 0, ids.y >= 0);
  TileIds result{kNobody, 0, -1, 0};
  if (somebody) {
    result.first = of_token(ids, lowest(somebody));
    result.first_end = place.begin + highest(vote(ids.x == result.first, ids.y == result.first)) + 1;
    result.last = of_token(ids, highest(somebody));
  }
  if (lane == 0) plan.ids[tile] = result;
}

// ---- pass 2
__global__ void __launch_bounds__(32 * kWarps) place_tiles(DevicePlan plan) {
  const int number = int(blockIdx.x * kWarps + threadIdx.x / 32), lane = int(threadIdx.x % 32);
  if (number >= plan.tiles) return;
  const Place place = place_of(plan, number);
  const int2 ids = ids_of(plan, place, lane);
  const uint64_t somebody = vote(ids.x >= 0, ids.y >= 0);
  TokenTile tile{place.row, place.begin, place.end, 0, 0, number, number, number + 1};
  const int first = somebody ? of_token(ids, lowest(somebody)) : -1;
  const int last = somebody ? of_token(ids, highest(somebody)) : -1;

  // ---- where the prompt lies, where the first step begins and the last one ends
  if (somebody) {
    int begin = place.tiles_end, end = place.tiles_begin;
    search(plan, place.tiles_begin, number + 1 - place.tiles_begin, 1, lane,
           [&](int at, const TileIds& other) {
             if (other.first == 0) begin = min(begin, at), end = max(end, at + 1);
             return other.first > 0;
           });
    tile.prompt_end = warp_max(end);
    tile.prompt_begin = min(warp_min(begin), tile.prompt_end);

    int own_begin = number;
    if (first > 0)
      search(plan, number - 1, number - place.tiles_begin, -1, lane, [&](int at, const TileIds& other) {
        if (other.last == first) own_begin = min(own_begin, at);
        return other.last < first;
      });
    tile.own_begin = max(warp_min(own_begin), tile.prompt_end);
  }
  int last_end = somebody ? place.begin + highest(somebody) + 1 : 0;
  if (last > 0) {
    search(plan, number + 1, place.tiles_end - number - 1, 1, lane, [&](int, const TileIds& other) {
      if (other.first == last) last_end = max(last_end, other.first_end);
      return other.first > last;
    });
    last_end = warp_max(last_end);
  }

  // ---- up to where each token is seen
  int ends[2];
  bool is_end[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = lane + 32 * i, id = i ? ids.y : ids.x;
    const uint64_t later = somebody & ~((uint64_t(2) << token) - 1);
    const int next_id = of_token(ids, later ? lowest(later) : 0);
    is_end[i] = id >= 0 && (!later || next_id != id);
  }
  const uint64_t step_ends = vote(is_end[0], is_end[1]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = lane + 32 * i, id = i ? ids.y : ids.x;
    if (id < 0)
      ends[i] = 0;
    else if (id == 0)
      ends[i] = place.sequence_end;
    else if (id == last)
      ends[i] = last_end;
    else
      ends[i] = place.begin + token + lowest(step_ends >> token) + 1;
    if (place.begin + token < place.end)
      plan.visible_end[int64_t(place.row) * plan.keys + place.begin + token] = ends[i];
  }
  const int tokens = place.end - place.begin;
  tile.min_end = warp_min(min(lane < tokens ? ends[0] : kNobody, lane + 32 < tokens ? ends[1] : kNobody));
  tile.max_end = warp_max(max(ends[0], ends[1]));
  if (lane == 0) plan.tile[number] = tile;
}

}  // namespace

DevicePlan device_plan(const SegmentAttentionParams& p, ScratchAllocator& scratch) {
  DevicePlan plan{};
  const int64_t row_tiles = (p.keys + kTileTokens - 1) / kTileTokens;
  const int64_t tiles = p.cu_seqlens ? p.keys / kTileTokens + p.sequences : p.batch * row_tiles;
  if (p.keys > INT32_MAX - kTileTokens || tiles > INT32_MAX / 2)
    throw std::runtime_error("statecore: segment_attention takes less than 2^31 tokens on CUDA");
  plan.keys = int32_t(p.keys), plan.first_query = int32_t(p.keys - p.queries);
  plan.sequences = int32_t(p.sequences), plan.cu_seqlens = p.cu_seqlens;
  plan.step_ids = p.step_ids, plan.ids_row = p.ids_batch;
  plan.tiles = int32_t(tiles), plan.row_tiles = int32_t(row_tiles);
  plan.query_row_tiles = int32_t(row_tiles - plan.first_query / kTileTokens);
  plan.visible_end = scratch.take<int32_t>(p.batch * p.keys);
  plan.ids = scratch.take<TileIds>(tiles);
  plan.tile = scratch.take<TokenTile>(tiles);
  return plan;
}

void make_plan(const DevicePlan& plan, void* stream) {
  if (plan.tiles == 0) return;
  const LaunchConfig shape{dim3(unsigned((plan.tiles + kWarps - 1) / kWarps)), dim3(32 * kWarps)};
  launch("segment_plan_ids", summarize_tiles, shape, stream, plan);
  launch("segment_plan_tiles", place_tiles, shape, stream, plan);
}

}  // namespace statecore
