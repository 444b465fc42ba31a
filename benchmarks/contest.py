"""One operator against its peers in one direction: same inputs, same process, interleaved."""

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.rows import Comparison
from benchmarks.timing import Timing, fastest, interleaved
from benchmarks.workload import Case

FORWARD, BOTH, BACKWARD = "forward", "forward + backward", "backward"
OURS = "ours"
SAME = 0.03  # relative error beyond which two sides do not compute the same thing
MESSAGE = 200  # characters of a reason
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Contest:
    """ours and every variant of every peer take nothing and return the output of `operator`.

    peers: {peer: {variant: run}}; failures: {peer: why it cannot run}; work: {peer: our work / its work}, 1 where it is
    not there; apart: peers that compute something else, whose results are not compared.
    """

    operator: str
    case: Case
    ours: Run
    inputs: tuple[Tensor, ...]
    peers: dict[str, dict[str, Run]]
    failures: dict[str, str] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    apart: frozenset[str] = frozenset()

    def runs(self) -> dict[tuple[str, str], Run]:
        theirs = {(peer, name): run for peer, variants in self.peers.items() for name, run in variants.items()}
        return {(OURS, ""): self.ours} | theirs

    def rows(self, directions: dict[str, dict[str, float | None]]) -> Iterator[Comparison]:
        """directions: {direction: {peer: target}}; peers that a direction does not name stay out of it."""
        torch.set_num_threads(self.case.threads)
        self.check()
        for direction, targets in directions.items():
            runs = {key: run for key, run in self.runs().items() if key[0] == OURS or key[0] in targets}
            timings = interleaved(self.directed(direction, runs))
            ours = timings.pop((OURS, ""))
            for peer, target in targets.items():
                yield self.row(direction, peer, target, ours, {n: t for (p, n), t in timings.items() if p == peer})

    def row(
        self, direction: str, peer: str, target: float | None, ours: Timing, variants: dict[str, Timing]
    ) -> Comparison:
        fields = {
            "operator": self.operator, "direction": direction, "peer": peer, "target": target,
            "ours_s": ours.median, "ours_spread": ours.spread, "failure": self.failures.get(peer, ""),
        } | self.case.labels()  # fmt: skip
        if fields["failure"]:
            return Comparison(**fields)
        best = fastest(variants)
        return Comparison(
            **fields, variant=best, peer_s=variants[best].median, peer_spread=variants[best].spread,
            work=self.work.get(peer, 1.0), tried={name: timing.median for name, timing in variants.items()},
        )  # fmt: skip

    def directed(self, direction: str, runs: dict[tuple[str, str], Run]) -> dict[tuple[str, str], Callable]:
        gradient = None if direction == FORWARD else torch.randn_like(self.ours())
        return {key: directed(direction, run, self.inputs, gradient) for key, run in runs.items()}

    def check(self) -> None:
        """Every peer computes what ours does."""
        with torch.no_grad():
            expected = self.ours().float()
            for (peer, variant), run in self.runs().items():
                if peer == OURS or peer in self.apart:
                    continue
                error = (run().float() - expected).norm() / expected.norm()
                if not error < SAME:
                    raise AssertionError(f"{self.operator} and {peer} {variant} differ by {error:.3f}, relatively")


def directed(direction: str, run: Run, inputs: tuple[Tensor, ...], gradient: Tensor | None) -> Callable[[], object]:
    """What is timed of a run in a direction; gradients are those of the inputs."""
    if direction == FORWARD:
        return without_gradients(run)
    return (both_ways if direction == BOTH else backward_alone)(run, inputs, gradient)


def without_gradients(run: Run) -> Run:
    return torch.no_grad()(run)


def both_ways(run: Run, inputs: tuple[Tensor, ...], gradient: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(run(), inputs, gradient)


def backward_alone(run: Run, inputs: tuple[Tensor, ...], gradient: Tensor) -> Callable[[], object]:
    out = run()
    return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)


def attempt(run: Run) -> str:
    """Calls it once; what it raised, in one line, or an empty string."""
    try:
        with torch.no_grad():
            run()
    except Exception as error:
        return in_one_line(error)
    return ""


def in_one_line(error: Exception) -> str:
    """Its first line, or what of that fits a table."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {textwrap.shorten(first, MESSAGE, placeholder=' ...')}"
