#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace statecore {

void parallel_ranges(int64_t n, ParallelBody body, void* context) {
  if (n == 0) return;
  torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace statecore
