"""The same operators composed of eager PyTorch calls, as fast as such compositions get: what a user would write
without statecore.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from statecore.reference import segment_mask


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, T, H, D] softmax attention by torch's fused kernel: under a boolean mask [B, T, T], or causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None]
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


def masked_segment_attention(q: Tensor, k: Tensor, v: Tensor, step_ids: Tensor) -> Tensor:
    """Segment attention by torch's fused kernel; building the mask is part of the work."""
    return sdpa(q, k, v, segment_mask(step_ids, q.shape[1]))


def chunked_linear_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int = 64) -> Tensor:
    """Linear attention without decay by batched matrix products: inside chunks, and between them through a cumulative
    sum of states.

    T must be a multiple of the chunk. States are float32, and chunk states are summed in one cumsum instead of a Python
    loop.
    """
    batch, time, heads, width = q.shape
    group = heads // k.shape[2]
    q, k, v = (x.transpose(1, 2).reshape(batch, -1, time // chunk, chunk, x.shape[-1]) for x in (q * width**-0.5, k, v))
    states = (k.transpose(-1, -2) @ v).float().cumsum(2)
    states = F.pad(states[:, :, :-1], (0, 0, 0, 0, 1, 0)).to(q.dtype)
    if group > 1:
        k, v, states = (x.repeat_interleave(group, 1) for x in (k, v, states))
    out = q @ states + (q @ k.transpose(-1, -2)).tril() @ v
    return out.reshape(batch, heads, time, -1).transpose(1, 2)


def chunked_step_linear_attention(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, prompt: int, step: int) -> Tensor:
    """Step linear attention where prompt and all steps have fixed lengths (multiples of 64), so that steps can be
    batched.

    The corrected states are a linear combination of the steps' sums: a Python loop over steps carries them.
    """
    batch, time, heads, width = q.shape
    group = heads // k.shape[2]
    bounds = list(zip([0, *range(prompt, time, step)], range(prompt, time + 1, step), strict=True))
    running = q.new_zeros(batch, k.shape[2], width, v.shape[-1], dtype=torch.float32)
    previous = zero = running
    states = []
    for index, (start, end) in enumerate(bounds):
        states.append(running)
        added = torch.einsum("bthk,bthv->bhkv", k[:, start:end], v[:, start:end]).float()
        running = states[-1] + added
        if index == 0:
            previous = zero = running
        else:
            strength = float(alpha[index]) if 2 <= index < len(alpha) else 0.0
            if strength:
                direction = (previous - zero) / (index - 1)
                running = previous + (1 - strength) * (running - previous) + strength * direction
            previous = running
    parts = []
    for state, (start, end) in zip(states, bounds, strict=True):
        local = chunked_linear_attention(q[:, start:end], k[:, start:end], v[:, start:end])
        state = state.to(q.dtype).repeat_interleave(group, 1)
        parts.append(local + torch.einsum("bthk,bhkv->bthv", q[:, start:end] * width**-0.5, state))
    return torch.cat(parts, 1)


def eager_state_update(states: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One decoding token a row: outer product into the running state and read. states [1, P, Hv, Dk, Dv] changed in
    place.
    """
    group = q.shape[1] // k.shape[1]
    states[0].add_(k[..., :, None].float() * v[..., None, :].float())
    state = states[0].repeat_interleave(group, 1) if group > 1 else states[0]
    return ((q.float() * q.shape[-1] ** -0.5)[..., None, :] @ state)[..., 0, :].to(q.dtype)
