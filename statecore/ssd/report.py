"""The report of a curriculum: the table of its evaluations, and its picture."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..figures import new_figure


def report_table(record: Mapping[str, Any]) -> str:
    """Markdown: one line per run, one column per figure of each evaluation."""
    sets = {name: found for run in record["runs"] for name, found in run["evaluation"].items()}
    columns = [(name, key) for name, found in sets.items() for key in ("loss", "exact") if key in found]
    titles = [f"{name}: {'loss' if key == 'loss' else 'exact answers'}" for name, key in columns]
    lines = [f"| trained on | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for run in record["runs"]:
        cells = []
        for name, key in columns:
            value = run["evaluation"][name].get(key)
            cells.append("" if value is None else f"{value:.3f}" if key == "loss" else f"{value:.1%}")
        lines.append(f"| {' + '.join(run['phases']) or 'nothing'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curriculum(record: Mapping[str, Any], path: Path) -> None:
    """Training loss of every run, held-out loss and exact answers."""
    figure = new_figure((13, 3.6))
    curves, losses, bars = figure.subplots(1, 3)
    runs = [run for run in record["runs"] if run["phases"]]
    for run in runs:
        start = _updates_before(run, runs)
        updates, loss = [start + x["step"] for x in run["history"]], [x["loss"] for x in run["history"]]
        curves.plot(updates, loss, label=" + ".join(run["phases"]))
    _draw_bars(losses, runs, "loss")
    _draw_bars(bars, runs, "exact")
    curves.set(title="training", xlabel="update", ylabel="nats per token")
    losses.set(title="held-out loss", ylabel="nats per token")
    bars.set(title="exact answers", ylim=(0, 1))
    curves.legend(fontsize=7)
    working = path.with_name(f".{path.name}.part.png")
    figure.savefig(working, dpi=110)
    os.replace(working, path)


def _updates_before(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> int:
    """Updates of the runs whose model this run started from."""
    return sum(
        other["history"][-1]["step"]
        for other in runs
        if other["history"]
        and len(other["phases"]) < len(run["phases"])
        and other["phases"] == run["phases"][: len(other["phases"])]
    )


def _draw_bars(axes: Any, runs: Sequence[Mapping[str, Any]], key: str) -> None:
    """Groups of bars, one group per evaluation that has the figure `key` and one bar per run."""
    shown = [name for name, found in runs[0]["evaluation"].items() if key in found]
    width = 0.8 / len(runs)
    for index, run in enumerate(runs):
        shift = (index - (len(runs) - 1) / 2) * width
        axes.bar([i + shift for i in range(len(shown))], [run["evaluation"][name][key] for name in shown], width)
    axes.set_xticks(range(len(shown)), shown, fontsize=8)
