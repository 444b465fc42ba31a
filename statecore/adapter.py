"""Conversion of a base checkpoint to a state-transition model, and the small adapter files that hold the difference.

`adapter.safetensors` has the linear branches and the step token rows, `statecore_config.json` the fields of StepConfig
and the base that they belong to. The base checkpoint is never written to.
"""

import copy
import json
import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .config import StepConfig
from .families import causal_lm_class
from .modeling import (
    LinearBranch,
    StateCoreForCausalLM,
    StepEmbedding,
    StepHead,
    Widen,
    is_adapter_weight,
)

WEIGHTS_FILE = "adapter.safetensors"
CONFIG_FILE = "statecore_config.json"
SHAPE_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
STEP_FIELDS = tuple(
    field.name
    for field in fields(StepConfig)
    if field.name in StepConfig.__annotations__ and field.name != "layer_types"
)
NOISE = 0.1  # standard deviation of new token rows around the mean row, in units of each channel's root mean square


def convert(
    base: str | os.PathLike | PreTrainedModel, *, step_start_token_ids: Sequence[int],
    step_end_token_ids: Sequence[int], seed: int = 0, dtype: torch.dtype | str = "auto", **step_fields,
) -> StateCoreForCausalLM:  # fmt: skip
    """A base as a state-transition model in eval mode, in which only the new parts are trainable.

    Args:
        base: path, hub name or model of a family in families.py. A model is copied.
        step_start_token_ids, step_end_token_ids: index i opens / closes thinking pattern i; the embedding grows if an
            id lies beyond its last row.
        seed: of the new weights.
        dtype: of a checkpoint that is loaded; a model keeps its own.
        step_fields: further fields of StepConfig (la_rank, alpha_max, ...).

    Raises:
        TypeError: step_fields has other names.
        ValueError: the base's family is unknown or has an unsupported feature (see `causal_lm_class`), a field is out
            of range, or the checkpoint lacks weights.
    """
    unknown = step_fields.keys() - set(STEP_FIELDS)
    if unknown:
        raise TypeError(f"convert() takes the fields {', '.join(STEP_FIELDS)}, got {', '.join(sorted(unknown))}")
    step_fields["step_start_token_ids"] = list(step_start_token_ids)
    step_fields["step_end_token_ids"] = list(step_end_token_ids)
    loaded = isinstance(base, PreTrainedModel)
    base_config = base.config if loaded else AutoConfig.from_pretrained(base)
    model_class = causal_lm_class(base_config)
    config = _step_config(model_class, base_config, step_fields)
    if loaded:
        model = model_class(config).to(dtype=base.dtype, device=base.device)
        missing = model.load_state_dict(base.state_dict(), strict=False).missing_keys
        model.generation_config = copy.deepcopy(base.generation_config)
    else:
        with _quiet():  # transformers would report every new weight as missing
            model, info = model_class.from_pretrained(base, config=config, dtype=dtype, output_loading_info=True)
        missing = info["missing_keys"]
    missing = [name for name in missing if not is_adapter_weight(name)]
    if missing:
        raise ValueError(
            f"the base checkpoint lacks {len(missing)} weights of {model_class.__name__}: {missing[:3]} ..."
        )
    base_rows, rows = config.vocab_size, max(config.step_token_ids, default=-1) + 1
    if rows > base_rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():  # rows between the step tokens' belong to no token: the mean row
            for table in _tables(model):
                table.weight[base_rows:] = table.weight[:base_rows].mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initialise(model)
    model.freeze_base()
    return model.eval()


@torch.no_grad()
def initialise(model: StateCoreForCausalLM) -> None:
    """Initialises the new weights. They depend on torch's random state only, not on how the base was loaded.

    Linear branches are initialised by LinearBranch and Widen. A step token row is the mean row of the ordinary tokens
    plus a little noise: the mean row gives a new token an average logit, neither too likely nor out of reach (Hewitt
    2021, "Initializing new word embeddings"), and the noise separates the patterns from the first update on.
    """
    for module in model.modules():
        if isinstance(module, (LinearBranch, Widen)):
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = False  # otherwise transformers' initialisers skip it
            module.initialize()
    ids = torch.tensor(model.config.step_token_ids, dtype=torch.long, device=model.device)
    if not len(ids):
        return
    for table in _tables(model):
        weight = table.weight
        ordinary = len(weight) - len(ids)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        mean = (weight.sum(0, dtype=dtype) - weight[ids].sum(0, dtype=dtype)) / max(ordinary, 1)
        rms = weight.norm(dim=0, dtype=dtype) / len(weight) ** 0.5
        noise = torch.randn(table.step_weight.shape).to(weight.device)
        table.step_weight.copy_(mean + NOISE * rms * noise)


def adapter_weights(model: StateCoreForCausalLM, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of the adapter file by name. state_dict: gathered weights, if the model holds only shards of them."""
    names = [name for name, _ in model.named_parameters() if is_adapter_weight(name)]
    source = model.state_dict() if state_dict is None else state_dict
    return {name: source[name].detach().cpu().contiguous() for name in names}


def save_adapter(
    model: StateCoreForCausalLM, folder: str | os.PathLike, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Writes adapter.safetensors and statecore_config.json into `folder`, each completely or not at all."""
    if not isinstance(model, StateCoreForCausalLM):
        raise TypeError(f"save_adapter() takes a state-transition model, got {type(model).__name__}")
    folder, config = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "base_model": config.name_or_path or None,
        "base_model_type": config.base_model_type,
        "base_shape": {name: getattr(config, name) for name in SHAPE_FIELDS},
        "step": {name: getattr(config, name) for name in STEP_FIELDS},
    }
    save_file(adapter_weights(model, state_dict), folder / f"{WEIGHTS_FILE}.part", metadata={"format": "pt"})
    (folder / f"{CONFIG_FILE}.part").write_text(json.dumps(description, indent=2) + "\n")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        os.replace(folder / f"{name}.part", folder / name)


def load_adapter(
    base: str | os.PathLike | PreTrainedModel | None, folder: str | os.PathLike, *, dtype: torch.dtype | str = "auto"
) -> StateCoreForCausalLM:
    """The base with the adapter of `folder`.

    Args:
        base: path, hub name or model; None for the base that the adapter names.
        folder: written by `save_adapter`.
        dtype: of a base that is loaded; a model keeps its own.

    Raises:
        FileNotFoundError: `folder` is no adapter.
        ValueError: the adapter belongs to another base, or names none.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        raise FileNotFoundError(f"{folder} is no adapter: it must hold {WEIGHTS_FILE} and {CONFIG_FILE}")
    description = json.loads((folder / CONFIG_FILE).read_text())
    base = description["base_model"] if base is None else base
    if base is None:
        raise ValueError(f"{folder} does not name its base model: pass `base`")
    base_config = base.config if isinstance(base, PreTrainedModel) else AutoConfig.from_pretrained(base)
    expected = description["base_shape"] | {"model_type": description["base_model_type"]}
    got = {name: getattr(base_config, name) for name in expected}
    if got != expected:
        raise ValueError(f"the adapter in {folder} belongs to a base with {expected}, got {got}")
    model = convert(base, dtype=dtype, **description["step"])
    load_adapter_weights(model, folder)
    return model


def load_adapter_weights(model: StateCoreForCausalLM, folder: str | os.PathLike) -> None:
    """Replaces the linear branches and step token rows of `model` by those in `folder`, whose names and shapes must
    match exactly.
    """
    weights = load_file(Path(folder) / WEIGHTS_FILE)
    own = {name: parameter for name, parameter in model.named_parameters() if is_adapter_weight(name)}
    if own.keys() != weights.keys():
        raise ValueError(
            f"{folder} does not fit the model: it lacks {sorted(own.keys() - weights.keys())[:3]} "
            f"and has unknown {sorted(weights.keys() - own.keys())[:3]}"
        )
    wrong = [name for name in own if own[name].shape != weights[name].shape]
    if wrong:
        name = wrong[0]
        raise ValueError(f"{name} must have shape {tuple(own[name].shape)}, {folder} has {tuple(weights[name].shape)}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def is_adapter(folder: str | os.PathLike) -> bool:
    return all((Path(folder) / name).is_file() for name in (WEIGHTS_FILE, CONFIG_FILE))


def _tables(model: StateCoreForCausalLM) -> list[StepEmbedding | StepHead]:
    """The embedding and, unless it is tied, the head."""
    embedding, head = model.model.embed_tokens, model.lm_head
    return [embedding] if head.step_weight is embedding.step_weight else [embedding, head]


def _step_config(model_class: type, base_config: PreTrainedConfig, step_fields: dict) -> StepConfig:
    base_fields = base_config.to_dict()
    for name in ("model_type", "architectures", "layer_types", "transformers_version"):
        base_fields.pop(name, None)
    config = model_class.config_class(**base_fields, **step_fields)
    config._attn_implementation = base_config._attn_implementation
    config.name_or_path = base_config.name_or_path
    return config


@contextmanager
def _quiet():
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
