"""Writes gpu.md and gpu.json, what run_gpu.sh found out: both or neither.

    python cuda_tests/gpu_page.py WORK FOLDER

WORK has stages.tsv, a line a stage, and what the benchmarks wrote: benchmarks/gpu.md and benchmarks/gpu.json.
"""

import csv
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

MEANING = {
    "build": "the library for this GPU, by nvcc",
    "conformance": "instructions as the emulator has them, byte by byte",
    "operators": "values and gradients against float64",
    "cuda_graphs": "capture and replay on other contents",
    "same_bits": "200 runs, one result",
    "memcheck": "compute-sanitizer: accesses out of bounds",
    "racecheck": "compute-sanitizer: races in shared memory",
    "synccheck": "compute-sanitizer: barriers",
    "benchmarks": "times and rooflines, below",
}


def answer(*command: str) -> str:
    """The first line of what a program prints; empty where there is no such program or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n", 1)[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine() -> dict[str, str]:
    name, driver, memory = answer(
        "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
    ).split(", ")
    return {
        "GPU": f"{name}, {memory}",
        "driver": driver,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "statecore": answer("git", "describe", "--always", "--dirty") or "of unknown revision",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "python": platform.python_version(),
    }


def page(facts: dict[str, str], stages: list[dict[str, str]], benchmarks: str) -> str:
    lines = ["# On a GPU", "", "Everything here is from one run of `make gpu`.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    lines += ["", "## Checks", "", "| stage | verdict | seconds | what it said last |", "|---|---|---|---|"]
    for stage in stages:
        said = stage["said"].replace("|", "\\|")
        lines.append(
            f"| {stage['name']}: {MEANING[stage['name']]} | {stage['verdict']} | {stage['seconds']} | {said} |"
        )
    lines += ["", benchmarks or "## Benchmarks\n\nThey wrote nothing: there is no figure of this run.\n"]
    return "\n".join(lines)


def main(work: Path, folder: Path) -> None:
    with (work / "stages.tsv").open() as table:
        stages = list(
            csv.DictReader(table, ["name", "verdict", "seconds", "said"], delimiter="\t", quoting=csv.QUOTE_NONE)
        )
    measured = {suffix: work / "benchmarks" / f"gpu.{suffix}" for suffix in ("md", "json")}
    text, figures = (path.read_text() if path.exists() else "" for path in measured.values())
    facts = machine()
    results = {"machine": facts, "stages": stages, "benchmarks": json.loads(figures) if figures else None}
    files = {"gpu.md": page(facts, stages, text), "gpu.json": json.dumps(results, indent=1) + "\n"}
    for name, content in files.items():
        (folder / f".{name}").write_text(content)
    for name in files:
        os.replace(folder / f".{name}", folder / name)
    print(folder / "gpu.md")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
