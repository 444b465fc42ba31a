// How states get from segment to segment of a sequence, for the sweeps of linear_attention_cpu.cpp and
// linear_attention_backward_cpu.cpp.
//
// Where sequences and heads are many, each is swept by one thread and its state is updated in place. Where
// they are few (LinearPlan::summed), a segment sums up its own contribution apart, starting from zero, and
// the state is
//
//   state before the segment * decay + sum over the segment so far.
//
// Then the sums of many segments can be had at once, the states before all segments follow in one short scan,
// and the segments can be finished at once. One thread sweeping in order computes the very same numbers, so
// that results do not depend on the number of threads: it is chosen where heads keep all threads busy, since
// it saves computing sums twice.
//
// A sweep is a class with one object a thread, whose calls are about the item that was selected last:
//
//   kBackwards                 the order of segments
//   units()                    independent parts of a sequence; an item is one unit of one sequence
//   state_size(), states()     elements of a unit's running states; 1, or 3 kinds where steps end
//   select(item)
//   start(base)                base [states, state_size]: what stands before the first segment
//   enter(segment, base)       base at the segment's first token
//   add(segment, sums)         sums [state_size]: what the segment contributes, and nothing else
//   run(segment, base, sums)   results, and sums as well; sums null: base is updated in place
//   leave(segment, base, sums) base behind the segment
//   finish(base)
#pragma once

#include <algorithm>

#include "common/parallel.h"
#include "common/scratch.h"
#include "linear_attention/linear_plan.h"

namespace statecore {

template <class Sweep>
const CarrySegment& segment_in_order(const LinearPlan& plan, const Range& segments, int64_t i) {
  return plan.segments[Sweep::kBackwards ? segments.end - 1 - i : segments.begin + i];
}

template <class Sweep, class Real>
void sweep_in_order(Sweep& sweep, const LinearPlan& plan, int64_t item, Real* base, Real* sums) {
  const Range& segments = plan.sequences[item / sweep.units()].segments;
  sweep.select(item);
  sweep.start(base);
  for (int64_t i = 0; i < segments.size(); ++i) {
    const CarrySegment& segment = segment_in_order<Sweep>(plan, segments, i);
    sweep.enter(segment, base);
    sweep.run(segment, base, sums);
    sweep.leave(segment, base, sums);
  }
  sweep.finish(base);
}

// In rounds of some segments of every item, so that memory does not grow with the length of sequences.
template <class Real, class MakeSweep>
void sweep_by_segments(const LinearPlan& plan, int64_t items, int64_t threads, const MakeSweep& make_sweep) {
  auto sizes = make_sweep();
  using Sweep = decltype(sizes);
  const int64_t size = sizes.state_size(), base_size = sizes.states() * size, units = sizes.units();
  const int64_t round = std::max<int64_t>(1, 4 * threads / items), tasks = items * round;
  const auto bases = make_scratch<Real>(items * base_size);
  const auto sums = make_scratch<Real>(tasks * size), befores = make_scratch<Real>(tasks * size);
  int64_t longest = 0;
  for (const LinearSequence& sequence : plan.sequences) longest = std::max(longest, sequence.segments.size());

  const auto each_item = [&](const auto& f) {
    parallel_for(items, [&](int64_t begin, int64_t end) {
      Sweep sweep = make_sweep();
      for (int64_t item = begin; item < end; ++item) {
        sweep.select(item);
        f(sweep, item, bases.get() + item * base_size);
      }
    });
  };
  each_item([&](Sweep& sweep, int64_t, Real* base) { sweep.start(base); });
  for (int64_t first = 0; first < longest; first += round) {
    // The segment of a task, or null where its sequence has ended.
    const auto segment_of = [&](int64_t task) -> const CarrySegment* {
      const Range& segments = plan.sequences[task / round / units].segments;
      const int64_t i = first + task % round;
      return i < segments.size() ? &segment_in_order<Sweep>(plan, segments, i) : nullptr;
    };
    const auto each_task = [&](const auto& f) {
      parallel_for(tasks, [&](int64_t begin, int64_t end) {
        Sweep sweep = make_sweep();
        for (int64_t task = begin; task < end; ++task)
          if (const CarrySegment* segment = segment_of(task)) {
            sweep.select(task / round);
            f(sweep, *segment, befores.get() + task * size, sums.get() + task * size);
          }
      });
    };
    each_task([](Sweep& sweep, const CarrySegment& segment, Real*, Real* sum) { sweep.add(segment, sum); });
    each_item([&](Sweep& sweep, int64_t item, Real* base) {
      for (int64_t task = item * round; task < (item + 1) * round; ++task)
        if (const CarrySegment* segment = segment_of(task)) {
          sweep.enter(*segment, base);
          std::copy_n(base, size, befores.get() + task * size);
          sweep.leave(*segment, base, sums.get() + task * size);
        }
    });
    each_task([](Sweep& sweep, const CarrySegment& segment, Real* before, Real* sum) {
      sweep.run(segment, before, sum);
    });
  }
  each_item([&](Sweep& sweep, int64_t, Real* base) { sweep.finish(base); });
}

// make_sweep() is called once a thread and phase.
template <class Real, class MakeSweep>
void carry(const LinearPlan& plan, int64_t units, int64_t multiply_adds, const MakeSweep& make_sweep) {
  const int64_t items = int64_t(plan.sequences.size()) * units;
  if (items == 0) return;
  const int64_t threads = multiply_adds >= kWorthSharing ? thread_count() : 1;
  const int64_t slots = (items + threads - 1) / threads * threads;  // of which items keep some busy
  // A sum that is computed twice costs up to a third of a sweep.
  if (plan.summed && 3 * slots > 4 * items) return sweep_by_segments<Real>(plan, items, threads, make_sweep);
  parallel_for(items, multiply_adds, [&](int64_t begin, int64_t end) {
    auto sweep = make_sweep();
    const auto base = make_scratch<Real>(sweep.states() * sweep.state_size());
    const auto sums = make_scratch<Real>(plan.summed ? sweep.state_size() : 0);
    for (int64_t item = begin; item < end; ++item)
      sweep_in_order(sweep, plan, item, base.get(), plan.summed ? sums.get() : nullptr);
  });
}

}  // namespace statecore
