// A work item is one row and one value head, whose state is read and written once for all the query heads
// that share it. No two rows have the same slot, so items are independent.

#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tile_kernels.h"
#include "linear_attention/step_end.h"
#include "state_update/state_update.h"

namespace statecore {
namespace {

const void* element(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * element_bytes(dtype);
}

template <class Real>
void update(const StateUpdateParams& p) {
  const auto& kernels = tile_kernels<Real>();
  const int dk = int(p.key_width), dv = int(p.value_width);
  const int64_t query_group = p.query_heads / p.key_heads, value_group = p.value_heads / p.key_heads;
  const int64_t state_size = p.key_width * p.value_width, kind_size = p.slots * p.value_heads * state_size;
  const Real* log_decay = static_cast<const Real*>(p.log_decay);

  const int64_t work = p.rows * p.value_heads * state_size * (1 + query_group);
  parallel_for(p.rows * p.value_heads, work, [&](int64_t begin, int64_t end) {
    // load() writes whole vectors, so rows of tiles are padded; q and out of several heads are packed
    // afterwards.
    const auto k = make_scratch<Real>(padded(dk)), v = make_scratch<Real>(padded(dv));
    const auto q = make_scratch<Real>(query_group * dk + kTilePad);
    const auto out = make_scratch<Real>(query_group * dv);

    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / p.value_heads, head = item % p.value_heads, key_head = head / value_group;
      const int64_t first_query = key_head * query_group, out_heads = std::max(p.query_heads, p.value_heads);
      void* to = const_cast<void*>(
          element(p.out, p.dtype, (row * out_heads + std::max(head, first_query)) * p.value_width));
      const int64_t slot = p.row_slots ? p.row_slots[row] : row;
      if (slot < 0) {
        std::fill_n(static_cast<char*>(to), query_group * dv * element_bytes(p.dtype), char(0));
        continue;
      }
      kernels.load(p.dtype, element(p.k, p.dtype, row * p.k_row + key_head * p.k_head), 0, 1, dk, k.get(), 0);
      kernels.load(p.dtype, element(p.v, p.dtype, row * p.v_row + head * p.v_head), 0, 1, dv, v.get(), 0);
      for (int64_t g = 0; g < query_group; ++g)
        kernels.load(p.dtype, element(p.q, p.dtype, row * p.q_row + (first_query + g) * p.q_head), 0, 1, dk,
                     q.get() + g * dk, 0);
      kernels.axpby(query_group * dk, Real(p.scale), q.get(), 0, q.get(), q.get());
      Real* running = static_cast<Real*>(p.states) + (slot * p.value_heads + head) * state_size;
      const Real decay = log_decay ? std::exp(log_decay[row * p.value_heads + head]) : Real(1);
      kernels.update_read(dk, dv, decay, k.get(), v.get(), running, int(query_group), q.get(), out.get());
      kernels.store(p.dtype, to, dv, int(query_group), dv, out.get(), dv);

      if (p.ends_step && p.ends_step[row] >= 0 && p.state_kinds == 3)
        end_step(state_size, p.ends_step[row], static_cast<const Real*>(p.alpha), p.alphas, running,
                 running + kind_size, running + 2 * kind_size);
    }
  });
}

}  // namespace

void state_update_cpu(const StateUpdateParams& p) {
  p.dtype == DType::kFloat64 ? update<double>(p) : update<float>(p);
}

}  // namespace statecore
