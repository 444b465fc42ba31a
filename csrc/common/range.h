#pragma once

#include <cstdint>

namespace statecore {

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

}  // namespace statecore
