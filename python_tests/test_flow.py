"""Step information gain: the paper's identities on a model small enough to enumerate, forks against reading everything
again, and the command on traces of every form.
"""

import json
import math
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from text_cases import byte_pair_tokenizer, chains, character_tokenizer, save_language_model
from text_cases import tiny_model as tiny_language_model
from tiny_models import ENDS, FAMILIES, STARTS, WORDS, tiny_base, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
)
from typer.testing import CliRunner

from statecore.adapter import convert, save_adapter
from statecore.cache import cache_bytes
from statecore.cli import app
from statecore.data import PromptOptions
from statecore.demo import task
from statecore.flow import (
    candidate_gains,
    continuation_log_probs,
    mark_steps,
    prompted_gains,
    read,
    step_gains,
    token_log_probs,
)
from statecore.flow.command import OutputOptions, ScoringOptions, SelectionOptions, flow
from statecore.flow.readers import ChainFields
from statecore.loading import ModelOptions, load_causal_lm
from statecore.segmentation import StepOptions

EXACT = 1e-12

# ----------------------------------------------------------------------------------------------------------------------
# A joint distribution of steps and answers, small enough to enumerate

PROMPT, CLOSE, SYMBOLS, STEP, STEPS = 4, 3, 3, 2, 2  # two steps of two symbols out of three; an answer of two symbols
STEP_VALUES = list(product(range(SYMBOLS), repeat=STEP))


class JointModel(nn.Module):
    """A causal language model of a random joint distribution p(s_1, s_2, y), without a cache.

    Step symbols follow their conditional distribution given the symbols before them, and after CLOSE, wherever it
    appears, so do the answer's.
    """

    def __init__(self):
        super().__init__()
        sizes = [SYMBOLS] * (STEP * STEPS + 2)
        self.joint = nn.Parameter(torch.randn(sizes, dtype=torch.float64).mul(1.5).flatten().softmax(0).view(sizes))

    def of(self, steps=(), answer=()):
        """p(first step symbols, first answer symbols), marginalised over all others."""
        index = [*steps, *[slice(None)] * (STEP * STEPS - len(steps)), *answer]
        return self.joint[tuple(index)].sum()

    def forward(self, input_ids, **kwargs):
        logits = torch.full((*input_ids.shape, 5), -math.inf, dtype=torch.float64)
        for b, row in enumerate(input_ids.tolist()):
            for t in range(len(row)):
                prefix = row[1 : t + 1]
                steps = prefix[: prefix.index(CLOSE)] if CLOSE in prefix else prefix
                answer = prefix[len(steps) + 1 :] if CLOSE in prefix else None
                if (answer is None and len(steps) == STEP * STEPS) or len(answer or ()) == 2:
                    logits[b, t] = 0.0  # no symbol follows
                    continue
                for symbol in range(SYMBOLS):
                    extended = self.of([*steps, symbol]) if answer is None else self.of(steps, [*answer, symbol])
                    logits[b, t, symbol] = extended.log()
        return SimpleNamespace(logits=logits)


def test_both_forms_match_enumeration():
    model = JointModel()
    with torch.no_grad():
        for steps in list(product(range(SYMBOLS), repeat=STEP * STEPS))[::7]:
            answer = [steps[0], steps[-1]]
            known = [model.of(steps[: STEP * i], answer) / model.of(steps[: STEP * i]) for i in range(STEPS + 1)]
            bayes = []
            for i in range(STEPS):  # posterior and prior of a step, each a ratio of marginals
                before, after = steps[: STEP * i], steps[: STEP * (i + 1)]
                posterior = model.of(after, answer) / model.of(before, answer)
                bayes.append((posterior / (model.of(after) / model.of(before))).log())
            arguments = ([PROMPT, *steps], [1, 1 + STEP, 1 + 2 * STEP], answer)
            for method in ("difference", "posterior"):
                found = step_gains(model, *arguments, closing=[CLOSE], method=method)
                torch.testing.assert_close(found.log_likelihoods, torch.stack(known).log(), atol=EXACT, rtol=0)
                torch.testing.assert_close(found.gains, torch.stack(bayes), atol=EXACT, rtol=0)
                total = (known[-1] / known[0]).log()
                assert abs(found.gains.sum() - total) < EXACT, "gains do not sum to the total"
            first = model.of(steps[:STEP]).log()
            assert abs(found.prior[0] - first) < EXACT
            assert abs(found.posterior[0] - (bayes[0] + first)) < EXACT


@pytest.mark.parametrize("before", [(), (2, 0)])
def test_signs_in_a_joint_distribution(before):
    """E_prior v = -KL(prior || posterior) <= 0 <= KL(posterior || prior) = E_posterior v."""
    model = JointModel()
    context = read(model, [PROMPT, *before])
    for answer in product(range(SYMBOLS), repeat=2):
        found = candidate_gains(model, context, STEP_VALUES, list(answer), closing=[CLOSE])
        with torch.no_grad():
            whole = model.of(before, answer)
            posterior = torch.stack([model.of([*before, *step], answer) / whole for step in STEP_VALUES])
            prior = torch.stack([model.of([*before, *step]) / model.of(before) for step in STEP_VALUES])
        torch.testing.assert_close(found.posterior.exp(), posterior, atol=EXACT, rtol=0)
        torch.testing.assert_close(found.prior.exp(), prior, atol=EXACT, rtol=0)
        assert abs(found.log_evidence) < EXACT
        expected = (prior * found.gains).sum(), (posterior * found.gains).sum()
        assert abs(expected[0] + (prior * (prior / posterior).log()).sum()) < EXACT
        assert abs(expected[1] - (posterior * (posterior / prior).log()).sum()) < EXACT
        assert expected[0] < 0 < expected[1]


def assert_signs_up_to_evidence(found, tolerance):
    """The sign identities with log Z, for a model whose immediate answers form no joint distribution with its steps."""
    prior, posterior, evidence = found.prior.exp(), found.posterior.exp(), found.log_evidence
    divergences = (found.prior - found.posterior) * prior, (found.posterior - found.prior) * posterior
    assert abs(prior.sum() - 1) < tolerance
    assert abs((prior * found.gains).sum() - (evidence - divergences[0].sum())) < tolerance
    assert abs((posterior * found.gains).sum() - (evidence + divergences[1].sum())) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_signs_in_a_language_model(family):
    """All steps of two tokens, all answers of one: the evidence is the answer's probability one step later."""
    model = tiny_base(family, torch.float64, vocab_size=7)
    context = read(model, [2, 5, 3])
    steps = list(product(range(7), repeat=2))
    evidence = []
    for answer in range(7):
        found = candidate_gains(model, context, steps, [answer], closing=[6], batch_size=20)
        assert_signs_up_to_evidence(found, 1e-10)
        evidence.append(found.log_evidence + found.log_likelihood)
        if answer == 3:
            alone = [token_log_probs(model, [2, 5, 3, *step, 6, 3]) for step in steps]
            expected = torch.stack([row[2:4].sum() + row[-1] for row in alone]).logsumexp(0)
            assert abs(evidence[-1] - expected) < 1e-10
    assert abs(torch.stack(evidence).exp().sum() - 1) < 1e-10
    assert abs(found.log_evidence) > 1e-3, "a random model should be no joint distribution"


# ----------------------------------------------------------------------------------------------------------------------
# Forks


def words(*lengths: int) -> list[list[int]]:
    return [torch.randint(2, WORDS, (length,)).tolist() for length in lengths]


def chain_of(model, prompt: int = 5, lengths=(4, 3, 6, 1, 5)):
    """(tokens, step_ends) of random words, with step tokens for a state-transition model."""
    head, *steps = words(prompt, *lengths)
    if hasattr(model.config, "step_start_token_ids"):
        steps = [[STARTS[i % 3], *step, ENDS[i % 3]] for i, step in enumerate(steps)]
    tokens, ends = head, [len(head)]
    for step in steps:
        tokens = tokens + step
        ends.append(len(tokens))
    return tokens, ends


def other(name: str):
    small = {"vocab_size": 60, "num_hidden_layers": 2, "hidden_size": 32, "initializer_range": 0.3}
    if name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3))
    elif name == "sliding window":
        heads = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 7}
        model = MistralForCausalLM(MistralConfig(**small, **heads))
    else:
        sizes = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 4}
        model = Mamba2ForCausalLM(Mamba2Config(**small, **sizes))
    return model.double().eval()


MODELS = {family: lambda family=family: tiny_base(family, torch.float64) for family in FAMILIES}
MODELS |= {f"state-transition {family}": lambda family=family: tiny_model(family) for family in FAMILIES}
MODELS |= {name: lambda name=name: other(name) for name in ("gpt2", "sliding window", "mamba2")}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("closing", "answer"), [(0, 1), (0, 4), (2, 1), (3, 5)])
def test_forks_recomputation_and_bayes_agree(name, closing, answer):
    model = MODELS[name]()
    tokens, ends = chain_of(model)
    closing, answer = words(closing, answer)
    forked = step_gains(model, tokens, ends, answer, closing=closing)
    recomputed = step_gains(model, tokens, ends, answer, closing=closing, cached=False)
    bayes = step_gains(model, tokens, ends, answer, closing=closing, method="posterior")
    assert forked.cached
    assert not recomputed.cached
    close = 1e-5 if name == "mamba2" else 1e-9  # its states are float32 in any model
    for found in (recomputed, bayes):
        torch.testing.assert_close(found.gains, forked.gains, atol=close, rtol=0)
        torch.testing.assert_close(found.log_likelihoods, forked.log_likelihoods, atol=close, rtol=0)
    difference = forked.log_likelihoods[-1] - forked.log_likelihoods[0]
    assert abs(forked.gains.sum() - difference) < 1e-12
    assert forked.gains.abs().max() > 1e-3
    one_pass = token_log_probs(model, [*tokens, *closing, *answer])[-len(answer) :].sum()
    assert abs(one_pass - forked.log_likelihoods[-1]) < close


def test_a_cache_that_cannot_be_continued_is_not_used(monkeypatch):
    """If a model ignores its state when several tokens follow at once, everything is read again, as the result says."""
    model = other("mamba2")
    forward = model.forward

    def forgetful(input_ids, cache_params=None, **kwargs):
        return forward(input_ids, cache_params=None, **kwargs)

    monkeypatch.setattr(model, "forward", forgetful)
    tokens, ends = chain_of(model)
    found = step_gains(model, tokens, ends, [3, 4])
    assert not found.cached
    expected = step_gains(model, tokens, ends, [3, 4], method="posterior")
    torch.testing.assert_close(found.gains, expected.gains, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["qwen2", "state-transition llama"])
def test_a_step_end_costs_only_the_answers_tokens(name, monkeypatch):
    model = MODELS[name]()
    tokens, ends = chain_of(model)
    forward, passes = model.forward, []

    def counted(input_ids, past_key_values=None, logits_to_keep=0, **kwargs):
        out = forward(input_ids, past_key_values=past_key_values, logits_to_keep=logits_to_keep, **kwargs)
        passes.append((input_ids.shape[1], out.past_key_values.layers[0].keys.shape[2]))
        return out

    monkeypatch.setattr(model, "forward", counted)
    step_gains(model, tokens, ends, [3, 4, 5], closing=[7, 8])
    sizes = [size for size, _ in passes]
    assert sizes[1::2] == [2 + 3 - 1] * len(ends)
    assert sum(sizes[0::2]) == len(tokens)
    if name.startswith("state"):
        held = {kept for _, kept in passes[3::2]}  # after a closed step: prompt and answer, however long the chain is
        assert held == {ends[0] + 4}


@pytest.mark.parametrize("name", ["qwen2", "state-transition qwen3", "mamba2"])
def test_continuations_leave_the_context_unchanged(name):
    model = MODELS[name]()
    tokens, _ = chain_of(model)
    context = read(model, tokens)
    first = continuation_log_probs(model, context, [[3, 4, 5]])[0]
    read(model, [9, 8, 7], read(model, [6, 6], context))
    continuation_log_probs(model, context, [[9, 9], [1, 2, 3, 4]])
    assert torch.equal(first, continuation_log_probs(model, context, [[3, 4, 5]])[0])
    if name.startswith("state"):
        assert cache_bytes(context.cache).state == cache_bytes(read(model, [6, 6], context).cache).state


@pytest.mark.parametrize("name", ["llama", "state-transition qwen2", "mamba2"])
def test_batched_candidates_match_single_chains(name):
    model = MODELS[name]()
    tokens, _ = chain_of(model, lengths=(4, 3))
    candidates = words(3, 1, 6, 2)
    if name.startswith("state"):
        candidates = [[STARTS[1], *step, ENDS[1]] for step in candidates]
    closing, answer = words(2, 3)
    found = candidate_gains(model, read(model, tokens), candidates, answer, closing=closing, batch_size=3)
    for i, step in enumerate(candidates):
        ends = [len(tokens), len(tokens) + len(step)]
        single = step_gains(model, tokens + step, ends, answer, closing=closing, method="posterior")
        assert abs(found.gains[i] - single.gains[0]) < (1e-5 if name == "mamba2" else 1e-9)
        assert abs(found.prior[i] - single.prior[0]) < (1e-5 if name == "mamba2" else 1e-9)
    assert abs(found.posterior.exp().sum() - 1) < 1e-12


def test_a_training_model_is_scored_without_dropout_and_stays_in_training_mode():
    model = tiny_base("qwen2", torch.float64, attention_dropout=0.5)
    tokens, ends = chain_of(model)
    expected = step_gains(model, tokens, ends, [3]).gains
    model.train()
    assert torch.equal(step_gains(model, tokens, ends, [3]).gains, expected)
    assert model.training


def test_prompted_posterior():
    model = tiny_base("qwen2", torch.float64)
    tokens, ends = chain_of(model)
    told = words(7)[0]
    found = prompted_gains(model, tokens, ends, told)
    without_answer = model(torch.tensor([tokens])).logits.log_softmax(-1)[0]
    with_answer = model(torch.tensor([told + tokens[ends[0] :]])).logits.log_softmax(-1)[0]
    shift = len(told) - ends[0]
    for i in range(len(ends) - 1):
        place = range(ends[i], ends[i + 1])
        prior = sum(without_answer[t - 1, tokens[t]] for t in place)
        posterior = sum(with_answer[t - 1 + shift, tokens[t]] for t in place)
        assert abs(found.gains[i] - (posterior - prior)) < 1e-10
    same_prompt = prompted_gains(model, tokens, ends, tokens[: ends[0]])
    assert torch.equal(same_prompt.gains, torch.zeros(len(ends) - 1).double())


def test_steps_are_marked_with_the_likeliest_pattern():
    model = tiny_model("qwen2")
    prompt, *steps = words(4, 3, 5, 2)
    tokens, ends, patterns = mark_steps(model, prompt, steps)
    assert [t for t in tokens if t < 50] == [*prompt, *[t for step in steps for t in step]]
    for pattern, begin, end in zip(patterns, ends, ends[1:], strict=False):
        assert (tokens[begin], tokens[end - 1]) == (STARTS[pattern], ENDS[pattern])
        logits = model(torch.tensor([tokens[:begin]])).logits[0, -1, STARTS]
        assert int(logits.argmax()) == pattern
    assert ends[-1] == len(tokens)


@pytest.mark.parametrize(
    ("ends", "answer", "method", "message"),
    [
        ([5], [3], "difference", "one step or more"),
        ([5, 9, 9], [3], "difference", "must grow"),
        ([0, 4], [3], "difference", "must grow"),
        ([5, 99], [3], "difference", "must grow"),
        ([5, 9], [], "difference", "at least one token"),
        ([5, 9], [3], "flow", "difference"),
        ([5, 9], [60], "difference", "vocabulary"),
    ],
)
def test_bad_chains_are_refused(ends, answer, method, message):
    model = tiny_base("qwen2")
    with pytest.raises(ValueError, match=message):
        step_gains(model, words(12)[0], ends, answer, method=method)


def test_a_pretrained_model(shared):
    """The 0.94 M-parameter character model: forks, recomputation and Bayes agree; the step that gives the name makes it
    likelier; the sum over all next characters behaves as the theory says.
    """
    data = shared / "data/tiny_lm"
    model = Qwen2ForCausalLM.from_pretrained(data / "babyllama105-qwen2").double().eval()
    known = [line.split("\t")[0] for line in (data / "babyllama_tok105/tok105.vocab").read_text().splitlines()]
    of = {character: i for i, character in enumerate(known)}

    def encode(text: str) -> list[int]:
        return [of[c] for c in text.replace(" ", "▁")]

    prompt, *steps = "▁Once upon a time, there was a boy.", " His name was Ben.", " He had a red ball."
    tokens, ends = [1, *encode(prompt)], []
    ends.append(len(tokens))
    for step in steps:
        tokens += encode(step)
        ends.append(len(tokens))
    answer, closing = encode("Ben"), encode(" One day, ")
    forked = step_gains(model, tokens, ends, answer, closing=closing)
    for arguments in ({"cached": False}, {"method": "posterior"}):
        found = step_gains(model, tokens, ends, answer, closing=closing, **arguments)
        torch.testing.assert_close(found.gains, forked.gains, atol=1e-8, rtol=0)
    assert forked.gains[0] > 1.5
    context = read(model, tokens[: ends[0]])
    every = candidate_gains(model, context, [[i] for i in range(len(known))], answer, closing=closing)
    assert_signs_up_to_evidence(every, 1e-8)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PROMPT_TEMPLATE = "Question: {prompt}\n"
SETTINGS = {"prompt": PromptOptions(PROMPT_TEMPLATE), "steps": StepOptions(8, 64)}


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return str(save_language_model(tmp_path_factory.mktemp("language")))


def test_a_file_of_traces(tmp_path, language, capsys):
    rows = [row | {"correct": i % 3 > 0} for i, row in enumerate(chains(8))]
    rows[5] = {"id": "broken", "problem": "?", "thinking": "Hm."}
    rows[6] |= {"thinking": "So it is. " * 60}  # too long for the model
    labels = [{"id": f"row-{i}", "spans": [[0, 40, "begin"], [40, 5000, "rest"]]} for i in range(8)]
    write_rows(tmp_path / "labels.jsonl", labels)
    source = write_rows(tmp_path / "traces.jsonl", rows)
    options = {"model": language, "labels": str(tmp_path / "labels.jsonl"), **SETTINGS}
    results = tmp_path / "results"
    outputs = OutputOptions(tmp_path / "rewards.jsonl", pictures=2)
    result = flow(source, output_dir=results, outputs=outputs, **options)
    assert {p.name for p in results.iterdir()} == {
        "flow.json", "report.md", "summary.png", "trace-001.png", "trace-001.json", "trace-002.png", "trace-002.json",
    }  # fmt: skip
    assert result["traces"] == 6
    assert [r["reason"] for r in result["left_out"]] == ["no_answer", "too_long"]
    assert set(result["by_kind"]) == {"opening", "category"}
    assert (result["correctness"]["right"], result["correctness"]["wrong"]) == (4, 2)
    assert -1 <= result["correctness"]["total gain"]["correlation"] <= 1
    assert json.loads((results / "flow.json").read_text()) == json.loads(json.dumps(result))
    assert "## Where gain is made and lost" in capsys.readouterr().out
    lines = read_rows(tmp_path / "rewards.jsonl")
    assert [line["id"] for line in lines] == [f"row-{i}" for i in (0, 1, 2, 3, 4, 7)]
    for line in lines:
        known = line["answer_log_likelihoods"]
        assert len(known) == len(line["steps"]) + 1
        thinking = rows[int(line["id"][4:])]["thinking"]
        for i, step in enumerate(line["steps"]):
            assert abs(step["gain"] - (known[i + 1] - known[i])) < 1e-12
            assert thinking[step["begin"] : step["end"]].strip() == step["text"]
    steps = sum(len(line["steps"]) for line in lines)
    assert result["steps"]["steps"] == steps == sum(part["steps"] for part in result["by_part_of_the_trace"])

    outputs = OutputOptions(tmp_path / "bayes.jsonl", pictures=2)
    by_bayes = flow(source, scoring=ScoringOptions("posterior"), outputs=outputs, **options)
    for line, same in zip(lines, read_rows(tmp_path / "bayes.jsonl"), strict=True):
        gains = [[step["gain"] for step in row["steps"]] for row in (line, same)]
        torch.testing.assert_close(*map(torch.tensor, gains), atol=1e-3, rtol=0)
    assert by_bayes["traces"] == 6
    with pytest.raises(FileExistsError, match="overwriting"):
        flow(source, output_dir=results, outputs=OutputOptions(pictures=2), **options)
    flow(source, output_dir=results, outputs=OutputOptions(pictures=2, overwrite=True), **options)


def test_one_trace_against_the_api(tmp_path, language, capsys):
    """Assembles by hand what the command feeds the model: text up to each step's end, closing, answer."""
    row = chains(1)[0]
    source = tmp_path / "trace.json"
    source.write_text(json.dumps(row))
    outputs, loading = OutputOptions(tmp_path / "r.jsonl"), ModelOptions(dtype="float64")
    flow(str(source), model=language, outputs=outputs, loading=loading, **SETTINGS)
    assert "nats" in capsys.readouterr().out
    line = json.loads((tmp_path / "r.jsonl").read_text())
    tokenizer, model = character_tokenizer(), load_causal_lm(language, dtype="float64")
    head, close = f"Question: {row['problem']}\n<think>\n", "\n</think>\n\n"
    for known, end in zip(line["answer_log_likelihoods"], [0, *(s["end"] for s in line["steps"])], strict=True):
        # As in `prepare`, white space after a step belongs to the step, and any before </think> to the last step.
        last = end == len(row["thinking"])
        given = tokenizer(head + row["thinking"][:end] + (close if last else close.lstrip())).input_ids
        tokens = [*given, *tokenizer(row["answer"]).input_ids, tokenizer.eos_token_id]
        assert abs(known - token_log_probs(model, tokens)[len(given) - 1 :].sum().item()) < 1e-9


def test_from_the_command_line(tmp_path, language, monkeypatch):
    source, path = write_rows(tmp_path / "t.jsonl", chains(2)), str(tmp_path / "r.jsonl")
    line = ["flow", source, "--model", language, "--rewards", path, "--prompt-template", "{prompt}", "--no-score-end"]
    line += ["--min-step-tokens", "8", "--max-step-tokens", "64", "--method", "posterior", "--limit", "1"]
    monkeypatch.setattr(sys, "argv", ["statecore", *line])
    outcome = CliRunner().invoke(app, line)
    assert outcome.exit_code == 0, outcome.output
    assert len(read_rows(tmp_path / "r.jsonl")) == 1
    assert CliRunner().invoke(app, line).exit_code == 1, "the rewards exist already"


def test_rows_and_answers_can_be_chosen(tmp_path, language):
    rows = [row | {"gold": str(i)} for i, row in enumerate(chains(4))]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    prompt = PromptOptions(PROMPT_TEMPLATE, think_close="\nSo the answer is ")
    options = {"model": language, "fields": ChainFields(answer="gold"), **SETTINGS, "prompt": prompt}
    outputs = OutputOptions(tmp_path / "r.jsonl")
    flow(str(tmp_path), selection=SelectionOptions(row=3), outputs=outputs, **options)
    line = json.loads((tmp_path / "r.jsonl").read_text())
    assert (line["id"], line["answer"]) == ("row-2", "2")
    with pytest.raises(ValueError, match="no row 9"):
        flow(str(tmp_path), selection=SelectionOptions(row=9), **options)
    result = flow(str(tmp_path / "all.json"), selection=SelectionOptions(limit=2), **options)
    assert "no row says" in result["correctness"]["not_measured"]


def test_a_prompted_posterior(tmp_path, language):
    source = write_rows(tmp_path / "t.jsonl", chains(2))
    scoring, outputs = ScoringOptions("posterior", "{prompt} (It is {answer})"), OutputOptions(tmp_path / "r.jsonl")
    flow(source, model=language, output_dir=tmp_path / "out", scoring=scoring, outputs=outputs, **SETTINGS)
    line = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])
    assert line["answer_log_likelihoods"] is None
    assert any(abs(step["gain"]) > 1e-6 for step in line["steps"])
    with pytest.raises(ValueError, match="answer"):
        flow(source, model=language, scoring=ScoringOptions("posterior", "{prompt}"), **SETTINGS)


def test_a_state_transition_model_on_text(tmp_path, language, capsys):
    base = Qwen2ForCausalLM.from_pretrained(language)
    size = base.config.vocab_size
    model = convert(language, step_start_token_ids=[size, size + 1], step_end_token_ids=[size + 2, size + 3], la_rank=4)
    folder = tmp_path / "model"
    save_adapter(model, folder)
    character_tokenizer().save_pretrained(folder / "tokenizer")
    source = write_rows(tmp_path / "t.jsonl", chains(3))
    loading = ModelOptions(base=language)
    result = flow(source, model=str(folder), output_dir=tmp_path / "out", loading=loading, **SETTINGS)
    assert set(result["by_kind"]) == {"opening", "pattern"}
    assert result["read_anew_at_every_step_end"] == 0
    capsys.readouterr()


def test_a_prepared_set(tmp_path, capsys):
    """The demo's training set, read by an ordinary and by a state-transition model."""
    _, starts, ends = task.tokenizer_with_steps()
    problems = task.draw(3, 4, torch.Generator().manual_seed(0))
    folder = task.write_training_set(tmp_path / "set", {"train": task.training_rows(problems, starts, ends)})
    base = tiny_language_model(len(task.TOKEN_ID), tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    save_adapter(
        convert(str(tmp_path / "base"), step_start_token_ids=starts, step_end_token_ids=ends, la_rank=4),
        tmp_path / "model",
    )
    for model in ("base", "model"):
        path = tmp_path / f"{model}.jsonl"
        loading = ModelOptions(dtype="float64")
        result = flow(str(folder), model=str(tmp_path / model), loading=loading, outputs=OutputOptions(path))
        assert set(result["by_kind"]["pattern"]) <= set(task.PATTERNS)
        lines = read_rows(path)
        assert len(lines) == 3
        assert [step["tokens"] for step in lines[0]["steps"]] == [
            task.STEP_TOKENS + (2 if model == "model" else 0) + (i == 3) for i in range(4)
        ]
        loaded = load_causal_lm(str(tmp_path / model), dtype="float64")
        ids = problems.input_ids if model == "base" else task.with_step_tokens(problems, starts, ends)
        expected = token_log_probs(loaded, ids[1].tolist())[-task.ANSWER_TOKENS :].sum()
        assert abs(lines[1]["answer_log_likelihoods"][-1] - expected) < 1e-9
        assert lines[1]["answer"] == task.make_tokenizer().decode(problems.answers[1, :2])
    capsys.readouterr()
    with pytest.raises(ValueError, match="no part 'eval'"):
        flow(str(folder), model=str(tmp_path / "base"), selection=SelectionOptions(split="eval"))
    with pytest.raises(ValueError, match="prompts as texts"):
        flow(str(folder), model=str(tmp_path / "base"), scoring=ScoringOptions("posterior", "{answer}"))


def test_unusable_rows_and_settings_are_named(tmp_path, language):
    good = write_rows(tmp_path / "t.jsonl", chains(2))
    options = {"model": language} | SETTINGS
    for row, message in [
        ({"problem": "?", "thinking": "So.", "answer": " "}, "no_answer"),
        ({"problem": "?", "answer": "1"}, "no_thinking"),
        ({"problem": "?", "thinking": "   ", "answer": "1"}, "no_thinking"),
    ]:
        with pytest.raises(ValueError, match=message):
            flow(write_rows(tmp_path / "bad.jsonl", [row]), **options)
    with pytest.raises(ValueError, match="strict"):
        flow(
            str(tmp_path / "bad.jsonl"),
            output_dir=tmp_path / "never",
            selection=SelectionOptions(strict=True),
            outputs=OutputOptions(tmp_path / "never.jsonl"),
            **options,
        )
    assert not [path for path in tmp_path.iterdir() if "never" in path.name], "a failed run left files behind"
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    for source, message in [("empty", "must hold"), ("broken.json", "JSON object")]:
        with pytest.raises(ValueError, match=message):
            flow(str(tmp_path / source), **options)
    with pytest.raises(ValueError, match="chat template"):
        flow(good, model=language)
    with pytest.raises(ValueError, match="min_step_tokens"):
        flow(good, **(options | {"steps": StepOptions(8, 9)}))
    other = tmp_path / "other"
    tiny_language_model(30).save_pretrained(other)
    loading = ModelOptions(tokenizer=f"{language}/tokenizer")
    with pytest.raises(ValueError, match="not this model's"):
        flow(good, loading=loading, **(options | {"model": str(other)}))
    headless = tmp_path / "headless"
    tiny_language_model(30, tie_word_embeddings=False).model.save_pretrained(headless)
    with pytest.raises(ValueError, match="weights are missing"):
        flow(good, loading=loading, **(options | {"model": str(headless)}))


@pytest.mark.parametrize(
    ("thinking", "think_close"),
    [("Hmm, so it goes. Wait, it is six.", "</think>"), ("Hmm, it is five。Wait, it is six.", "\n</think>\n")],
)
def test_a_tokenizer_that_merges_across_a_border(tmp_path, thinking, think_close, capsys):
    """Words as tokens: one token holds the end of the thinking and the answer, or the end of one step and the next."""
    pieces = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "Wait,": 2, "it": 3}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>", eos_token="<eos>")
    tokenizer.save_pretrained(tmp_path / "model" / "tokenizer")
    tiny_language_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "steps": StepOptions(1, 64)}
    row = {"problem": "How many?", "thinking": thinking, "answer": "It is six."}
    prompt = PromptOptions("{prompt}\n", think_close=think_close)
    with pytest.raises(ValueError, match="merged_border"):
        flow(write_rows(tmp_path / "t.jsonl", [row]), prompt=prompt, **options)
    row["thinking"] = thinking.replace("。", ". ")
    prompt = PromptOptions("{prompt}\n", think_close="\n</think>\n")
    assert flow(write_rows(tmp_path / "t.jsonl", [row]), prompt=prompt, **options)["traces"] == 1
    assert "Wait, it is six." in capsys.readouterr().out


def test_the_byte_pairs_of_large_models(tmp_path):
    """White space that shares a token with a word or punctuation mark stays with it, after the border."""
    tokenizer = byte_pair_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model" / "tokenizer")
    tiny_language_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    source = write_rows(tmp_path / "t.jsonl", chains(3))
    result = flow(source, model=str(tmp_path / "model"), steps=StepOptions(4, 64))
    assert result["traces"] == 3
