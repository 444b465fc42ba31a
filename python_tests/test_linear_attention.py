"""linear_attention against its definition, its equivalent forms, and itself split into several calls."""

import random
from itertools import pairwise

import pytest
import torch
from cases import EXACT, GRADIENT, VALUE, Heads, relative_error
from devices import CPU, Device, emulator, on
from linear_oracles import assert_like_reference, leaf, masked_linear_attention, run, scattered

from statecore import ops, reference

GROUPINGS = [(1, 1, 1), (3, 3, 3), (4, 2, 2), (6, 1, 1), (2, 2, 6), (1, 1, 9), (3, 3, 6)]
WIDTHS, CUDA_WIDTHS = [1, 3, 8, 16, 17, 31, 40], [16, 32, 48, 64, 80, 112, 128]
TIMES, CUDA_TIMES = [1, 2, 15, 31, 32, 33, 64, 129], [1, 2, 15, 63, 64, 65, 129, 200, 300, 530]


def random_case(seed: int, dtype: torch.dtype, device: Device = CPU):
    """Arguments and scale of a random call: odd sizes, GQA or GVA, decay, initial state, packing, strides."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    device.vary(draw)
    widths, times = (CUDA_WIDTHS, CUDA_TIMES) if device.runs_cuda else (WIDTHS, TIMES)
    heads = Heads(*draw.choice(GROUPINGS), draw.choice(widths), draw.choice(widths))
    packed = draw.random() < 0.4
    batch, time = 1 if packed else draw.choice([1, 2, 3]), draw.choice(times)
    batch = min(batch, device.length(512) // time + 1)
    tensors = on(device, *heads.qkv(batch, time, dtype))
    if draw.random() < 0.5:
        tensors = [scattered(x, aligned=seed % 2 == 0) for x in tensors]
    cu_seqlens = None
    if packed:
        cuts = sorted(draw.choices(range(time + 1), k=3))
        cu_seqlens = torch.tensor([0, *cuts, time], dtype=torch.int32)
    sequences = len(cu_seqlens) - 1 if packed else batch
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    log_decay = state = None
    if draw.random() < 0.7:
        strength = draw.choice([0.01, 0.3, 8.0])
        log_decay = (-torch.rand(batch, time, heads.v, dtype=torch.float64) * strength).to(state_dtype)
    if draw.random() < 0.7:
        state = torch.randn(sequences, heads.v, heads.key_width, heads.value_width, dtype=state_dtype)
    return (*tensors, *on(device, log_decay, state, cu_seqlens)), draw.choice([None, 0.7])


@pytest.mark.parametrize("seed", range(24))
def test_float64_equals_reference(seed):
    args, scale = random_case(seed, torch.float64)
    assert_like_reference(ops.linear_attention, reference.linear_attention, args, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(24, 36))
def test_equals_reference(seed, dtype, device):
    args, scale = random_case(seed, dtype, device)
    assert_like_reference(ops.linear_attention, reference.linear_attention, args, scale=scale)


@pytest.mark.parametrize("device", ["checked"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [Heads(2, 1, 1, 16, 32), Heads(1, 1, 2, 48, 16), Heads(1, 1, 1, 128, 128)], ids=str)
def test_memory_accesses_are_valid(heads, dtype, device):
    """Packed sequences over one tile and part of the next, all optional arguments, on a small and on a large GPU."""
    tensors = [leaf(x) for x in heads.qkv(1, 90, dtype)]
    decay, state = leaf(-torch.rand(1, 90, heads.v)), leaf(torch.randn(3, heads.v, heads.key_width, heads.value_width))
    args = (*tensors, decay, state, torch.tensor([0, 13, 13, 90], dtype=torch.int32))
    for seed in range(2):
        device.vary(random.Random(seed))
        assert_like_reference(ops.linear_attention, reference.linear_attention, args)


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_few_sequences_are_split_across_multiprocessors(device):
    """Two heads of one sequence fill a GPU with one multiprocessor; a large GPU splits them."""
    args = (*Heads(2, 2, 2, 32, 32).qkv(1, 300, torch.float32), -torch.rand(1, 300, 2), torch.randn(1, 2, 32, 32))
    launches = []
    for multiprocessors in (1, 132):
        emulator(device.name).gpu(multiprocessors=multiprocessors)
        assert_like_reference(ops.linear_attention, reference.linear_attention, args)
        launches.append(emulator(device.name).take_work()[0])
    assert "scan_splits" not in launches[0]
    assert "scan_splits" in launches[1]


@pytest.mark.parametrize("heads", [Heads(2, 1, 1, 2, 3), Heads(1, 1, 2, 3, 2)], ids=["gqa", "gva"])
def test_gradcheck(heads):
    tensors = heads.qkv(1, 5, requires_grad=True)
    decay = leaf(-torch.rand(1, 5, heads.v, dtype=torch.float64) - 0.1)
    state = leaf(torch.randn(1, heads.v, heads.key_width, heads.value_width, dtype=torch.float64))
    assert torch.autograd.gradcheck(ops.linear_attention, (*tensors, decay, state))


def test_float32_decay_and_state_beside_float64():
    heads = Heads(1, 1, 2, 4, 4)
    decay, state = leaf(-torch.rand(2, 9, 2)), leaf(torch.randn(2, 2, 4, 4))
    args = (*heads.qkv(2, 9), decay, state)
    (out, final), grads, _ = run(ops.linear_attention, args, {})
    assert out.dtype == final.dtype == torch.float64
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]
    assert relative_error(out, reference.linear_attention(*args)[0].detach()) < EXACT


# ---- splitting and packing


@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 50, 64, 100, None])
def test_two_calls_equal_one_call(cut, decays, device):
    dtype, heads = device.dtypes[0], device.supported(Heads(4, 2, 2, 8, 20))
    batch, time = (1, 300) if device.runs_cuda else (2, 129)  # long enough for splits on CUDA
    cut = time if cut is None else cut
    tensors = [leaf(x) for x in on(device, *heads.qkv(batch, time, dtype))]
    decay = leaf(-torch.rand(batch, time, 2, dtype=dtype).to(device)) if decays else None
    state = leaf(torch.randn(batch, 2, heads.key_width, heads.value_width, dtype=dtype).to(device))

    def in_two(q, k, v, decay, state):
        first, second = (
            [None if x is None else x[:, part] for x in (q, k, v, decay)] for part in (slice(cut), slice(cut, None))
        )
        out, state = ops.linear_attention(*first, state)
        rest, state = ops.linear_attention(*second, state)
        return torch.cat([out, rest], 1), state

    args = (*tensors, decay, state)
    whole, whole_grads, cotangents = run(ops.linear_attention, args, {})
    parts, parts_grads, _ = run(in_two, args, {}, cotangents)
    for x, y in zip(whole + whole_grads, parts + parts_grads, strict=True):
        assert relative_error(x, y) < GRADIENT[dtype]


def test_packed_equals_one_by_one(device):
    """Bit for bit on the CPU. On CUDA, how the work is split depends on its amount."""
    heads = device.supported(Heads(4, 2, 2, 8, 20))
    lengths = [5, 0, 64, 1, 270 if device.runs_cuda else 70]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    decay, state = -torch.rand(1, sum(lengths), 2), torch.randn(len(lengths), 2, heads.key_width, heads.value_width)
    args = (*heads.qkv(1, sum(lengths), torch.float32), decay, state, cu_seqlens)
    args = [leaf(x) for x in on(device, *args)]

    def one_by_one(q, k, v, decay, state, cu_seqlens):
        outs, states = [], []
        for n, (a, b) in enumerate(pairwise(cu_seqlens)):
            out, final = ops.linear_attention(*(x[:, a:b] for x in (q, k, v, decay)), state[n : n + 1])
            outs.append(out)
            states.append(final)
        return torch.cat(outs, 1), torch.cat(states)

    packed, packed_grads, cotangents = run(ops.linear_attention, args, {})
    single, single_grads, _ = run(one_by_one, args, {}, cotangents)
    for x, y in zip(packed + packed_grads, single + single_grads, strict=True):
        assert relative_error(x, y) < VALUE[torch.float32] if device.runs_cuda else torch.equal(x, y)


@pytest.mark.parametrize(("batch", "time"), [(0, 5), (2, 0), (0, 0)])
def test_empty_inputs(batch, time, device):
    heads = device.supported(Heads(4, 2, 2, 8, 20))
    tensors = [leaf(x) for x in on(device, *heads.qkv(batch, time, torch.float32))]
    state = leaf(torch.randn(batch, 2, heads.key_width, heads.value_width).to(device))
    (out, final), grads, (_, grad_final) = run(ops.linear_attention, (*tensors, None, state), {})
    assert out.shape == (batch, time, 4, heads.value_width)
    assert torch.equal(final, state)
    assert torch.equal(grads[3], grad_final)


def test_no_sequences(device):
    tensors = on(device, *Heads(1, 1, 1, 16, 16).qkv(1, 0, torch.float32))
    out, final = ops.linear_attention(*tensors, cu_seqlens=torch.zeros(1, dtype=torch.int32, device=device))
    assert out.shape == (1, 0, 1, 16)
    assert final.shape == (0, 1, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads_runs_or_strides(dtype, device):
    heads, batch, time = Heads(4, 4, 12, 24, 40), 2, 150
    if device.runs_cuda:
        heads, batch, time = Heads(1, 1, 2, 32, 48), 1, 300
    args = (*heads.qkv(batch, time, dtype), -torch.rand(batch, time, heads.v))
    *tensors, decay = on(device, *args)
    state = torch.randn(batch, heads.v, heads.key_width, heads.value_width).to(device)
    wanted = None
    for i, _ in enumerate(device.every_way()):
        layout = (lambda x: x, scattered, lambda x: scattered(x, aligned=True))[i % 3]
        args = [*(leaf(layout(x)) for x in tensors), leaf(decay), leaf(state)]
        got = run(ops.linear_attention, args, {}, wanted and wanted[2])
        wanted = wanted or got
        for x, y in zip(got[0] + got[1], wanted[0] + wanted[1], strict=True):
            assert torch.equal(x, y)


def test_expanded_gradient(device):
    """The gradient of a sum is one number, expanded: all its strides are 0."""
    heads = device.supported(Heads(4, 2, 2, 8, 20))
    args = on(device, *heads.qkv(1, 70, torch.float32), None, None, None, None)
    out, state = ops.linear_attention(*args[:3])
    one = torch.ones((), device=device)
    backward = torch.ops.statecore.linear_attention_backward
    got = backward(one.expand_as(out), one.expand_as(state), *args)
    for x, y in zip(got, backward(torch.ones_like(out), torch.ones_like(state), *args), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("device", ["emulated", "cuda"], indirect=True)
def test_refuses_on_cuda(device):
    def attend(key_width: int, value_width: int, dtype=torch.float32):
        ops.linear_attention(*on(device, *Heads(1, 1, 1, key_width, value_width).qkv(1, 3, dtype)))

    attend(16, 128)
    with pytest.raises(RuntimeError, match="q must be float32, bfloat16 or float16 on CUDA, got float64"):
        attend(16, 16, torch.float64)
    with pytest.raises(RuntimeError, match=r"q and k must have a width that is a multiple of 16 up to 128 .*, got 24"):
        attend(24, 16)
    with pytest.raises(RuntimeError, match="v must have a width that is a multiple of 16 up to 128 on CUDA, got 144"):
        attend(16, 144)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_graph_capture(device):
    """Captured once and replayed with other contents: kernels read on the device where sequences begin."""
    heads = Heads(4, 2, 2, 64, 128)
    tensors = on(device, *heads.qkv(1, 300, torch.bfloat16))
    state, cu_seqlens = on(device, torch.randn(4, 2, 64, 128), torch.tensor([0, 0, 0, 0, 300], dtype=torch.int32))
    cotangents = on(device, torch.randn(1, 300, 4, 128).bfloat16(), torch.randn(4, 2, 64, 128))

    def everything():
        results = ops.linear_attention(*tensors, None, state, cu_seqlens)
        args = (*cotangents, *tensors, None, state, cu_seqlens, None)
        return *results, *torch.ops.statecore.linear_attention_backward(*args)

    everything()  # loads the kernels before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything()
    cu_seqlens.copy_(torch.tensor([0, 1, 130, 130, 300], dtype=torch.int32))
    tensors[0].copy_(torch.randn_like(tensors[0]))
    wanted = everything()
    for _ in range(20):
        graph.replay()
        for x, y in zip(got, wanted, strict=True):
            assert torch.equal(x, y)


# ---- identities


def test_recurrence_is_a_masked_product():
    """T1, and T7 with decay: the chunked form, the recurrence and one [T, T] matrix are the same."""
    for heads in (Heads(4, 2, 2, 8, 12), Heads(2, 2, 4, 8, 12)):
        for decays in (False, True):
            tensors = heads.qkv(2, 100)
            decay = -torch.rand(2, 100, heads.v, dtype=torch.float64) if decays else None
            state = torch.randn(2, heads.v, 8, 12, dtype=torch.float64)
            got = ops.linear_attention(*tensors, decay, state)
            masked = masked_linear_attention(*tensors, decay, state)
            token_by_token = reference.linear_attention(*tensors, decay, state)
            for x, y, z in zip(got, masked, token_by_token, strict=True):
                assert relative_error(x, y) < 1e-13
                assert relative_error(x, z) < 1e-13


def test_zero_decay_is_no_decay(device):
    """T8."""
    tensors = on(device, *Heads(4, 2, 2, 16, 16).qkv(2, 100, torch.float32))
    decayed = ops.linear_attention(*tensors, torch.zeros(2, 100, 2, device=device))
    for x, y in zip(decayed, ops.linear_attention(*tensors), strict=True):
        assert relative_error(x, y) < 1e-6 if device.runs_cuda else torch.equal(x, y)


def test_rank_of_the_state():
    """T10: k^T v has rank 1, t random updates have rank min(t, D)."""
    heads = Heads(1, 1, 1, 8, 8)
    for time in (1, 3, 8, 20):
        _, state = ops.linear_attention(*heads.qkv(1, time))
        assert torch.linalg.matrix_rank(state[0, 0]) == min(time, 8)


def test_decay_of_minus_infinity_forgets_everything(device):
    heads = device.supported(Heads(2, 1, 1, 4, 20))
    q, k, v, decay = on(device, *heads.qkv(1, 40, torch.float32), -torch.rand(1, 40, 1))
    decay[0, 17] = float("-inf")
    out, state = ops.linear_attention(q, k, v, decay, torch.randn(1, 1, heads.key_width, heads.value_width).to(device))
    rest, rest_state = ops.linear_attention(q[:, 17:], k[:, 17:], v[:, 17:], decay[:, 17:])
    assert relative_error(out[:, 17:], rest) < 1e-6
    assert relative_error(state, rest_state) < 1e-6


# ---- accuracy at length


@pytest.mark.parametrize("strength", [None, 0.002, 0.1, 6.0])
@pytest.mark.parametrize("time", [1024, 4096])
def test_float32_error_at_length(time, strength, device):
    heads = Heads(2, 1, 1, 64, 64) if time == 1024 else Heads(1, 1, 1, 64, 32)
    time = device.length(time)
    tensors = heads.qkv(1, time, torch.float32)
    decay = None if strength is None else -torch.rand(1, time, 1) * strength
    state = torch.randn(1, 1, 64, heads.value_width)
    args = on(device, *tensors, decay, state)
    assert_like_reference(ops.linear_attention, masked_linear_attention, args)


def test_decay_has_a_gradient_per_value_head(device):
    """Value heads of a group share q and k, but not the gradients of their decays, strong or weak."""
    heads = Heads(1, 1, 4, 32, 32)
    tensors = on(device, *heads.qkv(1, 600, torch.float32))
    decay = leaf((-torch.rand(1, 600, 4) * torch.tensor([0.001, 0.1, 2.0, 10.0])).to(device))
    exact = leaf(decay, torch.float64)
    _, (grad,), cotangents = run(ops.linear_attention, (*tensors, decay), {})
    _, (wanted,), _ = run(masked_linear_attention, (*(x.double() for x in tensors), exact), {}, cotangents)
    for head in range(4):
        assert relative_error(grad[..., head], wanted[..., head]) < 1e-4, head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [None, 0.01, 1.0])
def test_half_precision_error_is_that_of_rounding(dtype, strength, device):
    """At most 1.5 times the error of exact arithmetic on the same rounded inputs, rounded once at the end.

    float32 results have a larger budget on CUDA, where kernels may round intermediate results to 16 bits.
    """
    heads, time = Heads(4, 2, 2, 64, 64), device.length(2048)
    tensors = heads.qkv(1, time, dtype)
    decay, state = None if strength is None else -torch.rand(1, time, 2) * strength, torch.randn(1, 2, 64, 64)
    args = [None if x is None else leaf(x) for x in on(device, *tensors, decay, state)]
    results, grads, cotangents = run(ops.linear_attention, args, {})
    doubles = [None if x is None else leaf(x, torch.float64) for x in args]
    wanted, wanted_grads, _ = run(masked_linear_attention, doubles, {}, cotangents)
    for got, exact in zip(results + grads, wanted + wanted_grads, strict=True):
        eager = relative_error(exact.float().to(got.dtype), exact)
        floor = 1e-3 if device.runs_cuda and got.dtype == torch.float32 else 1e-5
        assert relative_error(got, exact) <= 1.5 * max(eager, floor)


@pytest.mark.parametrize("key_heads", [1, 16])
def test_state_error_after_32768_tokens(key_heads, device):
    """With few heads the state is summed over splits, with many in one sweep."""
    heads = Heads(key_heads, key_heads, key_heads, 64, 64)
    q, k, v = on(device, *heads.qkv(1, device.length(32768), torch.bfloat16))
    _, state = ops.linear_attention(q, k, v)
    k, v, state = k[:, :, :1], v[:, :, :1], state[:, :1]
    wanted = torch.einsum("btd,bte->bde", k[:, :, 0].double(), v[:, :, 0].double())[:, None]
    assert relative_error(state, wanted) < 1e-3


# ---- refusals


def refused(match: str, **changes):
    heads = Heads(4, 2, 2, 8, 12)
    q, k, v = heads.qkv(2, 6, torch.float32)
    args = {"q": q, "k": k, "v": v, **changes}
    with pytest.raises(RuntimeError, match=match):
        ops.linear_attention(**args)


def test_refuses_invalid_arguments():
    x = torch.randn
    integers = torch.zeros(2, 6, 4, 8, dtype=torch.int32)
    refused(r"q must be float32, bfloat16, float16 or float64, got int32", q=integers)
    refused(r"q must have 4 dimensions \[B, T, Hq, Dk\], got shape \(2, 6, 8\)", q=x(2, 6, 8))
    refused(r"k must have 4 dimensions", k=x(2, 6, 8))
    refused(r"v must have 4 dimensions", v=x(2, 6, 8))
    refused(r"k must have shape \(2, 6, 2, 8\), got \(2, 5, 2, 8\)", k=x(2, 5, 2, 8))
    refused(r"k must have shape \(2, 6, 2, 8\), got \(2, 6, 2, 9\)", k=x(2, 6, 2, 9))
    refused(r"v must have shape \(2, 6, 2, 12\), got \(1, 6, 2, 12\)", v=x(1, 6, 2, 12))
    refused(r"heads must be grouped as GQA .* or GVA .*, got q 4, k 3, v 3", k=x(2, 6, 3, 8), v=x(2, 6, 3, 12))
    refused(r"heads must be grouped .*, got q 4, k 2, v 4", v=x(2, 6, 4, 12))
    refused(r"heads must be grouped .*, got q 4, k 0, v 0", k=x(2, 6, 0, 8), v=x(2, 6, 0, 12))
    refused(r"q and k must have a width of at least 1", q=x(2, 6, 4, 0), k=x(2, 6, 2, 0))
    refused(r"v must have a width of at least 1", v=x(2, 6, 2, 0))
    refused(r"k must be float32, got float64", k=x(2, 6, 2, 8, dtype=torch.float64))
    refused(r"v must be float32, got bfloat16", v=x(2, 6, 2, 12).bfloat16())
    refused(r"q must have stride 1 in its last dimension, got stride 4", q=x(2, 6, 8, 4).transpose(2, 3))
    refused(r"v must have stride 1 in its last dimension", v=x(2, 6, 12, 2).transpose(2, 3))
    refused(r"log_decay must have shape \(2, 6, 2\), got \(2, 6, 4\)", log_decay=x(2, 6, 4))
    refused(r"log_decay must be float32, got bfloat16", log_decay=x(2, 6, 2).bfloat16())
    refused(r"log_decay must be float32, got float64", log_decay=x(2, 6, 2).double())
    refused(r"initial_state must have shape \(2, 2, 8, 12\), got \(1, 2, 8, 12\)", initial_state=x(1, 2, 8, 12))
    refused(r"initial_state must be float32, got float16", initial_state=x(2, 2, 8, 12).half())


def test_refuses_bad_packing():
    heads = Heads(4, 2, 2, 8, 12)
    q, k, v = heads.qkv(1, 6, torch.float32)
    lengths = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    one = {"q": q, "k": k, "v": v}
    refused(r"cu_seqlens needs q of batch size 1, got 2", cu_seqlens=lengths(0, 6))
    refused(r"cu_seqlens must have 1 dimension", cu_seqlens=lengths(0, 6)[None], **one)
    refused(r"cu_seqlens must be int32, got int64", cu_seqlens=lengths(0, 6).long(), **one)
    refused(r"cu_seqlens must start with 0, got 1", cu_seqlens=lengths(1, 6), **one)
    refused(r"cu_seqlens must not decrease, got 4 then 3 at position 2", cu_seqlens=lengths(0, 4, 3, 6), **one)
    refused(r"cu_seqlens must end with the number of tokens, 6, got 5", cu_seqlens=lengths(0, 5), **one)
