"""The cache of a state-transition model: keys and values of the prompt and the current step, and three states.

`DynamicCache(config=model.config)`, which transformers builds everywhere by itself, consists of these layers because
every layer of the configuration has the type "statecore_step". Tensors in it are replaced, never changed in place, so
a snapshot copies references and costs the same at any length.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .config import LAYER_TYPE
from .steps import Slots, StepContext


class StepCacheLayer(DynamicLayer):
    """Cache of one layer: keys and values [B, Hk, kv, D], states [3, B, Hk, Dk, Dv] (running, step start, prompt) in
    float32, in float64 for float64 models.

    A forward calls `update`, which appends and returns everything that the new tokens may attend to, and then
    `finish_step_pass`, which takes the new states and drops the keys and values of finished steps. The full-attention
    teacher calls only the first: a plain growing cache.
    """

    _layer_type = LAYER_TYPE
    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, **kwargs):
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.keys = self.values = self.states = self.slots = None
        self.is_initialized = False
        self.seen = 0
        self.peak_kv_bytes = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, step_context: StepContext | None = None, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Appends [B, Hk, T, D] keys and values and returns all of them. In full attention there is no step context.

        Raises:
            ValueError: the cache was filled in another mode.
        """
        if self.seen and (step_context is None) != (self.slots is None):
            made, used = ("segments", "full attention") if step_context is None else ("full attention", "segments")
            raise ValueError(f"a cache filled with {made} cannot go on with {used}: start with a new cache")
        if self.seen and step_context is not None and step_context.linear == (self.states is None):
            made = "off" if step_context.linear else "on"
            raise ValueError(f"the cache was made with the linear branch {made}: start with a new cache")
        keys, values = super().update(key_states, value_states)
        self.seen += key_states.shape[-2]
        self.peak_kv_bytes = max(self.peak_kv_bytes, self.kv_bytes)
        return keys, values

    def finish_step_pass(self, slots: Slots, keep: Tensor | None, states: Tensor | None) -> None:
        """slots, keep: those of the pass's StepContext. states: None without the linear branch."""
        self.slots, self.states = slots, states
        if keep is not None:
            self.keys, self.values = self.keys.index_select(2, keep), self.values.index_select(2, keep)

    @property
    def kv_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    @property
    def state_bytes(self) -> int:
        return 0 if self.states is None else self.states.nbytes

    def get_seq_length(self) -> int:
        """Tokens seen, not slots kept: positions and generate() count from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, position of the first key). Only the full-attention teacher, which drops nothing, asks."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        rows = indices.to(self.keys.device)
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.states = None if self.states is None else self.states[:, rows]
        self.slots = None if self.slots is None else self.slots.select(rows)

    def crop(self, *args, **kwargs) -> None:
        raise NotImplementedError(
            "a step cache cannot be cropped: finished steps are gone and the state cannot be run backwards. "
            "Take statecore.cache.snapshot(cache) before and statecore.cache.restore(cache, snapshot) after."
        )


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of keys and values and of states now, and the most that keys and values ever took."""

    kv: int
    state: int
    peak_kv: int


def cache_bytes(cache: Cache) -> CacheBytes:
    layers = cache.layers
    return CacheBytes(
        sum(layer.kv_bytes for layer in layers),
        sum(layer.state_bytes for layer in layers),
        sum(layer.peak_kv_bytes for layer in layers),
    )


def fork(cache: Cache, rows: Tensor) -> Cache:
    """A new cache with the given rows (int64 [any length], repeats allowed); the old one stays as it is."""
    forked = snapshot(cache)
    forked.batch_select_indices(rows)
    return forked


def snapshot(cache: Cache) -> Cache:
    """The cache as it is now; copies references, not tensors."""
    saved = copy.copy(cache)
    saved.layers = [copy.copy(layer) for layer in cache.layers]
    return saved


def restore(cache: Cache, saved: Cache) -> None:
    """Sets `cache` back to what `snapshot` saved; the snapshot can be used again."""
    cache.layers = [copy.copy(layer) for layer in saved.layers]
