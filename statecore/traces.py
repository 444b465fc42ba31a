"""Rows of text in, tokenised chains of thought with step boundaries out.

Reads JSON Lines and Parquet files and hub datasets, finds the prompt, thinking and answer of each row, and places step
boundaries (statecore/segmentation.py) on its tokens. A row that cannot be used becomes a RowProblem that says why.
"""

from __future__ import annotations

import gzip
import json
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np

from . import segmentation
from .data import PromptFormat

# ----------------------------------------------------------------------------------------------------------------------
# Reading rows


class RowProblem(ValueError):
    """A row that cannot be used: a short reason, by which such rows are counted, and the details."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class BadRow:
    """Where a row was left out, and why. `line` counts from 1, in rows for Parquet files and hub datasets."""

    source: str
    line: int
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.source}, line {self.line}: {self.reason}: {self.detail}"


class LeftOut:
    """Collects the rows that cannot be used; with `strict`, the first one is an error."""

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


@dataclass(frozen=True)
class RowFields:
    """Where a row keeps its parts.

    Thinking and answer either have fields of their own, or `completion` names one field that holds both, with the
    thinking between `think_tags`: a text, or a list of chat messages that ends with the assistant's. The messages
    before it are then the prompt, and the `prompt` field is not read.

    Args:
        prompt, thinking, answer, id: where a row keeps its parts.
        completion: a field with thinking and answer in one, a text or a list of chat messages.
        think_tags: what encloses the thinking in `completion_field`.
    """

    prompt: str = field(default="problem", metadata={"option": "prompt_field"})
    thinking: str = field(default="thinking", metadata={"option": "thinking_field"})
    answer: str = field(default="answer", metadata={"option": "answer_field"})
    id: str = field(default="id", metadata={"option": "id_field"})
    completion: str | None = field(default=None, metadata={"option": "completion_field"})
    think_tags: tuple[str, str] = ("<think>", "</think>")


@dataclass(frozen=True)
class ReadOptions:
    """Which rows of a source are read.

    Args:
        split: split of a hub dataset.
        limit: read no more rows than this.
        strict: stop at the first row that cannot be used.
    """

    split: str = "train"
    limit: int | None = None
    strict: bool = False


@dataclass
class Trace:
    """One usable row: the prompt's chat messages, thinking and answer, and where it came from.

    `head` is the text before the thinking, which `read_traces` makes from the prompt.
    """

    id: str
    prompt: list[dict[str, str]]
    thinking: str
    answer: str
    source: str
    line: int
    head: str = ""

    def text(self) -> str:
        """The text up to the end of the thinking."""
        return self.head + self.thinking


def read_lines(source: str, split: str) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a source: a dict, or a RowProblem in its place.

    `source` is a .jsonl, .jsonl.gz or .parquet file, or a hub dataset `owner/name` or `owner/name:configuration`.
    """
    if source.endswith((".jsonl", ".jsonl.gz")):
        yield from read_jsonl(Path(source))
    elif source.endswith(".parquet"):
        rows = datasets.load_dataset("parquet", data_files=str(Path(source)), split="train")
        yield from enumerate(rows, 1)
    elif Path(source).exists():
        raise ValueError(
            f"cannot read {source}: expected a .jsonl, .jsonl.gz or .parquet file, or a dataset's name on the hub"
        )
    else:
        name, _, configuration = source.partition(":")
        yield from enumerate(datasets.load_dataset(name, configuration or None, split=split), 1)


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a .jsonl or .jsonl.gz file, with RowProblems as in `read_lines`."""
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, _parse_line(line)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield (
                number + 1,
                RowProblem("unreadable", f"the compressed file breaks off here, what follows is lost ({error})"),
            )


def _parse_line(line: bytes) -> Any:
    if not line.strip():
        return RowProblem("empty", "the line is blank")
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return RowProblem("broken_json", str(error))
    return row if isinstance(row, dict) else RowProblem("broken_json", f"expected an object, got {type(row).__name__}")


def parse_trace(row: Mapping[str, Any], fields: RowFields, source: str, line: int) -> Trace:
    """The parts of a row. Raises RowProblem if prompt, thinking or answer is missing."""
    if fields.completion is None:
        prompt = [{"role": "user", "content": _text(row, fields.prompt, "no_prompt")}]
        thinking = _text(row, fields.thinking, "no_thinking")
        answer = _text(row, fields.answer, "no_answer")
    else:
        content = row.get(fields.completion)
        if isinstance(content, list):
            prompt, content = _conversation(content, fields.completion)
        else:
            prompt = [{"role": "user", "content": _text(row, fields.prompt, "no_prompt")}]
            content = _text(row, fields.completion, "no_thinking")
        thinking, answer = _split_completion(content, fields)
    try:
        "".join([*(message["content"] for message in prompt), thinking, answer]).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: JSON can hold it, no tokenizer reads it
        raise RowProblem("broken_text", str(error)) from error
    name = row.get(fields.id)
    return Trace(
        str(name) if name is not None else f"{Path(source).name}:{line}", prompt, thinking, answer, source, line
    )


def read_traces(
    source: str, split: str, fields: RowFields, form: PromptFormat, tokenizer: Any
) -> Iterator[tuple[int, Trace | RowProblem]]:
    """Numbered traces of a source, with their heads; RowProblems in place of rows that cannot be used."""
    for line, row in read_lines(source, split):
        try:
            if isinstance(row, RowProblem):
                raise row
            trace = parse_trace(row, fields, source, line)
            trace.head = form.prompt_text(tokenizer, trace.prompt)
        except RowProblem as problem:
            yield line, problem
        except jinja2.TemplateError as error:
            yield line, RowProblem("no_prompt", f"the chat template refuses the messages: {error}")
        else:
            yield line, trace


def _text(row: Mapping[str, Any], name: str, reason: str) -> str:
    if name not in row:
        raise RowProblem(reason, f"field {name!r} is missing; the row has {', '.join(map(repr, row)) or 'no fields'}")
    value = row[name]
    if not isinstance(value, str):
        raise RowProblem(reason, f"field {name!r}: expected text, got {type(value).__name__}")
    if not value.strip():
        raise RowProblem(reason, f"field {name!r} is empty")
    return value.strip()


def _conversation(messages: list[Any], name: str) -> tuple[list[dict[str, str]], str]:
    """The prompt's messages and the assistant's text, from `role`/`content` or ShareGPT's `from`/`value` messages."""
    roles = {"human": "user", "gpt": "assistant"}
    try:
        turns = [
            (m["role"], m["content"]) if "role" in m else (roles.get(m["from"], m["from"]), m["value"])
            for m in messages
        ]
    except (KeyError, TypeError) as error:
        raise RowProblem("no_prompt", f"field {name!r}: expected messages with role and content ({error!r})") from error
    if len(turns) < 2 or turns[-1][0] != "assistant" or not all(isinstance(text, str) for _, text in turns):
        raise RowProblem(
            "no_thinking", f"field {name!r}: expected a prompt and then an assistant's message, all of them texts"
        )
    return [{"role": role, "content": text} for role, text in turns[:-1]], turns[-1][1]


def _split_completion(text: str, fields: RowFields) -> tuple[str, str]:
    opening, closing = fields.think_tags
    before, opened, rest = text.partition(opening)
    if not opened:
        rest = text  # chat templates often open the thinking in the prompt
    elif before.strip():
        raise RowProblem("no_thinking", f"field {fields.completion!r} has text before {opening}")
    thinking, closed, answer = rest.partition(closing)
    if not closed:
        raise RowProblem("no_thinking", f"field {fields.completion!r} has no {closing}")
    if not thinking.strip():
        raise RowProblem("no_thinking", f"field {fields.completion!r} has nothing before {closing}")
    if not answer.strip():
        raise RowProblem("no_answer", f"field {fields.completion!r} has nothing after {closing}")
    return thinking.strip(), answer.strip()


# ----------------------------------------------------------------------------------------------------------------------
# Text and tokens


@dataclass
class Tokenised:
    """One row's text as tokens, without markers, and the token positions at which its parts start."""

    trace: Trace
    ids: np.ndarray  # [tokens] int32, with the end-of-sequence token
    glued: bool  # whether the end of the prompt shares a token with the thinking
    steps: list[int]  # token positions at which the steps start; steps[0] is the length of the prompt
    answer: int  # token position at which the closing of the thinking (or the answer) starts
    step_chars: list[int]  # the same starts as character offsets in the thinking
    openings: list[str | None]  # what each step opens with

    def step_spans(self) -> list[tuple[int, int]]:
        """Character spans of the steps in the thinking."""
        return list(pairwise([*self.step_chars, len(self.trace.thinking)]))

    def step_tokens(self) -> list[int]:
        """Tokens of each step, without its markers."""
        return [end - begin for begin, end in pairwise([*self.steps, self.answer])]

    def marked_length(self) -> int:
        """Tokens of the row with the two markers of each step."""
        return len(self.ids) + 2 * len(self.steps)


@dataclass(frozen=True)
class StepRules:
    """What starts a step and how long it may be. Openings of `unit="token"` are tokens of `opening_tokenizer`, by
    default of the tokenizer that the text is tokenised with.
    """

    transitions: segmentation.Transitions
    steps: segmentation.StepOptions
    opening_tokenizer: Any = None


def tokenise(
    traces: Sequence[Trace], tokenizer: Any, think_close: str, rules: StepRules
) -> Iterator[Tokenised | RowProblem]:
    """Tokenises each trace as a whole and finds its steps; RowProblems in place of rows that cannot be used.

    A step starts at the token with the first visible character of its sentence, so a space or line break that the
    tokenizer joins to a word goes with the word. So does the closing of the thinking, where the last step ends.
    """
    texts = [trace.text() + think_close + trace.answer for trace in traces]
    all_ids, all_spans = segmentation.encode(tokenizer, texts)
    opening_spans = all_spans
    if rules.transitions.unit == "token" and rules.opening_tokenizer not in (None, tokenizer):
        opening_spans = segmentation.encode(rules.opening_tokenizer, texts)[1]
    forbidden = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    eos = tokenizer.eos_token_id
    for trace, text, ids, spans, own_spans in zip(traces, texts, all_ids, all_spans, opening_spans, strict=True):
        before, thinking_end = len(trace.head), len(trace.text())
        closing = len(text) - len(text[thinking_end:].lstrip())
        answer = bisect_right([end for _, end in spans], closing)
        sentences = [before + start for start in segmentation.sentence_starts(trace.thinking)]
        openings = rules.transitions.sentence_openings(text, sentences, own_spans)
        steps = segmentation.find_steps(sentences, openings, spans, answer, rules.transitions, rules.steps)
        if not steps:
            yield RowProblem("no_thinking", "the thinking is not a token of its own")
            continue
        special = sorted(forbidden.intersection(ids[steps[0].token :]))
        if special:
            yield RowProblem("special_tokens", f"thinking or answer hold {tokenizer.decode([special[0]])!r} as a text")
            continue
        yield Tokenised(
            trace,
            np.array(ids if ids[-1] == eos else [*ids, eos], dtype=np.int32),
            glued=spans[steps[0].token][0] < before,
            steps=[step.token for step in steps],
            answer=answer,
            step_chars=[step.char - before for step in steps],
            openings=[step.opening for step in steps],
        )
