"""Interleaved timing: every candidate runs once a round, so that a noisy moment of the machine hits all of them
alike.
"""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds a call."""

    median: float
    fastest: float
    slowest: float


def interleaved(candidates: dict[str, Callable[[], object]], *, rounds: int = 7) -> dict[str, Timing]:
    """Runs all candidates in turn, `rounds` times after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for warm_up in [True] + [False] * rounds:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if not warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def machine() -> dict[str, str]:
    """What the figures depend on."""
    from statecore import ops

    models = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "cpu family", "model\t"))
    ]
    return {
        "processor": "; ".join(dict.fromkeys(line.replace("\t", "").replace(":", ": ") for line in models)),
        "instruction set": str(ops.build_info()["cpu_isa"]),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
