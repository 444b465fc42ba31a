"""One question: an operator at one shape, compared with its definition, then timed in turns with its peers.

What measures is passed in (Instruments): the CPU's clock or a GPU's events.
"""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import memory, timing
from benchmarks.record import COMPARISON, KERNEL, QUANTITY, Number, Row
from benchmarks.roofline import BOTH, FORWARD, Ceilings, NoPeak, Passes, bound
from benchmarks.timing import NotTimed, Run, Timing, seconds_per_call
from benchmarks.workload import Case

OURS = "statecore"
RIGHT, RIGHT_GRADIENT = 0.01, 0.02  # relative errors against the definition in float64, of results rounded to 16 bits
SAME = 0.03  # relative error beyond which two sides do not compute the same thing
CORNER_HEADS, CORNER_TOKENS, ODD = 2, 1500, 37  # most that is compared: key heads, tokens, those after the second step
ABSENT, WRONG, OTHER = "not installed: ", "wrong, not timed: ", "computes something else, not timed: "
NO_TIME = "left out, the time of the run was spent"
JUDGED = {
    "ms": "time",
    "us": "time",
    "TFLOP/s": "rate",
    "percent": "share of roofline",
}  # number that a target's unit is about


@dataclass(frozen=True)
class Instruments:
    """How to measure; the defaults are a GPU's. left: seconds of the run that remain."""

    ceilings: Callable[[Case], Ceilings]
    left: Callable[[], float]
    time: Callable[[dict], dict] = timing.interleaved_on_gpu
    captured: Callable[[Sequence[Run]], tuple[Run, int | None]] = timing.captured
    extra: Callable[[Run], int | None] = memory.gpu_extra
    wait: Run = torch.cuda.synchronize

    @staticmethod
    def of_cpu(ceilings: Callable[[Case], Ceilings], left: Callable[[], float]) -> "Instruments":
        """A single call in place of a graph; memory beyond is not measured."""
        one, none = (lambda calls: (calls[0], None)), (lambda *_: None)
        return Instruments(ceilings, left, timing.interleaved, one, none, none)


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

    def run(self) -> Tensor:
        return self.ours(*self.inputs, *self.context)[0]


def contest(question: "Question", instruments: Instruments) -> Iterator[Row]:
    """Rows of what the peers prepare, then per direction ours and each peer, or why a peer did not run."""
    subject = question.subject(question.case)
    on_gpu = not question.case.threads  # on the CPU definitions take minutes; the tests compare with them
    if on_gpu:
        check_output(subject)
    peers, failures = made(question.chosen(subject.peers))
    for name, peer in peers.items():
        for what, build in peer.prepared.items():
            build()
            seconds = seconds_per_call(lambda: (build(), instruments.wait()))  # noqa: B023
            yield question.row(QUANTITY, what=f"{name}: {what}", numbers={"time": (seconds, "ms")})
    for direction in question.directions:
        try:
            if on_gpu and direction != FORWARD:
                check_gradients(subject)
            rows = list(one_direction(question, direction, subject, peers, failures, instruments))
        except Exception as error:  # ours, or a peer that had run once
            rows = [question.kernel(direction, failure=in_one_line(error))]
        yield from rows


@dataclass(frozen=True)
class Question:
    """One operator on one shape, how to measure it, and its targets.

    section: of the page; work: {direction: passes} of a case; measure: yields the rows; peers: names of those that take
    part, None for all; aims: {direction: (unit, target)} of ours; ratios: {(direction, peer): target}; rank: 1 runs
    first; needs: seconds, the question is left out where fewer remain.
    """

    section: str
    operator: str
    case: Case
    work: Callable[[Case], dict[str, Passes]] = lambda case: {}
    directions: tuple[str, ...] = (FORWARD,)
    subject: Callable[[Case], Subject] | None = None
    measure: Callable[["Question", Instruments], Iterator[Row]] = contest
    peers: tuple[str, ...] | None = None
    aims: dict[str, tuple[str, float | None]] = field(default_factory=dict)
    ratios: dict[tuple[str, str], float] = field(default_factory=dict)
    rank: int = 1
    needs: float = 10.0

    @property
    def name(self) -> str:
        case = self.case
        heads = "/".join(map(str, case.heads))
        return f"{self.operator}: B {case.batch}, T {case.time}, heads {heads}, D {case.width}"

    def chosen(self, makers: dict[str, Callable[[], Peer]]) -> dict[str, Callable[[], Peer]]:
        return {name: make for name, make in makers.items() if self.peers is None or name in self.peers}

    def row(self, kind: str, **fields) -> Row:
        return Row(**{"kind": kind, "operator": self.operator, "case": self.case.labels()} | fields)

    def kernel(self, direction: str, numbers: dict[str, Number] | None = None, failure: str = "") -> Row:
        unit, target = self.aims.get(direction, ("ms", None))
        aim = {"judged": JUDGED[unit], "unit": unit, "target": target}
        return self.row(KERNEL, direction=direction, numbers=numbers or {}, failure=failure, **aim)

    def timed(
        self, direction: str, instruments: Instruments, taken: Timing, extra: int | None = None, **more: Number
    ) -> Row:
        """Our time, and how close it is to the roofline. extra: bytes of memory beyond inputs and results."""
        unit, _ = self.aims.get(direction, ("ms", None))
        passes, least, prefix = self.work(self.case).get(direction, ()), 0.0, "G" if self.case.threads else "T"
        with suppress(NoPeak):
            least = bound(passes, instruments.ceilings(self.case)) if passes else 0.0
        numbers = {"time": (taken.median, "us" if unit == "us" else "ms"), "spread": (taken.spread, "percent")}
        if taken.host:
            numbers["CPU time"] = taken.host, "ms"
        if work := sum(one.flops for one in passes):
            numbers |= {"work": (work, "GFLOP"), "rate": (work / taken.median, f"{prefix}FLOP/s")}
        if moved := sum(one.bytes for one in passes):
            numbers |= {"moved": (moved, "MB"), "bandwidth": (moved / taken.median, f"{prefix}B/s")}
        if least:
            numbers |= {"roofline": (least, "ms"), "share of roofline": (least / taken.median, "percent")}
        if extra is not None:
            numbers["extra memory"] = extra, "MB"
        return self.kernel(direction, numbers | more)

    def comparison(
        self, direction: str, peer: str, ours: Row, timings: dict[tuple[str, str], Timing], failure: str = "",
        work: float = 1.0,
    ) -> Row:  # fmt: skip
        """ours: the row of this direction. timings: by side and variant; failure: why the peer is not among them."""
        theirs = {variant: taken for (name, variant), taken in timings.items() if name == peer}
        tried, numbers = {variant: taken.median for variant, taken in theirs.items()}, {}
        if theirs:
            best, (seconds, _) = min(tried, key=tried.get), ours.numbers["time"]
            its = theirs[best]
            numbers = {"time": (seconds, "ms"), "spread": ours.numbers["spread"]}
            numbers |= {"peer time": (its.median, "ms"), "peer spread": (its.spread, "percent")}
            numbers |= {"peer CPU time": (its.host, "ms")} if its.host else {}
            numbers |= {"peer variant": (best, "text")} if best else {}
            numbers |= {"our share of its work": (work, "percent")} if work != 1 else {}
            numbers |= {"ratio": (its.median / seconds * work, "times")}
            if "roofline" in ours.numbers:
                numbers["at our roofline"] = its.median / ours.numbers["roofline"][0] * work, "times"
        return self.row(
            COMPARISON, direction=direction, what=peer, numbers=numbers, failure="" if theirs else failure,
            tried=tried, judged="ratio", unit="times", target=self.ratios.get((direction, peer)),
        )  # fmt: skip


def made(makers: dict[str, Callable[[], object]]) -> tuple[dict[str, object], dict[str, str]]:
    """What the makers return, and why those that raised did."""
    found, failures = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:
            failures[name] = in_one_line(error)
    return found, failures


def in_one_line(error: Exception) -> str:
    """Its first line, shortened to fit a table."""
    if isinstance(error, NotTimed):
        return str(error)
    if isinstance(error, ImportError):
        return ABSENT + str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {textwrap.shorten(first, 200, placeholder=' ...')}"


# ---- timing


def one_direction(
    question: Question, direction: str, subject: Subject, peers: dict[str, Peer], failures: dict[str, str],
    instruments: Instruments,
) -> Iterator[Row]:  # fmt: skip
    gradient = None if direction == FORWARD else torch.randn_like(subject.run())
    ours = directed(direction, subject.run, subject.inputs, gradient)
    mine = ours()
    if not all(bool(x.isfinite().all()) for x in mine):
        raise NotTimed(f"{WRONG}infinite or not a number")
    runs, failures = {(OURS, ""): ours}, dict(failures)
    peers = {name: peer for name, peer in peers.items() if direction == FORWARD or not peer.forward_only}
    for name, peer in peers.items():
        for variant, run in peer.runs.items():
            try:
                if instruments.left() <= 0:
                    raise NotTimed(NO_TIME)
                candidate = directed(direction, run, peer.inputs, gradient)
                theirs = candidate()
                instruments.wait()
                for index, (its, own) in enumerate(zip(theirs, mine, strict=False)):
                    if its.shape == own.shape and not peer.apart:  # expanded keys have gradients of their own
                        agree(its, own, SAME, f"{OTHER}result {index} differs")
                runs[name, variant] = candidate
            except Exception as error:
                failures[name] = in_one_line(error)
    del mine
    timings = instruments.time(runs)
    whole = torch.no_grad()(lambda: subject.ours(*subject.inputs, *subject.context))  # its results are no extra memory
    extra = instruments.extra(whole if direction == FORWARD else ours)
    row = question.timed(direction, instruments, timings[OURS, ""], extra)
    yield row
    for name in subject.peers:
        if name in peers or name in failures:
            work = peers[name].work if name in peers else 1.0
            yield question.comparison(direction, name, row, timings, failures.get(name, ""), work)


def directed(
    direction: str, run: Run, inputs: tuple[Tensor, ...] = (), gradient: Tensor | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed of a run in a direction; gradients are those of the inputs."""
    if direction == FORWARD:
        return torch.no_grad()(lambda: (run(),))
    if direction == BOTH:
        return lambda: torch.autograd.grad(run(), inputs, gradient)
    out = run()
    return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)


# ---- correctness: NotTimed is raised for wrong results


def corner_of(case: Case) -> Callable[[Tensor], Tensor]:
    """Cuts [B, T, H, ...] to the last row, its last key heads with their groups, and the tokens up to a little after
    the second step. Causal operators give the same results there for the corner of their inputs alone.
    """
    tokens = min(case.time, case.prompt + 2 * case.step + ODD, CORNER_TOKENS)
    keys = min(CORNER_HEADS, case.heads[1])

    def cut(x: Tensor) -> Tensor:
        x = x[-1:, :tokens] if x.dim() > 1 else x  # else it has no T
        return x[:, :, -(x.shape[2] * keys // case.heads[1]) :] if x.dim() > 2 else x

    return cut


def corner(subject: Subject) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """Our output and inputs for the corner alone, then the definition's in float64."""
    cut = corner_of(subject.case)
    mine = [cut(x).detach().clone().requires_grad_() for x in subject.inputs]
    exact = [x.detach().double().requires_grad_() for x in mine]
    context = [cut(x).contiguous() for x in subject.context]
    exact_context = [x.double() if x.is_floating_point() else x for x in context]
    return subject.ours(*mine, *context)[0], mine, subject.definition(*exact, *exact_context)[0], exact


@torch.no_grad()
def check_output(subject: Subject) -> None:
    """The corner of the timed output, and the output computed from the corner of the inputs."""
    out, _, expected, _ = corner(subject)
    for what, found in {"the output": corner_of(subject.case)(subject.run()), "a corner's output": out}.items():
        agree(found, expected, RIGHT, f"{WRONG}{what} differs from the definition")


def check_gradients(subject: Subject) -> None:
    """Of the corner of the inputs."""
    out, mine, expected, exact = corner(subject)
    gradient = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    for index, found in enumerate(torch.autograd.grad(out, mine, gradient)):
        agree(found, wanted[index], RIGHT_GRADIENT, f"{WRONG}gradient {index} differs from the definition")


def agree(found: Tensor, wanted: Tensor, tolerance: float, complaint: str) -> None:
    found, wanted = found.detach().double(), wanted.detach().double()
    error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not error <= tolerance:
        raise NotTimed(f"{complaint} by {error:.2g}")
