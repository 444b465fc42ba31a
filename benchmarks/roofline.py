"""The least time an operator can take: its floating-point work or its bytes through memory, whichever takes longer. The
only place where either is counted, and where the ceilings they are divided by are measured.

Letters: B batch, T time, Hq / Hk query / key heads, D width, C chunk length, e bytes per element.

Work is what no implementation that keeps its states on the chip can avoid: the visible half of causal triangles, and in
the backward of linear attention the states once more (storing them would cost more). Bytes are each input read once and
each result written once.

- linear attention, per token: Hq (2 D D + 2 D (C + 1)) + Hk 2 D D forward; backward that again for dq, then Hk 4 D D +
  Hq (2 D D + 4 D (C + 1)). It moves e D (2 Hq + 2 Hk) bytes forward (q, out; k, v) and e D (3 Hq + 4 Hk) backward
  (q, dout, dq; k, v, dk, dv), with a decay 4 Hk more forward and 8 Hk backward; a sequence writes its final states,
  4 Hk D D each.
- segment attention, per visible pair: 4 D Hq forward, 10 D Hq backward; e D (2 Hq + 2 Hk) + 4 Hq + 4 bytes per token
  forward (with lse and the step ids), e D (4 Hq + 4 Hk) + 4 Hq + 4 backward.
- mixed attention: the work of both; e D (4 Hq + 4 Hk) + 4 bytes per token forward, e D (7 Hq + 8 Hk) + 4 backward.
- state update, per row: 2 D D (Hq + Hk) and 8 D D Hk + e D (2 Hq + 2 Hk) bytes.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.record import QUANTITY, Row
from benchmarks.timing import NotTimed, Run, Timing
from benchmarks.workload import Case, visible_pairs

FORWARD, BOTH, BACKWARD = "forward", "forward + backward", "backward"
GPU_CHUNK, CPU_CHUNK = 64, {torch.float32: 32, torch.bfloat16: 48}  # C, as in csrc/linear_attention
STATE = 4  # bytes per element of a state
CPU_PEAK = Path(__file__).with_name("cpu_peak.cpp")
MISSING = {"bfloat16": "this processor has no avx512_bf16, so it has no bfloat16 peak"}


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
Timed = Callable[[dict[Hashable, Run]], dict[Hashable, Timing]]


def bound(passes: Sequence[Work], ceilings: Ceilings) -> float:
    """The least seconds of all passes together."""
    return sum(work.seconds(ceilings) for work in passes)


# ---- work: {direction: passes} of a case


def linear_attention(case: Case, decay: bool = False, states: int = 1) -> dict[str, Passes]:
    """states: how many D x D results there are per sequence and key head."""
    queries, keys = case.heads
    tokens, row = case.batch * case.time, case.dtype.itemsize * case.width
    chunk = CPU_CHUNK[case.dtype] if case.threads else GPU_CHUNK
    state, triangle = 2 * case.width**2, case.width * (chunk + 1)
    forward = queries * (state + 2 * triangle) + keys * state
    backward = forward + keys * 2 * state + queries * (state + 4 * triangle)
    decays, written = 4 * keys * decay, STATE * states * case.batch * keys * case.width**2
    return _directions(
        Work(tokens * forward, tokens * (row * (2 * queries + 2 * keys) + decays) + written),
        Work(tokens * backward, tokens * (row * (3 * queries + 4 * keys) + 2 * decays) + written),
    )


def linear_attention_reads_and_updates(case: Case) -> dict[str, Passes]:
    """Without the triangles inside chunks: per token, one state read per query head and one update per key head."""
    return {FORWARD: (Work(2 * case.width**2 * sum(case.heads) * case.batch * case.time, 0),)}


def segment_attention(case: Case) -> dict[str, Passes]:
    queries, keys = case.heads
    tokens, row = case.batch * case.time, case.dtype.itemsize * case.width
    flops = 4 * case.width * queries * visible_pairs(replace(case, batch=1, device="cpu").step_ids()) * case.batch
    small = 4 * queries + 4
    return _directions(
        Work(flops, tokens * (row * (2 * queries + 2 * keys) + small)),
        Work(2.5 * flops, tokens * (row * (4 * queries + 4 * keys) + small)),
    )


def mixed_attention(case: Case) -> dict[str, Passes]:
    queries, keys = case.heads
    tokens, row = case.batch * case.time, case.dtype.itemsize * case.width
    passes = zip(segment_attention(case)[BOTH], linear_attention(case)[BOTH], strict=True)
    forward, backward = (segment.flops + linear.flops for segment, linear in passes)
    return _directions(
        Work(forward, tokens * (row * (4 * queries + 4 * keys) + 4)),
        Work(backward, tokens * (row * (7 * queries + 8 * keys) + 4)),
    )


def state_update(case: Case) -> Work:
    queries, keys = case.heads
    area = case.width**2
    moved = 2 * STATE * area * keys + case.dtype.itemsize * case.width * (2 * queries + 2 * keys)
    return Work(case.batch * 2 * area * (queries + keys), case.batch * moved)


def _directions(forward: Work, backward: Work) -> dict[str, Passes]:
    return {FORWARD: (forward,), BACKWARD: (backward,), BOTH: (forward, backward)}


# ---- ceilings, measured


def gpu_ceilings(
    timed: Timed, device: str = "cuda", copied: int = 4 << 30, square: int = 8192
) -> tuple[Ceilings, list[Row]]:
    """And the rows that show them: of a copy of so many bytes and of a product of so large matrices."""
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    taken = timed({"copy": lambda: target.copy_(source), "product": product(square, torch.bfloat16, device)})
    reached = Ceilings(2 * square**3 / taken["product"].median, 2 * copied / taken["copy"].median)
    found = {
        f"copy of {copied >> 20} MiB, bytes read and written": ("copy", reached.bytes, "TB/s"),
        f"matrix product {square} x {square} x {square} of bfloat16": ("product", reached.flops, "TFLOP/s"),
    }
    return reached, [
        Row(
            kind=QUANTITY, operator="", what=what, case={},
            numbers={"per second": (rate, unit), "spread": (taken[name].spread, "percent")},
        )
        for what, (name, rate, unit) in found.items()
    ]  # fmt: skip


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
    """Why there is no peak to compare with, in a sentence."""


def cpu_peak(case: Case) -> Ceilings:
    """Of its dtype and threads; bytes are never what bounds it."""
    dtype = str(case.dtype).removeprefix("torch.")
    found = cpu_peaks(case.threads)
    if dtype not in found:
        raise NoPeak(MISSING.get(dtype, f"there is no peak of {dtype}"))
    return Ceilings(found[dtype], float("inf"))


@functools.cache
def cpu_peaks(threads: int) -> dict[str, float]:
    """FLOP/s by dtype name, of so many threads at once; a dtype that the processor lacks is not in it."""
    compiler = shutil.which("c++")
    if compiler is None:
        raise NoPeak("there is no C++ compiler (c++) to build the measurement of the peak")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / CPU_PEAK.stem
        build = subprocess.run(
            [compiler, "-std=c++17", "-O3", "-march=native", "-pthread", CPU_PEAK, "-o", program],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if build.returncode:
            errors = [line for line in build.stderr.splitlines() if "error" in line]
            raise NoPeak(f"{CPU_PEAK.name} does not compile here: {(errors or ['no message'])[0]}")
        lines = subprocess.run([program, str(threads)], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: float(rate) for name, rate in (line.split() for line in lines)}
