"""The metastable world against closed forms and brute force, and the chain of real traces against made ones."""

import itertools
import json
import math
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse
from typer.testing import CliRunner

from statecore import metastable as m
from statecore.cli import app
from statecore.metastable import chain as d
from statecore.outputs import new_folder
from statecore.prepare import SCHEMA


@pytest.fixture
def run(monkeypatch):
    def invoke(*arguments: object):
        arguments = ("metastable", *map(str, arguments))
        monkeypatch.setattr(sys, "argv", ["statecore", *arguments])
        return CliRunner().invoke(app, list(arguments))

    return invoke


def random_kernel(n: int, rng: np.random.Generator, density: float = 0.3) -> sparse.csr_array:
    rows = rng.random((n, n)) * (rng.random((n, n)) < density)
    rows[np.arange(n), rng.integers(n, size=n)] += 0.1
    return sparse.csr_array(rows / rows.sum(1, keepdims=True))


# ----------------------------------------------------------------------------------------------------------------------
# World and exact times


@pytest.mark.parametrize(("graph", "bidirectional"), [*itertools.product(["path", "grid", "expander"], [False, True])])
def test_world_matches_its_options(graph, bidirectional):
    world = m.make_world(
        12, 9, 0.02, graph=graph, bidirectional=bidirectional, sources=2 if graph != "expander" else 1,
        spread=0.3, dense="random", seed=3,
    )  # fmt: skip
    kernel = world.kernel.toarray()
    np.testing.assert_allclose(kernel.sum(1), 1)
    sizes = np.bincount(world.cluster)
    assert len(sizes) == world.clusters == 12
    assert sizes.min() >= 6
    assert sizes.max() <= 12
    assert world.representatives.tolist() == (np.cumsum(sizes) - sizes).tolist()
    across = np.argwhere((kernel > 0) & (world.cluster[:, None] != world.cluster))
    assert sorted(map(tuple, across)) == sorted(map(tuple, world.edges))
    assert len(np.unique(world.edges[:, 0])) == len(world.edges)  # a source has one sparse edge
    np.testing.assert_allclose(kernel[tuple(world.edges.T)], 0.02)
    links = {(int(world.cluster[x]), int(world.cluster[y])) for x, y in world.edges}
    forward = {tuple(link) for link in m.meta_links(graph, 12, seed=3).tolist()}
    assert links == (forward | {(l, k) for k, l in forward} if bidirectional else forward)  # noqa: E741
    same = m.make_world(12, 9, 0.02, graph=graph, spread=0.3, dense="random", seed=3)
    again = m.make_world(12, 9, 0.02, graph=graph, spread=0.3, dense="random", seed=3)
    assert (same.kernel != again.kernel).nnz == 0


def test_meta_graphs():
    assert m.meta_links("path", 4).tolist() == [[0, 1], [1, 2], [2, 3]]
    assert m.meta_links("grid", 6).tolist() == [[0, 1], [0, 3], [1, 2], [1, 4], [2, 5], [3, 4], [4, 5]]
    links = m.meta_links("expander", 30, degree=3)
    assert (links[:, 0] != links[:, 1]).all()
    assert np.bincount(links[:, 0]).max() == np.bincount(links[:, 1]).max() == 3


@pytest.mark.parametrize("seed", range(6))
def test_hitting_times_against_the_sum_over_time(seed):
    """Against the sum over t of P(not yet arrived), by powers of the kernel; infinite where the chain can get lost."""
    rng = np.random.default_rng(seed)
    kernel = random_kernel(9, rng, density=0.12)
    target = np.arange(9) == rng.integers(9)
    outside = np.where(target, 0, 1) * kernel.toarray() * ~target[:, None]
    alive = (~target).astype(float)
    expected = np.zeros(9)
    for _ in range(20_000):
        expected += alive
        alive = outside @ alive
    times = m.hitting_times(kernel, target)
    lost = alive > 1e-9
    assert (np.isinf(times) == lost).all()
    np.testing.assert_allclose(times[~lost], expected[~lost], rtol=1e-8)


def test_hitting_times_are_infinite_before_dead_ends():
    kernel = sparse.csr_array(np.array([[0, 0.5, 0.5, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1.0]]))
    assert m.hitting_times(kernel, np.array([False, False, False, True])).tolist() == [np.inf, np.inf, 1, 0]
    with pytest.raises(ValueError, match="cannot be reached with certainty"):
        m.task_time(kernel, np.arange(4))
    with pytest.raises(ValueError, match="at least one of the 4 states"):
        m.hitting_times(kernel, np.zeros(4, dtype=bool))


@pytest.mark.parametrize("epsilon_max", [0.1, 0.2])
@pytest.mark.parametrize(("clusters", "size", "epsilon"), [(4, 5, 1e-2), (8, 5, 1e-2), (8, 10, 1e-3), (16, 5, 1e-4)])
def test_forward_path_takes_the_paper_s_times(clusters, size, epsilon, epsilon_max):
    """Exact for equal rows: a cluster is left after M / e steps from a uniform state, M / e - M + 1 from the source of
    its sparse edge, and M / e + 1 from any other state.
    """
    world = m.make_world(clusters, size, epsilon)
    entered = world.edges[:-1, 1] == world.edges[1:, 0]  # a cluster is entered at the source of its own edge

    def exact(e: float) -> float:
        inner = np.where(entered, size / e - size + 1, size / e + 1)
        return size / e + inner.sum()

    times = m.expected_times(world, epsilon_max)
    assert times["plain"] == pytest.approx(exact(epsilon), rel=1e-8)
    assert times["raised"] == pytest.approx(exact(epsilon_max), rel=1e-8)
    assert times["plain"] == pytest.approx((clusters - 1) * size / epsilon, rel=0.01)
    assert times["raised"] == pytest.approx((clusters - 1) * size / epsilon_max, rel=0.1)
    assert times["distilled"] == pytest.approx(2 * (clusters - 1), rel=0.01)


@pytest.mark.parametrize("clusters", [8, 16])
def test_two_way_path_diffuses(clusters):
    world = m.make_world(clusters, 5, 0.01, bidirectional=True)
    expected = clusters * (clusters - 1) / 2 * 5 / 0.01
    assert m.task_time(world.kernel, world.cluster) == pytest.approx(expected, rel=0.03)


def test_meta_chain_against_powers_of_the_kernel():
    world = m.make_world(5, 4, 0.05, graph="expander", dense="random", degree=2, seed=1)
    chain = m.meta_chain(world.kernel, world.cluster)
    np.testing.assert_allclose(chain.sum(1), 1)
    kernel = world.kernel.toarray()
    for k, first in enumerate(world.representatives):
        own = world.cluster == k
        at, time, went = np.eye(len(own))[first], 0.0, np.zeros(5)
        for _ in range(10_000):
            time += at.sum()
            at = at @ kernel
            went += np.bincount(world.cluster, weights=np.where(own, 0, at), minlength=5)
            at = np.where(own, at, 0)
        np.testing.assert_allclose(chain[k, np.arange(5) != k], (went / time)[np.arange(5) != k], rtol=1e-9)
        np.testing.assert_allclose(m.escape_law(chain)[k], went, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Walks


def test_walks_follow_the_kernel():
    rng = np.random.default_rng(0)
    kernel = random_kernel(12, rng)
    path = m.walk(kernel, rng.integers(12, size=100_000), 5)
    assert path.shape == (6, 100_000)
    counts = np.bincount((path[:-1] * 12 + path[1:]).ravel(), minlength=144).reshape(12, 12)
    expected = kernel.toarray() * counts.sum(1, keepdims=True)
    assert not counts[kernel.toarray() == 0].any()
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected) + 1e-9).all()
    np.testing.assert_array_equal(path, m.walk(kernel, path[0], 5))


def test_mean_of_walks_is_the_exact_time():
    world = m.make_world(3, 4, 0.05)
    start = np.random.default_rng(1).integers(4, size=20_000)
    taken = m.walk_until(world.kernel, start, world.cluster == 2, 10_000)
    assert (taken >= 0).all()
    error = taken.std() / math.sqrt(len(taken))
    assert abs(taken.mean() - m.task_time(world.kernel, world.cluster)) < 4 * error
    short = m.walk_until(world.kernel, start, world.cluster == 2, 50)
    np.testing.assert_array_equal(short, np.where(taken <= 50, taken, -1))
    assert (m.walk_until(world.kernel, start, world.cluster == 0, 5) == 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# Algorithms


def test_pretraining_converges_exponentially_after_pruning():
    world = m.make_world(4, 5, 0.02)
    pruned = m.pretrain(world.kernel, 0.02)
    assert ((pruned.kernel > 0) != (world.kernel > 0)).nnz == 0
    assert pruned.errors[-1] < 1e-8
    kept = m.pretrain(world.kernel, 0.02, threshold=0)
    assert kept.errors[-1] > 1e-4  # transitions that never occur decay as 1 / steps only
    late = [(t, e) for t, e in zip(pruned.steps, pruned.errors, strict=True) if t > 1.3 * pruned.stage_1_steps]
    slope = np.polyfit([t for t, _ in late[:8]], np.log([e for _, e in late[:8]]), 1)[0]
    assert slope == pytest.approx(-0.02 * 0.98 * (1 + 1 / 5), rel=0.02)


def test_pretraining_on_samples():
    world = m.make_world(4, 5, 0.02, bidirectional=True, seed=2)
    model = m.pretrain(world.kernel, 0.02, samples=400_000)
    assert ((model.kernel > 0) != (world.kernel > 0)).nnz == 0
    assert model.errors[-1] < 0.02
    poor = m.pretrain(world.kernel, 0.02, samples=300)
    assert (poor.kernel[tuple(world.edges.T)] == 0).any()
    with pytest.raises(ValueError, match="train on more samples"):
        m.task_time(poor.kernel, world.cluster)


@pytest.mark.parametrize("seed", range(3))
def test_search_finds_the_sparse_edges(seed):
    world = m.make_world(8, 5, 0.01, bidirectional=True, seed=seed)
    score = m.score_search(m.search(world.kernel, m.default_budget(8, 5, 0.01), seed=seed), world)
    assert score["sparse_edges"] == 14
    assert score["recall"] == 1
    assert score["false_edges"] <= 4
    assert score["clusters_exact"] > 0.9
    hasty = m.score_search(m.search(world.kernel, m.SearchBudget(64, 3, 5, 1000), seed=seed), world)
    assert hasty["false_edges"] > 40
    assert hasty["clusters_exact"] < 0.5
    late = m.score_search(m.search(world.kernel, m.SearchBudget(64, 3, 4000, 5000), seed=seed), world)
    assert late["recall"] < 1


def test_search_on_a_deterministic_chain():
    """On a ring, a warm-up of 3 steps from s visits s .. s + 3, and the next step, from s + 3, leads out."""
    n = 10
    ring = sparse.csr_array((np.ones(n), (np.arange(n), (np.arange(n) + 1) % n)))
    found = m.search(ring, m.SearchBudget(40, 2, 3, 20))
    for start, estimate in zip(found.starts, found.estimates, strict=True):
        assert sorted((np.flatnonzero(estimate) - start) % n) == [0, 1, 2, 3]
    left = np.unique((found.starts + 3) % n)
    assert found.edges.tolist() == [[x, (x + 1) % n] for x in left]
    assert found.reports.sum() == 80
    assert found.steps == 80 * 4


def test_raising_edges_shifts_their_logits():
    world = m.make_world(4, 5, 0.01)
    raised = m.raise_edges(world.kernel, world.edges, 0.2).toarray()
    with np.errstate(divide="ignore"):
        logits = np.log(world.kernel.toarray())
    logits[tuple(world.edges.T)] += math.log(0.2 * 0.99 / (0.01 * 0.8))
    np.testing.assert_allclose(raised, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), atol=1e-12)
    above = m.raise_edges(world.kernel, np.array([[0, 1]]), 0.1)  # this transition already has probability 0.2
    np.testing.assert_allclose(above.toarray(), world.kernel.toarray(), atol=1e-12)
    with pytest.raises(ValueError, match="3 edges out of state 0 cannot all"):
        m.raise_edges(world.kernel, np.array([[0, 1], [0, 2], [0, 3]]), 0.4)


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.5])
def test_ppo_clip_raises_only_the_edges(clip):
    world = m.make_world(5, 6, 0.01, graph="expander", dense="random", degree=2)
    tuned = m.ppo_clip(world.kernel, world.edges, 0.2, clip=clip)
    final = tuned.kernel[tuple(world.edges.T)]
    assert (final >= 0.2).all()
    assert (final <= 0.2 * math.exp(0.1)).all()
    assert tuned.lowest == sorted(tuned.lowest)
    assert m.within_cluster_change(world.kernel, tuned.kernel, world.cluster) < 1e-12
    others = np.setdiff1d(np.arange(30), world.edges[:, 0])
    np.testing.assert_allclose(tuned.kernel[others].toarray(), world.kernel[others].toarray(), atol=1e-14)
    # The first update of an epoch is not clipped and moves logits by the gradient's sign: the edge up, its row down.
    once = m.ppo_clip(world.kernel, world.edges[:1], 0.0101, rate=0.05)
    row = world.kernel[[world.edges[0, 0]]].toarray()[0]
    shift = np.where(np.arange(30) == world.edges[0, 1], 0.05, -0.05)
    np.testing.assert_allclose(
        once.kernel[[world.edges[0, 0]]].toarray()[0], row * np.exp(shift) / (row * np.exp(shift)).sum(), atol=1e-14
    )


def test_ppo_clip_on_a_false_edge_changes_the_law_of_its_cluster():
    world = m.make_world(4, 8, 0.01)
    within = np.array([[0, 3]])
    tuned = m.ppo_clip(world.kernel, within, 0.3)
    assert m.within_cluster_change(world.kernel, tuned.kernel, world.cluster) == pytest.approx(0.3 - 1 / 8, abs=0.03)


def test_distillation_and_rescaling():
    world = m.make_world(5, 5, 0.02, graph="expander", degree=2, seed=4)
    exact = m.meta_chain(world.kernel, world.cluster)
    logits = m.distil(world.kernel, world.cluster, walks=4_000, steps=250)
    np.testing.assert_allclose(np.exp(logits), exact, atol=5e-4)
    assert (np.isinf(logits) == (exact == 0)).all()
    fast = m.rescale(logits, math.log(5 / 0.02))
    np.testing.assert_allclose(fast.sum(1), 1)
    np.testing.assert_allclose(m.escape_law(fast), m.escape_law(np.exp(logits)), atol=1e-12)
    np.testing.assert_allclose(m.rescale(logits, 0), np.exp(logits), atol=1e-12)


def test_distilled_time_is_independent_of_epsilon_and_size():
    times = [
        m.expected_times(m.make_world(8, size, epsilon), 0.2)["distilled"]
        for size in (5, 20)
        for epsilon in (1e-2, 1e-4)
    ]
    np.testing.assert_allclose(times, 14, rtol=0.01)


# ----------------------------------------------------------------------------------------------------------------------
# Scaling


def test_fitted_exponents():
    x, seeds = np.repeat([4, 9, 16, 36], 3), np.tile(range(3), 4)
    y = 7 * x**1.5 * np.array([1, 2, 3.0])[seeds]
    fit = m.fit_exponent(x, y, seeds)
    assert fit["exponent"] == pytest.approx(1.5, abs=1e-9)
    assert fit["half_width"] < 1e-6
    noisy = m.fit_exponent(x, y * np.exp(np.random.default_rng(0).normal(0, 0.1, 12)), seeds)
    assert abs(noisy["exponent"] - 1.5) < noisy["half_width"] < 0.3
    with pytest.raises(ValueError, match="expected at least 5 points"):
        m.fit_exponent(x[:3], y[:3], seeds[:3])


@pytest.mark.parametrize(
    ("vary", "values", "plain", "distilled"),
    [("clusters", (5, 9, 17), 1, 1), ("size", (5, 10, 20), 1, 0), ("epsilon", (1e-2, 1e-3, 1e-4), -1, 0)],
)
def test_forward_path_grows_at_the_paper_s_rates(vary, values, plain, distilled):
    fixed = {"clusters": 6, "size": 5, "epsilon": 0.01, "dense": "random"}
    rows = m.scaling(vary, values, seeds=range(4), **{k: v for k, v in fixed.items() if k != vary})
    x = [row[vary] - (vary == "clusters") for row in rows]
    for name, exponent in (("plain", plain), ("distilled", distilled)):
        fit = m.fit_exponent(x, [row[name] for row in rows], [row["seed"] for row in rows])
        assert fit["exponent"] == pytest.approx(exponent, abs=0.08)


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 1}, "clusters: expected 2 or more"),
        ({"clusters": -3}, "clusters: expected 2 or more"),
        ({"size": 0}, "size: expected 1 state or more"),
        ({"epsilon": 0}, "at 0 no cluster can be left"),
        ({"epsilon": 1}, "both excluded, got 1"),
        ({"epsilon": -0.1}, "got -0.1"),
        ({"sources": 0}, "sources: expected 1 or more"),
        ({"spread": 1}, "spread: expected 0 or more"),
        ({"graph": "star"}, "graph: expected one of path, grid, expander, got 'star'"),
        ({"dense": "full"}, "dense: expected one of"),
        ({"size": 2, "sources": 3}, "size: expected at least 3 states"),
    ],
)
def test_bad_worlds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        m.make_world(**options)


def test_bad_settings_are_refused():
    world = m.make_world()
    with pytest.raises(ValueError, match="rounds: expected 1 or more, got 0"):
        m.search(world.kernel, m.SearchBudget(0, 3, 5, 10))
    with pytest.raises(ValueError, match="horizon: expected more steps than the warm-up's 50, got 50"):
        m.search(world.kernel, m.SearchBudget(4, 3, 50, 50))
    with pytest.raises(ValueError, match="samples: expected 1"):
        m.pretrain(world.kernel, 0.01, samples=0)
    with pytest.raises(ValueError, match="rate: expected a positive"):
        m.ppo_clip(world.kernel, world.edges, 0.2, rate=0)
    with pytest.raises(ValueError, match="got one of probability 0"):
        m.ppo_clip(world.kernel, np.array([[0, 39]]), 0.2)
    with pytest.raises(ValueError, match="3 rewarded edges leave one state"):
        m.ppo_clip(world.kernel, np.array([[0, 1], [0, 2], [0, 3]]), 0.4)
    with pytest.raises(ValueError, match=r"did not reach 0\.2 in 3 updates"):
        m.ppo_clip(world.kernel, world.edges, 0.2, limit=3)
    with pytest.raises(ValueError, match="at least one walk"):
        m.distil(world.kernel, world.cluster, walks=0, steps=5)


# ----------------------------------------------------------------------------------------------------------------------
# The chain of traces


def pattern_traces(rows: list[list[int]], patterns: int) -> d.PatternTraces:
    return d.PatternTraces(
        [f"t{i}" for i in range(len(rows))], np.concatenate([np.array(row, dtype=int) for row in rows]),
        np.repeat(np.arange(len(rows)), [len(row) for row in rows]), patterns,
    )  # fmt: skip


def metastable_traces(number: int = 400, length: int = 60, seed: int = 0) -> tuple[d.PatternTraces, m.World]:
    world = m.make_world(3, 4, 0.08, graph="expander", degree=2, dense="random", seed=seed)
    rng = np.random.default_rng(seed)
    path = m.walk(world.kernel, rng.integers(12, size=number), length - 1, seed=seed)
    return pattern_traces(path.T.tolist(), 12), world


def test_counts_stay_inside_traces():
    traces = pattern_traces([[0, 1, 2], [2], [1, 1, 0]], 3)
    assert traces.counts().tolist() == [[0, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert traces.counts(2).tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
    now, later, trace = traces.pairs()
    assert (now.tolist(), later.tolist(), trace.tolist()) == ([0, 1, 1, 1], [1, 2, 1, 0], [0, 0, 2, 2])


def test_expected_counts_are_the_mean_over_all_orders():
    rows = [[0, 1, 1, 2], [2, 2], [1], [0, 1, 2, 0, 0]]
    expected = np.zeros((3, 3))
    for row in rows:
        orders = list(itertools.permutations(row))
        for order in orders:
            for a, b in itertools.pairwise(order):
                expected[a, b] += 1 / len(orders)
    traces = pattern_traces(rows, 3)
    np.testing.assert_allclose(traces.expected_counts(), expected, atol=1e-12)
    rng = np.random.default_rng(0)
    mixed = traces.shuffled(rng)
    for i, row in enumerate(rows):
        assert sorted(mixed.steps[mixed.trace == i]) == sorted(row)
    again = traces.resampled(rng)
    assert {tuple(again.steps[again.trace == i]) for i in range(4)} <= {tuple(row) for row in rows}


def test_chain_of_markov_traces_is_their_kernel():
    traces, world = metastable_traces()
    chain = d.pattern_chain(traces.counts())
    assert chain.active.tolist() == list(range(12))
    np.testing.assert_allclose(chain.kernel, world.kernel.toarray(), atol=0.03)
    np.testing.assert_allclose(chain.stationary @ chain.kernel, chain.stationary, atol=1e-12)
    true = d.time_scales(world.kernel.toarray())[0]
    for lag in (1, 2, 4):
        assert d.time_scales(d.pattern_chain(traces.counts(lag)).kernel, lag)[0] == pytest.approx(true, rel=0.1)
    mixed = traces.shuffled(np.random.default_rng(0))
    assert d.time_scales(d.pattern_chain(mixed.counts()).kernel)[0] < true / 4


def test_metastable_sets_are_the_clusters():
    traces, world = metastable_traces()
    chain = d.pattern_chain(traces.counts())
    for excess, weight in d.excesses(traces, chain).values():
        sets, eigenvalues = d.metastable_sets(excess, weight)
        assert len({*zip(sets.tolist(), world.cluster.tolist(), strict=True)}) == 3 == sets.max() + 1
        assert eigenvalues[1] > 3 * eigenvalues[2]
    for row in d.describe_sets(traces, chain, sets):
        own = np.isin(np.arange(12), row["patterns"])
        assert row["stay"] == pytest.approx(traces.counts()[own][:, own].sum() / traces.counts()[own].sum())
        assert row["stay"] > 1.3 * row["stay_in_random_order"]
        assert row["position"] == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match="sets: expected 2 to 11 for 12 patterns"):
        d.metastable_sets(excess, weight, 12)


def test_unordered_traces_have_no_excess_over_random_order():
    """Traces that each use one half of the patterns in random order: slow against chance, no excess over order."""
    rng = np.random.default_rng(0)
    rows = [(rng.integers(4, size=30) + 4 * (i % 2)).tolist() for i in range(300)]
    rows += [rng.integers(8, size=30).tolist() for _ in range(20)]
    traces = pattern_traces(rows, 8)
    excesses = d.excesses(traces, d.pattern_chain(traces.counts()))
    sets, (slowest, *_) = d.metastable_sets(*excesses["chance"], 2)
    assert slowest > 0.8
    assert sets.tolist() in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)
    assert d.metastable_sets(*excesses["order"], 2)[1][0] < 0.1


def test_transient_patterns_are_left_out():
    chain = d.pattern_chain(np.array([[0, 5, 0, 0], [0, 1, 3, 2], [0, 2, 1, 2], [0, 3, 1, 0]]))
    assert chain.active.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="at least 3 patterns that follow each other in turn, got 2"):
        d.pattern_chain(np.array([[1, 2, 0], [2, 1, 1], [0, 0, 3]]))


def test_features_use_the_chain_without_their_trace():
    rows = [[0, 1, 2, 0, 1], [1, 2, 0, 0], [2, 1, 1, 0, 2, 2], [1]]
    traces = pattern_traces(rows, 3)
    chain = d.pattern_chain(traces.counts())
    features = d.trace_features(traces, chain, {"x": np.array([0, 0, 1])}, rare=0.3)
    for i, row in enumerate(rows[:3]):
        others = pattern_traces([other for j, other in enumerate(rows) if j != i], 3).counts()
        p = [(others[a, b] + 1 / 3) / (others[a].sum() + 1) for a, b in itertools.pairwise(row)]
        assert features["transitions"][i] == len(row) - 1
        assert features["surprise_bits"][i] == pytest.approx(-np.mean(np.log2(p)))
        assert features["rare"][i] == pytest.approx(np.mean(np.array(p) < 0.3))
        assert features["crossings_x"][i] == pytest.approx(
            np.mean([(a == 2) != (b == 2) for a, b in itertools.pairwise(row)])
        )
    assert np.isnan(features["rare"][3])


def test_comparison_of_outcomes_stays_within_groups():
    """A feature that differs only between groups, one that differs within them, one that depends on length alone."""
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1, 2], [80, 80, 40])
    right = np.where(group == 2, True, rng.random(200) < np.where(group == 0, 0.8, 0.2))
    transitions = rng.integers(5, 60, 200) - 4.0 * right
    features = {
        "transitions": transitions,
        "between": group + rng.normal(0, 0.1, 200),
        "inside": rng.normal(0, 1, 200) + right,
        "length_only": 10 / transitions,
    }
    result = d.compare_outcomes(features, right, group, shuffles=2_000)
    assert result["between"]["p"] > 0.01
    assert result["inside"]["p"] < 0.01
    assert result["inside"]["p_given_length"] < 0.01
    assert abs(result["length_only"]["given_length"]) < 1e-9
    total = weight = 0.0
    for g in (0, 1):
        a, b = (features["inside"][(group == g) & side] for side in (right, ~right))
        share = len(a) * len(b) / (len(a) + len(b))
        total, weight = total + share * (a.mean() - b.mean()), weight + share
    assert result["inside"]["difference"] == pytest.approx(total / weight)


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def write_prepared(folder, traces: d.PatternTraces, drop: str | None = None):
    folder.mkdir()
    rows = []
    for i, name in enumerate(traces.ids):
        own = traces.steps[traces.trace == i].tolist()
        rows.append(
            {"id": name, "input_ids": [0], "step_ids": [0], "prompt_length": 1, "patterns": own, "steps": len(own)}
        )
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    table = table.drop_columns([drop]) if drop else table
    pq.write_table(table.slice(0, len(rows) // 2), folder / "train.parquet")
    pq.write_table(table.slice(len(rows) // 2), folder / "eval.parquet")
    patterns = [{"id": i, "size": 1, "examples": [f"So step {i} | x"]} for i in range(traces.patterns)]
    (folder / "patterns.json").write_text(json.dumps({"patterns": patterns}))
    return folder


def write_outcomes(path, traces: d.PatternTraces, **change: object):
    rng = np.random.default_rng(0)
    rows = [{"id": name, "correct": bool(rng.random() < 0.5), "model": "a"} | change for name in traces.ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_traces_command(run, tmp_path):
    traces, world = metastable_traces(120, 30)
    prepared = write_prepared(tmp_path / "prepared", traces)
    outcomes = write_outcomes(tmp_path / "outcomes.jsonl", traces)
    result = run("traces", prepared, tmp_path / "out", "--outcomes", outcomes, "--shuffles", 3, "--lags", 2)
    assert result.exit_code == 0, result.output
    chain, times, told = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("chain.json", "times.json", "outcomes.json")
    )
    assert chain["prepared"]["traces"] == 120
    assert chain["prepared"]["transitions"] == traces.counts().sum()
    assert len({*zip(chain["set_of"]["order"], world.cluster.tolist(), strict=True)}) == 3
    assert times["slowest_in_random_order"]["mean"][0] < times["time_scales"][0][0]
    assert told["right"] + sum(g["wrong"] for g in told["groups"]) == told["traces_with_an_outcome"] == 120
    for name in ("chain.png", "times.png", "outcomes.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "120 of 120 traces say" in (tmp_path / "out" / "report.md").read_text()
    without = run("traces", prepared, tmp_path / "without", "--shuffles", 2, "--lags", 1)
    assert "prepared data do not say which answers are right" in without.output
    assert not (tmp_path / "without" / "outcomes.json").exists()


def test_traces_command_refuses(run, tmp_path):
    traces, _ = metastable_traces(30, 10)
    prepared = write_prepared(tmp_path / "prepared", traces)

    def refusal(*arguments: object) -> str:
        result = run("traces", *arguments)
        assert result.exit_code == 1, result.output
        assert not list(tmp_path.glob(".*partial"))
        return result.output

    out = tmp_path / "out"
    assert "train.parquet, patterns.json missing" in refusal(tmp_path, out)
    assert "got none called patterns" in refusal(write_prepared(tmp_path / "old", traces, drop="patterns"), out)
    single = write_prepared(tmp_path / "single", pattern_traces([[0], [1], [2]], 3))
    assert "there is no transition to count" in refusal(single, out)
    assert "there is no file" in refusal(prepared, out, "--outcomes", tmp_path / "nothing.jsonl")
    bad = write_outcomes(tmp_path / "bad.jsonl", traces, correct="yes")
    assert "expected true, false or null, got 'yes'" in refusal(prepared, out, "--outcomes", bad)
    plain = write_outcomes(tmp_path / "plain.jsonl", traces)
    assert "got no source" in refusal(prepared, out, "--outcomes", plain, "--group-fields", "source")
    other = write_outcomes(tmp_path / "other.jsonl", traces, id="else")
    assert "expected rows with ids of the prepared traces" in refusal(prepared, out, "--outcomes", other)
    assert "sets: expected 2 to" in refusal(prepared, out, "--sets", 1)
    assert "lags: expected 1 or more" in refusal(prepared, out, "--lags", 0)
    assert "lags: expected less than the 10 steps of the longest trace" in refusal(prepared, out, "--lags", 10)
    assert "rare: expected a probability" in refusal(prepared, out, "--rare", 0)
    out.mkdir()
    assert "exists already" in refusal(prepared, out)


@pytest.mark.parametrize("part", ["world", "traces"])
def test_each_part_has_help(run, part):
    result = run(part, "--help")
    assert result.exit_code == 0
    assert "--seed" in result.output
    assert part in run("--help").output


def test_world_command(run, tmp_path):
    out = tmp_path / "out"
    arguments = ("world", out, "--clusters", 4, "--epsilon", 0.05, "--epsilon-max", 0.3, "--walks", 500)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    told, warm_ups, scaling = (
        json.loads((out / name).read_text()) for name in ("world.json", "search.json", "scaling.json")
    )
    assert told["search"]["recall"] == 1
    assert told["times"]["fine-tuned"] < told["times"]["plain"] / 3
    assert told["times"]["distilled"] == pytest.approx(6, rel=0.1)
    assert min(row["recall"] for row in warm_ups["warm_ups"]) < 1
    assert scaling["exponents"]["clusters"]["plain"]["exponent"] == pytest.approx(1, abs=0.1)
    assert {path.name for path in out.iterdir()} == {
        "world.json", "world.png", "search.json", "search.png", "scaling.json", "scaling.png", "report.md",
    }  # fmt: skip
    assert "exists already" in run(*arguments).output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--clusters", 1), "clusters: expected 2 or more"),
        (("--epsilon", 0), "at 0 no cluster can be left"),
        (("--epsilon-max", 0.001), "epsilon_max: expected more than epsilon"),
        (("--walks", 1), "walks: expected 2 or more"),
        (("--samples", 500), "train on more samples"),
        (("--samples", -1), "samples: expected 1"),
        (("--rounds", 0), "rounds: expected 1 or more"),
    ],
)
def test_world_command_refuses(run, tmp_path, options, message):
    result = run("world", tmp_path / "out", "--walks", 10, *options)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_folder_appears_complete_or_not_at_all(tmp_path):
    out = tmp_path / "out"

    def write(text: str, *, fail: bool = False) -> None:
        with new_folder(out, True, marker="a.json") as folder:
            (folder / "a.json").write_text(text)
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("x", fail=True)
    assert not list(tmp_path.iterdir())
    write("first")
    with pytest.raises(KeyboardInterrupt):
        write("second", fail=True)
    assert (out / "a.json").read_text() == "first"
    write("third")
    assert (out / "a.json").read_text() == "third"
    (out / "a.json").rename(out / "other")
    with pytest.raises(FileExistsError, match="allow overwriting"):
        write("fourth")
