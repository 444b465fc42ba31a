"""What smaller states cost and save: held-out loss, decoding time, bytes of state and parameters of a model beside its
pruned variants.  (arXiv 2602.02195)
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..cache import cache_bytes
from .recording import read_pieces

UNCHANGED = "as it is"  # the row of the model itself


def held_out(model: PreTrainedModel, texts: Sequence[Sequence[int] | Tensor]) -> dict[str, float]:
    """Loss in nats per token, perplexity, and the share of next tokens predicted as the likeliest.

    Scores all tokens except the first of each text.
    """
    loss, right, count = 0.0, 0, 0
    for text in texts:
        tokens = torch.as_tensor(text, dtype=torch.long, device=model.device)
        begin = 0
        for read, _, logits in read_pieces(model, tokens, all_logits=True):
            target = tokens[begin + 1 : read + 1]
            logits = logits[: len(target)].float()
            loss += F.cross_entropy(logits, target, reduction="sum").item()
            right += int((logits.argmax(-1) == target).sum())
            count, begin = count + len(target), read
    if not count:
        raise ValueError("held-out texts must have at least two tokens")
    mean = loss / count
    return {"loss": mean, "perplexity": math.exp(min(mean, 700)), "accuracy": right / count, "tokens": count}


def decoding_cost(
    models: Mapping[str, PreTrainedModel], prompt: Sequence[int], tokens: int = 64, rounds: int = 5, *, batch: int = 1
) -> dict[str, dict[str, float]]:
    """Milliseconds per pass that decodes one token for each of `batch` sequences, bytes of state per sequence, and
    parameters.

    Models take turns within a round, so that all see the same machine load; the fastest round counts.
    """
    ids = torch.as_tensor(prompt, dtype=torch.long).expand(batch, -1)
    seconds = dict.fromkeys(models, math.inf)
    state_bytes = {}
    for _ in range(rounds):
        for name, model in models.items():
            elapsed, cache = _decode(model, ids.to(model.device), tokens)
            seconds[name] = min(seconds[name], elapsed)
            state_bytes[name] = cache_bytes(cache).state // batch
    return {
        name: {
            "ms": 1e3 * seconds[name] / tokens,
            "state_bytes": state_bytes[name],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        for name, model in models.items()
    }


@torch.no_grad()
def _decode(model: PreTrainedModel, prompt: Tensor, tokens: int) -> tuple[float, DynamicCache]:
    """Seconds that greedy decoding of `tokens` tokens takes after the prompt, as CPU time for models on the CPU."""
    cache = DynamicCache(config=model.config)

    def next_token(ids: Tensor) -> Tensor:
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    token = next_token(prompt)
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    began = clock()
    for _ in range(tokens):
        token = next_token(token)
    token.tolist()  # waits for the GPU
    return clock() - began, cache


def compare(
    model: PreTrainedModel,
    variants: Mapping[str, PreTrainedModel],
    texts: Sequence[Sequence[int] | Tensor],
    prompt: Sequence[int],
) -> list[dict[str, Any]]:
    """A row for the model as it is and for each variant: held-out figures, bytes of state, milliseconds per token."""
    models = {UNCHANGED: model} | dict(variants)
    cost = decoding_cost(models, prompt)
    return [{"model": name} | held_out(one, texts) | cost[name] for name, one in models.items()]


def side_of_the_asymmetry(rows: Sequence[Mapping[str, Any]], high: str = "joint", low: str = "reverse") -> str:
    """Says in words which heads this model can spare, the paper's high-scoring ones or the low-scoring ones, and where
    random pruning lies. `rows` come from `compare`, with variants named `high`, `low` and "random ...".
    """
    loss = {row["model"]: row["loss"] for row in rows}
    random_losses = [value for name, value in loss.items() if name.startswith("random")]
    text = (
        f"Pruning the heads with high scores costs {loss[high] - loss[UNCHANGED]:+.4f} nats per token, those with low "
        f"scores {loss[low] - loss[UNCHANGED]:+.4f}: "
    )
    if math.isclose(loss[high], loss[low], rel_tol=1e-9):
        text += "no difference."
    elif loss[high] < loss[low]:
        text += "high-scoring heads are easier to spare here, which is the side that the paper reports."
    else:
        text += "low-scoring heads are easier to spare here, the reverse of what the paper reports."
    if random_losses:
        count, below = len(random_losses), sum(value < loss[high] for value in random_losses)
        mean = math.fsum(random_losses) / count - loss[UNCHANGED]
        text += (
            f" Random pruning costs {mean:+.4f} in the mean of {count} draws and beats pruning of the high ones in "
            f"{below} of them."
        )
    return text
