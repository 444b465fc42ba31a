// The subset of CUDA C++ that kernels use, for a host compiler: keywords, built-in variables and functions,
// 16-bit floats. Functions that synchronise threads take the location of the call, for error messages.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

// Must follow the standard headers, whose attributes include some of the same names.
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace simt {

using Where = std::source_location;

struct Thread {
  uint3 thread, block;
  dim3 block_size, grid_size;
  unsigned index, lane, warp;  // in the block
};
extern const Thread* this_thread;  // the running one

void syncthreads(const Where&);
void syncwarp(uint32_t mask, const Where&);
uint32_t shuffle(uint32_t mask, uint32_t value, int from_lane, const Where&);
uint32_t ballot(uint32_t mask, bool predicate, const Where&);
void check_aligned(const void* address, size_t bytes, const Where&);

}  // namespace simt

#define threadIdx (::simt::this_thread->thread)
#define blockIdx (::simt::this_thread->block)
#define blockDim (::simt::this_thread->block_size)
#define gridDim (::simt::this_thread->grid_size)

using std::max;
using std::min;

// ---- synchronisation and warp-level collectives
inline void __syncthreads(simt::Where where = simt::Where::current()) { simt::syncthreads(where); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, simt::Where where = simt::Where::current()) {
  simt::syncwarp(mask, where);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int lane, simt::Where where = simt::Where::current()) {
  static_assert(sizeof(T) == 4);
  return std::bit_cast<T>(simt::shuffle(mask, std::bit_cast<uint32_t>(value), lane % 32, where));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, simt::Where where = simt::Where::current()) {
  return __shfl_sync(mask, value, int(simt::this_thread->lane) ^ bits, where);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned distance, simt::Where where = simt::Where::current()) {
  const int lane = int(simt::this_thread->lane);
  return __shfl_sync(mask, value, lane < int(distance) ? lane : lane - int(distance), where);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, simt::Where where = simt::Where::current()) {
  return simt::ballot(mask, predicate != 0, where);
}

// ---- streaming loads and stores
template <class T>
T __ldcs(const T* from, simt::Where where = simt::Where::current()) {
  simt::check_aligned(from, sizeof(T), where);
  return *from;
}
template <class T>
void __stcs(T* to, T value, simt::Where where = simt::Where::current()) {
  simt::check_aligned(to, sizeof(T), where);
  *to = value;
}

// ---- approximate functions; here exact
inline float __fdividef(float x, float y) { return x / y; }

// ---- bits
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(uint32_t(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(uint32_t(x)) + 1 : 0; }
inline int __clzll(long long x) { return std::countl_zero(uint64_t(x)); }
inline int __ffsll(long long x) { return x ? std::countr_zero(uint64_t(x)) + 1 : 0; }

// ---- 16-bit floats
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // NaN as on the GPU
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) {
  const float magnitude = std::bit_cast<float>((x.bits & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t exponent = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;  // infinity or NaN
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | exponent | (x.bits & 0x8000u) << 16);
}
inline __half __float2half_rn(float x) { return {std::bit_cast<uint16_t>(_Float16(x))}; }
