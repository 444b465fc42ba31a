"""The rows a phase trains on: read or made, filtered, tokenised and mixed.

A training row is prompt, thinking, answer and end of sequence; the prompt is not predicted.
"""

import hashlib
import math
import random
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets, interleave_datasets
from datasets.exceptions import DatasetGenerationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..data import PromptFormat
from ..loading import load_tokenizer
from ..losses import IGNORED
from ..traces import RowFields, RowProblem, parse_trace, read_lines
from .recipe import Phase, Recipe, Source, argument_error, from_mapping

PAD, EOS = "<|pad|>", "<|end|>"
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")})

# ----------------------------------------------------------------------------------------------------------------------
# Sources


@dataclass(frozen=True)
class Row:
    id: str
    prompt: str
    thinking: str
    answer: str


def rows_of(source: Source) -> Iterator[Row | RowProblem]:
    """The rows that a source's filter, part and number let through; a RowProblem stands for a row that cannot be
    used.
    """
    fields = from_mapping(RowFields, source.fields, f"fields of {source.title}")
    low, high = source.part
    taken = 0
    for line, raw in _raw_rows(source):
        if taken == source.rows:
            return
        if isinstance(raw, RowProblem):
            yield raw
            continue
        try:
            if not passes(raw, source.filter, source.title):
                continue
            trace = parse_trace(raw, fields, source.title, line)
        except RowProblem as problem:
            yield problem
            continue
        prompt = "\n".join(message["content"] for message in trace.prompt)
        if low <= hash_fraction(prompt) < high:
            taken += 1
            yield Row(trace.id, prompt, trace.thinking, trace.answer)


def _raw_rows(source: Source) -> Iterator[tuple[int, Any]]:
    if source.programs is None:
        return read_lines(source.source, source.split)
    try:
        return enumerate(programs(**source.programs), 1)
    except TypeError as error:
        raise ValueError(f"programs: {argument_error(error)}") from error


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12], 16) / 16**12


def passes(row: Mapping[str, Any], conditions: Mapping[str, Any], where: str) -> bool:
    """Whether a row meets all conditions: `field: value`, or `field: {min, max, any_of, none_of}` with any of these."""
    for name, condition in conditions.items():
        if name not in row:
            raise ValueError(f"{where}: the filter needs field {name!r}; the row has {', '.join(map(repr, row))}")
        value = row[name]
        rules = condition if isinstance(condition, Mapping) else {"any_of": [condition]}
        unknown = sorted(rules.keys() - {"min", "max", "any_of", "none_of"})
        if unknown:
            known = "known are min, max, any_of and none_of"
            raise ValueError(f"{where}: the filter of {name!r} has the unknown {unknown[0]!r}; {known}")
        bounded = "min" in rules or "max" in rules
        if bounded and (value is None or not rules.get("min", -math.inf) <= value <= rules.get("max", math.inf)):
            return False
        if value not in rules.get("any_of", [value]) or value in rules.get("none_of", []):
            return False
    return True


def programs(
    *, steps: Sequence[int], seed: int = 0, operations: Sequence[str] = ("+", "-"), count: int = 1_000_000
) -> Iterator[dict[str, Any]]:
    """Synthetic problems: small programs on single digits (modulo 10), solved statement by statement.

    A problem gives a first value and between steps[0] and steps[1] statements, each of which combines the newest value
    with an earlier one by one of `operations`, and asks for the last value. Names are consecutive letters from a random
    one on, so long problems contain no name that short ones do not. A row has problem, thinking and answer and, for
    filters, `steps` and `distinct`, the number of different values.
    """
    low, high = steps
    if not 1 <= low <= high <= 25:
        raise ValueError(f"programs: steps must be [low, high] with 1 <= low <= high <= 25, got {list(steps)}")
    unknown = sorted(set(operations) - {"+", "-"})
    if unknown or not operations:
        raise ValueError(f"programs: operations may be '+' and '-', got {list(operations)}")
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    for number in range(count):
        start = draw.randrange(26)
        names = [letters[(start + i) % 26] for i in range(draw.randint(low, high) + 1)]
        values = {names[0]: draw.randrange(10)}
        problem, thinking = [f"{names[0]}={values[names[0]]}."], []
        for before, name in pairwise(names):
            operation, other = draw.choice(operations), draw.choice([*values])
            first, second = values[before], values[other]
            value = (first + second if operation == "+" else first - second) % 10
            problem.append(f"{name}={before}{operation}{other}.")
            thinking.append(f"{name}={before}{operation}{other}:{first}{operation}{second},{name}={value}.")
            values[name] = value
        yield {
            "id": f"program-{seed}-{number}",
            "problem": "".join([*problem, f"{names[-1]}=?"]),
            "thinking": "".join(thinking),
            "answer": str(values[names[-1]]),
            "steps": len(names) - 1,
            "distinct": len(set(values.values())),
        }


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


@dataclass(frozen=True)
class RowEncoder:
    """Turns rows into tokens, and sources and mixtures of them into datasets under `cache_dir`."""

    tokenizer: PreTrainedTokenizerBase
    prompt_format: PromptFormat
    max_tokens: int
    too_long: str  # "drop" or "truncate"
    cache_dir: Path

    def prompt_text(self, row: Row) -> str:
        return self.prompt_format.prompt_text(self.tokenizer, [{"role": "user", "content": row.prompt}])

    def encode(self, row: Row) -> dict[str, Any] | RowProblem:
        """input_ids, labels and length. Prompt and completion are tokenised apart: generate() sees the prompt alone."""
        prompt = self.tokenizer(self.prompt_text(row), add_special_tokens=False).input_ids
        completion = row.thinking + self.prompt_format.think_close + row.answer
        completion = [*self.tokenizer(completion, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        ids, labels = prompt + completion, [IGNORED] * len(prompt) + completion
        if len(ids) > self.max_tokens:
            if self.too_long == "drop" or len(prompt) >= self.max_tokens:
                return RowProblem("too_long", f"{len(ids)} tokens")
            ids, labels = ids[: self.max_tokens], labels[: self.max_tokens]
        return {"input_ids": ids, "labels": labels, "length": len(ids)}

    def dataset(self, source: Source) -> tuple[Dataset, Counter]:
        """The encoded rows of a source, and how many were left out for which reason."""
        left_out: Counter = Counter()

        def encoded_rows() -> Iterator[dict[str, Any]]:
            for row in rows_of(source):
                encoded = row if isinstance(row, RowProblem) else self.encode(row)
                if isinstance(encoded, RowProblem):
                    left_out[encoded.reason] += 1
                else:
                    yield encoded

        if next(encoded_rows(), None) is None:
            raise ValueError(f"{source.title}: no row is left; left out for a reason: {dict(left_out) or 'none'}")
        left_out.clear()
        try:
            rows = Dataset.from_generator(  # on disk, with 1000 rows at a time in memory
                encoded_rows,
                features=FEATURES,
                cache_dir=str(self.cache_dir),
                fingerprint=uuid.uuid4().hex,  # unique, so that no cached rows are taken for these
                writer_batch_size=1000,
            )
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None
        return rows, left_out

    def mixture(self, phase: Phase, seed: int) -> tuple[Dataset, Counter]:
        """The rows of a phase, its sources interleaved by weight, and how many were left out for which reason."""
        parts, left_out = [], Counter()
        for source in phase.mixture:
            rows, counts = self.dataset(source)
            parts.append(rows)
            left_out.update(counts)
        return _interleave(parts, phase, seed), left_out


def _interleave(parts: list[Dataset], phase: Phase, seed: int) -> Dataset:
    weights = [source.weight for source in phase.mixture]
    if len(parts) == 1:
        return parts[0]
    if all(weight is None for weight in weights):
        return concatenate_datasets(parts)
    if any(weight is None or weight <= 0 for weight in weights):
        raise ValueError(f"phase {phase.name!r}: either all sources have a weight > 0 or none, got {weights}")
    probabilities = [weight / sum(weights) for weight in weights]
    parts = [part.shuffle(seed=seed) for part in parts]
    return interleave_datasets(parts, probabilities=probabilities, seed=seed, stopping_strategy="first_exhausted")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names, or a byte-level BPE trained on the rows of all phases."""
    if not isinstance(recipe.tokenizer, str):
        return _train_tokenizer(recipe)
    tokenizer = load_tokenizer(recipe.tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {recipe.tokenizer} has no end-of-sequence token, which rows end with")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    if set(recipe.tokenizer) != {"train"}:
        raise ValueError(f"tokenizer must be a name or {{train: vocabulary size}}, got {recipe.tokenizer}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    think_marks = (recipe.prompt_format.think_open, recipe.prompt_format.think_close)
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.tokenizer["train"],
        special_tokens=[PAD, EOS, *(mark.strip() for mark in think_marks if mark.strip())],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_tokenizer_texts(recipe), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=EOS, padding_side="left")


def _tokenizer_texts(recipe: Recipe, max_rows: int = 2000, max_chars: int = 2000) -> Iterator[str]:
    """Texts of the first rows of every source, their thinking cut."""
    for phase in recipe.phases:
        for source in phase.mixture:
            for row in islice(rows_of(source), max_rows):
                if not isinstance(row, RowProblem):
                    yield "\n".join([row.prompt, row.thinking[:max_chars], row.answer])
