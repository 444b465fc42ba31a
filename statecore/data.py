"""The training set: how its rows read, and batches of them with the teacher's alignment.

A row of the folder that `statecore prepare` writes reads

    prompt | <|step_i|> step 1 <|/step_i|> <|step_j|> step 2 <|/step_j|> ... | end of thinking, answer, end of sequence

with step id 0 for the prompt, 1..n for the steps (their markers included) and n + 1 for the rest. The text was
tokenised once, as a whole and without markers, and the markers stand between two of its tokens: without them a row is
token by token what the teacher reads.
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

PATTERNS_FILE = "patterns.json"  # thinking patterns, their tokens, and how prompts are put together


@dataclass(frozen=True)
class PromptFormat:
    """How the text of a row is put together; `statecore generate` builds its prompts with the same."""

    template: str | None = None  # with {prompt} in it; None: the tokenizer's chat template
    think_open: str = "<think>\n"
    think_close: str = "\n</think>\n\n"

    def prompt_text(self, tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
        """Everything before the thinking. A chat template that opens the thinking itself is left as it is."""
        if self.template is None:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        else:
            text = self.template.replace("{prompt}", "\n".join(message["content"] for message in messages))
        opening = self.think_open.strip()
        return text if opening and text.rstrip().endswith(opening) else text + self.think_open


@dataclass(frozen=True)
class PromptOptions:
    """A prompt format as a command takes it: what is None is as the command knows it already.

    Args:
        template: a text with {prompt} in it; default: the tokenizer's chat template.
        think_open, think_close: what stands around the thinking.
    """

    template: str | None = field(default=None, metadata={"option": "prompt_template"})
    think_open: str | None = None
    think_close: str | None = None

    def __post_init__(self):
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError(f"prompt_template: expected {{prompt}} in it, got {self.template!r}")

    def given(self) -> dict[str, str]:
        """The fields of a PromptFormat that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Prepared:
    """A training set as `prepare` wrote it."""

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
    """Reads the folder that `statecore prepare` wrote."""
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
    """The teacher's tokens and the pairs of positions at which student and teacher predict the same ordinary token.

    The teacher reads the row without its markers. For each ordinary token x behind the prompt, at the student's
    position p + 1, there is one pair: the student's position p, and the teacher's position of the last ordinary token
    before x. So for the first token after a marker the student's input is that marker, and the teacher's is the
    ordinary token before the marker (before both, where a step ends and the next begins). Where the student's next
    token is a marker there is no pair: the teacher has no opinion, and that position learns from the labels alone. A
    row's first token has no pair either, as nothing predicts it.

    input_ids `[T]`, is_marker bool `[T]`. Returns `teacher_ids` `[U]`, `student_positions` and `teacher_positions`
    `[M]`, both increasing.
    """
    ordinary = ~is_marker
    teacher_position = np.cumsum(ordinary) - 1  # of the ordinary token at a student's position
    targets = np.flatnonzero(ordinary)
    targets = targets[(targets >= prompt_length) & (teacher_position[targets] >= 1)]
    return input_ids[ordinary], targets - 1, teacher_position[targets] - 1


class _StepCollator:
    """What both collators share: markers, labels and the alignment of single rows."""

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
        labels[: max(prompt, 1)] = -100  # nothing in its own row predicts a row's first token
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
    """Rows side by side, padded at the end. B rows, T and U the longest with and without markers, M compared positions.

    input_ids, attention_mask, labels   [B, T] int64; labels are not shifted, -100 on prompt and padding
    step_ids                            [B, T] int32, -1 on padding
    teacher_input_ids, teacher_attention_mask   [B, U] int64
    student_index, teacher_index        [M] int64 into the flattened [B * T] and [B * U]: see `align_with_teacher`
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
    """Rows one behind the other in one sequence of N tokens, N' without markers; M compared positions.

    The names are those of transformers' DataCollatorWithFlattening; the same with `teacher_` before them describe the
    sequence without markers.

    input_ids, position_ids         [1, N] int64; positions start again with each row
    labels                          [1, N] int64; not shifted, -100 on prompts
    step_ids, seq_idx               [1, N] int32; seq_idx is the number of the row
    cu_seq_lens_q, cu_seq_lens_k    [rows + 1] int32
    max_length_q, max_length_k      int
    student_index, teacher_index    [M] int64 into the N and the N' tokens: see `align_with_teacher`
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
