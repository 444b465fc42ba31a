"""The objective of distillation (arXiv 2602.01198), from last hidden states and in bounded memory.

L = L_AR + beta * L_KD,   L_KD = KL(teacher || student) over the old vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

IGNORED = -100  # label of a token that is not predicted


@dataclass(frozen=True)
class Losses:
    """Sums over tokens, at least float32, and the numbers of tokens.

    total: ar + beta * kl, differentiable. ar: cross-entropy. kl: KL(teacher || student).
    predicted: tokens in ar. compared: tokens in kl.
    """

    total: Tensor
    ar: Tensor
    kl: Tensor
    predicted: int
    compared: int


def distillation_losses(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor, teacher_hidden: Tensor | None = None,
    student_index: Tensor | None = None, teacher_index: Tensor | None = None, *, beta: float = 1.0, chunk: int = 1024,
) -> Losses:  # fmt: skip
    """AR and KL losses from last hidden states. Only the logits of `chunk` tokens exist at a time.

    Args:
        model: a state-transition model, for its head.
        hidden: `[B, T, D]`, the student's last hidden states.
        labels: int64 `[B, T]`, not shifted; -100 where nothing is predicted.
        teacher_hidden: `[B', U, D]`, the teacher's last hidden states; None leaves kl at 0.
        student_index, teacher_index: int64 `[M]`, positions in the flattened `[B * T]` and `[B' * U]` at which student
            and teacher predict the same ordinary token.
        beta: weight of kl in the total.
        chunk: tokens per chunk: memory against calls.
    """
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    predicting = (target != IGNORED).nonzero()[:, 0]
    target = target[predicting]
    hidden = hidden.flatten(0, 1)[predicting]
    counterpart = torch.full((labels.numel(),), -1, device=labels.device)
    if teacher_hidden is not None:
        counterpart[student_index] = teacher_index
        teacher_hidden = teacher_hidden.flatten(0, 1)
    counterpart = counterpart[predicting]
    step_tokens = model.lm_head.step_ids

    def chunk_losses(part: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        logits = model.lm_head(part)
        logits = logits.to(_at_least_float32(logits.dtype))
        ar = F.cross_entropy(logits, target[begin:end], reduction="sum")
        compared = (counterpart[begin:end] >= 0).nonzero()[:, 0]
        if not len(compared):
            return ar, ar.new_zeros(())
        with torch.no_grad(), model.full_attention():
            teacher = model.lm_head(teacher_hidden[counterpart[begin:end][compared]]).to(logits.dtype)
        # The teacher never saw step tokens, so both distributions exclude them; finite, as kl_div of -inf is NaN.
        excluded = torch.finfo(torch.float32).min / 2
        teacher = teacher.index_fill_(1, step_tokens, excluded).log_softmax(1)
        student = logits[compared].index_fill(1, step_tokens, excluded).log_softmax(1)
        return ar, F.kl_div(student, teacher, reduction="sum", log_target=True)

    parameters = [p for p in model.lm_head.parameters() if p.requires_grad]
    total, ar, kl = _ChunkedSum.apply(chunk_losses, chunk, beta, hidden, *parameters)
    return Losses(total, ar, kl, len(target), int((counterpart >= 0).sum()))


class _ChunkedSum(torch.autograd.Function):
    """Sums losses chunk by chunk. Forward also computes the gradients, so logits neither outlive their chunk nor are
    computed twice.
    """

    @staticmethod
    def forward(
        ctx, losses: Callable[[Tensor, int, int], tuple[Tensor, Tensor]], chunk: int, beta: float, hidden: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        sums = torch.zeros(2, device=hidden.device, dtype=_at_least_float32(hidden.dtype))
        differentiable = any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(x) for x in (hidden, *parameters)] if differentiable else []
        for begin in range(0, len(hidden), chunk):
            end = min(begin + chunk, len(hidden))
            part = hidden[begin:end].detach().requires_grad_(differentiable)
            with torch.set_grad_enabled(differentiable):
                ar, kl = losses(part, begin, end)
                loss = ar + beta * kl
            if differentiable:
                gradients[0][begin:end], *others = torch.autograd.grad(loss, (part, *parameters))
                for total, gradient in zip(gradients[1:], others, strict=True):
                    total += gradient
            sums += torch.stack((ar, kl)).detach()
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(ar_sum := sums[0].clone(), kl_sum := sums[1].clone())
        return sums[0] + beta * sums[1], ar_sum, kl_sum

    @staticmethod
    def backward(ctx, grad_total: Tensor, *_: Tensor) -> tuple[Any, ...]:
        return None, None, None, *(grad_total.to(gradient.dtype) * gradient for gradient in ctx.saved_tensors)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
