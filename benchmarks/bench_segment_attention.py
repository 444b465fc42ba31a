"""segment_attention among steps and as plain causal attention; its work is what is visible, counted from the step ids.

python -m benchmarks.bench_segment_attention [--device cpu|cuda] [--only TEXT] [--quick]
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import cpu_limits, peers, roofline, suite
from benchmarks.contest import OURS, Instruments, Peer, Question, Subject, among, directed
from benchmarks.memory import nbytes, peak_growth
from benchmarks.peers import FLASH_MODULES, FLEX, MASKED, SDPA, TWO_CALLS
from benchmarks.record import Row
from benchmarks.roofline import BACKWARD, BOTH, FORWARD
from benchmarks.workload import DTYPES, Case, causal_pairs, cpu_case, cpu_cases, visible_pairs
from statecore import ops, reference

NAME = "segment_attention"
PER_FLOP = "causal, per visible FLOP"
CAUSAL = f"SDPA {PER_FLOP}"
LONGEST_MASKED, LONGEST_CAUSAL = 4096, 8192  # tokens of these peers on the CPU

# Targets: of the CPU, then of a GPU
TIMES_MASKED, TIMES_CAUSAL = {torch.float32: 12.0, torch.bfloat16: 20.0}, {torch.float32: 1.8, torch.bfloat16: 3.0}
TIMES_MASKED_BOTH = 10.0
RATES = {FORWARD: ("TFLOP/s", 450e12), BACKWARD: ("TFLOP/s", 320e12)}  # with steps of these lengths:
LARGE_STEPS = 256, 384, 512
TIMES_FLEX = dict.fromkeys(((FORWARD, FLEX), (BACKWARD, FLEX)), 2.0)


def questions(device: str) -> list[Question]:
    return on_cpu() if device == "cpu" else on_gpu()


def on_cpu() -> list[Question]:
    def asked(section: str, operator: str, case: Case, make=subject, **fields) -> Question:
        return Question(section, operator, case, roofline.segment_attention, subject=make, **fields)

    def ratios(dtype: torch.dtype) -> dict[tuple[str, str], float]:
        forward = {(FORWARD, MASKED): TIMES_MASKED[dtype], (FORWARD, CAUSAL): TIMES_CAUSAL[dtype]}
        return forward | {(BOTH, MASKED): TIMES_MASKED_BOTH}

    both, masked = {"directions": (FORWARD, BOTH)}, among(subject, MASKED)
    long = [cpu_case(dtype, time=cpu_limits.LONG) for dtype in DTYPES]
    return [
        *(asked("segment", NAME, case, measure=long_sequence) for case in long),
        *(asked("segment", NAME, case, ratios=ratios(case.dtype), **both) for case in cpu_cases()),
        *cpu_limits.questions(NAME, subject, roofline.segment_attention, MASKED, CAUSAL),
        *(asked("others", f"{NAME}, steps of 32", cpu_case(dtype, step=32), masked, **both) for dtype in DTYPES),
    ]


def on_gpu() -> list[Question]:
    def asked(rank: int, operator: str, heads: tuple[int, int], aimed: bool = False, **fields) -> Question:
        case = Case(dtype=torch.bfloat16, heads=heads, device="cuda", **fields)
        return Question(
            NAME, operator, case, roofline.segment_attention, (FORWARD, BACKWARD), subject,
            aims=RATES if aimed else {}, ratios=TIMES_FLEX if aimed else {}, rank=rank, needs=25.0,
        )  # fmt: skip

    def steps(rank: int, heads: tuple[int, int], step: int) -> Question:
        return asked(rank, f"{NAME}, steps of {step}", heads, step in LARGE_STEPS, time=32_768, step=step)

    def causal(rank: int, heads: tuple[int, int]) -> Question:
        return asked(rank, f"{NAME}, plain causal", heads, time=8192, prompt=0, step=8192)

    return [
        *(steps(1, (12, 2), step) for step in LARGE_STEPS),
        *(steps(3, (12, 2), step) for step in (128, 96, 64, 32)),
        *(steps(3, (28, 4), step) for step in LARGE_STEPS),
        causal(3, (16, 16)),
        *(steps(4, (16, 16), step) for step in LARGE_STEPS),
        causal(4, (12, 2)),
    ]


def subject(case: Case) -> Subject:
    inputs, ids = case.qkv(), case.step_ids()
    found: dict[str, Callable[[], Peer]] = {}
    if case.prompt:
        found[FLEX] = partial(flex_peer, case, inputs, ids)
    if case.threads:
        if case.time <= LONGEST_MASKED:
            found = {MASKED: partial(masked_peer, inputs, ids)} | found
        if case.time <= LONGEST_CAUSAL:
            found[CAUSAL] = partial(causal_peer, case, inputs, ids, lambda: peers.sdpa)
    else:
        if case.prompt:
            found[TWO_CALLS] = partial(two_calls_peer, inputs, ids)
        for make, names in ((peers.sdpa_on_gpu, SDPA), (peers.flash_attention, FLASH_MODULES)):
            for name in names:
                shown = f"{name}, {PER_FLOP}" if case.prompt else name
                found[shown] = partial(causal_peer, case, inputs, ids, partial(make, name))
    return Subject(case, ops.segment_attention, reference.segment_attention, inputs, (ids,), found)


def masked_peer(inputs: tuple[Tensor, ...], ids: Tensor) -> Peer:
    build = partial(reference.segment_mask, ids, ids.shape[1])
    mask = build()
    return Peer({"": lambda: peers.sdpa(*inputs, mask)}, inputs, prepared={"boolean mask": build})


def flex_peer(case: Case, inputs: tuple[Tensor, ...], ids: Tensor) -> Peer:
    build, on_cpu = partial(peers.block_mask, ids), case.threads > 0
    blocks, attend = build(), peers.flex(tuple(x.shape for x in inputs), gradients=not on_cpu)
    run = partial(attend, *inputs, blocks)
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
    run = directed(FORWARD, ours.results)
    grown, results = peak_growth(run)
    more = {
        "peak memory growth": (grown, "MB"), "of it results": (nbytes(results), "MB"),
        "mask of SDPA (computed)": (peers.masked_sdpa_bytes(case.time, case.dtype), "MB"),
    }  # fmt: skip
    yield question.timed(FORWARD, instruments, instruments.time({OURS: run})[OURS], **more)


if __name__ == "__main__":
    suite.main_of_operator(questions)
