"""step_linear_attention against its definition, its weighted mask, and itself split into several calls."""

import random
from itertools import pairwise

import pytest
import torch
from cases import GRADIENT, VALUE, Heads, random_step_ids, relative_error
from devices import CPU, Device, on
from linear_oracles import (
    assert_like_reference,
    leaf,
    masked_step_linear_attention,
    run,
    same_heads,
    scattered,
    step_weights,
)
from torch import Tensor

from statecore import ops, reference

GROUPINGS = [(1, 1, 1), (3, 3, 3), (4, 2, 2), (6, 1, 1)]
WIDTHS, CUDA_WIDTHS = [1, 3, 8, 16, 17, 31, 40], [16, 32, 48, 64, 80, 112, 128]
TIMES, CUDA_TIMES = [1, 2, 15, 32, 65, 150], [1, 2, 15, 63, 64, 65, 129, 200, 300, 530]
ALPHA = torch.tensor([7.0, 7.0, 0.1, 0.5, 0.0, 1.0, 0.3, 0.4])  # entries 0 and 1 must not matter


def first_ids(ids: Tensor, cu_seqlens: Tensor | None = None) -> list[int]:
    """Id of the first token of every sequence that is not padding; 0 for a sequence of padding."""
    rows = ids if cu_seqlens is None else [ids[0, a:b] for a, b in pairwise(cu_seqlens)]
    return [next((int(i) for i in row if i >= 0), 0) for row in rows]


def random_case(seed: int, dtype: torch.dtype, device: Device = CPU):
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
    style = {"prompt": draw.choice([0, 5, 40]), "longest": draw.choice([1, 7, 90]), "skip": draw.random() < 0.5}
    padding, cu_seqlens = draw.choice([0, 3]), None
    if packed:
        cuts = [0, *sorted(draw.choices(range(time + 1), k=3)), time]
        cu_seqlens = torch.tensor(cuts, dtype=torch.int32)
        ids = torch.cat([random_step_ids(1, b - a, padding=padding, **style) for a, b in pairwise(cuts)], 1)
    else:
        ids = random_step_ids(batch, time, padding=padding, **style)
    if draw.random() < 0.3:
        ids[ids >= 0] += 2  # no prompt
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    states = initial_step = None
    if draw.random() < 0.7:
        sequences = len(cu_seqlens) - 1 if packed else batch
        states = torch.randn(3, sequences, heads.v, heads.key_width, heads.value_width, dtype=state_dtype)
        before = [draw.choice([-1, first, max(first - 1, -1)]) for first in first_ids(ids, cu_seqlens)]
        initial_step = torch.tensor(before, dtype=torch.int32)
    alpha = ALPHA if draw.random() < 0.8 else ALPHA[:3]
    return (*tensors, *on(device, ids, alpha, states, initial_step, cu_seqlens)), draw.choice([None, 0.7])


@pytest.mark.parametrize("seed", range(30))
def test_float64_equals_reference(seed):
    args, scale = random_case(seed, torch.float64)
    assert_like_reference(ops.step_linear_attention, reference.step_linear_attention, args, constants=[4], scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(30, 42))
def test_equals_reference(seed, dtype, device):
    args, scale = random_case(seed, dtype, device)
    assert_like_reference(ops.step_linear_attention, reference.step_linear_attention, args, constants=[4], scale=scale)


@pytest.mark.parametrize("step", [1, 16, 63, 64, 65])
def test_steps_that_end_around_tile_edges(step, device):
    """Three sequences whose prompt ends at a tile edge, before it, or is empty; some steps have one token."""
    heads = device.supported(Heads(4, 2, 2, 8, 20))
    lengths = [64] + [step] * 3 + [1, 1, 5], [step] + [1] * 5 + [step, 64, 2], [0, 64, step]
    time = max(map(sum, lengths))
    ids = torch.full((3, time), -1, dtype=torch.int32)
    for row, parts in zip(ids, lengths, strict=True):
        row[: sum(parts)] = torch.arange(len(parts)).repeat_interleave(torch.tensor(parts))
    args = on(device, *heads.qkv(3, time, device.dtypes[0]), ids, ALPHA)
    assert_like_reference(ops.step_linear_attention, reference.step_linear_attention, args, constants=[4])


@pytest.mark.parametrize("device", ["checked"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [Heads(2, 1, 1, 16, 32), Heads(1, 1, 1, 128, 128)], ids=str)
def test_memory_accesses_are_valid(heads, dtype, device):
    """Packed sequences over one tile and part of the next that continue steps, on a small and on a large GPU."""
    ids = torch.cat([torch.tensor([[3] * 12 + [4]]), random_step_ids(1, 77, longest=30)], 1).int()
    states = torch.randn(3, 3, 1, heads.key_width, heads.value_width)
    last, cu_seqlens = torch.tensor([2, 1, -1], dtype=torch.int32), torch.tensor([0, 13, 13, 90], dtype=torch.int32)
    args = (*heads.qkv(1, 90, dtype), ids, ALPHA, states, last, cu_seqlens)
    for seed in range(2):
        device.vary(random.Random(seed))
        assert_like_reference(ops.step_linear_attention, reference.step_linear_attention, args, constants=[4])


@pytest.mark.parametrize("initial_step", [-1, 2])
def test_gradcheck(initial_step):
    tensors = Heads(2, 1, 1, 2, 2).qkv(1, 7, requires_grad=True)
    ids = torch.tensor([[-1, 3, 3, 4, 5, 5, -1]], dtype=torch.int32)
    states = leaf(torch.randn(3, 1, 1, 2, 2, dtype=torch.float64))
    last = torch.tensor([initial_step], dtype=torch.int32)
    assert torch.autograd.gradcheck(ops.step_linear_attention, (*tensors, ids, ALPHA, states, last))


# ---- splitting and packing


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 2, 13, 29, 64, 65, 99, None])
def test_two_calls_equal_one_call(cut, skip, device):
    dtype, heads = device.dtypes[0], device.supported(Heads(4, 2, 2, 8, 20))
    batch, time = (1, 280) if device.runs_cuda else (3, 129)  # long enough for splits on CUDA
    cut = time if cut is None else cut
    ids = random_step_ids(batch, time, prompt=6, longest=30, padding=3, skip=skip)
    states = torch.randn(3, batch, 2, heads.key_width, heads.value_width, dtype=dtype)
    initial_step = torch.tensor([-1, *first_ids(ids)[1:]], dtype=torch.int32)

    def in_two(q, k, v, ids, alpha, states, initial_step):
        first, second = ([x[:, part] for x in (q, k, v, ids)] for part in (slice(cut), slice(cut, None)))
        out, states = ops.step_linear_attention(*first, alpha, states, initial_step)
        seen = torch.cat([initial_step[:, None], first[3]], 1).amax(1).int()
        rest, states = ops.step_linear_attention(*second, alpha, states, seen)
        return torch.cat([out, rest], 1), states

    *args, alpha, states, initial_step = on(device, *heads.qkv(batch, time, dtype), ids, ALPHA, states, initial_step)
    args = (*map(leaf, args), alpha, leaf(states), initial_step)
    whole, whole_grads, cotangents = run(ops.step_linear_attention, args, {})
    parts, parts_grads, _ = run(in_two, args, {}, cotangents)
    for x, y in zip(whole + whole_grads, parts + parts_grads, strict=True):
        assert relative_error(x, y) < GRADIENT[dtype]


def test_packed_equals_one_by_one(device):
    """Bit for bit on the CPU. On CUDA, how the work is split depends on its amount."""
    lengths, heads = [5, 0, 64, 1, 270 if device.runs_cuda else 70], device.supported(Heads(4, 2, 2, 8, 20))
    ends = torch.tensor(lengths).cumsum(0).tolist()
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32)
    ids = torch.cat([random_step_ids(1, n, padding=2) for n in lengths], 1)
    states = torch.randn(3, 5, 2, heads.key_width, heads.value_width)
    initial_step = torch.tensor([-1, 4, 0, -1, 0], dtype=torch.int32)

    def one_by_one(q, k, v, ids, alpha, states, initial_step, cu_seqlens):
        parts = [
            ops.step_linear_attention(
                *(x[:, a:b] for x in (q, k, v, ids)), alpha, states[:, n : n + 1], initial_step[n : n + 1]
            )
            for n, (a, b) in enumerate(pairwise(cu_seqlens))
        ]
        outs, finals = zip(*parts, strict=True)
        return torch.cat(outs, 1), torch.cat(finals, 1)

    args = (*heads.qkv(1, ends[-1], torch.float32), ids, ALPHA, states, initial_step, cu_seqlens)
    args = [x if i == 4 else leaf(x) for i, x in enumerate(on(device, *args))]
    packed, packed_grads, cotangents = run(ops.step_linear_attention, args, {})
    single, single_grads, _ = run(one_by_one, args, {}, cotangents)
    for x, y in zip(packed + packed_grads, single + single_grads, strict=True):
        assert relative_error(x, y) < VALUE[torch.float32] if device.runs_cuda else torch.equal(x, y)


@pytest.mark.parametrize(("batch", "time"), [(0, 5), (2, 0), (0, 0)])
def test_empty_inputs(batch, time, device):
    heads = device.supported(Heads(4, 2, 2, 8, 20))
    tensors = [leaf(x) for x in on(device, *heads.qkv(batch, time, torch.float32))]
    states = leaf(torch.randn(3, batch, 2, heads.key_width, heads.value_width).to(device))
    ids = torch.zeros(batch, time, dtype=torch.int32)
    ids, alpha, seen = on(device, ids, ALPHA, torch.full((batch,), 3, dtype=torch.int32))
    (out, final), grads, (_, cotangent) = run(ops.step_linear_attention, (*tensors, ids, alpha, states, seen), {})
    assert out.shape == (batch, time, 4, heads.value_width)
    assert torch.equal(final, states)
    assert torch.equal(grads[3], cotangent)


def test_padding_is_ignored(device):
    """Poison padding with NaN: results do not change, its output and gradients are 0, and steps end across it."""
    heads = device.supported(Heads(4, 2, 2, 8, 20))
    sizes = heads.key_width, heads.value_width
    tensors = on(device, *heads.qkv(1, 100, torch.float32))
    ids = random_step_ids(1, 100, prompt=0, longest=5) + 1
    ids, alpha, states = on(device, ids, ALPHA, torch.randn(3, 1, 2, *sizes))
    initial_step = torch.tensor([1], dtype=torch.int32, device=device)
    valid = torch.ones(1, 140, dtype=torch.bool)
    valid[0, [0, *range(3, 105, 3), *range(135, 140)]] = False
    valid = valid.to(device)

    def spread(x, filler):
        padded = x.new_full((1, 140, *x.shape[2:]), filler)
        padded[valid] = x[0]
        return padded

    cotangents = on(device, torch.randn(1, 100, 4, heads.value_width), torch.randn(3, 1, 2, *sizes))
    dense = [leaf(x) for x in (*tensors, states)]
    args = (*dense[:3], ids, alpha, dense[3], initial_step)
    wanted, wanted_grads, _ = run(ops.step_linear_attention, args, {}, cotangents)
    padded = [leaf(spread(x, float("nan"))) for x in tensors]
    args = (*padded, spread(ids, -1), alpha, leaf(states), initial_step)
    got, got_grads, _ = run(ops.step_linear_attention, args, {}, [spread(cotangents[0], 1.0), cotangents[1]])
    limit = VALUE[torch.float32] if device.runs_cuda else 1e-6
    for x, y in zip([got[1], got_grads[3]], [wanted[1], wanted_grads[3]], strict=True):
        assert relative_error(x, y) < limit
    for x, y in zip([got[0], *got_grads[:3]], [wanted[0], *wanted_grads[:3]], strict=True):
        assert x[~valid].count_nonzero() == 0
        assert relative_error(x[valid][None], y) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads_runs_or_strides(dtype, device):
    heads, batch, time = (Heads(2, 1, 1, 32, 48), 1, 300) if device.runs_cuda else (Heads(4, 2, 2, 24, 40), 2, 150)
    states = torch.randn(3, batch, heads.k, heads.key_width, heads.value_width)
    args = (*heads.qkv(batch, time, dtype), random_step_ids(batch, time, longest=40), ALPHA, states)
    *tensors, ids, alpha, states = on(device, *args)
    wanted = None
    for i, _ in enumerate(device.every_way()):
        layout = (lambda x: x, scattered, lambda x: scattered(x, aligned=True))[i % 3]
        wide_ids = torch.cat([ids, ids], 1)[:, time:] if i % 2 else ids
        args = (*(leaf(layout(x)) for x in tensors), wide_ids, alpha, leaf(states))
        got = run(ops.step_linear_attention, args, {}, wanted and wanted[2])
        wanted = wanted or got
        for x, y in zip(got[0] + got[1], wanted[0] + wanted[1], strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_graph_capture(device):
    """Captured once and replayed with other contents: kernels read on the device where sequences and steps begin."""
    tensors = on(device, *Heads(4, 2, 2, 64, 128).qkv(1, 300, torch.bfloat16))
    ids, alpha, last = on(
        device, torch.zeros(1, 300, dtype=torch.int32), ALPHA, torch.full((4,), -1, dtype=torch.int32)
    )
    states, cu_seqlens = on(device, torch.randn(3, 4, 2, 64, 128), torch.tensor([0, 0, 0, 0, 300], dtype=torch.int32))
    cotangents = on(device, torch.randn(1, 300, 4, 128).bfloat16(), torch.randn(3, 4, 2, 64, 128))

    def everything():
        args = (*tensors, ids, alpha, states, last, cu_seqlens)
        results = ops.step_linear_attention(*args)
        return *results, *torch.ops.statecore.step_linear_attention_backward(*cotangents, *args, None)

    everything()  # loads the kernels before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything()
    cu_seqlens.copy_(torch.tensor([0, 1, 130, 130, 300], dtype=torch.int32))
    ids.copy_(torch.cat([random_step_ids(1, n, longest=40) + 2 for n in (1, 129, 170)], 1))
    last.copy_(torch.tensor([1, 2, 0, -1], dtype=torch.int32))
    wanted = everything()
    for _ in range(20):
        graph.replay()
        for x, y in zip(got, wanted, strict=True):
            assert torch.equal(x, y)


# ---- identities


def test_recurrence_is_a_weighted_mask():
    """T2: the recurrence, the closed form of the weights and the weighted [T, T] mask are the same."""
    tensors = Heads(4, 2, 2, 8, 12).qkv(2, 120)
    ids = random_step_ids(2, 120, prompt=10, longest=9)
    out, states = ops.step_linear_attention(*tensors, ids, ALPHA)
    masked_out, masked_state = masked_step_linear_attention(*tensors, ids, ALPHA)
    assert relative_error(out, masked_out) < 1e-13
    assert relative_error(states[0], masked_state) < 1e-13
    token_by_token, _ = reference.step_linear_attention(*tensors, ids, ALPHA)
    assert relative_error(out, token_by_token) < 1e-13


def step_end_states(k, v, ids, alpha) -> list[Tensor]:
    """S_0, S_1, ... of one sequence whose ids have no gaps: the states at the start of the next step."""
    states = []
    for step in range(int(ids.max())):
        tokens = (ids[0] <= step + 1).nonzero()[:, 0]
        prefix = slice(0, int((ids[0] <= step).sum()) + 1)
        assert prefix.stop <= len(tokens)
        _, last_states = ops.step_linear_attention(k[:, prefix], k[:, prefix], v[:, prefix], ids[:, prefix], alpha)
        states.append(last_states[1])
    return states


def test_mean_change_telescopes():
    """T3: the mean of the corrected changes in steps 1 .. t is (S_t - S_0) / t; each S_t is that of the paper."""
    _, k, v = Heads(2, 2, 2, 5, 6).qkv(1, 60)
    ids = random_step_ids(1, 60, prompt=6, longest=8)
    corrected = step_end_states(k, v, ids, ALPHA)
    changes = [b - a for a, b in pairwise(corrected)]
    assert len(changes) > 5
    for t in range(1, len(changes)):
        mean = torch.stack(changes[:t]).mean(0)
        assert relative_error(mean, (corrected[t] - corrected[0]) / t) < 1e-12
        raw = torch.einsum("thd,the->hde", k[0, ids[0] == t + 1], v[0, ids[0] == t + 1])[None]
        strength = float(ALPHA[t + 1]) if t + 1 < len(ALPHA) else 0.0
        assert relative_error(changes[t], (1 - strength) * raw + strength * mean) < 1e-12


def test_alpha_zero_is_linear_attention(device):
    """T4: without a correction, steps only decide when the other two states are set to the running one."""
    for dtype in dict.fromkeys((torch.float32, device.dtypes[0])):
        tensors = [leaf(x) for x in on(device, *Heads(4, 2, 2, 16, 32).qkv(2, 200, dtype))]
        ids = random_step_ids(2, 200, longest=80).to(device)
        plain, plain_grads, cotangents = run(ops.linear_attention, tensors, {})
        for alpha in on(device, torch.zeros(9), torch.zeros(0)):
            (out, states), _, _ = run(ops.step_linear_attention, (*tensors, ids, alpha), {})
            assert relative_error(out, plain[0]) < VALUE[dtype]
            assert relative_error(states[0], plain[1]) < VALUE[dtype]
            zeros = torch.zeros_like(states)
            zeros[0] = cotangents[1]
            _, grads, _ = run(ops.step_linear_attention, (*tensors, ids, alpha), {}, [cotangents[0], zeros])
            for x, y in zip(grads, plain_grads, strict=True):
                assert relative_error(x, y) < GRADIENT[dtype]


def test_one_step_is_linear_attention(device):
    """Bit for bit on the CPU."""
    *tensors, alpha = on(device, *Heads(4, 2, 2, 16, 32).qkv(2, 200, torch.float32), ALPHA)
    plain, state = ops.linear_attention(*tensors)
    for step in (0, 1, 5):
        ids = torch.full((2, 200), step, dtype=torch.int32, device=device)
        out, states = ops.step_linear_attention(*tensors, ids, alpha)
        for x, y in ((out, plain), (states[0], state)):
            assert relative_error(x, y) < VALUE[torch.float32] if device.runs_cuda else torch.equal(x, y)


def test_alpha_one_ignores_the_step():
    """T4: alpha_t = 1 replaces the change of the state in step t by the mean change before it."""
    _, k, v = Heads(1, 1, 1, 5, 6).qkv(1, 60)
    ids = random_step_ids(1, 60, prompt=6, longest=8)
    prompt, *corrected = step_end_states(k, v, ids, torch.ones(40))
    for t in range(2, len(corrected) + 1):
        before, after = corrected[t - 2], corrected[t - 1]
        assert relative_error(after, before + (before - prompt) / (t - 1)) < 1e-12


# ---- accuracy at length


@pytest.mark.parametrize("longest", [20, 500])
def test_float32_error_at_4096(longest, device):
    time = device.length(4096)
    tensors = on(device, *Heads(1, 1, 1, 64, 64).qkv(1, time, torch.float32))
    ids = random_step_ids(1, time, prompt=time // 20, longest=longest)
    ids, alpha = on(device, ids, torch.full((400,), 0.4))

    def exact(q, k, v, ids, alpha):
        out, state = masked_step_linear_attention(q, k, v, ids, alpha)
        return out, torch.stack([state, *(0 * state,) * 2])

    own, doubles = [leaf(x) for x in tensors], [leaf(x, torch.float64) for x in tensors]
    cotangents = on(device, torch.randn(1, time, 1, 64), torch.randn(3, 1, 1, 64, 64))
    cotangents[1][1:] = 0
    results, grads, _ = run(ops.step_linear_attention, (*own, ids, alpha), {}, cotangents)
    wanted, wanted_grads, _ = run(exact, (*doubles, ids, alpha), {}, cotangents)
    assert relative_error(results[0], wanted[0]) < 1e-5
    assert relative_error(results[1][0], wanted[1][0]) < 1e-5
    for x, y in zip(grads, wanted_grads, strict=True):
        assert relative_error(x, y) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_that_of_rounding(dtype, device):
    time = device.length(1024)
    *tensors, alpha = on(device, *Heads(4, 2, 2, 64, 64).qkv(1, time, dtype), ALPHA)
    ids = random_step_ids(1, time, prompt=100, longest=100).to(device)
    cotangents = on(device, torch.randn(1, time, 4, 64).to(dtype), torch.zeros(3, 1, 2, 64, 64))
    results, grads, _ = run(ops.step_linear_attention, (*map(leaf, tensors), ids, alpha), {}, cotangents)

    def exact(*args):
        return masked_step_linear_attention(*args)[:1]

    doubles = [leaf(x, torch.float64) for x in tensors]
    wanted, wanted_grads, _ = run(exact, (*doubles, ids, alpha), {}, cotangents[:1])
    for got, right in zip([results[0], *grads], wanted + wanted_grads, strict=True):
        assert relative_error(got, right) <= 1.5 * relative_error(right.to(dtype), right)


def test_oracle_weights():
    """Computed by hand: a prompt and three steps, alpha_2 = 0.5."""
    ids = torch.tensor([0, 1, 2, 3])
    weights = step_weights(ids, torch.tensor([0.0, 0.0, 0.5]))
    # S_2 = S_1 + 0.5 D_2 + 0.5 (S_1 - S_0) = S_0 + 1.5 D_1 + 0.5 D_2
    assert weights.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1.5, 0.5, 1]]
    q, k, v = same_heads(*Heads(1, 1, 1, 3, 3).qkv(1, 4))
    out, _ = reference.step_linear_attention(q, k, v, ids[None].int(), torch.tensor([0.0, 0.0, 0.5]), scale=1.0)
    by_hand = sum(w * (q[0, 3, 0] @ k[0, j, 0]) * v[0, j, 0] for j, w in enumerate([1, 1.5, 0.5, 1]))
    assert relative_error(out[0, 3, 0], by_hand) < 1e-13


# ---- refusals


def refused(match: str, **changes):
    q, k, v = Heads(4, 2, 2, 8, 12).qkv(2, 6, torch.float32)
    args = {"q": q, "k": k, "v": v, "step_ids": torch.zeros(2, 6, dtype=torch.int32), "alpha": ALPHA, **changes}
    with pytest.raises(RuntimeError, match=match):
        ops.step_linear_attention(**args)


def test_refuses_invalid_arguments():
    x = torch.randn

    def ids(*values):
        return torch.tensor([[0, 0, 0, 0, 0, 0], values], dtype=torch.int32)

    refused(r"heads must be grouped as GQA \(k and v have equally many, q a multiple\), got q 2, k 2, v 4",
            q=x(2, 6, 2, 8), k=x(2, 6, 2, 8), v=x(2, 6, 4, 12))  # fmt: skip
    refused(r"k must have shape", k=x(2, 6, 2, 9))
    refused(r"step_ids must have shape \(2, 6\), got \(2, 7\)", step_ids=torch.zeros(2, 7, dtype=torch.int32))
    refused(r"step_ids must be int32, got int64", step_ids=torch.zeros(2, 6, dtype=torch.int64))
    refused(r"step_ids must have stride 1 in its last dimension", step_ids=torch.zeros(6, 2, dtype=torch.int32).T)
    refused(r"step_ids must be >= 0, or -1 for padding, got -2 at \[1, 3\]", step_ids=ids(0, 0, 1, -2, 2, 2))
    refused(r"step_ids must not decrease inside a sequence, got 1 after 2 at \[1, 4\]", step_ids=ids(0, 1, 2, 2, 1, 2))
    refused(r"alpha must have 1 dimensions? \[A\], got shape \(\)", alpha=torch.tensor(0.4))
    refused(r"alpha must be float32, got float64", alpha=ALPHA.double())
    refused(r"initial_states must have shape \(3, 2, 2, 8, 12\), got \(2, 2, 8, 12\)", initial_states=x(2, 2, 8, 12))
    refused(r"initial_states must be float32, got bfloat16", initial_states=x(3, 2, 2, 8, 12).bfloat16())
    last = torch.tensor([0, 0], dtype=torch.int32)
    refused(r"initial_step must have shape \(2\), got \(1\)", initial_step=last[:1])
    refused(r"initial_step must be int32, got int64", initial_step=last.long())
    refused(
        r"initial_step must be >= 0, or -1 where nothing was seen, got -2 at \[1\]",
        initial_step=last - 2 * (last.new_tensor([0, 1])),
    )
    refused(r"from one call to the next: initial_step\[1\] is 3, but the sequence goes on with 2",
            step_ids=ids(-1, 2, 2, 3, 3, -1), initial_step=torch.tensor([0, 3], dtype=torch.int32))  # fmt: skip
    one = {"q": x(1, 6, 4, 8), "k": x(1, 6, 2, 8), "v": x(1, 6, 2, 12)}
    packed = torch.tensor([[2, 2, 3, 0, 0, 1]], dtype=torch.int32)
    refused(r"step_ids must not decrease inside a sequence, got 0 after 3 at \[0, 3\]", step_ids=packed, **one)
    ops.step_linear_attention(**one, step_ids=packed, alpha=ALPHA, cu_seqlens=torch.tensor([0, 3, 6]).int())
    refused(
        r"cu_seqlens must end with the number of tokens", step_ids=packed, cu_seqlens=torch.tensor([0, 3]).int(), **one
    )
