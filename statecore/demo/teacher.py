"""The demo's teacher: a stock Qwen2 with 0.7 M parameters that solves the task with full attention.

`teacher/` beside this file holds a trained one. Its training differed from `train_teacher` in that problems asked for
any term, not only for one of the last four. Its weights are rounded to float16 to take 1.4 MB; they are loaded as
float32, and every figure of the demo is measured after rounding.
"""

import math
import os
import random
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

from ..train import MuonAndAdamW
from . import task

SHIPPED = Path(__file__).parent / "teacher"
TRAINED_STEPS = 10  # of the longest problem that it is trained on
LARGEST_GAP = 4
WIDEST_GAP = 200


def load_teacher(folder: str | Path = SHIPPED) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def new_teacher() -> Qwen2ForCausalLM:
    """A teacher with random weights. The large rope_theta barely rotates half of each head: recall at any distance."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(task.TOKEN_ID),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
            bos_token_id=task.TOKEN_ID[task.BOS],
            eos_token_id=task.TOKEN_ID[task.EOS],
            pad_token_id=task.TOKEN_ID[task.PAD],
        )
    )


def train_teacher(folder: str | Path, *, updates: int = 500, seed: int = 0) -> Path:
    """Trains a teacher from scratch and writes it, rounded to float16, and its tokenizer to `folder`.

    With Muon on the layers' matrices and AdamW on the rest, recall of earlier terms appears several times sooner than
    with AdamW alone. The first 100 updates use short problems only.
    """
    torch.manual_seed(seed)
    model = new_teacher().train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    optimizer = MuonAndAdamW(
        matrices,
        others,
        muon={"lr": 0.02, "weight_decay": 0.01},
        adamw={"lr": 3e-3, "weight_decay": 0.0, "betas": (0.9, 0.98)},
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: _warm_cosine(update, updates))
    generator, lengths = torch.Generator().manual_seed(seed + 1), random.Random(seed)
    progress = tqdm(range(updates), desc="teacher", unit="update")
    for update in progress:
        steps = lengths.randint(2, 5 if update < 99 else TRAINED_STEPS)
        problems = task.draw(max(12, 224 // (steps + 1)), steps, generator)
        loss = _loss(
            model, problems, _gapped_positions(problems, 0 if update + 1 < updates // 3 else WIDEST_GAP, generator)
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if update % 20 == 19:
            progress.set_postfix(loss=f"{loss.item():.3f}", steps=steps)
    return _write(model, Path(folder))


def _loss(model: Qwen2ForCausalLM, problems: task.Problems, positions: Tensor) -> Tensor:
    """Cross-entropy of everything after the prompt, which is random."""
    hidden = model.model(problems.input_ids, position_ids=positions).last_hidden_state
    logits = model.lm_head(hidden[:, task.PROMPT_TOKENS - 1 : -1])
    return F.cross_entropy(logits.flatten(0, 1), problems.input_ids[:, task.PROMPT_TOKENS :].flatten())


def _gapped_positions(problems: task.Problems, widest: int, generator: torch.Generator) -> Tensor:
    """Positions int64 [B, T] with random gaps of up to LARGEST_GAP between steps, so that the model cannot rely on
    distances across steps.

    Half of the problems have one more gap of up to `widest`, before the first step or a later one, which puts what
    comes before it as far away as in a longer problem.
    """
    count, tokens = problems.input_ids.shape

    def up_to(high: int, *more: int) -> Tensor:
        return torch.randint(0, high + 1, (count, *more), generator=generator)

    increment = torch.ones(count, tokens, dtype=torch.long)
    borders = task.PROMPT_TOKENS + task.STEP_TOKENS * torch.arange(problems.steps + 1)
    increment[:, borders] += up_to(LARGEST_GAP, problems.steps + 1)
    if widest:
        wide = borders[up_to(problems.steps) * up_to(1)]
        increment[torch.arange(count), wide] += up_to(widest) * up_to(1)
    return increment.cumsum(1) - 1


def _warm_cosine(update: int, updates: int) -> float:
    """Factor of the learning rate: linear warm-up over 40 updates, cosine decay to 3 %."""
    return min(1.0, (update + 1) / 40) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, update / updates))))


def _write(model: Qwen2ForCausalLM, folder: Path) -> Path:
    working = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    model.half().save_pretrained(working)
    task.make_tokenizer().save_pretrained(working)
    if folder.exists():
        shutil.rmtree(folder)
    working.rename(folder)
    return folder


def copy_teacher(folder: Path) -> Path:
    """Copies the teacher that comes with the package to `folder`."""
    if not (SHIPPED / "config.json").is_file():
        raise FileNotFoundError(f"the package came without its teacher ({SHIPPED}): use --train-teacher")
    shutil.copytree(SHIPPED, folder, dirs_exist_ok=True)
    return folder
