// How parameter structs describe tensors with heads: q, k, v and everything shaped like them.
#pragma once

#include <cstdint>

namespace statecore {

// A tensor [B, T, H, D] whose last dimension is contiguous; strides count elements.
struct HeadsView {
  const void* data = nullptr;
  int64_t batch = 0, time = 0, head = 0;

  // In elements, from `data` to [b, t, h, 0].
  constexpr int64_t offset(int64_t b, int64_t t, int64_t h) const { return b * batch + t * time + h * head; }
};

constexpr HeadsView contiguous_heads(const void* data, int64_t tokens, int64_t heads, int64_t width) {
  return {data, tokens * heads * width, heads * width, width};
}

}  // namespace statecore
