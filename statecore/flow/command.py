"""`statecore flow`: how much each step of real traces tells about their answers.

Rows become chains (readers.py), chains are measured (gains.py), and the gains are summed up (summary.py), reported and
drawn (report.py). Only the figures of a trace stay in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import PATTERNS_FILE, PromptOptions, load_prepared
from ..labels import read_labels
from ..loading import ModelOptions, load_causal_lm, load_prompt_format, load_tokenizer
from ..modeling import StateCoreForCausalLM
from ..outputs import new_file, new_folder, write_json
from ..reading import context_length
from ..segmentation import StepOptions, TransitionOptions, choose_transitions
from ..settings import flat_settings
from ..traces import BadRow, RowProblem, StepRules
from .gains import Method, StepGains, prompted_gains, step_gains
from .readers import Chain, ChainFields, PreparedReader, TextReader, read_source
from .report import RESULT_FILE, draw_summary, draw_trace, report_text, steps_text
from .summary import Summary


@dataclass(frozen=True)
class ScoringOptions:
    """How gains are measured.

    Args:
        method: "difference" of answer log-likelihoods, forking at step ends, or "posterior" over prior by Bayes, in
            whole passes; they agree.
        posterior_template: with method "posterior", a text with {answer} (and {prompt}) in it that takes the prompt's
            place, for a posterior that the model itself is asked for. The paper's is unknown.
        score_end: the end of sequence belongs to the answer, so that 1 is not half of 12.
    """

    method: Method = "difference"
    posterior_template: str | None = None
    score_end: bool = True

    def __post_init__(self):
        template = self.posterior_template
        if template is not None and (self.method != "posterior" or "{answer}" not in template):
            raise ValueError('posterior_template must have {answer} in it and needs method "posterior"')


@dataclass(frozen=True)
class SelectionOptions:
    """Which rows are measured.

    Args:
        split: split of a hub dataset; "train" or "eval" of a prepared set.
        row: measure this row only (lines count from 1).
        limit: read no more rows than this.
        max_tokens: traces with more tokens are left out; default: what the model was made for.
        strict: stop at the first row that cannot be used.
    """

    split: str = "train"
    row: int | None = None
    limit: int | None = None
    max_tokens: int | None = None
    strict: bool = False


@dataclass(frozen=True)
class OutputOptions:
    """What is written.

    Args:
        rewards: a .jsonl file of per-step rewards, one line per trace.
        pictures: how many traces, from the first on, get a picture.
        overwrite: replace results that are there already.
    """

    rewards: Path | None = None
    pictures: int = 8
    overwrite: bool = False


# ----------------------------------------------------------------------------------------------------------------------
# The command


def flow(
    trace: str,
    output_dir: str | Path | None = None,
    *,
    model: str,
    labels: str | None = None,
    loading: ModelOptions = ModelOptions(),
    scoring: ScoringOptions = ScoringOptions(),
    selection: SelectionOptions = SelectionOptions(),
    fields: ChainFields = ChainFields(),
    prompt: PromptOptions = PromptOptions(),
    steps: StepOptions = StepOptions(),
    transitions: TransitionOptions = TransitionOptions(),
    outputs: OutputOptions = OutputOptions(),
) -> dict[str, Any]:
    """Show how much each step of a chain of thought tells about its answer: gains in nats, pictures, rewards.

    The gain of a step is log p(answer | steps up to it) - log p(answer | steps before it), where the model is made to
    answer at once. Rows that cannot be used are left out, counted and named; texts are not kept in memory.

    Args:
        trace: a .json, .jsonl, .jsonl.gz or .parquet file, a folder of them, a prepared training set, or a hub dataset
            (`owner/name` or `owner/name:configuration`).
        output_dir: a folder for pictures and report; without it they are not drawn.
        model: a causal language model, a state-transition checkpoint, or an adapter folder.
        labels: .jsonl or .jsonl.gz of {"id", "spans": [[start, end, category], ...]}, sentence labels with character
            offsets in the thinking; gains are then grouped by category too.
        tokenizer: folder or hub name; default: the folder `tokenizer` in the model's, or the model's own. A prepared
            set brings its own.
        dtype: what the model computes in; half precision blurs small gains.
        prompt_template: a text with {prompt} in it; default: as in the model's patterns.json, else the chat template.
        think_open, think_close: what stands around the thinking; the closing is read and not scored, so an answer's
            introduction may stand in it. Default: as in the model's patterns.json, else as `prepare`.
    """
    settings = flat_settings(**locals())
    settings["out"] = settings.pop("output_dir")  # its name in flow.json
    language = load_causal_lm(model, loading.base, loading.dtype)
    has_steps = isinstance(language, StateCoreForCausalLM) and bool(language.config.step_start_token_ids)
    if (Path(trace) / PATTERNS_FILE).is_file():
        source = _prepared_source(trace, model, language if has_steps else None, scoring, selection.split)
    else:
        tokenizer = load_tokenizer(loading.tokenizer or model)
        reader = TextReader(
            tokenizer,
            load_prompt_format(model, **prompt.given()),
            StepRules(choose_transitions(transitions), steps),
            fields,
            language if has_steps else None,
            scoring.score_end,
            scoring.posterior_template,
            read_labels(labels) if labels else {},
        )
        source = _Source(reader, read_source(trace, selection.split), tokenizer.unk_token_id)
    left_out: list[BadRow] = []
    with _opened(output_dir, outputs) as (folder, rewards):
        results = _Results(folder, rewards, outputs.pictures, {"model": str(model), "method": scoring.method})
        longest = selection.max_tokens or context_length(language)
        for chain in _chains(source, selection, longest, left_out):
            results.add(chain, measure(language, chain, scoring.method), source.unknown_token_id)
        if not results.summary.traces:
            raise ValueError(_nothing_measured(trace, selection.row, left_out))
        result, report = results.finish(settings, left_out)
    print(report)
    return result


def measure(model: PreTrainedModel, chain: Chain, method: Method) -> StepGains:
    if chain.posterior_prompt is not None:
        return prompted_gains(model, chain.tokens, chain.step_ends, chain.posterior_prompt)
    return step_gains(model, chain.tokens, chain.step_ends, chain.answer, closing=chain.closing, method=method)


# ----------------------------------------------------------------------------------------------------------------------
# Rows in, chains out


@dataclass(frozen=True)
class _Source:
    """Rows, (source, line, row or RowProblem) each, and the reader that makes chains of them."""

    reader: Callable[[Mapping[str, Any], str, int], Chain]
    rows: Iterable[tuple[str, int, Any]]
    unknown_token_id: int | None = None


def _prepared_source(
    folder: str, model_name: str, model: StateCoreForCausalLM | None, scoring: ScoringOptions, split: str
) -> _Source:
    """Rows of a prepared training set. `model` is given if it has step tokens, which must then be those of the set."""
    prepared = load_prepared(folder)
    if scoring.posterior_template is not None:
        raise ValueError("posterior_template needs prompts as texts: give the traces, not the prepared set")
    markers = prepared.step_start_token_ids + prepared.step_end_token_ids
    if model is not None and model.config.step_token_ids != markers:
        raise ValueError(f"the step tokens of {model_name} are not those of {folder}: prepare the set for this model")
    reader = PreparedReader(prepared, model is not None, scoring.score_end)
    return _Source(reader, ((folder, number, row) for number, row in enumerate(prepared.part(split), 1)))


def _chains(
    source: _Source, selection: SelectionOptions, longest: int | None, left_out: list[BadRow]
) -> Iterator[Chain]:
    """The chains of the selected rows; rows that cannot be used go to `left_out`."""
    if selection.row is None:
        rows = islice(source.rows, selection.limit)
    else:
        rows = islice((row for row in source.rows if row[1] == selection.row), 1)
    for file, line, row in tqdm(rows, desc="traces", unit="trace"):
        try:
            if isinstance(row, RowProblem):
                raise row
            chain = source.reader(row, file, line)
            if longest is not None and chain.token_count > longest:
                raise RowProblem("too_long", f"{chain.token_count} tokens, at most {longest} allowed")
        except RowProblem as problem:
            bad = BadRow(file, line, problem.reason, problem.detail)
            if selection.strict:
                raise ValueError(f"{bad} (strict: the first such row ends the run)") from problem
            left_out.append(bad)
        else:
            yield chain


def _nothing_measured(trace: str, row: int | None, left_out: list[BadRow]) -> str:
    if row is not None and not left_out:
        return f"{trace} has no row {row}: rows count from 1"
    lines = [f"no trace could be measured, {len(left_out)} were left out", *map(str, left_out[:10])]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Gains in, files out


@contextmanager
def _opened(output_dir: str | Path | None, outputs: OutputOptions) -> Iterator[tuple[Path | None, TextIO | None]]:
    """The folder for the report and the file for the rewards, where they are wanted."""
    folder = nullcontext() if output_dir is None else new_folder(output_dir, outputs.overwrite, marker=RESULT_FILE)
    rewards = nullcontext() if outputs.rewards is None else new_file(outputs.rewards, outputs.overwrite)
    with folder as opened_folder, rewards as opened_rewards:
        yield opened_folder, opened_rewards


class _Results:
    """Writes each chain's gains as they come, and the report on all of them at the end."""

    def __init__(self, folder: Path | None, rewards: TextIO | None, pictures: int, about: Mapping[str, Any]):
        self.folder, self.rewards, self.pictures, self.about = folder, rewards, pictures, about
        self.summary = Summary()
        self.unknown_tokens = 0
        self.first: tuple[Chain, StepGains] | None = None

    def add(self, chain: Chain, gains: StepGains, unknown_token_id: int | None) -> None:
        self.summary.add(chain, gains)
        self.first = self.first or (chain, gains)
        if unknown_token_id is not None:
            self.unknown_tokens += chain.tokens.count(unknown_token_id)
        record = {**self.about, **chain.record(gains)}
        if self.rewards is not None:
            self.rewards.write(json.dumps(record, ensure_ascii=False) + "\n")
        if self.folder is not None and self.summary.traces <= self.pictures:
            path = self.folder / f"trace-{self.summary.traces:03d}.png"
            draw_trace(path, chain, gains)
            write_json(path.with_suffix(".json"), record)

    def finish(self, settings: Mapping[str, Any], left_out: list[BadRow]) -> tuple[dict[str, Any], str]:
        """The result, and what to print: the steps of a single trace, else the report."""
        result = {
            "settings": settings,
            **self.summary.result(),
            "unknown_tokens": self.unknown_tokens,
            "left_out": [asdict(row) for row in left_out],
        }
        report = report_text(result)
        if self.folder is not None:
            write_json(self.folder / RESULT_FILE, result)
            (self.folder / "report.md").write_text(report, encoding="utf-8")
            draw_summary(self.folder / "summary.png", self.summary)
        return result, steps_text(*self.first) if self.summary.traces == 1 else report
