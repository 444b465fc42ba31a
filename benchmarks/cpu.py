"""Operators on the CPU against the same thing composed of eager PyTorch calls.

    python -m benchmarks.cpu                 every case, about 4 minutes; writes benchmarks/results/cpu.{md,json,png}
    python -m benchmarks.cpu --quick         short sequences only, prints and writes nothing

Both sides of every ratio are measured in one process, interleaved; figures are medians, the spread is (slowest -
fastest) / median of ours. Ratios above 1 mean that statecore is faster.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.timing import interleaved, machine
from statecore import ops

RESULTS = Path(__file__).parent / "results"
PROMPT = STEP = 256
ALPHA = (torch.arange(64) / 40).clamp(max=0.4)


@dataclass(frozen=True)
class Row:
    """One line of the result table; times in milliseconds."""

    operator: str
    peer: str
    direction: str
    dtype: str
    time: int
    heads: str
    width: int
    threads: int
    ours_ms: float
    spread: float
    peer_ms: float

    @property
    def ratio(self) -> float:
        return self.peer_ms / self.ours_ms


def step_ids(time: int) -> Tensor:
    return ((torch.arange(time) - PROMPT).div(STEP, rounding_mode="floor") + 1).clamp(min=0).int()[None]


def operators(
    time: int, dtype: torch.dtype, heads: tuple[int, int], width: int
) -> Iterator[tuple[str, str, Callable, Callable, list[Tensor]]]:
    """(operator, peer, ours, theirs, differentiable inputs); both take no arguments and return the output."""
    q, k, v = (torch.randn(1, time, h, width).to(dtype).requires_grad_() for h in (heads[0], heads[1], heads[1]))
    ids = step_ids(time)
    inputs = [q, k, v]
    yield (
        "segment_attention", "SDPA with the mask",
        lambda: ops.segment_attention(q, k, v, ids)[0], lambda: peers.masked_segment_attention(q, k, v, ids), inputs,
    )  # fmt: skip
    yield (
        "linear_attention", "eager chunked",
        lambda: ops.linear_attention(q, k, v)[0], lambda: peers.chunked_linear_attention(q, k, v), inputs,
    )  # fmt: skip
    yield (
        "step_linear_attention", "eager chunked by step",
        lambda: ops.step_linear_attention(q, k, v, ids, ALPHA)[0],
        lambda: peers.chunked_step_linear_attention(q, k, v, ALPHA, PROMPT, STEP), inputs,
    )  # fmt: skip
    gate = torch.randn(1, time, heads[0], width).to(dtype).requires_grad_()
    yield (
        "mixed_attention", "SDPA with the mask + eager chunked by step",
        lambda: ops.mixed_attention(q, k, v, q, k, v, gate, ids, ALPHA)[0],
        lambda: peers.masked_segment_attention(q, k, v, ids)
        + gate.sigmoid() * peers.chunked_step_linear_attention(q, k, v, ALPHA, PROMPT, STEP),
        [*inputs, gate],
    )  # fmt: skip


def measure(
    time: int, dtype: torch.dtype, heads: tuple[int, int], width: int, threads: int, rounds: int
) -> Iterator[Row]:
    torch.set_num_threads(threads)
    for operator, peer, ours, theirs, inputs in operators(time, dtype, heads, width):
        with torch.no_grad():
            error = (ours() - theirs()).norm() / theirs().norm()
            assert error < 0.03, f"{operator} and its peer differ by {error:.3f}: they do not compute the same thing"
            forward = interleaved({"ours": ours, "peer": theirs}, rounds=rounds)
        gradient = torch.randn_like(ours())

        def both(run: Callable[[], Tensor], gradient: Tensor = gradient, inputs: list[Tensor] = inputs) -> None:
            torch.autograd.grad(run(), inputs, gradient)

        backward = interleaved({"ours": lambda: both(ours), "peer": lambda: both(theirs)}, rounds=rounds)  # noqa: B023
        for direction, timing in (("forward", forward), ("forward + backward", backward)):
            mine = timing["ours"]
            yield Row(
                operator, peer, direction, str(dtype).removeprefix("torch."), time, "/".join(map(str, heads)), width,
                threads, mine.median * 1e3, (mine.slowest - mine.fastest) / mine.median, timing["peer"].median * 1e3,
            )  # fmt: skip


def measure_update(rows: int, dtype: torch.dtype, heads: tuple[int, int], width: int, threads: int, rounds: int) -> Row:
    torch.set_num_threads(threads)
    states = torch.zeros(1, rows, heads[1], width, width)
    q, k, v = (torch.randn(rows, h, width).to(dtype) * 0.1 for h in (heads[0], heads[1], heads[1]))
    timing = interleaved(
        {"ours": lambda: ops.state_update(states, q, k, v), "peer": lambda: peers.eager_state_update(states, q, k, v)},
        rounds=rounds * 5,
    )
    mine = timing["ours"]
    return Row(
        "state_update", "eager outer product and read", "in place", str(dtype).removeprefix("torch."), rows,
        "/".join(map(str, heads)), width, threads, mine.median * 1e3, (mine.slowest - mine.fastest) / mine.median,
        timing["peer"].median * 1e3,
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    lines = [
        "| operator | direction | dtype | T or rows | heads | D | threads | ms | spread | peer | its ms | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.operator} | {r.direction} | {r.dtype} | {r.time} | {r.heads} | {r.width} "
        f"| {r.threads} | {r.ours_ms:.3g} | {r.spread:.0%} | {r.peer} | {r.peer_ms:.3g} | **{r.ratio:.2f}** |"
        for r in rows
    ]
    return "\n".join(lines)


def write(rows: list[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    facts = machine()
    RESULTS.mkdir(exist_ok=True)
    record = {"machine": facts, "rows": [asdict(r) for r in rows]}
    (RESULTS / "cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    slowest = min(rows, key=lambda r: r.ratio)
    page = [
        "# Operators on the CPU",
        "",
        "Command: `python -m benchmarks.cpu`. Prompt and steps of 256 tokens, batch 1.",
        "Machine: " + "; ".join(f"{name}: {value}" for name, value in facts.items()) + ".",
        "",
        f"Smallest ratio of all: {slowest.ratio:.2f} "
        f"({slowest.operator}, {slowest.direction}, {slowest.dtype}, {slowest.time} tokens).",
        "",
        "![time of both sides against length](cpu.png)",
        "",
        table(rows),
        "",
    ]
    (RESULTS / "cpu.md").write_text("\n".join(page))
    names = list(dict.fromkeys(r.operator for r in rows if r.direction == "forward + backward"))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.4), constrained_layout=True)
    for axis, name in zip(axes, names, strict=True):
        for dtype in dict.fromkeys(r.dtype for r in rows):
            shown = [r for r in rows if r.operator == name and r.dtype == dtype and r.direction == "forward + backward"]
            shown = [r for r in shown if (r.threads, r.heads, r.width) == (2, "12/2", 128)]
            axis.loglog([r.time for r in shown], [r.ours_ms for r in shown], "o-", label=f"statecore {dtype}")
            axis.loglog([r.time for r in shown], [r.peer_ms for r in shown], "x--", label=f"eager {dtype}")
        lengths = sorted({r.time for r in rows if r.operator == name})
        axis.set(title=name, xlabel="tokens", ylabel="ms, forward + backward")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    figure.savefig(RESULTS / "cpu.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short sequences only, prints and writes nothing")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    rows = []
    for threads in (1, 2):
        for heads, width in (((12, 2), 128), ((16, 16), 64)):
            for dtype in (torch.float32, torch.bfloat16):
                for time in (512,) if quick else (512, 2048, 4096):
                    if time == 4096 and (threads == 1 or heads[1] > 2):
                        continue  # the masked peer alone takes minutes
                    found = list(measure(time, dtype, heads, width, threads, rounds=3 if time > 512 else 5))
                    print("\n".join(table(found).splitlines()[2:]), flush=True)
                    rows += found
                for batch in (1, 64):
                    rows.append(measure_update(batch, dtype, heads, width, threads, rounds=5))
                    print(table(rows[-1:]).splitlines()[2], flush=True)
    if not quick:
        write(rows)


if __name__ == "__main__":
    main()
