"""Smaller states: removed heads, and states of lower rank.  (Joint Rank-Norm Pruning, arXiv 2602.02195)

    S_h = alpha * mean rank_h / d + (1 - alpha) * mean nuclear norm_h / max_j mean nuclear norm_j        (eq. 14)

The paper prunes the heads with the highest S_h, without any training. Its evidence is one pair of models without a
random baseline, and there is a model for which the order is reversed. The command therefore always compares with random
and reverse pruning to the same budget, on held-out text (comparison.py).

`prune_heads` and `lower_ranks` return a new model of the same class. Its configuration records what is left
(`state_heads`, `state_ranks`), so `save_pretrained`, `from_pretrained`, adapters and `generate()` work as before:

- A pruned head of an SSD layer takes its channels, convolution, decay and part of the projections with it; a pruned
  key/value head of a linear branch takes those of its query heads (softmax attention keeps all of its own).
- A lowered state is stored in the coordinates of `r` directions: q and k of its head are multiplied by a basis [Dk, r],
  and the state is [r, Dv]. This is exact if the state lies in the span of these directions.

What the paper leaves open, and our default:

- alpha: 0.5. Scope of max_j: the whole model ("model"); "layer" compares heads within their layer only.
- How many heads: `keep`, a share of all heads of the model. At least one stays in each layer.
- What replaces a pruned head's output: zero, with the rest of the model unchanged; the gated norm of an SSD layer still
  divides by the width of all heads.
- Which directions a lower rank keeps: those in which the calibration states are largest, every position counting the
  same. Each layer keeps the same share of its width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..modeling import LinearBranch, StateCoreForCausalLM
from ..ssd.model import SSDForCausalLM, SSDMixer
from .recording import POSITIONS, Head, Trajectory, cached_states, read_pieces
from .summary import head_means

Order = Literal["joint", "reverse", "random"]
Directions = Literal["leading", "trailing", "random"]
Scope = Literal["model", "layer"]

# ----------------------------------------------------------------------------------------------------------------------
# Which heads


@dataclass(frozen=True)
class PruneOptions:
    """Which heads go.

    Args:
        keep: share of all heads of the model that stays, in (0, 1]; one stays in each layer.
        by: which heads of the saved model go first: those with the highest score ("joint"), the lowest ("reverse"), or
            any ("random"). All three are compared.
        alpha: weight of the rank in the score; 1 - alpha is that of the norm. The paper's is unknown.
        scope: norms count as a share of the largest in the "model", or in each "layer".
        draws: how many random prunings there are to compare with.
        seed: of the random prunings.
    """

    keep: float = 0.5
    by: Order = "joint"
    alpha: float = 0.5
    scope: Scope = "model"
    draws: int = 3
    seed: int = 0


def joint_scores(
    rank_fraction: np.ndarray, nuclear: np.ndarray, alpha: float = 0.5, groups: np.ndarray | None = None
) -> np.ndarray:
    """Eq. 14 for every head, in [0, 1]. groups: a number per head, such as its layer; the largest norm is taken within
    each group. None: over all heads.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in 0 .. 1 (1: rank alone, 0: norm alone), got {alpha}")
    groups = np.zeros(len(nuclear), dtype=int) if groups is None else np.asarray(groups)
    largest = np.array([nuclear[groups == group].max() for group in groups])
    return alpha * rank_fraction + (1 - alpha) * nuclear / np.where(largest > 0, largest, 1)


def head_scores(
    trajectories: Sequence[Trajectory], alpha: float = 0.5, scope: Scope = "model"
) -> tuple[list[Head], np.ndarray]:
    """The heads of recorded texts and their scores."""
    heads = trajectories[0].heads
    fraction = head_means(trajectories, "rank") / np.array([head.bound for head in heads])
    layers = np.array([head.layer for head in heads]) if scope == "layer" else None
    return heads, joint_scores(fraction, head_means(trajectories, "nuclear"), alpha, layers)


def choose_heads(
    heads: Sequence[Head], scores: np.ndarray, keep: float, by: Order = "joint", seed: int = 0
) -> dict[int, list[int]]:
    """For each layer, the heads that stay when a share `keep` of all heads is kept, at least one in each layer.

    Pruned are the heads with the highest scores ("joint"), with the lowest ("reverse"), or regardless of the score
    ("random").
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is the share of heads that stay: it must lie in (0, 1], got {keep}")
    if len(scores) != len(heads):
        raise ValueError(f"expected a score for each of the {len(heads)} heads, got {len(scores)}")
    order = {
        "joint": lambda: np.argsort(-np.asarray(scores), kind="stable"),
        "reverse": lambda: np.argsort(np.asarray(scores), kind="stable"),
        "random": lambda: np.random.default_rng(seed).permutation(len(heads)),
    }
    if by not in order:
        raise ValueError(f"by must be one of {', '.join(order)}, got {by!r}")
    left: dict[int, list[int]] = {}
    for head in heads:
        left.setdefault(head.layer, []).append(head.head)
    stay = max(round(keep * len(heads)), 1)
    if stay < len(left):
        raise ValueError(
            f"keep = {keep} leaves {stay} of {len(heads)} heads, but one must stay in each of {len(left)} layers: keep "
            f"at least {len(left) / len(heads):.3f}"
        )
    prune = len(heads) - stay
    for index in order[by]():
        layer = left[heads[index].layer]
        if prune and len(layer) > 1:
            layer.remove(heads[index].head)
            prune -= 1
    return left


# ----------------------------------------------------------------------------------------------------------------------
# Removing heads


def branches(model: PreTrainedModel) -> dict[int, SSDMixer | LinearBranch]:
    """The module of each layer that has a state."""
    if isinstance(model, SSDForCausalLM):
        mixers = {index: getattr(block.mixer, "la", block.mixer) for index, block in enumerate(model.backbone.layers)}
        return {index: mixer for index, mixer in mixers.items() if isinstance(mixer, (SSDMixer, LinearBranch))}
    if isinstance(model, StateCoreForCausalLM):
        return {index: layer.self_attn.la for index, layer in enumerate(model.model.layers)}
    raise ValueError(
        f"pruning takes state-transition models and SSD models, got {type(model).__name__}"
        + (": load it with SSDForCausalLM.from_pretrained" if type(model).__name__ == "Mamba2ForCausalLM" else "")
    )


def prune_heads(model: PreTrainedModel, keep: Mapping[int, Sequence[int]]) -> PreTrainedModel:
    """A copy of the model with only the heads `keep` of each layer, numbered as in `model`.

    Layers that `keep` does not name keep all heads.
    """
    found = branches(model)
    unknown = sorted(keep.keys() - found.keys())
    if unknown:
        raise ValueError(f"layer {unknown[0]} has no state heads; layers {', '.join(map(str, found))} have")
    for layer, kept in keep.items():
        heads = len(found[layer].heads)
        if not kept or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= heads:
            raise ValueError(
                f"layer {layer}: expected increasing head numbers in 0 .. {heads - 1}, at least one, got {list(kept)}"
            )
    config = copy.deepcopy(model.config)
    config.state_heads = [
        [found[layer].heads[i] for i in keep.get(layer, range(len(found[layer].heads)))] if layer in found else []
        for layer in range(config.num_hidden_layers)
    ]
    weights = dict(model.state_dict())
    prefixes = {id(module): name for name, module in model.named_modules()}
    for layer, kept in keep.items():
        branch = found[layer]
        for name, rows in _rows_of_heads(branch, kept).items():
            full = f"{prefixes[id(branch)]}.{name}"
            dimension = 1 if name == "out_proj.weight" else 0
            weights[full] = weights[full].index_select(dimension, rows.to(weights[full].device))
    return _rebuilt(model, config, weights)


def _rows_of_heads(branch: SSDMixer | LinearBranch, kept: Sequence[int]) -> dict[str, Tensor]:
    """The rows that stay, for every weight with a part for each head."""
    heads = torch.tensor(list(kept))
    return _branch_rows(branch, heads) if isinstance(branch, LinearBranch) else _mixer_rows(branch, heads)


def _branch_rows(branch: LinearBranch, heads: Tensor) -> dict[str, Tensor]:
    query_rows = _channels(_channels(heads, branch.group), branch.q.heads[1])
    rows = {
        "q.B": query_rows,
        "k.B": _channels(heads, branch.k.heads[1]),
        "v.B": _channels(heads, branch.v.heads[1]),
    }
    if branch.gate is not None:
        rows["gate.B"] = rows["gate.bias"] = query_rows
    if branch.basis is not None:
        rows["basis"] = heads
    return rows


def _mixer_rows(mixer: SSDMixer, heads: Tensor) -> dict[str, Tensor]:
    own = _channels(heads, mixer.config.head_dim)
    shared = torch.arange(2 * mixer.bc)  # B and C, which the heads of a group share
    inner = mixer.inner
    convolved = torch.cat([own, inner + shared])  # x, B, C
    projected = torch.cat([own, inner + convolved, 2 * inner + len(shared) + heads])  # z, x, B, C, dt
    rows = {"in_proj.weight": projected, "conv1d.weight": convolved, "norm.weight": own, "out_proj.weight": own}
    rows |= dict.fromkeys(("dt_bias", "A_log", "D"), heads)
    if mixer.in_proj.bias is not None:
        rows["in_proj.bias"] = projected
    if mixer.conv1d.bias is not None:
        rows["conv1d.bias"] = convolved
    return rows


def _channels(which: Tensor, width: int) -> Tensor:
    """The channels of heads that are `width` channels wide."""
    return (which[:, None] * width + torch.arange(width)).flatten()


def _rebuilt(model: PreTrainedModel, config: Any, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model with a new configuration and weights, and everything else as in the old one."""
    if isinstance(model, SSDForCausalLM):
        config.validate_ssd()
    else:
        config.validate_statecore()
    new = type(model)(config).to(dtype=model.dtype, device=model.device)
    parameters, old = dict(new.named_parameters()), dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.data = weights[name].detach().to(parameter.device).clone()
            if name in old:
                parameter.requires_grad_(old[name].requires_grad)
    new.generation_config = copy.deepcopy(model.generation_config)
    if isinstance(model, StateCoreForCausalLM):
        for field, value in vars(model.mode).items():
            setattr(new.mode, field, value)
    return new.train(model.training)


# ----------------------------------------------------------------------------------------------------------------------
# Lower rank


@dataclass(frozen=True)
class LowerOptions:
    """Which directions of the states stay.

    Args:
        keep: share of the width of the states' key side that stays, in (0, 1].
        by: the saved model's directions: those in which calibration states are largest ("leading"), smallest
            ("trailing"), or "random" ones. All three are compared.
        seed: of the random directions.
    """

    keep: float = 0.5
    by: Directions = "leading"
    seed: int = 0


def key_covariances(
    model: PreTrainedModel, texts: Sequence[Sequence[int] | Tensor], positions: Sequence[int] = POSITIONS
) -> dict[int, Tensor]:
    """For each layer the mean of S S^T / |S|^2 over positions of calibration texts, float64 [bases, Dk, Dk].

    Heads of a linear branch have a basis each; the heads of a group in an SSD layer share theirs, as they share keys.
    """
    found = branches(model)
    total: dict[int, Tensor] = {}
    for text in texts:
        places = [p for p in positions if p < len(text)]
        wanted = {*places, len(text)}
        for read, cache, _ in read_pieces(model, text, places):
            if read not in wanted:
                continue
            for layer, states in cached_states(cache).items():
                covariance = _normalised_covariance(states[0], found[layer])
                total[layer] = total[layer] + covariance if layer in total else covariance
    return total


def _normalised_covariance(state: Tensor, branch: SSDMixer | LinearBranch) -> Tensor:
    """S S^T / |S|^2 of states [H, Dk, Dv], summed over the heads that share a basis: [bases, Dk, Dk]."""
    state = state.double()
    outer = torch.einsum("hkv,hlv->hkl", state, state)
    outer = outer / outer.diagonal(dim1=1, dim2=2).sum(-1).clamp(min=1e-300)[:, None, None]
    count, of_head = _bases(branch)
    sums = outer.new_zeros(count, *outer.shape[1:])
    return sums.index_add(0, torch.tensor(of_head, device=outer.device), outer)


def _bases(branch: SSDMixer | LinearBranch) -> tuple[int, list[int]]:
    """The number of bases of a layer, and the number of each head's basis."""
    if isinstance(branch, LinearBranch):
        return len(branch.heads), list(range(len(branch.heads)))
    config = branch.config
    return config.n_groups, [head * config.n_groups // config.num_heads for head in branch.heads]


def choose_bases(
    covariances: Mapping[int, Tensor], keep: float, by: Directions = "leading", seed: int = 0
) -> dict[int, Tensor]:
    """Orthonormal bases [bases, Dk, r] for each layer, with r a share `keep` of Dk.

    by: the directions in which the states are largest ("leading"), smallest ("trailing"), or "random" ones.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is the share of the states' width that stays: it must lie in (0, 1], got {keep}")
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer, covariance in covariances.items():
        width = covariance.shape[-1]
        rank = max(round(keep * width), 1)
        if by == "random":
            noise = torch.randn(covariance.shape, generator=generator, dtype=torch.float64)
            vectors = torch.linalg.qr(noise)[0].to(covariance.device)
        elif by in ("leading", "trailing"):
            vectors = torch.linalg.eigh(covariance).eigenvectors  # ascending
            vectors = vectors.flip(-1) if by == "leading" else vectors
        else:
            raise ValueError(f"by must be 'leading', 'trailing' or 'random', got {by!r}")
        found[layer] = vectors[..., :rank]
    return found


def lower_ranks(model: PreTrainedModel, bases: Mapping[int, Tensor]) -> PreTrainedModel:
    """A copy of the model that stores states in the coordinates of each layer's orthonormal bases [bases, Dk, r]."""
    found = branches(model)
    if bases.keys() != found.keys():
        raise ValueError(f"expected bases for the layers {sorted(found)}, got {sorted(bases)}")
    config = copy.deepcopy(model.config)
    config.state_ranks = [bases[layer].shape[-1] if layer in bases else 1 for layer in range(config.num_hidden_layers)]
    weights = dict(model.state_dict())
    prefixes = {id(module): name for name, module in model.named_modules()}
    for layer, branch in found.items():
        basis = bases[layer]
        if len(basis) != _bases(branch)[0]:
            raise ValueError(f"layer {layer}: expected {_bases(branch)[0]} bases, got {len(basis)}")
        if branch.basis is not None:  # `basis` is relative to the coordinates of an earlier lowering
            basis = branch.basis.detach().to(basis) @ basis
        weights[f"{prefixes[id(branch)]}.basis"] = basis.to(model.dtype)
    return _rebuilt(model, config, weights)
