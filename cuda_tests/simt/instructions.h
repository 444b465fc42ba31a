// PTX instructions, as called by the emulated bodies of csrc/common/ptx.cuh and hopper.cuh. Shared memory is
// passed as 32-bit shared-space addresses.
#pragma once

#include <cstdint>

#include "simt/language.h"

namespace simt {

uint32_t shared_address(const void* pointer, const Where&);

// ---- mma.sync: d += a b by one warp, accumulated in float32
enum class HalfType { kBFloat16, kFloat16 };
void mma_m16n8k16(HalfType, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Where&);
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Where&);

// `matrices` 8x8 matrices of 16-bit elements. The first 8 * matrices lanes pass the addresses of their rows.
void ldmatrix(int matrices, bool transposed, uint32_t* registers, uint32_t row_address, const Where&);
void stmatrix(int matrices, bool transposed, const uint32_t* registers, uint32_t row_address, const Where&);

// ---- cp.async of 16 bytes; those beyond source_bytes are zero-filled
void cp_async(uint32_t to, const void* from, int source_bytes, const Where&);
void cp_async_commit();
void cp_async_wait(int pending, const Where&);

// ---- named barriers: bar.sync and bar.arrive
void named_barrier_sync(unsigned id, unsigned threads, const Where&);
void named_barrier_arrive(unsigned id, unsigned threads, const Where&);

// ---- sm_90a: see csrc/common/hopper.cuh
void mbarrier_init(uint32_t barrier, unsigned arrivals, const Where&);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t barrier, const Where&);
void mbarrier_expect_tx(uint32_t barrier, unsigned bytes, const Where&);
void mbarrier_wait(uint32_t barrier, unsigned parity, const Where&);

struct alignas(64) TensorMap {
  const unsigned char* data;
  int rank;
  uint32_t element_bytes, swizzle;   // swizzle: 0 or 128 bytes
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

struct WgmmaOperands {
  HalfType type;
  const uint32_t* a_registers;  // null: a is in shared memory
  uint64_t a, b;                // matrix descriptors
  bool a_mn_major, b_mn_major;
};
void wgmma(int n, float* d, const WgmmaOperands&, bool accumulate, const Where&);
void wgmma_fence();
void wgmma_commit(const Where&);
void wgmma_wait(int pending, const Where&);
void wgmma_fence_operand(const float* d, int count, const Where&);

}  // namespace simt
