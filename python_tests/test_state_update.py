"""state_update against its definition, and token by token against the operators over whole sequences."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import EXACT, VALUE, Heads, random_step_ids, relative_error
from devices import Device, on

from statecore import ops, reference

GROUPINGS = [(1, 1, 1), (3, 3, 3), (4, 2, 2), (12, 2, 2), (2, 2, 6), (1, 1, 5)]
WIDTHS, CUDA_WIDTHS = [1, 3, 8, 16, 17, 40, 64, 100], [16, 32, 48, 64, 80, 112, 128]
ALPHA = torch.tensor([7.0, 7.0, 0.1, 0.5, 0.0, 1.0, 0.3])


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_case(seed: int, dtype: torch.dtype, device: Device):
    """States, and the other positional arguments."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    widths = CUDA_WIDTHS if device.runs_cuda else WIDTHS
    heads = Heads(*draw.choice(GROUPINGS), draw.choice(widths), draw.choice(widths))
    rows, pool = draw.choice([1, 2, 5]), 7
    q, k, v = (x[0] for x in heads.qkv(1, rows, dtype))
    if draw.random() < 0.5:
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = draw.choice([1, 3])
    states = torch.randn(kinds, pool, heads.v, heads.key_width, heads.value_width, dtype=state_dtype)
    decay = -torch.rand(rows, heads.v, dtype=state_dtype) if draw.random() < 0.5 else None
    ends = int32(*(draw.choice([-1, 0, 1, 2, 3, 4, 5, 9]) for _ in range(rows))) if draw.random() < 0.7 else None
    slots = int32(*draw.sample(range(pool), rows)) if draw.random() < 0.6 else None
    if slots is not None and rows > 2:
        slots[[0, 2]] = -1
    args = on(device, q, k, v, decay, ends, ALPHA if ends is not None else None, slots)
    return states.to(device), args


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(25))
def test_equals_reference(seed, dtype, device):
    if device.runs_cuda and dtype == torch.float64:
        return  # refused: test_refuses_on_cuda
    states, args = random_case(seed, dtype, device)
    own, exact = states.clone(), states.double()
    out = ops.state_update(own, *args, scale=0.7)
    wanted = reference.state_update(
        exact, *(x.double() if i < 4 and x is not None else x for i, x in enumerate(args)), scale=0.7
    )
    assert out.dtype == dtype
    assert relative_error(out, wanted) <= VALUE[dtype]
    assert relative_error(own, exact) <= VALUE[dtype]


@pytest.mark.parametrize("heads", [Heads(4, 2, 2, 8, 12), Heads(4, 4, 4, 16, 16)], ids=["gqa", "mha"])
def test_token_by_token_is_step_linear_attention(heads):
    """Steps end at different tokens in each row. `ends_step` of a token follows from the next token's id."""
    q, k, v = heads.qkv(3, 60)
    ids = random_step_ids(3, 60, prompt=6, longest=8)
    wanted, wanted_states = ops.step_linear_attention(q, k, v, ids, ALPHA)
    states = torch.zeros_like(wanted_states)
    after = torch.cat([ids[:, 1:], ids[:, -1:]], 1)
    for t in range(60):
        ends = torch.where(after[:, t] > ids[:, t], ids[:, t], -1)
        out = ops.state_update(states, q[:, t], k[:, t], v[:, t], ends_step=ends, alpha=ALPHA)
        assert relative_error(out, wanted[:, t]) < EXACT
    assert relative_error(states, wanted_states) < EXACT


@pytest.mark.parametrize("heads", [Heads(4, 2, 2, 8, 12), Heads(2, 2, 6, 8, 12)], ids=["gqa", "gva"])
def test_token_by_token_is_linear_attention_with_decay(heads):
    q, k, v = heads.qkv(2, 40)
    decay = -torch.rand(2, 40, heads.v, dtype=torch.float64)
    wanted, wanted_state = ops.linear_attention(q, k, v, decay)
    states = torch.zeros_like(wanted_state)[None]
    for t in range(40):
        out = ops.state_update(states, q[:, t], k[:, t], v[:, t], decay[:, t])
        assert relative_error(out, wanted[:, t]) < EXACT
    assert relative_error(states[0], wanted_state) < EXACT


def test_other_slots_and_skipped_rows_are_unchanged(device):
    q, k, v = on(device, *(x[0] for x in Heads(4, 2, 2, 16, 32).qkv(1, 4, torch.float32)))
    states = torch.randn(3, 6, 2, 16, 32).to(device)
    before = states.clone()
    out = ops.state_update(states, q, k, v, None, *on(device, int32(2, 2, -1, 0), ALPHA, int32(5, -1, 0, -1)))
    assert torch.equal(states[:, [1, 2, 3, 4]], before[:, [1, 2, 3, 4]])
    assert torch.equal(states[1:, 0], before[1:, 0])
    assert not torch.equal(states[0, 0], before[0, 0])
    assert not torch.equal(states[1, 5], before[1, 5])
    assert torch.equal(states[2, 5], before[2, 5])
    assert out[[1, 3]].count_nonzero() == 0


def test_end_of_prompt_sets_all_three_states(device):
    q, k, v = on(device, *(x[0] for x in Heads(2, 2, 2, 16, 32).qkv(1, 1, torch.float32)))
    states = torch.randn(3, 1, 2, 16, 32).to(device)
    running = states[0] + torch.einsum("bhd,bhe->bhde", k, v)
    ops.state_update(states, q, k, v, ends_step=int32(0).to(device), alpha=ALPHA.to(device))
    for state in states:
        assert relative_error(state, running) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype, device):
    heads = Heads(12, 2, 2, 64, 64)
    q, k, v = on(device, *(x[0] for x in heads.qkv(1, 8, dtype)))
    states = torch.randn(3, 8, 2, 64, 64).to(device)
    exact = states.double()
    ends, alpha = on(device, int32(-1, 0, 1, 2, 3, -1, -1, 6), ALPHA)
    out = ops.state_update(states, q, k, v, None, ends, alpha)
    wanted = reference.state_update(exact, q.double(), k.double(), v.double(), None, ends, alpha)
    assert out.dtype == dtype
    assert relative_error(out, wanted) <= 1.5 * relative_error(wanted.to(dtype), wanted)
    assert relative_error(states, exact) < 1e-5


@pytest.mark.parametrize("device", ["cpu", "emulated", "checked", "cuda"], indirect=True)
def test_same_bits_on_every_run(device):
    heads = Heads(6, 1, 1, 64, 64)
    q, k, v = on(device, *(x[0] for x in heads.qkv(1, 16, torch.float32)))
    start, ends, alpha = on(device, torch.randn(3, 16, 1, 64, 64), torch.arange(16, dtype=torch.int32) - 1, ALPHA)
    results = []
    for _ in device.every_way():
        states = start.clone()
        results.append((ops.state_update(states, q, k, v, None, ends, alpha), states))
    for out, states in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(states, results[0][1])


def test_no_rows(device):
    q, k, v = on(device, *(x[0] for x in Heads(4, 2, 2, 16, 32).qkv(1, 0, torch.float32)))
    for pool in (0, 3):
        assert ops.state_update(torch.zeros(1, pool, 2, 16, 32, device=device), q, k, v).shape == (0, 4, 32)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_graph_capture(device):
    """Captured once and replayed with other contents, which the kernel reads on the device."""
    heads = Heads(12, 2, 2, 128, 128)
    q, k, v = on(device, *(x[0] for x in heads.qkv(1, 8, torch.bfloat16)))
    start = torch.randn(3, 8, 2, 128, 128).to(device)
    states, ends, slots, alpha = on(device, start.clone(), int32(*[-1] * 8), int32(*[-1] * 8), ALPHA)
    ops.state_update(states, q, k, v, None, ends, alpha, slots)  # loads the kernels before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.state_update(states, q, k, v, None, ends, alpha, slots)
    ends.copy_(int32(-1, 0, 1, 2, 3, -1, 4, 6))
    slots.copy_(int32(7, 6, 5, -1, 3, 2, 1, 0))
    wanted_states = start.clone()
    wanted = ops.state_update(wanted_states, q, k, v, None, ends, alpha, slots)
    for _ in range(20):
        states.copy_(start)
        graph.replay()
        assert torch.equal(out, wanted)
        assert torch.equal(states, wanted_states)


@pytest.mark.parametrize("device", ["emulated", "checked", "cuda"], indirect=True)
def test_slots_outside_the_pool_are_skipped_on_cuda(device):
    q, k, v = on(device, *(x[0] for x in Heads(4, 2, 2, 16, 32).qkv(1, 3, torch.float32)))
    states = torch.randn(1, 3, 2, 16, 32).to(device)
    before = states.clone()
    out = ops.state_update(states, q, k, v, slots=int32(3, -7, 2**31 - 1).to(device))
    assert torch.equal(states, before)
    assert out.count_nonzero() == 0


CHECKED = """
import sys
import torch
from devices import using
from statecore import ops

with using(sys.argv[1]) as device:
    x = torch.ones(2, 1, 16, device=device)
    slots = torch.tensor([0, 9], dtype=torch.int32, device=device)
    ops.state_update(torch.zeros(1, 3, 1, 16, 16, device=device), x, x, x, slots=slots)
"""


@pytest.mark.parametrize("device", ["emulated", "cuda"], indirect=True)
def test_contents_are_refused_on_cuda_when_asked(device):
    """In a process of its own, because STATECORE_CHECK is read once."""
    command = [sys.executable, "-c", CHECKED, device.name]
    environment = os.environ | {"STATECORE_CHECK": "1"}
    run = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert r"slots must be in [0, 3), or -1 to skip the row, got 9 at [1]" in run.stderr


@pytest.mark.parametrize("device", ["emulated", "cuda"], indirect=True)
def test_refuses_on_cuda(device):
    def update(key_width: int = 16, value_width: int = 32, dtype=torch.float32, offset: int = 0):
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        size = 3 * key_width * value_width
        states = torch.zeros(offset + size, dtype=state_dtype, device=device)[offset:]
        q, k, v = on(device, *(x[0] for x in Heads(1, 1, 1, key_width, value_width).qkv(1, 3, dtype)))
        ops.state_update(states.view(1, 3, 1, key_width, value_width), q, k, v)

    update()
    with pytest.raises(RuntimeError, match="q must be float32, bfloat16 or float16 on CUDA, got float64"):
        update(dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"q and k must have a width that is a multiple of 16 up to 128 .*, got 24"):
        update(key_width=24)
    with pytest.raises(RuntimeError, match="v must have a width that is a multiple of 16 up to 128 on CUDA, got 144"):
        update(value_width=144)
    with pytest.raises(RuntimeError, match="states must start at a multiple of 16 bytes on CUDA"):
        update(offset=1)


def refused(match: str, **changes):
    q, k, v = (x[0] for x in Heads(4, 2, 2, 8, 12).qkv(1, 3, torch.float32))
    states = changes.pop("states", torch.zeros(3, 5, 2, 8, 12))
    before = states.clone()
    with pytest.raises(RuntimeError, match=match):
        ops.state_update(states, **{"q": q, "k": k, "v": v, **changes})
    assert torch.equal(states, before), "refused, yet changed"


def test_refuses_invalid_arguments():
    x = torch.randn
    refused(r"q must have 3 dimensions \[B, Hq, Dk\], got shape \(1, 3, 4, 8\)", q=x(1, 3, 4, 8))
    refused(r"k must have shape \(3, 2, 8\), got \(3, 2, 9\)", k=x(3, 2, 9))
    refused(r"v must have shape \(3, 2, 12\), got \(2, 2, 12\)", v=x(2, 2, 12))
    refused(r"heads must be grouped as GQA .* or GVA .*, got q 4, k 3, v 3", k=x(3, 3, 8), v=x(3, 3, 12))
    refused(r"v must be float32, got float16", v=x(3, 2, 12).half())
    refused(r"q must have stride 1 in its last dimension", q=x(3, 8, 4).transpose(1, 2))
    refused(r"states must have 5 dimensions", states=x(5, 2, 8, 12))
    refused(r"states must have 3 states a slot, or 1 .*, got shape \(2, 5, 2, 8, 12\)", states=x(2, 5, 2, 8, 12))
    refused(r"states must have shape \(3, 5, 2, 8, 12\), got \(3, 5, 4, 8, 12\)", states=x(3, 5, 4, 8, 12))
    refused(r"states must be float32, got float64", states=x(3, 5, 2, 8, 12).double())
    refused(r"states must be contiguous", states=x(3, 5, 2, 12, 8).transpose(3, 4))
    refused(r"states must have a slot for each of the 3 rows when slots is not given, got 2", states=x(3, 2, 2, 8, 12))
    refused(r"log_decay must have shape \(3, 2\), got \(3, 4\)", log_decay=x(3, 4))
    refused(r"log_decay must be float32", log_decay=x(3, 2).half())
    refused(r"ends_step must have shape \(3\)", ends_step=int32(1, 2), alpha=ALPHA)
    refused(r"ends_step must be int32, got int64", ends_step=int32(1, 2, 3).long(), alpha=ALPHA)
    refused(r"ends_step must be >= 0, or -1 .*, got -2 at \[1\]", ends_step=int32(0, -2, 0), alpha=ALPHA)
    refused(r"alpha must be given with ends_step where states has 3 states a slot", ends_step=int32(0, -1, 0))
    refused(r"alpha must have 1 dimension", ends_step=int32(0, -1, 0), alpha=ALPHA[None])
    refused(r"slots must have shape \(3\)", slots=int32(0, 1))
    refused(r"slots must be int32, got int64", slots=int32(0, 1, 2).long())
    refused(r"slots must be in \[0, 5\), or -1 to skip the row, got 5 at \[2\]", slots=int32(0, 1, 5))
    refused(r"slots must be in \[0, 5\), .*, got -2 at \[0\]", slots=int32(-2, 1, 4))
    refused(r"slots must name no slot twice, got 4 at \[0\] and \[2\]", slots=int32(4, 1, 4))
