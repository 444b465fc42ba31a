// The scratch memory that an operator has been given, handed out in pieces.
#pragma once

#include <cstdint>

namespace statecore {

// Each piece begins at a multiple of 256 bytes of the whole. Without memory it only counts, which is how an
// operator finds out what to ask for.
class ScratchAllocator {
 public:
  explicit ScratchAllocator(void* scratch) : scratch_(static_cast<char*>(scratch)) {}

  template <class T>
  T* take(int64_t count) {
    T* part = scratch_ ? reinterpret_cast<T*>(scratch_ + bytes_) : nullptr;
    bytes_ += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return part;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* scratch_;
  int64_t bytes_ = 0;
};

}  // namespace statecore
