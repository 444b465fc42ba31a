// What kernels are written in, besides CUDA C++ itself: the one place where they differ between the two
// worlds that compile them. nvcc makes them for the GPU; g++ (STATECORE_EMULATED) makes the same files run on
// the emulator of cuda_tests/simt, so that they are tested where there is no GPU.
//
// In exchange kernels keep to this: shared memory only by STATECORE_SHARED and STATECORE_DYNAMIC_SHARED,
// launches only by launch(), no inline PTX and no __CUDA_ARCH__ outside this folder.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(STATECORE_EMULATED)

#include "simt/language.h"
#include "simt/simt.h"

// An array of the block's shared memory, unset at its start and aligned to 16 bytes.
#define STATECORE_SHARED(T, name, size) \
  static char name##_key;               \
  T(&name)                              \
  [size] = *static_cast<T(*)[size]>(::simt::shared_array(&name##_key, sizeof(T) * (size)))

// The bytes that launch() was asked for, aligned to 1024.
#define STATECORE_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(::simt::dynamic_shared())

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define STATECORE_SHARED(T, name, size) __shared__ __align__(16) T name[size]
#define STATECORE_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

#endif

namespace statecore {

struct LaunchConfig {
  dim3 grid, block;
  size_t dynamic_shared_bytes = 0;
};

// So many blocks in a row, if that is a number of them.
inline unsigned checked_blocks(const char* name, int64_t blocks) {
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string("statecore: ") + name +
                             " has too many tokens and heads for one launch");
  return unsigned(blocks);
}

// Queues kernel(args...) on `stream`, a cudaStream_t; throws where it cannot be launched. `name` is for
// messages.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchConfig& shape, void* stream,
            const Arguments&... args) {
#if defined(STATECORE_EMULATED)
  static_cast<void>(stream);
  ::simt::note_launch(reinterpret_cast<const void*>(kernel), shape.block, shape.dynamic_shared_bytes);
  ::simt::launch(name, shape.grid, shape.block, shape.dynamic_shared_bytes, [&] { kernel(args...); });
#else
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.dynamic_shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  if (shape.dynamic_shared_bytes > 48 * 1024)  // more than a kernel has unless it asks
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shape.dynamic_shared_bytes));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("statecore: launching ") + name +
                             " failed: " + cudaGetErrorString(error));
#endif
}

// ---- elements of tensors: float, __nv_bfloat16, __half; rounded to nearest even
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void set(float& to, float x) { to = x; }
__device__ __forceinline__ void set(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void set(__half& to, float x) { to = __float2half_rn(x); }

// ---- two 16-bit elements in a register, the first in the low half
template <class T>
__device__ __forceinline__ uint32_t pack(float x, float y);

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair);

#if defined(STATECORE_EMULATED)
template <>
inline uint32_t pack<__nv_bfloat16>(float x, float y) {
  return __float2bfloat16_rn(x).bits | uint32_t(__float2bfloat16_rn(y).bits) << 16;
}
template <>
inline uint32_t pack<__half>(float x, float y) {
  return __float2half_rn(x).bits | uint32_t(__float2half_rn(y).bits) << 16;
}
template <>
inline float2 unpack<__half>(uint32_t pair) {
  return make_float2(__half2float({uint16_t(pair)}), __half2float({uint16_t(pair >> 16)}));
}
#else
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
#endif
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

}  // namespace statecore
