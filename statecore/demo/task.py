"""The demo's reasoning task: terms of a sequence, each computed from two earlier ones.

To find x_t, start from x_{t-p} and x_{t-q} and append ten numbers, each computed from the two before it: their sum
modulo 10 if x_{t-1} is even ("plus"), their difference if it is odd ("minus"). The tenth number is x_t.

The prompt gives the lags p and q, the number of the term to name at the end (one of the last four), the number of the
last term, and the first four terms. A solution computes one term per step: it names the term, recalls the two earlier
ones, writes down the ten numbers and the result. So every step needs results of earlier steps that are not in the
prompt, and a mistake anywhere in the chain spoils the answer:

    <bos> p1 q3 ?x12 ..x14 x7= 7 x8= 1 x9= 4 x10= 3             prompt
    -x11 x10= 3 x8= 1 2 9 3 6 7 9 8 1 7 4 x11= 4                step 1: minus, since x10 is odd
    +x12 x11= 4 x9= 4 8 2 0 2 2 4 6 0 6 6 x12= 6                step 2: plus, since x11 is even
    ...
    -x14 x13= 7 x11= 4 3 1 2 9 3 6 7 9 8 1 x14= 1 done          step 4, the last
    x12= 6 <eos>                                                answer

Terms are numbered modulo 24 from a random start, so long problems have no tokens that short ones lack. Steps with a
plus and steps with a minus are the two thinking patterns.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..patterns import add_pattern_tokens

NAMES = 24  # term numbers, cyclic
GIVEN = 4  # terms in the prompt, and the largest lag
VALUES = 10
WORKED = 10  # numbers written down for a term
STEP_TOKENS = 7 + WORKED  # the last step has one more
ANSWER_TOKENS = 3
PROMPT_TOKENS = 5 + 2 * GIVEN
LONGEST = NAMES - GIVEN  # steps, before term numbers repeat

PAD, BOS, EOS, DONE = "<pad>", "<bos>", "<eos>", "done"
PATTERNS = ("plus", "minus")  # thinking patterns 0 and 1


def vocabulary() -> list[str]:
    """All tokens in the order of their ids."""
    numbers = range(NAMES)
    return [
        *(PAD, BOS, EOS, DONE),
        *(str(value) for value in range(VALUES)),
        *(f"p{lag}" for lag in range(1, GIVEN + 1)),
        *(f"q{lag}" for lag in range(1, GIVEN + 1)),
        *(f"+x{n}" for n in numbers),
        *(f"-x{n}" for n in numbers),
        *(f"x{n}=" for n in numbers),
        *(f"?x{n}" for n in numbers),
        *(f"..x{n}" for n in numbers),
    ]


TOKEN_ID = {token: index for index, token in enumerate(vocabulary())}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of the task, separated by spaces."""
    words = Tokenizer(WordLevel(TOKEN_ID, unk_token=PAD))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, bos_token=BOS, eos_token=EOS, padding_side="left"
    )


def tokenizer_with_steps() -> tuple[PreTrainedTokenizerFast, list[int], list[int]]:
    """The tokenizer with the step tokens of both patterns, and the ids of the start and of the end tokens."""
    tokenizer = make_tokenizer()
    starts, ends = add_pattern_tokens(tokenizer, len(PATTERNS))
    return tokenizer, starts, ends


@dataclass(frozen=True)
class Problems:
    """B problems with the same number of steps and their solutions, as the teacher reads them (without step tokens).

    input_ids: int64 [B, PROMPT_TOKENS + STEP_TOKENS * steps + 1 + ANSWER_TOKENS]. patterns: int64 [B, steps].
    """

    input_ids: Tensor
    patterns: Tensor
    steps: int

    @property
    def prompts(self) -> Tensor:
        return self.input_ids[:, :PROMPT_TOKENS]

    @property
    def answers(self) -> Tensor:
        """The answers, int64 [B, ANSWER_TOKENS]; the last but one token of each is the value asked for."""
        return self.input_ids[:, -ANSWER_TOKENS:]


def draw(count: int, steps: int, generator: torch.Generator) -> Problems:
    """Random problems with their solutions."""
    if not 1 <= steps <= LONGEST:
        raise ValueError(f"steps must lie in 1 .. {LONGEST}, got {steps}")

    def random(low: int, high: int, *more: int) -> Tensor:
        return torch.randint(low, high, (count, *more), generator=generator)

    def family(first: str, number: Tensor) -> Tensor:
        return TOKEN_ID[first] + number

    row = torch.arange(count)
    number = (random(0, NAMES)[:, None] + torch.arange(GIVEN + steps)) % NAMES
    p = random(1, GIVEN + 1)
    q = (p - 1 + random(1, GIVEN)) % GIVEN + 1  # different from p
    term = torch.cat([random(0, VALUES, GIVEN), torch.zeros(count, steps, dtype=torch.long)], 1)
    asked = random(steps, GIVEN + steps)  # one of the last four

    columns = [torch.full((count,), TOKEN_ID[BOS]), family("p1", p - 1), family("q1", q - 1)]
    columns += [family("?x0", number[row, asked]), family("..x0", number[:, -1])]
    for t in range(GIVEN):
        columns += [family("x0=", number[:, t]), family("0", term[:, t])]
    patterns = []
    for t in range(GIVEN, GIVEN + steps):
        minus = term[:, t - 1] % 2 == 1
        patterns.append(minus.long())
        first, second = term[row, t - p], term[row, t - q]
        columns.append(torch.where(minus, family("-x0", number[:, t]), family("+x0", number[:, t])))
        columns += [family("x0=", (number[:, t] - p) % NAMES), family("0", first)]
        columns += [family("x0=", (number[:, t] - q) % NAMES), family("0", second)]
        for _ in range(WORKED):
            first, second = second, torch.where(minus, first - second, first + second) % VALUES
            columns.append(family("0", second))
        term[:, t] = second
        columns += [family("x0=", number[:, t]), family("0", second)]
    columns += [torch.full((count,), TOKEN_ID[DONE]), family("x0=", number[row, asked])]
    columns += [family("0", term[row, asked]), torch.full((count,), TOKEN_ID[EOS])]
    return Problems(torch.stack(columns, 1), torch.stack(patterns, 1), steps)


def with_step_tokens(problems: Problems, start_ids: Sequence[int], end_ids: Sequence[int]) -> Tensor:
    """The same problems with the step tokens of each step's pattern around it, int64 [B, tokens + 2 * steps]."""
    done = -ANSWER_TOKENS - 1
    body = problems.input_ids[:, PROMPT_TOKENS:done].unflatten(1, (problems.steps, STEP_TOKENS))
    starts, ends = (torch.tensor(ids)[problems.patterns][..., None] for ids in (start_ids, end_ids))
    steps = torch.cat([starts, body, ends], 2).flatten(1)
    return torch.cat(
        [problems.prompts, steps[:, :-1], problems.input_ids[:, [done]], steps[:, -1:], problems.answers], 1
    )


def step_ids(steps: int) -> np.ndarray:
    """int32 [tokens + 2 * steps]: 0 for the prompt, then the number of the step, steps + 1 for the answer."""
    lengths = [PROMPT_TOKENS, *[STEP_TOKENS + 2] * steps, ANSWER_TOKENS]
    lengths[-2] += 1
    return np.repeat(np.arange(steps + 2), lengths).astype(np.int32)


def training_rows(problems: Problems, start_ids: Sequence[int], end_ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows of a prepared training set (see statecore/data.py)."""
    ids = step_ids(problems.steps)
    marked = with_step_tokens(problems, start_ids, end_ids).numpy().astype(np.int32)
    for tokens, patterns in zip(marked, problems.patterns.numpy().astype(np.int32), strict=True):
        yield {
            "id": f"{problems.steps} steps",
            "input_ids": tokens,
            "step_ids": ids,
            "prompt_length": PROMPT_TOKENS,
            "patterns": patterns,
            "steps": problems.steps,
        }


def write_training_set(folder: Path, parts: Mapping[str, Iterable[dict[str, Any]]]) -> Path:
    """Writes rows by part (`train`, `eval`) as the training set that `statecore prepare` would make of them."""
    tokenizer, starts, ends = tokenizer_with_steps()
    described = [
        {"id": i, "name": name, "start_token": tokenizer.decode([start]), "end_token": tokenizer.decode([end])}
        | {"start_token_id": start, "end_token_id": end}
        for i, (name, start, end) in enumerate(zip(PATTERNS, starts, ends, strict=True))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        Dataset.from_list(list(rows)).to_parquet(folder / f"{part}.parquet")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "patterns.json").write_text(json.dumps({"patterns": described}, indent=2) + "\n")
    return folder
