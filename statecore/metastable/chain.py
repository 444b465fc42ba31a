"""The chain between the thinking patterns of real chains of thought, and its statistics.

Counts how thinking patterns follow each other in a prepared training set and asks of that chain what the theory
(theory.py) assumes: are there sets of patterns that are seldom left, how slow is the chain, which of its transitions
are rare, and how do these relate to right answers? Every figure is compared with the same traces in random order:
traces differ in which patterns they use at all (by problem, by writer), and that alone makes a chain look slow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from scipy import sparse
from scipy.sparse import csgraph
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from tqdm.auto import tqdm

from ..data import PATTERNS_FILE
from ..traces import RowProblem, read_lines

# ----------------------------------------------------------------------------------------------------------------------
# Traces and their chain


@dataclass(frozen=True)
class PatternTraces:
    """The thinking patterns of many traces, concatenated: n steps of N traces over P patterns."""

    ids: list[str]  # N
    steps: np.ndarray  # [n], the pattern of each step
    trace: np.ndarray  # [n], the index of each step's trace, sorted
    patterns: int

    def pairs(self, lag: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pattern, pattern `lag` steps later, and trace, of all pairs of steps inside a trace."""
        same = np.flatnonzero(self.trace[:-lag] == self.trace[lag:])
        return self.steps[same], self.steps[same + lag], self.trace[same]

    def counts(self, lag: int = 1) -> np.ndarray:
        """How often each pattern follows each, `[P, P]`."""
        now, later, _ = self.pairs(lag)
        flat = np.bincount(now * self.patterns + later, minlength=self.patterns**2)
        return flat.reshape(self.patterns, self.patterns)

    def expected_counts(self) -> np.ndarray:
        """The mean of `counts` over all orders of the steps within each trace, `[P, P]`: the sum over traces of
        n_i (n_j - [i = j]) / n.
        """
        ones = np.ones(len(self.steps))
        used = sparse.csr_array((ones, (self.trace, self.steps)), shape=(len(self.ids), self.patterns))
        share = sparse.diags_array(1 / np.maximum(used.sum(1), 1)) @ used
        return (used.T @ share).toarray() - np.diag(share.sum(0))

    def shuffled(self, rng: np.random.Generator) -> PatternTraces:
        """The same steps in a random order within each trace."""
        order = np.lexsort((rng.random(len(self.steps)), self.trace))
        return PatternTraces(self.ids, self.steps[order], self.trace, self.patterns)

    def resampled(self, rng: np.random.Generator) -> PatternTraces:
        """As many traces, drawn with replacement."""
        bounds = np.searchsorted(self.trace, np.arange(len(self.ids) + 1))
        chosen = rng.integers(len(self.ids), size=len(self.ids))
        length = np.diff(bounds)[chosen]
        offset = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        steps = self.steps[np.repeat(bounds[chosen], length) + offset]
        trace = np.repeat(np.arange(len(chosen)), length)
        return PatternTraces([self.ids[i] for i in chosen], steps, trace, self.patterns)


@dataclass(frozen=True)
class PatternChain:
    """The chain between the A active patterns, which can all reach each other."""

    active: np.ndarray  # [A], their numbers
    kernel: np.ndarray  # [A, A], rows sum to 1
    stationary: np.ndarray  # [A]

    @property
    def flow(self) -> np.ndarray:
        """Stationary probability of each pair, symmetrised (additive reversibilisation); `[A, A]`."""
        flow = self.stationary[:, None] * self.kernel
        return (flow + flow.T) / 2


def read_patterns(prepared: str | Path) -> tuple[PatternTraces, list[dict[str, Any]]]:
    """The pattern sequences of all parts of a folder that `statecore prepare` wrote, and its description of each
    pattern. Traces of a single step stay in; they add no transition.
    """
    prepared = Path(prepared)
    missing = [name for name in ("train.parquet", PATTERNS_FILE) if not (prepared / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{prepared} is not a prepared training set ({', '.join(missing)} missing): make one with "
            "`statecore prepare`"
        )
    known = json.loads((prepared / PATTERNS_FILE).read_text(encoding="utf-8")).get("patterns")
    if not known:
        raise ValueError(f"{prepared / PATTERNS_FILE}: expected a list of `patterns`, got none: prepare the set again")
    ids: list[str] = []
    rows: list[np.ndarray] = []
    for path in (prepared / "train.parquet", prepared / "eval.parquet"):
        if path.exists():
            new_ids, new_rows = _read_rows(path)
            ids += new_ids
            rows += new_rows
    steps = np.concatenate([*rows, np.empty(0, dtype=np.int64)])
    trace = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    if len(steps) and not (steps.min() >= 0 and steps.max() < len(known)):
        raise ValueError(
            f"{prepared}: expected patterns 0 to {len(known) - 1}, got {steps.min()} to {steps.max()}: the parts of "
            "this folder do not belong together, prepare the set again"
        )
    traces = PatternTraces(ids, steps, trace, len(known))
    if not traces.counts().any():
        raise ValueError(
            f"{prepared}: expected traces of two steps or more, got {len(rows)} traces of at most one: there is no "
            "transition to count; prepare with a smaller max_step_tokens"
        )
    return traces, known


def _read_rows(path: Path) -> tuple[list[str], list[np.ndarray]]:
    lacking = sorted({"id", "patterns"} - set(pq.read_schema(path).names))
    if lacking:
        raise ValueError(
            f"{path}: expected the columns id and patterns, got none called {', '.join(lacking)}: prepare the set "
            "again with `statecore prepare`"
        )
    table = pq.read_table(path, columns=["id", "patterns"])
    return table["id"].to_pylist(), [np.asarray(row, dtype=np.int64) for row in table["patterns"].to_pylist()]


def pattern_chain(counts: np.ndarray) -> PatternChain:
    """The maximum-likelihood chain of transition counts `[P, P]` on the largest set of patterns that all reach each
    other. Raises ValueError where this set has fewer than three patterns.
    """
    _, component = csgraph.connected_components(sparse.csr_array(counts), connection="strong")
    weight = np.bincount(component, weights=counts.sum(1))
    active = np.flatnonzero(component == np.argmax(weight))
    if len(active) < 3:
        raise ValueError(
            f"expected at least 3 patterns that follow each other in turn, got {len(active)}: read more traces, or "
            "prepare them with other patterns"
        )
    inside = counts[np.ix_(active, active)].astype(float)
    kernel = inside / inside.sum(1, keepdims=True)
    balance = np.vstack([kernel.T - np.eye(len(active)), np.ones(len(active))])
    stationary = np.linalg.lstsq(balance, np.append(np.zeros(len(active)), 1.0), rcond=None)[0]
    return PatternChain(active, kernel, stationary)


# ----------------------------------------------------------------------------------------------------------------------
# Slow modes


def time_scales(kernel: np.ndarray, lag: int = 1, count: int = 5) -> list[float]:
    """Implied time scales -lag / log |lambda_i| in steps, slowest first, without the stationary one."""
    sizes = np.sort(np.abs(np.linalg.eigvals(kernel)))[::-1][1 : count + 1]
    return [float(-lag / np.log(min(size, 1 - 1e-12))) if size > 0 else 0.0 for size in sizes]


def slowest_scales(traces: PatternTraces, lags: int) -> list[float]:
    """The slowest implied time scale at each lag from 1 to `lags`."""
    return [time_scales(pattern_chain(traces.counts(lag)).kernel, lag)[0] for lag in range(1, lags + 1)]


class MetastableSets(NamedTuple):
    labels: np.ndarray  # [A], the set of each active pattern
    eigenvalues: list[float]  # of the excess, largest first

    @property
    def number(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def crossing(self) -> np.ndarray:
        """Whether two patterns are in different sets, bool `[A, A]`."""
        return self.labels[:, None] != self.labels


def metastable_sets(
    excess: np.ndarray, weight: np.ndarray, count: int | None = None, *, most: int = 8, seed: int = 0
) -> MetastableSets:
    """Sets of patterns that follow each other more often than expected, numbered by weight.

    excess `[A, A]` is flow minus expected flow, weight `[A]` the share of steps. K-means, weighted by `weight`, on the
    leading eigenvectors of the symmetrised excess (a spectral clustering). With independent draws as the expectation
    these are the slow eigenvectors of the reversible chain; with random orders of each trace they show only what the
    order of the steps contributes. Default `count`: before the largest drop among the first `most` eigenvalues.
    """
    size = len(weight)
    if count is not None and not 2 <= count < size:
        raise ValueError(f"sets: expected 2 to {size - 1} for {size} patterns that follow each other, got {count}")
    root = np.sqrt(weight)
    values, vectors = np.linalg.eigh((excess + excess.T) / 2 / np.outer(root, root))
    values, vectors = values[::-1], vectors[:, ::-1] / root[:, None]
    if count is None:
        count = 2 + int(np.argmax(-np.diff(values[: min(most, size - 1)])))
    labels = KMeans(count, n_init=20, random_state=seed).fit_predict(vectors[:, : count - 1], sample_weight=weight)
    order = np.argsort(-np.bincount(labels, weights=weight, minlength=count), kind="stable")
    return MetastableSets(np.argsort(order)[labels], values[:most].tolist())


def excesses(traces: PatternTraces, chain: PatternChain) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Flow minus expected flow `[A, A]` and weight `[A]`: stationary flow against independent draws ("chance"), and
    counted flow against random orders of each trace's steps ("order").
    """
    active = np.ix_(chain.active, chain.active)
    counts, expected = traces.counts()[active], traces.expected_counts()[active]
    weight = (counts.sum(0) + counts.sum(1)) / (2 * counts.sum())
    return {
        "chance": (chain.flow - np.outer(chain.stationary, chain.stationary), chain.stationary),
        "order": ((counts - expected) / counts.sum(), weight),
    }


def describe_sets(traces: PatternTraces, chain: PatternChain, sets: np.ndarray) -> list[dict[str, Any]]:
    """For each set its patterns, its share of all steps, the mean position of its steps in a trace (0 first, 1 last),
    and how often a step of the set is followed by another one: counted, and with each trace in random order.
    """
    length = np.bincount(traces.trace, minlength=len(traces.ids))
    first = np.cumsum(length) - length
    position = (np.arange(len(traces.steps)) - first[traces.trace]) / np.maximum(length[traces.trace] - 1, 1)
    counts, expected = traces.counts(), traces.expected_counts()
    rows = []
    for k in range(sets.max() + 1):
        own = chain.active[sets == k]
        inside = np.ix_(own, own)
        rows.append(
            {
                "set": k,
                "patterns": own.tolist(),
                "share": float(np.isin(traces.steps, own).mean()),
                "position": float(position[np.isin(traces.steps, own)].mean()),
                "stay": float(counts[inside].sum() / counts[own].sum()),
                "stay_in_random_order": float(expected[inside].sum() / expected[own].sum()),
            }
        )
    return rows


@dataclass(frozen=True)
class Resampling:
    """The chain of R random orders of the steps of each trace, and of R resamplings of the traces."""

    random_order_scales: np.ndarray  # [R, lags], the slowest time scale
    resampled_scales: np.ndarray  # [R, lags]
    random_order_eigenvalues: list[float]  # [R], the leading one of the excess over random orders
    agreement: dict[str, list[float]]  # [R] per kind of set: adjusted Rand index of the sets of resampled traces


def resample(
    traces: PatternTraces, chain: PatternChain, sets: Mapping[str, MetastableSets], lags: int, rounds: int, seed: int
) -> Resampling:
    rng = np.random.default_rng(seed)
    random_order_scales, resampled_scales, random_order_eigenvalues = [], [], []
    agreement: dict[str, list[float]] = {name: [] for name in sets}
    for _ in tqdm(range(rounds), desc="random orders and resamplings"):
        shuffled, resampled = traces.shuffled(rng), traces.resampled(rng)
        random_order_scales.append(slowest_scales(shuffled, lags))
        resampled_scales.append(slowest_scales(resampled, lags))
        excess, weight = excesses(shuffled, pattern_chain(shuffled.counts()))["order"]
        random_order_eigenvalues.append(metastable_sets(excess, weight, 2).eigenvalues[0])
        other = pattern_chain(resampled.counts())
        _, mine, theirs = np.intersect1d(chain.active, other.active, return_indices=True)
        for name, (excess, weight) in excesses(resampled, other).items():
            labels = metastable_sets(excess, weight, sets[name].number, seed=seed).labels
            agreement[name].append(adjusted_rand_score(sets[name].labels[mine], labels[theirs]))
    return Resampling(np.array(random_order_scales), np.array(resampled_scales), random_order_eigenvalues, agreement)


# ----------------------------------------------------------------------------------------------------------------------
# Rare transitions and right answers


def trace_features(
    traces: PatternTraces, chain: PatternChain, sets: Mapping[str, np.ndarray], rare: float
) -> dict[str, np.ndarray]:
    """Figures of each trace, `[N]` each, NaN for traces without a transition.

    `transitions` is their number; `crossings_<name>` the share of them from one of `sets[name]` to another; `rare` the
    share with a probability below `rare`; `surprise_bits` the mean of -log2 p. Probabilities are those of the chain
    without the trace itself, with one count spread over all patterns.
    """
    now, later, trace = traces.pairs()
    size, number = traces.patterns, len(traces.ids)
    counts = traces.counts()

    def own(key: np.ndarray) -> np.ndarray:
        _, inverse, times = np.unique(key, return_inverse=True, return_counts=True)
        return times[inverse]

    row = trace * size + now
    probability = (counts[now, later] - own(row * size + later) + 1 / size) / (counts.sum(1)[now] - own(row) + 1)
    total = np.bincount(trace, minlength=number)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(trace, weights=values, minlength=number) / np.where(total, total, np.nan)

    features = {"transitions": np.where(total, total, np.nan).astype(float)}
    for name, labels in sets.items():
        set_of = np.full(size, -1)
        set_of[chain.active] = labels
        features[f"crossings_{name}"] = mean((set_of[now] != set_of[later]).astype(float))
    return features | {
        "rare": mean((probability < rare).astype(float)),
        "surprise_bits": mean(-np.log2(probability)),
    }


class Outcome(NamedTuple):
    right: bool
    group: str  # right and wrong traces are compared within a group


@dataclass(frozen=True)
class OutcomeOptions:
    """Where the outcomes of traces are read from.

    Args:
        outcomes: .jsonl, .jsonl.gz or .parquet file that says by id which answers are right; prepared data do not.
        id_field: its field that holds the trace's id.
        correct_field: its field that holds true, false or null.
        group_fields: right and wrong traces are compared within equal values of these of its fields.
    """

    outcomes: str | Path | None = None
    id_field: str = "id"
    correct_field: str = "correct"
    group_fields: Sequence[str] = ("model",)


def read_outcomes(options: OutcomeOptions, ids: Sequence[str]) -> dict[str, Outcome]:
    """Outcomes by id, without those that are null. Raises ValueError where none belongs to a trace of `ids`."""
    path, id_field, correct_field = options.outcomes, options.id_field, options.correct_field
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"outcomes: there is no file {path}: expected the .jsonl(.gz) or .parquet of the traces"
        )
    outcomes: dict[str, Outcome] = {}
    for line, row in read_lines(str(path), "train"):
        if isinstance(row, RowProblem):
            continue
        lacking = [name for name in (id_field, correct_field, *options.group_fields) if name not in row]
        if lacking:
            raise ValueError(
                f"{path}, line {line}: expected the fields {id_field}, {correct_field} and "
                f"{', '.join(options.group_fields)}, got no {', '.join(lacking)}: name the fields with the options of "
                "the same name"
            )
        value = row[correct_field]
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{path}, line {line}: {correct_field}: expected true, false or null, got {value!r}")
        if value is not None:
            group = " / ".join(str(row[name]) for name in options.group_fields)
            outcomes[str(row[id_field])] = Outcome(value, group)
    if not outcomes.keys() & set(ids):
        raise ValueError(
            f"outcomes: expected rows with ids of the prepared traces (such as {ids[0]}) and true or false in "
            f"{correct_field}, got none in {path}"
        )
    return outcomes


def compare_outcomes(
    features: Mapping[str, np.ndarray], right: np.ndarray, group: np.ndarray, *, shuffles: int = 10_000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """How right and wrong traces differ within groups, by feature.

    `difference` is the mean of right minus wrong inside each group that has both, groups weighted by n m / (n + m);
    `p` is its two-sided p-value among `shuffles` reassignments of the outcomes within groups. `given_length` and
    `p_given_length` are the same for the part of the feature that log n and 1 / n (n transitions) do not explain within
    the group: long traces are more often wrong, and a single event is a smaller share of them. right bool `[n]`, group
    int `[n]`, features `[n]` each; without a group that has both outcomes there is no result.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(group == g) for g in np.unique(group)]
    members = [own for own in members if 0 < right[own].sum() < len(own)]
    columns: list[np.ndarray] = []
    for name, values in features.items():
        length = features["transitions"]
        columns += [values, values if name == "transitions" else _residual_given_length(values, length, members)]
    table = np.stack(columns)  # [2 features, n]
    observed, null, weight = np.zeros(len(table)), np.zeros((shuffles, len(table))), 0.0
    for own in members:
        labels, features_of_own = right[own], table[:, own]
        drawn = rng.permuted(np.tile(labels, (shuffles, 1)), axis=1).astype(float)
        n, m = labels.sum(), (~labels).sum()
        share = n * m / (n + m)
        observed += share * _mean_difference(features_of_own, labels.astype(float), n, m)
        null += share * _mean_difference(features_of_own, drawn, n, m)
        weight += share
    result = {}
    for i, name in enumerate(features):
        row = {}
        for j, key, p_key in ((2 * i, "difference", "p"), (2 * i + 1, "given_length", "p_given_length")):
            as_large = np.abs(null[:, j]) >= np.abs(observed[j]) - 1e-12
            row[key] = float(observed[j] / weight)
            row[p_key] = float((1 + as_large.sum()) / (1 + shuffles))
        if name == "transitions":  # at equal length they do not differ
            del row["given_length"], row["p_given_length"]
        result[name] = row
    return result


def _residual_given_length(values: np.ndarray, length: np.ndarray, members: Sequence[np.ndarray]) -> np.ndarray:
    """`values` minus their least-squares fit on 1, log n and 1 / n within each group; n is the length."""
    explained = np.zeros_like(values)
    for own in members:
        basis = np.stack([np.ones(len(own)), np.log(length[own]), 1 / length[own]], axis=1)
        explained[own] = basis @ np.linalg.lstsq(basis, values[own], rcond=None)[0]
    return values - explained


def _mean_difference(table: np.ndarray, chosen: np.ndarray, n: int, m: int) -> np.ndarray:
    """Mean over the n chosen columns minus mean over the m others; chosen 0 or 1, `[..., n + m]`."""
    inside = chosen @ table.T
    return inside / n - (table.sum(1) - inside) / m


def describe_outcomes(
    traces: PatternTraces, features: Mapping[str, np.ndarray], outcomes: Mapping[str, Outcome], seed: int
) -> dict[str, Any]:
    """Means of each feature of right and wrong traces by group, and their comparison."""
    known = [i for i, name in enumerate(traces.ids) if name in outcomes and features["transitions"][i] > 0]
    of_known = [outcomes[traces.ids[i]] for i in known]
    right = np.array([outcome.right for outcome in of_known], dtype=bool)
    groups = sorted({outcome.group for outcome in of_known})
    group = np.array([groups.index(outcome.group) for outcome in of_known], dtype=int)
    features = {name: values[np.array(known, dtype=int)] for name, values in features.items()}
    table = []
    for g, name in enumerate(groups):
        sides = {"right": (group == g) & right, "wrong": (group == g) & ~right}
        row: dict[str, Any] = {"group": name} | {side: int(own.sum()) for side, own in sides.items()}
        for feature, values in features.items():
            for side, own in sides.items():
                row[f"{feature}_{side}"] = float(values[own].mean()) if own.any() else None
        table.append(row)
    comparable = any(row["right"] and row["wrong"] for row in table)
    return {
        "traces_with_an_outcome": len(known),
        "traces": len(traces.ids),
        "right": int(right.sum()),
        "groups": table,
        "comparison": compare_outcomes(features, right, group, seed=seed) if comparable else {},
    }
