"""Adds to the record of a run on a GPU what was checked in it, and writes both: the end of cuda_tests/run_gpu.sh.

    python -m benchmarks.gpu_checks WORK FOLDER

WORK has stages.tsv, a line a stage (name, verdict, seconds, what it said last), and in benchmarks/ what
`python -m benchmarks.gpu` wrote, if it came that far. FOLDER gets gpu.json and gpu.md, whole or not at all.
"""

import csv
import sys
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import record
from benchmarks.gpu import NAME
from benchmarks.gpu_page import page
from benchmarks.machine import gpu_facts


def stages(table: Path) -> list[dict[str, str]]:
    with table.open() as lines:
        return list(
            csv.DictReader(lines, ["name", "verdict", "seconds", "said"], delimiter="\t", quoting=csv.QUOTE_NONE)
        )


def main(work: Path, folder: Path) -> None:
    found = record.stored(work / "benchmarks", NAME)
    found["checks"] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": gpu_facts(),
        "stages": stages(work / "stages.tsv"),
    }
    record.write(found, folder, NAME, page)
    print(folder / f"{NAME}.md")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
