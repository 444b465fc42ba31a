// What <op>_op.cpp files need to register and run their CUDA backends.
//
// These files are compiled into two libraries. The shipped one, torch.ops.statecore, contains the CPU backend
// and, if it was built with nvcc, the CUDA backend. The test library, torch.ops.statecore_emulated
// (STATECORE_EMULATED, see cuda_tests), contains only the CUDA backend, registered under the dispatch key
// CPU: its kernels run on the emulator and take CPU tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "common/tensor_checks.h"

#if defined(STATECORE_EMULATED)

#define STATECORE_CUDA_BACKEND
#define STATECORE_CUDA_KEY CPU
#if !defined(STATECORE_LIBRARY)
#error "define STATECORE_LIBRARY as the name of the test library"
#endif

#else

#include <torch/csrc/stable/accelerator.h>

#include "common/cuda_stream.h"

#define STATECORE_LIBRARY statecore
#define STATECORE_CPU_BACKEND
#if defined(STATECORE_WITH_CUDA)
#define STATECORE_CUDA_BACKEND
#define STATECORE_CUDA_KEY CUDA
#endif

#endif

// Register an operator's implementations: `STATECORE_CUDA_IMPL(m) { m.impl(...); }`, guarded by
// #if defined(STATECORE_CUDA_BACKEND).
#define STATECORE_CPU_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(statecore, CPU, m)
#define STATECORE_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(STATECORE_LIBRARY, STATECORE_CUDA_KEY, m)

namespace statecore {

// Makes q's device current for its lifetime. Launch on stream(), torch's current stream of that device.
class CurrentStreamGuard {
 public:
#if defined(STATECORE_EMULATED)
  explicit CurrentStreamGuard(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit CurrentStreamGuard(const Tensor& q)
      : guard_(q.get_device_index()), stream_(current_cuda_stream(q.get_device_index())) {}
  void* stream() const { return stream_; }  // a cudaStream_t

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
#endif
};

// ---- restrictions of the CUDA kernels beyond those of the CPU backend
inline void check_cuda_dtype(DType dtype) {
  if (dtype == DType::kFloat64) refuse("q must be float32, bfloat16 or float16 on CUDA, got float64");
}

inline void check_cuda_width(const char* names, int64_t width) {
  if (width % 16 != 0 || width > 128)
    refuse(names, " must have a width that is a multiple of 16 up to 128 on CUDA, got ", width);
}

// x, or a copy of it whose data pointer and strides (except the last) are multiples of 16 bytes, for kernels
// with 16-byte loads. The last dimension of x must span a multiple of 16 bytes.
inline Tensor aligned_for_cuda(const Tensor& x) {
  const int64_t elements = 16 / int64_t(x.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) aligned = aligned && x.stride(d) % elements == 0;
  if (aligned) return x;
  Tensor copy = torch::stable::new_empty(x, x.sizes());  // contiguous() would return a dense x itself
  torch::stable::copy_(copy, x);
  return copy;
}

// Uninitialised scratch memory for kernels, aligned to 16 bytes. It comes from torch's caching allocator, so
// it also works under CUDA graph capture.
inline Tensor cuda_scratch(int64_t bytes, const Tensor& q) {
  return torch::stable::new_empty(q, {bytes}, ScalarType::Byte);
}

}  // namespace statecore
