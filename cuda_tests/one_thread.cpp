// The CPU backend, which native tests compare with, on one thread: torch's threads are not here.

#include "common/parallel.h"

namespace statecore {

void parallel_ranges(int64_t n, ParallelBody body, void* context) {
  if (n > 0) body(0, n, context);
}

int64_t thread_count() { return 1; }

}  // namespace statecore
