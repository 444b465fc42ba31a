"""How a causal language model of transformers reads tokens: one call for every family, without dropout."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache


def forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: Cache | None = None,
    *,
    logits_to_keep: int = 0,
    use_cache: bool = True,
) -> tuple[Tensor, Cache | None]:
    """Logits of the last `logits_to_keep` tokens (0: of all), [B, T, V], and the model's cache.

    Families differ in what they call the cache, and some have no `logits_to_keep`.
    """
    parameters = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"use_cache": use_cache}
    if cache is not None:
        mamba_style = "cache_params" in parameters and "past_key_values" not in parameters
        arguments["cache_params" if mamba_style else "past_key_values"] = cache
    if "logits_to_keep" in parameters:
        arguments["logits_to_keep"] = logits_to_keep
    out = model(input_ids=input_ids, **arguments)
    caches = (getattr(out, name, None) for name in ("past_key_values", "cache_params"))
    return out.logits[:, -logits_to_keep:], next((cache for cache in caches if isinstance(cache, Cache)), None)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Puts the model into evaluation mode; restores its own mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def check_token_ids(model: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Raises ValueError for ids outside the model's vocabulary."""
    size = getattr(model.config.get_text_config(), "vocab_size", None) if hasattr(model, "config") else None
    if size is not None and token_ids and not 0 <= min(token_ids) <= max(token_ids) < size:
        raise ValueError(
            f"token ids must lie in 0 .. {size - 1}, the model's vocabulary, got {min(token_ids)} .. {max(token_ids)}: "
            "the tokenizer is not this model's"
        )


def context_length(model: PreTrainedModel) -> int | None:
    """How many tokens the model was made for; None where its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
