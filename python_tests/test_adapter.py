"""Conversion of base checkpoints, and the adapter files that hold the difference."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import BASE, ENDS, FAMILIES, STARTS, WORDS, random_chain, tiny_base, tiny_model
from transformers import Gemma2Config, GPT2Config, GPT2LMHeadModel, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.gemma2 import modeling_gemma2 as gemma2

from statecore import families
from statecore.adapter import convert, load_adapter, load_adapter_weights, save_adapter
from statecore.config import StepConfig
from statecore.modeling import MixedAttention, StateCoreForCausalLM, StateCoreModel, is_adapter_weight

STEP_TOKENS = {"step_start_token_ids": STARTS, "step_end_token_ids": ENDS}
BEYOND = {"step_start_token_ids": [58, 60, 66], "step_end_token_ids": [59, 61, 63]}  # the base has 60 rows


def chain() -> torch.Tensor:
    return torch.tensor([random_chain(22, 4, 4)])


def trained(model):
    """The model with random new weights, as after training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter_weight(name):
                parameter.normal_(std=0.3)
    return model


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_convert_keeps_the_base(family, tied, tmp_path):
    base = tiny_base(family, tie_word_embeddings=tied)
    base.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    words = torch.randint(2, WORDS, (2, 12))
    wanted = logits(base, words)
    converted = [convert(source, **STEP_TOKENS, la_rank=6, seed=3) for source in (base, tmp_path)]
    for model in converted:
        assert type(model) is FAMILIES[family][0]
        assert not model.training
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            name for name, _ in model.named_parameters() if is_adapter_weight(name)
        }
        with model.full_attention():
            assert torch.equal(logits(model, words), wanted)
        torch.testing.assert_close(logits(model, words)[..., :WORDS], wanted[..., :WORDS], rtol=0, atol=2e-5)
        assert torch.equal(base.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    one, other = (dict(model.named_parameters()) for model in converted)
    assert all(torch.equal(one[name], other[name]) for name in one), "the same seed must give the same weights"
    differs = convert(base, **STEP_TOKENS, la_rank=6, seed=4)
    assert not torch.equal(differs.model.embed_tokens.step_weight, one["model.embed_tokens.step_weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_convert_grows_the_embedding_only_where_rows_are_missing(tied):
    base = tiny_base("qwen2", tie_word_embeddings=tied)
    assert convert(base, **STEP_TOKENS, la_rank=6).config.vocab_size == BASE["vocab_size"]
    model = convert(base, **BEYOND, la_rank=6)
    assert model.config.vocab_size == len(model.lm_head.weight) == len(model.model.embed_tokens.weight) == 67
    assert base.config.vocab_size == len(base.lm_head.weight) == 60
    words = torch.randint(2, WORDS, (1, 9))
    with model.full_attention():
        assert torch.equal(logits(model, words)[..., :60], logits(base, words))


def test_step_rows_start_near_the_mean_row():
    base = tiny_base("llama", tie_word_embeddings=False)
    model = convert(base, **STEP_TOKENS, la_rank=6)
    ordinary = [token for token in range(BASE["vocab_size"]) if token not in STARTS + ENDS]
    for ours, theirs in ((model.model.embed_tokens, base.model.embed_tokens), (model.lm_head, base.lm_head)):
        offset = ours.step_weight - theirs.weight[ordinary].mean(0)
        ratio = offset.norm() / theirs.weight[: len(offset)].norm()
        assert 0.05 < ratio < 0.2
    assert len({tuple(row) for row in model.lm_head.step_weight.tolist()}) == 6


@pytest.mark.parametrize("tied", [True, False])
def test_adapter_round_trip(tied, tmp_path):
    base = tiny_base("qwen3", tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    model = trained(convert(tmp_path / "base", **BEYOND, la_rank=6, la_norm=True, alpha_max=0.3))
    save_adapter(model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter.safetensors",
        "statecore_config.json",
    ]
    weights = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert all(is_adapter_weight(name) for name in weights)
    assert ("lm_head.step_weight" in weights) == (not tied)
    ids = torch.randint(2, WORDS, (1, 12))
    ids[0, [3, 6]] = torch.tensor([58, 59])
    for source in (base, tmp_path / "base", None):  # None: the base that the adapter names
        loaded = load_adapter(source, tmp_path / "adapter")
        assert loaded.config.alpha_max == 0.3
        assert torch.equal(logits(loaded, ids), logits(model, ids))
        assert {p.requires_grad for n, p in loaded.named_parameters() if is_adapter_weight(n)} == {True}


def test_convert_refuses():
    known = ", ".join(FAMILIES)
    with pytest.raises(ValueError, match=f"the base must be one of {known}, got 'gpt2'"):
        convert(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)), **STEP_TOKENS)
    with pytest.raises(ValueError, match=f"the base must be one of {known}, got 'gemma2'"):
        convert(gemma2.Gemma2ForCausalLM(Gemma2Config(num_hidden_layers=1, vocab_size=9, **TINY_GEMMA2)), **STEP_TOKENS)
    with pytest.raises(ValueError, match=r"the base must be one of .* got 'statecore_qwen2'"):
        convert(tiny_model("qwen2"), **STEP_TOKENS)
    with pytest.raises(TypeError, match="got rank"):
        convert(tiny_base("qwen2"), **STEP_TOKENS, rank=4)
    with pytest.raises(Exception, match="la_rank must lie in"):
        convert(tiny_base("qwen2"), **STEP_TOKENS, la_rank=64)


class Gemma2Attention(MixedAttention, gemma2.Gemma2Attention):
    pass


class StateCoreGemma2Model(StateCoreModel, gemma2.Gemma2Model):
    attention_class = Gemma2Attention


class StateCoreGemma2ForCausalLM(StateCoreForCausalLM, gemma2.Gemma2ForCausalLM):
    class config_class(StepConfig, Gemma2Config):
        base_model_type = "gemma2"

    model_class = StateCoreGemma2Model


def gemma2_config(**features) -> Gemma2Config:
    plain = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": ["full_attention"] * 2}
    return Gemma2Config(num_hidden_layers=2, **(plain | features))


TINY_GEMMA2 = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (gemma2_config(attn_logit_softcapping=50.0), "with attn_logit_softcapping = 50.0 is"),
        (gemma2_config(final_logit_softcapping=9.0), "with final_logit_softcapping = 9.0 is"),
        (gemma2_config(layer_types=None), "with sliding_attention layers is"),
        (gemma2_config(use_bidirectional_attention=True), "with use_bidirectional_attention = True is"),
        (Qwen2Config(use_sliding_window=True, max_window_layers=1), "with sliding_attention layers is"),
        (Qwen3Config(layer_types=["chunked_attention"] * 32), "with chunked_attention layers is"),
        (LlamaConfig(sliding_window=64), "with sliding_window = 64 is"),
        (LlamaConfig(partial_rotary_factor=0.5), "with partial_rotary_factor = 0.5 is"),
        (LlamaConfig(logits_scaling=8.0), "with logits_scaling = 8.0 is"),
    ],
)
def test_bases_with_features_that_would_be_dropped_are_refused(config, message, monkeypatch):
    """Gemma2 stands for a family that was added without regard to its special features."""
    # Scaled RoPE frequencies are supported: the base computes them.
    families.causal_lm_class(LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}))
    monkeypatch.setattr(families, "CAUSAL_LM_CLASSES", (*families.CAUSAL_LM_CLASSES, StateCoreGemma2ForCausalLM))
    with pytest.raises(ValueError, match=message):
        families.causal_lm_class(config)


def test_a_base_with_a_scaled_embedding_is_refused():
    config = StateCoreGemma2ForCausalLM.config_class(num_hidden_layers=2, vocab_size=9, la_rank=2, **TINY_GEMMA2)
    with pytest.raises(TypeError, match=r"must be a plain nn.Embedding, got Gemma2TextScaledWordEmbedding"):
        StateCoreGemma2ForCausalLM(config)


def test_load_adapter_refuses(tmp_path):
    base = tiny_base("qwen2")
    model = convert(base, **STEP_TOKENS, la_rank=6)
    with pytest.raises(FileNotFoundError, match=r"is no adapter: it must hold adapter.safetensors"):
        load_adapter(base, tmp_path)
    with pytest.raises(TypeError, match="takes a state-transition model, got Qwen2ForCausalLM"):
        save_adapter(base, tmp_path)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"belongs to a base with .*_layers': 3.* got .*_layers': 2"):
        load_adapter(tiny_base("qwen2", num_hidden_layers=2), tmp_path)
    with pytest.raises(ValueError, match=r"belongs to a base with .*qwen2.* got .*llama"):
        load_adapter(tiny_base("llama"), tmp_path)
    with pytest.raises(ValueError, match="does not name its base model"):
        load_adapter(None, tmp_path)
    with pytest.raises(ValueError, match=r"la.A must have shape \(20, 32\), .* has \(24, 32\)"):
        load_adapter_weights(convert(base, **STEP_TOKENS, la_rank=5), tmp_path)
    with pytest.raises(ValueError, match=r"does not fit the model: it lacks .* and has unknown"):
        load_adapter_weights(convert(base, **STEP_TOKENS, la_rank=6, la_gate=False, la_norm=True), tmp_path)


def test_an_interrupted_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = convert(tiny_base("qwen2"), **STEP_TOKENS, la_rank=6)
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("statecore.adapter.json.dumps", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained(model), tmp_path)
    monkeypatch.undo()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert json.loads(before["statecore_config.json"])["step"]["la_rank"] == 6


@pytest.mark.parametrize("norm", [False, True])
def test_lora_beside_the_linear_branch(norm, tmp_path):
    """peft on the base's projections, with the linear branches in its own files, saved and loaded."""
    base, ids = tiny_base("qwen2"), chain()

    def fresh():
        return convert(base, **STEP_TOKENS, la_rank=6, la_norm=norm)

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["la"], init_lora_weights=False)
    peft_model = get_peft_model(fresh(), lora)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad and "modules_to_save" in name:
                parameter.normal_(std=0.3)
    wanted = logits(peft_model, ids)
    assert not torch.allclose(wanted, logits(fresh(), ids), atol=1e-3)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(), tmp_path)
    assert torch.equal(logits(loaded, ids), wanted)
    both = (peft_model, loaded.merge_and_unload())
    generated = [one.generate(input_ids=ids, max_new_tokens=5, do_sample=False) for one in both]
    assert torch.equal(*generated)
