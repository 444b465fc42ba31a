"""The same operators by others: composed of PyTorch calls, as fast as such compositions get, and by other packages.
Where a package is missing or refuses, these functions raise, and the page says why.

Letters: B batch, T time, Hq / Hk query / key heads, G = Hq / Hk, D width, C chunk length, N = T / C chunks.
"""

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

MASKED, FLEX, TWO_CALLS = "SDPA with the mask", "FlexAttention", "two varlen_attn and a merge"
CHUNKED, COMPILED, SCAN = "eager chunked", "torch.compile of chunked", "Mamba-2's chunk scan in transformers"
EAGER_UPDATE, FLA = "eager outer product and read", "flash-linear-attention"
SDPA = {"SDPA, flash": SDPBackend.FLASH_ATTENTION, "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION}
FLASH_MODULES = {
    "flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn.cute",
}  # fmt: skip
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, T, H, D] each


# ---- softmax attention


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, T, H, D] softmax attention by torch's fused kernel: under a boolean mask [B, T, T], or causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None]
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


def causal_attention(name: str) -> Attention:
    """By one of SDPA's backends, or by one of FLASH_MODULES."""
    attend = None if name in SDPA else import_module(FLASH_MODULES[name]).flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if attend is None:
            with sdpa_kernel(SDPA[name]):
                return sdpa(q, k, v)
        out = attend(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return run


def block_mask(step_ids: Tensor) -> BlockMask:
    """FlexAttention's form of the segment mask of one sequence [1, T]."""
    ids = step_ids[0]

    def visible(batch, head, i, j):
        return (j <= i) & ((ids[j] == 0) | (ids[j] == ids[i]))

    return create_block_mask(visible, None, None, len(ids), len(ids), device=ids.device)


@functools.lru_cache(maxsize=1)
def flex(shapes: tuple[torch.Size, ...], gradients: bool) -> Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]:
    """FlexAttention over [B, T, H, D], compiled on its first call, once for all masks over the same shapes.

    Without gradients for the CPU, where it has no backward and refuses inputs that require gradients even where none
    are recorded.
    """
    torch._functorch.config.donated_buffer = False  # a backward that is timed again and again keeps its buffers
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        q, k, v = ((x if gradients else x.detach()).transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return run


# ---- segment attention in two calls


class Part(NamedTuple):
    """Attention inside N pairs of a run of queries and a run of keys: their offsets, int32 [N + 1], and longest."""

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int
    causal: bool

    @staticmethod
    def of(queries: list[int], keys: list[int], causal: bool, device: torch.device) -> "Part":
        """queries, keys: lengths."""
        offsets = (torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32) for lengths in (queries, keys))
        return Part(*offsets, max(queries), max(keys), causal)


class VarlenAttention:
    """torch.nn.attention.varlen with its gradients under a given lse."""

    def __init__(self) -> None:
        module = import_module("torch.nn.attention.varlen")
        self.attend = module.varlen_attn
        self.options = {"return_aux": module.AuxRequest(lse=True)}
        if "enable_gqa" in inspect.signature(self.attend).parameters:  # older versions take groups as they come
            self.options["enable_gqa"] = True

    def forward(self, part: Part, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q [Tq, Hq, D], k and v [Tk, Hk, D] -> out [Tq, Hq, D], lse [Hq, Tq]."""
        window = (-1, 0) if part.causal else (-1, -1)
        return self.attend(q, k, v, *part[:4], window_size=window, **self.options)

    def backward(
        self, part: Part, gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._flash_attention_backward(
            gradient, q, k, v, out, lse, *part[:4], 0.0, part.causal,
            torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device),
        )  # fmt: skip


class OwnAndPrompt(torch.autograd.Function):
    """Segment attention as causal attention inside prompt and steps, merged by lse with attention of all tokens behind
    the prompt to the prompt.

    The gradient of either part under the merged output and lse is its share of the whole gradient. `calls` has
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
        shares = calls.backward(
            cross, gradient[prompt:], q[prompt:], k[:prompt], v[:prompt], out[prompt:], lse[:, prompt:].contiguous()
        )
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
    own = Part.of(lengths, lengths, True, step_ids.device)
    cross = Part.of([sum(lengths[1:])], lengths[:1], False, step_ids.device)
    return lambda q, k, v: OwnAndPrompt.apply(q[0], k[0], v[0], own, cross, calls)[None]


# ---- linear attention


def chunked_linear_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int = 64, carry: Tensor | None = None) -> Tensor:
    """Linear attention without decay by batched matrix products inside chunks and between them. T is a multiple of C.

    The query heads of a group lie side by side in one product, so nothing is repeated. States are summed in float32.
    carry: float32 [N, N], the state at the start of chunk n is sum_m carry[n, m] (sum of chunk m): a matrix product is
    faster than a cumulative sum until N is in the hundreds. None means a cumulative sum.
    """
    batch, time, heads, width = q.shape
    keys, chunks = k.shape[2], time // chunk
    group = heads // keys
    q = (q * width**-0.5).view(batch, chunks, chunk, keys, group, width).permute(0, 3, 1, 4, 2, 5)
    q = q.reshape(batch, keys, chunks, group * chunk, width)
    k, v = (x.transpose(1, 2).reshape(batch, keys, chunks, chunk, -1) for x in (k, v))
    sums = (k.transpose(-1, -2) @ v).float()
    if carry is None:
        states = F.pad(sums.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))
    else:
        states = (carry @ sums.flatten(3)).view_as(sums)
    scores = (q @ k.transpose(-1, -2)).unflatten(3, (group, chunk)).tril().flatten(3, 4)
    out = q @ states.to(q.dtype) + scores @ v
    return out.unflatten(3, (group, chunk)).permute(0, 2, 4, 1, 3, 5).reshape(batch, time, heads, -1)


def sums_before(chunks: int) -> Tensor:
    """The carry of linear attention: every earlier chunk counts once."""
    return torch.ones(chunks, chunks).tril(-1)


def corrected_sums_before(alpha: Tensor, time: int, prompt: int, step: int, chunk: int) -> Tensor:
    """The carry of step linear attention where prompt and all steps have fixed lengths, multiples of the chunk.

    The corrected states are linear combinations of the chunks' sums; the recurrence runs on their coefficients [N].
    """
    chunks = time // chunk
    carry = torch.zeros(chunks, chunks)
    running = start = prompt_end = torch.zeros(chunks)
    for index in range(chunks):
        behind = index * chunk - prompt
        if behind >= 0 and behind % step == 0:
            ended = behind // step
            strength = float(alpha[ended]) if 2 <= ended < len(alpha) else 0.0
            if ended == 0:
                prompt_end = running
            elif strength:
                running = start + (1 - strength) * (running - start) + strength * (start - prompt_end) / (ended - 1)
            start = running
        carry[index] = running
        running = running.clone()
        running[index] += 1
    return carry


def fla_linear_attention(decay: Tensor | None) -> Attention:
    """decay: None, constant [Hq], or [B, T, Hq]. k and v have as many heads as q."""
    if decay is None:
        attend = import_module("fla.ops.linear_attn").chunk_linear_attn
        return lambda q, k, v: attend(q, k, v, normalize=False, output_final_state=True)[0]
    attend = import_module("fla.ops.simple_gla").chunk_simple_gla
    form = {"g_gamma" if decay.dim() == 1 else "g": decay}
    return lambda q, k, v: attend(q, k, v, output_final_state=True, **form)[0]


# ---- state update


def eager_state_update(states: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One decoding token per row: outer product into the running state, and read. states [1, P, Hk, Dk, Dv] changed in
    place, q [P, Hq, Dk], k [P, Hk, Dk], v [P, Hk, Dv] -> [P, Hq, Dv].
    """
    rows, heads, width = q.shape
    states[0].addcmul_(k[..., :, None].float(), v[..., None, :].float())
    grouped = (q.float() * width**-0.5).view(rows, k.shape[1], -1, width)
    return (grouped @ states[0]).view(rows, heads, -1).to(q.dtype)


def fla_state_update() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """states [B, H, D, D], q, k, v [B, H, D] -> [B, H, D]; the new states are another tensor, dropped here."""
    recurrent = import_module("fla.ops.simple_gla").fused_recurrent_simple_gla

    def run(states: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = recurrent(q[:, None], k[:, None], v[:, None], initial_state=states, output_final_state=True)
        return out[:, 0]

    return run
