"""Step information gain: where it lies on chains whose right answers are known, and what it costs to measure.

    python -m benchmarks.papers.flow            about 5 minutes of one core; writes benchmarks/results/papers/flow.*
    python -m benchmarks.papers.flow --quick    a look at everything in half a minute; prints, writes nothing

The models are the demo's teacher, which comes with the package, its state-transition form after a short distillation
(a sixth of the demo's), and, where the shared data folder is (STATECORE_SHARED), a pretrained language model of 0.94 M
parameters that reads characters.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, Qwen2ForCausalLM

from benchmarks.machine import versions
from statecore.adapter import convert
from statecore.data import PromptOptions
from statecore.demo import distil, task, teacher
from statecore.flow import StepGains, candidate_gains, continuation_log_probs, read, step_gains
from statecore.flow.command import OutputOptions, SelectionOptions, flow
from statecore.loading import ModelOptions
from statecore.segmentation import StepOptions, TransitionOptions

RESULTS = Path(__file__).parents[1] / "results" / "papers"
TEACHER, STUDENT, SILENT = "teacher", "state-transition model", "the same, state silent"
AROUND = range(-4, 4)  # steps before and after the one that works out the term asked for
SAMPLED_STEPS = 16
CANDIDATES = 64


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    updates: int
    problems: int
    sampled: int
    stories: int
    lengths: tuple[int, ...]
    positions: tuple[int, ...]


FULL = Size(150, 40, 120, 40, (256, 512, 1024, 2048), (128, 256, 512, 1024, 2048, 4096))
QUICK = Size(2, 4, 8, 4, (128, 256), (128, 256))

# ----------------------------------------------------------------------------------------------------------------------
# Gains on chains whose every number is known


def asked_step(problems: task.Problems) -> list[int]:
    """Which step works out the term that the answer names; -1 and less where the prompt gives it."""
    first = problems.input_ids[:, 5] - task.TOKEN_ID["x0="]
    asked = problems.input_ids[:, 3] - task.TOKEN_ID["?x0"]
    return ((asked - first) % task.NAMES - task.GIVEN).tolist()


def chains(problems: task.Problems, markers: tuple[list[int], list[int]] | None) -> tuple[Tensor, list[int]]:
    """Prompt and steps [B, T] without the word that ends the last step, and the step ends."""
    body = problems.input_ids[:, : -task.ANSWER_TOKENS - 1]
    length = task.STEP_TOKENS + (2 if markers else 0)
    if markers:
        steps = body[:, task.PROMPT_TOKENS :].unflatten(1, (problems.steps, task.STEP_TOKENS))
        starts, ends = (torch.tensor(ids)[problems.patterns][..., None] for ids in markers)
        body = torch.cat([problems.prompts, torch.cat([starts, steps, ends], 2).flatten(1)], 1)
    return body, [task.PROMPT_TOKENS + length * i for i in range(problems.steps + 1)]


def gains_around_the_asked_step(models: dict[str, tuple], lengths: tuple[int, ...], count: int) -> list[dict[str, Any]]:
    """The value asked for is y, one token; its name is read before it. Right chains, the same for all models."""
    rows = []
    for steps in lengths:
        problems = task.draw(count, steps, torch.Generator().manual_seed(1000 + steps))
        asked = asked_step(problems)
        for name, (model, markers) in models.items():
            tokens, ends = chains(problems, markers)
            around: dict[int, list[float]] = {offset: [] for offset in AROUND}
            first, last, highest = [], [], []
            for row, at, answer in zip(tokens.tolist(), asked, problems.answers.tolist(), strict=True):
                found = step_gains(model, row, ends, answer[1:2], closing=answer[:1])
                first.append(found.log_likelihoods[0].item())
                last.append(found.log_likelihoods[-1].item())
                highest.append(int(found.gains.argmax()) == at)
                for offset in AROUND:
                    if 0 <= at + offset < steps:
                        around[offset].append(found.gains[at + offset].item())
            others = [gain for offset in AROUND if offset for gain in around[offset]]
            rows.append(
                {
                    "model": name, "steps": steps, "problems": count,
                    "asked step": statistics.fmean(around[0]), "other steps near": statistics.fmean(others),
                    "spread of the others": statistics.pstdev(others),
                    "asked step gains most": statistics.fmean(highest),
                    "log p before": statistics.fmean(first), "log p behind": statistics.fmean(last),
                    "around": {offset: statistics.fmean(g) for offset, g in around.items() if g},
                }
            )  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Chains that the teacher samples, right and wrong ones, through `statecore flow`


@torch.no_grad()
def sampled_traces(model: PreTrainedModel, count: int, seed: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Rows of a traces file, and how many chains had not the form of a solution and were left out."""
    problems = task.draw(count, SAMPLED_STEPS, torch.Generator().manual_seed(seed))
    worked = task.STEP_TOKENS * SAMPLED_STEPS
    torch.manual_seed(seed)
    out = model.generate(
        problems.prompts, attention_mask=torch.ones_like(problems.prompts), do_sample=True, temperature=1.0, top_k=0,
        max_new_tokens=worked + 1 + task.ANSWER_TOKENS, pad_token_id=task.TOKEN_ID[task.PAD],
    )  # fmt: skip
    tokenizer, rows = task.make_tokenizer(), []
    for i, (own, truth, at) in enumerate(
        zip(out.tolist(), problems.input_ids.tolist(), asked_step(problems), strict=True)
    ):
        body, answer = own[task.PROMPT_TOKENS :][:worked], truth[-task.ANSWER_TOKENS :]
        if len(own) != len(truth) or own[-task.ANSWER_TOKENS - 1] != task.TOKEN_ID[task.DONE]:
            continue
        steps = [body[s : s + task.STEP_TOKENS] for s in range(0, worked, task.STEP_TOKENS)]
        right = [truth[task.PROMPT_TOKENS :][s : s + task.STEP_TOKENS] for s in range(0, worked, task.STEP_TOKENS)]
        wrong = [number for number, (a, b) in enumerate(zip(steps, right, strict=True)) if a[-1] != b[-1]]
        rows.append(
            {
                "id": f"problem {i}", "problem": tokenizer.decode(truth[: task.PROMPT_TOKENS]),
                "thinking": "\n".join(tokenizer.decode(step) for step in steps),
                "answer": tokenizer.decode(answer[:-1]), "correct": own[-task.ANSWER_TOKENS :] == answer,
                "asked": at, "wrong_steps": wrong,
            }
        )  # fmt: skip
    return rows, count - len(rows)


def through_the_command(rows: list[dict[str, Any]], folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result of `statecore flow` and its rewards, one for each row."""
    with open(folder / "traces.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    task.make_tokenizer().save_pretrained(folder / "tokenizer")
    signs = [f"{sign}x{number}" for sign in "+-" for number in range(task.NAMES)]
    (folder / "transitions.txt").write_text("\n".join(signs))
    result = flow(
        str(folder / "traces.jsonl"), selection=SelectionOptions(strict=True),
        outputs=OutputOptions(folder / "rewards.jsonl"), **settings(folder),
    )  # fmt: skip
    rewards = [json.loads(line) for line in (folder / "rewards.jsonl").read_text().splitlines()]
    assert all(len(line["steps"]) == SAMPLED_STEPS for line in rewards)
    return result, rewards


def settings(folder: Path) -> dict[str, Any]:
    """How the command finds steps, closing and answer in the demo's chains."""
    return {
        "model": str(teacher.SHIPPED), "loading": ModelOptions(tokenizer=str(folder / "tokenizer")),
        "prompt": PromptOptions("{prompt}\n", think_open="", think_close="\ndone\n"),
        "steps": StepOptions(8, 64), "transitions": TransitionOptions(folder / "transitions.txt", "token"),
    }  # fmt: skip


def right_and_wrong(rows: list[dict[str, Any]], rewards: list[dict[str, Any]]) -> dict[str, Any]:
    """Gains of the asked step and of the sampled steps at large; where wrong chains lose."""
    by_truth: dict[str, list[float]] = {"right": [], "wrong": []}
    every, lowest_is_wrong, earlier = [], [], []
    for row, line in zip(rows, rewards, strict=True):
        gains = [step["gain"] for step in line["steps"]]
        every.append(statistics.fmean(gains))
        wrong_value = row["asked"] in row["wrong_steps"]
        by_truth["wrong" if wrong_value else "right"].append(gains[row["asked"]])
        if wrong_value:
            if row["wrong_steps"][0] < row["asked"]:
                earlier.append(gains[row["wrong_steps"][0]])
            lowest_is_wrong.append(gains[row["asked"]] == min(gains))
    mean = statistics.fmean
    return {
        "asked_step_when_right": mean(by_truth["right"]),
        "asked_step_when_wrong": mean(by_truth["wrong"]) if by_truth["wrong"] else None,
        "chains_with_a_wrong_asked_value": len(by_truth["wrong"]),
        "of_these_the_asked_step_loses_most": mean(lowest_is_wrong) if lowest_is_wrong else None,
        "of_these_an_earlier_step_was_wrong_first": len(earlier),
        "gain_of_that_earlier_step": mean(earlier) if earlier else None,
        "mean_gain_of_a_sampled_step": mean(every),
        "its_standard_error": statistics.stdev(every) / len(every) ** 0.5,
    }


# ----------------------------------------------------------------------------------------------------------------------
# The pretrained model of characters, on stories of its own


def character_model() -> tuple[PreTrainedModel, list[str]] | None:
    shared = Path(os.environ.get("STATECORE_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    folder = shared / "data" / "tiny_lm"
    if not folder.is_dir():
        return None
    table = (folder / "babyllama_tok105" / "tok105.vocab").read_text(encoding="utf-8")
    model = Qwen2ForCausalLM.from_pretrained(folder / "babyllama105-qwen2").eval()
    return model, [line.split("\t")[0] for line in table.splitlines()]


@torch.no_grad()
def stories(model: PreTrainedModel, alphabet: list[str], count: int) -> dict[str, Any]:
    """Sentences are the steps, the last one is y: its own, and for comparison that of the next story."""
    torch.manual_seed(0)
    begin = [1, *(alphabet.index(c) for c in "▁Once▁upon▁a▁time,")]
    out = model.generate(
        torch.tensor([begin] * count), attention_mask=torch.ones(count, len(begin)), do_sample=True,
        temperature=0.8, top_k=0, max_new_tokens=200, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    stop = alphabet.index(".")
    told = []
    for row in out.tolist():
        ends = [i + 1 for i, token in enumerate(row) if token == stop and i + 1 < len(row)]
        if len(ends) >= 3:
            told.append((row[: ends[-1]], ends[:-1]))  # the prompt is the first sentence, the answer the last one
    own, foreign = [], []
    for i, (row, ends) in enumerate(tqdm(told, desc="stories", unit="story")):
        other, other_ends = told[(i + 1) % len(told)]
        for found, answer in ((own, row[ends[-1] :]), (foreign, other[other_ends[-1] :])):
            gains = step_gains(model, row[: ends[-1]], ends, answer).gains
            found.append((gains[-1] / len(answer), gains.sum() / len(answer)))
    text = "".join(alphabet[t] for t in told[0][0][1:]).replace("▁", " ").strip()
    return {
        "stories": len(told),
        "example": text,
        "nats_a_character": {
            name: {"last step before it": _mean(g[0] for g in found), "all steps": _mean(g[1] for g in found)}
            for name, found in (("its own last sentence", own), ("another story's", foreign))
        },
        "sampled_sentences": sampled_sentences(model, told[: count // 3 or 1], stop),
    }


@torch.no_grad()
def sampled_sentences(model: PreTrainedModel, told: list[tuple[list[int], list[int]]], stop: int) -> dict[str, float]:
    """Many next sentences from the model itself after the first one of each story; y is the story's last sentence."""
    means, evidence, above = [], [], 0
    for row, ends in tqdm(told, desc="next sentences", unit="story"):
        begun = row[: ends[0]]
        out = model.generate(
            torch.tensor([begun] * CANDIDATES), attention_mask=torch.ones(CANDIDATES, len(begun)), do_sample=True,
            temperature=1.0, top_k=0, max_new_tokens=100, eos_token_id=[2, stop], pad_token_id=0,
        )  # fmt: skip
        told_on = [new[: new.index(stop) + 1] for new in out[:, len(begun) :].tolist() if stop in new]
        found = candidate_gains(model, read(model, begun), told_on, row[ends[-1] :][:50])
        means.append(found.gains.mean().item())
        evidence.append((found.gains.logsumexp(0) - math.log(len(told_on))).item())
        above += means[-1] > 0
    return {
        "stories": len(means),
        "candidates": CANDIDATES,
        "E v": statistics.fmean(means),
        "standard error": statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else math.nan,
        "stories with E v > 0": above,
        "log Z": statistics.fmean(evidence),
    }


def _mean(values: Any) -> float:
    return statistics.fmean(float(value) for value in values)


# ----------------------------------------------------------------------------------------------------------------------
# Cost


def long_chain(length: int, markers: tuple[list[int], list[int]] | None) -> tuple[list[int], list[int]]:
    """Steps of random problems, one after the other: as many as fit in `length` tokens."""
    tokens, ends = chains(task.draw(1, task.LONGEST, torch.Generator().manual_seed(0)), markers)
    row, step = tokens[0].tolist(), ends[1] - ends[0]
    count = (length - task.PROMPT_TOKENS) // step
    body = row[task.PROMPT_TOKENS :] * (count * step // (len(row) - task.PROMPT_TOKENS) + 1)
    return row[: task.PROMPT_TOKENS] + body[: count * step], [task.PROMPT_TOKENS + step * i for i in range(count + 1)]


def cpu_seconds(run: Callable[[], object]) -> float:
    """Of one thread: other work on the machine counts for little."""
    began = time.process_time()
    run()
    return time.process_time() - began


def whole_traces(models: dict[str, tuple], lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Seconds for all gains of one trace: forks, and everything read anew at each step end."""
    rows, answer, closing = [], [4, 2], [task.TOKEN_ID["x3="]]
    for name, (model, markers) in models.items():
        for length in tqdm(lengths, desc=f"whole traces, {name}", unit="length"):
            tokens, ends = long_chain(length, markers)
            ways = {
                way: partial(step_gains, model, tokens, ends, answer, closing=closing, cached=way == "forks")
                for way in ("forks", "anew")
            }
            found: dict[str, StepGains] = {way: run() for way, run in ways.items()}
            apart = (found["forks"].gains - found["anew"].gains).abs().max().item()
            rounds = range(3 if length <= 1024 else 1)
            took = [{way: cpu_seconds(run) for way, run in ways.items()} for _ in rounds]
            rows.append(
                {
                    "model": name, "tokens": len(tokens), "steps": len(ends) - 1,
                    "forks_s": min(t["forks"] for t in took), "anew_s": min(t["anew"] for t in took),
                    "largest_difference": apart,
                }
            )  # fmt: skip
    return rows


@torch.no_grad()
def one_step_end(models: dict[str, tuple], positions: tuple[int, ...]) -> list[dict[str, Any]]:
    """Milliseconds to score an answer at a step end after that many tokens, and the bytes that a fork holds on to."""
    rows = []
    for name, (model, markers) in models.items():
        tokens, ends = long_chain(max(positions) + 64, markers)
        context, wanted = None, list(positions)
        for begin, stop in pairwise([0, *ends]):
            context = read(model, tokens[begin:stop], context)
            if wanted and stop >= wanted[0]:
                answer = [[task.TOKEN_ID["x3="], 4, 2]]
                score = partial(continuation_log_probs, model, context, answer, last=2)
                fastest = min(cpu_seconds(score) for _ in range(40))
                layers = context.cache.layers
                held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
                held += sum(layer.states.nbytes for layer in layers if getattr(layer, "states", None) is not None)
                rows.append({"model": name, "position": stop, "ms": 1e3 * fastest, "bytes": held})
                wanted = [position for position in wanted if position > stop]
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Page


def page(record: dict[str, Any]) -> str:
    asked, sampled, cost, ends = record["asked"], record["sampled"], record["whole_traces"], record["one_step_end"]
    known = record["flow"]["correctness"]
    lines = [
        "# Step information gain (CoT-Flow)",
        "",
        f"Command: `python -m benchmarks.papers.flow` ({record['minutes']:.1f} minutes of one core).",
        "Machine: " + "; ".join(f"{name}: {value}" for name, value in record["machine"].items()) + ".",
        "",
        "v(s) = log p(y | steps up to s) - log p(y | steps before s), in nats; the model is made to answer at once.",
        "",
        "![gains around the asked step, one sampled chain, cost](flow.png)",
        "",
        "## Where the gain lies",
        "",
        "The demo's task: every step works out one term of a sequence from two earlier ones, the answer names the "
        "value of "
        "one of the last four. Right chains; y is the value, one token of ten possible digits. The state-transition "
        "model "
        f"is the teacher after {record['size']['updates']} updates of its linear branches (loss far from converged; "
        "the "
        "demo makes 900); with its state silent (as converted, before training) it sees the prompt and the answer "
        "alone.",
        "",
        "| model | steps | gain of the asked step | of others near it (sd) | asked step gains most | log p(y) before "
        "| after |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in asked:
        lines.append(
            f"| {row['model']} | {row['steps']} | {row['asked step']:+.2f} | {row['other steps near']:+.2f} "
            f"({row['spread of the others']:.2f}) | {row['asked step gains most']:.0%} | {row['log p before']:.2f} | "
            f"{row['log p behind']:.2f} |"
        )
    lines += [
        "",
        f"{record['problems']} problems per row. The gain falls on the step that states the value asked for, in the "
        "state-transition model as well, though its answer is read from the state alone. The steps that prepare it "
        "gain "
        "nothing in the mean: a model this small cannot work a term out in its head, so a preparatory step does not "
        "make "
        "its answer at once any likelier. Single gains before the asked step are large all the same (the sd): asked "
        "for a "
        "term that is not there yet, the model names some value, and is sure of it.",
        "",
        "## Right and wrong chains",
        "",
        f"{record['flow']['traces']} chains of {SAMPLED_STEPS} steps (6 more than the teacher was trained on), "
        "sampled from "
        f"the teacher at temperature 1 ({record['malformed']} more had not the form of a solution), measured by "
        "`statecore "
        f"flow` towards the true answer; {known['right']} ended in it, {known['wrong']} did not.",
        "",
        "| | |",
        "|---|---|",
        f"| gain of the asked step, value right | {sampled['asked_step_when_right']:+.2f} |",
    ]
    if sampled["asked_step_when_wrong"] is not None:
        lines += [
            f"| gain of the asked step, value wrong ({sampled['chains_with_a_wrong_asked_value']} chains) | "
            f"{sampled['asked_step_when_wrong']:+.2f} |",
            "| of these, the asked step is the one that loses most | "
            f"{sampled['of_these_the_asked_step_loses_most']:.0%} |",
        ]
    if sampled["gain_of_that_earlier_step"] is not None:
        lines.append(
            f"| of these, gain of the step that was wrong first, where it came before the asked one "
            f"({sampled['of_these_an_earlier_step_was_wrong_first']} chains) | "
            f"{sampled['gain_of_that_earlier_step']:+.2f} |"
        )
    lines += [
        f"| mean gain of a sampled step | {sampled['mean_gain_of_a_sampled_step']:+.3f} (standard error "
        f"{sampled['its_standard_error']:.3f}) |",
        "",
    ]
    if "not_measured" not in known:
        lines += [
            "| of a chain | mean, right | mean, wrong | correlation with right | area under ROC |",
            "|---|---|---|---|---|",
        ]
        for name, row in known.items():
            if isinstance(row, dict):
                lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
    else:
        lines.append(f"No correlation: {known['not_measured']}.")
    lines += [
        "",
        "A wrong value shows as a gain that does not come: before the asked step the true value is unlikely already, "
        "so "
        "little is left to lose. As a reward the gain credits the step that states the result; it does not point at "
        "the "
        "step further up where the error was made, and right chains have no larger share of steps that gain.",
        "",
        "![gain by step of a sampled chain](flow_trace.png)",
        "",
        "## The signs that the paper derives",
        "",
        "E v = -KL <= 0 over steps sampled from the model, E v = KL >= 0 over steps from its posterior: so it is in a "
        "joint distribution of steps and answers, exactly on one that is enumerated (tests, 1e-12). A language model "
        "made to answer at once is none: with Z = sum_s p(s) p(y | s) / p(y), E v = log Z - KL over its own steps.",
        "",
        f"For the teacher, over the chains above, E v is {sampled['mean_gain_of_a_sampled_step']:+.3f} (standard "
        "error "
        f"{sampled['its_standard_error']:.3f}): "
        + (
            "above 0. Thinking pays, which a joint distribution rules out; the paper's sign for ordinary sampling does "
            "not hold for answers at once."
            if sampled["mean_gain_of_a_sampled_step"] > 2 * sampled["its_standard_error"]
            else "not above 0 by two standard errors."
        ),
    ]
    told = record["stories"]
    if told is None:
        lines += ["", "The pretrained character model was not there, so nothing is said about real language."]
    else:
        drawn = told["sampled_sentences"]
        lines += [
            "",
            f"The 0.94 M-parameter character model on {told['stories']} stories that it told itself (sentences are "
            "steps, y "
            "is the last sentence), in nats a character of y:",
            "",
            "| y | gain of the step before it | of all steps |",
            "|---|---|---|",
        ]
        for name, row in told["nats_a_character"].items():
            lines.append(f"| {name} | {row['last step before it']:+.4f} | {row['all steps']:+.4f} |")
        lines += [
            "",
            f"Its own next sentences ({drawn['candidates']} sampled after the first sentence of each of "
            f"{drawn['stories']} stories), towards the last sentence that the story had: E v = {drawn['E v']:+.3f} "
            f"(standard error {drawn['standard error']:.3f}), above 0 in {drawn['stories with E v > 0']} stories; "
            f"log Z = {drawn['log Z']:+.3f} in the mean.",
        ]
    lines += [
        "",
        "## Cost",
        "",
        "CPU time of all gains of one trace, steps of 17 tokens (19 with step tokens), answer of 2 tokens after a "
        "closing of 1; forks at step ends against reading everything anew at each, interleaved in one run.",
        "",
        "| model | tokens | steps | forks, s | anew, s | ratio | largest difference of a gain |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in cost:
        lines.append(
            f"| {row['model']} | {row['tokens']} | {row['steps']} | {row['forks_s']:.3f} | {row['anew_s']:.3f} | "
            f"{row['anew_s'] / row['forks_s']:.1f} | {row['largest_difference']:.0e} |"
        )
    lines += [
        "",
        "One step end (CPU time, fastest of 40):",
        "",
        "| model | after tokens | ms | bytes that a fork holds |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row['model']} | {row['position']} | {row['ms']:.2f} | {row['bytes']:,} |" for row in ends]
    lines += [
        "",
        "## What is not shown",
        "",
        "Real chains of thought of reasoning models: no model that reads them fits here (the character model sees 256 "
        "characters). The posterior prompt of the paper: its template is not published and models this small follow no "
        "instruction; `--posterior-template` takes one. The paper's accuracy figures for guided decoding and RL.",
        "",
    ]
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(14, 4), layout="constrained")
    around, whole, single = figure.subplots(1, 3)
    most = max(row["steps"] for row in record["asked"])
    for row in record["asked"]:
        if row["steps"] == most:
            at = sorted(row["around"])
            around.plot(at, [row["around"][offset] for offset in at], "o-", label=row["model"])
    around.axhline(0, color="black", linewidth=0.8)
    around.set(title=f"chains of {most} steps", xlabel="step, counted from the asked one", ylabel="mean gain, nats")
    around.legend(fontsize=8)
    for name in dict.fromkeys(row["model"] for row in record["whole_traces"]):
        rows = [row for row in record["whole_traces"] if row["model"] == name]
        tokens = [row["tokens"] for row in rows]
        line = whole.loglog(tokens, [row["anew_s"] for row in rows], "x--", label=f"{name}, read anew")[0]
        whole.loglog(tokens, [row["forks_s"] for row in rows], "o-", color=line.get_color(), label=f"{name}, forks")
        rows = [row for row in record["one_step_end"] if row["model"] == name]
        single.plot([row["position"] for row in rows], [row["ms"] for row in rows], "o-", label=name)
    whole.set(title="all gains of a trace", xlabel="tokens", ylabel="CPU seconds")
    lengths = record["size"]["lengths"]
    whole.set_xticks(lengths, [str(length) for length in lengths])
    whole.minorticks_off()
    whole.legend(fontsize=8)
    single.set(title="one step end", xlabel="tokens before it", ylabel="CPU ms", ylim=(0, None))
    single.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and unconverged; prints, writes nothing")
    size = QUICK if parser.parse_args().quick else FULL
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher.copy_teacher(folder / "teacher")
        full = teacher.load_teacher()
        _, *markers = task.tokenizer_with_steps()
        silent = convert(full, step_start_token_ids=markers[0], step_end_token_ids=markers[1])
        student = distil.distil(folder / "teacher", folder, updates=size.updates, seed=0)
        models = {TEACHER: (full, None), STUDENT: (student, markers), SILENT: (silent, markers)}
        rows, malformed = sampled_traces(full, size.sampled)
        result, rewards = through_the_command(rows, folder)
        result.pop("settings")
        timed = {TEACHER: models[TEACHER], STUDENT: models[STUDENT]}
        characters = character_model()
        record = {
            "size": size.__dict__,
            "machine": versions(),
            "problems": size.problems,
            "asked": gains_around_the_asked_step(models, (4, 8, 12), size.problems),
            "malformed": malformed,
            "flow": result,
            "sampled": right_and_wrong(rows, rewards),
            "stories": stories(*characters, size.stories) if characters else None,
            "whole_traces": whole_traces(timed, size.lengths),
            "one_step_end": one_step_end(timed, size.positions),
        }
        record["minutes"] = time.process_time() / 60
        text = page(record)
        if size is FULL:
            RESULTS.mkdir(parents=True, exist_ok=True)
            shown = next((i for i, row in enumerate(rows) if row["asked"] in row["wrong_steps"]), 0)
            flow(
                str(folder / "traces.jsonl"), output_dir=folder / "shown", selection=SelectionOptions(row=shown + 1),
                **settings(folder),
            )  # fmt: skip
            (RESULTS / "flow_trace.png").write_bytes((folder / "shown" / "trace-001.png").read_bytes())
            (RESULTS / "flow.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
            (RESULTS / "flow.md").write_text(text)
            draw(record, RESULTS / "flow.png")
        else:
            draw(record, folder / "flow.png")
    print(text)


if __name__ == "__main__":
    main()
