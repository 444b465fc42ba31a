// Shared by the warp-specialised kernels for sm_90a: the position in a ring of shared-memory stages, and the
// tiles that TMA loads and wgmma reads.
//
// A producer fills the stages of a ring, consumers use them. Two mbarriers per stage order them: `full`, on
// which the producer arrives and the bytes it has requested land, and `empty`, on which the consumers arrive
// when they have read the stage. Both sides keep a PipelineState and advance it once per stage:
//
//   producer: mbarrier_wait(empty(state.stage), state.phase ^ 1)   passes at once on a fresh barrier
//             mbarrier_expect_tx(full, bytes); tma_load_tile(..., full); mbarrier_arrive(full)
//   consumer: mbarrier_wait(full(state.stage), state.phase)
//             ... warp_arrive(empty(state.stage))
#pragma once

#include "common/heads_view.h"
#include "common/hopper.cuh"
#include "common/mma.cuh"

namespace statecore {

// The stage to use next and the parity of the current phase of its mbarriers.
template <int kStages>
struct PipelineState {
  int stage = 0;
  unsigned phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// One arrival per warp, once all its lanes have reached this point.
__device__ __forceinline__ void warp_arrive(uint32_t barrier STATECORE_WHERE) {
  __syncwarp();
  if (lane_index() == 0) mbarrier_arrive(barrier STATECORE_PASS_WHERE);
}

// ---- tiles: 64 rows of a [B, T, H, D] tensor of 16-bit elements, as panels of 64 columns one after another
constexpr int kTmaTileRows = 64;
constexpr int kPanelColumns = 64;
constexpr int kPanelBytes = kTmaTileRows * kPanelColumns * 2;

template <int kWidth>
constexpr int kTmaTileBytes = kWidth / kPanelColumns * kPanelBytes;

// Issued by one thread: loads the tile whose first element is at {column, head, time, batch} of `map`, a
// heads_tensor_map(). Its kTmaTileBytes<kWidth>, zeros beyond the tensor included, count for `barrier`.
template <int kWidth>
__device__ __forceinline__ void tma_load_tile(uint32_t tile, const TensorMap& map, const int (&at)[4],
                                              uint32_t barrier STATECORE_WHERE) {
  static_assert(kWidth % kPanelColumns == 0, "tiles are whole panels");
#pragma unroll
  for (int panel = 0; panel < kWidth / kPanelColumns; ++panel) {
    const int panel_at[4] = {at[0] + panel * kPanelColumns, at[1], at[2], at[3]};
    tma_load(tile + panel * kPanelBytes, map, panel_at, barrier STATECORE_PASS_WHERE);
  }
}

// Whether TMA can address x [batch, time, heads, any width] of 16-bit elements. Strides of dimensions of size
// 1 do not matter.
inline bool tma_addressable(const HeadsView& x, int64_t batch, int64_t time, int64_t heads) {
  const auto fits = [](int64_t size, int64_t stride) {
    return size == 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t(1) << 39);
  };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && fits(batch, x.batch) && fits(time, x.time) &&
         fits(heads, x.head);
}

template <class T>
TensorMap heads_tensor_map(const HeadsView& x, int64_t batch, int64_t time, int64_t heads, int64_t width) {
  const int64_t placeholder = (width + 7) / 8 * 8;  // a valid stride for dimensions of size 1
  return make_tensor_map(static_cast<const T*>(x.data), {width, heads, time, batch},
                         {heads == 1 ? placeholder : x.head, time == 1 ? placeholder : x.time,
                          batch == 1 ? placeholder : x.batch},
                         {kPanelColumns, 1, kTmaTileRows, 1});
}

}  // namespace statecore
