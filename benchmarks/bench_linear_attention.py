"""linear_attention without decay, with a constant one and with one per token, and step_linear_attention.

`python -m benchmarks.bench_linear_attention [--device cpu|cuda] [--only TEXT] [--quick]` prints its tables.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from benchmarks import cpu_limits, peers, roofline, suite
from benchmarks.contest import Peer, Question, Subject
from benchmarks.peers import CHUNKED, COMPILED, FLA, SCAN
from benchmarks.roofline import BACKWARD, BOTH, FORWARD
from benchmarks.timing import seconds_per_call
from benchmarks.workload import ALPHA, CPU_TIME, DTYPES, Case, cpu_case, cpu_cases
from statecore import ops, reference

NAME, STEPS = "linear_attention", "step_linear_attention"
CONSTANT, PER_TOKEN = f"{NAME}, constant decay", f"{NAME}, decay per token"
UNCORRECTED, FLA_UNCORRECTED = f"{NAME}, without the correction", f"{FLA}, without the correction"
CPU_CHUNKS, GPU_CHUNKS = (32, 64, 128), (64, 128)  # of the eager peer
COMPILED_CHUNKS = SCAN_CHUNKS = (64, 128)
SCAN_HEADS, SCAN_WIDTH = 24, 64  # value heads and their width
FLA_COMPILES = 30.0  # seconds for a new number of heads or form

# Targets: of the CPU
TIMES_CHUNKED, TIMES_CHUNKED_BACKWARD = {torch.float32: 2.3, torch.bfloat16: 3.5}, 2.5


def questions(device: str) -> list[Question]:
    return on_cpu() if device == "cpu" else on_gpu()


def on_cpu() -> list[Question]:
    def ratios(dtype: torch.dtype) -> dict[tuple[str, str], float]:
        backward = dict.fromkeys(((BOTH, CHUNKED), (BACKWARD, CHUNKED)), TIMES_CHUNKED_BACKWARD)
        return {(FORWARD, CHUNKED): TIMES_CHUNKED[dtype]} | backward

    def plain(case: Case) -> Question:
        ways = FORWARD, BOTH, BACKWARD
        return Question("linear", NAME, case, roofline.linear_attention, ways, subject, ratios=ratios(case.dtype))

    def steps(case: Case, operator: str = STEPS) -> Question:
        return Question("others", operator, case, roofline.linear_attention, (FORWARD, BOTH), step_subject)

    scanned = cpu_case(torch.float32, heads=(1, 1, SCAN_HEADS))
    return [
        *map(plain, cpu_cases()),
        Question("linear", f"{NAME}, decay", scanned, subject=scan_subject),
        *cpu_limits.questions(NAME, subject, roofline.linear_attention_reads_and_updates, CHUNKED),
        *(steps(cpu_case(dtype, time=time)) for dtype in DTYPES for time in (512, CPU_TIME)),
        *(steps(cpu_case(dtype, step=32), f"{STEPS}, steps of 32") for dtype in DTYPES),
    ]


def on_gpu() -> list[Question]:
    def asked(rank: int, operator: str, case: Case, aims=None) -> Question:
        work, make = partial(roofline.linear_attention, decay=operator != NAME), partial(subject, operator=operator)
        fields = {"aims": aims or {}, "rank": rank, "needs": FLA_COMPILES}
        return Question(NAME, operator, case, work, (FORWARD, BOTH), make, **fields)

    def steps(rank: int, case: Case) -> Question:
        work, operator = partial(roofline.linear_attention, states=3), f"{STEPS}, steps of {case.step}"
        return Question(NAME, operator, case, work, (FORWARD, BOTH), step_subject, rank=rank)

    def of(batch: int, heads: tuple[int, int], time: int, step: int = 128, width: int = 128) -> Case:
        return Case(torch.bfloat16, time, heads, width, step=step, batch=batch, device="cuda")

    large, long = of(8, (16, 16), 8192), of(1, (12, 2), 32_768)
    return [
        asked(1, NAME, large, {FORWARD: ("ms", 0.33e-3), BOTH: ("ms", 1.25e-3)}),
        asked(1, NAME, long, {FORWARD: ("ms", 95e-6), BOTH: ("ms", 330e-6)}),
        steps(2, of(1, (12, 2), 32_768, 384)),
        asked(2, CONSTANT, large),
        asked(2, PER_TOKEN, large),
        asked(3, NAME, of(1, (12, 2), 8192)),
        asked(3, NAME, of(1, (28, 4), 32_768)),
        *(steps(3, of(1, (12, 2), 32_768, step)) for step in (128, 64, 32)),
        asked(4, NAME, of(8, (28, 4), 8192)),
        asked(4, CONSTANT, long),
        asked(4, PER_TOKEN, long),
        steps(4, of(1, (28, 4), 32_768, 384)),
        asked(5, NAME, of(2, (64, 64), 16_384)),
        asked(5, NAME, of(8, (16, 16), 8192, width=64)),
    ]


def subject(case: Case, operator: str = NAME) -> Subject:
    inputs, context, constant = case.qkv(), (), None
    if operator == CONSTANT:  # the decays of RetNet (arXiv 2307.08621); no gradient is taken of them
        decay = torch.log1p(-(2.0 ** (-5 - torch.arange(case.heads[1], device=case.device) % 8)))
        context = (decay.expand(case.batch, case.time, -1).contiguous(),)
        constant = decay.repeat_interleave(case.heads[0] // case.heads[1])
    elif operator == PER_TOKEN:
        decay = -0.1 * torch.rand(case.batch, case.time, case.heads[1], device=case.device)
        inputs = *inputs, decay.requires_grad_()
    found = {} if case.threads else {FLA: partial(fla_peer, case, inputs, constant)}
    if operator == NAME:
        found[CHUNKED] = lambda: chunked_peer(case, inputs, plain_carry(case))
        if case.threads:
            found[COMPILED] = lambda: compiled_peer(case, inputs)
    return Subject(case, ops.linear_attention, reference.linear_attention, inputs, context, found)


def step_subject(case: Case) -> Subject:
    inputs, context = case.qkv(), (case.step_ids(), ALPHA.to(case.device))
    carry = partial(peers.corrected_sums_before, ALPHA, case.time, case.prompt, case.step)
    found = {CHUNKED: lambda: chunked_peer(case, inputs, carry)}
    if not case.threads:
        found[UNCORRECTED] = lambda: Peer({"": lambda: ops.linear_attention(*inputs)[0]}, inputs, apart=True)
        found[FLA_UNCORRECTED] = lambda: replace(fla_peer(case, inputs), apart=True)
    return Subject(case, ops.step_linear_attention, reference.step_linear_attention, inputs, context, found)


def scan_subject(case: Case) -> Subject:
    """Grouped values with decay: one query and key head, many value heads. Both sides get x, dt, decay, B and C."""
    heads = case.heads[-1]
    decay, dt = -torch.arange(1.0, heads + 1), torch.rand(case.batch, case.time, heads) * 0.1
    c, b, x = (case.random(*shape).detach() for shape in ((1, case.width), (1, case.width), (heads, SCAN_WIDTH)))

    def by(operator: Callable) -> Callable:
        return lambda c, b, x, dt: operator(c, b, (x * dt[..., None]).to(x.dtype), dt * decay, scale=1.0)

    def peer() -> Peer:
        """It takes seconds and gigabytes: its chunk length is chosen on a quarter of the tokens."""
        scan = import_module("transformers.models.mamba2.modeling_mamba2").mamba2_chunk_scan
        trial = [some[:, : case.time // 4] for some in (x, dt, b, c)]
        trials = {chunk: partial(scan, *trial[:2], decay, *trial[2:], chunk) for chunk in SCAN_CHUNKS}
        best = min(SCAN_CHUNKS, key=lambda chunk: seconds_per_call(trials[chunk]))
        return Peer({f"C = {best}": partial(scan, x, dt, decay, b, c, best)})

    return Subject(case, by(ops.linear_attention), by(reference.linear_attention), (c, b, x, dt), peers={SCAN: peer})


def fla_peer(case: Case, inputs: tuple[Tensor, ...], constant_decay: Tensor | None = None) -> Peer:
    """It has no groups: k, v and the decay are repeated for every query head beforehand, and their gradients are left
    unsummed. constant_decay: [Hq].
    """
    q, *rest = inputs
    group = case.heads[0] // case.heads[1]

    def expanded() -> list[Tensor]:
        return [x.detach().repeat_interleave(group, dim=2).requires_grad_() for x in rest]

    peers.fla_linear_attention(None)  # raises before anything is made where the package is missing
    prepared = {"k and v for every query head": expanded} if group > 1 else {}
    k, v, *decay = expanded() if group > 1 else rest
    attend = peers.fla_linear_attention(decay[0] if decay else constant_decay)
    return Peer({"": lambda: attend(q, k, v)}, (q, k, v, *decay), prepared=prepared)


def chunked_peer(case: Case, inputs: tuple[Tensor, ...], carry: Callable[[int], Tensor]) -> Peer:
    """At the chunk lengths that divide prompt and steps. carry: of a chunk length."""
    chunks = CPU_CHUNKS if case.threads else GPU_CHUNKS
    chunks = [chunk for chunk in chunks if case.step % chunk == case.prompt % chunk == 0] or [case.step]
    runs = {}
    if case.threads and case.time > CPU_TIME:  # only here a cumulative sum may be faster than a product
        chunks = [max(chunks)]
        runs["cumulative sum"] = partial(peers.chunked_linear_attention, *inputs, *chunks)
    for chunk in chunks:
        runs[f"C = {chunk}"] = partial(peers.chunked_linear_attention, *inputs, chunk, carry(chunk).to(case.device))
    return Peer(runs, inputs)


def compiled_peer(case: Case, inputs: tuple[Tensor, ...]) -> Peer:
    torch.compiler.reset()
    compiled, carry = torch.compile(peers.chunked_linear_attention, dynamic=False, fullgraph=True), plain_carry(case)
    runs = {f"C = {chunk}": partial(compiled, *inputs, chunk, carry(chunk)) for chunk in COMPILED_CHUNKS}
    return Peer(runs, inputs, forward_only=True)


def plain_carry(case: Case) -> Callable[[int], Tensor]:
    return lambda chunk: peers.sums_before(case.time // chunk)


if __name__ == "__main__":
    suite.main_of_operator(questions)
