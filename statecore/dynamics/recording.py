"""State dynamics: rank and norm of linear-attention states while a model reads.  (arXiv 2602.02195)

    Rank_eff(S) = #{i : sigma_i > 1e-4 sigma_1},  stable rank = sum sigma_i^2 / sigma_1^2,  nuclear norm = sum sigma_i

for every head's state S [Dk, Dv], over token positions and at step ends. `read_pieces` streams a text through the
model's own cache in pieces that end where something is measured, `record` keeps the figures of each such place and
never a state, `summarise` says what the paper asks of them: are the heads' ranks of two kinds (stratification), are
heads that are high early high late (rank correlation), are they the same on other inputs (agreement).

Models: state-transition models, SSD models and their hybrids, and every model of transformers whose cache layers hold
recurrent states of one matrix a head (Mamba2, the gated delta net of Qwen3-Next and others). They stay as they are. A
hybrid's attention layers keep their keys and values, as always; they are not measured.

The threshold is relative, 1e-4 of the largest singular value, so precision matters: singular values come from an SVD
of the state in float32 or better, never from a Gram matrix, and states that are kept in half precision are refused,
because their rounding errors would count as rank.

The largest rank that a head can have is taken to be min(Dk, Dv), the paper's d. What feeds it may have a lower one: the
values of a linear branch are maps of `la_rank` numbers, so its states have no more than that.

What the paper leaves open, with what is done here:

- Calibration tokens and places: `positions` (32, 64, .. 4096, as far as the text goes, and its end), means over all
  places of all inputs; `every` measures more of them.
- How bimodal is bimodal: it gives none; here Sarle's bimodality coefficient (5/9 for a uniform distribution, 1 for two
  points), the share of variance between the two classes that split it best, how far their means are apart, and the
  shares of heads near both ends. The coefficient alone calls one outlier among equals bimodal.
- Early and late: the paper's tokens 128 and 2048; on shorter texts the last place and the one nearest to a sixteenth
  of it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from ..cache import StepCacheLayer
from ..ssd.model import SSDCacheLayer, SSDConfig

EPSILON = 1e-4
POSITIONS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
EARLY, LATE = 128, 2048
MEASURES = ("rank", "stable_rank", "nuclear", "frobenius")
NEAR = 0.1  # of the largest possible rank: heads this near to 0 or to it count as low or as saturated

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
    """How many singular values [.., d] are above `epsilon` times the largest; 0 for a state of zeros.  (eq. 6)"""
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
    """Least cosine between the vectors of all heads' nuclear norms before and after an update that moves them by at
    most `update`, from a vector of length `norm`.  (eq. 13; without decay a token's update moves each head's norm by at
    most |k| |v|)
    """
    return (1 - update / norm) / (1 + update / norm)


# ----------------------------------------------------------------------------------------------------------------------
# Reading with a cache


def cached_states(cache: Cache) -> dict[int, Tensor]:
    """The state of every layer that has one, [B, heads, Dk, Dv] (Mamba2: [B, heads, Dv, Dk]); the cache's own tensors.

    Of a state-transition model the running state: of an ended step before the correction, which comes with the next
    token.
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
    model: PreTrainedModel, tokens: Sequence[int] | Tensor, ends: Sequence[int] = (), *, piece: int = 512,
    all_logits: bool = False,
) -> Iterator[tuple[int, Cache, Tensor]]:  # fmt: skip
    """Reads one sequence in pieces of at most `piece` tokens that end at all of `ends`, and yields after each piece how
    many tokens were read, the cache, and logits [T, V] of the piece (its last token's, or `all_logits`).
    """
    tokens = torch.as_tensor(tokens, dtype=torch.long, device=model.device)
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(
            f"expected the ids of at least one token in a row, got a tensor of shape {tuple(tokens.shape)}"
        )
    vocabulary = model.config.get_text_config().vocab_size
    if int(tokens.max()) >= vocabulary or int(tokens.min()) < 0:
        raise ValueError(
            f"token ids must lie in 0 .. {vocabulary - 1}, got {int(tokens.min())} .. {int(tokens.max())}: "
            "is the tokenizer the model's?"
        )
    known = inspect.signature(model.forward).parameters
    name = "cache_params" if "cache_params" in known and "past_key_values" not in known else "past_key_values"
    cache = DynamicCache(config=model.config)
    begin = 0
    with _evaluating(model):
        for end in sorted({*ends, len(tokens)}):
            if not 0 < end <= len(tokens):
                raise ValueError(f"places to stop must lie in 1 .. {len(tokens)} tokens, got {end}")
            while begin < end:
                stop = min(end, begin + piece)
                part = {"input_ids": tokens[None, begin:stop], name: cache, "use_cache": True}
                out = model(**part, logits_to_keep=0 if all_logits else 1)
                begin = stop
                yield begin, cache, out.logits[0]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# ----------------------------------------------------------------------------------------------------------------------
# Recording


@dataclass(frozen=True)
class Head:
    """One head's state: layer, number in the layer, and the largest rank that it can have."""

    layer: int
    head: int
    bound: int


@dataclass(frozen=True)
class Trajectory:
    """What was measured while one text was read, M places and H heads.

    positions: tokens read before each place [M]. is_step_end: bool [M]. values: for each of MEASURES [M, H]. spectra:
    singular values at the last place, for each head.
    """

    name: str
    heads: list[Head]
    positions: np.ndarray
    is_step_end: np.ndarray
    values: dict[str, np.ndarray]
    spectra: list[np.ndarray]

    @property
    def fractions(self) -> np.ndarray:
        """Effective ranks as a share of what is possible [M, H]."""
        return self.values["rank"] / np.array([head.bound for head in self.heads])

    def early_and_late(self) -> tuple[int, int]:
        """The two places whose heads are compared."""
        late = int(np.abs(self.positions - LATE).argmin())
        early = int(np.abs(self.positions - self.positions[late] * EARLY / LATE).argmin())
        return early, late


def record(
    model: PreTrainedModel, tokens: Sequence[int] | Tensor, *, name: str = "", step_ends: Sequence[int] | None = None,
    positions: Sequence[int] = POSITIONS, every: int | None = None, epsilon: float = EPSILON, piece: int = 512,
) -> Trajectory:  # fmt: skip
    """Reads one sequence and measures its states.

    step_ends: how many tokens have been read where a step ends; None: behind the step end tokens of a state-transition
    model. positions, every: further places (those behind the end are left out; the end itself is always one). Memory:
    the cache, one layer's singular values, and four numbers a head and place.
    """
    tokens = torch.as_tensor(tokens, dtype=torch.long)
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must lie between 0 and 1, got {epsilon}")
    if (every is not None and every < 1) or any(position < 1 for position in positions):
        raise ValueError(f"positions and `every` must be >= 1, got {list(positions)} and {every}")
    count = tokens.numel()
    if step_ends is None:
        closing = torch.tensor(step_tokens(model)[1], dtype=torch.long)
        step_ends = (torch.isin(tokens.flatten(), closing).nonzero()[:, 0] + 1).tolist()
    regular = range(every, count + 1, every) if every else ()
    places = sorted({*(p for p in (*positions, *regular) if p <= count), *step_ends, *([count] if count else [])})
    heads: list[Head] = []
    rows: dict[str, list[np.ndarray]] = {measured: [] for measured in MEASURES}
    spectra: list[np.ndarray] = []
    wanted = set(places)
    for seen, cache, _ in read_pieces(model, tokens, places, piece=piece):
        if seen not in wanted:
            continue
        found, spectra = [], []
        for layer, states in cached_states(cache).items():
            sigma = singular_values(states[0])
            if seen == places[0]:
                heads += [Head(layer, head, sigma.shape[-1]) for head in range(len(sigma))]
            found.append(measure(sigma, epsilon))
            if seen == count:
                spectra += list(sigma.float().cpu().numpy())
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no linear-attention states of one matrix a head: expected a "
                "state-transition model, an SSD model, or one of transformers' with such layers (Mamba2, Qwen3-Next)"
            )
        for measured in MEASURES:
            rows[measured].append(torch.cat([part[measured] for part in found]).float().cpu().numpy())
    return Trajectory(
        name, heads, np.array(places), np.isin(places, list(step_ends)),
        {measured: np.stack(values) for measured, values in rows.items()}, spectra,
    )  # fmt: skip


def step_tokens(model: PreTrainedModel) -> tuple[list[int], list[int]]:
    """The tokens that start and end a step in a state-transition model or a hybrid with such layers; none in others."""
    attention = (model.config.attention or {}) if isinstance(model.config, SSDConfig) else {}

    def ids(name: str) -> list[int]:
        return getattr(model.config, name, None) or attention.get(name) or []

    return ids("step_start_token_ids"), ids("step_end_token_ids")


# ----------------------------------------------------------------------------------------------------------------------
# What the figures say


def head_means(trajectories: Sequence[Trajectory], measured: str) -> np.ndarray:
    """Mean of each head [H] over all places of an input, then over inputs: each input counts the same."""
    return np.mean([trajectory.values[measured].mean(0) for trajectory in trajectories], 0)


def bimodality(values: np.ndarray) -> dict[str, float | None]:
    """Whether numbers in 0 .. 1 are of two kinds. `coefficient`: Sarle's, (skewness^2 + 1) / kurtosis; `between`: share
    of the variance between the two classes that split them best, which `gap` (of their means) and `threshold` describe;
    None where all are equal.
    """
    values = np.sort(np.asarray(values, dtype=float))
    centred = values - values.mean()
    variance = (centred**2).mean()
    found: dict[str, float | None] = {
        "low": float((values < NEAR).mean()), "saturated": float((values > 1 - NEAR).mean()),
        "coefficient": None, "between": None, "gap": None, "threshold": None,
    }  # fmt: skip
    if variance < 1e-12:
        return found
    skewness, kurtosis = (centred**3).mean() / variance**1.5, (centred**4).mean() / variance**2
    below = np.arange(1, len(values))
    sums = np.cumsum(centred)[:-1]
    between = sums**2 / (below * (len(values) - below))  # of the classes' means around 0, times their shares
    best = int(between.argmax())
    found["coefficient"] = float((skewness**2 + 1) / kurtosis)
    found["between"] = float(between[best] / variance)
    found["gap"] = float(values[best + 1 :].mean() - values[: best + 1].mean())
    found["threshold"] = float(values[best : best + 2].mean())
    return found


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Rank correlation; None where one of them is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)


def cosine(first: np.ndarray, second: np.ndarray) -> float | None:
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / length if length else None


def summarise(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Stratification, rank correlation early to late, agreement across inputs, and the means of every head."""
    if not trajectories:
        raise ValueError("expected at least one recorded text, got none")
    first = trajectories[0]
    if any(other.heads != first.heads for other in trajectories):
        raise ValueError("the texts were recorded with different models: their heads differ")
    bounds = np.array([head.bound for head in first.heads])
    early_late = []
    for one in trajectories:
        early, late = one.early_and_late()
        early_late.append(
            {
                "name": one.name, "early": int(one.positions[early]), "late": int(one.positions[late]),
                "rank": _alike(one.fractions[early], one.fractions[late]),
                "nuclear": _alike(one.values["nuclear"][early], one.values["nuclear"][late]),
            }
        )  # fmt: skip
    means = {measured: head_means(trajectories, measured) for measured in MEASURES}
    pairs: dict[str, list[dict[str, float | None]]] = {"rank": [], "nuclear": []}
    for a, b in combinations(trajectories, 2):
        for measured, found in pairs.items():
            found.append(_alike(a.values[measured].mean(0), b.values[measured].mean(0)))
    last = np.mean([one.fractions[-1] for one in trajectories], 0)
    at_ends = [one.values["rank"][one.is_step_end].mean(0) for one in trajectories if one.is_step_end.any()]
    return {
        "inputs": [{"name": one.name, "tokens": int(one.positions[-1]), "steps": int(one.is_step_end.sum())}
                   for one in trajectories],
        "heads": [
            {"layer": head.layer, "head": head.head, "bound": head.bound}
            | {measured: float(means[measured][i]) for measured in MEASURES}
            | {"rank_at_step_ends": float(np.mean(at_ends, 0)[i]) if at_ends else None, "last_fraction": float(last[i])}
            for i, head in enumerate(first.heads)
        ],
        "stratification": {"mean": bimodality(means["rank"] / bounds), "at_the_end": bimodality(last)},
        "early_to_late": {
            "inputs": early_late, **{m: _mean_of([entry[m] for entry in early_late]) for m in ("rank", "nuclear")}
        },
        "across_inputs": {"pairs": len(pairs["rank"]), **{m: _mean_of(found) for m, found in pairs.items()}},
        "smallest_cosine_of_norms_between_places": _smallest_cosine(trajectories),
    }  # fmt: skip


def _alike(first: np.ndarray, second: np.ndarray) -> dict[str, float | None]:
    return {"spearman": spearman(first, second), "cosine": cosine(first, second)}


def _mean_of(entries: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    known = {name: [e[name] for e in entries if e[name] is not None] for name in ("spearman", "cosine")}
    return {name: math.fsum(values) / len(values) if values else None for name, values in known.items()}


def _smallest_cosine(trajectories: Sequence[Trajectory]) -> float | None:
    norms = [one.values["nuclear"] for one in trajectories]
    found = [cosine(a, b) for n in norms for a, b in pairwise(n)]
    return min((value for value in found if value is not None), default=None)
