"""Recorded state dynamics and pruned models for people: pictures with their data as JSON, and reports in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..figures import new_figure
from ..outputs import write_json
from .recording import EPSILON, Trajectory

# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_heads(path: Path, summary: Mapping[str, Any]) -> None:
    """Mean effective rank (share of the largest possible) and mean nuclear norm by layer and head; a histogram of final
    ranks.
    """
    heads = summary["heads"]
    layers = sorted({head["layer"] for head in heads})
    grids = {
        "mean effective rank / d": lambda head: head["rank"] / head["bound"],
        "mean nuclear norm, log10": lambda head: math.log10(max(head["nuclear"], 1e-12)),
    }
    figure = new_figure((13, 1.6 + max(2.4, 0.25 * len(layers))))
    *panels, histogram = figure.subplots(1, 3)
    for axes, (title, value) in zip(panels, grids.items(), strict=True):
        grid = np.full((len(layers), 1 + max(head["head"] for head in heads)), np.nan)
        for head in heads:
            grid[layers.index(head["layer"]), head["head"]] = value(head)
        limits = {"vmin": 0, "vmax": 1} if "rank" in title else {}
        image = axes.imshow(grid, cmap="viridis", interpolation="nearest", aspect="auto", **limits)
        axes.set(title=title, xlabel="head", ylabel="layer")
        axes.set_yticks(range(len(layers)), layers)
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes)
    found = summary["stratification"]["at_the_end"]
    histogram.hist([head["last_fraction"] for head in heads], bins=np.linspace(0, 1, 21), color="tab:blue")
    if found["threshold"] is not None:
        histogram.axvline(found["threshold"], color="tab:red", linestyle="--")
    shown = "all equal" if found["gap"] is None else f"two classes {found['gap']:.2f} apart"
    histogram.set(title=f"at the end: {shown}", xlabel="effective rank / d", ylabel="heads", xlim=(0, 1))
    figure.savefig(path, dpi=120)
    write_json(path.with_suffix(".json"), {"heads": heads, "stratification": summary["stratification"]})


def draw_trajectories(path: Path, trajectory: Trajectory) -> None:
    """Rank and nuclear norm of every head over the tokens of one input; dotted lines mark step ends."""
    figure = new_figure((12, 4))
    colours = _layer_colours(trajectory)
    norms = trajectory.values["nuclear"]
    panels = {"effective rank / d": trajectory.fractions, "nuclear norm": norms}
    for axes, (title, values) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for i, head in enumerate(trajectory.heads):
            axes.plot(trajectory.positions, values[:, i], color=colours[head.layer], linewidth=0.8, alpha=0.8)
        for position in trajectory.positions[trajectory.is_step_end]:
            axes.axvline(position, color="gray", linestyle=":", linewidth=0.5)
        axes.set(xscale="log", xlabel="tokens read", ylabel=title)
    figure.axes[1].set_yscale("log" if (norms > 0).all() else "linear")
    figure.suptitle(f"{trajectory.name}: one line per head, coloured by layer (dark: first)", fontsize="medium")
    figure.savefig(path, dpi=120)
    write_json(path.with_suffix(".json"), _trajectory_record(trajectory))


def draw_spectra(path: Path, trajectory: Trajectory, epsilon: float = EPSILON) -> None:
    """Singular values of every head after the last token, as a share of the largest."""
    figure = new_figure((6.5, 4.2))
    axes = figure.add_subplot(yscale="log", xlabel="number of the singular value", ylabel="singular value / largest")
    colours = _layer_colours(trajectory)
    heads = list(zip(trajectory.heads, trajectory.spectra, strict=True))
    for head, sigma in heads:
        if sigma[0] > 0:
            share = np.maximum(sigma / sigma[0], 1e-9)
            axes.plot(range(1, len(sigma) + 1), share, color=colours[head.layer], linewidth=0.8)
    axes.axhline(epsilon, color="tab:red", linestyle="--", linewidth=1)
    tokens = int(trajectory.positions[-1])
    axes.set_title(f"{trajectory.name}, {tokens} tokens (dashed: counted as rank above)", fontsize="medium")
    figure.savefig(path, dpi=120)
    rows = [{"layer": head.layer, "head": head.head, "singular_values": sigma.tolist()} for head, sigma in heads]
    write_json(path.with_suffix(".json"), {"name": trajectory.name, "tokens": tokens, "heads": rows})


def draw_variants(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Held-out loss, bytes of state and milliseconds per token of a model and its pruned variants."""
    figure = new_figure((12, 1.2 + 0.35 * len(rows)))
    names = [row["model"] for row in rows]
    units = {"loss": "held-out loss, nats per token", "state_bytes": "bytes of state", "ms": "ms per decoded token"}
    for axes, (key, title) in zip(figure.subplots(1, 3, sharey=True), units.items(), strict=True):
        bars = axes.barh(names, [row[key] for row in rows], color=["tab:gray", *["tab:blue"] * (len(rows) - 1)])
        axes.bar_label(bars, fmt="{:,.0f}" if key == "state_bytes" else "{:.3f}", padding=3, fontsize="small")
        axes.set_title(title, fontsize="medium")
        axes.margins(x=0.25)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def _trajectory_record(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "name": trajectory.name,
        "heads": [{"layer": head.layer, "head": head.head, "bound": head.bound} for head in trajectory.heads],
        "positions": trajectory.positions.tolist(),
        "is_step_end": trajectory.is_step_end.tolist(),
        **{name: values.tolist() for name, values in trajectory.values.items()},
    }


def _layer_colours(trajectory: Trajectory) -> dict[int, Any]:
    from matplotlib import colormaps

    layers = sorted({head.layer for head in trajectory.heads})
    return {layer: colormaps["viridis"](0.9 * i / max(len(layers) - 1, 1)) for i, layer in enumerate(layers)}


# ----------------------------------------------------------------------------------------------------------------------
# Reports


def dynamics_text(result: Mapping[str, Any]) -> str:
    """The report of `statecore dynamics record`, in Markdown."""
    inputs, heads = result["inputs"], result["heads"]
    tokens = sum(entry["tokens"] for entry in inputs)
    steps = sum(entry["steps"] for entry in inputs)
    lines = [
        "# State dynamics",
        "",
        f"{len(heads)} heads in {len({head['layer'] for head in heads})} layers with states, {len(inputs)} inputs of "
        f"{tokens} tokens and {steps} step ends in all. Effective rank: singular values above "
        f"{result['settings'].get('epsilon', EPSILON):g} of the largest.",
        "",
        "| heads' ranks, as shares of d | below 10 % | above 90 % | bimodality (uniform 0.56, two points 1) | variance "
        "between two classes | means of these apart |",
        "|---|---|---|---|---|---|",
    ]
    for title, found in (("mean over places", "mean"), ("behind the last token", "at_the_end")):
        row = result["stratification"][found]
        lines.append(
            f"| {title} | {row['low']:.0%} | {row['saturated']:.0%} | {number(row['coefficient'])} | "
            f"{number(row['between'])} | {number(row['gap'])} |"
        )
    lines += ["", "| | rank: Spearman | cosine | nuclear norm: Spearman | cosine |", "|---|---|---|---|---|"]
    for title, found in ((_early_to_late(result), "early_to_late"), ("one input to another", "across_inputs")):
        row = result[found]
        cells = [number(row[measured][kind]) for measured in ("rank", "nuclear") for kind in ("spearman", "cosine")]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "(-: cannot be said, because all values are equal or there is one input.)", ""])


def _early_to_late(result: Mapping[str, Any]) -> str:
    places = {(entry["early"], entry["late"]) for entry in result["early_to_late"]["inputs"]}
    return "token {} to {}".format(*places.pop()) if len(places) == 1 else "early to late"


def variants_text(title: str, rows: Sequence[Mapping[str, Any]], remarks: Sequence[str]) -> str:
    """The report of `statecore dynamics prune` and `lower`, in Markdown."""
    return "\n".join([title, "", *_variants_table(rows), "", *remarks, ""])


def _variants_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| model | loss, nats per token | perplexity | next token right | state, bytes | ms per token | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['loss']:.4f} | {row['perplexity']:.3f} | {row['accuracy']:.1%} | "
        f"{row['state_bytes']:,} | {row['ms']:.2f} | {row['parameters']:,} |"
        for row in rows
    ]
    return lines


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
