#define STATECORE_ISA portable
#define STATECORE_VECTOR_BYTES 16
#include "common/tile_kernels_impl.h"
