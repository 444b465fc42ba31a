// Threads of torch's own pool for code that does not include torch.
#pragma once

#include <cstdint>

namespace statecore {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);

// Calls body on ranges that together cover [0, n), from as many threads as torch uses. It must not throw.
void parallel_ranges(int64_t n, ParallelBody body, void* context);

int64_t thread_count();  // of the pool, as the user set it

// f(begin, end) on ranges that cover [0, n); scratch memory belongs at the top of f, once a thread.
template <class F>
void parallel_for(int64_t n, const F& f) {
  parallel_ranges(
      n, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&f));
}

// The same, on the calling thread alone where there is too little work to share: waking a thread takes about
// as long as kWorthSharing multiply-adds.
constexpr int64_t kWorthSharing = 1 << 18;

template <class F>
void parallel_for(int64_t n, int64_t multiply_adds, const F& f) {
  if (multiply_adds >= kWorthSharing)
    parallel_for(n, f);
  else if (n > 0)
    f(int64_t{0}, n);
}

}  // namespace statecore
