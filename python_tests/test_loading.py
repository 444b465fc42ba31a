"""Models, tokenizers and prompt formats from folders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_cases import character_tokenizer
from tiny_models import tiny_base, tiny_model
from transformers import Mamba2Config, Mamba2ForCausalLM

from statecore.data import PromptFormat
from statecore.loading import load_causal_lm, load_prompt_format, load_state_transition_model, load_tokenizer
from statecore.ssd import SSDForCausalLM


def test_any_causal_lm_is_loaded(tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "base")
    tiny_model().save_pretrained(tmp_path / "model")
    base = load_causal_lm(tmp_path / "base", dtype="float64")
    assert (type(base).__name__, base.dtype, base.training) == ("LlamaForCausalLM", torch.float64, False)
    model = load_state_transition_model(tmp_path / "model")
    assert (type(model).__name__, model.dtype, model.training) == ("StateCoreQwen2ForCausalLM", torch.float64, False)
    assert load_state_transition_model(model) is model
    with pytest.raises(ValueError, match="or an adapter folder, got a plain LlamaForCausalLM"):
        load_state_transition_model(tmp_path / "base")


def test_mamba2_loads_as_the_class_asked_for(tmp_path):
    config = Mamba2Config(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=8, expand=2, n_groups=1,
    )  # fmt: skip
    Mamba2ForCausalLM(config).save_pretrained(tmp_path)
    assert type(load_causal_lm(tmp_path)) is Mamba2ForCausalLM
    assert type(load_causal_lm(tmp_path, model_class=SSDForCausalLM)) is SSDForCausalLM


def test_checkpoints_without_all_weights_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.la.A"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (load_causal_lm, load_state_transition_model):
        with pytest.raises(ValueError, match=r"1 weights are missing \(model.layers.1.self_attn.la.A, "):
            load(tmp_path)


def test_a_tokenizer_may_be_in_a_subfolder(tmp_path):
    character_tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = load_tokenizer(tmp_path / "tokenizer").get_vocab()
    assert load_tokenizer(tmp_path).get_vocab() == words


def test_prompt_formats_are_read_and_overridden(tmp_path):
    assert load_prompt_format(None) == load_prompt_format(tmp_path) == PromptFormat()
    known = {"template": "Q: {prompt}", "think_open": "<a>", "think_close": "<b>"}
    (tmp_path / "patterns.json").write_text(json.dumps({"patterns": [], "prompt": known}))
    assert load_prompt_format(tmp_path) == PromptFormat("Q: {prompt}", "<a>", "<b>")
    changed = load_prompt_format(tmp_path, template=None, think_open="", think_close="<c>")
    assert changed == PromptFormat("Q: {prompt}", "", "<c>")
