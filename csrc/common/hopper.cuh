// Instructions of sm_90a: copies of whole tiles by the tensor memory accelerator (TMA), barriers in shared
// memory that count arrivals and bytes, and matrix products of four warps that read shared memory themselves.
// Like ptx.cuh, each with two bodies. Clusters are not used.
//
// A kernel that calls these has, for the other architectures of the same file, an empty body:
//
//   __global__ void __launch_bounds__(384, 1) kernel(const __grid_constant__ TensorMap a, ...) {
//   #if defined(STATECORE_SM90A)
//     ...
//   #endif
//   }
//
// Tiles are panels of [rows x 64] 16-bit elements, 128 bytes a row, swizzled by 128 bytes: mma.cuh's Tile<T,
// 64> at an address aligned to 1024. That is what TMA makes of a box of 64 columns, and what ldmatrix,
// stmatrix and wgmma read. A wider tile is several panels, one behind the other.
#pragma once

#include "common/ptx.cuh"

#if defined(STATECORE_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define STATECORE_SM90A
#endif

#if !defined(STATECORE_EMULATED)
#include <cuda.h>
#endif

namespace statecore {

// ---- mbarriers: 8 bytes of shared memory, in phases of parity 0, 1, 0, ... A phase ends when as many
// threads as were named have arrived and all bytes that were expected in it have landed.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, unsigned arrivals STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::mbarrier_init(barrier, arrivals, where);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}

// By the thread that has initialised barriers, before the __syncthreads() that shows them to the others.
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

// The current phase also waits for so many bytes. Not after the last arrival of the phase.
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

// Until the phase of this parity has ended: with 1 on a fresh barrier, which is in phase 0, not at all.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, unsigned parity STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::mbarrier_wait(barrier, parity, where);
#else
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!ended);
#endif
}

// ---- tensor maps: how TMA finds a box in a tensor. Made on the host, passed as const __grid_constant__.
#if defined(STATECORE_EMULATED)
using TensorMap = simt::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// A tensor of up to five dimensions, innermost first: `sizes` in elements; `strides` in elements too, of all
// dimensions but the first, which has stride 1; `box` is what one copy moves, at most 256 each way. The box
// is 64 wide if `swizzled`. Data and strides are multiples of 16 bytes. Throws where that is not so.
template <class T, int kRank>
TensorMap make_tensor_map(const T* data, const int64_t (&sizes)[kRank], const int64_t (&strides)[kRank - 1],
                          const int (&box)[kRank], bool swizzled = true) {
#if defined(STATECORE_EMULATED)
  return simt::make_tensor_map(data, sizeof(T), kRank, sizes, strides, box, swizzled ? 128 : 0);
#else
  // By its address: the library is not linked to the driver, which CPU-only machines lack.
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

// ---- TMA. One thread issues a copy. `at` is the first element of the box, innermost dimension first, and
// may lie outside of the tensor: elements outside are loaded as zeros and not stored.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
#if defined(STATECORE_EMULATED)
  static_cast<void>(map);
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// To shared memory. The bytes of the whole box, zeros included, count for the current phase of `barrier`;
// whoever has waited for it sees them.
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

// From shared memory. What ordinary stores have put there must be followed by fence_proxy_async() in the
// threads that stored, and then by a barrier. The bytes must not change before bulk_wait_read().
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

// The same for plain runs of bytes, without a tensor map: multiples of 16 at addresses aligned to 16.
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

// Stores of a thread are waited for in groups, by that thread. At the latest before it returns they must
// have been read.
__device__ __forceinline__ void bulk_commit() {
#if defined(STATECORE_EMULATED)
  simt::bulk_commit();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Until all but the last kPending groups have been read from shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read(STATECORE_ONLY_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::bulk_wait_read(kPending, where);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

// Until all but the last kPending groups have been written to global memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait(STATECORE_ONLY_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::bulk_wait(kPending, where);
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// What this thread has stored to shared memory will be seen by TMA and wgmma, which do not look where
// ordinary loads look. Then a barrier tells the thread that issues them.
__device__ __forceinline__ void fence_proxy_async() {
#if defined(STATECORE_EMULATED)
  simt::fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- warps
// True in one lane, always the same; the whole warp asks.
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

// Registers a thread may have: all warps of a warpgroup ask for the same number. Needs __launch_bounds__ of
// threads and blocks, from which the number at the start follows.
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

// ---- four 8x8 matrices of 16-bit elements to shared memory: the mirror image of ldmatrix
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

// ---- wgmma: d [64, n] = or += a [64, 16] b [16, n], by the four warps of a warpgroup (threads 128 i ..
// 128 i + 127), which all issue the same. Warp w of the group has rows 16 w .. 16 w + 15 of d, and of a where
// a comes from registers: both as mma.cuh says of 16x8 accumulators, d[4 j + i] being element i of columns
// 8 j .. 8 j + 7, and of operands.
//
//   wgmma_fence_operand(d); wgmma_fence();
//   for (k = 0; k < 64; k += 16) wgmma<T, n>(d, k_major(...k), k_major(...k), true);
//   wgmma_commit();
//   ...
//   wgmma_wait<0>(); wgmma_fence_operand(d);
//
// Until the wait d must not be touched, nor the operands be written, be it by a copy.
// The accumulators of mma.cuh as wgmma takes them.
template <int kTiles>
__device__ __forceinline__ float (&flat(float (&x)[kTiles][4]))[4 * kTiles] {
  return reinterpret_cast<float (&)[4 * kTiles]>(x);
}

enum class Major {
  kK,
  kMN
};  // what runs along the rows of an operand's panel: depth, or rows of a (columns of b)

// Descriptors of operands in panels of [rows x 64] elements, `panel` the first, each of panel_bytes.
//
// K-major: rows of panels are rows of a or columns of b, `row` (a multiple of 8) the first; 64 deep a panel.
// Going 16 deeper is 32 bytes further in the row: the hardware applies the swizzle to the whole address, so
// that a descriptor may begin within a row.
__device__ __forceinline__ uint64_t k_major(uint32_t panel, uint32_t panel_bytes, int row, int k) {
  const uint32_t begin = panel + uint32_t(k / 64) * panel_bytes + uint32_t(row) * 128 + uint32_t(k % 64) * 2;
  return uint64_t(begin >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// MN-major: rows of panels are depths; 64 rows of a or columns of b a panel, `mn` (a multiple of 64) the
// first. Going 16 deeper is 16 rows further.
__device__ __forceinline__ uint64_t mn_major(uint32_t panel, uint32_t panel_bytes, int mn, int k) {
  const uint32_t begin = panel + uint32_t(mn / 64) * panel_bytes + uint32_t(k) * 128;
  return uint64_t(begin >> 4) | uint64_t(panel_bytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

// Before the first wgmma, and wherever the warpgroup has touched registers of d or a since the last.
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

// Until all but the last kPending groups are complete.
template <int kPending>
__device__ __forceinline__ void wgmma_wait(STATECORE_ONLY_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::wgmma_wait(kPending, where);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Keeps the compiler from moving what is done with d, which no wgmma in flight may have, across this point:
// it does not know that the registers change between a wgmma and its wait.
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
// An instruction names all its registers. Lists of 4 ... 128 of them, as text and as operands.
#define STATECORE_NAMES_4 "%0,%1,%2,%3"
#define STATECORE_NAMES_8 STATECORE_NAMES_4 ",%4,%5,%6,%7"
#define STATECORE_NAMES_16 STATECORE_NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define STATECORE_NAMES_32 \
  STATECORE_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define STATECORE_NAMES_48 \
  STATECORE_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define STATECORE_NAMES_64 \
  STATECORE_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define STATECORE_NAMES_80 \
  STATECORE_NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define STATECORE_NAMES_96 \
  STATECORE_NAMES_80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define STATECORE_NAMES_112 \
  STATECORE_NAMES_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define STATECORE_NAMES_128 \
  STATECORE_NAMES_112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define STATECORE_SUMS(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define STATECORE_SUMS_4 STATECORE_SUMS(0)
#define STATECORE_SUMS_8 STATECORE_SUMS_4, STATECORE_SUMS(4)
#define STATECORE_16_SUMS(i) \
  STATECORE_SUMS(i), STATECORE_SUMS(i + 4), STATECORE_SUMS(i + 8), STATECORE_SUMS(i + 12)
#define STATECORE_SUMS_16 STATECORE_16_SUMS(0)
#define STATECORE_SUMS_32 STATECORE_SUMS_16, STATECORE_16_SUMS(16)
#define STATECORE_SUMS_48 STATECORE_SUMS_32, STATECORE_16_SUMS(32)
#define STATECORE_SUMS_64 STATECORE_SUMS_48, STATECORE_16_SUMS(48)
#define STATECORE_SUMS_80 STATECORE_SUMS_64, STATECORE_16_SUMS(64)
#define STATECORE_SUMS_96 STATECORE_SUMS_80, STATECORE_16_SUMS(80)
#define STATECORE_SUMS_112 STATECORE_SUMS_96, STATECORE_16_SUMS(96)
#define STATECORE_SUMS_128 STATECORE_SUMS_112, STATECORE_16_SUMS(112)

// Shapes: n, how many registers that makes, and the numbers of the seven operands behind them.
#define STATECORE_WGMMA_SHAPES(shape)                                                                  \
  shape(8, 4, 4, 5, 6, 7, 8, 9, 10) shape(16, 8, 8, 9, 10, 11, 12, 13, 14)                             \
      shape(32, 16, 16, 17, 18, 19, 20, 21, 22) shape(64, 32, 32, 33, 34, 35, 36, 37, 38)              \
          shape(96, 48, 48, 49, 50, 51, 52, 53, 54) shape(128, 64, 64, 65, 66, 67, 68, 69, 70)         \
              shape(160, 80, 80, 81, 82, 83, 84, 85, 86) shape(192, 96, 96, 97, 98, 99, 100, 101, 102) \
                  shape(224, 112, 112, 113, 114, 115, 116, 117, 118)                                   \
                      shape(256, 128, 128, 129, 130, 131, 132, 133, 134)
#define STATECORE_WGMMA(type, n, count, a, b, accumulate, signs_and_orders)                    \
  "{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate                                             \
  ", 0;\n"                                                                                     \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" STATECORE_NAMES_##count \
      "}, " a ", %" #b ", p, " signs_and_orders ";\n}"
#endif

template <class T, int kN, Major kA = Major::kK, Major kB = Major::kK>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b,
                                      bool accumulate STATECORE_WHERE) {
  constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;
  static_assert(kBFloat16 || std::is_same<T, __half>::value, "operands have 16 bits");
  static_assert(kWgmmaShape<kN>, "n is 8, 16, 32, 64, 96, ... 256");
#if defined(STATECORE_EMULATED)
  simt::wgmma(kBFloat16 ? simt::Half::kBFloat16 : simt::Half::kFloat16, kN, d, nullptr, a, kA == Major::kMN,
              b, kB == Major::kMN, accumulate, where);
#else
#define STATECORE_SHAPE(n, count, i0, i1, i2, i3, i4, i5, i6)                                \
  if constexpr (kN == n && kBFloat16)                                                        \
    asm volatile(STATECORE_WGMMA("bf16", n, count, "%" #i0, i1, i2, "1, 1, %" #i3 ", %" #i4) \
                 : STATECORE_SUMS_##count                                                    \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA)), "n"(int(kB)));        \
  if constexpr (kN == n && !kBFloat16)                                                       \
    asm volatile(STATECORE_WGMMA("f16", n, count, "%" #i0, i1, i2, "1, 1, %" #i3 ", %" #i4)  \
                 : STATECORE_SUMS_##count                                                    \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA)), "n"(int(kB)));
  STATECORE_WGMMA_SHAPES(STATECORE_SHAPE)
#undef STATECORE_SHAPE
#endif
}

// ... with a from registers.
template <class T, int kN, Major kB = Major::kK>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate STATECORE_WHERE) {
  constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;
  static_assert(kBFloat16 || std::is_same<T, __half>::value, "operands have 16 bits");
  static_assert(kWgmmaShape<kN>, "n is 8, 16, 32, 64, 96, ... 256");
#if defined(STATECORE_EMULATED)
  simt::wgmma(kBFloat16 ? simt::Half::kBFloat16 : simt::Half::kFloat16, kN, d, a, 0, false, b,
              kB == Major::kMN, accumulate, where);
#else
#define STATECORE_A(i0, i1, i2, i3) "{%" #i0 ",%" #i1 ",%" #i2 ",%" #i3 "}"
#define STATECORE_SHAPE(n, count, i0, i1, i2, i3, i4, i5, i6)                                               \
  if constexpr (kN == n && kBFloat16)                                                                       \
    asm volatile(STATECORE_WGMMA("bf16", n, count, STATECORE_A(i0, i1, i2, i3), i4, i5, "1, 1, %" #i6)      \
                 : STATECORE_SUMS_##count                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kB))); \
  if constexpr (kN == n && !kBFloat16)                                                                      \
    asm volatile(STATECORE_WGMMA("f16", n, count, STATECORE_A(i0, i1, i2, i3), i4, i5, "1, 1, %" #i6)       \
                 : STATECORE_SUMS_##count                                                                   \
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
