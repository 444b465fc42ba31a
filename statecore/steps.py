"""Which step every token belongs to, and which tokens a cache must keep for those to come.

Step ids: 0 the query prompt, 1 .. n the reasoning steps, n + 1 the answer, -1 padding. The id grows at a step start
token and at the token right after a step end token, so an end token is the last of its step, and a start token right
after it counts once. One rule for training, prefill in chunks and decoding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = -1
PROMPT = 0


@dataclass(frozen=True)
class Slots:
    """Which token each key and value in a cache belongs to; the same in every layer.

    ids: int32 [B, kv], step id of every slot, -1 for padding. A slot of a finished step may stay while another row
    needs its column; as ids only grow, nobody sees it.
    last_step: int32 [B], step id of the newest token of each row, -1 where only padding was seen.
    ended: bool [B], the newest token closed its step.
    """

    ids: Tensor
    last_step: Tensor
    ended: Tensor

    @staticmethod
    def empty(batch: int, device: torch.device) -> "Slots":
        nothing = torch.full((batch, 1), PADDING, dtype=torch.int32, device=device)
        return Slots(nothing[:, :0], nothing[:, 0], torch.zeros(batch, dtype=torch.bool, device=device))

    def select(self, rows: Tensor) -> "Slots":
        return Slots(self.ids[rows], self.last_step[rows], self.ended[rows])


@dataclass(frozen=True)
class Found:
    """Steps of the new tokens: ids int32 [B, T], and is_end bool [B, T], the token closes its step."""

    ids: Tensor
    is_end: Tensor


@dataclass(frozen=True)
class Segments:
    """What one forward pass tells every layer.

    step_ids: int32 [B, kept slots + T]. alpha: float32 [A], correction strengths. cu_seqlens: int32 [N + 1] of packed
    sequences. initial_step: int32 [B], id of the newest cached token. linear: the linear branch runs. slots: what the
    cache holds afterwards, and keep: int64, the columns that stay for it (None: all).
    """

    step_ids: Tensor
    alpha: Tensor
    cu_seqlens: Tensor | None
    initial_step: Tensor | None
    linear: bool
    slots: Slots | None
    keep: Tensor | None


def real_tokens(attention_mask: Tensor | None, inputs_embeds: Tensor) -> Tensor:
    """bool [B, T]: the new token is not padding. A mask over earlier tokens too, [B, seen + T], counts from its end."""
    batch, time = inputs_embeds.shape[:2]
    if attention_mask is None:
        return torch.ones(batch, time, dtype=torch.bool, device=inputs_embeds.device)
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < time:
        raise ValueError(
            f"attention_mask must have shape ({batch}, {time} or more), got {tuple(attention_mask.shape)}; "
            "segments take the place of masks of other shapes"
        )
    return attention_mask[:, attention_mask.shape[1] - time :].bool()


def given(segment_ids: Tensor, real: Tensor) -> Found:
    """Step ids that the caller gives. They say nothing of where a step ends before the next one begins."""
    if segment_ids.shape != real.shape:
        raise ValueError(f"segment_ids must have shape {tuple(real.shape)}, got {tuple(segment_ids.shape)}")
    return Found(segment_ids.to(torch.int32).masked_fill(~real, PADDING), torch.zeros_like(real))


def derive(
    rows: Tensor, patterns: int, real: Tensor, slots: Slots | None = None, packed: Tensor | None = None
) -> Found:
    """Step ids from tokens.

    rows: int64 [B, T], i for the start and patterns + i for the end token of thinking pattern i, -1 for others. real:
    bool [B, T], not padding. slots: what came before. packed: int32 [N + 1], bounds of packed sequences; each begins
    anew.
    """
    is_start, is_end = (rows >= 0) & (rows < patterns), (rows >= patterns) & real
    previous = F.pad(newest_real(real)[:, :-1], (1, 0), value=-1)
    first = 0 if packed is None else first_of_sequence(packed, rows.shape[1])
    after_end = is_end.gather(1, previous.clamp(min=0)) & (previous >= first)
    if slots is not None:
        after_end = after_end | ((previous < 0) & slots.ended[:, None])
    begins = real & (is_start | after_end)
    ids = begins.cumsum(1)
    if slots is not None:
        ids = ids + slots.last_step.clamp(min=0)[:, None]
    if packed is not None:
        ids = ids - (ids - begins.long())[:, first]
    return Found(ids.masked_fill(~real, PADDING).int(), is_end)


def plan(
    found: Found, slots: Slots | None, alpha: Tensor, packed: Tensor | None, linear: bool, caching: bool
) -> Segments:
    """What the layers must know of the new tokens and, `caching`, what stays in the cache behind them.

    A row needs its prompt and the step it is in; an ended step is nobody's. A column goes when no row needs it. The
    open steps of all rows reach up to now, so with prompts that end together, as generate() pads them, what stays is
    never longer than the longest prompt plus the longest open step, however much later one row's steps end than
    another's.
    """
    before = slots or Slots.empty(len(found.ids), found.ids.device)
    ids = torch.cat([before.ids, found.ids], 1)
    initial_step = None if slots is None else slots.last_step
    if not caching:
        return Segments(ids, alpha, packed, initial_step, linear, None, None)
    newest = newest_real(found.ids != PADDING)[:, -1:]
    nothing_new, at = newest < 0, newest.clamp(min=0)
    last_step = torch.where(nothing_new, before.last_step[:, None], found.ids.gather(1, at))
    ended = torch.where(nothing_new, before.ended[:, None], found.is_end.gather(1, at))
    needed = (ids == PROMPT) | ((ids > PROMPT) & (ids == last_step) & ~ended)
    column_needed = needed.any(0)
    keep = None if column_needed.all() else column_needed.nonzero()[:, 0]
    kept_ids = ids if keep is None else ids[:, keep]
    return Segments(ids, alpha, packed, initial_step, linear, Slots(kept_ids, last_step[:, 0], ended[:, 0]), keep)


def newest_real(real: Tensor) -> Tensor:
    """bool [B, T] -> int64 [B, T]: index of the newest token up to t that is not padding, -1 where there is none."""
    index = torch.arange(real.shape[1], device=real.device)
    return torch.where(real, index, -1).cummax(1).values


def find_packed(
    cu_seq_lens_q: Tensor | None, seq_idx: Tensor | None, position_ids: Tensor | None, rows: int
) -> Tensor | None:
    """Bounds int32 [N + 1] of packed sequences from what collators give, None where nothing is packed.

    That is bounds, or the number of each token's sequence [1, T], or positions [1, T] that begin anew.
    """
    if cu_seq_lens_q is not None:
        bounds = cu_seq_lens_q.int()
    elif seq_idx is not None:
        bounds = _bounds(seq_idx[0, 1:] != seq_idx[0, :-1])
    elif position_ids is not None and position_ids.shape[0] == rows == 1:
        bounds = _bounds(position_ids[0, 1:] - position_ids[0, :-1] != 1)
        if len(bounds) <= 2:
            return None
    else:
        return None
    if rows != 1:
        raise ValueError(f"packed sequences must come in one row, got a batch of {rows} rows")
    return bounds


def first_of_sequence(packed: Tensor, time: int) -> Tensor:
    """int64 [T]: index of the first token of the packed sequence that token t belongs to."""
    token = torch.arange(time, dtype=torch.int32, device=packed.device)
    return packed[:-1].long()[torch.searchsorted(packed[1:-1].contiguous(), token, right=True)]


def packed_positions(packed: Tensor, time: int) -> Tensor:
    """int64 [1, T]: positions that begin anew with every packed sequence."""
    return (torch.arange(time, device=packed.device) - first_of_sequence(packed, time))[None]


def _bounds(begins_next: Tensor) -> Tensor:
    """bool [T - 1], true where the next token begins a sequence -> int32 [N + 1]."""
    inner = begins_next.nonzero()[:, 0] + 1
    return F.pad(F.pad(inner, (1, 0)), (0, 1), value=len(begins_next) + 1).int()
