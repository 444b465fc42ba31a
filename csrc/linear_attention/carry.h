// How states are carried through the splits of a sequence, for the sweeps of linear_attention_cpu.cpp and
// linear_attention_backward_cpu.cpp.
//
// Where sequences and heads are many, one thread sweeps all of a sequence and updates its state in place.
// Where they are few (LinearPlan::has_local_states), a split computes its local state, from its own tokens
// and starting from zeros, and the state inside the split is
//
//   state before the split * decay + local state so far.
//
// Threads then compute the local states of many splits in parallel, a short scan turns them into the state
// before each split, and the splits are finished in parallel. A single thread that sweeps in order computes
// exactly the same numbers, so that results do not depend on the number of threads. That is preferred where
// tasks keep all threads busy, because no local state is computed twice.
//
// A sweep is a class, with one object per thread, whose calls refer to the task selected last:
//
//   kReverse                    order of the splits
//   head_blocks()               a task is one head block of one sequence; they are independent
//   state_size(), states()      elements of a head block's states; 1, or 3 kinds where steps end
//   select(task)
//   start(base)                 base [states, state_size]: the state before the first split
//   enter(split, base)          base at the split's first token
//   add(split, local)           local [state_size]: the split's local state, and nothing else
//   run(split, base, local)     results, and the local state too; local null: base is updated in place
//   leave(split, base, local)   base behind the split
//   finish(base)
#pragma once

#include <algorithm>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "linear_attention/linear_plan.h"

namespace statecore {

template <class Sweep>
const CarrySplit& split_in_order(const LinearPlan& plan, const Range& splits, int64_t i) {
  return plan.splits[Sweep::kReverse ? splits.end - 1 - i : splits.begin + i];
}

template <class Sweep, class Real>
void sweep_in_order(Sweep& sweep, const LinearPlan& plan, int64_t task, Real* base, Real* local) {
  const Range& splits = plan.sequences[task / sweep.head_blocks()].splits;
  sweep.select(task);
  sweep.start(base);
  for (int64_t i = 0; i < splits.size(); ++i) {
    const CarrySplit& split = split_in_order<Sweep>(plan, splits, i);
    sweep.enter(split, base);
    sweep.run(split, base, local);
    sweep.leave(split, base, local);
  }
  sweep.finish(base);
}

// In rounds of some splits of every task, so that memory does not grow with the length of sequences.
template <class Real, class MakeSweep>
void sweep_by_splits(const LinearPlan& plan, int64_t tasks, int64_t threads, const MakeSweep& make_sweep) {
  auto sizes = make_sweep();
  using Sweep = decltype(sizes);
  const int64_t size = sizes.state_size(), base_size = sizes.states() * size,
                head_blocks = sizes.head_blocks();
  const int64_t round = std::max<int64_t>(1, 4 * threads / tasks);  // splits per task
  const int64_t jobs = tasks * round;                               // one split of one task each
  const auto bases = make_scratch<Real>(tasks * base_size);
  const auto locals = make_scratch<Real>(jobs * size), split_bases = make_scratch<Real>(jobs * size);
  int64_t most_splits = 0;
  for (const LinearSequence& sequence : plan.sequences)
    most_splits = std::max(most_splits, sequence.splits.size());

  const auto for_each_task = [&](const auto& f) {
    parallel_for(tasks, [&](int64_t begin, int64_t end) {
      Sweep sweep = make_sweep();
      for (int64_t task = begin; task < end; ++task) {
        sweep.select(task);
        f(sweep, task, bases.get() + task * base_size);
      }
    });
  };
  for_each_task([&](Sweep& sweep, int64_t, Real* base) { sweep.start(base); });
  for (int64_t first = 0; first < most_splits; first += round) {
    // Null where the sequence has fewer splits.
    const auto split_of = [&](int64_t job) -> const CarrySplit* {
      const Range& splits = plan.sequences[job / round / head_blocks].splits;
      const int64_t i = first + job % round;
      return i < splits.size() ? &split_in_order<Sweep>(plan, splits, i) : nullptr;
    };
    const auto for_each_job = [&](const auto& f) {
      parallel_for(jobs, [&](int64_t begin, int64_t end) {
        Sweep sweep = make_sweep();
        for (int64_t job = begin; job < end; ++job)
          if (const CarrySplit* split = split_of(job)) {
            sweep.select(job / round);
            f(sweep, *split, split_bases.get() + job * size, locals.get() + job * size);
          }
      });
    };
    for_each_job([](Sweep& sweep, const CarrySplit& split, Real*, Real* local) { sweep.add(split, local); });
    for_each_task([&](Sweep& sweep, int64_t task, Real* base) {
      for (int64_t job = task * round; job < (task + 1) * round; ++job)
        if (const CarrySplit* split = split_of(job)) {
          sweep.enter(*split, base);
          std::copy_n(base, size, split_bases.get() + job * size);
          sweep.leave(*split, base, locals.get() + job * size);
        }
    });
    for_each_job([](Sweep& sweep, const CarrySplit& split, Real* base, Real* local) {
      sweep.run(split, base, local);
    });
  }
  for_each_task([&](Sweep& sweep, int64_t, Real* base) { sweep.finish(base); });
}

// make_sweep() is called once per thread and phase.
template <class Real, class MakeSweep>
void carry(const LinearPlan& plan, int64_t head_blocks, int64_t multiply_adds, const MakeSweep& make_sweep) {
  const int64_t tasks = int64_t(plan.sequences.size()) * head_blocks;
  if (tasks == 0) return;
  const int64_t threads = multiply_adds >= kWorthSharing ? thread_count() : 1;
  const int64_t thread_turns = ceil_div(tasks, threads) * threads;  // a thread idles in those without a task
  // A local state that is computed twice costs up to a third of a sweep.
  if (plan.has_local_states && 3 * thread_turns > 4 * tasks)
    return sweep_by_splits<Real>(plan, tasks, threads, make_sweep);
  parallel_for(tasks, multiply_adds, [&](int64_t begin, int64_t end) {
    auto sweep = make_sweep();
    const auto base = make_scratch<Real>(sweep.states() * sweep.state_size());
    const auto local = make_scratch<Real>(plan.has_local_states ? sweep.state_size() : 0);
    for (int64_t task = begin; task < end; ++task)
      sweep_in_order(sweep, plan, task, base.get(), plan.has_local_states ? local.get() : nullptr);
  });
}

}  // namespace statecore
