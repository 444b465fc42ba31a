"""What bounds an operator on the CPU: its share of the machine's peak, and forward time against length."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.contest import OURS, Instruments, Question, Subject, directed, made
from benchmarks.record import QUANTITY, Row
from benchmarks.roofline import FORWARD, Passes, product
from benchmarks.workload import ALL_THREADS, DTYPES, Case, cpu_case, cpu_cases

BY_LENGTH = "by length"  # the direction of rows that the picture shows
LONG, SHORTEST = 32_768, 512  # tokens
SQUARE = 1024  # of torch's matrix product
OF_PEAK = {torch.float32: 0.45, torch.bfloat16: 0.35}  # targets: this share at least,
TIMES_EIGHT = 8.8  # and at most this for eight times the length


def questions(
    operator: str, subject: Callable[[Case], Subject], work: Callable[[Case], dict[str, Passes]], *pictured: str
) -> list[Question]:
    """pictured: the peers in the picture."""
    ours = {"operator": operator, "subject": subject, "work": work}
    growing = [cpu_case(dtype, time=LONG, threads=n) for n in sorted({1, ALL_THREADS}) for dtype in DTYPES]
    shares = [(case, {FORWARD: ("percent", OF_PEAK[case.dtype])}) for case in cpu_cases()]
    drawn = {"measure": by_length, "peers": pictured}
    return [
        *(Question("peak", case=case, measure=share_of_peak, aims=aims, **ours) for case, aims in shares),
        *(Question("growth", case=cpu_case(dtype, time=LONG), **ours, **drawn) for dtype in DTYPES),
        *(Question("growth", case=case, measure=eightfold, **ours) for case in growing),
    ]


def share_of_peak(question: Question, instruments: Instruments) -> Iterator[Row]:
    """Timed in turns with torch's matrix product alone, without slow peers."""
    ours = directed(FORWARD, question.subject(question.case).run)
    taken = instruments.time({OURS: ours, "matmul": product(SQUARE, question.case.dtype)})
    rates = {"peak": instruments.ceilings(question.case).flops, "matmul": 2 * SQUARE**3 / taken["matmul"].median}
    more = {name: (rate, "GFLOP/s") for name, rate in rates.items()}
    yield question.timed(FORWARD, instruments, taken[OURS], **more)


def eightfold(question: Question, instruments: Instruments) -> Iterator[Row]:
    """The length of the case against an eighth of it."""
    times = short, long = question.case.time // 8, question.case.time
    runs = {time: question.subject(replace(question.case, time=time)).run for time in times}
    taken = instruments.time({time: directed(FORWARD, run) for time, run in runs.items()})
    numbers = {
        "time": (taken[long].median, "ms"), "spread": (taken[long].spread, "percent"),
        f"at T = {short}": (taken[short].median, "ms"), "ratio": (taken[long].median / taken[short].median, "growth"),
    }  # fmt: skip
    what, aim = f"time({long}) / time({short})", {"judged": "ratio", "unit": "growth", "target": TIMES_EIGHT}
    yield question.row(QUANTITY, what=what, numbers=numbers, **aim)


def by_length(question: Question, instruments: Instruments) -> Iterator[Row]:
    """Ours and the peers at doubling lengths up to the case's; the fastest form of a peer counts."""
    whole, found = question.case.time, defaultdict(dict)
    for time in (whole >> i for i in range(6, -1, -1) if whole >> i >= min(SHORTEST, whole // 2)):
        subject = question.subject(replace(question.case, time=time))
        runs, (peers, _) = {(OURS, ""): subject.run}, made(question.chosen(subject.peers))
        runs |= {(name, variant): run for name, peer in peers.items() for variant, run in peer.runs.items()}
        taken = instruments.time({key: directed(FORWARD, run) for key, run in runs.items()})
        for side in dict.fromkeys(name for name, _ in taken):
            found[side][f"T = {time}"] = min(its.median for (name, _), its in taken.items() if name == side), "ms"
    for side, numbers in found.items():
        yield question.row(QUANTITY, what=side, direction=BY_LENGTH, numbers=numbers)
