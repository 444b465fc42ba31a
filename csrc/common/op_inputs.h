// What the <op>_op.cpp files share on the way from tensors to parameter structs.
#pragma once

#include <utility>
#include <vector>

#include "common/tensor_checks.h"

namespace statecore {

// Copies of arguments that a parameter struct points into; must outlive it.
using HeldTensors = std::vector<Tensor>;

// Points p.q, p.k and p.v at tensors that the backend's kernels can load. Backend::check() may refuse them,
// Backend::aligned() may copy them.
template <class Backend, class Inputs>
void prepare_for(Inputs& p, const Tensor& q, const Tensor& k, const Tensor& v, HeldTensors& held) {
  Backend::check(p);
  for (const auto& [view, x] : {std::pair{&p.q, &q}, std::pair{&p.k, &k}, std::pair{&p.v, &v}})
    *view = heads_view(held.emplace_back(Backend::aligned(*x)));
}

}  // namespace statecore
