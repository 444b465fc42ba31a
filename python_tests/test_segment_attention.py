"""segment_attention against its definition, at the edges of its tiles, and what it refuses."""

import itertools
import resource

import pytest
import torch
import torch.nn.functional as F
from cases import EXACT, GRADIENT, VALUE, Heads, random_step_ids, relative_error

from statecore import ops, reference

MHA = Heads(q=2, k=2, v=2, key_width=16, value_width=16)
GQA = Heads(q=6, k=2, v=2, key_width=24, value_width=9)
MQA = Heads(q=3, k=1, v=1, key_width=5, value_width=33)

PROMPT_AND_STEPS = {"prompt": 20, "longest": 60}
TINY_STEPS = {"prompt": 3, "longest": 3, "skip": True}
LONG_PROMPT = {"prompt": 1000, "longest": 1}


def ids_of(*lengths: int, first: int = 0) -> torch.Tensor:
    """int32 [1, T]: the prompt of lengths[0] tokens (id `first`), then a step of each further length."""
    return torch.cat([torch.full((n,), first + i, dtype=torch.int32) for i, n in enumerate(lengths)])[None]


def with_gradients(function, tensors, *args, generator_seed=5, **kwargs):
    """Results, and the gradients of a fixed random combination of them (lse only where it is finite)."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = function(*leaves, *args, **kwargs)
    generator = torch.Generator().manual_seed(generator_seed)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse)]
    loss = (out * weights[0].to(out.dtype)).sum() + (lse.masked_fill(lse.isinf(), 0) * weights[1].to(lse.dtype)).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)


def assert_like_reference(tensors, step_ids, cu_seqlens=None, scale=None):
    """float64 inputs: in float64 to the last bits, in float32 within the budget."""
    wanted = with_gradients(reference.segment_attention, tensors, step_ids, cu_seqlens, scale=scale)
    for dtype in (torch.float64, torch.float32):
        inputs = [x.to(dtype) for x in tensors]
        got = with_gradients(ops.segment_attention, inputs, step_ids, cu_seqlens, scale=scale)
        limits = [VALUE[dtype]] * 2 + [GRADIENT[dtype]] * 3
        for name, x, y, limit in zip(("out", "lse", "grad_q", "grad_k", "grad_v"), got, wanted, limits, strict=True):
            assert x.dtype == (torch.float32 if dtype == torch.float32 else torch.float64)
            assert relative_error(x, y) <= limit, f"{name} in {dtype}"


# ---- against the definition


@pytest.mark.parametrize("heads", [MHA, GQA, MQA], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("kind", [PROMPT_AND_STEPS, TINY_STEPS, LONG_PROMPT], ids=["steps", "tiny steps", "prompt"])
@pytest.mark.parametrize("padding", [0, 40])
def test_random_cases(heads, kind, padding):
    for batch, time in ((2, 150), (1, 301)):
        assert_like_reference(heads.qkv(batch, time), random_step_ids(batch, time, padding=padding, **kind))


@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257])
def test_lengths_around_tile_edges(time):
    heads = Heads(q=2, k=1, v=1, key_width=8, value_width=8)
    for step_ids in (random_step_ids(1, time, prompt=time // 4, longest=70), ids_of(0, time), ids_of(time)):
        assert_like_reference(heads.qkv(1, time), step_ids)


@pytest.mark.parametrize("edge", [63, 64, 65, 127, 129])
def test_steps_that_begin_around_tile_edges(edge):
    assert_like_reference(MHA.qkv(1, 3 * edge + 5), ids_of(edge, edge, 5, edge))
    assert_like_reference(MHA.qkv(1, 2 * edge + 3), ids_of(edge, 3, edge, first=1))


@pytest.mark.parametrize(("key_width", "value_width"), [(1, 1), (3, 17), (16, 128), (100, 64), (129, 15)])
def test_any_width(key_width, value_width):
    heads = Heads(q=2, k=1, v=1, key_width=key_width, value_width=value_width)
    assert_like_reference(heads.qkv(2, 70), random_step_ids(2, 70, padding=3))


def test_more_query_heads_than_rows_of_a_tile():
    heads = Heads(q=300, k=1, v=1, key_width=4, value_width=4)
    assert_like_reference(heads.qkv(1, 20), ids_of(5, 7, 8))


def test_scale():
    assert_like_reference(GQA.qkv(1, 40), ids_of(10, 30), scale=0.37)
    assert_like_reference(GQA.qkv(1, 40), ids_of(10, 30), scale=0.0)


def test_large_scores_do_not_overflow():
    q, k, v = MHA.qkv(1, 130, torch.float32)
    out, lse = ops.segment_attention(300 * q, k, v, ids_of(50, 80))
    wanted, wanted_lse = reference.segment_attention(300 * q.double(), k.double(), v.double(), ids_of(50, 80))
    assert relative_error(lse, wanted_lse) < 1e-6
    assert relative_error(out, wanted) < 1e-3  # scores of some 1000 carry an absolute error of 1e-4


def test_gradcheck():
    heads = Heads(q=4, k=2, v=2, key_width=3, value_width=2)
    step_ids = torch.tensor([[-1, 0, 0, 1, 1, 2, 2, 5, -1]] * 2, dtype=torch.int32)

    def results(q, k, v):
        out, lse = ops.segment_attention(q, k, v, step_ids)
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(results, heads.qkv(2, 9, requires_grad=True))


def test_one_step_without_prompt_is_causal_attention():
    q, k, v = GQA.qkv(2, 200)
    out, _ = ops.segment_attention(q, k, v, torch.full((2, 200), 4, dtype=torch.int32))
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    assert relative_error(out, wanted.transpose(1, 2)) < EXACT


# ---- how tokens may be laid out


@pytest.mark.parametrize("lengths", [(70, 1, 0, 130, 3), (0, 0, 5), (64, 64), (0,), (200,)])
def test_packed_is_one_by_one(lengths):
    total = sum(lengths)
    q, k, v = GQA.qkv(1, total)
    pieces = [random_step_ids(1, n, prompt=10, longest=30, padding=2) for n in lengths]
    step_ids = torch.cat(pieces, dim=1)
    offsets = list(itertools.accumulate(lengths, initial=0))
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    got = with_gradients(ops.segment_attention, (q, k, v), step_ids, cu_seqlens)
    assert_like_reference((q, k, v), step_ids, cu_seqlens)
    for ids, begin, end in zip(pieces, offsets[:-1], offsets[1:], strict=True):
        out, lse = ops.segment_attention(*(x[:, begin:end] for x in (q, k, v)), ids)
        assert torch.equal(out, got[0][:, begin:end])
        assert torch.equal(lse, got[1][:, :, begin:end])


@pytest.mark.parametrize("queries", [1, 2, 7, 64, 100, 180])
def test_queries_are_the_last_tokens_of_a_cache_with_holes(queries):
    keys = 180
    q, k, v = GQA.qkv(3, queries, keys=keys)
    step_ids = random_step_ids(3, keys, prompt=30, longest=50)
    step_ids[0, torch.rand(keys) < 0.3] = -1
    step_ids[1, 64:128] = -1
    step_ids[2, : keys - 1] = -1
    assert_like_reference((q, k, v), step_ids)


@pytest.mark.parametrize("heads", [MHA, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("queries", [1, 100])
def test_what_lies_in_holes_and_padding_does_not_matter(heads, queries):
    q, k, v = heads.qkv(2, queries, keys=180)
    step_ids = random_step_ids(2, 180, prompt=30, longest=50)
    step_ids[torch.rand(2, 180) < 0.3] = -1
    wanted = with_gradients(ops.segment_attention, (q, k, v), step_ids)
    hole = step_ids == -1
    padding = hole[:, 180 - queries :]
    q, k, v = q.clone(), k.clone(), v.clone()
    k[hole], v[hole], q[padding] = float("nan"), float("inf"), float("nan")
    got = with_gradients(ops.segment_attention, (q, k, v), step_ids)
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x, y)
    out, lse, grad_q, grad_k, grad_v = got
    for nothing in (out[padding], grad_q[padding], grad_k[hole], grad_v[hole]):
        assert (nothing == 0).all()
    assert (lse.transpose(1, 2)[padding] == -torch.inf).all()


def test_padding_stays_zero_beside_infinite_values():
    q, k, v = MHA.qkv(1, 40)
    v[:, 3] = float("inf")
    out, _ = ops.segment_attention(q, k, v, F.pad(ids_of(10, 20), (0, 10), value=-1))
    assert (out[:, 30:] == 0).all()


@pytest.mark.parametrize("queries", [1, 2, 5, 40])
def test_what_lies_beside_a_row_does_not_matter(queries):
    heads = Heads(q=1, k=1, v=1, key_width=9, value_width=20)
    plain = heads.qkv(1, queries, keys=130)
    beside = [F.pad(x, (0, 7), value=float("nan"))[..., : x.shape[-1]] for x in plain]
    got = ops.segment_attention(*beside, ids_of(50, 80))
    for x, y in zip(got, ops.segment_attention(*plain, ids_of(50, 80)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("cuts", [(50,), (1, 2, 3), (64, 128), (33, 34, 150)])
def test_chunked_prefill_is_one_call(cuts):
    time = 170
    q, k, v = GQA.qkv(2, time)
    step_ids = random_step_ids(2, time, prompt=30, longest=40, padding=5)
    out, lse = ops.segment_attention(q, k, v, step_ids)
    for begin, end in zip((0, *cuts), (*cuts, time), strict=True):
        part, part_lse = ops.segment_attention(q[:, begin:end], k[:, :end], v[:, :end], step_ids[:, :end])
        assert relative_error(part, out[:, begin:end]) < EXACT
        assert relative_error(part_lse, lse[:, :, begin:end]) < EXACT


def test_padding_on_either_side_changes_nothing():
    time = 90
    q, k, v = GQA.qkv(1, time)
    step_ids = random_step_ids(1, time, prompt=30, longest=40)
    wanted = with_gradients(ops.segment_attention, (q, k, v), step_ids, generator_seed=1)
    for left, right in ((70, 0), (0, 70), (3, 5)):
        pad = (0, 0, 0, 0, left, right)
        ids = F.pad(step_ids, (left, right), value=-1)
        out, lse = ops.segment_attention(*(F.pad(x, pad, value=7.0) for x in (q, k, v)), ids)
        assert relative_error(out, F.pad(wanted[0], pad)) < EXACT
        assert relative_error(lse, F.pad(wanted[1], (left, right), value=-torch.inf)) < EXACT


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (2, 0, 0), (2, 0, 7), (0, 0, 0)])
def test_nothing_to_do(batch, queries, keys):
    tensors = GQA.qkv(batch, queries, keys=keys)
    out, lse, grad_q, grad_k, grad_v = with_gradients(
        ops.segment_attention, tensors, torch.zeros(batch, keys, dtype=torch.int32)
    )
    assert out.shape == (batch, queries, GQA.q, GQA.value_width)
    assert lse.shape == (batch, GQA.q, queries)
    assert grad_q.shape == tensors[0].shape
    assert (grad_k == 0).all()
    assert (grad_v == 0).all()


def test_nobody_at_all():
    tensors = GQA.qkv(2, 70)
    out, lse, *grads = with_gradients(ops.segment_attention, tensors, torch.full((2, 70), -1, dtype=torch.int32))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert all((grad == 0).all() for grad in grads)


def test_strided_inputs():
    heads, width, time = 4, 16, 90
    step_ids = random_step_ids(2, time, prompt=20, longest=30)
    fused = torch.randn(2, time, (heads + 2) * width, dtype=torch.float64)
    split = fused.split([heads * width, width, width], dim=-1)
    sliced = [x.unflatten(-1, (-1, width)) for x in split]
    heads_first = [torch.randn(2, h, time, width, dtype=torch.float64).transpose(1, 2) for h in (heads, 2, 2)]
    every_other = [torch.randn(2, 2 * time, h, width, dtype=torch.float64)[:, ::2] for h in (heads, 2, 2)]
    expanded = [torch.randn(1, time, 1, width, dtype=torch.float64).expand(2, time, h, width) for h in (heads, 2, 2)]
    for tensors in (sliced, heads_first, every_other, expanded):
        got = with_gradients(ops.segment_attention, tensors, step_ids)
        dense = with_gradients(ops.segment_attention, [x.contiguous() for x in tensors], step_ids)
        for x, y in zip(got, dense, strict=True):
            assert torch.equal(x, y)
    assert_like_reference(sliced, step_ids[:1].expand(2, time))


def test_gradient_without_strides():
    """That of a sum: one number, expanded."""
    q, k, v = GQA.qkv(1, 50)
    step_ids = ids_of(10, 40)
    out, lse = ops.segment_attention(q, k, v, step_ids)
    one = torch.ones((), dtype=q.dtype)
    arguments = q, k, v, out, lse, step_ids, None, None
    got = torch.ops.statecore.segment_attention_backward(one.expand_as(out), one.expand_as(lse), *arguments)
    dense = torch.ones_like(out), torch.ones_like(lse)
    for x, y in zip(got, torch.ops.statecore.segment_attention_backward(*dense, *arguments), strict=True):
        assert torch.equal(x, y)


# ---- accuracy, determinism, cost


@pytest.mark.parametrize("lengths", [(256, *[256] * 15), (0, 4096), (2000, 96, *[40] * 50)], ids=str)
def test_error_budget_at_4096_tokens(lengths):
    heads = Heads(q=2, k=1, v=1, key_width=64, value_width=64)
    exact, step_ids = heads.qkv(1, 4096), ids_of(*lengths)
    wanted = with_gradients(ops.segment_attention, exact, step_ids)  # float64, held to the reference by other tests
    got = with_gradients(ops.segment_attention, [x.float() for x in exact], step_ids)
    for x, y, limit in zip(got, wanted, (1e-5, 1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        assert relative_error(x, y) <= limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [(64, *[64] * 9), (0, 640)], ids=str)
def test_16_bit_error_against_eager_float32(dtype, lengths):
    rounded = [x.to(dtype) for x in GQA.qkv(1, 640)]
    step_ids = ids_of(*lengths)
    got = with_gradients(ops.segment_attention, rounded, step_ids)
    eager = with_gradients(lambda *args: _round_out(reference.segment_attention(*args), dtype),
                           [x.float() for x in rounded], step_ids)  # fmt: skip
    eager = [eager[0], eager[1], *(x.to(dtype) for x in eager[2:])]
    wanted = with_gradients(reference.segment_attention, [x.double() for x in rounded], step_ids)
    for name, x, y, z in zip(("out", "lse", "grad_q", "grad_k", "grad_v"), got, eager, wanted, strict=True):
        assert x.dtype == (torch.float32 if name == "lse" else dtype)
        assert relative_error(x, z) <= 1.5 * relative_error(y, z) + 1e-6, name


def _round_out(results, dtype):
    return results[0].to(dtype), results[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_same_bits_on_every_run_and_with_every_number_of_threads(dtype):
    cases = [
        (MQA.qkv(1, 900, dtype), random_step_ids(1, 900, prompt=60, longest=200), None),
        (MQA.qkv(1, 900, dtype), ids_of(0, 900), None),
        (GQA.qkv(3, 130, dtype), random_step_ids(3, 130, padding=9), None),
        (GQA.qkv(1, 700, dtype), ids_of(600, 100), torch.tensor([0, 10, 600, 700], dtype=torch.int32)),
    ]
    for tensors, step_ids, cu_seqlens in cases:
        results = []
        for threads in (1, 2, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(ops.segment_attention, tensors, step_ids, cu_seqlens))
        for other in results[1:]:
            for x, y in zip(results[0], other, strict=True):
                assert torch.equal(x, y)


def test_keys_of_other_steps_are_never_touched():
    """NaN in one step would spread through any block of keys that is multiplied at all, even with weight 0."""
    length = 1024
    step_ids = ids_of(length, *[length] * 5)
    tensors = Heads(q=1, k=1, v=1, key_width=4, value_width=4).qkv(1, 6 * length)
    step = slice(2 * length, 3 * length)
    for x in tensors[1:]:
        x[:, step] = float("nan")
    out, _lse, grad_q, grad_k, grad_v = with_gradients(ops.segment_attention, tensors, step_ids)
    assert out[:, step].isnan().all()
    for x in (out, grad_q):
        assert x[:, : 2 * length].isfinite().all()
        assert x[:, 3 * length :].isfinite().all()
    for x in (grad_k, grad_v):
        assert x[:, length : 2 * length].isfinite().all()
        assert x[:, 3 * length :].isfinite().all()


def test_memory_grows_with_tokens_only():
    time = 1 << 16  # a mask of [T, T] booleans would take 4 GiB
    q, k, v = (torch.randn(1, time, 1, 8) for _ in range(3))
    step_ids = (torch.arange(time, dtype=torch.int32) // 100)[None]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with_gradients(ops.segment_attention, (q, k, v), step_ids)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


# ---- what is refused


def inputs(**changes):
    """Arguments of a valid call, with some of them replaced."""
    q, k, v = GQA.qkv(1, 12, torch.float32)
    return {"q": q, "k": k, "v": v, "step_ids": ids_of(4, 8), "cu_seqlens": None} | changes


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


REFUSALS = {
    "q must be float32, bfloat16, float16 or float64, got int64": {"q": zeros(1, 12, 6, 24, dtype=torch.int64)},
    "q must have 4 dimensions [B, Tq, Hq, Dk], got shape (12, 6, 24)": {"q": zeros(12, 6, 24)},
    "k must have 4 dimensions [B, Tk, Hk, Dk], got shape (12, 2, 24)": {"k": zeros(12, 2, 24)},
    "v must have 4 dimensions [B, Tk, Hk, Dv], got shape (12, 2, 9)": {"v": zeros(12, 2, 9)},
    "k must have shape (1, 12, 2, 24), got (1, 12, 2, 23)": {"k": zeros(1, 12, 2, 23)},
    "k must have shape (1, 12, 2, 24), got (2, 12, 2, 24)": {"k": zeros(2, 12, 2, 24)},
    "v must have shape (1, 12, 2, 9), got (1, 13, 2, 9)": {"v": zeros(1, 13, 2, 9)},
    "v must have shape (1, 12, 2, 9), got (1, 12, 6, 9)": {"v": zeros(1, 12, 6, 9)},
    "q must have a multiple of the 2 heads of k and v, got 3": {"q": zeros(1, 12, 3, 24)},
    "q must have a multiple of the 2 heads of k and v, got 0": {"q": zeros(1, 12, 0, 24)},
    "q and k must have a width of at least 1": {"q": zeros(1, 12, 6, 0), "k": zeros(1, 12, 2, 0)},
    "v must have a width of at least 1": {"v": zeros(1, 12, 2, 0)},
    "k must have at least as many tokens as q, got 12 for 13 queries": {"q": zeros(1, 13, 6, 24)},
    "k must be float32, got bfloat16": {"k": zeros(1, 12, 2, 24, dtype=torch.bfloat16)},
    "v must be float32, got float64": {"v": zeros(1, 12, 2, 9, dtype=torch.float64)},
    "q must have stride 1 in its last dimension, got stride 6": {"q": zeros(1, 12, 24, 6).transpose(2, 3)},
    "k must have stride 1 in its last dimension, got stride 2": {"k": zeros(1, 12, 24, 2).transpose(2, 3)},
    "v must have stride 1 in its last dimension, got stride 2": {"v": zeros(1, 12, 9, 2).transpose(2, 3)},
    "step_ids must have shape (1, 12), got (1, 11)": {"step_ids": ids_of(4, 7)},
    "step_ids must be int32, got int64": {"step_ids": ids_of(4, 8).long()},
    "step_ids must have stride 1 in its last dimension, got stride 2": {"step_ids": ids_of(8, 16)[:, ::2]},
    "step_ids must not decrease inside a sequence, got 1 after 2 at [0, 9]": {
        "step_ids": int32(0, 0, 0, 0, 1, 1, 1, 2, 2, 1, 1, 1)[None]
    },
    "step_ids must not decrease inside a sequence, got 1 after 2 at [0, 8]": {
        "step_ids": int32(0, 0, 0, 0, 1, 1, 2, -1, 1, 2, 2, 2)[None]
    },
    "step_ids must be >= 0, or -1 for padding, got -2 at [0, 0]": {"step_ids": ids_of(4, 8, first=-2)},
    "cu_seqlens must have 1 dimensions [sequences + 1], got shape (1, 2)": {"cu_seqlens": int32(0, 12)[None]},
    "cu_seqlens must be int32, got int64": {"cu_seqlens": torch.tensor([0, 12])},
    "cu_seqlens must be contiguous": {"cu_seqlens": int32(0, 0, 12, 0)[::2]},
    "cu_seqlens must have at least one element": {"cu_seqlens": int32()},
    "cu_seqlens must start with 0, got 1": {"cu_seqlens": int32(1, 12)},
    "cu_seqlens must end with the number of tokens, 12, got 11": {"cu_seqlens": int32(0, 4, 11)},
    "cu_seqlens must not decrease, got 8 then 4 at position 2": {"cu_seqlens": int32(0, 8, 4, 12)},
    "k and q must have the same number of tokens when cu_seqlens is given, got 12 and 5": {
        "q": zeros(1, 5, 6, 24),
        "cu_seqlens": int32(0, 12),
    },
    "cu_seqlens needs q of batch size 1, got 2": {
        "q": zeros(2, 12, 6, 24),
        "k": zeros(2, 12, 2, 24),
        "v": zeros(2, 12, 2, 9),
        "cu_seqlens": int32(0, 12),
    },
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    with pytest.raises(RuntimeError) as refused:
        ops.segment_attention(**inputs(**REFUSALS[message]))
    assert f"statecore: {message}" in str(refused.value)


def test_ids_may_begin_again_with_each_packed_sequence():
    ops.segment_attention(**inputs(step_ids=torch.cat([ids_of(2, 4)] * 2, 1), cu_seqlens=int32(0, 6, 6, 12)))


def test_backward_refuses_what_does_not_fit():
    call = inputs()
    out, lse = ops.segment_attention(**call)
    tensors = [call[name] for name in "qkv"]
    backward = torch.ops.statecore.segment_attention_backward
    for message, grad_out, grad_lse in (
        ("grad_out must have shape (1, 12, 6, 9), got (1, 12, 6, 8)", out[..., 1:], None),
        ("grad_out must be float32, got float64", out.double(), None),
        ("grad_lse must have shape (1, 6, 12), got (1, 12, 6)", out, lse.transpose(1, 2)),
    ):
        with pytest.raises(RuntimeError) as refused:
            backward(grad_out, grad_lse, *tensors, out, lse, call["step_ids"], None, None)
        assert f"statecore: {message}" in str(refused.value)
