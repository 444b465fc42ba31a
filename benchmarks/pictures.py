"""Pictures of the record: ratios with their targets, and time against length."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.page import question
from benchmarks.rows import Comparison, Point, Row, Share, from_json

COLOURS = {"float32": "tab:blue", "bfloat16": "tab:orange"}
STYLES = ("o-", "x--", "s:", "^-.")
RATIOS, LENGTHS = "cpu_ratios.png", "cpu_lengths.png"
PICTURED = ("segment", "linear", "peak")  # sections whose rows become bars


def draw(record: dict, folder: Path) -> None:
    """Writes the pictures whose rows are there."""
    rows = {
        name: [from_json(fields) for fields in section["rows"]] for name, section in record["sections"].items()
    }  # fmt: skip
    bars = [
        row
        for name in PICTURED
        for row in rows.get(name, [])
        if isinstance(row, (Comparison, Share)) and not row.failure
    ]
    if bars:
        ratios(bars, folder / RATIOS)
    points = [row for row in rows.get("growth", []) if isinstance(row, Point)]
    if points:
        lengths(points, folder / LENGTHS)


def ratios(rows: list[Row], path: Path) -> None:
    """One panel a question, one group of bars for heads and threads, dashed lines at the targets."""
    questions = list(dict.fromkeys(question(row) for row in rows))
    columns = min(4, len(questions))
    lines = -(-len(questions) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.2 * lines), constrained_layout=True, squeeze=False
    )
    for axis in axes.flat[len(questions) :]:
        axis.set_axis_off()
    for axis, asked in zip(axes.flat, questions, strict=False):
        panel(axis, asked, [row for row in rows if question(row) == asked])
    key = [Patch(color=colour, label=dtype) for dtype, colour in COLOURS.items()]
    key.append(Line2D([], [], color="black", linestyle="--", label="target (black: of both dtypes)"))
    figure.legend(handles=key, loc="outside lower center", ncols=len(key))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def panel(axis: Axes, asked: str, rows: list[Row]) -> None:
    percent = 100 if isinstance(rows[0], Share) else 1
    groups = list(dict.fromkeys((row.heads, row.threads) for row in rows))
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    width = 0.8 / len(dtypes)
    for place, dtype in enumerate(dtypes):
        shown = [row for row in rows if row.dtype == dtype]
        at = [groups.index((row.heads, row.threads)) + (place - (len(dtypes) - 1) / 2) * width for row in shown]
        bars = axis.bar(at, [row.value * percent for row in shown], width, color=COLOURS.get(dtype))
        axis.bar_label(bars, fmt="%.3g", fontsize=7)
    targets = {row.dtype: row.target for row in rows if row.target is not None}
    for dtype, aim in targets.items():
        shared = len(targets) > 1 and len(set(targets.values())) == 1
        axis.axhline(aim * percent, color="black" if shared else COLOURS.get(dtype), linestyle="--")
    axis.margins(y=0.12)
    if percent == 1:
        axis.axhline(1, color="black", linewidth=0.6)
    axis.set_title(asked.replace(", against", "\nagainst"), fontsize=9)
    axis.set_ylabel("% of the peak" if percent == 100 else "times faster", fontsize=8)
    axis.set_xticks(range(len(groups)), [f"{heads}\n{_threads(threads)}" for heads, threads in groups], fontsize=8)


def lengths(points: list[Point], path: Path) -> None:
    """Forward time against length, both axes logarithmic, one panel an operator."""
    operators = list(dict.fromkeys(point.operator for point in points))
    figure, axes = plt.subplots(
        1, len(operators), figsize=(6 * len(operators), 4.4), constrained_layout=True, squeeze=False
    )
    ticks = sorted({point.time for point in points})
    for axis, operator in zip(axes.flat, operators, strict=True):
        own = [point for point in points if point.operator == operator]
        for style, side in zip(STYLES, dict.fromkeys(point.side for point in own), strict=False):
            for dtype in dict.fromkeys(point.dtype for point in own):
                line = [point for point in own if (point.side, point.dtype) == (side, dtype)]
                axis.loglog(
                    [point.time for point in line], [point.seconds * 1e3 for point in line], style,
                    color=COLOURS.get(dtype), label=f"{side}, {dtype}",
                )  # fmt: skip
        axis.set(
            title=f"{operator}, {own[0].heads} heads, {_threads(own[0].threads)}", xlabel="tokens", ylabel="ms, forward"
        )
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
