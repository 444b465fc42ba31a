// Decoding moves the states through memory and computes next to nothing: 5 FLOPs per 8 bytes if one query
// head reads a state. The kernel is therefore organised as a copy of the states.
//
// A block of 4 C threads owns C columns of one state [Dk, Dv], with C = 32, or 16 if there are few states.
// Its threads form a grid of 16 rows and C / 4 columns: thread (r, c) holds rows r, r + 16, ... of columns 4c
// to 4c + 3 in registers, each from one 16-byte load to one 16-byte store. A load of a warp covers 4 rows of
// 128 bytes (8 rows of 64 bytes if C = 16), which are whole sectors. All loads of a thread are issued before
// any is used, so that a block has its whole tile in flight (4 C Dk bytes, 16 KiB for Dk = 128 and C = 32)
// while it converts k and q in shared memory.
//
// The read, out = q S, sums over rows: first over those of a thread, then pairwise over r, by shuffles within
// a warp and through shared memory across warps. The summation tree is the same for both C, so the bits of a
// row depend neither on the other rows of the batch nor on their number.
//
// The end of a step needs the other two states of the slot. Only blocks whose row ends a step load them; the
// branch is uniform within a block.
//
// Expected on an H200, calculated from a copy bandwidth of 4.3 TB/s, not measured, for Dk = Dv = 128, 16-bit
// inputs and G query heads per state:
//
//   bytes per row and value head:  131072 of the state, in and out; 512 + 512 G of q, k, v and out
//   registers per thread:          at most 80, no spills
//   shared memory per block:       8.5 KiB (C = 32)
//   blocks per SM:                 6 of 128 threads, limited by registers; 96 KiB in flight
//   B 256, 64 heads, G = 1:        2.16 GB, 503 us
//   B 64, 4 heads, G = 7:          34.6 MB, 8.0 us
//   B 1, 2 heads, G = 6:           0.27 MB in 16 blocks, 0.06 us; dominated by load and store latency
#include <algorithm>
#include <stdexcept>

#include "common/elements.cuh"
#include "linear_attention/step_end.h"
#include "state_update/state_update.h"

namespace statecore {
namespace {

constexpr int kThreadRows = 16;  // rows of the thread grid; widths are multiples of it
constexpr int kMaxWidth = 128;   // of keys and values
constexpr int kMaxPasses = kMaxWidth / kThreadRows;
constexpr int kQueries = 8;         // query heads that are read between two barriers
constexpr int kThreadsPerSm = 768;  // limits registers to 80 per thread
// Tiles have 16 columns if 32 would give fewer blocks than this, two per SM of an H200.
constexpr int64_t kFewBlocks = 264;

// The thread grid of a block that owns kColumns columns of a state.
template <int kColumns>
struct ThreadGrid {
  static constexpr int kThreadColumns = kColumns / 4;
  static constexpr int kThreads = kThreadRows * kThreadColumns;
  static constexpr int kRowsPerWarp = 32 / kThreadColumns;
  static constexpr int kWarps = kThreads / 32;
};

__device__ __forceinline__ float4 decay_add(float decay, float4 s, float k, float4 v) {
  return make_float4(fmaf(k, v.x, decay * s.x), fmaf(k, v.y, decay * s.y), fmaf(k, v.z, decay * s.z),
                     fmaf(k, v.w, decay * s.w));
}

__device__ __forceinline__ float4 multiply_add(float4 sum, float q, float4 s) {
  return make_float4(fmaf(q, s.x, sum.x), fmaf(q, s.y, sum.y), fmaf(q, s.z, sum.z), fmaf(q, s.w, sum.w));
}

__device__ __forceinline__ float4 add_xor_lane(float4 sum, int lane_mask) {
  sum.x += __shfl_xor_sync(0xffffffffu, sum.x, lane_mask);
  sum.y += __shfl_xor_sync(0xffffffffu, sum.y, lane_mask);
  sum.z += __shfl_xor_sync(0xffffffffu, sum.z, lane_mask);
  sum.w += __shfl_xor_sync(0xffffffffu, sum.w, lane_mask);
  return sum;
}

// A thread's part of a state: 4 columns of `passes` rows, kThreadRows apart.
struct Fragment {
  float4 row[kMaxPasses];
};

__device__ __forceinline__ void load(Fragment& fragment, const float* state, int passes, int row_stride) {
#pragma unroll
  for (int i = 0; i < kMaxPasses; ++i)
    if (i < passes)
      fragment.row[i] = __ldcs(reinterpret_cast<const float4*>(state + i * kThreadRows * row_stride));
}

__device__ __forceinline__ void store(const Fragment& fragment, float* state, int passes, int row_stride) {
#pragma unroll
  for (int i = 0; i < kMaxPasses; ++i)
    if (i < passes) __stcs(reinterpret_cast<float4*>(state + i * kThreadRows * row_stride), fragment.row[i]);
}

// The end of step `step` for this thread's part of the three states. The running state is in registers.
__device__ __forceinline__ void end_step(Fragment& running, int32_t step, const StateUpdateParams& p,
                                         float* running_state, int64_t kind_size, int passes,
                                         int row_stride) {
  float *start_state = running_state + kind_size, *prompt_state = start_state + kind_size;
  if (step == 0) store(running, prompt_state, passes, row_stride);
  const float strength = correction_strength(step, static_cast<const float*>(p.alpha), p.alphas);
  if (strength != 0) {
    const float own = 1 - strength, mean = strength / float(step - 1);
#pragma unroll
    for (int i = 0; i < kMaxPasses; ++i) {
      if (i >= passes) break;
      const int at = i * kThreadRows * row_stride;
      const float4 start = __ldcs(reinterpret_cast<const float4*>(start_state + at));
      const float4 prompt = __ldcs(reinterpret_cast<const float4*>(prompt_state + at));
      float4& s = running.row[i];
      s = make_float4(
          corrected(s.x, start.x, prompt.x, own, mean), corrected(s.y, start.y, prompt.y, own, mean),
          corrected(s.z, start.z, prompt.z, own, mean), corrected(s.w, start.w, prompt.w, own, mean));
    }
  }
  store(running, start_state, passes, row_stride);
}

// The work of a block: some columns of one value head's state in batch row b, and the query heads
// that read it.
template <int kColumns>
struct WorkTile {
  int64_t b;
  int head, key_head, queries, first_query, first_column;
  int64_t first_out;

  __device__ __forceinline__ explicit WorkTile(const StateUpdateParams& p) {
    const int dv = int(p.value_width), tiles = dv / kColumns;
    const int64_t state = blockIdx.x / tiles;
    b = state / p.value_heads;
    head = int(state % p.value_heads), key_head = head / int(p.value_heads / p.key_heads);
    queries = int(p.query_heads / p.key_heads), first_query = key_head * queries;
    first_column = int(blockIdx.x % tiles) * kColumns;
    const int64_t out_heads = max(p.query_heads, p.value_heads);
    first_out = (b * out_heads + max(head, first_query)) * dv + first_column;
  }

  __device__ __forceinline__ void store_out(const StateUpdateParams& p, int query, int column,
                                            float x) const {
    store_element(p.dtype, p.out, first_out + int64_t(query) * int(p.value_width) + column, x);
  }
};

// Sums q S over the rows of each warp, for `count` query heads in shared memory.
template <int kColumns>
__device__ __forceinline__ void sum_within_warps(const Fragment& running, int passes, const float* q, int dk,
                                                 int count, float4* partial) {
  using Grid = ThreadGrid<kColumns>;
  const int thread = threadIdx.x, thread_column = thread % Grid::kThreadColumns;
  const int thread_row = thread / Grid::kThreadColumns;
  for (int g = 0; g < count; ++g) {
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < kMaxPasses; ++i)
      if (i < passes) sum = multiply_add(sum, q[g * dk + thread_row + i * kThreadRows], running.row[i]);
#pragma unroll
    for (int rows = 1; rows < Grid::kRowsPerWarp; rows *= 2)
      sum = add_xor_lane(sum, rows * Grid::kThreadColumns);
    if (thread_row % Grid::kRowsPerWarp == 0)
      partial[(g * Grid::kWarps + thread / 32) * Grid::kThreadColumns + thread_column] = sum;
  }
}

// Sums over the warps, and stores `count` query heads of out.
template <int kColumns>
__device__ __forceinline__ void sum_across_warps(const StateUpdateParams& p, const WorkTile<kColumns>& work,
                                                 const float* partial, int first, int count) {
  using Grid = ThreadGrid<kColumns>;
  for (int i = threadIdx.x; i < count * kColumns; i += Grid::kThreads) {
    float sum[Grid::kWarps];
#pragma unroll
    for (int w = 0; w < Grid::kWarps; ++w)
      sum[w] = partial[(i / kColumns * Grid::kWarps + w) * kColumns + i % kColumns];
#pragma unroll
    for (int n = Grid::kWarps; n > 1; n /= 2)
#pragma unroll
      for (int w = 0; w < n / 2; ++w) sum[w] = sum[2 * w] + sum[2 * w + 1];
    work.store_out(p, first + i / kColumns, i % kColumns, sum[0]);
  }
}

template <int kColumns>
__global__ void __launch_bounds__(ThreadGrid<kColumns>::kThreads,
                                  kThreadsPerSm / ThreadGrid<kColumns>::kThreads)
    state_update_kernel(StateUpdateParams p) {
  using Grid = ThreadGrid<kColumns>;
  STATECORE_SHARED(float, k, kMaxWidth);
  STATECORE_SHARED(float, q, (kQueries * kMaxWidth));  // scaled
  STATECORE_SHARED(float4, partial, kQueries * Grid::kWarps * Grid::kThreadColumns);

  const WorkTile<kColumns> work(p);
  const int dk = int(p.key_width), dv = int(p.value_width);
  const int thread = threadIdx.x, thread_column = thread % Grid::kThreadColumns;
  const int thread_row = thread / Grid::kThreadColumns;

  // Slots outside the pool are skipped as well: memory outside the pool must not be accessed, and the host
  // cannot check slots without a synchronisation.
  const int64_t slot = p.slots ? p.slots[work.b] : work.b;
  if (slot < 0 || slot >= p.pool) {
    for (int i = thread; i < work.queries * kColumns; i += Grid::kThreads)
      work.store_out(p, i / kColumns, i % kColumns, 0);
    return;
  }

  // ---- loads from global memory, those of the state first
  const int64_t state_size = p.key_width * p.value_width;
  float* state = static_cast<float*>(p.states) + (slot * p.value_heads + work.head) * state_size +
                 thread_row * dv + work.first_column + 4 * thread_column;
  const int passes = dk / kThreadRows;
  Fragment running;
  load(running, state, passes, dv);
  const int64_t first_k = work.b * p.k.batch + work.key_head * p.k.head;
  const int64_t first_q = work.b * p.q.batch + work.first_query * p.q.head;
  const int64_t first_v = work.b * p.v.batch + work.head * p.v.head + work.first_column + 4 * thread_column;
  const float4 v =  // element by element, since v may have any alignment
      make_float4(load_element(p.dtype, p.v.data, first_v), load_element(p.dtype, p.v.data, first_v + 1),
                  load_element(p.dtype, p.v.data, first_v + 2), load_element(p.dtype, p.v.data, first_v + 3));
  const float decay =
      p.log_decay ? expf(static_cast<const float*>(p.log_decay)[work.b * p.value_heads + work.head]) : 1.0f;
  const int32_t ended = p.ends_step && p.state_kinds == 3 ? p.ends_step[work.b] : -1;
  for (int i = thread; i < dk; i += Grid::kThreads) k[i] = load_element(p.dtype, p.k.data, first_k + i);

  // ---- update, and read for kQueries query heads at a time
  for (int first = 0; first < work.queries; first += kQueries) {
    const int count = min(work.queries - first, kQueries);
    const float scale = float(p.scale);
    for (int i = thread; i < count * dk; i += Grid::kThreads)
      q[i] = scale * load_element(p.dtype, p.q.data, first_q + (first + i / dk) * p.q.head + i % dk);
    __syncthreads();  // in the first iteration for k, too

    if (first == 0)
#pragma unroll
      for (int i = 0; i < kMaxPasses; ++i)
        if (i < passes) running.row[i] = decay_add(decay, running.row[i], k[thread_row + i * kThreadRows], v);

    sum_within_warps<kColumns>(running, passes, q, dk, count, partial);
    __syncthreads();  // also before q is overwritten in the next iteration
    sum_across_warps(p, work, reinterpret_cast<const float*>(partial), first, count);
  }

  // ---- stores to global memory
  if (ended >= 0) end_step(running, ended, p, state, p.pool * p.value_heads * state_size, passes, dv);
  store(running, state, passes, dv);
}

template <int kColumns>
void launch_state_update(const StateUpdateParams& p, void* stream) {
  const int64_t blocks = p.batch * p.value_heads * (p.value_width / kColumns);
  launch("state_update", state_update_kernel<kColumns>,
         {dim3(checked_blocks("state_update", blocks)), dim3(ThreadGrid<kColumns>::kThreads)}, stream, p);
}

}  // namespace

void state_update_cuda(const StateUpdateParams& p, void* stream) {
  if (p.batch == 0) return;
  if (p.dtype == DType::kFloat64)
    throw std::runtime_error("statecore: state_update on CUDA takes no float64");
  const bool wide = p.value_width % 32 == 0 && p.batch * p.value_heads * (p.value_width / 32) >= kFewBlocks;
  wide ? launch_state_update<32>(p, stream) : launch_state_update<16>(p, stream);
}

}  // namespace statecore
