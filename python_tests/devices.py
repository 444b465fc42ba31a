"""What the fixture `device` stands for, and the CUDA kernels on the emulator in place of the CPU backend."""

import os
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from statecore import ops

# Test libraries: the shipped CUDA operators on the emulator, plain and with a check of every memory access.
EMULATORS = {"emulated": "statecore_emulated", "checked": "statecore_checked"}
OPERATORS = (
    "linear_attention", "linear_attention_backward", "segment_attention", "segment_attention_backward",
    "step_linear_attention", "step_linear_attention_backward", "mixed_attention_forward", "state_update",
)  # fmt: skip


def missing(name: str) -> str | None:
    """Why nothing can run on the device `name`, None where it can."""
    if name == "cuda" and ops.build_info()["cuda_architectures"] == "none":
        return "statecore was built without CUDA kernels"
    if name == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU here"
    if name in EMULATORS and not _library(name).exists():
        return f"{_library(name)} is not built (make test builds it)"
    return None


def _library(name: str) -> Path:
    root = Path(__file__).resolve().parents[1]
    return Path(os.environ.get("STATECORE_EMULATORS", root / "build" / "cuda_tests")) / f"{EMULATORS[name]}.so"


class Device(str):
    """Where a test's tensors are: "cpu" or "cuda", which torch takes as it is.

    `name` is that of the parameter, cpu, emulated, checked or cuda; `runs_cuda` says that the CUDA kernels serve it.
    """

    def __new__(cls, name: str):
        self = super().__new__(cls, "cuda" if name == "cuda" else "cpu")
        self.name = name
        self.runs_cuda = name != "cpu"
        return self

    def every_way(self) -> Iterator[str]:
        """Ways to run the same once more that must not change a bit, which hold until the next one is asked for."""
        if self.name == "cpu":
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                yield f"{threads} threads"
        elif self.name == "cuda":
            yield from (f"run {i}" for i in range(200))
        else:
            for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
                emulator(self.name).schedule(order, seed)
                yield f"threads run in {order} order"


class Emulator:
    """The CUDA kernels of a test library."""

    def __init__(self, name: str):
        torch.ops.load_library(_library(name))
        self._library = EMULATORS[name]
        self._ops = getattr(torch.ops, self._library)
        self._registrations = None
        assert self._ops.checks_races() == (name == "checked")

    def serve(self) -> None:
        """From here on they compute for CPU tensors; gradients, fakes and autocast stay those of statecore.ops.

        The controls are at their defaults, and memory that nobody has set is NaN.
        """
        self.schedule("forward")
        self.gpu()
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # fills new tensors
        self._registrations = torch.library.Library("statecore", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # that this overrides
            for name in OPERATORS:
                self._registrations.impl(name, self._kernel(name), "CPU")

    def stop_serving(self) -> None:
        """The CPU backend is back."""
        if self._registrations is not None:
            self._registrations._destroy()
            self._registrations = None
            torch.use_deterministic_algorithms(self._deterministic)

    def _kernel(self, name: str):
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{self._library}::{name}", "CPU"):
            return getattr(self._ops, name).default
        return lambda *args, **kwargs: pytest.skip(f"{name} has no CUDA kernel")

    # ---- controls
    def schedule(self, order: str, seed: int = 1) -> None:
        """In which `order` threads run that could: forward, reverse or random."""
        self._ops.set_schedule(order, seed)

    def gpu(self, arch: int = 80, multiprocessors: int = 132) -> None:
        """What host code finds when it chooses kernels: 80 is A100, 90 H200."""
        self._ops.set_device(arch, multiprocessors)


@cache
def emulator(name: str) -> Emulator:
    return Emulator(name)
