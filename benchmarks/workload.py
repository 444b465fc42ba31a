"""What is measured: shapes, step ids, random inputs, and the work they mean.

Letters: T time, Hq / Hk query / key heads, D width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

ALL_THREADS = torch.get_num_threads()  # before any case changes it
ALPHA = (torch.arange(64) / 40).clamp(max=0.4)  # correction strengths, as in the models


@dataclass(frozen=True)
class Case:
    """One shape. heads: (Hq, Hk). prompt, step: tokens. threads: 0 on a GPU."""

    time: int
    dtype: torch.dtype
    heads: tuple[int, int]
    width: int
    prompt: int
    step: int
    threads: int = 0
    batch: int = 1
    device: str = "cpu"

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random q [B, T, Hq, D], k and v [B, T, Hk, D] that want gradients."""
        queries, keys = self.heads
        return tuple(self.random(heads, self.width) for heads in (queries, keys, keys))

    def random(self, *shape: int) -> Tensor:
        """[B, T, ...]; it wants gradients."""
        x = torch.randn(self.batch, self.time, *shape, device=self.device)
        return x.to(self.dtype).requires_grad_()

    def step_ids(self) -> Tensor:
        """int32 [B, T]: 0 in the prompt, then 1, 2, ... for `step` tokens each."""
        behind = torch.arange(self.time, device=self.device) - self.prompt
        ids = (behind.div(self.step, rounding_mode="floor") + 1).clamp(min=0).int()
        return ids.expand(self.batch, -1).contiguous()

    def labels(self) -> dict[str, object]:
        """The fields that every row of results has."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "time": self.time,
            "heads": "/".join(map(str, self.heads)),
            "width": self.width,
            "threads": self.threads,
            "batch": self.batch,
        }


@dataclass(frozen=True)
class ModelShape:
    """A Qwen2 model and the sequence it reads; the defaults are Qwen2.5-0.5B's but for the vocabulary."""

    hidden: int = 896
    layers: int = 24
    heads: tuple[int, int] = (14, 2)
    intermediate: int = 4864
    vocabulary: int = 32_768
    rank: int = 128
    prompt: int = 256
    step: int = 256
    prefill: int = 8192
    decoded: int = 512
    block: int = 32

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden}, {self.layers} layers, {self.heads[0]}/{self.heads[1]} heads, "
            f"intermediate {self.intermediate}, vocabulary {self.vocabulary}"
        )


@dataclass(frozen=True)
class Plan:
    """The sizes of a whole run; the defaults are what the committed page shows, QUICK is for trying the suite out."""

    time: int = 4096
    long: int = 32_768
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
    longest_masked: int = 4096
    longest_causal: int = 8192
    other_lengths: tuple[int, ...] = (512, 4096)
    heads: tuple[tuple[int, int], ...] = ((12, 2), (16, 16))
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    threads: tuple[int, ...] = tuple(sorted({1, ALL_THREADS}))
    width: int = 128
    prompt: int = 256
    step: int = 256
    short_step: int = 32
    chunks: tuple[int, ...] = (32, 64, 128)
    compiled_chunks: tuple[int, ...] = (64, 128)
    scan_heads: int = 24
    scan_width: int = 64
    scan_chunks: tuple[int, ...] = (64, 128)
    matmul: int = 1024
    caches_in_pool: float = 4.0
    model: ModelShape = field(default_factory=ModelShape)

    def case(self, dtype: torch.dtype, **changes) -> Case:
        """The first head layout on all threads, but for `changes`."""
        defaults = {
            "time": self.time, "heads": self.heads[0], "width": self.width, "threads": max(self.threads),
            "prompt": self.prompt, "step": self.step,
        }  # fmt: skip
        return Case(dtype=dtype, **(defaults | changes))

    def cases(self, **changes) -> list[Case]:
        """Every dtype and head layout, on one thread and on all of them."""
        return [
            self.case(dtype, **({"heads": heads, "threads": threads} | changes))
            for threads in self.threads
            for heads in self.heads
            for dtype in self.dtypes
        ]


QUICK = Plan(
    time=256, long=512, lengths=(128, 256), longest_masked=128, longest_causal=256, other_lengths=(128,),
    heads=((4, 2),), width=32, prompt=32, step=32, short_step=16, chunks=(16, 32), compiled_chunks=(32,), scan_heads=4,
    scan_width=16, scan_chunks=(32,), matmul=128, caches_in_pool=0.1,
    model=ModelShape(
        hidden=64, layers=2, heads=(4, 2), intermediate=96, vocabulary=256, rank=8, prompt=16, step=16, prefill=64,
        decoded=32, block=8,
    ),
)  # fmt: skip


def visible_pairs(step_ids: Tensor) -> int:
    """Pairs (token, token it sees) of segment attention over one sequence [1, T] whose ids do not decrease."""
    prompt, *steps = torch.bincount(step_ids[0][step_ids[0] >= 0]).tolist()
    return causal_pairs(prompt) + sum(tokens * prompt + causal_pairs(tokens) for tokens in steps)


def causal_pairs(time: int) -> int:
    return time * (time + 1) // 2


def attention_flops(pairs: int, case: Case) -> int:
    """Both matrix products of softmax attention over so many pairs a head, in one sequence."""
    return 4 * case.width * pairs * case.heads[0]


def linear_flops(case: Case) -> int:
    """What no chunk length can avoid: one rank-1 update a key head and one read a query head and token."""
    return 2 * case.width**2 * sum(case.heads) * case.time


CHUNK = {
    "float32": 32,
    "bfloat16": 48,
}  # tokens that the operators multiply at once: csrc/linear_attention/linear_tiles.h


def chunked_flops(time: int, heads: tuple[int, int], width: int, chunk: int) -> dict[str, int]:
    """Products of a chunked pass that stores no states, {"forward", "backward"}; of triangles what is visible.

    Forward: a state read a query head, an update a key head, scores and weighted values. Backward: the same again for
    dq, then dk and dv through the state, an update a query head, and four triangles.
    """
    queries, keys = heads
    state, triangle = 2 * width * width, 2 * width * (chunk + 1) // 2
    forward = queries * (state + 2 * triangle) + keys * state
    backward = forward + keys * 2 * state + queries * (state + 4 * triangle)
    return {"forward": time * forward, "backward": time * backward}
