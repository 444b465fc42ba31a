"""segment_attention against its definition, at tile edges, and what it refuses."""

import itertools
import random
import resource

import pytest
import torch
import torch.nn.functional as F
from cases import GRADIENT, VALUE, Heads, random_step_ids, relative_error
from devices import CPU, Device, emulator, on

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


def with_gradients(function, tensors, *args, generator_seed=5, dtype=torch.float64, **kwargs):
    """Results, and gradients of a fixed combination of them (lse where finite) with random weights in `dtype`."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = function(*leaves, *args, **kwargs)
    generator = torch.Generator().manual_seed(generator_seed)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype).to(x) for x in (out, lse)]
    loss = (out * weights[0]).sum() + (lse.masked_fill(lse.isinf(), 0) * weights[1]).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)


def assert_like_reference(tensors, step_ids, cu_seqlens=None, scale=None, device: Device = CPU):
    """Takes float64 inputs and checks results and gradients in every dtype of the device within its error budget."""
    device.vary(random.Random(step_ids.numel()))
    step_ids, cu_seqlens = on(device, step_ids, cu_seqlens)
    wanted = None
    for dtype in device.dtypes:
        inputs = [x.to(dtype) for x in on(device, *tensors)]
        if wanted is None or dtype.itemsize == 2:  # inputs rounded to 16 bits have other exact results
            exact = [x.double() for x in inputs]
            wanted = with_gradients(reference.segment_attention, exact, step_ids, cu_seqlens, scale=scale, dtype=dtype)
        got = with_gradients(ops.segment_attention, inputs, step_ids, cu_seqlens, scale=scale, dtype=dtype)
        limits = [VALUE[dtype]] * 2 + [GRADIENT[dtype]] * 3
        for name, x, y, limit in zip(("out", "lse", "grad_q", "grad_k", "grad_v"), got, wanted, limits, strict=True):
            assert x.dtype == (torch.float32 if name == "lse" and dtype.itemsize == 2 else dtype)
            assert relative_error(x, y) <= limit, f"{name} in {dtype}"


# ---- against the definition


@pytest.mark.parametrize("heads", [MHA, GQA, MQA], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("kind", [PROMPT_AND_STEPS, TINY_STEPS, LONG_PROMPT], ids=["steps", "tiny steps", "prompt"])
@pytest.mark.parametrize("padding", [0, 40])
def test_random_cases(heads, kind, padding, device):
    heads = device.supported(heads)
    for batch, time in ((2, 150), (1, 301)):
        step_ids = random_step_ids(batch, time, padding=padding, **kind)
        assert_like_reference(heads.qkv(batch, time), step_ids, device=device)


@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257])
def test_lengths_around_tile_edges(time, device):
    heads = device.supported(Heads(q=2, k=1, v=1, key_width=8, value_width=8))
    for step_ids in (random_step_ids(1, time, prompt=time // 4, longest=70), ids_of(0, time), ids_of(time)):
        assert_like_reference(heads.qkv(1, time), step_ids, device=device)


@pytest.mark.parametrize("edge", [63, 64, 65, 127, 129])
def test_steps_that_begin_around_tile_edges(edge, device):
    assert_like_reference(MHA.qkv(1, 3 * edge + 5), ids_of(edge, edge, 5, edge), device=device)
    assert_like_reference(MHA.qkv(1, 2 * edge + 3), ids_of(edge, 3, edge, first=1), device=device)


@pytest.mark.parametrize(("key_width", "value_width"), [(1, 1), (3, 17), (16, 128), (100, 64), (129, 15), (80, 112)])
def test_any_width(key_width, value_width, device):
    heads = device.supported(Heads(q=2, k=1, v=1, key_width=key_width, value_width=value_width))
    assert_like_reference(heads.qkv(2, 70), random_step_ids(2, 70, padding=3), device=device)


def test_more_query_heads_than_rows_of_a_tile(device):
    heads = device.supported(Heads(q=70 if device.runs_cuda else 300, k=1, v=1, key_width=4, value_width=4))
    assert_like_reference(heads.qkv(1, 20), ids_of(5, 7, 8), device=device)


def test_scale(device):
    for scale in (0.37, 0.0):
        assert_like_reference(device.supported(GQA).qkv(1, 40), ids_of(10, 30), scale=scale, device=device)


@pytest.mark.parametrize("device", ["checked"], indirect=True)
@pytest.mark.parametrize("widths", [(16, 32), (128, 128)], ids=str)
def test_memory_accesses_are_valid(widths, device):
    """Prompt and steps over several tiles, and queries at the end of a cache with empty slots."""
    heads = Heads(2, 1, 1, *widths)
    step_ids = random_step_ids(1, 140, prompt=20, longest=60, padding=9)
    assert_like_reference(heads.qkv(1, 140), step_ids, torch.tensor([0, 140, 140], dtype=torch.int32), device=device)
    step_ids[0, torch.rand(140) < 0.3] = -1
    assert_like_reference(heads.qkv(1, 3, keys=140), step_ids, device=device)


def test_large_scores_do_not_overflow(device):
    q, k, v, ids = on(device, *MHA.qkv(1, 130, torch.float32), ids_of(50, 80))
    out, lse = ops.segment_attention(300 * q, k, v, ids)
    wanted, wanted_lse = reference.segment_attention(300 * q.double(), k.double(), v.double(), ids)
    assert relative_error(lse, wanted_lse) < 1e-6
    assert relative_error(out, wanted) < 1e-3  # scores around 1000 have an absolute error of 1e-4


def test_gradcheck():
    heads = Heads(q=4, k=2, v=2, key_width=3, value_width=2)
    step_ids = torch.tensor([[-1, 0, 0, 1, 1, 2, 2, 5, -1]] * 2, dtype=torch.int32)

    def results(q, k, v):
        out, lse = ops.segment_attention(q, k, v, step_ids)
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(results, heads.qkv(2, 9, requires_grad=True))


def test_one_step_without_prompt_is_causal_attention(device):
    dtype = device.dtypes[0]
    q, k, v = on(device, *device.supported(GQA).qkv(2, 200, dtype))
    out, _ = ops.segment_attention(q, k, v, torch.full((2, 200), 4, dtype=torch.int32, device=device))
    heads_first = (x.double().transpose(1, 2) for x in (q, k, v))
    wanted = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    assert relative_error(out, wanted.transpose(1, 2)) < VALUE[dtype]


# ---- packing, caches, padding, strides


@pytest.mark.parametrize("lengths", [(70, 1, 0, 130, 3), (0, 0, 5), (64, 64), (0,), (200,)])
def test_packed_equals_one_by_one(lengths, device):
    dtype = device.dtypes[0]
    tensors = on(device, *device.supported(GQA).qkv(1, sum(lengths), dtype))
    pieces = [random_step_ids(1, n, prompt=10, longest=30, padding=2) for n in lengths]
    step_ids = torch.cat(pieces, dim=1)
    offsets = list(itertools.accumulate(lengths, initial=0))
    step_ids, cu_seqlens = on(device, step_ids, torch.tensor(offsets, dtype=torch.int32))
    got = with_gradients(ops.segment_attention, tensors, step_ids, cu_seqlens)
    assert_like_reference(tensors, step_ids, cu_seqlens, device=device)
    for ids, begin, end in zip(on(device, *pieces), offsets[:-1], offsets[1:], strict=True):
        out, lse = ops.segment_attention(*(x[:, begin:end] for x in tensors), ids)
        assert torch.equal(out, got[0][:, begin:end])
        assert torch.equal(lse, got[1][:, :, begin:end])


@pytest.mark.parametrize("queries", [1, 2, 7, 64, 100, 180])
def test_queries_at_the_end_of_a_cache_with_empty_slots(queries, device):
    keys = 180
    q, k, v = device.supported(GQA).qkv(3, queries, keys=keys)
    step_ids = random_step_ids(3, keys, prompt=30, longest=50)
    step_ids[0, torch.rand(keys) < 0.3] = -1
    step_ids[1, 64:128] = -1
    step_ids[2, : keys - 1] = -1
    assert_like_reference((q, k, v), step_ids, device=device)


@pytest.mark.parametrize("heads", [MHA, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("queries", [1, 100])
def test_empty_slots_and_padding_are_not_read(heads, queries, device):
    """Poison both with NaN and infinity: results do not change, and their gradients are 0."""
    step_ids = random_step_ids(2, 180, prompt=30, longest=50)
    step_ids[torch.rand(2, 180) < 0.3] = -1
    q, k, v, step_ids = on(device, *device.supported(heads).qkv(2, queries, device.dtypes[0], keys=180), step_ids)
    wanted = with_gradients(ops.segment_attention, (q, k, v), step_ids)
    empty = step_ids == -1
    padding = empty[:, 180 - queries :]
    q, k, v = q.clone(), k.clone(), v.clone()
    k[empty], v[empty], q[padding] = float("nan"), float("inf"), float("nan")
    got = with_gradients(ops.segment_attention, (q, k, v), step_ids)
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x, y)
    out, lse, grad_q, grad_k, grad_v = got
    for zero in (out[padding], grad_q[padding], grad_k[empty], grad_v[empty]):
        assert (zero == 0).all()
    assert (lse.transpose(1, 2)[padding] == -torch.inf).all()


def test_padding_stays_zero_beside_infinite_values(device):
    q, k, v, ids = on(device, *MHA.qkv(1, 40, device.dtypes[0]), F.pad(ids_of(10, 20), (0, 10), value=-1))
    v[:, 3] = float("inf")
    out, _ = ops.segment_attention(q, k, v, ids)
    assert (out[:, 30:] == 0).all()


@pytest.mark.parametrize("queries", [1, 2, 5, 40])
@pytest.mark.parametrize("gap", [7, 16])  # on CUDA: rows too unaligned to copy, and aligned rows
def test_gaps_between_tokens_are_not_read(queries, gap, device):
    """Poison inter-token gaps with NaN; the kernel must not read them."""
    heads = device.supported(Heads(q=1, k=1, v=1, key_width=9, value_width=20))
    *plain, ids = on(device, *heads.qkv(1, queries, device.dtypes[0], keys=130), ids_of(50, 80))
    poisoned = [F.pad(x, (gap, gap), value=float("nan"))[..., gap : gap + x.shape[-1]] for x in plain]
    got = ops.segment_attention(*poisoned, ids)
    for x, y in zip(got, ops.segment_attention(*plain, ids), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("cuts", [(50,), (1, 2, 3), (64, 128), (33, 34, 150)])
def test_chunked_prefill_is_one_call(cuts, device):
    time, dtype = 170, device.dtypes[0]
    tensors = device.supported(GQA).qkv(2, time, dtype)
    q, k, v, step_ids = on(device, *tensors, random_step_ids(2, time, prompt=30, longest=40, padding=5))
    out, lse = ops.segment_attention(q, k, v, step_ids)
    for begin, end in zip((0, *cuts), (*cuts, time), strict=True):
        part, part_lse = ops.segment_attention(q[:, begin:end], k[:, :end], v[:, :end], step_ids[:, :end])
        assert relative_error(part, out[:, begin:end]) < VALUE[dtype]
        assert relative_error(part_lse, lse[:, :, begin:end]) < VALUE[dtype]


def test_padding_on_either_side_changes_nothing(device):
    time, dtype = 90, device.dtypes[0]
    tensors = device.supported(GQA).qkv(1, time, dtype)
    q, k, v, step_ids = on(device, *tensors, random_step_ids(1, time, prompt=30, longest=40))
    wanted = with_gradients(ops.segment_attention, (q, k, v), step_ids, generator_seed=1)
    for left, right in ((70, 0), (0, 70), (3, 5)):
        pad = (0, 0, 0, 0, left, right)
        ids = F.pad(step_ids, (left, right), value=-1)
        out, lse = ops.segment_attention(*(F.pad(x, pad, value=7.0) for x in (q, k, v)), ids)
        assert relative_error(out, F.pad(wanted[0], pad)) < VALUE[dtype]
        assert relative_error(lse, F.pad(wanted[1], (left, right), value=-torch.inf)) < VALUE[dtype]


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (2, 0, 0), (2, 0, 7), (0, 0, 0)])
def test_empty_inputs(batch, queries, keys, device):
    heads = device.supported(GQA)
    tensors = on(device, *heads.qkv(batch, queries, device.dtypes[0], keys=keys))
    out, lse, grad_q, grad_k, grad_v = with_gradients(
        ops.segment_attention, tensors, torch.zeros(batch, keys, dtype=torch.int32, device=device)
    )
    assert out.shape == (batch, queries, GQA.q, heads.value_width)
    assert lse.shape == (batch, GQA.q, queries)
    assert grad_q.shape == tensors[0].shape
    assert (grad_k == 0).all()
    assert (grad_v == 0).all()


def test_only_padding(device):
    *tensors, ids = on(
        device, *device.supported(GQA).qkv(2, 70, device.dtypes[0]), torch.full((2, 70), -1, dtype=torch.int32)
    )
    out, lse, *grads = with_gradients(ops.segment_attention, tensors, ids)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert all((grad == 0).all() for grad in grads)


def test_strided_inputs(device):
    heads, width, time = 4, 16, 90
    step_ids = random_step_ids(2, time, prompt=20, longest=30).to(device)

    def randn(*shape):
        return torch.randn(*shape, dtype=device.dtypes[0]).to(device)

    fused = randn(2, time, (heads + 2) * width)
    split = fused.split([heads * width, width, width], dim=-1)
    sliced = [x.unflatten(-1, (-1, width)) for x in split]
    heads_first = [randn(2, h, time, width).transpose(1, 2) for h in (heads, 2, 2)]
    every_other = [randn(2, 2 * time, h, width)[:, ::2] for h in (heads, 2, 2)]
    expanded = [randn(1, time, 1, width).expand(2, time, h, width) for h in (heads, 2, 2)]
    one_off = [randn(2 * time * h * width + 1)[1:].view(2, time, h, width) for h in (heads, 2, 2)]
    for tensors in (sliced, heads_first, every_other, expanded, one_off):
        got = with_gradients(ops.segment_attention, tensors, step_ids)
        copies = [x.clone(memory_format=torch.contiguous_format) for x in tensors]
        for x, y in zip(got, with_gradients(ops.segment_attention, copies, step_ids), strict=True):
            assert torch.equal(x, y)
    assert_like_reference(sliced, step_ids[:1].expand(2, time), device=device)


def test_expanded_gradient(device):
    """The gradient of a sum is one number, expanded: all its strides are 0."""
    dtype = device.dtypes[0]
    q, k, v, step_ids = on(device, *device.supported(GQA).qkv(1, 50, dtype), ids_of(10, 40))
    out, lse = ops.segment_attention(q, k, v, step_ids)
    one = torch.ones((), dtype=dtype, device=device)
    arguments = q, k, v, out, lse, step_ids, None, None
    got = torch.ops.statecore.segment_attention_backward(one.expand_as(out), one.expand_as(lse), *arguments)
    dense = torch.ones_like(out), torch.ones_like(lse)
    for x, y in zip(got, torch.ops.statecore.segment_attention_backward(*dense, *arguments), strict=True):
        assert torch.equal(x, y)


# ---- accuracy, determinism, cost


@pytest.mark.parametrize("lengths", [(256, *[256] * 15), (0, 4096), (2000, 96, *[40] * 50)], ids=str)
def test_error_budget_at_4096_tokens(lengths, device):
    heads, time = Heads(q=2, k=1, v=1, key_width=64, value_width=64), device.length(4096)
    *exact, step_ids = on(device, *heads.qkv(1, time), ids_of(*lengths)[:, :time])
    # On the CPU other tests compare float64 with the reference.
    exactly = reference.segment_attention if device.runs_cuda else ops.segment_attention
    wanted = with_gradients(exactly, exact, step_ids)
    got = with_gradients(ops.segment_attention, [x.float() for x in exact], step_ids)
    for x, y, limit in zip(got, wanted, (1e-5, 1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        assert relative_error(x, y) <= limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [(64, *[64] * 9), (0, 640)], ids=str)
def test_16_bit_error_against_eager_float32(dtype, lengths, device):
    *rounded, step_ids = on(device, *device.supported(GQA).qkv(1, 640, dtype), ids_of(*lengths))
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
def test_bits_do_not_depend_on_runs_or_threads(dtype, device):
    if device.runs_cuda and dtype == torch.float64:
        return  # refused: test_refuses_on_cuda
    gqa, mqa = device.supported(GQA), device.supported(MQA)
    long, packed = (900, 700) if device.length(900) == 900 else (300, 200)
    cuts = torch.tensor([0, 10, packed - 100, packed], dtype=torch.int32)
    cases = [
        (mqa.qkv(1, long, dtype), random_step_ids(1, long, prompt=60, longest=200), None),
        (mqa.qkv(1, long, dtype), ids_of(0, long), None),
        (gqa.qkv(3, 130, dtype), random_step_ids(3, 130, padding=9), None),
        (gqa.qkv(1, packed, dtype), ids_of(packed - 100, 100), cuts),
    ]
    for tensors, step_ids, cu_seqlens in cases:
        arguments = on(device, *tensors, step_ids, cu_seqlens)
        results = None
        for way in device.every_way():
            again = with_gradients(ops.segment_attention, arguments[:3], *arguments[3:])
            results = results or again
            for x, y in zip(results, again, strict=True):
                assert torch.equal(x, y), way


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_graph_capture(device):
    """Captured once and replayed with other contents: kernels read on the device where sequences and steps begin."""
    heads, time = Heads(4, 2, 2, 64, 128), 700
    *tensors, step_ids = on(device, *heads.qkv(1, time, torch.bfloat16), ids_of(0, time))
    cu_seqlens, grad_out, grad_lse = on(
        device, int32(0, 0, 0, time), torch.randn(1, time, 4, 128).bfloat16(), torch.randn(1, 4, time)
    )

    def everything():
        out, lse = ops.segment_attention(*tensors, step_ids, cu_seqlens)
        args = (grad_out, grad_lse, *tensors, out, lse, step_ids, cu_seqlens, None)
        return out, lse, *torch.ops.statecore.segment_attention_backward(*args)

    everything()  # loads the kernels before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything()
    cu_seqlens.copy_(int32(0, 1, 300, time))
    step_ids.copy_(torch.cat([random_step_ids(1, n, prompt=50, longest=90) for n in (1, 299, time - 300)], 1))
    wanted = everything()
    for _ in range(20):
        graph.replay()
        for x, y in zip(got, wanted, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("device", ["emulated", "cuda"], indirect=True)
def test_refuses_on_cuda(device):
    def attend(key_width: int, value_width: int, dtype=torch.float32):
        tensors = on(device, *Heads(1, 1, 1, key_width, value_width).qkv(1, 3, dtype), ids_of(3))
        ops.segment_attention(*tensors)

    attend(16, 128)
    with pytest.raises(RuntimeError, match="q must be float32, bfloat16 or float16 on CUDA, got float64"):
        attend(16, 16, torch.float64)
    with pytest.raises(RuntimeError, match=r"q and k must have a width that is a multiple of 16 up to 128 .*, got 24"):
        attend(24, 16)
    with pytest.raises(RuntimeError, match="v must have a width that is a multiple of 16 up to 128 on CUDA, got 144"):
        attend(16, 144)


def test_keys_of_other_steps_are_never_touched(device):
    """Poison one step with NaN: any product with its keys would spread it, even with probability 0."""
    length = 1024 if device.length(6144) == 6144 else 128
    heads = device.supported(Heads(q=1, k=1, v=1, key_width=4, value_width=4))
    *tensors, step_ids = on(device, *heads.qkv(1, 6 * length, device.dtypes[0]), ids_of(length, *[length] * 5))
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


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_products_grow_with_the_visible_area(device):
    """Twice as many steps take twice the work; a step twice as long takes four times the work."""

    def products(*lengths: int) -> int:
        tensors = Heads(1, 1, 1, 16, 16).qkv(1, sum(lengths), torch.bfloat16)
        emulator(device.name).take_work()
        with_gradients(ops.segment_attention, tensors, ids_of(0, *lengths))
        return emulator(device.name).take_work()[1]

    assert products(*[256] * 4) <= 2.1 * products(*[256] * 2)
    assert products(1024) >= 3 * products(512)


def test_memory_grows_with_tokens_only():
    time = 1 << 16  # a mask of [T, T] booleans would take 4 GiB
    q, k, v = (torch.randn(1, time, 1, 8) for _ in range(3))
    step_ids = (torch.arange(time, dtype=torch.int32) // 100)[None]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with_gradients(ops.segment_attention, (q, k, v), step_ids)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


# ---- refusals


def inputs(**changes):
    """Arguments of a valid call, some of them replaced by `changes`."""
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


def test_step_ids_may_restart_in_each_packed_sequence():
    ops.segment_attention(**inputs(step_ids=torch.cat([ids_of(2, 4)] * 2, 1), cu_seqlens=int32(0, 6, 6, 12)))


def test_backward_refuses_invalid_arguments():
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
