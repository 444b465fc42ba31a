// Access to tensor elements whose type is known only at run time: for memory-bound kernels, which are then
// compiled once instead of once per element type.
#pragma once

#include "common/cuda.cuh"
#include "common/dtype.h"

namespace statecore {

__device__ __forceinline__ float load_element(DType dtype, const void* data, int64_t at) {
  if (dtype == DType::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
  if (dtype == DType::kFloat16) return to_float(static_cast<const __half*>(data)[at]);
  return static_cast<const float*>(data)[at];
}

__device__ __forceinline__ void store_element(DType dtype, void* data, int64_t at, float x) {
  if (dtype == DType::kBFloat16)
    set(static_cast<__nv_bfloat16*>(data)[at], x);
  else if (dtype == DType::kFloat16)
    set(static_cast<__half*>(data)[at], x);
  else
    static_cast<float*>(data)[at] = x;
}

// Four elements at a time: `at` is a multiple of 4, and data is aligned to four elements.
__device__ __forceinline__ float4 load_vec4(DType dtype, const void* data, int64_t at) {
  if (dtype == DType::kFloat32) return reinterpret_cast<const float4*>(data)[at / 4];
  const uint2 pairs = reinterpret_cast<const uint2*>(data)[at / 4];
  const bool is_bfloat16 = dtype == DType::kBFloat16;
  const float2 x = is_bfloat16 ? unpack<__nv_bfloat16>(pairs.x) : unpack<__half>(pairs.x);
  const float2 y = is_bfloat16 ? unpack<__nv_bfloat16>(pairs.y) : unpack<__half>(pairs.y);
  return make_float4(x.x, x.y, y.x, y.y);
}

__device__ __forceinline__ void store_vec4(DType dtype, void* data, int64_t at, float4 x) {
  if (dtype == DType::kFloat32)
    reinterpret_cast<float4*>(data)[at / 4] = x;
  else if (dtype == DType::kBFloat16)
    reinterpret_cast<uint2*>(data)[at / 4] =
        make_uint2(pack<__nv_bfloat16>(x.x, x.y), pack<__nv_bfloat16>(x.z, x.w));
  else
    reinterpret_cast<uint2*>(data)[at / 4] = make_uint2(pack<__half>(x.x, x.y), pack<__half>(x.z, x.w));
}

}  // namespace statecore
