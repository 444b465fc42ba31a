"""The configuration of state-transition models: fields for the linear branch and the steps, on top of a base family's.

Every layer has the type "statecore_step". It selects the cache layer of cache.py wherever transformers builds a cache,
and makes code that does not know it (continuous batching, static caches, other engines) fail with an error instead of
running plain attention.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import PreTrainedConfig

LAYER_TYPE = "statecore_step"
PROJECTIONS = ("base_plus_low_rank", "low_rank")


@strict
class StepConfig(PreTrainedConfig):
    """The fields that state-transition models add to their family's configuration.

    step_start_token_ids, step_end_token_ids: index i holds the token that opens / closes a step of thinking pattern i.
    la_rank: rank of the linear branch's trainable factors.
    la_projection: "base_plus_low_rank" adds them to the frozen q and k projections, "low_rank" uses them alone (arXiv
        2602.01198 leaves it open).
    la_rope: rotate the linear branch's q and k as the base rotates its own.
    la_gate: sigmoid gate on each channel of the linear branch's output.
    la_norm: RMSNorm on each head of that output, before the gate.
    alpha_max, alpha_steps: a step t >= 2 is corrected with strength min(alpha_max, t / alpha_steps); alpha_max = 0
        switches the correction off.
    max_steps: steps beyond this number are not corrected.
    state_heads: the key/value heads of every layer that have a linear branch and a state; None: all.
    state_ranks: the width that the linear branch's keys of every layer are projected to, which bounds the rank of its
        states; None: no projection. (statecore/dynamics/pruning.py sets both.)
    """

    layer_types: list[str] | None = None
    step_start_token_ids: list[int] | None = None
    step_end_token_ids: list[int] | None = None
    la_rank: int = 128
    la_projection: str = "base_plus_low_rank"
    la_rope: bool = True
    la_gate: bool = True
    la_norm: bool = False
    alpha_max: float | int = 0.4
    alpha_steps: int = 40
    max_steps: int = 4096
    state_heads: list[list[int]] | None = None
    state_ranks: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.step_start_token_ids = list(self.step_start_token_ids or [])
        self.step_end_token_ids = list(self.step_end_token_ids or [])
        self.layer_types = [LAYER_TYPE] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @property
    def step_token_ids(self) -> list[int]:
        """All step tokens, starts before ends; entry i belongs to row i of the trainable token rows."""
        return self.step_start_token_ids + self.step_end_token_ids

    def alpha_table(self, device: torch.device | str | None = None) -> Tensor:
        """float32 [max_steps]: correction strength of every step (arXiv 2602.01198 sec. 4, whose max is a misprint for
        min).
        """
        step = torch.arange(self.max_steps, dtype=torch.float32, device=device)
        return (step / self.alpha_steps).clamp(max=self.alpha_max)

    def validate_layer_type(self):
        """Replaces the base's check, which only knows the layer types of transformers."""

    def validate_statecore(self):
        starts, ends = self.step_start_token_ids or [], self.step_end_token_ids or []
        if len(starts) != len(ends) or len({*starts, *ends}) != len(starts) + len(ends):
            raise ValueError(
                "step_start_token_ids and step_end_token_ids must be equally long and hold every token once, "
                f"got {len(starts)} start and {len(ends)} end tokens ({len({*starts, *ends})} different ones)"
            )
        if any(token < 0 for token in [*starts, *ends]):
            raise ValueError(f"step token ids must be >= 0, got {min([*starts, *ends])}")
        if not 1 <= self.la_rank <= self.hidden_size:
            raise ValueError(f"la_rank must lie in 1 .. hidden_size = {self.hidden_size}, got {self.la_rank}")
        if self.la_projection not in PROJECTIONS:
            raise ValueError(f"la_projection must be one of {PROJECTIONS}, got {self.la_projection!r}")
        if not 0 <= self.alpha_max <= 1:
            raise ValueError(f"alpha_max must lie in 0 .. 1, got {self.alpha_max}")
        if self.alpha_steps < 1 or self.max_steps < 1:
            raise ValueError(f"alpha_steps and max_steps must be >= 1, got {self.alpha_steps} and {self.max_steps}")
        layers, kv_heads = self.num_hidden_layers, self.num_key_value_heads or self.num_attention_heads
        width = getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads
        check_pruned(self.state_heads, self.state_ranks, [kv_heads] * layers, [width] * layers)
        if getattr(self, "use_sliding_window", False):
            raise ValueError(
                "use_sliding_window must be False: segments replace sliding windows, the two do not combine"
            )


def check_pruned(
    state_heads: list[list[int]] | None, state_ranks: list[int] | None, heads: list[int], widths: list[int]
) -> None:
    """Checks both fields against the number of heads and the key width of every layer; a layer with 0 heads has no
    states.
    """
    for name, given in (("state_heads", state_heads), ("state_ranks", state_ranks)):
        if given is not None and len(given) != len(heads):
            raise ValueError(f"{name} must have an entry for each of the {len(heads)} layers, got {len(given)}")
    for layer, (count, width) in enumerate(zip(heads, widths, strict=True)):
        if count and state_heads is not None:
            kept = state_heads[layer]
            if not kept or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= count:
                raise ValueError(
                    f"state_heads of layer {layer} must be increasing numbers in 0 .. {count - 1}, at least one, "
                    f"got {kept}"
                )
        if count and state_ranks is not None and not 1 <= state_ranks[layer] <= width:
            raise ValueError(f"state_ranks of layer {layer} must lie in 1 .. {width}, got {state_ranks[layer]}")


def __getattr__(name: str):
    # The configurations of the families: families.py imports this module, so they are looked up when asked for.
    if name.startswith("StateCore"):
        from . import families

        return getattr(families, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
