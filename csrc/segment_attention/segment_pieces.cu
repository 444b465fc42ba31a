#include <algorithm>
#include <stdexcept>

#include "segment_attention/segment_pieces.cuh"

namespace statecore {
namespace {

constexpr int kScanThreads = 256;
constexpr int64_t kLeastWork = 8;       // of a piece: less is not worth the traffic of partial sums
constexpr int64_t kEnoughBlocks = 528;  // four for each SM of an H200

// Sum of x over the threads before this one; *all: over all of them.
__device__ __forceinline__ int64_t sum_before(int64_t x, int64_t* shared, int64_t* all) {
  const int thread = int(threadIdx.x);
  __syncthreads();  // the last sums have been read
  shared[thread] = x;
  for (int distance = 1; distance < kScanThreads; distance *= 2) {
    __syncthreads();
    const int64_t other = thread >= distance ? shared[thread - distance] : 0;
    __syncthreads();
    shared[thread] += other;
  }
  __syncthreads();
  *all = shared[kScanThreads - 1];
  return shared[thread] - x;
}

// One block, each thread of which has some neighbouring tiles: even a million tokens are but 64 tiles each.
__global__ void __launch_bounds__(kScanThreads) cut_work(DevicePlan plan, DevicePieces pieces) {
  STATECORE_SHARED(int64_t, shared, kScanThreads);
  const int share = (plan.tiles + kScanThreads - 1) / kScanThreads;
  const int begin = min(int(threadIdx.x) * share, plan.tiles), end = min(begin + share, plan.tiles);
  const auto work_of = [&](int number) {
    const int2 tiles = seeing_tiles(plan, number, plan.tile[number]);
    return (tiles.y - tiles.x) * pieces.group;
  };
  const auto cuts = [&](int work, int64_t length) { return int((work + length - 1) / length); };

  int64_t work = 0, all_work;
  for (int number = begin; number < end; ++number) work += work_of(number);
  sum_before(work, shared, &all_work);
  const int64_t length = max(kLeastWork, (all_work + pieces.wanted - 1) / pieces.wanted);

  // ---- one piece for every tile that is used; those that are cut have `sums` more
  int64_t whole = 0, cut = 0, sums = 0;
  for (int number = begin; number < end; ++number) {
    const int n = cuts(work_of(number), length);
    if (n > 1)
      ++cut, sums += n;
    else
      whole += plan.tile[number].begin < plan.tile[number].end;
  }
  int64_t all_whole, all_cut, all_sums;
  whole = sum_before(whole, shared, &all_whole);
  cut = sum_before(cut, shared, &all_cut);
  sums = sum_before(sums, shared, &all_sums);
  for (int number = begin; number < end; ++number) {
    const int tile_work = work_of(number), n = cuts(tile_work, length);
    if (n > 1) {
      // Longest first: these lie before all others.
      pieces.cut[cut++] = {number, int(sums), n, 0};
      for (int i = 0; i < n; ++i, ++sums)
        pieces.piece[sums] = {number, int(i * length), min(int((i + 1) * length), tile_work), int(sums)};
    } else if (plan.tile[number].begin < plan.tile[number].end) {
      pieces.piece[all_sums + whole++] = {number, 0, tile_work, -1};
    }
  }
  if (threadIdx.x == 0) {
    pieces.counts[0] = int(all_sums + all_whole);
    pieces.counts[1] = int(all_cut);
  }
}

}  // namespace

DevicePieces device_pieces(const SegmentAttentionParams& p, const DevicePlan& plan,
                           ScratchAllocator& scratch) {
  DevicePieces pieces{};
  pieces.group = int32_t(p.query_heads / p.kv_heads);
  const int64_t wanted = (kEnoughBlocks + p.kv_heads - 1) / p.kv_heads;
  // A tile is cut where it has more work than a piece, so there are less than twice `wanted` pieces of cut
  // tiles; and few where there is little work at all.
  const int64_t row_tiles = p.cu_seqlens ? plan.tiles : plan.row_tiles;
  const int64_t most_work = plan.tiles * row_tiles * pieces.group;
  const int64_t max_sums = std::min(2 * wanted, 2 * most_work / kLeastWork);
  if (most_work / kLeastWork > INT32_MAX)
    throw std::runtime_error("statecore: segment_attention_backward has too many tokens for one launch");
  pieces.wanted = int32_t(wanted);
  pieces.max_sums = int32_t(max_sums), pieces.max_cuts = int32_t(max_sums / 2);
  pieces.max_pieces = int32_t(max_sums + plan.tiles);
  pieces.counts = scratch.take<int32_t>(2);
  pieces.piece = scratch.take<Piece>(pieces.max_pieces);
  pieces.cut = scratch.take<CutTile>(pieces.max_cuts);
  return pieces;
}

void make_pieces(const DevicePlan& plan, const DevicePieces& pieces, void* stream) {
  if (plan.tiles > 0) launch("segment_pieces", cut_work, {dim3(1), dim3(kScanThreads)}, stream, plan, pieces);
}

}  // namespace statecore
