"""Distillation: the chunked loss, what learns and what stays, exact resume, LoRA through peft, recipes, options."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

from statecore import train
from statecore.adapter import convert, load_adapter
from statecore.data import PackedCollator, PaddedCollator, Prepared, load_prepared
from statecore.demo import task
from statecore.losses import Losses, distillation_losses

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PLAIN = len(task.TOKEN_ID)
_, STARTS, ENDS = task.tokenizer_with_steps()


def tiny_base(tied: bool = True) -> Qwen2ForCausalLM:
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=PLAIN, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def tiny_student(base: Qwen2ForCausalLM | None = None, **fields):
    fields = {"la_rank": 4, "alpha_steps": 4} | fields
    model = convert(base or tiny_base(), step_start_token_ids=STARTS, step_end_token_ids=ENDS, **fields)
    with torch.no_grad():  # v starts at zero; the tests want a branch that speaks
        for name, parameter in model.named_parameters():
            if ".la.v.B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def rows(count: int = 8, steps: tuple[int, ...] = (2, 3)) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    problems = [task.draw(count // len(steps), n, generator) for n in steps]
    return [row for some in problems for row in task.training_rows(some, STARTS, ENDS)]


@pytest.fixture(scope="module")
def training_set(tmp_path_factory) -> Path:
    """A prepared training set of 16 rows and 4 for evaluation, as `statecore prepare` writes them."""
    folder = tmp_path_factory.mktemp("prepared")
    task.write_training_set(folder / "set", {"train": rows(16), "eval": rows(4)})
    return folder / "set"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_base().save_pretrained(folder)
    return folder


def arguments(folder: Path, **changes) -> train.TrainArguments:
    usual = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return train.TrainArguments(**(usual | changes))


def prepared_rows(training_set: Path) -> Prepared:
    return load_prepared(training_set)


# ----------------------------------------------------------------------------------------------------------------------
# Loss


def losses_of(model, batch: dict, *, chunk: int, beta: float = 0.7) -> tuple[Losses, dict[str, torch.Tensor]]:
    """Losses of a batch, and their gradients by parameter name."""
    model.zero_grad()
    own, teacher = train.split_inputs(batch)
    with torch.no_grad(), model.full_attention():
        teacher_hidden = train.last_hidden_state(model, model, teacher)
    hidden = train.last_hidden_state(model, model, own)
    losses = distillation_losses(
        model, hidden, batch["labels"], teacher_hidden, batch["student_index"], batch["teacher_index"],
        beta=beta, chunk=chunk,
    )  # fmt: skip
    losses.total.backward()
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_chunked_loss_is_the_plain_loss(tied, chunk):
    """Against the formula written out over whole [T, vocabulary] tensors, values and gradients in float64."""
    model = tiny_student(tiny_base(tied)).double().train()
    batch = PaddedCollator([*STARTS, *ENDS], 0)(rows(4))
    losses, gradients = losses_of(model, batch, chunk=chunk)

    model.zero_grad()
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    with torch.no_grad(), model.full_attention():
        teacher = model(
            batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"], use_cache=False
        ).logits
    ar = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    student = logits.flatten(0, 1)[batch["student_index"], :PLAIN].log_softmax(-1)
    teacher = teacher.flatten(0, 1)[batch["teacher_index"], :PLAIN].log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum()
    (ar + 0.7 * kl).backward()

    assert losses.predicted == int((batch["labels"] != -100).sum())
    assert losses.compared == len(batch["student_index"])
    torch.testing.assert_close(losses.ar.double(), ar, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.kl.double(), kl, rtol=1e-5, atol=0)
    plain = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=2e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest floating-point tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self.elements = max(self.elements, leaf.numel())
        return result


def test_loss_never_holds_all_logits():
    vocabulary, width, tokens, chunk = 5000, 8, 400, 50
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = convert(
        Qwen2ForCausalLM(config), step_start_token_ids=[vocabulary], step_end_token_ids=[vocabulary + 1], la_rank=2
    )
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    teacher, index = torch.randn(1, tokens, width), torch.arange(tokens - 1)
    labels = torch.randint(0, vocabulary, (1, tokens))
    with LargestTensor() as largest:
        losses = distillation_losses(model, hidden, labels, teacher, index, index, chunk=chunk)
        losses.total.backward()
    assert hidden.grad.abs().sum() > 0
    assert largest.elements == chunk * (vocabulary + 2)


def test_teacher_and_student_agree_at_the_start_of_one_step():
    """With a single step nothing is out of sight, and the branch is silent: the student is its teacher."""
    model = convert(tiny_base(), step_start_token_ids=STARTS, step_end_token_ids=ENDS, la_rank=4).double()
    problems = task.draw(2, 1, torch.Generator().manual_seed(0))
    row = next(task.training_rows(problems, STARTS, ENDS))
    # Without markers and with one segment id for everything behind the prompt.
    ordinary = ~torch.isin(torch.tensor(row["input_ids"]), torch.tensor([*STARTS, *ENDS]))
    row["input_ids"] = torch.tensor(row["input_ids"])[ordinary].numpy()
    row["step_ids"] = torch.tensor(row["step_ids"])[ordinary].clamp(max=1).numpy()
    losses, _ = losses_of(model, PaddedCollator([*STARTS, *ENDS], 0)([row]), chunk=64)
    assert losses.compared == losses.predicted == len(row["input_ids"]) - task.PROMPT_TOKENS
    assert abs(losses.kl.item()) < 1e-5 < losses.ar.item()


def test_packed_equals_padded():
    model = tiny_student().double().train()
    padded, of_padded = losses_of(model, PaddedCollator([*STARTS, *ENDS], 0)(rows(6)), chunk=64)
    packed, of_packed = losses_of(model, PackedCollator([*STARTS, *ENDS], 0)(rows(6)), chunk=64)
    assert (padded.predicted, padded.compared) == (packed.predicted, packed.compared)
    torch.testing.assert_close(padded.total, packed.total, rtol=1e-5, atol=0)
    for name, gradient in of_padded.items():
        torch.testing.assert_close(of_packed[name], gradient, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Trainer


def test_only_the_new_parts_learn(training_set, tmp_path):
    base = tiny_base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = tiny_student(base)
    new = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(".la." in name or name.endswith("step_weight") for name in new)
    trainer = train.make_trainer(model, prepared_rows(training_set), arguments(tmp_path, weight_decay=0.1))
    trainer.train()
    state = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(state[name][: len(tensor)], tensor), name  # the vocabulary has grown
    unchanged = [name for name, tensor in new.items() if torch.equal(state[name], tensor)]
    assert not unchanged
    logged = [entry for entry in trainer.state.log_history if "ar" in entry]
    assert len(logged) == 2
    for entry in logged:
        share = 1 - 2 * 2.5 / (2.5 * 9 + 4)  # of the predicted tokens that are ordinary, on average
        assert math.isclose(entry["loss"], entry["ar"] + entry["kl"] * share, rel_tol=0.05)


def test_loss_falls_and_evaluation_reports_both_parts(training_set, tmp_path):
    trainer = train.make_trainer(
        tiny_student(), prepared_rows(training_set),
        arguments(tmp_path, max_steps=24, eval_strategy="steps", eval_steps=12, logging_steps=4, learning_rate=3e-2),
    )  # fmt: skip
    trainer.train()
    ar = [entry["ar"] for entry in trainer.state.log_history if "ar" in entry]
    assert ar == sorted(ar, reverse=True)
    assert ar[-1] < ar[0] - 0.1
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2
    assert evaluations[1]["eval_ar"] < evaluations[0]["eval_ar"]
    assert all(entry["eval_kl"] >= 0 and entry["eval_ar"] > 0 for entry in evaluations)


def test_accumulated_batches_equal_one_large_batch(training_set, tmp_path):
    def step(**changes):
        trainer = train.make_trainer(
            tiny_student(), prepared_rows(training_set), arguments(tmp_path, max_steps=1, optim="sgd", **changes)
        )
        trainer.train()
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    whole = step(per_device_train_batch_size=8)
    accumulated = step(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name in whole:
        torch.testing.assert_close(accumulated[name], whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("lora_rank", "packed", "muon"), [(0, False, None), (0, True, 0.02), (2, False, 0.02)])
def test_resume_is_exact(training_set, base_folder, tmp_path, lora_rank, packed, muon):
    """2 N updates equal N updates, a new process's worth of forgetting, and N more: bit for bit."""

    def run(folder: Path, **changes) -> dict[str, torch.Tensor]:
        usual = {
            "base": str(base_folder),
            "data": str(training_set),
            "la_rank": 4,
            "lora_rank": lora_rank,
            "packed": packed,
            "muon_learning_rate": muon,
            "lr_scheduler_type": "linear",
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 3,
        }
        train.train(arguments(folder, **(usual | changes)))
        weights = load_file(folder / "adapter.safetensors")
        return weights | (load_file(folder / "adapter_model.safetensors") if lora_rank else {})

    straight = run(tmp_path / "straight")
    checkpoint = tmp_path / "straight" / "checkpoint-3"
    resumed = run(tmp_path / "resumed", resume_from_checkpoint=str(checkpoint))
    half = load_file(checkpoint / "adapter.safetensors")
    assert straight.keys() == resumed.keys()
    for name, tensor in straight.items():
        assert torch.equal(resumed[name], tensor), name
    assert not all(torch.equal(half[name], straight[name]) for name in half)
    assert not (checkpoint / "model.safetensors").exists()


def test_lora_round_trip_through_peft(training_set, tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_base()
    tuned = train.with_lora(tiny_student(base), rank=2, alpha=4, targets=["q_proj", "v_proj"])
    trainable = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in trainable if "lora_" in name} == {"default"}
    assert any(".la.modules_to_save.default." in name for name in trainable)
    assert any(name.endswith("step_weight") for name in trainable)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    batch = PaddedCollator([*STARTS, *ENDS], 0)(rows(2))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    wanted = tuned(**inputs).logits
    train.save_trained(tuned, tmp_path)
    again = peft.PeftModel.from_pretrained(load_adapter(tiny_base(), tmp_path), tmp_path)
    assert torch.equal(again(**inputs).logits, wanted)
    with train.as_teacher(again):
        teacher = again(input_ids=batch["teacher_input_ids"], use_cache=False).logits
    assert torch.equal(teacher[..., :PLAIN], base(batch["teacher_input_ids"]).logits)


def test_rows_that_are_too_long(training_set, tmp_path):
    longest = max(len(row["input_ids"]) for row in rows(4))
    prepared = prepared_rows(training_set)
    trainer = train.make_trainer(tiny_student(), prepared, arguments(tmp_path, max_tokens=longest - 1))
    assert 0 < len(trainer.train_dataset) < len(prepared.train)
    with pytest.raises(ValueError, match="max_tokens = 5"):
        train.make_trainer(tiny_student(), prepared, arguments(tmp_path, max_tokens=5))


# ----------------------------------------------------------------------------------------------------------------------
# Recipes and command line


def test_command_line_overrides_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base: some/base\nlearning_rate: 2e-4\nbeta: 0.5\nla_rope: false\nlora_targets: [q_proj, k_proj]\n"
    )
    options = ["--config", str(recipe), "--beta", "2", "--use_cpu", "true"]
    got = train.parse(options)
    assert (got.base, got.learning_rate, got.beta, got.la_rope) == ("some/base", 2e-4, 2.0, False)
    assert got.lora_targets == ["q_proj", "k_proj"]


def test_recipe_errors(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rat: 1.0\n")
    with pytest.raises(ValueError, match="unknown names: learning_rat"):
        train.parse(["--config", str(recipe)])
    recipe.write_text("- beta\n")
    with pytest.raises(ValueError, match="name: value"):
        train.parse(["--config", str(recipe)])
    with pytest.raises(ValueError, match="needs the name"):
        train.parse(["--config"])
    with pytest.raises(ValueError, match="beta must be >= 0"):
        train.TrainArguments(beta=-1.0, use_cpu=True)
    with pytest.raises(ValueError, match="--base is missing"):
        train.train(train.TrainArguments(use_cpu=True))


@pytest.mark.parametrize(
    "recipe",
    [path for path in sorted(RECIPES.glob("*.yaml")) if not path.name.startswith(("prepare-", "ssd-"))],
    ids=lambda path: path.name,
)
def test_shipped_recipes_are_read(recipe):
    values = yaml.safe_load(recipe.read_text())
    # A machine without a GPU refuses bf16 training; the names and types are what this is about.
    got = train.parse(["--config", str(recipe), "--use_cpu", "true", "--bf16", "false"])
    for name, value in values.items():
        if name not in ("bf16", "report_to"):
            kind = type(getattr(got, name))
            assert getattr(got, name) == (kind(value) if kind in (int, float) else value), name


def test_runs_as_a_module(training_set, base_folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    values = {"base": str(base_folder), "data": str(training_set), "la_rank": 4, "max_steps": 1, "logging_steps": 1}
    recipe.write_text(yaml.safe_dump(values | {"use_cpu": True, "per_device_train_batch_size": 4}))
    command = [sys.executable, "-m", "statecore.train", "--config", str(recipe), "--output_dir", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    report = json.loads((tmp_path / "out" / "train_report.json").read_text())
    assert {"ar", "kl", "loss"} <= report["history"][0].keys()
    assert load_adapter(base_folder, tmp_path / "out").config.la_rank == 4
