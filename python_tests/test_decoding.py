"""The main invariant: one masked pass over a sequence, token-by-token decoding with cleared keys and values, and any
chunking in between compute the same, through whole models in float64, in batches whose rows end steps at different
tokens.
"""

from itertools import pairwise

import pytest
import torch
from tiny_models import FAMILIES, left_padded, random_chain, tiny_model
from torch import Tensor
from transformers import DynamicCache

LARGEST_DIFFERENCE = 1e-9
LENGTHS, PROMPTS, LONGEST_STEPS = (34, 31, 34, 27), (4, 6, 3, 5), (3, 5, 2, 4)

VARIANTS = {
    "no gate": {"la_gate": False},
    "norm": {"la_norm": True},
    "low rank only": {"la_projection": "low_rank"},
    "no rope": {"la_rope": False},
    "no momentum": {"alpha_max": 0},
    "untied": {"tie_word_embeddings": False},
}


def batch() -> dict[str, Tensor]:
    return left_padded([random_chain(*row) for row in zip(LENGTHS, PROMPTS, LONGEST_STEPS, strict=True)])


@torch.no_grad()
def in_chunks(model, inputs: dict[str, Tensor], bounds: list[int]) -> tuple[Tensor, DynamicCache]:
    """Logits [B, T, V], computed over one cache in the chunks between `bounds`."""
    cache, logits = DynamicCache(config=model.config), []
    for begin, end in pairwise(bounds):
        part = {name: tensor[:, begin:end] for name, tensor in inputs.items()}
        part["attention_mask"] = inputs["attention_mask"][:, :end]
        logits.append(model(**part, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1), cache


@torch.no_grad()
def assert_chunking_does_not_matter(model, inputs: dict[str, Tensor]) -> None:
    time = inputs["input_ids"].shape[1]
    valid = inputs["attention_mask"].bool()
    whole = model(**inputs, use_cache=False).logits
    chunkings = {"one by one": list(range(time + 1)), "prompt, then one by one": [0, *range(8, time + 1)]}
    for parts in (2, 3, 6):
        chunkings[f"{parts} chunks"] = [0, *sorted(torch.randperm(time - 1)[: parts - 1].add(1).tolist()), time]
    for name, bounds in chunkings.items():
        logits, cache = in_chunks(model, inputs, bounds)
        difference = (logits - whole)[valid].abs().max()
        assert difference <= LARGEST_DIFFERENCE, f"{name} ({bounds}): {difference}"
        assert cache.get_seq_length() == time
        assert cache.layers[0].keys.shape[2] < time - 10, "no slot was cleared"


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_equals_token_by_token_equals_chunks(family):
    model, inputs = tiny_model(family), batch()
    assert_chunking_does_not_matter(model, inputs)
    # The equality above means something only if state and correction affect the result.
    with torch.no_grad():
        logits = model(**inputs).logits
        model.set_momentum(False)
        raw = model(**inputs).logits
        model.set_linear_attention(False)
        alone = model(**inputs).logits
    assert (logits - raw).abs().max() > 1e-3
    assert (raw - alone).abs().max() > 1e-1


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_linear_branch(variant):
    assert_chunking_does_not_matter(tiny_model("qwen2", **VARIANTS[variant]), batch())


def test_segments_without_a_state():
    model = tiny_model("llama")
    model.set_linear_attention(False)
    assert_chunking_does_not_matter(model, batch())


def test_rows_are_independent():
    """A row of a padded batch has the logits that it has alone."""
    model = tiny_model("qwen3")
    rows = [random_chain(*row) for row in zip(LENGTHS, PROMPTS, LONGEST_STEPS, strict=True)]
    inputs = left_padded(rows)
    together, _ = in_chunks(model, inputs, list(range(inputs["input_ids"].shape[1] + 1)))
    for row, logits in zip(rows, together, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([row])).logits[0]
        assert (logits[-len(row) :] - alone).abs().max() <= LARGEST_DIFFERENCE


def test_the_cache_never_exceeds_prompt_and_open_step():
    """After each token the cache has at most the prompts' columns and those of the longest open step."""
    model, inputs = tiny_model("qwen2"), batch()
    cache = DynamicCache(config=model.config)
    prompt_columns = int((inputs["attention_mask"] == 0).sum(1).max()) + max(PROMPTS)
    for end in range(1, inputs["input_ids"].shape[1] + 1):
        part = {name: tensor[:, end - 1 : end] for name, tensor in inputs.items()}
        part["attention_mask"] = inputs["attention_mask"][:, :end]
        with torch.no_grad():
            model(**part, past_key_values=cache)
        slots = cache.layers[0].slots
        open_step = ((slots.ids == slots.last_step[:, None]) & (slots.ids > 0)).sum(1).max()
        assert slots.ids.shape[1] <= prompt_columns + open_step
        assert cache.layers[0].keys.shape[2] == slots.ids.shape[1]


def test_chunking_does_not_change_states():
    model, inputs = tiny_model("qwen2"), batch()
    time = inputs["input_ids"].shape[1]
    _, one = in_chunks(model, inputs, [0, time])
    _, many = in_chunks(model, inputs, list(range(time + 1)))
    for first, second in zip(one.layers, many.layers, strict=True):
        assert first.states.dtype == torch.float64
        torch.testing.assert_close(first.states, second.states, rtol=0, atol=LARGEST_DIFFERENCE)
