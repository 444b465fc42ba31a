"""The base model families, a block of four classes each.

To add a family, copy a block and append its ForCausalLM class to CAUSAL_LM_CLASSES: the tests compare every class in
it with its base. If a tiny base of the family needs fields of its own, such as the neutral value of a feature that is
on by default, they go to OWN_FIELDS in python_tests/tiny_models.py. A family fits if

- attention has q_proj, k_proj, v_proj and o_proj (with or without bias), heads of `head_dim`, and `scaling` for the
  scores, and does nothing else to the scores: no soft-capping, sinks, position biases or sliding windows
  (`attention_dropout` is not applied by mixed attention);
- norms of q and k, if any, act on single heads before RoPE: override `normalise`;
- RoPE rotates all of `head_dim`, the first half against the second (`rotate_half`), by the model's
  `position_embeddings`, whatever their frequencies;
- the token embedding is a plain nn.Embedding: StepEmbedding replaces it, and would drop a scale inside;
- logits are `lm_head(hidden_states)`, tied or not, and nothing after it: losses.py calls the head alone;
- the model's forward takes `inputs_embeds` and passes its keyword arguments on to every `layers[i].self_attn`; it takes
  the masks of its layers as a dictionary by layer type (copy Qwen2), or one mask (copy Llama, for its `layer_mask`);
- the configuration names `num_attention_heads`, `num_key_value_heads`, `hidden_size` and `rms_norm_eps`.

`causal_lm_class` refuses what a configuration shows of the opposite, StateCoreModel the embedding. If the family shows
it in a field that is not in NEUTRAL_VALUES yet, add the field there, and a case to python_tests/test_adapter.py.
"""

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from .config import StepConfig
from .modeling import MixedAttention, StateCoreForCausalLM, StateCoreModel

# ----------------------------------------------------------------------------------------------------------------------
# Qwen2


@strict
class StateCoreQwen2Config(StepConfig, Qwen2Config):
    model_type = "statecore_qwen2"
    base_model_type = "qwen2"


class Qwen2MixedAttention(MixedAttention, qwen2.Qwen2Attention):
    pass


class StateCoreQwen2Model(StateCoreModel, qwen2.Qwen2Model):
    config_class = StateCoreQwen2Config
    attention_class = Qwen2MixedAttention


class StateCoreQwen2ForCausalLM(StateCoreForCausalLM, qwen2.Qwen2ForCausalLM):
    config_class = StateCoreQwen2Config
    model_class = StateCoreQwen2Model


# ----------------------------------------------------------------------------------------------------------------------
# Qwen3


@strict
class StateCoreQwen3Config(StepConfig, Qwen3Config):
    model_type = "statecore_qwen3"
    base_model_type = "qwen3"


class Qwen3MixedAttention(MixedAttention, qwen3.Qwen3Attention):
    def normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k)


class StateCoreQwen3Model(StateCoreModel, qwen3.Qwen3Model):
    config_class = StateCoreQwen3Config
    attention_class = Qwen3MixedAttention


class StateCoreQwen3ForCausalLM(StateCoreForCausalLM, qwen3.Qwen3ForCausalLM):
    config_class = StateCoreQwen3Config
    model_class = StateCoreQwen3Model


# ----------------------------------------------------------------------------------------------------------------------
# Llama


@strict
class StateCoreLlamaConfig(StepConfig, LlamaConfig):
    model_type = "statecore_llama"
    base_model_type = "llama"


class LlamaMixedAttention(MixedAttention, llama.LlamaAttention):
    pass


class StateCoreLlamaModel(StateCoreModel, llama.LlamaModel):
    config_class = StateCoreLlamaConfig
    attention_class = LlamaMixedAttention

    def layer_mask(self, mask: Tensor | None) -> Tensor | None:
        return mask


class StateCoreLlamaForCausalLM(StateCoreForCausalLM, llama.LlamaForCausalLM):
    config_class = StateCoreLlamaConfig
    model_class = StateCoreLlamaModel


# ----------------------------------------------------------------------------------------------------------------------
# Registration and refusal

CAUSAL_LM_CLASSES = (StateCoreQwen2ForCausalLM, StateCoreQwen3ForCausalLM, StateCoreLlamaForCausalLM)

for _causal_lm in CAUSAL_LM_CLASSES:
    AutoConfig.register(_causal_lm.config_class.model_type, _causal_lm.config_class, exist_ok=True)
    AutoModel.register(_causal_lm.config_class, _causal_lm.model_class, exist_ok=True)
    AutoModelForCausalLM.register(_causal_lm.config_class, _causal_lm, exist_ok=True)


def causal_lm_class(base_config: PreTrainedConfig) -> type[StateCoreForCausalLM]:
    """The class that a base with this configuration is converted to.

    Raises:
        ValueError: its family is unknown, or it has a feature that conversion would silently drop.
    """
    classes = {causal_lm.config_class.base_model_type: causal_lm for causal_lm in CAUSAL_LM_CLASSES}
    if base_config.model_type not in classes:
        raise ValueError(f"the base must be one of {', '.join(classes)}, got {base_config.model_type!r}")
    dropped = unsupported_features(base_config)
    if dropped:
        raise ValueError(
            f"a {base_config.model_type} base with {', '.join(dropped)} is not supported: "
            "conversion would silently drop it"
        )
    return classes[base_config.model_type]


# Fields that change what attention, the head or RoPE compute, with the value at which they change nothing.
NEUTRAL_VALUES = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logits_scaling": 1,
    "use_bidirectional_attention": False,
    "partial_rotary_factor": 1,
}


def unsupported_features(base_config: PreTrainedConfig) -> list[str]:
    """Features of a base configuration that neither mixed attention nor the head and its losses compute."""
    fields = {**(getattr(base_config, "rope_parameters", None) or {}), **base_config.to_dict()}
    layer_types = fields.get("layer_types")
    features = [f"{name} layers" for name in sorted({*(layer_types or [])} - {"full_attention"})]
    if layer_types is None and fields.get("sliding_window") is not None:
        features.append(f"sliding_window = {fields['sliding_window']}")
    for name, neutral in NEUTRAL_VALUES.items():
        if fields.get(name) not in (None, neutral):
            features.append(f"{name} = {fields[name]}")
    return features
