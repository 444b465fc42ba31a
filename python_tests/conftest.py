"""Fixtures of all test files: reproducible randomness, devices, shared data."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from devices import Device, require, using


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def device(request) -> Iterator[Device]:
    """The test runs once on each device: on the CPU, with the CUDA kernels on the emulator, and on a GPU.

    It is skipped on a missing device, or fails there with STATECORE_REQUIRE_EMULATOR=1 or STATECORE_REQUIRE_CUDA=1.
    Indirect parametrisation also offers "checked", the emulator that checks every memory access.
    """
    require(request.param)
    with using(request.param) as device:
        yield device


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder with real data and tokenizers that is not part of the project."""
    folder = Path(os.environ.get("STATECORE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the shared data folder, and {folder} does not exist (set STATECORE_SHARED)")
    return folder
