"""state_update: one decoding token per row, in place.

    python -m benchmarks.bench_state_update [--device cpu|cuda] [--only TEXT] [--quick]

On a GPU it is replayed from a CUDA graph, as in decoding: of as many calls, each with states of its own, as it takes
for the states to exceed the L2 cache. On the CPU it is called with a pool of states far larger than the caches, and
with pools that fit in them.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers, roofline, suite
from benchmarks.contest import OURS, RIGHT, Instruments, Question, agree, made, reason_of, relative_difference
from benchmarks.machine import last_level_cache
from benchmarks.peers import EAGER_UPDATE, FLA
from benchmarks.record import Row
from benchmarks.timing import Timing
from benchmarks.workload import DTYPES, Case, cpu_cases
from statecore import ops, reference

NAME, IN_PLACE, IN_GRAPH = "state_update", "in place", "in place, in a graph"
COPY = "a copy of as many bytes of states"
POOL = 4  # last-level caches that the CPU's large pool fills
TINY = 8  # width of states that are no work
EXCEEDS_CACHE, MOST_CALLS = 128 << 20, 1024  # bytes of states in a graph
LARGE = 100e6  # bytes of states that are to move as fast as a copy on a GPU

# Targets: of the CPU, then of a GPU
TIMES_COPY_ON_CPU, PER_HEAD_STATE = 0.8, 2e-6
TIMES_COPY, OF_ONE_ROW = 0.85, ("us", 4e-6)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # states [1, B, Hk, D, D], q [B, Hq, D], k and v [B, Hk, D]
Call = Callable[[], Tensor | None]


def questions(device: str) -> list[Question]:
    return on_cpu() if device == "cpu" else on_gpu()


def on_cpu() -> list[Question]:
    def asked(case: Case, rows: int, **fields) -> Question:
        return _question("update", IN_PLACE, replace(case, time=1, prompt=0, step=1, batch=rows), **fields)

    found, cache = [], last_level_cache()
    for case in cpu_cases():
        large, inside = (max(1, size // _state_bytes(case)) for size in (POOL * cache, cache // 4))
        found += [
            asked(case, large, ratios={(IN_PLACE, COPY): TIMES_COPY_ON_CPU}),
            asked(case, inside, measure=per_head_state),
            asked(case, 1),
            asked(case, 64),
        ]
    ones = [case for case in cpu_cases() if case.threads == 1][: len(DTYPES)]
    return found + [asked(replace(case, heads=(1, 1)), 1, measure=per_head_state) for case in ones]


def on_gpu() -> list[Question]:
    first = {(1, (12, 2)), (256, (64, 64))}
    second = {(64, (28, 4)), (256, (16, 16))}

    def asked(rows: int, heads: tuple[int, int]) -> Question:
        case = Case(dtype=torch.bfloat16, heads=heads, time=1, prompt=0, step=1, batch=rows, device="cuda")
        return _question(
            NAME, IN_GRAPH, case, aims={IN_GRAPH: OF_ONE_ROW if rows == 1 else ("us", None)},
            ratios={(IN_GRAPH, COPY): TIMES_COPY} if rows * _state_bytes(case) >= LARGE else {},
            rank=1 if (rows, heads) in first else 3 if (rows, heads) in second else 4,
        )  # fmt: skip

    return [asked(rows, heads) for heads in ((12, 2), (28, 4), (16, 16), (64, 64)) for rows in (1, 8, 64, 256)]


def _question(section: str, direction: str, case: Case, **fields) -> Question:
    def work(case: Case) -> dict[str, roofline.Passes]:
        return {direction: (roofline.state_update(case),)}

    return Question(section, NAME, case, work, (direction,), **{"measure": update, "needs": 5.0} | fields)


def _state_bytes(case: Case) -> int:
    """Of one row."""
    return roofline.STATE * case.heads[1] * case.width**2


def update(question: Question, instruments: Instruments) -> Iterator[Row]:
    (direction,), case = question.directions, question.case
    sets = inputs_of(case)
    if failure := reason_of(lambda: wrong(sets[0])):
        yield from question.failed(failure)
        return
    calls = [partial(ops.state_update, *inputs) for inputs in sets]
    ours = instruments.captured(calls)
    makers = {EAGER_UPDATE: eager_calls, COPY: copy_calls}
    if not case.threads:
        makers = {FLA: fla_calls} | makers
    elif (IN_PLACE, COPY) not in question.ratios:  # inside the caches
        del makers[COPY]
    found, failures = made({name: partial(entered, make, case, sets, instruments) for name, make in makers.items()})
    runs = {(name, variant): run for name, variants in found.items() for variant, run in variants.items()}
    timings = {
        side: Timing(taken.median / len(sets), taken.spread)
        for side, taken in instruments.time({(OURS, ""): ours} | runs).items()
    }
    taken, more = timings[OURS, ""], {"memory beyond": (instruments.extra(calls[0]), "MB")}
    if case.threads and COPY in found:
        pool, its = sets[0][0].nbytes, min(its.median for (name, _), its in timings.items() if name == COPY)
        more |= {"pool": (pool, "MB"), "copy": (2 * pool / its, "GB/s")}
    yield question.timed(direction, instruments, taken, **more)
    if ours.launches is not None:
        launches = {"launches": (ours.launches / len(calls), "launches")}
        yield question.quantity("in a graph", launches, judged="launches", unit="launches", target=1.0)
    for name in makers:
        yield question.comparison(direction, name, instruments, timings, failures.get(name, ""))


def entered(
    make: Callable[[Case, list[Inputs]], dict[str, list[Call]]], case: Case, sets: list[Inputs],
    instruments: Instruments,
) -> dict[str, Call]:  # fmt: skip
    """{variant: all its calls as one}; the first call, on states that begin as ours, must agree with ours."""
    variants = make(case, sets)
    if make is not copy_calls:
        states, *vectors = sets[0]
        for calls in variants.values():
            agree((ops.state_update(states.clone(), *vectors),), (calls[0](),))
    return {variant: instruments.captured(calls) for variant, calls in variants.items()}


def inputs_of(case: Case) -> list[Inputs]:
    """One set on the CPU; on a GPU as many as exceed the cache."""
    count = 1 if case.threads else max(1, min(MOST_CALLS, -(-EXCEEDS_CACHE // (case.batch * _state_bytes(case)))))
    queries, keys = case.heads

    def some(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(count, *shape, device=case.device) * 0.1).to(dtype)

    states = some(1, case.batch, keys, case.width, case.width, dtype=torch.float32)
    vectors = (some(case.batch, heads, case.width) for heads in (queries, keys, keys))
    return list(zip(states, *vectors, strict=True))


def wrong(inputs: Inputs) -> str:
    """Output and states of the last row against the definition in float64, on copies."""
    states, q, k, v = inputs
    mine, exact = states.clone(), states[:, -1:].double()
    out = ops.state_update(mine, q, k, v)
    expected = reference.state_update(exact, *(x[-1:].double() for x in (q, k, v)))
    error = max(relative_difference(out[-1:], expected), relative_difference(mine[:, -1:], exact))
    return "" if error <= RIGHT else f"wrong, not timed: the last row differs from the definition by {error:.2g}"


def fla_calls(case: Case, sets: list[Inputs]) -> dict[str, list[Call]]:
    """It has no groups: as many states as query heads, and k and v repeated beforehand."""
    run = peers.fla_state_update()
    group = case.heads[0] // case.heads[1]

    def call(states: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Call:
        states, k, v = (x.repeat_interleave(group, dim=1) for x in (states[0], k, v))
        return partial(run, states, q, k, v)

    return {"": [call(*inputs) for inputs in sets]}


def eager_calls(case: Case, sets: list[Inputs]) -> dict[str, list[Call]]:
    return {"": [partial(peers.eager_state_update, states.clone(), *vectors) for states, *vectors in sets]}


def copy_calls(case: Case, sets: list[Inputs]) -> dict[str, list[Call]]:
    if case.threads:
        return {name: [run] for name, run in roofline.copies(sets[0][0].nbytes).items()}
    return {"": [partial(torch.empty_like(states).copy_, states) for states, *_ in sets]}


def per_head_state(question: Question, instruments: Instruments) -> Iterator[Row]:
    """Inside the caches, without the cost of a call."""
    case = question.case
    (inputs,), (tiny,) = inputs_of(case), inputs_of(replace(case, width=TINY))
    timings = instruments.time({"ours": lambda: ops.state_update(*inputs), "tiny": lambda: ops.state_update(*tiny)})
    ours, call, count = timings["ours"], timings["tiny"].median, case.batch * case.heads[1]
    numbers = {
        "head-states": (count, "count"), "call": (ours.median, "us"), "spread": (ours.spread, "percent"),
        "call on tiny states": (call, "us"), "per head-state": ((ours.median - call) / count, "us"),
    }  # fmt: skip
    where = "one head-state" if count == 1 else "fits in the last-level cache"
    aim = {"judged": "per head-state", "unit": "us", "target": PER_HEAD_STATE}
    yield question.quantity(f"time per head-state, {where}", numbers, **aim)


if __name__ == "__main__":
    suite.main_of_operator(questions)
