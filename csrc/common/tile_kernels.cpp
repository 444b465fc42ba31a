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
  const TileKernels<float>* float_kernels;
  const TileKernels<double>* double_kernels;
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
      {"avx512", has_avx512, &avx512::float_kernels(), &avx512::double_kernels()},
      {"avx2", has_avx2, &avx2::float_kernels(), &avx2::double_kernels()},
#else
  const Isa known[] = {
#endif
      {"portable", true, &portable::float_kernels(), &portable::double_kernels()},
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
  return *isa().float_kernels;
}

template <>
const TileKernels<double>& tile_kernels<double>() {
  return *isa().double_kernels;
}

const char* cpu_isa() { return isa().name; }

}  // namespace statecore
