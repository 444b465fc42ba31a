"""What every test file shares: reproducible randomness, and one thread unless a test says otherwise."""

import os
from pathlib import Path

import pytest
import torch

from statecore import ops


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    """The test runs once on each. Without a GPU the second is skipped, or fails where STATECORE_REQUIRE_CUDA=1."""
    if request.param == "cuda":
        missing = None
        if ops.build_info()["cuda_architectures"] == "none":
            missing = "statecore was built without CUDA kernels"
        elif not torch.cuda.is_available():
            missing = "torch finds no GPU here"
        if missing and os.environ.get("STATECORE_REQUIRE_CUDA") == "1":
            pytest.fail(f"STATECORE_REQUIRE_CUDA=1, but {missing}")
        if missing:
            pytest.skip(f"needs a GPU: {missing}")
    return request.param


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data and tokenizers that is not part of the project."""
    folder = Path(os.environ.get("STATECORE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the shared data folder, and {folder} is not there (set STATECORE_SHARED)")
    return folder
