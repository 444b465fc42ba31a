"""`statecore ssd`: training an SSD model in phases, from open chains of thought to harder synthetic problems.
(arXiv 2505.22425)

A recipe names the model, the tokenizer, the phases and what is evaluated after each. A phase is a mixture of sources
(files, hub datasets, synthetic problems) with filters, and settings of transformers' Trainer, which does the training.
A training row is prompt, thinking, answer and end of sequence; the prompt is not predicted.

What the paper leaves open, with our default:

- Sizes and settings of the phases, the start checkpoint, how sources are weighted: fields of the recipe.
- Whether optimizer and schedule go on between phases: each phase starts anew with its own. What a later mixture leaves
  out is soon forgotten, so a mixture should hold some of the earlier ones.
- What happens to rows that are too long: they are left out (`too_long: drop`), because a chain without its end teaches
  never to finish; `too_long: truncate` cuts them.
- How problems are synthesised: the paper prompts a language model for concepts, a rationale and a problem and rejects
  what reward models dislike. Here `programs` composes concepts (operations) into problems whose solution is known;
  `filter` takes the place of the rejection.

Updates whose gradient is not finite are skipped and counted, as the paper's code skips such batches.
"""

import hashlib
import math
import os
import random
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
import yaml
from datasets import Dataset, Features, List, Value, concatenate_datasets, interleave_datasets
from datasets.exceptions import DatasetGenerationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ..data import PromptFormat
from ..outputs import write_json, write_text
from ..traces import RowFields, RowProblem, parse_trace, read_lines
from ..train import IGNORED, MuonAndAdamW
from .model import SSDConfig, SSDForCausalLM

PAD, EOS = "<|pad|>", "<|end|>"
EVALUATED_TOKENS = 16384  # of a packed batch in evaluation
ROW = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")})


# ----------------------------------------------------------------------------------------------------------------------
# Recipes


@dataclass
class Source:
    """Where rows come from. Either `source` or `programs` must be there."""

    source: str | None = None  # a .jsonl, .jsonl.gz or .parquet file, or a hub dataset
    split: str = "train"
    fields: dict[str, Any] = field(default_factory=dict)  # of traces.RowFields: where a row keeps its parts
    programs: dict[str, Any] | None = None  # arguments of `programs`: synthetic problems
    filter: dict[str, Any] = field(default_factory=dict)  # see `passes`
    part: tuple[float, float] = (0.0, 1.0)  # of all prompts, by their hash: keeps evaluation apart from training
    rows: int | None = None  # at most
    weight: float | None = None  # share in the mixture; None: by number of rows

    def __post_init__(self):
        if (self.source is None) == (self.programs is None):
            raise ValueError(f"a source needs either `source` or `programs`, got {self}")
        if self.programs is not None and self.rows is None:
            raise ValueError(f"programs never end: say how many `rows`, got {self}")
        low, high = self.part
        if not 0 <= low < high <= 1:
            raise ValueError(f"part must be [low, high] with 0 <= low < high <= 1, got {self.part}")

    @property
    def title(self) -> str:
        return self.source or f"programs {self.programs}"


@dataclass
class Phase:
    """A mixture of sources and how it is trained on: arguments of transformers.TrainingArguments."""

    name: str
    mixture: list[Source]
    training: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evaluation(Source):
    """Held-out rows: their loss and, with `answers`, how many are answered exactly when decoded greedily."""

    name: str = ""
    answers: bool = False
    max_new_tokens: int = 512

    def __post_init__(self):
        super().__post_init__()
        if not self.name:
            raise ValueError("`name` is missing")


@dataclass
class Recipe:
    """A recipe file. `model` holds fields of SSDConfig, or `checkpoint` and fields that differ from it."""

    model: dict[str, Any]
    tokenizer: str | dict[str, int]  # a path or hub name, or {train: vocabulary size} for one of the recipe's texts
    phases: list[Phase]
    evaluation: list[Evaluation] = field(default_factory=list)
    prompt: dict[str, Any] = field(default_factory=dict)  # of data.PromptFormat
    max_tokens: int = 20480
    too_long: str = "drop"
    packed: bool = True
    muon_learning_rate: float | None = None
    training: dict[str, Any] = field(default_factory=dict)  # of every phase

    def __post_init__(self):
        if self.too_long not in ("drop", "truncate"):
            raise ValueError(f"too_long must be 'drop' or 'truncate', got {self.too_long!r}")
        if not self.phases:
            raise ValueError("a recipe needs at least one phase")
        for kind in (self.phases, self.evaluation):
            names = [entry.name for entry in kind]
            if len(set(names)) < len(names):
                raise ValueError(f"phases, and evaluations, need different names, got {', '.join(names)}")

    @property
    def form(self) -> PromptFormat:
        return make(PromptFormat, self.prompt, "prompt")


def read_recipe(path: str | Path) -> Recipe:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {path}: recipes/ssd-tiny.yaml is one to start from")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got {type(values).__name__}")
    return parse_recipe(values, str(path))


def parse_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    values = dict(values)
    values["phases"] = [_phase(entry, f"{where}, phase {i + 1}") for i, entry in enumerate(values.get("phases") or [])]
    evaluation = enumerate(values.get("evaluation") or [])
    values["evaluation"] = [make(Evaluation, entry, f"{where}, evaluation {i + 1}") for i, entry in evaluation]
    return make(Recipe, values, where)


def _phase(values: Mapping[str, Any], where: str) -> Phase:
    values = _mapping(values, where)
    mixture = values.get("mixture") or []
    values["mixture"] = [make(Source, entry, f"{where}, source {i + 1}") for i, entry in enumerate(mixture)]
    if not values["mixture"]:
        raise ValueError(f"{where}: `mixture` names no source")
    return make(Phase, values, where)


def make(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from a mapping; says where in the recipe something is missing or unknown."""
    values = _mapping(values, where)
    known = {f.name for f in fields(kind)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(map(repr, unknown))}; known are {', '.join(sorted(known))}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {str(error).partition('() ')[2] or error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected `name: value` lines, got {values!r}")
    return dict(values)


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def programs(
    *, steps: Sequence[int], seed: int = 0, operations: Sequence[str] = ("+", "-"), count: int = 1_000_000
) -> Iterator[dict[str, Any]]:
    """Synthetic problems: small programs on single digits (modulo 10), solved statement by statement.

    A problem gives a first value and between steps[0] and steps[1] statements, each of which combines the newest value
    with an earlier one by one of `operations`, and asks for the last. Names are letters in order from a random one on,
    so that longer problems hold no name that short ones do not. A row has problem, thinking and answer, and for
    filters steps and distinct, how many different values occur.
    """
    low, high = steps
    if not 1 <= low <= high <= 25:
        raise ValueError(f"programs: steps must be [low, high] with 1 <= low <= high <= 25, got {list(steps)}")
    unknown = sorted(set(operations) - {"+", "-"})
    if unknown or not operations:
        raise ValueError(f"programs: operations may be '+' and '-', got {list(operations)}")
    draw = random.Random(seed)
    for number in range(count):
        start, letters = draw.randrange(26), "abcdefghijklmnopqrstuvwxyz"
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


def rows_of(source: Source) -> Iterator[dict[str, str] | RowProblem]:
    """id, prompt, thinking and answer of the rows that a source's filter, part and number let through."""
    if source.programs is not None:
        try:
            numbered = enumerate(programs(**source.programs), 1)
        except TypeError as error:
            raise ValueError(f"programs: {str(error).partition('() ')[2]}") from error
    else:
        numbered = read_lines(source.source, source.split)
    where = make(RowFields, source.fields, f"fields of {source.title}")
    taken = 0
    for line, row in numbered:
        if taken == source.rows:
            return
        try:
            if isinstance(row, RowProblem):
                raise row
            if not passes(row, source.filter, source.title):
                continue
            trace = parse_trace(row, where, source.title, line)
        except RowProblem as problem:
            yield problem
            continue
        prompt = "\n".join(message["content"] for message in trace.prompt)
        if source.part[0] <= share(prompt) < source.part[1]:
            taken += 1
            yield {"id": trace.id, "prompt": prompt, "thinking": trace.thinking, "answer": trace.answer}


def share(text: str) -> float:
    """A number in 0 .. 1 that depends on the text alone."""
    return int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12], 16) / 16**12


@dataclass
class Texts:
    """How rows become tokens."""

    tokenizer: PreTrainedTokenizerBase
    form: PromptFormat
    max_tokens: int
    too_long: str
    folder: Path  # for encoded rows

    def prompt(self, row: Mapping[str, str]) -> str:
        return self.form.prompt_text(self.tokenizer, [{"role": "user", "content": row["prompt"]}])

    def encode(self, row: Mapping[str, str]) -> dict[str, Any]:
        """input_ids and labels. The border lies between tokens: generate() gets the prompt alone."""
        prompt = self.tokenizer(self.prompt(row), add_special_tokens=False).input_ids
        rest = row["thinking"] + self.form.think_close + row["answer"]
        rest = [*self.tokenizer(rest, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        ids, labels = prompt + rest, [IGNORED] * len(prompt) + rest
        if len(ids) > self.max_tokens:
            if self.too_long == "drop" or len(prompt) >= self.max_tokens:
                raise RowProblem("too_long", f"{len(ids)} tokens")
            ids, labels = ids[: self.max_tokens], labels[: self.max_tokens]
        return {"input_ids": ids, "labels": labels, "length": len(ids)}

    def dataset(self, source: Source, left_out: Counter) -> Dataset:
        def encoded() -> Iterator[dict[str, Any]]:
            for row in rows_of(source):
                try:
                    if isinstance(row, RowProblem):
                        raise row
                    yield self.encode(row)
                except RowProblem as problem:
                    left_out[problem.reason] += 1

        if next(encoded(), None) is None:
            raise ValueError(f"{source.title}: no row is left; left out for a reason: {dict(left_out) or 'none'}")
        left_out.clear()
        try:  # on disk, a piece in memory at a time; the fingerprint keeps it from being taken for other rows
            return Dataset.from_generator(
                encoded, features=ROW, cache_dir=str(self.folder), fingerprint=uuid.uuid4().hex, writer_batch_size=1000
            )
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None

    def mixture(self, phase: Phase, seed: int, left_out: Counter) -> Dataset:
        parts = []
        for source in phase.mixture:
            counts: Counter = Counter()
            parts.append(self.dataset(source, counts))
            left_out.update(counts)
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


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names, or one of bytes and merges from the texts of all phases."""
    if isinstance(recipe.tokenizer, str):
        tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer {recipe.tokenizer} has no end-of-sequence token, which rows end with")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    if set(recipe.tokenizer) != {"train"}:
        raise ValueError(f"tokenizer must be a name or {{train: vocabulary size}}, got {recipe.tokenizer}")
    words = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.pre_tokenizer, words.decoder = pre_tokenizers.Sequence([digits, bytes_]), decoders.ByteLevel()
    form = recipe.form
    marks = [mark.strip() for mark in (form.think_open, form.think_close) if mark.strip()]
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.tokenizer["train"], special_tokens=[PAD, EOS, *marks], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    words.train_from_iterator(_texts(recipe), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=EOS, padding_side="left")


def _texts(recipe: Recipe, longest: int = 2000, rows: int = 2000) -> Iterator[str]:
    for phase in recipe.phases:
        for source in phase.mixture:
            for row, _ in zip(rows_of(source), range(rows), strict=False):
                if not isinstance(row, RowProblem):
                    yield "\n".join([row["prompt"], row["thinking"][:longest], row["answer"]])


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> SSDForCausalLM:
    """A new model, or the checkpoint that the recipe starts from."""
    given = dict(recipe.model)
    checkpoint, dtype = given.pop("checkpoint", None), given.pop("dtype", "float32")
    torch.manual_seed(seed)
    if checkpoint is not None:
        model = SSDForCausalLM.from_pretrained(checkpoint, dtype=dtype, **given)
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, {checkpoint} only {model.config.vocab_size}: "
                "take the checkpoint's own tokenizer"
            )
        return model
    unknown = sorted(given.keys() - {f.name for f in fields(SSDConfig)})
    if unknown:
        raise ValueError(f"model: unknown {', '.join(unknown)}: expected `checkpoint` or fields of SSDConfig")
    ends = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    return SSDForCausalLM(SSDConfig(**(ends | given))).to(getattr(torch, dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Training and evaluation


class SkipNonFinite(TrainerCallback):
    """Leaves out updates whose gradient is not finite."""

    def __init__(self):
        self.skipped = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            self.skipped += 1
            model.zero_grad(set_to_none=True)


class CurriculumTrainer(Trainer):
    """transformers' Trainer; with `muon_learning_rate` the layers' matrices learn by Muon, the rest by AdamW."""

    muon_learning_rate: float | None = None

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.muon_learning_rate is not None:
            learning = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
            matrices = [p for name, p in learning if name.endswith("_proj.weight")]
            others = [p for name, p in learning if not name.endswith("_proj.weight")]
            decay, betas = self.args.weight_decay, (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = MuonAndAdamW(
                matrices,
                others,
                muon={"lr": self.muon_learning_rate, "weight_decay": decay},
                adamw={"lr": self.args.learning_rate, "weight_decay": decay, "betas": betas},
            )
        return super().create_optimizer(model)


@torch.no_grad()
def held_out_loss(model: SSDForCausalLM, rows: Dataset) -> float:
    """Nats a predicted token."""
    collate, total, count = DataCollatorWithFlattening(return_flash_attn_kwargs=True), 0.0, 0
    for batch in packs(rows, EVALUATED_TOKENS):
        inputs = collate(batch)
        ids, target = inputs["input_ids"].to(model.device), inputs["labels"][0, 1:].to(model.device)
        bounds = inputs["cu_seq_lens_q"].to(model.device)
        logits = model(ids, cu_seq_lens_q=bounds, use_cache=False).logits[0, :-1]
        total += F.cross_entropy(logits.float(), target, ignore_index=IGNORED, reduction="sum").item()
        count += int((target != IGNORED).sum())
    return total / max(count, 1)


def packs(rows: Dataset, tokens: int) -> Iterator[list[dict[str, Any]]]:
    """Rows in groups of up to `tokens` tokens; a longer row is a group of its own."""
    group: list[dict[str, Any]] = []
    for row in rows:
        if group and sum(len(other["labels"]) for other in group) + row["length"] > tokens:
            yield group
            group = []
        group.append({"input_ids": row["input_ids"], "labels": row["labels"]})
    yield group


@dataclass(frozen=True)
class Answers:
    """Of so many problems: share answered exactly, share whose thinking was closed, share of the commonest answer."""

    problems: int
    exact: float
    closed: float
    guess: float


@torch.no_grad()
def answer(
    model: SSDForCausalLM, texts: Texts, rows: Sequence[Mapping[str, str]], max_new_tokens: int, batch: int = 100
) -> Answers:
    """Greedy answers by `generate()`; a problem whose thinking never ends counts as wrong."""
    exact = closed = 0
    mark = texts.form.think_close.strip()
    texts.tokenizer.padding_side = "left"
    for begin in range(0, len(rows), batch):
        part = rows[begin : begin + batch]
        inputs = texts.tokenizer(
            [texts.prompt(row) for row in part], return_tensors="pt", padding=True, add_special_tokens=False
        )
        out = model.generate(
            input_ids=inputs.input_ids.to(model.device), attention_mask=inputs.attention_mask.to(model.device),
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=texts.tokenizer.eos_token_id,
            pad_token_id=texts.tokenizer.pad_token_id,
        )  # fmt: skip
        for row, ids in zip(part, out[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
            ids = ids[: ids.index(texts.tokenizer.eos_token_id)] if texts.tokenizer.eos_token_id in ids else ids
            _, found, said = texts.tokenizer.decode(ids).partition(mark)
            closed += bool(found)
            exact += bool(found) and said.strip() == row["answer"].strip()
    count = max(len(rows), 1)
    return Answers(len(rows), exact / count, closed / count, best_guess(rows))


def best_guess(rows: Sequence[Mapping[str, str]]) -> float:
    """Share of problems that the commonest answer solves."""
    return max(Counter(row["answer"].strip() for row in rows).values(), default=0) / max(len(rows), 1)


class Curriculum:
    """The phases of a recipe, trained in any selection; what two selections begin with alike is trained once."""

    def __init__(self, recipe: Recipe, output: Path, encoded: Path, seed: int, say: Callable[[str], Any] = print):
        self.recipe, self.output, self.seed, self.say = recipe, output, seed, say
        self.tokenizer = make_tokenizer(recipe)
        self.texts = Texts(self.tokenizer, recipe.form, recipe.max_tokens, recipe.too_long, encoded)
        self.left_out = {phase.name: Counter() for phase in recipe.phases}
        self.data = {p.name: self.texts.mixture(p, seed, self.left_out[p.name]) for p in recipe.phases}
        self.held_out = [(e, self.texts.dataset(e, Counter())) for e in recipe.evaluation]
        self.done: dict[tuple[str, ...], dict[str, Any]] = {}

    def run(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Trains the named phases one after the other; the record of the last, whose model lies in its `folder`."""
        if names in self.done:
            return self.done[names]
        if not names:
            model = make_model(self.recipe, self.tokenizer, self.seed)
            self.done[names] = self._record(names, model, None, {}, [])
            return self.done[names]
        before = self.run(names[:-1])
        number, phase = next((i, p) for i, p in enumerate(self.recipe.phases) if p.name == names[-1])
        if len(names) == 1:
            model = make_model(self.recipe, self.tokenizer, self.seed)
        else:
            model = SSDForCausalLM.from_pretrained(before["folder"], dtype="auto")
        rows = self.data[phase.name]
        self.say(f"{' + '.join(names)}: {len(rows):,} rows, {sum(rows['length']):,} tokens")
        skip = SkipNonFinite()
        trainer = self._trainer(model, phase, rows, number, skip)
        result = trainer.train()
        folder = self.output / "-".join(slug(name) for name in names)
        save_whole(trainer, folder, self.tokenizer)
        with suppress(OSError):  # where no checkpoints were asked for
            Path(trainer.args.output_dir).rmdir()
            Path(trainer.args.output_dir).parent.rmdir()
        metrics = result.metrics | {"skipped_updates": skip.skipped, "rows": len(rows)}
        self.done[names] = self._record(names, trainer.accelerator.unwrap_model(trainer.model), folder, metrics,
                                        [x for x in trainer.state.log_history if "loss" in x])  # fmt: skip
        return self.done[names]

    def _trainer(
        self, model: SSDForCausalLM, phase: Phase, rows: Dataset, number: int, skip: SkipNonFinite
    ) -> CurriculumTrainer:
        given = {
            "output_dir": str(self.output / "checkpoints" / slug(phase.name)),
            "report_to": "none",
            "save_strategy": "no",
            "seed": self.seed + number,
            "remove_unused_columns": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        try:
            arguments = TrainingArguments(**(given | self.recipe.training | phase.training))
        except (TypeError, ValueError) as error:
            raise ValueError(f"training of phase {phase.name!r}: {str(error).partition('() ')[2] or error}") from error
        if self.recipe.packed:
            collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        else:
            collator = DataCollatorForSeq2Seq(self.tokenizer, padding=True)
        trainer = CurriculumTrainer(
            model=model, args=arguments, train_dataset=rows.remove_columns("length"), data_collator=collator,
            processing_class=self.tokenizer, callbacks=[skip],
        )  # fmt: skip
        trainer.muon_learning_rate = self.recipe.muon_learning_rate
        return trainer

    def _record(
        self, names: tuple[str, ...], model: SSDForCausalLM, folder: Path | None, metrics: dict, history: list
    ) -> dict[str, Any]:
        model = model.eval()
        evaluation = {}
        for setting, rows in self.held_out:
            found: dict[str, Any] = {"rows": len(rows), "loss": held_out_loss(model, rows)}
            if setting.answers and names:
                problems = [row for row in rows_of(setting) if not isinstance(row, RowProblem)]
                answers = answer(model, self.texts, problems, setting.max_new_tokens)
                found |= {"exact": answers.exact, "closed": answers.closed, "guess": answers.guess}
            evaluation[setting.name] = found
            shown = ", ".join(f"{k} {v:.3f}" for k, v in found.items() if k != "rows")
            self.say(f"{' + '.join(names) or 'before training'}: {setting.name}: {shown}")
        return {"phases": list(names), "folder": folder and str(folder), "training": metrics, "history": history,
                "evaluation": evaluation}  # fmt: skip


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def save_whole(trainer: Trainer, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes model and tokenizer; what stood in the folder before goes when everything is there."""
    working = folder.with_name(f".{folder.name}.{os.environ.get('MASTER_PORT', os.getpid())}.partial")
    trainer.save_model(str(working))
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(working)
        shutil.rmtree(folder, ignore_errors=True)
        working.rename(folder)
    trainer.accelerator.wait_for_everyone()


# ----------------------------------------------------------------------------------------------------------------------
# Command


def ssd(recipe: Path, *, output: Path = Path("statecore-ssd"), ablate: bool = False, seed: int = 0) -> Path:
    """Train an SSD model in phases, as a recipe says, and evaluate it after each.

    Writes the model of every phase, report.json, report.md and curriculum.png. The last model is a transformers
    checkpoint: `generate()` and, where it has no attention layers, Mamba2ForCausalLM take it as it is.

    Args:
        recipe: a YAML file; recipes/ssd-tiny.yaml trains in minutes on a CPU.
        output: folder that everything is written to.
        ablate: train without each phase, too, and compare.
        seed: of new weights, sampling and order.
    """
    parsed, output = read_recipe(recipe), Path(output)
    output.mkdir(parents=True, exist_ok=True)
    record = run_recipe(parsed, output, ablate=ablate, seed=seed, say=typer.echo)
    typer.echo(f"{report_table(record)}\nThe model is in {record['runs'][-1]['folder']}, the report in {output}")
    return output


def run_recipe(
    recipe: Recipe, output: Path, *, ablate: bool, seed: int, say: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Trains and evaluates; the record of all runs (also in `output`), the full curriculum last."""
    with tempfile.TemporaryDirectory(dir=output, prefix=".rows-") as encoded:
        curriculum = Curriculum(recipe, output, Path(encoded), seed, say)
        runs = run_selections(curriculum, ablate)
    model = SSDForCausalLM.from_pretrained(runs[-1]["folder"])
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "left_out": {name: dict(counts) for name, counts in curriculum.left_out.items()},
        "runs": runs,
    }
    write_json(output / "report.json", record)
    write_text(output / "report.md", f"# Curriculum\n\n{report_table(record)}\n\n![curriculum](curriculum.png)\n")
    draw_curriculum(record, output / "curriculum.png")
    return record


def run_selections(curriculum: Curriculum, ablate: bool) -> list[dict[str, Any]]:
    """The records of no training, with `ablate` of all phases but one, and of the first, the first two, ... phases."""
    everything = tuple(phase.name for phase in curriculum.recipe.phases)
    selections = [()]
    if ablate and len(everything) > 1:
        selections += [tuple(n for n in everything if n != left) for left in reversed(everything)]
    selections += [everything[: i + 1] for i in range(len(everything))]
    return [curriculum.run(names) for names in dict.fromkeys(selections)]


def report_table(record: Mapping[str, Any]) -> str:
    """Markdown: a line a run, a column a figure of each evaluation."""
    sets = {name: found for run in record["runs"] for name, found in run["evaluation"].items()}
    columns = [(name, key) for name, found in sets.items() for key in ("loss", "exact") if key in found]
    titles = [f"{name}: {'loss' if key == 'loss' else 'exact answers'}" for name, key in columns]
    lines = [f"| trained on | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for run in record["runs"]:
        cells = []
        for name, key in columns:
            value = run["evaluation"][name].get(key)
            cells.append("" if value is None else f"{value:.3f}" if key == "loss" else f"{value:.1%}")
        lines.append(f"| {' + '.join(run['phases']) or 'nothing'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curriculum(record: Mapping[str, Any], path: Path) -> None:
    """Training loss of every run, held-out loss and exact answers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, losses, bars) = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    runs = [run for run in record["runs"] if run["phases"]]
    sets = list(runs[0]["evaluation"])
    for place, run in enumerate(runs):
        label = " + ".join(run["phases"])
        offset = sum(other["history"][-1]["step"] for other in runs
                     if other["history"] and other["phases"] == run["phases"][: len(other["phases"])]
                     and len(other["phases"]) < len(run["phases"]))  # fmt: skip
        curves.plot([offset + x["step"] for x in run["history"]], [x["loss"] for x in run["history"]], label=label)
        shift = (place - (len(runs) - 1) / 2) * 0.8 / len(runs)
        for axis, key in ((losses, "loss"), (bars, "exact")):
            shown = [name for name in sets if key in run["evaluation"][name]]
            axis.bar([i + shift for i in range(len(shown))], [run["evaluation"][name][key] for name in shown],
                     0.8 / len(runs), label=label)  # fmt: skip
            axis.set_xticks(range(len(shown)), shown, fontsize=8)
    curves.set(title="training", xlabel="update", ylabel="nats a token")
    losses.set(title="held-out loss", ylabel="nats a token")
    bars.set(title="exact answers", ylim=(0, 1))
    curves.legend(fontsize=7)
    working = path.with_name(f".{path.name}.part.png")
    figure.savefig(working, dpi=110)
    plt.close(figure)
    os.replace(working, path)
