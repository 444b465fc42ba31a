#define STATECORE_ISA avx2_kernels
#define STATECORE_VECTOR_BYTES 32
#include "common/tile_kernels_impl.h"
