"""Models, tokenizers and prompt formats from folders and hub names, the same for every command.

A model's folder is a transformers checkpoint or an adapter (statecore/adapter.py). Beside its weights it may hold a
folder `tokenizer` and `patterns.json`, which records how `statecore prepare` built the prompts.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .adapter import is_adapter, load_adapter
from .data import PATTERNS_FILE, PromptFormat
from .modeling import StateCoreForCausalLM


@dataclass(frozen=True)
class ModelOptions:
    """How a command loads its model and tokenizer.

    Args:
        base: the base checkpoint under an adapter; default: the one the adapter names.
        tokenizer: folder or hub name; default: the folder `tokenizer` in the model's, or the model's own.
        dtype: what the model computes in.
    """

    base: str | None = None
    tokenizer: str | None = None
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "float32"


def load_causal_lm(
    model: str | os.PathLike,
    base: str | os.PathLike | None = None,
    dtype: str = "float32",
    *,
    model_class: type = AutoModelForCausalLM,
) -> PreTrainedModel:
    """Loads a causal language model, a state-transition checkpoint or an adapter, in eval mode, on the GPU if there is
    one.

    Args:
        model: folder or hub name.
        base: the base checkpoint under an adapter; default: the one the adapter names.
        dtype: name of a torch dtype, or "auto" for the checkpoint's own.
        model_class: the class that reads a checkpoint that is not an adapter.

    Raises:
        ValueError: the checkpoint lacks weights of its model.
    """
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    if is_adapter(model):
        loaded = load_adapter(base, model, dtype=torch_dtype)
    else:
        loaded, info = model_class.from_pretrained(model, dtype=torch_dtype, output_loading_info=True)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"{model} must hold a causal language model; {len(missing)} weights are missing ({missing[0]}, ...)"
            )
    return loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def load_state_transition_model(
    model: str | os.PathLike | StateCoreForCausalLM, base: str | os.PathLike | None = None
) -> StateCoreForCausalLM:
    """As load_causal_lm, in the checkpoint's own dtype. A loaded model is returned as it is.

    Raises:
        ValueError: it is not a state-transition model, or lacks weights.
    """
    if isinstance(model, StateCoreForCausalLM):
        return model
    loaded = load_causal_lm(model, base, "auto")
    if not isinstance(loaded, StateCoreForCausalLM):
        raise ValueError(
            f"{model} must be a state-transition checkpoint or an adapter folder, got a plain {type(loaded).__name__}: "
            "train one with `statecore train`"
        )
    return loaded


def load_tokenizer(name: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer in the subfolder `tokenizer` of a model's folder if there is one, else that of `name` itself."""
    inner = Path(name) / "tokenizer"
    return AutoTokenizer.from_pretrained(inner if inner.is_dir() else name)


def load_prompt_format(folder: str | os.PathLike | None, **given: str | None) -> PromptFormat:
    """The prompt format in the patterns.json of a model's folder, or the default format if there is none.

    given: fields of PromptFormat that take precedence; None leaves a field as it is.
    """
    file = None if folder is None else Path(folder) / PATTERNS_FILE
    known = json.loads(file.read_text(encoding="utf-8")).get("prompt", {}) if file and file.is_file() else {}
    return PromptFormat(**(known | {name: value for name, value in given.items() if value is not None}))
