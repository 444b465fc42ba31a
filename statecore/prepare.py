"""`statecore prepare`: long chains of thought in, a training set of tokenised steps out.

The stages: read rows (traces.py), find transitions and step boundaries (segmentation.py), group the steps into thinking
patterns (patterns.py), write rows in the form that data.py describes, and say in a report what came out.
"""

from __future__ import annotations

import hashlib
import resource
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import patterns as pattern_clusters
from . import segmentation
from .data import PATTERNS_FILE, PromptFormat
from .labels import label_agreement, read_labels
from .outputs import new_folder, write_json
from .traces import (
    BadRow,
    RowFields,
    RowProblem,
    StepRules,
    Tokenised,
    Trace,
    read_traces,
    tokenise,
)


def prepare(
    sources: Sequence[str],
    output: str | Path,
    *,
    tokenizer: str,
    split: str = "train",
    limit: int | None = None,
    prompt_field: str = "problem",
    thinking_field: str = "thinking",
    answer_field: str = "answer",
    id_field: str = "id",
    completion_field: str | None = None,
    think_tags: tuple[str, str] = ("<think>", "</think>"),
    prompt_template: str | None = None,
    think_open: str = "<think>\n",
    think_close: str = "\n</think>\n\n",
    model: str | None = None,
    model_tokenizer: str | None = None,
    transitions: str | Path | None = None,
    opening_unit: segmentation.OpeningUnit = "word",
    entropy_rows: int = 500,
    top_transitions: int = 16,
    entropy_threshold_bits: float | None = None,
    min_opening_count: int = 20,
    min_step_tokens: int = 32,
    max_step_tokens: int = 512,
    max_tokens: int = 32_768,
    patterns: int = 128,
    embedding: Literal["tfidf", "hidden_states"] | None = None,
    embedding_layer: int | None = None,
    elbow: Sequence[int] = (16, 32, 64, 128, 256),
    window: int | None = None,
    batch_size: int = 4,
    labels: str | Path | None = None,
    eval_fraction: float = 0.02,
    seed: int = 0,
    strict: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Turns long chains of thought into a training set: steps, thinking patterns, tokens.

    Rows that cannot be used are left out, counted and named by line in the report; the run goes on, unless `strict`.
    The same sources and settings give the same rows. Texts, tokens and step embeddings are held in memory. Returns the
    report that stands in `report.json`.

    Args:
        sources: .jsonl, .jsonl.gz or .parquet files, or hub datasets (`owner/name` or `owner/name:configuration`).
        output: the folder to write; it appears when everything is written.
        tokenizer: folder or hub name of the base model's tokenizer.
        split: split of a hub dataset.
        limit: read no more rows than this.
        prompt_field, thinking_field, answer_field, id_field: where a row keeps its parts.
        completion_field: a field with thinking and answer in one, a text or a list of chat messages.
        think_tags: what encloses the thinking in `completion_field`.
        prompt_template: a text with {prompt} in it; default: the tokenizer's chat template.
        think_open, think_close: what the training text has around the thinking.
        model: folder or hub name of a causal language model that finds the transitions and embeds the steps; without
            one the transitions come from a file or the built-in list, and the embeddings from TF-IDF.
        model_tokenizer: folder or hub name of that model's tokenizer, where it is not beside the model.
        transitions: file of transition words, one a line or JSON; then no entropies are computed.
        opening_unit: what opens a sentence, its first "word" or its first "token" of the model.
        entropy_rows: rows to measure entropies on, drawn at random.
        top_transitions: how many openings with the highest mean entropy are transitions.
        entropy_threshold_bits: take all openings of at least this mean entropy instead.
        min_opening_count: openings seen less often are no transitions.
        min_step_tokens: a shorter step joins the one before it.
        max_step_tokens: a longer step is halved at a sentence.
        max_tokens: rows with more tokens, markers included, are left out.
        patterns: number of thinking patterns; each adds two tokens to the tokenizer.
        embedding: "hidden_states" of the model or "tfidf"; default: hidden states where there is a model.
        embedding_layer: the model's layer whose states are used; default: the middle one.
        elbow: numbers of patterns to compare in the report.
        window: tokens that the model reads at once; default: its context, at most 4096.
        batch_size: windows that the model reads at once.
        labels: .jsonl or .jsonl.gz of {"id", "spans": [[start, end, category], ...]}, sentence labels with character
            offsets in the thinking; the report then says how the step boundaries lie to them.
        eval_fraction: share of problems (not rows) to set apart in eval.parquet.
        seed: of all random choices.
        strict: stop at the first row that cannot be used.
        overwrite: replace a training set that is there already.
    """
    settings = {name: _plain(value) for name, value in locals().items()}
    _check_settings(settings)
    clock = _Clock()
    base_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    fields = RowFields(prompt_field, thinking_field, answer_field, id_field, completion_field, tuple(think_tags))
    form = PromptFormat(prompt_template, think_open, think_close)
    if prompt_template is None and not base_tokenizer.chat_template:
        raise ValueError(f"the tokenizer {tokenizer} has no chat template: give prompt_template, with {{prompt}} in it")
    if base_tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer} has no end-of-sequence token, so an answer could never end")
    language = None
    if model is not None:
        language = _Language(model, model_tokenizer or model, base_tokenizer, window, batch_size)
    left_out = _LeftOut(strict)

    with new_folder(output, overwrite, marker=PATTERNS_FILE) as folder:
        with clock("reading"):
            traces = list(_read_all(sources, split, limit, fields, form, base_tokenizer, left_out))
            left_out.check_some_remain(traces)

        table: list[segmentation.OpeningEntropy] = []
        if transitions is not None:
            chosen = segmentation.load_transitions(transitions)
        elif language is None:
            chosen = list(segmentation.DEFAULT_TRANSITIONS)
        else:
            with clock("entropies"):
                sample = np.sort(np.random.default_rng(seed).permutation(len(traces))[:entropy_rows])
                table = language.opening_entropies([traces[i] for i in sample], opening_unit)
                winners = segmentation.select_transitions(
                    table,
                    top=None if entropy_threshold_bits is not None else top_transitions,
                    threshold_bits=entropy_threshold_bits,
                    min_count=min_opening_count,
                )
                chosen = [row.opening for row in winners]

        with clock("tokens and steps"):
            rules = StepRules(
                segmentation.Transitions(chosen, opening_unit),
                segmentation.StepOptions(min_step_tokens, max_step_tokens),
                language.tokenizer if opening_unit == "token" else None,
            )
            rows = list(_tokenise_all(traces, base_tokenizer, think_close, rules, max_tokens, left_out))
            left_out.check_some_remain(rows)

        with clock("embeddings"):
            step_texts = [row.trace.thinking[a:b].strip() for row in rows for a, b in row.step_spans()]
            embedding = embedding or ("tfidf" if language is None else "hidden_states")
            if embedding == "tfidf":
                problems = [_problem_hash(row.trace.prompt) for row in rows for _ in row.steps]
                points = pattern_clusters.tfidf_embedding(step_texts, problems, seed=seed)
            else:
                points = language.step_embeddings(rows, embedding_layer)

        with clock("patterns"):
            assigned, centres = pattern_clusters.cluster_steps(points, patterns, seed=seed)
            typical = pattern_clusters.typical_steps(points, assigned, centres, step_texts)
            sizes = np.bincount(assigned, minlength=patterns).tolist()
            elbow_table = pattern_clusters.elbow(points, elbow, seed=seed)
            pattern_clusters.draw_figures(folder / "figures", elbow_table, sizes)

        with clock("writing"):
            start_ids, end_ids = pattern_clusters.add_pattern_tokens(base_tokenizer, patterns)
            base_tokenizer.save_pretrained(folder / "tokenizer")
            first_step = np.cumsum([0, *(len(row.steps) for row in rows)])
            parts = (
                (
                    "eval" if problem_share(row.trace.prompt) < eval_fraction else "train",
                    assemble(row, assigned[begin:end], start_ids, end_ids),
                )
                for row, (begin, end) in zip(rows, pairwise(first_step), strict=True)
            )
            written = _write_rows(folder, tqdm(parts, desc="writing", total=len(rows), unit="row"))
            if not written["train"]:
                raise ValueError(f"all problems fell to the evaluation part (eval_fraction {eval_fraction}): read more")
            entropy_of = {row.opening: row.entropy_bits for row in table}
            openings = Counter(opening for row in rows for opening in row.openings)
            pattern_file = {
                "patterns": [
                    {
                        "id": i,
                        "start_token": pattern_clusters.pattern_tokens(i)[0],
                        "end_token": pattern_clusters.pattern_tokens(i)[1],
                        "start_token_id": start_ids[i],
                        "end_token_id": end_ids[i],
                        "size": sizes[i],
                        "examples": [step_texts[j] for j in typical[i]],
                    }
                    for i in range(patterns)
                ],
                "transitions": [
                    {
                        "opening": word,
                        "steps": openings[word.casefold() if opening_unit == "word" else word],
                        "entropy_bits": entropy_of.get(word),
                    }
                    for word in chosen
                ],
                "prompt": asdict(form),
            }
            write_json(folder / PATTERNS_FILE, pattern_file)

        report: dict[str, Any] = {
            "settings": settings,
            "rows": {
                "read": len(rows) + len(left_out.rows),
                "left_out": len(left_out.rows),
                "train": written["train"],
                "eval": written["eval"],
            },
            "left_out": {
                "by_reason": dict(Counter(row.reason for row in left_out.rows).most_common()),
                "rows": [asdict(row) for row in left_out.rows],
            },
            "notes": _notes(rows, base_tokenizer.unk_token_id, max_step_tokens),
            "tokens": sum(len(row.ids) for row in rows),
            "tokens_a_row": _spread([len(row.ids) + 2 * len(row.steps) for row in rows]),
            "steps_a_trace": _spread([len(row.steps) for row in rows]),
            "tokens_a_step": _spread([n for row in rows for n in row.step_tokens()]),
            "transitions": pattern_file["transitions"],
            "opening_entropies": [asdict(row) for row in table if row.count >= min_opening_count],
            "patterns": {"count": patterns, "embedding": embedding, "sizes": _spread(sizes), "empty": sizes.count(0)},
            "elbow": elbow_table,
            "tokenizer": {"tokens": len(base_tokenizer), "first_marker": start_ids[0], "last_marker": end_ids[-1]},
        }
        if labels is not None:
            report["label_agreement"] = label_agreement(
                {row.trace.id: row.step_chars[1:] for row in rows}, read_labels(labels)
            )
        report["seconds"] = clock.seconds
        report["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        write_json(folder / "report.json", report)
        text = _report_text(report, pattern_file)
        (folder / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return report


# ----------------------------------------------------------------------------------------------------------------------
# Stages


class _LeftOut:
    """The rows that cannot be used; `strict`: the first of them is an error."""

    def __init__(self, strict: bool):
        self.strict = strict
        self.rows: list[BadRow] = []

    def add(self, source: str, line: int, problem: RowProblem) -> None:
        row = BadRow(source, line, problem.reason, problem.detail)
        if self.strict:
            raise ValueError(f"{row} (strict: the first row that cannot be used ends the run)") from problem
        self.rows.append(row)

    def check_some_remain(self, remaining: Sequence[Any]) -> None:
        if not remaining:
            first = [str(row) for row in self.rows[:10]]
            raise ValueError("\n".join([f"none of the {len(self.rows)} rows can be used", *first]))


class _Language:
    """A causal language model and its tokenizer, which read the thinking of a trace behind its prompt."""

    def __init__(self, name: str, tokenizer: str, base_tokenizer: Any, window: int | None, batch_size: int):
        self.reading = {"window": window, "batch_size": batch_size}
        own = AutoTokenizer.from_pretrained(tokenizer)
        self.tokenizer = base_tokenizer if own.get_vocab() == base_tokenizer.get_vocab() else own
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device)

    def opening_entropies(
        self, traces: Sequence[Trace], unit: segmentation.OpeningUnit
    ) -> list[segmentation.OpeningEntropy]:
        texts = [trace.text() for trace in traces]
        starts = [
            [len(trace.head) + start for start in segmentation.sentence_starts(trace.thinking)] for trace in traces
        ]
        return segmentation.opening_entropies(self.model, self.tokenizer, texts, starts, unit=unit, **self.reading)

    def step_embeddings(self, rows: Sequence[Tokenised], layer: int | None) -> np.ndarray:
        texts, spans = [], []
        for row in rows:
            before = len(row.trace.head)
            texts.append(row.trace.text())
            spans.append([(before + begin, before + end) for begin, end in row.step_spans()])
        return pattern_clusters.hidden_state_embedding(
            self.model, self.tokenizer, texts, spans, layer=layer, **self.reading
        )


def _read_all(
    sources: Sequence[str],
    split: str,
    limit: int | None,
    fields: RowFields,
    form: PromptFormat,
    tokenizer: Any,
    left_out: _LeftOut,
) -> Iterator[Trace]:
    rows = ((str(s), *row) for s in sources for row in read_traces(str(s), split, fields, form, tokenizer))
    for source, line, row in tqdm(islice(rows, limit), desc="reading", unit="row"):
        if isinstance(row, RowProblem):
            left_out.add(source, line, row)
        else:
            yield row


def _tokenise_all(
    traces: Sequence[Trace],
    tokenizer: Any,
    think_close: str,
    rules: StepRules,
    max_tokens: int,
    left_out: _LeftOut,
) -> Iterator[Tokenised]:
    with tqdm(total=len(traces), desc="tokens and steps", unit="row") as bar:
        for at in range(0, len(traces), 64):
            part = traces[at : at + 64]
            for trace, row in zip(part, tokenise(part, tokenizer, think_close, rules), strict=True):
                bar.update()
                if isinstance(row, RowProblem):
                    left_out.add(trace.source, trace.line, row)
                elif (length := len(row.ids) + 2 * len(row.steps)) > max_tokens:
                    too_long = RowProblem("too_long", f"{length} tokens, at most {max_tokens} allowed")
                    left_out.add(trace.source, trace.line, too_long)
                else:
                    yield row


def _plain(value: Any) -> Any:
    """A setting as JSON can hold it."""
    if isinstance(value, (str, int, float, type(None))):
        return value
    return str(value) if isinstance(value, Path) else [_plain(item) for item in value]


def _check_settings(settings: Mapping[str, Any]) -> None:
    if isinstance(settings["sources"], str) or not settings["sources"]:
        raise ValueError(f"sources: expected a list of files or hub names, got {settings['sources']!r}")
    if settings["prompt_template"] is not None and "{prompt}" not in settings["prompt_template"]:
        raise ValueError(f"prompt_template: expected {{prompt}} in it, got {settings['prompt_template']!r}")
    if not 1 <= 2 * settings["min_step_tokens"] <= settings["max_step_tokens"]:
        raise ValueError(
            f"max_step_tokens: expected at least twice min_step_tokens ({settings['min_step_tokens']}), so that a long "
            f"step can be halved, got {settings['max_step_tokens']}"
        )
    if not 0 <= settings["eval_fraction"] < 1:
        raise ValueError(f"eval_fraction: expected 0 or more and less than 1, got {settings['eval_fraction']}")
    if settings["patterns"] < 1:
        raise ValueError(f"patterns: expected 1 or more, got {settings['patterns']}")
    if settings["model"] is None:
        for name, needs in (("embedding", "hidden_states"), ("opening_unit", "token")):
            if settings[name] == needs:
                raise ValueError(f"{name}={needs!r} needs a language model: give `model`")


def _notes(rows: Sequence[Tokenised], unknown: int | None, longest: int) -> dict[str, int]:
    """Things that are no reason to leave a row out, and that a person should know."""
    return {
        "steps_longer_than_allowed": sum(n > longest for row in rows for n in row.step_tokens()),
        "rows_whose_prompt_shares_a_token_with_the_thinking": sum(row.glued for row in rows),
        "unknown_tokens": sum(int((row.ids == unknown).sum()) for row in rows) if unknown is not None else 0,
        "ids_seen_more_than_once": len(rows) - len({row.trace.id for row in rows}),
    }


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {
        "mean": round(statistics.fmean(values), 2),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "min": int(min(values)),
        "max": int(max(values)),
    }


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - begin, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Rows on disk


def assemble(
    row: Tokenised, pattern_of_step: Sequence[int], start_ids: Sequence[int], end_ids: Sequence[int]
) -> dict[str, Any]:
    """The row of the training set: the tokens with the markers of each step's pattern around it."""
    pieces, step_ids = [row.ids[: row.steps[0]]], [np.zeros(row.steps[0], dtype=np.int32)]
    bounds = [*row.steps, row.answer]
    for number, ((begin, end), pattern) in enumerate(zip(pairwise(bounds), pattern_of_step, strict=True), 1):
        pieces += [[start_ids[pattern]], row.ids[begin:end], [end_ids[pattern]]]
        step_ids.append(np.full(end - begin + 2, number, dtype=np.int32))
    pieces.append(row.ids[row.answer :])
    step_ids.append(np.full(len(pieces[-1]), len(row.steps) + 1, dtype=np.int32))
    return {
        "id": row.trace.id,
        "input_ids": np.concatenate(pieces).astype(np.int32),
        "step_ids": np.concatenate(step_ids),
        "prompt_length": row.steps[0],
        "patterns": np.asarray(pattern_of_step, dtype=np.int32),
        "steps": len(row.steps),
    }


SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "step_ids": pa.list_(pa.int32()),
        "prompt_length": pa.int32(),
        "patterns": pa.list_(pa.int32()),
        "steps": pa.int32(),
    }
)


def problem_share(messages: Sequence[Mapping[str, str]]) -> float:
    """A number in [0, 1) from the prompt's words alone, so that the traces of one problem stay together in a split."""
    return int.from_bytes(_problem_hash(messages)[:8], "big") / 2**64


def _problem_hash(messages: Sequence[Mapping[str, str]]) -> bytes:
    words = " ".join(" ".join(message["content"] for message in messages).casefold().split())
    return hashlib.sha256(words.encode()).digest()


def _write_rows(folder: Path, rows: Iterable[tuple[str, dict[str, Any]]]) -> Counter:
    """Writes (part, row) pairs to `<part>.parquet`, a few at a time; the number of rows of each part."""
    written: Counter = Counter()
    waiting: dict[str, list[dict[str, Any]]] = {}
    writers: dict[str, pq.ParquetWriter] = {}

    def flush(part: str) -> None:
        if part not in writers:
            writers[part] = pq.ParquetWriter(folder / f"{part}.parquet", SCHEMA, compression="zstd")
        writers[part].write_table(pa.Table.from_pylist(waiting.pop(part), schema=SCHEMA))

    for part, row in rows:
        waiting.setdefault(part, []).append(row)
        written[part] += 1
        if len(waiting[part]) == 1_000:
            flush(part)
    for part in list(waiting):
        flush(part)
    for writer in writers.values():
        writer.close()
    return written


# ----------------------------------------------------------------------------------------------------------------------
# The report for people


def _report_text(report: Mapping[str, Any], pattern_file: Mapping[str, Any]) -> str:
    """The report for people."""
    rows = report["rows"]
    lines = [
        "# Prepared training set",
        "",
        f"{rows['read']:,} rows read, {rows['left_out']:,} left out; {rows['train']:,} for training, {rows['eval']:,} "
        f"for evaluation; {report['tokens']:,} tokens without markers.",
        "",
        "| | mean | median | p95 | min | max |",
        "|---|---|---|---|---|---|",
    ]
    for name, key in (
        ("steps a trace", "steps_a_trace"),
        ("tokens a step", "tokens_a_step"),
        ("tokens a row", "tokens_a_row"),
    ):
        spread = report[key]
        lines.append(
            f"| {name} | " + " | ".join(f"{spread[k]:g}" for k in ("mean", "median", "p95", "min", "max")) + " |"
        )
    lines += ["", "## Rows left out", ""]
    for reason, count in report["left_out"]["by_reason"].items():
        named = [row for row in report["left_out"]["rows"] if row["reason"] == reason]
        lines.append(f"- {reason}: {count}" + (" (the first 20 of them; all are in report.json)" if count > 20 else ""))
        lines += [f"  - {BadRow(**row)}" for row in named[:20]]
    if not rows["left_out"]:
        lines.append("None.")
    lines += ["", "## To know", ""]
    lines += [f"- {name.replace('_', ' ')}: {count}" for name, count in report["notes"].items()]
    lines += ["", "## Transitions", "", "| opening | steps that open with it | mean entropy (bits) |", "|---|---|---|"]
    for row in report["transitions"]:
        bits = "not measured" if row["entropy_bits"] is None else f"{row['entropy_bits']:.3f}"
        lines.append(f"| {row['opening']} | {row['steps']} | {bits} |")
    if report["opening_entropies"]:
        lines += ["", "All openings seen often enough, highest entropy first (opening, count, bits):", ""]
        lines.append(
            ", ".join(
                f"{row['opening']} {row['count']} {row['entropy_bits']:.2f}" for row in report["opening_entropies"]
            )
        )
    sizes = report["patterns"]["sizes"]
    lines += [
        "",
        "## Thinking patterns",
        "",
        f"{report['patterns']['count']} patterns ({report['patterns']['embedding']}), {report['patterns']['empty']} of "
        f"them empty; steps in one: median {sizes['median']:g}, from {sizes['min']} to {sizes['max']}.",
        "",
        "| patterns | inertia a step | silhouette |",
        "|---|---|---|",
    ]
    lines += [f"| {row['patterns']} | {row['inertia']:.4f} | {row['silhouette']:.4f} |" for row in report["elbow"]]
    if "label_agreement" in report:
        lines += ["", "## Agreement with the sentence labels", "", *_agreement_text(report["label_agreement"])]
    lines += ["", "## Most typical steps", ""]
    for pattern in pattern_file["patterns"]:
        lines.append(f"- {pattern['start_token']} ({pattern['size']} steps)")
        lines += [f"  - {' '.join(example.split())[:160]}" for example in pattern["examples"][:3]]
    seconds = ", ".join(f"{stage} {time_:g} s" for stage, time_ in report["seconds"].items())
    lines += ["", f"Time: {seconds}. Peak memory {report['peak_memory_mib']:,} MiB.", ""]
    return "\n".join(lines)


def _agreement_text(agreement: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{agreement['traces']} traces, {agreement['boundaries']:,} boundaries, {agreement['labelled_sentences']:,} "
        f"labelled sentences. Boundaries on the start of a labelled sentence: "
        f"{agreement['boundaries_on_a_sentence_start']}. Boundaries against changes of category: precision "
        f"{agreement['category_change_precision']}, recall {agreement['category_change_recall']}.",
        "",
        "| category | share of sentences | share of boundaries | of its sentences start a step |",
        "|---|---|---|---|",
    ]
    for name, row in agreement["categories"].items():
        lines.append(f"| {name} | {row['share_of_sentences']} | {row['share_of_boundaries']} | {row['start_a_step']} |")
    if "entropy" in agreement:
        lines.append("")
        lines += [
            f"Mean entropy of sentences {name.replace('_', ' ')}: {row['mean']} ({row['sentences']} sentences)."
            for name, row in agreement["entropy"].items()
        ]
    return lines
