"""What the figures depend on: processor or GPU, caches, memory, versions."""

import hashlib
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.roofline import copies
from benchmarks.timing import interleaved
from benchmarks.workload import ALL_THREADS
from statecore import ops

SOURCES = Path(__file__).parents[1] / "csrc"
GPU_PACKAGES = ("triton", "fla-core", "flash-attn", "flash-attn-3", "flash-attn-4")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
COPIED = 256 << 20  # bytes: far more than any cache


def cpu_facts() -> dict[str, str]:
    """Names and values, for people; memory bandwidth is measured."""
    torch.set_num_threads(ALL_THREADS)
    bandwidth = 2 * COPIED / min(timing.median for timing in interleaved(copies(COPIED)).values())
    return {"memory bandwidth": f"{bandwidth / 1e9:.1f} GB/s (copy, read + write, all threads)"} | versions()


def versions() -> dict[str, str]:
    """The same without measuring anything."""
    return {
        "processor": _processor(),
        "threads": str(ALL_THREADS),
        "caches": ", ".join(f"{name} {size >> 10} KiB" for name, size in caches().items()),
        "instruction set": str(ops.build_info()["cpu_isa"]),
        "statecore": _revision(),
        "torch": torch.__version__,
        "transformers": installed("transformers"),
        "compiler": _first_line("c++", "--version"),
        "python": platform.python_version(),
    }


def gpu_facts() -> dict[str, str]:
    """The same of the current GPU; its ceilings are rows of the record."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "GPU": f"{gpu.name}, {gpu.multi_processor_count} SMs, compute capability {gpu.major}.{gpu.minor}, "
        f"{gpu.total_memory / 1e9:.0f} GB, L2 cache {gpu.L2_cache_size >> 20} MiB",
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "statecore": _revision(),
        "statecore's kernels": str(ops.build_info()["cuda_architectures"]),
        "torch": torch.__version__,
        **{package: installed(package) for package in GPU_PACKAGES},
        "python": platform.python_version(),
        "processor": _processor(),
    }


def installed(package: str) -> str:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def caches() -> dict[str, int]:
    """Bytes of each data cache that the first core sees: {"L1": ..., "L2": ..., "L3": ...}."""
    found = {}
    for folder in sorted(CACHES.glob("index*")):
        kind, level, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = int(size.rstrip("KM")) << (20 if size.endswith("M") else 10)
    return found


def last_level_cache() -> int:
    """Bytes; 32 MiB where the system does not say."""
    return max(caches().values(), default=32 << 20)


def _processor() -> str:
    fields = dict.fromkeys(("model name", "cpu family", "model"), "unknown")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in fields:
            fields[name.strip()] = value.strip()
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"


def _revision() -> str:
    """Where there is no repository, a hash of the C++ sources stands for the revision."""
    described = _first_line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    if not described:
        files = sorted(path for path in SOURCES.rglob("*") if path.is_file())
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        described = f"unknown, csrc/ has SHA-256 {digest[:12]}"
    return f"{installed('statecore')}, revision {described}"


def _first_line(command: str, *arguments: str) -> str:
    """What a program answers, empty where it is missing or fails."""
    if shutil.which(command) is None:
        return ""
    answer = subprocess.run([command, *arguments], capture_output=True, text=True, check=False).stdout
    return answer.splitlines()[0] if answer else ""
