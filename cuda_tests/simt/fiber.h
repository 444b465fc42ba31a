// Stacks that one CPU thread changes between.
#pragma once

#include <cstddef>

namespace simt {

struct Fiber {
  void* suspended = nullptr;  // where it goes on
};

// Makes `fiber` begin with entry() on `stack`. entry() must never return.
void start(Fiber& fiber, char* stack, size_t bytes, void (*entry)());

// Goes on with `to`, and returns when something switches back to `from`.
void switch_fiber(Fiber& from, const Fiber& to);

}  // namespace simt
