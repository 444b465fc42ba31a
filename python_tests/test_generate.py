"""The unmodified generate() on state-transition models, step-wise decoding on top of it, and its command."""

import io
import json
from itertools import pairwise

import pytest
import torch
from tiny_models import ENDS, EOS, FAMILIES, STARTS, WORDS, left_padded, random_chain, tiny_base, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast, TextStreamer, pipeline

from statecore import decoding, steps
from statecore import generate as generate_command
from statecore.adapter import convert, save_adapter
from statecore.cache import cache_bytes
from statecore.decoding import DecodingOptions
from statecore.generate import PromptSource, _StepPrinter, generate
from statecore.loading import load_state_transition_model

# Random models hardly ever decode a marker; with this bias they open and close steps.
BIAS = {(token,): 4.0 for token in STARTS + ENDS}


def prompts() -> dict[str, torch.Tensor]:
    inputs = left_padded([random_chain(20, 4, 4), random_chain(13, 5, 3)])
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    names = {"<pad>": 0, "<eos>": EOS} | {f"w{i}": i for i in range(2, WORDS)}
    for i, (start, end) in enumerate(zip(STARTS, ENDS, strict=True)):
        names |= {f"<|step_{i}|>": start, f"<|/step_{i}|>": end}
    core = Tokenizer(models.WordLevel(names | {"<unk>": 59}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


# ----------------------------------------------------------------------------------------------------------------------
# generate() of transformers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "prefill_chunk_size": 7},
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_the_cache_does_not_change_tokens(family, arguments):
    """Decoding over a cleared cache and full passes over the whole sequence give the same tokens."""
    model = tiny_model(family)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        kept = {k: v for k, v in arguments.items() if use_cache or k != "prefill_chunk_size"}
        kept |= {"max_new_tokens": 12, "sequence_bias": BIAS}
        results.append(model.generate(**prompts_of(3), use_cache=use_cache, **kept))
    assert torch.equal(*results)
    new = results[0][:, 20:]
    assert any((new == token).any() for token in STARTS + ENDS)


def prompts_of(seed: int) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return prompts()


def test_left_padding_does_not_change_tokens():
    model = tiny_model()
    rows = [random_chain(20, 4, 4), random_chain(13, 5, 3), random_chain(6, 6, 2)]
    inputs = left_padded(rows)
    together = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
    )
    for row, result in zip(rows, together, strict=True):
        alone = model.generate(torch.tensor([row]), max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert result[20:].tolist() == alone[0, len(row) :].tolist()


def test_a_second_turn_over_the_cache():
    """The input is the whole sequence, as generate() expects."""
    model = tiny_model()
    first, turn = torch.tensor([random_chain(15, 4, 4)]), torch.tensor([[STARTS[1], 7, ENDS[1], 9]])
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cache = DynamicCache(config=model.config)
    first_turn = model.generate(first, past_key_values=cache, **arguments)
    history = torch.cat([first_turn, turn], 1)
    over_cache = model.generate(history, past_key_values=cache, **arguments)
    assert torch.equal(over_cache, model.generate(history, **arguments))
    assert cache.get_seq_length() == over_cache.shape[1] - 1


def test_streamer_and_pipeline(tokenizer, capsys, tmp_path):
    model = tiny_model(dtype=torch.float32)
    ids = torch.tensor([random_chain(12, 4, 3)])
    arguments = {"max_new_tokens": 5, "do_sample": False}
    result = model.generate(ids, streamer=TextStreamer(tokenizer, skip_prompt=True), **arguments)
    assert capsys.readouterr().out.split() == tokenizer.decode(result[0, 12:]).split()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path))
    assert type(pipe.model) is type(model)
    text = tokenizer.decode(ids[0])
    generated = pipe(text, return_full_text=False, **arguments)[0]["generated_text"]
    assert generated.split() == tokenizer.decode(result[0, 12:], skip_special_tokens=True).split()


def test_assisted_decoding_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(torch.tensor([[3, 4]]), assistant_model=tiny_model("llama"), max_new_tokens=3)


def test_finished_rows_stop_growing():
    """A finished row is fed padding until the others finish, which must not add keys and values."""
    model = tiny_model()
    cache = DynamicCache(config=model.config)

    def only_first_ends(batch: int, ids: torch.Tensor) -> list[int]:
        length = len(ids) - 6
        if batch == 0:
            return [EOS] if length == 2 else [5]
        return [STARTS[0]] if length % 4 == 0 else [ENDS[0]] if length % 4 == 3 else [7]

    rows = torch.randint(2, WORDS, (2, 6))
    result = model.generate(
        rows, past_key_values=cache, max_new_tokens=30, do_sample=False, prefix_allowed_tokens_fn=only_first_ends
    )
    assert result[0, 9:].tolist() == [0] * 27
    slots = cache.layers[0].slots
    assert slots.last_step.tolist()[0] == 0
    assert slots.ids.shape[1] <= 6 + 3 + 4  # prompts, the tokens of row 0, the open step of row 1


# ----------------------------------------------------------------------------------------------------------------------
# The grammar of steps


def allowed(model, tokens: list[int], **options) -> set[int]:
    scores = decoding.StepGrammar(model, **options)(torch.tensor([tokens]), torch.zeros(1, 60))
    return set((scores[0] > -torch.inf).nonzero()[:, 0].tolist())


def test_grammar():
    model, words = tiny_model(), set(range(60)) - set(STARTS) - set(ENDS)
    assert allowed(model, [3, 4]) == words | set(STARTS), "no step is open"
    assert allowed(model, [3, STARTS[1], 5]) == words | {ENDS[1]}, "a step closes with its own end token"
    assert allowed(model, [3, STARTS[1], 5, ENDS[1]]) == words | {STARTS[0], STARTS[2]}, "the pattern may not repeat"
    assert allowed(model, [STARTS[1], 5, ENDS[1], 6]) == words | {STARTS[0], STARTS[2]}
    assert allowed(model, [STARTS[1], 5, ENDS[1]], allow_repeats=True) == words | set(STARTS)
    assert allowed(model, [STARTS[2], 5, 6], max_step_tokens=5) == words | {ENDS[2]}
    assert allowed(model, [STARTS[2], 5, 6, 7], max_step_tokens=5) == {ENDS[2]}, "the fifth token must be the last"
    assert allowed(model, [9, 9, 9, 9, 9, 9], max_step_tokens=5) == words | set(STARTS), "a prompt is no step"
    with pytest.raises(ValueError, match="max_step_tokens must be >= 2"):
        decoding.StepGrammar(model, 1)


def test_grammar_treats_rows_independently():
    rows = torch.tensor([[3, STARTS[1], 5], [STARTS[0], 6, ENDS[0]], [3, 4, 5]])
    model = tiny_model()
    together = decoding.StepGrammar(model, 4)(rows, torch.zeros(3, 60))
    for row, scores in zip(rows.tolist(), together, strict=True):
        assert set((scores > -torch.inf).nonzero()[:, 0].tolist()) == allowed(model, row, max_step_tokens=4)


def test_tracker_and_model_follow_the_same_step_rule():
    model = tiny_model()
    for _ in range(20):
        tokens = torch.randint(2, 10, (40,))
        markers = torch.rand(40) < 0.4
        tokens[markers] = torch.tensor(STARTS + ENDS)[torch.randint(0, 6, (int(markers.sum()),))]
        step_rows = model.get_input_embeddings().step_rows(tokens[None])
        ids = steps.steps_from_markers(step_rows, 3, torch.ones(1, 40).bool()).ids[0].tolist()
        tracker = decoding.StepTracker(model.config, tokens[:7].tolist())
        for token in tokens[7:].tolist():
            tracker.feed(token)
        assert [step.number for step in tracker.all_steps for _ in step.tokens] == ids[7:]
        assert [token for step in tracker.all_steps for token in step.tokens] == tokens[7:].tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Step-wise decoding


def test_generate_steps_reports(tokenizer):
    model = tiny_model()
    shown = []
    results = decoding.generate_steps(
        model, [[3, 4, 5, 6], [7, 8]], tokenizer=tokenizer, max_new_tokens=60, max_step_tokens=6, temperature=1.0,
        on_step=lambda row, step: shown.append((row, step)), sequence_bias=BIAS | {(EOS,): -20.0},
    )  # fmt: skip
    for row, result in enumerate(results):
        assert len(result.token_ids) == 60
        assert not result.finished
        closed = [step for step in result.steps if step.closed]
        assert [step for shown_row, step in shown if shown_row == row] == closed
        marked = [step for step in result.steps if step.pattern is not None]
        assert len(marked) >= 4
        assert all(len(step.tokens) <= 6 for step in marked)
        assert all(a.pattern != b.pattern for a, b in pairwise(marked))
        for step in marked:
            assert step.tokens[0] == STARTS[step.pattern]
            assert step.tokens[-1] == ENDS[step.pattern] or not step.closed
            assert step.alpha == pytest.approx(min(0.4, step.number / 4) if step.number > 1 else 0)
        words = [f"w{token}" for token in result.token_ids if token in range(3, WORDS)]
        assert [word for word in result.text.split() if word[0] == "w"] == words
        assert "step" not in result.text
        token_bytes = 3 * 2 * 2 * 8 * 8
        assert result.full_kv_bytes == token_bytes * (4 + 59)  # the last token is not fed
        assert result.peak_kv_bytes < result.full_kv_bytes
        assert result.state_bytes == 3 * 3 * 2 * 8 * 8 * 8
        assert result.ms_per_token > 0


def test_generate_steps_is_generate_with_a_grammar():
    model, prompt = tiny_model(), [3, 4, 5]
    (result,) = decoding.generate_steps(model, [prompt], max_new_tokens=20, max_step_tokens=None, sequence_bias=BIAS)
    grammar = [decoding.StepGrammar(model)]
    plain = model.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, logits_processor=grammar, sequence_bias=BIAS
    )
    assert result.token_ids == plain[0, 3:].tolist()


def test_memory_is_bounded_by_prompt_and_longest_step():
    model = tiny_model()
    options = {"max_step_tokens": 8, "temperature": 1.0, "sequence_bias": BIAS | {(EOS,): -20.0}}
    short, long = (decoding.generate_steps(model, [[3, 4, 5]], max_new_tokens=n, **options)[0] for n in (60, 240))
    token_bytes = 3 * 2 * 2 * 8 * 8
    prologue = next(i for i, token in enumerate(long.token_ids) if token in STARTS)  # counts as prompt
    longest = max(len(step.tokens) for step in long.steps)
    assert longest <= 40
    assert long.peak_kv_bytes <= token_bytes * (3 + prologue + longest)
    assert long.state_bytes == short.state_bytes
    assert long.full_kv_bytes > 3.5 * short.full_kv_bytes


def test_momentum_switch_is_restored():
    model = tiny_model()
    (result,) = decoding.generate_steps(model, [[3, 4]], max_new_tokens=20, momentum=False, sequence_bias=BIAS)
    assert model.mode.momentum
    assert all(step.alpha == 0 for step in result.steps)
    model.set_momentum(False)
    decoding.generate_steps(model, [[3, 4]], max_new_tokens=2)
    assert not model.mode.momentum


def test_full_attention_decodes_as_the_base():
    model = tiny_model()
    with model.full_attention():
        (result,) = decoding.generate_steps(model, [[3, 4, 5]], max_new_tokens=12)
        plain = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=12, do_sample=False)
    assert result.token_ids == plain[0, 3:].tolist()
    assert result.peak_kv_bytes == result.full_kv_bytes
    assert result.state_bytes == 0


def test_keywords_take_precedence_over_options():
    model, options = tiny_model(), DecodingOptions(max_new_tokens=9, temperature=1.0, seed=3)
    (by_options,) = decoding.generate_steps(model, [[3, 4]], options=options, sequence_bias=BIAS)
    (by_keywords,) = decoding.generate_steps(
        model, [[3, 4]], max_new_tokens=9, temperature=1.0, seed=3, sequence_bias=BIAS
    )
    assert by_options.token_ids == by_keywords.token_ids
    (shorter,) = decoding.generate_steps(model, [[3, 4]], options=options, max_new_tokens=4, sequence_bias=BIAS)
    assert shorter.token_ids == by_options.token_ids[:4]
    with pytest.raises(ValueError, match=r"max_new_tokens must be >= 1 and temperature >= 0, got 0 and 1\.0"):
        decoding.generate_steps(model, [[3, 4]], options=options, max_new_tokens=0)


def test_seed_and_empty_prompts():
    model = tiny_model()
    one, same, other = (
        decoding.generate_steps(model, [[3, 4]], max_new_tokens=12, temperature=1.0, seed=seed)[0] for seed in (1, 1, 2)
    )
    assert one.token_ids == same.token_ids
    assert one.token_ids != other.token_ids
    with pytest.raises(ValueError, match="each of at least one token"):
        decoding.generate_steps(model, [[3], []])


# ----------------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def adapter(tmp_path, tokenizer):
    """An adapter folder as training writes it, and its base checkpoint beside it."""
    tiny_base("qwen2").save_pretrained(tmp_path / "base")
    model = convert(tmp_path / "base", step_start_token_ids=STARTS, step_end_token_ids=ENDS, la_rank=6)
    save_adapter(model, tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


SHORT = DecodingOptions(max_new_tokens=6)


def raw(prompt: str | None = None, **source) -> PromptSource:
    return PromptSource(prompt, raw=True, **source)


def test_one_prompt_is_printed(adapter, capsys):
    (result,) = generate(adapter, source=raw("w3 w4 w5"), options=SHORT)
    out = capsys.readouterr().out
    assert "[answer]" in out
    assert f"{len(result.token_ids)} tokens in {len(result.steps)} steps" in out
    assert result.prompt_tokens == 3


def test_steps_are_printed_as_they_end(capsys, tokenizer):
    printer = _StepPrinter(tokenizer, ["a", "b"])
    printer(1, decoding.Step(4, 2, 0.125, [STARTS[2], 5, 6, ENDS[2]], True))
    assert capsys.readouterr().out == "\nb [step 4  pattern 2  4 tokens  alpha 0.125]\nw5 w6\n"


def test_an_unfinished_step_is_printed_with_the_result(capsys, tokenizer):
    start = tokenizer.convert_tokens_to_ids("<|step_0|>")
    words = tokenizer.convert_tokens_to_ids(["w5", "w6"])
    step = decoding.Step(number=1, pattern=0, alpha=0.0, tokens=[start, *words], closed=False)
    cut = decoding.Generation(3, step.tokens, [step], False, "w5 w6", "", 1024, 2048, 4096, None)
    _StepPrinter(tokenizer, ["a"]).result("a", cut)
    assert "[step 1  pattern 0  3 tokens  unfinished]\nw5 w6\n" in capsys.readouterr().out


def test_file_in_file_out_and_resume(adapter, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out" / "results.jsonl"
    rows = [{"id": f"p{i}", "question": " ".join(f"w{j}" for j in range(2, 4 + i))} for i in range(5)]
    source.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    prompts = raw(input=source, prompt_field="question")
    arguments = {"source": prompts, "output": output, "batch_size": 2, "options": SHORT}
    assert len(generate(adapter, **arguments)) == 5
    whole = output.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["id"] for line in lines] == ["p0", "p1", "p2", "p3", "p4"]
    assert {"text", "answer", "steps", "tokens", "peak_kv_bytes", "state_bytes", "full_kv_bytes"} <= lines[0].keys()
    # A run that was killed while writing a line resumes after the last complete one.
    output.write_text("\n".join(whole.splitlines()[:3]) + '\n{"id": "p3", "te')
    assert len(generate(adapter, **arguments)) == 2
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == ["p0", "p1", "p2", "p3", "p4"]
    assert [json.loads(line)["answer"] for line in output.read_text().splitlines()] == [
        line["answer"] for line in lines
    ]
    assert generate(adapter, **arguments) == []


def test_stdin(adapter, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("w3 w4\n"))
    assert generate(adapter, source=raw(input="-"), options=SHORT, quiet=True)[0].prompt_tokens == 2
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "w3"}\n{"prompt": "w4 w5"}\n'))
    assert [one.prompt_tokens for one in generate(adapter, source=raw(input="-"), options=SHORT, quiet=True)] == [1, 2]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"prompt": "a"}\n{"prompt": ', "line 2: expected a JSON object"),
        ('{"prompt": "a"}\n{"text": "b"}', "line 2: expected a text in the field 'prompt', got None"),
        ('{"prompt": "a", "id": 7}\n{"prompt": "b", "id": "7"}', "'7' comes several times"),
    ],
)
def test_invalid_input_is_named(content, message, adapter, tmp_path):
    (tmp_path / "in").write_text(content)
    with pytest.raises(ValueError, match=message):
        generate(adapter, source=raw(input=tmp_path / "in"), options=SHORT)


def test_the_command_offers_the_engine():
    assert generate_command.generate_steps is decoding.generate_steps
    assert all(hasattr(generate_command, name) for name in generate_command.__all__)


def test_generate_refuses(adapter, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="either a prompt or an input file"):
        generate(adapter, source=PromptSource())
    with pytest.raises(
        ValueError, match="must be a state-transition checkpoint or an adapter folder, got a plain Qwen2"
    ):
        load_state_transition_model(adapter.parent / "base")
    with pytest.raises(ValueError, match="no chat template"):
        generate(adapter, source=PromptSource("w3"))
    with pytest.raises(ValueError, match="pass `tokenizer`"):
        generate(tiny_model(), source=PromptSource("w3"))
    (tmp_path / "other.jsonl").write_text("not ours\n")
    with pytest.raises(ValueError, match="must hold results of this command"):
        generate(adapter, source=raw("w3"), output=tmp_path / "other.jsonl", options=SHORT)


def test_prompts_are_built_as_the_training_set_was(adapter, tokenizer):
    form = {"template": "w9 {prompt} w8 ", "think_open": "w7", "think_close": ""}
    (adapter / "patterns.json").write_text(json.dumps({"patterns": [], "prompt": form}))
    arguments = {"source": PromptSource("w3 w4"), "options": DecodingOptions(max_new_tokens=2), "quiet": True}
    (result,) = generate(adapter, **arguments)
    assert result.prompt_tokens == 5
    # The same with the tokenizer in a subfolder, where `prepare` writes it.
    tokenizer.save_pretrained(adapter / "tokenizer")
    (again,) = generate(adapter, **arguments)
    assert again.token_ids == result.token_ids


def test_peak_includes_cleared_slots():
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[3, STARTS[0], 5, ENDS[0]]]), past_key_values=cache)
    used = cache_bytes(cache)
    assert used.peak_kv == 4 * used.kv
