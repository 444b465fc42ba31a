"""state_update: one decoding token per row, in place.

`python -m benchmarks.bench_state_update [--device cpu|cuda] [--only TEXT] [--quick]` prints its tables.

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
from benchmarks.contest import OTHER, OURS, RIGHT, SAME, WRONG, Instruments, Question, agree, made
from benchmarks.machine import last_level_cache
from benchmarks.peers import EAGER_UPDATE, FLA
from benchmarks.record import QUANTITY, Row
from benchmarks.timing import Timing
from benchmarks.workload import DTYPES, Case, cpu_cases
from statecore import ops, reference

NAME, IN_PLACE, IN_GRAPH = "state_update", "in place", "in place, in a graph"
COPY = "a copy of as many bytes of states"
TINY = 8  # width of states too small to matter
EXCEEDS_CACHE, MOST_CALLS = 128 << 20, 1024  # bytes of states in a graph
LARGE = 100e6  # bytes of states that a GPU is to move as fast as a copy
TIMES_COPY_ON_CPU, PER_HEAD_STATE = 0.8, 2e-6  # targets of the CPU,
TIMES_COPY, OF_ONE_ROW = 0.85, ("us", 4e-6)  # and of a GPU
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # states [1, B, Hk, D, D], q [B, Hq, D], k and v [B, Hk, D]
Calls = dict[str, list[Callable[[], Tensor | None]]]  # by variant, one for each of several inputs


def questions(device: str) -> list[Question]:
    def asked(section: str, direction: str, case: Case, rows: int, **fields) -> Question:
        case = replace(case, time=1, prompt=0, step=1, batch=rows)
        fields = {"measure": update, "needs": 5.0} | fields
        return Question(section, NAME, case, partial(work, direction), (direction,), **fields)

    if device == "cpu":
        on_cpu, cache, found = partial(asked, "update", IN_PLACE), last_level_cache(), []
        for case in cpu_cases():
            fitting = cache // state_bytes(case)  # rows
            found.append(on_cpu(case, max(1, 4 * fitting), ratios={(IN_PLACE, COPY): TIMES_COPY_ON_CPU}))
            found.append(on_cpu(case, max(1, fitting // 4), measure=per_head_state))
            found += [on_cpu(case, 1), on_cpu(case, 64)]
        ones = [replace(case, heads=(1, 1)) for case in cpu_cases()[: len(DTYPES)]]  # one thread
        return found + [on_cpu(case, 1, measure=per_head_state) for case in ones]

    ranks = {(1, (12, 2)): 1, (256, (64, 64)): 1, (64, (28, 4)): 3, (256, (16, 16)): 3}
    found = []
    for heads in ((12, 2), (28, 4), (16, 16), (64, 64)):
        case = Case(dtype=torch.bfloat16, heads=heads, time=1, device="cuda")
        for rows in (1, 8, 64, 256):
            aims = {IN_GRAPH: OF_ONE_ROW if rows == 1 else ("us", None)}
            ratios = {(IN_GRAPH, COPY): TIMES_COPY} if rows * state_bytes(case) >= LARGE else {}
            rank = ranks.get((rows, heads), 4)
            found.append(asked(NAME, IN_GRAPH, case, rows, aims=aims, ratios=ratios, rank=rank))
    return found


def work(direction: str, case: Case) -> dict[str, roofline.Passes]:
    """On the CPU bytes alone: a copy bounds it there, not arithmetic."""
    update = roofline.state_update(case)
    return {direction: (replace(update, flops=0) if case.threads else update,)}


def state_bytes(case: Case) -> int:
    """Per row."""
    return roofline.STATE * case.heads[1] * case.width**2


def update(question: Question, instruments: Instruments) -> Iterator[Row]:
    (direction,), case = question.directions, question.case
    sets = inputs_of(case)
    check(*sets[0])
    calls = [partial(ops.state_update, *inputs) for inputs in sets]
    ours, launches = instruments.captured(calls)
    makers = {FLA: fla_calls, EAGER_UPDATE: eager_calls, COPY: copy_calls}
    if case.threads:
        del makers[FLA]
        if not question.ratios:  # inside the caches
            del makers[COPY]
    found, failures = made({name: partial(entered, make, case, sets, instruments) for name, make in makers.items()})
    runs = {(name, variant): run for name, variants in found.items() for variant, run in variants.items()}
    timings = {
        side: Timing(taken.median / len(sets), taken.spread)
        for side, taken in instruments.time({(OURS, ""): ours} | runs).items()
    }
    more = {}
    if case.threads and COPY in found:
        pool, its = sets[0][0].nbytes, min(its.median for (name, _), its in timings.items() if name == COPY)
        more |= {"pool": (pool, "MB"), "copy": (2 * pool / its, "GB/s")}
    row = question.timed(direction, instruments, timings[OURS, ""], instruments.extra(calls[0]), **more)
    yield row
    if launches is not None:
        numbers, aim = {"launches": (launches / len(calls), "launches")}, {"unit": "launches", "target": 1.0}
        yield question.row(QUANTITY, what="in a graph", numbers=numbers, judged="launches", **aim)
    for name in makers:
        yield question.comparison(direction, name, row, timings, failures.get(name, ""))


def entered(make: Callable[[Case, list[Inputs]], Calls], case: Case, sets: list[Inputs], instruments: Instruments):
    """{variant: all its calls as one}; the first call, on the same states, must agree with ours."""
    variants = make(case, sets)
    if make is not copy_calls:
        states, *vectors = sets[0]
        agree(variants[""][0](), ops.state_update(states.clone(), *vectors), SAME, f"{OTHER}the output differs")
    return {variant: instruments.captured(calls)[0] for variant, calls in variants.items()}


def inputs_of(case: Case) -> list[Inputs]:
    """One set on the CPU; on a GPU as many as exceed the cache."""
    count = 1 if case.threads else max(1, min(MOST_CALLS, -(-EXCEEDS_CACHE // (case.batch * state_bytes(case)))))
    queries, keys = case.heads

    def some(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(count, *shape, device=case.device) * 0.1).to(dtype)

    states = some(1, case.batch, keys, case.width, case.width, dtype=torch.float32)
    vectors = (some(case.batch, heads, case.width) for heads in (queries, keys, keys))
    return list(zip(states, *vectors, strict=True))


def check(states: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Output and states of the last row against the definition in float64, on copies."""
    mine, exact = states.clone(), states[:, -1:].double()
    out = ops.state_update(mine, q, k, v)
    expected = reference.state_update(exact, *(x[-1:].double() for x in (q, k, v)))
    for found, wanted in ((out[-1:], expected), (mine[:, -1:], exact)):
        agree(found, wanted, RIGHT, f"{WRONG}the last row differs from the definition")


def fla_calls(case: Case, sets: list[Inputs]) -> Calls:
    """It has no groups: as many states as query heads, and k and v repeated beforehand."""
    run, group = peers.fla_state_update(), case.heads[0] // case.heads[1]

    def call(states: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        states, k, v = (x.repeat_interleave(group, dim=1) for x in (states[0], k, v))
        return partial(run, states, q, k, v)

    return {"": [call(*inputs) for inputs in sets]}


def eager_calls(case: Case, sets: list[Inputs]) -> Calls:
    return {"": [partial(peers.eager_state_update, states.clone(), *vectors) for states, *vectors in sets]}


def copy_calls(case: Case, sets: list[Inputs]) -> Calls:
    if case.threads:
        return {name: [run] for name, run in roofline.copies(sets[0][0].nbytes).items()}
    return {"": [partial(torch.empty_like(states).copy_, states) for states, *_ in sets]}


def per_head_state(question: Question, instruments: Instruments) -> Iterator[Row]:
    """Inside the caches, without the cost of a call."""
    case = question.case
    (inputs,), (tiny,) = inputs_of(case), inputs_of(replace(case, width=TINY))
    taken = instruments.time({"ours": lambda: ops.state_update(*inputs), "tiny": lambda: ops.state_update(*tiny)})
    ours, call, count = taken["ours"], taken["tiny"].median, case.batch * case.heads[1]
    numbers = {
        "head-states": (count, "count"), "call": (ours.median, "us"), "spread": (ours.spread, "percent"),
        "call on tiny states": (call, "us"), "per head-state": ((ours.median - call) / count, "us"),
    }  # fmt: skip
    what = f"time per head-state, {'one head-state' if count == 1 else 'fits in the last-level cache'}"
    aim = {"judged": "per head-state", "unit": "us", "target": PER_HEAD_STATE}
    yield question.row(QUANTITY, what=what, numbers=numbers, **aim)


if __name__ == "__main__":
    suite.main_of_operator(questions)
