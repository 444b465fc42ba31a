"""The texts that `statecore dynamics` reads: any source in, tokens with step ends out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from .. import segmentation
from ..data import PATTERNS_FILE, load_prepared
from ..loading import load_tokenizer
from ..reading import context_length
from ..segmentation import StepOptions, TransitionOptions, Transitions, choose_transitions
from ..traces import RowProblem, read_lines
from .recording import step_tokens

HELD_OUT = 0.2  # share of the texts to hold out if no others are given


@dataclass(frozen=True)
class Text:
    """Tokens, and the token counts at which steps end."""

    name: str
    tokens: list[int]
    step_ends: list[int]


@dataclass(frozen=True)
class TextOptions:
    """Which texts are read.

    Args:
        text_field: which field of a row is read.
        split: split of a hub dataset; "train" or "eval" of a prepared set.
        limit: read no more inputs than this.
        max_tokens: read no more tokens of an input than this; default: what the model was made for.
    """

    text_field: str = "thinking"
    split: str = "train"
    limit: int | None = 8
    max_tokens: int | None = None


def read_texts(
    source: str,
    model: PreTrainedModel,
    tokenizer: str,
    options: TextOptions = TextOptions(),
    steps: StepOptions = StepOptions(),
    transitions: TransitionOptions = TransitionOptions(),
) -> list[Text]:
    """Texts as the model reads them, from a text file, the rows of a .jsonl, .jsonl.gz or .parquet file or of a hub
    dataset, or a prepared training set, which has a tokenizer of its own.

    Steps are found as `statecore prepare` finds them. For a state-transition model, step tokens are added around them,
    one thinking pattern after the other, and the first step serves as the prompt.
    """
    if (Path(source) / PATTERNS_FILE).is_file():
        found = _prepared_texts(source, options.split, step_tokens(model))
    else:
        reader = _TextReader(load_tokenizer(tokenizer), choose_transitions(transitions), steps, step_tokens(model))
        found = (reader(name, text) for name, text in _rows(source, options))
    longest = options.max_tokens or context_length(model)
    texts = [_cut(text, longest) for text in islice(found, options.limit)]
    if not any(text.tokens for text in texts):
        raise ValueError(f"{source} is empty: expected text to read")
    return [text for text in texts if text.tokens]


def _cut(text: Text, longest: int | None) -> Text:
    tokens = text.tokens[:longest]
    return Text(text.name, tokens, [end for end in text.step_ends if end <= len(tokens)])


def _rows(source: str, options: TextOptions) -> Iterator[tuple[str, str]]:
    """(name, text) of every row."""
    path = Path(source)
    if path.is_file() and not source.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        try:
            yield path.name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{source} must be a text in UTF-8 ({error}), or a .jsonl, .jsonl.gz or .parquet file"
            ) from error
        return
    for line, row in read_lines(source, options.split):
        if isinstance(row, RowProblem):
            raise ValueError(f"{source}, line {line}: {row}")
        value = row.get(options.text_field)
        if not isinstance(value, str):
            raise ValueError(
                f"{source}, line {line}: expected a text in the field {options.text_field!r}, got "
                f"{type(value).__name__}; the row has {', '.join(map(repr, row))}: name another with --text-field"
            )
        yield str(row.get("id", f"{path.name}:{line}")), value


@dataclass(frozen=True)
class _TextReader:
    """Tokenises a text, finds its steps and puts the model's step tokens, if it has any, around all but the first."""

    tokenizer: Any
    transitions: Transitions
    steps: StepOptions
    markers: tuple[list[int], list[int]]

    def __call__(self, name: str, text: str) -> Text:
        (ids,), (spans,) = segmentation.encode(self.tokenizer, [text])
        if not ids:
            return Text(name, [], [])
        sentences = segmentation.sentence_starts(text)
        openings = self.transitions.sentence_openings(text, sentences, spans)
        steps = segmentation.find_steps(sentences, openings, spans, len(ids), self.transitions, self.steps)
        return self._marked(name, ids, [*(step.token for step in steps[1:]), len(ids)])

    def _marked(self, name: str, ids: list[int], step_ends: list[int]) -> Text:
        starts, ends = self.markers
        if not starts:
            return Text(name, ids, step_ends)
        marked, marked_ends = ids[: step_ends[0]], [step_ends[0]]
        for i, (begin, end) in enumerate(pairwise(step_ends)):
            marked += [starts[i % len(starts)], *ids[begin:end], ends[i % len(ends)]]
            marked_ends.append(len(marked))
        return Text(name, marked, marked_ends)


def _prepared_texts(source: str, split: str, markers: tuple[list[int], list[int]]) -> Iterator[Text]:
    """Rows of a prepared set, without step tokens if the model has none."""
    prepared = load_prepared(source)
    known = {*prepared.step_start_token_ids, *prepared.step_end_token_ids}
    wanted = {token for kind in markers for token in kind}
    if wanted and wanted != known:
        raise ValueError(f"the model's step tokens are not those of {source}: prepare the set for this model")
    for row in prepared.part(split):
        ids, step_ids = np.asarray(row["input_ids"]), np.asarray(row["step_ids"])
        ends = np.flatnonzero(np.diff(step_ids, append=step_ids[-1] + 1)) + 1  # of the prompt, each step, the answer
        if not wanted:
            stays = ~np.isin(ids, list(known))
            ends, ids = np.cumsum(stays)[ends - 1], ids[stays]
        yield Text(str(row["id"]), ids.tolist(), ends.tolist())


def hold_out(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Texts to calibrate with and texts to score on: the last fifth of all texts, or of the tokens of a single text."""
    count = max(round(HELD_OUT * len(texts)), 1)
    if len(texts) > 1:
        return list(texts[:-count]), list(texts[-count:])
    (text,) = texts
    cut = len(text.tokens) - round(HELD_OUT * len(text.tokens))
    if not 1 <= cut <= len(text.tokens) - 2:
        raise ValueError(f"{text.name} has {len(text.tokens)} tokens, too few to hold some out: name --heldout")
    ends = [end for end in text.step_ends if end <= cut]
    return [Text(text.name, text.tokens[:cut], ends)], [Text(text.name, text.tokens[cut:], [])]
