// Instructions of sm_80 that CUDA C++ has no words for, each with two bodies: inline PTX for nvcc, and the
// emulator's function for g++. Shared memory is given by its 32-bit address.
#pragma once

#include "common/cuda.cuh"

#if defined(STATECORE_EMULATED)
#include "simt/instructions.h"
// The line of the kernel that an emulator's message names: the last parameter of every wrapper.
#define STATECORE_WHERE , ::simt::Where where = ::simt::Where::current()
#define STATECORE_ONLY_WHERE ::simt::Where where = ::simt::Where::current()
#else
#define STATECORE_WHERE
#define STATECORE_ONLY_WHERE
#endif

namespace statecore {

__device__ __forceinline__ uint32_t shared_address(const void* p STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  return simt::address_of(p, where);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#endif
}

// ---- matrix products of a warp: d += a b, sums in float32. Registers: see mma.cuh.
__device__ __forceinline__ void mma_m16n8k16(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2] STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::mma_m16n8k16(simt::Half::kBFloat16, d, a, b, where);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_m16n8k16(__half, float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2] STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::mma_m16n8k16(simt::Half::kFloat16, d, a, b, where);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Operands are float32 whose low 13 bits are ignored.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2] STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::mma_m16n8k8_tf32(d, a, b, where);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- four 8x8 matrices of 16-bit elements; lanes 8 m .. 8 m + 7 give the addresses of the rows of matrix m
template <bool kTransposed>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t row_address STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::ldmatrix(4, kTransposed, r, row_address, where);
#else
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
#endif
}

// ---- 16 bytes from global to shared memory in the background, or 16 zeros. Both addresses are aligned to
// 16; `from` is not read where zeros are asked for, but must be a valid pointer.
__device__ __forceinline__ void cp_async(uint32_t to, const void* from, bool zeros STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::cp_async(to, from, zeros ? 0 : 16, where);
#else
  const int bytes = zeros ? 0 : 16;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if defined(STATECORE_EMULATED)
  simt::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but the last kPending groups of this thread have landed; other threads see them after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait(STATECORE_ONLY_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::cp_async_wait(kPending, where);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- a barrier of some warps; number 0 is that of __syncthreads
__device__ __forceinline__ void named_barrier_sync(unsigned number, unsigned threads STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::named_barrier(number, threads, true, where);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
#endif
}

__device__ __forceinline__ void named_barrier_arrive(unsigned number, unsigned threads STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::named_barrier(number, threads, false, where);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
#endif
}

// Hides from the compiler where x comes from: addresses and indices derived from it are computed at the point
// of use instead of being hoisted out of the loop, where they would occupy registers.
__device__ __forceinline__ int64_t opaque(int64_t x) {
#if !defined(STATECORE_EMULATED)
  asm volatile("" : "+l"(x));
#endif
  return x;
}

__device__ __forceinline__ int opaque(int x) {
#if !defined(STATECORE_EMULATED)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// 2^x, to about 2 units in the last place; 0 for very negative x and for -inf.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(STATECORE_EMULATED)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace statecore
