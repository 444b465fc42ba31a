"""State dynamics: ranks of states in models trained here, and what pruning by them costs.

    python -m benchmarks.papers.dynamics            about 7 minutes of one core; writes results/papers/dynamics*
    python -m benchmarks.papers.dynamics --quick    a look at everything in a minute; prints, writes nothing
    python -m benchmarks.papers.dynamics --page     page, comparison and heads again, from the json file

Three models, trained here: an SSD model on real chains of thought, a pretrained character model of 0.94 M parameters
converted to a state-transition model, and the demo's teacher converted likewise. The first two need the shared data
folder (STATECORE_SHARED); without it they are left out.
"""

import argparse
import copy
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2ForCausalLM

from benchmarks.machine import versions
from statecore.adapter import convert
from statecore.demo import distil, measure, task, teacher
from statecore.dynamics import (
    Trajectory,
    branches,
    choose_bases,
    choose_heads,
    decoding_cost,
    head_scores,
    held_out,
    key_covariances,
    lower_ranks,
    prune_heads,
    summarise,
)
from statecore.dynamics import record as record_states
from statecore.dynamics.report import draw_heads, draw_spectra, draw_trajectories, number
from statecore.dynamics.texts import Text, TextOptions, read_texts
from statecore.outputs import write_json
from statecore.ssd import SSDConfig, SSDForCausalLM
from statecore.traces import read_jsonl

RESULTS = Path(__file__).parents[1] / "results" / "papers"
SHARED = Path(os.environ.get("STATECORE_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
TRACES, CHARACTERS = SHARED / "longcot_clean" / "train.jsonl.gz", SHARED / "tiny_lm"
SSD, CHARACTER, DEMO = "SSD, real chains of thought", "character model, converted", "demo model, converted"
ORDERS = ("joint", "reverse", "rank alone", "norm alone")
KEPT = (0.75, 0.5, 0.25)
BATCH = 64


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    ssd_updates: int
    character_updates: int
    demo_updates: int
    calibration: int
    scored: int
    tokens: int
    draws: int
    problems: int


FULL = Size(300, 100, 150, 8, 6, 2048, 5, 40)
QUICK = Size(4, 2, 2, 2, 2, 256, 2, 8)


@dataclass(frozen=True)
class Subject:
    """A model, texts to judge heads by, texts to score on, and the share of right answers where there are any."""

    name: str
    about: str
    model: PreTrainedModel
    calibration: list[Text]
    scored: list[Text]
    answers: Callable[[PreTrainedModel], float] | None = None


# ----------------------------------------------------------------------------------------------------------------------
# An SSD model on real chains of thought


def ssd_subject(size: Size, folder: Path) -> Subject:
    rows = [row for _, row in islice(read_jsonl(TRACES), 500)]
    problems = sorted({row["problem"] for row in rows})
    apart = set(problems[::6])
    known = [row["thinking"] for row in rows if row["problem"] not in apart]
    unknown = [row for row in rows if row["problem"] in apart and len(row["thinking"]) > 5 * size.tokens]
    tokenizer = _byte_pairs(known)
    tokenizer.save_pretrained(folder / "tokenizer")
    stream = torch.cat([torch.tensor(tokenizer(text).input_ids) for text in known])
    torch.manual_seed(0)
    config = SSDConfig(
        hidden_size=128, num_heads=16, head_dim=16, expand=2, state_size=32, n_groups=1, num_hidden_layers=4,
        vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.02, pad_token_id=0, bos_token_id=None,
        eos_token_id=1,
    )  # fmt: skip
    model = SSDForCausalLM(config).train()
    rows_of = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        begins = torch.randint(0, len(stream) - 385, (8, 1), generator=rows_of)
        batch = stream[begins + torch.arange(385)]
        return model(batch, labels=batch, use_cache=False).loss

    last = _train(model, loss, size.ssd_updates, 4e-3, "SSD model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unknown))
    options = TextOptions(max_tokens=size.tokens, limit=size.calibration + size.scored)
    texts = read_texts(str(folder / "rows.jsonl"), model, str(folder), options)
    about = (
        f"4 layers of 16 heads, states 32 x 16, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{size.ssd_updates} updates of 8 x 384 tokens of {len(known)} traces (loss {last:.2f} at the end)"
    )
    return Subject(SSD, about, model.eval(), texts[: size.calibration], texts[size.calibration :])


def _byte_pairs(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    learn = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    words.train_from_iterator([text[:4000] for text in texts[:100]], learn)
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def _train(model: torch.nn.Module, loss_of_batch: Callable[[], Tensor], updates: int, rate: float, title: str) -> float:
    """AdamW with a short warm-up and a cosine; the mean loss of the last tenth."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda u: min((u + 1) / 20, 0.55 + 0.45 * math.cos(math.pi * u / updates))
    )
    losses = []
    for _ in tqdm(range(updates), desc=title, unit="update"):
        optimizer.zero_grad()
        loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return statistics.fmean(losses[-max(updates // 10, 1) :])


# ----------------------------------------------------------------------------------------------------------------------
# The pretrained character model, converted


def character_subject(size: Size) -> Subject:
    """It reads stories that the base told; sentences are the steps, the first one is the prompt."""
    table = (CHARACTERS / "babyllama_tok105" / "tok105.vocab").read_text(encoding="utf-8")
    alphabet = [line.split("\t")[0] for line in table.splitlines()]
    base = Qwen2ForCausalLM.from_pretrained(CHARACTERS / "babyllama105-qwen2").eval()
    first = len(alphabet)
    model = convert(base, step_start_token_ids=[first], step_end_token_ids=[first + 1], la_rank=32)
    batch, count = 6, size.calibration + size.scored
    told = list(_stories(base, alphabet, 6 * batch + count, first))
    trained, rest = told[: len(told) - count], told[len(told) - count :]
    draw = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        total = torch.zeros(())
        for i in torch.randint(0, len(trained), (4,), generator=draw).tolist():
            story, tokens = trained[i]
            plain, marked = torch.tensor(story)[None], torch.tensor(tokens.tokens)[None]
            with torch.no_grad(), model.full_attention():
                wanted = model(plain, use_cache=False).logits[0, :-1, :first].log_softmax(-1)
            at = (marked[0] < first).nonzero()[:, 0]
            out = model(marked, labels=marked, use_cache=False)
            given = out.logits[0, at[:-1], :first].log_softmax(-1)
            total = total + (out.loss + F.kl_div(given, wanted, log_target=True, reduction="batchmean")) / 4
        return total

    model.train()
    last = _train(model, loss, size.character_updates, 3e-3, "character model")
    about = (
        f"5 layers of 4 key/value heads, states 16 x 16, {size.character_updates} updates of the linear branches alone "
        f"(labels + KL to the base with full attention) on {len(trained)} of its own stories, sentences as steps (loss "
        f"{last:.2f} at the end)"
    )
    texts = [text for _, text in rest]
    return Subject(CHARACTER, about, model.eval(), texts[: size.calibration], texts[size.calibration :])


@torch.no_grad()
def _stories(base: PreTrainedModel, alphabet: list[str], count: int, first: int) -> Iterator[tuple[list[int], Text]]:
    """Characters of a story, and the same with step tokens."""
    torch.manual_seed(0)
    begin = [1, *(alphabet.index(c) for c in "▁Once▁upon▁a▁time,")]
    out = base.generate(
        torch.tensor([begin] * count), attention_mask=torch.ones(count, len(begin)), do_sample=True, temperature=0.8,
        top_k=0, max_new_tokens=220, min_new_tokens=220, pad_token_id=0,
    )  # fmt: skip
    stop = alphabet.index(".")
    for number_, row in enumerate(out.tolist()):
        sentences, begin_at = [], 0
        for i, token in enumerate(row):
            if token == stop or i + 1 == len(row):
                sentences.append(row[begin_at : i + 1])
                begin_at = i + 1
        tokens, ends = list(sentences[0]), [len(sentences[0])]
        for sentence in filter(None, sentences[1:]):
            tokens += [first, *sentence, first + 1]
            ends.append(len(tokens))
        yield row, Text(f"story {number_ + 1}", tokens, ends)


# ----------------------------------------------------------------------------------------------------------------------
# The demo's model


def demo_subject(size: Size, folder: Path) -> Subject:
    teacher.load_teacher().save_pretrained(folder / "teacher")
    model = distil.distil(folder / "teacher", folder, updates=size.demo_updates, seed=0)
    _, starts, ends = task.tokenizer_with_steps()
    texts = []
    for name, steps in enumerate([12] * (size.calibration + size.scored)):
        problem = task.draw(1, steps, torch.Generator().manual_seed(5000 + name))
        tokens = task.with_step_tokens(problem, starts, ends)[0].tolist()
        texts.append(Text(f"problem {name + 1}", tokens, [i + 1 for i, t in enumerate(tokens) if t in ends]))
    held = task.draw(size.problems, 6, torch.Generator().manual_seed(9000))
    about = (
        f"3 layers of 2 key/value heads, states 64 x 64, {size.demo_updates} updates of the linear branches (the demo "
        f"makes 900); answers: {size.problems} problems of 6 steps, decoded greedily"
    )
    return Subject(
        DEMO, about, model, texts[: size.calibration], texts[size.calibration :],
        lambda one: measure.decode(one, held).correct.double().mean().item(),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def study(subject: Subject, size: Size, folder: Path | None) -> dict[str, Any]:
    """Dynamics and pruning of one model."""
    began = time.process_time()
    found = [
        record_states(subject.model, text.tokens, name=text.name, step_ends=text.step_ends)
        for text in tqdm(subject.calibration, desc=f"recording, {subject.name}", unit="text")
    ]
    summary = {"settings": {}} | summarise(found)
    if folder is not None:
        draw_heads(folder / "dynamics_heads.png", summary)
        draw_trajectories(folder / "dynamics_trajectories.png", found[0])
        draw_spectra(folder / "dynamics_spectra.png", found[0])
    recording = time.process_time() - began
    rows, cost = pruning_rows(subject, found, size)
    return {
        "about": subject.about, "summary": summary, "decay": decay_and_rank(subject.model, summary),
        "value_rank": _value_rank(subject.model), "texts": [len(t.tokens) for t in subject.scored],
        "recording_s": recording, "rows": rows, "cost": cost, "lowered": lowered_rows(subject, size),
    }  # fmt: skip


def _value_rank(model: PreTrainedModel) -> int | None:
    """Rank of the maps that the values come from, where it is below d."""
    return getattr(model.config, "la_rank", None)


def decay_and_rank(model: PreTrainedModel, summary: dict[str, Any]) -> float | None:
    """Rank correlation over heads of the effective rank with how slowly the head forgets, as its parameters say it."""
    if not isinstance(model, SSDForCausalLM):
        return None
    rate = [(mixer.A_log.exp() * F.softplus(mixer.dt_bias)).detach() for mixer in branches(model).values()]
    return float(spearmanr(-torch.cat(rate).numpy(), [head["rank"] for head in summary["heads"]]).statistic)


def pruning_rows(
    subject: Subject, found: Sequence[Trajectory], size: Size
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Held-out figures of every order and budget, and what decoding costs at some budgets."""
    heads, joint = head_scores(found)
    scores = {"joint": joint, "reverse": joint, "rank alone": head_scores(found, 1.0)[1]}
    scores["norm alone"] = head_scores(found, 0.0)[1]
    layers = len({head.layer for head in heads})
    rows = [_scored(subject, subject.model, {"order": "as it is", "keep": 1.0, "heads": len(heads)})]
    halves: dict[str, PreTrainedModel] = {"as it is": subject.model}
    plan: list[tuple[str, float, int]] = []
    for keep in KEPT:
        if round(keep * len(heads)) >= layers:
            plan += [(order, keep, 0) for order in ORDERS] + [("random", keep, seed) for seed in range(size.draws)]
    for order, keep, seed in tqdm(plan, desc=f"pruning, {subject.name}", unit="model"):
        by = order if order in ("reverse", "random") else "joint"
        pruned = prune_heads(subject.model, choose_heads(heads, scores.get(order, joint), keep, by, seed))
        rows.append(_scored(subject, pruned, {"order": order, "keep": keep, "heads": round(keep * len(heads))}))
        if order == "joint":
            halves[f"{keep:.0%} of the heads"] = pruned
    prompt = subject.scored[0].tokens[:64]
    cost = [{"model": name} | figures for name, figures in decoding_cost(halves, prompt, 48, 5).items()]
    many = decoding_cost(halves, prompt, 16, 5, batch=BATCH)
    for row in cost:
        row["batch_ms"] = many[row["model"]]["ms"]
        row["checkpoint_bytes"] = _checkpoint_bytes(halves[row["model"]])
    return rows, cost


def lowered_rows(subject: Subject, size: Size) -> list[dict[str, Any]]:
    covariances = key_covariances(subject.model, [text.tokens for text in subject.calibration[:4]])
    rows = []
    for keep in (0.5, 0.25):
        for by in ("leading", "trailing", "random"):
            low = lower_ranks(subject.model, choose_bases(covariances, keep, by))
            width = low.config.state_ranks[0]
            rows.append(_scored(subject, low, {"directions": by, "keep": keep, "width": width}))
    return rows


def _scored(subject: Subject, model: PreTrainedModel, row: dict[str, Any]) -> dict[str, Any]:
    row |= held_out(model, [text.tokens for text in subject.scored])
    if subject.answers is not None:
        row["answers"] = subject.answers(model)
    return row


def _checkpoint_bytes(model: PreTrainedModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(model).save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


# ----------------------------------------------------------------------------------------------------------------------
# Page


def at(rows: Sequence[dict[str, Any]], order: str, keep: float, value: str = "loss") -> list[float]:
    return [row[value] for row in rows if row["order"] == order and row["keep"] == keep]


def budgets(rows: Sequence[dict[str, Any]]) -> list[float]:
    return sorted({row["keep"] for row in rows} - {1.0}, reverse=True)


def page(record: dict[str, Any]) -> str:
    studies = record["studies"]
    lines = [
        "# State rank dynamics and pruning",
        "",
        f"Command: `python -m benchmarks.papers.dynamics` ({record['minutes']:.1f} minutes of one core, training "
        "included).",
        "Machine: " + "; ".join(f"{name}: {value}" for name, value in record["machine"].items()) + ".",
        "",
        "Effective rank: singular values above 1e-4 of the largest, of states in float32. Models:",
        "",
        *[f"- **{name}**: {one['about']}." for name, one in studies.items()],
        "",
        "![held-out loss by share of heads kept](dynamics.png)",
        "",
        "## Are there two kinds of heads, and do they stay what they are?",
        "",
        "| model | heads | rank / d after the last token: below 10 % | above 90 % | bimodality (uniform 0.56) | two "
        "classes apart by | rank early to late: Spearman | cosine | norm: Spearman | cosine | rank across inputs: "
        "Spearman | norm |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in studies.items():
        found = one["summary"]
        kinds, early, across = found["stratification"]["at_the_end"], found["early_to_late"], found["across_inputs"]
        cells = [
            name, str(len(found["heads"])), f"{kinds['low']:.0%}", f"{kinds['saturated']:.0%}",
            number(kinds["coefficient"]), number(kinds["gap"]), number(early["rank"]["spearman"]),
            number(early["rank"]["cosine"]), number(early["nuclear"]["spearman"]), number(early["nuclear"]["cosine"]),
            number(across["rank"]["spearman"]), number(across["nuclear"]["spearman"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "(-: all heads have the same rank.) Early and late are the tokens " + _places(studies) + ".", ""]
    lines += [_stratified(name, one) for name, one in studies.items()]
    decay = next((one["decay"] for one in studies.values() if one["decay"] is not None), None)
    if decay is not None:
        lines += [
            "",
            f"In the SSD model the rank follows how slowly a head forgets: Spearman {decay:.2f} between effective "
            "rank and -A softplus(dt_bias), which is known before any text is read.",
        ]
    lines += [
        "",
        f"![ranks and norms by layer and head, {record['pictured']}](dynamics_heads.png)",
        "![trajectories; dotted: step ends](dynamics_trajectories.png)",
        "![spectra](dynamics_spectra.png)",
        "",
        "## Pruning heads, zero-shot",
        "",
        "Held-out loss in nats per token (next token right). High: heads with the highest joint score go first, as the "
        f"paper has it (alpha 0.5); low: the reverse; random: mean and range of {record['size']['draws']} draws.",
        "",
        "| model | heads kept | as it is | high go first | low go first | random | rank alone | norm alone | side |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in studies.items():
        rows = one["rows"]
        for keep in budgets(rows):
            heads = next(row["heads"] for row in rows if row["keep"] == keep)
            drawn = at(rows, "random", keep)
            cells = [name, f"{heads} of {rows[0]['heads']}", _cell(rows, "as it is", 1.0)]
            cells += [_cell(rows, "joint", keep), _cell(rows, "reverse", keep)]
            cells += [f"{statistics.fmean(drawn):.3f} ({min(drawn):.3f} to {max(drawn):.3f})"]
            cells += [_cell(rows, "rank alone", keep), _cell(rows, "norm alone", keep), side(rows, keep)]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", verdict(studies), ""]
    for name, one in studies.items():
        if "answers" in one["rows"][0]:
            lines += [f"Right answers, {name}: " + _answers(one["rows"]) + "."]
    lines += [
        "",
        "## What pruned heads give back",
        "",
        "Heads with high scores gone; decoding is CPU time, fastest of 5 interleaved rounds of 48 tokens.",
        "",
        f"| model | | state, bytes | ms per decoded token | ms, {BATCH} at once | parameters | checkpoint, bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in studies.items():
        lines += [
            f"| {name} | {row['model']} | {row['state_bytes']:,} | {row['ms']:.2f} | {row['batch_ms']:.2f} | "
            f"{row['parameters']:,} | {row['checkpoint_bytes']:,} |"
            for row in one["cost"]
        ]
    lines += [
        "",
        "The state of an SSD layer counts with the window of its convolution. A linear branch that is pruned no longer "
        "runs in the operator that fuses it with softmax attention: one sequence of a small model, all overhead, gains "
        "no time.",
        "",
        "## States of lower rank, zero-shot",
        "",
        "q and k of every head on a basis of so many directions. Held-out loss (next token right).",
        "",
        "| model | width | as it is | leading | trailing | random |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in studies.items():
        for keep in sorted({row["keep"] for row in one["lowered"]}, reverse=True):
            part = {row["directions"]: row for row in one["lowered"] if row["keep"] == keep}
            cells = [f"{part[by]['loss']:.3f} ({part[by]['accuracy']:.1%})" for by in ("leading", "trailing", "random")]
            whole = _cell(one["rows"], "as it is", 1.0)
            lines.append(f"| {name} | {part['leading']['width']} | {whole} | " + " | ".join(cells) + " |")
    best = [
        part["leading"]["loss"] < min(part["trailing"]["loss"], part["random"]["loss"])
        for one in studies.values()
        for keep in {row["keep"] for row in one["lowered"]}
        for part in [{row["directions"]: row for row in one["lowered"] if row["keep"] == keep}]
    ]
    lines += [
        "",
        f"The leading directions of calibration states are the best of the three in {sum(best)} of {len(best)} cases.",
        "",
        "## What is not shown",
        "",
        "The paper's own models (Qwen3-Next, 80 B parameters) and tasks (needle in a haystack, GSM8K): nothing of that "
        "size runs here. The recorder reads transformers' Qwen3-Next and Mamba2, which tests check on random weights "
        "against the recurrence; their checkpoints were not at hand. Our models are small and trained for minutes, so "
        "where they differ from the paper they say what depends on the model, not that the paper is wrong about its "
        "own. The share of heads, alpha, calibration texts and what replaces a pruned head are not published; ours are "
        "options.",
        "",
    ]
    return "\n".join(lines)


def _cell(rows: Sequence[dict[str, Any]], order: str, keep: float) -> str:
    return f"{at(rows, order, keep)[0]:.3f} ({at(rows, order, keep, 'accuracy')[0]:.1%})"


def side(rows: Sequence[dict[str, Any]], keep: float) -> str:
    high, low, drawn = at(rows, "joint", keep)[0], at(rows, "reverse", keep)[0], at(rows, "random", keep)
    if high < low:
        return "the paper's" + ("" if high < min(drawn) else ", not better than random")
    return "reversed" + ("" if low < min(drawn) else ", low not better than random")


def verdict(studies: dict[str, Any]) -> str:
    """On which side the asymmetry falls, in words."""
    sides = {
        name: [at(one["rows"], "joint", keep)[0] < at(one["rows"], "reverse", keep)[0] for keep in budgets(one["rows"])]
        for name, one in studies.items()
    }
    parts = []
    for name, ours in sides.items():
        beaten = [
            sum(
                loss < at(studies[name]["rows"], "joint", keep)[0] for loss in at(studies[name]["rows"], "random", keep)
            )
            for keep in budgets(studies[name]["rows"])
        ]
        draws = len(at(studies[name]["rows"], "random", budgets(studies[name]["rows"])[0])) * len(beaten)
        parts.append(
            f"{name}: high-scoring heads are the ones to spare at {sum(ours)} of {len(ours)} budgets, and a random "
            f"draw does better than sparing them in {sum(beaten)} of {draws}"
        )
    whole = [won for ours in sides.values() for won in ours]
    if all(whole):
        start = "The asymmetry falls on the paper's side everywhere."
    elif not any(whole):
        start = "The asymmetry is the reverse of the paper's everywhere: the heads with high scores are those needed."
    else:
        start = (
            f"The asymmetry falls on the paper's side in {sum(whole)} of {len(whole)} cases and is reversed in others."
        )
    return start + " " + "; ".join(parts) + "."


def _answers(rows: Sequence[dict[str, Any]]) -> str:
    parts = [f"{rows[0]['answers']:.0%} as it is"]
    for keep in budgets(rows):
        drawn = at(rows, "random", keep, "answers")
        parts.append(
            f"with {keep:.0%} of the heads {at(rows, 'joint', keep, 'answers')[0]:.0%} (high gone), "
            f"{at(rows, 'reverse', keep, 'answers')[0]:.0%} (low gone), {statistics.fmean(drawn):.0%} (random)"
        )
    return "; ".join(parts)


def _places(studies: dict[str, Any]) -> str:
    shown = []
    for name, one in studies.items():
        inputs = one["summary"]["early_to_late"]["inputs"]
        early, late = ([entry[at_] for entry in inputs] for at_ in ("early", "late"))
        shown.append(f"{_span(early)} and {_span(late)} ({name})")
    return ", ".join(shown)


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def _stratified(name: str, one: dict[str, Any]) -> str:
    """Whether the paper's stratification shows: about half the heads near zero rank, the others near the bound."""
    kinds = one["summary"]["stratification"]["at_the_end"]
    if kinds["low"] >= 0.25 and kinds["saturated"] >= 0.25:
        said = "two kinds of heads as in the paper, many near zero rank and many near the bound."
    elif kinds["gap"] is None:
        said = "no stratification: every head has the same rank."
    else:
        said = (
            f"the paper's picture (half of the heads near zero rank, the others near the bound) does not show: "
            f"{kinds['low']:.0%} are near zero, {kinds['saturated']:.0%} near the bound."
        )
    bound = one["value_rank"]
    width = one["summary"]["heads"][0]["bound"]
    if bound is not None and bound < width:
        said += f" The values come from {bound} numbers, so no rank can exceed {bound} of {width}."
    return f"- {name}: {said}"


def draw(record: dict[str, Any], path: Path) -> None:
    studies = record["studies"]
    figure = Figure(figsize=(4.6 * len(studies), 3.8), layout="constrained")
    for axes, (name, one) in zip(figure.subplots(1, len(studies), squeeze=False)[0], studies.items(), strict=True):
        rows = one["rows"]
        kept = [1.0, *budgets(rows)]
        whole = rows[0]["loss"]
        for order, colour, label in (
            ("joint", "tab:blue", "high scores go first (paper)"), ("reverse", "tab:red", "low scores go first"),
        ):  # fmt: skip
            axes.plot(kept, [whole, *(at(rows, order, keep)[0] for keep in kept[1:])], "o-", color=colour, label=label)
        drawn = [[whole], *(at(rows, "random", keep) for keep in kept[1:])]
        axes.plot(kept, [np.mean(part) for part in drawn], "s--", color="gray", label="random, mean")
        axes.fill_between(kept, [min(p) for p in drawn], [max(p) for p in drawn], color="gray", alpha=0.25)
        axes.set(title=name, xlabel="share of heads kept", ylabel="held-out loss, nats per token")
        axes.invert_xaxis()
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


# ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look at everything; writes nothing")
    parser.add_argument("--page", action="store_true", help="page, comparison and heads again, from the json file")
    arguments = parser.parse_args()
    if arguments.page:
        record = json.loads((RESULTS / "dynamics.json").read_text())
        (RESULTS / "dynamics.md").write_text(page(record))
        draw(record, RESULTS / "dynamics.png")
        draw_heads(RESULTS / "dynamics_heads.png", record["studies"][record["pictured"]]["summary"])
        return
    size = QUICK if arguments.quick else FULL
    torch.set_num_threads(1)
    began = time.process_time()
    studies: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, pictures = Path(temporary), Path(temporary) / "pictures"
        for part in ("ssd", "demo", "pictures"):
            (folder / part).mkdir()
        subjects: list[Callable[[], Subject]] = []
        if TRACES.is_file() and CHARACTERS.is_dir():
            subjects = [lambda: ssd_subject(size, folder / "ssd"), lambda: character_subject(size)]
        else:
            print(f"{SHARED} is not there (set STATECORE_SHARED): only the demo's model is measured")
        for make in [*subjects, lambda: demo_subject(size, folder / "demo")]:
            subject = make()
            studies[subject.name] = study(subject, size, None if studies else pictures)
            print(f"{subject.name}: {(time.process_time() - began) / 60:.1f} minutes so far", flush=True)
        record = {
            "size": size.__dict__, "machine": versions(), "minutes": (time.process_time() - began) / 60,
            "pictured": next(iter(studies)), "studies": studies,
        }  # fmt: skip
        if arguments.quick:
            print(page(record))
            return
        RESULTS.mkdir(parents=True, exist_ok=True)
        for file in pictures.iterdir():
            (RESULTS / file.name).write_bytes(file.read_bytes())
    write_json(RESULTS / "dynamics.json", record)
    (RESULTS / "dynamics.md").write_text(page(record))
    draw(record, RESULTS / "dynamics.png")
    print(page(record))


if __name__ == "__main__":
    main()
