#pragma once

namespace statecore {

// x / y rounded up, of non-negative integers.
template <class Int>
constexpr Int ceil_div(Int x, Int y) {
  return (x + y - 1) / y;
}

}  // namespace statecore
