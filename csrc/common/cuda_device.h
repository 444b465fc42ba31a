// The GPU that host code chooses kernels, tiles and splits for.
#pragma once

#include <cstddef>

namespace statecore {

struct CudaDevice {
  int arch;  // 10 x major + minor compute capability: 80 is A100; 90, which has sm_90a's code, H200
  int multiprocessors;  // SMs
  size_t shared_bytes;  // of shared memory that a block may have
};

// The current one; asks the driver every time, which takes well under a microsecond and no synchronisation.
CudaDevice current_cuda_device();

}  // namespace statecore
