// Backward, in five launches after the plan:
//
//   preprocess     delta = rowsum(grad_out * out) - grad_lse, and lse in base 2, of every query and head
//   splits         how the work of the keys is divided (segment_splits.cuh)
//   queries        grad_q: one block per m_block of 64 queries and head, which visits the forward's k_blocks
//   keys           grad_k and grad_v: one block per split of a k_block of 64 keys and key head
//   reduce_splits  adds the partial sums, in order, of the k_blocks that were split
//
// Both large kernels recompute P = 2^(scale Q K^T - lse) and dS = P (grad_out V^T - delta); then grad_q =
// scale dS K, and with keys as rows grad_k = scale dS^T Q, grad_v = P^T grad_out. Computing P and dS twice
// costs 2 products of 10, but no result is accumulated by two blocks: no atomics, bitwise reproducible.
//
// P and dS are not rounded to 16 bits, which takes a second product for the remainder of each (10 instead of
// 7): rounding them would add as much error as rounding the results, on top of the rounded out in delta.
//
// A block keeps two tiles of 64 rows in shared memory (Q and grad_out, or K and V), and two stages of 32 rows
// (16 of float) of the other two, which cp.async fills one mainloop iteration ahead, with one barrier per
// iteration. lse and delta of a stage's queries travel with it. Padding queries are zeros with lse +infinity,
// so their probabilities are 0; masks are only applied where a k_block is not fully visible.
//
//   width, element   registers (queries, keys)   shared memory   blocks per SM of sm_80
//   64, 16 bits      159, 165                    32 KiB          3, 2
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
#include "segment_attention/segment_splits.cuh"
#include "segment_attention/segment_tiles.cuh"

namespace statecore {
namespace {

// Rows per mainloop iteration: keys of an m_block, or queries of a k_block.
template <class T>
constexpr int kStageRows = sizeof(T) == 2 ? 32 : 16;

// Two resident tiles, two stages of two tiles.
template <class T, int kWidth>
constexpr int kTileBytes = Tile<T, kWidth>::bytes(2 * kTileTokens + 4 * kStageRows<T>);

// Of a query and a head. Padding has lse_log2 +infinity, so that its probabilities are 0.
struct alignas(8) RowStatistics {
  float lse_log2;  // lse in log2 units
  float delta;     // rowsum(grad_out * out) - grad_lse
};

// Columns of grad_k and grad_v that a block accumulates: all, if they fit into registers.
template <class T, int kWidth>
constexpr int kGradColumns = sizeof(T) == 4 ? 64 : kWidth;

struct Backward {
  SegmentAttentionBackwardParams p;
  DevicePlan plan;
  DeviceSplits splits;
  RowStatistics* statistics;  // [Hq, tiles, 64]
  float* partials;            // [max_partials, Hk, 64, Dk + Dv]

  __device__ __forceinline__ RowStatistics* statistics_of(int m_block, int head) const {
    return statistics + (int64_t(head) * plan.tiles + m_block) * kTileTokens;
  }
};

// ---- preprocess: one block per m_block and head, a warp per row, four columns per lane
__global__ void __launch_bounds__(kThreads) segment_backward_preprocess_kernel(Backward b) {
  const SegmentAttentionBackwardParams& p = b.p;
  const int head = int(blockIdx.x % p.query_heads), lane = lane_index();
  const int m_block = b.plan.query_tile(int(blockIdx.x / p.query_heads));
  const TokenTile queries = b.plan.tile[m_block];
  RowStatistics* statistics = b.statistics_of(m_block, head);
  const int32_t* visible_end = b.plan.visible_end + int64_t(queries.batch) * b.plan.keys;
  const auto valid = valid_queries(b.plan, queries, queries.begin, visible_end);
  for (int row = int(threadIdx.x) / 32; row < kTileTokens; row += kWarps) {
    RowStatistics result{kInfinity, 0};
    if (valid(row)) {
      const int64_t query = queries.begin + row - b.plan.first_query;
      const int64_t at = (int64_t(queries.batch) * p.queries + query) * p.query_heads + head;
      const int64_t grad_at = p.grad_out.offset(queries.batch, query, head);
      float sum = 0;
      if (4 * lane < p.value_width) {
        const float4 x = load_vec4(p.dtype, p.out, at * p.value_width + 4 * lane);
        const float4 y = load_vec4(p.dtype, p.grad_out.data, grad_at + 4 * lane);
        sum = x.x * y.x + x.y * y.y + (x.z * y.z + x.w * y.w);
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      const int64_t at_lse = (int64_t(queries.batch) * p.query_heads + head) * p.queries + query;
      if (p.grad_lse) sum -= static_cast<const float*>(p.grad_lse)[at_lse];
      result = {static_cast<const float*>(p.lse)[at_lse] * float(kLog2e), sum};
    }
    if (lane == 0) statistics[row] = result;
  }
}

// ---- gradients of queries: visits the forward's k_blocks
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth == 64 ? 3 : 2)
    segment_backward_queries_kernel(Backward b) {
  using Tile = Tile<T, kWidth>;
  constexpr int kKeys = kStageRows<T>;
  constexpr bool kQInRegisters = sizeof(T) == 2;
  STATECORE_DYNAMIC_SHARED(shared);
  unsigned char *q_tile = shared, *grad_tile = q_tile + Tile::bytes(kTileTokens),
                *stages = grad_tile + Tile::bytes(kTileTokens);

  // ---- the block's m_block and head
  const SegmentAttentionBackwardParams& p = b.p;
  const DevicePlan& plan = b.plan;
  const int head = int(blockIdx.x % p.query_heads), kv_head = head / int(p.query_heads / p.kv_heads);
  const int m_block = plan.query_tile(int(blockIdx.x / p.query_heads));
  const TokenTile queries = plan.tile[m_block];
  if (queries.begin >= queries.end) return;
  const int32_t* visible_end = plan.visible_end + int64_t(queries.batch) * plan.keys;
  const RowsView<T> q = rows_of<T>(p.q, queries.batch, head, p.key_width);
  const RowsView<T> grad_out = rows_of<T>(p.grad_out, queries.batch, head, p.value_width);
  const RowsView<T> k = rows_of<T>(p.k, queries.batch, kv_head, p.key_width);
  const RowsView<T> v = rows_of<T>(p.v, queries.batch, kv_head, p.value_width);
  const auto load_stage = [&](unsigned char* stage, const TokenTile& keys, int first) {
    const auto visible = visible_keys(queries, keys, first, visible_end);
    load_rows<kKeys, kWidth>(stage, k, first, visible);
    load_rows<kKeys, kWidth>(stage + Tile::bytes(kKeys), v, first, visible);
    cp_async_commit();
  };

  // ---- prologue
  KeyIterator<kKeys> k_iter(plan, queries, m_block);
  const auto valid = valid_queries(plan, queries, queries.begin, visible_end);
  const int first_query = queries.begin - plan.first_query;
  load_rows<kTileTokens, kWidth>(q_tile, q, first_query, valid);
  load_rows<kTileTokens, kWidth>(grad_tile, grad_out, first_query, valid);
  load_stage(stages, k_iter.keys, k_iter.first_key());

  const int warp_row = int(threadIdx.x) / 32 * 16;
  const RowStatistics* statistics = b.statistics_of(m_block, head);
  RowStatistics row[2];  // of the lane's two rows
  int token[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    row[i] = statistics[warp_row + accumulator_row(2 * i)];
    token[i] = queries.begin + warp_row + accumulator_row(2 * i);
  }
  const float scale_log2 = float(p.scale * kLog2e);
  float grad_q[kWidth / 8][4] = {};
  RowOperands<T, kWidth, kQInRegisters> q_operands(q_tile, warp_row);
  const RowOperands<T, kWidth, false> grad_operands(grad_tile, warp_row);
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

    // dS = P (grad_out V^T - delta)
    float scores[kKeys / 8][4] = {}, grad_scores[kKeys / 8][4] = {};
    q_operands.template multiply<kKeys>(scores, k_tile);
    grad_operands.template multiply<kKeys>(grad_scores, v_tile);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int key = first_key + 8 * n + accumulator_column(j);
        const int end = unmasked ? INT32_MAX : key < keys_end ? visible_end[key] : 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool visible = unmasked || (key <= token[i] && token[i] < end);
          const float probability =
              visible ? exp2_approx(scores[n][2 * i + j] * scale_log2 - row[i].lse_log2) : 0;
          grad_scores[n][2 * i + j] = probability * (grad_scores[n][2 * i + j] - row[i].delta);
        }
      }
    accumulate_product<SplitA<T>, T, kWidth, kKeys>(grad_q, grad_scores, k_tile);
  }

  // ---- epilogue
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool row_valid = valid(warp_row + accumulator_row(i));
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) grad_q[n][i] = row_valid ? grad_q[n][i] * float(p.scale) : 0;
  }
  const int64_t stride = p.query_heads * p.key_width;
  T* to = static_cast<T*>(p.grad_q) + (int64_t(queries.batch) * p.queries + first_query) * stride +
          head * p.key_width;
  store_rows(
      to, stride, int(p.key_width), warp_row, grad_q,
      [&](int i) { return queries.begin + i < queries.end && queries.begin + i >= plan.first_query; },
      q_tile);
}

// ---- gradients of keys and values: a split of the work of a k_block
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) segment_backward_keys_kernel(Backward b) {
  using Tile = Tile<T, kWidth>;
  constexpr int kQueries = kStageRows<T>, kColumns = kGradColumns<T, kWidth> / 8;
  STATECORE_DYNAMIC_SHARED(shared);
  unsigned char *k_tile = shared, *v_tile = k_tile + Tile::bytes(kTileTokens),
                *stages = v_tile + Tile::bytes(kTileTokens),
                *statistics = stages + Tile::bytes(4 * kQueries);  // two stages of kQueries

  // ---- the block's k_block and head, and the part of its m_blocks and query heads
  const SegmentAttentionBackwardParams& p = b.p;
  const DevicePlan& plan = b.plan;
  const int kv_head = int(blockIdx.x % p.kv_heads), index = int(blockIdx.x / p.kv_heads);
  const int column = int(blockIdx.y) * 8 * kColumns;
  if (index >= b.splits.counts[0]) return;
  const KeySplit split = b.splits.split[index];
  const TokenTile keys = plan.tile[split.k_block];
  const int2 m_blocks = m_blocks_of(plan, split.k_block, keys);
  const int32_t* visible_end = plan.visible_end + int64_t(keys.batch) * plan.keys;

  // The queries of a mainloop iteration: kQueries of an m_block, from `offset` on, for one head.
  struct QueryIterator {
    int left, offset, m_block, head;  // left: m_blocks and heads of the split, this one included
    TokenTile queries;
  };
  const auto advance = [&](QueryIterator& q_iter) {
    q_iter.offset += kQueries;
    if (q_iter.offset < kTileTokens) return;
    q_iter.offset = 0;
    if (++q_iter.m_block == m_blocks.y) q_iter.m_block = m_blocks.x, ++q_iter.head;
    if (--q_iter.left > 0) q_iter.queries = plan.tile[q_iter.m_block];
  };
  const auto load_stage = [&](int stage, const QueryIterator& q_iter) {
    unsigned char* q_tile = stages + stage * Tile::bytes(2 * kQueries);
    const int first = q_iter.queries.begin + q_iter.offset;
    const auto valid = valid_queries(plan, q_iter.queries, first, visible_end);
    load_rows<kQueries, kWidth>(q_tile, rows_of<T>(p.q, keys.batch, q_iter.head, p.key_width),
                                first - plan.first_query, valid);
    load_rows<kQueries, kWidth>(q_tile + Tile::bytes(kQueries),
                                rows_of<T>(p.grad_out, keys.batch, q_iter.head, p.value_width),
                                first - plan.first_query, valid);
    constexpr int kPerCopy = 16 / int(sizeof(RowStatistics));
    const int at = int(threadIdx.x) * kPerCopy;
    if (at < kQueries)
      cp_async(shared_address(statistics) + (stage * kQueries + at) * int(sizeof(RowStatistics)),
               b.statistics_of(q_iter.m_block, q_iter.head) + q_iter.offset + at, false);
    cp_async_commit();
  };

  // ---- prologue
  const auto valid = [&](int row) {
    return keys.begin + row < keys.end && (keys.min_end > 0 || visible_end[keys.begin + row] > 0);
  };
  load_rows<kTileTokens, kWidth>(k_tile, rows_of<T>(p.k, keys.batch, kv_head, p.key_width), keys.begin,
                                 valid);
  load_rows<kTileTokens, kWidth>(v_tile, rows_of<T>(p.v, keys.batch, kv_head, p.value_width), keys.begin,
                                 valid);
  cp_async_commit();
  QueryIterator q_iter{split.end - split.begin, 0, 0, 0, keys};
  if (q_iter.left > 0) {
    q_iter.m_block = m_blocks.x + split.begin % (m_blocks.y - m_blocks.x);
    q_iter.head = kv_head * b.splits.group + split.begin / (m_blocks.y - m_blocks.x);
    q_iter.queries = plan.tile[q_iter.m_block];
    load_stage(0, q_iter);
  }

  const int warp_row = int(threadIdx.x) / 32 * 16;
  int key[2];  // of the lane's two rows
#pragma unroll
  for (int i = 0; i < 2; ++i) key[i] = keys.begin + warp_row + accumulator_row(2 * i);
  const float scale_log2 = float(p.scale * kLog2e);
  float grad_k[kColumns][4] = {}, grad_v[kColumns][4] = {};
  const RowOperands<T, kWidth, false> k_operands(k_tile, warp_row), v_operands(v_tile, warp_row);

  // ---- mainloop; keys are rows and queries are columns
  for (int stage = 0; q_iter.left > 0; stage ^= 1) {
    const int first_query = q_iter.queries.begin + q_iter.offset;
    const bool unmasked = fully_visible(q_iter.queries, keys);
    advance(q_iter);
    const unsigned char *q_tile = stages + stage * Tile::bytes(2 * kQueries),
                        *grad_tile = q_tile + Tile::bytes(kQueries);
    const auto* row = reinterpret_cast<const RowStatistics*>(statistics) + stage * kQueries;
    cp_async_wait<0>();
    __syncthreads();  // this stage has landed; the other may be overwritten
    if (q_iter.left > 0) load_stage(stage ^ 1, q_iter);

    // P^T
    float probabilities[kQueries / 8][4] = {}, grad_scores[kQueries / 8][4] = {};
    k_operands.template multiply<kQueries>(probabilities, q_tile);
    int end[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) end[i] = !unmasked && key[i] < keys.end ? visible_end[key[i]] : 0;
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = 8 * n + accumulator_column(j), query = first_query + column;
        const float lse_log2 = row[column].lse_log2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool visible = unmasked || (key[i] <= query && query < end[i]);
          float& x = probabilities[n][2 * i + j];
          x = visible ? exp2_approx(x * scale_log2 - lse_log2) : 0;
        }
      }
    accumulate_product<SplitA<T>, T, kWidth, kQueries>(grad_v, probabilities, grad_tile, column);

    // dS^T = P^T (V grad_out^T - delta)
    v_operands.template multiply<kQueries>(grad_scores, grad_tile);
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float delta = row[8 * n + accumulator_column(j)].delta;
#pragma unroll
        for (int i = j; i < 4; i += 2) grad_scores[n][i] = probabilities[n][i] * (grad_scores[n][i] - delta);
      }
    accumulate_product<SplitA<T>, T, kWidth, kQueries>(grad_k, grad_scores, q_tile, column);
  }

  // ---- epilogue
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) grad_k[n][i] *= float(p.scale);
  const int dk = int(p.key_width), dv = int(p.value_width);
  if (split.partial >= 0) {
    float* to =
        b.partials + (int64_t(split.partial) * p.kv_heads + kv_head) * kTileTokens * (dk + dv) + column;
    const auto all_rows = [](int) { return true; };
    store_rows(to, dk + dv, dk - column, warp_row, grad_k, all_rows);
    store_rows(to + dk, dk + dv, dv - column, warp_row, grad_v, all_rows);
    return;
  }
  // The results go through the tiles of K and V, whose loads are still in flight if the mainloop was empty.
  cp_async_wait<0>();
  __syncthreads();
  const auto in_tile = [&](int row) { return keys.begin + row < keys.end; };
  const int64_t first = (int64_t(keys.batch) * plan.keys + keys.begin) * p.kv_heads + kv_head;
  store_rows(static_cast<T*>(p.grad_k) + first * dk + column, p.kv_heads * dk, dk - column, warp_row, grad_k,
             in_tile, k_tile);
  store_rows(static_cast<T*>(p.grad_v) + first * dv + column, p.kv_heads * dv, dv - column, warp_row, grad_v,
             in_tile, v_tile);
}

// ---- adds the partial sums of a split k_block, in order: one block per kReducedRows of its rows
constexpr int kReducedRows = 8;

__global__ void __launch_bounds__(kThreads) reduce_splits_kernel(Backward b) {
  constexpr int kParts = kTileTokens / kReducedRows;
  const SegmentAttentionBackwardParams& p = b.p;
  const int part = int(blockIdx.x % kParts), kv_head = int(blockIdx.x / kParts % p.kv_heads);
  const int index = int(blockIdx.x / kParts / p.kv_heads);
  if (index >= b.splits.counts[1]) return;
  const SplitKBlock split = b.splits.split_k_block[index];
  const TokenTile keys = b.plan.tile[split.k_block];
  const int dk = int(p.key_width), dv = int(p.value_width), width = dk + dv;
  const int64_t partial_stride = p.kv_heads * kTileTokens * width;
  for (int i = int(threadIdx.x); i < kReducedRows * width / 4; i += kThreads) {
    const int row = part * kReducedRows + i / (width / 4), column = i % (width / 4) * 4;
    if (keys.begin + row >= keys.end) break;
    const float* from = b.partials +
                        (int64_t(split.first_partial) * p.kv_heads + kv_head) * kTileTokens * width +
                        row * width + column;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int j = 0; j < split.splits; ++j) {
      const float4 x = *reinterpret_cast<const float4*>(from + j * partial_stride);
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    const int64_t head = (int64_t(keys.batch) * b.plan.keys + keys.begin + row) * p.kv_heads + kv_head;
    if (column < dk)
      store_vec4(p.dtype, p.grad_k, head * dk + column, sum);
    else
      store_vec4(p.dtype, p.grad_v, head * dv + column - dk, sum);
  }
}

// ---- launches
unsigned backward_blocks(int64_t blocks) { return checked_blocks("segment_attention_backward", blocks); }

template <class T, int kWidth>
void launch_gradients(const Backward& b, void* stream) {
  const SegmentAttentionBackwardParams& p = b.p;
  const int64_t m_blocks = query_tiles(p, b.plan);
  const size_t bytes = kTileBytes<T, kWidth>;
  if (m_blocks > 0)
    launch("segment_backward_queries", segment_backward_queries_kernel<T, kWidth>,
           {dim3(backward_blocks(m_blocks * p.query_heads)), dim3(kThreads), bytes}, stream, b);
  launch("segment_backward_keys", segment_backward_keys_kernel<T, kWidth>,
         {dim3(backward_blocks(b.splits.max_splits * p.kv_heads), kWidth / kGradColumns<T, kWidth>),
          dim3(kThreads), bytes + 2 * kStageRows<T> * sizeof(RowStatistics)},
         stream, b);
}

template <class T>
void launch_gradients(const Backward& b, void* stream) {
  if constexpr (kHasNarrowKernels<T>)
    if (is_narrow(b.p)) return launch_gradients<T, 64>(b, stream);
  launch_gradients<T, 128>(b, stream);
}

Backward in_scratch(const SegmentAttentionBackwardParams& p, ScratchAllocator& scratch) {
  Backward b{};
  b.p = p;
  b.plan = device_plan(p, scratch);
  b.splits = device_splits(p, b.plan, scratch);
  b.statistics = scratch.take<RowStatistics>(p.query_heads * b.plan.tiles * kTileTokens);
  b.partials =
      scratch.take<float>(b.splits.max_partials * p.kv_heads * kTileTokens * (p.key_width + p.value_width));
  return b;
}

}  // namespace

int64_t segment_attention_backward_cuda_scratch(const SegmentAttentionBackwardParams& p) {
  ScratchAllocator allocator(nullptr);
  in_scratch(p, allocator);
  return allocator.bytes();
}

void segment_attention_backward_cuda(const SegmentAttentionBackwardParams& p, void* scratch, void* stream) {
  ScratchAllocator allocator(scratch);
  const Backward b = in_scratch(p, allocator);
  if (b.plan.tiles == 0) return;
  make_plan(b.plan, stream);
  make_splits(b.plan, b.splits, stream);
  if (const int64_t m_blocks = query_tiles(p, b.plan); m_blocks > 0)
    launch("segment_backward_preprocess", segment_backward_preprocess_kernel,
           {dim3(backward_blocks(m_blocks * p.query_heads)), dim3(kThreads)}, stream, b);
  switch (p.dtype) {
    case DType::kFloat32: launch_gradients<float>(b, stream); break;
    case DType::kBFloat16: launch_gradients<__nv_bfloat16>(b, stream); break;
    case DType::kFloat16: launch_gradients<__half>(b, stream); break;
    case DType::kFloat64: throw std::runtime_error("statecore: segment_attention on CUDA takes no float64");
  }
  if (b.splits.max_split_k_blocks > 0)
    launch("segment_reduce_splits", reduce_splits_kernel,
           {dim3(backward_blocks(b.splits.max_split_k_blocks * p.kv_heads * (kTileTokens / kReducedRows))),
            dim3(kThreads)},
           stream, b);
}

}  // namespace statecore
