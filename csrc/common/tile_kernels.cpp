#include "common/tile_kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "common/tile_kernels_isa.h"

namespace statecore {
namespace {

struct Isa {
  const char* name;
  bool available;
  const IsaKernels& kernels;
};

Isa choose_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512dq");
  const Isa known[] = {
      {"avx512_bf16", has_avx512 && __builtin_cpu_supports("avx512bf16"), avx512_bf16_kernels},
      {"avx512", has_avx512, avx512_kernels},
      {"avx2", has_avx2, avx2_kernels},
#else
  const Isa known[] = {
#endif
      {"portable", true, portable_kernels},
  };
  const char* wanted = std::getenv("STATECORE_CPU_ISA");
  std::string usable;
  for (const Isa& isa : known) {
    if (!isa.available) continue;
    if (wanted == nullptr || *wanted == '\0' || wanted == std::string(isa.name)) return isa;
    usable += usable.empty() ? "" : ", ";
    usable += isa.name;
  }
  throw std::runtime_error("statecore: STATECORE_CPU_ISA must be one of " + usable +
                           " on this machine, got '" + wanted + "'; unset it to use the best one.");
}

const Isa& isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

}  // namespace

template <>
const TileKernels<float>& tile_kernels<float>() {
  return *isa().kernels.float_tiles;
}

template <>
const TileKernels<double>& tile_kernels<double>() {
  return *isa().kernels.double_tiles;
}

template <>
const ProductKernels<float>& product_kernels<float>() {
  return *isa().kernels.float_products;
}

template <>
const ProductKernels<double>& product_kernels<double>() {
  return *isa().kernels.double_products;
}

template <>
const ProductKernels<BFloat16Pair>& product_kernels<BFloat16Pair>() {
  return *isa().kernels.bfloat16_products;
}

bool has_bfloat16_products() { return isa().kernels.bfloat16_products != nullptr; }

const char* cpu_isa() { return isa().name; }

}  // namespace statecore
