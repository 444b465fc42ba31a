"""Runs questions, the most important first, within a time budget; one that fails does not stop the others."""

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import pictures, record, roofline
from benchmarks.contest import Instruments, Question, in_one_line
from benchmarks.machine import cpu_facts, gpu_facts
from benchmarks.page import expected_page, line, page, tables
from benchmarks.record import Row
from benchmarks.timing import interleaved_on_gpu
from statecore.outputs import write_text

GPU_BUDGET = 280.0  # seconds
NO_GPU = "benchmarks.gpu: torch finds no GPU here, so nothing is measured; --expected calculates what to expect of one"


def prepared(device: str, budget: float = math.inf) -> tuple[Instruments, dict[str, str], dict[str, dict]]:
    """Instruments, facts about the machine, and on a GPU the section of its ceilings. The budget starts to run."""
    start = time.perf_counter()

    def left() -> float:
        return budget - (time.perf_counter() - start)

    if device == "cpu":
        return Instruments.of_cpu(roofline.cpu_peak, left), cpu_facts(), {}
    if not torch.cuda.is_available():
        sys.exit(NO_GPU)
    machine, (reached, rows) = gpu_facts(), roofline.gpu_ceilings(interleaved_on_gpu)
    ceilings = record.section(machine, rows, time.perf_counter() - start)
    return Instruments(lambda case: reached, left), machine, {"ceilings": ceilings}


def measure(
    asked: Sequence[Question], instruments: Instruments, machine: dict[str, str],
    keep: Callable[[dict[str, dict]], None] = lambda sections: None,
) -> dict[str, dict]:  # fmt: skip
    """{section: record.section}. Prints a line per row and calls `keep` after every question, so that a kernel that
    hangs loses only its own rows.
    """
    sections = {question.section: record.section(machine) for question in asked}
    for question in sorted(asked, key=lambda question: (question.rank, question.needs)):
        section = sections[question.section]
        if instruments.left() < question.needs:
            section["left_out"].append(question.name)
            print(f"{question.section}: left out: {question.name}", flush=True)
            continue
        start = time.perf_counter()
        for row in answers(question, instruments):
            print(f"{question.section:8} {time.perf_counter() - start:6.1f} s  {line(row)}", flush=True)
            section["rows"].append(asdict(row))
        section["seconds"] += time.perf_counter() - start
        section["date"] = record.now()
        keep(sections)
    return sections


def small(asked: Iterable[Question]) -> list[Question]:
    """The same on tiny shapes, without duplicates."""
    asked = [replace(question, case=question.case.small()) for question in asked]
    return list({(q.section, q.operator, q.case, q.measure, tuple(q.ratios)): q for q in asked}.values())


def answers(question: Question, instruments: Instruments) -> Iterator[Row]:
    try:
        torch.manual_seed(0)
        if question.case.threads:
            torch.set_num_threads(question.case.threads)
        yield from question.measure(question, instruments)
    except Exception as error:
        yield from (question.kernel(direction, failure=in_one_line(error)) for direction in question.directions)


def show(sections: dict[str, dict]) -> None:
    for name, section in sections.items():
        print(f"\n## {name}\n", *tables([Row(**row) for row in section["rows"]]), sep="\n")


def main_of_operator(questions: Callable[[str], list[Question]]) -> None:
    """The command line of one operator's script: prints its tables."""
    parser = argparse.ArgumentParser()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"{device} if not given")
    parser.add_argument("--only", default="", metavar="TEXT", help="questions whose names contain it")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try it out")
    chosen = parser.parse_args()
    asked = [question for question in questions(chosen.device) if chosen.only in question.name]
    instruments, machine, ceilings = prepared(chosen.device)
    show(ceilings | measure(small(asked) if chosen.quick else asked, instruments, machine))


def main_of_device(device: str, asked: Sequence[Question], arguments: Sequence[str] | None = None) -> None:
    """The command line of benchmarks.cpu and benchmarks.gpu: writes the record of the device and its page."""
    name, budget, draw = ("cpu", math.inf, pictures.draw) if device == "cpu" else ("gpu", GPU_BUDGET, None)
    names = list(dict.fromkeys(question.section for question in asked))
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="FOLDER", help="where the results go")
    parser.add_argument("--budget", type=float, default=budget, metavar="SECONDS", help=f"{budget:g} if not given")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, writes nothing")
    parser.add_argument("--page", action="store_true", help="regenerate the page from the JSON, measure nothing")
    parser.set_defaults(expected=False, checks=None)
    if device == "cuda":
        parser.add_argument("--expected", action="store_true", help="calculate what an H200 allows; needs no GPU")
        parser.add_argument(
            "--checks", type=Path, metavar="WORK", help="add the checks that cuda_tests/run_gpu.sh left there"
        )
    chosen = parser.parse_args(arguments)
    asked = [question for question in asked if question.section in chosen.only]
    found = record.stored(chosen.checks / "benchmarks" if chosen.checks else chosen.out, name)

    def keep(sections: dict[str, dict]) -> None:
        found["sections"] |= sections
        record.write(found, chosen.out, name, page(found, name), draw)

    if chosen.expected:
        text = expected_page(asked)
        print(text)
        if chosen.only == names:
            write_text(chosen.out / f"{name}_expected.md", text)
    elif chosen.checks:
        rows = stages(chosen.checks / "stages.tsv")
        found["checks"] = {"date": record.now(), "machine": gpu_facts(), "stages": rows}
        keep({})
    elif chosen.page:
        keep({})
    else:
        instruments, machine, ceilings = prepared(device, chosen.budget)
        if chosen.quick:
            show(ceilings | measure(small(asked), instruments, machine))
            return
        found["sections"] |= ceilings
        measured = measure(asked, instruments, machine, keep if device == "cuda" else lambda sections: None)
        keep(measured)
        show(measured)


def stages(table: Path) -> list[dict[str, str]]:
    """What `make gpu` ran: a line per stage with its name, verdict, seconds and the last line that it printed."""
    fields = ["name", "verdict", "seconds", "said"]
    return list(csv.DictReader(table.read_text().splitlines(), fields, delimiter="\t", quoting=csv.QUOTE_NONE))
