"""Step information gains for people: what is kept of many traces, reports and pictures."""

from __future__ import annotations

import heapq
import math
import textwrap
import warnings
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from .gains import StepGains

RESULT_FILE = "flow.json"


@dataclass(frozen=True)
class Chain:
    """One trace as tokens, with what a person needs to read the result.

    texts: of the steps. spans: their character spans in the thinking, None where only tokens are known. kinds: for each
    way of naming steps ("pattern", "category", "opening") the name of every step. correct: None where the row does not
    say.
    """

    id: str
    source: str
    line: int
    tokens: list[int]
    step_ends: list[int]
    closing: list[int]
    answer: list[int]
    answer_text: str
    texts: list[str]
    spans: list[tuple[int, int]] | None
    kinds: dict[str, list[str]]
    correct: bool | None = None
    posterior_prompt: list[int] | None = None

    def record(self, gains: StepGains) -> dict[str, Any]:
        """For a line of the rewards file."""
        rows = []
        for i, (text, gain) in enumerate(zip(self.texts, gains.gains.tolist(), strict=True)):
            begin, end = self.spans[i] if self.spans else (None, None)
            tokens = self.step_ends[i + 1] - self.step_ends[i]
            kinds = {name: names[i] for name, names in self.kinds.items()}
            rows.append({"text": text, "begin": begin, "end": end, "tokens": tokens, "gain": gain, **kinds})
        known = gains.log_likelihoods
        return {
            "id": self.id, "source": self.source, "line": self.line, "correct": self.correct,
            "answer": self.answer_text, "answer_log_likelihoods": None if known is None else known.tolist(),
            "steps": rows,
        }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Many traces


class Summary:
    """What is kept of many traces: a number a step and naming, four a trace, and the ten most losing steps."""

    PARTS = 10  # of a trace, by its steps

    def __init__(self) -> None:
        self.traces = 0
        self.uncached = 0
        self.kinds: dict[str, dict[str, array]] = {}
        self.parts = [array("d") for _ in range(self.PARTS)]
        self.scores: dict[str, array] = {
            name: array("d")
            for name in ("total gain", "final log-likelihood", "share of steps that gain", "worst step")
        }
        self.correct = array("b")  # -1: the row does not say
        self.worst: list[tuple[float, int, dict[str, Any]]] = []

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
                step = {"id": trace.id, "step": i + 1, "gain": gain, "text": textwrap.shorten(trace.texts[i], 160)}
                entry = (-gain, self.traces * 100_000 + i, step)
                (heapq.heappush if len(self.worst) < 10 else heapq.heappushpop)(self.worst, entry)
        final = math.nan if gains.log_likelihoods is None else gains.log_likelihoods[-1].item()
        share = sum(gain > 0 for gain in values) / len(values)
        for name, value in zip(self.scores, (sum(values), final, share, min(values)), strict=True):
            self.scores[name].append(value)
        self.correct.append(-1 if trace.correct is None else trace.correct)

    def result(self) -> dict[str, Any]:
        everything = array("d", chain.from_iterable(self.parts))
        return {
            "traces": self.traces,
            "read_anew_at_every_step_end": self.uncached,
            "steps": spread(everything),
            "by_kind": {
                naming: {name: spread(values) for name, values in _by_size(groups)}
                for naming, groups in self.kinds.items()
            },
            "by_part_of_the_trace": [spread(part) for part in self.parts],
            "most_losing_steps": [step for _, _, step in sorted(self.worst, reverse=True)],
            "correctness": self.correctness(),
        }

    def correctness(self) -> dict[str, Any]:
        """How the figures of a trace go with its answer being right, or why that cannot be said."""
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


def _by_size(groups: Mapping[str, array]) -> list[tuple[str, array]]:
    return sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))


def spread(gains: Iterable[float]) -> dict[str, Any]:
    """Count, mean, quartiles, share above zero, and all that was gained and lost."""
    values = np.array(gains, dtype=float)
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


# ----------------------------------------------------------------------------------------------------------------------
# For people


def steps_text(trace: Chain, gains: StepGains) -> str:
    """One trace on the terminal: a bar and the beginning of each step."""
    values = gains.gains.tolist()
    unit = 10 / max(max(map(abs, values)), 1e-12)
    known = gains.log_likelihoods
    lines = [
        f"{trace.id}: gain of each step in nats, towards the answer {textwrap.shorten(trace.answer_text, 80)!r}",
        "",
    ]
    for i, (text, gain) in enumerate(zip(trace.texts, values, strict=True), 1):
        bar = ("-" if gain < 0 else "+") * round(abs(gain) * unit)
        lines.append(f"{i:4d} {gain:+9.3f} {bar:10s} {textwrap.shorten(text, 80, placeholder=' ...')}")
    total = f"\n     {sum(values):+9.3f} in all"
    if known is not None:
        total += f": log p(answer) goes from {known[0]:.3f} to {known[-1]:.3f}"
    return "\n".join([*lines, total])


def report(result: Mapping[str, Any]) -> str:
    """The report on many traces, in Markdown."""
    every, left_out = result["steps"], result["left_out"]
    lines = [
        "# Step information gain",
        "",
        f"{result['traces']} traces, {every['steps']} steps, {len(left_out)} rows left out. A step gains "
        f"{every['mean']:.4f} nats in the mean (median {every['quartiles'][1]:.4f}); {every['share_above_zero']:.1%} "
        f"of the steps gain; {every['gained']:.2f} nats were gained and {every['lost']:.2f} lost.",
    ]
    if result["read_anew_at_every_step_end"] and result["settings"]["method"] == "difference":
        lines += ["", "The model's cache cannot be forked: every step end was read anew."]
    if result["unknown_tokens"]:
        lines += ["", f"{result['unknown_tokens']} tokens are unknown to the tokenizer: is it the model's?"]
    for naming, groups in result["by_kind"].items():
        lines += ["", f"## By {naming}", "", *_spread_table(naming, list(groups.items())[:24])]
        if len(groups) > 24:
            lines += ["", f"The {len(groups) - 24} rarest are in {RESULT_FILE}."]
    parts = [
        (f"{10 * i} to {10 * i + 10} % of the steps", part) for i, part in enumerate(result["by_part_of_the_trace"])
    ]
    lines += ["", "## Where gain is made and lost", "", *_spread_table("part of the trace", parts)]
    if result["most_losing_steps"]:
        lines += ["", "The steps that lose most:", ""]
        lines += [f"- {s['gain']:+.3f} ({s['id']}, step {s['step']}) {s['text']}" for s in result["most_losing_steps"]]
    lines += ["", "## Right and wrong answers", ""]
    known = dict(result["correctness"])
    right, wrong, unknown = (known.pop(name) for name in ("right", "wrong", "unknown"))
    lines.append(f"{right} traces are right, {wrong} wrong, {unknown} do not say.")
    if "not_measured" in known:
        lines += ["", f"No correlation is given: {known['not_measured']}."]
    else:
        lines += [
            "",
            "| of a trace | mean, right | mean, wrong | correlation | area under ROC |",
            "|---|---|---|---|---|",
        ]
        for name, row in known.items():
            cells = " | ".join(f"{row[key]:.3f}" for key in row)
            lines.append(f"| {name} | {cells} |")
    if left_out:
        lines += ["", "## Rows left out", ""]
        lines += [f"- {r['source']}, line {r['line']}: {r['reason']}: {r['detail']}" for r in left_out[:20]]
        if len(left_out) > 20:
            lines.append(f"- and {len(left_out) - 20} more, in {RESULT_FILE}")
    return "\n".join(lines) + "\n"


def _spread_table(name: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    lines = [f"| {name} | steps | mean | quartiles | gain | gained | lost |", "|---|---|---|---|---|---|---|"]
    for label, row in rows:
        if row["steps"]:
            quartiles = " ".join(f"{value:.3f}" for value in row["quartiles"])
            lines.append(
                f"| {label} | {row['steps']} | {row['mean']:.3f} | {quartiles} | {row['share_above_zero']:.0%} | "
                f"{row['gained']:.2f} | {row['lost']:.2f} |"
            )
    return lines


MOST_BARS = 60


def draw_trace(path: Path, trace: Chain, gains: StepGains) -> None:
    """Bars of the gains beside the beginnings of the steps, and the answer's log-likelihood as they add up."""
    from matplotlib.figure import Figure

    values = gains.gains.numpy()
    shown = np.sort(np.argsort(-np.abs(values), kind="stable")[:MOST_BARS])
    labels = [_beginning(trace.texts[i]) for i in shown]
    height = np.arange(len(shown))
    figure = Figure(figsize=(11, 1.4 + 0.4 * len(shown)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    left.barh(height, values[shown], color=np.where(values[shown] < 0, "tab:red", "tab:blue"), height=0.7)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(height, [f"{label}  {i + 1}" for i, label in zip(shown, labels, strict=True)], fontsize=7)
    left.set_xlabel("gain of the step, nats")
    left.set_ylim(len(shown) - 0.4, -0.6)
    cut = (
        f"the {len(shown)} of {len(values)} steps with the largest gains and losses; "
        if len(shown) < len(values)
        else ""
    )
    title = f"{trace.id}: {cut}answer {textwrap.shorten(trace.answer_text, 60)!r}"
    figure.suptitle(title, fontsize=9, parse_math=False)
    for label in left.get_yticklabels():
        label.set_parse_math(False)
    if gains.log_likelihoods is None:
        right.plot(np.cumsum(values)[shown], height, "o-", color="tab:green", markersize=3)
        right.set_xlabel("gain so far, nats")
    else:
        right.axvline(gains.log_likelihoods[0].item(), color="grey", linestyle=":", label="prompt alone")
        right.plot(gains.log_likelihoods.numpy()[1:][shown], height, "o-", color="tab:green", markersize=3)
        right.set_xlabel("log p(answer)")
        right.legend(fontsize=7)
    _save(figure, path)


def draw_summary(path: Path, summary: Summary) -> None:
    """Gains by kind of step, along the trace, and of right and wrong traces."""
    from matplotlib.figure import Figure

    naming = next((name for name in ("category", "pattern", "opening") if name in summary.kinds), "opening")
    groups = _by_size(summary.kinds.get(naming, {}))[:16]
    figure = Figure(figsize=(13, 1.6 + 0.3 * max(len(groups), 8)), layout="constrained")
    by_kind, by_part, by_truth = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    by_kind.boxplot([values for _, values in groups], orientation="horizontal", showfliers=False, showmeans=True)
    names = [f"{name} ({len(values)})" for name, values in groups]
    by_kind.set_yticks(range(1, len(names) + 1), names, fontsize=7)
    by_kind.invert_yaxis()
    by_kind.axvline(0, color="black", linewidth=0.8)
    by_kind.set(title=f"by {naming} (steps)", xlabel="gain of a step, nats")
    for label in by_kind.get_yticklabels():
        label.set_parse_math(False)
    at = [i for i, part in enumerate(summary.parts) if part]
    gained, lost = (
        [np.clip(p, *limits).mean() for p in (np.array(summary.parts[i]) for i in at)]
        for limits in ((0, None), (None, 0))
    )
    by_part.bar(at, gained, color="tab:blue", label="gained")
    by_part.bar(at, lost, color="tab:red", label="lost")
    by_part.set(title="along the trace", xlabel="tenth of the steps", ylabel="nats a step")
    by_part.legend(fontsize=7)
    correct, total = np.array(summary.correct), np.array(summary.scores["total gain"])
    bins = np.histogram_bin_edges(total, 20)
    for value, name, colour in ((1, "right", "tab:green"), (0, "wrong", "tab:red"), (-1, "not said", "tab:grey")):
        if (correct == value).any():
            by_truth.hist(
                total[correct == value], bins, alpha=0.6, color=colour, label=f"{name} ({(correct == value).sum()})"
            )
    by_truth.set(title="right and wrong answers", xlabel="gain of a whole trace, nats", ylabel="traces")
    by_truth.legend(fontsize=7)
    _save(figure, path)


def _beginning(text: str) -> str:
    return textwrap.fill(textwrap.shorten(text, 100, placeholder=" ..."), 60)


def _save(figure: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path, dpi=120)
