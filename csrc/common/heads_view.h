// How parameter structs describe tensors with heads: q, k, v and everything shaped like them.
#pragma once

#include <cstdint>

namespace statecore {

// A tensor [B, T, H, D] whose last dimension is contiguous; strides count elements.
struct HeadsView {
  const void* data = nullptr;
  int64_t batch = 0, time = 0, head = 0;
};

}  // namespace statecore
