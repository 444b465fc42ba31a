// A decoding step moves states and computes next to nothing: 5 floating-point operations for 8 bytes where
// one query head reads a state. So the kernel is a copy of the states that happens to change them.
//
// A block of 4 C threads owns C columns of one state [Dk, Dv], C = 32, or 16 where there are few states. Its
// threads stand 16 down the rows and C / 4 across: thread (r, c) holds rows r, r + 16, ... of columns
// 4c .. 4c + 3 in registers, from one 16-byte load each to one 16-byte store each. A warp's load covers 4
// rows of 128 bytes (8 of 64), whole sectors of whole lines. All loads of a thread are in flight together, so
// a block keeps its whole tile (64 C Dk / 16 bytes, 16 KiB for Dk = 128 and C = 32) on the way from memory;
// k and q are converted in shared memory meanwhile.
//
// Reading, out = q S, sums down the rows: in a thread over its rows, then over r in pairs, fours, ... by
// shuffles inside a warp and through shared memory across warps. That tree is the same for both C, so a row's
// bits depend neither on the other rows of the batch nor on how many there are.
//
// The end of a step needs the other two states of the slot, which are fetched only by blocks whose row ends
// one: the branch is the same for a whole block.
//
// Expected on an H200, calculated from a copy bandwidth of 4.3 TB/s (nothing here has run on a GPU), for
// Dk = Dv = 128, 16-bit inputs and G query heads a state:
//
//   bytes, row and value head:  131072 of state in and out, 512 + 512 G of q, k, v and out
//   registers:                  at most 80 a thread, nothing spilled
//   shared memory:              8.5 KiB a block (C = 32)
//   blocks an SM:               6 of 128 threads, limited by registers; 96 KiB in flight
//   B 256, 64 heads, G = 1:     2.16 GB, 503 us
//   B 64, 4 heads, G = 7:       34.6 MB, 8.0 us
//   B 1, 2 heads, G = 6:        0.27 MB in 16 blocks, 0.06 us; the latency of a load and a store decides
#include <algorithm>
#include <stdexcept>

#include "common/elements.cuh"
#include "linear_attention/step_end.h"
#include "state_update/state_update.h"

namespace statecore {
namespace {

constexpr int kRows = 16;       // threads down a tile; widths are multiples of it
constexpr int kMaxWidth = 128;  // of keys and values
constexpr int kPasses = kMaxWidth / kRows;
constexpr int kQueries = 8;        // query heads that are read between two barriers
constexpr int kThreadsOnSm = 768;  // leaves 80 registers to each
// Below so many blocks of 32 columns (two for each SM of an H200), tiles have 16.
constexpr int64_t kFewBlocks = 264;

template <int kColumns>
struct Tile {
  static constexpr int kAcross = kColumns / 4;  // threads
  static constexpr int kThreads = kRows * kAcross;
  static constexpr int kWarpRows = 32 / kAcross;  // rows of threads in a warp
  static constexpr int kWarps = kThreads / 32;
};

__device__ __forceinline__ float4 decayed_plus(float decay, float4 s, float k, float4 v) {
  return make_float4(fmaf(k, v.x, decay * s.x), fmaf(k, v.y, decay * s.y), fmaf(k, v.z, decay * s.z),
                     fmaf(k, v.w, decay * s.w));
}

__device__ __forceinline__ float4 plus_scaled(float4 sum, float q, float4 s) {
  return make_float4(fmaf(q, s.x, sum.x), fmaf(q, s.y, sum.y), fmaf(q, s.z, sum.z), fmaf(q, s.w, sum.w));
}

__device__ __forceinline__ float4 plus_lane(float4 sum, int distance) {
  sum.x += __shfl_xor_sync(0xffffffffu, sum.x, distance);
  sum.y += __shfl_xor_sync(0xffffffffu, sum.y, distance);
  sum.z += __shfl_xor_sync(0xffffffffu, sum.z, distance);
  sum.w += __shfl_xor_sync(0xffffffffu, sum.w, distance);
  return sum;
}

// What a thread holds of a tile: 4 columns of each of `passes` rows, 16 apart.
struct Strip {
  float4 at[kPasses];
};

__device__ __forceinline__ void load(Strip& strip, const float* state, int passes, int row_stride) {
#pragma unroll
  for (int i = 0; i < kPasses; ++i)
    if (i < passes) strip.at[i] = __ldcs(reinterpret_cast<const float4*>(state + i * kRows * row_stride));
}

__device__ __forceinline__ void store(const Strip& strip, float* state, int passes, int row_stride) {
#pragma unroll
  for (int i = 0; i < kPasses; ++i)
    if (i < passes) __stcs(reinterpret_cast<float4*>(state + i * kRows * row_stride), strip.at[i]);
}

// The end of step `step` for this thread's part of the three states; running comes in registers.
__device__ __forceinline__ void end_step(Strip& running, int32_t step, const StateUpdateParams& p,
                                         float* running_state, int64_t kind_size, int passes,
                                         int row_stride) {
  float *start_state = running_state + kind_size, *prompt_state = start_state + kind_size;
  if (step == 0) store(running, prompt_state, passes, row_stride);
  const float strength = correction_strength(step, static_cast<const float*>(p.alpha), p.alphas);
  if (strength != 0) {
    const float own = 1 - strength, mean = strength / float(step - 1);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (i >= passes) break;
      const int at = i * kRows * row_stride;
      const float4 start = __ldcs(reinterpret_cast<const float4*>(start_state + at));
      const float4 prompt = __ldcs(reinterpret_cast<const float4*>(prompt_state + at));
      float4& s = running.at[i];
      s = make_float4(
          corrected(s.x, start.x, prompt.x, own, mean), corrected(s.y, start.y, prompt.y, own, mean),
          corrected(s.z, start.z, prompt.z, own, mean), corrected(s.w, start.w, prompt.w, own, mean));
    }
  }
  store(running, start_state, passes, row_stride);
}

template <int kColumns>
__global__ void __launch_bounds__(Tile<kColumns>::kThreads, kThreadsOnSm / Tile<kColumns>::kThreads)
    update(StateUpdateParams p) {
  using Tile = Tile<kColumns>;
  STATECORE_SHARED(float, k, kMaxWidth);
  STATECORE_SHARED(float, q, kQueries* kMaxWidth);                             // scaled
  STATECORE_SHARED(float4, partial, kQueries * Tile::kWarps * Tile::kAcross);  // sums over the rows of a warp

  // ---- who we are: some columns of one head's state, and the query heads that read it
  const int dk = int(p.key_width), dv = int(p.value_width), tiles = dv / kColumns;
  const int64_t item = blockIdx.x / tiles, row = item / p.value_heads;
  const int head = int(item % p.value_heads), key_head = head / int(p.value_heads / p.key_heads);
  const int queries = int(p.query_heads / p.key_heads), first_query = key_head * queries;
  const int first_column = int(blockIdx.x % tiles) * kColumns;
  const int thread = threadIdx.x, across = thread % Tile::kAcross, down = thread / Tile::kAcross;
  const int64_t out_heads = max(p.query_heads, p.value_heads);
  const int64_t first_out = (row * out_heads + max(head, first_query)) * dv + first_column;
  const auto set_out = [&](int query, int column, float x) {
    store_element(p.dtype, p.out, first_out + int64_t(query) * dv + column, x);
  };

  // A slot that does not exist is skipped too: nothing outside the pool may be touched, and looking at slots
  // on the host would cost a synchronisation.
  const int64_t slot = p.row_slots ? p.row_slots[row] : row;
  if (slot < 0 || slot >= p.slots) {
    for (int i = thread; i < queries * kColumns; i += Tile::kThreads) set_out(i / kColumns, i % kColumns, 0);
    return;
  }

  // ---- everything that comes from memory, the long way first
  const int64_t state_size = p.key_width * p.value_width;
  float* state = static_cast<float*>(p.states) + (slot * p.value_heads + head) * state_size + down * dv +
                 first_column + 4 * across;
  const int passes = dk / kRows;
  Strip running;
  load(running, state, passes, dv);
  const int64_t first_k = row * p.k_row + key_head * p.k_head;
  const int64_t first_q = row * p.q_row + first_query * p.q_head;
  const int64_t first_v = row * p.v_row + head * p.v_head + first_column + 4 * across;
  const float4 v = make_float4(load_element(p.dtype, p.v, first_v), load_element(p.dtype, p.v, first_v + 1),
                               load_element(p.dtype, p.v, first_v + 2),
                               load_element(p.dtype, p.v, first_v + 3));  // of any alignment
  const float decay =
      p.log_decay ? expf(static_cast<const float*>(p.log_decay)[row * p.value_heads + head]) : 1.0f;
  const int32_t ended = p.ends_step && p.state_kinds == 3 ? p.ends_step[row] : -1;
  for (int i = thread; i < dk; i += Tile::kThreads) k[i] = load_element(p.dtype, p.k, first_k + i);

  // ---- read for kQueries heads at a time; the update waits for k, which the first barrier publishes
  for (int done = 0; done < queries; done += kQueries) {
    const int now = min(queries - done, kQueries);
    const float scale = float(p.scale);
    for (int i = thread; i < now * dk; i += Tile::kThreads)
      q[i] = scale * load_element(p.dtype, p.q, first_q + (done + i / dk) * p.q_head + i % dk);
    __syncthreads();

    if (done == 0)
#pragma unroll
      for (int i = 0; i < kPasses; ++i)
        if (i < passes) running.at[i] = decayed_plus(decay, running.at[i], k[down + i * kRows], v);

    for (int g = 0; g < now; ++g) {
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < kPasses; ++i)
        if (i < passes) sum = plus_scaled(sum, q[g * dk + down + i * kRows], running.at[i]);
#pragma unroll
      for (int rows = 1; rows < Tile::kWarpRows; rows *= 2) sum = plus_lane(sum, rows * Tile::kAcross);
      if (down % Tile::kWarpRows == 0)
        partial[(g * Tile::kWarps + thread / 32) * Tile::kAcross + across] = sum;
    }
    __syncthreads();  // also: q may be overwritten from here on

    const float* sums = reinterpret_cast<const float*>(partial);
    for (int i = thread; i < now * kColumns; i += Tile::kThreads) {
      float part[Tile::kWarps];
#pragma unroll
      for (int w = 0; w < Tile::kWarps; ++w)
        part[w] = sums[(i / kColumns * Tile::kWarps + w) * kColumns + i % kColumns];
#pragma unroll
      for (int n = Tile::kWarps; n > 1; n /= 2)
#pragma unroll
        for (int w = 0; w < n / 2; ++w) part[w] = part[2 * w] + part[2 * w + 1];
      set_out(done + i / kColumns, i % kColumns, part[0]);
    }
  }

  // ---- back to memory
  if (ended >= 0) end_step(running, ended, p, state, p.slots * p.value_heads * state_size, passes, dv);
  store(running, state, passes, dv);
}

template <int kColumns>
void launch_update(const StateUpdateParams& p, void* stream) {
  const int64_t blocks = p.rows * p.value_heads * (p.value_width / kColumns);
  if (blocks > INT32_MAX)
    throw std::runtime_error("statecore: state_update has too many rows and heads for one launch");
  launch("state_update", update<kColumns>, {dim3(unsigned(blocks)), dim3(Tile<kColumns>::kThreads)}, stream,
         p);
}

}  // namespace

void state_update_cuda(const StateUpdateParams& p, void* stream) {
  if (p.rows == 0) return;
  if (p.dtype == DType::kFloat64)
    throw std::runtime_error("statecore: state_update on CUDA takes no float64");
  const bool wide = p.value_width % 32 == 0 && p.rows * p.value_heads * (p.value_width / 32) >= kFewBlocks;
  wide ? launch_update<32>(p, stream) : launch_update<16>(p, stream);
}

}  // namespace statecore
