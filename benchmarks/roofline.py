"""The least time an operator can take: its floating-point work or its bytes through memory, whichever takes longer. The
only place where either is counted.

Work is what no implementation that keeps its states on the chip can avoid: the visible half of causal triangles, and in
the backward of linear attention the states once more (storing them would cost more). Bytes are each input read once and
each result written once. Hq / Hk are query / key heads.
"""

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.record import QUANTITY, Row
from benchmarks.timing import NotTimed, Run
from benchmarks.workload import Case, visible_pairs

FORWARD, BOTH, BACKWARD = "forward", "forward + backward", "backward"
GPU_CHUNK, CPU_CHUNK = 64, {torch.float32: 32, torch.bfloat16: 48}  # C, as in csrc/linear_attention
STATE = 4  # bytes per element of a state


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches: FLOP/s of a matrix product, B/s (read + written) of a copy."""

    flops: float
    bytes: float


H200 = Ceilings(790e12, 4.3e12)  # bfloat16


@dataclass(frozen=True)
class Work:
    """One pass over the inputs."""

    flops: float
    bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bytes)


Passes = tuple[Work, ...]  # that run one after the other


def bound(passes: Sequence[Work], ceilings: Ceilings) -> float:
    """The least seconds of all passes together."""
    return sum(work.seconds(ceilings) for work in passes)


# ---- work: {direction: passes} of a case


def linear_attention(case: Case, decay: bool = False, states: int = 1) -> dict[str, Passes]:
    """states: how many D x D results there are per sequence and key head."""
    tokens, row, queries, keys = _sizes(case)
    chunk = CPU_CHUNK[case.dtype] if case.threads else GPU_CHUNK
    state, triangle = 2 * case.width**2, case.width * (chunk + 1)  # per token: an update or a read; half a square
    forward = queries * (state + 2 * triangle) + keys * state
    backward = forward + keys * 2 * state + queries * (state + 4 * triangle)  # that again for dq; dk and dv
    decays, written = 4 * keys * decay, STATE * states * case.batch * keys * case.width**2
    return _directions(  # q, out; k, v. Backward q, dout, dq; k, v, dk, dv
        Work(tokens * forward, tokens * (row * (2 * queries + 2 * keys) + decays) + written),
        Work(tokens * backward, tokens * (row * (3 * queries + 4 * keys) + 2 * decays) + written),
    )


def linear_attention_reads_and_updates(case: Case) -> dict[str, Passes]:
    """Without the triangles inside chunks: per token, one state read per query head and one update per key head."""
    return {FORWARD: (Work(2 * case.width**2 * sum(case.heads) * case.batch * case.time, 0),)}


def segment_attention(case: Case) -> dict[str, Passes]:
    tokens, row, queries, keys = _sizes(case)
    pairs = case.batch * visible_pairs(replace(case, batch=1, device="cpu").step_ids())
    flops, small = 4 * case.width * queries * pairs, 4 * queries + 4  # lse and the step ids
    return _directions(
        Work(flops, tokens * (row * (2 * queries + 2 * keys) + small)),
        Work(2.5 * flops, tokens * (row * (4 * queries + 4 * keys) + small)),
    )


def mixed_attention(case: Case) -> dict[str, Passes]:
    tokens, row, queries, keys = _sizes(case)
    passes = zip(segment_attention(case)[BOTH], linear_attention(case)[BOTH], strict=True)
    forward, backward = (segment.flops + linear.flops for segment, linear in passes)
    return _directions(
        Work(forward, tokens * (row * (4 * queries + 4 * keys) + 4)),
        Work(backward, tokens * (row * (7 * queries + 8 * keys) + 4)),
    )


def state_update(case: Case) -> Work:
    rows, row, queries, keys = _sizes(case)
    area = case.width**2
    return Work(rows * 2 * area * (queries + keys), rows * (2 * STATE * area * keys + row * (2 * queries + 2 * keys)))


def _sizes(case: Case) -> tuple[int, int, int, int]:
    """Tokens, bytes of one token and head, query heads, key heads."""
    return case.batch * case.time, case.dtype.itemsize * case.width, *case.heads


def _directions(forward: Work, backward: Work) -> dict[str, Passes]:
    return {FORWARD: (forward,), BACKWARD: (backward,), BOTH: (forward, backward)}


# ---- ceilings, measured


def gpu_ceilings(
    timed: Callable[[dict], dict], device: str = "cuda", copied: int = 4 << 30, square: int = 8192
) -> tuple[Ceilings, list[Row]]:
    """And the rows that show them. copied: bytes; square: side of the matrices."""
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    taken = timed({"copy": lambda: target.copy_(source), "product": product(square, torch.bfloat16, device)})
    reached = Ceilings(2 * square**3 / taken["product"].median, 2 * copied / taken["copy"].median)

    def row(what: str, name: str, rate: float, unit: str) -> Row:
        numbers = {"reached": (rate, unit), "spread": (taken[name].spread, "percent")}
        return Row(kind=QUANTITY, operator="", case={}, what=what, numbers=numbers)

    return reached, [
        row(f"copy of {copied >> 20} MiB, bytes read and written", "copy", reached.bytes, "TB/s"),
        row(f"matrix product {square} x {square} x {square} of bfloat16", "product", reached.flops, "TFLOP/s"),
    ]


def product(square: int, dtype: torch.dtype, device: str = "cpu") -> Run:
    """Of random numbers: a GPU multiplies zeros faster."""
    left, right = (torch.randn(square, square, device=device).to(dtype) for _ in range(2))
    return lambda: left @ right


def copies(nbytes: int) -> dict[str, Run]:
    """Ways to copy so many bytes on torch's current number of threads."""
    threads = torch.get_num_threads()
    source, target = torch.ones(nbytes // 4), torch.empty(nbytes // 4)
    part = nbytes // threads
    pool = ThreadPoolExecutor(threads)

    def memcpy(index: int) -> None:
        ctypes.memmove(target.data_ptr() + index * part, source.data_ptr() + index * part, part)

    return {"copy_": lambda: target.copy_(source), "memcpy": lambda: list(pool.map(memcpy, range(threads)))}


class NoPeak(NotTimed):
    """There is no peak to compare with."""


def cpu_peak(case: Case) -> Ceilings:
    """Of its dtype and threads; bytes are never what bounds it."""
    dtype = str(case.dtype).removeprefix("torch.")
    found = cpu_peaks(case.threads)
    if dtype not in found:
        raise NoPeak(f"no peak is known: cpu_peak.cpp has no {dtype} on this processor")
    return Ceilings(found[dtype], float("inf"))


@functools.cache
def cpu_peaks(threads: int) -> dict[str, float]:
    """FLOP/s by dtype name, of so many threads at once."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "cpu_peak"
        build = ["c++", "-std=c++17", "-O3", "-march=native", "-pthread", Path(__file__).with_name("cpu_peak.cpp")]
        try:
            subprocess.run([*build, "-o", program], capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoPeak(f"cpu_peak.cpp cannot be compiled here: {error}") from error
        lines = subprocess.run([program, str(threads)], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: float(rate) for name, rate in (line.split() for line in lines)}
