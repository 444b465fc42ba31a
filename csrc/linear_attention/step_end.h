// What the end of a reasoning step does to the three states of a head: running (raw), start (the corrected
// state that the step started from) and prompt (S_0).  arXiv 2602.01198 section 4:
//
//   S_t = S_{t-1} + (1 - alpha_t) (S_raw - S_{t-1}) + alpha_t (S_{t-1} - S_0) / (t - 1),   t >= 2
//
// and S_t is both the running state and the start of the next step. Step 1 is not corrected; the end of the
// prompt (step 0) makes all three the running one.
#pragma once

#include <algorithm>
#include <cstdint>

namespace statecore {

template <class Real>
constexpr Real correction_strength(int32_t step, const Real* alpha, int64_t alphas) {
  return step >= 2 && step < alphas ? alpha[step] : Real(0);
}

// One element of S_t, with own = 1 - alpha_t and mean = alpha_t / (t - 1).
template <class Real>
constexpr Real corrected(Real running, Real start, Real prompt, Real own, Real mean) {
  return start + own * (running - start) + mean * (start - prompt);
}

// Each state is n contiguous elements.
template <class Real>
void end_step(int64_t n, int32_t step, const Real* alpha, int64_t alphas, Real* running, Real* start,
              Real* prompt) {
  if (step == 0) std::copy_n(running, n, prompt);
  const Real strength = correction_strength(step, alpha, alphas);
  if (strength != 0) {
    const Real own = 1 - strength, mean = strength / Real(step - 1);
    for (int64_t i = 0; i < n; ++i) running[i] = corrected(running[i], start[i], prompt[i], own, mean);
  }
  std::copy_n(running, n, start);
}

// Gradients of the three states after the end of the step -> before it.
template <class Real>
void end_step_backward(int64_t n, int32_t step, const Real* alpha, int64_t alphas, Real* running, Real* start,
                       Real* prompt) {
  const Real strength = correction_strength(step, alpha, alphas);
  const Real own = 1 - strength, mean = strength ? strength / Real(step - 1) : Real(0);
  for (int64_t i = 0; i < n; ++i) {
    const Real both = running[i] + start[i];
    running[i] = own * both;
    start[i] = (strength + mean) * both;
    prompt[i] -= mean * both;
  }
  if (step == 0) {
    for (int64_t i = 0; i < n; ++i) running[i] += prompt[i];
    std::fill_n(prompt, n, Real(0));
  }
}

}  // namespace statecore
