"""mixed_attention against its definition and against the two operators that it combines."""

import random
from itertools import pairwise

import pytest
import torch
from cases import VALUE, Heads, random_step_ids, relative_error
from devices import CPU, Device, on
from linear_oracles import assert_like_reference, leaf, run, scattered

from statecore import ops, reference

ALPHA = torch.tensor([0.0, 0.0, 0.1, 0.5, 0.0, 1.0, 0.3])
ALPHA_INDEX = 8  # among the positional arguments


def mixed_inputs(heads: Heads, batch: int, queries: int, keys: int, lin_kv_heads: int, lin_width: int, dtype):
    """q, k, v, lin_q, lin_k, lin_v, gate."""
    linear = Heads(heads.q, lin_kv_heads, lin_kv_heads, lin_width, heads.value_width)
    gate = torch.randn(batch, queries, heads.q, heads.value_width, dtype=torch.float64).to(dtype) * 2
    return [*heads.qkv(batch, queries, dtype, keys=keys), *linear.qkv(batch, queries, dtype), gate]


def random_case(seed: int, dtype: torch.dtype, device: Device = CPU):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    heads = Heads(
        *draw.choice([(1, 1, 1), (4, 2, 2), (6, 1, 1), (4, 4, 4)]), draw.choice([1, 8, 17]), draw.choice([3, 16])
    )
    device.vary(draw)
    heads = device.supported(heads)
    packed = draw.random() < 0.4
    batch, queries = 1 if packed else draw.choice([1, 2]), draw.choice([1, 15, 65, 100])
    keys = queries if packed else queries + draw.choice([0, 0, 1, 40])
    lin_kv_heads, lin_width = draw.choice([heads.q, heads.k]), draw.choice([16, 32] if device.runs_cuda else [4, 16])
    tensors = on(device, *mixed_inputs(heads, batch, queries, keys, lin_kv_heads, lin_width, dtype))
    if draw.random() < 0.5:
        tensors = [scattered(x, aligned=seed % 2 == 0) for x in tensors]
    cuts = sorted(draw.choices(range(queries + 1), k=2)) if packed else []
    lengths = [b - a for a, b in pairwise([0, *cuts, queries])] if packed else [keys]
    style = {"prompt": draw.choice([0, 5]), "longest": draw.choice([3, 30]), "padding": draw.choice([0, 2])}
    ids = torch.cat([random_step_ids(batch, length, **style) for length in lengths], 1)
    cu_seqlens = torch.tensor([0, *cuts, queries], dtype=torch.int32) if packed else None
    states = None
    if draw.random() < 0.6:
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (3, len(lengths) if packed else batch, tensors[5].shape[2], tensors[3].shape[3], heads.value_width)
        states = torch.randn(shape, dtype=state_dtype)
    return (*tensors, *on(device, ids, ALPHA, states, None, cu_seqlens))


@pytest.mark.parametrize("seed", range(20))
def test_float64_equals_reference(seed):
    args = random_case(seed, torch.float64)
    assert_like_reference(
        ops.mixed_attention, reference.mixed_attention, args, constants=[ALPHA_INDEX], scale=0.4, lin_scale=0.3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(20, 30))
def test_equals_reference(seed, dtype, device):
    args = random_case(seed, dtype, device)
    assert_like_reference(ops.mixed_attention, reference.mixed_attention, args, constants=[ALPHA_INDEX])


@pytest.mark.parametrize("device", ["checked"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_accesses_are_valid(dtype, device):
    tensors = mixed_inputs(Heads(2, 1, 1, 32, 48), 1, 80, 80, 1, 16, dtype)
    ids, cu_seqlens = random_step_ids(1, 80, longest=30), torch.tensor([0, 0, 80], dtype=torch.int32)
    args = (*tensors, ids, ALPHA, torch.randn(3, 2, 1, 16, 48), None, cu_seqlens)
    assert_like_reference(ops.mixed_attention, reference.mixed_attention, args, constants=[ALPHA_INDEX])


def test_gradcheck():
    tensors = [leaf(x) for x in mixed_inputs(Heads(2, 1, 1, 2, 2), 1, 5, 5, 2, 3, torch.float64)]
    ids = torch.tensor([[-1, 0, 1, 2, 3]], dtype=torch.int32)
    states = leaf(torch.randn(3, 1, 2, 3, 2, dtype=torch.float64))
    assert torch.autograd.gradcheck(ops.mixed_attention, (*tensors, ids, ALPHA, states))


def combined(q, k, v, lin_q, lin_k, lin_v, gate, ids, alpha, states=None, step=None, cu_seqlens=None, **scales):
    segment, _ = ops.segment_attention(q, k, v, ids, cu_seqlens, scale=scales.get("scale"))
    own_ids = ids[:, ids.shape[1] - q.shape[1] :]
    lin_args = lin_q, lin_k, lin_v, own_ids, alpha, states, step, cu_seqlens
    linear, states = ops.step_linear_attention(*lin_args, scale=scales.get("lin_scale"))
    return segment + gate.sigmoid() * linear, states


def test_combines_the_two_operators(device):
    args = random_case(1, torch.float32, device)
    args = [x if i == ALPHA_INDEX else leaf(x) for i, x in enumerate(args)]
    got, grads, cotangents = run(ops.mixed_attention, args, {"lin_scale": 0.2})
    wanted, wanted_grads, _ = run(combined, args, {"lin_scale": 0.2}, cotangents)
    assert torch.equal(got[1], wanted[1])
    for x, y in zip(got + grads, wanted + wanted_grads, strict=True):
        assert relative_error(x, y) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_step_with_a_closed_gate_is_causal_attention(dtype, device):
    """T5."""
    if device.runs_cuda and dtype == torch.float64:
        return  # refused
    tensors = mixed_inputs(device.supported(Heads(4, 2, 2, 8, 12)), 2, 70, 70, 2, 16, dtype)
    tensors[6] = torch.full_like(tensors[6], -1000.0)
    *tensors, ids, alpha = on(device, *tensors, torch.ones(2, 70, dtype=torch.int32), ALPHA)
    out, _ = ops.mixed_attention(*tensors, ids, alpha)
    q, k, v = (x.double().transpose(1, 2) for x in tensors[:3])
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert relative_error(out, wanted.transpose(1, 2)) < VALUE[dtype]


@pytest.mark.parametrize("cut", [1, 20, 64, 79])
def test_chunked_prefill_is_one_call(cut, device):
    """The second call gets all keys and ids so far, and the states of the first."""
    dtype = device.dtypes[0]
    tensors = mixed_inputs(device.supported(Heads(4, 2, 2, 8, 12)), 2, 80, 80, 2, 16, dtype)
    *tensors, ids, alpha = on(device, *tensors, random_step_ids(2, 80, longest=20), ALPHA)
    q, k, v, *linear = tensors
    out, states = ops.mixed_attention(*tensors, ids, alpha)
    first = [x[:, :cut] for x in tensors]
    second = [q[:, cut:], k, v, *(x[:, cut:] for x in linear)]
    first_out, carried = ops.mixed_attention(*first, ids[:, :cut], alpha)
    rest_out, carried = ops.mixed_attention(*second, ids, alpha, carried, ids[:, cut - 1].contiguous())
    assert relative_error(torch.cat([first_out, rest_out], 1), out) < VALUE[dtype]
    assert relative_error(carried, states) < VALUE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_at_most_that_of_eager(dtype, device):
    """Eager: the same formula in float32, with every operator's result rounded."""
    tensors = mixed_inputs(Heads(4, 2, 2, 32, 32), 1, 200, 200, 2, 32, dtype)
    *tensors, ids, alpha = on(device, *tensors, random_step_ids(1, 200, prompt=20, longest=60), ALPHA)

    def eager(q, k, v, lin_q, lin_k, lin_v, gate, ids, alpha):
        segment, _ = reference.segment_attention(q.float(), k.float(), v.float(), ids)
        linear, _ = reference.step_linear_attention(lin_q.float(), lin_k.float(), lin_v.float(), ids, alpha)
        return ((segment.to(dtype) + gate.sigmoid() * linear.to(dtype)),)

    doubles = [leaf(x, torch.float64) for x in tensors]
    (exact, _), exact_grads, cotangents = run(reference.mixed_attention, (*doubles, ids, alpha), {})
    (rough,), rough_grads, _ = run(eager, (*map(leaf, tensors), ids, alpha), {}, cotangents[:1])
    (got, _), grads, _ = run(
        ops.mixed_attention,
        (*map(leaf, tensors), ids, alpha),
        {},
        [cotangents[0], torch.zeros(3, 1, 2, 32, 32, device=device)],
    )
    _, exact_grads, _ = run(
        lambda *args: reference.mixed_attention(*args)[:1], (*doubles, ids, alpha), {}, cotangents[:1]
    )
    for x, y, z in zip([got, *grads], [rough, *rough_grads], [exact, *exact_grads], strict=True):
        assert relative_error(x, z) <= 1.5 * relative_error(y, z)


def test_bits_do_not_depend_on_threads_runs_or_strides(device):
    heads = Heads(2, 1, 1, 32, 48) if device.runs_cuda else Heads(4, 2, 2, 24, 40)
    tensors = mixed_inputs(heads, 2, 150, 150, heads.k, heads.key_width, torch.float32)
    *tensors, ids, alpha = on(device, *tensors, random_step_ids(2, 150, longest=40), ALPHA)
    wanted = None
    for run_number, _ in enumerate(device.every_way()):
        # Not the gate: torch's sigmoid, which computes its gradient, has other bits for other strides.
        inputs = [leaf(scattered(x)) if run_number % 2 and i < 6 else leaf(x) for i, x in enumerate(tensors)]
        got = run(ops.mixed_attention, (*inputs, ids, alpha), {}, wanted and wanted[2])
        wanted = wanted or got
        for x, y in zip(got[0] + got[1], wanted[0] + wanted[1], strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_graph_capture(device):
    """Captured once and replayed with other contents: kernels read on the device where sequences and steps begin."""
    tensors = mixed_inputs(Heads(4, 2, 2, 64, 128), 1, 300, 300, 2, 64, torch.bfloat16)
    ids, states = torch.zeros(1, 300, dtype=torch.int32), torch.randn(3, 3, 2, 64, 128)
    cu_seqlens = torch.tensor([0, 0, 0, 300], dtype=torch.int32)
    *tensors, ids, alpha, states, cu_seqlens = on(device, *tensors, ids, ALPHA, states, cu_seqlens)
    ops.mixed_attention(*tensors, ids, alpha, states, None, cu_seqlens)  # loads the kernels before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.mixed_attention(*tensors, ids, alpha, states, None, cu_seqlens)
    cu_seqlens.copy_(torch.tensor([0, 1, 130, 300], dtype=torch.int32))
    ids.copy_(torch.cat([random_step_ids(1, n, longest=40) for n in (1, 129, 170)], 1))
    wanted = ops.mixed_attention(*tensors, ids, alpha, states, None, cu_seqlens)
    for _ in range(20):
        graph.replay()
        for x, y in zip(got, wanted, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(("batch", "time"), [(0, 5), (2, 0)])
def test_empty_inputs(batch, time, device):
    heads = device.supported(Heads(4, 2, 2, 8, 12))
    tensors = [leaf(x) for x in on(device, *mixed_inputs(heads, batch, time, time, 2, 16, torch.float32))]
    ids, alpha = on(device, torch.zeros(batch, time, dtype=torch.int32), ALPHA)
    (out, states), grads, _ = run(ops.mixed_attention, (*tensors, ids, alpha), {})
    assert out.shape == (batch, time, 4, heads.value_width)
    assert states.shape == (3, batch, 2, 16, heads.value_width)
    assert [g.shape for g in grads] == [x.shape for x in tensors]


def refused(match: str, **changes):
    names = "q", "k", "v", "lin_q", "lin_k", "lin_v", "gate"
    tensors = mixed_inputs(Heads(4, 2, 2, 8, 12), 2, 6, 9, 2, 16, torch.float32)
    args = {**dict(zip(names, tensors, strict=True)), "step_ids": torch.zeros(2, 9, dtype=torch.int32), "alpha": ALPHA}
    with pytest.raises(RuntimeError, match=match):
        ops.mixed_attention(**{**args, **changes})


def test_refuses_invalid_arguments():
    x = torch.randn
    refused(r"k must have at least as many tokens as q, got 5 for 6", k=x(2, 5, 2, 8), v=x(2, 5, 2, 12))
    refused(r"step_ids must have shape \(2, 9\), got \(2, 6\)", step_ids=torch.zeros(2, 6, dtype=torch.int32))
    refused(r"lin_q must have 4 dimensions", lin_q=x(2, 6, 16))
    refused(r"lin_q must have shape \(2, 6, 4, 16\), got \(2, 9, 4, 16\)", lin_q=x(2, 9, 4, 16))
    refused(r"lin_q must have shape \(2, 6, 4, 16\), got \(2, 6, 2, 16\)", lin_q=x(2, 6, 2, 16))
    refused(r"lin_q must be float32, got bfloat16", lin_q=x(2, 6, 4, 16).bfloat16())
    refused(r"lin_k must have shape \(2, 6, 2, 16\), got \(2, 6, 2, 8\)", lin_k=x(2, 6, 2, 8))
    refused(r"heads must be grouped as GQA \(lin_k and lin_v .*got lin_q 4, lin_k 3, lin_v 3",
            lin_k=x(2, 6, 3, 16), lin_v=x(2, 6, 3, 12))  # fmt: skip
    refused(r"lin_v must have shape \(2, 6, 2, 12\), got \(2, 6, 2, 8\)", lin_v=x(2, 6, 2, 8))
    refused(r"lin_v must be float32, got float64", lin_v=x(2, 6, 2, 12).double())
    refused(r"gate must have shape \(2, 6, 4, 12\), got \(2, 6, 2, 12\)", gate=x(2, 6, 2, 12))
    refused(r"gate must be float32, got float16", gate=x(2, 6, 4, 12).half())
    refused(r"gate must have stride 1 in its last dimension", gate=x(2, 6, 12, 4).transpose(2, 3))
    refused(r"alpha must be float32, got int64", alpha=torch.zeros(3, dtype=torch.int64))
    refused(r"initial_states must have shape \(3, 2, 2, 16, 12\)", initial_states=x(3, 2, 4, 16, 12))
    refused(r"initial_step must be int32", initial_step=torch.zeros(2))
    refused(r"cu_seqlens", cu_seqlens=torch.tensor([0, 6], dtype=torch.int32))
