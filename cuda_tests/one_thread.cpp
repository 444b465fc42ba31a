// Single-threaded replacement for torch's thread pool, with which native tests run the CPU backend.

#include "common/parallel.h"

namespace statecore {

void parallel_ranges(int64_t n, ParallelBody body, void* context) {
  if (n > 0) body(0, n, context);
}

int64_t thread_count() { return 1; }

}  // namespace statecore
