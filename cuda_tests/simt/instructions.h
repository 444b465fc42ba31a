// Instructions that CUDA C++ has no words for, as the host bodies of csrc/common/ptx.cuh call them. Shared
// memory is given by its 32-bit address, as the instructions take it.
#pragma once

#include <cstdint>

#include "simt/language.h"

namespace simt {

uint32_t address_of(const void* shared, const Where&);

// ---- tensor cores: d += a b for a warp, sums in float32
enum class Half { kBFloat16, kFloat16 };
void mma_m16n8k16(Half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Where&);
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Where&);

// `matrices` of 8x8 16-bit elements, a row of 16 bytes at the address of each of the first 8 * matrices
// lanes.
void ldmatrix(int matrices, bool transposed, uint32_t* registers, uint32_t row_address, const Where&);
void stmatrix(int matrices, bool transposed, const uint32_t* registers, uint32_t row_address, const Where&);

// ---- copies to shared memory in the background: 16 bytes, of which the last 16 - source_bytes are zeros
void cp_async(uint32_t to, const void* from, int source_bytes, const Where&);
void cp_async_commit();
void cp_async_wait(int pending, const Where&);

// ---- sm_90: see csrc/common/hopper.cuh
void mbarrier_init(uint32_t barrier, unsigned arrivals, const Where&);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t barrier, const Where&);
void mbarrier_expect_tx(uint32_t barrier, unsigned bytes, const Where&);
void mbarrier_wait(uint32_t barrier, unsigned parity, const Where&);

struct alignas(64) TensorMap {
  const unsigned char* data;
  int rank;
  uint32_t element_bytes, swizzle;   // 0 or 128 bytes
  int64_t size[5], stride_bytes[5];  // innermost first
  uint32_t box[5];
};
TensorMap make_tensor_map(const void* data, size_t element_bytes, int rank, const int64_t* sizes,
                          const int64_t* strides, const int* box, uint32_t swizzle);
void tma_load(uint32_t to, const TensorMap&, int rank, const int* at, uint32_t barrier, const Where&);
void tma_store(const TensorMap&, int rank, const int* at, uint32_t from, const Where&);
void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, const Where&);
void bulk_store(void* to, uint32_t from, uint32_t bytes, const Where&);
void bulk_commit();
void bulk_wait_read(int pending, const Where&);
void bulk_wait(int pending, const Where&);
void fence_proxy_async();

bool elect_one(const Where&);

// `a_registers` or, where it is null, `a`.
void wgmma(Half, int n, float* d, const uint32_t* a_registers, uint64_t a, bool a_mn_major, uint64_t b,
           bool b_mn_major, bool accumulate, const Where&);
void wgmma_fence();
void wgmma_commit(const Where&);
void wgmma_wait(int pending, const Where&);
void wgmma_fence_operand(const float* d, int count, const Where&);

// ---- barriers of some warps; without `waits` the thread only arrives
void named_barrier(unsigned id, unsigned threads, bool waits, const Where&);

}  // namespace simt
