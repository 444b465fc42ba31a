"""Operators on the current GPU against their peers and its ceilings, within a time.

    python -m benchmarks.gpu                              everything, at most five minutes; writes benchmarks/results/
    python -m benchmarks.gpu --only segment_attention     one operator, and the rest of the page as it was
    python -m benchmarks.gpu --budget 120 --out folder    the most important rows first; what was left out is named
    python -m benchmarks.gpu --expected                   no GPU: what its ceilings allow, calculated

Written are gpu.json and gpu.md made of it (gpu_expected.md), whole or not at all.
"""

import argparse
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import (
    bench_linear_attention,
    bench_mixed_attention,
    bench_segment_attention,
    bench_state_update,
    record,
)
from benchmarks.contest import Run, in_one_line
from benchmarks.gpu_contest import Instruments, Question
from benchmarks.gpu_page import expected_page, line, page, tables_of
from benchmarks.machine import gpu_facts
from benchmarks.roofline import Ceilings
from benchmarks.rows import Ceiling, Row
from benchmarks.timing import Timing, by_events
from statecore.outputs import write_text

NAME, EXPECTED = "gpu", "gpu_expected"
OPERATORS = {
    "linear_attention": bench_linear_attention,
    "segment_attention": bench_segment_attention,
    "mixed_attention": bench_mixed_attention,
    "state_update": bench_state_update,
}
CEILINGS = "ceilings"
BUDGET = 280.0  # seconds
COPIED, SQUARE = 4 << 30, 8192  # bytes of the copy, side of the matrix product
NO_GPU = "benchmarks.gpu: torch finds no GPU here, so nothing is measured; --expected calculates what to expect of one"


def questions(names: Sequence[str]) -> dict[str, list[Question]]:
    return {name: OPERATORS[name].questions() for name in names}


def ceilings(
    device: str, timed: Callable[[dict[Hashable, Run]], dict[Hashable, Timing]], copied: int, square: int
) -> tuple[Ceilings, list[Ceiling]]:
    """Measured: a copy of so many bytes, and a matrix product of random bfloat16, as zeros would be faster."""
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(square, square, device=device).to(torch.bfloat16) for _ in range(2))
    taken = timed({"copy": lambda: target.copy_(source), "product": lambda: left @ right})
    copy, product = taken["copy"], taken["product"]
    found = Ceilings(2 * square**3 / product.median, 2 * copied / copy.median)
    labels = {"operator": "", "heads": "", "width": 0}
    rows = [
        Ceiling(
            what=f"copy of {copied >> 20} MiB, bytes read and written", rate=found.bytes, spread=copy.spread,
            judged="TB/s", dtype="", time=0, **labels,
        ),
        Ceiling(
            what=f"matrix product {square} x {square} x {square} of bfloat16", rate=found.flops, spread=product.spread,
            judged="TFLOP/s", dtype="bfloat16", time=square, **labels,
        ),
    ]  # fmt: skip
    return found, rows


def measure(
    asked: dict[str, list[Question]], instruments: Instruments, machine: dict[str, str],
    keep: Callable[[dict[str, dict]], None] = lambda sections: None,
) -> dict[str, dict]:  # fmt: skip
    """{section: record.section and "left_out"}: the most important questions of all sections first, and whatever one
    of them meets, the others are asked. Prints a line a row, and keeps what there is after every question: a kernel
    that never ends takes only itself along.
    """
    rows: dict[str, list[Row]] = {name: [] for name in asked}
    seconds, left_out = dict.fromkeys(asked, 0.0), {name: [] for name in asked}

    def sections() -> dict[str, dict]:
        return {
            name: record.section(rows[name], seconds[name], machine) | {"left_out": left_out[name]} for name in asked
        }

    everything = [(name, question) for name, found in asked.items() for question in found]
    for name, question in sorted(everything, key=lambda pair: (pair[1].rank, pair[1].needs)):
        if instruments.left() < question.needs:
            left_out[name].append(question.name)
            print(f"{name}: left out: {question.name}", flush=True)
            continue
        start = time.perf_counter()
        for row in _answers(question, instruments):
            print(f"{instruments.left():6.1f} s left  {line(row)}", flush=True)
            rows[name].append(row)
        seconds[name] += time.perf_counter() - start
        keep(sections())
    return sections()


def _answers(question: Question, instruments: Instruments) -> Iterator[Row]:
    try:
        torch.manual_seed(0)
        yield from question.measure(question, instruments)
    except Exception as error:
        yield from question.failed(in_one_line(error), instruments.ceilings)


def only(name: str) -> None:
    """One operator's table; the script of an operator is no more than this."""
    main(["--only", name, *sys.argv[1:]])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=OPERATORS, metavar="NAME", help=", ".join(OPERATORS))
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="FOLDER", help="for gpu.json and gpu.md")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"{BUDGET:.0f} if not given")
    parser.add_argument(
        "--expected", action="store_true", help="print the calculated table, written where it is whole; needs no GPU"
    )
    chosen = parser.parse_args(arguments)
    asked = questions(chosen.only or list(OPERATORS))
    if chosen.expected:
        text = expected_page(asked)
        print(text)
        if not chosen.only:
            write_text(chosen.out / f"{EXPECTED}.md", text)
        return
    if not torch.cuda.is_available():
        sys.exit(NO_GPU)
    start = time.perf_counter()
    machine = gpu_facts()
    reached, rows = ceilings("cuda", by_events, COPIED, SQUARE)
    instruments = Instruments(reached, left=lambda: chosen.budget - (time.perf_counter() - start))
    found = record.stored(chosen.out, NAME)
    found["sections"][CEILINGS] = record.section(rows, time.perf_counter() - start, machine)

    def keep(sections: dict[str, dict]) -> None:
        found["sections"] |= sections
        record.write(found, chosen.out, NAME, page)

    measured = measure(asked, instruments, machine, keep)
    keep(measured)
    for name in asked:
        print("", *tables_of(measured[name]), sep="\n")


if __name__ == "__main__":
    main()
