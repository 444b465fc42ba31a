// Under grouped value heads (GVA) the gradients of q and k of a key head are sums over its value heads, each
// of which has a state, and so a sweep, of its own.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace statecore {

// sums [rows, width] = float32 addends [rows, group, width] summed over the group, then rounded to `dtype`.
void launch_group_sums(DType dtype, const float* addends, void* sums, int64_t rows, int group, int width,
                       void* stream);

}  // namespace statecore
