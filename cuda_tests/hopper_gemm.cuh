// A small GEMM that exercises all of csrc/common/hopper.cuh, for tests: c[64, 128] = a[64, depth]
// b[depth, 128], by one block. A producer warpgroup loads panels by TMA into a two-stage pipeline, a
// consumer warpgroup multiplies them, and the result is stored through shared memory by TMA. Tests plant
// one bug at a time.
#pragma once

#include "common/hopper.cuh"
#include "common/mma.cuh"

namespace hopper_gemm {

using namespace statecore;

enum class Operands {
  kKMajor,      // a [64, depth], b^T [128, depth]: depth runs along the rows of panels
  kMnMajor,     // a^T [depth, 64], b [depth, 128]
  kARegisters,  // a [64, depth], loaded to registers; b [depth, 128]
  kAStored,     // like kKMajor, but threads copy a to shared memory with ordinary stores
};

enum class Bug {
  kNone,
  kNoInitBarrier,   // mbarriers are used before other threads can see them
  kNoInitFence,     // mbarriers are used before the async proxy can see them
  kIgnoreEmpty,     // stages are refilled without waiting until they are empty
  kEarlyRelease,    // stages are released while wgmmas still read them
  kNoRelease,       // stages are never released
  kNoProxyFence,    // wgmmas read what threads stored, without a proxy fence
  kFewBytes,        // expect_tx of half of a stage
  kManyBytes,       // expect_tx of more bytes than are loaded
  kTwoArrivals,     // two threads arrive on an mbarrier that expects one arrival
  kUnusedLoad,      // one more stage is loaded than consumed
  kWrongStride,     // wrong stride in a matrix descriptor
  kWrongMajor,      // b is read as MN-major although it is K-major
  kEarlyRead,       // accumulators are read before wgmma_wait
  kNoWgmmaFence,    // no wgmma_fence
  kOneWarpMissing,  // one of the four warps does not issue the wgmmas
  kEarlyStore,      // TMA stores the result before all warps have written it
  kNoStoreFence,    // TMA stores the result without a proxy fence
  kEarlyOverwrite,  // the result is overwritten before TMA has read it
  kNoStoreWait,     // the block exits before TMA has read the result
};

constexpr int kM = 64, kN = 128, kTileK = 64, kStages = 2, kThreads = 256;
constexpr int kPanelBytes = 64 * 128;
constexpr int kStageBytes = 3 * kPanelBytes;  // a, then b: two panels of 64 rows, or one of 128 rows
constexpr int kResultBytes = 2 * kPanelBytes;
constexpr int kSharedBytes = kStages * kStageBytes + kResultBytes;

template <Operands kOperands>
constexpr bool kAMnMajor = kOperands == Operands::kMnMajor;
template <Operands kOperands>
constexpr bool kBMnMajor = kOperands == Operands::kMnMajor || kOperands == Operands::kARegisters;

template <class T>
struct Problem {
  const T* a;
  int depth;  // any multiple of 8
};

// Addresses in shared memory: the stages, the result after them, and the mbarriers.
struct Shared {
  unsigned char* stages;
  uint32_t stages_address, full_barriers, empty_barriers;

  __device__ __forceinline__ uint32_t a(int stage) const { return stages_address + stage * kStageBytes; }
  __device__ __forceinline__ uint32_t b(int stage) const { return a(stage) + kPanelBytes; }
  __device__ __forceinline__ uint32_t result() const { return a(kStages); }
  __device__ __forceinline__ uint32_t full(int stage) const { return full_barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return empty_barriers + 8 * stage; }
};

// ---- producer

// One thread: announces the bytes of the stage and loads them, starting at k.
template <Operands kOperands, Bug kBug>
__device__ __forceinline__ void load_stage(const TensorMap& a_map, const TensorMap& b_map,
                                           const Shared& shared, int stage, int k) {
  constexpr bool kStored = kOperands == Operands::kAStored;
  constexpr int kLoadedBytes = kStored ? kStageBytes - kPanelBytes : kStageBytes;
  const uint32_t a = shared.a(stage), b = shared.b(stage), full = shared.full(stage);
  mbarrier_arrive_expect_tx(full, kBug == Bug::kFewBytes    ? kPanelBytes
                                  : kBug == Bug::kManyBytes ? kLoadedBytes + 16
                                                            : kLoadedBytes);
  if (!kStored) {
    if (kAMnMajor<kOperands>)
      tma_load(a, a_map, {0, k}, full);
    else
      tma_load(a, a_map, {k, 0}, full);
  }
  if (kBMnMajor<kOperands>) {
    tma_load(b, b_map, {0, k}, full);
    tma_load(b + kPanelBytes, b_map, {64, k}, full);
  } else {
    tma_load(b, b_map, {k, 0}, full);
  }
}

// All threads: copy a to the stage with ordinary stores.
template <class T, Bug kBug>
__device__ __forceinline__ void store_a(const Problem<T>& p, const Shared& shared, int stage, int k) {
  for (int vector = int(threadIdx.x) % 128; vector < kM * 8; vector += 128) {
    const int row = vector / 8, column = vector % 8 * 8;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (k + column < p.depth) x = *reinterpret_cast<const uint4*>(p.a + row * p.depth + k + column);
    *reinterpret_cast<uint4*>(shared.stages + stage * kStageBytes + Tile<T, 64>::offset(row, column)) = x;
  }
  if (kBug != Bug::kNoProxyFence) fence_proxy_async();
  mbarrier_arrive(shared.full(stage));
}

template <class T, Operands kOperands, Bug kBug>
__device__ __forceinline__ void produce(const TensorMap& a_map, const TensorMap& b_map, const Problem<T>& p,
                                        int k_tiles, const Shared& shared) {
  constexpr bool kStored = kOperands == Operands::kAStored;
  const int thread = int(threadIdx.x) % 128;
  if (thread / 32 == 0 && elect_one()) prefetch_tensor_map(a_map), prefetch_tensor_map(b_map);
  for (int i = 0; i < k_tiles; ++i) {
    const int stage = i % kStages, k = i * kTileK;
    // Threads that do not fill stages must not wait for empty ones either: the consumer does not wait for
    // them, so a phase could complete twice before they look.
    if (!kStored && thread > (kBug == Bug::kTwoArrivals)) break;
    // In the first round the barriers are fresh, so parity 1 counts as complete.
    if (kBug != Bug::kIgnoreEmpty) mbarrier_wait(shared.empty(stage), (i / kStages & 1) ^ 1);
    if (thread == 0 || (kBug == Bug::kTwoArrivals && thread == 1))
      load_stage<kOperands, kBug>(a_map, b_map, shared, stage, k);
    if (kStored) store_a<T, kBug>(p, shared, stage, k);
  }
  if (kBug == Bug::kUnusedLoad && thread == 0) {
    const int stage = k_tiles % kStages;
    mbarrier_wait(shared.empty(stage), (k_tiles / kStages & 1) ^ 1);
    mbarrier_arrive_expect_tx(shared.full(stage), kPanelBytes);
    tma_load(shared.a(stage), a_map, {0, 0}, shared.full(stage));
  }
}

// ---- consumer

// Issues the wgmmas of a stage as one group.
template <class T, Operands kOperands, Bug kBug>
__device__ __forceinline__ void multiply_stage(float (&sums)[kN / 2], const Shared& shared, int stage,
                                               bool accumulate) {
  const int thread = int(threadIdx.x) % 128;
  const uint32_t a = shared.a(stage), b = shared.b(stage);
  OperandA<T> a_registers[kTileK / 16];
  if constexpr (kOperands == Operands::kARegisters) {
#pragma unroll
    for (int k = 0; k < kTileK / 16; ++k)
      load_operand<false>(a_registers[k], Tile<T, 64>{}, shared.stages + stage * kStageBytes,
                          thread / 32 * 16, 16 * k);
  }
  wgmma_fence_operand(sums);
  if (kBug != Bug::kNoWgmmaFence) wgmma_fence();
#pragma unroll
  for (int k = 0; k < kTileK; k += 16) {
    if (kBug == Bug::kOneWarpMissing && thread >= 96) break;
    uint64_t b_descriptor = kBMnMajor<kOperands> ? mn_major_descriptor(b, kPanelBytes, 0, k)
                                                 : k_major_descriptor(b, 2 * kPanelBytes, 0, k);
    if (kBug == Bug::kWrongStride) b_descriptor -= uint64_t(512 >> 4) << 32;
    if constexpr (kOperands == Operands::kARegisters)
      wgmma<T, kN, Major::kMN>(sums, a_registers[k / 16].r, b_descriptor, accumulate || k > 0);
    else if constexpr (kAMnMajor<kOperands>)
      wgmma<T, kN, Major::kMN, Major::kMN>(sums, mn_major_descriptor(a, kPanelBytes, 0, k), b_descriptor,
                                           accumulate || k > 0);
    else
      wgmma<T, kN, Major::kK, kBug == Bug::kWrongMajor ? Major::kMN : Major::kK>(
          sums, k_major_descriptor(a, kPanelBytes, 0, k), b_descriptor, accumulate || k > 0);
  }
  wgmma_commit();
}

// Stores the warpgroup's accumulators to panels of 64 columns, as T.
template <class T>
__device__ __forceinline__ void store_accumulators(uint32_t panels, const float (&sums)[kN / 2]) {
  const int lane = lane_index(), warp = int(threadIdx.x) % 128 / 32;
  const int row = warp * 16 + lane % 16;
#pragma unroll
  for (int column = 0; column < kN; column += 16) {
    uint32_t r[4];  // matrices: rows 0-7 and rows 8-15 of columns 0-7, then of columns 8-15
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = pack<T>(sums[column / 2 + 2 * i], sums[column / 2 + 2 * i + 1]);
    stmatrix<false>(
        panels + column / 64 * kPanelBytes + Tile<T, 64>::offset(row, column % 64 + lane / 16 * 8), r);
  }
}

template <class T, Bug kBug>
__device__ __forceinline__ void store_result(const TensorMap& c_map, const Shared& shared,
                                             const float (&sums)[kN / 2]) {
  store_accumulators<T>(shared.result(), sums);
  if (kBug == Bug::kEarlyRead) wgmma_wait<0>();
  if (kBug != Bug::kNoStoreFence) fence_proxy_async();
  if (kBug != Bug::kEarlyStore) named_barrier_sync(1, 128);
  if (threadIdx.x == 0) {
    tma_store(c_map, {0, 0}, shared.result());
    tma_store(c_map, {64, 0}, shared.result() + kPanelBytes);
    bulk_commit();
    if (kBug == Bug::kEarlyOverwrite)
      *reinterpret_cast<uint4*>(shared.stages + kStages * kStageBytes) = make_uint4(0, 0, 0, 0);
    if (kBug != Bug::kNoStoreWait) bulk_wait_read<0>();
  }
}

template <class T, Operands kOperands, Bug kBug>
__device__ __forceinline__ void consume(const TensorMap& c_map, int k_tiles, const Shared& shared) {
  const int lane = int(threadIdx.x) % 32;
  float sums[kN / 2] = {};
  for (int i = 0; i < k_tiles; ++i) {
    const int stage = i % kStages;
    mbarrier_wait(shared.full(stage), i / kStages & 1);
    multiply_stage<T, kOperands, kBug>(sums, shared, stage, i > 0);
    if (kBug == Bug::kEarlyRelease && lane == 0) mbarrier_arrive(shared.empty(stage));
    if (kBug == Bug::kEarlyRead && i + 1 == k_tiles) break;
    wgmma_wait<0>();
    wgmma_fence_operand(sums);
    // One arrival per warp: if a is in registers, all lanes must have read the stage.
    __syncwarp();
    if (lane == 0 && kBug != Bug::kEarlyRelease && kBug != Bug::kNoRelease)
      mbarrier_arrive(shared.empty(stage));
  }
  store_result<T, kBug>(c_map, shared, sums);
}

template <class T, Operands kOperands, Bug kBug>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                const __grid_constant__ TensorMap c_map, Problem<T> p) {
#if defined(STATECORE_SM90A)
  STATECORE_DYNAMIC_SHARED(stages);
  STATECORE_SHARED(uint64_t, barriers, 2 * kStages);
  const uint32_t full_barriers = shared_address(barriers);
  const Shared shared{stages, shared_address(stages), full_barriers, full_barriers + kStages * 8};

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(shared.full(stage), kOperands == Operands::kAStored ? 129 : 1);
      mbarrier_init(shared.empty(stage), 4);
    }
    if (kBug != Bug::kNoInitFence) fence_mbarrier_init();
  }
  if (kBug != Bug::kNoInitBarrier) __syncthreads();

  const int k_tiles = (p.depth + kTileK - 1) / kTileK;
  if (threadIdx.x >= 128) {
    warpgroup_reg_dealloc<56>();
    produce<T, kOperands, kBug>(a_map, b_map, p, k_tiles, shared);
  } else {
    warpgroup_reg_alloc<240>();
    consume<T, kOperands, kBug>(c_map, k_tiles, shared);
  }
#endif
}

// a and b are stored as `kOperands` says, with kM and kN rows or columns; c is [valid_rows, kN], and TMA
// drops the rows beyond.
template <class T, Operands kOperands, Bug kBug = Bug::kNone>
void run(const T* a, const T* b, T* c, int depth, int valid_rows, void* stream) {
  const TensorMap a_map = kAMnMajor<kOperands> ? make_tensor_map(a, {kM, depth}, {kM}, {64, kTileK})
                                               : make_tensor_map(a, {depth, kM}, {depth}, {kTileK, kM});
  const TensorMap b_map = kBMnMajor<kOperands> ? make_tensor_map(b, {kN, depth}, {kN}, {64, kTileK})
                                               : make_tensor_map(b, {depth, kN}, {depth}, {kTileK, kN});
  const TensorMap c_map = make_tensor_map(c, {kN, valid_rows}, {kN}, {64, kM});
  launch("gemm", gemm_kernel<T, kOperands, kBug>, {dim3(1), dim3(kThreads), kSharedBytes}, stream, a_map,
         b_map, c_map, Problem<T>{a, depth});
}

}  // namespace hopper_gemm
