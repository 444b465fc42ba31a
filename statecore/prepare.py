"""`statecore prepare`: long chains of thought in, a training set of tokenised steps out.

The stages: read rows (traces.py), choose transitions and find steps (segmentation.py), group the steps into thinking
patterns (patterns.py), write rows in the form that data.py describes, and report (prepare_report.py).
"""

from __future__ import annotations

import hashlib
import resource
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from .data import PATTERNS_FILE, PromptFormat, PromptOptions
from .labels import label_agreement, read_labels
from .language import LanguageModel, LanguageOptions
from .loading import load_tokenizer
from .outputs import new_folder, write_json, write_text
from .patterns import (
    PatternOptions,
    ThinkingPatterns,
    add_pattern_tokens,
    draw_figures,
    find_patterns,
    pattern_tokens,
    tfidf_embedding,
)
from .prepare_report import pattern_figures, report_text, row_figures
from .segmentation import Corpus, EntropyOptions, StepOptions, Transitions, choose_transitions
from .settings import flat_settings
from .traces import LeftOut, ReadOptions, RowFields, RowProblem, StepRules, Tokenised, Trace, read_traces, tokenise

DEFAULT_PROMPT = PromptOptions(think_open=PromptFormat.think_open, think_close=PromptFormat.think_close)


def prepare(
    sources: Sequence[str],
    output_dir: str | Path,
    *,
    tokenizer: str,
    reading: ReadOptions = ReadOptions(),
    fields: RowFields = RowFields(),
    prompt: PromptOptions = DEFAULT_PROMPT,
    language: LanguageOptions = LanguageOptions(),
    transitions: EntropyOptions = EntropyOptions(),
    steps: StepOptions = StepOptions(),
    patterns: PatternOptions = PatternOptions(),
    max_tokens: int = 32_768,
    labels: str | Path | None = None,
    eval_fraction: float = 0.02,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Turns long chains of thought into a training set: steps, thinking patterns, tokens.

    Rows that cannot be used are left out, counted, and named by line in the report; the run goes on, unless `strict`.
    The same sources and settings give the same rows. Texts, tokens and step embeddings are held in memory. Returns the
    contents of `report.json`.

    Args:
        sources: .jsonl, .jsonl.gz or .parquet files, or hub datasets (`owner/name` or `owner/name:configuration`).
        output_dir: the folder to write; it appears when everything is written.
        tokenizer: folder or hub name of the base model's tokenizer.
        think_open, think_close: what encloses the thinking in the training text.
        max_tokens: rows with more tokens, markers included, are left out.
        labels: .jsonl or .jsonl.gz of {"id", "spans": [[start, end, category], ...]}, sentence labels with character
            offsets in the thinking; the report then says how the step boundaries agree with them.
        eval_fraction: share of problems (not rows) to set apart in eval.parquet.
        seed: of all random choices.
        overwrite: replace an existing training set.
    """
    settings = {**locals(), "output": output_dir}  # as report.json names it
    del settings["output_dir"]
    check_settings(sources, eval_fraction, language, transitions, patterns)
    form = PromptFormat(**prompt.given())
    base_tokenizer = load_base_tokenizer(tokenizer, form)
    model = None if language.model is None else LanguageModel(language, base_tokenizer)
    known_labels = None if labels is None else read_labels(labels)
    left_out, clock = LeftOut(reading.strict), Clock()

    with new_folder(output_dir, overwrite, marker=PATTERNS_FILE) as folder:
        with clock("reading"):
            traces = read_all(sources, reading, fields, form, base_tokenizer, left_out)
        with clock("entropies"):
            chosen = choose_transitions(transitions, Corpus(traces, model, seed))
        if not chosen.entropies:
            del clock.seconds["entropies"]  # none were measured
        with clock("tokens and steps"):
            rules = StepRules(chosen, steps, None if model is None else model.tokenizer)
            rows = tokenise_all(traces, base_tokenizer, form.think_close, rules, max_tokens, left_out)
        with clock("embeddings"):
            embedded = embed(rows, patterns, model, seed)
        with clock("patterns"):
            found = find_patterns(embedded.points, embedded.texts, patterns, seed)
            draw_figures(folder / "figures", found.elbow, found.sizes)
        with clock("writing"):
            written = write_set(folder, rows, found, base_tokenizer, eval_fraction)
            described = describe(found, written, rows, chosen, form)
            write_json(folder / PATTERNS_FILE, described)

        report = {
            "settings": flat_settings(**settings),
            **row_figures(rows, left_out.rows, written.rows, steps.max_step_tokens, base_tokenizer.unk_token_id),
            "transitions": described["transitions"],
            "opening_entropies": [
                asdict(row) for row in chosen.entropies if row.count >= transitions.min_opening_count
            ],
            **pattern_figures(found, embedded.by),
            "tokenizer": {
                "tokens": len(base_tokenizer),
                "first_marker": written.start_ids[0],
                "last_marker": written.end_ids[-1],
            },
        }
        if known_labels is not None:
            boundaries = {row.trace.id: row.step_chars[1:] for row in rows}
            report["label_agreement"] = label_agreement(boundaries, known_labels)
        report["seconds"] = clock.seconds
        report["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        text = report_text(report, described["patterns"])
        write_json(folder / "report.json", report)
        write_text(folder / "report.md", text)
    print(text)
    return report


def check_settings(
    sources: Sequence[str],
    eval_fraction: float,
    language: LanguageOptions,
    transitions: EntropyOptions,
    patterns: PatternOptions,
) -> None:
    """Checks what no option group can check by itself."""
    if isinstance(sources, str) or not sources:
        raise ValueError(f"sources: expected a list of files or hub names, got {sources!r}")
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction: expected 0 or more and less than 1, got {eval_fraction}")
    if language.model is None and patterns.embedding == "hidden_states":
        raise ValueError("embedding='hidden_states' needs a language model: give `model`")
    if language.model is None and transitions.opening_unit == "token":
        raise ValueError("opening_unit='token' needs a language model: give `model`")


def load_base_tokenizer(name: str, form: PromptFormat) -> Any:
    tokenizer = load_tokenizer(name)
    if form.template is None and not tokenizer.chat_template:
        raise ValueError(f"the tokenizer {name} has no chat template: give prompt_template, with {{prompt}} in it")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name} has no end-of-sequence token, so an answer could never end")
    return tokenizer


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - begin, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Rows into steps


def read_all(
    sources: Sequence[str],
    reading: ReadOptions,
    fields: RowFields,
    form: PromptFormat,
    tokenizer: Any,
    left_out: LeftOut,
) -> list[Trace]:
    """The traces of all sources, with the text before their thinking."""
    numbered = ((str(s), *row) for s in sources for row in read_traces(str(s), reading.split, fields, form, tokenizer))
    traces = []
    for source, line, row in tqdm(islice(numbered, reading.limit), desc="reading", unit="row"):
        if isinstance(row, RowProblem):
            left_out.add(source, line, row)
        else:
            traces.append(row)
    left_out.check_some_remain(traces)
    return traces


def tokenise_all(
    traces: Sequence[Trace], tokenizer: Any, think_close: str, rules: StepRules, max_tokens: int, left_out: LeftOut
) -> list[Tokenised]:
    """The traces as tokens, except those longer than `max_tokens`."""
    rows = []
    with tqdm(total=len(traces), desc="tokens and steps", unit="row") as bar:
        for at in range(0, len(traces), 64):
            part = traces[at : at + 64]
            for trace, row in zip(part, tokenise(part, tokenizer, think_close, rules), strict=True):
                bar.update()
                if isinstance(row, RowProblem):
                    left_out.add(trace.source, trace.line, row)
                elif row.marked_length() > max_tokens:
                    detail = f"{row.marked_length()} tokens, at most {max_tokens} allowed"
                    left_out.add(trace.source, trace.line, RowProblem("too_long", detail))
                else:
                    rows.append(row)
    left_out.check_some_remain(rows)
    return rows


@dataclass(frozen=True)
class EmbeddedSteps:
    """The steps of all rows, in order: a text and a point for each."""

    texts: list[str]
    points: np.ndarray  # [steps, width]
    by: str  # "hidden_states" or "tfidf"


def embed(rows: Sequence[Tokenised], options: PatternOptions, model: LanguageModel | None, seed: int) -> EmbeddedSteps:
    texts = [row.trace.thinking[begin:end].strip() for row in rows for begin, end in row.step_spans()]
    if (options.embedding or ("tfidf" if model is None else "hidden_states")) == "tfidf":
        problems = [_problem_hash(row.trace.prompt) for row in rows for _ in row.steps]
        return EmbeddedSteps(texts, tfidf_embedding(texts, problems, seed=seed), "tfidf")
    return EmbeddedSteps(texts, model.step_embeddings(rows, options.layer), "hidden_states")


# ----------------------------------------------------------------------------------------------------------------------
# The set on disk

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


@dataclass(frozen=True)
class Written:
    """How many rows each part has, and the marker tokens of the patterns."""

    rows: Counter
    start_ids: list[int]
    end_ids: list[int]


def write_set(
    folder: Path, rows: Sequence[Tokenised], found: ThinkingPatterns, tokenizer: Any, eval_fraction: float
) -> Written:
    """Adds the patterns' markers to the tokenizer, and writes it and the rows."""
    start_ids, end_ids = add_pattern_tokens(tokenizer, len(found.sizes))
    tokenizer.save_pretrained(folder / "tokenizer")
    first_step = np.cumsum([0, *(len(row.steps) for row in rows)])
    parts = (
        (
            "eval" if problem_share(row.trace.prompt) < eval_fraction else "train",
            assemble(row, found.of_step[begin:end], start_ids, end_ids),
        )
        for row, (begin, end) in zip(rows, pairwise(first_step), strict=True)
    )
    counts = write_rows(folder, tqdm(parts, desc="writing", total=len(rows), unit="row"))
    if not counts["train"]:
        raise ValueError(f"all problems fell to the evaluation part (eval_fraction {eval_fraction}): read more")
    return Written(counts, start_ids, end_ids)


def assemble(
    row: Tokenised, pattern_of_step: Sequence[int], start_ids: Sequence[int], end_ids: Sequence[int]
) -> dict[str, Any]:
    """A row of the training set: the tokens, with each step between the markers of its pattern."""
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


def problem_share(messages: Sequence[Mapping[str, str]]) -> float:
    """A hash of the prompt's words, in [0, 1), so that all traces of a problem fall in the same part."""
    return int.from_bytes(_problem_hash(messages)[:8], "big") / 2**64


def _problem_hash(messages: Sequence[Mapping[str, str]]) -> bytes:
    words = " ".join(" ".join(message["content"] for message in messages).casefold().split())
    return hashlib.sha256(words.encode()).digest()


def write_rows(folder: Path, rows: Iterable[tuple[str, dict[str, Any]]]) -> Counter:
    """Writes (part, row) pairs to `<part>.parquet`, a thousand rows at a time, and counts the rows of each part."""
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


def describe(
    found: ThinkingPatterns, written: Written, rows: Sequence[Tokenised], chosen: Transitions, form: PromptFormat
) -> dict[str, Any]:
    """The contents of patterns.json: the patterns and their markers, the transitions, and the prompt format."""
    entropies = {row.opening: row.entropy_bits for row in chosen.entropies}
    opened = Counter(opening for row in rows for opening in row.openings)
    return {
        "patterns": [
            {
                "id": i,
                "start_token": pattern_tokens(i)[0],
                "end_token": pattern_tokens(i)[1],
                "start_token_id": written.start_ids[i],
                "end_token_id": written.end_ids[i],
                "size": size,
                "examples": examples,
            }
            for i, (size, examples) in enumerate(zip(found.sizes, found.examples, strict=True))
        ],
        "transitions": [
            {"opening": word, "steps": opened[chosen.key(word)], "entropy_bits": entropies.get(word)}
            for word in chosen.openings
        ],
        "prompt": asdict(form),
    }
