"""`prepare` from rows to a training set, and the collators with the teacher's alignment."""

import gzip
import hashlib
import json
import random
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from text_cases import byte_pair_tokenizer, chains, character_tokenizer, save_language_model
from transformers import AutoTokenizer
from typer.testing import CliRunner

from statecore import data, segmentation, traces
from statecore.cli import app
from statecore.data import PackedCollator, PaddedCollator, PromptFormat, PromptOptions, load_prepared
from statecore.language import LanguageOptions
from statecore.patterns import PatternOptions
from statecore.prepare import prepare, problem_share
from statecore.segmentation import EntropyOptions, StepOptions
from statecore.steps import steps_from_markers
from statecore.traces import ReadOptions, RowFields

# ----------------------------------------------------------------------------------------------------------------------
# Alignment and collators

STARTS, ENDS, PAD = [100, 102, 104], [101, 103, 105], 0


def random_row(rng: random.Random, prompt: int | None = None) -> dict:
    """A row of distinct ordinary tokens, so that equal tokens mean equal positions, with steps of random length."""
    fresh = iter(rng.sample(range(200, 10_000), 400))
    prompt = rng.randint(1, 6) if prompt is None else prompt
    ids, steps = [next(fresh) for _ in range(prompt)], [0] * prompt
    chosen = [rng.randrange(3) for _ in range(rng.randint(1, 5))]
    for number, pattern in enumerate(chosen, 1):
        body = [next(fresh) for _ in range(rng.randint(1, 7))]
        ids += [STARTS[pattern], *body, ENDS[pattern]]
        steps += [number] * (len(body) + 2)
    answer = [next(fresh) for _ in range(rng.randint(1, 5))]
    return {
        "id": "x", "input_ids": ids + answer, "step_ids": steps + [len(chosen) + 1] * len(answer),
        "prompt_length": prompt, "patterns": chosen, "steps": len(chosen),
    }  # fmt: skip


def brute_force_pairs(row: dict) -> set[tuple[int, int]]:
    """(student position, teacher position) wherever the next token of both is the same."""
    markers = {*STARTS, *ENDS}
    ids = row["input_ids"]
    teacher = [token for token in ids if token not in markers]
    pairs = set()
    for p in range(len(ids) - 1):
        token = ids[p + 1]
        if token in markers or p + 1 < row["prompt_length"]:
            continue
        read = [t for t in ids[: p + 1] if t not in markers]  # what the teacher has read by then
        if read:
            assert teacher[len(read)] == token
            pairs.add((p, len(read) - 1))
    return pairs


@pytest.mark.parametrize("prompt", [None, 0, 1])
def test_alignment_against_brute_force(prompt):
    rng = random.Random(0)
    for _ in range(200):
        row = random_row(rng, prompt)
        ids = np.array(row["input_ids"])
        teacher, student, counterpart = data.align_with_teacher(ids, np.isin(ids, STARTS + ENDS), row["prompt_length"])
        assert teacher.tolist() == [t for t in row["input_ids"] if t not in STARTS + ENDS]
        assert set(zip(student.tolist(), counterpart.tolist(), strict=True)) == brute_force_pairs(row)
        assert np.all(np.diff(student) > 0)
        assert np.all(np.diff(counterpart) == 1)  # nothing behind the prompt is left out


def test_first_token_of_a_step_is_compared_where_the_marker_is_the_students_input():
    ids = np.array([1, 2, 100, 3, 101, 102, 4, 103, 5])
    _, student, teacher = data.align_with_teacher(ids, np.isin(ids, STARTS + ENDS), 2)
    assert list(zip(student.tolist(), teacher.tolist(), strict=True)) == [(2, 1), (5, 2), (7, 3)]


def test_padded_batch():
    rng = random.Random(1)
    rows = [random_row(rng) for _ in range(5)]
    batch = PaddedCollator(STARTS + ENDS, PAD)(rows)
    width = max(len(row["input_ids"]) for row in rows)
    assert {name: batch[name].dtype for name in batch if "step" not in name} == {
        name: torch.int64 for name in batch if "step" not in name
    }
    assert batch["step_ids"].dtype == torch.int32
    assert batch["input_ids"].shape == batch["step_ids"].shape == batch["labels"].shape == (5, width)
    student, teacher = batch["input_ids"].flatten(), batch["teacher_input_ids"].flatten()
    pairs = 0
    for b, row in enumerate(rows):
        n, prompt = len(row["input_ids"]), row["prompt_length"]
        assert batch["input_ids"][b].tolist() == row["input_ids"] + [PAD] * (width - n)
        assert batch["attention_mask"][b].tolist() == [1] * n + [0] * (width - n)
        assert batch["step_ids"][b].tolist() == row["step_ids"] + [-1] * (width - n)
        assert batch["labels"][b].tolist() == [-100] * prompt + row["input_ids"][prompt:] + [-100] * (width - n)
        plain = [t for t in row["input_ids"] if t not in STARTS + ENDS]
        unpadded = batch["teacher_input_ids"][b][batch["teacher_attention_mask"][b].bool()]
        assert unpadded.tolist() == plain
        pairs += len(brute_force_pairs(row))
    assert len(batch["student_index"]) == len(batch["teacher_index"]) == pairs
    assert torch.equal(student[batch["student_index"] + 1], teacher[batch["teacher_index"] + 1])


def test_packed_batch_is_its_rows_one_by_one():
    rng = random.Random(2)
    rows = [random_row(rng) for _ in range(4)]
    collator = PackedCollator(STARTS + ENDS, PAD)
    batch, singles = collator(rows), [collator([row]) for row in rows]
    for name in ("input_ids", "position_ids", "labels", "step_ids", "teacher_input_ids", "teacher_position_ids"):
        assert torch.equal(batch[name], torch.cat([single[name] for single in singles], 1)), name
        assert batch[name].shape[0] == 1
    for prefix in ("", "teacher_"):
        bounds = batch[prefix + "cu_seq_lens_q"]
        lengths = [single[prefix + "input_ids"].shape[1] for single in singles]
        assert bounds.dtype == batch[prefix + "seq_idx"].dtype == torch.int32
        assert bounds.diff().tolist() == lengths
        assert torch.equal(bounds, batch[prefix + "cu_seq_lens_k"])
        assert batch[prefix + "max_length_q"] == batch[prefix + "max_length_k"] == max(lengths)
        assert torch.bincount(batch[prefix + "seq_idx"][0]).tolist() == lengths
    for name, bounds in (("student_index", "cu_seq_lens_q"), ("teacher_index", "teacher_cu_seq_lens_q")):
        shifted = [single[name] + at for single, at in zip(singles, batch[bounds].tolist(), strict=False)]
        assert torch.equal(batch[name], torch.cat(shifted)), name
    # With a prompt of no tokens, a row's first label would be predicted from the row before.
    assert collator([random_row(rng, 0)] * 2)["labels"][0, 0] == -100


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def write_rows(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else open(path, "w", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_pair_tokenizer().save_pretrained(folder)
    return folder


SMALL = {"patterns": PatternOptions(4, elbow=(2, 4)), "steps": StepOptions(6, 40), "eval_fraction": 0.25}


@pytest.fixture(scope="module")
def prepared_folder(tmp_path_factory, tokenizer_folder) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    source = write_rows(folder / "rows.jsonl.gz", chains(40))
    prepare([str(source)], folder / "out", tokenizer=str(tokenizer_folder), **SMALL)
    return folder / "out"


def test_rows_without_markers_are_the_text_tokenised_as_a_whole(prepared_folder):
    prepared = load_prepared(prepared_folder)
    tokenizer = byte_pair_tokenizer()
    by_id = {row["id"]: row for row in chains(40)}
    markers = {*prepared.step_start_token_ids, *prepared.step_end_token_ids}
    for row in [*prepared.train, *prepared.eval]:
        own = by_id.pop(row["id"])
        text = f"<|user|>{own['problem']}\n<|assistant|><think>\n{own['thinking']}\n</think>\n\n{own['answer']}"
        plain = [token for token in row["input_ids"] if token not in markers]
        assert plain == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        prompt = row["input_ids"][: row["prompt_length"]]
        assert tokenizer.decode(prompt) == f"<|user|>{own['problem']}\n<|assistant|><think>\n"
        assert prompt == tokenizer(tokenizer.decode(prompt))["input_ids"]  # as decoding will tokenise it
    assert not by_id


def test_steps_open_with_transitions_and_lie_inside_markers(prepared_folder):
    prepared = load_prepared(prepared_folder)
    starts, ends = np.array(prepared.step_start_token_ids), np.array(prepared.step_end_token_ids)
    opened = 0
    for row in [*prepared.train, *prepared.eval]:
        ids, steps = np.array(row["input_ids"]), np.array(row["step_ids"])
        assert row["steps"] == len(row["patterns"]) == steps.max() - 1
        assert np.all(steps[: row["prompt_length"]] == 0)
        assert steps[row["prompt_length"]] == 1
        rank = np.full_like(ids, -1)
        for i in range(4):
            rank[ids == starts[i]], rank[ids == ends[i]] = i, 4 + i
        derived = steps_from_markers(torch.tensor(rank)[None], 4, torch.ones(1, len(ids), dtype=torch.bool)).ids
        assert derived[0].tolist() == steps.tolist()
        for number, pattern in enumerate(row["patterns"], 1):
            step = ids[steps == number]
            assert (step[0], step[-1]) == (starts[pattern], ends[pattern])
            assert not np.isin(step[1:-1], [*starts, *ends]).any()
            assert 6 <= len(step) - 2 <= 40
            text = prepared.tokenizer.decode(step[1:-1]).strip()
            if number > 1:
                opened += segmentation.first_word(text, 0) in segmentation.DEFAULT_TRANSITIONS
                assert text[0].isupper()  # a sentence
        answer = prepared.tokenizer.decode(ids[steps == row["steps"] + 1])
        assert answer.startswith("</think>\n\nIt is ")
        assert answer.endswith("<eos>")
    assert opened > 100


@pytest.mark.parametrize("positional", [False, True])
def test_prepare_command(prepared_folder, tokenizer_folder, tmp_path, monkeypatch, positional):
    """The command with flat options writes what the function with option groups writes."""
    source, folder = write_rows(tmp_path / "rows.jsonl", chains(40)), tmp_path / "out"
    arguments = ["prepare", str(source), *([] if positional else ["--output-dir"]), str(folder)]
    options = {"tokenizer": tokenizer_folder, "patterns": 4, "min_step_tokens": 6, "max-step-tokens": 40}
    for name, value in (options | {"eval-fraction": 0.25}).items():
        arguments += [f"--{name}", str(value)]
    arguments += ["--elbow", "2", "--elbow", "4"]
    monkeypatch.setattr("sys.argv", ["statecore", *arguments])
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert ("deprecated" in result.output) == positional
    for name in ("train.parquet", "eval.parquet", "patterns.json", "tokenizer/tokenizer.json"):
        assert (folder / name).read_bytes() == (prepared_folder / name).read_bytes(), name
    settings, by_function = (json.loads((f / "report.json").read_text())["settings"] for f in (folder, prepared_folder))
    assert settings | {"sources": 0, "output": 0} == by_function | {"sources": 0, "output": 0}
    assert set(settings) == {
        "sources", "output", "tokenizer", "split", "limit", "prompt_field", "thinking_field", "answer_field",
        "id_field", "completion_field", "think_tags", "prompt_template", "think_open", "think_close", "model",
        "model_tokenizer", "transitions", "opening_unit", "entropy_rows", "top_transitions", "entropy_threshold_bits",
        "min_opening_count", "min_step_tokens", "max_step_tokens", "max_tokens", "patterns", "embedding",
        "embedding_layer", "elbow", "window", "batch_size", "labels", "eval_fraction", "seed", "strict", "overwrite",
    }  # fmt: skip


def test_files_of_a_prepared_set(prepared_folder):
    prepared = load_prepared(prepared_folder)
    report = json.loads((prepared_folder / "report.json").read_text())
    listed = prepared.patterns["patterns"]
    assert [pattern["id"] for pattern in listed] == [0, 1, 2, 3]
    used = np.bincount([p for row in [*prepared.train, *prepared.eval] for p in row["patterns"]], minlength=4)
    assert [pattern["size"] for pattern in listed] == used.tolist() == sorted(used, reverse=True)
    for pattern in listed:
        assert prepared.tokenizer.convert_tokens_to_ids(pattern["start_token"]) == pattern["start_token_id"]
        assert prepared.tokenizer.convert_tokens_to_ids(pattern["end_token"]) == pattern["end_token_id"]
        assert 0 < len(pattern["examples"]) <= 5
    assert {row["opening"] for row in prepared.patterns["transitions"]} == set(segmentation.DEFAULT_TRANSITIONS)
    assert report["rows"] == {"read": 40, "left_out": 0, "train": len(prepared.train), "eval": len(prepared.eval)}
    steps = [row["steps"] for row in [*prepared.train, *prepared.eval]]
    assert report["steps_a_trace"]["mean"] == round(np.mean(steps), 2)
    assert prepared.train.features["input_ids"].feature.dtype == "int32"
    assert prepared.train.features["prompt_length"].dtype == "int32"
    assert (prepared_folder / "figures" / "elbow.png").exists()
    assert "<|step_3|>" in (prepared_folder / "report.md").read_text()
    assert PromptFormat(**prepared.patterns["prompt"]) == PromptFormat()
    batch = PackedCollator.of(prepared)(list(prepared.train)[:3])
    assert batch["input_ids"].max() < len(prepared.tokenizer)


def test_same_rows_give_the_same_files(prepared_folder, tokenizer_folder, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", chains(40))
    prepare([str(source)], tmp_path / "again", tokenizer=str(tokenizer_folder), **SMALL)
    for name in ("train.parquet", "eval.parquet", "patterns.json", "tokenizer/tokenizer.json"):
        a, b = (
            hashlib.sha256((folder / name).read_bytes()).digest() for folder in (prepared_folder, tmp_path / "again")
        )
        assert a == b, name


def test_problems_do_not_cross_the_split(prepared_folder):
    prepared = load_prepared(prepared_folder)
    problems = [{int(i.split("-")[1]) // 2 for i in part["id"]} for part in (prepared.train, prepared.eval)]
    assert problems[0]
    assert problems[1]
    assert not problems[0] & problems[1]
    shares = [problem_share([{"role": "user", "content": f"problem {i}"}]) for i in range(2000)]
    assert abs(np.mean(np.array(shares) < 0.25) - 0.25) < 0.04
    assert problem_share([{"content": "A  b\n"}]) == problem_share([{"content": "a B"}])


BAD = [
    ("", "empty", "blank"),
    ('{"problem": "a", ', "broken_json", "column"),
    ("[1, 2]", "broken_json", "got list"),
    ({"thinking": "a", "answer": "b"}, "no_prompt", "'problem' is missing"),
    ({"problem": 3, "thinking": "a", "answer": "b"}, "no_prompt", "got int"),
    ({"problem": "a", "thinking": " \n", "answer": "b"}, "no_thinking", "empty"),
    ({"problem": "a", "thinking": None, "answer": "b"}, "no_thinking", "got NoneType"),
    ({"problem": "a", "thinking": "c"}, "no_answer", "missing"),
    ('{"problem": "a", "thinking": "\\ud83d x", "answer": "b"}', "broken_text", "surrogates"),
    ({"problem": "a", "thinking": "Okay. <eos> Wait", "answer": "b"}, "special_tokens", "'<eos>'"),
    ({"problem": "a", "thinking": "Wait, so. " * 300, "answer": "b"}, "too_long", "at most 400"),
]


def test_bad_rows_are_counted_and_named(tokenizer_folder, tmp_path, capsys):
    good = chains(20)
    rows = [*good[:10], *(row for row, _, _ in BAD), *good[10:]]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    report = prepare([str(source)], tmp_path / "out", tokenizer=str(tokenizer_folder), max_tokens=400, **SMALL)
    assert report["rows"]["read"] == 31
    assert report["rows"]["train"] + report["rows"]["eval"] == 20
    named = {row["line"]: row for row in report["left_out"]["rows"]}
    assert sorted(named) == list(range(11, 22))
    for line, (_, reason, detail) in enumerate(BAD, 11):
        assert named[line]["reason"] == reason
        assert detail in named[line]["detail"]
    assert report["left_out"]["by_reason"] == {
        "broken_json": 2, "no_prompt": 2, "no_thinking": 2, "empty": 1, "no_answer": 1, "broken_text": 1,
        "special_tokens": 1, "too_long": 1,
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "line 12: broken_json" in printed
    assert printed.strip() == (tmp_path / "out" / "report.md").read_text().strip()


@pytest.mark.parametrize(
    "row", [row for row, _, _ in BAD], ids=[f"{reason}-{i}" for i, (_, reason, _) in enumerate(BAD)]
)
def test_strict_stops_at_a_bad_row_and_leaves_nothing(row, tokenizer_folder, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [*chains(6), row])
    strict = ReadOptions(strict=True)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 7: .*strict"):
        prepare(
            [str(source)], tmp_path / "out", tokenizer=str(tokenizer_folder), max_tokens=400, reading=strict, **SMALL
        )
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_file_that_breaks_off(tokenizer_folder, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl.gz", chains(400, seed=3))
    source.write_bytes(source.read_bytes()[:-2000])
    rows = list(traces.read_lines(str(source), "train"))
    line, problem = rows[-1]
    assert problem.reason == "unreadable"
    assert line == len(rows)
    assert all(isinstance(row, dict) for _, row in rows[:-2])


def test_nothing_usable_is_an_error(tokenizer_folder, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", ["{", "{"])
    with pytest.raises(ValueError, match=r"(?s)none of the 2 rows.*line 1: broken_json"):
        prepare([str(source)], tmp_path / "out", tokenizer=str(tokenizer_folder), **SMALL)


def completion(row: dict, opened: bool = True) -> str:
    return ("<think>" if opened else "") + f"\n{row['thinking']}\n</think>\n\n{row['answer']}"


def parse(row: dict, **fields) -> traces.Trace:
    return traces.parse_trace(row, traces.RowFields(**fields), "rows.jsonl", 4)


def test_one_field_for_thinking_and_answer():
    row = chains(1)[0]
    plain = parse(row)
    for opened in (True, False):
        assert parse({**row, "text": completion(row, opened)}, completion="text") == plain
    turns = [("user", row["problem"]), ("assistant", completion(row))]
    messages = {"id": "row-0", "messages": [{"role": r, "content": c} for r, c in turns]}
    assert parse(messages, completion="messages") == plain
    sharegpt = {
        "id": "row-0",
        "messages": [{"from": f, "value": c} for f, (_, c) in zip(("human", "gpt"), turns, strict=True)],
    }
    assert parse(sharegpt, completion="messages") == plain
    other = {**row, "text": f"[T] {row['thinking']} [/T] {row['answer']}"}
    assert parse(other, completion="text", think_tags=("[T]", "[/T]")) == plain
    assert parse({k: v for k, v in row.items() if k != "id"}).id == "rows.jsonl:4"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<think>a", "no_thinking"), ("<think> </think> b", "no_thinking"), ("so <think>a</think> b", "no_thinking"),
        ("<think>a</think> ", "no_answer"), ([{"role": "user", "content": "a"}], "no_thinking"),
        ([{"role": "user"}, {"role": "assistant", "content": "b"}], "no_prompt"), (["a", "b"], "no_prompt"),
    ],
)  # fmt: skip
def test_completions_that_cannot_be_used(text, reason):
    with pytest.raises(traces.RowProblem) as problem:
        parse({"problem": "p", "text": text}, completion="text")
    assert problem.value.reason == reason


def test_a_chat_template_may_refuse_a_row():
    tokenizer = byte_pair_tokenizer("{{ raise_exception('no system message') }}")
    fields, form = traces.RowFields(), PromptFormat()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces, "read_lines", lambda source, split: enumerate(chains(1), 1))
        ((line, problem),) = traces.read_traces("rows.jsonl", "train", fields, form, tokenizer)
    assert (line, problem.reason) == (1, "no_prompt")
    assert "no system message" in problem.detail


def test_parquet_and_hub_sources(tokenizer_folder, prepared_folder, tmp_path, monkeypatch):
    rows = chains(40)
    table = datasets.Dataset.from_list([{"id": r["id"], "question": r["problem"], "text": completion(r)} for r in rows])
    table.to_parquet(tmp_path / "rows.parquet")
    fields = {"fields": RowFields(prompt="question", completion="text")}
    prepare([str(tmp_path / "rows.parquet")], tmp_path / "a", tokenizer=str(tokenizer_folder), **fields, **SMALL)
    real = datasets.load_dataset
    asked = []

    def load_dataset(name, *args, **kwargs):
        if name != "owner/name":
            return real(name, *args, **kwargs)
        asked.append((name, *args, kwargs))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepare(
        ["owner/name:default"],
        tmp_path / "b",
        tokenizer=str(tokenizer_folder),
        reading=ReadOptions("all"),
        **fields,
        **SMALL,
    )
    assert asked == [("owner/name", "default", {"split": "all"})]
    wanted = (prepared_folder / "train.parquet").read_bytes()
    assert (tmp_path / "a" / "train.parquet").read_bytes() == wanted
    assert (tmp_path / "b" / "train.parquet").read_bytes() == wanted


# ----------------------------------------------------------------------------------------------------------------------
# Prompts, models, folders


def test_prompt_formats():
    tokenizer = byte_pair_tokenizer()
    message = [{"role": "user", "content": "A {b}?"}]
    assert PromptFormat().prompt_text(tokenizer, message) == "<|user|>A {b}?\n<|assistant|><think>\n"
    assert PromptFormat("Q: {prompt}\nA:", "").prompt_text(tokenizer, message) == "Q: A {b}?\nA:"
    tokenizer.chat_template += "{{ '<think>\n' }}"
    assert PromptFormat().prompt_text(tokenizer, message) == "<|user|>A {b}?\n<|assistant|><think>\n"


def test_a_prompt_that_shares_a_token_with_the_thinking_is_noted(tokenizer_folder, tmp_path):
    rows = [{**row, "thinking": f"Wait. {row['thinking']}"} for row in chains(20)]
    source = write_rows(tmp_path / "rows.jsonl", rows)

    def notes(template: str, name: str) -> dict:
        return prepare(
            [str(source)],
            tmp_path / name,
            tokenizer=str(tokenizer_folder),
            prompt=PromptOptions(template, think_open=""),
            **SMALL,
        )["notes"]

    assert notes("{prompt} ", "glued")["rows_whose_prompt_shares_a_token_with_the_thinking"] == 20
    assert notes("{prompt}\n", "apart")["rows_whose_prompt_shares_a_token_with_the_thinking"] == 0


@pytest.mark.parametrize("unit", ["word", "token"])
def test_language_model_finds_transitions_and_embeds_steps(unit, tokenizer_folder, tmp_path):
    """With a model whose tokenizer is that of the training set, and one whose tokenizer is not."""
    model = save_language_model(tmp_path / "model")
    source = write_rows(tmp_path / "rows.jsonl", chains(24))
    for name, tokenizer, template in (("other", tokenizer_folder, None), ("same", model / "tokenizer", "{prompt}\n")):
        report = prepare(
            [str(source)], tmp_path / name, tokenizer=str(tokenizer), prompt=PromptOptions(template),
            language=LanguageOptions(str(model), str(model / "tokenizer"), window=200),
            transitions=EntropyOptions(None, unit, entropy_rows=12, top_transitions=3, min_opening_count=4),
            **(SMALL | {"steps": StepOptions(6, 200)}),
        )  # fmt: skip
        table = report["opening_entropies"]
        assert [row["opening"] for row in report["transitions"]] == [row["opening"] for row in table[:3]]
        assert all(0 < row["entropy_bits"] < 7 and row["count"] >= 4 for row in table)
        assert sum(row["steps"] for row in report["transitions"]) > 20
        assert report["patterns"]["embedding"] == "hidden_states"
    again = tmp_path / "other" / "patterns.json"
    if unit == "word":
        of_file = EntropyOptions(again)
        report = prepare(
            [str(source)], tmp_path / "file", tokenizer=str(tokenizer_folder), transitions=of_file, **SMALL
        )
        assert [row["opening"] for row in report["transitions"]] == segmentation.load_transitions(again)
        assert report["patterns"]["embedding"] == "tfidf"
        assert report["opening_entropies"] == []


def test_labels_are_compared(tokenizer_folder, tmp_path):
    rows = chains(20)
    source = write_rows(tmp_path / "rows.jsonl", rows)
    labels = []
    for row in rows:
        starts = [*segmentation.sentence_starts(row["thinking"]), len(row["thinking"])]
        labels.append({"id": row["id"], "spans": [[a, b, "Deduction"] for a, b in pairwise(starts)]})
    file = write_rows(tmp_path / "labels.jsonl", labels)
    report = prepare([str(source)], tmp_path / "out", tokenizer=str(tokenizer_folder), labels=file, **SMALL)
    agreement = report["label_agreement"]
    assert agreement["boundaries_on_a_sentence_start"] == 1
    assert agreement["boundaries"] == round(20 * (report["steps_a_trace"]["mean"] - 1))
    assert "Agreement with the sentence labels" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(ValueError, match=r'rows\.jsonl, line 1: expected an object with "id" and "spans"'):
        prepare([str(source)], tmp_path / "b", tokenizer=str(tokenizer_folder), labels=source, **SMALL)


def test_folders_are_whole_and_not_overwritten_unasked(tokenizer_folder, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", chains(20))
    run = {"tokenizer": str(tokenizer_folder), **SMALL}
    with pytest.raises(ValueError, match="1000 thinking patterns cannot be made"):
        prepare([str(source)], tmp_path / "out", **(run | {"patterns": PatternOptions(1000)}))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    prepare([str(source)], tmp_path / "out", **run)
    with pytest.raises(FileExistsError, match="exists already"):
        prepare([str(source)], tmp_path / "out", **run)
    report = prepare([str(source)], tmp_path / "out", **(run | {"overwrite": True, "reading": ReadOptions(limit=10)}))
    assert report["rows"]["read"] == 10
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match=r"of a folder with patterns.json"):
        prepare([str(source)], tmp_path / "mine", **(run | {"overwrite": True}))
    with pytest.raises(FileNotFoundError, match="not a prepared training set"):
        load_prepared(tmp_path / "mine")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (lambda: {"sources": "rows.jsonl"}, "expected a list"),
        (lambda: {"prompt": PromptOptions("Q:")}, r"expected \{prompt\}"),
        (lambda: {"steps": StepOptions(6, 11)}, "at least twice min_step_tokens"),
        (lambda: {"steps": StepOptions(0, 40)}, "at least twice"),
        (lambda: {"eval_fraction": 1.0}, "eval_fraction"),
        (lambda: {"patterns": PatternOptions(0)}, "patterns: expected 1"),
        (lambda: {"patterns": PatternOptions(4, "hidden_states")}, "needs a language model"),
        (lambda: {"transitions": EntropyOptions(opening_unit="token")}, "needs a language model"),
        (lambda: {"eval_fraction": 0.999999}, "all problems fell"),
    ],
)
def test_settings_that_cannot_work(setting, message, tokenizer_folder, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", chains(20))
    arguments = {"sources": [str(source)], "tokenizer": str(tokenizer_folder), **SMALL}
    with pytest.raises(ValueError, match=message):
        prepare(output_dir=tmp_path / "out", **(arguments | setting()))


def test_tokenizers_that_cannot_work(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", chains(20))
    character_tokenizer().save_pretrained(tmp_path / "no template")
    with pytest.raises(ValueError, match="has no chat template"):
        prepare([str(source)], tmp_path / "out", tokenizer=str(tmp_path / "no template"), **SMALL)
    tokenizer = byte_pair_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no end")
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        prepare([str(source)], tmp_path / "out", tokenizer=str(tmp_path / "no end"), **SMALL)
    with pytest.raises(ValueError, match=r"expected a \.jsonl"):
        list(traces.read_lines(str(tmp_path), "train"))


# ----------------------------------------------------------------------------------------------------------------------
# Real chains of thought and a real tokenizer


def test_real_traces(shared, tmp_path):
    """A slice of real traces with Qwen2.5's tokenizer: tokens, boundaries and labels."""
    with gzip.open(shared / "data" / "longcot_clean" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][600:660]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    folder = shared / "data" / "qwen2_5_tokenizer"
    labels = shared / "data" / "longcot_labels" / "sentence_categories.jsonl.gz"
    patterns = PatternOptions(16, elbow=(8, 16))
    report = prepare([str(source)], tmp_path / "out", tokenizer=str(folder), patterns=patterns, labels=labels)
    assert report["rows"]["left_out"] == 0
    prepared = load_prepared(tmp_path / "out")
    assert len(prepared.tokenizer) == 151_665 + 32
    assert min(prepared.step_start_token_ids) == 151_665  # the first spare row of Qwen2.5's embedding
    plain = AutoTokenizer.from_pretrained(folder)
    by_id = {row["id"]: row for row in rows}
    markers = {*prepared.step_start_token_ids, *prepared.step_end_token_ids}
    for row in prepared.train:
        own = by_id[row["id"]]
        ordinary = [token for token in row["input_ids"] if token not in markers]
        text = prepared.tokenizer.decode(ordinary)
        assert own["thinking"].strip() in text
        assert text.endswith(f"\n</think>\n\n{own['answer'].strip()}<|im_end|>")
        prompt = prepared.tokenizer.decode(row["input_ids"][: row["prompt_length"]])
        assert prompt.endswith("<|im_start|>assistant\n<think>\n")
        assert ordinary == plain(text)["input_ids"]
