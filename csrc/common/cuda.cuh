// What kernels are written in, besides CUDA C++ itself: the one place where they differ between the two
// worlds that compile them. nvcc makes them for the GPU; g++ (STATECORE_EMULATED) makes the same files run on
// the emulator of cuda_tests/simt, so that they are tested where there is no GPU.
//
// In exchange kernels keep to this: shared memory only by STATECORE_SHARED, launches only by launch(), no
// inline PTX and no __CUDA_ARCH__ outside this file.
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

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define STATECORE_SHARED(T, name, size) __shared__ __align__(16) T name[size]

#endif

namespace statecore {

// Queues kernel(args...) on `stream`, a cudaStream_t; throws where it cannot be launched. `name` is for
// messages.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
            const Arguments&... args) {
#if defined(STATECORE_EMULATED)
  static_cast<void>(stream);
  ::simt::launch(name, grid, block, [&] { kernel(args...); });
#else
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
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

}  // namespace statecore
