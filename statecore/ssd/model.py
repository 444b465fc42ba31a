"""Attention-free language models on the linear-attention operator: Mamba-2's state-space duality (SSD), the model of
PromptCoT-Mamba.  (arXiv 2405.21060, 2505.22425)

    [z, x, B, C, dt] = in_proj(hidden),  x, B, C = silu(causal depthwise convolution),  dt = softplus(dt + dt_bias)
    S_t = exp(dt_t A) S_{t-1} + B_t^T (dt_t x_t),  y_t = C_t S_t + D x_t,  out = out_proj(RMSNorm(y * silu(z)))

This is `linear_attention` with q = C, k = B, v = dt x and log_decay = dt A. Its states are [heads, Dk, Dv] as in
flash-linear-attention, the transpose of the reference's [heads, head_dim, state_size]. Prefill and training run in
chunks; decoding is one rank-1 update of a state of constant size. Either may continue the other at any token.

Parameters, their names and the configuration are those of transformers' Mamba2, so checkpoints load in both directions
(`SSDForCausalLM.from_pretrained`, `Mamba2ForCausalLM.from_pretrained`). Layers of attention or of mixed attention
(statecore/modeling.py) may stand among the SSD layers; such hybrids have a model type of their own.

Where the sources leave something open or disagree:

- The gated norm. The reference block normalises each group of channels separately, transformers all channels together.
  `norm_groups = 1` follows transformers, so that its checkpoints give its logits; `norm_groups = n_groups` follows the
  reference.
- dt limits. transformers clamps dt in prefill but not in decoding; here both clamp it, so that decoding continues the
  same model.
- Padding. A padding token neither adds to a state nor lets it decay.
- Hybrids. An attention layer replaces an SSD layer and, like it, has no MLP behind it.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, Mamba2Config, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .. import ops, steps
from ..cache import StepCacheLayer
from ..config import LAYER_TYPE as STEP_LAYER_TYPE
from ..config import check_pruned
from ..families import LlamaMixedAttention, StateCoreLlamaConfig
from ..modeling import LinearBranch, Widen
from ..steps import StepContext

SSD_LAYER_TYPE = "statecore_ssd"
SSD, ATTENTION, MIXED_ATTENTION = KINDS = ("ssd", "attention", "mixed_attention")


# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@strict
class SSDConfig(Mamba2Config):
    """transformers' Mamba2Config with fields for hybrids, the reference's gated norm and pruned layers.

    layer_list: the kind of every layer, "ssd", "attention" or "mixed_attention"; None means "ssd" throughout.
    attention: fields of StateCoreLlamaConfig for the layers that are not "ssd": num_attention_heads, which is required,
    num_key_value_heads, rope_parameters, and for mixed attention its step tokens and la_rank.
    norm_groups: groups of channels that the gated norm normalises separately.
    state_heads, state_ranks: for every layer the heads it keeps and the width that B and C are projected to (see
    statecore/dynamics/pruning.py; entries of "attention" layers are ignored). The gated norm divides by the width of
    all heads, so a removed head is equivalent to one whose output is zero.

    With their defaults, the configuration is saved as a plain `mamba2` one.
    """

    model_type = "statecore_ssd"

    layer_list: list[str] | None = None
    attention: dict[str, Any] | None = None
    norm_groups: int = 1
    state_heads: list[list[int]] | None = None
    state_ranks: list[int] | None = None

    @property
    def kinds(self) -> list[str]:
        return self.layer_list or [SSD] * self.num_hidden_layers

    @property
    def layer_types(self) -> list[str]:
        """The cache layer of every layer, which `DynamicCache(config=config)` builds."""
        return [SSD_LAYER_TYPE if kind == SSD else STEP_LAYER_TYPE for kind in self.kinds]

    @property
    def is_plain_mamba2(self) -> bool:
        pruned = self.state_heads is not None or self.state_ranks is not None
        return set(self.kinds) <= {SSD} and self.norm_groups == 1 and not pruned

    def attention_config(self) -> StateCoreLlamaConfig:
        """Configuration of the layers that are not "ssd"."""
        shared = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.layer_norm_epsilon,
            "initializer_range": self.initializer_range,
        }
        own = self.attention or {}
        all_heads = list(range(own.get("num_key_value_heads") or own.get("num_attention_heads", 0)))
        mixed = [kind == MIXED_ATTENTION for kind in self.kinds]
        for name, pruned, unused in (
            ("state_heads", self.state_heads, all_heads),
            ("state_ranks", self.state_ranks, 1),
        ):
            if pruned is not None:
                shared[name] = [entry if here else unused for entry, here in zip(pruned, mixed, strict=True)]
        return StateCoreLlamaConfig(**(shared | own))

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        if self.is_plain_mamba2:
            for name in ("layer_list", "attention", "norm_groups", "state_heads", "state_ranks"):
                fields.pop(name, None)
            fields["model_type"] = Mamba2Config.model_type
            if fields.get("architectures"):
                fields["architectures"] = ["Mamba2ForCausalLM"]
        return fields

    @classmethod
    def get_config_dict(cls, name, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Accepts `mamba2` checkpoints beside its own and refuses all others."""
        fields, rest = super().get_config_dict(name, **kwargs)
        found = fields.get("model_type")
        if found not in (Mamba2Config.model_type, cls.model_type):
            raise ValueError(
                f"{name} holds a model of type {found!r}, expected 'mamba2' or 'statecore_ssd': take a checkpoint of "
                "transformers' Mamba2 or one that SSDForCausalLM saved"
            )
        return fields | {"model_type": cls.model_type}, rest

    @classmethod
    def from_mamba2(cls, config: Mamba2Config, **fields) -> "SSDConfig":
        """The same model as a transformers configuration, with some fields changed."""
        given = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        return cls(**(given | fields))

    def validate_layer_type(self):
        """Replaces the base's check, which knows only the layer types of transformers itself."""

    def validate_ssd(self):
        inner = self.num_heads * self.head_dim
        if self.n_groups < 1 or self.num_heads % self.n_groups:
            raise ValueError(
                f"num_heads must be a multiple of n_groups, got {self.num_heads} heads and {self.n_groups} groups"
            )
        if self.norm_groups < 1 or inner % self.norm_groups:
            raise ValueError(
                f"norm_groups must divide num_heads * head_dim = {inner}, got {self.norm_groups}: 1 is transformers' "
                f"Mamba2, n_groups = {self.n_groups} the reference block"
            )
        if self.conv_kernel < 1 or self.state_size < 1:
            raise ValueError(f"conv_kernel and state_size must be >= 1, got {self.conv_kernel} and {self.state_size}")
        low, high = self.time_step_limit
        if not 0 <= low <= high:
            raise ValueError(f"time_step_limit must be (low, high) with 0 <= low <= high, got {(low, high)}")
        self._check_layers()
        self._check_pruned()

    def _check_layers(self):
        if self.layer_list is not None and len(self.layer_list) != self.num_hidden_layers:
            raise ValueError(
                f"layer_list must name {self.num_hidden_layers} layers (num_hidden_layers), got {len(self.layer_list)}"
            )
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown:
            raise ValueError(f"layer_list may hold {', '.join(map(repr, KINDS))}, got {unknown[0]!r}")
        if set(self.kinds) == {SSD}:
            return
        heads = (self.attention or {}).get("num_attention_heads")
        if not heads:
            raise ValueError(
                "layers that are not 'ssd' need attention = {'num_attention_heads': ...}, and more fields of "
                f"StateCoreLlamaConfig where the defaults do not fit; got attention = {self.attention}"
            )
        if "head_dim" not in self.attention and self.hidden_size % heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {heads}")

    def _check_pruned(self):
        own = self.attention or {}
        queries = own.get("num_attention_heads", 1)
        of_kind = {
            SSD: (self.num_heads, self.state_size),
            MIXED_ATTENTION: (
                own.get("num_key_value_heads") or queries, own.get("head_dim") or self.hidden_size // queries
            ),
            ATTENTION: (0, 0),
        }  # fmt: skip
        heads, widths = zip(*(of_kind[kind] for kind in self.kinds), strict=True)
        check_pruned(self.state_heads, self.state_ranks, list(heads), list(widths))
        if self.state_heads is None or self.norm_groups == 1:
            return
        for layer, kept in enumerate(self.state_heads):
            if self.kinds[layer] != SSD:
                continue
            counts = [sum(h * self.norm_groups // self.num_heads == g for h in kept) for g in range(self.norm_groups)]
            if self.num_heads % self.norm_groups or len(set(counts)) > 1:
                raise ValueError(
                    f"with norm_groups = {self.norm_groups}, which must divide num_heads = {self.num_heads}, every "
                    f"group must keep equally many heads; layer {layer} keeps {counts}: choose state_heads accordingly"
                )


# ----------------------------------------------------------------------------------------------------------------------
# Cache


class SSDCacheLayer(CacheLayerMixin):
    """The cache of one SSD layer, of constant size.

    state: float32 (float64 models: float64) [B, Hv, Dk, Dv]. window: [B, conv_kernel - 1, channels], the newest inputs
    of the convolution. Both are None before the first token. Decoding changes `state` in place, so a copy of the layer
    (statecore.cache.snapshot, fork) copies its tensors.
    """

    _layer_type = SSD_LAYER_TYPE
    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False
    kv_bytes = peak_kv_bytes = 0

    def __init__(self, **kwargs):
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.state: Tensor | None = None
        self.window: Tensor | None = None
        self.seen = 0

    def __copy__(self) -> "SSDCacheLayer":
        copied = SSDCacheLayer()
        copied.seen = self.seen
        if self.state is not None:
            copied.state, copied.window = self.state.clone(), self.window.clone()
        return copied

    @property
    def state_bytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes + self.window.nbytes

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            rows = indices.to(self.state.device)
            self.state, self.window = self.state[rows], self.window[rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.batch_select_indices(torch.arange(len(self.state)).repeat_interleave(repeats))

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def lazy_initialization(self, *args, **kwargs) -> None:
        raise NotImplementedError("an SSD layer holds a state, not keys and values")

    update = lazy_initialization

    def crop(self, *args, **kwargs) -> None:
        raise NotImplementedError(
            "an SSD state cannot be run backwards. Take statecore.cache.snapshot(cache) before and "
            "statecore.cache.restore(cache, snapshot) after."
        )


def ssm_states(cache: Cache) -> dict[int, Tensor]:
    """The states of a filled cache by layer, float32 [B, Hv, Dk, Dv]; not copies: decoding changes them.

    Of mixed attention layers it is the running state.
    """
    states = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, SSDCacheLayer) and layer.state is not None:
            states[index] = layer.state
        elif isinstance(layer, StepCacheLayer) and layer.states is not None:
            states[index] = layer.states[0]
    return states


# ----------------------------------------------------------------------------------------------------------------------
# The SSD layer


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`S_t = exp(dt_t A) S_{t-1} + B_t^T (dt_t x_t)`, `y_t = C_t S_t`.  (arXiv 2405.21060)

    x [B, T, H, P], dt >= 0 [B, T, H], A <= 0 [H], B and C [B, T, G, N] with H a multiple of G,
    state [sequences, H, N, P] -> y [B, T, H, P] and the state after the last token.
    """
    v = (x * dt[..., None]).to(x.dtype)
    return ops.linear_attention(C, B, v, dt * A, state, cu_seqlens, scale=1.0)


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """`ssd_scan` for one token: [B, 1, ...] each; updates `state` [B, H, N, P] in place."""
    v = (x * dt[..., None]).to(x.dtype)
    return ops.state_update(state[None], C[:, 0], B[:, 0], v[:, 0], (dt * A)[:, 0], scale=1.0)[:, None]


@dataclass(frozen=True)
class Packing:
    """Positions in a line of packed sequences where each sequence follows its window: the `gap` inputs that the
    convolution reads before its first token.

    cu_seqlens: int32 [N + 1].
    tokens: int64 [T], positions of the tokens.
    windows: int64 [N, gap], positions of each sequence's window.
    tails: int64 [N, gap], positions of its last inputs: the window of a continuation.
    """

    cu_seqlens: Tensor
    tokens: Tensor
    windows: Tensor
    tails: Tensor

    @staticmethod
    def of(cu_seqlens: Tensor, time: int, gap: int) -> "Packing":
        bounds = cu_seqlens.long()
        token = torch.arange(time, device=bounds.device)
        sequence = torch.searchsorted(bounds[1:].contiguous(), token, right=True)
        earlier_windows = gap * torch.arange(len(bounds) - 1, device=bounds.device)
        offset = earlier_windows[:, None] + torch.arange(gap, device=bounds.device)
        return Packing(cu_seqlens, token + gap * (sequence + 1), bounds[:-1, None] + offset, bounds[1:, None] + offset)


class SSDNorm(nn.Module):
    """RMSNorm of x, or of x * silu(gate), in each of `groups` groups of channels; at least in float32. The mean is over
    `full` channels, of which those beyond `width` are zero.
    """

    def __init__(self, width: int, eps: float, groups: int = 1, full: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.share = (full or width) / width
        self.eps, self.groups = eps * self.share, groups

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        wide = _at_least_float32(x)
        if gate is not None:
            wide = wide * F.silu(_at_least_float32(gate))
        if self.groups == 1:
            wide = F.rms_norm(wide, wide.shape[-1:], eps=self.eps)
        else:
            wide = wide.unflatten(-1, (self.groups, -1))
            wide = F.rms_norm(wide, wide.shape[-1:], eps=self.eps).flatten(-2)
        if self.share != 1:
            wide = wide * self.share**0.5
        return self.weight * wide.to(self.weight.dtype)


class Projection(nn.Linear):
    """A linear map with initial weights uniform in +- 1 / sqrt(inputs), divided by `shrink`."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, shrink: float = 1.0):
        super().__init__(inputs, outputs, bias=bias)
        self.shrink = shrink


class SSDMixer(nn.Module):
    """The Mamba-2 block between norm and residual. A pruned one keeps some of the heads, projects B and C on a `basis`
    of their group, or both.
    """

    def __init__(self, config: SSDConfig, index: int = 0):
        super().__init__()
        self.config = config
        self.heads = list(range(config.num_heads)) if config.state_heads is None else config.state_heads[index]
        self.group_of_head = None  # the heads left may fill groups unequally, so each then gets its own B and C
        if config.n_groups > 1 and len(self.heads) < config.num_heads:
            self.group_of_head = [head * config.n_groups // config.num_heads for head in self.heads]
        self.inner = len(self.heads) * config.head_dim
        self.bc = config.n_groups * config.state_size
        channels = self.inner + 2 * self.bc
        shrink = math.sqrt(config.num_hidden_layers) if config.rescale_prenorm_residual else 1.0
        self.in_proj = Projection(config.hidden_size, self.inner + channels + len(self.heads), bias=config.use_bias)
        self.conv1d = nn.Conv1d(
            channels, channels, config.conv_kernel, groups=channels, bias=config.use_conv_bias,
            padding=config.conv_kernel - 1,
        )  # fmt: skip
        self.dt_bias = nn.Parameter(torch.empty(len(self.heads)))
        self.A_log = nn.Parameter(torch.empty(len(self.heads)))
        self.D = nn.Parameter(torch.empty(len(self.heads)))
        self.basis = None
        if config.state_ranks is not None:
            self.basis = nn.Parameter(torch.empty(config.n_groups, config.state_size, config.state_ranks[index]))
        full = config.num_heads * config.head_dim
        self.norm = SSDNorm(self.inner, config.layer_norm_epsilon, config.norm_groups, full)
        self.out_proj = Projection(self.inner, config.hidden_size, bias=config.use_bias, shrink=shrink)
        self.act = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: Tensor, layer: SSDCacheLayer | None = None, valid: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:  # fmt: skip
        """[B, T, hidden] -> [B, T, hidden].

        layer: the cache that the sequences continue and update, one row per sequence (packed ones too); empty at the
        start of the sequences.
        valid: bool [B, T], false for padding; None means no padding.
        """
        config = self.config
        z, xbc, dt = self.in_proj(hidden_states).split([self.inner, self.inner + 2 * self.bc, len(self.heads)], -1)
        if valid is not None:
            xbc = xbc * valid[..., None]
        state, window = (None, None) if layer is None else (layer.state, layer.window)
        xbc, window = self.convolve(xbc, window, packing)
        x, B, C = xbc.split([self.inner, self.bc, self.bc], -1)
        x = x.unflatten(-1, (len(self.heads), config.head_dim))
        B, C = (part.unflatten(-1, (config.n_groups, config.state_size)) for part in (B, C))
        if self.basis is not None:
            B, C = (torch.einsum("btgn,gnr->btgr", part, self.basis.to(part.dtype)) for part in (B, C))
        if self.group_of_head is not None:
            B, C = B[:, :, self.group_of_head], C[:, :, self.group_of_head]
        dt = F.softplus(_at_least_float32(dt) + _at_least_float32(self.dt_bias))
        if tuple(config.time_step_limit) != (0.0, math.inf):
            dt = dt.clamp(*config.time_step_limit)
        if valid is not None:
            dt = dt * valid[..., None]
        A = -_at_least_float32(self.A_log).exp()
        if state is not None and x.shape[1] == 1 and packing is None and not torch.is_grad_enabled():
            y = ssd_step(x, dt, A, B, C, state)
        else:
            y, state = ssd_scan(x, dt, A, B, C, state, packing and packing.cu_seqlens)
        y = (y + x * self.D[:, None]).flatten(2)
        if layer is not None:
            layer.state, layer.window = state, window
            layer.seen += hidden_states.shape[1]
        return self.out_proj(self.norm(y, z).to(hidden_states.dtype))

    def convolve(self, x: Tensor, window: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution and activation of [B, T, channels], and the window for the next tokens."""
        gap = self.config.conv_kernel - 1
        if packing is None:
            before = x.new_zeros(len(x), gap, x.shape[2]) if window is None else window.to(x.dtype)
            line = torch.cat([before, x], 1)
            next_window = line[:, line.shape[1] - gap :]
        else:
            line = x.new_zeros(1, x.shape[1] + packing.windows.numel(), x.shape[2])
            line = line.index_copy(1, packing.tokens, x)
            if window is not None:
                line = line.index_copy(1, packing.windows.flatten(), window.to(x.dtype).flatten(0, 1)[None])
            next_window = line[0, packing.tails]
        weight, bias = self.conv1d.weight.to(x.dtype), self.conv1d.bias
        bias = None if bias is None else bias.to(x.dtype)
        if x.shape[1] == 1 and packing is None:
            out = (line * weight[:, 0].T).sum(1, keepdim=True)
            out = out if bias is None else out + bias
        else:
            # As an image of height 1: torch's 2-d convolution takes [.., T, channels] as channels-last, without a copy.
            image = line.transpose(1, 2).unsqueeze(2)
            out = F.conv2d(image, weight.unsqueeze(2), bias, groups=x.shape[2]).squeeze(2).transpose(1, 2)
            if packing is not None:
                out = out[:, packing.tokens - gap]
        # A view would keep the whole line alive.
        return self.act(out), next_window.clone()

    def initialize(self) -> None:
        """As in the reference: A uniform in 1 .. 16, dt log-uniform in time_step_min .. time_step_max, D = 1.
        (transformers initialises A to 1, 2, .. num_heads.)
        """
        config = self.config
        init.copy_(self.A_log, torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16).log())
        init.ones_(self.D)
        if self.basis is not None:
            init.copy_(self.basis, torch.eye(*self.basis.shape[1:]).expand_as(self.basis))
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(low, high).exp()
        dt = dt.clamp(min=config.time_step_floor)
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ----------------------------------------------------------------------------------------------------------------------
# Models


class CausalAttention(LlamaMixedAttention):
    """Llama's attention on the segment operator: one segment of all tokens, no linear branch."""

    def __init__(self, config: StateCoreLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.la


@dataclass(frozen=True)
class PassContext:
    """What one forward pass tells every layer."""

    valid: Tensor | None  # bool [B, T], not padding; None: no padding at all
    packing: Packing | None
    position_embeddings: tuple[Tensor, Tensor] | None  # of the attention layers
    step_contexts: dict[str, StepContext]  # by kind of layer


class SSDBlock(GradientCheckpointingLayer):
    """Norm, mixer, residual."""

    def __init__(self, config: SSDConfig, attention: StateCoreLlamaConfig | None, index: int):
        super().__init__()
        self.index, self.kind = index, config.kinds[index]
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = SSDNorm(config.hidden_size, config.layer_norm_epsilon)
        if self.kind == SSD:
            self.mixer = SSDMixer(config, index)
        else:
            self.mixer = (LlamaMixedAttention if self.kind == MIXED_ATTENTION else CausalAttention)(attention, index)

    def forward(self, hidden_states: Tensor, context: PassContext, past_key_values: Cache | None = None) -> Tensor:
        normed = self.norm(hidden_states)
        if self.kind == SSD:
            layer = None if past_key_values is None else past_key_values.layers[self.index]
            mixed = self.mixer(normed, layer, context.valid, context.packing)
        else:
            mixed, _ = self.mixer(
                normed, context.position_embeddings, past_key_values=past_key_values,
                step_context=context.step_contexts[self.kind],
            )  # fmt: skip
        return (_at_least_float32(hidden_states) if self.residual_in_fp32 else hidden_states) + mixed


class SSDPreTrainedModel(PreTrainedModel):
    config: SSDConfig
    config_class = SSDConfig
    base_model_prefix = "backbone"
    _no_split_modules: ClassVar = ["SSDBlock"]
    supports_gradient_checkpointing = True
    _is_stateful = True  # a state cannot drop a token, so assisted decoding refuses

    def __init__(self, config: SSDConfig):
        if not isinstance(config, SSDConfig):
            raise ValueError(
                f"{type(self).__name__} needs an SSDConfig, got {type(config).__name__}"
                + (": use SSDConfig.from_mamba2(config)" if isinstance(config, Mamba2Config) else "")
            )
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Projection):
            bound = module.in_features**-0.5 / module.shrink
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, SSDNorm):
            init.ones_(module.weight)
        else:
            super()._init_weights(module)
        if isinstance(module, (SSDMixer, LinearBranch, Widen)):
            module.initialize()


class SSDModel(SSDPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: SSDConfig):
        super().__init__(config)
        hybrid = set(config.kinds) != {SSD}
        attention = config.attention_config() if hybrid else None
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SSDBlock(config, attention, index) for index in range(config.num_hidden_layers)])
        self.norm_f = SSDNorm(config.hidden_size, config.layer_norm_epsilon)
        self.rotary_emb = LlamaRotaryEmbedding(attention) if hybrid else None
        self.step_config = attention
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
        step_ids: Tensor | None = None, cu_seq_lens_q: Tensor | None = None, seq_idx: Tensor | None = None,
        output_hidden_states: bool | None = None, **kwargs,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """attention_mask: [B, seen + T], 0 for padding, which is at the start or the end of a sequence.
        cu_seq_lens_q, seq_idx, or position_ids that restart: packed sequences, in one row; each starts with empty
        states.
        step_ids: int [B, T], for mixed attention layers; default: those that the step tokens in input_ids define.
        """
        step_ids = steps.accept_segment_ids(step_ids, kwargs)
        if "cache_params" in kwargs:
            raise ValueError("the cache is called past_key_values here, got cache_params")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        packable = attention_mask is None and past_key_values is None
        cu_seqlens = steps.packed_cu_seqlens(cu_seq_lens_q, seq_idx, position_ids if packable else None, len(hidden))
        if cu_seqlens is not None:
            if past_key_values is not None:
                raise ValueError("packed sequences cannot be cached: give each sequence a row of its own")
            use_cache = False
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        self._check_cache(past_key_values)
        context = self._make_context(
            hidden, attention_mask, position_ids, past_key_values, cu_seqlens, input_ids, step_ids
        )
        all_hidden = [hidden]
        for block in self.layers:
            hidden = block(hidden, context=context, past_key_values=past_key_values)
            all_hidden.append(hidden)
        hidden = all_hidden[-1] = self.norm_f(hidden)
        shown = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(all_hidden) if shown else None,
        )  # fmt: skip

    def _check_cache(self, cache: Cache | None) -> None:
        expected = [SSDCacheLayer if kind == SSD else StepCacheLayer for kind in self.config.kinds]
        if cache is not None and [type(layer) for layer in cache.layers] != expected:
            raise ValueError("past_key_values must be a DynamicCache(config=model.config), got layers of another type")

    def _make_context(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None,
        cu_seqlens: Tensor | None, input_ids: Tensor | None, step_ids: Tensor | None,
    ) -> PassContext:  # fmt: skip
        time = hidden.shape[1]
        valid = steps.valid_tokens(attention_mask, hidden)
        padded = attention_mask is not None and not bool(valid.all())
        packing = None if cu_seqlens is None else Packing.of(cu_seqlens, time, self.config.conv_kernel - 1)
        if self.step_config is None:
            return PassContext(valid if padded else None, packing, None, {})
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            consecutive = torch.arange(seen, seen + time, device=hidden.device)[None]
            position_ids = consecutive if cu_seqlens is None else steps.packed_positions(cu_seqlens, time)
        step_contexts = {
            kind: self._make_step_context(kind, valid, cache, cu_seqlens, input_ids, step_ids)
            for kind in {*self.config.kinds} - {SSD}
        }
        position_embeddings = self.rotary_emb(hidden, position_ids)
        return PassContext(valid if padded else None, packing, position_embeddings, step_contexts)

    def _make_step_context(
        self, kind: str, valid: Tensor, cache: Cache | None, cu_seqlens: Tensor | None, input_ids: Tensor | None,
        step_ids: Tensor | None,
    ) -> StepContext:  # fmt: skip
        """The steps that layers of one kind attend in; for "attention" everything is the prompt."""
        slots = None if cache is None else cache.layers[self.config.kinds.index(kind)].slots
        mixed = kind == MIXED_ATTENTION
        if not mixed:
            tokens = steps.steps_from_ids(torch.zeros_like(valid, dtype=torch.int32), valid)
        elif step_ids is not None:
            tokens = steps.steps_from_ids(step_ids, valid)
        else:
            patterns = len(self.step_config.step_start_token_ids)
            tokens = steps.steps_from_markers(self._markers(input_ids, valid), patterns, valid, slots, cu_seqlens)
        alpha = self.step_config.alpha_table(valid.device) if mixed else torch.zeros(1, device=valid.device)
        return steps.make_context(tokens, slots, alpha, cu_seqlens, mixed, cache is not None)

    def _markers(self, input_ids: Tensor | None, valid: Tensor) -> Tensor:
        """int64 [B, T]: index into the step tokens, -1 for ordinary tokens."""
        marker_of_token = torch.full((self.config.vocab_size,), -1, device=valid.device)
        ids = torch.tensor(self.step_config.step_token_ids, dtype=torch.long, device=valid.device)
        marker_of_token[ids] = torch.arange(len(ids), device=valid.device)
        return torch.full_like(valid, -1, dtype=torch.long) if input_ids is None else marker_of_token[input_ids]


class SSDForCausalLM(SSDPreTrainedModel, GenerationMixin):
    """A causal language model on `SSDModel`; `generate()` is transformers' own."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: SSDConfig):
        super().__init__(config)
        self.backbone = SSDModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.backbone.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.backbone.embeddings = value

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, step_ids: Tensor | None = None, cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None, logits_to_keep: int | Tensor = 0, output_hidden_states: bool | None = None,
        cache_params: None = None, **kwargs,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """The arguments of SSDModel.forward, and labels: [B, T], not shifted, -100 where no token is predicted."""
        step_ids = steps.accept_segment_ids(step_ids, kwargs)
        if cache_params is not None:
            raise ValueError("the cache is called past_key_values here, got cache_params")
        outputs = self.backbone(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, step_ids,
            cu_seq_lens_q, seq_idx, output_hidden_states,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept].to(self.lm_head.weight.dtype))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


AutoConfig.register(SSDConfig.model_type, SSDConfig, exist_ok=True)
AutoModel.register(SSDConfig, SSDModel, exist_ok=True)
AutoModelForCausalLM.register(SSDConfig, SSDForCausalLM, exist_ok=True)
