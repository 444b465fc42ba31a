"""Distils the teacher into a state-transition model: `statecore train` on problems of the demo's task."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import train
from ..adapter import load_adapter
from . import task

RECIPE = Path(__file__).parent / "recipe.yaml"
LONGEST_TRAINED = 12  # steps


def write_training_set(folder: Path, rows: int, seed: int) -> Path:
    """Problems of 2 to LONGEST_TRAINED steps, the same number of each, as a prepared training set."""
    _, starts, ends = task.tokenizer_with_steps()
    generator = torch.Generator().manual_seed(seed)
    lengths = range(2, LONGEST_TRAINED + 1)

    def generate() -> Iterator[dict[str, Any]]:
        for steps in lengths:
            yield from task.training_rows(task.draw(-(-rows // len(lengths)), steps, generator), starts, ends)

    return task.write_training_set(folder, {"train": generate()})


def distil(teacher: Path, output_dir: Path, *, updates: int | None, seed: int) -> PreTrainedModel:
    """Trains with recipe.yaml into output_dir/model, on a training set that it writes to output_dir/training-set."""
    training_set = output_dir / "training-set"
    options = ["--base", str(teacher), "--data", str(training_set), "--output_dir", str(output_dir / "model")]
    options += ["--seed", str(seed)] + ([] if updates is None else ["--max_steps", str(updates)])
    arguments = train.parse(["--config", str(RECIPE), *options])
    write_training_set(training_set, arguments.max_steps * arguments.per_device_train_batch_size, seed)
    return load_adapter(teacher, train.train(arguments), dtype=torch.float32)
