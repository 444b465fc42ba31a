"""Pictures of the CPU's record: ratios with their targets, and time against length."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.cpu_limits import BY_LENGTH
from benchmarks.page import question
from benchmarks.record import COMPARISON, KERNEL, Row

COLOURS = {"float32": "tab:blue", "bfloat16": "tab:orange"}
STYLES = ("o-", "x--", "s:", "^-.")
RATIOS, LENGTHS = "cpu_ratios.png", "cpu_lengths.png"
BARS = {"segment": COMPARISON, "linear": COMPARISON, "peak": KERNEL}  # what is drawn of these sections


def draw(record: dict, folder: Path) -> None:
    """Writes the pictures whose rows are there."""
    rows = {name: [Row(**fields) for fields in section["rows"]] for name, section in record["sections"].items()}
    bars = [row for name, kind in BARS.items() for row in rows.get(name, []) if row.kind == kind and not row.failure]
    if bars:
        ratios(bars, folder / RATIOS)
    if lines := [row for row in rows.get("growth", []) if row.direction == BY_LENGTH]:
        lengths(lines, folder / LENGTHS)


def ratios(rows: list[Row], path: Path) -> None:
    """One panel per question, one group of bars per heads and threads, dashed lines at the targets."""
    questions = list(dict.fromkeys(question(row) for row in rows))
    columns = min(4, len(questions))
    lines = -(-len(questions) // columns)
    size = (4.2 * columns, 3.2 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, constrained_layout=True, squeeze=False)
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
    percent = 100 if rows[0].unit == "percent" else 1
    cases = {id(row): (row.case["heads"], row.case["threads"]) for row in rows}
    groups = list(dict.fromkeys(cases.values()))
    dtypes = list(dict.fromkeys(row.case["dtype"] for row in rows))
    width = 0.8 / len(dtypes)
    for place, dtype in enumerate(dtypes):
        shown = [row for row in rows if row.case["dtype"] == dtype]
        at = [groups.index(cases[id(row)]) + (place - (len(dtypes) - 1) / 2) * width for row in shown]
        bars = axis.bar(at, [row.value * percent for row in shown], width, color=COLOURS.get(dtype))
        axis.bar_label(bars, fmt="%.3g", fontsize=7)
    targets = {row.case["dtype"]: row.target for row in rows if row.target is not None}
    for dtype, aim in targets.items():
        shared = len(targets) > 1 and len(set(targets.values())) == 1
        axis.axhline(aim * percent, color="black" if shared else COLOURS.get(dtype), linestyle="--")
    axis.margins(y=0.12)
    if percent == 1:
        axis.axhline(1, color="black", linewidth=0.6)
    axis.set_title(asked.replace(", against", "\nagainst"), fontsize=9)
    axis.set_ylabel("% of the peak" if percent == 100 else "times faster", fontsize=8)
    axis.set_xticks(range(len(groups)), [f"{heads}\n{_threads(threads)}" for heads, threads in groups], fontsize=8)


def lengths(rows: list[Row], path: Path) -> None:
    """Forward time against length, both axes logarithmic, one panel per operator."""
    operators = list(dict.fromkeys(row.operator for row in rows))
    size = (6 * len(operators), 4.4)
    figure, axes = plt.subplots(1, len(operators), figsize=size, constrained_layout=True, squeeze=False)
    for axis, operator in zip(axes.flat, operators, strict=True):
        own = [row for row in rows if row.operator == operator]
        for style, side in zip(STYLES, dict.fromkeys(row.what for row in own), strict=False):
            for row in (row for row in own if row.what == side):
                times, taken = _tokens(row), [seconds * 1e3 for seconds, _ in row.numbers.values()]
                dtype = row.case["dtype"]
                axis.loglog(times, taken, style, color=COLOURS.get(dtype), label=f"{side}, {dtype}")
        title = f"{operator}, {own[0].case['heads']} heads, {_threads(own[0].case['threads'])}"
        axis.set(title=title, xlabel="tokens", ylabel="ms, forward")
        ticks = sorted({time for row in rows for time in _tokens(row)})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _tokens(row: Row) -> list[int]:
    return [int(name.removeprefix("T = ")) for name in row.numbers]


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
