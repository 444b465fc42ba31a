"""State-transition models: a base model with mixed attention (arXiv 2602.01198 sec. 3).

    out = W_o (softmax attention over prompt and current step + sigmoid(gate) * linear attention over everything)

The base model stays as it is, names and weights included; each layer's attention gets a trainable linear branch `la`,
and the step tokens get trainable rows beside the frozen embedding. The linear branch's values start at zero, so a
converted model starts as its base restricted to segments. Without segments and linear branch (`full_attention`) it is
the base model bit for bit, its own teacher.

Forward derives steps from the token ids. One formula serves training (one pass), chunked prefill and decoding: a cache
only drops keys and values that no later token attends to.

This module has what all families share; families.py has the families.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import rotate_half

from . import ops, steps
from .cache import StepCacheLayer
from .config import LAYER_TYPE, StepConfig
from .steps import Slots, StepContext


@dataclass
class Mode:
    """Switches of a model; all of its modules share one object."""

    full_attention: bool = False
    linear_attention: bool = True
    momentum: bool = True


# ----------------------------------------------------------------------------------------------------------------------
# Trainable parts


class LinearBranch(nn.Module):
    """Queries, keys, values and gate of the linear attention: low-rank maps B A of the hidden states. One parameter
    holds all four A's.

    q and k are added to the base's, after its q and k norms if it has any (Qwen3): the base's attention compares the
    normalised heads, and an addition after the norm lets training change their length. v starts at zero, so the branch
    contributes nothing at first; its gradient is not zero, because q and k are the base's.

    A pruned branch keeps some of the key/value heads with their query heads, or projects q and k onto a `basis`, or
    both.
    """

    def __init__(self, config: StepConfig, head_dim: int, layer_idx: int = 0):
        super().__init__()
        kv_heads = config.num_key_value_heads
        self.group = config.num_attention_heads // kv_heads
        self.heads = list(range(kv_heads)) if config.state_heads is None else config.state_heads[layer_idx]
        self.query_heads = [head * self.group + i for head in self.heads for i in range(self.group)]
        self.whole = len(self.heads) == kv_heads and config.state_ranks is None
        self.rank = config.la_rank
        self.on_base = config.la_projection == "base_plus_low_rank"
        queries, keys = (len(self.query_heads), head_dim), (len(self.heads), head_dim)
        self.A = nn.Parameter(torch.empty((4 if config.la_gate else 3) * self.rank, config.hidden_size))
        # Without the base's q and k, q = k = v = 0 would have no gradient.
        self.q = Widen(self.rank, *queries, zero=self.on_base)
        self.k = Widen(self.rank, *keys, zero=self.on_base)
        self.v = Widen(self.rank, *keys)
        self.gate = Widen(self.rank, *queries, bias=True) if config.la_gate else None
        self.norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps) if config.la_norm else None
        self.basis = None
        if config.state_ranks is not None:
            self.basis = nn.Parameter(torch.empty(len(self.heads), head_dim, config.state_ranks[layer_idx]))

    def forward(
        self, hidden_states: Tensor, base_q: Tensor, base_k: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """hidden_states [B, T, hidden], the base's q [B, T, Hq, D] and k [B, T, Hk, D] before RoPE -> q, k, v and gate:
        q and gate [B, T, query heads, D], k and v [B, T, heads, D], for the heads of the branch.
        """
        narrow = F.linear(hidden_states, self.A.to(hidden_states.dtype)).split(self.rank, -1)
        q, k, v = self.q(narrow[0]), self.k(narrow[1]), self.v(narrow[2])
        if self.on_base:
            if len(self.heads) < base_k.shape[2]:
                base_q, base_k = base_q[:, :, self.query_heads], base_k[:, :, self.heads]
            q, k = base_q + q, base_k + k
        return q, k, v, None if self.gate is None else self.gate(narrow[3])

    def initialize(self) -> None:
        init.normal_(self.A, std=self.A.shape[1] ** -0.5)  # unit variance for normalised hidden states
        if self.basis is not None:
            init.copy_(self.basis, torch.eye(*self.basis.shape[1:]).expand_as(self.basis))

    def project(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of q and k, after RoPE, in the basis of their heads: [.., D] -> [.., rank]."""
        if self.basis is None:
            return q, k
        basis = self.basis.to(q.dtype)
        q = torch.einsum("bthgd,hdr->bthgr", q.unflatten(2, (-1, self.group)), basis).flatten(2, 3)
        return q, torch.einsum("bthd,hdr->bthr", k, basis)


class Widen(nn.Module):
    """x [.., rank] -> B x + bias [.., heads, head_dim], in the dtype of x."""

    def __init__(self, rank: int, heads: int, head_dim: int, *, zero: bool = True, bias: bool = False):
        super().__init__()
        self.heads, self.zero = (heads, head_dim), zero
        self.B = nn.Parameter(torch.empty(heads * head_dim, rank))
        self.bias = nn.Parameter(torch.empty(heads * head_dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.B.to(x.dtype), bias).unflatten(-1, self.heads)

    def initialize(self) -> None:
        if self.zero:
            init.zeros_(self.B)
        else:
            init.normal_(self.B, std=self.B.shape[1] ** -0.5)
        if self.bias is not None:
            init.zeros_(self.bias)


class StepEmbedding(nn.Embedding):
    """The base's frozen embedding with trainable rows `step_weight` [n, hidden] for the n step tokens."""

    def __init__(self, config: StepConfig, mode: Mode):
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.mode = mode
        self.token_ids = config.step_token_ids
        self.step_weight = nn.Parameter(torch.empty(len(self.token_ids), config.hidden_size))
        self.register_buffer("sorted_ids", torch.tensor(sorted(self.token_ids), dtype=torch.long), persistent=False)
        self.register_buffer("sorted_rows", torch.tensor(self.token_ids, dtype=torch.long).argsort(), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        embeddings = super().forward(input_ids)
        if self.mode.full_attention or not self.token_ids:
            return embeddings
        row = self.step_rows(input_ids)
        step_embeddings = F.embedding(row.clamp(min=0), self.step_weight).to(embeddings.dtype)
        return torch.where((row >= 0)[..., None], step_embeddings, embeddings)

    def step_rows(self, input_ids: Tensor) -> Tensor:
        """Token ids of any shape -> index into config.step_token_ids, -1 for ordinary tokens."""
        if not self.token_ids:
            return torch.full_like(input_ids, -1)
        index = torch.searchsorted(self.sorted_ids, input_ids.contiguous()).clamp(max=len(self.token_ids) - 1)
        return torch.where(self.sorted_ids[index] == input_ids, self.sorted_rows[index], -1)

    def initialize(self) -> None:
        ids = torch.tensor(self.token_ids, dtype=torch.long)
        init.copy_(self.sorted_ids, ids.sort().values)
        init.copy_(self.sorted_rows, ids.argsort())


class StepHead(nn.Linear):
    """The base's frozen output head with trainable rows `step_weight` [n, hidden] for the step tokens. If the base ties
    its head, they are the embedding's.
    """

    def __init__(self, config: StepConfig, mode: Mode):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.mode = mode
        self.token_ids = config.step_token_ids
        self.step_weight = nn.Parameter(torch.empty(len(self.token_ids), config.hidden_size))
        self.register_buffer("step_ids", torch.tensor(self.token_ids, dtype=torch.long), persistent=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        logits = super().forward(hidden_states)
        if self.mode.full_attention or not self.token_ids:
            return logits
        # In place: a second [T, vocabulary] tensor would be the largest of the whole pass.
        return logits.index_copy_(-1, self.step_ids, F.linear(hidden_states, self.step_weight.to(hidden_states.dtype)))

    def initialize(self) -> None:
        init.copy_(self.step_ids, torch.tensor(self.token_ids, dtype=torch.long))


# ----------------------------------------------------------------------------------------------------------------------
# Mixed attention


class MixedAttention:
    """Mixin before a family's attention class: the base's projections, the linear branch `la`, and one operator."""

    def __init__(self, config: StepConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.la = LinearBranch(config, self.head_dim, layer_idx)

    def normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The family's norms of q [B, T, Hq, D] and k [B, T, Hk, D] before RoPE."""
        return q, k

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None, step_context: StepContext | None = None, **kwargs,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """[B, T, hidden] -> [B, T, hidden]; without a step context it is the base's own attention."""
        if step_context is None:
            return super().forward(
                hidden_states=hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
                past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.normalise(q, k)
        linear = self.la(hidden_states, q, k) if step_context.linear else None
        if linear is None or not self.config.la_rope:
            q, k = rotate([q, k], position_embeddings)
        else:
            q, k, *lin_qk = rotate([q, k, *linear[:2]], position_embeddings)
            linear = (*lin_qk, *linear[2:])
        layer = None
        if past_key_values is not None:
            layer = past_key_values.layers[self.layer_idx]
            k, v = past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx, step_context)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        if linear is None:
            out, _ = ops.segment_attention(q, k, v, step_context.step_ids, step_context.cu_seqlens, scale=self.scaling)
            states = None
        else:
            out, states = self.mix(q, k, v, *linear, step_context, layer.states if layer else None)
        if layer is not None:
            layer.finish_step_pass(step_context.slots, step_context.keep, states)
        return self.o_proj(out.flatten(2)), None

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, lin_q: Tensor, lin_k: Tensor, lin_v: Tensor, gate: Tensor | None,
        context: StepContext, states: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Segment attention + gated linear attention: out [B, T, Hq, D] and states [3, N, heads, key width, D]. The
        branch has all Hk heads of width D unless it is pruned.
        """
        initial_step = context.initial_step if states is not None else None
        if gate is not None and self.la.norm is None and self.la.whole:
            return ops.mixed_attention(
                q, k, v, lin_q, lin_k, lin_v, gate, context.step_ids, context.alpha, states, initial_step,
                context.cu_seqlens, scale=self.scaling, lin_scale=self.scaling,
            )  # fmt: skip
        out, _ = ops.segment_attention(q, k, v, context.step_ids, context.cu_seqlens, scale=self.scaling)
        own_ids = context.step_ids[:, context.step_ids.shape[1] - q.shape[1] :]
        lin_q, lin_k = self.la.project(lin_q, lin_k)
        lin_out, states = ops.step_linear_attention(
            lin_q, lin_k, lin_v, own_ids, context.alpha, states, initial_step, context.cu_seqlens, scale=self.scaling
        )
        lin_out = lin_out if self.la.norm is None else self.la.norm(lin_out)
        lin_out = lin_out if gate is None else gate.sigmoid() * lin_out
        if lin_out.shape[2] == out.shape[2]:
            return out + lin_out, states
        return out.index_add(2, torch.tensor(self.la.query_heads, device=out.device), lin_out), states


def rotate(heads: list[Tensor], position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """RoPE on several [B, T, H, D] at once. Keeps their dtype, which autocast would not."""
    cos, sin = (x.unsqueeze(2) for x in position_embeddings)
    together = torch.cat(heads, 2)
    rotated = (together * cos + rotate_half(together) * sin).to(together.dtype)
    return rotated.split([x.shape[2] for x in heads], 2)


# ----------------------------------------------------------------------------------------------------------------------
# Models


class Switches:
    """What both model classes share: switches, which are not saved, and the initialisation of new weights."""

    mode: Mode

    @contextmanager
    def full_attention(self):
        """Inside, the model is its teacher, the base bit for bit: no segments, no linear branch, no step token rows."""
        before, self.mode.full_attention = self.mode.full_attention, True
        try:
            yield self
        finally:
            self.mode.full_attention = before

    def set_linear_attention(self, on: bool) -> None:
        """False leaves segment attention only, with no memory of finished steps."""
        self.mode.linear_attention = on

    def set_momentum(self, on: bool) -> None:
        """False switches off the momentum correction of the state at step ends."""
        self.mode.momentum = on

    def freeze_base(self) -> None:
        """Makes only the linear branches and the step token rows trainable."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_adapter_weight(name))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (StepEmbedding, StepHead)):
            init.normal_(module.step_weight, std=self.config.initializer_range)
        if isinstance(module, (LinearBranch, Widen, StepEmbedding, StepHead)):
            module.initialize()


def is_adapter_weight(name: str) -> bool:
    """Whether a state-transition model has the parameter and its base has not."""
    return ".la." in name or name.endswith("step_weight")


class StateCoreModel(Switches):
    """Mixin before a family's model class: replaces attention and embedding, and finds the steps in every pass."""

    attention_class: type[nn.Module]

    def __init__(self, config: StepConfig):
        super().__init__(config)
        if type(self.embed_tokens) is not nn.Embedding:
            raise TypeError(
                f"{type(self).__name__} replaces its base's embedding, which must be a plain nn.Embedding, "
                f"got {type(self.embed_tokens).__name__}"
            )
        self.mode = Mode()
        self.embed_tokens = StepEmbedding(config, self.mode)
        for index, layer in enumerate(self.layers):
            layer.self_attn = self.attention_class(config, index)
        self.post_init()

    def layer_mask(self, mask: Tensor | None) -> dict[str, Tensor | None] | Tensor | None:
        """The mask in the form in which the base's forward takes it for its layers."""
        return {LAYER_TYPE: mask}

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
        step_ids: Tensor | None = None, cu_seq_lens_q: Tensor | None = None, seq_idx: Tensor | None = None, **kwargs,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """The base's forward with steps.

        attention_mask: [B, seen + T], 0 for padding.
        step_ids: int [B, T], 0 the prompt, 1 .. n the steps, n + 1 the answer, -1 padding; default: those that the step
        tokens in input_ids define.
        cu_seq_lens_q, seq_idx, or position_ids that restart: packed sequences, in one row.
        """
        step_ids = steps.accept_segment_ids(step_ids, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, time = inputs_embeds.shape[:2]
        packable = attention_mask is None and past_key_values is None
        cu_seqlens = steps.packed_cu_seqlens(cu_seq_lens_q, seq_idx, position_ids if packable else None, batch)
        if cu_seqlens is not None:
            if past_key_values is not None:
                raise ValueError("packed sequences cannot be cached: give each sequence a row of its own")
            use_cache = False
            if position_ids is None:
                position_ids = steps.packed_positions(cu_seqlens, time)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if self.mode.full_attention:
            step_context = None
            # The base finds packed sequences by positions that restart, and only without a mask. Causal attention
            # hides padding at the end of a sequence anyway.
            is_packed = cu_seqlens is not None
            mask = create_causal_mask(
                config=self.config, inputs_embeds=inputs_embeds, attention_mask=None if is_packed else attention_mask,
                past_key_values=past_key_values,
                position_ids=steps.packed_positions(cu_seqlens, time) if is_packed else position_ids,
            )  # fmt: skip
        else:
            valid = steps.valid_tokens(attention_mask, inputs_embeds)
            step_context = self.step_context(input_ids, step_ids, valid, past_key_values, cu_seqlens)
            mask = torch.empty(0, 0, 0, 0)  # never read; for None, Llama would build a [T, T] mask
        return super().forward(
            inputs_embeds=inputs_embeds, attention_mask=self.layer_mask(mask), position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache, step_context=step_context, **kwargs,
        )  # fmt: skip

    def step_context(
        self, input_ids: Tensor | None, step_ids: Tensor | None, valid: Tensor, cache: DynamicCache | None,
        cu_seqlens: Tensor | None,
    ) -> StepContext:  # fmt: skip
        """The steps of a pass, from `step_ids` or else from the step tokens in `input_ids`."""
        slots = past_slots(cache)
        if step_ids is not None:
            tokens = steps.steps_from_ids(step_ids, valid)
        else:
            no_markers = torch.full_like(valid, -1, dtype=torch.long)
            markers = no_markers if input_ids is None else self.embed_tokens.step_rows(input_ids)
            patterns = len(self.config.step_start_token_ids)
            tokens = steps.steps_from_markers(markers, patterns, valid, slots, cu_seqlens)
        alpha = self.config.alpha_table(valid.device) if self.mode.momentum else torch.zeros(1, device=valid.device)
        return steps.make_context(tokens, slots, alpha, cu_seqlens, self.mode.linear_attention, cache is not None)


def past_slots(cache: DynamicCache | None) -> Slots | None:
    """What the cache holds; None without a cache or with an empty one."""
    if cache is None:
        return None
    layer = cache.layers[0] if cache.layers else None
    if not isinstance(layer, StepCacheLayer):
        raise ValueError("past_key_values must be a DynamicCache(config=model.config), got layers of another type")
    return layer.slots


class StateCoreForCausalLM(Switches):
    """Mixin before a family's ForCausalLM class."""

    model_class: type[PreTrainedModel]
    _tied_weights_keys: ClassVar = {
        "lm_head.weight": "model.embed_tokens.weight",
        "lm_head.step_weight": "model.embed_tokens.step_weight",
    }
    _is_stateful = True  # a finished step cannot be taken back: assisted decoding refuses

    def __init__(self, config: StepConfig):
        PreTrainedModel.__init__(self, config)  # the family's own would build the base model only to drop it
        self.model = self.model_class(config)
        self.mode = self.model.mode
        self.vocab_size = config.vocab_size
        self.lm_head = StepHead(config, self.mode)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, step_ids: Tensor | None = None, cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None, logits_to_keep: int | Tensor = 0, **kwargs,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """As the base's, with the further arguments of StateCoreModel.forward."""
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
            step_ids=step_ids, cu_seq_lens_q=cu_seq_lens_q, seq_idx=seq_idx,
            logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args, **kwargs) -> dict:
        """As the base's. A finished row in a batch is fed padding: masked here, it adds nothing to the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        stop, new = self.generation_config.eos_token_id, inputs.get("input_ids")
        decoding = new is not None and new.shape[1] == 1 and input_ids.shape[1] > 1
        if stop is None or not decoding or self.mode.full_attention:
            return inputs
        stop = torch.tensor([stop] if isinstance(stop, int) else stop, device=input_ids.device)
        pad = self.generation_config.pad_token_id
        pad = stop[0] if pad is None else pad
        before, last = input_ids[:, -2], input_ids[:, -1]
        finished = (last == pad) & (torch.isin(before, stop) | (before == pad))
        inputs["attention_mask"] = (~finished).long()[:, None]  # forward only reads that of the new token
        return inputs

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Takes over the weight only: resizing passes a plain Linear, and the step rows must stay."""
        self.lm_head.weight, self.lm_head.out_features = new_embeddings.weight, new_embeddings.out_features

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As the base's; the step rows stay trainable even if the embedding is frozen."""
        rows = [self.model.embed_tokens.step_weight, self.lm_head.step_weight]
        trainable = [row.requires_grad for row in rows]
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for row, flag in zip(rows, trainable, strict=True):
            row.requires_grad_(flag)
        return embeddings


def __getattr__(name: str):
    if not name.startswith("__") and hasattr(families, name):
        return getattr(families, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Registers every family with transformers' Auto classes. families.py builds on this module, hence the import at its end
# and the lookup above: whichever of the two is imported first, the other one's names are not there yet.
from . import families  # noqa: E402
