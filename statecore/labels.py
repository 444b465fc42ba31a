"""Labels of sentences, by people or a model, and how step boundaries agree with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .traces import RowProblem, read_jsonl


def read_labels(path: str | Path) -> dict[str, list[Any]]:
    """Sentence labels by id, from a .jsonl or .jsonl.gz file of {"id", "spans": [[start, end, category], ...]}."""
    labels = {}
    for line, row in read_jsonl(Path(path)):
        if isinstance(row, RowProblem) or not {"id", "spans"} <= row.keys():
            raise ValueError(f'{path}, line {line}: expected an object with "id" and "spans", got {row}')
        labels[row["id"]] = row["spans"]
    return labels


def label_agreement(
    boundaries: Mapping[str, Sequence[int]], labels: Mapping[str, Sequence[Sequence[Any]]]
) -> dict[str, Any]:
    """How step boundaries agree with labelled sentences.

    `boundaries[id]` are the character offsets in the thinking at which steps 2, 3, ... start. `labels[id]` are spans
    `[start, end, category]` or `[start, end, category, entropy]` of the same text. The result covers the ids in both:

    - the share of boundaries that fall on the start of a labelled sentence,
    - precision and recall of the boundaries against the sentences whose category differs from the one before,
    - for each category its share of all labelled sentences after the first, its share of the boundaries, and the share
      of its sentences that start a step,
    - if there are entropies, the mean entropy of sentences at a boundary, and of the others.
    """
    total = on_start = changes = changes_hit = 0
    sentences, starting = Counter(), Counter()
    entropies: dict[bool, list[float]] = {True: [], False: []}
    shared = boundaries.keys() & labels.keys()
    for key in sorted(shared):
        wanted = set(boundaries[key])
        total += len(wanted)
        for (_, _, category_before, *_), (start, _, category, *entropy) in pairwise(labels[key]):
            hit, change = start in wanted, category != category_before
            sentences[category] += 1
            starting[category] += hit
            on_start += hit
            changes += change
            changes_hit += hit and change
            entropies[hit] += map(float, entropy[:1])
    result: dict[str, Any] = {
        "traces": len(shared),
        "boundaries": total,
        "labelled_sentences": sentences.total(),
        "boundaries_on_a_sentence_start": _ratio(on_start, total),
        "category_change_precision": _ratio(changes_hit, total),
        "category_change_recall": _ratio(changes_hit, changes),
        "categories": {
            name: {
                "sentences": count,
                "share_of_sentences": _ratio(count, sentences.total()),
                "share_of_boundaries": _ratio(starting[name], on_start),
                "start_a_step": _ratio(starting[name], count),
            }
            for name, count in sentences.most_common()
        },
    }
    if entropies[True] or entropies[False]:
        result["entropy"] = {
            name: {"sentences": len(entropies[at]), "mean": _ratio(sum(entropies[at]), len(entropies[at]))}
            for name, at in (("at_boundaries", True), ("elsewhere", False))
        }
    return result


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None
