"""The same operators composed of PyTorch calls, as fast as such compositions get: what a good user would write
without statecore.

Letters: B batch, T time, Hq / Hk query / key heads, G = Hq / Hk, D width, C chunk length, N = T / C chunks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

FLEX, CHUNKED, EAGER_UPDATE = "FlexAttention", "eager chunked", "eager outer product and read"


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, T, H, D] softmax attention by torch's fused kernel: under a boolean mask [B, T, T], or causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None]
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


def masked_sdpa_bytes(time: int, dtype: torch.dtype) -> int:
    """What the fused kernel needs under a mask: the boolean mask, and its copy as numbers that are added."""
    return time * time * (1 + dtype.itemsize)


def block_mask(step_ids: Tensor) -> BlockMask:
    """FlexAttention's form of the segment mask of one sequence [1, T]."""
    ids = step_ids[0]

    def sees(batch, head, i, j):
        return (j <= i) & ((ids[j] == 0) | (ids[j] == ids[i]))

    return create_block_mask(sees, None, None, len(ids), len(ids), device=ids.device)


def flex(gradients: bool = False) -> Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]:
    """A freshly compiled FlexAttention over [B, T, H, D]; compiles on its first call.

    Without gradients for the CPU, where it has no backward and refuses inputs that want gradients even where none are
    recorded.
    """
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        q, k, v = ((x if gradients else x.detach()).transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return run


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
    weights = (q @ k.transpose(-1, -2)).unflatten(3, (group, chunk)).tril().flatten(3, 4)
    out = q @ states.to(q.dtype) + weights @ v
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
    running = start = origin = torch.zeros(chunks)
    for index in range(chunks):
        behind = index * chunk - prompt
        if behind >= 0 and behind % step == 0:
            ended = behind // step
            strength = float(alpha[ended]) if 2 <= ended < len(alpha) else 0.0
            if ended == 0:
                origin = running
            elif strength:
                running = start + (1 - strength) * (running - start) + strength * (start - origin) / (ended - 1)
            start = running
        carry[index] = running
        running = running.clone()
        running[index] += 1
    return carry


def chunked_mamba_scan(x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, chunk: int) -> Tensor:
    """Mamba-2's SSD by transformers' own CPU function, the whole of its mixer between convolution and gate.

    x [B, T, Hv, Dv], dt [B, T, Hv], decay [Hv] (< 0), b and c [B, T, groups, Dk] -> [B, T, Hv, Dv] in float32.
    """
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return mamba2_chunk_scan(x, dt, decay, b, c, chunk)


def eager_state_update(states: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One decoding token a row: outer product into the running state and read. states [1, P, Hk, Dk, Dv] changed in
    place, q [P, Hq, Dk], k [P, Hk, Dk], v [P, Hk, Dv] -> [P, Hq, Dv].
    """
    rows, heads, width = q.shape
    states[0].addcmul_(k[..., :, None].float(), v[..., None, :].float())
    grouped = (q.float() * width**-0.5).view(rows, k.shape[1], -1, width)
    return (grouped @ states[0]).view(rows, heads, -1).to(q.dtype)
