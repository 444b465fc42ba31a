// Element types of the operators' tensors, for the parameter structs.
#pragma once

#include <cstdint>

namespace statecore {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace statecore
