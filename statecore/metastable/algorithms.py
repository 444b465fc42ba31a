"""The algorithms of arXiv 2502.01694 on metastable worlds (theory.py), and how times grow with the world.

In reading order: pretraining (Algorithm 1), sparse-edge search (Algorithm 2), PPO-Clip (Algorithm 3), distillation
(Algorithm 4), scaling. K clusters of M states, n states in all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import sparse, stats
from tqdm.auto import tqdm

from .theory import Walker, World, chain_time, first_states, make_world, meta_chain, task_time

# ----------------------------------------------------------------------------------------------------------------------
# Pretraining (Algorithm 1)


@dataclass(frozen=True)
class BaseModel:
    """A pretrained linear softmax: its kernel, and its largest error |p - p*| during training."""

    kernel: sparse.csr_array
    steps: list[int]  # gradient steps after which the error was taken, counted through both stages
    errors: list[float]
    stage_1_steps: int


def pretrain(
    kernel: sparse.csr_array,
    epsilon: float,
    *,
    samples: int | None = None,
    stage_1_steps: int | None = None,
    stage_2_steps: int | None = None,
    threshold: float | None = None,
    rate: float = 1.0,
    seed: int = 0,
) -> BaseModel:
    """Two-stage cross-entropy gradient descent of p(. | x) = softmax(<W, x>) on transitions of `kernel` (Algorithm 1).

    Stage 1 starts from W = 0, so every state may follow every other; then entries below `threshold` are pruned to zero
    probability, and stage 2 trains the others. Every gradient step sees the whole sample.

    Args:
        samples: transitions drawn in each stage, each from a uniform state (a long walk of a forward chain would stay
            in its last cluster); None: the exact gradient.
        stage_1_steps: default 10 / epsilon: transitions that never occur decay as 1 / steps and are then well below
            the threshold. (The paper counts T_1 = K M^2 / epsilon^2 sampled steps; ours see the whole sample at once.)
        stage_2_steps: default 20 / epsilon: the slowest error, that of a sparse edge, decays as
            exp(-epsilon (1 - epsilon) (1 + 1 / M) steps).
        threshold: default epsilon / 2, between transitions that never occur and the rarest ones that do. Not known
            from the paper.
        rate: step size of a row, stable below 4 (the Hessian of a softmax is at most 1/2).
    """
    rng = np.random.default_rng(seed)
    stage_1_steps = math.ceil(10 / epsilon) if stage_1_steps is None else stage_1_steps
    stage_2_steps = math.ceil(20 / epsilon) if stage_2_steps is None else stage_2_steps
    threshold = epsilon / 2 if threshold is None else threshold
    if samples is not None and samples < 1:
        raise ValueError(f"samples: expected 1 transition or more, or none for the exact gradient, got {samples}")
    true = torch.from_numpy(kernel.toarray())
    n = len(true)
    logits = torch.zeros_like(true)
    total = stage_1_steps + stage_2_steps
    measured = {0, stage_1_steps, total} | {int(t) for t in np.geomspace(1, max(total, 1), 60)}
    measured |= {stage_1_steps + i * stage_2_steps // 20 for i in range(20)}
    steps, errors = [], []
    for t in tqdm(range(total + 1), desc="pretraining", unit="step", leave=False):
        if t in (0, stage_1_steps):
            observed, weight = _sample_transitions(true, samples, rng)
        if t == stage_1_steps:
            logits = torch.where(torch.softmax(logits, 1) >= threshold, logits, -torch.inf)
        model = torch.softmax(logits, 1)
        if t in measured:
            steps.append(t)
            errors.append(float((model - true).abs().max()))
        if t < total:
            logits -= rate * n * weight[:, None] * (model - observed)
    return BaseModel(sparse.csr_array(model.numpy()), steps, errors, stage_1_steps)


def _sample_transitions(
    true: torch.Tensor, samples: int | None, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Observed kernel `[n, n]` and share of the sample of each row `[n]`."""
    n = len(true)
    if samples is None:
        return true, torch.full((n,), 1 / n, dtype=true.dtype)
    rows = rng.multinomial(samples, np.full(n, 1 / n))
    counts = torch.from_numpy(rng.multinomial(rows, true.numpy() / true.numpy().sum(1, keepdims=True))).to(true.dtype)
    return counts / counts.sum(1, keepdim=True).clamp(min=1), counts.sum(1) / samples


# ----------------------------------------------------------------------------------------------------------------------
# Sparse-edge search (Algorithm 2)


@dataclass(frozen=True)
class SearchBudget:
    """R rounds of N rollouts: `warm_up` steps (T_0) to learn the cluster, then on to at most `horizon` (T_max)."""

    rounds: int
    rollouts: int
    warm_up: int
    horizon: int

    def __post_init__(self):
        for name in ("rounds", "rollouts", "warm_up"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.horizon <= self.warm_up:
            raise ValueError(
                f"horizon: expected more steps than the warm-up's {self.warm_up}, got {self.horizon}: nothing is "
                "reported before the warm-up ends"
            )


def default_budget(clusters: int, size: float, epsilon: float) -> SearchBudget:
    """R = 4 K log K, N = 2 log K (at least 5), T_0 = 2 M log(K M), T_max = T_0 + 2 M / epsilon.

    The orders are the paper's, the constants ours (the paper gives none). In a cluster that mixes at once a rollout
    misses a state during T_0 with probability (K M)^-2, and a longer warm-up only lets it leave the cluster; it escapes
    through one sparse edge within 2 M / epsilon steps with probability 1 - exp(-2).
    """
    log = max(math.log(clusters), 1.0)
    warm_up = math.ceil(2 * size * max(math.log(clusters * size), 1.0))
    return SearchBudget(
        math.ceil(4 * clusters * log), max(5, math.ceil(2 * log)), warm_up, warm_up + math.ceil(2 * size / epsilon)
    )


@dataclass(frozen=True)
class SearchOptions:
    """Parts of a search budget in place of those of `default_budget`.

    Args:
        rounds: rounds of the search; default 4 K log K.
        rollouts: rollouts per round; default 2 log K, at least 5.
        warm_up: steps before a rollout may report; default 2 M log(K M).
        horizon: most steps of a rollout; default the warm-up and 2 M / epsilon.
    """

    rounds: int | None = None
    rollouts: int | None = None
    warm_up: int | None = None
    horizon: int | None = None

    def budget(self, clusters: int, size: float, epsilon: float) -> SearchBudget:
        chosen = asdict(default_budget(clusters, size, epsilon))
        chosen |= {name: value for name, value in asdict(self).items() if value is not None}
        if self.warm_up is not None and self.horizon is None:
            chosen["horizon"] = self.warm_up + math.ceil(2 * size / epsilon)
        return SearchBudget(**chosen)


@dataclass(frozen=True)
class Search:
    """What a search found."""

    edges: np.ndarray  # [F, 2], distinct, sorted
    reports: np.ndarray  # [F], rollouts that reported each
    starts: np.ndarray  # [R]
    estimates: np.ndarray  # [R, n] bool, the states estimated to be the start's cluster
    steps: int  # of the model, in all rollouts together


def search(kernel: sparse.csr_array, budget: SearchBudget, *, quorum: float = 0.5, seed: int = 0) -> Search:
    """Looks for sparse edges with walks of the model alone (Algorithm 2); all rounds at once.

    Each round starts N rollouts at one uniform state. The states that at least a share `quorum` of them visit during
    the warm-up are taken to be its cluster; after that a rollout reports its first transition out of them, and ends.
    Read literally, the paper counts every visited state; then a single early escape adds the next cluster to the
    estimate, so the default is half of the rollouts.
    """
    rng = np.random.default_rng(seed)
    walker = Walker(kernel, rng)
    n, rounds, rollouts = kernel.shape[0], budget.rounds, budget.rollouts
    starts = rng.integers(n, size=rounds)
    states = np.repeat(starts, rollouts)
    round_of = np.repeat(np.arange(rounds), rollouts)
    visited = np.zeros((rounds * rollouts, n), dtype=bool)
    every = np.arange(len(states))
    visited[every, states] = True
    for _ in range(budget.warm_up):
        states = walker.step(states)
        visited[every, states] = True
    estimates = visited.reshape(rounds, rollouts, n).mean(1) >= quorum
    steps = len(states) * budget.warm_up
    found = []
    for _ in range(budget.warm_up, budget.horizon):
        if not len(states):
            break
        following = walker.step(states)
        steps += len(states)
        escaped = estimates[round_of, states] & ~estimates[round_of, following]
        found.append(np.stack([states[escaped], following[escaped]], axis=1))
        states, round_of = following[~escaped], round_of[~escaped]
    edges, reports = np.unique(np.concatenate(found), axis=0, return_counts=True)
    return Search(edges, reports, starts, estimates, steps)


def score_search(found: Search, world: World) -> dict[str, Any]:
    """Recall of sparse edges, false edges, cost, and the share of estimates that are exactly the start's cluster."""
    n = len(world.cluster)
    key, true = found.edges @ [n, 1], world.edges @ [n, 1]
    right = (found.estimates == (world.cluster[found.starts][:, None] == world.cluster)).all(1)
    return {
        "sparse_edges": len(true),
        "found": int(np.isin(true, key).sum()),
        "recall": float(np.isin(true, key).mean()),
        "false_edges": int((~np.isin(key, true)).sum()),
        "clusters_exact": float(right.mean()),
        "steps": found.steps,
    }


def raise_edges(kernel: sparse.csr_array, edges: np.ndarray, probability: float) -> sparse.csr_array:
    """The kernel with each of `edges` `[F, 2]` at `probability` or more: search with memory (Proposition 3.3).

    The other entries of a row shrink by a common factor. The logit of an edge grows by log(p (1 - e) / (e (1 - p))).
    Raises ValueError where the raised edges leave nothing for the rest of a row.
    """
    kernel = kernel.tolil()
    for source in np.unique(edges[:, 0]):
        row = kernel[[source]].toarray()[0]
        raised = edges[edges[:, 0] == source, 1]
        new = np.maximum(row[raised], probability)
        if new.sum() >= 1:
            raise ValueError(
                f"epsilon_max: {len(raised)} edges out of state {source} cannot all have probability {probability}: "
                f"expected less than {1 / len(raised):.3g}"
            )
        rest = row.copy()
        rest[raised] = 0
        row = rest * (1 - new.sum()) / rest.sum()
        row[raised] = new
        kernel[[source]] = row
    return sparse.csr_array(kernel)


# ----------------------------------------------------------------------------------------------------------------------
# PPO-Clip (Algorithm 3)


@dataclass(frozen=True)
class FineTuned:
    """What PPO-Clip made of a kernel."""

    kernel: sparse.csr_array
    updates: int
    lowest: list[float]  # probability of the least likely rewarded edge after each update


def ppo_clip(
    kernel: sparse.csr_array,
    edges: np.ndarray,
    epsilon_max: float,
    *,
    clip: float = 0.2,
    rate: float = 0.05,
    epochs: int = 4,
    limit: int = 10_000,
) -> FineTuned:
    """Raises the rewarded `edges` `[F, 2]` by sign-gradient ascent on the PPO-Clip objective (Algorithm 3).

    J(W) = E_{(x,y) ~ p_old} min(r A, clip(r, 1 - c, 1 + c) A), r = p_W(y|x) / p_old(y|x), A = 1 on the edges, else 0;
    the expectation is exact, x uniform. Step size, clip and stopping are not known from the paper: here the logits move
    by `rate`, p_old is renewed every `epochs` updates, and the advantage of an edge is 0 from epsilon_max on, so edges
    of different initial probability end alike (within a factor exp(2 rate)).
    """
    probability = torch.from_numpy(kernel.toarray())
    source, target = (torch.from_numpy(np.ascontiguousarray(column)).long() for column in edges.T)
    _check_ppo_clip(probability, source, target, epsilon_max, clip, rate)
    logits = probability.log()
    lowest: list[float] = []
    for update in range(limit):
        current = torch.softmax(logits, 1)[source, target]
        if update and len(edges):
            lowest.append(float(current.min()))
        advantage = (current < epsilon_max).double()
        if not advantage.any():
            break
        if update % epochs == 0:
            old = current
        logits.requires_grad_()
        ratio = torch.softmax(logits, 1)[source, target] / old
        objective = (old * torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)).sum()
        (gradient,) = torch.autograd.grad(objective, logits)
        logits = logits.detach() + rate * gradient.sign()
    else:
        raise ValueError(f"the edges did not reach {epsilon_max} in {limit} updates: raise rate or limit")
    return FineTuned(sparse.csr_array(torch.softmax(logits, 1).numpy()), len(lowest), lowest)


def _check_ppo_clip(
    probability: torch.Tensor, source: torch.Tensor, target: torch.Tensor, epsilon_max: float, clip: float, rate: float
) -> None:
    for name, value in (("epsilon_max", epsilon_max), ("clip", clip)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: expected a number between 0 and 1, both excluded, got {value}")
    if not rate > 0:
        raise ValueError(f"rate: expected a positive step of the logits, got {rate}")
    if not (probability[source, target] > 0).all():
        raise ValueError("edges: expected transitions that the model can make, got one of probability 0")
    crowded = int(torch.bincount(source).max()) if len(source) else 0
    if crowded * epsilon_max >= 1:
        raise ValueError(
            f"epsilon_max: {crowded} rewarded edges leave one state, so expected less than {1 / crowded:.3g}, got "
            f"{epsilon_max}; if a search found them, most are false: its warm-up was too short to see a cluster, or so "
            "long that rollouts left it"
        )


def within_cluster_change(before: sparse.csr_array, after: sparse.csr_array, cluster: np.ndarray) -> float:
    """Largest total variation, over states, between both laws of the next state given that it is in the same
    cluster.
    """
    same = cluster[:, None] == cluster
    laws = [np.where(same, kernel.toarray(), 0) for kernel in (before, after)]
    one, other = (law / law.sum(1, keepdims=True) for law in laws)
    return float(np.abs(one - other).sum(1).max() / 2)


# ----------------------------------------------------------------------------------------------------------------------
# Distillation (Algorithm 4)


def distil(kernel: sparse.csr_array, cluster: np.ndarray, *, walks: int, steps: int, seed: int = 0) -> np.ndarray:
    """Trains a K x K softmax model on the cluster-to-cluster transitions of walks (Algorithm 4): logits `[K, K]`.

    `walks` walks of `steps` steps start from the first state of each cluster; each step is recorded as (cluster of x,
    cluster of y), the paper's map to representatives. The cross-entropy of a one-hot softmax is least where its
    probabilities are the frequencies, so the logits are their logarithms (-inf for pairs that never occurred), and no
    gradient descent is needed.
    """
    if walks < 1 or steps < 1:
        raise ValueError(f"expected at least one walk of one step from each cluster, got walks={walks}, steps={steps}")
    count = int(cluster[-1]) + 1
    walker = Walker(kernel, np.random.default_rng(seed))
    states = np.repeat(first_states(cluster), walks)
    pairs = np.zeros(count * count, dtype=np.int64)
    for _ in tqdm(range(steps), desc="distilling", unit="step", leave=False):
        following = walker.step(states)
        pairs += np.bincount(cluster[states] * count + cluster[following], minlength=count * count)
        states = following
    frequency = pairs.reshape(count, count) / pairs.reshape(count, count).sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        return np.log(frequency)


def rescale(logits: np.ndarray, beta: float) -> np.ndarray:
    """The meta-chain `[K, K]` of the logits with `beta` added to all off-diagonal ones, formula (4).

    Time runs exp(beta) times faster; the escape law of each cluster stays the same. With beta = log(M / epsilon) the
    time no longer depends on M and epsilon.
    """
    shifted = logits + beta * (1 - np.eye(len(logits)))
    return torch.softmax(torch.from_numpy(shifted), 1).numpy()


# ----------------------------------------------------------------------------------------------------------------------
# Scaling


def expected_times(world: World, epsilon_max: float) -> dict[str, float]:
    """Exact E[tau] of the chain, of the chain with its sparse edges at epsilon_max, and of the rescaled meta-chain."""
    with np.errstate(divide="ignore"):
        logits = np.log(meta_chain(world.kernel, world.cluster))
    return {
        "plain": task_time(world.kernel, world.cluster),
        "raised": task_time(raise_edges(world.kernel, world.edges, epsilon_max), world.cluster),
        "distilled": chain_time(rescale(logits, math.log(world.size / world.epsilon))),
    }


def scaling(
    vary: Literal["clusters", "size", "epsilon"],
    values: Sequence[float],
    *,
    seeds: Sequence[int],
    epsilon_max: float = 0.2,
    **fixed: Any,
) -> list[dict[str, float]]:
    """`expected_times` of worlds that differ in one parameter, one row per value and seed; `fixed` holds the other
    arguments of make_world.
    """
    rows = []
    for value in tqdm(values, desc=f"times over {vary}", unit="value", leave=False):
        for seed in seeds:
            world = make_world(**{**fixed, vary: value}, seed=seed)
            rows.append({vary: value, "seed": seed, **expected_times(world, epsilon_max)})
    return rows


def fit_exponent(x: Sequence[float], y: Sequence[float], seeds: Sequence[int]) -> dict[str, float]:
    """Least squares of log y = exponent log x + a constant per seed, as worlds of one seed share their random parts;
    `half_width` is that of the exponent's 95 % confidence interval.
    """
    _, group = np.unique(seeds, return_inverse=True)
    size = np.bincount(group)
    log_x, log_y = (v - (np.bincount(group, weights=v) / size)[group] for v in (np.log(x), np.log(y)))
    freedom = len(log_x) - len(size) - 1
    if freedom < 1:
        raise ValueError(f"expected at least {len(size) + 2} points for an exponent and its error, got {len(log_x)}")
    fit = stats.linregress(log_x, log_y)
    error = fit.stderr * math.sqrt((len(log_x) - 2) / freedom)  # linregress counts two parameters
    return {"exponent": float(fit.slope), "half_width": float(stats.t.ppf(0.975, freedom) * error)}


def fit_scaling(panels: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """`fit_exponent` of each time in each panel of `scaling` rows, by the name of the varied parameter."""
    return {
        vary: {
            name: fit_exponent(
                [abscissa(vary, row) for row in rows], [row[name] for row in rows], [row["seed"] for row in rows]
            )
            for name in ("plain", "raised", "distilled")
        }
        for vary, rows in panels.items()
    }


def abscissa(vary: str, row: Mapping[str, float]) -> float:
    """The varied parameter of a row; clusters count as K - 1, the hops of a path."""
    return row[vary] - 1 if vary == "clusters" else row[vary]


def warm_up_sweep(
    world: World, kernel: sparse.csr_array, budget: SearchBudget, warm_ups: Sequence[int], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """`score_search` for each length of the warm-up and seed, with the same number of steps after the warm-up."""
    after = budget.horizon - budget.warm_up
    return [
        {"warm_up": t, "seed": seed}
        | score_search(search(kernel, SearchBudget(budget.rounds, budget.rollouts, t, t + after), seed=seed), world)
        for t in tqdm(warm_ups, desc="warm-ups", leave=False)
        for seed in seeds
    ]
