#include <algorithm>

#include "common/ceil_div.h"
#include "common/cuda_device.h"
#include "linear_attention/linear_schedule.h"

namespace statecore {
namespace {

constexpr int64_t kBlocksPerSm = 2;        // occupancy of a sweep
constexpr int64_t kMinSplitLength = 128;   // tokens
constexpr double kScanTimePerSplit = 0.5;  // in units of SweepCost::chunk_time
constexpr int64_t kChunkTimeTokens = 64;   // that chunk_time is given for

}  // namespace

int32_t choose_split_length(const LinearAttentionInputs& p, const ScheduleCosts& costs) {
  const int64_t sequences = std::max<int64_t>(p.sequences, 1);
  const int64_t longest = p.cu_seqlens ? ceil_div(p.tokens, sequences) : p.tokens;
  const int64_t resident_blocks = kBlocksPerSm * current_cuda_device().multiprocessors;
  const auto time_of = [&](const std::vector<SweepCost>& sweeps, int64_t length) {
    double time = 0;
    for (const SweepCost& sweep : sweeps) {
      const int64_t blocks = sequences * ceil_div(longest, length) * sweep.blocks_per_split;
      const int64_t waves = ceil_div(blocks, resident_blocks);
      time += double(waves * ceil_div(length, kChunkTimeTokens)) * sweep.chunk_time;
    }
    return time;
  };
  int32_t best_length = 0;
  double least_time = time_of(costs.results, std::max<int64_t>(longest, 1));
  for (int64_t length = kMinSplitLength; length < longest; length *= 2) {
    const double scans =
        double(ceil_div(longest, length)) * kScanTimePerSplit * double(costs.local_states.size());
    const double time = time_of(costs.results, length) + time_of(costs.local_states, length) + scans;
    if (time < least_time) least_time = time, best_length = int32_t(length);
  }
  return best_length;
}

}  // namespace statecore
