// torch's current CUDA stream as a raw handle, without a compile- or link-time dependency on CUDA.
//
// aoti_torch_get_current_cuda_stream is in libtorch_cuda.so, which CPU-only builds of torch lack. The weak
// reference resolves through libtorch.so's own dependencies if torch has CUDA and is null otherwise. That is
// why CMakeLists.txt links libtorch with --no-as-needed.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace statecore {

inline bool torch_has_cuda() { return &aoti_torch_get_current_cuda_stream != nullptr; }

// A cudaStream_t.
inline void* current_cuda_stream(int32_t device) {
  void* stream = nullptr;
  if (!torch_has_cuda() || aoti_torch_get_current_cuda_stream(device, &stream) != 0)
    throw std::runtime_error("statecore: torch has no current CUDA stream for device " +
                             std::to_string(device));
  return stream;
}

}  // namespace statecore
