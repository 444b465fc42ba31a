"""The GPU's benchmark suite, gone through with small tensors on the CPU: the same code, other instruments. What only a
GPU can do (events, graphs, its allocator) is tested where there is one.
"""

import json
import sys
import types
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cases import relative_error
from devices import require
from torch import Tensor

from benchmarks import (
    bench_linear_attention,
    bench_mixed_attention,
    bench_segment_attention,
    bench_state_update,
    gpu,
    peers,
    record,
    roofline,
    suite,
)
from benchmarks.contest import NO_TIME, Instruments, Peer, check_gradients, check_output, corner_of
from benchmarks.page import expected_page, page
from benchmarks.peers import CHUNKED, EAGER_UPDATE
from benchmarks.record import COMPARISON, KERNEL, Row
from benchmarks.roofline import BACKWARD, BOTH, FORWARD, Ceilings, Work, bound
from benchmarks.timing import Timing
from benchmarks.workload import Case, visible_pairs
from statecore import ops, reference

ROUGH = Ceilings(1e12, 1e10)


# ---- rooflines by hand


def by_hand(**changes) -> Case:
    return Case(**{"time": 10, "dtype": torch.bfloat16, "heads": (4, 2), "width": 8, "prompt": 2, "step": 4} | changes)


def test_roofline_of_linear_attention():
    forward, backward = roofline.linear_attention(by_hand(batch=3))[BOTH]
    # 30 tokens: a read of 2 x 8 x 8 and triangles of 2 x (65 x 8) a query head, an update of 128 a key head
    assert forward.flops == 30 * (4 * (128 + 1040) + 2 * 128)
    # that again for dq; dk and dv from a state a key head, an update and four half triangles a query head
    assert backward.flops == forward.flops + 30 * (2 * 256 + 4 * (128 + 2080))
    # 4 heads of q and of out, 2 of k and of v, 16 bytes each; three sequences end with two states of 8 x 8
    assert forward.bytes == 30 * 12 * 16 + 3 * 2 * 64 * 4
    assert backward.bytes == 30 * (3 * 4 + 4 * 2) * 16 + 3 * 2 * 64 * 4
    decayed = roofline.linear_attention(by_hand(batch=3), decay=True)[BOTH]
    assert [work.bytes for work in decayed] == [forward.bytes + 30 * 2 * 4, backward.bytes + 30 * 2 * 8]


def test_roofline_of_segment_attention():
    case = by_hand()
    pairs = visible_pairs(case.step_ids())
    assert pairs == 3 + 2 * (4 * 2 + 10)
    (forward,), (backward,) = (roofline.segment_attention(case)[way] for way in (FORWARD, BACKWARD))
    assert forward.flops == 4 * 8 * 39 * 4
    assert backward.flops == 10 * 8 * 39 * 4
    assert forward.bytes == 10 * (12 * 16 + 4 * 4 + 4)
    assert backward.bytes == 10 * (24 * 16 + 4 * 4 + 4)


def test_roofline_of_mixed_attention():
    case = by_hand()
    forward, backward = roofline.mixed_attention(case)[BOTH]
    linear, segment = roofline.linear_attention(case)[BOTH], roofline.segment_attention(case)[BOTH]
    assert forward.flops == linear[0].flops + segment[0].flops
    assert backward.flops == linear[1].flops + segment[1].flops
    assert forward.bytes == 10 * ((4 * 4 + 4 * 2) * 16 + 4)
    assert backward.bytes == 10 * ((7 * 4 + 8 * 2) * 16 + 4)


def test_roofline_of_state_update():
    work = roofline.state_update(by_hand(batch=5, time=1))
    assert work.flops == 5 * 2 * 64 * (4 + 2)
    assert work.bytes == 5 * (2 * 2 * 64 * 4 + 12 * 16)


def test_bound_takes_the_longer_of_both_pass_by_pass():
    assert bound((Work(100, 1), Work(1, 10)), Ceilings(10, 1)) == 10 + 10


def test_standard_shapes_take_what_was_calculated_by_hand():
    large = Case(time=8192, dtype=torch.bfloat16, heads=(16, 16), width=128, prompt=256, step=128, batch=8)
    (forward,) = roofline.linear_attention(large)[FORWARD]
    assert forward.bytes == 8 * 8192 * 16 * 1024 + 8 * 16 * 128 * 128 * 4
    assert forward.seconds(roofline.H200) == pytest.approx(251.7e-6, rel=1e-3)  # memory
    steps = replace(large, time=32_768, heads=(12, 2), batch=1, step=256)
    (forward,) = roofline.segment_attention(steps)[FORWARD]
    assert forward.seconds(roofline.H200) == pytest.approx(97.5e-6, rel=1e-3)  # tensor cores


# ---- peers


class EagerAttention:
    """peers.VarlenAttention in eager torch: attention inside runs, and its gradients under given denominators."""

    def forward(self, part: peers.Part, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
        for rows, columns in self.runs(part):
            weights, found = self.weights(part, q[rows], k[columns])
            lse[:, rows] = found
            out[rows] = torch.einsum("hij,jhd->ihd", (weights - found[..., None]).exp(), self.grouped(v[columns], q))
        return out, lse

    def backward(self, part, gradient, q, k, v, out, lse):
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for rows, columns in self.runs(part):
            weights, _ = self.weights(part, q[rows], k[columns])
            p = (weights - lse[:, rows, None]).exp()
            values, keys = self.grouped(v[columns], q), self.grouped(k[columns], q)
            delta = (gradient[rows] * out[rows]).sum(-1).t()[..., None]
            ds = p * (torch.einsum("ihd,jhd->hij", gradient[rows], values) - delta) * q.shape[-1] ** -0.5
            dq[rows] += torch.einsum("hij,jhd->ihd", ds, keys)
            dk[columns] += self.summed(torch.einsum("hij,ihd->jhd", ds, q[rows]), k)
            dv[columns] += self.summed(torch.einsum("hij,ihd->jhd", p, gradient[rows]), v)
        return dq, dk, dv

    def runs(self, part: peers.Part):
        borders = (x.tolist() for x in (part.queries, part.keys))
        slices = ([slice(*pair) for pair in pairwise(found)] for found in borders)
        return list(zip(*slices, strict=True))

    def weights(self, part: peers.Part, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.einsum("ihd,jhd->hij", q, self.grouped(k, q)) * q.shape[-1] ** -0.5
        if part.causal:
            weights = weights.masked_fill(torch.ones_like(weights).triu(1).bool(), float("-inf"))
        return weights, weights.logsumexp(-1)

    def grouped(self, x: Tensor, q: Tensor) -> Tensor:
        return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)

    def summed(self, x: Tensor, like: Tensor) -> Tensor:
        return x.unflatten(1, (like.shape[1], -1)).sum(2)


@pytest.mark.parametrize(("prompt", "step"), [(32, 16), (7, 50)])
def test_two_calls_and_a_merge_are_segment_attention(prompt, step):
    case = Case(time=128, dtype=torch.float32, heads=(4, 2), width=16, prompt=prompt, step=step)
    q, k, v = case.qkv()
    ids = case.step_ids()
    mine, _ = ops.segment_attention(q, k, v, ids)
    theirs = peers.own_and_prompt(ids, EagerAttention())(q, k, v)
    assert relative_error(theirs, mine) < 1e-5
    gradient = torch.randn_like(mine)
    wanted = torch.autograd.grad(mine, (q, k, v), gradient)
    for found, expected in zip(torch.autograd.grad(theirs, (q, k, v), gradient), wanted, strict=True):
        assert relative_error(found, expected) < 1e-4


def test_varlen_attention_has_what_we_call():
    attention = peers.VarlenAttention()
    part = peers.Part.of([2, 3], [2, 3], True, torch.device("meta"))
    q, k = torch.empty(5, 4, 16, device="meta"), torch.empty(5, 2, 16, device="meta")
    out, lse = attention.forward(part, q, k, k)
    assert (out.shape, lse.shape) == (q.shape, (4, 5))


def test_sdpa_is_plain_causal_attention():
    q, k, v = Case(time=64, dtype=torch.float32, heads=(4, 2), width=16, prompt=0, step=64).qkv()
    mine, _ = ops.segment_attention(q, k, v, torch.ones(1, 64, dtype=torch.int32))
    assert relative_error(peers.causal_attention("SDPA, flash")(q, k, v), mine) < 1e-5


def test_flex_attention_is_segment_attention(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = Case(time=128, dtype=torch.float32, heads=(4, 2), width=16, prompt=32, step=16)
    inputs = tuple(x.detach() for x in case.qkv())
    ids = case.step_ids()
    (run,) = bench_segment_attention.flex_peer(case, inputs, ids).runs.values()
    assert relative_error(run(), ops.segment_attention(*inputs, ids)[0]) < 1e-5


def ungrouped(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert q.shape[2] == k.shape[2] == v.shape[2]


def chunk_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True):
    """With the names and defaults of flash-linear-attention."""
    ungrouped(q, k, v)
    assert not normalize
    return reference.linear_attention(q, k, v, scale=scale)


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False):
    ungrouped(q, k, v)
    decay = g if g_gamma is None else g_gamma.expand(*q.shape[:3])
    assert decay.shape == q.shape[:3]
    return reference.linear_attention(q, k, v, decay, scale=scale)


def fused_recurrent_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False
):  # fmt: skip
    ungrouped(q, k, v)
    return reference.linear_attention(q, k, v, g, initial_state, scale=scale)


@pytest.fixture
def fla(monkeypatch):
    """Something in place of the package that takes and computes the same."""
    plain = types.SimpleNamespace(chunk_linear_attn=chunk_linear_attn)
    gated = types.SimpleNamespace(
        chunk_simple_gla=chunk_simple_gla, fused_recurrent_simple_gla=fused_recurrent_simple_gla
    )
    monkeypatch.setitem(sys.modules, "fla.ops.linear_attn", plain)
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", gated)


@pytest.mark.parametrize("operator", [getattr(bench_linear_attention, n) for n in ("NAME", "CONSTANT", "PER_TOKEN")])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
def test_fla_gets_what_ours_gets(fla, operator, heads):
    case = Case(time=40, dtype=torch.float32, heads=heads, width=8, prompt=8, step=8, batch=2)
    subject = bench_linear_attention.subject(case, operator)
    peer = subject.peers[peers.FLA]()
    (run,) = peer.runs.values()
    assert relative_error(run(), subject.run()) < 1e-5
    gradient = torch.randn(2, 40, heads[0], 8)
    mine, theirs = (
        torch.autograd.grad(call(), inputs[0], gradient)[0]
        for call, inputs in ((subject.run, subject.inputs), (run, peer.inputs))
    )
    assert relative_error(theirs, mine) < 1e-5
    assert len(peer.inputs) == len(subject.inputs)
    assert bool(peer.prepared) == (heads[0] != heads[1])


def test_fla_updates_the_same_states(fla):
    case = Case(time=1, batch=3, dtype=torch.bfloat16, heads=(4, 2), width=16, prompt=0, step=1)
    states, *vectors = bench_state_update.inputs_of(case)[0]
    (call,) = bench_state_update.fla_calls(case, [(states, *vectors)])[""]
    assert relative_error(call(), ops.state_update(states, *vectors)) < 0.01


@pytest.mark.parametrize("name", peers.FLASH_MODULES)
def test_flash_attention_is_called_for_causal_attention(monkeypatch, name):
    def flash_attn_func(q, k, v, causal=False):
        out = peers.sdpa(q, k, v)
        assert causal
        return (out, None) if name == "flash-attn 4" else out

    module = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, peers.FLASH_MODULES[name], module)
    case = Case(time=64, dtype=torch.float32, heads=(4, 2), width=16, prompt=0, step=64)
    subject = bench_segment_attention.subject(case)
    peer = subject.peers[name]()
    assert not peer.apart
    assert relative_error(peer.runs[""](), subject.run()) < 1e-5


def test_causal_attention_is_more_work_than_steps():
    case = Case(time=128, dtype=torch.float32, heads=(4, 2), width=16, prompt=32, step=16)
    peer = bench_segment_attention.subject(case).peers["SDPA, flash, causal, per visible FLOP"]()
    assert peer.apart
    assert peer.work == visible_pairs(case.step_ids()) / (128 * 129 / 2)


# ---- the whole way


def by_the_clock(runs):
    for run in runs.values():
        run()
    return {name: Timing(1e-3 * (1 + place), 0.1, 1e-5) for place, name in enumerate(runs)}


def in_sequence(calls):
    """Several calls as one, where there are no graphs."""
    return lambda: [call() for call in calls], len(calls)


def instruments(left=lambda: 1e9, **changes) -> Instruments:
    own = {"time": by_the_clock, "captured": in_sequence, "extra": lambda run: 0, "wait": lambda: None}
    return Instruments(lambda case: ROUGH, left, **own | changes)


def small(question):
    """The same question of a size for the CPU."""
    case = question.case
    if question.operator == "state_update":
        return replace(question, case=replace(case, batch=min(case.batch, 3), heads=(4, 2), width=16, device="cpu"))
    steps = {"prompt": 0, "step": 96} if not case.prompt else {"prompt": 32, "step": 32}
    shape = {"time": 96, "heads": (4, 2), "width": 16, "batch": min(case.batch, 2), "device": "cpu"}
    return replace(question, case=replace(case, **shape | steps))


@pytest.fixture
def quick(monkeypatch):
    """Nothing is compiled, and states need not exceed any cache."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(bench_state_update, "EXCEEDS_CACHE", 1 << 14)
    peers.flex.cache_clear()
    yield
    peers.flex.cache_clear()


def rows_of(record_of_all: dict) -> list:
    return [Row(**fields) for section in record_of_all.values() for fields in section["rows"]]


def first_of_each(*modules):
    """One question for every operator that is asked about."""
    found = {}
    for module in modules:
        for question in module.questions("cuda"):
            found.setdefault(question.operator, small(question))
    return list(found.values())


def first():
    return first_of_each(bench_linear_attention)[0]


@pytest.fixture
def measured(quick):
    return suite.measure(first_of_each(*gpu.OPERATORS), instruments(), {"GPU": "none"})


def test_every_operator_is_right_and_timed(measured):
    rows = rows_of(measured)
    kernels = [row for row in rows if row.kind == KERNEL]
    assert len(kernels) == sum(len(question.directions) for question in first_of_each(*gpu.OPERATORS))
    assert [row.failure for row in kernels] == [""] * len(kernels)
    assert any(row.unit == "launches" and row.reached for row in rows)
    by_peer = {(row.operator, row.direction, row.what): row for row in rows if row.kind == COMPARISON}
    for key in (
        ("linear_attention", BOTH, CHUNKED),
        ("step_linear_attention, steps of 384", FORWARD, CHUNKED),
        ("mixed_attention, steps of 384", BOTH, bench_mixed_attention.SEPARATE),
        ("state_update", bench_state_update.IN_GRAPH, EAGER_UPDATE),
        ("state_update", bench_state_update.IN_GRAPH, bench_state_update.COPY),
    ):
        assert by_peer[key].failure == "", key
        assert by_peer[key].numbers["peer time"][0] > 0


def test_missing_peers_are_named(measured):
    reasons = {row.what: row.failure for row in rows_of(measured) if row.kind == COMPARISON and row.failure}
    for peer, module in ((peers.FLA, "fla"), ("flash-attn 3", "flash_attn_interface")):
        assert reasons[peer].startswith("not installed: ")
        assert module in reasons[peer]
    assert "CPU" in reasons[peers.TWO_CALLS]  # it refuses, and says why


def test_page(measured, tmp_path):
    reached, rows = roofline.gpu_ceilings(by_the_clock, "cpu", 1 << 12, 16)
    assert reached.bytes == 2 * 4096 / 1e-3
    found = {"sections": {"ceilings": record.section({"GPU": "none"}, rows, 1.0)} | measured}
    record.write(found, tmp_path, "gpu", page(found, "gpu"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]
    assert record.stored(tmp_path, "gpu") == json.loads(json.dumps(found))
    text = (tmp_path / "gpu.md").read_text()
    for expected in (
        "## 1. What the GPU itself does", "## 5. state_update", "- GPU: none", "not installed: ", "targets reached",
        "| <= 0.33 ms |", "| >= 450 TFLOP/s |", "| >= 2x |", "<= one launch per call", "roofline ms",
        "create_block_mask",
    ):  # fmt: skip
        assert expected in text, expected


def test_targets_of_state_update():
    asked = {(question.case.batch, question.case.heads): question for question in bench_state_update.questions("cuda")}
    aim, copy = bench_state_update.IN_GRAPH, (bench_state_update.IN_GRAPH, bench_state_update.COPY)
    assert asked[1, (12, 2)].aims[aim] == ("us", 4e-6)
    assert asked[256, (64, 64)].ratios[copy] == 0.85
    assert copy not in asked[8, (12, 2)].ratios  # far smaller than the cache of the GPU


def test_what_does_not_fit_the_time_is_left_out_by_name(quick):
    asked = first_of_each(bench_state_update, bench_mixed_attention)
    taken = iter((100.0, *[4.0] * 100))  # the first question finds time, the others do not
    sections = suite.measure(asked, instruments(left=lambda: next(taken)), {})
    assert sections["state_update"]["rows"]
    assert not sections["state_update"]["left_out"]
    assert sections["mixed_attention"]["rows"] == []
    assert sections["mixed_attention"]["left_out"] == [question.name for question in asked[1:]]
    assert "mixed_attention, steps of 384: B 1, T 96, heads 4/2, D 16" in page({"sections": sections}, "gpu")


def test_what_was_measured_is_kept_after_every_question(quick):
    asked = first_of_each(bench_mixed_attention)
    lengths = []
    suite.measure(asked, instruments(), {}, lambda kept: lengths.append(len(kept["mixed_attention"]["rows"])))
    assert len(lengths) == len(asked)
    assert 0 < lengths[0] < lengths[1]


def test_the_most_important_questions_come_first(quick, capsys):
    asked = first_of_each(bench_mixed_attention, bench_state_update)
    suite.measure(asked, instruments(left=lambda: 0.0), {})
    lines = capsys.readouterr().out.splitlines()
    ranks = {question.name: question.rank for question in asked}
    order = [ranks[line.partition("left out: ")[2]] for line in lines]
    assert order == sorted(order)
    assert len(order) > 1


def test_peers_are_left_out_when_the_time_is_spent(quick):
    question = first()
    rows = list(question.measure(question, instruments(left=lambda: 0.0)))
    assert {row.failure for row in rows if row.kind == COMPARISON and row.what == CHUNKED} == {NO_TIME}
    assert all(not row.failure for row in rows if row.kind == KERNEL)


def small_subject(heads=(4, 2)):
    case = Case(time=96, dtype=torch.bfloat16, heads=heads, width=16, prompt=32, step=32)
    return bench_linear_attention.subject(case)


def answers(subject, own):
    return suite.answers(replace(first(), subject=lambda case: subject), own)


def test_a_wrong_result_is_reported_and_not_timed(quick):
    subject = small_subject()
    check_output(subject)
    check_gradients(subject)
    more = replace(subject, ours=lambda q, k, v: tuple(1.05 * x for x in ops.linear_attention(q, k, v)))
    rows = list(answers(more, instruments(time=lambda runs: pytest.fail("timed"))))
    assert [row.failure[:29] for row in rows] == ["wrong, not timed: the output "] * 2


def test_wrong_gradients_leave_the_forward_to_be_timed(quick):
    steep = replace(small_subject(), ours=lambda q, k, v: ops.linear_attention(q, k, v * 1.05 - (v * 0.05).detach()))
    forward, both = (row for row in answers(steep, instruments()) if row.kind == KERNEL)
    assert (forward.failure, forward.numbers["time"][0]) == ("", 1e-3)
    assert "gradient 2 differs" in both.failure


def test_what_is_not_finite_is_not_timed(quick):
    def poisoned(q, k, v):
        out, state = ops.linear_attention(q, k, v)
        if q.shape[2] == 8:  # the whole; outside of the corner that is compared
            out = out.clone()
            out[0, 0, 0, 0] = float("inf")
        return out, state

    subject = replace(small_subject(heads=(8, 4)), ours=poisoned)
    check_output(subject)
    failures = {row.direction: row.failure for row in answers(subject, instruments()) if row.failure}
    assert "infinite" in failures[FORWARD]


def test_a_peer_that_computes_something_else_is_not_timed(quick):
    subject = small_subject()
    other = Peer({"": lambda: 2 * subject.run()}, subject.inputs)
    rows = answers(replace(subject, peers={"other": lambda: other}), instruments())
    failures = [row.failure for row in rows if row.kind == COMPARISON]
    assert len(failures) == 2
    assert all(failure.startswith("computes something else") for failure in failures)


def test_an_operator_that_refuses_is_reported(quick, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no kernel for this\nat all")

    monkeypatch.setattr(ops, "state_update", refuse)
    monkeypatch.setattr(ops, "mixed_attention", refuse)
    asked = first_of_each(bench_state_update, bench_mixed_attention)
    rows = rows_of(suite.measure(asked, instruments(), {}))
    assert {row.failure for row in rows} == {"RuntimeError: no kernel for this"}


def test_what_breaks_while_it_is_timed_breaks_its_direction_alone(quick):
    calls = iter((by_the_clock, None))  # None cannot be called
    rows = answers(small_subject(), instruments(time=lambda runs: next(calls)(runs)))
    forward, both = (row for row in rows if row.kind == KERNEL)
    assert (forward.failure, both.failure[:9]) == ("", "TypeError")


def test_the_corner_is_the_end_of_rows_and_heads():
    case = Case(time=500, dtype=torch.float32, heads=(12, 4), width=2, prompt=100, step=30, batch=3)
    cut = corner_of(case)
    q, k, _ = case.qkv()
    assert torch.equal(cut(q), q[2:, :197, 6:])
    assert torch.equal(cut(k), k[2:, :197, 2:])
    causal = replace(case, time=5000, prompt=0, step=5000)
    assert corner_of(causal)(causal.random(4, 1)).shape == (1, 1500, 2, 1)  # its definition takes a square of it


def test_constant_decay_is_the_same_for_peers_and_ours():
    """What the peer gets per query head is what ours gets per token and key head."""
    case = Case(time=40, dtype=torch.float32, heads=(4, 2), width=8, prompt=8, step=8)
    subject = bench_linear_attention.subject(case, bench_linear_attention.CONSTANT)
    q, k, v = (x.detach() for x in subject.inputs)
    gammas = torch.log1p(-(2.0 ** (-5 - torch.arange(2))))
    expected, _ = reference.linear_attention(q, k, v, gammas.expand(1, 40, -1))
    assert relative_error(subject.run(), expected) < 1e-5


# ---- without a GPU


def test_expected_table_is_the_committed_one():
    text = expected_page(gpu.questions())
    assert "calculated, not measured" in text
    assert (record.RESULTS / "gpu_expected.md").read_text() == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit) as ended:
        suite.main_of_device("cuda", gpu.questions(), ["--out", str(tmp_path)])
    assert ended.value.code == suite.NO_GPU
    assert list(tmp_path.iterdir()) == []


def test_instruments_of_the_gpu():
    require("cuda")
    x = torch.randn(1 << 20, device="cuda")
    own = Instruments(lambda case: ROUGH, lambda: 1.0)
    timings = own.time({"add": lambda: x + 1, "sort": lambda: x.sort()})
    assert 0 < timings["add"].median < timings["sort"].median
    assert timings["add"].host > 0
    replay, launches = own.captured([lambda: x.add_(1), lambda: x.add_(1)])
    assert launches == 2
    before = x.clone()
    replay()
    assert torch.equal(x, before + 1 + 1)
    assert own.extra(lambda: (x + 1) + 1) == x.nbytes
