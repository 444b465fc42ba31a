"""What every test file shares: reproducible randomness, and one thread unless a test says otherwise."""

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
    """The test runs once on each: on the CPU, with CUDA kernels on the emulator, and on a GPU.

    What is missing here is skipped, or fails where STATECORE_REQUIRE_EMULATOR=1 or STATECORE_REQUIRE_CUDA=1.
    Parametrised indirectly, tests also get "checked", the emulator that looks at every memory access.
    """
    require(request.param)
    with using(request.param) as device:
        yield device


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data and tokenizers that is not part of the project."""
    folder = Path(os.environ.get("STATECORE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the shared data folder, and {folder} is not there (set STATECORE_SHARED)")
    return folder
