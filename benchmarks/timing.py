"""Interleaved timing: every candidate runs once a round, so that a noisy moment of the machine hits all of them
alike.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

SLOW = 1.0  # seconds: a case with a slower candidate gets three rounds
BUDGET = 2.0  # seconds that the rounds of a faster case take
SAMPLE = 1e-3  # seconds: shorter calls are repeated inside one sample


@dataclass(frozen=True)
class Timing:
    """Seconds a call, and how far apart the samples lie, relatively."""

    median: float
    spread: float

    @staticmethod
    def of(samples: list[float]) -> "Timing":
        """spread: (slowest - fastest) / median without the tenth of the samples at either end."""
        middle = sorted(samples)[len(samples) // 10 : len(samples) - len(samples) // 10]
        median = statistics.median(samples)
        return Timing(median, (middle[-1] - middle[0]) / median)


def interleaved(candidates: dict[str, Callable[[], object]]) -> dict[str, Timing]:
    """Runs all candidates in turn: 3 rounds where one takes over a second, else 5 to 25 in about two seconds."""
    first = {name: _warm(run) for name, run in candidates.items()}
    calls = {name: max(1, math.ceil(SAMPLE / max(seconds, 1e-7))) for name, seconds in first.items()}
    a_round = sum(first[name] * calls[name] for name in candidates)
    rounds = 3 if max(first.values()) > SLOW else min(25, max(5, int(BUDGET / a_round)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            samples[name].append(seconds_a_call(run, calls[name]))
    return {name: Timing.of(s) for name, s in samples.items()}


def fastest(timings: dict[str, Timing]) -> str:
    return min(timings, key=lambda name: timings[name].median)


def seconds_a_call(run: Callable[[], object], calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _warm(run: Callable[[], object]) -> float:
    seconds = seconds_a_call(run)
    return seconds if seconds > SLOW else seconds_a_call(run)
