"""Gains of many traces in bounded memory: by kind of step, by part of the trace, and by whether the answer is right."""

from __future__ import annotations

import heapq
import math
import textwrap
from array import array
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np

from .gains import StepGains
from .readers import Chain


class Summary:
    """Figures of many traces: one number per step and way of naming it, four per trace, and the worst ten steps."""

    PARTS = 10  # of a trace, by number of steps
    WORST = 10

    def __init__(self) -> None:
        self.traces = 0
        self.uncached = 0
        self.kinds: dict[str, dict[str, array]] = {}
        self.parts = [array("d") for _ in range(self.PARTS)]
        self.scores: dict[str, array] = {
            name: array("d")
            for name in ("total gain", "final log-likelihood", "share of steps that gain", "worst step")
        }
        self.correct = array("b")  # -1: unknown
        self.worst: list[tuple[float, int, int, dict[str, Any]]] = []  # a heap: loss, trace, step, what is reported

    def add(self, trace: Chain, gains: StepGains) -> None:
        self.traces += 1
        values = gains.gains.tolist()
        self.uncached += not gains.cached
        for naming, names in trace.kinds.items():
            for name, gain in zip(names, values, strict=True):
                self.kinds.setdefault(naming, {}).setdefault(name, array("d")).append(gain)
        for i, gain in enumerate(values):
            self.parts[i * self.PARTS // len(values)].append(gain)
            if gain < 0:
                self._add_loss(trace, i, gain)
        final = math.nan if gains.log_likelihoods is None else gains.log_likelihoods[-1].item()
        share = sum(gain > 0 for gain in values) / len(values)
        for name, value in zip(self.scores, (sum(values), final, share, min(values)), strict=True):
            self.scores[name].append(value)
        self.correct.append(-1 if trace.correct is None else trace.correct)

    def _add_loss(self, trace: Chain, i: int, gain: float) -> None:
        step = {"id": trace.id, "step": i + 1, "gain": gain, "text": textwrap.shorten(trace.texts[i], 160)}
        entry = (-gain, self.traces, i, step)
        if len(self.worst) < self.WORST:
            heapq.heappush(self.worst, entry)
        else:
            heapq.heappushpop(self.worst, entry)

    def result(self) -> dict[str, Any]:
        return {
            "traces": self.traces,
            "read_anew_at_every_step_end": self.uncached,
            "steps": spread(chain.from_iterable(self.parts)),
            "by_kind": {
                naming: {name: spread(values) for name, values in by_size(groups)}
                for naming, groups in self.kinds.items()
            },
            "by_part_of_the_trace": [spread(part) for part in self.parts],
            "most_losing_steps": [step for *_, step in sorted(self.worst, reverse=True)],
            "correctness": self.correctness(),
        }

    def correctness(self) -> dict[str, Any]:
        """How the figures of a trace relate to its answer being right, or why that cannot be measured."""
        correct = np.array(self.correct)
        known = correct >= 0
        right, wrong = int((correct == 1).sum()), int((correct == 0).sum())
        found: dict[str, Any] = {"right": right, "wrong": wrong, "unknown": int((~known).sum())}
        if not known.any():
            return found | {"not_measured": "no row says whether its answer is right"}
        if not right or not wrong:
            return found | {"not_measured": f"all {right + wrong} answers are {'right' if right else 'wrong'}"}
        from sklearn.metrics import roc_auc_score

        for name, values in self.scores.items():
            score, truth = np.array(values)[known], correct[known] == 1
            if not np.isfinite(score).all() or np.ptp(score) == 0:
                continue
            found[name] = {
                "mean_when_right": float(score[truth].mean()),
                "mean_when_wrong": float(score[~truth].mean()),
                "correlation": float(np.corrcoef(score, truth)[0, 1]),
                "area_under_roc": float(roc_auc_score(truth, score)),
            }
        return found


def by_size(groups: Mapping[str, array]) -> list[tuple[str, array]]:
    """Groups with their names, the largest first."""
    return sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))


def spread(gains: Iterable[float]) -> dict[str, Any]:
    """Count, mean, quartiles, share above zero, total gained and total lost."""
    values = np.fromiter(gains, dtype=float)
    if not len(values):
        return {"steps": 0}
    low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
    return {
        "steps": len(values),
        "mean": float(values.mean()),
        "quartiles": [low, middle, high],
        "share_above_zero": float((values > 0).mean()),
        "gained": float(values[values > 0].sum()),
        "lost": float(values[values < 0].sum()),
    }
