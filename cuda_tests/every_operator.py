"""Calls every operator, forward and backward, on small shapes full of edge cases, for compute-sanitizer.

    compute-sanitizer --tool memcheck python cuda_tests/every_operator.py

Odd lengths, empty sequences, grouped heads, the widths of both tile sizes, every dtype. python_tests checks results;
this script only makes the calls.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from statecore import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
T = 197  # three tiles of 64, and a partial one


def qkv(heads: int, groups: int, width: int, value_width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    shapes = (heads, width), (groups, width), (groups, value_width)
    return [torch.randn(1, T, *shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def backward(*results: Tensor) -> None:
    torch.autograd.backward(results, [torch.randn_like(result) for result in results])


def calls(dtype: torch.dtype, device: str) -> Iterator[str]:
    """Makes the calls one by one and yields a description of each after it was made."""
    step_ids = (torch.arange(T, dtype=torch.int32, device=device) // 45)[None]
    step_ids[:, :3] = -1  # padding
    packed = torch.tensor([0, 1, 1, 130, T], dtype=torch.int32, device=device)  # one sequence is empty
    packed_ids = torch.cat([torch.arange(n, device=device) // 33 for n in packed.diff().tolist()])[None].int()
    alpha = torch.tensor([0, 0, 0.1, 0.2, 0.3], device=device)
    for width in (64, 128):
        q, k, v = qkv(4, 2, width, 64, dtype, device)
        decay = -torch.rand(1, T, 2, device=device)
        for log_decay in (None, decay.requires_grad_()):
            backward(*ops.linear_attention(q, k, v, log_decay))
            yield f"linear_attention, width {width}, {'no ' if log_decay is None else ''}decay"
        initial = torch.randn(4, 2, width, 64, device=device, requires_grad=True)
        backward(*ops.linear_attention(q, k, v, decay, initial, packed))
        yield f"linear_attention, width {width}, packed"

        backward(*ops.step_linear_attention(q, k, v, step_ids, alpha))
        yield f"step_linear_attention, width {width}"
        states = torch.randn(3, 4, 2, width, 64, device=device, requires_grad=True)
        seen = torch.tensor([-1, 0, 0, 0], dtype=torch.int32, device=device)
        backward(*ops.step_linear_attention(q, k, v, packed_ids, alpha, states, seen, packed))
        yield f"step_linear_attention, width {width}, packed"

        backward(*ops.segment_attention(q, k, v, step_ids))
        yield f"segment_attention, width {width}"
        backward(*ops.segment_attention(q, k, v, packed_ids, packed))
        yield f"segment_attention, width {width}, packed"
        backward(*ops.segment_attention(q[:, -1:], k, v, step_ids))
        yield f"segment_attention, width {width}, one query"

        gate = torch.randn(1, T, 4, 64, device=device, dtype=dtype, requires_grad=True)
        backward(*ops.mixed_attention(q, k, v, q, k, v, gate, step_ids, alpha))
        yield f"mixed_attention, width {width}"

        rows, pool = 5, torch.randn(3, 7, 2, width, 64, device=device)
        q, k, v = (x.detach()[0, :rows] for x in (q, k, v))
        slots = torch.tensor([6, 0, -1, 2, 3], dtype=torch.int32, device=device)
        ends = torch.tensor([-1, 0, 1, 2, 9], dtype=torch.int32, device=device)
        ops.state_update(pool, q, k, v, None, ends, alpha, slots)
        yield f"state_update, width {width}"


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    count = 0
    for dtype in DTYPES:
        for call in calls(dtype, device):
            if device == "cuda":
                torch.cuda.synchronize()
            print(f"{dtype}: {call}", flush=True)
            count += 1
    print(f"{count} calls")


if __name__ == "__main__":
    main()
