"""`statecore ssd`: trains an SSD model in phases, from open chains of thought to harder synthetic problems.
(arXiv 2505.22425)

Phases and evaluations come from a recipe (recipe.py), training rows from its sources (rows.py); transformers' Trainer
does the training. Updates whose gradient is not finite are skipped and counted, as the paper's code skips such batches.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ..outputs import write_json, write_text
from ..traces import RowProblem
from ..train import MuonAndAdamW
from .evaluation import greedy_answers, held_out_loss
from .model import SSDConfig, SSDForCausalLM
from .recipe import Phase, Recipe, argument_error, read_recipe
from .report import draw_curriculum, report_table
from .rows import RowEncoder, make_tokenizer, rows_of

# ----------------------------------------------------------------------------------------------------------------------
# Model and trainer


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
    of_tokenizer = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    return SSDForCausalLM(SSDConfig(**(of_tokenizer | given))).to(getattr(torch, dtype))


class SkipNonFinite(TrainerCallback):
    """Skips updates whose gradient is not finite."""

    def __init__(self):
        self.skipped = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            self.skipped += 1
            model.zero_grad(set_to_none=True)


class CurriculumTrainer(Trainer):
    """transformers' Trainer; with `muon_learning_rate`, Muon for the layers' matrices and AdamW for the rest."""

    muon_learning_rate: float | None = None

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.muon_learning_rate is not None:
            trainable = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
            matrices = [p for name, p in trainable if name.endswith("_proj.weight")]
            others = [p for name, p in trainable if not name.endswith("_proj.weight")]
            decay, betas = self.args.weight_decay, (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = MuonAndAdamW(
                matrices,
                others,
                muon={"lr": self.muon_learning_rate, "weight_decay": decay},
                adamw={"lr": self.args.learning_rate, "weight_decay": decay, "betas": betas},
            )
        return super().create_optimizer(model)


# ----------------------------------------------------------------------------------------------------------------------
# Curriculum


@dataclass(frozen=True)
class Run:
    """What training on some phases, one after the other, gave. `training` and `history` are those of the last phase."""

    phases: tuple[str, ...]
    folder: str | None  # of the saved model; None before any training
    training: dict[str, Any]
    history: list[dict[str, Any]]  # the Trainer's log
    evaluation: dict[str, dict[str, Any]]  # by name


class Curriculum:
    """The phases of a recipe, trained in any selection. Selections that begin with the same phases share their runs."""

    def __init__(self, recipe: Recipe, output_dir: Path, cache_dir: Path, seed: int, say: Callable[[str], Any] = print):
        self.recipe, self.output_dir, self.seed, self.say = recipe, output_dir, seed, say
        self.tokenizer = make_tokenizer(recipe)
        self.encoder = RowEncoder(self.tokenizer, recipe.prompt_format, recipe.max_tokens, recipe.too_long, cache_dir)
        mixtures = {phase.name: self.encoder.mixture(phase, seed) for phase in recipe.phases}
        self.train_rows = {name: rows for name, (rows, _) in mixtures.items()}
        self.left_out = {name: dict(counts) for name, (_, counts) in mixtures.items()}
        self.held_out = [(evaluation, self.encoder.dataset(evaluation)[0]) for evaluation in recipe.evaluation]
        self.runs: dict[tuple[str, ...], Run] = {}

    def run(self, phases: tuple[str, ...]) -> Run:
        """Trains the named phases one after the other and evaluates the result."""
        if phases not in self.runs:
            self.runs[phases] = self._train(phases) if phases else self._untrained()
        return self.runs[phases]

    def _untrained(self) -> Run:
        model = make_model(self.recipe, self.tokenizer, self.seed)
        return Run((), None, {}, [], self._evaluate(model, ()))

    def _train(self, phases: tuple[str, ...]) -> Run:
        """Trains the last of `phases` on top of a run of those before it."""
        start = self.run(phases[:-1])
        if start.folder is None:
            model = make_model(self.recipe, self.tokenizer, self.seed)
        else:
            model = SSDForCausalLM.from_pretrained(start.folder, dtype="auto")
        rows, skip = self.train_rows[phases[-1]], SkipNonFinite()
        self.say(f"{' + '.join(phases)}: {len(rows):,} rows, {sum(rows['length']):,} tokens")
        trainer = self._trainer(model, phases[-1], skip)
        result = trainer.train()
        folder = self.output_dir / "-".join(slug(phase) for phase in phases)
        save_model(trainer, folder, self.tokenizer)
        with suppress(OSError):  # they stay where the recipe asks for checkpoints
            Path(trainer.args.output_dir).rmdir()
            Path(trainer.args.output_dir).parent.rmdir()
        return Run(
            phases,
            str(folder),
            result.metrics | {"skipped_updates": skip.skipped, "rows": len(rows)},
            [entry for entry in trainer.state.log_history if "loss" in entry],
            self._evaluate(trainer.accelerator.unwrap_model(trainer.model), phases),
        )

    def _trainer(self, model: SSDForCausalLM, name: str, skip: SkipNonFinite) -> CurriculumTrainer:
        index = [phase.name for phase in self.recipe.phases].index(name)
        if self.recipe.packed:
            collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        else:
            collator = DataCollatorForSeq2Seq(self.tokenizer, padding=True)
        trainer = CurriculumTrainer(
            model=model, args=self._training_arguments(self.recipe.phases[index], self.seed + index),
            train_dataset=self.train_rows[name].remove_columns("length"), data_collator=collator,
            processing_class=self.tokenizer, callbacks=[skip],
        )  # fmt: skip
        trainer.muon_learning_rate = self.recipe.muon_learning_rate
        return trainer

    def _training_arguments(self, phase: Phase, seed: int) -> TrainingArguments:
        defaults = {
            "output_dir": str(self.output_dir / "checkpoints" / slug(phase.name)),
            "report_to": "none",
            "save_strategy": "no",
            "seed": seed,
            "remove_unused_columns": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        try:
            return TrainingArguments(**(defaults | self.recipe.training | phase.training))
        except (TypeError, ValueError) as error:
            raise ValueError(f"training of phase {phase.name!r}: {argument_error(error)}") from error

    def _evaluate(self, model: SSDForCausalLM, phases: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """Figures of each evaluation; an untrained model is not asked for answers."""
        model = model.eval()
        evaluation = {}
        for setting, rows in self.held_out:
            found: dict[str, Any] = {"rows": len(rows), "loss": held_out_loss(model, rows)}
            if setting.answers and phases:
                problems = [row for row in rows_of(setting) if not isinstance(row, RowProblem)]
                found |= asdict(greedy_answers(model, self.encoder, problems, setting.max_new_tokens))
            evaluation[setting.name] = found
            shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items() if name != "rows")
            self.say(f"{' + '.join(phases) or 'before training'}: {setting.name}: {shown}")
        return evaluation


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def save_model(trainer: Trainer, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes model and tokenizer into a hidden neighbour, which replaces `folder` once it is complete."""
    # All processes of a distributed run must name the same folder.
    working = folder.with_name(f".{folder.name}.{os.environ.get('MASTER_PORT', os.getpid())}.partial")
    trainer.save_model(str(working))
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(working)
        shutil.rmtree(folder, ignore_errors=True)
        working.rename(folder)
    trainer.accelerator.wait_for_everyone()


# ----------------------------------------------------------------------------------------------------------------------
# Command


def ssd(recipe: Path, *, output_dir: Path = Path("statecore-ssd"), ablate: bool = False, seed: int = 0) -> Path:
    """Train an SSD model in phases, as a recipe says, and evaluate it after each.

    Writes the model of every phase, report.json, report.md and curriculum.png. The last model is a transformers
    checkpoint: `generate()` and, where it has no attention layers, Mamba2ForCausalLM take it as it is.

    Args:
        recipe: a YAML file; recipes/ssd-tiny.yaml trains in minutes on a CPU.
        output_dir: folder that everything is written to.
        ablate: train without each phase, too, and compare.
        seed: of new weights, sampling and order.
    """
    parsed, output_dir = read_recipe(recipe), Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    record = run_recipe(parsed, output_dir, ablate=ablate, seed=seed, say=typer.echo)
    typer.echo(f"{report_table(record)}\nThe model is in {record['runs'][-1]['folder']}, the report in {output_dir}")
    return output_dir


def run_recipe(
    recipe: Recipe, output_dir: Path, *, ablate: bool, seed: int, say: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Trains and evaluates; the record of all runs, which report.json holds too, with the full curriculum last."""
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".rows-") as cache_dir:
        curriculum = Curriculum(recipe, output_dir, Path(cache_dir), seed, say)
        selections = select_phases([phase.name for phase in recipe.phases], ablate)
        runs = [asdict(curriculum.run(phases)) for phases in selections]
    model = SSDForCausalLM.from_pretrained(runs[-1]["folder"])
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "left_out": curriculum.left_out,
        "runs": runs,
    }
    write_json(output_dir / "report.json", record)
    write_text(output_dir / "report.md", f"# Curriculum\n\n{report_table(record)}\n\n![curriculum](curriculum.png)\n")
    draw_curriculum(record, output_dir / "curriculum.png")
    return record


def select_phases(phases: list[str], ablate: bool) -> list[tuple[str, ...]]:
    """The selections to run: none; with `ablate` all phases but one, for each; the first, the first two, ... phases."""
    selections: list[tuple[str, ...]] = [()]
    if ablate and len(phases) > 1:
        selections += [tuple(name for name in phases if name != left_out) for left_out in reversed(phases)]
    selections += [tuple(phases[: i + 1]) for i in range(len(phases))]
    return list(dict.fromkeys(selections))
