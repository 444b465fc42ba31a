// Build and run-time information for `statecore info`.

#include <torch/csrc/stable/library.h>

#include <string>

#include "common/cuda_stream.h"
#include "common/tile_kernels.h"

namespace statecore {
namespace {

std::string cpu_isa_op() { return cpu_isa(); }

std::string cuda_architectures() { return STATECORE_CUDA_ARCHITECTURES; }

bool torch_has_cuda_op() { return torch_has_cuda(); }

STABLE_TORCH_LIBRARY_IMPL(statecore, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa_op));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("torch_has_cuda", TORCH_BOX(&torch_has_cuda_op));
}

}  // namespace
}  // namespace statecore
