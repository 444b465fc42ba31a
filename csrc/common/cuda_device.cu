#include "common/cuda.cuh"
#include "common/cuda_device.h"

namespace statecore {

#if defined(STATECORE_EMULATED)

CudaDevice current_cuda_device() {
  const simt::Device& device = simt::device();
  return {device.arch, device.multiprocessors, simt::kSharedBytes};
}

#else

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("statecore: querying the GPU failed: ") + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

}  // namespace

CudaDevice current_cuda_device() {
  int device = 0;
  check(cudaGetDevice(&device));
  return {10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
              attribute(cudaDevAttrComputeCapabilityMinor, device),
          attribute(cudaDevAttrMultiProcessorCount, device),
          size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device))};
}

#endif

}  // namespace statecore
