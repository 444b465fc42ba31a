// Forward: a block computes a tile of 64 queries of one head, 16 to each of its 4 warps, and walks the tiles
// of keys that the plan lists for it, 64 keys at a time (32 of float), with an online softmax in base 2:
//
//   scores = q k^T in registers, masked where tiles are not seen as a whole; weights = 2^(scores - row
//   maximum), which become the left operand of out += weights v without leaving registers, rounded to the
//   element type (float: split in two tf32 numbers, see mma.cuh).
//
// Shared memory holds q, whose place the rounded results take at the end, and two stages of k and v: while
// one is multiplied by, cp.async fills the other. One barrier a step does both, says that a stage has landed
// for everybody and that the other is free. 16-bit operands of q stay in registers for the whole walk.
//
// Rows of k and v that nobody in the tile sees are zeros whatever they hold, since weight 0 times NaN is NaN.
// Only tiles with such rows look at visible_end on loading, and only tiles that are not seen as a whole do so
// for the mask; these are those with the diagonal, the edges of steps, ends of sequences and holes.
//
// Blocks of the heads of a group follow each other, so k and v of a tile come from memory once and then from
// the L2 cache. Tiles at the end of a row, which see most where steps are long, come first.
//
//   width, element         registers   shared memory   blocks an SM of sm_80
//   64, 16 bits            168         40 KiB          3
//   128, 16 bits           254         80 KiB          2
//   128, float             192         96 KiB          1
//
// On GPUs with the instructions of sm_90a 16-bit elements are left to segment_attention_sm90.cu, which also
// says what is to be expected of them: those of sm_80, which are used here, do not reach that rate.
#include <cmath>
#include <stdexcept>

#include "segment_attention/segment_attention_sm90.h"
#include "segment_attention/segment_softmax.cuh"

namespace statecore {
namespace {

// Keys of a step, all of whose scores are in registers at once.
template <class T>
constexpr int kStepKeys = sizeof(T) == 2 ? 64 : 32;

// q (then out), two stages of k and v.
template <class T, int kWidth>
constexpr int kForwardBytes = Tile<T, kWidth>::bytes(kTileTokens + 4 * kStepKeys<T>);

// That registers are limited to; without a limit the compiler takes more for nothing.
template <class T, int kWidth>
constexpr int kForwardBlocks = sizeof(T) == 2 ? kWidth == 64 ? 3 : 2 : 1;

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T, kWidth>)
    segment_forward(SegmentAttentionParams p, DevicePlan plan) {
  using Tile = Tile<T, kWidth>;
  constexpr int kColumns = kWidth / 8, kKeys = kStepKeys<T>;
  constexpr bool kHoldsQ = sizeof(T) == 2;  // as operands, in registers
  STATECORE_DYNAMIC_SHARED(shared);
  unsigned char *q_tile = shared, *stages = q_tile + Tile::bytes(kTileTokens);

  // ---- who we are: a tile of queries and one head
  const int head = int(blockIdx.x % p.query_heads), kv_head = head / int(p.query_heads / p.kv_heads);
  const int number = plan.query_tile(int(blockIdx.x / p.query_heads));
  const TokenTile queries = plan.tile[number];
  if (queries.begin >= queries.end) return;
  const int32_t* visible_end = plan.visible_end + int64_t(queries.row) * plan.keys;
  const Rows<T> q = rows_of<T>(p.q, p.q_batch, p.q_time, p.q_head, queries.row, head, p.key_width);
  const Rows<T> k = rows_of<T>(p.k, p.k_batch, p.k_time, p.k_head, queries.row, kv_head, p.key_width);
  const Rows<T> v = rows_of<T>(p.v, p.v_batch, p.v_time, p.v_head, queries.row, kv_head, p.value_width);

  const auto load_step = [&](unsigned char* stage, const TokenTile& keys, int first) {
    const auto seen = seen_by_somebody(queries, keys, first, visible_end);
    load_rows<kKeys, kWidth>(stage, k, first, seen);
    load_rows<kKeys, kWidth>(stage + Tile::bytes(kKeys), v, first, seen);
    cp_async_commit();
  };

  // ---- this lane's two rows
  const int warp_row = int(threadIdx.x) / 32 * 16;
  int token[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) token[i] = queries.begin + warp_row + accumulator_row(2 * i);
  const float scale = float(p.scale * kLog2e);
  Softmax softmax(1);
  float out[kColumns][4] = {};

  KeySteps<kKeys> step(plan, queries, number);
  load_rows<kTileTokens, kWidth>(q_tile, q, queries.begin - plan.first_query,
                                 query_rows(plan, queries, queries.begin, visible_end));
  load_step(stages, step.keys, step.first_key());
  RowOperands<T, kWidth, kHoldsQ> q_operands(q_tile, warp_row);
  cp_async_wait<0>();
  __syncthreads();
  q_operands.hold();

  for (int parity = 0; !step.done(); parity ^= 1) {
    const int first_key = step.first_key(), keys_end = step.keys.end;
    const bool all = all_visible(queries, step.keys);
    step.advance(plan);
    unsigned char *k_tile = stages + parity * Tile::bytes(2 * kKeys), *v_tile = k_tile + Tile::bytes(kKeys);
    cp_async_wait<0>();
    __syncthreads();  // this stage is there for everybody, and nobody reads the other one any more
    if (!step.done()) load_step(stages + (parity ^ 1) * Tile::bytes(2 * kKeys), step.keys, step.first_key());

    // ---- scores, in units of ln 2
    float score[kKeys / 8][4] = {};
    q_operands.template multiply<kKeys>(score, k_tile);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) score[n][i] *= scale;
    const auto ends = [&](int column) {
      const int key = first_key + column;
      return make_int2(key < keys_end ? visible_end[key] : 0, key + 1 < keys_end ? visible_end[key + 1] : 0);
    };
    if (!all) hide_scores(score, first_key, token, ends);

    // ---- weights, and what the sums so far are worth beside them
    float keeps[2];
    softmax.weigh(score, keeps);
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] *= keeps[i / 2];

    add_weighted_rows<OperandA<T>, T, kWidth, kKeys>(out, score, v_tile);
  }

  // ---- results: rows with nobody there are 0, whatever has been computed for them
  const auto inside = [&](int row) {
    return queries.begin + row < queries.end && queries.begin + row >= plan.first_query;
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool is_query = inside(token[i] - queries.begin), there = is_query && visible_end[token[i]] > 0;
    const float lse = softmax.finish(i, there, out);
    if (is_query && threadIdx.x % 4 == 0)
      static_cast<float*>(
          p.lse)[(queries.row * p.query_heads + head) * p.queries + token[i] - plan.first_query] = lse;
  }
  const int64_t stride = p.query_heads * p.value_width;
  const int64_t first =
      (int64_t(queries.row) * p.queries + queries.begin - plan.first_query) * stride + head * p.value_width;
  if (p.out_dtype == p.dtype)
    store_rows(static_cast<T*>(p.out) + first, stride, int(p.value_width), warp_row, out, inside, q_tile);
  else
    store_rows(static_cast<float*>(p.out) + first, stride, int(p.value_width), warp_row, out, inside);
}

template <class T, int kWidth>
void launch_forward(const SegmentAttentionParams& p, const DevicePlan& plan, void* stream) {
  const int64_t blocks = query_tiles(p, plan) * p.query_heads;
  launch(
      "segment_attention", segment_forward<T, kWidth>,
      {dim3(checked_blocks("segment_attention", blocks)), dim3(kThreads), size_t(kForwardBytes<T, kWidth>)},
      stream, p, plan);
}

template <class T>
void launch_forward(const SegmentAttentionParams& p, const DevicePlan& plan, void* stream) {
  if constexpr (kHasNarrowKernels<T>)
    if (is_narrow(p)) return launch_forward<T, 64>(p, plan, stream);
  launch_forward<T, 128>(p, plan, stream);
}

}  // namespace

int64_t segment_attention_cuda_scratch(const SegmentAttentionParams& p) {
  ScratchAllocator parts(nullptr);
  device_plan(p, parts);
  return parts.bytes();
}

void segment_attention_cuda(const SegmentAttentionParams& p, void* scratch, void* stream) {
  if (p.batch == 0 || p.queries == 0) return;
  ScratchAllocator parts(scratch);
  const DevicePlan plan = device_plan(p, parts);
  make_plan(plan, stream);
  if (segment_attention_sm90_takes(p)) return segment_attention_sm90(p, plan, stream);
  switch (p.dtype) {
    case DType::kFloat32: return launch_forward<float>(p, plan, stream);
    case DType::kBFloat16: return launch_forward<__nv_bfloat16>(p, plan, stream);
    case DType::kFloat16: return launch_forward<__half>(p, plan, stream);
    case DType::kFloat64: throw std::runtime_error("statecore: segment_attention on CUDA takes no float64");
  }
}

}  // namespace statecore
