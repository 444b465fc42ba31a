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
BARS = {"segment": COMPARISON, "linear": COMPARISON, "peak": KERNEL}  # what is drawn of these sections


def draw(record: dict, folder: Path) -> None:
    """Writes the pictures whose rows are there."""
    rows = {name: [Row(**fields) for fields in section["rows"]] for name, section in record["sections"].items()}
    bars = [row for name, kind in BARS.items() for row in rows.get(name, []) if row.kind == kind and not row.failure]
    if bars:
        ratios(bars, folder / "cpu_ratios.png")
    if lines := [row for row in rows.get("growth", []) if row.direction == BY_LENGTH]:
        lengths(lines, folder / "cpu_lengths.png")


def ratios(rows: list[Row], path: Path) -> None:
    """One panel per question."""
    questions = list(dict.fromkeys(map(question, rows)))
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
    """One group of bars per heads and threads, dashed lines at the targets."""
    percent = 100 if rows[0].unit == "percent" else 1
    groups = list(dict.fromkeys(map(group, rows)))
    dtypes = list(dict.fromkeys(row.case["dtype"] for row in rows))
    width = 0.8 / len(dtypes)
    for place, dtype in enumerate(dtypes):
        own = [row for row in rows if row.case["dtype"] == dtype]
        at = [groups.index(group(row)) + (place - (len(dtypes) - 1) / 2) * width for row in own]
        bars = axis.bar(at, [row.value * percent for row in own], width, color=COLOURS.get(dtype))
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
    axis.set_xticks(range(len(groups)), groups, fontsize=8)


def lengths(rows: list[Row], path: Path) -> None:
    """Forward time against length, both axes logarithmic, one panel per operator."""
    operators = list(dict.fromkeys(row.operator for row in rows))
    size = (6 * len(operators), 4.4)
    figure, axes = plt.subplots(1, len(operators), figsize=size, constrained_layout=True, squeeze=False)
    for axis, operator in zip(axes.flat, operators, strict=True):
        own = [row for row in rows if row.operator == operator]
        styles = dict(zip(dict.fromkeys(row.what for row in own), STYLES, strict=False))
        for row in sorted(own, key=lambda row: list(styles).index(row.what)):
            times, dtype = [int(name.removeprefix("T = ")) for name in row.numbers], row.case["dtype"]
            taken, label = [seconds * 1e3 for seconds, _ in row.numbers.values()], f"{row.what}, {dtype}"
            axis.loglog(times, taken, styles[row.what], color=COLOURS.get(dtype), label=label)
        heads, threads = group(own[0]).split("\n")
        axis.set(title=f"{operator}, {heads} heads, {threads}", xlabel="tokens", ylabel="ms, forward")
        ticks = sorted({int(name.removeprefix("T = ")) for row in rows for name in row.numbers})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def group(row: Row) -> str:
    threads = row.case["threads"]
    return f"{row.case['heads']}\n{threads} thread{'s' if threads > 1 else ''}"
