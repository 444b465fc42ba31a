"""`statecore generate`: prompts from the command line, a file or stdin, steps as they end, results as lines of JSON."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .decoding import (
    DecodingOptions,
    Generation,
    Step,
    StepGrammar,
    StepTracker,
    StepWatcher,
    generate_steps,
)
from .loading import load_prompt_format, load_state_transition_model, load_tokenizer
from .modeling import StateCoreForCausalLM
from .segmentation import encode

__all__ = [
    "DecodingOptions",
    "Generation",
    "PromptSource",
    "Step",
    "StepGrammar",
    "StepTracker",
    "StepWatcher",
    "generate",
    "generate_steps",
]


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from: one is given, or a file of them.

    Args:
        prompt: one prompt; give this or `input`.
        input: a file, or - for stdin: lines of JSON objects, or a plain text that is one prompt.
        prompt_field: field of the JSON objects that holds the prompt.
        id_field: field of the JSON objects that holds the id; default ids are line numbers.
        raw: take prompts as they are, instead of building them as the training set's were.
    """

    prompt: str | None = None
    input: str | os.PathLike | None = None
    prompt_field: str = "prompt"
    id_field: str = "id"
    raw: bool = False

    def __post_init__(self):
        if (self.prompt is None) == (self.input is None):
            raise ValueError("give either a prompt or an input file (- for stdin)")

    def read(self) -> list[tuple[str, str]]:
        """(id, prompt) of every row."""
        if self.prompt is not None:
            return [("1", self.prompt)]
        text = sys.stdin.read() if str(self.input) == "-" else Path(self.input).read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):
            return self._read_lines(text)
        if not text.strip():
            raise ValueError(f"{self.input} is empty: expected a prompt or lines of JSON objects")
        return [("1", text)]

    def _read_lines(self, text: str) -> list[tuple[str, str]]:
        rows = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            place = f"{self.input}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: expected a JSON object ({error})") from error
            value = row.get(self.prompt_field) if isinstance(row, dict) else None
            if not isinstance(value, str) or not value:
                raise ValueError(f"{place}: expected a text in the field {self.prompt_field!r}, got {value!r}")
            name = str(row.get(self.id_field, number))
            if name in rows:
                raise ValueError(f"{self.input}: every row needs an id of its own, {name!r} comes several times")
            rows[name] = value
        return list(rows.items())


def generate(
    model: str | os.PathLike | StateCoreForCausalLM,
    *,
    source: PromptSource,
    output: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    options: DecodingOptions = DecodingOptions(),
    batch_size: int = 1,
    quiet: bool = False,
) -> list[Generation]:
    """Decode step by step with constant memory, from a prompt, a file or stdin.

    Args:
        model: an adapter folder, a state-transition checkpoint, or a model.
        source: where prompts come from.
        output: a .jsonl file for the results, one line each; rows whose id it already has are skipped, so an
            interrupted run resumes where it stopped. Without it results are printed.
        base: the base checkpoint under an adapter; default: the one the adapter names.
        tokenizer: folder or tokenizer; default: the folder `tokenizer` in the model's, or the model's own.
        options: how steps are decoded.
        batch_size: prompts decoded together.
        quiet: print nothing but errors and progress.

    Returns:
        The new results in the order of their prompts.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    rows = source.read()
    done = _finished_ids(Path(output)) if output is not None else set()
    rows = [row for row in rows if row[0] not in done]
    if not rows:
        return []
    folder = None if isinstance(model, StateCoreForCausalLM) else Path(model)
    if tokenizer is None and folder is None:
        raise ValueError("a model that is already loaded needs its tokenizer: pass `tokenizer`")
    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(folder if tokenizer is None else tokenizer)
    model = load_state_transition_model(model, base)
    token_ids = _encode(tokenizer, [text for _, text in rows], folder, source.raw)
    results = []
    with tqdm(total=len(rows), unit="prompt", disable=output is None) as progress:
        for begin in range(0, len(rows), batch_size):
            batch = rows[begin : begin + batch_size]
            show = output is None and not quiet
            printer = _StepPrinter(tokenizer, [name for name, _ in batch]) if show else None
            generations = generate_steps(
                model,
                token_ids[begin : begin + batch_size],
                tokenizer=tokenizer,
                options=replace(options, seed=options.seed + begin),
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
    """Prints steps as they end and results when complete, with the prompt's id if there are several prompts."""

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
        pace = "" if generation.ms_per_token is None else f", {generation.ms_per_token:.1f} ms per token"
        print(
            f"\n{name}[answer]\n{generation.answer.strip()}\n\n"
            f"{name}{len(generation.token_ids)} tokens in {len(generation.steps)} steps{pace}; "
            f"peak keys and values {_size(generation.peak_kv_bytes)} + states {_size(generation.state_bytes)}; "
            f"full attention would hold {_size(generation.full_kv_bytes)}"
            + ("" if generation.finished else "\nstopped at max_new_tokens before the model ended by itself"),
            flush=True,
        )


def _size(count: int) -> str:
    return f"{count / 1024:.1f} KiB" if count < 1024**2 else f"{count / 1024**2:.1f} MiB"


def _finished_ids(output: Path) -> set[str]:
    """Ids of the results in the output file. An incomplete last line, as a killed run leaves it, is cut off."""
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
    with open(output, "ab", buffering=0) as file:  # a single write: the line is in the file whole or not at all
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], folder: Path | None, raw: bool
) -> list[list[int]]:
    """Token ids of prompts; unless `raw`, built as `statecore prepare` built those of the training set."""
    if not raw:
        form = load_prompt_format(folder)
        if form.template is None and not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template and the model's folder no patterns.json: use `raw`")
        texts = [form.prompt_text(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    return encode(tokenizer, texts)[0]
