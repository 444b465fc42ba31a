"""Oracles of the linear attention tests: masked forms in float64, and comparison of results and gradients."""

from collections.abc import Callable, Sequence

import torch
from cases import GRADIENT, VALUE, relative_error
from torch import Tensor


def scattered(x: Tensor, aligned: bool = False) -> Tensor:
    """The values of x `[B, T, heads, width]` in memory where no two dimensions are contiguous.

    aligned: rows start at multiples of 16 bytes, if the width is one.
    """
    batch, time, heads, width = x.shape
    offset, gap = (8, 16) if aligned else (2, 3)
    memory = torch.randn(heads, time, batch, width + gap, dtype=torch.float64).to(x)
    view = memory.permute(2, 1, 0, 3)[..., offset : offset + width]
    view.copy_(x)
    return view


def leaf(x: Tensor | None, dtype: torch.dtype | None = None, requires_grad: bool = True) -> Tensor | None:
    if x is None or not x.is_floating_point():
        return x
    return x.detach().to(dtype or x.dtype).requires_grad_(requires_grad)


def run(function: Callable, args: Sequence, kwargs: dict, cotangents: Sequence[Tensor] | None = None):
    """Results, gradients of the args that require one, and the cotangents of the results (default: random)."""
    results = function(*args, **kwargs)
    if cotangents is None:
        cotangents = [torch.randn_like(x) for x in results]
    total = sum((x.double() * c.double()).sum() for x, c in zip(results, cotangents, strict=True))
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        gradients = []
    elif total.requires_grad:
        gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
    else:  # only padding: results do not depend on the inputs
        gradients = [torch.zeros_like(x) for x in leaves]
    return [x.detach() for x in results], list(gradients), cotangents


def assert_like_reference(
    operator: Callable, reference: Callable, args: Sequence, constants: Sequence[int] = (), **kwargs
) -> None:
    """Values and gradients of `operator` against `reference` in float64; `constants` are args without a gradient."""
    dtype = args[0].dtype
    own = [x if i in constants else leaf(x) for i, x in enumerate(args)]
    exact = [x if i in constants else leaf(x, torch.float64) for i, x in enumerate(args)]
    results, gradients, cotangents = run(operator, own, kwargs)
    wanted, wanted_gradients, _ = run(reference, exact, kwargs, cotangents)
    for kind, budget, pairs in (
        ("result", VALUE[dtype], zip(results, wanted, strict=True)),
        ("gradient", GRADIENT[dtype], zip(gradients, wanted_gradients, strict=True)),
    ):
        for i, (x, y) in enumerate(pairs):
            # For sums of terms around 1 that cancel to 0, the absolute error counts.
            error = min(relative_error(x, y), float((x.double() - y).norm()))
            assert error <= budget, f"{kind} {i}: error {error:.2e}"


def same_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, T, heads, width] each, grouped heads repeated."""
    heads = max(x.shape[2] for x in tensors)
    return tuple(x.repeat_interleave(heads // x.shape[2], dim=2) for x in tensors)


def masked_linear_attention(q, k, v, log_decay=None, initial_state=None, *, scale=None):
    """`linear_attention` as one [T, T] matrix per head (arXiv 2405.21060's duality); differentiable, no packing."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, time, value_heads = v.shape[:3]
    decay = q.new_zeros(batch, time, value_heads) if log_decay is None else log_decay.to(q.dtype)
    total = decay.cumsum(1).transpose(1, 2)  # [B, Hv, T]
    causal = torch.ones(time, time, dtype=torch.bool, device=q.device).tril()
    weight = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, float("-inf")).exp()
    k_of_value = k.repeat_interleave(value_heads // k.shape[2], dim=2)
    to_end = (total[..., -1:] - total).exp()
    state = torch.einsum("bhj,bjhd,bjhe->bhde", to_end, k_of_value, v)
    heads = max(q.shape[2], value_heads)
    q, k, v = same_heads(q, k, v)
    weight, total = (x.repeat_interleave(heads // value_heads, dim=1) for x in (weight, total))
    out = _weighted(weight, q * scale, k, v)
    if initial_state is not None:
        initial = initial_state.to(q.dtype)
        state = state + (decay.sum(1).exp())[..., None, None] * initial
        initial = initial.repeat_interleave(heads // value_heads, dim=1)
        out = out + torch.einsum("bhi,bihd,bhde->bihe", total.exp(), q * scale, initial)
    return out, state


def _weighted(weight: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(-1, -2) * weight) @ v).transpose(1, 2)


def step_weights(ids: Tensor, alpha: Tensor) -> Tensor:
    """ids [T] of one sequence, 0, 1, 2, ... -> float64 [T, T], weight of token b in the state that token a reads.

    W[t] = W[t-1] + (1 - alpha_t) e_t + alpha_t / (t-1) W[t-1] is the share of every step's own sum in S_t - S_0. The
    prompt and a token's own step have weight 1.
    """
    steps = int(ids.max()) + 1
    shares = torch.zeros(steps, steps, dtype=torch.float64)
    for t in range(1, steps):
        strength = float(alpha[t]) if 2 <= t < len(alpha) else 0.0
        shares[t] = shares[t - 1] * (1 + (strength / (t - 1) if t > 1 else 0.0))
        shares[t, t] = 1 - strength
    shares[:, 0] = 1
    before = shares[ids.long().clamp_min(1) - 1][:, ids.long()]  # [last finished step of a, step of b]
    same = ids[:, None] == ids[None, :]
    return torch.where(same | (ids == 0)[None, :], 1.0, before).tril()


def masked_step_linear_attention(q, k, v, ids, alpha, *, scale=None):
    """`step_linear_attention` as a weighted mask, for new sequences with ids 0, 1, 2, ... without gaps or padding.

    Returns out and the running state.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weight = torch.stack([step_weights(row, alpha) for row in ids.cpu()])[:, None].to(q)
    state = torch.einsum("bj,bjhd,bjhe->bhde", weight[:, 0, -1], k, v)
    q, k, v = same_heads(q, k, v)
    return _weighted(weight, q * scale, k, v), state
