// Backward, in five launches after the plan:
//
//   statistics   delta = sum of grad_out * out, less grad_lse, and lse in base 2, of every query and head
//   pieces       how the keys' work is divided (segment_pieces.cuh)
//   queries      grad_q: a block to a tile of 64 queries of a head, along the forward's way through the keys
//   keys         grad_k and grad_v: a block to a piece of the work of a tile of 64 keys of a head
//   add_pieces   sums of pieces, in order, for the tiles that were cut
//
// Both large kernels recompute weights from lse, P = 2^(scale q k^T - lse), and dS = P (grad_out v^T -
// delta); then grad_q = scale dS k, and with keys as rows grad_k = scale dS^T q, grad_v = P^T grad_out.
// Computing P and dS twice costs 2 products of 10, and nothing is added to by two blocks: no atomics, the
// same bits always.
//
// P and dS are not rounded to 16 bits, which takes a second product for the rest of each (10 instead of 7):
// rounded, they would add as much error as rounding results does, and out in delta adds some already.
//
// A block keeps two tiles of 64 rows in shared memory (q and grad_out, or k and v), and two stages of 32 rows
// (16 of float) of the other two, which cp.async fills one step ahead; one barrier a step. The statistics of
// a stage's queries travel with it. Queries without anybody are zeros with lse +infinity, so their weights
// are 0; masks are left to tiles that are not seen as a whole.
//
//   width, element   registers (queries, keys)   shared memory   blocks an SM of sm_80
//   64, 16 bits      160, 165                    32 KiB          3, 2
//   128, 16 bits     233, 251                    64 KiB          2, 2
//   128, float       168, 182                    96 KiB          1, 1 (keys: 64 columns each)
//
// Expected on an H200, calculated as for the forward:
//
//   12 query heads, 2 of k and v:   481 GFLOP, 609 us; 0.85 GB, 0.20 ms
//   28 and 4:                      1122 GFLOP, 1.42 ms; 1.9 GB, 0.45 ms
#include <algorithm>
#include <stdexcept>

#include "common/elements.cuh"
#include "segment_attention/segment_pieces.cuh"
#include "segment_attention/segment_tiles.cuh"

namespace statecore {
namespace {

// Rows of a step: keys beside a tile of queries, or queries beside a tile of keys.
template <class T>
constexpr int kStepRows = sizeof(T) == 2 ? 32 : 16;

// Two tiles that stay, two stages of two that pass.
template <class T, int kWidth>
constexpr int kTileBytes = Tile<T, kWidth>::bytes(2 * kTileTokens + 4 * kStepRows<T>);

// Of a query and a head; rows without anybody have lse +infinity, so that all their weights are 0.
struct alignas(8) RowStatistics {
  float lse;    // in units of ln 2
  float delta;  // sum of grad_out * out, less grad_lse
};

// Columns of both gradients that a block of segment_backward_keys adds up: all, if registers hold them.
template <class T, int kWidth>
constexpr int kGradColumns = sizeof(T) == 4 ? 64 : kWidth;

struct Backward {
  SegmentAttentionBackwardParams p;
  DevicePlan plan;
  DevicePieces pieces;
  RowStatistics* statistics;  // [Hq, tiles, 64]
  float* sums;                // [max_sums, Hk, 64, Dk + Dv]

  __device__ __forceinline__ RowStatistics* statistics_of(int tile, int head) const {
    return statistics + (int64_t(head) * plan.tiles + tile) * kTileTokens;
  }
};

// ---- statistics: a block to a tile of queries and a head, a warp to a row, four columns to a lane
__global__ void __launch_bounds__(kThreads) segment_statistics(Backward b) {
  const SegmentAttentionParams& p = b.p.forward;
  const int head = int(blockIdx.x % p.query_heads), lane = lane_index();
  const int number = b.plan.query_tile(int(blockIdx.x / p.query_heads));
  const TokenTile queries = b.plan.tile[number];
  RowStatistics* statistics = b.statistics_of(number, head);
  const int32_t* visible_end = b.plan.visible_end + int64_t(queries.row) * b.plan.keys;
  const auto there = query_rows(b.plan, queries, queries.begin, visible_end);
  for (int row = int(threadIdx.x) / 32; row < kTileTokens; row += kWarps) {
    RowStatistics result{kInfinity, 0};
    if (there(row)) {
      const int64_t query = queries.begin + row - b.plan.first_query;
      const int64_t at = (int64_t(queries.row) * p.queries + query) * p.query_heads + head;
      const int64_t grad_at =
          queries.row * b.p.grad_out_batch + query * b.p.grad_out_time + head * b.p.grad_out_head;
      float sum = 0;
      if (4 * lane < p.value_width) {
        const float4 x = load_vec4(p.dtype, p.out, at * p.value_width + 4 * lane);
        const float4 y = load_vec4(p.dtype, b.p.grad_out, grad_at + 4 * lane);
        sum = x.x * y.x + x.y * y.y + (x.z * y.z + x.w * y.w);
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      const int64_t in_lse = (int64_t(queries.row) * p.query_heads + head) * p.queries + query;
      if (b.p.grad_lse) sum -= static_cast<const float*>(b.p.grad_lse)[in_lse];
      result = {static_cast<const float*>(p.lse)[in_lse] * float(kLog2e), sum};
    }
    if (lane == 0) statistics[row] = result;
  }
}

// ---- gradients of queries: the forward's way through the keys
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth == 64 ? 3 : 2) segment_backward_queries(Backward b) {
  using Tile = Tile<T, kWidth>;
  constexpr int kKeys = kStepRows<T>;
  constexpr bool kHoldsQ = sizeof(T) == 2;  // as operands, in registers
  STATECORE_DYNAMIC_SHARED(shared);
  unsigned char *q_tile = shared, *grad_tile = q_tile + Tile::bytes(kTileTokens),
                *stages = grad_tile + Tile::bytes(kTileTokens);

  // ---- who we are: a tile of queries and one head
  const SegmentAttentionParams& p = b.p.forward;
  const DevicePlan& plan = b.plan;
  const int head = int(blockIdx.x % p.query_heads), kv_head = head / int(p.query_heads / p.kv_heads);
  const int number = plan.query_tile(int(blockIdx.x / p.query_heads));
  const TokenTile queries = plan.tile[number];
  if (queries.begin >= queries.end) return;
  const int32_t* visible_end = plan.visible_end + int64_t(queries.row) * plan.keys;
  const Rows<T> k = rows_of<T>(p.k, p.k_batch, p.k_time, p.k_head, queries.row, kv_head, p.key_width);
  const Rows<T> v = rows_of<T>(p.v, p.v_batch, p.v_time, p.v_head, queries.row, kv_head, p.value_width);
  const auto load_step = [&](unsigned char* stage, const TokenTile& keys, int first) {
    const auto seen = seen_by_somebody(queries, keys, first, visible_end);
    load_rows<kKeys, kWidth>(stage, k, first, seen);
    load_rows<kKeys, kWidth>(stage + Tile::bytes(kKeys), v, first, seen);
    cp_async_commit();
  };

  KeySteps<kKeys> step(plan, queries, number);
  const auto there = query_rows(plan, queries, queries.begin, visible_end);
  const int first_query = queries.begin - plan.first_query;
  load_rows<kTileTokens, kWidth>(
      q_tile, rows_of<T>(p.q, p.q_batch, p.q_time, p.q_head, queries.row, head, p.key_width), first_query,
      there);
  load_rows<kTileTokens, kWidth>(grad_tile,
                                 rows_of<T>(b.p.grad_out, b.p.grad_out_batch, b.p.grad_out_time,
                                            b.p.grad_out_head, queries.row, head, p.value_width),
                                 first_query, there);
  load_step(stages, step.keys, step.first_key());

  // ---- this lane's two rows
  const int warp_row = int(threadIdx.x) / 32 * 16;
  const RowStatistics* statistics = b.statistics_of(number, head);
  RowStatistics row[2];
  int token[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    row[i] = statistics[warp_row + accumulator_row(2 * i)];
    token[i] = queries.begin + warp_row + accumulator_row(2 * i);
  }
  const float scale = float(p.scale * kLog2e);
  float grad_q[kWidth / 8][4] = {};
  RowOperands<T, kWidth, kHoldsQ> q_operands(q_tile, warp_row);
  const RowOperands<T, kWidth, false> grad_operands(grad_tile, warp_row);
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

    float weight[kKeys / 8][4] = {}, grad[kKeys / 8][4] = {};
    q_operands.template multiply<kKeys>(weight, k_tile);
    grad_operands.template multiply<kKeys>(grad, v_tile);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int key = first_key + 8 * n + accumulator_column(j);
        const int end = all ? INT32_MAX : key < keys_end ? visible_end[key] : 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool visible = all || (key <= token[i] && token[i] < end);
          const float x = visible ? exp2_approx(weight[n][2 * i + j] * scale - row[i].lse) : 0;
          grad[n][2 * i + j] = x * (grad[n][2 * i + j] - row[i].delta);
        }
      }
    add_weighted_rows<SplitA<T>, T, kWidth, kKeys>(grad_q, grad, k_tile);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool somebody = there(warp_row + accumulator_row(i));
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) grad_q[n][i] = somebody ? grad_q[n][i] * float(p.scale) : 0;
  }
  const int64_t stride = p.query_heads * p.key_width;
  T* to = static_cast<T*>(b.p.grad_q) + (int64_t(queries.row) * p.queries + first_query) * stride +
          head * p.key_width;
  store_rows(
      to, stride, int(p.key_width), warp_row, grad_q,
      [&](int i) { return queries.begin + i < queries.end && queries.begin + i >= plan.first_query; },
      q_tile);
}

// ---- gradients of keys and values: a piece of the work of a tile of keys
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) segment_backward_keys(Backward b) {
  using Tile = Tile<T, kWidth>;
  constexpr int kQueries = kStepRows<T>, kColumns = kGradColumns<T, kWidth> / 8;
  STATECORE_DYNAMIC_SHARED(shared);
  unsigned char *k_tile = shared, *v_tile = k_tile + Tile::bytes(kTileTokens),
                *stages = v_tile + Tile::bytes(kTileTokens),
                *statistics = stages + Tile::bytes(4 * kQueries);  // two stages of kQueries

  // ---- who we are: a tile of keys of one head, and some of the queries and heads that see it
  const SegmentAttentionParams& p = b.p.forward;
  const DevicePlan& plan = b.plan;
  const int kv_head = int(blockIdx.x % p.kv_heads), number = int(blockIdx.x / p.kv_heads);
  const int column = int(blockIdx.y) * 8 * kColumns;
  if (number >= b.pieces.counts[0]) return;
  const Piece piece = b.pieces.piece[number];
  const TokenTile keys = plan.tile[piece.tile];
  const int2 seeing = seeing_tiles(plan, piece.tile, keys);
  const int32_t* visible_end = plan.visible_end + int64_t(keys.row) * plan.keys;

  // Where we are: so much work left, and of that now this part of a tile of queries, of this head.
  struct Step {
    int left, part, tile, head;
    TokenTile queries;
  };
  const auto advance = [&](Step& step) {
    step.part += kQueries;
    if (step.part < kTileTokens) return;
    step.part = 0;
    if (++step.tile == seeing.y) step.tile = seeing.x, ++step.head;
    if (--step.left > 0) step.queries = plan.tile[step.tile];
  };
  const auto load_step = [&](int parity, const Step& step) {
    unsigned char* stage = stages + parity * Tile::bytes(2 * kQueries);
    const int first = step.queries.begin + step.part;
    const auto there = query_rows(plan, step.queries, first, visible_end);
    load_rows<kQueries, kWidth>(
        stage, rows_of<T>(p.q, p.q_batch, p.q_time, p.q_head, keys.row, step.head, p.key_width),
        first - plan.first_query, there);
    load_rows<kQueries, kWidth>(stage + Tile::bytes(kQueries),
                                rows_of<T>(b.p.grad_out, b.p.grad_out_batch, b.p.grad_out_time,
                                           b.p.grad_out_head, keys.row, step.head, p.value_width),
                                first - plan.first_query, there);
    constexpr int kPerPiece = 16 / int(sizeof(RowStatistics));
    const int at = int(threadIdx.x) * kPerPiece;
    if (at < kQueries)
      cp_async(shared_address(statistics) + (parity * kQueries + at) * int(sizeof(RowStatistics)),
               b.statistics_of(step.tile, step.head) + step.part + at, false);
    cp_async_commit();
  };

  const auto there = [&](int row) {
    return keys.begin + row < keys.end && (keys.min_end > 0 || visible_end[keys.begin + row] > 0);
  };
  load_rows<kTileTokens, kWidth>(
      k_tile, rows_of<T>(p.k, p.k_batch, p.k_time, p.k_head, keys.row, kv_head, p.key_width), keys.begin,
      there);
  load_rows<kTileTokens, kWidth>(
      v_tile, rows_of<T>(p.v, p.v_batch, p.v_time, p.v_head, keys.row, kv_head, p.value_width), keys.begin,
      there);
  cp_async_commit();
  Step step{piece.end - piece.begin, 0, 0, 0, keys};
  if (step.left > 0) {
    step.tile = seeing.x + piece.begin % (seeing.y - seeing.x);
    step.head = kv_head * b.pieces.group + piece.begin / (seeing.y - seeing.x);
    step.queries = plan.tile[step.tile];
    load_step(0, step);
  }

  // ---- this lane's two rows
  const int warp_row = int(threadIdx.x) / 32 * 16;
  int key[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) key[i] = keys.begin + warp_row + accumulator_row(2 * i);
  const float scale = float(p.scale * kLog2e);
  float grad_k[kColumns][4] = {}, grad_v[kColumns][4] = {};
  const RowOperands<T, kWidth, false> k_operands(k_tile, warp_row), v_operands(v_tile, warp_row);

  for (int parity = 0; step.left > 0; parity ^= 1) {
    const int first_query = step.queries.begin + step.part;
    const bool all = all_visible(step.queries, keys);
    advance(step);
    const unsigned char *q_tile = stages + parity * Tile::bytes(2 * kQueries),
                        *grad_tile = q_tile + Tile::bytes(kQueries);
    const auto* row = reinterpret_cast<const RowStatistics*>(statistics) + parity * kQueries;
    cp_async_wait<0>();
    __syncthreads();  // this stage is there for everybody, and nobody reads the other one any more
    if (step.left > 0) load_step(parity ^ 1, step);

    // Keys are rows here and queries columns.
    float weight[kQueries / 8][4] = {}, grad[kQueries / 8][4] = {};
    k_operands.template multiply<kQueries>(weight, q_tile);
    int end[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) end[i] = !all && key[i] < keys.end ? visible_end[key[i]] : 0;
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = 8 * n + accumulator_column(j), query = first_query + column;
        const float lse = row[column].lse;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool visible = all || (key[i] <= query && query < end[i]);
          float& x = weight[n][2 * i + j];
          x = visible ? exp2_approx(x * scale - lse) : 0;
        }
      }
    add_weighted_rows<SplitA<T>, T, kWidth, kQueries>(grad_v, weight, grad_tile, column);
    v_operands.template multiply<kQueries>(grad, grad_tile);
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float delta = row[8 * n + accumulator_column(j)].delta;
#pragma unroll
        for (int i = j; i < 4; i += 2) grad[n][i] = weight[n][i] * (grad[n][i] - delta);
      }
    add_weighted_rows<SplitA<T>, T, kWidth, kQueries>(grad_k, grad, q_tile, column);
  }

#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) grad_k[n][i] *= float(p.scale);
  const int dk = int(p.key_width), dv = int(p.value_width);
  if (piece.sums >= 0) {
    float* to = b.sums + (int64_t(piece.sums) * p.kv_heads + kv_head) * kTileTokens * (dk + dv) + column;
    const auto all = [](int) { return true; };
    store_rows(to, dk + dv, dk - column, warp_row, grad_k, all);
    store_rows(to + dk, dk + dv, dv - column, warp_row, grad_v, all);
    return;
  }
  cp_async_wait<0>();
  __syncthreads();  // where there was no step, k and v may still be on their way to where the results go now
  const auto inside = [&](int row) { return keys.begin + row < keys.end; };
  const int64_t first = (int64_t(keys.row) * plan.keys + keys.begin) * p.kv_heads + kv_head;
  store_rows(static_cast<T*>(b.p.grad_k) + first * dk + column, p.kv_heads * dk, dk - column, warp_row,
             grad_k, inside, k_tile);
  store_rows(static_cast<T*>(b.p.grad_v) + first * dv + column, p.kv_heads * dv, dv - column, warp_row,
             grad_v, inside, v_tile);
}

// ---- the sums of the pieces of a tile, in order: a block to some rows of it
constexpr int kReducedRows = 8;

__global__ void __launch_bounds__(kThreads) segment_add_pieces(Backward b) {
  constexpr int kParts = kTileTokens / kReducedRows;
  const SegmentAttentionParams& p = b.p.forward;
  const int part = int(blockIdx.x % kParts), kv_head = int(blockIdx.x / kParts % p.kv_heads);
  const int number = int(blockIdx.x / kParts / p.kv_heads);
  if (number >= b.pieces.counts[1]) return;
  const CutTile cut = b.pieces.cut[number];
  const TokenTile keys = b.plan.tile[cut.tile];
  const int dk = int(p.key_width), dv = int(p.value_width), width = dk + dv;
  const int64_t next = p.kv_heads * kTileTokens * width;
  for (int i = int(threadIdx.x); i < kReducedRows * width / 4; i += kThreads) {
    const int row = part * kReducedRows + i / (width / 4), column = i % (width / 4) * 4;
    if (keys.begin + row >= keys.end) break;
    const float* from = b.sums + (int64_t(cut.first_sums) * p.kv_heads + kv_head) * kTileTokens * width +
                        row * width + column;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int j = 0; j < cut.pieces; ++j) {
      const float4 x = *reinterpret_cast<const float4*>(from + j * next);
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    const int64_t head = (int64_t(keys.row) * b.plan.keys + keys.begin + row) * p.kv_heads + kv_head;
    if (column < dk)
      store_vec4(p.dtype, b.p.grad_k, head * dk + column, sum);
    else
      store_vec4(p.dtype, b.p.grad_v, head * dv + column - dk, sum);
  }
}

// ---- launches
unsigned backward_blocks(int64_t blocks) { return checked_blocks("segment_attention_backward", blocks); }

template <class T, int kWidth>
void launch_products(const Backward& b, void* stream) {
  const SegmentAttentionParams& p = b.p.forward;
  const int64_t tiles = query_tiles(p, b.plan);
  const size_t bytes = kTileBytes<T, kWidth>;
  if (tiles > 0)
    launch("segment_backward_queries", segment_backward_queries<T, kWidth>,
           {dim3(backward_blocks(tiles * p.query_heads)), dim3(kThreads), bytes}, stream, b);
  launch("segment_backward_keys", segment_backward_keys<T, kWidth>,
         {dim3(backward_blocks(b.pieces.max_pieces * p.kv_heads), kWidth / kGradColumns<T, kWidth>),
          dim3(kThreads), bytes + 2 * kStepRows<T> * sizeof(RowStatistics)},
         stream, b);
}

template <class T>
void launch_products(const Backward& b, void* stream) {
  if constexpr (kHasNarrowKernels<T>)
    if (is_narrow(b.p.forward)) return launch_products<T, 64>(b, stream);
  launch_products<T, 128>(b, stream);
}

Backward in_scratch(const SegmentAttentionBackwardParams& params, ScratchAllocator& scratch) {
  const SegmentAttentionParams& p = params.forward;
  Backward b{};
  b.p = params;
  b.plan = device_plan(p, scratch);
  b.pieces = device_pieces(p, b.plan, scratch);
  b.statistics = scratch.take<RowStatistics>(p.query_heads * b.plan.tiles * kTileTokens);
  b.sums = scratch.take<float>(b.pieces.max_sums * p.kv_heads * kTileTokens * (p.key_width + p.value_width));
  return b;
}

}  // namespace

int64_t segment_attention_backward_cuda_scratch(const SegmentAttentionBackwardParams& params) {
  ScratchAllocator parts(nullptr);
  in_scratch(params, parts);
  return parts.bytes();
}

void segment_attention_backward_cuda(const SegmentAttentionBackwardParams& params, void* scratch,
                                     void* stream) {
  ScratchAllocator parts(scratch);
  const Backward b = in_scratch(params, parts);
  if (b.plan.tiles == 0) return;
  make_plan(b.plan, stream);
  make_pieces(b.plan, b.pieces, stream);
  const SegmentAttentionParams& p = params.forward;
  if (const int64_t tiles = query_tiles(p, b.plan); tiles > 0)
    launch("segment_statistics", segment_statistics,
           {dim3(backward_blocks(tiles * p.query_heads)), dim3(kThreads)}, stream, b);
  switch (p.dtype) {
    case DType::kFloat32: launch_products<float>(b, stream); break;
    case DType::kBFloat16: launch_products<__nv_bfloat16>(b, stream); break;
    case DType::kFloat16: launch_products<__half>(b, stream); break;
    case DType::kFloat64: throw std::runtime_error("statecore: segment_attention on CUDA takes no float64");
  }
  if (b.pieces.max_cuts > 0)
    launch("segment_add_pieces", segment_add_pieces,
           {dim3(backward_blocks(b.pieces.max_cuts * p.kv_heads * (kTileTokens / kReducedRows))),
            dim3(kThreads)},
           stream, b);
}

}  // namespace statecore
