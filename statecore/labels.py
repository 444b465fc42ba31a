"""Sentence labels of people or of a model, and how step boundaries lie to them."""

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
    """How the step boundaries lie to labelled sentences.

    `boundaries[id]` are character offsets in the thinking at which steps 2, 3, ... start; `labels[id]` are spans
    `[start, end, category]` or `[start, end, category, entropy]` over the same text. Gives, over the ids in both: the
    share of boundaries that fall on the start of a labelled sentence; precision and recall of the boundaries against
    the sentences whose category differs from that of the sentence before; for each category its share of all labelled
    sentences after the first, its share of the boundaries, and the share of its sentences that start a step; and, where
    there are entropies, the mean entropy of sentences at a boundary and of the others.
    """
    total, on_start, changes, change_hits = 0, 0, 0, 0
    sentences, hits = Counter(), Counter()
    entropies: dict[bool, list[float]] = {True: [], False: []}
    shared = sorted(boundaries.keys() & labels.keys())
    for key in shared:
        wanted = set(boundaries[key])
        total += len(wanted)
        for before, span in pairwise(labels[key]):
            hit = span[0] in wanted
            sentences[span[2]] += 1
            hits[span[2]] += hit
            on_start += hit
            changes += span[2] != before[2]
            change_hits += hit and span[2] != before[2]
            if len(span) > 3:
                entropies[hit].append(float(span[3]))

    def share(part: float, whole: float) -> float | None:
        return round(part / whole, 4) if whole else None

    result: dict[str, Any] = {
        "traces": len(shared),
        "boundaries": total,
        "labelled_sentences": sentences.total(),
        "boundaries_on_a_sentence_start": share(on_start, total),
        "category_change_precision": share(change_hits, total),
        "category_change_recall": share(change_hits, changes),
        "categories": {
            name: {
                "sentences": count,
                "share_of_sentences": share(count, sentences.total()),
                "share_of_boundaries": share(hits[name], on_start),
                "start_a_step": share(hits[name], count),
            }
            for name, count in sentences.most_common()
        },
    }
    if entropies[True] or entropies[False]:
        result["entropy"] = {
            name: {"sentences": len(entropies[at]), "mean": share(sum(entropies[at]), len(entropies[at]))}
            for name, at in (("at_boundaries", True), ("elsewhere", False))
        }
    return result
