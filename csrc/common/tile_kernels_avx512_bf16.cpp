#define STATECORE_ISA avx512_bf16_kernels
#define STATECORE_VECTOR_BYTES 64
#include "common/tile_kernels_impl.h"
