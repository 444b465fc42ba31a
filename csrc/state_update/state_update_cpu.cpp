// Work is divided by batch row and value head: the state of a value head is read and written once for all
// query heads that share it. No two rows have the same slot, so work items are independent.

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

const void* head_of(const HeadsView& x, DType dtype, int64_t b, int64_t head) {
  return element(x.data, dtype, b * x.batch + head * x.head);
}

template <class Real>
void update(const StateUpdateParams& p) {
  const auto& kernels = tile_kernels<Real>();
  const int dk = int(p.key_width), dv = int(p.value_width);
  const int64_t query_group = p.query_heads / p.key_heads, value_group = p.value_heads / p.key_heads;
  const int64_t state_size = p.key_width * p.value_width, kind_size = p.pool * p.value_heads * state_size;
  const Real* log_decay = static_cast<const Real*>(p.log_decay);

  const int64_t multiply_adds = p.batch * p.value_heads * state_size * (1 + query_group);
  parallel_for(p.batch * p.value_heads, multiply_adds, [&](int64_t begin, int64_t end) {
    // load() writes whole vectors, so the last row of each array is padded. q and out are dense across heads.
    const auto k = make_scratch<Real>(padded(dk)), v = make_scratch<Real>(padded(dv));
    const auto q = make_scratch<Real>(query_group * dk + kTilePad);
    const auto out = make_scratch<Real>(query_group * dv);

    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p.value_heads, head = item % p.value_heads, key_head = head / value_group;
      const int64_t first_query = key_head * query_group, out_heads = std::max(p.query_heads, p.value_heads);
      void* to = const_cast<void*>(
          element(p.out, p.dtype, (b * out_heads + std::max(head, first_query)) * p.value_width));
      const int64_t slot = p.slots ? p.slots[b] : b;
      if (slot < 0) {
        std::fill_n(static_cast<char*>(to), query_group * dv * element_bytes(p.dtype), char(0));
        continue;
      }
      kernels.load(p.dtype, head_of(p.k, p.dtype, b, key_head), 0, 1, dk, k.get(), 0);
      kernels.load(p.dtype, head_of(p.v, p.dtype, b, head), 0, 1, dv, v.get(), 0);
      for (int64_t g = 0; g < query_group; ++g)
        kernels.load(p.dtype, head_of(p.q, p.dtype, b, first_query + g), 0, 1, dk, q.get() + g * dk, 0);
      kernels.axpby(query_group * dk, Real(p.scale), q.get(), 0, q.get(), q.get());
      Real* running = static_cast<Real*>(p.states) + (slot * p.value_heads + head) * state_size;
      const Real decay = log_decay ? std::exp(log_decay[b * p.value_heads + head]) : Real(1);
      kernels.update_read(dk, dv, decay, k.get(), v.get(), running, int(query_group), q.get(), out.get());
      kernels.store(p.dtype, to, dv, int(query_group), dv, out.get(), dv);

      if (p.ends_step && p.ends_step[b] >= 0 && p.state_kinds == 3)
        end_step(state_size, p.ends_step[b], static_cast<const Real*>(p.alpha), p.alphas, running,
                 running + kind_size, running + 2 * kind_size);
    }
  });
}

}  // namespace

void state_update_cpu(const StateUpdateParams& p) {
  p.dtype == DType::kFloat64 ? update<double>(p) : update<float>(p);
}

}  // namespace statecore
