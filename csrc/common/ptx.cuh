// Wrappers for sm_80 instructions that CUDA C++ does not expose, each with one body of inline PTX for nvcc
// and one that calls the emulator. Shared memory is passed as 32-bit shared-space addresses.
#pragma once

#include "common/cuda.cuh"

#if defined(STATECORE_EMULATED)
#include "simt/instructions.h"
// The last parameter of every wrapper: the line of the kernel that the emulator's error messages name.
#define STATECORE_WHERE , ::simt::Where where = ::simt::Where::current()
#define STATECORE_ONLY_WHERE ::simt::Where where = ::simt::Where::current()
#define STATECORE_PASS_WHERE , where
#else
#define STATECORE_WHERE
#define STATECORE_ONLY_WHERE
#define STATECORE_PASS_WHERE
#endif

namespace statecore {

__device__ __forceinline__ uint32_t shared_address(const void* p STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  return simt::shared_address(p, where);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#endif
}

// ---- mma.sync: d += a b by one warp, accumulated in float32. For register layouts see mma.cuh.
__device__ __forceinline__ void mma_m16n8k16(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2] STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::mma_m16n8k16(simt::HalfType::kBFloat16, d, a, b, where);
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
  simt::mma_m16n8k16(simt::HalfType::kFloat16, d, a, b, where);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Operands are float32 values whose low 13 bits the tensor core ignores.
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

// ---- ldmatrix: loads four 8x8 matrices of 16-bit elements. Lanes 8 m to 8 m + 7 pass the addresses of the
// rows of matrix m.
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

// ---- cp.async: copies 16 bytes from global to shared memory asynchronously, or writes 16 zero bytes. Both
// addresses are 16-byte aligned. With `zero_fill`, `from` is not read but must be a valid pointer.
__device__ __forceinline__ void cp_async(uint32_t to, const void* from, bool zero_fill STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::cp_async(to, from, zero_fill ? 0 : 16, where);
#else
  const int bytes = zero_fill ? 0 : 16;
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

// Waits until at most the kPending most recent cp.async groups of this thread are incomplete. Other threads
// see the data after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait(STATECORE_ONLY_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::cp_async_wait(kPending, where);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- named barriers among `threads` threads, whole warps; barrier 0 is the one of __syncthreads()
__device__ __forceinline__ void named_barrier_sync(unsigned number, unsigned threads STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::named_barrier_sync(number, threads, where);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
#endif
}

__device__ __forceinline__ void named_barrier_arrive(unsigned number, unsigned threads STATECORE_WHERE) {
#if defined(STATECORE_EMULATED)
  simt::named_barrier_arrive(number, threads, where);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
#endif
}

// Hides the origin of x from the compiler: addresses and indices derived from it are computed where they are
// used instead of being hoisted out of loops, where they would occupy registers.
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

// 2^x with an error of about 2 ulp; 0 for very negative x and -inf.
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
