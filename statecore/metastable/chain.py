"""`statecore metastable traces`: the chain between the thinking patterns of real chains of thought.

Counts how thinking patterns follow each other in a prepared training set and asks of that chain what the theory of
metastable.py assumes: are there sets of patterns that are seldom left, how slow is it, what are its rare transitions,
and do they go with right answers? Everything stands beside the same traces with their steps in random order: traces
differ in the patterns that they use at all (their problem, their writer), and that alone makes a chain look slow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy import sparse
from scipy.sparse import csgraph
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from tqdm.auto import tqdm

from ..data import PATTERNS_FILE
from ..figures import new_figure
from ..outputs import new_folder, write_json
from ..traces import RowProblem, read_lines
from .world_command import without

# ----------------------------------------------------------------------------------------------------------------------
# The chain between thinking patterns


@dataclass(frozen=True)
class PatternTraces:
    """The thinking patterns of many traces, one behind the other: n steps of N traces over P patterns."""

    ids: list[str]  # N
    steps: np.ndarray  # [n], the pattern of each step
    trace: np.ndarray  # [n], the trace of each step, not decreasing
    patterns: int

    def pairs(self, lag: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pattern now, pattern `lag` steps later, and trace, for all pairs inside a trace."""
        same = np.flatnonzero(self.trace[:-lag] == self.trace[lag:])
        return self.steps[same], self.steps[same + lag], self.trace[same]

    def counts(self, lag: int = 1) -> np.ndarray:
        """How often each pattern follows each, `[P, P]`."""
        now, later, _ = self.pairs(lag)
        flat = np.bincount(now * self.patterns + later, minlength=self.patterns**2)
        return flat.reshape(self.patterns, self.patterns)

    def expected_counts(self) -> np.ndarray:
        """The mean of `counts` over all orders of the steps within each trace, `[P, P]`: sum over traces of
        n_i (n_j - [i = j]) / n.
        """
        ones = np.ones(len(self.steps))
        used = sparse.csr_array((ones, (self.trace, self.steps)), shape=(len(self.ids), self.patterns))
        share = sparse.diags_array(1 / np.maximum(used.sum(1), 1)) @ used
        return (used.T @ share).toarray() - np.diag(share.sum(0))

    def shuffled(self, rng: np.random.Generator) -> PatternTraces:
        """The same steps in a random order within each trace."""
        return PatternTraces(self.ids, self.steps[np.lexsort((rng.random(len(self.steps)), self.trace))], self.trace,
                             self.patterns)  # fmt: skip

    def resampled(self, rng: np.random.Generator) -> PatternTraces:
        """As many traces, drawn with replacement."""
        bounds = np.searchsorted(self.trace, np.arange(len(self.ids) + 1))
        chosen = rng.integers(len(self.ids), size=len(self.ids))
        length = np.diff(bounds)[chosen]
        offset = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        steps = self.steps[np.repeat(bounds[chosen], length) + offset]
        return PatternTraces([self.ids[i] for i in chosen], steps, np.repeat(np.arange(len(chosen)), length),
                             self.patterns)  # fmt: skip


@dataclass(frozen=True)
class PatternChain:
    """The chain between the patterns that can all reach each other, A of them."""

    active: np.ndarray  # [A], their numbers
    kernel: np.ndarray  # [A, A], rows sum to 1
    stationary: np.ndarray  # [A]

    @property
    def flow(self) -> np.ndarray:
        """Probability of each pair in the long run, the same both ways (additive reversibilisation); `[A, A]`."""
        flow = self.stationary[:, None] * self.kernel
        return (flow + flow.T) / 2


def read_patterns(prepared: str | Path) -> tuple[PatternTraces, list[dict[str, Any]]]:
    """The pattern sequences of a folder that `statecore prepare` wrote, all parts of it, and what it says of each
    pattern. Traces of a single step stay in, they add no transition.
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
    for part in ("train", "eval"):
        path = prepared / f"{part}.parquet"
        if not path.exists():
            continue
        lacking = sorted({"id", "patterns"} - set(pq.read_schema(path).names))
        if lacking:
            raise ValueError(
                f"{path}: expected the columns id and patterns, got none called {', '.join(lacking)}: prepare the set "
                "again with `statecore prepare`"
            )
        table = pq.read_table(path, columns=["id", "patterns"])
        ids += table["id"].to_pylist()
        rows += [np.asarray(row, dtype=np.int64) for row in table["patterns"].to_pylist()]
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


def pattern_chain(counts: np.ndarray) -> PatternChain:
    """The maximum-likelihood chain of transition counts `[P, P]` on the largest set of patterns that all reach each
    other. Raises ValueError where that is fewer than three patterns.
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


def time_scales(kernel: np.ndarray, lag: int = 1, most: int = 5) -> list[float]:
    """Implied time scales -lag / log |lambda_i| in steps, slowest first, without the stationary one."""
    sizes = np.sort(np.abs(np.linalg.eigvals(kernel)))[::-1][1 : most + 1]
    return [float(-lag / np.log(min(size, 1 - 1e-12))) if size > 0 else 0.0 for size in sizes]


def metastable_sets(
    excess: np.ndarray, weight: np.ndarray, count: int | None = None, *, most: int = 8, seed: int = 0
) -> tuple[np.ndarray, list[float]]:
    """Sets of patterns that follow each other more often than expected: the set of each, `[A]`, numbered by weight, and
    the eigenvalues they were read from.

    excess `[A, A]` is flow minus expected flow, weight `[A]` the share of steps. K-means, weighted by `weight`, on the
    leading eigenvectors of the symmetrised excess (a spectral clustering). With independent draws as the expectation
    these are the slow eigenvectors of the reversible chain; with the random order of each trace they are what the order
    of the steps alone makes. Default `count`: before the largest drop among the first `most` eigenvalues.
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
    return np.argsort(order)[labels], values[:most].tolist()


def excesses(traces: PatternTraces, chain: PatternChain) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Flow minus what is expected `[A, A]` and weight `[A]`: of independent draws under the stationary law ("chance"),
    and of each trace's steps in random order under the counted one ("order").
    """
    active = np.ix_(chain.active, chain.active)
    counts, expected = traces.counts()[active], traces.expected_counts()[active]
    weight = (counts.sum(0) + counts.sum(1)) / (2 * counts.sum())
    return {
        "chance": (chain.flow - np.outer(chain.stationary, chain.stationary), chain.stationary),
        "order": ((counts - expected) / counts.sum(), weight),
    }


def describe_sets(traces: PatternTraces, chain: PatternChain, sets: np.ndarray) -> list[dict[str, Any]]:
    """For each set its patterns, its share of all steps, where in a trace its steps stand on average (0 first, 1 last),
    and how often the step after one of its steps is one of its steps too: counted, and with each trace in random order.
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


# ----------------------------------------------------------------------------------------------------------------------
# Rare transitions and right answers


def trace_features(
    traces: PatternTraces, chain: PatternChain, sets: Mapping[str, np.ndarray], rare: float
) -> dict[str, np.ndarray]:
    """What each trace does, `[N]` each, not-a-number for traces without a transition.

    `transitions` their number; `crossings_<name>` the share of them from one of `sets[name]` to another; `rare` the
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


def read_outcomes(
    path: str | Path, id_field: str, correct_field: str, group_fields: Sequence[str]
) -> dict[str, tuple[bool, str]]:
    """Whether each trace's answer is right, and its group, by id; rows that do not know are left out."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"outcomes: there is no file {path}: expected the .jsonl(.gz) or .parquet of the traces"
        )
    outcomes: dict[str, tuple[bool, str]] = {}
    for line, row in read_lines(str(path), "train"):
        if isinstance(row, RowProblem):
            continue
        lacking = [name for name in (id_field, correct_field, *group_fields) if name not in row]
        if lacking:
            raise ValueError(
                f"{path}, line {line}: expected the fields {id_field}, {correct_field} and {', '.join(group_fields)}, "
                f"got no {', '.join(lacking)}: name the fields with the options of the same name"
            )
        value = row[correct_field]
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{path}, line {line}: {correct_field}: expected true, false or null, got {value!r}")
        if value is not None:
            outcomes[str(row[id_field])] = (value, " / ".join(str(row[name]) for name in group_fields))
    return outcomes


def compare_outcomes(
    features: Mapping[str, np.ndarray], right: np.ndarray, group: np.ndarray, *, shuffles: int = 10_000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """How right and wrong traces differ within groups, by feature.

    `difference` is the mean of right minus wrong inside each group that has both, groups weighted by n m / (n + m);
    `p` its two-sided p-value among `shuffles` reassignments of the outcomes within groups; `given_length` and
    `p_given_length` are the same after what log n and 1 / n explain of the feature inside each group is taken off (n
    transitions; least squares): long traces are more often wrong, and what happens once weighs less in them. right
    bool `[n]`, group int `[n]`, features `[n]` each; no group with both outcomes: no result.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(group == g) for g in np.unique(group)]
    members = [own for own in members if 0 < right[own].sum() < len(own)]
    columns: list[np.ndarray] = []
    for name, values in features.items():
        columns.append(values)
        number = features["transitions"]
        explained = np.zeros_like(values)
        for own in members if name != "transitions" else []:
            length = np.stack([np.ones(len(own)), np.log(number[own]), 1 / number[own]], axis=1)
            explained[own] = length @ np.linalg.lstsq(length, values[own], rcond=None)[0]
        columns.append(values - explained)
    table = np.stack(columns)  # [2 features, n]
    observed, null, weight = np.zeros(len(table)), np.zeros((shuffles, len(table))), 0.0
    for own in members:
        labels = right[own]
        drawn = rng.permuted(np.tile(labels, (shuffles, 1)), axis=1).astype(float)
        n, m = labels.sum(), (~labels).sum()
        share = n * m / (n + m)
        total = table[:, own].sum(1)

        def difference(chosen: np.ndarray, own=own, n=n, m=m, total=total) -> np.ndarray:
            inside = chosen @ table[:, own].T
            return inside / n - (total - inside) / m

        observed += share * difference(labels.astype(float))
        null += share * difference(drawn)
        weight += share
    result = {}
    for i, name in enumerate(features):
        row = {}
        for j, suffix in ((2 * i, ""), (2 * i + 1, "_given_length")):
            if suffix and name == "transitions":
                continue
            p = (1 + (np.abs(null[:, j]) >= np.abs(observed[j]) - 1e-12).sum()) / (1 + shuffles)
            row |= {("difference" + suffix if not suffix else suffix[1:]): float(observed[j] / weight), "p" + suffix: p}
        result[name] = {key: float(value) for key, value in row.items()}
    return result


# ----------------------------------------------------------------------------------------------------------------------
# The run


def traces(
    prepared: str | Path,
    output: str | Path,
    *,
    outcomes: str | Path | None = None,
    id_field: str = "id",
    correct_field: str = "correct",
    group_fields: Sequence[str] = ("model",),
    sets: int | None = None,
    rare: float = 0.01,
    lags: int = 6,
    shuffles: int = 50,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Looks at the chain between the thinking patterns of real traces: metastable sets, time scales, rare transitions.

    Writes the chain, its time scales and, with outcomes, how right and wrong traces differ, as pictures, each with its
    JSON, and a report. Returns what the report says.

    Args:
        prepared: the folder that `statecore prepare` wrote.
        output: the folder to write; it appears when everything is written.
        outcomes: .jsonl, .jsonl.gz or .parquet file that says by id which answers are right; prepared data do not.
        id_field, correct_field: where a row of it keeps the trace's id, and true, false or null.
        group_fields: right and wrong traces are compared within equal values of these fields of it.
        sets: number of metastable sets; default: before the largest drop among the first 8 eigenvalues.
        rare: a transition is rare below this probability.
        lags: time scales at 1 to this many steps; on a Markov chain they are all the same.
        shuffles: random orders of the steps of each trace, and resamplings of the traces, to compare with.
        seed: of everything drawn.
        overwrite: replace such a folder that is there already.
    """
    for name, value, least in (("lags", lags, 1), ("shuffles", shuffles, 2)):
        if value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}")
    if not 0 < rare < 1:
        raise ValueError(f"rare: expected a probability between 0 and 1, both excluded, got {rare}")
    walked, known = read_patterns(prepared)
    longest = int(np.bincount(walked.trace).max())
    if lags >= longest:
        raise ValueError(f"lags: expected less than the {longest} steps of the longest trace, got {lags}")
    counts = walked.counts()
    chain = pattern_chain(counts)
    found = {
        name: metastable_sets(excess, weight, sets, seed=seed)
        for name, (excess, weight) in excesses(walked, chain).items()
    }
    labels = {name: own for name, (own, _) in found.items()}
    answers = None if outcomes is None else read_outcomes(outcomes, id_field, correct_field, group_fields)
    if answers is not None and not answers.keys() & set(walked.ids):
        raise ValueError(
            f"outcomes: expected rows with ids of the prepared traces (such as {walked.ids[0]}) and true or false in "
            f"{correct_field}, got none in {outcomes}"
        )

    with new_folder(output, overwrite, marker="chain.json") as folder:
        rng = np.random.default_rng(seed)
        scales = [time_scales(pattern_chain(walked.counts(lag)).kernel, lag) for lag in range(1, lags + 1)]
        mixed_scales, again, mixed_top = [], [], []
        agreement: dict[str, list[float]] = {name: [] for name in labels}
        for _ in tqdm(range(shuffles), desc="random orders and resamplings"):
            mixed, other = walked.shuffled(rng), walked.resampled(rng)
            for variant, slowest in ((mixed, mixed_scales), (other, again)):
                slowest.append(
                    [time_scales(pattern_chain(variant.counts(lag)).kernel, lag)[0] for lag in range(1, lags + 1)]
                )
            mixed_top.append(metastable_sets(*excesses(mixed, pattern_chain(mixed.counts()))["order"], 2)[1][0])
            redone = pattern_chain(other.counts())
            _, mine, theirs = np.intersect1d(chain.active, redone.active, return_indices=True)
            for name, (excess, weight) in excesses(other, redone).items():
                count = int(labels[name].max()) + 1
                relabelled, _ = metastable_sets(excess, weight, count, seed=seed)
                agreement[name].append(adjusted_rand_score(labels[name][mine], relabelled[theirs]))
        probability = chain.stationary[:, None] * chain.kernel
        described = {}
        for name, (own, eigenvalues) in found.items():
            rows = describe_sets(walked, chain, own)
            for row in rows:
                row["examples"] = [
                    _opening(known[i]) for i in sorted(row["patterns"], key=lambda i: -counts[i].sum())[:4]
                ]
            crossing = own[:, None] != own
            described[name] = {
                "sets": rows,
                "eigenvalues": eigenvalues,
                "found_again": {"mean": float(np.mean(agreement[name])), "least": float(np.min(agreement[name]))},
                "crossings": float(probability[crossing].sum()),
                "crossing_pairs_rare": float((chain.kernel[crossing] < rare).mean()),
            }
        absolute = np.sort(np.abs(np.linalg.eigvals(chain.kernel)))[::-1]
        lift = counts / np.maximum(walked.expected_counts(), 1e-12)
        often = np.argsort(np.where(counts >= 20, lift, 0) - 1e9 * np.eye(len(counts)), axis=None)[::-1][:12]
        result: dict[str, Any] = {
            "prepared": {
                "traces": len(walked.ids),
                "steps": len(walked.steps),
                "transitions": int(counts.sum()),
                "patterns": walked.patterns,
                "active_patterns": len(chain.active),
                "transitions_between_active": float(counts[np.ix_(chain.active, chain.active)].sum() / counts.sum()),
            },
            "spectral_gap": float(1 - absolute[1]),
            "eigenvalues": absolute[:10].tolist(),
            "sets": described,
            "order_eigenvalue_in_random_order": float(np.max(mixed_top)),
            "same_pattern_again": {
                "share": float(np.trace(counts) / counts.sum()),
                "in_random_order": float(np.trace(walked.expected_counts()) / counts.sum()),
            },
            "rare": {
                "below": rare,
                "transitions": float(probability[chain.kernel < rare].sum()),
                "pairs": float((chain.kernel < rare).mean()),
            },
            "successions": [
                {"from": int(i), "to": int(j), "count": int(counts[i, j]), "times_random_order": float(lift[i, j])}
                for i, j in (divmod(int(at), len(counts)) for at in often)
            ],
        }
        times = {
            "lags": list(range(1, lags + 1)),
            "time_scales": scales,
            "slowest_resampled": {"mean": np.mean(again, 0).tolist(), "deviation": np.std(again, 0, ddof=1).tolist()},
            "slowest_in_random_order": {
                "mean": np.mean(mixed_scales, 0).tolist(),
                "deviation": np.std(mixed_scales, 0, ddof=1).tolist(),
            },
        }
        result["time_scales"] = times
        settings = {"sets": sets, "rare": rare, "lags": lags, "shuffles": shuffles, "seed": seed}
        whole = {"settings": settings} | without(result, "time_scales")
        whole |= {"active": chain.active.tolist(), "kernel": chain.kernel.tolist()}
        whole |= {"stationary": chain.stationary.tolist(), "set_of": {k: own.tolist() for k, own in labels.items()}}
        write_json(folder / "chain.json", whole)
        draw_chain(folder / "chain.png", chain, labels, counts, lift)
        write_json(folder / "times.json", times)
        draw_times(folder / "times.png", times)
        if answers is not None:
            result["outcomes"] = _outcomes(walked, chain, labels, rare, answers, seed)
            write_json(folder / "outcomes.json", result["outcomes"])
            if result["outcomes"]["comparison"]:
                draw_outcomes(folder / "outcomes.png", result["outcomes"])
        text = _traces_text(result)
        (folder / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return result


def _opening(pattern: Mapping[str, Any]) -> str:
    """The first words of a pattern's most typical step."""
    words = " ".join(" ".join(pattern.get("examples") or [""]).split()[:9])
    return f"{pattern['id']}: {words}".replace("|", "/")


def _outcomes(
    walked: PatternTraces,
    chain: PatternChain,
    labels: Mapping[str, np.ndarray],
    rare: float,
    answers: Mapping[str, tuple[bool, str]],
    seed: int,
) -> dict[str, Any]:
    features = trace_features(walked, chain, labels, rare)
    known = np.array([i for i, name in enumerate(walked.ids) if name in answers and features["transitions"][i] > 0])
    right = np.array([answers[walked.ids[i]][0] for i in known], dtype=bool)
    names = [answers[walked.ids[i]][1] for i in known]
    groups = sorted(set(names))
    group = np.array([groups.index(name) for name in names], dtype=int)
    own = {name: values[known] for name, values in features.items()}
    table = [
        {
            "group": name,
            "right": int(right[group == g].sum()),
            "wrong": int((~right[group == g]).sum()),
            **{
                f"{feature}_{side}": float(values[(group == g) & chosen].mean())
                if ((group == g) & chosen).any()
                else None
                for feature, values in own.items()
                for side, chosen in (("right", right), ("wrong", ~right))
            },
        }
        for g, name in enumerate(groups)
    ]
    both = any(row["right"] and row["wrong"] for row in table)
    return {
        "traces_with_an_outcome": len(known),
        "traces": len(walked.ids),
        "right": int(right.sum()),
        "groups": table,
        "comparison": compare_outcomes(own, right, group, seed=seed) if both else {},
    }


def draw_chain(
    path: Path, chain: PatternChain, sets: Mapping[str, np.ndarray], counts: np.ndarray, lift: np.ndarray
) -> None:
    """How much likelier than by chance, and than in random order, each pattern follows each, sorted by set; and the
    successions that the order of steps favours most, those between two sets in red.
    """
    figure = new_figure((19, 6))
    *matrices, network = figure.subplots(1, 3)
    size = len(chain.active)
    with np.errstate(divide="ignore", invalid="ignore"):
        lifts = {"chance": chain.kernel / chain.stationary, "order": lift[np.ix_(chain.active, chain.active)]}
        logs = {name: np.where(values > 0, np.log2(values), np.nan) for name, values in lifts.items()}
    for axes, (name, values) in zip(matrices, logs.items(), strict=True):
        order = np.lexsort((-chain.stationary, sets[name]))
        image = axes.imshow(values[np.ix_(order, order)], cmap="RdBu_r", vmin=-4, vmax=4, interpolation="nearest")
        for edge in np.flatnonzero(np.diff(sets[name][order])) + 0.5:
            axes.axhline(edge, color="black", linewidth=0.8)
            axes.axvline(edge, color="black", linewidth=0.8)
        if size <= 64:
            axes.set_xticks(range(size), chain.active[order], fontsize=6, rotation=90)
            axes.set_yticks(range(size), chain.active[order], fontsize=6)
        against = {"chance": "chance", "order": "random order in each trace"}[name]
        axes.set(xlabel="next pattern, by set", ylabel="pattern", title=f"log2 of frequency over {against}")
    figure.colorbar(image, ax=matrices, shrink=0.7)
    labels = sets["order"][order]
    place = np.stack([f(2 * np.pi * np.arange(size) / size) for f in (np.cos, np.sin)], axis=1)
    own = chain.active[order]
    gain = counts[np.ix_(own, own)] * (1 - 1 / np.maximum(lift[np.ix_(own, own)], 1))
    np.fill_diagonal(gain, 0)
    for at in np.argsort(gain, axis=None)[::-1][: 2 * size]:
        i, j = divmod(int(at), size)
        across = labels[i] != labels[j]
        network.annotate(
            "", place[j], place[i], zorder=2 if across else 1,
            arrowprops={
                "arrowstyle": "-|>", "color": "tab:red" if across else "0.6", "alpha": 0.7, "shrinkA": 8, "shrinkB": 8,
                "linewidth": float(4 * gain[i, j] / gain.max()) + 0.3, "connectionstyle": "arc3,rad=0.2",
            },
        )  # fmt: skip
    weight = 3_000 * counts[own].sum(1) / counts.sum() + 40
    network.scatter(*place.T, s=weight, c=labels, cmap="tab10", vmin=0, vmax=9, zorder=3)
    for name, (x, y) in zip(chain.active[order], place, strict=True):
        network.text(1.12 * x, 1.12 * y, str(name), ha="center", va="center", fontsize=7)
    network.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal", title="favoured successions; red: between sets")
    network.axis("off")
    figure.savefig(path, dpi=100)


def draw_times(path: Path, times: Mapping[str, Any]) -> None:
    """Implied time scales against the lag, and the slowest one with the steps in random order."""
    figure = new_figure((6.5, 4))
    axes = figure.add_subplot(xlabel="lag, steps", ylabel="implied time scale, steps")
    lags = times["lags"]
    for i in range(min(map(len, times["time_scales"]))):
        scale = [row[i] for row in times["time_scales"]]
        axes.plot(
            lags, scale, ".-", color="tab:blue", alpha=1 / (1 + i), label="real order, slowest first" if not i else ""
        )
    for name, colour, label in (
        ("slowest_resampled", "tab:blue", None), ("slowest_in_random_order", "tab:orange", "random order, slowest"),
    ):  # fmt: skip
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
    place = np.arange(len(rows))
    for axes, (feature, row) in zip(panels, outcomes["comparison"].items(), strict=True):
        axes.barh(place - 0.2, [r[f"{feature}_right"] for r in rows], 0.4, color="tab:green", label="right")
        axes.barh(place + 0.2, [r[f"{feature}_wrong"] for r in rows], 0.4, color="tab:red", label="wrong")
        axes.set(title=f"{feature.replace('_', ' ')} (p = {row['p']:.2g})")
    panels[0].set_yticks(place, [f"{r['group']}\n{r['right']} right, {r['wrong']} wrong" for r in rows], fontsize=8)
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _traces_text(result: Mapping[str, Any]) -> str:
    data, times, rare = result["prepared"], result["time_scales"], result["rare"]
    mixed, again = times["slowest_in_random_order"], times["slowest_resampled"]
    again_now = result["same_pattern_again"]
    lines = [
        "# The chain between thinking patterns",
        "",
        f"{data['traces']:,} traces, {data['steps']:,} steps, {data['transitions']:,} transitions; "
        f"{data['active_patterns']} of {data['patterns']} patterns reach each other "
        f"({data['transitions_between_active']:.1%} of the transitions).",
        "",
        f"Spectral gap {result['spectral_gap']:.3f}. Slowest implied time scale, in steps:",
        "",
        "| lag | " + " | ".join(map(str, times["lags"])) + " |",
        "|---|" + "---|" * len(times["lags"]),
        "| real order (± 2 deviations over resampled traces) | "
        + " | ".join(
            f"{row[0]:.2f} ± {2 * deviation:.2f}"
            for row, deviation in zip(times["time_scales"], again["deviation"], strict=True)
        )
        + " |",
        "| steps of each trace in random order | "
        + " | ".join(f"{m:.2f} ± {2 * d:.2f}" for m, d in zip(mixed["mean"], mixed["deviation"], strict=True))
        + " |",
        "",
        "On a Markov chain the first row would not change with the lag; the second row is what differences between "
        "traces alone make.",
        "",
        f"The same pattern comes twice in a row in {again_now['share']:.1%} of the transitions, in "
        f"{again_now['in_random_order']:.1%} with each trace in random order.",
        "",
        "## Metastable sets",
    ]
    titles = {
        "chance": "Patterns that follow each other more often than independent draws would (slow modes of the chain)",
        "order": "Patterns that follow each other more often than in a random order of the same trace",
    }
    for name, title in titles.items():
        block = result["sets"][name]
        lines += [
            "",
            f"### {title}",
            "",
            "| set | share of steps | mean position | next step in it | in random order | most frequent patterns |",
            "|---|---|---|---|---|---|",
        ]
        for row in block["sets"]:
            lines.append(
                f"| {row['set']} ({len(row['patterns'])} patterns) | {row['share']:.1%} | {row['position']:.2f} "
                f"| {row['stay']:.1%} | {row['stay_in_random_order']:.1%} | {'; '.join(row['examples'])} |"
            )
        lines += [
            "",
            f"Leading eigenvalues {', '.join(f'{value:.3f}' for value in block['eigenvalues'])}"
            + (f"; in random order at most {result['order_eigenvalue_in_random_order']:.3f}" if name == "order" else "")
            + f". In resampled traces the sets come back with an adjusted Rand index of "
            f"{block['found_again']['mean']:.2f} (least {block['found_again']['least']:.2f}). {block['crossings']:.1%} "
            "of the transitions cross.",
        ]
    lines += [
        "",
        "## Rare transitions",
        "",
        f"{rare['pairs']:.1%} of all pairs of patterns follow each other with a probability below {rare['below']:g}; "
        f"together they are {rare['transitions']:.1%} of the transitions. Among pairs across sets "
        + " and ".join(f"{result['sets'][n]['crossing_pairs_rare']:.1%} ({n})" for n in titles)
        + " are that rare.",
        "",
        "## Right answers",
        "",
    ]
    if "outcomes" not in result:
        return "\n".join(
            [*lines, "Not looked at: prepared data do not say which answers are right (give `outcomes`).", ""]
        )
    found = result["outcomes"]
    lines.append(
        f"{found['traces_with_an_outcome']:,} of {found['traces']:,} traces say whether their answer is right; "
        f"{found['right']:,} are."
    )
    if not found["comparison"]:
        return "\n".join([*lines, "No group has right and wrong answers, so nothing can be compared.", ""])
    lines += [
        "",
        "Right minus wrong, within groups; then the same at equal length (p: reassignments of outcomes within groups).",
        "",
        "| of a trace | difference | p | at equal length | p |",
        "|---|---|---|---|---|",
    ]
    for name, row in found["comparison"].items():
        equal = f"{row['given_length']:+.3g} | {row['p_given_length']:.2g}" if "given_length" in row else "|"
        lines.append(f"| {name.replace('_', ' ')} | {row['difference']:+.3g} | {row['p']:.2g} | {equal} |")
    lines += [
        "",
        "Groups: " + ", ".join(f"{g['group']} ({g['right']} right, {g['wrong']} wrong)" for g in found["groups"]),
    ]
    return "\n".join([*lines, ""])
