"""Held-out loss of a model, and how many problems it answers exactly."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import DataCollatorWithFlattening

from ..losses import IGNORED
from .model import SSDForCausalLM
from .rows import Row, RowEncoder

MAX_PACK_TOKENS = 16384


@torch.no_grad()
def held_out_loss(model: SSDForCausalLM, rows: Dataset) -> float:
    """Nats per predicted token."""
    collate, total, count = DataCollatorWithFlattening(return_flash_attn_kwargs=True), 0.0, 0
    for pack in packs(rows, MAX_PACK_TOKENS):
        inputs = collate(pack)
        ids, target = inputs["input_ids"].to(model.device), inputs["labels"][0, 1:].to(model.device)
        cu_seqlens = inputs["cu_seq_lens_q"].to(model.device)
        logits = model(ids, cu_seq_lens_q=cu_seqlens, use_cache=False).logits[0, :-1]
        total += F.cross_entropy(logits.float(), target, ignore_index=IGNORED, reduction="sum").item()
        count += int((target != IGNORED).sum())
    return total / max(count, 1)


def packs(rows: Dataset, max_tokens: int) -> Iterator[list[dict[str, Any]]]:
    """Groups of rows of up to `max_tokens` tokens; a longer row is a group of its own."""
    pack: list[dict[str, Any]] = []
    tokens = 0
    for row in rows:
        if pack and tokens + row["length"] > max_tokens:
            yield pack
            pack, tokens = [], 0
        pack.append({"input_ids": row["input_ids"], "labels": row["labels"]})
        tokens += row["length"]
    yield pack


@dataclass(frozen=True)
class Answers:
    """Shares of the problems: answered exactly, with their thinking closed, and solved by the commonest answer."""

    exact: float
    closed: float
    guess: float


@torch.no_grad()
def greedy_answers(
    model: SSDForCausalLM, encoder: RowEncoder, rows: Sequence[Row], max_new_tokens: int, batch_size: int = 100
) -> Answers:
    """Answers decoded greedily by `generate()`; a problem whose thinking never closes counts as wrong."""
    exact = closed = 0
    tokenizer, close_mark = encoder.tokenizer, encoder.prompt_format.think_close.strip()
    tokenizer.padding_side = "left"
    for begin in range(0, len(rows), batch_size):
        batch = rows[begin : begin + batch_size]
        inputs = tokenizer(
            [encoder.prompt_text(row) for row in batch], return_tensors="pt", padding=True, add_special_tokens=False
        )
        out = model.generate(
            input_ids=inputs.input_ids.to(model.device), attention_mask=inputs.attention_mask.to(model.device),
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for row, ids in zip(batch, out[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
            ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
            _, found, answer = tokenizer.decode(ids).partition(close_mark)
            closed += bool(found)
            exact += bool(found) and answer.strip() == row.answer.strip()
    count = max(len(rows), 1)
    return Answers(exact / count, closed / count, best_guess(rows))


def best_guess(rows: Sequence[Row]) -> float:
    """Share of problems that the commonest answer solves."""
    return max(Counter(row.answer.strip() for row in rows).values(), default=0) / max(len(rows), 1)
