"""Rows of any source into chains: tokens with step ends, answer, and what a reader of the results needs to know.

A reader is called with a row, its source and line, and returns a Chain, or raises RowProblem if the row cannot be used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from .. import segmentation
from ..data import Prepared, PromptFormat
from ..modeling import StateCoreForCausalLM
from ..traces import RowFields, RowProblem, StepRules, Tokenised, Trace, parse_trace, read_lines, tokenise
from .gains import StepGains, mark_steps


@dataclass(frozen=True)
class Chain:
    """One trace as tokens, with what a person needs to read the result.

    step_ends: positions after the prompt and after each step. texts: of the steps. spans: their character spans in the
    thinking; None if only tokens are known. kinds: the name of every step, for each way of naming steps ("pattern",
    "category", "opening"). correct: None if the row does not say.
    """

    id: str
    source: str
    line: int
    tokens: list[int]
    step_ends: list[int]
    closing: list[int]
    answer: list[int]
    answer_text: str
    texts: list[str]
    spans: list[tuple[int, int]] | None
    kinds: dict[str, list[str]]
    correct: bool | None = None
    posterior_prompt: list[int] | None = None

    @property
    def token_count(self) -> int:
        """Tokens up to the end of the answer."""
        return self.step_ends[-1] + len(self.closing) + len(self.answer)

    def record(self, gains: StepGains) -> dict[str, Any]:
        """The chain's entry in the rewards file."""
        steps = []
        for i, (text, gain) in enumerate(zip(self.texts, gains.gains.tolist(), strict=True)):
            begin, end = self.spans[i] if self.spans else (None, None)
            tokens = self.step_ends[i + 1] - self.step_ends[i]
            kinds = {naming: names[i] for naming, names in self.kinds.items()}
            steps.append({"text": text, "begin": begin, "end": end, "tokens": tokens, "gain": gain, **kinds})
        known = gains.log_likelihoods
        return {
            "id": self.id,
            "source": self.source,
            "line": self.line,
            "correct": self.correct,
            "answer": self.answer_text,
            "answer_log_likelihoods": None if known is None else known.tolist(),
            "steps": steps,
        }


# ----------------------------------------------------------------------------------------------------------------------
# Rows of text


@dataclass(frozen=True)
class ChainFields(RowFields):
    """Where a row keeps its parts, and what else it says.

    Args:
        prompt, thinking, answer, id: where a row keeps its parts; the answer that is scored may be any field, such as
            that of a short reference answer.
        completion: a field with thinking and answer in one, a text or a list of chat messages.
        think_tags: what encloses the thinking in `completion_field`.
        correct: a field that says, true or false, whether the trace's own answer was right.
    """

    correct: str = field(default="correct", metadata={"option": "correct_field"})


@dataclass(frozen=True)
class TextReader:
    """Reads rows of text. The steps are those that `statecore prepare` finds under the same rules.

    A text is tokenised once, as a whole, so the tokens up to a step's end are those of the complete chain. White space
    after a step belongs to the step; any before the first visible character of the closing belongs to the last step, so
    after an earlier step the closing follows without it.
    """

    tokenizer: Any
    form: PromptFormat
    rules: StepRules
    fields: ChainFields = ChainFields()
    model: StateCoreForCausalLM | None = None  # adds step tokens around the steps
    score_end: bool = True
    posterior_template: str | None = None
    labels: Mapping[str, Sequence[Sequence[Any]]] = field(default_factory=dict)

    def __post_init__(self):
        if self.form.template is None and not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: give prompt_template, with {prompt} in it")
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer must have an end-of-sequence token, so that an answer can end")

    def __call__(self, row: Mapping[str, Any], source: str, line: int) -> Chain:
        trace = parse_trace(row, self.fields, source, line)
        try:
            trace.head = self.form.prompt_text(self.tokenizer, trace.prompt)
            found = self._tokenise(trace)
            posterior_prompt = self._posterior_prompt(trace, found) if self.posterior_template else None
        except jinja2.TemplateError as error:
            raise RowProblem("no_prompt", f"the chat template refuses the messages: {error}") from error
        ids = found.ids.tolist()
        answer_begin = self._answer_begin(found)
        answer_end = len(ids) if self.score_end else len(ids) - 1  # the last token is the end of sequence
        tokens, step_ends, kinds = self._marked(ids, [*found.steps, found.answer])
        spans = found.step_spans()
        correct = row.get(self.fields.correct)
        return Chain(
            id=trace.id,
            source=source,
            line=line,
            tokens=tokens,
            step_ends=step_ends,
            closing=ids[found.answer : answer_begin],
            answer=ids[answer_begin:answer_end],
            answer_text=trace.answer,
            texts=[trace.thinking[begin:end].strip() for begin, end in spans],
            spans=spans,
            kinds=self._text_kinds(found) | kinds,
            correct=correct if isinstance(correct, bool) else None,
            posterior_prompt=posterior_prompt,
        )

    def _tokenise(self, trace: Trace) -> Tokenised:
        found = next(tokenise([trace], self.tokenizer, self.form.think_close, self.rules))
        if isinstance(found, RowProblem):
            raise found
        return found

    def _marked(self, ids: list[int], bounds: list[int]) -> tuple[list[int], list[int], dict[str, list[str]]]:
        """Tokens and step ends of prompt and steps, with the model's step tokens if it has any, and their patterns."""
        if self.model is None:
            return ids[: bounds[-1]], bounds, {}
        steps = [ids[begin:end] for begin, end in pairwise(bounds)]
        tokens, step_ends, patterns = mark_steps(self.model, ids[: bounds[0]], steps)
        return tokens, step_ends, {"pattern": list(map(str, patterns))}

    def _text_kinds(self, found: Tokenised) -> dict[str, list[str]]:
        kinds = {"opening": [opening or "(no word)" for opening in found.openings]}
        if found.trace.id in self.labels:
            labels = self.labels[found.trace.id]
            kinds["category"] = [_category(labels, *span) for span in found.step_spans()]
        return kinds

    def _answer_begin(self, found: Tokenised) -> int:
        """The position of the answer's first token.

        Raises RowProblem if a token has visible characters on both sides of a border between prompt, steps, closing and
        answer.
        """
        trace = found.trace
        text = trace.text() + self.form.think_close + trace.answer
        offsets = segmentation.encode(self.tokenizer, [text])[1][0]
        answer_char = len(text) - len(trace.answer)
        answer = int(np.searchsorted([end for _, end in offsets], answer_char, side="right"))
        step_chars = [len(trace.head) + char for char in found.step_chars]
        borders = zip([*found.steps, found.answer, answer], [*step_chars, len(trace.text()), answer_char], strict=True)
        for token, char in borders:
            begin, end = offsets[token]
            if text[begin:char].strip() and text[char:end].strip():
                raise RowProblem(
                    "merged_border",
                    f"the tokenizer joins {text[begin:char]!r} and {text[char:end]!r} into one token across the border "
                    "of a step: put white space around think_open and think_close, or use another tokenizer",
                )
        return answer

    def _posterior_prompt(self, trace: Trace, found: Tokenised) -> list[int]:
        """Tokens of the prompt that tells the model the answer."""
        *earlier, last = trace.prompt
        content = self.posterior_template.replace("{prompt}", last["content"]).replace("{answer}", trace.answer)
        head = self.form.prompt_text(self.tokenizer, [*earlier, {**last, "content": content}])
        told = self._tokenise(replace(trace, head=head))
        if not np.array_equal(told.ids[told.steps[0] :], found.ids[found.steps[0] :]):
            raise RowProblem("merged_border", "the thinking has other tokens behind the posterior prompt")
        return told.ids[: told.steps[0]].tolist()


def _category(labels: Sequence[Sequence[Any]], begin: int, end: int) -> str:
    """The label that covers most of the characters begin..end."""
    covered: dict[str, int] = {}
    for first, last, name, *_ in labels:
        covered[name] = covered.get(name, 0) + max(0, min(last, end) - max(first, begin))
    best = max(covered, key=covered.get, default=None)
    return best if best is not None and covered[best] else "(no label)"


# ----------------------------------------------------------------------------------------------------------------------
# Rows of a prepared training set


@dataclass(frozen=True)
class PreparedReader:
    """Reads rows of a prepared training set, with their thinking patterns. `marked` keeps the step tokens."""

    prepared: Prepared
    marked: bool
    score_end: bool = True

    def __call__(self, row: Mapping[str, Any], source: str, line: int) -> Chain:
        if not row["patterns"]:
            raise RowProblem("no_steps", "the row has a prompt and an answer, and no step between them")
        tokenizer = self.prepared.tokenizer
        ids, step_ids = np.asarray(row["input_ids"]), np.asarray(row["step_ids"])
        is_marker = np.isin(ids, [*self.prepared.step_start_token_ids, *self.prepared.step_end_token_ids])
        ends = [int(np.searchsorted(step_ids, i, side="right")) for i in range(len(row["patterns"]) + 1)]
        texts = [tokenizer.decode(ids[b:e][~is_marker[b:e]]).strip() for b, e in pairwise(ends)]
        tail = ids[ends[-1] :].tolist()
        closing = self._closing_length(tail)
        answer = tail[closing:] if self.score_end else tail[closing:-1]
        if not answer:
            raise RowProblem("no_answer", "nothing follows the end of the thinking")
        tokens = ids[: ends[-1]]
        if not self.marked:
            tokens = tokens[~is_marker[: len(tokens)]]
            ends = np.cumsum(~is_marker)[np.asarray(ends) - 1].tolist()
        return Chain(
            id=str(row["id"]),
            source=source,
            line=line,
            tokens=tokens.tolist(),
            step_ends=ends,
            closing=tail[:closing],
            answer=answer,
            answer_text=tokenizer.decode(answer, skip_special_tokens=True).strip(),
            texts=texts,
            spans=None,
            kinds={"pattern": self._pattern_names(row["patterns"])},
        )

    def _closing_length(self, tail: list[int]) -> int:
        """How many tokens after the last step close the thinking."""
        think_close = self.prepared.patterns.get("prompt", {"think_close": ""})["think_close"].strip()
        tokenizer = self.prepared.tokenizer
        for count in range(len(tail) + 1):
            if tokenizer.decode(tail[:count]).strip().startswith(think_close):
                return count
        found = tokenizer.decode(tail)[:80]
        raise RowProblem("no_answer", f"expected {think_close!r} behind the last step, got {found!r}")

    def _pattern_names(self, patterns: Sequence[int]) -> list[str]:
        known = self.prepared.patterns["patterns"]
        return [known[pattern].get("name", known[pattern]["start_token"]) for pattern in patterns]


# ----------------------------------------------------------------------------------------------------------------------
# Sources


def read_source(source: str, split: str) -> Iterator[tuple[str, int, Any]]:
    """(file, line, row or RowProblem) of a .json, .jsonl, .jsonl.gz or .parquet file, of all such files in a folder, or
    of a hub dataset.
    """
    path = Path(source)
    if path.is_dir():
        endings = (".json", ".jsonl", ".jsonl.gz", ".parquet")
        files = sorted(str(file) for file in path.iterdir() if file.name.endswith(endings))
        if not files:
            raise ValueError(f"the folder {source} must hold a prepared training set or {', '.join(endings)} files")
        for file in files:
            yield from read_source(file, split)
    elif path.suffix == ".json" and path.exists():
        yield from _read_json(source)
    else:
        yield from ((source, line, row) for line, row in read_lines(source, split))


def _read_json(source: str) -> Iterator[tuple[str, int, Any]]:
    try:
        content = json.loads(Path(source).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} must hold a JSON object or a list of them ({error})") from error
    for number, row in enumerate(content if isinstance(content, list) else [content], 1):
        if not isinstance(row, dict):
            row = RowProblem("broken_json", f"expected an object, got {type(row).__name__}")
        yield source, number, row
