"""`statecore metastable world`: a made world (metastable.py) and the paper's way through it, with pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..figures import new_figure
from ..outputs import new_folder, write_json
from .theory import (
    BaseModel,
    Dense,
    Graph,
    SearchBudget,
    World,
    chain_time,
    default_budget,
    distil,
    escape_law,
    fit_exponent,
    make_world,
    meta_chain,
    ppo_clip,
    pretrain,
    rescale,
    scaling,
    score_search,
    search,
    task_time,
    walk_until,
    warm_up_sweep,
    within_cluster_change,
)

# ----------------------------------------------------------------------------------------------------------------------
# The run


def world(
    output: str | Path,
    *,
    clusters: int = 8,
    size: int = 5,
    epsilon: float = 0.01,
    epsilon_max: float = 0.2,
    graph: Graph = "path",
    bidirectional: bool = False,
    sources: int = 1,
    spread: float = 0.0,
    dense: Dense = "uniform",
    degree: int = 3,
    walks: int = 10_000,
    samples: int | None = None,
    rounds: int | None = None,
    rollouts: int | None = None,
    warm_up: int | None = None,
    horizon: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes a metastable world and goes the paper's way through it: pretraining, search, fine-tuning, distillation.

    Writes world, search and scaling as pictures, each with its JSON, and a report. Returns what the report says.

    Args:
        output: the folder to write; it appears when everything is written.
        clusters: clusters of states (K), at least 2.
        size: states in a cluster (M).
        epsilon: probability of a sparse edge.
        epsilon_max: what search and fine-tuning raise it to.
        graph: which clusters are linked.
        bidirectional: links also lead back; on a path the walk then diffuses.
        sources: sparse edges a link.
        spread: cluster sizes vary by this share of the size.
        dense: rows inside a cluster, equal or random.
        degree: links out of a cluster of the expander.
        walks: walks that check the exact time, all at once.
        samples: transitions to pretrain on, in each stage; default K M^2 / epsilon^2.
        rounds: rounds of the search; default 4 K log K.
        rollouts: rollouts a round; default 2 log K, at least 5.
        warm_up: steps before a rollout may report; default 2 M log(K M).
        horizon: most steps of a rollout; default the warm-up and 2 M / epsilon.
        seed: of everything drawn.
        overwrite: replace such a folder that is there already.
    """
    if not epsilon < epsilon_max < 1:
        raise ValueError(f"epsilon_max: expected more than epsilon ({epsilon}) and less than 1, got {epsilon_max}")
    if walks < 2:
        raise ValueError(f"walks: expected 2 or more, got {walks}")
    shape = {"clusters": clusters, "size": size, "epsilon": epsilon, "graph": graph, "bidirectional": bidirectional}
    shape |= {"sources": sources, "spread": spread, "dense": dense, "degree": degree}
    place = make_world(**shape, seed=seed)
    budget = default_budget(clusters, size, epsilon)
    given = {"rounds": rounds, "rollouts": rollouts, "warm_up": warm_up, "horizon": horizon}
    if warm_up is not None and horizon is None:
        given["horizon"] = warm_up + math.ceil(2 * size / epsilon)
    budget = SearchBudget(**{name: getattr(budget, name) if v is None else v for name, v in given.items()})

    with new_folder(output, overwrite, marker="world.json") as folder, tqdm(total=7, desc="world") as bar:

        def done(stage: str) -> None:
            bar.set_postfix_str(stage)
            bar.update()

        exact = task_time(place.kernel, place.cluster)
        start = np.random.default_rng(seed).choice(np.flatnonzero(place.cluster == 0), walks)
        taken = walk_until(place.kernel, start, place.cluster == clusters - 1, math.ceil(50 * exact), seed=seed)
        arrived = taken[taken >= 0]
        done("walks")
        samples = math.ceil(clusters * size**2 / epsilon**2) if samples is None else samples
        model = pretrain(place.kernel, epsilon, samples=samples, seed=seed)
        learned = task_time(model.kernel, place.cluster)
        done("pretraining")
        found = search(model.kernel, budget, seed=seed)
        score = score_search(found, place)
        done("search")
        tuned = ppo_clip(model.kernel, found.edges, epsilon_max)
        done("PPO-Clip")
        scale = math.ceil(size / epsilon)
        logits = distil(model.kernel, place.cluster, walks=min(scale, 1_000), steps=scale, seed=seed)
        chain = rescale(logits, math.log(size / epsilon))
        done("distillation")
        times = {
            "plain": exact,
            "learned": learned,
            "fine-tuned": task_time(tuned.kernel, place.cluster),
            "distilled": chain_time(chain),
        }
        warm_ups = np.unique(np.geomspace(1, max(4 * size / epsilon, 2), 13).astype(int)).tolist()
        sweep = warm_up_sweep(place, model.kernel, budget, warm_ups, range(seed, seed + 3))
        done("warm-ups")
        uneven = shape | {"dense": "random", "spread": max(spread, 0.2)}
        choices = {
            "clusters": [4, 9, 16, 36, 64],
            "size": [size * m for m in (1, 2, 4, 8)],
            "epsilon": [epsilon * f for f in (1, 0.3, 0.1, 0.03)],
        }
        panels = {
            vary: scaling(vary, values, seeds=range(seed, seed + 3), epsilon_max=epsilon_max, **without(uneven, vary))
            for vary, values in choices.items()
        }
        done("scaling")
        result = {
            "settings": shape | {"epsilon_max": epsilon_max, "seed": seed, "search": vars(budget)},
            "times": times,
            "path_theory": {
                "plain": (clusters - 1) * size / epsilon,
                "fine-tuned": (clusters - 1) * size / epsilon_max,
                "distilled": 2 * (clusters - 1),
            },
            "walks": {
                "count": walks,
                "arrived": len(arrived),
                "mean": float(arrived.mean()),
                "standard_error": float(arrived.std(ddof=1) / math.sqrt(len(arrived))),
            },
            "pretraining": {
                "stage_1_steps": model.stage_1_steps,
                "steps": model.steps,
                "largest_error": model.errors,
                "sparse_edges_kept": int((model.kernel[tuple(place.edges.T)] > 0).sum()),
                "entries": model.kernel.nnz,
                "true_entries": place.kernel.nnz,
            },
            "search": score,
            "fine_tuning": {
                "updates": tuned.updates,
                "within_cluster_change": within_cluster_change(model.kernel, tuned.kernel, place.cluster),
            },
            "distillation": {
                "escape_error": float(
                    np.abs(escape_law(chain) - escape_law(meta_chain(place.kernel, place.cluster))).max()
                )
            },
        }
        fits = fit_scaling(panels)
        write_json(folder / "world.json", result)
        draw_world(folder / "world.png", place, model, times)
        write_json(folder / "search.json", {"settings": result["settings"], "warm_ups": sweep})
        draw_warm_ups(folder / "search.png", sweep, budget.warm_up)
        write_json(folder / "scaling.json", {"settings": result["settings"], "exponents": fits, "rows": panels})
        draw_scaling(folder / "scaling.png", panels, fits)
        text = _world_text(result, fits)
        (folder / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return result | {"exponents": fits}


def without(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}


def _world_text(result: Mapping[str, Any], fits: Mapping[str, Any]) -> str:
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


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


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
            x = np.array([_abscissa(vary, row) for row in rows])
            y = np.array([row[name] for row in rows])
            (points,) = axes.loglog(x, y, mark, markersize=5, label=label)
            constant = np.exp(np.log(y).mean() - fit["exponent"] * np.log(x).mean())
            axes.loglog(x, constant * x ** fit["exponent"], color=points.get_color(), linewidth=0.8)
        ticks = sorted({_abscissa(vary, row) for row in rows})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel={"clusters": "clusters - 1", "size": "states in a cluster"}.get(vary, vary))
        axes.legend(title="exponent", fontsize="small")
    figure.axes[0].set_ylabel("expected steps")
    figure.savefig(path, dpi=120)


def fit_scaling(panels: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """`fit_exponent` of each time in each panel of `scaling` rows; clusters count as K - 1, the hops of a path."""
    return {
        vary: {
            name: fit_exponent(
                [_abscissa(vary, row) for row in rows], [row[name] for row in rows], [row["seed"] for row in rows]
            )
            for name in ("plain", "raised", "distilled")
        }
        for vary, rows in panels.items()
    }


def _abscissa(vary: str, row: Mapping[str, float]) -> float:
    return row[vary] - 1 if vary == "clusters" else row[vary]
