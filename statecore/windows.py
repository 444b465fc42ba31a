"""Texts as a language model reads them: tokens with their characters, in batches of overlapping windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm


def encode(tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Token ids and character spans of each text.

    Adds the beginning-of-sequence token if the tokenizer has one, unless the text starts with it already, as after a
    chat template. Raises ValueError for a tokenizer without character offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer ({type(tokenizer).__name__}) gives no character offsets, so step boundaries cannot be "
            "placed on tokens; expected a fast tokenizer (a tokenizer.json in its folder)"
        )
    bos = tokenizer.bos_token
    starts_with_bos = [bool(bos) and text.startswith(bos) for text in texts]
    ids: list[list[int]] = [[] for _ in texts]
    offsets: list[list[tuple[int, int]]] = [[] for _ in texts]
    for has_bos in (False, True):
        chosen = [i for i, starts in enumerate(starts_with_bos) if starts == has_bos]
        if chosen:
            encoded = tokenizer(
                [texts[i] for i in chosen], add_special_tokens=not has_bos, return_offsets_mapping=True, verbose=False
            )
            for i, row, spans in zip(chosen, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                if spans and spans[-1] == (0, 0):  # an end-of-sequence token; spans must not decrease
                    spans[-1] = (len(texts[i]), len(texts[i]))
                ids[i], offsets[i] = row, spans
    return ids, offsets


def token_windows(length: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Windows `(begin, end, first)` of at most `size` tokens over a text of `length` tokens.

    Every token is in `first..end` of exactly one window. All windows but the first begin with the `size // 2` tokens
    before `first`, so every token of a long text is read with at least half a window of context, or all that it has.
    """
    begin, first = 0, 0
    while first < length:
        end = min(begin + size, length)
        yield begin, end, first
        begin, first = end - size // 2, end


def context_size(model: torch.nn.Module, window: int | None) -> int:
    """The most tokens in a window: `window`, by default 4096, but no more than the model's maximum."""
    limit = getattr(model.config, "max_position_embeddings", None) or 4096
    return min(window or 4096, limit)


def window_batches(
    ids: Sequence[Sequence[int]], size: int, batch_size: int, device: torch.device, progress: str | None
) -> Iterator[tuple[list[tuple[int, int, int, int]], torch.Tensor, torch.Tensor]]:
    """Batches of the windows of all texts: (text, begin, end, first) for each row, and ids and mask [B, T], padded at
    the end.
    """
    rows = [(i, *window) for i, row in enumerate(ids) for window in token_windows(len(row), size)]
    rows.sort(key=lambda row: row[1] - row[2])  # longest first: little padding, and running out of memory shows at once
    for at in tqdm(range(0, len(rows), batch_size), desc=progress, disable=progress is None, unit="batch"):
        batch = rows[at : at + batch_size]
        width = max(end - begin for _, begin, end, _ in batch)
        input_ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for b, (i, begin, end, _) in enumerate(batch):
            input_ids[b, : end - begin] = torch.tensor(ids[i][begin:end])
            mask[b, : end - begin] = 1
        yield batch, input_ids.to(device), mask.to(device)
