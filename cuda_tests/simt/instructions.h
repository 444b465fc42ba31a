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

// ---- barriers of some warps; without `waits` the thread only arrives
void named_barrier(unsigned id, unsigned threads, bool waits, const Where&);

}  // namespace simt
