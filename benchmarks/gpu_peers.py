"""The same operators by other packages on a GPU. A function whose package is missing, or refuses, raises: the page then
says why. Peers of PyTorch calls alone, which also run on the CPU, are in peers.py.

Letters: B batch, T time, Hq / Hk query / key heads, D width, N sequences.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers

FLA, TWO_CALLS = "flash-linear-attention", "two varlen_attn and a merge"
SDPA = {"SDPA, flash": SDPBackend.FLASH_ATTENTION, "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION}
FLASH_MODULES = {
    "flash-attn 2": "flash_attn",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, T, H, D] each


# ---- causal softmax attention


def sdpa(name: str) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPA[name]):
            return peers.sdpa(q, k, v)

    return run


def flash_attention(name: str) -> Attention:
    attend = import_module(FLASH_MODULES[name]).flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return run


# ---- segment attention in two calls


@dataclass(frozen=True)
class Part:
    """Attention inside N pairs of a run of queries and a run of keys: their borders, int32 [N + 1], and longest."""

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int
    causal: bool

    @staticmethod
    def of(queries: list[int], keys: list[int], causal: bool, device: torch.device) -> "Part":
        """queries, keys: lengths."""
        borders = [
            torch.tensor([0, *lengths]).cumsum(0).to(dtype=torch.int32, device=device) for lengths in (queries, keys)
        ]
        return Part(*borders, max(queries), max(keys), causal)


class VarlenAttention:
    """torch.nn.attention.varlen with its gradients under a given logarithm of the denominators."""

    def __init__(self) -> None:
        module = import_module("torch.nn.attention.varlen")
        self.attend = module.varlen_attn
        self.options = {"return_aux": module.AuxRequest(lse=True)}
        if "enable_gqa" in inspect.signature(self.attend).parameters:  # where it is missing, groups need no word
            self.options["enable_gqa"] = True

    def forward(self, part: Part, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q [Tq, Hq, D], k and v [Tk, Hk, D] -> out [Tq, Hq, D], lse [Hq, Tq]."""
        window = (-1, 0) if part.causal else (-1, -1)
        borders = part.queries, part.keys, part.longest_queries, part.longest_keys
        return self.attend(q, k, v, *borders, window_size=window, **self.options)

    def backward(
        self, part: Part, gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._flash_attention_backward(
            gradient, q, k, v, out, lse, part.queries, part.keys, part.longest_queries, part.longest_keys,
            0.0, part.causal, torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device),
        )  # fmt: skip


class OwnAndPrompt(torch.autograd.Function):
    """Segment attention as the own segment and, behind the prompt, all of the prompt, merged by their denominators.

    The gradient of either part under the merged result and denominator is its share of the whole gradient. `calls` has
    VarlenAttention's two methods. q [T, Hq, D], k and v [T, Hk, D].
    """

    @staticmethod
    def forward(ctx, q, k, v, own: Part, cross: Part, calls):
        prompt = cross.longest_keys
        out, lse = calls.forward(own, q, k, v)
        behind = calls.forward(cross, q[prompt:], k[:prompt], v[:prompt])
        out[prompt:], lse[:, prompt:] = merged(out[prompt:], lse[:, prompt:], *behind)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = own, cross, calls
        return out

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, out, lse = ctx.saved_tensors
        own, cross, calls = ctx.call
        prompt = cross.longest_keys
        dq, dk, dv = calls.backward(own, gradient, q, k, v, out, lse)
        behind = (x[prompt:] for x in (gradient, q))
        ahead = (x[:prompt] for x in (k, v))
        shares = calls.backward(cross, *behind, *ahead, out[prompt:], lse[:, prompt:].contiguous())
        for whole, share in zip((dq[prompt:], dk[:prompt], dv[:prompt]), shares, strict=True):
            whole += share
        return dq, dk, dv, None, None, None


def merged(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over both sets of keys from attention over each: out [T, H, D], lse [H, T]."""
    both = torch.logaddexp(lse, other_lse)
    mine, theirs = ((x - both).exp().t()[..., None] for x in (lse, other_lse))
    return (mine * out + theirs * other_out).to(out.dtype), both


def own_and_prompt(step_ids: Tensor, calls) -> Attention:
    """Of one sequence [1, T] that begins with a prompt."""
    lengths = torch.bincount(step_ids[0]).tolist()
    prompt, rest = lengths[0], sum(lengths[1:])
    own = Part.of(lengths, lengths, True, step_ids.device)
    cross = Part.of([rest], [prompt], False, step_ids.device)
    return lambda q, k, v: OwnAndPrompt.apply(q[0], k[0], v[0], own, cross, calls)[None]


# ---- linear attention


def fla_linear_attention(decay: Tensor | None) -> Attention:
    """decay: None, [Hq] constant or [B, T, Hq]. k and v have as many heads as q."""
    if decay is None:
        chunk = import_module("fla.ops.linear_attn").chunk_linear_attn
        return lambda q, k, v: chunk(q, k, v, normalize=False, output_final_state=True)[0]
    chunk = import_module("fla.ops.simple_gla").chunk_simple_gla
    form = {"g_gamma" if decay.dim() == 1 else "g": decay}
    return lambda q, k, v: chunk(q, k, v, output_final_state=True, **form)[0]


def fla_state_update() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """states [B, H, D, D], q, k, v [B, H, D] -> [B, H, D]; the new states are another tensor, dropped here."""
    recurrent = import_module("fla.ops.simple_gla").fused_recurrent_simple_gla

    def run(states: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = recurrent(q[:, None], k[:, None], v[:, None], initial_state=states, output_final_state=True)
        return out[:, 0]

    return run
