"""The step that each token belongs to, and the keys and values that a cache keeps for later tokens.

Step ids: 0 the prompt, 1 .. n the reasoning steps, n + 1 the answer, -1 padding. An end token is the last token of its
step. Training, chunked prefill and decoding share the rule, which `begins_step` states.
"""

import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = -1
PROMPT = 0
Flag = TypeVar("Flag", bool, Tensor)


def begins_step(is_start: Flag, follows_end: Flag) -> Flag:
    """The step rule, for one token (bool) or many (bool tensor): the step id grows by one at a step start token and at
    the token after a step end token, once where the two coincide.
    """
    return is_start | follows_end


@dataclass(frozen=True)
class Slots:
    """The tokens whose keys and values a cache holds; the same in every layer.

    ids: int32 [B, kv], step id of every slot, -1 for padding. A slot of a finished step stays while another row of the
    batch needs its column; it is masked, because later tokens have larger ids.
    last_step: int32 [B], step id of each row's newest token, -1 if the row is all padding so far.
    ended: bool [B], the newest token closed its step.
    """

    ids: Tensor
    last_step: Tensor
    ended: Tensor

    @staticmethod
    def empty(batch: int, device: torch.device) -> "Slots":
        padding = torch.full((batch, 1), PADDING, dtype=torch.int32, device=device)
        return Slots(padding[:, :0], padding[:, 0], torch.zeros(batch, dtype=torch.bool, device=device))

    def select(self, rows: Tensor) -> "Slots":
        return Slots(self.ids[rows], self.last_step[rows], self.ended[rows])


@dataclass(frozen=True)
class TokenSteps:
    """Steps of the new tokens: ids int32 [B, T], and is_end bool [B, T], the token closes its step."""

    ids: Tensor
    is_end: Tensor


@dataclass(frozen=True)
class StepContext:
    """What a forward pass tells its layers about steps.

    step_ids: int32 [B, cached slots + T].
    alpha: float32 [A], correction strength of every step.
    cu_seqlens: int32 [N + 1] of packed sequences, else None.
    initial_step: int32 [B], step id of the newest cached token; None without a cache.
    linear: whether the linear branch runs.
    slots: what the cache holds after the pass; keep: int64, the columns that it keeps (None: all of them). Both are
    None if the pass does not cache.
    """

    step_ids: Tensor
    alpha: Tensor
    cu_seqlens: Tensor | None
    initial_step: Tensor | None
    linear: bool
    slots: Slots | None
    keep: Tensor | None


# ----------------------------------------------------------------------------------------------------------------------
# Step ids


def valid_tokens(attention_mask: Tensor | None, inputs_embeds: Tensor) -> Tensor:
    """bool [B, T]: the new token is not padding. Of a mask [B, seen + T] over cached tokens too, the last T count."""
    batch, time = inputs_embeds.shape[:2]
    if attention_mask is None:
        return torch.ones(batch, time, dtype=torch.bool, device=inputs_embeds.device)
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < time:
        raise ValueError(
            f"attention_mask must have shape ({batch}, {time} or more), got {tuple(attention_mask.shape)}; "
            "segment attention replaces masks of other shapes"
        )
    return attention_mask[:, attention_mask.shape[1] - time :].bool()


def steps_from_ids(step_ids: Tensor, valid: Tensor) -> TokenSteps:
    """Steps from the caller's step ids [B, T]. A step counts as open until a larger id follows."""
    if step_ids.shape != valid.shape:
        raise ValueError(f"step_ids must have shape {tuple(valid.shape)}, got {tuple(step_ids.shape)}")
    return TokenSteps(step_ids.to(torch.int32).masked_fill(~valid, PADDING), torch.zeros_like(valid))


def steps_from_markers(
    markers: Tensor, patterns: int, valid: Tensor, slots: Slots | None = None, cu_seqlens: Tensor | None = None
) -> TokenSteps:
    """Steps from the step tokens among the new tokens.

    markers: int64 [B, T], i for the start and patterns + i for the end token of thinking pattern i, -1 for others.
    valid: bool [B, T], not padding.
    slots: the cached tokens before them.
    cu_seqlens: int32 [N + 1] of packed sequences; ids start again at 0 in each.
    """
    is_start, is_end = (markers >= 0) & (markers < patterns), (markers >= patterns) & valid
    previous = F.pad(last_valid(valid)[:, :-1], (1, 0), value=-1)
    first = 0 if cu_seqlens is None else sequence_starts(cu_seqlens, markers.shape[1])
    follows_end = is_end.gather(1, previous.clamp(min=0)) & (previous >= first)
    if slots is not None:
        follows_end = follows_end | ((previous < 0) & slots.ended[:, None])
    begins = valid & begins_step(is_start, follows_end)
    ids = begins.cumsum(1)
    if slots is not None:
        ids = ids + slots.last_step.clamp(min=0)[:, None]
    if cu_seqlens is not None:
        ids = ids - (ids - begins.long())[:, first]
    return TokenSteps(ids.masked_fill(~valid, PADDING).int(), is_end)


def last_valid(valid: Tensor) -> Tensor:
    """bool [B, T] -> int64 [B, T]: index of the last valid token up to and including t, -1 if there is none."""
    index = torch.arange(valid.shape[1], device=valid.device)
    return torch.where(valid, index, -1).cummax(1).values


def accept_segment_ids(step_ids: Tensor | None, arguments: dict[str, Any]) -> Tensor | None:
    """Takes `segment_ids`, the deprecated alias of a forward's `step_ids`, out of its keyword arguments."""
    segment_ids = arguments.pop("segment_ids", None)
    if segment_ids is None:
        return step_ids
    if step_ids is not None:
        raise TypeError("step_ids and its deprecated alias segment_ids cannot both be given")
    warnings.warn("segment_ids is a deprecated alias of step_ids", FutureWarning, stacklevel=2)
    return segment_ids


# ----------------------------------------------------------------------------------------------------------------------
# Context of a pass


def make_context(
    tokens: TokenSteps, slots: Slots | None, alpha: Tensor, cu_seqlens: Tensor | None, linear: bool, caching: bool
) -> StepContext:
    """The context of a pass over new `tokens`, which follow the cached `slots`.

    `caching`: with what the cache keeps. Of a row that is its prompt and its open step; a step that has ended is no
    longer attended to. A column is dropped when no row needs it. The open steps of all rows reach up to the newest
    token, so if all prompts end at the same column, as generate() pads them, the cache never holds more columns than
    the longest prompt plus the longest open step, however far apart the rows' steps end.
    """
    cached = slots or Slots.empty(len(tokens.ids), tokens.ids.device)
    ids = torch.cat([cached.ids, tokens.ids], 1)
    initial_step = None if slots is None else slots.last_step
    if not caching:
        return StepContext(ids, alpha, cu_seqlens, initial_step, linear, None, None)
    newest = last_valid(tokens.ids != PADDING)[:, -1:]
    only_padding, index = newest < 0, newest.clamp(min=0)
    last_step = torch.where(only_padding, cached.last_step[:, None], tokens.ids.gather(1, index))
    ended = torch.where(only_padding, cached.ended[:, None], tokens.is_end.gather(1, index))
    needed = ((ids == PROMPT) | ((ids > PROMPT) & (ids == last_step) & ~ended)).any(0)
    keep = None if needed.all() else needed.nonzero()[:, 0]
    kept_ids = ids if keep is None else ids[:, keep]
    slots = Slots(kept_ids, last_step[:, 0], ended[:, 0])
    return StepContext(ids, alpha, cu_seqlens, initial_step, linear, slots, keep)


# ----------------------------------------------------------------------------------------------------------------------
# Packed sequences


def packed_cu_seqlens(
    cu_seq_lens_q: Tensor | None, seq_idx: Tensor | None, position_ids: Tensor | None, batch: int
) -> Tensor | None:
    """cu_seqlens int32 [N + 1] of packed sequences from what collators give, None if nothing is packed.

    cu_seq_lens_q: the bounds themselves. seq_idx [1, T]: the number of each token's sequence. position_ids [1, T]:
    positions that restart with every sequence.
    """
    if cu_seq_lens_q is not None:
        bounds = cu_seq_lens_q.int()
    elif seq_idx is not None:
        bounds = _bounds(seq_idx[0, 1:] != seq_idx[0, :-1])
    elif position_ids is not None and position_ids.shape[0] == batch == 1:
        bounds = _bounds(position_ids[0, 1:] - position_ids[0, :-1] != 1)
        if len(bounds) <= 2:
            return None
    else:
        return None
    if batch != 1:
        raise ValueError(f"packed sequences must come in one row, got a batch of {batch} rows")
    return bounds


def sequence_starts(cu_seqlens: Tensor, time: int) -> Tensor:
    """int64 [T]: index of the first token of each token's packed sequence."""
    token = torch.arange(time, dtype=torch.int32, device=cu_seqlens.device)
    return cu_seqlens[:-1].long()[torch.searchsorted(cu_seqlens[1:-1].contiguous(), token, right=True)]


def packed_positions(cu_seqlens: Tensor, time: int) -> Tensor:
    """int64 [1, T]: positions that restart with every packed sequence."""
    return (torch.arange(time, device=cu_seqlens.device) - sequence_starts(cu_seqlens, time))[None]


def _bounds(next_starts: Tensor) -> Tensor:
    """bool [T - 1], true where the next token starts a sequence -> int32 [N + 1]."""
    inner = next_starts.nonzero()[:, 0] + 1
    return F.pad(F.pad(inner, (1, 0)), (0, 1), value=len(next_starts) + 1).int()
