// The part of the test library that is not the shipped sources: what tests set of the emulator, as operators
// beside those under test (schemas: csrc/library.cpp).

#include <torch/csrc/stable/library.h>

#include <string>

#include "common/cuda_backend.h"
#include "simt/simt.h"

namespace {

void set_schedule(std::string order, int64_t seed) {
  using enum simt::Order;
  if (order != "forward" && order != "reverse" && order != "random")
    statecore::refuse("order must be forward, reverse or random, got ", order);
  simt::schedule() = {order == "forward"   ? kForward
                      : order == "reverse" ? kReverse
                                           : kRandom,
                      uint64_t(seed)};
}

void set_device(int64_t arch, int64_t multiprocessors) { simt::device() = {int(arch), int(multiprocessors)}; }

bool checks_races() { return simt::checks_races(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(STATECORE_LIBRARY, m) {
  m.def("set_schedule(str order, int seed) -> ()");
  m.def("set_device(int arch, int multiprocessors) -> ()");
  m.def("checks_races() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(STATECORE_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("set_schedule", TORCH_BOX(&set_schedule));
  m.impl("set_device", TORCH_BOX(&set_device));
  m.impl("checks_races", TORCH_BOX(&checks_races));
}
