#define STATECORE_ISA portable_kernels
#define STATECORE_VECTOR_BYTES 16
#include "common/tile_kernels_impl.h"
