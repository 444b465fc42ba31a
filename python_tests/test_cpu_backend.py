"""Promises of the CPU backend alone: every instruction set, every schedule, and the memory that a call takes."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Heads, random_step_ids
from linear_oracles import leaf, run

from benchmarks.memory import peak_growth
from statecore import ops

HERE = Path(__file__).parent
OPERATORS = [f"test_{op}.py" for op in ("linear_attention", "segment_attention", "step_linear_attention")]
OPERATORS += ["test_mixed_attention.py", "test_state_update.py"]
ALPHA = (torch.arange(128) / 40).clamp(max=0.4)
MIB = 1 << 20


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_operators_on_every_instruction_set(isa):
    """All operator tests again with the kernels for older processors."""
    if ops.build_info()["cpu_isa"] == isa:
        return  # all other tests run it
    environment = os.environ | {"STATECORE_CPU_ISA": isa}
    known = [sys.executable, "-c", "from statecore import ops; print(ops.build_info()['cpu_isa'])"]
    probe = subprocess.run(known, env=environment, capture_output=True, text=True, check=False)
    if "STATECORE_CPU_ISA must be one of" in probe.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert probe.stdout.split() == [isa]
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *OPERATORS]
    tests += ["-k", "not emulated and not checked and not cuda"]
    done = subprocess.run(tests, env=environment, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


# ---- schedules: few heads and long sequences, whose splits threads share


def few_heads(case: str, dtype: torch.dtype):
    """Operator and inputs: long sequences with one or two key heads."""
    time = 1500
    if case == "groups of query heads":
        return ops.linear_attention, [leaf(x) for x in Heads(6, 2, 2, 24, 40).qkv(1, time, dtype)]
    if case == "groups of value heads with decay":
        q, k, v = Heads(1, 1, 7, 24, 40).qkv(2, time, dtype)
        return ops.linear_attention, [
            *map(leaf, (q, k, v)),
            leaf(-torch.rand(2, time, 7)),
            leaf(torch.randn(2, 7, 24, 40)),
        ]
    if case == "packed":
        ends = torch.tensor([0, 3, 3, 700, 701, time], dtype=torch.int32)
        tensors = [leaf(x) for x in Heads(3, 1, 1, 24, 40).qkv(1, time, dtype)]
        return ops.linear_attention, [*tensors, None, None, ends]
    ids = random_step_ids(1, time, prompt=100, longest=600 if case == "long steps" else 40, padding=20)
    return ops.step_linear_attention, [*map(leaf, Heads(4, 2, 2, 24, 40).qkv(1, time, dtype)), ids, ALPHA]


CASES = ["groups of query heads", "groups of value heads with decay", "packed", "long steps", "short steps"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_splits_shared_among_threads_give_the_same_bits(case, dtype):
    operator, inputs = few_heads(case, dtype)
    torch.set_num_threads(1)
    results, grads, cotangents = run(operator, inputs, {})
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        more, more_grads, _ = run(operator, inputs, {}, cotangents)
        for x, y in zip([*results, *grads], [*more, *more_grads], strict=True):
            assert torch.equal(x, y), threads


# ---- memory beyond the results, as stated in csrc/*/*.h


def extra_memory(function, inputs, backward: bool) -> float:
    """Peak bytes of one call, forward or backward, without its results: the median of three, as the kernel counts
    resident pages in batches.
    """
    torch.set_num_threads(2)
    outs = function(*inputs)  # creates libraries' buffers and threads
    gradient = torch.ones_like(outs[0])

    def call():
        if backward:
            return torch.autograd.grad(outs[0], inputs[:3], gradient, retain_graph=True)
        with torch.no_grad():
            return function(*inputs)

    call()
    found = []
    for _ in range(3):
        growth, results = peak_growth(call)
        if growth is None:
            pytest.skip("the peak of resident memory cannot be reset here (/proc/self/clear_refs)")
        found.append(growth - sum(x.nbytes for x in results))
        del results
    return statistics.median(found)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(8, 2), (16, 16)])
def test_linear_attention_needs_a_few_states_beyond_its_results(heads, dtype, backward):
    """About 1 MiB per thread, nothing that grows with tokens times widths (the inputs take 20 to 200 MiB)."""
    inputs = [leaf(x) for x in Heads(heads[0], heads[1], heads[1], 64, 64).qkv(1, 16384, dtype)]
    assert extra_memory(ops.linear_attention, inputs, backward) < 3 * MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segment_attention_needs_little_beyond_its_results(dtype):
    time = 16384
    q, k, v = (leaf(x) for x in Heads(8, 2, 2, 64, 64).qkv(1, time, dtype))
    ids = ((torch.arange(time) - 256) // 256 + 1).clamp(min=0).int()[None]
    inputs = [q, k, v, ids]
    assert extra_memory(ops.segment_attention, inputs, backward=False) < 2 * MIB
    sums = 2 * time * (80 + 80) * 4  # float32 sums of dk and dv of both key heads, padded rows
    assert extra_memory(ops.segment_attention, inputs, backward=True) < sums + 8 * MIB
