"""linear_attention and step_linear_attention on a GPU.

    python -m benchmarks.bench_linear_attention     this table alone; benchmarks.gpu runs them all

Without decay, with one that is constant or given a token, and with the correction at step ends.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import gpu_peers, peers, roofline
from benchmarks.contest import BOTH, FORWARD
from benchmarks.gpu_contest import Instruments, Peer, Question, Subject, contest, corner_of
from benchmarks.gpu_peers import FLA
from benchmarks.peers import CHUNKED
from benchmarks.rows import Row
from benchmarks.workload import ALPHA, Case
from statecore import ops, reference

PLAIN, CONSTANT, PER_TOKEN = "linear_attention", "linear_attention, constant decay", "linear_attention, decay a token"
STEPS, UNCORRECTED = "step_linear_attention", "linear_attention, without the correction"
FLA_UNCORRECTED = f"{FLA}, without the correction"
CHUNKS = (64, 128)  # of the eager peer
COMPILED = 30.0  # seconds that fla's kernels take to compile and choose their tiles, for a new number of heads or form


def questions() -> list[Question]:
    def case(batch: int, heads: tuple[int, int], time: int, width: int = 128) -> Case:
        return Case(time=time, dtype=torch.bfloat16, heads=heads, width=width, prompt=256, step=128, batch=batch)

    large, long = case(8, (16, 16), 8192), case(1, (12, 2), 32_768)
    return [
        _linear(1, PLAIN, large, {FORWARD: ("ms", 0.33e-3), BOTH: ("ms", 1.25e-3)}),
        _linear(1, PLAIN, long, {FORWARD: ("ms", 95e-6), BOTH: ("ms", 330e-6)}),
        _steps(2, replace(long, step=384)),
        _linear(2, CONSTANT, large),
        _linear(2, PER_TOKEN, large),
        _linear(3, PLAIN, case(1, (12, 2), 8192)),
        _linear(3, PLAIN, case(1, (28, 4), 32_768)),
        *(_steps(3, replace(long, step=step)) for step in (128, 64, 32)),
        _linear(4, PLAIN, case(8, (28, 4), 8192)),
        _linear(4, CONSTANT, long),
        _linear(4, PER_TOKEN, long),
        _steps(4, replace(long, heads=(28, 4), step=384)),
        _linear(5, PLAIN, case(2, (64, 64), 16_384)),
        _linear(5, PLAIN, case(8, (16, 16), 8192, width=64)),
    ]


def _linear(rank: int, operator: str, case: Case, aims: dict[str, tuple[str, float]] | None = None) -> Question:
    passes = roofline.linear_attention(case, decay=operator != PLAIN)
    return Question(operator, case, rank, timed(passes), linear, aims or {}, needs=COMPILED)


def _steps(rank: int, case: Case) -> Question:
    passes = roofline.linear_attention(case, states=3)
    return Question(f"{STEPS}, steps of {case.step}", case, rank, timed(passes), step_linear)


def timed(passes: dict[str, roofline.Passes]) -> dict[str, roofline.Passes]:
    """A backward alone would be timed without the work that it leaves to the forward."""
    return {direction: passes[direction] for direction in (FORWARD, BOTH)}


def linear(question: Question, instruments: Instruments) -> Iterator[Row]:
    case = replace(question.case, device=instruments.device)
    return contest(question, linear_subject(case, question.operator), instruments)


def linear_subject(case: Case, operator: str) -> Subject:
    inputs, cut = case.qkv(), corner_of(case)
    if operator == CONSTANT:  # the decays of RetNet (arXiv 2307.08621); no gradient is taken of them
        heads = torch.arange(case.heads[1], device=case.device)
        decay = torch.log1p(-(2.0 ** (-5 - heads % 8)))
        log_decay = decay.expand(case.batch, case.time, -1).contiguous()
        theirs = decay.repeat_interleave(case.heads[0] // case.heads[1])

        def by(log_decay: Tensor, form: Callable) -> Callable:
            return lambda q, k, v: form(q, k, v, log_decay)

        ours, corner = (by(x, ops.linear_attention) for x in (log_decay, cut(log_decay).contiguous()))
        definition = by(cut(log_decay).double(), reference.linear_attention)
    else:
        if operator == PER_TOKEN:
            shape = case.batch, case.time, case.heads[1]
            inputs = *inputs, (-0.1 * torch.rand(shape, device=case.device)).requires_grad_()
        theirs, ours, corner, definition = None, ops.linear_attention, ops.linear_attention, reference.linear_attention
    found = {FLA: lambda: fla_peer(case, inputs, theirs)}
    if operator == PLAIN:
        found[CHUNKED] = lambda: chunked_peer(case, inputs, lambda chunk: peers.sums_before(case.time // chunk))
    return Subject(ours, inputs, corner, definition, cut, found)


def fla_peer(case: Case, inputs: tuple[Tensor, ...], constant_decay: Tensor | None = None, apart: bool = False) -> Peer:
    """It has no groups: k, v and the decay are repeated for every query head beforehand, and their gradients are left
    unsummed. constant_decay: [Hq].
    """
    q, *rest = inputs
    group = case.heads[0] // case.heads[1]

    def expanded() -> list[Tensor]:
        return [x.detach().repeat_interleave(group, dim=2).requires_grad_() for x in rest]

    gpu_peers.fla_linear_attention(None)  # raises before anything is made where the package is missing
    prepared = {"k and v for every query head": expanded} if group > 1 else {}
    k, v, *decay = expanded() if group > 1 else rest
    attend = gpu_peers.fla_linear_attention(decay[0] if decay else constant_decay)
    return Peer({"": lambda: attend(q, k, v)}, (q, k, v, *decay), apart=apart, prepared=prepared)


def chunked_peer(case: Case, inputs: tuple[Tensor, ...], carry: Callable[[int], Tensor]) -> Peer:
    """The chunks that the lengths of prompt and steps are multiples of; carry: of a chunk length."""

    def variant(chunk: int) -> Callable[[], Tensor]:
        carried = carry(chunk).to(case.device)
        return lambda: peers.chunked_linear_attention(*inputs, chunk, carried)

    chunks = [chunk for chunk in CHUNKS if case.step % chunk == case.prompt % chunk == 0] or [case.step]
    return Peer({f"C = {chunk}": variant(chunk) for chunk in chunks}, inputs)


def step_linear(question: Question, instruments: Instruments) -> Iterator[Row]:
    case = replace(question.case, device=instruments.device)
    return contest(question, step_linear_subject(case), instruments)


def step_linear_subject(case: Case) -> Subject:
    inputs, cut, alpha = case.qkv(), corner_of(case), ALPHA.to(case.device)
    ids = case.step_ids()
    few = ids[-1:, : cut(inputs[0]).shape[1]]

    def by(form: Callable, ids: Tensor) -> Callable:
        return lambda q, k, v: form(q, k, v, ids, alpha)

    def carry(chunk: int) -> Tensor:
        return peers.corrected_sums_before(ALPHA, case.time, case.prompt, case.step, chunk)

    found = {
        CHUNKED: lambda: chunked_peer(case, inputs, carry),
        UNCORRECTED: lambda: Peer({"": lambda: ops.linear_attention(*inputs)[0]}, inputs, apart=True),
        FLA_UNCORRECTED: lambda: fla_peer(case, inputs, apart=True),
    }
    return Subject(
        by(ops.step_linear_attention, ids), inputs, by(ops.step_linear_attention, few),
        by(reference.step_linear_attention, few.cpu()), cut, found,
    )  # fmt: skip


if __name__ == "__main__":
    from benchmarks.gpu import only

    only("linear_attention")
