"""One question: an operator at one shape, compared with its definition, then timed in turns with its peers.

What measures is passed in (Instruments): the CPU's clock or a GPU's events. Everything else is the same on both.
"""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks import memory, roofline, timing
from benchmarks.record import COMPARISON, KERNEL, QUANTITY, Number, Row
from benchmarks.roofline import BOTH, FORWARD, NoPeak
from benchmarks.timing import NotTimed, Run, Timing, fastest, seconds_per_call
from benchmarks.workload import Case

OURS = "statecore"
RIGHT, RIGHT_GRADIENT = 0.01, 0.02  # relative errors against the definition in float64, of results rounded to 16 bits
SAME = 0.03  # relative error beyond which two sides do not compute the same thing
CORNER_HEADS, CORNER_TOKENS, ODD = 2, 1500, 37  # most that is compared: key heads, tokens, those behind the second step
ABSENT, OTHER = "not installed: ", "computes something else, not timed: "
NO_TIME = "left out, the time of the run was spent"
MESSAGE = 200  # characters of a reason
JUDGED = {"ms": "time", "us": "time", "TFLOP/s": "rate", "percent": "share of it"}  # by the unit of a target
Timings = dict[tuple[str, str], Timing]  # by side and variant


@dataclass(frozen=True)
class Instruments:
    """What measures, on a GPU if not given. left: seconds of the run that remain."""

    ceilings: Callable[[Case], roofline.Ceilings]
    left: Callable[[], float]
    time: Callable[[dict], dict] = timing.interleaved_on_gpu
    captured: Callable[[Sequence[Run]], timing.Replay] = timing.captured
    extra: Callable[[Run], int | None] = memory.gpu_extra
    wait: Run = torch.cuda.synchronize


@dataclass(frozen=True)
class Peer:
    """runs: by variant; inputs: what gradients are taken of, q first; work: our work / its work; apart: it computes
    something else; forward_only: it stays out of the other directions; prepared: what it builds beforehand.
    """

    runs: dict[str, Run]
    inputs: tuple[Tensor, ...] = ()
    work: float = 1.0
    apart: bool = False
    forward_only: bool = False
    prepared: dict[str, Run] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """An operator and its definition: both take (*inputs, *context) and return the output first; gradients are those of
    the inputs. peers: what makes them; it raises where a peer is missing or refuses.
    """

    case: Case
    ours: Callable[..., tuple[Tensor, ...]]
    definition: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    context: tuple[Tensor, ...] = ()
    peers: dict[str, Callable[[], Peer]] = field(default_factory=dict)

    def results(self) -> tuple[Tensor, ...]:
        return self.ours(*self.inputs, *self.context)

    def run(self) -> Tensor:
        return self.results()[0]

    def corner(self) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and context of the corner alone."""
        cut = corner_of(self.case)
        return [cut(x).detach().clone() for x in self.inputs], [cut(x).contiguous() for x in self.context]


def contest(question: "Question", instruments: Instruments) -> Iterator[Row]:
    """What peers build, ours in every direction, and each peer that runs; of those that do not, why."""
    subject = question.subject(question.case)
    if broken := reason_of(lambda: wrong(subject)):
        yield from question.failed(broken)
        return
    peers, failures = made(subject.peers)
    for name, peer in peers.items():
        for what, build in peer.prepared.items():

            def finished(build: Run = build) -> None:
                build()
                instruments.wait()

            finished()
            yield question.quantity(f"{name}: {what}", {"time": (seconds_per_call(finished), "ms")})
    steep = reason_of(lambda: wrong_gradients(subject)) if question.directions != (FORWARD,) else ""
    for direction in question.directions:
        if steep and direction != FORWARD:
            yield question.kernel(direction, failure=steep)
            continue
        try:
            rows = list(one_direction(question, direction, subject, peers, failures, instruments))
        except Exception as error:  # of ours, or of a peer that has run before
            rows = [question.kernel(direction, failure=in_one_line(error))]
        yield from rows


@dataclass(frozen=True)
class Question:
    """What is to be found out. section: of the page; work: {direction: passes} of a case; measure: its rows; aims:
    {direction: (unit, target)} of ours; ratios: {(direction, peer): target}; rank: 1 is asked first; needs: seconds, it
    is not asked where fewer remain.
    """

    section: str
    operator: str
    case: Case
    work: Callable[[Case], dict[str, roofline.Passes]] = lambda case: {}
    directions: tuple[str, ...] = (FORWARD,)
    subject: Callable[[Case], Subject] | None = None
    measure: Callable[["Question", Instruments], Iterator[Row]] = contest
    aims: dict[str, tuple[str, float | None]] = field(default_factory=dict)
    ratios: dict[tuple[str, str], float] = field(default_factory=dict)
    rank: int = 1
    needs: float = 10.0

    @property
    def name(self) -> str:
        case = self.case
        heads = "/".join(map(str, case.heads))
        return f"{self.operator}: B {case.batch}, T {case.time}, heads {heads}, D {case.width}"

    def passes(self, direction: str) -> roofline.Passes:
        return self.work(self.case).get(direction, ())

    def bound(self, direction: str, instruments: Instruments) -> float:
        """The least seconds of ours, 0 where its work is not counted. Raises NoPeak."""
        passes = self.passes(direction)
        return roofline.bound(passes, instruments.ceilings(self.case)) if passes else 0.0

    def row(self, kind: str, **fields) -> Row:
        return Row(**{"kind": kind, "operator": self.operator, "case": self.case.labels()} | fields)

    def quantity(self, what: str, numbers: dict[str, Number], **fields) -> Row:
        return self.row(QUANTITY, what=what, numbers=numbers, **fields)

    def kernel(self, direction: str, numbers: dict[str, Number] | None = None, failure: str = "") -> Row:
        unit, target = self.aims.get(direction, ("ms", None))
        aim = {"judged": JUDGED[unit], "unit": unit, "target": target}
        return self.row(KERNEL, direction=direction, numbers=numbers or {}, failure=failure, **aim)

    def timed(self, direction: str, instruments: Instruments, taken: Timing, **more: Number) -> Row:
        """Ours, and what that is of the machine's ceilings."""
        unit, _ = self.aims.get(direction, ("ms", None))
        passes, prefix = self.passes(direction), "G" if self.case.threads else "T"
        work, moved = sum(one.flops for one in passes), sum(one.bytes for one in passes)
        numbers = {"time": (taken.median, "us" if unit == "us" else "ms"), "spread": (taken.spread, "percent")}
        if taken.host:
            numbers["CPU time"] = taken.host, "ms"
        if passes:
            numbers |= {"work": (work, "GFLOP"), "rate": (work / taken.median, f"{prefix}FLOP/s")}
            numbers |= {"moved": (moved, "MB"), "bandwidth": (moved / taken.median, f"{prefix}B/s")}
        with suppress(NoPeak):
            if bound := self.bound(direction, instruments):
                numbers |= {"roofline": (bound, "ms"), "share of it": (bound / taken.median, "percent")}
        return self.kernel(direction, numbers | more)

    def comparison(
        self,
        direction: str,
        peer: str,
        instruments: Instruments,
        timings: Timings,
        failure: str = "",
        work: float = 1.0,
    ) -> Row:
        """failure: why the peer is not among the timings."""
        aim = {"judged": "ratio", "unit": "times", "target": self.ratios.get((direction, peer))}
        ours, theirs = timings[OURS, ""], {variant: its for (name, variant), its in timings.items() if name == peer}
        if not theirs:
            return self.row(COMPARISON, direction=direction, what=peer, failure=failure, **aim)
        best = fastest(theirs)
        its = theirs[best]
        numbers = {
            "time": (ours.median, "ms"), "spread": (ours.spread, "percent"),
            "its time": (its.median, "ms"), "its spread": (its.spread, "percent"),
        }  # fmt: skip
        if its.host:
            numbers["its CPU time"] = its.host, "ms"
        if best:
            numbers["its best form"] = best, "text"
        numbers["ratio"] = its.median / ours.median * work, "times"
        with suppress(NoPeak):
            if bound := self.bound(direction, instruments):
                numbers["at our roofline"] = its.median / bound * work, "times"
        tried = {variant: taken.median for variant, taken in theirs.items()}
        return self.row(COMPARISON, direction=direction, what=peer, numbers=numbers, tried=tried, **aim)

    def failed(self, reason: str) -> Iterator[Row]:
        return (self.kernel(direction, failure=reason) for direction in self.directions)


def among(subject: Callable[[Case], Subject], *names: str) -> Callable[[Case], Subject]:
    """With these peers alone."""

    def chosen(case: Case) -> Subject:
        found = subject(case)
        return replace(found, peers={name: make for name, make in found.peers.items() if name in names})

    return chosen


def made(makers: dict[str, Callable[[], object]]) -> tuple[dict[str, object], dict[str, str]]:
    """What each of them makes, and why the others did not."""
    found, failures = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:
            failures[name] = in_one_line(error)
    return found, failures


# ---- how fast is it?


def one_direction(
    question: Question, direction: str, subject: Subject, peers: dict[str, Peer], failures: dict[str, str],
    instruments: Instruments,
) -> Iterator[Row]:  # fmt: skip
    gradient = None if direction == FORWARD else torch.randn_like(subject.run())
    ours = directed(direction, subject.run, subject.inputs, gradient)
    mine = in_tuple(ours())
    if not all(bool(x.isfinite().all()) for x in mine):
        raise NotTimed("wrong, not timed: infinite or not a number")
    runs, failures = {(OURS, ""): ours}, dict(failures)
    peers = {name: peer for name, peer in peers.items() if direction == FORWARD or not peer.forward_only}
    for name, peer in peers.items():
        for variant, run in peer.runs.items():
            try:
                if instruments.left() <= 0:
                    raise NotTimed(NO_TIME)
                candidate = directed(direction, run, peer.inputs, gradient)
                theirs = in_tuple(candidate())
                instruments.wait()
                if not peer.apart:
                    agree(mine, theirs)
                runs[name, variant] = candidate
            except Exception as error:
                failures[name] = in_one_line(error)
    del mine
    timings = instruments.time(runs)
    # Forward with all results: they are no extra memory.
    extra = instruments.extra(directed(FORWARD, subject.results) if direction == FORWARD else ours)
    yield question.timed(direction, instruments, timings[OURS, ""], **{"memory beyond": (extra, "MB")})
    for name in subject.peers:
        if name in peers or name in failures:
            work = peers[name].work if name in peers else 1.0
            yield question.comparison(direction, name, instruments, timings, failures.get(name, ""), work)


def directed(direction: str, run: Run, inputs: tuple[Tensor, ...] = (), gradient: Tensor | None = None) -> Run:
    """What is timed of a run in a direction; gradients are those of the inputs."""
    if direction == FORWARD:
        return torch.no_grad()(run)
    if direction == BOTH:
        return lambda: torch.autograd.grad(run(), inputs, gradient)
    out = run()
    return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)


def in_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


# ---- is it right?


def corner_of(case: Case) -> Callable[[Tensor], Tensor]:
    """The last row, its last key heads with their groups, from the start to a little behind the second step: causal
    operators have the same results there for the corner of the inputs alone. Cuts [B, T, ...] with heads third.
    """
    tokens = min(case.time, case.prompt + 2 * case.step + ODD, CORNER_TOKENS)
    keys = min(CORNER_HEADS, case.heads[1])

    def cut(x: Tensor) -> Tensor:
        if x.dim() < 2:  # has no T
            return x
        x = x[-1:, :tokens]
        return x if x.dim() == 2 else x[:, :, -(x.shape[2] * keys // case.heads[1]) :]

    return cut


def wrong(subject: Subject) -> str:
    """What differs from the definition, or an empty string: the corner of the timed output, and that of a corner."""
    with torch.no_grad():
        inputs, context = subject.corner()
        expected = subject.definition(*exact(inputs), *exact(context))[0]
        timed, corner = corner_of(subject.case)(subject.run()), subject.ours(*inputs, *context)[0]
    return first_wrong({"the output": (timed, expected), "a corner's output": (corner, expected)}, RIGHT)


def wrong_gradients(subject: Subject) -> str:
    """The same of a corner's gradients."""
    inputs, context = subject.corner()
    mine, theirs = ([x.requires_grad_() for x in found] for found in (inputs, exact(inputs)))
    out = subject.ours(*mine, *context)[0]
    gradient = torch.randn_like(out)
    found = torch.autograd.grad(out, mine, gradient)
    wanted = torch.autograd.grad(subject.definition(*theirs, *exact(context))[0], theirs, *exact([gradient]))
    pairs = enumerate(zip(found, wanted, strict=True))
    return first_wrong({f"gradient {index}": pair for index, pair in pairs}, RIGHT_GRADIENT)


def exact(tensors: Sequence[Tensor]) -> list[Tensor]:
    """In float64, and on the CPU, because the definitions go from token to token."""
    tensors = [x.detach().cpu() for x in tensors]
    return [x.double() if x.is_floating_point() else x for x in tensors]


def first_wrong(pairs: dict[str, tuple[Tensor, Tensor]], tolerance: float) -> str:
    for what, (found, wanted) in pairs.items():
        error = relative_difference(found, wanted)
        if not error <= tolerance:
            return f"wrong, not timed: {what} differs from the definition by {error:.2g}"
    return ""


def agree(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """Of results with the same shapes; expanded keys have gradients of their own."""
    for index, (found, wanted) in enumerate(zip(theirs, mine, strict=False)):
        if found.shape == wanted.shape and not (error := relative_difference(found, wanted)) <= SAME:
            raise NotTimed(f"{OTHER}result {index} differs by {error:.2g}")


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double().to(found.device)
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def reason_of(check: Callable[[], str]) -> str:
    """What it finds, or the error it raises."""
    try:
        return check()
    except Exception as error:
        return in_one_line(error)


def in_one_line(error: Exception) -> str:
    """Its first line, or what of that fits a table."""
    if isinstance(error, NotTimed):
        return str(error)
    if isinstance(error, ImportError):
        return ABSENT + str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {textwrap.shorten(first, MESSAGE, placeholder=' ...')}"
