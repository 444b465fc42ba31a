// The CUDA C++ that kernels are written in, for two compilers: nvcc builds them for the GPU, and g++
// (STATECORE_EMULATED) builds the same files for the emulator in cuda_tests/simt, which tests them on
// machines without a GPU. All differences between the two are in this file, ptx.cuh and hopper.cuh.
//
// Kernels therefore declare shared memory only with STATECORE_SHARED and STATECORE_DYNAMIC_SHARED, are
// launched only by launch(), and contain no inline PTX and no __CUDA_ARCH__.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(STATECORE_EMULATED)

#include "simt/language.h"
#include "simt/simt.h"

// An uninitialised array in shared memory, aligned to 16 bytes.
#define STATECORE_SHARED(T, name, size) \
  static char name##_key;               \
  T(&name)                              \
  [size] = *static_cast<T(*)[size]>(::simt::shared_array(&name##_key, sizeof(T) * (size)))

// The dynamic shared memory of the launch, aligned to 1024 bytes.
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

// `blocks` as gridDim.x; throws if the grid would be too large.
inline unsigned checked_blocks(const char* name, int64_t blocks) {
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string("statecore: ") + name +
                             " has too many tokens and heads for one launch");
  return unsigned(blocks);
}

// Launches kernel(args...) on `stream`, a cudaStream_t. Throws if the launch fails; `name` is for messages.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchConfig& config, void* stream,
            const Arguments&... args) {
#if defined(STATECORE_EMULATED)
  static_cast<void>(stream);
  ::simt::record_launch(reinterpret_cast<const void*>(kernel), config.block, config.dynamic_shared_bytes);
  ::simt::launch(name, config.grid, config.block, config.dynamic_shared_bytes, [&] { kernel(args...); });
#else
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = config.dynamic_shared_bytes;
  launch_config.stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  if (config.dynamic_shared_bytes > 48 * 1024)  // kernels must opt in to more than 48 KiB
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(config.dynamic_shared_bytes));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&launch_config, kernel, args...);
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("statecore: launching ") + name +
                             " failed: " + cudaGetErrorString(error));
#endif
}

// ---- conversions between float and element types (float, __nv_bfloat16, __half), round to nearest even
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void set(float& to, float x) { to = x; }
__device__ __forceinline__ void set(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void set(__half& to, float x) { to = __float2half_rn(x); }

// ---- two 16-bit elements packed in a register, the first in the low half
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
