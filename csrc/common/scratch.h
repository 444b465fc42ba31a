// Uninitialised memory for tiles, aligned to cache lines. Allocate it once per thread, outside of loops.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace statecore {

constexpr std::align_val_t kCacheLine{64};

template <class T>
struct ScratchDeleter {
  void operator()(T* p) const { operator delete[](p, kCacheLine); }
};

template <class T>
using Scratch = std::unique_ptr<T[], ScratchDeleter<T>>;

template <class T>
Scratch<T> make_scratch(int64_t elements) {
  return Scratch<T>(static_cast<T*>(operator new[](elements * sizeof(T), kCacheLine)));
}

}  // namespace statecore
