"""state_update on a GPU, replayed from a CUDA graph as in decoding.

    python -m benchmarks.bench_state_update          this table alone; benchmarks.gpu runs them all

A graph holds as many calls, each with states of its own, as it takes for the states to exceed the second-level cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import gpu_peers, peers, roofline
from benchmarks.contest import OURS, in_one_line
from benchmarks.gpu_contest import (
    ABSENT,
    RIGHT,
    STATE_UPDATE,
    Instruments,
    Question,
    disagreement,
    relative_difference,
)
from benchmarks.gpu_peers import FLA
from benchmarks.peers import EAGER_UPDATE
from benchmarks.rows import Launches, Row
from benchmarks.timing import Timing
from benchmarks.workload import Case
from statecore import ops, reference

IN_PLACE, COPY = "in place, in a graph", "a copy of as many bytes of states"
OF_COPY = 0.85
A_CALL = ("us", 4e-6)  # of one row
LARGE = 100e6  # bytes of states that are to move as fast as a copy
EXCEEDS_CACHE = 128 << 20  # bytes
MOST_CALLS = 1024
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # states [1, B, Hk, D, D], q [B, Hq, D], k and v [B, Hk, D]
Call = Callable[[], Tensor | None]


def questions() -> list[Question]:
    first = {(1, (12, 2)), (256, (64, 64))}
    second = {(64, (28, 4)), (256, (16, 16))}
    found = []
    for heads in ((12, 2), (28, 4), (16, 16), (64, 64)):
        for rows in (1, 8, 64, 256):
            rank = 1 if (rows, heads) in first else 3 if (rows, heads) in second else 4
            found.append(_question(rank, heads, rows))
    return found


def _question(rank: int, heads: tuple[int, int], rows: int) -> Question:
    case = Case(time=rows, dtype=torch.bfloat16, heads=heads, width=128, prompt=0, step=1)
    return Question(
        STATE_UPDATE, case, rank, {IN_PLACE: (roofline.state_update(case),)}, update,
        {IN_PLACE: A_CALL if rows == 1 else ("us", None)},
        {(IN_PLACE, COPY): OF_COPY} if state_bytes(case) >= LARGE else {}, needs=5.0,
    )  # fmt: skip


def state_bytes(case: Case) -> int:
    return roofline.STATE * case.time * case.heads[1] * case.width**2


def update(question: Question, instruments: Instruments) -> Iterator[Row]:
    case = replace(question.case, device=instruments.device)
    sets = inputs_beyond_the_cache(case)
    failure = wrong(sets[0])
    if failure:
        yield from question.failed(failure, instruments.ceilings)
        return
    calls = [partial(ops.state_update, *inputs) for inputs in sets]
    ours = instruments.captured(calls)
    runs, failures = {OURS: ours}, {}
    for peer, make in {FLA: fla_calls, EAGER_UPDATE: eager_calls, COPY: copy_calls}.items():
        try:
            theirs = make(case, sets)
            if peer != COPY and (failure := differs(theirs[0], sets[0])):
                failures[peer] = failure
            else:
                runs[peer] = instruments.captured(theirs)
        except ImportError as error:
            failures[peer] = ABSENT + str(error)
        except Exception as error:
            failures[peer] = in_one_line(error)
    timings = {
        side: Timing(timing.median / len(sets), timing.spread) for side, timing in instruments.time(runs).items()
    }  # fmt: skip
    taken = timings.pop(OURS)
    yield question.kernel(
        IN_PLACE, instruments.ceilings, seconds=taken.median, spread=taken.spread, extra=instruments.extra(calls[0])
    )
    if ours.launches is not None:
        yield Launches(operator=STATE_UPDATE, launches=ours.launches / len(calls), target=1.0, **question.case.labels())
    for peer in (FLA, EAGER_UPDATE, COPY):
        if peer in failures:
            yield question.comparison(IN_PLACE, peer, taken, failure=failures[peer])
        else:
            its = timings[peer]
            yield question.comparison(IN_PLACE, peer, taken, peer_s=its.median, peer_spread=its.spread)


def inputs_beyond_the_cache(case: Case) -> list[Inputs]:
    count = max(1, min(MOST_CALLS, -(-EXCEEDS_CACHE // state_bytes(case))))
    queries, keys = case.heads

    def some(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(count, *shape, device=case.device) * 0.1).to(dtype)

    states = some(1, case.time, keys, case.width, case.width, dtype=torch.float32)
    vectors = (some(case.time, heads, case.width) for heads in (queries, keys, keys))
    return list(zip(states, *vectors, strict=True))


def wrong(inputs: Inputs) -> str:
    """Output and states of the last row against the definition in float64, on copies."""
    states, q, k, v = inputs
    mine = states.clone()
    exact = states[:, -1:].double()
    try:
        out = ops.state_update(mine, q, k, v)
    except Exception as error:
        return in_one_line(error)
    expected = reference.state_update(exact, *(x[-1:].double() for x in (q, k, v)))
    error = max(relative_difference(out[-1:], expected), relative_difference(mine[:, -1:], exact))
    return "" if error <= RIGHT else f"wrong, not timed: the last row differs from the definition by {error:.2g}"


def differs(call: Call, inputs: Inputs) -> str:
    """Of a peer's first call, which has states of its own that begin as ours."""
    states, q, k, v = inputs
    return disagreement((ops.state_update(states.clone(), q, k, v),), (call(),))


def fla_calls(case: Case, sets: list[Inputs]) -> list[Call]:
    """It has no groups: as many states as query heads, and k and v repeated beforehand."""
    run = gpu_peers.fla_state_update()
    group = case.heads[0] // case.heads[1]

    def call(states: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Call:
        states, k, v = (x.repeat_interleave(group, dim=1) for x in (states[0], k, v))
        return partial(run, states, q, k, v)

    return [call(*inputs) for inputs in sets]


def eager_calls(case: Case, sets: list[Inputs]) -> list[Call]:
    return [partial(peers.eager_state_update, states.clone(), *vectors) for states, *vectors in sets]


def copy_calls(case: Case, sets: list[Inputs]) -> list[Call]:
    return [partial(torch.empty_like(states).copy_, states) for states, *_ in sets]


if __name__ == "__main__":
    from benchmarks.gpu import only

    only("state_update")
