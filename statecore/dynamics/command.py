"""`statecore dynamics`: `record` measures the states of a model while it reads; `prune` uses that to make a model with
fewer heads; `lower` makes one with states of lower rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, Mamba2Config, PreTrainedModel

from ..adapter import is_adapter, save_adapter
from ..data import PATTERNS_FILE
from ..loading import ModelOptions, load_causal_lm
from ..outputs import new_folder, write_json
from ..segmentation import StepOptions, TransitionOptions
from ..ssd import SSDForCausalLM
from . import recording
from .comparison import compare, side_of_the_asymmetry
from .pruning import (
    LowerOptions,
    Order,
    PruneOptions,
    branches,
    choose_bases,
    choose_heads,
    head_scores,
    key_covariances,
    lower_ranks,
    prune_heads,
)
from .recording import Head, RecordOptions, Trajectory
from .report import draw_heads, draw_spectra, draw_trajectories, draw_variants, dynamics_text, variants_text
from .summary import summarise
from .texts import Text, TextOptions, hold_out, read_texts

RECORD_FILE, PRUNING_FILE = "dynamics.json", "pruning.json"

# ----------------------------------------------------------------------------------------------------------------------
# statecore dynamics record


def record(
    model: str,
    text: str,
    output_dir: str | Path,
    *,
    measuring: RecordOptions = RecordOptions(),
    loading: ModelOptions = ModelOptions(),
    reading: TextOptions = TextOptions(),
    steps: StepOptions = StepOptions(),
    transitions: TransitionOptions = TransitionOptions(),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Record rank and norm of a model's linear-attention states while it reads, over tokens and at step ends.

    Writes pictures of the heads, their trajectories and spectra, each with its JSON, trajectories.npz with those of all
    inputs, dynamics.json and a report. The model is not changed; no state is kept.

    Args:
        model: a state-transition checkpoint or adapter, an SSD model, or one of transformers' with recurrent states of
            one matrix per head (Mamba2, Qwen3-Next, ...).
        text: a text file, a .jsonl, .jsonl.gz or .parquet file, a hub dataset, or a prepared training set.
        output_dir: the folder to write; it appears when everything is written.
        dtype: what the model computes in; states in half precision have no honest rank.
        overwrite: replace an existing folder of this kind.
    """
    with new_folder(output_dir, overwrite, marker=RECORD_FILE) as folder:
        language = load_causal_lm(model, loading.base, loading.dtype)
        texts = read_texts(text, language, loading.tokenizer or model, reading, steps, transitions)
        trajectories = record_texts(language, texts, measuring)
        settings = {"model": model, "text": text, "dtype": loading.dtype, "epsilon": measuring.epsilon}
        result = {"settings": settings} | summarise(trajectories)
        report = _write_recording(folder, trajectories, result)
    print(report)
    return result


def record_texts(
    model: PreTrainedModel, texts: Sequence[Text], options: RecordOptions = RecordOptions()
) -> list[Trajectory]:
    return [
        recording.record(model, text.tokens, name=text.name, step_ends=text.step_ends, **vars(options))
        for text in tqdm(texts, desc="recording", unit="text")
    ]


def _write_recording(folder: Path, trajectories: Sequence[Trajectory], result: Mapping[str, Any]) -> str:
    """Writes all files of a recording; returns the report."""
    write_json(folder / RECORD_FILE, result)
    draw_heads(folder / "heads.png", result)
    draw_trajectories(folder / "trajectories.png", trajectories[0])
    draw_spectra(folder / "spectra.png", trajectories[0], result["settings"]["epsilon"])
    arrays = {}
    for i, trajectory in enumerate(trajectories):
        arrays |= {f"{i}/positions": trajectory.positions, f"{i}/is_step_end": trajectory.is_step_end}
        arrays |= {f"{i}/{measure}": values for measure, values in trajectory.values.items()}
    np.savez_compressed(folder / "trajectories.npz", **arrays)
    report = dynamics_text(result)
    (folder / "report.md").write_text(report, encoding="utf-8")
    return report


# ----------------------------------------------------------------------------------------------------------------------
# statecore dynamics prune, lower


def prune(
    model: str,
    text: str,
    output_dir: str | Path,
    *,
    pruning: PruneOptions = PruneOptions(),
    heldout: str | None = None,
    loading: ModelOptions = ModelOptions(),
    reading: TextOptions = TextOptions(),
    steps: StepOptions = StepOptions(),
    transitions: TransitionOptions = TransitionOptions(),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Prune state heads by joint rank and norm, without training, beside random and reverse pruning of the same budget.

    Writes the pruned model, what it and its rivals cost and save on held-out text (pruning.json, pruning.png), and a
    report. Heads are gone for good: less state, less time, a smaller checkpoint, which loads like any other.

    Args:
        model: a state-transition checkpoint or adapter, an SSD model or a Mamba2 checkpoint.
        text: what heads are judged by: a text file, a .jsonl, .jsonl.gz or .parquet file, a hub dataset, or a prepared
            training set.
        output_dir: the folder to write; it appears when everything is written, the model in its folder `model`.
        heldout: texts that the models are compared on; default: the last fifth of `text`, which then judges no head.
        dtype: what the models compute in and are written in.
        overwrite: replace an existing folder of this kind.
    """
    with new_folder(output_dir, overwrite, marker=PRUNING_FILE) as folder:
        subject = _load_subject(model, text, heldout, loading, reading, steps, transitions)
        heads, scores = head_scores(record_texts(subject.model, subject.calibration), pruning.alpha, pruning.scope)
        kept = _head_choices(heads, scores, pruning)
        variants = {name: prune_heads(subject.model, chosen) for name, chosen in kept.items()}
        rows = subject.compare(variants)
        saved = "random 1" if pruning.by == "random" else pruning.by
        _save_model(variants[saved], model, folder / "model")
        settings = {"model": model, "text": text, "heldout": heldout}
        settings |= {name: getattr(pruning, name) for name in ("keep", "by", "alpha", "scope", "seed")}
        result = {
            "settings": settings,
            "heads": [
                {"layer": head.layer, "head": head.head, "score": float(score)}
                for head, score in zip(heads, scores, strict=True)
            ],
            "kept": {name: {str(layer): which for layer, which in chosen.items()} for name, chosen in kept.items()},
            "rows": rows,
            "asymmetry": side_of_the_asymmetry(rows),
        }
        title = f"# Pruning state heads: {pruning.keep:.0%} stay"
        report = _write_comparison(folder, result, title, [result["asymmetry"], "", f"Saved: {saved}."])
    print(report)
    return result


def _head_choices(heads: Sequence[Head], scores: np.ndarray, options: PruneOptions) -> dict[str, dict[int, list[int]]]:
    """The heads kept by each variant, layer by layer."""

    def choose(by: Order, seed: int = 0) -> dict[int, list[int]]:
        return choose_heads(heads, scores, options.keep, by, seed)

    draws = {f"random {i + 1}": choose("random", options.seed + i) for i in range(max(options.draws, 1))}
    return {"joint": choose("joint"), "reverse": choose("reverse"), **draws}


def lower(
    model: str,
    text: str,
    output_dir: str | Path,
    *,
    lowering: LowerOptions = LowerOptions(),
    heldout: str | None = None,
    loading: ModelOptions = ModelOptions(),
    reading: TextOptions = TextOptions(),
    steps: StepOptions = StepOptions(),
    transitions: TransitionOptions = TransitionOptions(),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Lower the rank of every head's state, without training, beside random and reverse directions of the same budget.

    Writes the model with narrower states, what it and its rivals cost and save on held-out text (pruning.json,
    pruning.png), and a report.

    Args:
        model: a state-transition checkpoint or adapter, an SSD model or a Mamba2 checkpoint.
        text: what directions are found with: a text file, a .jsonl, .jsonl.gz or .parquet file, a hub dataset, or a
            prepared training set.
        output_dir: the folder to write; it appears when everything is written, the model in its folder `model`.
        heldout: texts that the models are compared on; default: the last fifth of `text`, not used otherwise then.
        dtype: what the models compute in and are written in.
        overwrite: replace an existing folder of this kind.
    """
    with new_folder(output_dir, overwrite, marker=PRUNING_FILE) as folder:
        subject = _load_subject(model, text, heldout, loading, reading, steps, transitions)
        covariances = key_covariances(subject.model, [text.tokens for text in subject.calibration])
        variants = {
            directions: lower_ranks(subject.model, choose_bases(covariances, lowering.keep, directions, lowering.seed))
            for directions in ("leading", "trailing", "random")
        }
        rows = subject.compare(variants)
        _save_model(variants[lowering.by], model, folder / "model")
        settings = {"model": model, "text": text, "heldout": heldout, **vars(lowering)}
        result = {"settings": settings, "state_ranks": variants[lowering.by].config.state_ranks, "rows": rows}
        title = f"# States of lower rank: {lowering.keep:.0%} of the width"
        report = _write_comparison(folder, result, title, [f"Saved: {lowering.by}."])
    print(report)
    return result


@dataclass(frozen=True)
class _Subject:
    """A model to be made smaller, texts to calibrate with, and held-out texts to compare on."""

    model: PreTrainedModel
    calibration: list[Text]
    held_out: list[Text]

    def compare(self, variants: Mapping[str, PreTrainedModel]) -> list[dict[str, Any]]:
        return compare(self.model, variants, [text.tokens for text in self.held_out], self.held_out[0].tokens[:64])


def _load_subject(
    model: str,
    text: str,
    heldout: str | None,
    loading: ModelOptions,
    reading: TextOptions,
    steps: StepOptions,
    transitions: TransitionOptions,
) -> _Subject:
    language = load_causal_lm(model, loading.base, loading.dtype, model_class=_prunable_class(model))
    branches(language)  # refuses models that cannot be pruned before any text is read

    def read(source: str) -> list[Text]:
        return read_texts(source, language, loading.tokenizer or model, reading, steps, transitions)

    if heldout is None:
        return _Subject(language, *hold_out(read(text)))
    return _Subject(language, read(text), read(heldout))


def _prunable_class(model: str) -> type:
    """Our SSD model for transformers' Mamba2 checkpoints, whose own class cannot be pruned; else the checkpoint's."""
    is_mamba2 = not is_adapter(model) and AutoConfig.from_pretrained(model).model_type == Mamba2Config.model_type
    return SSDForCausalLM if is_mamba2 else AutoModelForCausalLM


def _save_model(variant: PreTrainedModel, source: str, folder: Path) -> None:
    """Saves a checkpoint (an adapter if the source is one) with the tokenizer and prompt format of its source."""
    if is_adapter(source):
        save_adapter(variant, folder)
    else:
        variant.save_pretrained(folder)
    if (Path(source) / "tokenizer").is_dir():
        shutil.copytree(Path(source) / "tokenizer", folder / "tokenizer")
    for name in (PATTERNS_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)


def _write_comparison(folder: Path, result: Mapping[str, Any], title: str, remarks: Sequence[str]) -> str:
    """Writes pruning.json, its picture and the report; returns the report."""
    write_json(folder / PRUNING_FILE, result)
    draw_variants(folder / "pruning.png", result["rows"])
    report = variants_text(title, result["rows"], remarks)
    (folder / "report.md").write_text(report, encoding="utf-8")
    return report
