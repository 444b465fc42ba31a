"""The demo's results as pictures and as one self-contained HTML page."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from ..outputs import write_text
from .measure import NO_MOMENTUM, NO_STATE, STUDENT, TEACHER

COLOURS = {TEACHER: "tab:gray", STUDENT: "tab:blue", NO_MOMENTUM: "tab:orange", NO_STATE: "tab:red"}
MARKERS = {TEACHER: "s", STUDENT: "o", NO_MOMENTUM: "^", NO_STATE: "x"}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>statecore demo</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 58rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }}
pre {{ background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: 13px }}
.note {{ color: #666; font-size: 14px }}
</style></head><body>
<h1>From full attention to states</h1>
<p>{introduction}</p>
{tables}
<p class="note">{note}</p>
<h2>Accuracy by number of steps</h2><img alt="accuracy by number of steps" src="{accuracy}">
<h2>What one more token costs</h2><img alt="memory and time per token against length" src="{cost}">
<p class="note">{cost_note}</p>
<h2>Where the state goes</h2><img alt="states at step ends" src="{states}">
<p class="note">The states at the ends of the steps of a few problems, each layer in the plane of its two principal
components; the circle is the state after the prompt.</p>
<h2>A problem</h2>
<p>The task: {task}</p>
<pre>{example}</pre>
</body></html>
"""


def format_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Header and cells of the comparison at one number of steps."""
    table = [["", "exact answer", "KV + state", "ms per token"]]
    for row in rows:
        held = kilobytes(row["kv_bytes"] + row["state_bytes"])
        table.append([row["model"], f"{100 * row['accuracy']:.1f} %", held, f"{row['ms_per_token']:.2f}"])
    return table


def kilobytes(count: float) -> str:
    return f"{count / 1e3:,.0f} kB"


def draw_accuracy(rows: Sequence[dict[str, Any]], longest_trained: int) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="steps", ylabel="exact answers, %", ylim=(-3, 103))
    for name in COLOURS:
        own = [row for row in rows if row["model"] == name]
        values = [100 * row["accuracy"] for row in own]
        axes.plot([row["steps"] for row in own], values, marker=MARKERS[name], color=COLOURS[name], label=name)
    axes.axvline(longest_trained, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(" longest trained", (longest_trained, 2), fontsize=9)
    axes.set_xticks(sorted({row["steps"] for row in rows}))
    axes.legend(fontsize=9)
    return figure


def draw_cost(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    memory, time = figure.subplots(1, 2)
    memory.set(xlabel="tokens so far", ylabel="keys, values and states of a sequence", xscale="log", yscale="log")
    time.set(xlabel="tokens so far", ylabel="ms per token", xscale="log")
    lengths = sorted({row["length"] for row in rows})
    for name in (TEACHER, STUDENT):
        own = [row for row in rows if row["model"] == name]
        style = {"marker": MARKERS[name], "color": COLOURS[name], "label": name}
        memory.plot(lengths, [row["bytes"] for row in own], **style)
        time.plot(lengths, [row["ms_per_token"] for row in own], **style)
    memory.yaxis.set_major_formatter(FuncFormatter(lambda value, _: kilobytes(value)))
    time.set_ylim(bottom=0)
    for axes in (memory, time):
        axes.set_xticks(lengths, [str(length) for length in lengths], rotation=45)
        axes.minorticks_off()
    memory.legend(fontsize=9)
    return figure


def draw_states(places: Tensor, shares: Sequence[float]) -> Figure:
    """places: [layers, problems, steps + 1, 2] (see measure.state_trajectories)."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for layer, (axes, plane) in enumerate(zip(figure.subplots(1, len(places)), places, strict=True)):
        for number, path in enumerate(plane.numpy()):
            colour = f"C{number}"
            axes.plot(path[:, 0], path[:, 1], "-", color=colour, linewidth=0.8)
            axes.scatter(path[1:, 0], path[1:, 1], s=12, color=colour)
            axes.scatter(path[:1, 0], path[:1, 1], s=40, facecolors="white", edgecolors=colour, zorder=3)
            axes.annotate(str(len(path) - 1), path[-1], fontsize=8, color=colour)
        axes.set_title(f"layer {layer + 1}: {100 * shares[layer]:.0f} % of the variance", fontsize=10)
        axes.set(xticks=[], yticks=[])
    return figure


def write_page(output: Path, figures: dict[str, Figure], tables: dict[str, list[list[str]]], **texts: str) -> Path:
    """Writes every figure as a PNG and `index.html` with all of them inside. tables: by heading. texts: see PAGE."""
    images = {}
    for name, figure in figures.items():
        path = output / f"{name}.png"
        figure.savefig(path, dpi=120)
        images[name] = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    escaped = {name: html.escape(text) for name, text in texts.items()}
    page = PAGE.format(**images, **escaped, tables="".join(map(_html_table, tables, tables.values())))
    write_text(output / "index.html", page)
    return output / "index.html"


def _html_table(heading: str, cells: list[list[str]]) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in cells]
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    top = "".join(f"<th>{cell}</th>" for cell in head)
    return f"<h2>{html.escape(heading)}</h2><table><tr>{top}</tr>{rows}</table>\n"
