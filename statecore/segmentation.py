"""Long chains of thought into steps: sentences, transition words, step boundaries.

A step starts at a sentence that opens with a transition: a word such as "Wait" or "Alternatively" at which a language
model is least sure of what comes next (State-Transition Framework, arXiv 2602.01198, section on data construction).
The transitions are found with the next-token entropy of a causal language model (`opening_entropies`,
`select_transitions`), read from a file (`load_transitions`), or taken from `DEFAULT_TRANSITIONS`.
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
from tqdm.auto import tqdm

# Used when neither a model nor a file is given. These are the words that open sentences of R1-style traces with a mean
# entropy above 0.99 bits over 20 or more sentences in the public sentence entropies of interp-reasoning/thought-anchors
# (1,746 sentences that open with a word, mean 0.91), less the pronouns "this", "it" and "they", which point back into
# the step that they would end.
DEFAULT_TRANSITIONS = ("maybe", "hmm", "but", "or", "wait", "another", "alright", "alternatively")

OpeningUnit = Literal["word", "token"]

# ----------------------------------------------------------------------------------------------------------------------
# Sentences

# Formulas and code are taken whole, so that nothing inside them ends a sentence. `$...$` follows pandoc's rule (no
# space inside the dollars, no digit behind the closing one), which leaves prices alone. The length limits keep an
# unclosed opener from swallowing a trace.
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
    """Character offsets at which the sentences of `text` start, in order; each is the offset of a visible character.

    A sentence ends at `.`, `!`, `?` or an ellipsis before a space, at a CJK full stop, and at a newline. It does not
    end inside `$...$`, `$$...$$`, `\\(...\\)`, `\\[...\\]`, LaTeX environments and code, in a number such as 3.14,
    after an abbreviation or the number of a list item, nor at a full stop before a lower-case letter. Empty for blank
    text.
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
    """First word of the sentence that starts at `start`, in lower case, past quotes and Markdown marks.

    None where the sentence opens with something else, such as a number or a formula.
    """
    match = _WORD.match(text, _DECORATION.match(text, start).end())
    return match[0].casefold() if match else None


def sentence_openings(
    text: str, starts: Sequence[int], unit: OpeningUnit, offsets: Sequence[tuple[int, int]] | None = None
) -> list[str | None]:
    """What each sentence opens with: its first word (`unit="word"`) or its first token, stripped (`unit="token"`).

    `offsets` are the character spans of the text's tokens; only `unit="token"` needs them.
    """
    if unit == "word":
        return [first_word(text, start) for start in starts]
    ends = [end for _, end in offsets]
    return [text[slice(*offsets[bisect_right(ends, start)])].strip() for start in starts]


# ----------------------------------------------------------------------------------------------------------------------
# Transitions


@dataclass(frozen=True)
class OpeningEntropy:
    """How unsure the model is where a sentence opens like this."""

    opening: str
    count: int
    entropy_bits: float


def encode(tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Token ids and character spans of each text.

    The beginning-of-sequence token is added where the tokenizer has one and the text does not carry it yet (chat
    templates do). Raises ValueError for a tokenizer without character offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer ({type(tokenizer).__name__}) gives no character offsets, so step boundaries cannot be "
            "placed on tokens; expected a fast tokenizer (a tokenizer.json in its folder)"
        )
    bos = tokenizer.bos_token
    carried = [bool(bos) and text.startswith(bos) for text in texts]
    ids: list[list[int]] = [[] for _ in texts]
    offsets: list[list[tuple[int, int]]] = [[] for _ in texts]
    for has_bos in (False, True):
        chosen = [i for i, carries in enumerate(carried) if carries == has_bos]
        if chosen:
            encoded = tokenizer(
                [texts[i] for i in chosen], add_special_tokens=not has_bos, return_offsets_mapping=True, verbose=False
            )
            for i, row, spans in zip(chosen, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                if spans and spans[-1] == (0, 0):  # an end-of-sequence token: keep the spans in order
                    spans[-1] = (len(texts[i]), len(texts[i]))
                ids[i], offsets[i] = row, spans
    return ids, offsets


def token_windows(length: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Windows `(begin, end, first)` of at most `size` tokens over a text of `length` tokens.

    Every token lies in `first..end` of exactly one window; windows after the first repeat the `size // 2` tokens before
    `first` as context, so a text longer than the model's context is still read with at least half of it.
    """
    begin, first = 0, 0
    while first < length:
        end = min(begin + size, length)
        yield begin, end, first
        begin, first = end - size // 2, end


def context_size(model: torch.nn.Module, window: int | None) -> int:
    """Tokens a window may hold: `window`, or 4096, and never more than the model was made for."""
    limit = getattr(model.config, "max_position_embeddings", None) or 4096
    return min(window or 4096, limit)


def window_batches(
    ids: Sequence[Sequence[int]], size: int, batch_size: int, device: torch.device, progress: str | None
) -> Iterator[tuple[list[tuple[int, int, int, int]], torch.Tensor, torch.Tensor]]:
    """Windows of all texts in batches padded at the end: (text, begin, end, first) of each row, ids and mask [B, T]."""
    rows = [(i, *window) for i, row in enumerate(ids) for window in token_windows(len(row), size)]
    rows.sort(key=lambda row: row[1] - row[2])  # longest first: little padding, and memory trouble shows at once
    for at in tqdm(range(0, len(rows), batch_size), desc=progress, disable=progress is None, unit="batch"):
        batch = rows[at : at + batch_size]
        width = max(end - begin for _, begin, end, _ in batch)
        input_ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for b, (i, begin, end, _) in enumerate(batch):
            input_ids[b, : end - begin] = torch.tensor(ids[i][begin:end])
            mask[b, : end - begin] = 1
        yield batch, input_ids.to(device), mask.to(device)


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
    """Mean next-token entropy of `model` at sentence starts, for each opening; highest first.

    H = -sum p log2 p, in bits, of the distribution that predicts the first token of the sentence: the one that holds
    the character at `starts[i][j]` of `texts[i]`. The mean runs over the sentences that open with the same word or
    token (`unit`), so with a tokenizer of characters `unit="word"` still reports words, by the entropy over their first
    letter. `model` is any causal language model of transformers; texts longer than `window` (default: the model's
    context, at most 4096 tokens) are read in overlapping windows. Sentences that open with no word and the first token
    of a text, which nothing predicts, are left out.
    """
    model.eval()
    ids, offsets = encode(tokenizer, texts)
    opening_at: list[dict[int, str]] = []  # for each text: position that predicts a sentence's first token -> opening
    for text, text_starts, spans in zip(texts, starts, offsets, strict=True):
        ends = [end for _, end in spans]
        openings = sentence_openings(text, text_starts, unit, spans)
        positions = [bisect_right(ends, start) - 1 for start in text_starts]
        opening_at.append({p: opening for p, opening in zip(positions, openings, strict=True) if opening and p >= 0})
    size = context_size(model, window)
    found: dict[str, list[float]] = defaultdict(list)
    device = next(model.parameters()).device
    description = "entropy at sentence starts" if progress else None
    for batch, input_ids, mask in window_batches(ids, size, batch_size, device, description):
        wanted = [
            [(p - begin, opening) for p, opening in opening_at[i].items() if first <= p < end]
            for i, begin, end, first in batch
        ]
        kept = sorted({p for row in wanted for p, _ in row})
        if not kept:
            continue
        keep = torch.tensor(kept, device=device)
        logits = model(input_ids=input_ids, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits
        column = {p: j for j, p in enumerate(kept)}
        for b, row in enumerate(wanted):
            if row:
                log_p = logits[b, [column[p] for p, _ in row]].float().log_softmax(-1)
                entropies = -(log_p.exp() * log_p).sum(-1) / math.log(2)
                for (_, opening), entropy in zip(row, entropies.tolist(), strict=True):
                    found[opening].append(entropy)
    table = [OpeningEntropy(opening, len(values), float(np.mean(values))) for opening, values in found.items()]
    return sorted(table, key=lambda row: (-row.entropy_bits, row.opening))


def select_transitions(
    table: Iterable[OpeningEntropy], *, top: int | None = None, threshold_bits: float | None = None, min_count: int = 20
) -> list[OpeningEntropy]:
    """The openings seen at least `min_count` times whose mean entropy is the `top` highest or at least
    `threshold_bits`.

    Exactly one of `top` and `threshold_bits` is given. Raises ValueError where nothing is left.
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


def load_transitions(path: str | Path) -> list[str]:
    """Transition words from a file: JSON, or one word a line.

    JSON is a list of words or of objects with an "opening", or an object that holds such a list under "transitions":
    the `patterns.json` of a prepared training set is one. In the plain form empty lines and lines that start with `#`
    are passed over. Raises ValueError for an empty list.
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
        raise ValueError(f"{path} names no transition; expected one word a line, or a JSON list of words")
    return words


@dataclass(frozen=True)
class Transitions:
    """What steps open with: words, compared without regard to case, or tokens (`unit`).

    entropies: where the choice was made by them, those of all openings, highest first.
    """

    openings: Sequence[str] = DEFAULT_TRANSITIONS
    unit: OpeningUnit = "word"
    entropies: Sequence[OpeningEntropy] = ()

    def key(self, opening: str) -> str:
        """What two spellings of an opening have in common."""
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
        transitions: file of transition words, one a line or JSON; default: the built-in list.
        opening_unit: what opens a sentence, its first "word" or its first "token".
    """

    transitions: str | Path | None = None
    opening_unit: OpeningUnit = "word"


@dataclass(frozen=True)
class EntropyOptions(TransitionOptions):
    """What steps open with, where a language model may choose.

    Args:
        transitions: file of transition words, one a line or JSON; then no entropies are computed.
        opening_unit: what opens a sentence, its first "word" or its first "token" of the model.
        entropy_rows: rows to measure entropies on, drawn at random.
        top_transitions: how many openings with the highest mean entropy are transitions.
        entropy_threshold_bits: take all openings of at least this mean entropy instead.
        min_opening_count: openings seen less often are no transitions.
    """

    entropy_rows: int = 500
    top_transitions: int = 16
    entropy_threshold_bits: float | None = None
    min_opening_count: int = 20


@dataclass(frozen=True)
class Corpus:
    """What transitions may be learned from: rows of text (`traces.Trace`) and the language model that reads them
    (`language.LanguageModel`), where there is one.
    """

    traces: Sequence[Any]
    language: Any = None
    seed: int = 0

    def sample(self, rows: int) -> list[Any]:
        """Traces drawn at random, in their order."""
        chosen = np.random.default_rng(self.seed).permutation(len(self.traces))[:rows]
        return [self.traces[i] for i in np.sort(chosen)]


def transitions_of_file(options: TransitionOptions, corpus: Corpus | None) -> Transitions | None:
    if options.transitions is None:
        return None
    return Transitions(load_transitions(options.transitions), options.opening_unit)


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


def built_in_transitions(options: TransitionOptions, corpus: Corpus | None) -> Transitions | None:
    return Transitions(DEFAULT_TRANSITIONS, options.opening_unit)


# In the order in which they are asked.
STRATEGIES: tuple[Callable[[TransitionOptions, Corpus | None], Transitions | None], ...] = (
    transitions_of_file,
    transitions_by_entropy,
    built_in_transitions,
)


def choose_transitions(options: TransitionOptions = TransitionOptions(), corpus: Corpus | None = None) -> Transitions:
    """What steps open with, by the first strategy that the options ask for and the corpus has the means for.

    A new strategy is a function like those above, which returns None where it is not asked for, an entry in
    `STRATEGIES` before those that it takes precedence over, and its options: fields of TransitionOptions, which every
    command that finds steps then has, or of a subclass like EntropyOptions, for commands with a corpus. Nothing else
    needs to know of it.
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
    """Where a step starts, as a token and as a character of the text, and what it opens with."""

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
    """The steps of a text from the characters at which its sentences start and what they open with.

    `spans` are the character spans of the text's tokens. The last step ends before token `end`; there is no step where
    not even the first sentence starts before it. Of sentences that start in one token, one with a transition counts.
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

    `sentences` are the token positions at which its sentences start (strictly increasing, the first is where the
    thinking starts), `opens[i]` says whether sentence i opens with a transition, `end` is the position after the last
    token.
    A piece of fewer than `shortest` tokens joins the step before it (a short first piece takes in what follows). A step
    of more than `longest` tokens is halved at the sentence nearest to its middle, again and again, so its parts are of
    like length; it stays long where no sentence start leaves `shortest` tokens on both sides.
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
