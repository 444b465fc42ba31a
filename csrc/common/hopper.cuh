// Wrappers for sm_90a instructions: TMA copies, mbarriers and wgmma. As in ptx.cuh, each has one body for
// nvcc and one for the emulator. Clusters are not used.
//
// A kernel that uses these has an empty body on all other architectures that its file is compiled for:
//
//   __global__ void __launch_bounds__(384, 1) kernel(const __grid_constant__ TensorMap a, ...) {
//   #if defined(STATECORE_SM90A)
//     ...
//   #endif
//   }
//
// Tiles consist of panels of [rows, 64] 16-bit elements with the 128-byte swizzle: mma.cuh's Tile<T, 64> at
// an address aligned to 1024 bytes. TMA writes a box of 64 columns in this layout, and ldmatrix, stmatrix and
// wgmma address it. Wider tiles are several panels, one after another.
#pragma once

#include "common/ptx.cuh"

#if defined(STATECORE_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define STATECORE_SM90A
#endif

#if !defined(STATECORE_EMULATED)
#include <cuda.h>
#endif

namespace statecore {

// ---- mbarriers: 8 bytes of shared memory each. A phase completes when the pending arrival count and the
// tx-count (bytes still expected from asynchronous copies) are both zero. Phases have parity 0, 1, 0, ...
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, unsigned arrivals STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::mbarrier_init(barrier, arrivals, where);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}

// Makes initialised mbarriers visible to the async proxy. Called by the initialising thread, followed by
// __syncthreads() for the other threads.
__device__ __forceinline__ void fence_mbarrier_init() {
#if defined(STATECORE_EMULATED)
  simt::fence_mbarrier_init();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::mbarrier_arrive(barrier, where);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// Adds `bytes` to the tx-count of the current phase. Must precede the last arrival of the phase.
__device__ __forceinline__ void mbarrier_expect_tx(uint32_t barrier, unsigned bytes STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::mbarrier_expect_tx(barrier, bytes, where);
#else
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, unsigned bytes STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::mbarrier_expect_tx(barrier, bytes, where);
  simt::mbarrier_arrive(barrier, where);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}

// Waits for the completion of the phase with this parity. On a freshly initialised barrier parity 1 counts as
// complete, so the wait returns at once.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, unsigned parity STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::mbarrier_wait(barrier, parity, where);
#else
  uint32_t completed;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(completed)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!completed);
#endif
}

// ---- tensor maps: the TMA descriptors of tensors. Encoded on the host, passed as const __grid_constant__.
#if defined(STATECORE_EMULATED)
using TensorMap = simt::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// Describes a tensor of up to five dimensions, innermost first. `sizes` and `strides` count elements; the
// innermost stride is 1 and left out. `box` is the tile that one copy moves, at most 256 elements in each
// dimension; with `swizzled`, its rows are 128 bytes. Data and strides must be multiples of 16 bytes. Throws
// if the driver rejects any of these.
template <class T, int kRank>
TensorMap make_tensor_map(const T* data, const int64_t (&sizes)[kRank], const int64_t (&strides)[kRank - 1],
                          const int (&box)[kRank], bool swizzled = true) {
#if defined(STATECORE_EMULATED)
  return simt::make_tensor_map(data, sizeof(T), kRank, sizes, strides, box, swizzled ? 128 : 0);
#else
  // Looked up at run time: linking to the driver library would break the package on machines without one.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000,
                                                               cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("statecore: the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(address);
  }();
  const CUtensorMapDataType type = std::is_same<T, __nv_bfloat16>::value ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : std::is_same<T, __half>::value      ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  static_assert(sizeof(T) == 2 || std::is_same<T, float>::value, "elements are 16-bit floats or float");
  cuuint64_t size[kRank], stride_bytes[kRank];
  cuuint32_t box_size[kRank], element_strides[kRank];
  for (int i = 0; i < kRank; ++i) {
    size[i] = cuuint64_t(sizes[i]);
    box_size[i] = cuuint32_t(box[i]);
    element_strides[i] = 1;
    if (i > 0) stride_bytes[i - 1] = cuuint64_t(strides[i - 1]) * sizeof(T);
  }
  TensorMap map;
  const CUresult result = encode(&map, type, kRank, const_cast<T*>(data), size, stride_bytes, box_size,
                                 element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("statecore: no tensor map for these sizes, strides and box (CUDA error " +
                             std::to_string(int(result)) + ")");
  return map;
#endif
}

// ---- TMA copies, issued by one thread. `at` is the first element of the box, innermost dimension first. The
// box may extend beyond the tensor on all sides: out-of-bounds elements are loaded as zeros and not stored.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
#if defined(STATECORE_EMULATED)
  static_cast<void>(map);
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// Global to shared memory. Completes on `barrier`: the bytes of the whole box, out-of-bounds zeros included,
// are subtracted from the tx-count, and threads that have waited for the phase see the data.
template <int kRank>
__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap& map, const int (&at)[kRank],
                                         uint32_t barrier STATECORE_WHERE) {
  static_assert(kRank >= 2 && kRank <= 5, "boxes have two to five dimensions");
#if defined(STATECORE_EMULATED)
  simt::tma_load(to, map, kRank, at, barrier, where);
#else
#define STATECORE_TMA_LOAD(dimensions) \
  "cp.async.bulk.tensor." dimensions ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {"
  if constexpr (kRank == 2)
    asm volatile(STATECORE_TMA_LOAD("2d") "%3,%4}], [%2];" ::"r"(to), "l"(&map), "r"(barrier), "r"(at[0]),
                 "r"(at[1])
                 : "memory");
  else if constexpr (kRank == 3)
    asm volatile(STATECORE_TMA_LOAD("3d") "%3,%4,%5}], [%2];" ::"r"(to), "l"(&map), "r"(barrier), "r"(at[0]),
                 "r"(at[1]), "r"(at[2])
                 : "memory");
  else if constexpr (kRank == 4)
    asm volatile(STATECORE_TMA_LOAD("4d") "%3,%4,%5,%6}], [%2];" ::"r"(to), "l"(&map), "r"(barrier),
                 "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
                 : "memory");
  else
    asm volatile(STATECORE_TMA_LOAD("5d") "%3,%4,%5,%6,%7}], [%2];" ::"r"(to), "l"(&map), "r"(barrier),
                 "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
                 : "memory");
#undef STATECORE_TMA_LOAD
#endif
}

// Shared to global memory. Threads that wrote the data with ordinary stores must call fence_proxy_async() and
// then synchronise with the issuing thread. The source must not be overwritten before bulk_wait_read().
template <int kRank>
__device__ __forceinline__ void tma_store(const TensorMap& map, const int (&at)[kRank],
                                          uint32_t from STATECORE_WHERE) {
  static_assert(kRank >= 2 && kRank <= 5, "boxes have two to five dimensions");
#if defined(STATECORE_EMULATED)
  simt::tma_store(map, kRank, at, from, where);
#else
#define STATECORE_TMA_STORE(dimensions) \
  "cp.async.bulk.tensor." dimensions ".global.shared::cta.bulk_group [%1, {"
  if constexpr (kRank == 2)
    asm volatile(STATECORE_TMA_STORE("2d") "%2,%3}], [%0];" ::"r"(from), "l"(&map), "r"(at[0]), "r"(at[1])
                 : "memory");
  else if constexpr (kRank == 3)
    asm volatile(STATECORE_TMA_STORE("3d") "%2,%3,%4}], [%0];" ::"r"(from), "l"(&map), "r"(at[0]), "r"(at[1]),
                 "r"(at[2])
                 : "memory");
  else if constexpr (kRank == 4)
    asm volatile(STATECORE_TMA_STORE("4d") "%2,%3,%4,%5}], [%0];" ::"r"(from), "l"(&map), "r"(at[0]),
                 "r"(at[1]), "r"(at[2]), "r"(at[3])
                 : "memory");
  else
    asm volatile(STATECORE_TMA_STORE("5d") "%2,%3,%4,%5,%6}], [%0];" ::"r"(from), "l"(&map), "r"(at[0]),
                 "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
                 : "memory");
#undef STATECORE_TMA_STORE
#endif
}

// Bulk copies of contiguous bytes, without a tensor map. Size and addresses are multiples of 16 bytes.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, unsigned bytes,
                                          uint32_t barrier STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::bulk_load(to, from, bytes, barrier, where);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

__device__ __forceinline__ void bulk_store(void* to, uint32_t from, unsigned bytes STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::bulk_store(to, from, bytes, where);
#else
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
#endif
}

// Commits the thread's prior TMA and bulk stores as a bulk async-group. A thread must not exit before its
// stores have been read from shared memory (bulk_wait_read).
__device__ __forceinline__ void bulk_commit() {
#if defined(STATECORE_EMULATED)
  simt::bulk_commit();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until at most the kPending most recent groups have yet to be read from shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read(STATECORE_ONLY_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::bulk_wait_read(kPending, where);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

// Waits until at most the kPending most recent groups have yet to be written to global memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait(STATECORE_ONLY_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::bulk_wait(kPending, where);
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Makes this thread's ordinary stores to shared memory visible to the async proxy, through which TMA and
// wgmma access it. Must be followed by a barrier with the thread that issues those instructions.
__device__ __forceinline__ void fence_proxy_async() {
#if defined(STATECORE_EMULATED)
  simt::fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- warps and warpgroups

// True in one lane of the warp, the same one each time. All lanes must call it.
__device__ __forceinline__ bool elect_one(STATECORE_ONLY_WHERE) {
#if defined(STATECORE_EMULATED)
  return simt::elect_one(where);
#else
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(elected));
  return elected != 0;
#endif
}

// setmaxnreg: changes the per-thread register count, for all warps of a warpgroup alike. The kernel needs
// __launch_bounds__(threads, blocks), which determine the initial count.
template <int kRegisters>
__device__ __forceinline__ void warpgroup_reg_alloc() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24, 32, ... 256");
#if !defined(STATECORE_EMULATED)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ __forceinline__ void warpgroup_reg_dealloc() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24, 32, ... 256");
#if !defined(STATECORE_EMULATED)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// ---- stmatrix: stores four 8x8 matrices of 16-bit elements, with the register layout of ldmatrix
template <bool kTransposed>
__device__ __forceinline__ void stmatrix(uint32_t row_address, const uint32_t (&r)[4] STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::stmatrix(4, kTransposed, r, row_address, where);
#else
  if constexpr (kTransposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row_address),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row_address),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#endif
}

// ---- wgmma: d[64, n] (+)= a[64, 16] b[16, n], asynchronously, by the four warps of a warpgroup (threads 128
// i to 128 i + 127), all of which issue it. Warp w holds rows 16 w to 16 w + 15 of d, as n / 8 accumulators
// of mma.cuh: d[4 j + i] is element i of the 16x8 tile at column 8 j. If a comes from registers, it is an
// OperandA of mma.cuh with the same rows.
//
//   wgmma_fence_operand(d); wgmma_fence();
//   for (k = 0; k < 64; k += 16) wgmma<T, n>(d, k_major_descriptor(...k), k_major_descriptor(...k), true);
//   wgmma_commit();
//   ...
//   wgmma_wait<0>(); wgmma_fence_operand(d);
//
// Between the first wgmma and the wait, neither d nor the operands may be accessed, not even by a copy.

// Accumulator tiles of mma.cuh as the flat array that wgmma takes.
template <int kTiles>
__device__ __forceinline__ float (&flatten(float (&x)[kTiles][4]))[4 * kTiles] {
  return reinterpret_cast<float (&)[4 * kTiles]>(x);
}

// The dimension that is contiguous in shared memory: k, or m (of a) and n (of b).
enum class Major { kK, kMN };

// Matrix descriptors of operands that start at `panel`, in panels of panel_bytes.
//
// K-major: rows of a panel are rows of a or columns of b, starting at `row` (a multiple of 8); a panel holds
// 64 elements in k. Advancing k by 16 advances the address by 32 bytes within the row, which is allowed
// because the hardware computes the swizzle from the whole address.
__device__ __forceinline__ uint64_t k_major_descriptor(uint32_t panel, uint32_t panel_bytes, int row, int k) {
  const uint32_t begin = panel + uint32_t(k / 64) * panel_bytes + uint32_t(row) * 128 + uint32_t(k % 64) * 2;
  return uint64_t(begin >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// MN-major: rows of a panel are k; a panel holds 64 rows of a or columns of b, starting at `mn` (a multiple
// of 64). Advancing k by 16 advances the address by 16 rows.
__device__ __forceinline__ uint64_t mn_major_descriptor(uint32_t panel, uint32_t panel_bytes, int mn, int k) {
  const uint32_t begin = panel + uint32_t(mn / 64) * panel_bytes + uint32_t(k) * 128;
  return uint64_t(begin >> 4) | uint64_t(panel_bytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

// Required before the first wgmma, and whenever registers of d or a were accessed since the last one.
__device__ __forceinline__ void wgmma_fence() {
#if defined(STATECORE_EMULATED)
  simt::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit(STATECORE_ONLY_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::wgmma_commit(where);
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most the kPending most recent wgmma-groups are incomplete.
template <int kPending>
__device__ __forceinline__ void wgmma_wait(STATECORE_ONLY_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::wgmma_wait(kPending, where);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Keeps the compiler from moving accesses to d across this point: it does not know that the registers change
// between a wgmma and its wait. No wgmma in flight may use d.
template <int kCount>
__device__ __forceinline__ void wgmma_fence_operand(float (&d)[kCount] STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::wgmma_fence_operand(d, kCount, where);
#else
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

template <int kN>
constexpr bool kWgmmaShape = kN == 8 || kN == 16 || (kN > 0 && kN <= 256 && kN % 32 == 0);

#if !defined(STATECORE_EMULATED)
// A wgmma instruction names every accumulator register: lists of 4 to 128 of them, as asm text and operands.
#define STATECORE_REGISTERS_4 "%0,%1,%2,%3"
#define STATECORE_REGISTERS_8 STATECORE_REGISTERS_4 ",%4,%5,%6,%7"
#define STATECORE_REGISTERS_16 STATECORE_REGISTERS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define STATECORE_REGISTERS_32 \
  STATECORE_REGISTERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define STATECORE_REGISTERS_48 \
  STATECORE_REGISTERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define STATECORE_REGISTERS_64 \
  STATECORE_REGISTERS_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define STATECORE_REGISTERS_80 \
  STATECORE_REGISTERS_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define STATECORE_REGISTERS_96 \
  STATECORE_REGISTERS_80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define STATECORE_REGISTERS_112 \
  STATECORE_REGISTERS_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define STATECORE_REGISTERS_128 \
  STATECORE_REGISTERS_112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define STATECORE_ACC(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define STATECORE_ACC_4 STATECORE_ACC(0)
#define STATECORE_ACC_8 STATECORE_ACC_4, STATECORE_ACC(4)
#define STATECORE_16_ACC(i) \
  STATECORE_ACC(i), STATECORE_ACC(i + 4), STATECORE_ACC(i + 8), STATECORE_ACC(i + 12)
#define STATECORE_ACC_16 STATECORE_16_ACC(0)
#define STATECORE_ACC_32 STATECORE_ACC_16, STATECORE_16_ACC(16)
#define STATECORE_ACC_48 STATECORE_ACC_32, STATECORE_16_ACC(32)
#define STATECORE_ACC_64 STATECORE_ACC_48, STATECORE_16_ACC(48)
#define STATECORE_ACC_80 STATECORE_ACC_64, STATECORE_16_ACC(64)
#define STATECORE_ACC_96 STATECORE_ACC_80, STATECORE_16_ACC(80)
#define STATECORE_ACC_112 STATECORE_ACC_96, STATECORE_16_ACC(96)
#define STATECORE_ACC_128 STATECORE_ACC_112, STATECORE_16_ACC(112)

// Shapes: n, the number of accumulator registers, and the indices of the seven asm operands after them.
#define STATECORE_WGMMA_SHAPES(shape)                                                                  \
  shape(8, 4, 4, 5, 6, 7, 8, 9, 10) shape(16, 8, 8, 9, 10, 11, 12, 13, 14)                             \
      shape(32, 16, 16, 17, 18, 19, 20, 21, 22) shape(64, 32, 32, 33, 34, 35, 36, 37, 38)              \
          shape(96, 48, 48, 49, 50, 51, 52, 53, 54) shape(128, 64, 64, 65, 66, 67, 68, 69, 70)         \
              shape(160, 80, 80, 81, 82, 83, 84, 85, 86) shape(192, 96, 96, 97, 98, 99, 100, 101, 102) \
                  shape(224, 112, 112, 113, 114, 115, 116, 117, 118)                                   \
                      shape(256, 128, 128, 129, 130, 131, 132, 133, 134)
#define STATECORE_WGMMA(type, n, count, a, b, accumulate, scale_and_major)                         \
  "{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate                                                 \
  ", 0;\n"                                                                                         \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" STATECORE_REGISTERS_##count \
      "}, " a ", %" #b ", p, " scale_and_major ";\n}"
#endif

template <class T, int kN, Major kA = Major::kK, Major kB = Major::kK>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b,
                                      bool accumulate STATECORE_WHERE) {
  constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;
  static_assert(kBFloat16 || std::is_same<T, __half>::value, "operands are 16-bit");
  static_assert(kWgmmaShape<kN>, "n is 8, 16, 32, 64, 96, ... 256");
#if defined(STATECORE_EMULATED)
  simt::wgmma(kN, d,
              {.type = kBFloat16 ? simt::HalfType::kBFloat16 : simt::HalfType::kFloat16,
               .a_registers = nullptr,
               .a = a,
               .b = b,
               .a_mn_major = kA == Major::kMN,
               .b_mn_major = kB == Major::kMN},
              accumulate, where);
#else
#define STATECORE_SHAPE(n, count, i0, i1, i2, i3, i4, i5, i6)                                \
  if constexpr (kN == n && kBFloat16)                                                        \
    asm volatile(STATECORE_WGMMA("bf16", n, count, "%" #i0, i1, i2, "1, 1, %" #i3 ", %" #i4) \
                 : STATECORE_ACC_##count                                                     \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA)), "n"(int(kB)));        \
  if constexpr (kN == n && !kBFloat16)                                                       \
    asm volatile(STATECORE_WGMMA("f16", n, count, "%" #i0, i1, i2, "1, 1, %" #i3 ", %" #i4)  \
                 : STATECORE_ACC_##count                                                     \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA)), "n"(int(kB)));
  STATECORE_WGMMA_SHAPES(STATECORE_SHAPE)
#undef STATECORE_SHAPE
#endif
}

// The same with a in registers.
template <class T, int kN, Major kB = Major::kK>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate STATECORE_WHERE) {
  constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;
  static_assert(kBFloat16 || std::is_same<T, __half>::value, "operands are 16-bit");
  static_assert(kWgmmaShape<kN>, "n is 8, 16, 32, 64, 96, ... 256");
#if defined(STATECORE_EMULATED)
  simt::wgmma(kN, d,
              {.type = kBFloat16 ? simt::HalfType::kBFloat16 : simt::HalfType::kFloat16,
               .a_registers = a,
               .a = 0,
               .b = b,
               .a_mn_major = false,
               .b_mn_major = kB == Major::kMN},
              accumulate, where);
#else
#define STATECORE_A(i0, i1, i2, i3) "{%" #i0 ",%" #i1 ",%" #i2 ",%" #i3 "}"
#define STATECORE_SHAPE(n, count, i0, i1, i2, i3, i4, i5, i6)                                               \
  if constexpr (kN == n && kBFloat16)                                                                       \
    asm volatile(STATECORE_WGMMA("bf16", n, count, STATECORE_A(i0, i1, i2, i3), i4, i5, "1, 1, %" #i6)      \
                 : STATECORE_ACC_##count                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kB))); \
  if constexpr (kN == n && !kBFloat16)                                                                      \
    asm volatile(STATECORE_WGMMA("f16", n, count, STATECORE_A(i0, i1, i2, i3), i4, i5, "1, 1, %" #i6)       \
                 : STATECORE_ACC_##count                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kB)));
  STATECORE_WGMMA_SHAPES(STATECORE_SHAPE)
#undef STATECORE_SHAPE
#undef STATECORE_A
#endif
}

#if !defined(STATECORE_EMULATED)
#undef STATECORE_WGMMA
#undef STATECORE_WGMMA_SHAPES
#endif

}  // namespace statecore
