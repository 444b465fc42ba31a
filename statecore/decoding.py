"""Step-wise decoding on the unmodified generate() of transformers: well-formed steps of bounded length, reported as
they end, and what they cost.

The model finds its steps and clears its cache by itself (steps.py, cache.py). The grammar added here closes every step
in time, which bounds the cache.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .cache import cache_bytes
from .config import StepConfig
from .modeling import StateCoreForCausalLM
from .steps import begins_step


@dataclass(frozen=True)
class DecodingOptions:
    """How steps are decoded.

    Args:
        max_new_tokens: decode at most this many tokens.
        max_step_tokens: close a step that reaches this length, markers included, which bounds the cache; 0 for no
            bound.
        allow_repeats: let a step have the thinking pattern of the step before it.
        momentum: correct the state at step ends.
        temperature: 0 for the most probable token, else sample.
        top_p: sample among the most probable tokens that make up this share.
        seed: of the sampling.
    """

    max_new_tokens: int = 2048
    max_step_tokens: int | None = 512
    allow_repeats: bool = False
    momentum: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError(
                f"max_new_tokens must be >= 1 and temperature >= 0, got {self.max_new_tokens} and {self.temperature}"
            )


@dataclass
class Step:
    """Consecutive tokens with one step id: a reasoning step or, if `pattern` is None, text between or after steps.

    number: the step id.
    pattern: its thinking pattern.
    alpha: strength of the momentum correction at its end (arXiv 2602.01198 sec. 4).
    tokens: token ids, both markers included.
    closed: its end token has been decoded.
    """

    number: int
    pattern: int | None
    alpha: float
    tokens: list[int] = field(default_factory=list)
    closed: bool = False


@dataclass
class Generation:
    """One decoded row and what it cost.

    prompt_tokens: length of the prompt.
    token_ids, text: everything decoded; the text is without markers.
    steps: the reasoning steps. answer: the text after the last of them.
    finished: the model ended by itself, before max_new_tokens.
    peak_kv_bytes, state_bytes, full_kv_bytes: the row's share of its batch's memory in bytes: the most that keys and
    values took, the states, and the keys and values that full attention would hold at the end.
    ms_per_token: mean wall time in milliseconds of a decoding pass (one token for every row of the batch) after the
    first token; None below two tokens.
    """

    prompt_tokens: int
    token_ids: list[int]
    steps: list[Step]
    finished: bool
    text: str
    answer: str
    peak_kv_bytes: int
    state_bytes: int
    full_kv_bytes: int
    ms_per_token: float | None

    def record(self) -> dict[str, Any]:
        """For one line of a results file: texts and figures, with token counts in place of all token ids."""
        row = asdict(self) | {"tokens": len(self.token_ids)}
        del row["token_ids"]
        return row | {"steps": [asdict(step) | {"tokens": len(step.tokens)} for step in self.steps]}


class StepGrammar(LogitsProcessor):
    """Keeps steps well formed. An open step admits no start token and no end token but its own; outside a step there is
    no end token at all.

    max_step_tokens: force the step's end token as its token of this number (>= 2, markers included); None: no bound.
    allow_repeats: False bars the pattern of the previous step from opening the next one (arXiv 2602.01198,
    thinking-pattern diversity; the exact rule is unpublished).

    It keeps no state between calls, so beam search may reorder rows.
    """

    def __init__(self, model: StateCoreForCausalLM, max_step_tokens: int | None = None, allow_repeats: bool = False):
        if max_step_tokens is not None and max_step_tokens < 2:
            raise ValueError(f"max_step_tokens must be >= 2 (a step has two markers), got {max_step_tokens}")
        self.step_rows = model.get_input_embeddings().step_rows
        self.token_ids = model.config.step_token_ids
        self.max_step_tokens = max_step_tokens
        self.allow_repeats = allow_repeats

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [B, T], scores [B, vocabulary] -> scores with -inf for the tokens that may not follow."""
        if not self.token_ids:
            return scores
        patterns = len(self.token_ids) // 2
        token_ids = torch.tensor(self.token_ids, device=scores.device)
        markers = self.step_rows(input_ids)
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = torch.where(markers >= 0, position, -1).amax(1)  # position of each row's newest marker
        marker = torch.where(last >= 0, markers.gather(1, last.clamp(min=0)[:, None])[:, 0], -1)[:, None]
        is_open = (marker >= 0) & (marker < patterns)
        pattern = torch.where(marker >= 0, marker % patterns, -1)
        same = pattern == torch.arange(patterns, device=scores.device)
        no_start = is_open | (same & (not self.allow_repeats))
        no_end = ~(is_open & same)
        banned = torch.cat([no_start, no_end], 1)
        scores = scores.index_copy(1, token_ids, scores[:, token_ids].masked_fill(banned, -torch.inf))
        if self.max_step_tokens is not None:
            is_full = is_open & (input_ids.shape[1] - last[:, None] >= self.max_step_tokens - 1)
            own_end = token_ids[patterns:][pattern.clamp(min=0)]
            forced = torch.full_like(scores, -torch.inf).scatter(1, own_end, 0.0)
            scores = torch.where(is_full, forced, scores)
        return scores


class StepTracker:
    """The steps of one row, token by token, by the same rule as the model's (statecore.steps). Tokens and markers of
    the prompt count towards step numbers, but are not held.
    """

    def __init__(self, config: StepConfig, prompt: Sequence[int], momentum: bool = True):
        self.patterns = len(config.step_start_token_ids)
        self.marker_of = {token: marker for marker, token in enumerate(config.step_token_ids)}
        self.alpha = config.alpha_table().tolist() if momentum else []
        self.follows_end = False
        self.all_steps = [Step(0, None, 0.0)]
        for token in prompt:
            self.feed(token)
        self.all_steps = [replace(self.all_steps[-1], tokens=[])]

    def feed(self, token: int) -> Step | None:
        """Takes the next token; returns the step that it closes."""
        marker = self.marker_of.get(token)
        is_start = marker is not None and marker < self.patterns
        if begins_step(is_start, self.follows_end):
            number = self.all_steps[-1].number + 1
            alpha = self.alpha[number] if 2 <= number < len(self.alpha) else 0.0
            self.all_steps.append(Step(number, marker if is_start else None, alpha))
        current = self.all_steps[-1]
        current.tokens.append(token)
        self.follows_end = marker is not None and not is_start
        if not self.follows_end:
            return None
        current.closed = True
        return current

    def steps(self) -> list[Step]:
        """Without the prompt's own step and the answer."""
        return [step for step in self.all_steps if step.number > 0 and step.tokens and step is not self.answer()]

    def answer(self) -> Step | None:
        last = self.all_steps[-1]
        return last if last.pattern is None and not last.closed else None


class StepWatcher(BaseStreamer):
    """A streamer for generate() that takes whole batches: tracks every row, reports steps as they end, keeps the time
    of every token.
    """

    def __init__(
        self, trackers: Sequence[StepTracker], stop_ids: set[int], on_step: Callable[[int, Step], None] | None = None
    ):
        self.trackers, self.stop_ids, self.on_step = trackers, stop_ids, on_step
        self.finished = [False] * len(trackers)
        self.times: list[float] = []
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:  # generate() hands over the prompt first
            self.prompt_seen = True
            return
        self.times.append(time.perf_counter())
        for row, token in enumerate(value.tolist()):
            if self.finished[row]:
                continue
            self.finished[row] = token in self.stop_ids
            step = self.trackers[row].feed(token)
            if step is not None and self.on_step is not None:
                self.on_step(row, step)

    def end(self) -> None:
        pass


# ----------------------------------------------------------------------------------------------------------------------
# Decoding a batch


@torch.no_grad()
def generate_steps(
    model: StateCoreForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    options: DecodingOptions | None = None,
    on_step: Callable[[int, Step], None] | None = None,
    **arguments: Any,
) -> list[Generation]:
    """Decodes one batch of prompts. Inside model.full_attention() it decodes with the base model, without a grammar.

    Args:
        model: a state-transition model.
        prompts: token ids, none empty.
        tokenizer: for the texts of the results, which stay empty without it, and for stop tokens if the model's
            generation config has none.
        options: how to decode.
        on_step: called as `on_step(row, step)` when a step ends.
        arguments: fields of DecodingOptions, which take precedence over `options`; others go to model.generate().

    Returns:
        One Generation for each prompt, in their order.

    Raises:
        ValueError: there is no prompt or an empty one, or an option is out of range.
    """
    if not prompts or any(not prompt for prompt in prompts):
        raise ValueError("prompts must hold at least one prompt, each of at least one token")
    given = {option.name: arguments.pop(option.name) for option in fields(DecodingOptions) if option.name in arguments}
    options = replace(options or DecodingOptions(), **given)
    momentum = options.momentum and model.mode.momentum
    stop_ids = _stop_ids(model, tokenizer)
    pad = model.generation_config.pad_token_id
    pad = pad if pad is not None else min(stop_ids, default=0)
    longest = max(map(len, prompts))
    rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    grammar = []
    if not model.mode.full_attention:
        grammar.append(StepGrammar(model, options.max_step_tokens or None, options.allow_repeats))
    watcher = StepWatcher([StepTracker(model.config, prompt, momentum) for prompt in prompts], stop_ids, on_step)
    cache = DynamicCache(config=model.config)
    is_sampled = options.temperature > 0
    sampling = {"temperature": options.temperature, "top_p": options.top_p} if is_sampled else {}
    devices = [model.device] if model.device.type == "cuda" else []
    with _momentum(model, momentum), torch.random.fork_rng(devices=devices):
        torch.manual_seed(options.seed)
        model.generate(
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            past_key_values=cache,
            max_new_tokens=options.max_new_tokens,
            logits_processor=grammar,
            streamer=watcher,
            eos_token_id=sorted(stop_ids) or None,
            pad_token_id=pad,
            do_sample=is_sampled,
            **sampling,
            **arguments,
        )
    return [_summary(row, prompts, watcher, cache, tokenizer) for row in range(len(prompts))]


def _summary(
    row: int,
    prompts: Sequence[Sequence[int]],
    watcher: StepWatcher,
    cache: DynamicCache,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Generation:
    tracker, batch, used = watcher.trackers[row], len(prompts), cache_bytes(cache)
    tokens = [token for step in tracker.all_steps for token in step.tokens]
    answer = tracker.answer().tokens if tracker.answer() else []
    times = watcher.times
    token_bytes = sum(2 * layer.keys[0, :, 0].nbytes if layer.keys.shape[2] else 0 for layer in cache.layers)
    return Generation(
        prompt_tokens=len(prompts[row]),
        token_ids=tokens,
        steps=tracker.steps(),
        finished=watcher.finished[row],
        text=_decode(tokenizer, tokens, tracker),
        answer=_decode(tokenizer, answer, tracker),
        peak_kv_bytes=used.peak_kv // batch,
        state_bytes=used.state // batch,
        full_kv_bytes=token_bytes * cache.get_seq_length(),
        ms_per_token=1000 * (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
    )


def _decode(tokenizer: PreTrainedTokenizerBase | None, tokens: Sequence[int], tracker: StepTracker) -> str:
    """Text without markers and other special tokens."""
    if tokenizer is None:
        return ""
    return tokenizer.decode([token for token in tokens if token not in tracker.marker_of], skip_special_tokens=True)


def _stop_ids(model: StateCoreForCausalLM, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """End tokens of the generation configuration, else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = getattr(tokenizer, "eos_token_id", None)
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


@contextmanager
def _momentum(model: StateCoreForCausalLM, on: bool) -> Iterator[None]:
    before = model.mode.momentum
    model.set_momentum(on)
    try:
        yield
    finally:
        model.set_momentum(before)
