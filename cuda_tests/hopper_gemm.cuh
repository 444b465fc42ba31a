// A small product with all that csrc/common/hopper.cuh offers, for tests: c = a b, [64, 128] = [64, depth]
// [depth, 128], by one block. A producer warpgroup loads panels by TMA into two stages, a second one
// multiplies, and the result leaves through shared memory by TMA. Tests plant one bug each.
#pragma once

#include "common/hopper.cuh"
#include "common/mma.cuh"

namespace hopper_gemm {

using namespace statecore;

enum class Operands {
  kKMajor,      // a [64, depth], b^T [128, depth]: depth runs along the rows of panels
  kMnMajor,     // a^T [depth, 64], b [depth, 128]
  kARegisters,  // a [64, depth], loaded to registers; b [depth, 128]
  kAStored,     // like kKMajor, but a is copied to shared memory by threads
};

enum class Bug {
  kNone,
  kNoInitBarrier,  // barriers are used before the others can see them
  kNoInitFence,    // ... and copies may not see them
  kIgnoreEmpty,    // stages are refilled whether or not they are free
  kEarlyRelease,   // ... and freed while products still read them
  kLateRelease,    // ... and never freed
  kNoProxyFence,   // products read what threads stored, without a fence between
  kFewBytes,       // a phase ends when half of a stage has landed
  kManyBytes,      // ... or waits for more than comes
  kTwoArrivals,    // both of the producer's threads arrive at a barrier of one
  kUnusedLoad,     // one more stage is loaded than is used
  kWrongStride,    // in a descriptor
  kWrongMajor,     // b is read the other way round
  kTouchedSums,    // accumulators are read before the products are waited for
  kNoProductFence,
  kOneWarpMissing,  // three of four warps issue a product
  kEarlyStore,      // TMA reads the result before all warps have put it there
  kNoStoreFence,    // ... or without a fence
  kEarlyOverwrite,  // ... which changes before it has been read
  kStoreNotWaited,  // the block ends meanwhile
};

constexpr int kM = 64, kN = 128, kStep = 64, kStages = 2, kThreads = 256;
constexpr int kPanelBytes = 64 * 128,
              kStageBytes = 3 * kPanelBytes;  // a, then b: two panels, or one of 128 rows
constexpr int kResultBytes = 2 * kPanelBytes;
constexpr int kSharedBytes = kStages * kStageBytes + kResultBytes;

template <class T>
struct Problem {
  const T* a;
  int depth;  // any multiple of 8
};

// Rows 16 w .. 16 w + 15 of the warpgroup's sums to panels of 64 columns, as T.
template <class T>
__device__ __forceinline__ void store_sums(uint32_t panels, const float (&sums)[kN / 2]) {
  const int lane = lane_index(), warp = int(threadIdx.x) % 128 / 32;
  const int row = warp * 16 + lane % 16;
#pragma unroll
  for (int column = 0; column < kN; column += 16) {
    uint32_t r[4];  // matrices: rows 0-7, rows 8-15, then the next 8 columns
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = pack<T>(sums[column / 2 + 2 * i], sums[column / 2 + 2 * i + 1]);
    stmatrix<false>(
        panels + column / 64 * kPanelBytes + Tile<T, 64>::offset(row, column % 64 + lane / 16 * 8), r);
  }
}

template <class T, Operands kOperands, Bug kBug>
__global__ void __launch_bounds__(kThreads, 1)
    multiply(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
             const __grid_constant__ TensorMap c_map, Problem<T> p) {
#if defined(STATECORE_SM90A)
  STATECORE_DYNAMIC_SHARED(shared);
  STATECORE_SHARED(uint64_t, barriers, 2 * kStages);
  constexpr bool kMnMajor = kOperands == Operands::kMnMajor, kStored = kOperands == Operands::kAStored;
  constexpr bool kBMnMajor = kMnMajor || kOperands == Operands::kARegisters;
  const int thread = int(threadIdx.x) % 128, steps = (p.depth + kStep - 1) / kStep;
  const bool producer = threadIdx.x >= 128;
  const uint32_t stages = shared_address(shared), result = stages + kStages * kStageBytes;
  const uint32_t full = shared_address(barriers), empty = full + kStages * 8;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(full + 8 * s, kStored ? 129 : 1);
      mbarrier_init(empty + 8 * s, 4);
    }
    if (kBug != Bug::kNoInitFence) fence_mbarrier_init();
  }
  if (kBug != Bug::kNoInitBarrier) __syncthreads();

  if (producer) {
    warpgroup_reg_dealloc<56>();
    if (thread / 32 == 0 && elect_one()) prefetch_tensor_map(a_map), prefetch_tensor_map(b_map);
    for (int i = 0; i < steps; ++i) {
      const int s = i % kStages, k = i * kStep;
      const uint32_t a = stages + s * kStageBytes, b = a + kPanelBytes;
      // Who takes no part in filling stages must not wait for them: the barriers would not wait for him.
      if (!kStored && thread > (kBug == Bug::kTwoArrivals)) break;
      // Parity 1 of a fresh barrier has ended: the first round waits for nobody.
      if (kBug != Bug::kIgnoreEmpty) mbarrier_wait(empty + 8 * s, (i / kStages & 1) ^ 1);
      if (thread == 0 || (kBug == Bug::kTwoArrivals && thread == 1)) {
        constexpr int kLoaded = kStored ? kStageBytes - kPanelBytes : kStageBytes;
        mbarrier_arrive_expect_tx(full + 8 * s, kBug == Bug::kFewBytes    ? kPanelBytes
                                                : kBug == Bug::kManyBytes ? kLoaded + 16
                                                                          : kLoaded);
        if (!kStored) {
          if (kMnMajor)
            tma_load(a, a_map, {0, k}, full + 8 * s);
          else
            tma_load(a, a_map, {k, 0}, full + 8 * s);
        }
        if (kBMnMajor) {
          tma_load(b, b_map, {0, k}, full + 8 * s);
          tma_load(b + kPanelBytes, b_map, {64, k}, full + 8 * s);
        } else {
          tma_load(b, b_map, {k, 0}, full + 8 * s);
        }
      }
      if (kStored) {
        for (int piece = thread; piece < kM * 8; piece += 128) {
          const int row = piece / 8, column = piece % 8 * 8;
          uint4 x = make_uint4(0, 0, 0, 0);
          if (k + column < p.depth) x = *reinterpret_cast<const uint4*>(p.a + row * p.depth + k + column);
          *reinterpret_cast<uint4*>(shared + s * kStageBytes + Tile<T, 64>::offset(row, column)) = x;
        }
        if (kBug != Bug::kNoProxyFence) fence_proxy_async();
        mbarrier_arrive(full + 8 * s);
      }
    }
    if (kBug == Bug::kUnusedLoad && thread == 0) {
      const int s = steps % kStages;
      mbarrier_wait(empty + 8 * s, (steps / kStages & 1) ^ 1);
      mbarrier_arrive_expect_tx(full + 8 * s, kPanelBytes);
      tma_load(stages + s * kStageBytes, a_map, {0, 0}, full + 8 * s);
    }
  } else {
    warpgroup_reg_alloc<240>();
    float sums[kN / 2] = {};
    for (int i = 0; i < steps; ++i) {
      const int s = i % kStages;
      const uint32_t a = stages + s * kStageBytes, b = a + kPanelBytes;
      mbarrier_wait(full + 8 * s, i / kStages & 1);
      OperandA<T> a_registers[kStep / 16];
      if constexpr (kOperands == Operands::kARegisters) {
#pragma unroll
        for (int k = 0; k < kStep / 16; ++k)
          load<false>(a_registers[k], Tile<T, 64>{}, shared + s * kStageBytes, thread / 32 * 16, 16 * k);
      }
      wgmma_fence_operand(sums);
      if (kBug != Bug::kNoProductFence) wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStep; k += 16) {
        if (kBug == Bug::kOneWarpMissing && thread >= 96) break;
        uint64_t b_descriptor =
            kBMnMajor ? mn_major(b, kPanelBytes, 0, k) : k_major(b, 2 * kPanelBytes, 0, k);
        if (kBug == Bug::kWrongStride) b_descriptor -= uint64_t(512 >> 4) << 32;
        if constexpr (kOperands == Operands::kARegisters)
          wgmma<T, kN, Major::kMN>(sums, a_registers[k / 16].r, b_descriptor, i > 0 || k > 0);
        else if constexpr (kMnMajor)
          wgmma<T, kN, Major::kMN, Major::kMN>(sums, mn_major(a, kPanelBytes, 0, k), b_descriptor,
                                               i > 0 || k > 0);
        else
          wgmma<T, kN, Major::kK, kBug == Bug::kWrongMajor ? Major::kMN : Major::kK>(
              sums, k_major(a, kPanelBytes, 0, k), b_descriptor, i > 0 || k > 0);
      }
      wgmma_commit();
      if (kBug == Bug::kEarlyRelease && thread % 32 == 0) mbarrier_arrive(empty + 8 * s);
      if (kBug == Bug::kTouchedSums && i + 1 == steps) break;
      wgmma_wait<0>();
      wgmma_fence_operand(sums);
      // One lane of each warp: with a in registers, all its lanes have read the stage by now.
      __syncwarp();
      if (thread % 32 == 0 && kBug != Bug::kEarlyRelease && kBug != Bug::kLateRelease)
        mbarrier_arrive(empty + 8 * s);
    }

    store_sums<T>(result, sums);
    if (kBug == Bug::kTouchedSums) wgmma_wait<0>();
    if (kBug != Bug::kNoStoreFence) fence_proxy_async();
    if (kBug != Bug::kEarlyStore) named_barrier_sync(1, 128);
    if (thread == 0) {
      tma_store(c_map, {0, 0}, result);
      tma_store(c_map, {64, 0}, result + kPanelBytes);
      bulk_commit();
      if (kBug == Bug::kEarlyOverwrite)
        *reinterpret_cast<uint4*>(shared + kStages * kStageBytes) = make_uint4(0, 0, 0, 0);
      if (kBug != Bug::kStoreNotWaited) bulk_wait_read<0>();
    }
  }
#endif
}

// a, b: as `kOperands` says; c [valid_rows, 128], of which TMA leaves out the rows behind. b has 128 columns
// or rows, a kM.
template <class T, Operands kOperands, Bug kBug = Bug::kNone>
void run(const T* a, const T* b, T* c, int depth, int valid_rows, void* stream) {
  constexpr bool kMnMajor = kOperands == Operands::kMnMajor;
  constexpr bool kBMnMajor = kMnMajor || kOperands == Operands::kARegisters;
  const TensorMap a_map = kMnMajor ? make_tensor_map(a, {kM, depth}, {kM}, {64, kStep})
                                   : make_tensor_map(a, {depth, kM}, {depth}, {kStep, kM});
  const TensorMap b_map = kBMnMajor ? make_tensor_map(b, {kN, depth}, {kN}, {64, kStep})
                                    : make_tensor_map(b, {depth, kN}, {depth}, {kStep, kN});
  const TensorMap c_map = make_tensor_map(c, {kN, valid_rows}, {kN}, {64, kM});
  launch("multiply", multiply<T, kOperands, kBug>, {dim3(1), dim3(kThreads), kSharedBytes}, stream, a_map,
         b_map, c_map, Problem<T>{a, depth});
}

}  // namespace hopper_gemm
