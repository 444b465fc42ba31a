// Divides an operator's scratch memory among its buffers.
#pragma once

#include <cstdint>

namespace statecore {

// Buffers start at multiples of 256 bytes. With a null pointer it only counts bytes, which is how an operator
// determines how much scratch memory it needs.
class ScratchAllocator {
 public:
  explicit ScratchAllocator(void* scratch) : scratch_(static_cast<char*>(scratch)) {}

  template <class T>
  T* take(int64_t count) {
    T* buffer = scratch_ ? reinterpret_cast<T*>(scratch_ + bytes_) : nullptr;
    bytes_ += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return buffer;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* scratch_;
  int64_t bytes_ = 0;
};

}  // namespace statecore
