"""Reports and pictures of `statecore metastable`: the made world, and the chain of real traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..figures import new_figure
from .algorithms import BaseModel, abscissa
from .chain import PatternChain
from .theory import World

# ----------------------------------------------------------------------------------------------------------------------
# The world


def world_text(result: Mapping[str, Any], fits: Mapping[str, Any]) -> str:
    shape, theory, score = result["settings"], result["path_theory"], result["search"]
    on_path = shape["graph"] == "path" and not shape["bidirectional"]
    lines = [
        "# A metastable world",
        "",
        f"{shape['clusters']} clusters of about {shape['size']} states, "
        f"{'two-way' if shape['bidirectional'] else 'forward'} {shape['graph']}, {score['sparse_edges']} sparse edges "
        f"of probability {shape['epsilon']}.",
        "",
        "| chain | expected steps, first to last cluster |" + (" a forward path's leading term |" if on_path else ""),
        "|---|---|" + ("---|" if on_path else ""),
    ]
    for name, steps in result["times"].items():
        lines.append(f"| {name} | {steps:,.1f} |" + (f" {theory.get(name, theory['plain']):,.1f} |" if on_path else ""))
    walks, learned, tuned = result["walks"], result["pretraining"], result["fine_tuning"]
    lines += [
        "",
        f"- walks: {walks['arrived']:,} of {walks['count']:,} arrived, {walks['mean']:,.1f} ± "
        f"{walks['standard_error']:.1f} steps",
        f"- pretraining: {learned['sparse_edges_kept']} of {score['sparse_edges']} sparse edges kept, "
        f"{learned['entries']} entries of {learned['true_entries']}; largest error {learned['largest_error'][-1]:.2g}",
        f"- search: {score['found']} of {score['sparse_edges']} found, {score['false_edges']} false, cluster estimate "
        f"exact in {score['clusters_exact']:.0%} of rounds, {score['steps']:,} steps",
        f"- PPO-Clip: {tuned['updates']} updates; laws inside clusters moved by {tuned['within_cluster_change']:.2g}",
        f"- distillation: escape law off by at most {result['distillation']['escape_error']:.2g}",
        "",
        "Fitted exponents (random rows, cluster sizes ± 20 % or more, 3 seeds; clusters counted as K - 1):",
        "",
        "| | clusters | size | epsilon |",
        "|---|---|---|---|",
    ]
    for name in ("plain", "raised", "distilled"):
        cells = [f"{fits[v][name]['exponent']:.3f} ± {fits[v][name]['half_width']:.3f}" for v in fits]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def draw_world(path: Path, world: World, model: BaseModel, times: Mapping[str, float]) -> None:
    """The kernel, the error of pretraining, and the expected times of the task."""
    figure = new_figure((13, 4))
    left, middle, right = figure.subplots(1, 3)
    with np.errstate(divide="ignore"):
        image = left.imshow(np.log10(world.kernel.toarray()), cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=left, label="log10 probability")
    left.set(
        title=f"{world.clusters} clusters, {len(world.edges)} sparse edges", xlabel="to state", ylabel="from state"
    )
    middle.loglog(model.steps, model.errors, ".-")
    middle.axvline(max(model.stage_1_steps, 1), color="gray", linestyle=":")
    middle.set(title="pretraining (dotted: entries pruned)", xlabel="gradient steps", ylabel="largest error")
    names = list(times)
    bars = right.barh(names, [times[name] for name in names], color="tab:blue")
    right.bar_label(bars, fmt="{:,.0f}", padding=3)
    right.set_xlim(right=4 * max(times.values()))
    right.set(xscale="log", title="expected steps, first to last cluster")
    right.invert_yaxis()
    figure.savefig(path, dpi=120)


def draw_warm_ups(path: Path, rows: Sequence[Mapping[str, Any]], chosen: int) -> None:
    """Recall and false edges of the search against the length of the warm-up."""
    figure = new_figure((6.5, 4))
    left = figure.add_subplot(xscale="log", xlabel="warm-up T_0, steps", ylabel="share")
    right = left.twinx()
    lengths = sorted({row["warm_up"] for row in rows})

    def mean(name: str) -> list[float]:
        return [float(np.mean([row[name] for row in rows if row["warm_up"] == t])) for t in lengths]

    lines = left.plot(lengths, mean("recall"), "o-", color="tab:blue", label="recall of sparse edges")
    lines += left.plot(lengths, mean("clusters_exact"), "^-", color="tab:green", label="cluster estimates exact")
    lines += right.plot(lengths, mean("false_edges"), "s--", color="tab:red", label="false edges (right)")
    left.axvline(chosen, color="gray", linestyle=":")
    left.set_ylim(0, 1.05)
    right.set_ylim(bottom=0)
    figure.legend(handles=lines, loc="outside upper center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)


def draw_scaling(path: Path, panels: Mapping[str, Sequence[Mapping[str, float]]], fits: Mapping[str, Any]) -> None:
    """Times against each varied parameter, with the fitted exponents."""
    figure = new_figure((4.5 * len(panels), 4))
    for axes, (vary, rows) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for name, mark in (("plain", "o"), ("raised", "s"), ("distilled", "^")):
            fit = fits[vary][name]
            label = f"{name}: {fit['exponent']:.2f} ± {fit['half_width']:.2f}"
            x = np.array([abscissa(vary, row) for row in rows])
            y = np.array([row[name] for row in rows])
            (points,) = axes.loglog(x, y, mark, markersize=5, label=label)
            constant = np.exp(np.log(y).mean() - fit["exponent"] * np.log(x).mean())
            axes.loglog(x, constant * x ** fit["exponent"], color=points.get_color(), linewidth=0.8)
        ticks = sorted({abscissa(vary, row) for row in rows})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel={"clusters": "clusters - 1", "size": "states in a cluster"}.get(vary, vary))
        axes.legend(title="exponent", fontsize="small")
    figure.axes[0].set_ylabel("expected steps")
    figure.savefig(path, dpi=120)


# ----------------------------------------------------------------------------------------------------------------------
# The chain of traces


SET_TITLES = {
    "chance": "Patterns that follow each other more often than independent draws would (slow modes of the chain)",
    "order": "Patterns that follow each other more often than in a random order of the same trace",
}


def traces_text(result: Mapping[str, Any]) -> str:
    data, rare = result["prepared"], result["rare"]
    lines = [
        "# The chain between thinking patterns",
        "",
        f"{data['traces']:,} traces, {data['steps']:,} steps, {data['transitions']:,} transitions; "
        f"{data['active_patterns']} of {data['patterns']} patterns reach each other "
        f"({data['transitions_between_active']:.1%} of the transitions).",
        "",
        f"Spectral gap {result['spectral_gap']:.3f}. Slowest implied time scale, in steps:",
        "",
        *_times_lines(result["time_scales"]),
        "",
        f"The same pattern comes twice in a row in {result['same_pattern_again']['share']:.1%} of the transitions, in "
        f"{result['same_pattern_again']['in_random_order']:.1%} with each trace in random order.",
        "",
        "## Metastable sets",
    ]
    for name in SET_TITLES:
        lines += ["", *_sets_lines(name, result)]
    lines += [
        "",
        "## Rare transitions",
        "",
        f"{rare['pairs']:.1%} of all pairs of patterns follow each other with a probability below {rare['below']:g}; "
        f"together they are {rare['transitions']:.1%} of the transitions. Among pairs across sets "
        + " and ".join(f"{result['sets'][name]['crossing_pairs_rare']:.1%} ({name})" for name in SET_TITLES)
        + " are that rare.",
        "",
        "## Right answers",
        "",
        *_outcome_lines(result.get("outcomes")),
    ]
    return "\n".join([*lines, ""])


def _times_lines(times: Mapping[str, Any]) -> list[str]:
    in_random_order, resampled = times["slowest_in_random_order"], times["slowest_resampled"]
    real_cells = [
        f"{scales[0]:.2f} ± {2 * deviation:.2f}"
        for scales, deviation in zip(times["time_scales"], resampled["deviation"], strict=True)
    ]
    random_cells = [
        f"{mean:.2f} ± {2 * deviation:.2f}"
        for mean, deviation in zip(in_random_order["mean"], in_random_order["deviation"], strict=True)
    ]
    return [
        "| lag | " + " | ".join(map(str, times["lags"])) + " |",
        "|---|" + "---|" * len(times["lags"]),
        f"| real order (± 2 deviations over resampled traces) | {' | '.join(real_cells)} |",
        f"| steps of each trace in random order | {' | '.join(random_cells)} |",
        "",
        "On a Markov chain the first row would not change with the lag; the second row is what differences between "
        "traces alone make.",
    ]


def _sets_lines(name: str, result: Mapping[str, Any]) -> list[str]:
    found = result["sets"][name]
    lines = [
        f"### {SET_TITLES[name]}",
        "",
        "| set | share of steps | mean position | next step in it | in random order | most frequent patterns |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['set']} ({len(row['patterns'])} patterns) | {row['share']:.1%} | {row['position']:.2f} "
        f"| {row['stay']:.1%} | {row['stay_in_random_order']:.1%} | {'; '.join(row['examples'])} |"
        for row in found["sets"]
    ]
    eigenvalues = ", ".join(f"{value:.3f}" for value in found["eigenvalues"])
    if name == "order":
        eigenvalues += f"; in random order at most {result['order_eigenvalue_in_random_order']:.3f}"
    again = found["found_again"]
    return [
        *lines,
        "",
        f"Leading eigenvalues {eigenvalues}. In resampled traces the sets come back with an adjusted Rand index of "
        f"{again['mean']:.2f} (least {again['least']:.2f}). {found['crossings']:.1%} of the transitions cross.",
    ]


def _outcome_lines(outcomes: Mapping[str, Any] | None) -> list[str]:
    if outcomes is None:
        return ["Not looked at: prepared data do not say which answers are right (give `outcomes`)."]
    known = (
        f"{outcomes['traces_with_an_outcome']:,} of {outcomes['traces']:,} traces say whether their answer is right; "
        f"{outcomes['right']:,} are."
    )
    if not outcomes["comparison"]:
        return [known, "No group has right and wrong answers, so nothing can be compared."]
    lines = [
        known,
        "",
        "Right minus wrong, within groups; then the same at equal length (p: reassignments of outcomes within groups).",
        "",
        "| of a trace | difference | p | at equal length | p |",
        "|---|---|---|---|---|",
    ]
    for name, row in outcomes["comparison"].items():
        equal = f"{row['given_length']:+.3g} | {row['p_given_length']:.2g}" if "given_length" in row else "|"
        lines.append(f"| {name.replace('_', ' ')} | {row['difference']:+.3g} | {row['p']:.2g} | {equal} |")
    groups = ", ".join(f"{g['group']} ({g['right']} right, {g['wrong']} wrong)" for g in outcomes["groups"])
    return [*lines, "", f"Groups: {groups}"]


def draw_chain(
    path: Path, chain: PatternChain, sets: Mapping[str, np.ndarray], counts: np.ndarray, lift: np.ndarray
) -> None:
    """How much likelier than by chance, and than in random order, each pattern follows each, sorted by set; and the
    successions that the order of steps favours most.
    """
    figure = new_figure((19, 6))
    by_chance, by_order, network = figure.subplots(1, 3)
    with np.errstate(divide="ignore", invalid="ignore"):
        lift_over_chance = chain.kernel / chain.stationary
    _draw_matrix(by_chance, chain, sets["chance"], lift_over_chance, "chance")
    active = np.ix_(chain.active, chain.active)
    image = _draw_matrix(by_order, chain, sets["order"], lift[active], "random order in each trace")
    figure.colorbar(image, ax=[by_chance, by_order], shrink=0.7)
    _draw_network(network, chain, sets["order"], counts, lift)
    figure.savefig(path, dpi=100)


def _draw_matrix(axes: Any, chain: PatternChain, labels: np.ndarray, lift: np.ndarray, against: str) -> Any:
    """log2 of the lift `[A, A]`, with lines between the sets."""
    order = np.lexsort((-chain.stationary, labels))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(lift > 0, np.log2(lift), np.nan)[np.ix_(order, order)]
    image = axes.imshow(values, cmap="RdBu_r", vmin=-4, vmax=4, interpolation="nearest")
    for edge in np.flatnonzero(np.diff(labels[order])) + 0.5:
        axes.axhline(edge, color="black", linewidth=0.8)
        axes.axvline(edge, color="black", linewidth=0.8)
    size = len(chain.active)
    if size <= 64:
        axes.set_xticks(range(size), chain.active[order], fontsize=6, rotation=90)
        axes.set_yticks(range(size), chain.active[order], fontsize=6)
    axes.set(xlabel="next pattern, by set", ylabel="pattern", title=f"log2 of frequency over {against}")
    return image


def _draw_network(axes: Any, chain: PatternChain, labels: np.ndarray, counts: np.ndarray, lift: np.ndarray) -> None:
    """Patterns on a circle, by set, and arrows for the most favoured successions, those between two sets in red."""
    order, size = np.lexsort((-chain.stationary, labels)), len(chain.active)
    active, labels = chain.active[order], labels[order]
    position = np.stack([f(2 * np.pi * np.arange(size) / size) for f in (np.cos, np.sin)], axis=1)
    gain = counts[np.ix_(active, active)] * (1 - 1 / np.maximum(lift[np.ix_(active, active)], 1))
    np.fill_diagonal(gain, 0)
    for at in np.argsort(gain, axis=None)[::-1][: 2 * size]:
        i, j = divmod(int(at), size)
        across = labels[i] != labels[j]
        axes.annotate(
            "", position[j], position[i], zorder=2 if across else 1,
            arrowprops={
                "arrowstyle": "-|>", "color": "tab:red" if across else "0.6", "alpha": 0.7, "shrinkA": 8, "shrinkB": 8,
                "linewidth": float(4 * gain[i, j] / gain.max()) + 0.3, "connectionstyle": "arc3,rad=0.2",
            },
        )  # fmt: skip
    area = 3_000 * counts[active].sum(1) / counts.sum() + 40
    axes.scatter(*position.T, s=area, c=labels, cmap="tab10", vmin=0, vmax=9, zorder=3)
    for name, (x, y) in zip(active, position, strict=True):
        axes.text(1.12 * x, 1.12 * y, str(name), ha="center", va="center", fontsize=7)
    axes.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal", title="favoured successions; red: between sets")
    axes.axis("off")


def draw_times(path: Path, times: Mapping[str, Any]) -> None:
    """Implied time scales against the lag, beside the slowest one with the steps in random order."""
    figure = new_figure((6.5, 4))
    axes = figure.add_subplot(xlabel="lag, steps", ylabel="implied time scale, steps")
    lags = times["lags"]
    for i in range(min(map(len, times["time_scales"]))):
        scale = [row[i] for row in times["time_scales"]]
        label = "real order, slowest first" if i == 0 else ""
        axes.plot(lags, scale, ".-", color="tab:blue", alpha=1 / (1 + i), label=label)
    for name, colour, label in (
        ("slowest_resampled", "tab:blue", None),
        ("slowest_in_random_order", "tab:orange", "random order, slowest"),
    ):
        mean, deviation = np.array(times[name]["mean"]), 2 * np.array(times[name]["deviation"])
        axes.fill_between(lags, mean - deviation, mean + deviation, color=colour, alpha=0.25)
        if label:
            axes.plot(lags, mean, "s--", color=colour, label=label)
    axes.plot(lags, lags, ":", color="gray", label="lag: shorter scales cannot be seen")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_outcomes(path: Path, outcomes: Mapping[str, Any]) -> None:
    """Mean of each feature for right and wrong traces, in each group that has both."""
    rows = [row for row in outcomes["groups"] if row["right"] and row["wrong"]]
    figure = new_figure((4 * len(outcomes["comparison"]), 0.6 * len(rows) + 2.2))
    panels = figure.subplots(1, len(outcomes["comparison"]), sharey=True, squeeze=False)[0]
    position = np.arange(len(rows))
    for axes, (feature, row) in zip(panels, outcomes["comparison"].items(), strict=True):
        axes.barh(position - 0.2, [r[f"{feature}_right"] for r in rows], 0.4, color="tab:green", label="right")
        axes.barh(position + 0.2, [r[f"{feature}_wrong"] for r in rows], 0.4, color="tab:red", label="wrong")
        axes.set(title=f"{feature.replace('_', ' ')} (p = {row['p']:.2g})")
    panels[0].set_yticks(position, [f"{r['group']}\n{r['right']} right, {r['wrong']} wrong" for r in rows], fontsize=8)
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
