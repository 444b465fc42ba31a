"""The devices of the fixture `device`: CPU, GPU, and the CUDA kernels on an emulator in place of the CPU backend."""

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from cases import Heads
from torch import Tensor

from statecore import ops

# Test libraries: the shipped CUDA operators on the emulator, without and with a check of every memory access.
EMULATORS = {"emulated": "statecore_emulated", "checked": "statecore_checked"}


def operators() -> list[str]:
    """Names of the operators with a CPU backend."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("statecore::")]
    return [name.partition("::")[2] for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")]


def require(name: str) -> None:
    """Skips the test if the device `name` is missing; fails it if the environment demands the device."""
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
    """A torch device, "cpu" or "cuda", and what it supports.

    name: cpu, emulated, checked or cuda. runs_cuda: the CUDA kernels run, on a GPU or on the emulator.
    """

    def __new__(cls, name: str):
        self = super().__new__(cls, "cuda" if name == "cuda" else "cpu")
        self.name = name
        self.runs_cuda = name != "cpu"
        return self

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Two supported dtypes: the most accurate one, and one below it."""
        return (torch.float32, torch.bfloat16) if self.runs_cuda else (torch.float64, torch.float32)

    def supported(self, heads: Heads) -> Heads:
        """The same heads with the next supported widths."""
        if not self.runs_cuda:
            return heads
        key_width, value_width = (min(-(-width // 16) * 16, 128) for width in (heads.key_width, heads.value_width))
        return replace(heads, key_width=key_width, value_width=value_width)

    def length(self, time: int) -> int:
        """Tokens of a long case; fewer on the emulator, where thousands take minutes."""
        return min(time, 512) if self.name in EMULATORS else time

    def vary(self, draw: random.Random) -> None:
        """Draws another emulated GPU; its architecture and size decide kernels, tiles and splits."""
        if self.name in EMULATORS:
            emulator(self.name).gpu(draw.choice([80, 90]), draw.choice([1, 8, 132]))

    def every_way(self) -> Iterator[str]:
        """Ways to repeat a computation that must not change a bit of its results. Each holds until the next one."""
        if self.name == "cpu":
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                yield f"{threads} threads"
        elif self.name == "cuda":
            yield from (f"run {i}" for i in range(200))
        else:
            for order, asynchronous in (("forward", "late"), ("reverse", "early"), ("random", "random")):
                emulator(self.name).schedule(order, asynchronous)
                yield f"threads in {order} order, copies {asynchronous}"


CPU = Device("cpu")


def on(device: Device, *values):
    """The same values, with tensors moved to the device."""
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
        """Inside, these kernels compute for CPU tensors. Gradients, fakes and autocast stay those of statecore.ops.

        Controls and counters start at their defaults; uninitialised memory is poisoned with NaN.
        """
        self.schedule("forward")
        self.gpu()
        self.take_work()
        deterministic = torch.are_deterministic_algorithms_enabled()
        registrations = torch.library.Library("statecore", "IMPL")
        try:
            torch.use_deterministic_algorithms(True)  # poisons new tensors
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Warning only once for all operators")  # about the override
                for name in operators():
                    registrations.impl(name, getattr(self._ops, name).default, "CPU")
            yield
        finally:
            registrations._destroy()  # the CPU backend is back
            torch.use_deterministic_algorithms(deterministic)

    # ---- controls and counters
    def schedule(self, order: str, asynchronous: str = "late", seed: int = 1) -> None:
        """order: in which runnable threads run: forward, reverse, random. asynchronous: when asynchronous copies and
        products take effect: late, early, random.
        """
        orders, times = ("forward", "reverse", "random"), ("late", "early", "random")  # as in cuda_tests/simt/simt.h
        self._ops.set_schedule(orders.index(order), times.index(asynchronous), seed)

    def gpu(self, arch: int = 80, multiprocessors: int = 132) -> None:
        """The GPU for which host code chooses kernels. arch: 80 for A100, 90 for H200."""
        self._ops.set_device(arch, multiprocessors)

    def take_work(self) -> tuple[list[str], int]:
        """Names of the kernels launched since the last call, and the number of their tensor-core products."""
        launches, products = self._ops.take_work()
        return launches.splitlines(), products


@cache
def emulator(name: str) -> Emulator:
    return Emulator(name)


@contextmanager
def using(name: str) -> Iterator[Device]:
    with emulator(name).serving() if name in EMULATORS else nullcontext():
        yield Device(name)
