"""`statecore metastable traces`: the chain between the thinking patterns of real chains of thought (chain.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..outputs import new_folder, write_json
from .chain import (
    MetastableSets,
    OutcomeOptions,
    PatternChain,
    PatternTraces,
    Resampling,
    describe_outcomes,
    describe_sets,
    excesses,
    metastable_sets,
    pattern_chain,
    read_outcomes,
    read_patterns,
    resample,
    time_scales,
    trace_features,
)
from .report import draw_chain, draw_outcomes, draw_times, traces_text


@dataclass(frozen=True)
class ChainOptions:
    """How the chain is analysed.

    Args:
        sets: number of metastable sets; default: before the largest drop among the first 8 eigenvalues.
        rare: a transition is rare below this probability.
        lags: time scales at 1 to this many steps; on a Markov chain they are all the same.
        shuffles: random orders of the steps of each trace, and resamplings of the traces, to compare with.
    """

    sets: int | None = None
    rare: float = 0.01
    lags: int = 6
    shuffles: int = 50

    def __post_init__(self):
        for name, least in (("lags", 1), ("shuffles", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if not 0 < self.rare < 1:
            raise ValueError(f"rare: expected a probability between 0 and 1, both excluded, got {self.rare}")


def traces(
    prepared: str | Path,
    output_dir: str | Path,
    *,
    answers: OutcomeOptions = OutcomeOptions(),
    chain: ChainOptions = ChainOptions(),
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Analyse the chain between the thinking patterns of real traces: metastable sets, time scales, rare transitions.

    Writes the chain, its time scales and, with outcomes, how right and wrong traces differ, as pictures, each with its
    JSON, and a report. Returns the report's figures.

    Args:
        prepared: folder that `statecore prepare` wrote.
        output_dir: folder to write; it appears once it is complete.
        seed: of everything drawn.
        overwrite: replace a folder of an earlier run.
    """
    walked, patterns = read_patterns(prepared)
    longest = int(np.bincount(walked.trace).max())
    if chain.lags >= longest:
        raise ValueError(f"lags: expected less than the {longest} steps of the longest trace, got {chain.lags}")
    counted = pattern_chain(walked.counts())
    sets = {
        name: metastable_sets(excess, weight, chain.sets, seed=seed)
        for name, (excess, weight) in excesses(walked, counted).items()
    }
    outcomes = None if answers.outcomes is None else read_outcomes(answers, walked.ids)

    with new_folder(output_dir, overwrite, marker="chain.json") as folder:
        resampling = resample(walked, counted, sets, chain.lags, chain.shuffles, seed)
        labels = {name: found.labels for name, found in sets.items()}
        result = _describe_chain(walked, counted, sets, resampling, patterns, chain.rare)
        whole = {"settings": asdict(chain) | {"seed": seed}} | result
        whole |= {"active": counted.active.tolist(), "kernel": counted.kernel.tolist()}
        whole |= {"stationary": counted.stationary.tolist(), "set_of": {k: own.tolist() for k, own in labels.items()}}
        write_json(folder / "chain.json", whole)
        draw_chain(folder / "chain.png", counted, labels, walked.counts(), _lift(walked))
        result["time_scales"] = _describe_times(walked, resampling, chain.lags)
        write_json(folder / "times.json", result["time_scales"])
        draw_times(folder / "times.png", result["time_scales"])
        if outcomes is not None:
            features = trace_features(walked, counted, labels, chain.rare)
            result["outcomes"] = describe_outcomes(walked, features, outcomes, seed)
            write_json(folder / "outcomes.json", result["outcomes"])
            if result["outcomes"]["comparison"]:
                draw_outcomes(folder / "outcomes.png", result["outcomes"])
        text = traces_text(result)
        (folder / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Results


def _describe_chain(
    walked: PatternTraces,
    chain: PatternChain,
    sets: Mapping[str, MetastableSets],
    resampling: Resampling,
    patterns: list[dict[str, Any]],
    rare: float,
) -> dict[str, Any]:
    counts, expected = walked.counts(), walked.expected_counts()
    probability = chain.stationary[:, None] * chain.kernel
    eigenvalues = np.sort(np.abs(np.linalg.eigvals(chain.kernel)))[::-1]
    return {
        "prepared": {
            "traces": len(walked.ids),
            "steps": len(walked.steps),
            "transitions": int(counts.sum()),
            "patterns": walked.patterns,
            "active_patterns": len(chain.active),
            "transitions_between_active": float(counts[np.ix_(chain.active, chain.active)].sum() / counts.sum()),
        },
        "spectral_gap": float(1 - eigenvalues[1]),
        "eigenvalues": eigenvalues[:10].tolist(),
        "sets": {
            name: {
                "sets": _with_examples(describe_sets(walked, chain, found.labels), counts, patterns),
                "eigenvalues": found.eigenvalues,
                "found_again": {
                    "mean": float(np.mean(resampling.agreement[name])),
                    "least": float(np.min(resampling.agreement[name])),
                },
                "crossings": float(probability[found.crossing].sum()),
                "crossing_pairs_rare": float((chain.kernel[found.crossing] < rare).mean()),
            }
            for name, found in sets.items()
        },
        "order_eigenvalue_in_random_order": float(np.max(resampling.random_order_eigenvalues)),
        "same_pattern_again": {
            "share": float(np.trace(counts) / counts.sum()),
            "in_random_order": float(np.trace(expected) / counts.sum()),
        },
        "rare": {
            "below": rare,
            "transitions": float(probability[chain.kernel < rare].sum()),
            "pairs": float((chain.kernel < rare).mean()),
        },
        "successions": _favoured_successions(walked),
    }


def _with_examples(
    sets: list[dict[str, Any]], counts: np.ndarray, patterns: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """`sets` with the openings of the most frequent patterns of each."""
    for row in sets:
        frequent = sorted(row["patterns"], key=lambda i: -counts[i].sum())[:4]
        row["examples"] = [_opening(patterns[i]) for i in frequent]
    return sets


def _opening(pattern: Mapping[str, Any]) -> str:
    """The first words of a pattern's most typical step."""
    words = " ".join(" ".join(pattern.get("examples") or [""]).split()[:9])
    return f"{pattern['id']}: {words}".replace("|", "/")


def _lift(walked: PatternTraces) -> np.ndarray:
    """How many times more often than in random order each pattern follows each, `[P, P]`."""
    return walked.counts() / np.maximum(walked.expected_counts(), 1e-12)


def _favoured_successions(walked: PatternTraces, number: int = 12, least: int = 20) -> list[dict[str, Any]]:
    """The transitions between different patterns, counted `least` times or more, that the order favours most."""
    counts, lift = walked.counts(), _lift(walked)
    often = np.where(counts >= least, lift, 0) - 1e9 * np.eye(len(counts))
    pairs = [divmod(int(at), len(counts)) for at in np.argsort(often, axis=None)[::-1][:number]]
    return [
        {"from": int(i), "to": int(j), "count": int(counts[i, j]), "times_random_order": float(lift[i, j])}
        for i, j in pairs
    ]


def _describe_times(walked: PatternTraces, resampling: Resampling, lags: int) -> dict[str, Any]:
    def summary(scales: np.ndarray) -> dict[str, list[float]]:
        return {"mean": np.mean(scales, 0).tolist(), "deviation": np.std(scales, 0, ddof=1).tolist()}

    return {
        "lags": list(range(1, lags + 1)),
        "time_scales": [time_scales(pattern_chain(walked.counts(lag)).kernel, lag) for lag in range(1, lags + 1)],
        "slowest_resampled": summary(resampling.resampled_scales),
        "slowest_in_random_order": summary(resampling.random_order_scales),
    }
