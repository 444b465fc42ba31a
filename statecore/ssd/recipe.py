"""Recipes of `statecore ssd`: the YAML file that names model, tokenizer, phases and evaluations, parsed and checked.
(arXiv 2505.22425)

A phase is a mixture of sources (files, hub datasets, synthetic problems) with filters, and arguments of transformers'
Trainer. What the paper leaves open, with our default:

- Sizes and settings of the phases, the start checkpoint, how sources are weighted: fields of the recipe.
- Whether optimizer and schedule carry over from phase to phase: each phase starts afresh with its own. A model soon
  forgets what a later mixture leaves out, so a mixture should contain some of the earlier ones.
- What happens to rows that are too long: they are left out (`too_long: drop`), because a chain without its end teaches
  the model never to finish; `too_long: truncate` cuts them.
- How problems are synthesised: the paper prompts a language model for concepts, a rationale and a problem, and rejects
  what reward models dislike. Here `programs` composes concepts (operations) into problems whose solution is known, and
  `filter` takes the place of the rejection.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..data import PromptFormat
from ..settings import read_yaml


@dataclass
class Source:
    """Where rows come from: exactly one of `source` and `programs` is set."""

    source: str | None = None  # a .jsonl, .jsonl.gz or .parquet file, or a hub dataset
    split: str = "train"
    fields: dict[str, Any] = field(default_factory=dict)  # of traces.RowFields: where a row keeps its parts
    programs: dict[str, Any] | None = None  # arguments of rows.programs: synthetic problems
    filter: dict[str, Any] = field(default_factory=dict)  # conditions of rows.passes
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
    """A mixture of sources and the transformers.TrainingArguments it is trained with."""

    name: str
    mixture: list[Source]
    training: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evaluation(Source):
    """Held-out rows: their loss and, with `answers`, how many greedy answers are exactly right."""

    name: str = ""
    answers: bool = False
    max_new_tokens: int = 512

    def __post_init__(self):
        super().__post_init__()
        if not self.name:
            raise ValueError("`name` is missing")


@dataclass
class Recipe:
    """A recipe file. `model` holds fields of SSDConfig, or `checkpoint` and the fields that differ from it."""

    model: dict[str, Any]
    tokenizer: str | dict[str, int]  # a path or hub name, or {train: vocabulary size} to train one on the phases' rows
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
        for entries in (self.phases, self.evaluation):
            names = [entry.name for entry in entries]
            if len(set(names)) < len(names):
                raise ValueError(f"phases, and evaluations, need different names, got {', '.join(names)}")

    @property
    def prompt_format(self) -> PromptFormat:
        return from_mapping(PromptFormat, self.prompt, "prompt")


def read_recipe(path: str | Path) -> Recipe:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no recipe {path}: recipes/ssd-tiny.yaml is one to start from")
    return parse_recipe(read_yaml(path), str(path))


def parse_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    values = dict(values)
    phases, evaluations = values.get("phases") or [], values.get("evaluation") or []
    values["phases"] = [_parse_phase(entry, f"{where}, phase {i}") for i, entry in enumerate(phases, 1)]
    values["evaluation"] = [
        from_mapping(Evaluation, entry, f"{where}, evaluation {i}") for i, entry in enumerate(evaluations, 1)
    ]
    return from_mapping(Recipe, values, where)


def _parse_phase(values: Mapping[str, Any], where: str) -> Phase:
    values = _checked_mapping(values, where)
    mixture = values.get("mixture") or []
    values["mixture"] = [from_mapping(Source, entry, f"{where}, source {i}") for i, entry in enumerate(mixture, 1)]
    if not values["mixture"]:
        raise ValueError(f"{where}: `mixture` names no source")
    return from_mapping(Phase, values, where)


def from_mapping(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from a mapping; errors say where in the recipe a value is missing, unknown or wrong."""
    values = _checked_mapping(values, where)
    known = {f.name for f in fields(kind)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(map(repr, unknown))}; known are {', '.join(sorted(known))}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {argument_error(error)}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _checked_mapping(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected `name: value` lines, got {values!r}")
    return dict(values)


def argument_error(error: Exception) -> str:
    """The message of a call with wrong arguments, without the name of the function that was called."""
    return str(error).partition("() ")[2] or str(error)
