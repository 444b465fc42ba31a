"""The operators in a few lines of eager torch each: the specification that every backend is tested against.

Written to be read, not to be fast: recurrences go token by token, softmax takes one [Tq, Tk] mask. Everything is
differentiable by torch's autograd (except `state_update`, which works in place) and computes in the dtype of its
inputs, float64 included. Fast code never imports this module.

Letters: B batch, T time, Hq / Hk / Hv query / key / value heads, Dk / Dv widths, N sequences, P slots.
"""

import torch
from torch import Tensor

PADDING = -1  # step id of padding
PROMPT = 0  # step id of the prompt


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, *, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t,  out_t = scale * q_t S_t.

    (arXiv 2602.01198 eq. 3; with decay arXiv 2405.21060)
    """
    out, final = {}, []
    for n, (b, tokens) in enumerate(_sequences(q, cu_seqlens)):
        state = _zero_state(k, v) if initial_state is None else initial_state[n].to(_state_dtype(v))
        for t in tokens:
            if log_decay is not None:
                state = state * log_decay[b, t].to(state.dtype).exp()[:, None, None]
            state = state + _outer(k[b, t], v[b, t])
            out[b, t] = _read(q[b, t], state, scale)
        final.append(state)
    return _assemble(out, q, v), _stack(final, k, v)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, step_ids: Tensor, cu_seqlens: Tensor | None = None, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of token i over tokens j <= i of the prompt and of i's own step.  (arXiv 2602.01198 sec. 3)"""
    q, k, v = _same_heads(q, k, v)
    scores = torch.einsum("bihd,bjhd->bhij", q * _scale(q, scale), k)
    visible = segment_mask(step_ids, q.shape[1], cu_seqlens)[:, None]
    padding = ~visible.any(-1)  # output 0, lse -inf
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.where(padding[..., None], 0.0, scores).logsumexp(-1)
    probabilities = (scores - lse[..., None]).exp()
    out = torch.einsum("bhij,bjhd->bihd", probabilities, v)
    return out, lse.masked_fill(padding, float("-inf")).to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def segment_mask(step_ids: Tensor, queries: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """[B, Tk] step ids -> bool [B, Tq, Tk], query i attends to key j; the queries are the last Tq tokens."""
    keys = step_ids.shape[1]
    key_id, query_id = step_ids[:, None, :], step_ids[:, keys - queries :, None]
    position = torch.arange(keys, device=step_ids.device)
    visible = (position <= position[keys - queries :, None]) & (query_id != PADDING)
    visible = visible & ((key_id == PROMPT) | (key_id == query_id))
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
        visible = visible & (sequence == sequence[:, None])
    return visible


def step_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, step_ids: Tensor, alpha: Tensor, initial_states: Tensor | None = None,
    initial_step: Tensor | None = None, cu_seqlens: Tensor | None = None, *, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Linear attention whose state is corrected whenever a reasoning step ends.  (arXiv 2602.01198 sec. 4)"""
    out, final = {}, []
    for n, (b, tokens) in enumerate(_sequences(q, cu_seqlens)):
        states = (_zero_state(k, v),) * 3 if initial_states is None else tuple(initial_states[:, n].to(_state_dtype(v)))
        last = PADDING if initial_step is None else int(initial_step[n])
        for t in tokens:
            step = int(step_ids[b, t])
            if step == PADDING:
                continue
            if last != PADDING and step > last:
                states = end_step(states, last, alpha)
            running, start, prompt = states
            states = (running + _outer(k[b, t], v[b, t]), start, prompt)
            out[b, t] = _read(q[b, t], states[0], scale)
            last = step
        final.append(torch.stack(states))
    return _assemble(out, q, v), torch.stack(final, 1) if final else torch.stack([_stack([], k, v)] * 3)


def end_step(states: tuple[Tensor, Tensor, Tensor], step: int, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(running, step start, prompt) states at the end of step `step` -> the same three after the correction.

    A step t >= 2 changes the state by 1 - alpha of its own change plus alpha of the mean change over earlier steps,
    which telescopes to (S_{t-1} - S_0) / (t - 1). Step 1 has no earlier steps. The end of the prompt (step 0) sets all
    three states to the running one.
    """
    running, start, prompt = states
    if step == PROMPT:
        return running, running, running
    strength = float(alpha[step]) if 2 <= step < len(alpha) else 0.0
    if strength:
        running = start + (1 - strength) * (running - start) + strength * (start - prompt) / (step - 1)
    return running, running, prompt


def mixed_attention(
    q: Tensor, k: Tensor, v: Tensor, lin_q: Tensor, lin_k: Tensor, lin_v: Tensor, gate: Tensor, step_ids: Tensor,
    alpha: Tensor, initial_states: Tensor | None = None, initial_step: Tensor | None = None,
    cu_seqlens: Tensor | None = None, *, scale: float | None = None, lin_scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Segment attention + sigmoid(gate) * step linear attention.  (arXiv 2602.01198 sec. 3)"""
    out, _ = segment_attention(q, k, v, step_ids, cu_seqlens, scale=scale)
    own_ids = step_ids[:, step_ids.shape[1] - q.shape[1] :]
    lin_out, states = step_linear_attention(
        lin_q, lin_k, lin_v, own_ids, alpha, initial_states, initial_step, cu_seqlens, scale=lin_scale
    )
    return out + gate.sigmoid() * lin_out, states


def state_update(
    states: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, ends_step: Tensor | None = None,
    alpha: Tensor | None = None, slots: Tensor | None = None, *, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """One token per row: rank-1 update of its state, read, and the correction if it ends a step. Changes `states`."""
    out = {}
    for b in range(q.shape[0]):
        slot = b if slots is None else int(slots[b])
        if slot == PADDING:
            continue
        running = states[0, slot]
        if log_decay is not None:
            running = running * log_decay[b].to(running.dtype).exp()[:, None, None]
        states[0, slot] = running + _outer(k[b], v[b])
        out[b, 0] = _read(q[b], states[0, slot], scale)
        # A slot with one state has nothing to correct.
        if states.shape[0] == 3 and ends_step is not None and (step := int(ends_step[b])) >= 0:
            states[:, slot] = torch.stack(end_step(tuple(states[:, slot].clone()), step, alpha))
    return _assemble(out, q[:, None], v[:, None])[:, 0]


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, range]]:
    """(batch row, its tokens) of every sequence."""
    if cu_seqlens is None:
        return [(b, range(q.shape[1])) for b in range(q.shape[0])]
    return [
        (0, range(start, end)) for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    ]


def _state_dtype(v: Tensor) -> torch.dtype:
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def _zero_state(k: Tensor, v: Tensor) -> Tensor:
    return v.new_zeros(v.shape[-2], k.shape[-1], v.shape[-1], dtype=_state_dtype(v))


def _stack(states: list[Tensor], k: Tensor, v: Tensor) -> Tensor:
    return torch.stack(states) if states else _zero_state(k, v)[None][:0]


def _outer(k: Tensor, v: Tensor) -> Tensor:
    """k [Hk, Dk], v [Hv, Dv] -> k^T v of every value head [Hv, Dk, Dv]; value heads of a group share a key (GVA)."""
    k = k.repeat_interleave(v.shape[0] // k.shape[0], dim=0).to(_state_dtype(v))
    return k[:, :, None] * v[:, None, :]


def _read(q: Tensor, state: Tensor, scale: float | None) -> Tensor:
    """q [Hq, Dk], state [Hv, Dk, Dv] -> [max(Hq, Hv), Dv]; query heads of a group share a state (GQA)."""
    heads = max(q.shape[0], state.shape[0])
    q, state = q.repeat_interleave(heads // q.shape[0], dim=0), state.repeat_interleave(heads // state.shape[0], dim=0)
    return torch.einsum("hk,hkv->hv", q.to(state.dtype) * _scale(q, scale), state)


def _assemble(rows: dict[tuple[int, int], Tensor], q: Tensor, v: Tensor) -> Tensor:
    """{(b, t): [Ho, Dv]} -> [B, T, Ho, Dv] in the dtype of v; tokens without an entry are 0."""
    batch, time, heads = q.shape[0], q.shape[1], max(q.shape[2], v.shape[2])
    nothing = v.new_zeros(heads, v.shape[-1])
    flat = [rows.get((b, t), nothing).to(v.dtype) for b in range(batch) for t in range(time)]
    return torch.stack(flat).view(batch, time, heads, -1) if flat else v.new_zeros(batch, time, heads, v.shape[-1])


def _same_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Repeats the heads (dim 2) of grouped tensors so that all have the same number."""
    heads = max(x.shape[2] for x in tensors)
    return tuple(x.repeat_interleave(heads // x.shape[2], dim=2) for x in tensors)
