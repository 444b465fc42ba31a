"""mixed_attention: one operator against its two parts, gated and summed by element-wise passes.

`python -m benchmarks.bench_mixed_attention [--device cpu|cuda] [--only TEXT] [--quick]` prints its tables.

On the CPU the parts are torch's; on a GPU they are statecore's own, so the ratio is what one operator saves over two.
"""

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
    context, name = (case.step_ids(), ALPHA.to(case.device)), EAGER if case.threads else SEPARATE
    found = {name: partial(parts_peer, case, inputs, *context)}
    return Subject(case, ops.mixed_attention, reference.mixed_attention, inputs, context, found)


def parts_peer(case: Case, inputs: tuple[Tensor, ...], ids: Tensor, alpha: Tensor) -> Peer:
    """variants: of the chunk length on the CPU, on a GPU of how the element-wise part runs."""
    qkv, lin_qkv, gate = inputs[:3], inputs[3:6], inputs[6]
    if case.threads:
        mask, chunk = reference.segment_mask(ids, case.time), min(CHUNK, case.step)
        carry = peers.corrected_sums_before(alpha, case.time, case.prompt, case.step, chunk)
        parts = partial(peers.sdpa, *qkv, mask), partial(peers.chunked_linear_attention, *lin_qkv, chunk, carry)
        variants = {f"C = {chunk}": gate_and_sum}
    else:
        attend, remember = (
            partial(ops.segment_attention, *qkv, ids),
            partial(ops.step_linear_attention, *lin_qkv, ids, alpha),
        )
        parts = (lambda: attend()[0]), (lambda: remember()[0])
        variants = {"eager": gate_and_sum, "torch.compile": torch.compile(gate_and_sum, dynamic=False, fullgraph=True)}
    attended, remembered = parts
    return Peer({name: lambda by=by: by(attended(), gate, remembered()) for name, by in variants.items()}, inputs)


def gate_and_sum(attended: Tensor, gate: Tensor, remembered: Tensor) -> Tensor:
    return attended + gate.sigmoid() * remembered


if __name__ == "__main__":
    suite.main_of_operator(questions)
