"""The training set: the format of its rows, and batches of them aligned with the teacher.

A row of the folder that `statecore prepare` writes is

    prompt | <|step_i|> step 1 <|/step_i|> <|step_j|> step 2 <|/step_j|> ... | end of thinking, answer, end of sequence

with step id 0 for the prompt, 1..n for the steps including their markers, and n + 1 for the rest. The text is tokenised
once, as a whole, and the markers are inserted between its tokens. So a row without its markers is, token by token, what
the teacher reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer

PATTERNS_FILE = "patterns.json"  # thinking patterns, their tokens, and the prompt format


@dataclass(frozen=True)
class PromptFormat:
    """How the text of a row is put together. `statecore generate` formats its prompts in the same way."""

    template: str | None = None  # with {prompt} in it; None: the tokenizer's chat template
    think_open: str = "<think>\n"
    think_close: str = "\n</think>\n\n"

    def prompt_text(self, tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
        """Everything before the thinking. `think_open` is not repeated if the chat template has it already."""
        if self.template is None:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        else:
            text = self.template.replace("{prompt}", "\n".join(message["content"] for message in messages))
        opening = self.think_open.strip()
        return text if opening and text.rstrip().endswith(opening) else text + self.think_open


@dataclass(frozen=True)
class PromptOptions:
    """The parts of a PromptFormat that a command is told; the others (None) come from elsewhere.

    Args:
        template: a text with {prompt} in it; default: the tokenizer's chat template.
        think_open, think_close: what encloses the thinking.
    """

    template: str | None = field(default=None, metadata={"option": "prompt_template"})
    think_open: str | None = None
    think_close: str | None = None

    def __post_init__(self):
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError(f"prompt_template: expected {{prompt}} in it, got {self.template!r}")

    def given(self) -> dict[str, str]:
        """Those fields of a PromptFormat that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Prepared:
    """A training set written by `statecore prepare`."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    tokenizer: Any
    patterns: dict[str, Any]  # what PATTERNS_FILE holds

    def part(self, split: str) -> datasets.Dataset:
        """The rows of "train" or "eval"."""
        rows = {"train": self.train, "eval": self.eval}.get(split)
        if rows is None:
            raise ValueError(f"the prepared set has no part {split!r}: expected train, or eval where there is one")
        return rows

    @property
    def step_start_token_ids(self) -> list[int]:
        return [pattern["start_token_id"] for pattern in self.patterns["patterns"]]

    @property
    def step_end_token_ids(self) -> list[int]:
        return [pattern["end_token_id"] for pattern in self.patterns["patterns"]]


def load_prepared(folder: str | Path) -> Prepared:
    """Reads a folder written by `statecore prepare`."""
    folder = Path(folder)
    missing = [name for name in ("train.parquet", PATTERNS_FILE, "tokenizer") if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a prepared training set ({', '.join(missing)} missing): make one with `statecore prepare`"
        )
    files = {
        name: str(folder / f"{name}.parquet") for name in ("train", "eval") if (folder / f"{name}.parquet").exists()
    }
    parts = datasets.load_dataset("parquet", data_files=files)
    return Prepared(
        parts["train"],
        parts.get("eval"),
        AutoTokenizer.from_pretrained(folder / "tokenizer"),
        json.loads((folder / PATTERNS_FILE).read_text(encoding="utf-8")),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def align_with_teacher(
    input_ids: np.ndarray, is_marker: np.ndarray, prompt_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The teacher's tokens, and the pairs of positions at which student and teacher predict the same ordinary token.

    The teacher reads the row without its markers. Each ordinary token x after the prompt, at the student's position
    p + 1, gives one pair: p, and the teacher's position of the last ordinary token before x. So for the first token
    after a marker, the student's input is the marker, and the teacher's is the ordinary token before it (before both
    markers between two steps). There is no pair where the student's next token is a marker: the teacher cannot predict
    it, and that position learns from the labels alone. A row's first token has no pair, as nothing predicts it.

    input_ids `[T]`, is_marker bool `[T]`. Returns `teacher_ids` `[U]`, and increasing `student_positions` and
    `teacher_positions` `[M]`.
    """
    ordinary = ~is_marker
    teacher_position = np.cumsum(ordinary) - 1  # by the student's position of an ordinary token
    targets = np.flatnonzero(ordinary)
    targets = targets[(targets >= prompt_length) & (teacher_position[targets] >= 1)]
    return input_ids[ordinary], targets - 1, teacher_position[targets] - 1


class _StepCollator:
    """What both collators share: markers, labels and the alignment of each row."""

    def __init__(self, marker_token_ids: Iterable[int], pad_token_id: int):
        self.marker_token_ids = np.fromiter(marker_token_ids, dtype=np.int64)
        self.pad_token_id = pad_token_id

    @classmethod
    def of(cls, prepared: Prepared) -> _StepCollator:
        """The collator for a prepared training set."""
        pad, eos = prepared.tokenizer.pad_token_id, prepared.tokenizer.eos_token_id
        return cls([*prepared.step_start_token_ids, *prepared.step_end_token_ids], eos if pad is None else pad)

    def _row(self, feature: Mapping[str, Any]) -> dict[str, np.ndarray]:
        ids = np.asarray(feature["input_ids"], dtype=np.int64)
        prompt = int(feature["prompt_length"])
        teacher_ids, student, teacher = align_with_teacher(ids, np.isin(ids, self.marker_token_ids), prompt)
        labels = ids.copy()
        labels[: max(prompt, 1)] = -100  # a row's first token has no predecessor in its own row
        steps = np.asarray(feature["step_ids"], dtype=np.int32)
        return {
            "ids": ids,
            "labels": labels,
            "steps": steps,
            "teacher_ids": teacher_ids,
            "student": student,
            "teacher": teacher,
        }


class PaddedCollator(_StepCollator):
    """B rows side by side, padded at the end to the longest row's T tokens, U without markers; M pairs of positions.

    input_ids, attention_mask, labels   [B, T] int64; labels are not shifted, -100 on prompt and padding
    step_ids                            [B, T] int32, -1 on padding
    teacher_input_ids, teacher_attention_mask   [B, U] int64
    student_index, teacher_index        [M] int64, indices into [B * T] and [B * U], see `align_with_teacher`
    """

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [self._row(feature) for feature in features]
        width = max(len(row["ids"]) for row in rows)
        teacher_width = max(len(row["teacher_ids"]) for row in rows)

        def pad(name: str, to: int, value: int) -> torch.Tensor:
            return torch.from_numpy(
                np.stack([np.pad(r[name], (0, to - len(r[name])), constant_values=value) for r in rows])
            )

        def mask(name: str, to: int) -> torch.Tensor:
            return torch.from_numpy(np.stack([np.arange(to) < len(r[name]) for r in rows]).astype(np.int64))

        return {
            "input_ids": pad("ids", width, self.pad_token_id),
            "attention_mask": mask("ids", width),
            "step_ids": pad("steps", width, -1),
            "labels": pad("labels", width, -100),
            "teacher_input_ids": pad("teacher_ids", teacher_width, self.pad_token_id),
            "teacher_attention_mask": mask("teacher_ids", teacher_width),
            "student_index": torch.from_numpy(np.concatenate([r["student"] + b * width for b, r in enumerate(rows)])),
            "teacher_index": torch.from_numpy(
                np.concatenate([r["teacher"] + b * teacher_width for b, r in enumerate(rows)])
            ),
        }


class PackedCollator(_StepCollator):
    """Rows packed into one sequence of T tokens, U without markers; M pairs of positions.

    The names are those of transformers' DataCollatorWithFlattening. The same with the prefix `teacher_` describe the
    sequence without markers.

    input_ids, position_ids         [1, T] int64; positions restart with each row
    labels                          [1, T] int64; not shifted, -100 on prompts
    step_ids, seq_idx               [1, T] int32; seq_idx is the number of the row
    cu_seq_lens_q, cu_seq_lens_k    [rows + 1] int32
    max_length_q, max_length_k      int
    student_index, teacher_index    [M] int64, indices into the T and the U tokens, see `align_with_teacher`
    """

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = [self._row(feature) for feature in features]
        batch = self._flat([row["ids"] for row in rows])
        teacher = self._flat([row["teacher_ids"] for row in rows])
        starts, teacher_starts = batch["cu_seq_lens_q"][:-1].tolist(), teacher["cu_seq_lens_q"][:-1].tolist()
        batch |= {
            "labels": torch.from_numpy(np.concatenate([row["labels"] for row in rows]))[None],
            "step_ids": torch.from_numpy(np.concatenate([row["steps"] for row in rows]))[None],
            "student_index": torch.from_numpy(
                np.concatenate([row["student"] + at for row, at in zip(rows, starts, strict=True)])
            ),
            "teacher_index": torch.from_numpy(
                np.concatenate([row["teacher"] + at for row, at in zip(rows, teacher_starts, strict=True)])
            ),
        }
        return batch | {f"teacher_{name}": value for name, value in teacher.items()}

    @staticmethod
    def _flat(rows: Sequence[np.ndarray]) -> dict[str, Any]:
        lengths = [len(row) for row in rows]
        bounds = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
        return {
            "input_ids": torch.from_numpy(np.concatenate(rows))[None],
            "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
            "seq_idx": torch.from_numpy(np.repeat(np.arange(len(rows), dtype=np.int32), lengths))[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
