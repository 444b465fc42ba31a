"""The metastable world of arXiv 2502.01694: do its rates show, where do they break, and what do real traces look like?

    python -m benchmarks.papers.metastable --prepared prepared --outcomes traces.jsonl.gz

writes benchmarks/results/papers/metastable.{md,json,png} and metastable_traces.png, 1 to 3 minutes on one core.
`prepared` is a folder of `statecore prepare`; without it the part on real traces is left out and said to be.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from benchmarks.machine import versions
from statecore import metastable as m
from statecore.metastable.chain import OutcomeOptions
from statecore.metastable.traces_command import traces

RESULTS = Path(__file__).parents[1] / "results" / "papers"
EPSILON_MAX = 0.2
UNEVEN = {"dense": "random", "spread": 0.2}  # a real test of the rates: equal rows follow them by a closed form
TIMES = ("plain", "raised", "distilled")


def closed_forms() -> list[dict[str, float]]:
    rows = []
    for clusters, size, epsilon in (
        (4, 5, 1e-2),
        (8, 5, 1e-2),
        (16, 5, 1e-2),
        (8, 10, 1e-2),
        (8, 5, 1e-3),
        (8, 5, 1e-4),
    ):
        times = m.expected_times(m.make_world(clusters, size, epsilon), EPSILON_MAX)
        rows.append({"clusters": clusters, "size": size, "epsilon": epsilon, **times})
    return rows


def fits(rows: Sequence[dict[str, float]], vary: str, names: Sequence[str]) -> dict[str, Any]:
    """Exponents of some columns in the varied one; clusters count as K - 1, the hops of a path."""
    x = [row[vary] - (vary == "clusters") for row in rows]
    return {name: m.fit_exponent(x, [row[name] for row in rows], [row["seed"] for row in rows]) for name in names}


def growth() -> dict[str, Any]:
    """Exact times over each parameter, on forward paths."""
    base = {"clusters": 8, "size": 10, "epsilon": 1e-2} | UNEVEN
    choices = {"clusters": (4, 9, 16, 36, 64), "size": (5, 10, 20, 40, 80), "epsilon": (1e-1, 1e-2, 1e-3, 1e-4)}
    result = {}
    for vary, values in choices.items():
        fixed = {name: value for name, value in base.items() if name != vary}
        rows = m.scaling(vary, values, seeds=range(5), epsilon_max=EPSILON_MAX, **fixed)
        result[vary] = {"rows": rows, "exponents": fits(rows, vary, TIMES)}
    return result


def graphs() -> list[dict[str, Any]]:
    """Exponents in K over meta-graphs, one-way and two-way."""
    result = []
    for graph in ("path", "grid", "expander"):
        for bidirectional in (False, True):
            fixed = {"size": 10, "epsilon": 1e-2, "graph": graph, "bidirectional": bidirectional} | UNEVEN
            rows = m.scaling("clusters", (4, 9, 16, 36, 64), seeds=range(5), epsilon_max=EPSILON_MAX, **fixed)
            exponents = fits(rows, "clusters", TIMES)
            less = [row | {name: row[name] / math.log(row["clusters"]) for name in TIMES} for row in rows]
            result.append(
                {
                    "graph": graph,
                    "bidirectional": bidirectional,
                    "rows": rows,
                    "exponents": exponents,
                    "exponents_without_a_logarithm": fits(less, "clusters", TIMES),
                }
            )
    return result


def many_walks() -> dict[str, float]:
    """10^5 walks at once against the exact time."""
    world = m.make_world(8, 5, 0.02)
    start = np.random.default_rng(0).integers(5, size=100_000)
    began = time.perf_counter()
    taken = m.walk_until(world.kernel, start, world.cluster == 7, 100_000)
    seconds = time.perf_counter() - began
    error = taken.std(ddof=1) / math.sqrt(len(taken))
    exact = m.task_time(world.kernel, world.cluster)
    return {
        "walks": len(taken),
        "mean": float(taken.mean()),
        "standard_error": float(error),
        "exact": exact,
        "unfinished": int((taken < 0).sum()),
        "million_steps_a_second": float(taken.sum() / seconds / 1e6),
    }


def pretraining() -> dict[str, Any]:
    """Errors with and without pruning at exact gradients; sparse edges kept against the size of the sample."""
    world = m.make_world(8, 5, 0.01)
    curves = {}
    for name, threshold in (("pruned", None), ("not pruned", 0.0)):
        model = m.pretrain(world.kernel, 0.01, threshold=threshold)
        curves[name] = {"steps": model.steps, "errors": model.errors}
    kept = []
    for epsilon in tqdm((0.03, 0.01, 0.003), desc="samples"):
        for share in (1, 3, 10, 30, 100, 300):
            for seed in range(3):
                world = m.make_world(8, 5, epsilon, seed=seed)
                samples = round(share * 8 * 5 / epsilon)
                kernel = m.pretrain(world.kernel, epsilon, samples=samples, seed=seed).kernel
                edges = float((kernel[tuple(world.edges.T)] > 0).mean())
                wrong = int(((kernel > 0) > (world.kernel > 0)).nnz)
                kept.append({"epsilon": epsilon, "samples_over_KM_epsilon": share, "seed": seed, "kept": edges,
                             "wrong_entries": wrong, "share_of_paper": samples / (8 * 25 / epsilon**2)})  # fmt: skip
    return {"curves": curves, "samples": kept}


def searching() -> dict[str, Any]:
    """Warm-ups at one size, and recall and cost of the default budget over K, M and epsilon, two-way paths."""
    world = m.make_world(8, 5, 0.01, bidirectional=True)
    budget = m.default_budget(8, 5, 0.01)
    warm_ups = [1, 2, 4, 6, 9, 14, 25, 56, 120, 250, 500, 1000, 2000]
    sweep = m.warm_up_sweep(world, world.kernel, budget, warm_ups, range(5))
    base = {"clusters": 8, "size": 5, "epsilon": 1e-2}
    cost = {}
    choices = {"clusters": (4, 8, 16, 32, 64), "size": (5, 10, 20, 40), "epsilon": (1e-2, 3e-3, 1e-3, 3e-4)}
    for vary, values in choices.items():
        rows = []
        for value in tqdm(values, desc=f"search over {vary}"):
            for seed in range(3):
                shape = base | {vary: value}
                world = m.make_world(**shape, bidirectional=True, seed=seed)
                budget = m.default_budget(**shape)
                found = m.search(world.kernel, budget, seed=seed)
                true = np.isin(found.edges @ [10**6, 1], world.edges @ [10**6, 1])
                ends = 1 + 2 / shape["clusters"]  # mean escape time of a two-way path over that of an inner cluster
                walked = found.steps - budget.rounds * budget.rollouts * budget.warm_up
                rows.append({vary: value, "seed": seed} | m.score_search(found, world) | {
                    "bare_steps": walked / (budget.rollouts * math.log(shape["clusters"]) * ends),
                    "reports_of_true_edges": float(np.median(found.reports[true])),
                    "reports_of_false_edges": float(np.median(found.reports[~true])) if (~true).any() else None,
                    "false_reported_once": int((found.reports[~true] == 1).sum()),
                })  # fmt: skip
        cost[vary] = {"rows": rows, "exponents": fits(rows, vary, ["steps", "bare_steps"])}
    return {"budget": vars(budget), "warm_ups": sweep, "cost": cost}


def tuning() -> list[dict[str, Any]]:
    """The whole way on learned models: pretrain, search, PPO-Clip, distil, over epsilon."""
    rows = []
    for epsilon in (3e-2, 1e-2, 3e-3):
        for seed in range(3):
            world = m.make_world(8, 5, epsilon, seed=seed)
            samples = math.ceil(8 * 25 / epsilon**2)
            model = m.pretrain(world.kernel, epsilon, samples=samples, seed=seed).kernel
            found = m.search(model, m.default_budget(8, 5, epsilon), seed=seed)
            tuned = m.ppo_clip(model, found.edges, EPSILON_MAX)
            scale = math.ceil(5 / epsilon)
            logits = m.distil(model, world.cluster, walks=scale, steps=scale, seed=seed)
            rescaled = m.rescale(logits, math.log(5 / epsilon))
            beta = math.log(5 / epsilon)
            with np.errstate(invalid="ignore"):  # the other reading: the logit itself times beta
                times = np.where(np.eye(8, dtype=bool), logits, logits * beta)
            multiplied = torch.softmax(torch.from_numpy(times), 1).numpy()
            hops = 1 / multiplied[np.arange(7), np.arange(1, 8)]  # a linear solve would not see them beside 1
            rows.append({
                "epsilon": epsilon, "seed": seed, **m.score_search(found, world), "updates": tuned.updates,
                "plain": m.task_time(world.kernel, world.cluster), "tuned": m.task_time(tuned.kernel, world.cluster),
                "within": m.within_cluster_change(model, tuned.kernel, world.cluster),
                "distilled": m.chain_time(rescaled), "distilled_by_multiplying": float(hops.sum()),
            })  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# The section


def mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def exponent(fit: dict[str, float]) -> str:
    return f"{fit['exponent']:+.3f} ± {fit['half_width']:.3f}"


def verdict(fit: dict[str, float], paper: float) -> str:
    """Whether the paper's exponent is within the fit's interval, or within 0.05, less than a logarithm would make."""
    return "yes" if abs(fit["exponent"] - paper) <= max(fit["half_width"], 0.05) else "no"


def standing(row: dict[str, Any]) -> str:
    """What becomes of plain time K M / epsilon and distilled time K on a meta-graph."""
    exact, less = (row[name] for name in ("exponents", "exponents_without_a_logarithm"))
    if all(verdict(exact[name], 1) == "yes" for name in ("plain", "distilled")):
        return "hold"
    if all(exact[name]["exponent"] < 1 or verdict(exact[name], 1) == "yes" for name in ("plain", "distilled")):
        return "hold as bounds"
    if all(less[name]["exponent"] < 1 or verdict(less[name], 1) == "yes" for name in ("plain", "distilled")):
        return "hold with a factor log K"
    return "broken"


def draw(path: Path, result: dict[str, Any]) -> None:
    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    labels = {"clusters": "clusters - 1", "size": "states in a cluster", "epsilon": "epsilon"}
    for ax, (vary, panel) in zip(axes, result["growth"].items(), strict=False):
        for name, mark in zip(TIMES, "os^", strict=True):
            x = [row[vary] - (vary == "clusters") for row in panel["rows"]]
            label = f"{name}: {exponent(panel['exponents'][name])}"
            ax.loglog(x, [row[name] for row in panel["rows"]], mark, markersize=4, label=label)
        ax.set(xlabel=labels[vary], ylabel="expected steps", title="forward path")
        ticks = sorted({row[vary] - (vary == "clusters") for row in panel["rows"]})
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.legend(fontsize=8, title="exponent")
    for row, colour in zip(result["graphs"], np.repeat(["tab:blue", "tab:orange", "tab:green"], 2), strict=True):
        x = sorted({r["clusters"] - 1 for r in row["rows"]})
        y = [mean([r for r in row["rows"] if r["clusters"] - 1 == k], "plain") for k in x]
        name = f"{row['graph']}, {'two-way' if row['bidirectional'] else 'forward'}"
        label = f"{name}: {row['exponents']['plain']['exponent']:.2f}"
        axes[3].loglog(x, y, "s--" if row["bidirectional"] else "o-", color=colour, markersize=4, label=label)
    axes[3].set_xticks(x, [f"{tick:g}" for tick in x])
    axes[3].minorticks_off()
    axes[3].set(xlabel="clusters - 1", ylabel="expected steps", title="meta-graphs")
    axes[3].legend(fontsize=8, title="exponent")
    for name, curve in result["pretraining"]["curves"].items():
        axes[4].semilogy(curve["steps"], curve["errors"], ".-", markersize=4, label=name)
    axes[4].set(xlabel="gradient steps", ylabel="largest error", title="pretraining, exact gradient")
    axes[4].legend(fontsize=8)
    sweep = result["search"]["warm_ups"]
    lengths = sorted({row["warm_up"] for row in sweep})
    right = axes[5].twinx()
    lines = []
    for ax, name, style, label in (
        (axes[5], "recall", "o-b", "recall"), (axes[5], "clusters_exact", "^-g", "cluster estimate exact"),
        (right, "false_edges", "s--r", "false edges (right)"),
    ):  # fmt: skip
        y = [mean([row for row in sweep if row["warm_up"] == t], name) for t in lengths]
        lines += ax.semilogx(lengths, y, style, markersize=4, label=label)
    axes[5].set(xlabel="warm-up T_0, steps", ylabel="share", title="search, two-way path", ylim=(0, 1.05))
    right.set_ylim(bottom=0)
    axes[5].legend(handles=lines, fontsize=8, loc="center")
    figure.savefig(path, dpi=110)


def page(result: dict[str, Any], real_text: str | None) -> str:
    grown, walks, cost = result["growth"], result["walks"], result["search"]["cost"]
    lines = [
        "# Metastable dynamics (arXiv 2502.01694)",
        "",
        "Command: `python -m benchmarks.papers.metastable --prepared prepared --outcomes traces.jsonl.gz`, where "
        "`prepared` "
        "comes from `statecore prepare traces.jsonl.gz prepared --tokenizer TOKENIZER --patterns 32`.",
        "Machine: " + "; ".join(f"{name}: {value}" for name, value in versions().items())
        + f"; one thread; {result['seconds']:.0f} s.",
        "",
        "The paper has no experiments; its rates hold up to logarithms. Times are exact solutions of linear systems "
        "unless "
        f"they say otherwise, epsilon_max is {EPSILON_MAX}, rows inside clusters are random and cluster sizes vary by "
        "± 20 %, five seeds; ± is the 95 % interval of a fit of logarithms with a constant for each seed. Clusters "
        "count as K - 1.",
        "",
        "![rates, meta-graphs, pretraining, search](metastable.png)",
        "",
        "## Rates on a forward path",
        "",
        "| expected time | in | paper's exponent | fitted | reproduces |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    claims = {
        "plain": ("plain reasoning, K M / epsilon", {"clusters": 1, "size": 1, "epsilon": -1}),
        "raised": ("sparse edges at epsilon_max, K M / epsilon_max", {"clusters": 1, "size": 1, "epsilon": 0}),
        "distilled": ("distilled and rescaled, K", {"clusters": 1, "size": 0, "epsilon": 0}),
    }
    for name, (title, expected) in claims.items():
        for vary, value in expected.items():
            fit = grown[vary]["exponents"][name]
            lines.append(f"| {title} | {vary} | {value:+d} | {exponent(fit)} | {verdict(fit, value)} |")
    for vary, value in {"clusters": 1, "size": 1, "epsilon": -1}.items():
        fit = cost[vary]["exponents"]["bare_steps"]
        lines.append(f"| search, bare steps | {vary} | {value:+d} | {exponent(fit)} | {verdict(fit, value)} |")
    whole = {vary: part["exponents"]["steps"] for vary, part in cost.items()}
    largest = max(row["epsilon"] for row in cost["epsilon"]["rows"])
    rarer = [row for row in cost["epsilon"]["rows"] if row["epsilon"] < largest]
    narrow = fits(rarer, "epsilon", ["bare_steps"])["bare_steps"]
    lines += [
        "",
        "Bare steps of the search are those after the warm-up, for one of its N = 2 log K rollouts and divided by the "
        "log K in R = 4 K log K rounds, and by 1 + 2 / K, as the end clusters of its two-way path have one exit and "
        "the others two. At the largest epsilon the warm-up is not short beside an escape, which flattens that "
        f"exponent; without it, it is {exponent(narrow)}. Counted whole, the exponents of the steps are "
        + ", ".join(f"{exponent(fit)} ({vary})" for vary, fit in whole.items())
        + ".",
    ]
    lines += [
        "",
        "With equal rows the leading terms are met closely:",
        "",
        "| K | M | epsilon | plain | (K-1) M / epsilon | raised | (K-1) M / epsilon_max | distilled | 2 (K-1) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["closed_forms"]:
        hops, size = row["clusters"] - 1, row["size"]
        lines.append(
            f"| {row['clusters']} | {size} | {row['epsilon']:g} | {row['plain']:,.1f} | "
            f"{hops * size / row['epsilon']:,.0f} "
            f"| {row['raised']:.1f} | {hops * size / EPSILON_MAX:.0f} | {row['distilled']:.2f} | {2 * hops} |"
        )
    lines += [
        "",
        f"{walks['walks']:,} walks at once took {walks['mean']:,.1f} ± {walks['standard_error']:.1f} (standard error) "
        "steps, "
        f"exact {walks['exact']:,.1f}, at {walks['million_steps_a_second']:.0f} million steps per second.",
        "",
        "## Where links lead back",
        "",
        "Exponent of the expected time in K - 1, by meta-graph:",
        "",
        "| meta-graph | plain | raised | distilled | K M / epsilon and K |",
        "|---|---|---|---|---|",
    ]
    for row in result["graphs"]:
        fit = row["exponents"]
        lines.append(
            f"| {row['graph']}, {'two-way' if row['bidirectional'] else 'forward'} | "
            + " | ".join(exponent(fit[name]) for name in TIMES)
            + f" | {standing(row)} |"
        )
    two_way = next(row for row in result["graphs"] if row["graph"] == "path" and row["bidirectional"])
    lines += [
        "",
        f"On a two-way path the walk diffuses: exponent {exponent(two_way['exponents']['plain'])}, so neither "
        "theorem's "
        "rate holds there, for the distilled chain as little as for the plain one. The paper's condition that excludes "
        "this could not be read. A two-way expander does not diffuse, and K M / epsilon bounds it although its "
        "shortest "
        "ways have only about log K sparse edges (assumption A3 asks for about K).",
        "",
        "## Pretraining",
        "",
    ]
    curves = result["pretraining"]["curves"]
    lines.append(
        f"With exact gradients the largest error after {curves['pruned']['steps'][-1]:,} steps is "
        f"{curves['pruned']['errors'][-1]:.1e} where small entries were pruned, "
        f"{curves['not pruned']['errors'][-1]:.1e} "
        "where not: what never occurs decays as 1 / steps, the rest exponentially. Sparse edges kept and wrong "
        "entries, "
        "against the number of sampled transitions (K = 8, M = 5, threshold epsilon / 2, three seeds):"
    )
    kept = result["pretraining"]["samples"]
    shares = sorted({row["samples_over_KM_epsilon"] for row in kept})
    lines += [
        "",
        "| samples / (K M / epsilon) | " + " | ".join(map(str, shares)) + " |",
        "|---|" + "---|" * len(shares),
    ]
    for epsilon in sorted({row["epsilon"] for row in kept}, reverse=True):
        own = [[r for r in kept if (r["epsilon"], r["samples_over_KM_epsilon"]) == (epsilon, s)] for s in shares]
        cells = [f"{mean(rows, 'kept'):.0%}, {mean(rows, 'wrong_entries'):.1f} wrong" for rows in own]
        lines.append(f"| epsilon = {epsilon:g} | " + " | ".join(cells) + " |")
    smallest = min(row["epsilon"] for row in kept)
    enough = min(
        (s for s in shares if mean([r for r in kept if r["samples_over_KM_epsilon"] == s], "kept") > 0.99), default=None
    )
    if enough is not None:
        part = mean(
            [r for r in kept if (r["epsilon"], r["samples_over_KM_epsilon"]) == (smallest, enough)], "share_of_paper"
        )
        lines += [
            "",
            f"{enough} K M / epsilon transitions keep more than 99 % of the sparse edges at every epsilon: at "
            f"{smallest:g} that "
            f"is {part:.0%} of the paper's K M^2 / epsilon^2, which is enough and not needed here, where transitions "
            "start "
            "at uniform states.",
        ]
    sweep = result["search"]["warm_ups"]
    lines += [
        "",
        "## Search",
        "",
        f"Two-way path of 8 clusters of 5 states, epsilon 0.01, {result['search']['budget']['rounds']} rounds of "
        f"{result['search']['budget']['rollouts']} rollouts, five seeds:",
        "",
        "| warm-up T_0 | recall | false edges | cluster estimate exact |",
        "|---|---|---|---|",
    ]
    for t in sorted({row["warm_up"] for row in sweep}):
        own = [row for row in sweep if row["warm_up"] == t]
        lines.append(
            f"| {t} | {mean(own, 'recall'):.0%} | {mean(own, 'false_edges'):.1f} | {mean(own, 'clusters_exact'):.0%} |"
        )
    every = [row for part in cost.values() for row in part["rows"]]
    false = sum(row["false_edges"] for row in every)
    once = sum(row["false_reported_once"] for row in every)
    lines += [
        "",
        "Too short a warm-up has not seen the cluster, so its own states look like new ones: false edges, few true "
        "ones. Too "
        "long a one has left it (escape takes M / epsilon steps), so the next cluster counts as known and its edge is "
        "missed. "
        "Between the two lies the time scale gap that the theory needs.",
        "",
        f"With the default budget, over K, M and epsilon ({len(every)} searches): mean recall "
        f"{mean(every, 'recall'):.2%}, "
        f"{false / len(every):.1f} false edges a search beside {mean(every, 'sparse_edges'):.0f} true ones. False ones "
        "come when most rollouts of a round leave the cluster during the warm-up, or miss the same state of it. "
        f"{once} of the {false} were reported by one rollout only; a true edge is reported by "
        f"{np.median([row['reports_of_true_edges'] for row in every]):.0f} (median), so the number of reports tells "
        "them apart.",
        "",
        "## Fine-tuning and distillation on learned models",
        "",
        "Forward path, K = 8, M = 5, three seeds; models pretrained on K M^2 / epsilon^2 transitions, edges from the "
        "search:",
        "",
        "| epsilon | plain | recall | false | PPO updates | after PPO-Clip | law inside clusters moved by | distilled "
        "| logits multiplied instead |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for epsilon in sorted({row["epsilon"] for row in result["tuning"]}, reverse=True):
        own = [row for row in result["tuning"] if row["epsilon"] == epsilon]
        lines.append(
            f"| {epsilon:g} | {mean(own, 'plain'):,.0f} | {mean(own, 'recall'):.0%} | {mean(own, 'false_edges'):.1f} "
            f"| {mean(own, 'updates'):.0f} | {mean(own, 'tuned'):.1f} | {max(row['within'] for row in own):.1e} "
            f"| {mean(own, 'distilled'):.2f} | {mean(own, 'distilled_by_multiplying'):.2g} |"
        )
    lines += [
        "",
        f"(K - 1) M / epsilon_max is {7 * 5 / EPSILON_MAX:.0f}, 2 (K - 1) is 14. The sign of the gradient moves all "
        "other "
        "logits of a row alike, so where the edges are true the law inside clusters stays as it was, better than the "
        "o(1/M) "
        "that is claimed; a false edge inside a cluster does change it. Rescaling adds log(M / epsilon) to the "
        "off-diagonal "
        "logits; multiplying the logits by it, as some summaries of the paper say, loses the chain.",
        "",
        "## Real traces",
        "",
    ]
    if real_text is None:
        return "\n".join([*lines, "Not run: no `--prepared` was given.", ""])
    real = result["traces"]
    now, mixed = real["time_scales"]["time_scales"], real["time_scales"]["slowest_in_random_order"]["mean"]
    order = real["sets"]["order"]
    lines += [
        "Long chains of thought of several models (from the public repositories tianyi-lab/MiP-Overthinking, "
        "interp-reasoning/thought-anchors and NovaSky-AI/SkyThought), TF-IDF patterns of `statecore prepare`.",
        "",
        "What it says of the theory:",
        "",
        f"- The chain is slow (slowest time scale {now[0][0]:.1f} steps), but not for its dynamics: with the steps of "
        f"each trace in random order it is {mixed[0]:.1f}. The slow sets are what a trace stays with from end to end; "
        "their typical steps show that these are problems.",
        f"- It is not Markov: the time scale goes from {now[0][0]:.1f} to {now[-1][0]:.1f} steps between lags 1 and "
        f"{len(now)}, as it does where traces differ and do not change.",
        "- The order of steps does carry structure: the leading eigenvalue of what it adds is "
        f"{order['eigenvalues'][0]:.2f}, at most {real['order_eigenvalue_in_random_order']:.2f} in random order. Its "
        f"{len(order['sets'])} sets stand at mean positions "
        + " and ".join(f"{row['position']:.2f}" for row in order["sets"])
        + " of a trace (0 first, 1 last) and are followed by themselves in "
        + " and ".join(f"{row['stay']:.0%}" for row in order["sets"])
        + " of the cases: an opening phase that is not come back to, not clusters left and found again. The theory's "
        "picture, rare moves between sets that each hold the chain for long, is not what these patterns show.",
    ]
    if real.get("outcomes", {}).get("comparison"):
        compared = real["outcomes"]["comparison"]

        def below(key: str) -> str:
            low = [
                f"{name.replace('_', ' ')} (p = {row[key]:.2g})"
                for name, row in compared.items()
                if row.get(key, 1) < 0.05
            ]
            return ", ".join(low) or "none"

        lines.append(
            f"- Right answers: {real['outcomes']['traces_with_an_outcome']} of {real['outcomes']['traces']:,} traces "
            "know "
            f"theirs. Of {len(compared)} features compared, p < 0.05 before any correction: {below('p')}; at equal "
            "length: "
            f"{below('p_given_length')}. Wrong traces are longer; beyond that these data do not tie rare transitions "
            "to "
            "right answers."
            if below("p_given_length") == "none"
            else f"- Right answers, p < 0.05 before any correction: {below('p')}; at equal length "
            f"{below('p_given_length')}."
        )
    lines += [
        "",
        "The report of `statecore metastable traces prepared out --outcomes traces.jsonl.gz --group-fields source "
        "--group-fields model`:",
        "",
        "![the chain](metastable_traces.png)",
        "",
    ]
    lines += ["#" + line if line.startswith("#") else line for line in real_text.splitlines()[2:]]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, help="a folder of `statecore prepare`")
    parser.add_argument("--outcomes", type=Path, help="the traces' file, which says what was right")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RESULTS.parent) as working:
        folder, real_text = Path(working), None
        result: dict[str, Any] = {}
        if options.prepared:
            answers = OutcomeOptions(options.outcomes, group_fields=("source", "model"))
            result["traces"] = traces(options.prepared, folder / "traces", answers=answers)
            real_text = (folder / "traces" / "report.md").read_text()
            (folder / "traces" / "chain.png").rename(folder / "metastable_traces.png")
        parts = {
            "closed_forms": closed_forms, "growth": growth, "graphs": graphs, "walks": many_walks,
            "pretraining": pretraining, "search": searching, "tuning": tuning,
        }  # fmt: skip
        for name, part in tqdm(parts.items(), desc="metastable"):
            result[name] = part()
        result["seconds"] = time.perf_counter() - began
        (folder / "metastable.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(folder / "metastable.png", result)
        (folder / "metastable.md").write_text(page(result, real_text))
        for path in folder.glob("metastable*"):
            os.replace(path, RESULTS / path.name)


if __name__ == "__main__":
    main()
