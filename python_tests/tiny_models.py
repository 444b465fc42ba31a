"""Tiny models of every family, with linear branches that do something, and chains of steps for them to read."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from statecore.families import CAUSAL_LM_CLASSES
from statecore.modeling import StateCoreForCausalLM, is_adapter_weight

# The class of every family and that of its base.
FAMILIES = {ours.config_class.base_model_type: (ours, ours.__bases__[1]) for ours in CAUSAL_LM_CLASSES}
PATTERNS = 3
WORDS = 50  # ordinary tokens 2 .. 49
PAD, EOS = 0, 1
STARTS, ENDS = [50, 52, 54], [51, 53, 55]
BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # logits of order one, so that absolute differences are meaningful
    "tie_word_embeddings": True,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
OWN_FIELDS = {"qwen3": {"head_dim": 8}}  # of families whose defaults do not fit a tiny model
STEPS = {"step_start_token_ids": STARTS, "step_end_token_ids": ENDS, "la_rank": 6, "alpha_max": 0.4, "alpha_steps": 4}


def base_fields(family: str, **fields) -> dict:
    return BASE | OWN_FIELDS.get(family, {}) | fields


def tiny_base(family: str, dtype: torch.dtype = torch.float32, **fields) -> PreTrainedModel:
    model_class = FAMILIES[family][1]
    return model_class(model_class.config_class(**base_fields(family, **fields))).to(dtype).eval()


def tiny_model(
    family: str = "qwen2", dtype: torch.dtype = torch.float64, *, fresh: bool = False, **fields
) -> StateCoreForCausalLM:
    """A random model. fresh: with the linear branch silent, as after conversion."""
    model_class = FAMILIES[family][0]
    model = model_class(model_class.config_class(**base_fields(family, **(STEPS | fields)))).to(dtype).eval()
    if not fresh:
        for name, parameter in model.named_parameters():
            if is_adapter_weight(name):
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_chain(length: int, prompt: int, longest: int) -> list[int]:
    """A prompt, steps of up to `longest` tokens between markers, and an answer that fills up `length`."""

    def words(count: int) -> list[int]:
        return torch.randint(2, WORDS, (count,)).tolist()

    chain, pattern = words(prompt), 0
    while len(chain) + longest + 2 <= length - 3:
        pattern = (pattern + int(torch.randint(1, PATTERNS, ()))) % PATTERNS
        chain += [STARTS[pattern], *words(int(torch.randint(1, longest + 1, ()))), ENDS[pattern]]
    return (chain + words(length))[:length]


def left_padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """input_ids, attention_mask and position_ids [B, T] as generate() makes them."""
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
