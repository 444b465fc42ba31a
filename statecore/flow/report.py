"""Gains for people: one trace on the terminal and as a picture, many traces as a Markdown report and a picture."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..figures import new_figure
from .gains import StepGains
from .readers import Chain
from .summary import Summary, by_size

RESULT_FILE = "flow.json"
MOST_KINDS = 24  # in a table; the rest are in RESULT_FILE
MOST_PROBLEMS = 20
MOST_BARS = 60

# ----------------------------------------------------------------------------------------------------------------------
# Text


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


def report_text(result: Mapping[str, Any]) -> str:
    """The report on many traces, in Markdown."""
    lines = [
        *_overview(result),
        *_kinds(result["by_kind"]),
        *_parts(result["by_part_of_the_trace"]),
        *_worst_steps(result["most_losing_steps"]),
        *_correctness(result["correctness"]),
        *_left_out(result["left_out"]),
    ]
    return "\n".join(lines) + "\n"


def _overview(result: Mapping[str, Any]) -> list[str]:
    steps = result["steps"]
    lines = [
        "# Step information gain",
        "",
        f"{result['traces']} traces, {steps['steps']} steps, {len(result['left_out'])} rows left out. A step gains "
        f"{steps['mean']:.4f} nats in the mean (median {steps['quartiles'][1]:.4f}); {steps['share_above_zero']:.1%} "
        f"of the steps gain; {steps['gained']:.2f} nats were gained and {steps['lost']:.2f} lost.",
    ]
    if result["read_anew_at_every_step_end"] and result["settings"]["method"] == "difference":
        lines += ["", "The model's cache cannot be forked: every step end was read anew."]
    if result["unknown_tokens"]:
        lines += ["", f"{result['unknown_tokens']} tokens are unknown to the tokenizer: is it the model's?"]
    return lines


def _kinds(by_kind: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for naming, groups in by_kind.items():
        lines += ["", f"## By {naming}", "", *_spread_table(naming, list(groups.items())[:MOST_KINDS])]
        if len(groups) > MOST_KINDS:
            lines += ["", f"The {len(groups) - MOST_KINDS} rarest are in {RESULT_FILE}."]
    return lines


def _parts(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    named = [(f"{10 * i} to {10 * i + 10} % of the steps", part) for i, part in enumerate(parts)]
    return ["", "## Where gain is made and lost", "", *_spread_table("part of the trace", named)]


def _worst_steps(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    if not steps:
        return []
    return [
        "", "The steps that lose most:", "",
        *(f"- {step['gain']:+.3f} ({step['id']}, step {step['step']}) {step['text']}" for step in steps),
    ]  # fmt: skip


def _correctness(correctness: Mapping[str, Any]) -> list[str]:
    known = dict(correctness)
    right, wrong, unknown = (known.pop(name) for name in ("right", "wrong", "unknown"))
    lines = [
        "", "## Right and wrong answers", "",
        f"{right} traces are right, {wrong} wrong, {unknown} do not say.", "",
    ]  # fmt: skip
    if "not_measured" in known:
        return [*lines, f"No correlation is given: {known['not_measured']}."]
    lines += ["| of a trace | mean, right | mean, wrong | correlation | area under ROC |", "|---|---|---|---|---|"]
    for name, row in known.items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
    return lines


def _left_out(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["", "## Rows left out", ""]
    lines += [f"- {r['source']}, line {r['line']}: {r['reason']}: {r['detail']}" for r in rows[:MOST_PROBLEMS]]
    if len(rows) > MOST_PROBLEMS:
        lines.append(f"- and {len(rows) - MOST_PROBLEMS} more, in {RESULT_FILE}")
    return lines


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


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_trace(path: Path, trace: Chain, gains: StepGains) -> None:
    """A bar for the gain of each step beside the step's beginning, and the answer's log-likelihood as it develops."""
    values = gains.gains.numpy()
    shown = np.sort(np.argsort(-np.abs(values), kind="stable")[:MOST_BARS])
    height = np.arange(len(shown))
    figure = new_figure((11, 1.4 + 0.4 * len(shown)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    left.barh(height, values[shown], color=np.where(values[shown] < 0, "tab:red", "tab:blue"), height=0.7)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(height, [f"{_beginning(trace.texts[i])}  {i + 1}" for i in shown], fontsize=7)
    left.set_xlabel("gain of the step, nats")
    left.set_ylim(len(shown) - 0.4, -0.6)
    _show_literally(left)
    cut = f"the {len(shown)} of {len(values)} steps with the largest gains and losses; "
    title = f"{trace.id}: {cut if len(shown) < len(values) else ''}answer {textwrap.shorten(trace.answer_text, 60)!r}"
    figure.suptitle(title, fontsize=9, parse_math=False)
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
    naming = next((name for name in ("category", "pattern", "opening") if name in summary.kinds), "opening")
    groups = by_size(summary.kinds.get(naming, {}))[:16]
    figure = new_figure((13, 1.6 + 0.3 * max(len(groups), 8)))
    by_kind, by_part, by_truth = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    _draw_kinds(by_kind, naming, groups)
    _draw_parts(by_part, summary)
    _draw_truth(by_truth, summary)
    _save(figure, path)


def _draw_kinds(axes: Any, naming: str, groups: Sequence[tuple[str, Sequence[float]]]) -> None:
    axes.boxplot([values for _, values in groups], orientation="horizontal", showfliers=False, showmeans=True)
    names = [f"{name} ({len(values)})" for name, values in groups]
    axes.set_yticks(range(1, len(names) + 1), names, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(title=f"by {naming} (steps)", xlabel="gain of a step, nats")
    _show_literally(axes)


def _draw_parts(axes: Any, summary: Summary) -> None:
    """Mean gain and mean loss in each tenth of the trace."""
    tenths = [i for i, part in enumerate(summary.parts) if part]
    parts = [np.array(summary.parts[i]) for i in tenths]
    axes.bar(tenths, [np.clip(part, 0, None).mean() for part in parts], color="tab:blue", label="gained")
    axes.bar(tenths, [np.clip(part, None, 0).mean() for part in parts], color="tab:red", label="lost")
    axes.set(title="along the trace", xlabel="tenth of the steps", ylabel="nats a step")
    axes.legend(fontsize=7)


def _draw_truth(axes: Any, summary: Summary) -> None:
    """Histograms of a whole trace's gain, for right and wrong traces."""
    correct, total = np.array(summary.correct), np.array(summary.scores["total gain"])
    bins = np.histogram_bin_edges(total, 20)
    for value, name, colour in ((1, "right", "tab:green"), (0, "wrong", "tab:red"), (-1, "not said", "tab:grey")):
        chosen = total[correct == value]
        if len(chosen):
            axes.hist(chosen, bins, alpha=0.6, color=colour, label=f"{name} ({len(chosen)})")
    axes.set(title="right and wrong answers", xlabel="gain of a whole trace, nats", ylabel="traces")
    axes.legend(fontsize=7)


def _beginning(text: str) -> str:
    return textwrap.fill(textwrap.shorten(text, 100, placeholder=" ..."), 60)


def _show_literally(axes: Any) -> None:
    """Dollar signs in texts of traces start no formula."""
    for label in axes.get_yticklabels():
        label.set_parse_math(False)


def _save(figure: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path, dpi=120)
