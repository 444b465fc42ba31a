"""Distillation of a model into its own state-transition form (arXiv 2602.01198; what it leaves open is an option).

The student reads the chain of thought with step tokens, segments and state; the teacher is the same weights with full
attention on the same text without step tokens. They are compared where both predict the same ordinary token
(losses.py). Only the linear branches and the step token rows are trained, with `lora_rank` > 0 also LoRA factors on the
base's projections.

    statecore train --config recipes/qwen2.5-1.5b.yaml --data training-set --learning_rate 2e-4
    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml -m statecore.train --config ...
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from . import adapter
from .data import PATTERNS_FILE, PackedCollator, PaddedCollator, Prepared, load_prepared
from .losses import distillation_losses
from .settings import read_yaml

logger = logging.get_logger(__name__)


@dataclass
class TrainArguments(TrainingArguments):
    """Arguments of `statecore train`, typed or in a YAML file: all of transformers.TrainingArguments, and these."""

    base: str | None = field(default=None, metadata={"help": "Base checkpoint: a path or a hub name."})
    data: str | None = field(default=None, metadata={"help": "Folder written by `statecore prepare`."})
    model_dtype: str = field(default="auto", metadata={"help": "dtype of the frozen base: auto, float32, bfloat16 ..."})
    beta: float = field(default=1.0, metadata={"help": "Weight of the distillation loss; 0: labels alone, no teacher."})
    packed: bool = field(
        default=False, metadata={"help": "Pack the sequences of a batch into one row, without padding."}
    )
    max_tokens: int | None = field(default=None, metadata={"help": "Leave out rows with more tokens than this."})
    loss_chunk: int = field(default=1024, metadata={"help": "Tokens whose logits are in memory at the same time."})
    la_rank: int = field(default=128, metadata={"help": "Rank of the linear branch's factors."})
    la_projection: str = field(default="base_plus_low_rank", metadata={"help": "base_plus_low_rank or low_rank."})
    la_rope: bool = field(default=True, metadata={"help": "Rotate the linear branch's queries and keys by position."})
    la_gate: bool = field(default=True, metadata={"help": "Sigmoid gate on the linear branch's output."})
    la_norm: bool = field(default=False, metadata={"help": "RMSNorm on the linear branch's output."})
    alpha_max: float = field(default=0.4, metadata={"help": "Largest correction of a state; 0 switches it off."})
    alpha_steps: int = field(default=40, metadata={"help": "Steps over which the correction would grow to 1."})
    muon_learning_rate: float | None = field(
        default=None, metadata={"help": "Train matrices with Muon at this rate, the rest with AdamW at learning_rate."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA on the base's projections (peft); 0 for none."})
    lora_alpha: float = field(default=16.0, metadata={"help": "LoRA is scaled by lora_alpha / lora_rank."})
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"],
        metadata={"help": "Names of the projections that get LoRA."},
    )
    # Arguments of transformers with other defaults.
    output_dir: str | None = field(
        default="statecore-train", metadata={"help": "Folder for checkpoints and the adapter."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collators read every column."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Logits of whole batches are never kept."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint folder, or `last` for the newest one in output_dir."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.beta < 0:
            raise ValueError(f"beta must be >= 0, got {self.beta}")
        if self.loss_chunk < 1:
            raise ValueError(f"loss_chunk must be >= 1, got {self.loss_chunk}")

    @property
    def step_fields(self) -> dict[str, Any]:
        """The fields of StepConfig that training sets."""
        names = ("la_rank", "la_projection", "la_rope", "la_gate", "la_norm", "alpha_max", "alpha_steps")
        return {name: getattr(self, name) for name in names}


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon on matrices, the only parameters it takes, and AdamW on the others, as one optimizer.

    muon, adamw: arguments of torch.optim.Muon and torch.optim.AdamW. A schedule scales both learning rates.
    """

    def __init__(
        self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], *, muon: dict[str, Any],
        adamw: dict[str, Any],
    ):  # fmt: skip
        self.parts = (torch.optim.Muon(matrices, **muon), torch.optim.AdamW(others, **adamw))
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        """The parts' own groups, not copies: the parts must read what a schedule writes into them."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()


# ----------------------------------------------------------------------------------------------------------------------
# Trainer


class StateCoreTrainer(Trainer):
    """Trains a state-transition model against itself with full attention; logs `ar` and `kl` per token beside `loss`.

    The model is a state-transition model or a PeftModel around one (see `with_lora`). Checkpoints hold the adapter
    without the base, which never changes and takes 15 GB at 7B parameters.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by num_items_in_batch, which counts all accumulated batches

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True
        self.sums = {part: torch.zeros(4, dtype=torch.float64) for part in ("train", "eval")}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.args.muon_learning_rate is not None:
            trained = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
            matrices = [p for name, p in trained if p.ndim == 2 and not name.endswith("step_weight")]
            others = [p for name, p in trained if p.ndim != 2 or name.endswith("step_weight")]
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = MuonAndAdamW(
                matrices,
                others,
                muon={"lr": self.args.muon_learning_rate, "weight_decay": self.args.weight_decay},
                adamw={"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay, "betas": betas},
            )
        return super().create_optimizer(model)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict]:  # fmt: skip
        """Sum of AR + beta * KL over the batch, divided by the number of predicted tokens."""
        own, teacher = split_inputs(inputs)
        state_model = state_transition_model(self.accelerator.unwrap_model(model))
        alignment: dict[str, Tensor] = {}
        if self.args.beta > 0:
            with torch.no_grad(), as_teacher(self.accelerator.unwrap_model(model)):
                alignment["teacher_hidden"] = last_hidden_state(model, state_model, teacher)
            alignment |= {name: inputs[name] for name in ("student_index", "teacher_index")}
        hidden = last_hidden_state(model, state_model, own)
        losses = distillation_losses(
            state_model, hidden, inputs["labels"], **alignment, beta=self.args.beta, chunk=self.args.loss_chunk
        )
        counts = (losses.ar.item(), losses.predicted, losses.kl.item(), losses.compared)
        self.sums["train" if model.training else "eval"] += torch.tensor(counts, dtype=torch.float64)
        if num_items_in_batch is None:
            loss = losses.total / max(losses.predicted, 1)
        else:
            loss = losses.total / num_items_in_batch
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                loss = loss * self.accelerator.num_processes  # DDP averages gradients; the count is global
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        part, prefix = ("eval", "eval_") if "eval_loss" in logs else ("train", "")
        if f"{prefix}loss" in logs:
            sums = self.accelerator.reduce(self.sums[part].float().to(self.args.device), "sum").tolist()
            self.sums[part].zero_()
            logs[f"{prefix}ar"], logs[f"{prefix}kl"] = sums[0] / max(sums[1], 1), sums[2] / max(sums[3], 1)
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes adapter, tokenizer and arguments; called by transformers wherever it would write a model."""
        folder = Path(output_dir or self.args.output_dir)
        save_trained(self.accelerator.unwrap_model(self.model), folder, state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Called on resuming; transformers restores optimizer, schedule and data position by itself."""
        load_trained(self.accelerator.unwrap_model(self.model if model is None else model), resume_from_checkpoint)


def split_inputs(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A collator's batch -> arguments of the student's and of the teacher's forward."""
    names = ("input_ids", "attention_mask", "position_ids", "seq_idx", "cu_seq_lens_q")
    own = {name: inputs[name] for name in ("step_ids", *names) if name in inputs}
    teacher = {name: inputs[f"teacher_{name}"] for name in names if f"teacher_{name}" in inputs}
    return own, teacher


def last_hidden_state(model: nn.Module, state_model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """[B, T, D] before the output head, captured in a forward of the whole model, which DDP and FSDP require."""
    captured = []
    hook = state_model.model.register_forward_hook(lambda _module, _inputs, out: captured.append(out.last_hidden_state))
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return captured[0]


def state_transition_model(model: nn.Module) -> PreTrainedModel:
    """The model itself, or the one inside a PeftModel."""
    return model.get_base_model() if _is_peft(model) else model


@contextmanager
def as_teacher(model: nn.Module):
    """Inside, the model is the base it was made from: full attention, no LoRA."""
    with ExitStack() as stack:
        stack.enter_context(state_transition_model(model).full_attention())
        if _is_peft(model):
            stack.enter_context(model.disable_adapter())
        yield


# ----------------------------------------------------------------------------------------------------------------------
# LoRA and files


def with_lora(model: PreTrainedModel, *, rank: int, alpha: float, targets: Sequence[str]) -> nn.Module:
    """A PeftModel with LoRA on the base's projections `targets`; linear branches and step token rows stay trainable."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'statecore[lora]'") from error
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), modules_to_save=["la"], task_type="CAUSAL_LM"
    )
    tuned = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if name.endswith("step_weight"):
            parameter.requires_grad_(True)
    return tuned


def save_trained(model: nn.Module, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Writes the adapter and, for a PeftModel, peft's own files beside it. The whole trained model is then

    PeftModel.from_pretrained(load_adapter(base, folder), folder)
    """
    if not _is_peft(model):
        adapter.save_adapter(model, folder, state_dict)
        return
    plain = None
    if state_dict is not None:
        plain = {
            name.removeprefix("base_model.model.").replace(".modules_to_save.default.", "."): tensor
            for name, tensor in state_dict.items()
        }
    with _trained_branches(model) as inner:
        adapter.save_adapter(inner, folder, plain)
    model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)


def load_trained(model: nn.Module, folder: str | Path) -> None:
    """Loads what `save_trained` wrote into a model of the same structure."""
    if not _is_peft(model):
        adapter.load_adapter_weights(model, folder)
        return
    with _trained_branches(model) as inner:
        adapter.load_adapter_weights(inner, folder)
    model.load_adapter(str(folder), model.active_adapter, is_trainable=True)


@contextmanager
def _trained_branches(tuned: nn.Module):
    """The model inside a PeftModel, without peft's wrappers around the linear branches, which change weight names."""
    model = tuned.get_base_model()
    wrappers = [layer.self_attn.la for layer in model.model.layers]
    for layer, wrapper in zip(model.model.layers, wrappers, strict=True):
        layer.self_attn.la = wrapper.modules_to_save[tuned.active_adapter]
    try:
        yield model
    finally:
        for layer, wrapper in zip(model.model.layers, wrappers, strict=True):
            layer.self_attn.la = wrapper


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "get_base_model")


# ----------------------------------------------------------------------------------------------------------------------
# Command


def train(arguments: TrainArguments) -> Path:
    """Trains, and returns `output_dir`, which then holds a report and everything that `statecore generate` needs."""
    for name in ("base", "data"):
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name} is missing. {TrainArguments.__dataclass_fields__[name].metadata['help']}")
    prepared = load_prepared(arguments.data)
    model = adapter.convert(
        arguments.base,
        step_start_token_ids=prepared.step_start_token_ids,
        step_end_token_ids=prepared.step_end_token_ids,
        seed=arguments.seed,
        dtype=arguments.model_dtype,
        **arguments.step_fields,
    )
    trainer = make_trainer(model, prepared, arguments)
    resume = arguments.resume_from_checkpoint
    if resume == "last":
        resume = get_last_checkpoint(arguments.output_dir)
        if resume is None:
            raise FileNotFoundError(f"there is no checkpoint in {arguments.output_dir} to resume from")
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        report = {"metrics": result.metrics, "history": trainer.state.log_history}
        (Path(arguments.output_dir) / "train_report.json").write_text(json.dumps(report, indent=2) + "\n")
        shutil.copyfile(Path(arguments.data) / PATTERNS_FILE, Path(arguments.output_dir) / PATTERNS_FILE)
    return Path(arguments.output_dir)


def make_trainer(
    model: PreTrainedModel, prepared: Prepared, arguments: TrainArguments, **more: Any
) -> StateCoreTrainer:
    """A trainer for a converted model and a training set; `more` goes to transformers.Trainer (callbacks ...)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # bfloat16 would round small updates away
    if arguments.lora_rank > 0:
        model = with_lora(model, rank=arguments.lora_rank, alpha=arguments.lora_alpha, targets=arguments.lora_targets)
    collator = PackedCollator if arguments.packed else PaddedCollator
    return StateCoreTrainer(
        model=model,
        args=arguments,
        train_dataset=_without_long_rows(prepared.train, arguments.max_tokens),
        eval_dataset=None if prepared.eval is None else _without_long_rows(prepared.eval, arguments.max_tokens),
        data_collator=collator.of(prepared),
        processing_class=prepared.tokenizer,
        **more,
    )


def _without_long_rows(rows: Dataset, longest: int | None) -> Dataset:
    if longest is None:
        return rows
    kept = rows.filter(lambda row: len(row["input_ids"]) <= longest)
    if len(kept) < len(rows):
        logger.warning(f"{len(rows) - len(kept)} of {len(rows)} rows have more than {longest} tokens and are left out")
    if not len(kept):
        raise ValueError(f"no row has at most max_tokens = {longest} tokens")
    return kept


def parse(command_line: Sequence[str]) -> TrainArguments:
    """Arguments from `--config FILE.yaml`, if given, and from the command line, which takes precedence."""
    command_line, from_file = list(command_line), []
    if "--config" in command_line:
        at = command_line.index("--config")
        if at + 1 == len(command_line):
            raise ValueError("--config needs the name of a YAML file")
        from_file = _as_options(Path(command_line[at + 1]))
        del command_line[at : at + 2]
    (arguments,) = HfArgumentParser(TrainArguments).parse_args_into_dataclasses([*from_file, *command_line])
    return arguments


def _as_options(recipe: Path) -> list[str]:
    """A YAML file as command-line options, to be checked and converted like those."""
    values = read_yaml(recipe, {argument.name for argument in fields(TrainArguments)})
    options = []
    for name, value in values.items():
        if isinstance(value, dict):
            options += [f"--{name}", json.dumps(value)]
        elif isinstance(value, list):
            options += [f"--{name}", *map(str, value)]
        elif value is not None:
            options += [f"--{name}", str(value)]
    return options


def main(command_line: Sequence[str] | None = None) -> None:
    """`statecore train --config FILE.yaml --option value ...`"""
    train(parse(sys.argv[1:] if command_line is None else command_line))


if __name__ == "__main__":
    main()
