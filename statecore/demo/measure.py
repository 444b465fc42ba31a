"""What the demo measures: exact answers, bytes, and time per token of the teacher and of the student's variants."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from ..cache import cache_bytes
from ..decoding import StepGrammar
from ..modeling import StateCoreForCausalLM
from . import task

LONGEST_STEP = task.STEP_TOKENS + 3  # both markers, and the word that ends the last step; longer ones are closed
SLACK = 8  # tokens by which a solution may exceed the right one before it is cut off
TEACHER, STUDENT, NO_MOMENTUM, NO_STATE = (
    "teacher, full attention",
    "state-transition model",
    "the same without momentum",
    "the same without the state",
)


@contextmanager
def variant(student: StateCoreForCausalLM, name: str) -> Iterator[StateCoreForCausalLM]:
    """The student with what `name` says switched off."""
    student.set_momentum(name != NO_MOMENTUM)
    student.set_linear_attention(name != NO_STATE)
    try:
        yield student
    finally:
        student.set_momentum(True)
        student.set_linear_attention(True)


def compare(
    teacher: PreTrainedModel, student: StateCoreForCausalLM, lengths: tuple[int, ...], problems: int, seed: int
) -> list[dict[str, Any]]:
    """One row per model and number of steps; all models get the same held-out problems."""
    rows = []
    names = (TEACHER, STUDENT, NO_MOMENTUM, NO_STATE)
    with tqdm(total=len(lengths) * len(names), desc="decode", unit="run") as progress:
        for steps in lengths:
            held_out = task.draw(problems, steps, torch.Generator().manual_seed(seed + steps))
            for name in names:
                progress.set_postfix(steps=steps, model=name)
                if name == TEACHER:
                    decoded = decode(teacher, held_out)
                else:
                    with variant(student, name):
                        decoded = decode(student, held_out)
                rows.append({"model": name, "steps": steps, "problems": problems} | decoded.figures())
                progress.update()
    return rows


@dataclass(frozen=True)
class Decoded:
    """Greedy solutions of B problems. Bytes are those of one sequence at their peak."""

    tokens: Tensor  # int64 [B, generated]
    correct: Tensor  # bool [B]
    kv_bytes: int
    state_bytes: int
    ms_per_token: float  # per pass, which decodes one token for each of the B problems

    def figures(self) -> dict[str, Any]:
        return {
            "accuracy": self.correct.double().mean().item(),
            "kv_bytes": self.kv_bytes,
            "state_bytes": self.state_bytes,
            "ms_per_token": self.ms_per_token,
        }


class _Clock(LogitsProcessor):
    """Records when each decoding pass has its logits."""

    def __init__(self):
        self.ticks: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.ticks.append(time.perf_counter())
        return scores


class _InSteps(LogitsProcessor):
    """Opens a step after the prompt and after every step that does not say that it is the last.

    The trained model does so by itself. Without its state it prefers to write the whole chain before the first step or
    into one step, where softmax attention covers everything, as the teacher's does.
    """

    def __init__(self, model: StateCoreForCausalLM):
        self.starts = torch.tensor(model.config.step_start_token_ids)
        self.ends = torch.tensor(model.config.step_end_token_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        first = torch.full((len(input_ids),), input_ids.shape[1] == task.PROMPT_TOKENS)
        goes_on = torch.isin(input_ids[:, -1], self.ends) & (input_ids[:, -2] != task.TOKEN_ID[task.DONE])
        must_open = (first | goes_on)[:, None] & ~torch.isin(torch.arange(scores.shape[1]), self.starts)
        return scores.masked_fill(must_open, float("-inf"))


@torch.no_grad()
def decode(model: PreTrainedModel, problems: task.Problems) -> Decoded:
    """Solves problems with transformers' own generate(). A solution is correct if its answer is."""
    clock = _Clock()
    processors: list[LogitsProcessor] = [clock]
    per_step = task.STEP_TOKENS
    if isinstance(model, StateCoreForCausalLM):
        per_step += LONGEST_STEP - task.STEP_TOKENS
        processors += [StepGrammar(model, LONGEST_STEP, allow_repeats=True), _InSteps(model)]
    out = model.generate(
        problems.prompts,
        attention_mask=torch.ones_like(problems.prompts),
        max_new_tokens=per_step * problems.steps + 1 + task.ANSWER_TOKENS + SLACK,
        do_sample=False,
        eos_token_id=task.TOKEN_ID[task.EOS],
        pad_token_id=task.TOKEN_ID[task.PAD],
        logits_processor=processors,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[:, task.PROMPT_TOKENS :]
    pairs = zip(tokens.tolist(), problems.answers.tolist(), strict=True)
    correct = torch.tensor([_answer(row) == wanted for row, wanted in pairs])
    passes = [1e3 * (after - before) for before, after in pairwise(clock.ticks)]
    kv_bytes, state_bytes = _peak_bytes(out.past_key_values)
    count = len(tokens)
    return Decoded(tokens, correct, kv_bytes // count, state_bytes // count, statistics.median(passes))


def _answer(tokens: list[int]) -> list[int] | None:
    """The last tokens up to the end of sequence; None if it never ended."""
    end = task.TOKEN_ID[task.EOS]
    if end not in tokens:
        return None
    stop = tokens.index(end) + 1
    return tokens[max(0, stop - task.ANSWER_TOKENS) : stop]


def _peak_bytes(cache: DynamicCache) -> tuple[int, int]:
    """Peak bytes of keys and values, and bytes of states."""
    if hasattr(cache.layers[0], "states"):
        held = cache_bytes(cache)
        return held.peak_kv, held.state
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers), 0


@torch.no_grad()
def cost_curves(
    teacher: PreTrainedModel, student: StateCoreForCausalLM, lengths: tuple[int, ...], batch: int
) -> list[dict[str, Any]]:
    """Bytes and milliseconds of decoding one more token after `length` tokens.

    The tokens before it are the steps of a random problem over and over, far longer than anything the models were
    trained on: only the cost matters here.
    """
    rows = []
    for name, model in tqdm([(TEACHER, teacher), (STUDENT, student)], desc="cost", unit="model"):
        for length in lengths:
            tokens = _long_chain(model, length + DECODED, batch)
            cache = DynamicCache(config=model.config)
            model(tokens[:, :length], past_key_values=cache, logits_to_keep=1)
            times, most = [], 0
            for position in range(length, length + DECODED):
                began = time.perf_counter()
                model(tokens[:, position : position + 1], past_key_values=cache)
                times.append(1e3 * (time.perf_counter() - began))
                most = max(most, _bytes_now(cache))
            figures = {"bytes": most // batch, "ms_per_token": statistics.median(times)}
            rows.append({"model": name, "length": length, "batch": batch} | figures)
    return rows


DECODED = 2 * (task.STEP_TOKENS + 2)  # tokens timed at each length: two whole steps


def _long_chain(model: PreTrainedModel, length: int, batch: int) -> Tensor:
    problems = task.draw(batch, task.LONGEST, torch.Generator().manual_seed(0))
    tokens = problems.input_ids
    if isinstance(model, StateCoreForCausalLM):
        tokens = task.with_step_tokens(problems, model.config.step_start_token_ids, model.config.step_end_token_ids)
    last_step = task.STEP_TOKENS + 3  # left out, because it is longer than the others
    chain = tokens[:, task.PROMPT_TOKENS : -task.ANSWER_TOKENS - last_step]
    return torch.cat([problems.prompts, chain.repeat(1, -(-length // chain.shape[1]))], 1)[:, :length]


def _bytes_now(cache: DynamicCache) -> int:
    if hasattr(cache.layers[0], "states"):
        held = cache_bytes(cache)
        return held.kv + held.state
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def state_trajectories(student: StateCoreForCausalLM, problems: task.Problems) -> tuple[Tensor, list[float]]:
    """States at step ends in the plane of each layer's two principal components: [layers, B, steps + 1, 2], the state
    after the prompt first, and the share of the variance that lies in each plane.

    The states of all heads of a layer count as one vector; components are over all problems and steps.
    """
    config = student.config
    tokens = task.with_step_tokens(problems, config.step_start_token_ids, config.step_end_token_ids)
    cache = DynamicCache(config=config)
    lengths = np.bincount(task.step_ids(problems.steps)).tolist()
    per_layer: list[list[Tensor]] = [[] for _ in cache.layers]
    for part in tokens.split(lengths, dim=1):
        student(part, past_key_values=cache, logits_to_keep=1)
        for states, layer in zip(per_layer, cache.layers, strict=True):
            states.append(layer.states[1].flatten(1))  # the state at the start of this part
    places, shares = [], []
    for states in per_layer:
        stacked = torch.stack(states[1:], 1)
        plane = PCA(2).fit(stacked.flatten(0, 1).numpy())
        places.append(torch.from_numpy(plane.transform(stacked.flatten(0, 1).numpy())).view(*stacked.shape[:2], 2))
        shares.append(float(plane.explained_variance_ratio_.sum()))
    return torch.stack(places), shares
