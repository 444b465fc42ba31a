"""The metastable world: chains of thought as a Markov chain of dense clusters and rare edges between them.

(Metastable Dynamics of Chain-of-Thought Reasoning, arXiv 2502.01694, a paper of theory without experiments.) A state is
a reasoning statement. Inside a cluster the chain mixes fast (easy steps); from one cluster to another lead sparse edges
of probability epsilon (hard steps). So plain reasoning over K clusters of M states takes about K M / epsilon steps, a
search that finds the sparse edges makes it K M / epsilon_max, and a chain distilled to one state a cluster makes it K.

In reading order: the world and its exact times, walks, the base model (Algorithm 1), the search (Algorithm 2), PPO-Clip
(Algorithm 3), distillation (Algorithm 4), how times grow. A kernel is a SciPy csr_array `[n, n]` float64 whose rows
sum to 1; times are counted in steps of the chain. What the command makes of all this is in metastable_world.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import sparse, stats
from scipy.sparse import csgraph
from scipy.sparse.linalg import spsolve
from tqdm.auto import tqdm

Graph = Literal["path", "grid", "expander"]
Dense = Literal["uniform", "random"]

# ----------------------------------------------------------------------------------------------------------------------
# The world


@dataclass(frozen=True)
class World:
    """A metastable chain of n states in K clusters with E sparse edges. The task is to get from the first cluster to
    the last.
    """

    kernel: sparse.csr_array  # [n, n]
    cluster: np.ndarray  # [n], the cluster of each state, 0 .. K-1, not decreasing
    edges: np.ndarray  # [E, 2], source and target state of each sparse edge
    epsilon: float

    @property
    def clusters(self) -> int:
        return int(self.cluster[-1]) + 1

    @property
    def size(self) -> float:
        """Mean number of states in a cluster (the paper's M)."""
        return len(self.cluster) / self.clusters

    @property
    def representatives(self) -> np.ndarray:
        """The first state of each cluster `[K]`: the paper's S_o."""
        return np.flatnonzero(np.diff(self.cluster, prepend=-1))


def make_world(
    clusters: int = 8,
    size: int = 5,
    epsilon: float = 0.01,
    *,
    graph: Graph = "path",
    bidirectional: bool = False,
    sources: int = 1,
    spread: float = 0.0,
    dense: Dense = "uniform",
    degree: int = 3,
    seed: int = 0,
) -> World:
    """A random world (paper section 2; assumptions A1, A2).

    Each link of the meta-graph becomes `sources` sparse edges. Each of them leaves from a state of its own, so a state
    has at most one, and takes the probability epsilon of its row; the rest of the row is the dense kernel of the
    cluster. Raises ValueError for sizes that make no such world.

    Args:
        clusters: K, at least 2.
        size: M, states in a cluster.
        epsilon: probability of a sparse edge, in (0, 1).
        graph: which clusters are linked, all forward: "path" k -> k+1; "grid", right and down in the squarest
            K = rows x columns; "expander", `degree` random permutations of the clusters.
        bidirectional: every link also backwards. The paper's condition that keeps the walk from diffusing is not
            known to us; default forward, where its rates hold on a path.
        sources: sparse edges a link (the paper's n_out for a path).
        spread: cluster sizes are drawn from M (1 - spread) .. M (1 + spread).
        dense: rows inside a cluster: "uniform", where times have closed forms, or "random", entries that differ by up
            to a factor of 3, so that states of a cluster keep comparable mass (A1).
        degree: links out of a cluster of the expander.
        seed: of everything drawn.
    """
    _check_world(clusters, size, epsilon, graph, sources, spread, dense, degree)
    rng = np.random.default_rng(seed)
    links = meta_links(graph, clusters, degree=degree, seed=seed)
    if bidirectional:
        links = np.unique(np.concatenate([links, links[:, ::-1]]), axis=0)
    needed = np.bincount(links[:, 0], minlength=clusters) * sources
    if needed.max() > size:
        raise ValueError(
            f"size: expected at least {needed.max()} states in a cluster, as that many sparse edges leave one and each "
            f"from a state of its own, got {size}: raise size, or lower sources or degree"
        )
    sizes = np.maximum(np.rint(rng.uniform(size * (1 - spread), size * (1 + spread), clusters)).astype(int), needed)
    sizes = np.maximum(sizes, 1)
    begin = np.concatenate([[0], np.cumsum(sizes)])
    blocks = [np.ones((m, m)) if dense == "uniform" else rng.uniform(0.5, 1.5, (m, m)) for m in sizes]
    inside = sparse.block_diag([b / b.sum(1, keepdims=True) for b in blocks], format="csr")
    starts = [rng.permutation(m)[:k] + first for m, k, first in zip(sizes, needed, begin[:-1], strict=True)]
    source = np.concatenate(starts)
    to = np.repeat(links[np.argsort(links[:, 0], kind="stable"), 1], sources)
    target = begin[to] + rng.integers(sizes[to])
    edges = np.stack([source, target], axis=1)
    keep = np.ones(begin[-1])
    keep[source] = 1 - epsilon
    across = sparse.coo_array((np.full(len(edges), epsilon), (source, target)), shape=inside.shape)
    kernel = sparse.csr_array(sparse.diags_array(keep) @ inside + across)
    return World(kernel, np.repeat(np.arange(clusters), sizes), edges, epsilon)


def meta_links(graph: Graph, clusters: int, *, degree: int = 3, seed: int = 0) -> np.ndarray:
    """The forward links between clusters, `[L, 2]`, sorted; see make_world."""
    k = np.arange(clusters)
    if graph == "path":
        links = np.stack([k[:-1], k[1:]], axis=1)
    elif graph == "grid":
        rows = max(r for r in range(1, math.isqrt(clusters) + 1) if clusters % r == 0)
        place = k.reshape(rows, -1)
        right = np.stack([place[:, :-1].ravel(), place[:, 1:].ravel()], axis=1)
        down = np.stack([place[:-1].ravel(), place[1:].ravel()], axis=1)
        links = np.concatenate([right, down])
    else:
        links = _random_permutations(clusters, degree, np.random.default_rng(seed))
    return np.unique(links, axis=0)


def _random_permutations(clusters: int, degree: int, rng: np.random.Generator) -> np.ndarray:
    """Links of `degree` permutations without fixed points, the first one a single cycle, so that all is connected."""
    order = rng.permutation(clusters)
    links = [np.stack([order, np.roll(order, -1)], axis=1)]
    while len(links) < degree:
        image = rng.permutation(clusters)
        if (image != np.arange(clusters)).all():
            links.append(np.stack([np.arange(clusters), image], axis=1))
    return np.concatenate(links)


def _check_world(
    clusters: int, size: int, epsilon: float, graph: str, sources: int, spread: float, dense: str, degree: int
) -> None:
    if clusters < 2:
        raise ValueError(f"clusters: expected 2 or more (there is nowhere to go in one), got {clusters}")
    if size < 1:
        raise ValueError(f"size: expected 1 state or more in a cluster, got {size}")
    if not 0 < epsilon < 1:
        raise ValueError(
            f"epsilon: expected a probability between 0 and 1, both excluded, got {epsilon}: at 0 no cluster can be "
            "left, and times are infinite"
        )
    for name, value in (("sources", sources), ("degree", degree)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    if not 0 <= spread < 1:
        raise ValueError(f"spread: expected 0 or more and less than 1, got {spread}")
    for name, value, known in (("graph", graph, Graph), ("dense", dense, Dense)):
        if value not in known.__args__:
            raise ValueError(f"{name}: expected one of {', '.join(known.__args__)}, got {value!r}")


# ----------------------------------------------------------------------------------------------------------------------
# Exact times


def hitting_times(kernel: sparse.csr_array, target: np.ndarray) -> np.ndarray:
    """Expected steps from each state until the chain is in `target` (bool `[n]`): float64 `[n]`.

    0 in the target, infinite where the chain may never arrive; the rest solves (I - P) t = 1 on the states outside.
    """
    if not target.any():
        raise ValueError(f"target: expected at least one of the {len(target)} states, got none")
    steps = sparse.csr_array(kernel > 0)
    lost = ~_can_reach(steps, target)
    stay = sparse.diags_array((~target).astype(float))
    lost = _can_reach(sparse.csr_array(stay @ steps), lost)  # the target ends the walk
    times = np.where(lost, np.inf, 0.0)
    outside = np.flatnonzero(~lost & ~target)
    if len(outside):
        within = sparse.csr_array(kernel)[outside][:, outside]
        times[outside] = spsolve((sparse.eye_array(len(outside)) - within).tocsc(), np.ones(len(outside)))
    return times


def _can_reach(steps: sparse.csr_array, target: np.ndarray) -> np.ndarray:
    """From which states some path of `steps` leads into `target`; bool `[n]`."""
    if not target.any():
        return target.copy()
    backwards = sparse.csr_array(steps.T, dtype=float)
    return np.isfinite(csgraph.dijkstra(backwards, indices=np.flatnonzero(target), unweighted=True, min_only=True))


def task_time(kernel: sparse.csr_array, cluster: np.ndarray) -> float:
    """Expected steps from the first cluster (a uniform state of it) to the last (any state of it): E[tau], Theorem 3.2.

    Raises ValueError where the last cluster is not reached with certainty.
    """
    times = hitting_times(kernel, cluster == cluster[-1])[cluster == cluster[0]]
    if not np.isfinite(times).all():
        raise ValueError(
            f"the last cluster ({cluster[-1]}) cannot be reached with certainty from the first: expected a sparse edge "
            "out of every cluster on the way and none into a dead end; if the kernel was learned, sparse edges were "
            "lost: train on more samples or lower the threshold"
        )
    return float(times.mean())


def meta_chain(kernel: sparse.csr_array, cluster: np.ndarray) -> np.ndarray:
    """The chain between clusters, `[K, K]` float64 with rows that sum to 1: what distillation tends to.

    Cluster k is left from its first state after T_k steps on average, for cluster l with probability e_kl (two exact
    linear solves); the chain leaves k for l with probability e_kl / T_k a step. A cluster without exit keeps itself.
    """
    count = int(cluster[-1]) + 1
    chain = np.eye(count)
    membership = sparse.csr_array((np.ones(len(cluster)), (np.arange(len(cluster)), cluster)))
    for k in range(count):
        own = np.flatnonzero(cluster == k)
        time = hitting_times(kernel, cluster != k)[own[0]]
        if np.isfinite(time):
            rows = sparse.csr_array(kernel)[own]
            leaving = (rows @ membership).toarray()
            leaving[:, k] = 0
            escape = np.linalg.solve(np.eye(len(own)) - rows[:, own].toarray(), leaving)[0]
            chain[k] = escape / time
            chain[k, k] = 1 - 1 / time
    return chain


def escape_law(chain: np.ndarray) -> np.ndarray:
    """Where a meta-chain goes when it leaves: its off-diagonal rows, normalised; zeros for a row without exit."""
    leaving = chain - np.diag(np.diag(chain))
    total = leaving.sum(1, keepdims=True)
    return np.divide(leaving, total, out=np.zeros_like(leaving), where=total > 0)


# ----------------------------------------------------------------------------------------------------------------------
# Walks


class Walker:
    """Draws steps of many walks at once: `step` takes the states `[N]` to the next ones, 10^5 in a few milliseconds."""

    def __init__(self, kernel: sparse.csr_array, rng: np.random.Generator):
        kernel = sparse.csr_array(kernel).sorted_indices()  # so that equal kernels give equal walks
        total = np.cumsum(kernel.data)
        before = np.concatenate([[0.0], total])[kernel.indptr[:-1]]
        row = np.repeat(np.arange(kernel.shape[0]), np.diff(kernel.indptr))
        # One increasing list for all rows: row x occupies (x, x + 1], so one binary search draws from every row.
        self.bounds = row + (total - before[row])
        self.indices, self.last = kernel.indices, kernel.indptr[1:] - 1
        self.rng = rng

    def step(self, states: np.ndarray) -> np.ndarray:
        chosen = np.searchsorted(self.bounds, states + self.rng.random(len(states)), side="right")
        return self.indices[np.minimum(chosen, self.last[states])]


def walk(kernel: sparse.csr_array, start: np.ndarray, steps: int, *, seed: int = 0) -> np.ndarray:
    """`N` walks from `start` `[N]`: states `[steps + 1, N]`."""
    walker = Walker(kernel, np.random.default_rng(seed))
    path = np.empty((steps + 1, len(start)), dtype=np.int32)
    path[0] = start
    for t in range(steps):
        path[t + 1] = walker.step(path[t])
    return path


def walk_until(
    kernel: sparse.csr_array, start: np.ndarray, target: np.ndarray, limit: int, *, seed: int = 0
) -> np.ndarray:
    """Steps of N walks from `start` `[N]` until they are in `target` (bool `[n]`): int64 `[N]`, -1 beyond `limit`."""
    walker = Walker(kernel, np.random.default_rng(seed))
    taken = np.full(len(start), -1)
    taken[target[start]] = 0
    going = np.flatnonzero(taken < 0)
    states = np.asarray(start)[going]
    for t in tqdm(range(1, limit + 1), desc="walks", unit="step", leave=False):
        if not len(going):
            break
        states = walker.step(states)
        there = target[states]
        taken[going[there]] = t
        going, states = going[~there], states[~there]
    return taken


# ----------------------------------------------------------------------------------------------------------------------
# Base model (Algorithm 1)


@dataclass(frozen=True)
class BaseModel:
    """A pretrained linear softmax: its kernel, and its largest error |p - p*| as training went on."""

    kernel: sparse.csr_array
    steps: list[int]  # gradient steps at which the error was taken, both stages counted on
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

    Stage 1 starts from W = 0, so every state may follow every other; then entries below `threshold` are set to zero
    probability for good; stage 2 goes on with the others. The gradient is that of the whole sample in every step.

    Args:
        samples: transitions drawn in each stage, each from a uniform state (a forward chain left alone would show
            little but its last cluster); None: the exact gradient.
        stage_1_steps: default 10 / epsilon: what never occurs decays as 1 / steps and is then well below the threshold.
            (The paper counts T_1 = K M^2 / epsilon^2 sampled steps; ours see the whole sample at once.)
        stage_2_steps: default 20 / epsilon: the slowest error, that of a sparse edge, decays as
            exp(-epsilon (1 - epsilon) (1 + 1 / M) steps).
        threshold: default epsilon / 2, between what never occurs and the rarest thing that does. Not known from the
            paper.
        rate: step size a row, stable below 4 (the Hessian of a softmax is at most 1/2).
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
    checkpoints = {0, stage_1_steps, total} | {
        int(t) for t in np.unique(np.geomspace(1, max(total, 1), 60).astype(int))
    }
    checkpoints |= {stage_1_steps + i * stage_2_steps // 20 for i in range(20)}
    at, errors = [], []
    for t in tqdm(range(total + 1), desc="pretraining", unit="step", leave=False):
        if t in (0, stage_1_steps):
            seen, weight = _sample_transitions(true, samples, rng)
        if t == stage_1_steps:
            logits = torch.where(torch.softmax(logits, 1) >= threshold, logits, -torch.inf)
        model = torch.softmax(logits, 1)
        if t in checkpoints:
            at.append(t)
            errors.append(float((model - true).abs().max()))
        if t < total:
            logits -= rate * n * weight[:, None] * (model - seen)
    return BaseModel(sparse.csr_array(model.numpy()), at, errors, stage_1_steps)


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


@dataclass(frozen=True)
class Search:
    """What a search found."""

    edges: np.ndarray  # [F, 2], distinct, sorted
    reports: np.ndarray  # [F], how many rollouts reported each
    starts: np.ndarray  # [R]
    estimates: np.ndarray  # [R, n] bool, the states taken for the start's cluster
    steps: int  # of the model, all rollouts together


def default_budget(clusters: int, size: float, epsilon: float) -> SearchBudget:
    """R = 4 K log K, N = 2 log K (at least 5), T_0 = 2 M log(K M), T_max = T_0 + 2 M / epsilon.

    The orders are the paper's, the constants ours (the paper gives none). In a cluster that mixes at once a rollout
    misses a state during T_0 with probability (K M)^-2, and more steps only let it leave; it escapes through one sparse
    edge within 2 M / epsilon steps with probability 1 - exp(-2).
    """
    log = max(math.log(clusters), 1.0)
    warm_up = math.ceil(2 * size * max(math.log(clusters * size), 1.0))
    return SearchBudget(
        math.ceil(4 * clusters * log), max(5, math.ceil(2 * log)), warm_up, warm_up + math.ceil(2 * size / epsilon)
    )


def search(kernel: sparse.csr_array, budget: SearchBudget, *, quorum: float = 0.5, seed: int = 0) -> Search:
    """Looks for sparse edges with nothing but walks of the model (Algorithm 2); all rounds at once.

    Each round starts N rollouts at one uniform state. The states that at least a share `quorum` of them visit during
    the warm-up are taken for its cluster; afterwards the first transition of a rollout from inside to outside is
    reported, and the rollout ends. Read literally the paper takes every visited state; then a single early escape puts
    the next cluster into the estimate, so the default is half of the rollouts.
    """
    for name in ("rounds", "rollouts", "warm_up"):
        if getattr(budget, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(budget, name)}")
    if budget.horizon <= budget.warm_up:
        raise ValueError(
            f"horizon: expected more steps than the warm-up's {budget.warm_up}, got {budget.horizon}: nothing is "
            "reported before the warm-up ends"
        )
    rng = np.random.default_rng(seed)
    walker = Walker(kernel, rng)
    n, rounds, rollouts = kernel.shape[0], budget.rounds, budget.rollouts
    starts = rng.integers(n, size=rounds)
    states = np.repeat(starts, rollouts)
    owner = np.repeat(np.arange(rounds), rollouts)
    visited = np.zeros((rounds * rollouts, n), dtype=bool)
    everyone = np.arange(len(states))
    visited[everyone, states] = True
    for _ in range(budget.warm_up):
        states = walker.step(states)
        visited[everyone, states] = True
    estimates = visited.reshape(rounds, rollouts, n).mean(1) >= quorum
    steps = len(states) * budget.warm_up
    found = []
    for _ in range(budget.warm_up, budget.horizon):
        if not len(states):
            break
        following = walker.step(states)
        steps += len(states)
        out = estimates[owner, states] & ~estimates[owner, following]
        found.append(np.stack([states[out], following[out]], axis=1))
        states, owner = following[~out], owner[~out]
    edges, reports = np.unique(np.concatenate(found), axis=0, return_counts=True)
    return Search(edges, reports, starts, estimates, steps)


def score_search(found: Search, world: World) -> dict[str, Any]:
    """Recall of sparse edges, false edges, cost, and how often the estimate was exactly the start's cluster."""
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

    The other entries of a row shrink alike. In logits an edge gains log(p (1 - e) / (e (1 - p))). Raises ValueError
    where the raised edges leave nothing of a row.
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
    kernel: sparse.csr_array
    updates: int
    lowest: list[float]  # the least probable of the rewarded edges after each update


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
    by `rate`, p_old is renewed every `epochs` updates, and an edge's advantage ends at epsilon_max, so that edges of
    unequal start end alike (within a factor exp(2 rate)).
    """
    for name, value in (("epsilon_max", epsilon_max), ("clip", clip)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: expected a number between 0 and 1, both excluded, got {value}")
    if not rate > 0:
        raise ValueError(f"rate: expected a positive step of the logits, got {rate}")
    probability = torch.from_numpy(kernel.toarray())
    source, target = (torch.from_numpy(np.ascontiguousarray(column)).long() for column in edges.T)
    if len(edges) and not (probability[source, target] > 0).all():
        raise ValueError("edges: expected transitions that the model can make, got one of probability 0")
    crowded = int(torch.bincount(source).max()) if len(edges) else 0
    if crowded * epsilon_max >= 1:
        raise ValueError(
            f"epsilon_max: {crowded} rewarded edges leave one state, so expected less than {1 / crowded:.3g}, got "
            f"{epsilon_max}; if a search found them, most are false: its warm-up was too short to see a cluster, or so "
            "long that rollouts left it"
        )
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


def within_cluster_change(before: sparse.csr_array, after: sparse.csr_array, cluster: np.ndarray) -> float:
    """Largest total variation, over states, between the laws of the next state given that it is in the same cluster."""
    same = cluster[:, None] == cluster
    laws = [np.where(same, kernel.toarray(), 0) for kernel in (before, after)]
    one, other = (law / law.sum(1, keepdims=True) for law in laws)
    return float(np.abs(one - other).sum(1).max() / 2)


# ----------------------------------------------------------------------------------------------------------------------
# Distillation (Algorithm 4)


def distil(kernel: sparse.csr_array, cluster: np.ndarray, *, walks: int, steps: int, seed: int = 0) -> np.ndarray:
    """Trains a K x K softmax model on the cluster-to-cluster transitions of walks (Algorithm 4): logits `[K, K]`.

    From the first state of each cluster `walks` walks of `steps` steps; each step is recorded as (cluster of x, cluster
    of y), the paper's map to representatives. The cross-entropy of a one-hot softmax is least where its probabilities
    are the frequencies, so the logits are their logarithms (-inf for what was not seen) instead of a long descent.
    """
    if walks < 1 or steps < 1:
        raise ValueError(f"expected at least one walk of one step from each cluster, got walks={walks}, steps={steps}")
    count = int(cluster[-1]) + 1
    representatives = np.flatnonzero(np.diff(cluster, prepend=-1))
    walker = Walker(kernel, np.random.default_rng(seed))
    states = np.repeat(representatives, walks)
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

    Time runs exp(beta) faster, and where the chain goes when it leaves a cluster stays the same. The command's beta is
    log(M / epsilon).
    """
    shifted = logits + beta * (1 - np.eye(len(logits)))
    return torch.softmax(torch.from_numpy(shifted), 1).numpy()


def chain_time(chain: np.ndarray) -> float:
    """Expected steps of a meta-chain from the first to the last cluster."""
    return task_time(sparse.csr_array(chain), np.arange(len(chain)))


# ----------------------------------------------------------------------------------------------------------------------
# How times grow


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
    """`expected_times` of worlds that differ in one parameter, a row for each value and seed; `fixed` is the rest of
    make_world's arguments.
    """
    rows = []
    for value in tqdm(values, desc=f"times over {vary}", unit="value", leave=False):
        for seed in seeds:
            world = make_world(**{**fixed, vary: value}, seed=seed)
            rows.append({vary: value, "seed": seed, **expected_times(world, epsilon_max)})
    return rows


def fit_exponent(x: Sequence[float], y: Sequence[float], seeds: Sequence[int]) -> dict[str, float]:
    """Least squares of log y = exponent log x + a constant of each seed; `half_width` of the exponent's 95 % confidence
    interval. A constant each, because worlds of one seed share their random parts.
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


def warm_up_sweep(
    world: World, kernel: sparse.csr_array, budget: SearchBudget, warm_ups: Sequence[int], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """`score_search` for each length of the warm-up and seed, with the same number of steps after it."""
    after = budget.horizon - budget.warm_up
    return [
        {"warm_up": t, "seed": seed}
        | score_search(search(kernel, SearchBudget(budget.rounds, budget.rollouts, t, t + after), seed=seed), world)
        for t in tqdm(warm_ups, desc="warm-ups", leave=False)
        for seed in seeds
    ]
