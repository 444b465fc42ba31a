"""What every test file shares: reproducible randomness, and one thread unless a test says otherwise."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data and tokenizers that is not part of the project."""
    folder = Path(os.environ.get("STATECORE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the shared data folder, and {folder} is not there (set STATECORE_SHARED)")
    return folder
