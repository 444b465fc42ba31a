"""`statecore metastable world`: makes a metastable world (theory.py) and runs the paper's algorithms on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..outputs import new_folder, write_json
from .algorithms import (
    BaseModel,
    FineTuned,
    Search,
    SearchBudget,
    SearchOptions,
    distil,
    fit_scaling,
    ppo_clip,
    pretrain,
    rescale,
    scaling,
    score_search,
    search,
    warm_up_sweep,
    within_cluster_change,
)
from .report import draw_scaling, draw_warm_ups, draw_world, world_text
from .theory import (
    World,
    WorldShape,
    chain_time,
    escape_law,
    make_world,
    meta_chain,
    task_time,
    walk_until,
)


def world(
    output_dir: str | Path,
    *,
    shape: WorldShape = WorldShape(),
    epsilon_max: float = 0.2,
    walks: int = 10_000,
    samples: int | None = None,
    budget: SearchOptions = SearchOptions(),
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make a metastable world and run the paper's algorithms on it: pretraining, search, fine-tuning, distillation.

    Writes world, search and scaling as pictures, each with its JSON, and a report. Returns the report's figures.

    Args:
        output_dir: folder to write; it appears once it is complete.
        epsilon_max: probability that search and fine-tuning raise sparse edges to.
        walks: walks that check the exact time, all at once.
        samples: transitions to pretrain on, in each stage; default K M^2 / epsilon^2.
        seed: of everything drawn.
        overwrite: replace a folder of an earlier run.
    """
    if not shape.epsilon < epsilon_max < 1:
        raise ValueError(
            f"epsilon_max: expected more than epsilon ({shape.epsilon}) and less than 1, got {epsilon_max}"
        )
    if walks < 2:
        raise ValueError(f"walks: expected 2 or more, got {walks}")
    made = make_world(**asdict(shape), seed=seed)
    search_budget = budget.budget(shape.clusters, shape.size, shape.epsilon)
    settings = asdict(shape) | {"epsilon_max": epsilon_max, "seed": seed, "search": asdict(search_budget)}

    with new_folder(output_dir, overwrite, marker="world.json") as folder, tqdm(total=7, desc="world") as bar:

        def done(stage: str) -> None:
            bar.set_postfix_str(stage)
            bar.update()

        exact = task_time(made.kernel, made.cluster)
        taken = _walk(made, walks, math.ceil(50 * exact), seed)
        done("walks")
        samples = math.ceil(shape.clusters * shape.size**2 / shape.epsilon**2) if samples is None else samples
        stages = run_stages(made, shape, search_budget, epsilon_max, samples, seed, done)
        warm_ups = np.unique(np.geomspace(1, max(4 * shape.size / shape.epsilon, 2), 13).astype(int)).tolist()
        sweep = warm_up_sweep(made, stages.model.kernel, search_budget, warm_ups, range(seed, seed + 3))
        done("warm-ups")
        panels = _scaling_panels(shape, epsilon_max, seed)
        done("scaling")
        fits = fit_scaling(panels)

        result = {
            "settings": settings,
            "times": {"plain": exact} | stages.times,
            "path_theory": _path_theory(shape, epsilon_max),
            "walks": _describe_walks(taken),
            **_describe_stages(made, stages),
        }
        write_json(folder / "world.json", result)
        draw_world(folder / "world.png", made, stages.model, result["times"])
        write_json(folder / "search.json", {"settings": settings, "warm_ups": sweep})
        draw_warm_ups(folder / "search.png", sweep, search_budget.warm_up)
        write_json(folder / "scaling.json", {"settings": settings, "exponents": fits, "rows": panels})
        draw_scaling(folder / "scaling.png", panels, fits)
        text = world_text(result, fits)
        (folder / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return result | {"exponents": fits}


# ----------------------------------------------------------------------------------------------------------------------
# Stages


@dataclass(frozen=True)
class Stages:
    """What each of the paper's algorithms made of a world."""

    model: BaseModel
    found: Search
    tuned: FineTuned
    distilled: np.ndarray  # [K, K], the rescaled meta-chain
    times: dict[str, float]  # expected steps of the task on each chain


def run_stages(
    made: World,
    shape: WorldShape,
    budget: SearchBudget,
    epsilon_max: float,
    samples: int,
    seed: int,
    done: Callable[[str], None],
) -> Stages:
    """Pretraining, search, fine-tuning and distillation; calls `done` with the name of each when it is finished."""
    model = pretrain(made.kernel, shape.epsilon, samples=samples, seed=seed)
    times = {"learned": task_time(model.kernel, made.cluster)}
    done("pretraining")
    found = search(model.kernel, budget, seed=seed)
    done("search")
    tuned = ppo_clip(model.kernel, found.edges, epsilon_max)
    times["fine-tuned"] = task_time(tuned.kernel, made.cluster)
    done("PPO-Clip")
    scale = math.ceil(shape.size / shape.epsilon)
    logits = distil(model.kernel, made.cluster, walks=min(scale, 1_000), steps=scale, seed=seed)
    distilled = rescale(logits, math.log(shape.size / shape.epsilon))
    times["distilled"] = chain_time(distilled)
    done("distillation")
    return Stages(model, found, tuned, distilled, times)


def _walk(made: World, walks: int, limit: int, seed: int) -> np.ndarray:
    """Steps that walks from the first cluster take to the last, -1 beyond `limit`."""
    start = np.random.default_rng(seed).choice(np.flatnonzero(made.cluster == 0), walks)
    return walk_until(made.kernel, start, made.cluster == made.clusters - 1, limit, seed=seed)


def _scaling_panels(shape: WorldShape, epsilon_max: float, seed: int) -> dict[str, list[dict[str, float]]]:
    """Times of uneven worlds over clusters, size and epsilon; even ones follow the rates by a closed form."""
    choices = {
        "clusters": [4, 9, 16, 36, 64],
        "size": [shape.size * m for m in (1, 2, 4, 8)],
        "epsilon": [shape.epsilon * f for f in (1, 0.3, 0.1, 0.03)],
    }
    uneven = asdict(shape) | {"dense": "random", "spread": max(shape.spread, 0.2)}
    panels = {}
    for vary, values in choices.items():
        fixed = {name: value for name, value in uneven.items() if name != vary}
        panels[vary] = scaling(vary, values, seeds=range(seed, seed + 3), epsilon_max=epsilon_max, **fixed)
    return panels


# ----------------------------------------------------------------------------------------------------------------------
# Results


def _path_theory(shape: WorldShape, epsilon_max: float) -> dict[str, float]:
    """Leading terms of the expected steps on a forward path."""
    return {
        "plain": (shape.clusters - 1) * shape.size / shape.epsilon,
        "fine-tuned": (shape.clusters - 1) * shape.size / epsilon_max,
        "distilled": 2 * (shape.clusters - 1),
    }


def _describe_walks(taken: np.ndarray) -> dict[str, Any]:
    arrived = taken[taken >= 0]
    return {
        "count": len(taken),
        "arrived": len(arrived),
        "mean": float(arrived.mean()),
        "standard_error": float(arrived.std(ddof=1) / math.sqrt(len(arrived))),
    }


def _describe_stages(made: World, stages: Stages) -> dict[str, dict[str, Any]]:
    model, tuned = stages.model, stages.tuned
    escape_error = np.abs(escape_law(stages.distilled) - escape_law(meta_chain(made.kernel, made.cluster))).max()
    return {
        "pretraining": {
            "stage_1_steps": model.stage_1_steps,
            "steps": model.steps,
            "largest_error": model.errors,
            "sparse_edges_kept": int((model.kernel[tuple(made.edges.T)] > 0).sum()),
            "entries": model.kernel.nnz,
            "true_entries": made.kernel.nnz,
        },
        "search": score_search(stages.found, made),
        "fine_tuning": {
            "updates": tuned.updates,
            "within_cluster_change": within_cluster_change(model.kernel, tuned.kernel, made.cluster),
        },
        "distillation": {"escape_error": float(escape_error)},
    }
