"""The benchmark suite: peers compute what ours does, work is counted right, and results become a page."""

import importlib
import json
from dataclasses import asdict, replace

import pytest
import torch
from cases import relative_error

from benchmarks import bench_state_update, cpu, peers, pictures, record, roofline, suite
from benchmarks.contest import Instruments, made
from benchmarks.page import page, target, verdict
from benchmarks.record import COMPARISON, QUANTITY, Row
from benchmarks.timing import Timing, interleaved
from benchmarks.workload import ALPHA, Case, causal_pairs, visible_pairs
from statecore import ops
from statecore.reference import segment_mask

CLOSE = 1e-5


def small_case(heads: tuple[int, int] = (4, 2), prompt: int = 32, step: int = 16) -> Case:
    return Case(time=128, dtype=torch.float32, heads=heads, width=16, threads=1, prompt=prompt, step=step)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_masked_sdpa_is_segment_attention(heads):
    case = small_case(heads)
    q, k, v = case.qkv()
    ids = case.step_ids()
    assert relative_error(peers.sdpa(q, k, v, segment_mask(ids, 128)), ops.segment_attention(q, k, v, ids)[0]) < CLOSE


def test_causal_sdpa_is_one_segment():
    q, k, v = small_case().qkv()
    ids = torch.zeros(1, 128, dtype=torch.int32)
    assert relative_error(peers.sdpa(q, k, v), ops.segment_attention(q, k, v, ids)[0]) < CLOSE


def test_block_mask_is_the_segment_mask():
    ids = small_case().step_ids()
    assert torch.equal(
        peers.block_mask(ids).mask_mod(0, 0, torch.arange(128)[:, None], torch.arange(128)), segment_mask(ids, 128)[0]
    )


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize("chunk", [8, 32])
@pytest.mark.parametrize("by_product", [True, False])
def test_chunked_is_linear_attention(heads, chunk, by_product):
    q, k, v = small_case(heads).qkv()
    carry = peers.sums_before(128 // chunk) if by_product else None
    assert (
        relative_error(peers.chunked_linear_attention(q, k, v, chunk, carry), ops.linear_attention(q, k, v)[0]) < CLOSE
    )


@pytest.mark.parametrize(("prompt", "step", "chunk"), [(32, 16, 8), (32, 16, 16), (16, 32, 16), (128, 16, 16)])
def test_corrected_carry_is_step_linear_attention(prompt, step, chunk):
    case = small_case(prompt=prompt, step=step)
    q, k, v = case.qkv()
    carry = peers.corrected_sums_before(ALPHA * 2, case.time, prompt, step, chunk)
    expected, _ = ops.step_linear_attention(q, k, v, case.step_ids(), ALPHA * 2)
    assert relative_error(peers.chunked_linear_attention(q, k, v, chunk, carry), expected) < CLOSE


def test_eager_state_update():
    q, k, v = torch.randn(3, 4, 16), torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    mine = torch.randn(1, 3, 2, 16, 16)
    theirs = mine.clone()
    assert relative_error(peers.eager_state_update(theirs, q, k, v), ops.state_update(mine, q, k, v)) < CLOSE
    assert relative_error(theirs, mine) < CLOSE


@pytest.mark.parametrize(("prompt", "step", "time"), [(32, 16, 128), (20, 7, 101), (200, 16, 64), (0, 5, 33)])
def test_visible_pairs_is_the_sum_of_the_mask(prompt, step, time):
    case = Case(time=time, dtype=torch.float32, heads=(1, 1), width=8, threads=1, prompt=prompt, step=step)
    assert visible_pairs(case.step_ids()) == int(segment_mask(case.step_ids(), time).sum())


def test_counted_work():
    case = small_case()
    assert causal_pairs(4) == 10
    (four_tokens,) = roofline.segment_attention(replace(case, time=4))[roofline.FORWARD]
    assert four_tokens.flops == 10 * 4 * (16 + 16) * 2
    (states,) = roofline.linear_attention_reads_and_updates(case)[roofline.FORWARD]
    assert states.flops == 128 * (4 + 2) * 16 * 16 * 2


def test_interleaved_runs_every_candidate():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1

    timings = interleaved({name: lambda name=name: count(name) for name in calls})
    assert all(calls.values())
    assert all(timing.median > 0 for timing in timings.values())


def test_spread_leaves_out_a_tenth_at_either_end():
    assert Timing.of([1.0, 2.0, 4.0]) == Timing(2.0, 1.5)
    assert Timing.of([100.0, *range(10, 18), 0.001]) == Timing(13.5, 7 / 13.5)


def test_a_peer_that_fails_is_named():
    def broken():
        raise ValueError("grouped heads\nare not there")

    assert made({"peer": broken}) == ({}, {"peer": "ValueError: grouped heads"})
    assert made({"peer": lambda: 1}) == ({"peer": 1}, {})


def segment_row(kind: str, what: str, number: float | None, unit: str, **fields) -> Row:
    """Forward, at a small case; number: None where nothing was measured."""
    case = {"dtype": "float32", "T": 64, "heads": "4/2", "D": 16, "threads": 1}
    numbers = {} if number is None else {"ratio": (number, unit)}
    return Row(
        kind=kind, operator="segment_attention", direction="forward", what=what, case=case, numbers=numbers,
        judged="ratio", unit=unit, **fields,
    )  # fmt: skip


def test_targets():
    faster = segment_row(COMPARISON, "p", 13, "times", target=12)
    assert (target(faster), verdict(faster)) == (">= 12x", "reached")
    growing = segment_row(QUANTITY, "time(64) / time(8)", 9, "growth", target=8.8)
    assert (target(growing), verdict(growing)) == ("<= 8.8x", "**not reached**")
    failed = segment_row(COMPARISON, "p", None, "times", target=12, failure="no g++")
    assert verdict(failed) == ""


ROUGH = Instruments.of_cpu(lambda case: roofline.Ceilings(1e12, 1e12), lambda: 1e9)


@pytest.fixture(scope="module")
def quick_record():
    """Sections on tiny shapes and one thread, those that compile nothing."""
    asked = suite.small(q for q in cpu.questions() if q.section not in ("segment", "linear", "peak"))
    asked = [replace(q, case=replace(q.case, threads=1)) for q in asked if q.case.dtype == torch.float32]
    return {"sections": suite.measure(asked, ROUGH, {"processor": "any"})}


def test_sections_run_and_rows_survive_json(quick_record):
    assert set(quick_record["sections"]) == {"growth", "others", "update", "model"}
    for section in json.loads(json.dumps(quick_record))["sections"].values():
        assert section["rows"]
        assert [asdict(Row(**fields)) for fields in section["rows"]] == section["rows"]
        assert not any(fields["failure"] for fields in section["rows"])


def test_record_becomes_page_and_pictures(quick_record, tmp_path):
    bars = [
        segment_row(COMPARISON, "p", 13, "times", target=12),
        segment_row(COMPARISON, "q", None, "times", failure="no g++"),
    ]
    segment = quick_record["sections"]["growth"] | {"rows": [asdict(row) for row in bars]}
    found = {"sections": quick_record["sections"] | {"segment": segment}}
    record.write(found, tmp_path / "results", "cpu", page(found, "cpu"), pictures.draw)
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "cpu.json", "cpu.md", "cpu_lengths.png", "cpu_ratios.png",
    ]  # fmt: skip
    assert record.stored(tmp_path / "results", "cpu") == json.loads(json.dumps(found))
    text = (tmp_path / "results" / "cpu.md").read_text()
    assert text == page(record.stored(tmp_path / "results", "cpu"), "cpu")
    for expected in ("## 1. Segment attention", "targets reached", "cannot run: no g++", "A whole model", "| >= 12x |"):
        assert expected in text


def test_script_of_an_operator_prints_its_tables(monkeypatch, capsys):
    monkeypatch.setattr(suite, "prepared", lambda device: (ROUGH, {}, {}))
    monkeypatch.setattr("sys.argv", ["bench_state_update", "--device", "cpu", "--quick", "--only", "B 64"])
    suite.main_of_operator(bench_state_update.questions)
    printed = capsys.readouterr().out
    assert "## update" in printed
    assert "| state_update | in place | eager outer product and read | bfloat16 | 3 | 4/2 | 16 | 1 |" in printed


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_committed_pages_are_those_of_the_committed_records(name):
    assert (record.RESULTS / f"{name}.md").read_text() == page(record.stored(record.RESULTS, name), name)


@pytest.mark.parametrize("paper", ["dynamics", "flow", "metastable", "ssd"])
def test_scripts_of_the_papers_can_be_loaded(paper):
    importlib.import_module(f"benchmarks.papers.{paper}")
