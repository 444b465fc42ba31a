"""Step-wise decoding on the unmodified generate() of transformers: a grammar of steps, steps shown as they end, and
what it all cost.

The model itself finds its steps and clears its cache (statecore/steps.py, statecore/cache.py); what is added here
keeps the steps well formed and bounded, so that memory is bounded too.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, LogitsProcessor, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .cache import cache_bytes
from .config import StepConfig
from .loading import load_prompt_format, load_state_transition_model, load_tokenizer
from .modeling import StateCoreForCausalLM
from .segmentation import encode


@dataclass
class Step:
    """A stretch of tokens with one step id: a reasoning step, or, where `pattern` is None, text between or after steps.

    number: its step id. pattern: its thinking pattern. tokens: with both markers. alpha: strength of the correction at
    its end (arXiv 2602.01198 sec. 4). closed: its end token has come.
    """

    number: int
    pattern: int | None
    alpha: float
    tokens: list[int] = field(default_factory=list)
    closed: bool = False


@dataclass
class Generation:
    """One decoded row and what it cost.

    token_ids: everything decoded; text: the same without markers. answer: what follows the last step. finished: it
    ended by itself. Bytes are those of the row's share in its batch: peak of the step cache's keys and values, states,
    and the keys and values that full attention would hold at the end. ms_per_token: wall time of a decoding pass (one
    token for every row of the batch) after the first token; None below two tokens.
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
        """For a line of a file: texts and figures, tokens counted."""
        row = asdict(self) | {"tokens": len(self.token_ids)}
        del row["token_ids"]
        return row | {"steps": [asdict(step) | {"tokens": len(step.tokens)} for step in self.steps]}


class StepGrammar(LogitsProcessor):
    """Keeps steps well formed: while a step is open, neither another start nor a foreign end; outside, no end at all.

    max_step_tokens: a step has at most so many tokens, markers included; then its own end token is forced.
    allow_repeats: False bars the pattern of the previous step from opening the next (arXiv 2602.01198, thinking-pattern
    diversity; the exact rule is unpublished).
    Looks at the tokens only, so beams may be reordered under it.
    """

    def __init__(self, model: StateCoreForCausalLM, max_step_tokens: int | None = None, allow_repeats: bool = False):
        if max_step_tokens is not None and max_step_tokens < 2:
            raise ValueError(f"max_step_tokens must be >= 2 (a step has two markers), got {max_step_tokens}")
        self.step_rows = model.get_input_embeddings().step_rows
        self.token_ids = model.config.step_token_ids
        self.max_step_tokens = max_step_tokens
        self.allow_repeats = allow_repeats

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [B, T], scores [B, vocabulary] -> scores with -inf for what must not come."""
        if not self.token_ids:
            return scores
        patterns = len(self.token_ids) // 2
        token_ids = torch.tensor(self.token_ids, device=scores.device)
        rows = self.step_rows(input_ids)
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        marker = torch.where(rows >= 0, position, -1).amax(1)  # newest marker of each row of the batch
        row = torch.where(marker >= 0, rows.gather(1, marker.clamp(min=0)[:, None])[:, 0], -1)
        is_open, pattern = ((row >= 0) & (row < patterns))[:, None], torch.where(row >= 0, row % patterns, -1)[:, None]
        same = pattern == torch.arange(patterns, device=scores.device)
        no_start = is_open | (same & (not self.allow_repeats))
        no_end = ~(is_open & same)
        banned = torch.cat([no_start, no_end], 1)
        scores = scores.index_copy(1, token_ids, scores[:, token_ids].masked_fill(banned, -torch.inf))
        if self.max_step_tokens is not None:
            full = is_open[:, 0] & (input_ids.shape[1] - marker >= self.max_step_tokens - 1)
            own_end = token_ids[patterns:][pattern[:, 0].clamp(min=0)]
            forced = torch.full_like(scores, -torch.inf).scatter(1, own_end[:, None], 0.0)
            scores = torch.where(full[:, None], forced, scores)
        return scores


class StepTracker:
    """Follows one row token by token with the rule of statecore.steps; holds the steps after its
    prompt.
    """

    def __init__(self, config: StepConfig, prompt: Sequence[int], momentum: bool = True):
        self.patterns = len(config.step_start_token_ids)
        self.row_of = {token: row for row, token in enumerate(config.step_token_ids)}
        self.alpha = config.alpha_table().tolist() if momentum else []
        self.after_end = False
        self.segments = [Step(0, None, 0.0)]
        for token in prompt:
            self.feed(token)
        self.segments = [replace(self.segments[-1], tokens=[])]

    def feed(self, token: int) -> Step | None:
        """Takes the next token; returns the step that it closes."""
        row = self.row_of.get(token)
        is_start = row is not None and row < self.patterns
        if is_start or self.after_end:
            number = self.segments[-1].number + 1
            alpha = self.alpha[number] if 2 <= number < len(self.alpha) else 0.0
            self.segments.append(Step(number, row if is_start else None, alpha))
        current = self.segments[-1]
        current.tokens.append(token)
        self.after_end = row is not None and not is_start
        if not self.after_end:
            return None
        current.closed = True
        return current

    def steps(self) -> list[Step]:
        return [step for step in self.segments if step.number > 0 and step.tokens and step is not self.answer()]

    def answer(self) -> Step | None:
        last = self.segments[-1]
        return last if last.pattern is None and not last.closed else None


class StepWatcher(BaseStreamer):
    """A streamer for generate() that takes whole batches: follows every row, reports ended steps, keeps the time."""

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


@torch.no_grad()
def generate_steps(
    model: StateCoreForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 2048,
    max_step_tokens: int | None = 512,
    allow_repeats: bool = False,
    momentum: bool = True,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_step: Callable[[int, Step], None] | None = None,
    **generate_arguments: Any,
) -> list[Generation]:
    """Decodes one batch of prompts (token ids, none empty). `on_step(row, step)` is called as each step ends.

    Arguments as of `generate`; generate_arguments go to model.generate(). Without a tokenizer the texts stay empty.
    Inside model.full_attention() it decodes with the base model, without a grammar.
    """
    if not prompts or any(not prompt for prompt in prompts):
        raise ValueError("prompts must hold at least one prompt, each of at least one token")
    momentum = momentum and model.mode.momentum
    stop_ids = _stop_ids(model, tokenizer)
    pad = model.generation_config.pad_token_id
    pad = pad if pad is not None else min(stop_ids, default=0)
    longest = max(map(len, prompts))
    rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    grammar = [] if model.mode.full_attention else [StepGrammar(model, max_step_tokens, allow_repeats)]
    watcher = StepWatcher([StepTracker(model.config, prompt, momentum) for prompt in prompts], stop_ids, on_step)
    cache = DynamicCache(config=model.config)
    sampling = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    with _momentum(model, momentum), torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(seed)
        model.generate(
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            logits_processor=grammar,
            streamer=watcher,
            eos_token_id=sorted(stop_ids) or None,
            pad_token_id=pad,
            do_sample=temperature > 0,
            **sampling,
            **generate_arguments,
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
    tokens = [token for step in tracker.segments for token in step.tokens]
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
    return tokenizer.decode([token for token in tokens if token not in tracker.row_of], skip_special_tokens=True)


def generate(
    model: str | os.PathLike | StateCoreForCausalLM,
    *,
    prompt: str | None = None,
    input: str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    prompt_field: str = "prompt",
    id_field: str = "id",
    raw: bool = False,
    max_new_tokens: int = 2048,
    max_step_tokens: int | None = 512,
    allow_repeats: bool = False,
    momentum: bool = True,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 1,
    quiet: bool = False,
) -> list[Generation]:
    """Decode step by step with constant memory, from a prompt, a file or stdin.

    Args:
        model: an adapter folder, a state-transition checkpoint, or a model.
        prompt: one prompt; give this or `input`.
        input: a file, or - for stdin: lines of JSON objects, or a plain text that is one prompt.
        output: a .jsonl file for the results, one line each; rows whose id it already has are skipped, so a run that
            was interrupted goes on where it stopped. Without it results are printed.
        base: the base checkpoint under an adapter; default: the one the adapter names.
        tokenizer: folder or tokenizer; default: the folder `tokenizer` in the model's, or the model's own.
        prompt_field: field of the JSON objects that holds the prompt.
        id_field: field of the JSON objects that holds the id; default ids are line numbers.
        raw: take prompts as they are, instead of building them as the training set's were.
        max_new_tokens: decode at most so many tokens.
        max_step_tokens: a step that reaches this length is closed, which bounds the cache; 0 for no bound.
        allow_repeats: let a step have the thinking pattern of the step before it.
        momentum: correct the state at step ends.
        temperature: 0 for the most probable token, else sample.
        top_p: sample among the most probable tokens that make up this share.
        seed: of the sampling.
        batch_size: prompts decoded together.
        quiet: print nothing but errors and progress.

    Returns:
        The new results in the order of their prompts.
    """
    if (prompt is None) == (input is None):
        raise ValueError("give either a prompt or an input file (- for stdin)")
    if batch_size < 1 or max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            "batch_size and max_new_tokens must be >= 1 and temperature >= 0, "
            f"got {batch_size}, {max_new_tokens} and {temperature}"
        )
    rows = [("1", prompt)] if prompt is not None else _read_prompts(input, prompt_field, id_field)
    done = _finished_ids(Path(output)) if output is not None else set()
    rows = [row for row in rows if row[0] not in done]
    if not rows:
        return []
    folder = None if isinstance(model, StateCoreForCausalLM) else Path(model)
    if tokenizer is None and folder is None:
        raise ValueError("a model that is already loaded needs its tokenizer: pass `tokenizer`")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = load_tokenizer(folder if tokenizer is None else tokenizer)
    model = load_state_transition_model(model, base)
    token_ids = _encode(tokenizer, [text for _, text in rows], folder, raw)
    show = output is None and not quiet
    results = []
    with tqdm(total=len(rows), unit="prompt", disable=output is None) as progress:
        for begin in range(0, len(rows), batch_size):
            batch = rows[begin : begin + batch_size]
            printer = _StepPrinter(tokenizer, [name for name, _ in batch]) if show else None
            generations = generate_steps(
                model,
                token_ids[begin : begin + batch_size],
                tokenizer=tokenizer,
                max_new_tokens=max_new_tokens,
                max_step_tokens=max_step_tokens or None,
                allow_repeats=allow_repeats,
                momentum=momentum,
                temperature=temperature,
                top_p=top_p,
                seed=seed + begin,
                on_step=printer,
            )
            for (name, text), generation in zip(batch, generations, strict=True):
                if output is not None:
                    _append_line(Path(output), {"id": name, "prompt": text, **generation.record()})
                elif printer is not None:
                    printer.result(name, generation)
            results += generations
            progress.update(len(batch))
    return results


class _StepPrinter:
    """Prints steps as they end and results when they are complete; names the prompt where there are several."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]):
        self.tokenizer, self.names = tokenizer, names

    def __call__(self, row: int, step: Step) -> None:
        self._show(self.names[row], step)

    def _show(self, name: str, step: Step) -> None:
        name = f"{name} " if len(self.names) > 1 else ""
        ending = f"alpha {step.alpha:.3f}" if step.closed else "unfinished"
        print(
            f"\n{name}[step {step.number}  pattern {step.pattern}  {len(step.tokens)} tokens  {ending}]\n"
            + self.tokenizer.decode(step.tokens[1 : -1 if step.closed else None], skip_special_tokens=True).strip(),
            flush=True,
        )

    def result(self, name: str, generation: Generation) -> None:
        if generation.steps and not generation.steps[-1].closed:
            self._show(name, generation.steps[-1])
        name = f"{name} " if len(self.names) > 1 else ""
        pace = "" if generation.ms_per_token is None else f", {generation.ms_per_token:.1f} ms a token"
        state = _size(generation.peak_kv_bytes), _size(generation.state_bytes), _size(generation.full_kv_bytes)
        print(
            f"\n{name}[answer]\n{generation.answer.strip()}\n\n"
            f"{name}{len(generation.token_ids)} tokens in {len(generation.steps)} steps{pace}; "
            "peak keys and values {} + states {}; full attention would hold {}".format(*state)
            + ("" if generation.finished else "\nstopped at max_new_tokens before the model ended by itself"),
            flush=True,
        )


def _size(count: int) -> str:
    return f"{count / 1024:.1f} KiB" if count < 1024**2 else f"{count / 1024**2:.1f} MiB"


def _read_prompts(source: str | os.PathLike, prompt_field: str, id_field: str) -> list[tuple[str, str]]:
    """(id, prompt) of every row."""
    text = sys.stdin.read() if str(source) == "-" else Path(source).read_text(encoding="utf-8")
    if not text.lstrip().startswith("{"):
        if not text.strip():
            raise ValueError(f"{source} is empty: expected a prompt or lines of JSON objects")
        return [("1", text)]
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}, line {number}: expected a JSON object ({error})") from error
        value = row.get(prompt_field) if isinstance(row, dict) else None
        if not isinstance(value, str) or not value:
            raise ValueError(f"{source}, line {number}: expected a text in the field {prompt_field!r}, got {value!r}")
        rows.append((str(row.get(id_field, number)), value))
    names = [name for name, _ in rows]
    if len(set(names)) != len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{source}: every row needs an id of its own, {repeated!r} comes several times")
    return rows


def _finished_ids(output: Path) -> set[str]:
    """Ids that the output file already holds. A last line that broke off is cut away."""
    if not output.exists():
        return set()
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(output, len(whole))
    try:
        return {json.loads(line)["id"] for line in whole.splitlines() if line.strip()}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{output} must hold results of this command, one a line ({error!r}): name another file"
        ) from error


def _append_line(output: Path, row: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "ab", buffering=0) as file:  # one write: a line is there whole or not at all
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], folder: Path | None, raw: bool
) -> list[list[int]]:
    """Token ids of prompts, put together as `statecore prepare` put them (patterns.json beside the model says how)."""
    if not raw:
        form = load_prompt_format(folder)
        if form.template is None and not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template and the model's folder no patterns.json: use `raw`")
        texts = [form.prompt_text(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    return encode(tokenizer, texts)[0]


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


def _cuda_devices(model: StateCoreForCausalLM) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []
