// The instruction sets that tile_kernels() chooses from; one namespace and one source file each.
#pragma once

#include "common/tile_kernels.h"

#define STATECORE_DECLARE_ISA(isa)             \
  namespace statecore::isa {                   \
  const TileKernels<float>& float_kernels();   \
  const TileKernels<double>& double_kernels(); \
  }

STATECORE_DECLARE_ISA(portable)
STATECORE_DECLARE_ISA(avx2)
STATECORE_DECLARE_ISA(avx512)
