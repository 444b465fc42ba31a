"""How much memory a call takes, on the CPU and on a GPU."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

PROCESS = Path("/proc/self")


def peak_growth(run: Callable[[], object]) -> tuple[int | None, object]:
    """(bytes, result of run): growth of the process's peak resident memory during the call, its result included.

    Frees what the allocator kept, resets the kernel's high-water mark and reads VmHWM - VmRSS. None where the mark
    cannot be reset.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None, run()
    before = _status("VmRSS")
    result = run()
    return _status("VmHWM") - before, result


def gpu_extra(run: Callable[[], object]) -> int:
    """Bytes that torch allocates on the GPU during a call at most, beyond its results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    return torch.cuda.max_memory_allocated() - before - nbytes(results)


def nbytes(results: Tensor | tuple[Tensor | None, ...]) -> int:
    results = (results,) if isinstance(results, Tensor) else results
    return sum(result.nbytes for result in results if result is not None)


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
