"""The demo: task, teacher, measurements and page."""

import html.parser
import inspect
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, Qwen2ForCausalLM

from statecore import demo
from statecore.adapter import convert
from statecore.data import PaddedCollator, load_prepared
from statecore.demo import distil, measure, page, task, teacher


def draw(count: int, steps: int, seed: int = 0) -> task.Problems:
    return task.draw(count, steps, torch.Generator().manual_seed(seed))


def untrained_student(base: Qwen2ForCausalLM | None = None):
    _, starts, ends = task.tokenizer_with_steps()
    torch.manual_seed(1)
    base = base or teacher.new_teacher().eval()
    return convert(base, step_start_token_ids=starts, step_end_token_ids=ends, la_rank=4)


# ----------------------------------------------------------------------------------------------------------------------
# Task


def solve(prompt: list[str]) -> list[str]:
    """The solution of a problem, computed from the words of its prompt as the module's docstring describes."""
    _, p, q, asked, last, *given = prompt
    p, q, asked, last = int(p[1:]), int(q[1:]), int(asked[2:]), int(last[3:])
    names = [int(word[1:-1]) for word in given[0::2]]
    terms = dict(zip(names, map(int, given[1::2]), strict=True))
    words, t = [], names[-1]
    while t != last:
        minus, t = terms[t] % 2, (t + 1) % task.NAMES
        numbers = [terms[(t - p) % task.NAMES], terms[(t - q) % task.NAMES]]
        for _ in range(10):
            numbers.append((numbers[-2] - numbers[-1] if minus else numbers[-2] + numbers[-1]) % 10)
        terms[t] = numbers[-1]
        words += [f"{'-' if minus else '+'}x{t}", f"x{(t - p) % task.NAMES}=", numbers[0]]
        words += [f"x{(t - q) % task.NAMES}=", *numbers[1:], f"x{t}=", terms[t]]
    return [str(word) for word in [*words, "done", f"x{asked}=", terms[asked], "<eos>"]]


@pytest.mark.parametrize("steps", [1, 4, task.LONGEST])
def test_solutions_are_right(steps):
    tokenizer = task.make_tokenizer()
    for row in draw(20, steps).input_ids:
        words = tokenizer.convert_ids_to_tokens(row)
        assert words[task.PROMPT_TOKENS :] == solve(words[: task.PROMPT_TOKENS])


def test_docstring_example_is_right():
    """The module's docstring shows a problem without its third step."""
    indented = [line.strip() for line in inspect.cleandoc(task.__doc__).splitlines() if line.startswith("    ")]
    lines = [line.split("   ")[0].split() for line in indented]
    (prompt, first, second, dots, last, answer) = lines
    assert dots == ["..."]
    words = solve(prompt)
    assert words[: task.STEP_TOKENS] == first
    assert words[task.STEP_TOKENS : 2 * task.STEP_TOKENS] == second
    assert words[-task.ANSWER_TOKENS - task.STEP_TOKENS - 1 :] == last + answer


def test_later_steps_recall_results_of_earlier_ones():
    """From the fifth step on, no recalled term is in the prompt."""
    problems = draw(50, 8)
    body = problems.input_ids[:, task.PROMPT_TOKENS : -task.ANSWER_TOKENS - 1].unflatten(1, (8, task.STEP_TOKENS))
    in_prompt = [set(row) for row in problems.prompts[:, 5::2].tolist()]
    recalled = body[:, task.GIVEN :, [1, 3]].flatten(1).tolist()
    assert not any(key in given for keys, given in zip(recalled, in_prompt, strict=True) for key in keys)


def test_problems_are_seeded_and_bounded():
    assert torch.equal(draw(4, 3).input_ids, draw(4, 3).input_ids)
    assert not torch.equal(draw(4, 3).input_ids, draw(4, 3, seed=1).input_ids)
    with pytest.raises(ValueError, match=f"1 .. {task.LONGEST}, got {task.LONGEST + 1}"):
        draw(1, task.LONGEST + 1)


def test_tokenizer_reads_what_it_writes():
    tokenizer, starts, ends = task.tokenizer_with_steps()
    marked = task.with_step_tokens(draw(1, 3), starts, ends)[0].tolist()
    assert tokenizer(tokenizer.decode(marked))["input_ids"] == marked


def test_training_set_is_a_prepared_one(tmp_path):
    lengths = distil.LONGEST_TRAINED - 1  # from 2 steps on
    folder = distil.write_training_set(tmp_path, rows=3 * lengths, seed=3)
    prepared = load_prepared(folder)
    assert len(prepared.train) == 3 * lengths
    assert {row["steps"] for row in prepared.train} == set(range(2, distil.LONGEST_TRAINED + 1))
    row = prepared.train[5]
    plain = draw(2, row["steps"], seed=0)
    assert len(row["input_ids"]) == len(row["step_ids"]) == plain.input_ids.shape[1] + 2 * row["steps"]
    batch = PaddedCollator.of(prepared)([row])
    # The model derives the same steps from the tokens, and the teacher's text is a problem of the task.
    student = untrained_student()
    derived = DynamicCache(config=student.config)
    student(batch["input_ids"], past_key_values=derived, logits_to_keep=1)
    assert int(derived.layers[0].slots.last_step[0]) == int(batch["step_ids"][0, -1]) == row["steps"] + 1
    assert solve(words := prepared.tokenizer.convert_ids_to_tokens(batch["teacher_input_ids"][0])[: task.PROMPT_TOKENS])
    assert words[0] == task.BOS


# ----------------------------------------------------------------------------------------------------------------------
# Teacher


@pytest.fixture(scope="module")
def shipped() -> Qwen2ForCausalLM:
    return teacher.load_teacher()


def test_shipped_teacher_is_loaded_exactly(shipped):
    weights = load_file(teacher.SHIPPED / "model.safetensors")
    own = shipped.state_dict()
    assert sum(path.stat().st_size for path in teacher.SHIPPED.iterdir()) < 3e6
    assert sum(p.numel() for p in shipped.parameters()) < 1e6
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float16
        assert own[name].dtype == torch.float32
        assert torch.equal(own[name], tensor.float())


@pytest.mark.parametrize(("steps", "least"), [(4, 0.97), (10, 0.97), (16, 0.8)])
def test_shipped_teacher_solves_the_task(shipped, steps, least):
    assert measure.decode(shipped, draw(64, steps, seed=5)).figures()["accuracy"] >= least


def test_teacher_training_writes_a_teacher(tmp_path):
    folder = teacher.train_teacher(tmp_path / "teacher", updates=3)
    trained = teacher.load_teacher(folder)
    fresh = teacher.train_teacher(tmp_path / "again", updates=3)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(load_file(fresh / "model.safetensors")[name], tensor), name
    assert trained.config.vocab_size == len(task.TOKEN_ID)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def test_answers_are_compared_token_by_token():
    key, end = task.TOKEN_ID["x3="], task.TOKEN_ID[task.EOS]
    answer = [key, task.TOKEN_ID["7"], end]
    assert measure._answer([9, 9, *answer, 0, 0]) == answer
    assert measure._answer([9, 9, *answer[:-1]]) is None
    assert measure._answer([9, end]) != answer


def test_figures_of_decoding(shipped):
    """The teacher and a converted, untrained student: exact bytes of keys and values, and of states."""
    student = untrained_student(shipped)
    problems = draw(3, 6)
    config = shipped.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    decoded = measure.decode(shipped, problems)
    assert decoded.correct.all()
    assert decoded.state_bytes == 0
    assert decoded.kv_bytes == per_token * (problems.input_ids.shape[1] - 1)  # the last token is not fed
    states = measure.decode(student, problems).state_bytes
    assert states == 3 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim**2 * 4


def test_cost_grows_for_the_teacher_alone(shipped):
    student = untrained_student(shipped)
    rows = measure.cost_curves(shipped, student, (64, 128), batch=2)
    held = {(row["model"], row["length"]): row["bytes"] for row in rows}
    assert held[measure.TEACHER, 128] - held[measure.TEACHER, 64] == 64 * 2 * 3 * 2 * 64 * 4
    assert held[measure.STUDENT, 128] == held[measure.STUDENT, 64]


def test_state_trajectories_start_at_the_prompt():
    student = untrained_student()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".la.v.B" in name:
                torch.nn.init.normal_(parameter)
    places, shares = measure.state_trajectories(student, draw(3, 4))
    assert places.shape == (3, 3, 5, 2)
    assert all(0 < share <= 1 for share in shares)
    assert places.diff(dim=2).norm(dim=-1).min() > 0


# ----------------------------------------------------------------------------------------------------------------------
# The whole demo


class References(html.parser.HTMLParser):
    """Collects the references of a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset")]


def test_demo_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "DECODED_STEPS", (2, 13))
    monkeypatch.setattr(demo, "TABLED_STEPS", (2, 13))
    monkeypatch.setattr(demo, "COST_LENGTHS", (64, 128))
    written = demo.demo(tmp_path / "out", updates=2, problems=3)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {(row["model"], row["steps"]) for row in results["decoding"]} == {
        (name, steps) for name in page.COLOURS for steps in (2, 13)
    }
    references = References()
    references.feed(written.read_text())
    assert len(references.found) == 3
    assert all(value.startswith("data:image/png;base64,") for value in references.found)
    printed = capsys.readouterr().out
    assert "13 steps, longer than any trained on" in printed
    for row in results["decoding"]:
        assert f"{100 * row['accuracy']:.1f} %" in printed


def test_student_variants_decode_in_steps():
    student = untrained_student()
    config = student.config
    hold = measure._InSteps(student)
    start, end = config.step_start_token_ids[0], config.step_end_token_ids[0]
    prompt = draw(1, 2).prompts
    scores = torch.zeros(1, config.vocab_size)

    def allowed(*tokens: int) -> set[int]:
        ids = torch.cat([prompt, torch.tensor([tokens], dtype=torch.long)], 1)
        return set(hold(ids, scores.clone())[0].isfinite().nonzero()[:, 0].tolist())

    everything = set(range(config.vocab_size))
    assert allowed() == set(config.step_start_token_ids)  # after the prompt
    assert allowed(start) == everything  # inside a step
    assert allowed(start, task.TOKEN_ID["x3="], end) == set(config.step_start_token_ids)  # another step must follow
    assert allowed(start, task.TOKEN_ID[task.DONE], end) == everything  # the last step


def test_cost_picture_shows_all_values():
    rows = [
        {"model": name, "length": length, "bytes": 1000 * length, "ms_per_token": 7.0}
        for name in (measure.TEACHER, measure.STUDENT)
        for length in (128, 256)
    ]
    _, time = page.draw_cost(rows).axes
    assert time.get_ylim()[0] == 0
    assert time.get_ylim()[1] > 7
