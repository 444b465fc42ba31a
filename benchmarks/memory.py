"""How much memory a call takes, and copies to compare its speed with."""

import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def gpu_extra(run: Callable[[], Tensor | tuple[Tensor | None, ...]]) -> int:
    """Bytes that torch allocates on the GPU during the call at most, beyond those of its results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    peak = torch.cuda.max_memory_allocated()
    results = (results,) if isinstance(results, Tensor) else results
    return peak - before - sum(result.nbytes for result in results if result is not None)


def copies(nbytes: int) -> dict[str, Callable[[], object]]:
    """Ways to copy so many bytes on torch's current number of threads."""
    threads = torch.get_num_threads()
    source, target = torch.ones(nbytes // 4), torch.empty(nbytes // 4)
    part = nbytes // threads
    pool = ThreadPoolExecutor(threads)

    def memcpy(index: int) -> None:
        ctypes.memmove(target.data_ptr() + index * part, source.data_ptr() + index * part, part)

    return {"copy_": lambda: target.copy_(source), "memcpy": lambda: list(pool.map(memcpy, range(threads)))}


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
