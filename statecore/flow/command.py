"""`statecore flow`: what each step of real traces tells about their answers.

Rows of any source become chains of tokens with step ends, statecore/flow.py measures them, statecore/flow_report.py
draws and sums up. Nothing of a trace stays in memory but its figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .. import segmentation
from ..adapter import is_adapter, load_adapter
from ..data import PATTERNS_FILE, Prepared, PromptFormat, load_prepared
from ..modeling import StateCoreForCausalLM
from ..outputs import new_file, new_folder, write_json
from ..traces import RowFields, RowProblem, StepRules, Tokenised, parse_trace, read_jsonl, read_lines, tokenise
from .gains import Method, StepGains, mark_steps, prompted_gains, step_gains
from .report import RESULT_FILE, Chain, Summary, draw_summary, draw_trace, report, steps_text

# ----------------------------------------------------------------------------------------------------------------------
# Traces


@dataclass(frozen=True)
class TextReader:
    """Rows of text into chains: the steps are those that `statecore prepare` would make with the same rules.

    A text is tokenised once, as a whole, so the tokens up to a step's end are those of the chain as it stands. White
    space behind a step is the step's, and what stands before the first visible character of the closing is the last
    step's: behind earlier steps the closing follows without it.
    """

    tokenizer: Any
    fields: RowFields
    form: PromptFormat
    rules: StepRules
    model: StateCoreForCausalLM | None = None  # puts step tokens around the steps
    correct_field: str = "correct"
    score_end: bool = True
    posterior_template: str | None = None
    labels: Mapping[str, Sequence[Sequence[Any]]] | None = None

    def __call__(self, row: Mapping[str, Any], source: str, line: int) -> Chain:
        """Raises RowProblem where the row cannot be used."""
        trace = parse_trace(row, self.fields, source, line)
        try:
            trace.head = self.form.prompt_text(self.tokenizer, trace.prompt)
            found = self._tokenise(trace)
            posterior = self._posterior_prompt(trace, found) if self.posterior_template else None
        except jinja2.TemplateError as error:
            raise RowProblem("no_prompt", f"the chat template refuses the messages: {error}") from error
        ids = found.ids.tolist()
        answer = self._check_borders(found)
        steps = [ids[begin:stop] for begin, stop in pairwise([*found.steps, found.answer])]
        kinds = {"opening": [opening or "(no word)" for opening in found.openings]}
        spans = found.step_spans()
        if self.labels is not None and trace.id in self.labels:
            kinds["category"] = [_category(self.labels[trace.id], *span) for span in spans]
        if self.model is None:
            tokens, step_ends = ids[: found.answer], [*found.steps, found.answer]
        else:
            tokens, step_ends, patterns = mark_steps(self.model, ids[: found.steps[0]], steps)
            kinds["pattern"] = [str(pattern) for pattern in patterns]
        correct = row.get(self.correct_field)
        stop = len(ids) if self.score_end else len(ids) - 1  # the last token is the end of sequence
        return Chain(
            trace.id, source, line, tokens, step_ends, ids[found.answer : answer], ids[answer:stop], trace.answer,
            [trace.thinking[begin:end].strip() for begin, end in spans], spans, kinds,
            correct if isinstance(correct, bool) else None, posterior,
        )  # fmt: skip

    def _tokenise(self, trace: Any) -> Tokenised:
        found = next(tokenise([trace], self.tokenizer, self.form.think_close, self.rules))
        if isinstance(found, RowProblem):
            raise found
        return found

    def _check_borders(self, found: Tokenised) -> int:
        """The token that the answer begins with. Raises RowProblem where a token has visible characters on both sides
        of a border between prompt, steps and answer.
        """
        trace = found.trace
        text = trace.text() + self.form.think_close + trace.answer
        offsets = segmentation.encode(self.tokenizer, [text])[1][0]
        ends = [end for _, end in offsets]
        before = len(trace.head)
        answer = int(np.searchsorted(ends, len(text) - len(trace.answer), side="right"))
        borders = [(token, before + char) for token, char in zip(found.steps, found.step_chars, strict=True)]
        borders.append((found.answer, len(trace.text())))
        borders.append((answer, len(text) - len(trace.answer)))
        for token, char in borders:
            begin, end = offsets[token]
            if text[begin:char].strip() and text[char:end].strip():
                raise RowProblem(
                    "merged_border",
                    f"the tokenizer joins {text[begin:char]!r} and {text[char:end]!r} into one token across the border "
                    "of a step: put white space around think_open and think_close, or use another tokenizer",
                )
        return answer

    def _posterior_prompt(self, trace: Any, found: Tokenised) -> list[int]:
        *earlier, last = trace.prompt
        content = self.posterior_template.replace("{prompt}", last["content"]).replace("{answer}", trace.answer)
        told = replace(trace, head=self.form.prompt_text(self.tokenizer, [*earlier, {**last, "content": content}]))
        other = self._tokenise(told)
        if not np.array_equal(other.ids[other.steps[0] :], found.ids[found.steps[0] :]):
            raise RowProblem("merged_border", "the thinking has other tokens behind the posterior prompt")
        return other.ids[: other.steps[0]].tolist()


@dataclass(frozen=True)
class PreparedReader:
    """Rows of a prepared training set into chains, with their thinking patterns; `marked` keeps the step tokens."""

    prepared: Prepared
    marked: bool
    score_end: bool = True

    def __call__(self, row: Mapping[str, Any], source: str, line: int) -> Chain:
        """Raises RowProblem where the row cannot be used."""
        known, tokenizer = self.prepared.patterns, self.prepared.tokenizer
        ids, numbers = np.asarray(row["input_ids"]), np.asarray(row["step_ids"])
        markers = np.isin(ids, [*self.prepared.step_start_token_ids, *self.prepared.step_end_token_ids])
        count = len(row["patterns"])
        if not count:
            raise RowProblem("no_steps", "the row has a prompt and an answer, and no step between them")
        ends = [int(np.searchsorted(numbers, i, side="right")) for i in range(count + 1)]
        texts = [tokenizer.decode(ids[b:e][~markers[b:e]]).strip() for b, e in pairwise(ends)]
        tail = ids[ends[-1] :].tolist()
        closed = self._closing(tail, known["prompt"]["think_close"] if "prompt" in known else "", tokenizer)
        answer = tail[closed:] if self.score_end else tail[closed:-1]
        if not answer:
            raise RowProblem("no_answer", "nothing follows the end of the thinking")
        chain_ids = ids[: ends[-1]]
        if not self.marked:
            ends = np.cumsum(~markers)[np.asarray(ends) - 1].tolist()
            chain_ids = chain_ids[~markers[: len(chain_ids)]]
        names = [pattern.get("name", pattern["start_token"]) for pattern in known["patterns"]]
        return Chain(
            str(row["id"]), source, line, chain_ids.tolist(), ends, tail[:closed], answer,
            tokenizer.decode(answer, skip_special_tokens=True).strip(), texts, None,
            {"pattern": [names[pattern] for pattern in row["patterns"]]},
        )  # fmt: skip

    @staticmethod
    def _closing(tail: list[int], think_close: str, tokenizer: Any) -> int:
        """How many tokens of the end close the thinking."""
        mark = think_close.strip()
        for count in range(len(tail) + 1):
            if tokenizer.decode(tail[:count]).strip().startswith(mark):
                return count
        raise RowProblem("no_answer", f"expected {mark!r} behind the last step, got {tokenizer.decode(tail)[:80]!r}")


def _category(spans: Sequence[Sequence[Any]], begin: int, end: int) -> str:
    """The label that covers most of a step."""
    covered: dict[str, int] = {}
    for first, last, name, *_ in spans:
        covered[name] = covered.get(name, 0) + max(0, min(last, end) - max(first, begin))
    best = max(covered, key=covered.get, default=None)
    return best if best is not None and covered[best] else "(no label)"


def read_source(source: str, split: str) -> Iterator[tuple[str, int, Any]]:
    """(file, line, row or RowProblem) of a .json, .jsonl, .jsonl.gz or .parquet file, of all those in a folder, or of a
    hub dataset.
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
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{source} must hold a JSON object or a list of them ({error})") from error
        for number, row in enumerate(content if isinstance(content, list) else [content], 1):
            wrong = RowProblem("broken_json", f"expected an object, got {type(row).__name__}")
            yield source, number, row if isinstance(row, dict) else wrong
    else:
        yield from ((source, line, row) for line, row in read_lines(source, split))


def read_labels(path: str | Path) -> dict[str, list[Any]]:
    """Sentence labels by id: lines of {"id", "spans": [[start, end, category], ...]}."""
    labels = {}
    for line, row in read_jsonl(Path(path)):
        if isinstance(row, RowProblem) or not {"id", "spans"} <= row.keys():
            raise ValueError(f'{path}, line {line}: expected an object with "id" and "spans", got {row}')
        labels[row["id"]] = row["spans"]
    return labels


# ----------------------------------------------------------------------------------------------------------------------
# The command


def flow(
    trace: str,
    *,
    model: str,
    base: str | None = None,
    tokenizer: str | None = None,
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "float32",
    method: Method = "difference",
    posterior_template: str | None = None,
    score_end: bool = True,
    out: Path | None = None,
    rewards: Path | None = None,
    pictures: int = 8,
    split: str = "train",
    row: int | None = None,
    limit: int | None = None,
    prompt_field: str = "problem",
    thinking_field: str = "thinking",
    answer_field: str = "answer",
    id_field: str = "id",
    completion_field: str | None = None,
    correct_field: str = "correct",
    think_tags: tuple[str, str] = ("<think>", "</think>"),
    prompt_template: str | None = None,
    think_open: str | None = None,
    think_close: str | None = None,
    transitions: str | None = None,
    opening_unit: segmentation.OpeningUnit = "word",
    min_step_tokens: int = 32,
    max_step_tokens: int = 512,
    max_tokens: int | None = None,
    labels: str | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Show how much each step of a chain of thought tells about its answer: gains in nats, pictures, rewards.

    The gain of a step is log p(answer | steps up to it) - log p(answer | steps before it), where the model is made to
    answer at once. Rows that cannot be used are left out, counted and named; texts are not kept in memory.

    Args:
        trace: a .json, .jsonl, .jsonl.gz or .parquet file, a folder of them, a prepared training set, or a hub dataset
            (`owner/name` or `owner/name:configuration`).
        model: a causal language model, a state-transition checkpoint, or an adapter folder.
        base: the base checkpoint under an adapter; default: the one the adapter names.
        tokenizer: folder or hub name; default: the folder `tokenizer` in the model's, or the model's own. A prepared
            set brings its own.
        dtype: what the model computes in; half precision blurs small gains.
        method: "difference" of answer log-likelihoods, forking at step ends, or "posterior" over prior by Bayes, in
            whole passes; they agree.
        posterior_template: with method "posterior", a text with {answer} (and {prompt}) in it that takes the prompt's
            place, for a posterior that the model itself is asked for. The paper's is unknown.
        score_end: the end of sequence belongs to the answer, so that 1 is not half of 12.
        out: a folder for pictures and report; without it they are not drawn.
        rewards: a .jsonl file of per-step rewards, one line a trace.
        pictures: how many traces, from the first on, get a picture.
        split: split of a hub dataset; "train" or "eval" of a prepared set.
        row: measure this row only (lines count from 1).
        limit: read no more rows than this.
        prompt_field, thinking_field, answer_field, id_field: where a row keeps its parts; the answer that is scored may
            be any field, such as that of a short reference answer.
        completion_field: a field with thinking and answer in one, a text or a list of chat messages.
        correct_field: a field that says, true or false, whether the trace's own answer was right.
        think_tags: what encloses the thinking in `completion_field`.
        prompt_template: a text with {prompt} in it; default: as in the model's patterns.json, else the chat template.
        think_open, think_close: what stands around the thinking; the closing is read and not scored, so
            an answer's introduction may stand in it. Default: as in the model's patterns.json, else as `prepare`.
        transitions: file of transition words, one a line or JSON; default: the built-in list.
        opening_unit: what opens a sentence, its first "word" or its first "token".
        min_step_tokens: a shorter step joins the one before it.
        max_step_tokens: a longer step is halved at a sentence.
        max_tokens: traces with more tokens are left out; default: what the model was made for.
        labels: .jsonl or .jsonl.gz of {"id", "spans": [[start, end, category], ...]}, sentence labels with character
            offsets in the thinking; gains are then grouped by category too.
        strict: stop at the first row that cannot be used.
        overwrite: replace results that are there already.
    """
    settings = {name: _plain(value) for name, value in locals().items()}
    if posterior_template is not None and (method != "posterior" or "{answer}" not in posterior_template):
        raise ValueError('posterior_template must have {answer} in it and needs method "posterior"')
    if prompt_template is not None and "{prompt}" not in prompt_template:
        raise ValueError(f"prompt_template: expected {{prompt}} in it, got {prompt_template!r}")
    if not 1 <= 2 * min_step_tokens <= max_step_tokens:
        raise ValueError(
            f"max_step_tokens must be at least twice min_step_tokens ({min_step_tokens}), got {max_step_tokens}"
        )
    is_prepared = (Path(trace) / PATTERNS_FILE).is_file()
    language = load_causal_lm(model, base, dtype)
    with_steps = isinstance(language, StateCoreForCausalLM) and bool(language.config.step_start_token_ids)
    if is_prepared:
        prepared = load_prepared(trace)
        if posterior_template is not None:
            raise ValueError("posterior_template needs prompts as texts: give the traces, not the prepared set")
        part = {"train": prepared.train, "eval": prepared.eval}.get(split)
        if part is None:
            raise ValueError(f"{trace} has no part {split!r}: expected train, or eval where there is one")
        markers = prepared.step_start_token_ids + prepared.step_end_token_ids
        if with_steps and language.config.step_token_ids != markers:
            raise ValueError(f"the step tokens of {model} are not those of {trace}: prepare the set for this model")
        reader: Any = PreparedReader(prepared, with_steps, score_end)
        rows = ((trace, i, r) for i, r in enumerate(part, 1))
    else:
        words = _tokenizer(tokenizer or model)
        form = _prompt_format(Path(model), prompt_template, think_open, think_close)
        if form.template is None and not words.chat_template:
            raise ValueError("the tokenizer has no chat template: give prompt_template, with {prompt} in it")
        if words.eos_token_id is None:
            raise ValueError("the tokenizer must have an end-of-sequence token, so that an answer can end")
        chosen = segmentation.choose_transitions(segmentation.TransitionOptions(transitions, opening_unit))
        reader = TextReader(
            words,
            RowFields(prompt_field, thinking_field, answer_field, id_field, completion_field, tuple(think_tags)),
            form,
            StepRules(chosen, segmentation.StepOptions(min_step_tokens, max_step_tokens)),
            language if with_steps else None,
            correct_field,
            score_end,
            posterior_template,
            read_labels(labels) if labels else None,
        )
        rows = read_source(trace, split)
    most = max_tokens or getattr(language.config.get_text_config(), "max_position_embeddings", None)
    unknown_token = None if is_prepared else words.unk_token_id
    summary, left_out, unknown = Summary(), [], 0
    pictured = nullcontext() if out is None else new_folder(out, overwrite, marker=RESULT_FILE)
    rewarded = nullcontext() if rewards is None else new_file(rewards, overwrite)
    with pictured as folder, rewarded as lines:
        only = rows if row is None else ((s, i, r) for s, i, r in rows if i == row)
        for source, line, raw in tqdm(islice(only, limit if row is None else 1), desc="traces", unit="trace"):
            try:
                if isinstance(raw, RowProblem):
                    raise raw
                one = reader(raw, source, line)
                length = one.step_ends[-1] + len(one.closing) + len(one.answer)
                if most is not None and length > most:
                    raise RowProblem("too_long", f"{length} tokens, at most {most} allowed")
            except RowProblem as problem:
                if strict:
                    raise ValueError(
                        f"{source}, line {line}: {problem} (strict: the first such row ends the run)"
                    ) from problem
                left_out.append({"source": source, "line": line, "reason": problem.reason, "detail": problem.detail})
                continue
            unknown += 0 if unknown_token is None else one.tokens.count(unknown_token)
            gains = measure(language, one, method)
            record = {"model": str(model), "method": method} | one.record(gains)
            summary.add(one, gains)
            if lines is not None:
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            if folder is not None and summary.traces <= pictures:
                name = f"trace-{summary.traces:03d}"
                draw_trace(folder / f"{name}.png", one, gains)
                write_json(folder / f"{name}.json", record)
            if summary.traces == 1:
                first = (one, gains)
        if not summary.traces:
            shown = "\n".join(f"{r['source']}, line {r['line']}: {r['reason']}: {r['detail']}" for r in left_out[:10])
            if row is not None and not left_out:
                raise ValueError(f"{trace} has no row {row}: rows count from 1")
            raise ValueError(f"no trace could be measured, {len(left_out)} were left out\n{shown}".rstrip())
        result = {"settings": settings, **summary.result(), "unknown_tokens": unknown, "left_out": left_out}
        text = report(result)
        if folder is not None:
            write_json(folder / RESULT_FILE, result)
            (folder / "report.md").write_text(text, encoding="utf-8")
            draw_summary(folder / "summary.png", summary)
    print(steps_text(*first) if summary.traces == 1 else text)
    return result


def measure(model: PreTrainedModel, trace: Chain, method: Method) -> StepGains:
    if trace.posterior_prompt is not None:
        return prompted_gains(model, trace.tokens, trace.step_ends, trace.posterior_prompt)
    return step_gains(model, trace.tokens, trace.step_ends, trace.answer, closing=trace.closing, method=method)


def load_causal_lm(model: str, base: str | None = None, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model, state-transition checkpoint, or adapter on its base; on the GPU where there is one."""
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    if is_adapter(model):
        loaded = load_adapter(base, model, dtype=kind)
    else:
        loaded, info = AutoModelForCausalLM.from_pretrained(model, dtype=kind, output_loading_info=True)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"{model} must hold a causal language model; {len(missing)} weights are missing ({missing[0]}, ...)"
            )
    return loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(Path(name) / "tokenizer" if (Path(name) / "tokenizer").is_dir() else name)


def _prompt_format(model: Path, template: str | None, think_open: str | None, think_close: str | None) -> PromptFormat:
    file = model / PATTERNS_FILE
    known = json.loads(file.read_text(encoding="utf-8")).get("prompt", {}) if file.is_file() else {}
    given = {"template": template, "think_open": think_open, "think_close": think_close}
    return PromptFormat(**(known | {name: value for name, value in given.items() if value is not None}))


def _plain(value: Any) -> Any:
    return (
        value
        if isinstance(value, (str, int, float, type(None)))
        else str(value)
        if isinstance(value, Path)
        else list(value)
    )
