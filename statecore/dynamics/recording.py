"""State dynamics: rank and norm of linear-attention states while a model reads.  (arXiv 2602.02195)

    Rank_eff(S) = #{i : sigma_i > 1e-4 sigma_1},  stable rank = sum sigma_i^2 / sigma_1^2,  nuclear norm = sum sigma_i

for every head's state S [Dk, Dv], at chosen token positions and at step ends. `read_pieces` streams a text through the
model's own cache in pieces that end wherever something is measured; `record` keeps the figures of each such position
and never a state.

Models: state-transition models, SSD models and their hybrids, and every model of transformers whose cache layers hold
one recurrent state matrix per head (Mamba2, the gated delta net of Qwen3-Next and others). Models are not modified. The
attention layers of a hybrid keep their keys and values as usual and are not measured.

The threshold is relative, 1e-4 of the largest singular value, so precision matters: singular values come from an SVD of
the state in float32 or better, never from a Gram matrix. States kept in half precision are refused, because their
rounding errors would count as rank.

The largest possible rank of a head is taken to be min(Dk, Dv), the paper's d. Its inputs may limit it further: the
values of a linear branch are linear maps of `la_rank` numbers, so its states have no higher rank than that.

The paper leaves open which positions calibrate. Here: `positions` (32, 64, .. 4096, as far as the text goes) and the
end of the text, with means over all positions of all inputs; `every` adds more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from ..cache import StepCacheLayer
from ..reading import check_token_ids, evaluating, forward
from ..ssd.model import SSDCacheLayer, SSDConfig

EPSILON = 1e-4
POSITIONS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
EARLY, LATE = 128, 2048
MEASURES = ("rank", "stable_rank", "nuclear", "frobenius")

# ----------------------------------------------------------------------------------------------------------------------
# Measures


def singular_values(states: Tensor) -> Tensor:
    """[.., Dk, Dv] -> [.., min(Dk, Dv)], descending; computed in float32, for float64 states in float64."""
    if states.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"states are held in {str(states.dtype).removeprefix('torch.')}, whose rounding errors would count as "
            "rank: load the model in float32"
        )
    return torch.linalg.svdvals(states)


def effective_rank(sigma: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Number of singular values [.., d] above `epsilon` times the largest; 0 for a state of zeros.  (eq. 6)"""
    return (sigma > epsilon * sigma[..., :1]).sum(-1)


def measure(sigma: Tensor, epsilon: float = EPSILON) -> dict[str, Tensor]:
    """All MEASURES from singular values [.., d]."""
    square = sigma.square().sum(-1)
    return {
        "rank": effective_rank(sigma, epsilon).to(sigma.dtype),
        "stable_rank": square / sigma[..., 0].square().clamp(min=torch.finfo(sigma.dtype).tiny),
        "nuclear": sigma.sum(-1),
        "frobenius": square.sqrt(),
    }


def cosine_bound(update: float, norm: float) -> float:
    """Lower bound of the cosine between all heads' nuclear norms before and after an update.  (eq. 13)

    `norm` is the length of that vector before the update, `update` bounds how far the update moves it. Without decay, a
    token moves the norm of each head by at most |k| |v|.
    """
    return (1 - update / norm) / (1 + update / norm)


# ----------------------------------------------------------------------------------------------------------------------
# Reading with a cache


def cached_states(cache: Cache) -> dict[int, Tensor]:
    """The state of every layer that has one, [B, H, Dk, Dv] (Mamba2: [B, H, Dv, Dk]); the cache's own tensors.

    For a state-transition model this is the running state. At the end of a step the correction has not been applied
    yet; that happens with the next token.
    """
    found = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, StepCacheLayer):
            state = None if layer.states is None else layer.states[0]
        elif isinstance(layer, SSDCacheLayer):
            state = layer.state
        elif isinstance(layer, LinearAttentionCacheLayerMixin):
            state = layer.recurrent_states.get(0)
        else:
            continue
        if state is not None and state.ndim == 4 and state.numel():
            found[index] = state
    return found


@torch.no_grad()
def read_pieces(
    model: PreTrainedModel,
    tokens: Sequence[int] | Tensor,
    ends: Sequence[int] = (),
    *,
    piece: int = 512,
    all_logits: bool = False,
) -> Iterator[tuple[int, Cache, Tensor]]:
    """Reads one sequence in pieces of at most `piece` tokens, with a piece ending at each of `ends`.

    Yields after each piece the number of tokens read so far, the cache, and the piece's logits [T, V] (`all_logits`) or
    those of its last token [1, V].
    """
    tokens = torch.as_tensor(tokens, dtype=torch.long, device=model.device)
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(
            f"expected the ids of at least one token in a row, got a tensor of shape {tuple(tokens.shape)}"
        )
    check_token_ids(model, tokens.tolist())
    cache = DynamicCache(config=model.config)
    begin = 0
    with evaluating(model):
        for end in sorted({*ends, len(tokens)}):
            if not 0 < end <= len(tokens):
                raise ValueError(f"places to stop must lie in 1 .. {len(tokens)} tokens, got {end}")
            while begin < end:
                stop = min(end, begin + piece)
                logits, _ = forward(model, tokens[None, begin:stop], cache, logits_to_keep=0 if all_logits else 1)
                begin = stop
                yield begin, cache, logits[0]


def step_tokens(model: PreTrainedModel) -> tuple[list[int], list[int]]:
    """The step start and step end tokens of a state-transition model or a hybrid with such layers; others have none."""
    attention = (model.config.attention or {}) if isinstance(model.config, SSDConfig) else {}

    def ids(name: str) -> list[int]:
        return getattr(model.config, name, None) or attention.get(name) or []

    return ids("step_start_token_ids"), ids("step_end_token_ids")


# ----------------------------------------------------------------------------------------------------------------------
# Recording


@dataclass(frozen=True)
class Head:
    """One head's state: layer, number within the layer, and largest possible rank."""

    layer: int
    head: int
    bound: int


@dataclass(frozen=True)
class Trajectory:
    """The measurements of one text at M positions and for H heads.

    positions: tokens read at each position [M]. is_step_end: bool [M]. values: [M, H] for each of MEASURES. spectra:
    each head's singular values at the last position.
    """

    name: str
    heads: list[Head]
    positions: np.ndarray
    is_step_end: np.ndarray
    values: dict[str, np.ndarray]
    spectra: list[np.ndarray]

    @property
    def fractions(self) -> np.ndarray:
        """Effective ranks as a share of the largest possible rank [M, H]."""
        return self.values["rank"] / np.array([head.bound for head in self.heads])

    def early_and_late(self) -> tuple[int, int]:
        """Indices of the two positions whose heads are compared: those nearest to the paper's tokens 128 and 2048, or
        in shorter texts the last one and the one nearest to a sixteenth of it.
        """
        late = int(np.abs(self.positions - LATE).argmin())
        early = int(np.abs(self.positions - self.positions[late] * EARLY / LATE).argmin())
        return early, late


@dataclass(frozen=True)
class RecordOptions:
    """Where and how states are measured.

    Args:
        positions: tokens behind which states are measured, besides the step ends and the last token.
        every: also measure behind every so many tokens.
        epsilon: share of the largest singular value above which others count as rank.
    """

    positions: Sequence[int] = POSITIONS
    every: int | None = None
    epsilon: float = EPSILON


def record(
    model: PreTrainedModel,
    tokens: Sequence[int] | Tensor,
    *,
    name: str = "",
    step_ends: Sequence[int] | None = None,
    positions: Sequence[int] = POSITIONS,
    every: int | None = None,
    epsilon: float = EPSILON,
    piece: int = 512,
) -> Trajectory:
    """Reads one sequence and measures its states.

    step_ends: token counts at which steps end; None: after the step end tokens of a state-transition model. positions,
    every: further token counts to measure at, ignored past the end of the text, which is always measured. Memory: the
    cache, one layer's singular values, and four numbers per head and position.
    """
    tokens = torch.as_tensor(tokens, dtype=torch.long)
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must lie between 0 and 1, got {epsilon}")
    if (every is not None and every < 1) or any(position < 1 for position in positions):
        raise ValueError(f"positions and `every` must be >= 1, got {list(positions)} and {every}")
    if step_ends is None:
        end_tokens = torch.tensor(step_tokens(model)[1], dtype=torch.long)
        step_ends = (torch.isin(tokens.flatten(), end_tokens).nonzero()[:, 0] + 1).tolist()
    count = tokens.numel()
    chosen = (*positions, *(range(every, count + 1, every) if every else ()))
    places = sorted({*(p for p in chosen if p <= count), *step_ends, *([count] if count else [])})
    wanted = set(places)
    measured: list[dict[str, np.ndarray]] = []
    spectra: dict[int, Tensor] = {}
    for read, cache, _ in read_pieces(model, tokens, places, piece=piece):
        if read in wanted:
            spectra = _spectra(model, cache)
            measured.append(_figures(spectra, epsilon))
    return Trajectory(
        name,
        heads=[Head(layer, head, sigma.shape[-1]) for layer, sigma in spectra.items() for head in range(len(sigma))],
        positions=np.array(places),
        is_step_end=np.isin(places, list(step_ends)),
        values={key: np.stack([figures[key] for figures in measured]) for key in MEASURES},
        spectra=[row for sigma in spectra.values() for row in sigma.float().cpu().numpy()],
    )


def _spectra(model: PreTrainedModel, cache: Cache) -> dict[int, Tensor]:
    """Singular values [H, d] of every layer that has states."""
    spectra = {layer: singular_values(states[0]) for layer, states in cached_states(cache).items()}
    if not spectra:
        raise ValueError(
            f"{type(model).__name__} has no linear-attention states of one matrix per head: expected a "
            "state-transition model, an SSD model, or a model of transformers with such layers (Mamba2, Qwen3-Next)"
        )
    return spectra


def _figures(spectra: dict[int, Tensor], epsilon: float) -> dict[str, np.ndarray]:
    """All MEASURES of all heads [H], layer by layer."""
    layers = [measure(sigma, epsilon) for sigma in spectra.values()]
    return {name: torch.cat([layer[name] for layer in layers]).float().cpu().numpy() for name in MEASURES}
