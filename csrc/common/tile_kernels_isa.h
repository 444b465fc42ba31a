// The instruction sets that tile_kernels.cpp selects from, one source file each.
#pragma once

#include "common/tile_kernels.h"

namespace statecore {

struct IsaKernels {
  const TileKernels<float>* float_tiles;
  const TileKernels<double>* double_tiles;
  const ProductKernels<float>* float_products;
  const ProductKernels<double>* double_products;
  const ProductKernels<BFloat16Pair>* bfloat16_products = nullptr;  // null without AVX-512-BF16
};

extern const IsaKernels portable_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels;

}  // namespace statecore
