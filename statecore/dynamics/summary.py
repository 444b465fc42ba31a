"""What recorded state dynamics say: are the ranks of two kinds (stratification), do heads that are high early stay high
(rank correlation), and are they the same heads on other inputs (agreement)?  (arXiv 2602.02195)

The paper gives no measure of bimodality. Reported here are Sarle's bimodality coefficient (5/9 for a uniform
distribution, 1 for two points), the share of variance between the two classes that split the ranks best, the distance
between the means of these classes, and the shares of heads near both ends. The coefficient alone calls a single outlier
among equals bimodal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from .recording import MEASURES, Trajectory

NEAR = 0.1  # a rank within this share of the largest possible one from 0 counts as low, from 1 as saturated


def head_means(trajectories: Sequence[Trajectory], measured: str) -> np.ndarray:
    """Mean of each head [H] over all positions of an input, then over inputs, so that each input counts the same."""
    return np.mean([trajectory.values[measured].mean(0) for trajectory in trajectories], 0)


def bimodality(values: np.ndarray) -> dict[str, float | None]:
    """Whether numbers in 0 .. 1 form two groups.

    `low`, `saturated`: shares near 0 and 1. `coefficient`: Sarle's, (skewness^2 + 1) / kurtosis. `between`: share of
    variance between the two classes that split the numbers best; `gap` is the distance of their means, `threshold` lies
    between them. The last four are None if all numbers are equal.
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
    below = np.arange(1, len(values))  # size of the lower class, for every split into two
    sums = np.cumsum(centred)[:-1]
    between = sums**2 / (below * (len(values) - below))  # variance of the class means, weighted by class size
    best = int(between.argmax())
    found["coefficient"] = float((skewness**2 + 1) / kurtosis)
    found["between"] = float(between[best] / variance)
    found["gap"] = float(values[best + 1 :].mean() - values[: best + 1].mean())
    found["threshold"] = float(values[best : best + 2].mean())
    return found


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Rank correlation; None if either is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)


def cosine(first: np.ndarray, second: np.ndarray) -> float | None:
    """Cosine similarity; None if either is zero."""
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / length if length else None


def summarise(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Stratification, rank correlation from early to late, agreement across inputs, and the means of every head."""
    if not trajectories:
        raise ValueError("expected at least one recorded text, got none")
    heads = trajectories[0].heads
    if any(other.heads != heads for other in trajectories):
        raise ValueError("the texts were recorded with different models: their heads differ")
    mean_fractions = head_means(trajectories, "rank") / np.array([head.bound for head in heads])
    last_fractions = np.mean([trajectory.fractions[-1] for trajectory in trajectories], 0)
    return {
        "inputs": [
            {"name": t.name, "tokens": int(t.positions[-1]), "steps": int(t.is_step_end.sum())} for t in trajectories
        ],
        "heads": _head_rows(trajectories, last_fractions),
        "stratification": {"mean": bimodality(mean_fractions), "at_the_end": bimodality(last_fractions)},
        "early_to_late": _early_to_late(trajectories),
        "across_inputs": _across_inputs(trajectories),
        "smallest_cosine_of_norms_between_places": _smallest_cosine(trajectories),
    }


def _head_rows(trajectories: Sequence[Trajectory], last_fractions: np.ndarray) -> list[dict[str, Any]]:
    means = {measure: head_means(trajectories, measure) for measure in MEASURES}
    at_ends = [t.values["rank"][t.is_step_end].mean(0) for t in trajectories if t.is_step_end.any()]
    rank_at_ends = np.mean(at_ends, 0).tolist() if at_ends else [None] * len(last_fractions)
    return [
        {"layer": head.layer, "head": head.head, "bound": head.bound}
        | {measure: float(values[i]) for measure, values in means.items()}
        | {"rank_at_step_ends": rank_at_ends[i], "last_fraction": float(last_fractions[i])}
        for i, head in enumerate(trajectories[0].heads)
    ]


def _early_to_late(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    rows = []
    for trajectory in trajectories:
        early, late = trajectory.early_and_late()
        fractions, norms = trajectory.fractions, trajectory.values["nuclear"]
        rows.append(
            {
                "name": trajectory.name,
                "early": int(trajectory.positions[early]),
                "late": int(trajectory.positions[late]),
                "rank": _similarity(fractions[early], fractions[late]),
                "nuclear": _similarity(norms[early], norms[late]),
            }
        )
    return {"inputs": rows, **{measure: _mean([row[measure] for row in rows]) for measure in ("rank", "nuclear")}}


def _across_inputs(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    pairs = list(combinations(trajectories, 2))
    similarities = {
        measure: [_similarity(a.values[measure].mean(0), b.values[measure].mean(0)) for a, b in pairs]
        for measure in ("rank", "nuclear")
    }
    return {"pairs": len(pairs), **{measure: _mean(found) for measure, found in similarities.items()}}


def _similarity(first: np.ndarray, second: np.ndarray) -> dict[str, float | None]:
    return {"spearman": spearman(first, second), "cosine": cosine(first, second)}


def _mean(similarities: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    known = {name: [s[name] for s in similarities if s[name] is not None] for name in ("spearman", "cosine")}
    return {name: math.fsum(values) / len(values) if values else None for name, values in known.items()}


def _smallest_cosine(trajectories: Sequence[Trajectory]) -> float | None:
    """Over all pairs of neighbouring positions: how far the vector of nuclear norms turns at most."""
    norms = [trajectory.values["nuclear"] for trajectory in trajectories]
    cosines = [cosine(before, after) for values in norms for before, after in pairwise(values)]
    return min((value for value in cosines if value is not None), default=None)
