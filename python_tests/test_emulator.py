"""The devices "emulated" and "checked" run the CUDA kernels, and the CPU backend is restored afterwards."""

import pytest
import torch
from cases import Heads
from devices import emulator, require, using

from statecore import ops


def update(width: int) -> torch.Tensor:
    q, k, v = (x[0] for x in Heads(1, 1, 1, width, 16).qkv(1, 2, torch.float32))
    return ops.state_update(torch.zeros(1, 2, 1, width, 16), q, k, v)


@pytest.mark.parametrize("device", ["emulated", "checked"], indirect=True)
def test_cuda_kernels_serve_cpu_tensors(device):
    assert update(16).shape == (2, 1, 16)
    assert emulator(device.name).take_work() == (["state_update"], 0)
    with pytest.raises(RuntimeError, match="multiple of 16 up to 128 on CUDA"):
        update(24)
    assert torch.empty(3, device=device).isnan().all()


def test_the_cpu_backend_is_back_afterwards():
    require("emulated")
    with using("emulated"), pytest.raises(RuntimeError, match="on CUDA"):
        update(24)
    assert update(24).isfinite().all()
