// Operators of the test library that control the emulator and read its counters. The other operators are the
// shipped ones.

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "common/cuda_backend.h"
#include "simt/simt.h"

namespace {

// order and async are values of simt::Order and simt::Async.
void set_schedule(int64_t order, int64_t async, int64_t seed) {
  simt::schedule() = {.order = simt::Order(order), .seed = uint64_t(seed), .async = simt::Async(async)};
}

void set_device(int64_t arch, int64_t multiprocessors) { simt::device() = {int(arch), int(multiprocessors)}; }

// The names of the kernels launched since the last call, one per line, and the number of mma they executed.
std::tuple<std::string, int64_t> take_work() {
  const simt::Counters counters = simt::take_counters();
  std::string launches;
  for (const std::string& name : counters.launches) launches += name + "\n";
  return {launches, int64_t(counters.mma)};
}

bool checks_races() { return simt::checks_races(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(STATECORE_LIBRARY, m) {
  m.def("set_schedule(int order, int async, int seed) -> ()");
  m.def("set_device(int arch, int multiprocessors) -> ()");
  m.def("take_work() -> (str launches, int mma)");
  m.def("checks_races() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(STATECORE_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("set_schedule", TORCH_BOX(&set_schedule));
  m.impl("set_device", TORCH_BOX(&set_device));
  m.impl("take_work", TORCH_BOX(&take_work));
  m.impl("checks_races", TORCH_BOX(&checks_races));
}
