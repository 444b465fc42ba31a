"""The metastable world: chains of thought as a Markov chain of dense clusters and rare edges between them.

(Metastable Dynamics of Chain-of-Thought Reasoning, arXiv 2502.01694, a paper of theory without experiments.) A state is
a reasoning statement. Inside a cluster the chain mixes fast (easy steps); sparse edges of probability epsilon (hard
steps) lead from one cluster to another. So plain reasoning over K clusters of M states takes about K M / epsilon steps,
a search that finds the sparse edges reduces that to K M / epsilon_max, and a chain distilled to one state per cluster
takes about K.

In reading order: the world, its exact times, walks. A kernel is a SciPy csr_array `[n, n]` float64 whose rows sum to 1;
times are counted in steps of the chain. The paper's algorithms are in algorithms.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import spsolve
from tqdm.auto import tqdm

Graph = Literal["path", "grid", "expander"]
Dense = Literal["uniform", "random"]

# ----------------------------------------------------------------------------------------------------------------------
# The world


@dataclass(frozen=True)
class WorldShape:
    """What a random world looks like (paper section 2; assumptions A1, A2).

    Args:
        clusters: clusters of states (the paper's K), at least 2.
        size: states in a cluster (M).
        epsilon: probability of a sparse edge, in (0, 1).
        graph: which clusters are linked, all forward: "path", k to k + 1; "grid", right and down in the squarest
            K = rows x columns; "expander", `degree` random permutations of the clusters.
        bidirectional: links also lead back; on a path the walk then diffuses. (Forward paths follow the paper's rates;
            its condition against diffusion is not known to us.)
        sources: sparse edges per link (the paper's n_out for a path).
        spread: cluster sizes are drawn from M (1 - spread) .. M (1 + spread).
        dense: rows inside a cluster: "uniform", where times have closed forms, or "random", entries that differ by up
            to a factor of 3, so that states of a cluster keep comparable mass (A1).
        degree: links out of a cluster of the expander.
    """

    clusters: int = 8
    size: int = 5
    epsilon: float = 0.01
    graph: Graph = "path"
    bidirectional: bool = False
    sources: int = 1
    spread: float = 0.0
    dense: Dense = "uniform"
    degree: int = 3

    def __post_init__(self):
        if self.clusters < 2:
            raise ValueError(f"clusters: expected 2 or more (there is nowhere to go in one), got {self.clusters}")
        if self.size < 1:
            raise ValueError(f"size: expected 1 state or more in a cluster, got {self.size}")
        if not 0 < self.epsilon < 1:
            raise ValueError(
                f"epsilon: expected a probability between 0 and 1, both excluded, got {self.epsilon}: at 0 no cluster "
                "can be left, and times are infinite"
            )
        for name in ("sources", "degree"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread: expected 0 or more and less than 1, got {self.spread}")
        for name, known in (("graph", Graph), ("dense", Dense)):
            if getattr(self, name) not in known.__args__:
                raise ValueError(f"{name}: expected one of {', '.join(known.__args__)}, got {getattr(self, name)!r}")


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
        return first_states(self.cluster)


def first_states(cluster: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.diff(cluster, prepend=-1))


def make_world(clusters: int = 8, size: int = 5, epsilon: float = 0.01, *, seed: int = 0, **shape: Any) -> World:
    """A random world; `shape` holds the other fields of WorldShape.

    Each link of the meta-graph becomes `sources` sparse edges. Each of them leaves from a state of its own, so a state
    has at most one, and takes the probability epsilon of its row; the rest of the row is the dense kernel of the
    cluster. Raises ValueError for sizes that make no such world.
    """
    wanted = WorldShape(clusters, size, epsilon, **shape)
    rng = np.random.default_rng(seed)
    links = meta_links(wanted.graph, clusters, degree=wanted.degree, seed=seed)
    if wanted.bidirectional:
        links = np.unique(np.concatenate([links, links[:, ::-1]]), axis=0)
    needed = np.bincount(links[:, 0], minlength=clusters) * wanted.sources
    if needed.max() > size:
        raise ValueError(
            f"size: expected at least {needed.max()} states in a cluster, as that many sparse edges leave one and each "
            f"from a state of its own, got {size}: raise size, or lower sources or degree"
        )
    smallest, largest = size * (1 - wanted.spread), size * (1 + wanted.spread)
    sizes = np.maximum(np.rint(rng.uniform(smallest, largest, clusters)).astype(int), needed)
    sizes = np.maximum(sizes, 1)
    begin = np.concatenate([[0], np.cumsum(sizes)])
    blocks = [np.ones((m, m)) if wanted.dense == "uniform" else rng.uniform(0.5, 1.5, (m, m)) for m in sizes]
    inside = sparse.block_diag([b / b.sum(1, keepdims=True) for b in blocks], format="csr")
    starts = [rng.permutation(m)[:k] + first for m, k, first in zip(sizes, needed, begin[:-1], strict=True)]
    source = np.concatenate(starts)
    to = np.repeat(links[np.argsort(links[:, 0], kind="stable"), 1], wanted.sources)
    target = begin[to] + rng.integers(sizes[to])
    edges = np.stack([source, target], axis=1)
    keep = np.ones(begin[-1])
    keep[source] = 1 - epsilon
    across = sparse.coo_array((np.full(len(edges), epsilon), (source, target)), shape=inside.shape)
    kernel = sparse.csr_array(sparse.diags_array(keep) @ inside + across)
    return World(kernel, np.repeat(np.arange(clusters), sizes), edges, epsilon)


def meta_links(graph: Graph, clusters: int, *, degree: int = 3, seed: int = 0) -> np.ndarray:
    """The forward links between clusters, `[L, 2]`, sorted; see WorldShape."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Exact times


def hitting_times(kernel: sparse.csr_array, target: np.ndarray) -> np.ndarray:
    """Expected steps from each state until the chain is in `target` (bool `[n]`): float64 `[n]`.

    0 in the target, infinite where the chain may never arrive; the others solve (I - P) t = 1 on the states outside.
    """
    if not target.any():
        raise ValueError(f"target: expected at least one of the {len(target)} states, got none")
    steps = sparse.csr_array(kernel > 0)
    lost = ~_can_reach(steps, target)
    stay = sparse.diags_array((~target).astype(float))
    lost = _can_reach(sparse.csr_array(stay @ steps), lost)  # a walk ends in the target
    times = np.where(lost, np.inf, 0.0)
    outside = np.flatnonzero(~lost & ~target)
    if len(outside):
        within = sparse.csr_array(kernel)[outside][:, outside]
        times[outside] = spsolve((sparse.eye_array(len(outside)) - within).tocsc(), np.ones(len(outside)))
    return times


def _can_reach(steps: sparse.csr_array, target: np.ndarray) -> np.ndarray:
    """Whether a path of `steps` leads from each state into `target`; bool `[n]`."""
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
    """The chain between clusters, `[K, K]` float64 with rows that sum to 1: the limit of distillation.

    From its first state, cluster k is left after T_k steps on average, for cluster l with probability e_kl (two exact
    linear solves); the chain moves from k to l with probability e_kl / T_k per step. A cluster without exit is
    absorbing.
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
    """Where a meta-chain goes when it leaves a cluster: its off-diagonal rows, normalised; zeros without exit."""
    leaving = chain - np.diag(np.diag(chain))
    total = leaving.sum(1, keepdims=True)
    return np.divide(leaving, total, out=np.zeros_like(leaving), where=total > 0)


def chain_time(chain: np.ndarray) -> float:
    """Expected steps of a meta-chain from the first to the last cluster."""
    return task_time(sparse.csr_array(chain), np.arange(len(chain)))


# ----------------------------------------------------------------------------------------------------------------------
# Walks


class Walker:
    """Advances many walks at once: `step` takes the states `[N]` to the next ones, 10^5 in a few milliseconds."""

    def __init__(self, kernel: sparse.csr_array, rng: np.random.Generator):
        kernel = sparse.csr_array(kernel).sorted_indices()  # equal kernels must give equal walks
        total = np.cumsum(kernel.data)
        before = np.concatenate([[0.0], total])[kernel.indptr[:-1]]
        row = np.repeat(np.arange(kernel.shape[0]), np.diff(kernel.indptr))
        # One increasing array for all rows: row x occupies (x, x + 1], so one binary search draws from every row.
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
    """Steps that N walks from `start` `[N]` take into `target` (bool `[n]`): int64 `[N]`, -1 beyond `limit`."""
    walker = Walker(kernel, np.random.default_rng(seed))
    taken = np.full(len(start), -1)
    taken[target[start]] = 0
    going = np.flatnonzero(taken < 0)
    states = np.asarray(start)[going]
    for t in tqdm(range(1, limit + 1), desc="walks", unit="step", leave=False):
        if not len(going):
            break
        states = walker.step(states)
        arrived = target[states]
        taken[going[arrived]] = t
        going, states = going[~arrived], states[~arrived]
    return taken
