"""Operators on the CPU against their peers, the machine's limits and a whole model.

    python -m benchmarks.cpu                        everything, about a quarter of an hour; writes benchmarks/results/
    python -m benchmarks.cpu --only linear peak     some sections, and the rest of the page as it was
    python -m benchmarks.cpu --page                 the page and pictures anew from the JSON, nothing measured
    python -m benchmarks.cpu --quick                every section on tiny shapes, writes nothing

Written are cpu.json, cpu.md made of it, and the pictures, each whole or not at all.
"""

import argparse
import time

import torch

from benchmarks import pictures, record
from benchmarks.machine import facts
from benchmarks.page import page, question, tables, value, verdict
from benchmarks.rows import Row
from benchmarks.sections import SECTIONS
from benchmarks.workload import QUICK, Plan

RESULTS = record.RESULTS
NAME = "cpu"


def measure(names: list[str], plan: Plan, machine: dict[str, str]) -> dict[str, dict]:
    """{section: {"date", "seconds", "machine", "rows"}}; prints a line a row."""
    measured = {}
    for name in names:
        torch.manual_seed(0)
        start = time.perf_counter()
        rows = []
        for row in SECTIONS[name](plan):
            print(f"{name:8} {time.perf_counter() - start:6.1f} s  {line(row)}", flush=True)
            rows.append(row)
        measured[name] = record.section(rows, time.perf_counter() - start, machine)
        for table in tables(rows):
            print("", *table, "", sep="\n", flush=True)
    return measured


def line(row: Row) -> str:
    case = f"{question(row)}: {row.dtype}, T {row.time}, heads {row.heads}, {row.threads} threads"
    return f"{case}: {row.failure or value(row)} {verdict(row)}".rstrip()


def write(found: dict) -> None:
    record.write(found, RESULTS, NAME, page, pictures.draw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="every section on tiny shapes, writes nothing")
    what.add_argument("--page", action="store_true", help="the page anew from the JSON, nothing measured")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    arguments = parser.parse_args()
    found = record.stored(RESULTS, NAME)
    if not arguments.page:
        names = arguments.only or list(SECTIONS)
        measured = measure(names, QUICK if arguments.quick else Plan(), facts())
        if arguments.quick:
            return
        found["sections"] |= measured
    if not found["sections"]:
        parser.error(f"{RESULTS / NAME}.json holds no measurements: run without --page first")
    write(found)


if __name__ == "__main__":
    main()
