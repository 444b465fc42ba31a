"""What the fixture `device` stands for, and the CUDA kernels on the emulator in place of the CPU backend."""

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from statecore import ops

# Test libraries: the shipped CUDA operators on the emulator, plain and with a check of every memory access.
EMULATORS = {"emulated": "statecore_emulated", "checked": "statecore_checked"}
OPERATORS = (
    "linear_attention", "linear_attention_backward", "segment_attention", "segment_attention_backward",
    "step_linear_attention", "step_linear_attention_backward", "mixed_attention_forward", "state_update",
)  # fmt: skip


def require(name: str) -> None:
    """Skips the test where nothing can run on the device `name`; fails it where the environment demands the device."""
    missing = None
    if name == "cuda" and ops.build_info()["cuda_architectures"] == "none":
        missing = "statecore was built without CUDA kernels"
    elif name == "cuda" and not torch.cuda.is_available():
        missing = "torch finds no GPU here"
    elif name in EMULATORS and not _library(name).exists():
        missing = f"{_library(name)} is not built (make test builds it)"
    demand = "STATECORE_REQUIRE_CUDA" if name == "cuda" else "STATECORE_REQUIRE_EMULATOR"
    if missing and os.environ.get(demand) == "1":
        pytest.fail(f"{demand}=1, but {missing}")
    if missing:
        pytest.skip(f"no device {name}: {missing}")


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

    @property
    def finest(self) -> torch.dtype:
        """The dtype with the least error that is served."""
        return torch.float32 if self.runs_cuda else torch.float64

    def length(self, time: int) -> int:
        """Tokens of a long case: fewer where thousands take minutes."""
        return min(time, 512) if self.name in EMULATORS else time

    def vary(self, draw: random.Random) -> None:
        """From here on the emulated GPU is another one; kernels, tiles and splits are chosen by its size."""
        if self.name in EMULATORS:
            emulator(self.name).gpu(draw.choice([80, 90]), draw.choice([1, 8, 132]))

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


CPU = Device("cpu")


def on(device: Device, *values):
    """The same values, tensors among them on the device."""
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in values)


class Emulator:
    """The CUDA kernels of a test library."""

    def __init__(self, name: str):
        torch.ops.load_library(_library(name))
        self._library = EMULATORS[name]
        self._ops = getattr(torch.ops, self._library)
        assert self._ops.checks_races() == (name == "checked")

    @contextmanager
    def serving(self) -> Iterator[None]:
        """They compute for CPU tensors meanwhile; gradients, fakes and autocast stay those of statecore.ops.

        The controls start at their defaults, and memory that nobody has set is NaN.
        """
        self.schedule("forward")
        self.gpu()
        deterministic = torch.are_deterministic_algorithms_enabled()
        registrations = torch.library.Library("statecore", "IMPL")
        try:
            torch.use_deterministic_algorithms(True)  # fills new tensors
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Warning only once for all operators")  # that this overrides
                for name in OPERATORS:
                    registrations.impl(name, self._kernel(name), "CPU")
            yield
        finally:
            registrations._destroy()  # the CPU backend is back
            torch.use_deterministic_algorithms(deterministic)

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


@contextmanager
def using(name: str) -> Iterator[Device]:
    with emulator(name).serving() if name in EMULATORS else nullcontext():
        yield Device(name)
