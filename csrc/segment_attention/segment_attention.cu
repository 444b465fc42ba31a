// Forward. A block computes an m_block of 64 queries of one head, 16 per warp, and visits the k_blocks that
// the plan lists for it, 64 keys at a time (float: 32), with an online softmax in base 2:
//
//   S = Q K^T in registers, masked where the k_block is not fully visible; P = 2^(S - row_max), which becomes
//   the left operand of O += P V without leaving registers, rounded to the element type (float: split into
//   two tf32 numbers, see mma.cuh).
//
// Shared memory holds Q, in the epilogue the rounded O, and two stages of K and V: while one is used,
// cp.async fills the other. One barrier per mainloop iteration tells both that a stage has landed and that
// the other may be overwritten. 16-bit operands of Q stay in registers throughout.
//
// Rows of K and V that no query of the m_block sees are zeroed: probability 0 times NaN would be NaN. Only
// k_blocks with such rows read visible_end while loading, and only those that are not fully visible read it
// for the mask: k_blocks on the diagonal, at the borders of steps and ends of sequences, and with padding.
//
// Blocks of the heads of a group are neighbours, so K and V of a k_block come from memory once and then from
// the L2 cache. m_blocks at the end of a row, which see most where steps are long, come first.
//
//   width, element         registers   shared memory   blocks per SM of sm_80
//   64, 16 bits            168         40 KiB          3
//   128, 16 bits           254         80 KiB          2
//   128, float             192         96 KiB          1
//
// On GPUs with the instructions of sm_90a 16-bit elements are left to segment_attention_sm90.cu, which states
// the expected time: the instructions of sm_80 used here do not reach that rate.
#include <cmath>
#include <stdexcept>

#include "segment_attention/segment_attention_sm90.h"
#include "segment_attention/segment_softmax.cuh"

namespace statecore {
namespace {

// Keys per mainloop iteration, all of whose scores are in registers at once.
template <class T>
constexpr int kStageKeys = sizeof(T) == 2 ? 64 : 32;

// Q (then O), two stages of K and V.
template <class T, int kWidth>
constexpr int kForwardBytes = Tile<T, kWidth>::bytes(kTileTokens + 4 * kStageKeys<T>);

// Min blocks per SM: caps register use, which the compiler would otherwise raise without gain.
template <class T, int kWidth>
constexpr int kForwardBlocks = sizeof(T) == 2 ? kWidth == 64 ? 3 : 2 : 1;

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T, kWidth>)
    segment_forward_kernel(SegmentAttentionParams p, DevicePlan plan) {
  using Tile = Tile<T, kWidth>;
  constexpr int kColumns = kWidth / 8, kKeys = kStageKeys<T>;
  constexpr bool kQInRegisters = sizeof(T) == 2;
  STATECORE_DYNAMIC_SHARED(shared);
  unsigned char *q_tile = shared, *stages = q_tile + Tile::bytes(kTileTokens);

  // ---- the block's m_block and head
  const int head = int(blockIdx.x % p.query_heads), kv_head = head / int(p.query_heads / p.kv_heads);
  const int m_block = plan.query_tile(int(blockIdx.x / p.query_heads));
  const TokenTile queries = plan.tile[m_block];
  if (queries.begin >= queries.end) return;
  const int32_t* visible_end = plan.visible_end + int64_t(queries.batch) * plan.keys;
  const RowsView<T> q = rows_of<T>(p.q, queries.batch, head, p.key_width);
  const RowsView<T> k = rows_of<T>(p.k, queries.batch, kv_head, p.key_width);
  const RowsView<T> v = rows_of<T>(p.v, queries.batch, kv_head, p.value_width);

  const auto load_stage = [&](unsigned char* stage, const TokenTile& keys, int first) {
    const auto visible = visible_keys(queries, keys, first, visible_end);
    load_rows<kKeys, kWidth>(stage, k, first, visible);
    load_rows<kKeys, kWidth>(stage + Tile::bytes(kKeys), v, first, visible);
    cp_async_commit();
  };

  // ---- prologue
  const int warp_row = int(threadIdx.x) / 32 * 16;
  int token[2];  // of the lane's two rows
#pragma unroll
  for (int i = 0; i < 2; ++i) token[i] = queries.begin + warp_row + accumulator_row(2 * i);
  const float scale_log2 = float(p.scale * kLog2e);
  Softmax softmax(1);  // scores are scaled beforehand: the scale may be negative
  float out[kColumns][4] = {};

  KeyIterator<kKeys> k_iter(plan, queries, m_block);
  load_rows<kTileTokens, kWidth>(q_tile, q, queries.begin - plan.first_query,
                                 valid_queries(plan, queries, queries.begin, visible_end));
  load_stage(stages, k_iter.keys, k_iter.first_key());
  RowOperands<T, kWidth, kQInRegisters> q_operands(q_tile, warp_row);
  cp_async_wait<0>();
  __syncthreads();
  q_operands.load_registers();

  // ---- mainloop
  for (int stage = 0; !k_iter.done(); stage ^= 1) {
    const int first_key = k_iter.first_key(), keys_end = k_iter.keys.end;
    const bool unmasked = fully_visible(queries, k_iter.keys);
    k_iter.advance(plan);
    unsigned char *k_tile = stages + stage * Tile::bytes(2 * kKeys), *v_tile = k_tile + Tile::bytes(kKeys);
    cp_async_wait<0>();
    __syncthreads();  // this stage has landed; the other may be overwritten
    if (!k_iter.done())
      load_stage(stages + (stage ^ 1) * Tile::bytes(2 * kKeys), k_iter.keys, k_iter.first_key());

    // S = scale Q K^T, in log2 units
    float scores[kKeys / 8][4] = {};
    q_operands.template multiply<kKeys>(scores, k_tile);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] *= scale_log2;
    const auto visible_ends = [&](int column) {
      const int key = first_key + column;
      return make_int2(key < keys_end ? visible_end[key] : 0, key + 1 < keys_end ? visible_end[key + 1] : 0);
    };
    if (!unmasked) mask_scores(scores, first_key, token, visible_ends);

    // O = rescale O + P V
    float rescale[2];
    softmax.online_softmax(scores, rescale);
    Softmax::rescale_o(out, rescale);
    accumulate_product<OperandA<T>, T, kWidth, kKeys>(out, scores, v_tile);
  }

  // ---- epilogue
  const auto is_query_row = [&](int row) {
    return queries.begin + row < queries.end && queries.begin + row >= plan.first_query;
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool is_query = is_query_row(token[i] - queries.begin);
    const bool valid = is_query && visible_end[token[i]] > 0;
    const float lse = softmax.finalize(i, valid, out);
    if (is_query && threadIdx.x % 4 == 0)
      static_cast<float*>(
          p.lse)[(queries.batch * p.query_heads + head) * p.queries + token[i] - plan.first_query] = lse;
  }
  const int64_t stride = p.query_heads * p.value_width;
  const int64_t first =
      (int64_t(queries.batch) * p.queries + queries.begin - plan.first_query) * stride + head * p.value_width;
  if (p.out_dtype == p.dtype)
    store_rows(static_cast<T*>(p.out) + first, stride, int(p.value_width), warp_row, out, is_query_row,
               q_tile);
  else
    store_rows(static_cast<float*>(p.out) + first, stride, int(p.value_width), warp_row, out, is_query_row);
}

template <class T, int kWidth>
void launch_forward(const SegmentAttentionParams& p, const DevicePlan& plan, void* stream) {
  const int64_t blocks = query_tiles(p, plan) * p.query_heads;
  launch(
      "segment_attention", segment_forward_kernel<T, kWidth>,
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
  ScratchAllocator allocator(nullptr);
  device_plan(p, allocator);
  return allocator.bytes();
}

void segment_attention_cuda(const SegmentAttentionParams& p, void* scratch, void* stream) {
  if (p.batch == 0 || p.queries == 0) return;
  ScratchAllocator allocator(scratch);
  const DevicePlan plan = device_plan(p, allocator);
  make_plan(plan, stream);
  if (segment_attention_sm90_supports(p)) return segment_attention_sm90(p, plan, stream);
  switch (p.dtype) {
    case DType::kFloat32: return launch_forward<float>(p, plan, stream);
    case DType::kBFloat16: return launch_forward<__nv_bfloat16>(p, plan, stream);
    case DType::kFloat16: return launch_forward<__half>(p, plan, stream);
    case DType::kFloat64: throw std::runtime_error("statecore: segment_attention on CUDA takes no float64");
  }
}

}  // namespace statecore
