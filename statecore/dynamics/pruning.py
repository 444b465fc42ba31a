"""Smaller states: heads that are really gone, and states of lower rank.  (Joint Rank-Norm Pruning, arXiv 2602.02195)

    S_h = alpha * mean rank_h / d + (1 - alpha) * mean nuclear norm_h / max_j mean nuclear norm_j        (eq. 14)

The paper prunes the heads with the highest S_h, without any training. Its evidence is one pair of models without a
random baseline, and a model on which the order turned around is known; so `compare` always puts random and reverse
pruning of the same budget beside it, with a held-out loss.

`prune_heads` and `lower_ranks` return a new model of the same class, whose configuration says what is left
(`state_heads`, `state_ranks`), so that `save_pretrained`, `from_pretrained`, adapters and `generate()` work as before:

- A pruned head of an SSD layer takes its channels, its convolution, its decay and its part of the projections with
  it; a pruned key/value head of a linear branch those of its query heads (softmax attention keeps all of its own).
- A lowered state is kept in the coordinates of `r` directions: q and k of its head are multiplied with a basis [Dk, r],
  the state is [r, Dv]. That is exact where the state has these directions alone.

What the paper leaves open, with our default:

- alpha: 0.5. Scope of max_j: the whole model ("model"); "layer" compares heads with their layer only.
- How many heads: `keep`, a share of all heads of the model. At least one stays in each layer.
- What takes the place of a pruned head's output: zero, as if the rest of the model had been there; the gated norm of an
  SSD layer goes on dividing by the width of all heads.
- Which directions a lower rank keeps: those in which the calibration states are largest, every place counting the same.
  Each layer keeps the same share of its width.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..cache import cache_bytes
from ..modeling import LinearBranch, StateCoreForCausalLM
from ..ssd.model import SSDForCausalLM, SSDMixer
from .recording import POSITIONS, Head, Trajectory, cached_states, head_means, read_pieces

Order = Literal["joint", "reverse", "random"]
Directions = Literal["leading", "trailing", "random"]
Scope = Literal["model", "layer"]

# ----------------------------------------------------------------------------------------------------------------------
# Which heads


def joint_scores(
    rank_fraction: np.ndarray, nuclear: np.ndarray, alpha: float = 0.5, groups: np.ndarray | None = None
) -> np.ndarray:
    """Eq. 14 for every head, in [0, 1]. groups: numbers of heads that the largest norm is sought among, such as their
    layers; None: all.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in 0 .. 1 (1: rank alone, 0: norm alone), got {alpha}")
    groups = np.zeros(len(nuclear), dtype=int) if groups is None else np.asarray(groups)
    largest = np.array([nuclear[groups == group].max() for group in groups])
    return alpha * rank_fraction + (1 - alpha) * nuclear / np.where(largest > 0, largest, 1)


def head_scores(
    trajectories: Sequence[Trajectory], alpha: float = 0.5, scope: Scope = "model"
) -> tuple[list[Head], np.ndarray]:
    """The heads of recorded texts, and the score of each."""
    heads = trajectories[0].heads
    fraction = head_means(trajectories, "rank") / np.array([head.bound for head in heads])
    layers = np.array([head.layer for head in heads]) if scope == "layer" else None
    return heads, joint_scores(fraction, head_means(trajectories, "nuclear"), alpha, layers)


def choose_heads(
    heads: Sequence[Head], scores: np.ndarray, keep: float, by: Order = "joint", seed: int = 0
) -> dict[int, list[int]]:
    """By layer the heads that stay when those with the highest score ("joint"), the lowest ("reverse") or any
    ("random", ignoring the score) are pruned until a share `keep` is left; one stays in each layer.
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
    """The part of each layer that has a state."""
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
    """A copy of the model with the heads `keep` of each layer (numbered as they are now); layers that `keep` does not
    name stay whole.
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
    """For each weight that has a part for every head, which rows stay."""
    heads = torch.tensor(list(kept))

    def channels(which: Tensor, width: int) -> Tensor:
        return (which[:, None] * width + torch.arange(width)).flatten()

    if isinstance(branch, LinearBranch):
        queries = channels(heads, branch.group)
        rows = {"k.B": channels(heads, branch.k.heads[1]), "v.B": channels(heads, branch.v.heads[1])}
        rows["q.B"] = channels(queries, branch.q.heads[1])
        if branch.gate is not None:
            rows["gate.B"] = rows["gate.bias"] = rows["q.B"]
        return rows if branch.basis is None else rows | {"basis": heads}
    inner, shared = branch.inner, torch.arange(2 * branch.bc)
    own = channels(heads, branch.config.head_dim)
    projected = torch.cat([own, inner + own, 2 * inner + shared, 2 * inner + len(shared) + heads])
    convolved = torch.cat([own, inner + shared])
    rows = {"in_proj.weight": projected, "conv1d.weight": convolved, "norm.weight": own, "out_proj.weight": own}
    rows |= dict.fromkeys(("dt_bias", "A_log", "D"), heads)
    if branch.in_proj.bias is not None:
        rows["in_proj.bias"] = projected
    if branch.conv1d.bias is not None:
        rows["conv1d.bias"] = convolved
    return rows


def _rebuilt(model: PreTrainedModel, config: Any, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model with another configuration, these weights, and all else of the old one."""
    config.validate_ssd() if isinstance(model, SSDForCausalLM) else config.validate_statecore()
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


def key_covariances(
    model: PreTrainedModel, texts: Sequence[Sequence[int] | Tensor], positions: Sequence[int] = POSITIONS
) -> dict[int, Tensor]:
    """By layer the mean of S S^T / |S|^2 over places of calibration texts, float64 [bases, Dk, Dk]: one for each head
    of a linear branch, one for each group of heads of an SSD layer, which share their keys.
    """
    found = branches(model)
    total: dict[int, Tensor] = {}
    for text in texts:
        places = [p for p in positions if p < len(text)]
        wanted = {*places, len(text)}
        for seen, cache, _ in read_pieces(model, text, places):
            for layer, states in cached_states(cache).items() if seen in wanted else ():
                state = states[0].double()
                outer = torch.einsum("hkv,hlv->hkl", state, state)
                outer = outer / outer.diagonal(dim1=1, dim2=2).sum(-1).clamp(min=1e-300)[:, None, None]
                bases, of_head = _bases(found[layer])
                one = outer.new_zeros(bases, *outer.shape[1:])
                one = one.index_add(0, torch.tensor(of_head, device=outer.device), outer)
                total[layer] = total[layer] + one if layer in total else one
    return total


def _bases(branch: SSDMixer | LinearBranch) -> tuple[int, list[int]]:
    """How many bases a layer has, and which one each of its heads is on."""
    if isinstance(branch, LinearBranch):
        return len(branch.heads), list(range(len(branch.heads)))
    config = branch.config
    return config.n_groups, [head * config.n_groups // config.num_heads for head in branch.heads]


def choose_bases(
    covariances: Mapping[int, Tensor], keep: float, by: Directions = "leading", seed: int = 0
) -> dict[int, Tensor]:
    """By layer orthonormal bases [bases, Dk, r] with r a share `keep` of Dk: the directions in which the states are
    largest, smallest ("trailing"), or random ones.
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
    """A copy of the model whose states are kept in the coordinates of each layer's orthonormal bases [bases, Dk, r]."""
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
        if branch.basis is not None:  # states are in its coordinates already
            basis = branch.basis.detach().to(basis) @ basis
        weights[f"{prefixes[id(branch)]}.basis"] = basis.to(model.dtype)
    return _rebuilt(model, config, weights)


# ----------------------------------------------------------------------------------------------------------------------
# What it costs and saves


def held_out(model: PreTrainedModel, texts: Sequence[Sequence[int] | Tensor]) -> dict[str, float]:
    """Loss in nats a token, perplexity, and share of next tokens that are the likeliest, over all tokens but each
    text's first.
    """
    loss, right, count = 0.0, 0, 0
    for text in texts:
        tokens = torch.as_tensor(text, dtype=torch.long, device=model.device)
        begin = 0
        for seen, _, logits in read_pieces(model, tokens, all_logits=True):
            target = tokens[begin + 1 : seen + 1]
            logits = logits[: len(target)].float()
            loss += F.cross_entropy(logits, target, reduction="sum").item()
            right += int((logits.argmax(-1) == target).sum())
            count, begin = count + len(target), seen
    if not count:
        raise ValueError("held-out texts must have at least two tokens")
    mean = loss / count
    return {"loss": mean, "perplexity": math.exp(min(mean, 700)), "accuracy": right / count, "tokens": count}


@torch.no_grad()
def decoding_cost(
    models: Mapping[str, PreTrainedModel], prompt: Sequence[int], tokens: int = 64, rounds: int = 5, *, batch: int = 1
) -> dict[str, dict[str, float]]:
    """Milliseconds (CPU time where models are on the CPU; fastest round) of a pass that decodes a token for each of
    `batch` sequences, one model after the other in every round, bytes of state of a sequence, and parameters.
    """
    ids = torch.as_tensor(prompt, dtype=torch.long).expand(batch, -1)
    fastest = dict.fromkeys(models, math.inf)
    found: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, model in models.items():
            on_cpu = model.device.type == "cpu"
            cache = DynamicCache(config=model.config)
            logits = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            clock = time.process_time if on_cpu else time.perf_counter
            began = clock()
            for _ in range(tokens):
                token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            int(token[0, 0])  # waits for a GPU
            fastest[name] = min(fastest[name], clock() - began)
            found[name] = {
                "ms": 1e3 * fastest[name] / tokens, "state_bytes": cache_bytes(cache).state // batch,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            }  # fmt: skip
    return found


def compare(
    model: PreTrainedModel, variants: Mapping[str, PreTrainedModel], texts: Sequence[Sequence[int] | Tensor],
    prompt: Sequence[int],
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for the model as it is and for each variant: held-out figures, bytes of state, milliseconds a token."""
    every = {"as it is": model} | dict(variants)
    cost = decoding_cost(every, prompt)
    return [{"model": name} | held_out(one, texts) | cost[name] for name, one in every.items()]


def side_of_the_asymmetry(rows: Sequence[Mapping[str, Any]], high: str = "joint", low: str = "reverse") -> str:
    """In words which heads this model can spare, the paper's high ones or the low ones, and where random pruning lies;
    from rows of `compare` named `high`, `low` and "random ...".
    """
    loss = {row["model"]: row["loss"] for row in rows}
    at_random = [value for name, value in loss.items() if name.startswith("random")]
    text = (
        f"Pruning the heads with high scores costs {loss[high] - loss['as it is']:+.4f} nats a token, those with low "
        f"scores {loss[low] - loss['as it is']:+.4f}: "
    )
    if math.isclose(loss[high], loss[low], rel_tol=1e-9):
        text += "no difference."
    elif loss[high] < loss[low]:
        text += "high-scoring heads are easier to spare here, which is the side that the paper reports."
    else:
        text += "low-scoring heads are easier to spare here, the reverse of what the paper reports."
    if at_random:
        below = sum(value < loss[high] for value in at_random)
        mean = math.fsum(at_random) / len(at_random) - loss["as it is"]
        text += (
            f" Random pruning costs {mean:+.4f} in the mean of {len(at_random)} draws and beats pruning of the high "
            f"ones in {below} of them."
        )
    return text
