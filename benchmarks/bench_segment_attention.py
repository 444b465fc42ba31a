"""segment_attention among steps and as plain causal attention; its work is what is visible, counted from the step ids.

`python -m benchmarks.bench_segment_attention [--device cpu|cuda] [--only TEXT] [--quick]` prints its tables.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import cpu_limits, peers, roofline, suite
from benchmarks.contest import OURS, Instruments, Peer, Question, Subject
from benchmarks.memory import nbytes, peak_growth
from benchmarks.peers import FLASH_MODULES, FLEX, MASKED, SDPA, TWO_CALLS
from benchmarks.record import Row
from benchmarks.roofline import BACKWARD, BOTH, FORWARD
from benchmarks.workload import DTYPES, Case, causal_pairs, cpu_case, cpu_cases, visible_pairs
from statecore import ops, reference

NAME, PER_FLOP = "segment_attention", "causal, per visible FLOP"
CAUSAL = f"SDPA {PER_FLOP}"
LONGEST_MASKED, LONGEST_CAUSAL = 4096, 8192  # tokens of these peers on the CPU
# Targets: of the CPU, then of a GPU
TIMES_MASKED, TIMES_CAUSAL = {torch.float32: 12.0, torch.bfloat16: 20.0}, {torch.float32: 1.8, torch.bfloat16: 3.0}
TIMES_MASKED_BOTH = 10.0
RATES = {FORWARD: ("TFLOP/s", 450e12), BACKWARD: ("TFLOP/s", 320e12)}  # with steps of these lengths:
LARGE_STEPS = 256, 384, 512
TIMES_FLEX = {(FORWARD, FLEX): 2.0, (BACKWARD, FLEX): 2.0}


def questions(device: str) -> list[Question]:
    return on_cpu() if device == "cpu" else on_gpu()


def on_cpu() -> list[Question]:
    def asked(section: str, operator: str, case: Case, **fields) -> Question:
        return Question(section, operator, case, roofline.segment_attention, subject=subject, **fields)

    def ratios(dtype: torch.dtype) -> dict[tuple[str, str], float]:
        forward = {(FORWARD, MASKED): TIMES_MASKED[dtype], (FORWARD, CAUSAL): TIMES_CAUSAL[dtype]}
        return forward | {(BOTH, MASKED): TIMES_MASKED_BOTH}

    both, short = {"directions": (FORWARD, BOTH)}, f"{NAME}, steps of 32"
    long = [cpu_case(dtype, time=cpu_limits.LONG) for dtype in DTYPES]
    return [
        *(asked("segment", NAME, case, measure=long_sequence) for case in long),
        *(asked("segment", NAME, case, ratios=ratios(case.dtype), **both) for case in cpu_cases()),
        *cpu_limits.questions(NAME, subject, roofline.segment_attention, MASKED, CAUSAL),
        *(asked("others", short, cpu_case(dtype, step=32), peers=(MASKED,), **both) for dtype in DTYPES),
    ]


def on_gpu() -> list[Question]:
    def steps(rank: int, heads: tuple[int, int], step: int) -> Question:
        case = Case(dtype=torch.bfloat16, heads=heads, time=32_768, step=step, device="cuda")
        aims, ratios = (RATES, TIMES_FLEX) if step in LARGE_STEPS else ({}, {})
        return asked(f"{NAME}, steps of {step}", case, aims=aims, ratios=ratios, rank=rank)

    def causal(rank: int, heads: tuple[int, int]) -> Question:
        case = Case(dtype=torch.bfloat16, heads=heads, time=8192, prompt=0, step=8192, device="cuda")
        return asked(f"{NAME}, plain causal", case, rank=rank)

    def asked(operator: str, case: Case, **fields) -> Question:
        ways = FORWARD, BACKWARD
        return Question(NAME, operator, case, roofline.segment_attention, ways, subject, needs=25.0, **fields)

    return [
        *(steps(1, (12, 2), step) for step in LARGE_STEPS),
        *(steps(3, (12, 2), step) for step in (128, 96, 64, 32)),
        *(steps(3, (28, 4), step) for step in LARGE_STEPS),
        causal(3, (16, 16)),
        *(steps(4, (16, 16), step) for step in LARGE_STEPS),
        causal(4, (12, 2)),
    ]


def subject(case: Case) -> Subject:
    inputs, ids, behind = case.qkv(), case.step_ids(), f", {PER_FLOP}" if case.prompt else ""
    found = {MASKED: partial(masked_peer, inputs, ids)} if case.threads and case.time <= LONGEST_MASKED else {}
    if case.prompt:
        found[FLEX] = partial(flex_peer, case, inputs, ids)
    if case.threads:
        causal = {CAUSAL: lambda: peers.sdpa} if case.time <= LONGEST_CAUSAL else {}
    else:
        found |= {TWO_CALLS: partial(two_calls_peer, inputs, ids)} if case.prompt else {}
        causal = {name + behind: partial(peers.causal_attention, name) for name in (*SDPA, *FLASH_MODULES)}
    found |= {name: partial(causal_peer, case, inputs, ids, make) for name, make in causal.items()}
    return Subject(case, ops.segment_attention, reference.segment_attention, inputs, (ids,), found)


def masked_peer(inputs: tuple[Tensor, ...], ids: Tensor) -> Peer:
    build = partial(reference.segment_mask, ids, ids.shape[1])
    return Peer({"": partial(peers.sdpa, *inputs, build())}, inputs, prepared={"boolean mask": build})


def flex_peer(case: Case, inputs: tuple[Tensor, ...], ids: Tensor) -> Peer:
    build, on_cpu = partial(peers.block_mask, ids), case.threads > 0
    attend = peers.flex(tuple(x.shape for x in inputs), gradients=not on_cpu)
    run = partial(attend, *inputs, build())
    return Peer({"": run}, inputs, forward_only=on_cpu, prepared={"create_block_mask": build})


def two_calls_peer(inputs: tuple[Tensor, ...], ids: Tensor) -> Peer:
    return Peer({"": partial(peers.own_and_prompt(ids, peers.VarlenAttention()), *inputs)}, inputs)


def causal_peer(case: Case, inputs: tuple[Tensor, ...], ids: Tensor, make: Callable[[], peers.Attention]) -> Peer:
    """Full causal attention: the same task where there are no steps, else more work."""
    visible = visible_pairs(ids) / causal_pairs(case.time)
    return Peer({"": partial(make(), *inputs)}, inputs, visible, apart=visible < 1, forward_only=case.threads > 0)


def long_sequence(question: Question, instruments: Instruments) -> Iterator[Row]:
    """Where a mask is out of the question."""
    case, ours = question.case, question.subject(question.case)
    run = torch.no_grad()(lambda: ours.ours(*ours.inputs, *ours.context))
    grown, results = peak_growth(run)
    sizes = {
        "peak memory growth": grown, "results": nbytes(results),
        "mask of SDPA (computed)": case.time**2 * (1 + case.dtype.itemsize),  # as booleans, then as what is added
    }  # fmt: skip
    taken = instruments.time({OURS: run})[OURS]
    yield question.timed(FORWARD, instruments, taken, **{name: (size, "MB") for name, size in sizes.items()})


if __name__ == "__main__":
    suite.main_of_operator(questions)
