// Fibers: stacks that one CPU thread switches between.
#pragma once

#include <cstddef>

namespace simt {

struct Fiber {
  void* suspended = nullptr;  // the saved context
};

// Makes `fiber` start in entry() on `stack` when it is first switched to. entry() must never return.
void start(Fiber& fiber, char* stack, size_t bytes, void (*entry)());

// Resumes `to`. Returns when `from` is resumed.
void switch_fiber(Fiber& from, const Fiber& to);

}  // namespace simt
