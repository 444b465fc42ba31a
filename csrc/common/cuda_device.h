// The properties of a GPU from which host code chooses kernels, tiles and splits.
#pragma once

#include <cstddef>

namespace statecore {

struct CudaDevice {
  int arch;             // 10 * major + minor compute capability: A100 is 80; H200 is 90 and runs sm_90a code
  int multiprocessors;  // SMs
  size_t shared_bytes;  // maximum shared memory per block
};

// The current device. Queries the driver on every call: well under a microsecond, no synchronisation.
CudaDevice current_cuda_device();

}  // namespace statecore
