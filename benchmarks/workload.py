"""What is measured: shapes, step ids and random inputs.

Letters: B batch, T time, Hq / Hk query / key heads, D width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ALL_THREADS = torch.get_num_threads()  # before any case changes it
ALPHA = (torch.arange(64) / 40).clamp(max=0.4)  # correction strengths, as in the models
DTYPES = torch.float32, torch.bfloat16
CPU_TIME, CPU_HEADS = 4096, ((12, 2), (16, 16))


@dataclass(frozen=True)
class Case:
    """One shape. heads: (Hq, Hk). prompt, step: their tokens. threads: 0 on a GPU."""

    dtype: torch.dtype
    time: int
    heads: tuple[int, ...] = (12, 2)
    width: int = 128
    prompt: int = 256
    step: int = 256
    threads: int = 0
    batch: int = 1
    device: str = "cpu"

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random q [B, T, Hq, D], k and v [B, T, Hk, D] that require gradients."""
        queries, keys = self.heads
        return tuple(self.random(heads, self.width) for heads in (queries, keys, keys))

    def random(self, *shape: int) -> Tensor:
        """[B, T, *shape]; requires gradients."""
        x = torch.randn(self.batch, self.time, *shape, device=self.device)
        return x.to(self.dtype).requires_grad_()

    def step_ids(self) -> Tensor:
        """int32 [B, T]: 0 in the prompt, then 1, 2, ... for `step` tokens each."""
        behind = torch.arange(self.time, device=self.device) - self.prompt
        ids = (behind.div(self.step, rounding_mode="floor") + 1).clamp(min=0).int()
        return ids.expand(self.batch, -1).contiguous()

    def labels(self) -> dict[str, str | int]:
        """What a row says of its case. Decoding has rows (B) of one token and no T."""
        labels = {"dtype": str(self.dtype).removeprefix("torch.")}
        if self.batch > 1 or self.time == 1:
            labels["B"] = self.batch
        if self.time > 1:
            labels["T"] = self.time
        labels |= {"heads": "/".join(map(str, self.heads)), "D": self.width}
        return labels | ({"threads": self.threads} if self.threads else {})

    def small(self) -> "Case":
        """A tiny shape of the same kind, for a trial run."""
        time = min(self.time, 128)
        step = time if self.step >= self.time else min(self.step, 32)
        heads = (4, 2) if self.heads[0] > 1 else self.heads
        return replace(
            self, time=time, heads=heads, width=16, prompt=min(self.prompt, 32), step=step, batch=min(self.batch, 3)
        )


def cpu_case(dtype: torch.dtype, **changes) -> Case:
    """The standard shape of the CPU's page, but for `changes`."""
    return Case(dtype=dtype, **({"time": CPU_TIME, "threads": ALL_THREADS} | changes))


def cpu_cases() -> list[Case]:
    """Every dtype and head layout, on one thread and on all of them."""
    threads = sorted({1, ALL_THREADS})
    return [cpu_case(dtype, heads=heads, threads=n) for n in threads for heads in CPU_HEADS for dtype in DTYPES]


def visible_pairs(step_ids: Tensor) -> int:
    """Visible (query, key) pairs of segment attention over one sequence [1, T] whose ids never decrease."""
    prompt, *steps = torch.bincount(step_ids[0][step_ids[0] >= 0]).tolist()
    return causal_pairs(prompt) + sum(tokens * prompt + causal_pairs(tokens) for tokens in steps)


def causal_pairs(time: int) -> int:
    return time * (time + 1) // 2
