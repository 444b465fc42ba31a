"""mixed_attention on a GPU: gate and sum in its epilogue against two operators and element-wise passes.

    python -m benchmarks.bench_mixed_attention     this table alone; benchmarks.gpu runs them all

The peer is statecore's own: what one operator saves over two.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.contest import BOTH, FORWARD
from benchmarks.gpu_contest import Instruments, Peer, Question, Subject, contest, corner_of
from benchmarks.rows import Row
from benchmarks.workload import ALPHA, Case, visible_pairs
from statecore import ops, reference

SEPARATE = "the two operators, then gate and sum"


def questions() -> list[Question]:
    return [_question(2, (12, 2), 384), _question(3, (28, 4), 384), _question(4, (12, 2), 64)]


def _question(rank: int, heads: tuple[int, int], step: int) -> Question:
    case = Case(time=32_768, dtype=torch.bfloat16, heads=heads, width=128, prompt=256, step=step)
    passes = roofline.mixed_attention(case, visible_pairs(case.step_ids()))
    directions = {direction: passes[direction] for direction in (FORWARD, BOTH)}
    return Question(f"mixed_attention, steps of {step}", case, rank, directions, mixed)


def mixed(question: Question, instruments: Instruments) -> Iterator[Row]:
    return contest(question, mixed_subject(replace(question.case, device=instruments.device)), instruments)


def mixed_subject(case: Case) -> Subject:
    gate = case.random(case.heads[0], case.width)
    inputs, cut = (*case.qkv(), *case.qkv(), gate), corner_of(case)
    ids, alpha = case.step_ids(), ALPHA.to(case.device)
    few = ids[-1:, : cut(gate).shape[1]]

    def by(form: Callable, ids: Tensor) -> Callable:
        return lambda *tensors: form(*tensors, ids, alpha)

    return Subject(
        by(ops.mixed_attention, ids), inputs, by(ops.mixed_attention, few), by(reference.mixed_attention, few), cut,
        {SEPARATE: lambda: separate_peer(inputs, ids, alpha)},
    )  # fmt: skip


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
    from benchmarks.gpu import only

    only("mixed_attention")
