"""The public operators: shapes, gradients, fakes and autocast of `torch.ops.statecore.*`.

Letters: B batch, T time, Hq / Hk / Hv query / key / value heads, Ho = max(Hq, Hv), Dk / Dv key / value width, N
sequences, P slots.

Common to all of them:

- q, k, v are all float32, all bfloat16 or all float16 (on CPU also float64), last dimension contiguous, other strides
  free; outputs have their dtype. Sums and states are float32 (float64 for float64 inputs).
- Heads are grouped in one of two ways: GQA (`Hk == Hv`, `Hq` a multiple of `Hk`) or, in `linear_attention` and
  `state_update`, GVA (`Hq == Hk`, `Hv` a multiple of `Hk`).
- Packed sequences: `B == 1` and `cu_seqlens` int32 `[N + 1]`, increasing from 0 to T. Without it every batch row is a
  sequence, `N == B`.
- `scale=None` means `Dk ** -0.5`; it multiplies q.
- `step_ids` int32 `[B, T]`: 0 for the prompt, 1, 2, ... for the reasoning steps, the next id for the answer; they never
  decrease within a sequence. -1 is padding: no token attends to it, it adds nothing to a state, its output is 0.
- Results are bitwise reproducible, forward and backward, with any number of threads. No double backward.
- On CUDA, widths are multiples of 16 up to 128, fastest at 64 and 128; no float64.
- Wrong shapes, dtypes, devices, head counts or strides raise RuntimeError before any work. So do wrong contents; on
  CUDA only with STATECORE_CHECK=1 in the environment, because the check synchronises with the host. Without it, wrong
  contents never cause reads or writes out of bounds, and rows with a slot out of range are skipped.

`statecore.reference` defines the same functions in eager torch.
"""

from pathlib import Path

import torch
from torch import Tensor

_LIBRARY = Path(__file__).with_name("_C.so")
if not _LIBRARY.exists():
    raise ImportError(
        f"statecore's C++ library {_LIBRARY} is missing: build it with `pip install .` in the source folder."
    )
torch.ops.load_library(_LIBRARY)
_ops = torch.ops.statecore


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, *, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal linear attention with an optional decay.

    `S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t`, `out_t = scale * q_t S_t` (update first, then read). Without decay
    this is the linear branch of arXiv 2602.01198 (eq. 3); with one scalar decay per head it is Mamba-2's SSD (arXiv
    2405.21060: q = C, k = B, v = dt * x, log_decay = dt * A). A sequence may be split between calls at any token, with
    the state carried over. Differentiable in q, k, v, log_decay and initial_state, through both results.

    Args:
        q: `[B, T, Hq, Dk]`.
        k: `[B, T, Hk, Dk]`.
        v: `[B, T, Hv, Dv]`.
        log_decay: float32 `[B, T, Hv]`, <= 0; None means no decay.
        initial_state: float32 `[N, Hv, Dk, Dv]`; None means zeros.
        cu_seqlens: int32 `[N + 1]`; None means one sequence per batch row.
        scale: factor of q; None means `Dk ** -0.5`.

    Returns:
        out `[B, T, Ho, Dv]` and the state after the last token of each sequence, float32 `[N, Hv, Dk, Dv]`.
    """
    return _ops.linear_attention(q, k, v, log_decay, initial_state, cu_seqlens, scale=scale)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, step_ids: Tensor, cu_seqlens: Tensor | None = None, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every token over the prompt and its own step (arXiv 2602.01198 sec. 3).

    Token i attends to the tokens `j <= i` of its sequence with `step_ids[j] == 0` or `step_ids[j] == step_ids[i]`. Work
    grows with the visible area and memory with T; no `[T, T]` mask is built. With one step and no prompt this is causal
    attention. Differentiable in q, k, v, through both results.

    Args:
        q: `[B, Tq, Hq, Dk]`.
        k: `[B, Tk, Hk, Dk]`, `Tk >= Tq`. If `Tk > Tq` (not with cu_seqlens), the queries are the last Tq of the Tk
            tokens: chunked prefill and decoding over a cache, whose empty slots have id -1 and may be anywhere.
        v: `[B, Tk, Hk, Dv]`.
        step_ids: int32 `[B, Tk]`.
        cu_seqlens: int32 `[N + 1]`; None means one sequence per batch row.
        scale: factor of q; None means `Dk ** -0.5`.

    Returns:
        out `[B, Tq, Hq, Dv]` and lse, the natural logarithm of each softmax denominator, float32 `[B, Hq, Tq]` (-inf
        for padding).
    """
    return _ops.segment_attention(q, k, v, step_ids, cu_seqlens, scale=scale)


def step_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, step_ids: Tensor, alpha: Tensor, initial_states: Tensor | None = None,
    initial_step: Tensor | None = None, cu_seqlens: Tensor | None = None, *, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Linear attention whose state is corrected at the end of every reasoning step (arXiv 2602.01198 sec. 4).

    Step t ends where the next token of its sequence has a larger id. Let S_raw be the state after its last token,
    S_{t-1} the state at its start and S_0 the state after the prompt. For t >= 2 the state then becomes
    `S_{t-1} + (1 - alpha[t]) (S_raw - S_{t-1}) + alpha[t] (S_{t-1} - S_0) / (t - 1)`: the momentum correction replaces
    part of the step's own change by the mean change over the steps before it. Step 1 is not corrected, nor the last
    step of a sequence, which has not ended. With alpha all zero this is `linear_attention`. A sequence may be split
    between calls at any token, with states and the last id carried over. Differentiable in q, k, v and initial_states,
    through both results.

    Args:
        q: `[B, T, Hq, Dk]`.
        k: `[B, T, Hk, Dk]`.
        v: `[B, T, Hk, Dv]`.
        step_ids: int32 `[B, T]`.
        alpha: float32 `[A]`, correction strength of step t at index t, 0 where `t >= A`; entries 0 and 1 are not used.
        initial_states: float32 `[3, N, Hk, Dk, Dv]`: the running state, that at the start of the current step, S_0;
            None means zeros.
        initial_step: int32 `[N]`, id of the last token in initial_states, -1 if there is none; None means -1 for all.
        cu_seqlens: int32 `[N + 1]`; None means one sequence per batch row.
        scale: factor of q; None means `Dk ** -0.5`.

    Returns:
        out `[B, T, Hq, Dv]` and states, float32 `[3, N, Hk, Dk, Dv]`, to pass as initial_states of the next call.
    """
    return _ops.step_linear_attention(q, k, v, step_ids, alpha, initial_states, initial_step, cu_seqlens, scale=scale)


def mixed_attention(
    q: Tensor, k: Tensor, v: Tensor, lin_q: Tensor, lin_k: Tensor, lin_v: Tensor, gate: Tensor, step_ids: Tensor,
    alpha: Tensor, initial_states: Tensor | None = None, initial_step: Tensor | None = None,
    cu_seqlens: Tensor | None = None, *, scale: float | None = None, lin_scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`segment_attention(q, k, v) + sigmoid(gate) * step_linear_attention(lin_q, lin_k, lin_v)`: the mixed attention
    module of arXiv 2602.01198 (sec. 3) without its projections. Differentiable in q, k, v, lin_q, lin_k, lin_v, gate
    and initial_states, through both results.

    Args:
        q: `[B, Tq, Hq, Dk]`.
        k: `[B, Tk, Hk, Dk]`, `Tk >= Tq` as in `segment_attention`.
        v: `[B, Tk, Hk, Dv]`.
        lin_q: `[B, Tq, Hq, Lk]` of the linear branch, which reads the last Tq step ids.
        lin_k: `[B, Tq, Hk, Lk]`.
        lin_v: `[B, Tq, Hk, Dv]`.
        gate: `[B, Tq, Hq, Dv]`, before the sigmoid.
        step_ids: int32 `[B, Tk]`.
        alpha, initial_states, initial_step, cu_seqlens: as in `step_linear_attention`.
        scale: factor of q; None means `Dk ** -0.5`.
        lin_scale: factor of lin_q; None means `Lk ** -0.5`.

    Returns:
        out `[B, Tq, Hq, Dv]` and states, float32 `[3, N, Hk, Lk, Dv]`.
    """
    return _ops.mixed_attention(
        q, k, v, lin_q, lin_k, lin_v, gate, step_ids, alpha, initial_states, initial_step, cu_seqlens,
        scale=scale, lin_scale=lin_scale,
    )  # fmt: skip


def state_update(
    states: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, ends_step: Tensor | None = None,
    alpha: Tensor | None = None, slots: Tensor | None = None, *, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Decodes one token per row: updates the row's state in place, reads it, and ends a step if the token ends one.

    `S <- exp(log_decay) S + k^T v`, `out = scale * q S`, then for rows with `ends_step[b] = t >= 0`: t = 0 ends the
    prompt and sets all three states to the running one; t >= 1 applies the correction of `step_linear_attention` and
    sets both the running state and the step start to the result. Not differentiable.

    Args:
        states: float32 `[3, P, Hv, Dk, Dv]` (running, step start, prompt), or `[1, P, Hv, Dk, Dv]` without
            correction; changed in place.
        q: `[B, Hq, Dk]`.
        k: `[B, Hk, Dk]`.
        v: `[B, Hv, Dv]`.
        log_decay: float32 `[B, Hv]`, <= 0; None means no decay.
        ends_step: int32 `[B]`, id of the step that this token ends, -1 if it ends none; None means -1 for all.
        alpha: float32 `[A]` as in `step_linear_attention`; required with ends_step if states holds all three.
        slots: int32 `[B]`, slot of each row, all different; -1 skips the row (out = 0). None means slot b for row b.
        scale: factor of q; None means `Dk ** -0.5`.

    Returns:
        out `[B, Ho, Dv]`.
    """
    return _ops.state_update(states, q, k, v, log_decay, ends_step, alpha, slots, scale=scale)


def build_info() -> dict[str, str | bool]:
    """How the library was compiled, and the CPU instruction set it uses on this machine."""
    return {
        "library": str(_LIBRARY),
        "cpu_isa": _ops.cpu_isa(),
        "cuda_architectures": _ops.cuda_architectures(),
        "torch_has_cuda": _ops.torch_has_cuda(),
    }


# mixed_attention has no kernel of its own: it is mixed_attention_forward without what that saves for backward.
@torch.library.impl("statecore::mixed_attention", "CompositeImplicitAutograd")
def _(
    q, k, v, lin_q, lin_k, lin_v, gate, step_ids, alpha, initial_states=None, initial_step=None, cu_seqlens=None, *,
    scale=None, lin_scale=None,
):  # fmt: skip
    return _ops.mixed_attention_forward(
        q, k, v, lin_q, lin_k, lin_v, gate, step_ids, alpha, initial_states, initial_step, cu_seqlens, scale, lin_scale
    )[:2]


# ---- fake kernels: shapes and dtypes for torch.compile and meta tensors


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _sequences(q: Tensor, cu_seqlens: Tensor | None):
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


def _like_or_empty(x: Tensor | None, q: Tensor) -> Tensor:
    return q.new_empty(0) if x is None else x.new_empty(x.shape)


@torch.library.register_fake("statecore::linear_attention")
def _(q, k, v, log_decay=None, initial_state=None, cu_seqlens=None, *, scale=None):
    heads = max(q.shape[2], v.shape[2])
    state = q.new_empty(_sequences(q, cu_seqlens), v.shape[2], q.shape[3], v.shape[3], dtype=_state_dtype(q))
    return q.new_empty(*q.shape[:2], heads, v.shape[3]), state


@torch.library.register_fake("statecore::segment_attention")
def _(q, k, v, step_ids, cu_seqlens=None, *, scale=None):
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=_state_dtype(q))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@torch.library.register_fake("statecore::step_linear_attention")
def _(q, k, v, step_ids, alpha, initial_states=None, initial_step=None, cu_seqlens=None, *, scale=None):
    states = q.new_empty(3, _sequences(q, cu_seqlens), v.shape[2], q.shape[3], v.shape[3], dtype=_state_dtype(q))
    return q.new_empty(*q.shape[:3], v.shape[3]), states


@torch.library.register_fake("statecore::mixed_attention_forward")
def _(q, k, v, lin_q, lin_k, lin_v, gate, step_ids, alpha, initial_states, initial_step, cu_seqlens, scale, lin_scale):
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=_state_dtype(q))
    states = (3, _sequences(q, cu_seqlens), lin_v.shape[2], lin_q.shape[3], lin_v.shape[3])
    return out, q.new_empty(states, dtype=_state_dtype(q)), torch.empty_like(out), lse, torch.empty_like(out)


@torch.library.register_fake("statecore::state_update")
def _(states, q, k, v, log_decay=None, ends_step=None, alpha=None, slots=None, *, scale=None):
    return q.new_empty(q.shape[0], max(q.shape[1], v.shape[1]), v.shape[2])


@torch.library.register_fake("statecore::linear_attention_backward")
def _(grad_out, grad_final_state, q, k, v, log_decay, initial_state, cu_seqlens, scale):
    return *_like(q, k, v), _like_or_empty(log_decay, q), _like_or_empty(initial_state, q)


@torch.library.register_fake("statecore::segment_attention_backward")
def _(grad_out, grad_lse, q, k, v, out, lse, step_ids, cu_seqlens, scale):
    return _like(q, k, v)


@torch.library.register_fake("statecore::step_linear_attention_backward")
def _(grad_out, grad_states, q, k, v, step_ids, alpha, initial_states, initial_step, cu_seqlens, scale):
    return *_like(q, k, v), _like_or_empty(initial_states, q)


# ---- gradients


def _save_linear(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.scale = keyword_only_inputs["scale"]


def _linear_backward(ctx, grad_out, grad_final_state):
    q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    grads = _ops.linear_attention_backward(
        grad_out, grad_final_state, q, k, v, log_decay, initial_state, cu_seqlens, ctx.scale
    )
    *grads, grad_decay, grad_initial = grads
    return *grads, None if log_decay is None else grad_decay, None if initial_state is None else grad_initial, None


def _save_segment(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.scale = keyword_only_inputs["scale"]


def _segment_backward(ctx, grad_out, grad_lse):
    q, k, v, step_ids, cu_seqlens, out, lse = ctx.saved_tensors
    grads = _ops.segment_attention_backward(grad_out, grad_lse, q, k, v, out, lse, step_ids, cu_seqlens, ctx.scale)
    return *grads, None, None


def _step_linear_backward(ctx, grad_out, grad_states):
    q, k, v, step_ids, alpha, initial_states, initial_step, cu_seqlens = ctx.saved_tensors
    *grads, grad_initial = _ops.step_linear_attention_backward(
        grad_out, grad_states, q, k, v, step_ids, alpha, initial_states, initial_step,
        cu_seqlens, ctx.scale,
    )  # fmt: skip
    return *grads, None, None, None if initial_states is None else grad_initial, None, None


def _save_mixed(ctx, inputs, output):
    *tensors, ctx.scale, ctx.lin_scale = inputs
    _, _, segment_out, lse, linear_out = output
    ctx.mark_non_differentiable(segment_out, lse, linear_out)
    ctx.save_for_backward(*tensors, segment_out, lse, linear_out)


def _mixed_backward(ctx, grad_out, grad_states, *_):
    q, k, v, lin_q, lin_k, lin_v, gate, step_ids, alpha, initial_states, initial_step, cu_seqlens, *saved = (
        ctx.saved_tensors
    )
    segment_out, lse, linear_out = saved
    opening = gate.to(grad_states.dtype).sigmoid()
    grad_gate = (grad_out * linear_out * opening * (1 - opening)).to(gate.dtype)
    grads = _ops.segment_attention_backward(grad_out, None, q, k, v, segment_out, lse, step_ids, cu_seqlens, ctx.scale)
    *lin_grads, grad_initial = _ops.step_linear_attention_backward(
        (grad_out * opening).to(q.dtype), grad_states, lin_q, lin_k, lin_v,
        step_ids[:, step_ids.shape[1] - q.shape[1] :], alpha, initial_states, initial_step, cu_seqlens,
        ctx.lin_scale,
    )  # fmt: skip
    grad_initial = None if initial_states is None else grad_initial
    return *grads, *lin_grads, grad_gate, None, None, grad_initial, None, None, None, None


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        "statecore: gradients of gradients are not implemented; use statecore.reference where they are needed."
    )


torch.library.register_autograd("statecore::linear_attention", _linear_backward, setup_context=_save_linear)
torch.library.register_autograd("statecore::segment_attention", _segment_backward, setup_context=_save_segment)
torch.library.register_autograd("statecore::step_linear_attention", _step_linear_backward, setup_context=_save_linear)
torch.library.register_autograd("statecore::mixed_attention_forward", _mixed_backward, setup_context=_save_mixed)
for _name in ("linear_attention", "segment_attention", "step_linear_attention"):
    torch.library.register_autograd(f"statecore::{_name}_backward", _refuse_double_backward)


# ---- autocast: activations are cast as for torch's own attention; states and decays stay float32

_autocast_library = torch.library.Library("statecore", "IMPL")


def _register_autocast(name: str, activations: slice) -> None:
    """`activations`: which positional arguments are cast to the autocast dtype."""
    op = getattr(_ops, name).default
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast_and_call(*args, _device=device, _keys=keys, **kwargs):
            dtype = torch.get_autocast_dtype(_device)
            args = list(args)
            args[activations] = [x.to(dtype) if x.dtype != torch.float64 else x for x in args[activations]]
            with torch._C._ExcludeDispatchKeyGuard(_keys):
                return op(*args, **kwargs)

        _autocast_library.impl(name, cast_and_call, key)


for _name in ("linear_attention", "segment_attention", "step_linear_attention"):
    _register_autocast(_name, slice(0, 3))
_register_autocast("mixed_attention_forward", slice(0, 7))
_register_autocast("state_update", slice(1, 4))
