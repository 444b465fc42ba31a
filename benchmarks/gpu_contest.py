"""One operator on a GPU at one shape: compared with its definition, then timed beside its peers in the same run.

Nothing here says CUDA: what measures is given (Instruments), so that the tests go the same way with small tensors on
the CPU.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import memory, roofline, timing
from benchmarks.contest import FORWARD, OURS, SAME, Run, directed, in_one_line, without_gradients
from benchmarks.rows import Comparison, Kernel, Preparation, Row
from benchmarks.timing import Timing, fastest, seconds_a_call
from benchmarks.workload import Case

Operator = Callable[..., tuple[Tensor, ...]]  # differentiable; the first result is the output
RIGHT, RIGHT_GRADIENT = 0.01, 0.02  # relative errors against the definition in float64, of results rounded to 16 bits
CORNER_HEADS, CORNER_TOKENS = 2, 1500  # of the corner that is compared, at most: key heads, and tokens
ODD = 37  # tokens of it behind the second step
STATE_UPDATE = "state_update"  # whose cases are so many rows, not tokens
NO_TIME = "left out, the time of the run was spent"
ABSENT = "not installed: "


@dataclass(frozen=True)
class Instruments:
    """What measures; left: seconds of the run that remain."""

    ceilings: roofline.Ceilings
    left: Callable[[], float]
    device: str = "cuda"
    time: Callable[[dict[Hashable, Run]], dict[Hashable, Timing]] = timing.by_events
    captured: Callable[[Sequence[Run]], timing.Replay] = timing.captured
    extra: Callable[[Run], int | None] = memory.gpu_extra
    wait: Callable[[], None] = torch.cuda.synchronize


@dataclass(frozen=True)
class Question:
    """What is to be found out. rank: 1 is asked first; needs: seconds, it is not asked where fewer remain; measure: its
    rows; passes: {direction: its roofline}; aims: {direction: (unit, target)} of ours; ratios: {(direction, peer):
    target}.
    """

    operator: str
    case: Case
    rank: int
    passes: dict[str, roofline.Passes]
    measure: Callable[["Question", Instruments], Iterator[Row]]
    aims: dict[str, tuple[str, float]] = field(default_factory=dict)
    ratios: dict[tuple[str, str], float] = field(default_factory=dict)
    needs: float = 10.0

    @property
    def name(self) -> str:
        case = self.case
        heads = "/".join(map(str, case.heads))
        size = f"{case.time} rows" if self.operator == STATE_UPDATE else f"B {case.batch}, T {case.time}"
        return f"{self.operator}: {size}, heads {heads}, D {case.width}"

    def kernel(self, direction: str, ceilings: roofline.Ceilings, **fields: object) -> Kernel:
        passes = self.passes[direction]
        unit, target = self.aims.get(direction, ("ms", None))
        return Kernel(
            operator=self.operator, direction=direction, judged=unit, target=target,
            flops=sum(work.flops for work in passes), moved=sum(work.bytes for work in passes),
            bound=roofline.bound(passes, ceilings), **self.case.labels(), **fields,
        )  # fmt: skip

    def comparison(self, direction: str, peer: str, ours: Timing, **fields: object) -> Comparison:
        return Comparison(
            operator=self.operator, direction=direction, peer=peer, target=self.ratios.get((direction, peer)),
            ours_s=ours.median, ours_spread=ours.spread, **self.case.labels(), **fields,
        )  # fmt: skip

    def failed(self, reason: str, ceilings: roofline.Ceilings) -> Iterator[Row]:
        return (self.kernel(direction, ceilings, failure=reason) for direction in self.passes)


@dataclass(frozen=True)
class Peer:
    """runs: {variant: run}; inputs: what gradients are taken of, q first; work: our work / its work; apart: it computes
    something else; prepared: what it builds beforehand.
    """

    runs: dict[str, Run]
    inputs: tuple[Tensor, ...]
    work: float = 1.0
    apart: bool = False
    prepared: dict[str, Callable[[], object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """An operator with what it is compared to. corner, definition: both take the corner of the inputs."""

    ours: Operator
    inputs: tuple[Tensor, ...]
    corner: Operator
    definition: Operator
    cut: Callable[[Tensor], Tensor]
    peers: dict[str, Callable[[], Peer]]

    def run(self) -> Tensor:
        return self.ours(*self.inputs)[0]


def corner_of(case: Case) -> Callable[[Tensor], Tensor]:
    """The last row, its last key heads with their groups, from the start to a little behind the second step. Operators
    that are causal have the same results there for the corner of the inputs alone.
    """
    tokens = min(case.time, case.prompt + 2 * case.step + ODD, CORNER_TOKENS)
    keys = min(CORNER_HEADS, case.heads[1])
    return lambda x: x[-1:, :tokens, -(x.shape[2] * keys // case.heads[1]) :]


# ---- is it right?


def wrong(subject: Subject) -> str:
    """What differs from the definition, or an empty string: the corner of the timed output, and that of a corner."""
    with torch.no_grad():
        inputs = [subject.cut(x).contiguous() for x in subject.inputs]
        expected = subject.definition(*(x.double() for x in inputs))[0]
        timed, alone = subject.cut(subject.run()), subject.corner(*inputs)[0]
    return first_wrong({"the output": (timed, expected), "a corner's output": (alone, expected)}, RIGHT)


def wrong_gradients(subject: Subject) -> str:
    """The same of a corner's gradients."""
    mine = [subject.cut(x).detach().clone().requires_grad_() for x in subject.inputs]
    exact = [x.detach().double().requires_grad_() for x in mine]
    out = subject.corner(*mine)[0]
    gradient = torch.randn_like(out)
    found = torch.autograd.grad(out, mine, gradient)
    wanted = torch.autograd.grad(subject.definition(*exact)[0], exact, gradient.double())
    pairs = enumerate(zip(found, wanted, strict=True))
    return first_wrong({f"gradient {index}": pair for index, pair in pairs}, RIGHT_GRADIENT)


def first_wrong(pairs: dict[str, tuple[Tensor, Tensor]], tolerance: float) -> str:
    for what, (found, wanted) in pairs.items():
        error = relative_difference(found, wanted)
        if not error <= tolerance:
            return f"wrong, not timed: {what} differs from the definition by {error:.2g}"
    return ""


def failure_of(check: Callable[[Subject], str], subject: Subject) -> str:
    try:
        return check(subject)
    except Exception as error:
        return in_one_line(error)


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def disagreement(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> str:
    """Of results with the same shapes; expanded keys have gradients of their own."""
    for index, (found, wanted) in enumerate(zip(theirs, mine, strict=False)):
        if found.shape == wanted.shape and not (error := relative_difference(found, wanted)) <= SAME:
            return f"computes something else, not timed: result {index} differs by {error:.2g}"
    return ""


# ---- how fast is it?


def contest(question: Question, subject: Subject, instruments: Instruments) -> Iterator[Row]:
    """Ours in every direction, what peers build, and each peer that runs; of those that do not, why."""
    broken = failure_of(wrong, subject)
    if broken:
        yield from question.failed(broken, instruments.ceilings)
        return
    peers, failures = {}, {}
    for name, make in subject.peers.items():
        try:
            peers[name] = make()
        except ImportError as error:
            failures[name] = ABSENT + str(error)
        except Exception as error:
            failures[name] = in_one_line(error)
    for name, peer in peers.items():
        for what, build in peer.prepared.items():
            yield preparation(question, f"{name}: {what}", build, instruments)
    steep = failure_of(wrong_gradients, subject)
    for direction in question.passes:
        if steep and direction != FORWARD:
            yield question.kernel(direction, instruments.ceilings, failure=steep)
            continue
        try:
            rows = list(one_direction(question, direction, subject, peers, failures, instruments))
        except Exception as error:  # of ours, or of a peer that has run before
            rows = [question.kernel(direction, instruments.ceilings, failure=in_one_line(error))]
        yield from rows


def one_direction(
    question: Question, direction: str, subject: Subject, peers: dict[str, Peer], failures: dict[str, str],
    instruments: Instruments,
) -> Iterator[Row]:  # fmt: skip
    gradient = torch.randn_like(subject.run())
    ours = directed(direction, subject.run, subject.inputs, gradient)
    mine = in_tuple(ours())
    if not all(bool(x.isfinite().all()) for x in mine):
        yield question.kernel(direction, instruments.ceilings, failure="wrong, not timed: infinite or not a number")
        return
    runs, failures = {(OURS, ""): ours}, dict(failures)
    for name, peer in peers.items():
        for variant, run in peer.runs.items():
            if instruments.left() <= 0:
                failures[name] = NO_TIME
                continue
            try:
                candidate = directed(direction, run, peer.inputs, gradient)
                theirs = in_tuple(candidate())
                instruments.wait()
                failure = "" if peer.apart else disagreement(mine, theirs)
            except Exception as error:
                failure = in_one_line(error)
            if failure:
                failures[name] = failure
            else:
                runs[name, variant] = candidate
    del mine
    timings = instruments.time(runs)
    taken = timings.pop((OURS, ""))
    extra = instruments.extra(whole(direction, subject, ours))
    yield question.kernel(
        direction, instruments.ceilings, seconds=taken.median, spread=taken.spread, host=taken.host, extra=extra
    )
    for name in subject.peers:
        found = {variant: measured for (peer, variant), measured in timings.items() if peer == name}
        if not found:
            yield question.comparison(direction, name, taken, failure=failures[name])
            continue
        best = fastest(found)
        yield question.comparison(
            direction, name, taken, variant=best, peer_s=found[best].median, peer_spread=found[best].spread,
            peer_host=found[best].host, work=peers[name].work,
            tried={variant: measured.median for variant, measured in found.items()},
        )  # fmt: skip


def whole(direction: str, subject: Subject, ours: Callable[[], object]) -> Callable[[], object]:
    """Forward with all its results, as they are no extra memory; in the other directions the gradients are all."""
    return without_gradients(lambda: subject.ours(*subject.inputs)) if direction == FORWARD else ours


def preparation(question: Question, what: str, build: Callable[[], object], instruments: Instruments) -> Preparation:
    """By the clock, the second time."""

    def finished() -> None:
        build()
        instruments.wait()

    finished()
    return Preparation(
        operator=question.operator, what=what, seconds=seconds_a_call(finished), **question.case.labels()
    )


def in_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results
