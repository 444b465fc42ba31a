"""What is measured: one function a section of the page, each yielding its rows as they come."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import cpu_model, peers
from benchmarks.contest import BACKWARD, BOTH, FORWARD, Contest, attempt, without_gradients
from benchmarks.machine import last_level_cache
from benchmarks.memory import copies, peak_growth
from benchmarks.peak import NoPeak, peak
from benchmarks.peers import CHUNKED, EAGER_UPDATE, FLEX
from benchmarks.rows import (
    Bandwidth,
    Comparison,
    Growth,
    HeadState,
    LongSequence,
    Point,
    Preparation,
    Row,
    Share,
)
from benchmarks.timing import interleaved, seconds_a_call
from benchmarks.workload import (
    ALPHA,
    Case,
    Plan,
    attention_flops,
    causal_pairs,
    linear_flops,
    visible_pairs,
)
from statecore import ops
from statecore.reference import segment_mask

MASKED, CAUSAL = "SDPA with the mask", "SDPA causal, per visible FLOP"
COMPILED, SCAN = "torch.compile of chunked", "Mamba-2's chunk scan in transformers"
FASTER = {torch.float32: 12.0, torch.bfloat16: 20.0}  # times SDPA with the mask
PER_FLOP = {torch.float32: 1.8, torch.bfloat16: 3.0}  # times SDPA causal, per visible FLOP
BOTH_WAYS = 10.0  # times SDPA with the mask, forward + backward
LINEAR = {torch.float32: 2.3, torch.bfloat16: 3.5}  # times eager chunked
LINEAR_GRADIENT = 2.5  # times eager chunked, with backward
OF_PEAK = {torch.float32: 0.45, torch.bfloat16: 0.35}
OF_COPY = 0.8  # state_update: share of copy bandwidth
A_HEAD_STATE = 2e-6  # state_update: seconds in cache
TINY = 8  # width of states that are no work
GROWTH = 8.8  # for eight times the length


# ---- segment attention


def segment(plan: Plan) -> Iterator[Row]:
    """Against the mask, causal attention and FlexAttention; then a length where a mask is out of the question."""
    for dtype in plan.dtypes:
        yield long_segment(plan.case(dtype, time=plan.long))
    for case in plan.cases():
        yield from segment_contest(case)


def segment_contest(case: Case) -> Iterator[Row]:
    torch.set_num_threads(case.threads)
    q, k, v = case.qkv()
    ids = case.step_ids()
    mask, blocks = segment_mask(ids, case.time), peers.block_mask(ids)
    builds = {"boolean mask": lambda: segment_mask(ids, case.time), "create_block_mask": lambda: peers.block_mask(ids)}
    for what, build in builds.items():
        seconds = seconds_a_call(build)
        yield Preparation(operator="segment_attention", what=what, seconds=seconds, **case.labels())
    flex = peers.flex()
    runs = {
        MASKED: lambda: peers.sdpa(q, k, v, mask),
        CAUSAL: lambda: peers.sdpa(q, k, v),
        FLEX: lambda: flex(q, k, v, blocks),
    }
    failure = attempt(runs[FLEX])
    contest = Contest(
        "segment_attention", case, lambda: ops.segment_attention(q, k, v, ids)[0], (q, k, v),
        {peer: {"": run} for peer, run in runs.items() if not (failure and peer == FLEX)},
        failures={FLEX: failure} if failure else {},
        work={CAUSAL: visible_pairs(ids) / causal_pairs(case.time)}, apart=frozenset([CAUSAL]),
    )  # fmt: skip
    forward = {MASKED: FASTER[case.dtype], CAUSAL: PER_FLOP[case.dtype], FLEX: None}
    yield from contest.rows({FORWARD: forward, BOTH: {MASKED: BOTH_WAYS}})


def long_segment(case: Case) -> LongSequence:
    torch.set_num_threads(case.threads)
    q, k, v = case.qkv()
    ids = case.step_ids()
    run = without_gradients(lambda: ops.segment_attention(q, k, v, ids))
    extra, results = peak_growth(run)
    return LongSequence(
        operator="segment_attention", seconds=interleaved({"ours": run})["ours"].median, extra=extra,
        results=sum(x.nbytes for x in results), peer_needs=peers.masked_sdpa_bytes(case.time, case.dtype),
        **case.labels(),
    )  # fmt: skip


# ---- linear attention


def linear(plan: Plan) -> Iterator[Row]:
    """Against eager and compiled chunked forms; with decay against Mamba-2's scan."""
    for case in plan.cases():
        yield from linear_contest(case, plan)
    yield from scan_rows(plan.case(torch.float32), plan)


def linear_contest(case: Case, plan: Plan) -> Iterator[Comparison]:
    torch.set_num_threads(case.threads)
    q, k, v = case.qkv()
    torch.compiler.reset()
    compiled = torch.compile(peers.chunked_linear_attention, dynamic=False, fullgraph=True)
    compiled_runs = {
        name: run
        for chunk in plan.compiled_chunks
        for name, run in chunked_variants(q, k, v, (chunk,), compiled).items()
    }
    failures = [failure for run in compiled_runs.values() if (failure := attempt(run))]
    theirs = {CHUNKED: chunked_variants(q, k, v, plan.chunks)}
    if not failures:
        theirs[COMPILED] = compiled_runs
    contest = Contest(
        "linear_attention", case, lambda: ops.linear_attention(q, k, v)[0], (q, k, v), theirs,
        failures={COMPILED: failures[0]} if failures else {},
    )  # fmt: skip
    yield from contest.rows(
        {
            FORWARD: {CHUNKED: LINEAR[case.dtype], COMPILED: None},
            BOTH: {CHUNKED: LINEAR_GRADIENT},
            BACKWARD: {CHUNKED: LINEAR_GRADIENT},
        }
    )


def chunk_name(chunk: int) -> str:
    return f"C = {chunk}"


def chunked_variants(
    q: Tensor, k: Tensor, v: Tensor, chunks: tuple[int, ...], form: Callable = peers.chunked_linear_attention
) -> dict[str, Callable[[], Tensor]]:
    """{"C = 32": run, ...} with the carry by a matrix product, which is the faster one up to a few hundred chunks."""

    def variant(chunk: int) -> Callable[[], Tensor]:
        carry = peers.sums_before(q.shape[1] // chunk)
        return lambda: form(q, k, v, chunk, carry)

    return {chunk_name(chunk): variant(chunk) for chunk in chunks}


def scan_rows(case: Case, plan: Plan) -> Iterator[Comparison]:
    """The scan takes seconds and gigabytes: its chunk length is chosen on a quarter of the tokens."""
    torch.set_num_threads(case.threads)
    (trial,) = scan_contest(replace(case, time=case.time // 4), plan, plan.scan_chunks).rows({FORWARD: {SCAN: None}})
    best = next(chunk for chunk in plan.scan_chunks if chunk_name(chunk) == trial.variant)
    for row in scan_contest(case, plan, (best,)).rows({FORWARD: {SCAN: None}}):
        yield replace(row, heads=f"1/1/{plan.scan_heads}", tried=trial.tried)


def scan_contest(case: Case, plan: Plan, chunks: tuple[int, ...]) -> Contest:
    """Grouped values with decay: one query and key head, many value heads. Both sides get x, dt, decay, B and C."""
    x = torch.randn(1, case.time, plan.scan_heads, plan.scan_width).to(case.dtype)
    dt = torch.rand(1, case.time, plan.scan_heads) * 0.1
    decay = -torch.arange(1.0, plan.scan_heads + 1)
    b, c = (torch.randn(1, case.time, 1, case.width).to(case.dtype) for _ in range(2))

    def ours() -> Tensor:
        return ops.linear_attention(c, b, (x * dt[..., None]).to(x.dtype), dt * decay, scale=1.0)[0]

    def theirs(chunk: int) -> Callable[[], Tensor]:
        return lambda: peers.chunked_mamba_scan(x, dt, decay, b, c, chunk)

    variants = {chunk_name(chunk): theirs(chunk) for chunk in chunks}
    return Contest("linear_attention, decay", case, ours, (), {SCAN: variants})


# ---- share of the machine's peak


def shares(plan: Plan) -> Iterator[Share]:
    for case in plan.cases():
        torch.set_num_threads(case.threads)
        q, k, v = case.qkv()
        ids = case.step_ids()
        square = torch.randn(plan.matmul, plan.matmul).to(case.dtype)
        runs = {
            "segment_attention": lambda: ops.segment_attention(q, k, v, ids),  # noqa: B023
            "linear_attention": lambda: ops.linear_attention(q, k, v),  # noqa: B023
            "matmul": lambda: square @ square,  # noqa: B023
        }
        work = {
            "segment_attention": attention_flops(visible_pairs(ids), case),
            "linear_attention": linear_flops(case),
        }
        timings = interleaved({name: without_gradients(run) for name, run in runs.items()})
        for operator, flops in work.items():
            yield share(case, operator, flops, timings[operator], 2 * plan.matmul**3 / timings["matmul"].median)


def share(case: Case, operator: str, flops: int, timing, matmul: float) -> Share:
    labels = case.labels()
    try:
        top, failure = peak(labels["dtype"], case.threads), ""
    except NoPeak as reason:
        top, failure = 0.0, str(reason)
    return Share(
        operator=operator, target=OF_PEAK[case.dtype], failure=failure, ours=flops / timing.median,
        spread=timing.spread, peak=top, matmul=matmul, **labels,
    )  # fmt: skip


# ---- state_update


def update(plan: Plan) -> Iterator[Row]:
    cache = last_level_cache()
    a_state = plan.width**2 * 4
    for case in plan.cases():
        keys = case.heads[1]
        yield update_bandwidth(case, rows=int(plan.caches_in_pool * cache) // (a_state * keys))
        yield head_state(case, "fits in the last-level cache", rows=max(1, cache // 4 // (a_state * keys)))
        for rows in (1, 64):
            yield from update_contest(case, rows)
    for dtype in plan.dtypes:
        yield head_state(plan.case(dtype, heads=(1, 1), threads=1), "one head-state", rows=1)


def update_inputs(case: Case, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """states [1, P, Hk, D, D], q [P, Hq, D], k and v [P, Hk, D]; written once, so that every page exists."""
    queries, keys = case.heads
    states = torch.zeros(1, rows, keys, case.width, case.width).fill_(0.5)
    q, k, v = (torch.randn(rows, heads, case.width).to(case.dtype) * 0.01 for heads in (queries, keys, keys))
    return states, q, k, v


def update_bandwidth(case: Case, rows: int) -> Bandwidth:
    torch.set_num_threads(case.threads)
    states, q, k, v = update_inputs(case, rows)
    timings = interleaved({"ours": lambda: ops.state_update(states, q, k, v), **copies(states.nbytes)})
    ours, moved = timings.pop("ours"), 2 * states.nbytes
    return Bandwidth(
        operator="state_update", target=OF_COPY, pool=states.nbytes, ours=moved / ours.median, spread=ours.spread,
        copy=moved / min(timing.median for timing in timings.values()), **case.labels() | {"time": rows},
    )  # fmt: skip


def head_state(case: Case, pool: str, rows: int) -> HeadState:
    torch.set_num_threads(case.threads)
    inputs, tiny = update_inputs(case, rows), update_inputs(replace(case, width=TINY), rows)
    timings = interleaved({"ours": lambda: ops.state_update(*inputs), "idle": lambda: ops.state_update(*tiny)})
    return HeadState(
        operator="state_update", target=A_HEAD_STATE, pool=pool, head_states=rows * case.heads[1],
        seconds=timings["ours"].median, spread=timings["ours"].spread, idle=timings["idle"].median,
        **case.labels() | {"time": rows},
    )  # fmt: skip


def update_contest(case: Case, rows: int) -> Iterator[Comparison]:
    states, q, k, v = update_inputs(case, rows)
    mine, theirs = states, states.clone()
    contest = Contest(
        "state_update", case, lambda: ops.state_update(mine, q, k, v), (),
        {EAGER_UPDATE: {"": lambda: peers.eager_state_update(theirs, q, k, v)}},
    )  # fmt: skip
    for row in contest.rows({FORWARD: {EAGER_UPDATE: None}}):
        yield replace(row, time=rows, direction="in place")


# ---- growth with the length


def growth(plan: Plan) -> Iterator[Row]:
    """Linear time, and where the peers stop: points for the picture on all threads, then the ratios."""
    for time in plan.lengths:
        for dtype in plan.dtypes:
            yield from points(plan.case(dtype, time=time), plan)
    for threads in plan.threads:
        for dtype in plan.dtypes:
            yield from growth_ratios(plan, dtype, threads)


def points(case: Case, plan: Plan) -> Iterator[Point]:
    torch.set_num_threads(case.threads)
    q, k, v = case.qkv()
    ids = case.step_ids()
    attention = {"statecore": lambda: ops.segment_attention(q, k, v, ids)[0]}
    if case.time <= plan.longest_masked:
        mask = segment_mask(ids, case.time)
        attention[MASKED] = lambda: peers.sdpa(q, k, v, mask)
    if case.time <= plan.longest_causal:
        attention["SDPA causal"] = lambda: peers.sdpa(q, k, v)
    chunk = max(plan.chunks)
    chunked = {
        "statecore": lambda: ops.linear_attention(q, k, v)[0],
        **chunked_variants(q, k, v, plan.chunks if case.time <= plan.time else (chunk,)),
        "cumulative sum": lambda: peers.chunked_linear_attention(q, k, v, chunk),
    }
    for operator, runs in (("segment_attention", attention), ("linear_attention", chunked)):
        timings = interleaved({name: without_gradients(run) for name, run in runs.items()})
        seconds = {name: timing.median for name, timing in timings.items()}
        if operator == "linear_attention":
            seconds = {"statecore": seconds.pop("statecore"), CHUNKED: min(seconds.values())}
        for side, value in seconds.items():
            yield Point(operator=operator, side=side, seconds=value, **case.labels())


def growth_ratios(plan: Plan, dtype: torch.dtype, threads: int) -> Iterator[Growth]:
    torch.set_num_threads(threads)
    cases = {time: plan.case(dtype, time=time, threads=threads) for time in (plan.time, plan.long)}

    def segment_run(case: Case) -> Callable:
        (q, k, v), ids = case.qkv(), case.step_ids()
        return without_gradients(lambda: ops.segment_attention(q, k, v, ids))

    def linear_run(case: Case) -> Callable:
        q, k, v = case.qkv()
        return without_gradients(lambda: ops.linear_attention(q, k, v))

    for operator, make in (("segment_attention", segment_run), ("linear_attention", linear_run)):
        timings = interleaved({time: make(case) for time, case in cases.items()})
        yield Growth(
            operator=operator, target=GROWTH * plan.long / plan.time / 8, short=plan.time,
            short_s=timings[plan.time].median, long_s=timings[plan.long].median, spread=timings[plan.long].spread,
            **cases[plan.long].labels(),
        )  # fmt: skip


# ---- the other operators, and short steps


def others(plan: Plan) -> Iterator[Comparison]:
    for dtype in plan.dtypes:
        for time in plan.other_lengths:
            case = plan.case(dtype, time=time)
            yield from step_linear_contest(case, plan)
            yield from mixed_contest(case)
        short = plan.case(dtype, step=plan.short_step)
        yield from step_linear_contest(short, plan, f"step_linear_attention, steps of {short.step}")
        yield from short_segment_contest(short)


def step_linear_variants(
    q: Tensor, k: Tensor, v: Tensor, case: Case, chunks: tuple[int, ...]
) -> dict[str, Callable[[], Tensor]]:
    def variant(chunk: int) -> Callable[[], Tensor]:
        carry = peers.corrected_sums_before(ALPHA, case.time, case.prompt, case.step, chunk)
        return lambda: peers.chunked_linear_attention(q, k, v, chunk, carry)

    return {chunk_name(chunk): variant(chunk) for chunk in chunks if case.step % chunk == case.prompt % chunk == 0}


def step_linear_contest(case: Case, plan: Plan, name: str = "step_linear_attention") -> Iterator[Comparison]:
    torch.set_num_threads(case.threads)
    q, k, v = case.qkv()
    ids = case.step_ids()
    contest = Contest(
        name, case, lambda: ops.step_linear_attention(q, k, v, ids, ALPHA)[0], (q, k, v),
        {CHUNKED: step_linear_variants(q, k, v, case, plan.chunks)},
    )  # fmt: skip
    yield from contest.rows({FORWARD: {CHUNKED: None}, BOTH: {CHUNKED: None}})


def mixed_contest(case: Case) -> Iterator[Comparison]:
    torch.set_num_threads(case.threads)
    q, k, v = case.qkv()
    gate = torch.randn_like(q).requires_grad_()
    ids, peer = case.step_ids(), f"{MASKED} + gate * {CHUNKED}"
    mask = segment_mask(ids, case.time)
    ((variant, memory),) = step_linear_variants(q, k, v, case, (min(64, case.step),)).items()
    contest = Contest(
        "mixed_attention", case, lambda: ops.mixed_attention(q, k, v, q, k, v, gate, ids, ALPHA)[0], (q, k, v, gate),
        {peer: {variant: lambda: peers.sdpa(q, k, v, mask) + gate.sigmoid() * memory()}},
    )  # fmt: skip
    yield from contest.rows({FORWARD: {peer: None}, BOTH: {peer: None}})


def short_segment_contest(case: Case) -> Iterator[Comparison]:
    torch.set_num_threads(case.threads)
    q, k, v = case.qkv()
    ids = case.step_ids()
    mask = segment_mask(ids, case.time)
    contest = Contest(
        f"segment_attention, steps of {case.step}", case, lambda: ops.segment_attention(q, k, v, ids)[0], (q, k, v),
        {MASKED: {"": lambda: peers.sdpa(q, k, v, mask)}},
    )  # fmt: skip
    yield from contest.rows({FORWARD: {MASKED: None}, BOTH: {MASKED: None}})


def model(plan: Plan) -> Iterator[Row]:
    yield from cpu_model.phases(plan.model, max(plan.threads))


SECTIONS = {
    "segment": segment,
    "linear": linear,
    "peak": shares,
    "update": update,
    "growth": growth,
    "model": model,
    "others": others,
}
