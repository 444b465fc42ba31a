"""Interleaved timing: every candidate runs once per round, so that a noisy moment of the machine hits all of them. On
the CPU by the clock, on a GPU by its events.
"""

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[], object]
SLOW = 1.0  # seconds: a case with a slower candidate gets three rounds
BUDGET = 2.0  # seconds that the rounds of a faster case take
SAMPLE = 1e-3  # seconds: shorter calls are repeated within one sample
WARM_CALLS, WARM_SECONDS = 20, 0.5  # on a GPU: stop warming up at either, but not before the third call
GPU_ROUNDS, GPU_BUDGET = (20, 100), 0.3  # fewest and most rounds on a GPU, and the seconds they may take in between
CLOCK = 2e9  # Hz: no GPU's clock exceeds it


class NotTimed(Exception):
    """Says why, in full."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call and their relative spread. host: seconds the CPU takes to issue a call to a GPU."""

    median: float
    spread: float
    host: float = 0.0

    @staticmethod
    def of(samples: list[float], host: float = 0.0) -> "Timing":
        """spread: (slowest - fastest) / median, without the slowest and the fastest tenth of the samples."""
        middle = sorted(samples)[len(samples) // 10 : len(samples) - len(samples) // 10]
        median = statistics.median(samples)
        return Timing(median, (middle[-1] - middle[0]) / median, host)


def interleaved(candidates: dict[Hashable, Run]) -> dict[Hashable, Timing]:
    """All candidates in turn: 3 rounds where one takes over a second, else 5 to 25 in about two seconds."""
    first = {name: seconds_per_call(run) for name, run in candidates.items()}
    first |= {name: seconds_per_call(candidates[name]) for name, seconds in first.items() if seconds <= SLOW}
    calls = {name: max(1, math.ceil(SAMPLE / max(seconds, 1e-7))) for name, seconds in first.items()}
    a_round = sum(first[name] * calls[name] for name in candidates)
    rounds = 3 if max(first.values()) > SLOW else min(25, max(5, int(BUDGET / a_round)))
    samples: dict[Hashable, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            samples[name].append(seconds_per_call(run, calls[name]))
    return {name: Timing.of(found) for name, found in samples.items()}


def interleaved_on_gpu(candidates: dict[Hashable, Run]) -> dict[Hashable, Timing]:
    """The same by events of the current GPU: 20 to 100 rounds in about a third of a second.

    Before each call the GPU sleeps until the CPU has issued all of it, so that Python is not part of the time, and the
    L2 cache is filled with other data: by reading, because dirty lines would have to be written back during the call.
    """
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    other = torch.ones(2 * cache // 4, device="cuda")
    hosts = {name: _seconds_to_issue(run) for name, run in candidates.items()}
    events: dict[Hashable, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in candidates}

    def a_round() -> None:
        for name, run in candidates.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int((1.5 * hosts[name] + 5e-5) * CLOCK))
            other.sum()
            begin.record()
            run()
            end.record()
            events[name].append((begin, end))
        torch.cuda.synchronize()

    fewest, most = GPU_ROUNDS
    for _ in range(min(most, max(fewest, int(GPU_BUDGET / seconds_per_call(a_round)))) - 1):
        a_round()
    return {
        name: Timing.of([begin.elapsed_time(end) * 1e-3 for begin, end in pairs], hosts[name])
        for name, pairs in events.items()
    }


def captured(calls: Sequence[Run]) -> tuple[Run, int | None]:
    """All calls as one CUDA graph, and how many nodes it has, None where they cannot be counted."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(WARM_CALLS):
            calls[index % len(calls)]()
    torch.cuda.current_stream().wait_stream(stream)
    graph, count = torch.cuda.CUDAGraph(keep_graph=True), ctypes.c_size_t()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.instantiate()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        error = driver.cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    except (OSError, AttributeError, RuntimeError):
        error = True
    return graph.replay, None if error else count.value


def seconds_per_call(run: Run, calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _seconds_to_issue(run: Run) -> float:
    """The median of warm calls, by the CPU's clock."""
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < 3 or (len(samples) < WARM_CALLS and time.perf_counter() - start < WARM_SECONDS):
        samples.append(seconds_per_call(run))
        torch.cuda.synchronize()
    return statistics.median(samples)
