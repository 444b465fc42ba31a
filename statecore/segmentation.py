"""Long chains of thought into steps: sentences, transitions, step boundaries.

A step starts at a sentence that opens with a transition: a word such as "Wait" or "Alternatively", where a language
model is least certain of the next token (State-Transition Framework, arXiv 2602.01198, section on data construction).
Transitions are chosen by `choose_transitions`, whose docstring says how to add a way of choosing them, and steps are
found by `find_steps`.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from .windows import context_size, encode, window_batches

# Used when neither a model nor a file is given: the words that open 20 or more sentences of R1-style traces with a mean
# entropy above 0.99 bits in the public sentence entropies of interp-reasoning/thought-anchors (1,746 sentences that
# open with a word, mean 0.91), except the pronouns "this", "it" and "they", which refer back to the step before.
DEFAULT_TRANSITIONS = ("maybe", "hmm", "but", "or", "wait", "another", "alright", "alternatively")

OpeningUnit = Literal["word", "token"]

# ----------------------------------------------------------------------------------------------------------------------
# Sentences

# Formulas and code are matched as a whole, so that nothing inside them ends a sentence. `$...$` follows pandoc's rule
# (no space just inside the dollar signs, no digit after the closing one), which leaves prices alone. The length limits
# keep an unclosed delimiter from swallowing a trace.
_PROTECTED = r"""
    ```.*?```
  | \\begin\{(?P<environment>[a-zA-Z*]+)\}.{0,4000}?\\end\{(?P=environment)\}
  | \$\$.{1,4000}?\$\$
  | \\\[.{0,4000}?\\\]
  | \\\(.{0,1000}?\\\)
  | (?<![\\$])\$(?=[^\s$])[^$\n]{0,400}?(?<=[^\s\\])\$(?!\d)
  | `[^`\n]{1,400}`
"""
_SENTENCE_END = r"""
    \n\s*
  | (?P<mark>[.!?…]+)[*_"'”’)\]]*[^\S\n]+(?=\S)
  | [。！？]+[”’」』）]*\s*
"""
_SCAN = re.compile(rf"(?:{_PROTECTED})|(?P<end>{_SENTENCE_END})", re.VERBOSE | re.DOTALL)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[])(?:e\.?g|i\.?e|vs|cf|etc|approx|resp|dr|mrs?|ms|prof|st|viz|al|w\.?r\.?t|a\.k\.a)$", re.IGNORECASE
)
_NUMBER_FOLLOWS = re.compile(r"(?:^|[\s(\[])(?:no|nos|fig|figs|eq|eqs|sec|ch|p|pp)$", re.IGNORECASE)
_ENUMERATOR = re.compile(r"[*_#(]*(?:\d{1,3}|[A-Za-z]|[ivx]{1,4})$")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_DECORATION = re.compile(r"[\s*_#>\"'“‘(\-–—•]*")


def sentence_starts(text: str) -> list[int]:
    """Increasing character offsets of the first visible characters of the sentences of `text`; none for blank text.

    A sentence ends at `.`, `!`, `?` or an ellipsis followed by a space, at a CJK full stop, and at a newline. It does
    not end inside `$...$`, `$$...$$`, `\\(...\\)`, `\\[...\\]`, LaTeX environments or code, inside a number such as
    3.14, after an abbreviation or the number of a list item, or at a full stop followed by a lower-case letter.
    """
    first = len(text) - len(text.lstrip())
    if first == len(text):
        return []
    starts = [first]
    for match in _SCAN.finditer(text):
        end = match.end()
        if match["end"] is None or end >= len(text) or end <= first:
            continue
        if match["mark"] is not None:
            sentence = text[starts[-1] : match.start()]
            if match["mark"] == ".":
                tail = sentence[-8:]
                if _ABBREVIATION.search(tail) or _ENUMERATOR.match(sentence):
                    continue
                if text[end].isdigit() and _NUMBER_FOLLOWS.search(tail):
                    continue
            if match["mark"][-1] in ".…" and text[end].islower():
                continue
        starts.append(end)
    return starts


def first_word(text: str, start: int) -> str | None:
    """The first word of the sentence that starts at `start`, in lower case, after any quotes and Markdown marks.

    None if the sentence opens with something else, such as a number or a formula.
    """
    match = _WORD.match(text, _DECORATION.match(text, start).end())
    return match[0].casefold() if match else None


def sentence_openings(
    text: str, starts: Sequence[int], unit: OpeningUnit, offsets: Sequence[tuple[int, int]] | None = None
) -> list[str | None]:
    """What each sentence opens with: its first word (`unit="word"`) or its first token, stripped (`unit="token"`).

    `offsets` are the character spans of the text's tokens, which only `unit="token"` needs.
    """
    if unit == "word":
        return [first_word(text, start) for start in starts]
    ends = [end for _, end in offsets]
    return [text[slice(*offsets[bisect_right(ends, start)])].strip() for start in starts]


# ----------------------------------------------------------------------------------------------------------------------
# Entropy at sentence starts


@dataclass(frozen=True)
class OpeningEntropy:
    """How uncertain a model is, on average, at the sentences that open like this."""

    opening: str
    count: int
    entropy_bits: float


@torch.inference_mode()
def opening_entropies(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    starts: Sequence[Sequence[int]],
    *,
    unit: OpeningUnit = "word",
    window: int | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> list[OpeningEntropy]:
    """Mean next-token entropy of a causal language model at sentence starts, by opening, highest first.

    H = -sum p log2 p, in bits, of the distribution that predicts a sentence's first token: the one that holds character
    `starts[i][j]` of `texts[i]`. The mean is over the sentences that open with the same word or token (`unit`). With a
    tokenizer of characters, `unit="word"` still groups by words, and measures at their first letters. Texts longer than
    `window` tokens (default: the model's context, at most 4096) are read in overlapping windows. Left out are sentences
    that open with no word, and the first token of a text, which nothing predicts.
    """
    model.eval()
    ids, offsets = encode(tokenizer, texts)
    predicted = [_predicted_openings(*row, unit) for row in zip(texts, starts, offsets, strict=True)]
    device = next(model.parameters()).device
    description = "entropy at sentence starts" if progress else None
    found: dict[str, list[float]] = defaultdict(list)
    for batch, input_ids, mask in window_batches(ids, context_size(model, window), batch_size, device, description):
        wanted = [
            [(p - begin, opening) for p, opening in predicted[i].items() if first <= p < end]
            for i, begin, end, first in batch
        ]
        for opening, entropy in _entropies(model, input_ids, mask, wanted):
            found[opening].append(entropy)
    table = [OpeningEntropy(opening, len(values), float(np.mean(values))) for opening, values in found.items()]
    return sorted(table, key=lambda row: (-row.entropy_bits, row.opening))


def _predicted_openings(
    text: str, starts: Sequence[int], spans: Sequence[tuple[int, int]], unit: OpeningUnit
) -> dict[int, str]:
    """Sentence openings by the token position that predicts their first token."""
    ends = [end for _, end in spans]
    positions = [bisect_right(ends, start) - 1 for start in starts]
    openings = sentence_openings(text, starts, unit, spans)
    return {p: opening for p, opening in zip(positions, openings, strict=True) if opening and p >= 0}


def _entropies(
    model: torch.nn.Module, input_ids: torch.Tensor, mask: torch.Tensor, wanted: Sequence[Sequence[tuple[int, str]]]
) -> Iterator[tuple[str, float]]:
    """(opening, bits) at the wanted positions of each row. Computes logits at those only."""
    positions = sorted({p for row in wanted for p, _ in row})
    if not positions:
        return
    keep = torch.tensor(positions, device=input_ids.device)
    logits = model(input_ids=input_ids, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits
    column = {p: j for j, p in enumerate(positions)}
    for b, row in enumerate(wanted):
        if row:
            log_p = logits[b, [column[p] for p, _ in row]].float().log_softmax(-1)
            bits = -(log_p.exp() * log_p).sum(-1) / math.log(2)
            yield from zip((opening for _, opening in row), bits.tolist(), strict=True)


# ----------------------------------------------------------------------------------------------------------------------
# Transitions


@dataclass(frozen=True)
class Transitions:
    """What steps open with: words, regardless of case, or tokens (`unit`). `opening in transitions` tests for one.

    `entropies` are those of all openings, highest first, if the choice was made by them. A subclass that overrides
    `sentence_openings` gives names of its own to what sentences open with: a number, a blank line before them.
    """

    openings: Sequence[str] = DEFAULT_TRANSITIONS
    unit: OpeningUnit = "word"
    entropies: Sequence[OpeningEntropy] = ()

    def sentence_openings(
        self, text: str, starts: Sequence[int], offsets: Sequence[tuple[int, int]]
    ) -> list[str | None]:
        """What each sentence of `text` opens with; `offsets` are the character spans of the text's tokens."""
        return sentence_openings(text, starts, self.unit, offsets)

    def key(self, opening: str) -> str:
        """The opening in the spelling that sentence_openings gives it."""
        return opening.casefold() if self.unit == "word" else opening

    @cached_property
    def _keys(self) -> frozenset[str]:
        return frozenset(map(self.key, self.openings))

    def __contains__(self, opening: str | None) -> bool:
        return opening is not None and opening in self._keys


@dataclass(frozen=True)
class TransitionOptions:
    """What steps open with.

    Args:
        transitions: file of transition words, one per line or JSON; default: the built-in list.
        opening_unit: what opens a sentence, its first "word" or its first "token".
    """

    transitions: str | Path | None = None
    opening_unit: OpeningUnit = "word"


@dataclass(frozen=True, kw_only=True)
class EntropyOptions(TransitionOptions):
    """What steps open with, where a language model may decide.

    Args:
        transitions: file of transition words, one per line or JSON; then no entropies are computed.
        opening_unit: what opens a sentence, its first "word" or its first "token" of the model.
        entropy_rows: rows to measure entropies on, drawn at random.
        top_transitions: how many openings with the highest mean entropy are transitions.
        entropy_threshold_bits: take all openings with at least this mean entropy instead.
        min_opening_count: openings seen less often are not transitions.
    """

    entropy_rows: int = 500
    top_transitions: int = 16
    entropy_threshold_bits: float | None = None
    min_opening_count: int = 20


@dataclass(frozen=True)
class Corpus:
    """What transitions may be learned from: `traces.Trace` rows and, if there is one, the `language.LanguageModel` that
    reads them.
    """

    traces: Sequence[Any]
    language: Any = None
    seed: int = 0

    def sample(self, rows: int) -> list[Any]:
        """At most `rows` traces, drawn at random and left in order."""
        chosen = np.random.default_rng(self.seed).permutation(len(self.traces))[:rows]
        return [self.traces[i] for i in np.sort(chosen)]


def transitions_from_file(options: TransitionOptions, corpus: Corpus | None) -> Transitions | None:
    if options.transitions is None:
        return None
    return Transitions(load_transitions(options.transitions), options.opening_unit)


def load_transitions(path: str | Path) -> list[str]:
    """Transition words from a file: JSON, or one word per line.

    JSON is a list of words or of objects with an "opening", or an object with such a list under "transitions", as in
    the `patterns.json` of a prepared training set. In the plain form, empty lines and lines that start with `#` are
    skipped. Raises ValueError for an empty list.
    """
    text = Path(path).read_text(encoding="utf-8")
    if text.lstrip().startswith(("[", "{")):
        try:
            content = json.loads(text)
            entries = content["transitions"] if isinstance(content, dict) else content
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(
                f'{path}: expected a JSON list of transitions, or one in "transitions" ({error})'
            ) from error
        words = [entry["opening"] if isinstance(entry, Mapping) else str(entry) for entry in entries]
    else:
        lines = (line.strip() for line in text.splitlines())
        words = [line for line in lines if line and not line.startswith("#")]
    if not words:
        raise ValueError(f"{path} names no transition; expected one word per line, or a JSON list of words")
    return words


def transitions_by_entropy(options: TransitionOptions, corpus: Corpus | None) -> Transitions | None:
    if not isinstance(options, EntropyOptions) or corpus is None or corpus.language is None:
        return None
    table = corpus.language.opening_entropies(corpus.sample(options.entropy_rows), options.opening_unit)
    by_rank = options.entropy_threshold_bits is None
    chosen = select_transitions(
        table,
        top=options.top_transitions if by_rank else None,
        threshold_bits=options.entropy_threshold_bits,
        min_count=options.min_opening_count,
    )
    return Transitions([row.opening for row in chosen], options.opening_unit, table)


def select_transitions(
    table: Iterable[OpeningEntropy], *, top: int | None = None, threshold_bits: float | None = None, min_count: int = 20
) -> list[OpeningEntropy]:
    """Of the openings seen at least `min_count` times, the `top` with the highest mean entropy, or those with at least
    `threshold_bits`; exactly one of the two is given. Raises ValueError if none is left.
    """
    if (top is None) == (threshold_bits is None):
        raise ValueError(f"expected either top or threshold_bits, got top={top} and threshold_bits={threshold_bits}")
    table = sorted(table, key=lambda row: (-row.entropy_bits, row.opening))
    often = [row for row in table if row.count >= min_count]
    chosen = often[:top] if top is not None else [row for row in often if row.entropy_bits >= threshold_bits]
    if not chosen:
        best = f"the highest mean is {often[0].entropy_bits:.3f} bits" if often else "none is that frequent"
        raise ValueError(
            f"no transition left of {len(table)} sentence openings ({len(often)} seen {min_count} times or more; {best}"
            "): read more rows, or lower the minimum count or the threshold"
        )
    return chosen


def built_in_transitions(options: TransitionOptions, corpus: Corpus | None) -> Transitions | None:
    return Transitions(DEFAULT_TRANSITIONS, options.opening_unit)


# The first that applies is taken.
STRATEGIES: tuple[Callable[[TransitionOptions, Corpus | None], Transitions | None], ...] = (
    transitions_from_file,
    transitions_by_entropy,
    built_in_transitions,
)


def choose_transitions(options: TransitionOptions = TransitionOptions(), corpus: Corpus | None = None) -> Transitions:
    """What steps open with, by the first strategy that applies. Without a corpus, nothing can be measured.

    To add a strategy:

    1. Write a function like those above. It returns None if the options do not ask for it or the corpus lacks what it
       needs. If steps open with something that is no word or token, it returns a subclass of Transitions.
    2. Add it to `STRATEGIES`, before those that it takes precedence over.
    3. Add its options, each with a line under `Args:`. Those of TransitionOptions are options of `prepare`, `flow` and
       `dynamics`; those of a subclass, only of commands that read a whole corpus first: EntropyOptions, of `prepare`.

    These commands all choose their transitions here and need no change.
    """
    return next(found for strategy in STRATEGIES if (found := strategy(options, corpus)) is not None)


# ----------------------------------------------------------------------------------------------------------------------
# Steps


@dataclass(frozen=True)
class StepOptions:
    """How short and how long a step may be, in tokens without markers.

    Args:
        min_step_tokens: a shorter step joins the one before it.
        max_step_tokens: a longer step is halved at a sentence.
    """

    min_step_tokens: int = 32
    max_step_tokens: int = 512

    def __post_init__(self):
        if not 1 <= 2 * self.min_step_tokens <= self.max_step_tokens:
            raise ValueError(
                f"max_step_tokens: expected at least twice min_step_tokens ({self.min_step_tokens}), so that a long "
                f"step can be halved, got {self.max_step_tokens}"
            )


@dataclass(frozen=True)
class StepStart:
    """Where a step starts, as a token and a character of the text, and what it opens with."""

    token: int
    char: int
    opening: str | None


def find_steps(
    sentences: Sequence[int],
    openings: Sequence[str | None],
    spans: Sequence[tuple[int, int]],
    end: int,
    transitions: Transitions,
    options: StepOptions,
) -> list[StepStart]:
    """The steps of a text whose sentences start at the characters `sentences` and open with `openings`.

    `spans` are the character spans of the text's tokens. The last step ends before token `end`; if no sentence starts
    before `end`, there are no steps. If several sentences start within one token, the first counts, or the last that
    opens with a transition.
    """
    ends = [stop for _, stop in spans]
    starts: dict[int, StepStart] = {}
    for char, opening in zip(sentences, openings, strict=True):
        token = bisect_right(ends, char)
        if token < end and (token not in starts or opening in transitions):
            starts[token] = StepStart(token, char, opening)
    if not starts:
        return []
    opens = [start.opening in transitions for start in starts.values()]
    steps = split_steps(list(starts), opens, end, shortest=options.min_step_tokens, longest=options.max_step_tokens)
    return [starts[token] for token in steps]


def split_steps(sentences: Sequence[int], opens: Sequence[bool], end: int, *, shortest: int, longest: int) -> list[int]:
    """Token positions at which the steps of one chain of thought start.

    `sentences` are the token positions at which its sentences start, strictly increasing from the start of the
    thinking. `opens[i]` says whether sentence i opens with a transition, `end` is the position after the last token.

    A piece of fewer than `shortest` tokens joins the step before it; a short first piece absorbs what follows. A step
    of more than `longest` tokens is halved at the sentence start nearest to its middle, recursively, so that its parts
    are of similar length. It stays long if no sentence start leaves `shortest` tokens on both sides.
    """
    openers = [sentences[0]] + [s for s, opener in zip(sentences[1:], opens[1:], strict=True) if opener]
    steps = [openers[0]]
    for begin, stop in pairwise([*openers, end]):
        if stop - begin >= shortest and begin - steps[-1] >= shortest:
            steps.append(begin)

    def halve(begin: int, stop: int) -> list[int]:
        inner = sentences[bisect_left(sentences, begin + shortest) : bisect_right(sentences, stop - shortest)]
        if stop - begin <= longest or not inner:
            return [begin]
        middle = min(inner, key=lambda s: abs(2 * s - begin - stop))
        return halve(begin, middle) + halve(middle, stop)

    return [start for begin, stop in pairwise([*steps, end]) for start in halve(begin, stop)]
