// What the end of reasoning step t does to the three states of a head: running (S_raw), start (S_{t-1}, the
// corrected state that the step started from) and prompt (S_0).  arXiv 2602.01198 section 4:
//
//   S_t = S_{t-1} + (1 - alpha_t) (S_raw - S_{t-1}) + alpha_t (S_{t-1} - S_0) / (t - 1),   t >= 2
//
// The last term is the momentum correction. S_t becomes both the running state and the start of the next
// step. Step 1 is not corrected; at the end of the prompt (step 0) the running state becomes all three.
#pragma once

#include <algorithm>
#include <cstdint>

namespace statecore {

constexpr int32_t kNoStep = -1;  // no step ends here

// alpha_t, or 0 where a step is not corrected.
template <class Real>
constexpr Real correction_strength(int32_t step, const Real* alpha, int64_t alphas) {
  return step >= 2 && step < alphas ? alpha[step] : Real(0);
}

// One element of S_t, with raw_weight = 1 - alpha_t and momentum = alpha_t / (t - 1).
template <class Real>
constexpr Real corrected(Real running, Real start, Real prompt, Real raw_weight, Real momentum) {
  return start + raw_weight * (running - start) + momentum * (start - prompt);
}

// Each state is n contiguous elements.
template <class Real>
void end_step(int64_t n, int32_t step, const Real* alpha, int64_t alphas, Real* running, Real* start,
              Real* prompt) {
  if (step == 0) std::copy_n(running, n, prompt);
  const Real strength = correction_strength(step, alpha, alphas);
  if (strength != 0) {
    const Real raw_weight = 1 - strength, momentum = strength / Real(step - 1);
    for (int64_t i = 0; i < n; ++i)
      running[i] = corrected(running[i], start[i], prompt[i], raw_weight, momentum);
  }
  std::copy_n(running, n, start);
}

// Gradients of the three states after the end of the step -> before it.
template <class Real>
void end_step_backward(int64_t n, int32_t step, const Real* alpha, int64_t alphas, Real* running, Real* start,
                       Real* prompt) {
  const Real strength = correction_strength(step, alpha, alphas);
  const Real raw_weight = 1 - strength, momentum = strength ? strength / Real(step - 1) : Real(0);
  for (int64_t i = 0; i < n; ++i) {
    const Real grad = running[i] + start[i];  // S_t is both
    running[i] = raw_weight * grad;
    start[i] = (strength + momentum) * grad;
    prompt[i] -= momentum * grad;
  }
  if (step == 0) {
    for (int64_t i = 0; i < n; ++i) running[i] += prompt[i];
    std::fill_n(prompt, n, Real(0));
  }
}

}  // namespace statecore
