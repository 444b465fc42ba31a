"""What `statecore prepare` reports: figures for report.json, and report.md for people."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .patterns import ThinkingPatterns
from .traces import BadRow, Tokenised

SHOWN_BAD_ROWS = 20  # by reason; report.json has all of them
SHOWN_EXAMPLES = 3  # steps of a pattern

# ----------------------------------------------------------------------------------------------------------------------
# Figures


def row_figures(
    rows: Sequence[Tokenised], left_out: Sequence[BadRow], written: Mapping[str, int], longest: int, unknown: int | None
) -> dict[str, Any]:
    """How many rows there are and how long.

    `written` counts the rows of each part, `longest` is the most tokens that a step should have, `unknown` the
    tokenizer's unknown token.
    """
    return {
        "rows": {
            "read": len(rows) + len(left_out),
            "left_out": len(left_out),
            "train": written["train"],
            "eval": written["eval"],
        },
        "left_out": {
            "by_reason": dict(Counter(row.reason for row in left_out).most_common()),
            "rows": [asdict(row) for row in left_out],
        },
        "notes": _notes(rows, longest, unknown),
        "tokens": sum(len(row.ids) for row in rows),
        "tokens_a_row": spread([row.marked_length() for row in rows]),
        "steps_a_trace": spread([len(row.steps) for row in rows]),
        "tokens_a_step": spread([n for row in rows for n in row.step_tokens()]),
    }


def _notes(rows: Sequence[Tokenised], longest: int, unknown: int | None) -> dict[str, int]:
    """Peculiarities that are no reason to leave a row out, but worth knowing."""
    return {
        "steps_longer_than_allowed": sum(n > longest for row in rows for n in row.step_tokens()),
        "rows_whose_prompt_shares_a_token_with_the_thinking": sum(row.glued for row in rows),
        "unknown_tokens": sum(int((row.ids == unknown).sum()) for row in rows) if unknown is not None else 0,
        "ids_seen_more_than_once": len(rows) - len({row.trace.id for row in rows}),
    }


def pattern_figures(found: ThinkingPatterns, embedding: str) -> dict[str, Any]:
    return {
        "patterns": {
            "count": len(found.sizes),
            "embedding": embedding,
            "sizes": spread(found.sizes),
            "empty": found.sizes.count(0),
        },
        "elbow": found.elbow,
    }


def spread(values: Sequence[int]) -> dict[str, float]:
    return {
        "mean": round(statistics.fmean(values), 2),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "min": int(min(values)),
        "max": int(max(values)),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Markdown


def report_text(report: Mapping[str, Any], patterns: Sequence[Mapping[str, Any]]) -> str:
    """report.md, from what report.json holds and the patterns of patterns.json."""
    sections = {
        "# Prepared training set": _overview(report),
        "## Rows left out": _left_out(report["left_out"]),
        "## To know": (f"- {name.replace('_', ' ')}: {count}" for name, count in report["notes"].items()),
        "## Transitions": _transitions(report),
        "## Thinking patterns": _patterns(report),
    }
    if "label_agreement" in report:
        sections["## Agreement with the sentence labels"] = _agreement(report["label_agreement"])
    sections["## Most typical steps"] = _typical_steps(patterns)
    lines = [line for title, body in sections.items() for line in (title, "", *body, "")]
    seconds = ", ".join(f"{stage} {time_:g} s" for stage, time_ in report["seconds"].items())
    return "\n".join([*lines, f"Time: {seconds}. Peak memory {report['peak_memory_mib']:,} MiB.", ""])


def _overview(report: Mapping[str, Any]) -> Iterator[str]:
    rows = report["rows"]
    yield (
        f"{rows['read']:,} rows read, {rows['left_out']:,} left out; {rows['train']:,} for training, {rows['eval']:,} "
        f"for evaluation; {report['tokens']:,} tokens without markers."
    )
    yield ""
    yield "| | mean | median | p95 | min | max |"
    yield "|---|---|---|---|---|---|"
    for key in ("steps_a_trace", "tokens_a_step", "tokens_a_row"):
        figures = " | ".join(f"{report[key][name]:g}" for name in ("mean", "median", "p95", "min", "max"))
        yield f"| {key.replace('_', ' ')} | {figures} |"


def _left_out(left_out: Mapping[str, Any]) -> Iterator[str]:
    for reason, count in left_out["by_reason"].items():
        some = f" (the first {SHOWN_BAD_ROWS} of them; all are in report.json)" if count > SHOWN_BAD_ROWS else ""
        yield f"- {reason}: {count}{some}"
        own = [row for row in left_out["rows"] if row["reason"] == reason]
        yield from (f"  - {BadRow(**row)}" for row in own[:SHOWN_BAD_ROWS])
    if not left_out["rows"]:
        yield "None."


def _transitions(report: Mapping[str, Any]) -> Iterator[str]:
    yield "| opening | steps that open with it | mean entropy (bits) |"
    yield "|---|---|---|"
    for row in report["transitions"]:
        bits = "not measured" if row["entropy_bits"] is None else f"{row['entropy_bits']:.3f}"
        yield f"| {row['opening']} | {row['steps']} | {bits} |"
    if report["opening_entropies"]:
        yield ""
        yield "All openings seen often enough, highest entropy first (opening, count, bits):"
        yield ""
        yield ", ".join(
            f"{row['opening']} {row['count']} {row['entropy_bits']:.2f}" for row in report["opening_entropies"]
        )


def _patterns(report: Mapping[str, Any]) -> Iterator[str]:
    found = report["patterns"]
    sizes = found["sizes"]
    yield (
        f"{found['count']} patterns ({found['embedding']}), {found['empty']} of them empty; steps in one: median "
        f"{sizes['median']:g}, from {sizes['min']} to {sizes['max']}."
    )
    yield ""
    yield "| patterns | inertia per step | silhouette |"
    yield "|---|---|---|"
    for row in report["elbow"]:
        yield f"| {row['patterns']} | {row['inertia']:.4f} | {row['silhouette']:.4f} |"


def _agreement(agreement: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{agreement['traces']} traces, {agreement['boundaries']:,} boundaries, {agreement['labelled_sentences']:,} "
        f"labelled sentences. Boundaries on the start of a labelled sentence: "
        f"{agreement['boundaries_on_a_sentence_start']}. Boundaries against changes of category: precision "
        f"{agreement['category_change_precision']}, recall {agreement['category_change_recall']}."
    )
    yield ""
    yield "| category | share of sentences | share of boundaries | of its sentences start a step |"
    yield "|---|---|---|---|"
    for name, row in agreement["categories"].items():
        yield f"| {name} | {row['share_of_sentences']} | {row['share_of_boundaries']} | {row['start_a_step']} |"
    if "entropy" in agreement:
        yield ""
    for name, row in agreement.get("entropy", {}).items():
        yield f"Mean entropy of sentences {name.replace('_', ' ')}: {row['mean']} ({row['sentences']} sentences)."


def _typical_steps(patterns: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for pattern in patterns:
        yield f"- {pattern['start_token']} ({pattern['size']} steps)"
        yield from (f"  - {' '.join(example.split())[:160]}" for example in pattern["examples"][:SHOWN_EXAMPLES])
