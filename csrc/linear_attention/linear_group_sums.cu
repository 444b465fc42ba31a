#include "common/ceil_div.h"
#include "common/elements.cuh"
#include "linear_attention/linear_group_sums.h"

namespace statecore {
namespace {

constexpr int kThreads = 256;  // of 4 elements

__global__ void __launch_bounds__(kThreads)
    sum_groups_kernel(DType dtype, const float* addends, void* sums, int64_t rows, int group, int width) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (i >= rows * width) return;
  const float* from = addends + i / width * group * width + i % width;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int g = 0; g < group; ++g) {
    const float4 x = *reinterpret_cast<const float4*>(from + int64_t(g) * width);
    sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
  }
  store_vec4(dtype, sums, i, sum);
}

}  // namespace

void launch_group_sums(DType dtype, const float* addends, void* sums, int64_t rows, int group, int width,
                       void* stream) {
  const int64_t blocks = ceil_div<int64_t>(rows * width, 4 * kThreads);
  if (blocks == 0) return;
  launch("sum_groups", sum_groups_kernel, {dim3(checked_blocks("linear attention", blocks)), dim3(kThreads)},
         stream, dtype, addends, sums, rows, group, width);
}

}  // namespace statecore
