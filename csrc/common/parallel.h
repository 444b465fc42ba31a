// torch's thread pool for code that does not include torch.
#pragma once

#include <cstdint>

namespace statecore {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);

// Calls body on ranges that together cover [0, n), on torch's threads. body must not throw.
void parallel_ranges(int64_t n, ParallelBody body, void* context);

int64_t thread_count();  // torch.get_num_threads()

// f(begin, end) on ranges that cover [0, n). Allocate scratch memory at the top of f: once per thread.
template <class F>
void parallel_for(int64_t n, const F& f) {
  parallel_ranges(
      n, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&f));
}

// The same, but on the calling thread alone if there is too little work: waking a thread takes about as long
// as kWorthSharing multiply-adds.
constexpr int64_t kWorthSharing = 1 << 18;

template <class F>
void parallel_for(int64_t n, int64_t multiply_adds, const F& f) {
  if (multiply_adds >= kWorthSharing)
    parallel_for(n, f);
  else if (n > 0)
    f(int64_t{0}, n);
}

}  // namespace statecore
