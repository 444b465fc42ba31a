"""segment_attention on a GPU, among steps and as plain causal attention.

    python -m benchmarks.bench_segment_attention     this table alone; benchmarks.gpu runs them all

Work is what is visible, counted from the step ids.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks import gpu_peers, peers, roofline
from benchmarks.contest import BACKWARD, FORWARD
from benchmarks.gpu_contest import Instruments, Peer, Question, Subject, contest, corner_of
from benchmarks.gpu_peers import FLASH_MODULES, SDPA, TWO_CALLS
from benchmarks.peers import FLEX
from benchmarks.rows import Row
from benchmarks.workload import Case, causal_pairs, visible_pairs
from statecore import ops, reference

CAUSAL = "segment_attention, plain causal"
LARGE_STEPS = (256, 384, 512)  # with targets
RATES = {FORWARD: ("TFLOP/s", 450e12), BACKWARD: ("TFLOP/s", 320e12)}  # of visible work
TIMES_FLEX = dict.fromkeys(((FORWARD, FLEX), (BACKWARD, FLEX)), 2.0)


def questions() -> list[Question]:
    def steps(rank: int, heads: tuple[int, int], step: int) -> Question:
        aimed = step in LARGE_STEPS
        case = _case(heads, 32_768, prompt=256, step=step)
        return _question(rank, f"segment_attention, steps of {step}", case, RATES if aimed else {}, aimed)

    def causal(rank: int, heads: tuple[int, int], time: int) -> Question:
        return _question(rank, CAUSAL, _case(heads, time, prompt=0, step=time))

    return [
        *(steps(1, (12, 2), step) for step in LARGE_STEPS),
        *(steps(3, (12, 2), step) for step in (128, 96, 64, 32)),
        *(steps(3, (28, 4), step) for step in LARGE_STEPS),
        causal(3, (16, 16), 8192),
        *(steps(4, (16, 16), step) for step in LARGE_STEPS),
        causal(4, (12, 2), 8192),
    ]


def _case(heads: tuple[int, int], time: int, prompt: int, step: int) -> Case:
    return Case(time=time, dtype=torch.bfloat16, heads=heads, width=128, prompt=prompt, step=step)


def _question(
    rank: int, operator: str, case: Case, aims: dict[str, tuple[str, float]] | None = None, flex: bool = False
) -> Question:
    passes = roofline.segment_attention(case, visible_pairs(case.step_ids()))
    return Question(
        operator, case, rank, {direction: passes[direction] for direction in (FORWARD, BACKWARD)}, segment,
        aims or {}, TIMES_FLEX if flex else {}, needs=25.0,
    )  # fmt: skip


def segment(question: Question, instruments: Instruments) -> Iterator[Row]:
    case = replace(question.case, device=instruments.device)
    return contest(question, segment_subject(case), instruments)


def segment_subject(case: Case) -> Subject:
    inputs, cut, ids = case.qkv(), corner_of(case), case.step_ids()
    few = ids[-1:, : cut(inputs[0]).shape[1]]

    def by(form: Callable, ids: Tensor) -> Callable:
        return lambda q, k, v: form(q, k, v, ids)

    found = {}
    if case.prompt:
        found |= {FLEX: lambda: flex_peer(inputs, ids), TWO_CALLS: lambda: two_calls_peer(inputs, ids)}
    for makers, names in ((gpu_peers.sdpa, SDPA), (gpu_peers.flash_attention, FLASH_MODULES)):
        for name in names:
            shown = f"{name}, causal, per visible FLOP" if case.prompt else name
            found[shown] = functools.partial(causal_peer, inputs, ids, makers, name)
    return Subject(
        by(ops.segment_attention, ids), inputs, by(ops.segment_attention, few), by(reference.segment_attention, few),
        cut, found,
    )  # fmt: skip


def flex_peer(inputs: tuple[Tensor, ...], ids: Tensor) -> Peer:
    blocks = peers.block_mask(ids)
    attend = compiled_flex(tuple(x.shape for x in inputs))
    return Peer(
        {"": lambda: attend(*inputs, blocks)}, inputs, prepared={"create_block_mask": lambda: peers.block_mask(ids)}
    )


@functools.lru_cache(maxsize=1)
def compiled_flex(shapes: tuple[torch.Size, ...]) -> Callable[..., Tensor]:
    """Compiled once for all masks over the same shapes. A backward that is timed again and again keeps its buffers."""
    torch._functorch.config.donated_buffer = False
    return peers.flex(gradients=True)


def two_calls_peer(inputs: tuple[Tensor, ...], ids: Tensor) -> Peer:
    attend = gpu_peers.own_and_prompt(ids, gpu_peers.VarlenAttention())
    return Peer({"": lambda: attend(*inputs)}, inputs)


def causal_peer(inputs: tuple[Tensor, ...], ids: Tensor, make: Callable[[str], gpu_peers.Attention], name: str) -> Peer:
    """Full causal attention: the same where there are no steps, else more work."""
    attend, time = make(name), inputs[0].shape[1]
    visible = visible_pairs(ids) / causal_pairs(time)
    return Peer({"": lambda: attend(*inputs)}, inputs, work=visible, apart=visible < 1)


if __name__ == "__main__":
    from benchmarks.gpu import only

    only("segment_attention")
