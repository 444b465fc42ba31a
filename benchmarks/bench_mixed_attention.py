"""mixed_attention: one operator against its two parts, gated and summed by element-wise passes.

    python -m benchmarks.bench_mixed_attention [--device cpu|cuda] [--only TEXT] [--quick]

On the CPU the parts are torch's; on a GPU they are statecore's own, so the ratio is what one operator saves over two.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers, roofline, suite
from benchmarks.contest import Peer, Question, Subject
from benchmarks.peers import CHUNKED, MASKED
from benchmarks.roofline import BOTH, FORWARD
from benchmarks.workload import ALPHA, CPU_TIME, DTYPES, Case, cpu_case
from statecore import ops, reference

NAME = "mixed_attention"
SEPARATE = "the two operators, then gate and sum"
EAGER, CHUNK = f"{MASKED} + gate * {CHUNKED}", 64


def questions(device: str) -> list[Question]:
    def asked(section: str, case: Case, operator: str = NAME, **fields) -> Question:
        return Question(section, operator, case, roofline.mixed_attention, (FORWARD, BOTH), subject, **fields)

    def on_gpu(rank: int, heads: tuple[int, int], step: int) -> Question:
        case = Case(dtype=torch.bfloat16, heads=heads, time=32_768, step=step, device="cuda")
        return asked(NAME, case, f"{NAME}, steps of {step}", rank=rank)

    if device == "cpu":
        return [asked("others", cpu_case(dtype, time=time)) for dtype in DTYPES for time in (512, CPU_TIME)]
    return [on_gpu(2, (12, 2), 384), on_gpu(3, (28, 4), 384), on_gpu(4, (12, 2), 64)]


def subject(case: Case) -> Subject:
    inputs = *case.qkv(), *case.qkv(), case.random(case.heads[0], case.width)
    ids, alpha = case.step_ids(), ALPHA.to(case.device)
    found = {EAGER: lambda: eager_peer(case, inputs, ids)} if case.threads else {}
    if not case.threads:
        found[SEPARATE] = partial(separate_peer, inputs, ids, alpha)
    return Subject(case, ops.mixed_attention, reference.mixed_attention, inputs, (ids, alpha), found)


def eager_peer(case: Case, inputs: tuple[Tensor, ...], ids: Tensor) -> Peer:
    q, k, v, lin_q, lin_k, lin_v, gate = inputs
    mask, chunk = reference.segment_mask(ids, case.time), min(CHUNK, case.step)
    carry = peers.corrected_sums_before(ALPHA, case.time, case.prompt, case.step, chunk)

    def run() -> Tensor:
        remembered = peers.chunked_linear_attention(lin_q, lin_k, lin_v, chunk, carry)
        return gate_and_sum(peers.sdpa(q, k, v, mask), gate, remembered)

    return Peer({f"C = {chunk}": run}, inputs)


def separate_peer(inputs: tuple[Tensor, ...], ids: Tensor, alpha: Tensor) -> Peer:
    """variants: how the element-wise part runs."""
    q, k, v, lin_q, lin_k, lin_v, gate = inputs

    def variant(gated: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            attended, _ = ops.segment_attention(q, k, v, ids)
            remembered, _ = ops.step_linear_attention(lin_q, lin_k, lin_v, ids, alpha)
            return gated(attended, gate, remembered)

        return run

    compiled = torch.compile(gate_and_sum, dynamic=False, fullgraph=True)
    return Peer({"eager": variant(gate_and_sum), "torch.compile": variant(compiled)}, inputs)


def gate_and_sum(attended: Tensor, gate: Tensor, remembered: Tensor) -> Tensor:
    return attended + gate.sigmoid() * remembered


if __name__ == "__main__":
    suite.main_of_operator(questions)
