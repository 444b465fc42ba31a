#include <cmath>
#include <stdexcept>

#include "segment_attention/segment_attention_sm90.h"
#include "segment_attention/segment_tiles.cuh"

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

// Of the 4 lanes that share a row of accumulators.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T, kWidth>) segment_forward(SegmentAttentionParams p, DevicePlan plan) {
  using Tile = Tile<T, kWidth>;
  constexpr int kDepth = kMmaDepth<T>, kDepths = kWidth / kDepth, kColumns = kWidth / 8;
  constexpr int kKeys = kStepKeys<T>;
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
  const float scale = float(p.scale * 1.4426950408889634);
  float top[2] = {-kInfinity, -kInfinity}, sum[2] = {0, 0};
  float out[kColumns][4] = {};

  KeySteps<kKeys> step(plan, queries, number);
  load_rows<kTileTokens, kWidth>(q_tile, q, queries.begin - plan.first_query, [&](int row) {
    return queries.begin + row < queries.end && queries.begin + row >= plan.first_query;
  });
  load_step(stages, step.keys, step.first_key());
  OperandA<T> q_operand[kHoldsQ ? kDepths : 1];
  if constexpr (kHoldsQ) {
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepths; ++d) load<false>(q_operand[d], Tile{}, q_tile, warp_row, d * kDepth);
  }

  for (int parity = 0; !step.done(); parity ^= 1) {
    const TokenTile keys = step.keys;
    const int first_key = step.first_key();
    step.advance(plan);
    unsigned char *k_tile = stages + parity * Tile::bytes(2 * kKeys), *v_tile = k_tile + Tile::bytes(kKeys);
    cp_async_wait<0>();
    __syncthreads();  // this stage is there for everybody, and nobody reads the other one any more
    if (!step.done())
      load_step(stages + (parity ^ 1) * Tile::bytes(2 * kKeys), step.keys, step.first_key());

    // ---- scores, in units of ln 2
    float score[kKeys / 8][4] = {};
#pragma unroll(kHoldsQ ? kDepths : 1)
    for (int d = 0; d < kDepths; ++d) {
      if constexpr (!kHoldsQ) load<false>(q_operand[0], Tile{}, q_tile, warp_row, d * kDepth);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        OperandB<T> b[2];
        load<false>(b, Tile{}, k_tile, 16 * n, d * kDepth);
        mma(score[2 * n], q_operand[kHoldsQ ? d : 0], b[0]);
        mma(score[2 * n + 1], q_operand[kHoldsQ ? d : 0], b[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) score[n][i] *= scale;
    if (!all_visible(queries, keys))
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = first_key + 8 * n + accumulator_column(j);
          const int end = key < keys.end ? visible_end[key] : 0;
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (key > token[i] || token[i] >= end) score[n][2 * i + j] = -kInfinity;
        }

    // ---- weights, and what the sums so far are worth beside them
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float highest = top[i];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
        highest = fmaxf(highest, fmaxf(score[n][2 * i], score[n][2 * i + 1]));
      highest = row_max(highest);
      const float shift = highest == -kInfinity ? 0 : highest;  // who has seen nobody yet
      const float keeps = exp2_approx(top[i] - shift);
      top[i] = highest;
      sum[i] *= keeps;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& weight = score[n][2 * i + j];
          weight = exp2_approx(weight - shift);
          sum[i] += weight;
        }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) out[n][2 * i] *= keeps, out[n][2 * i + 1] *= keeps;
    }

#pragma unroll
    for (int d = 0; d < kKeys / kDepth; ++d) {
      OperandA<T> weights;
      from_accumulators<T>(weights, &score[d * kDepth / 8]);
#pragma unroll
      for (int n = 0; n < kColumns / 2; ++n) {
        OperandB<T> b[2];
        load<true>(b, Tile{}, v_tile, d * kDepth, 16 * n);
        mma(out[2 * n], weights, b[0]);
        mma(out[2 * n + 1], weights, b[1]);
      }
    }
  }

  // ---- results: rows with nobody there are 0, whatever has been computed for them
  const int64_t row_elements = p.query_heads * p.value_width;
  const int64_t first_row = int64_t(queries.row) * p.queries + queries.begin - plan.first_query;
  const bool rounds = sizeof(T) == 2 && p.out_dtype == p.dtype;
  __syncwarp();  // out takes the place of q, of which a warp has read its own rows alone
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool inside = token[i] < queries.end && token[i] >= plan.first_query;
    const bool there = inside && visible_end[token[i]] > 0;
    const float total = row_sum(sum[i]), factor = 1 / total;
    if (inside && threadIdx.x % 4 == 0)
      static_cast<float*>(p.lse)[(queries.row * p.query_heads + head) * p.queries + token[i] -
                                 plan.first_query] = there ? (top[i] + log2f(total)) * kLn2 : -kInfinity;
    const int row = token[i] - queries.begin;
    float* to = static_cast<float*>(p.out) + (first_row + row) * row_elements + head * p.value_width;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const float x = there ? out[n][2 * i] * factor : 0, y = there ? out[n][2 * i + 1] * factor : 0;
      const int column = 8 * n + accumulator_column(0);
      if (rounds)
        store_pair(Tile{}, q_tile, row, column, x, y);
      else if (inside && column < p.value_width)
        *reinterpret_cast<float2*>(to + column) = make_float2(x, y);
    }
  }
  if (!rounds) return;
  __syncwarp();
  constexpr int kPerPiece = 16 / int(sizeof(T));
  for (int piece = int(threadIdx.x) % 32; piece < 16 * Tile::kPieces; piece += 32) {
    const int row = warp_row + piece / Tile::kPieces, column = piece % Tile::kPieces * kPerPiece;
    const int at = queries.begin + row;
    if (at >= queries.end || at < plan.first_query || column >= p.value_width) continue;
    T* to = static_cast<T*>(p.out) + (first_row + row) * row_elements + head * p.value_width + column;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(q_tile + Tile::offset(row, column));
  }
}

template <class T, int kWidth>
void launch_forward(const SegmentAttentionParams& p, const DevicePlan& plan, void* stream) {
  const int64_t blocks = query_tiles(p, plan) * p.query_heads;
  if (blocks > INT32_MAX)
    throw std::runtime_error("statecore: segment_attention has too many tokens and heads for one launch");
  launch("segment_attention", segment_forward<T, kWidth>,
         {dim3(unsigned(blocks)), dim3(kThreads), size_t(kForwardBytes<T, kWidth>)}, stream, p, plan);
}

template <class T>
void launch_forward(const SegmentAttentionParams& p, const DevicePlan& plan, void* stream) {
  p.key_width > 64 || p.value_width > 64 ? launch_forward<T, 128>(p, plan, stream)
                                         : launch_forward<T, 64>(p, plan, stream);
}

}  // namespace

int64_t segment_attention_cuda_scratch(const SegmentAttentionParams& p) {
  ScratchParts parts(nullptr);
  device_plan(p, parts);
  return parts.bytes();
}

void segment_attention_cuda(const SegmentAttentionParams& p, void* scratch, void* stream) {
  if (p.batch == 0 || p.queries == 0) return;
  ScratchParts parts(scratch);
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
