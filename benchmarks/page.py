"""The page of results, made of the record alone: what was asked, what was found, which targets are reached."""

from itertools import groupby

from benchmarks.markdown import UNITS, Column, giga, mb, ms, percent, table, us
from benchmarks.rows import (
    Bandwidth,
    Ceiling,
    Comparison,
    Growth,
    HeadState,
    Kernel,
    Launches,
    LongSequence,
    Phase,
    Point,
    Preparation,
    Row,
    Share,
    from_json,
)
from benchmarks.workload import CHUNK, chunked_flops

CASE: list[Column] = [
    ("dtype", lambda r: r.dtype),
    ("B", lambda r: str(r.batch) if r.batch != 1 else ""),
    ("T", lambda r: str(r.time)),
    ("heads", lambda r: r.heads),
    ("D", lambda r: str(r.width)),
    ("threads", lambda r: str(r.threads or "")),
]
ROWS_CASE = [("rows", column) if name == "T" else (name, column) for name, column in CASE]
VERDICT: list[Column] = [("target", lambda r: target(r)), ("", lambda r: verdict(r))]

TITLES = {
    "segment": "Segment attention",
    "linear": "Linear attention",
    "peak": "Share of the machine's own peak",
    "update": "state_update: one decoding token",
    "growth": "Growth with the length",
    "model": "A whole model",
    "others": "The other operators, and short steps",
}
NOTES = {
    "segment": (
        "SDPA is `scaled_dot_product_attention`. With the mask it gets the same boolean mask, built beforehand; causal "
        "is another, larger task (`is_causal=True`), so the ratio is that of visible FLOP a second: 4 D a pair of "
        "tokens that see each other and query head. FlexAttention is compiled, with its block mask built beforehand; "
        "on the CPU it has no backward. Compiling is not counted.\n\n"
        "Memory is the growth of the process's peak resident memory during the call (VmHWM after resetting it, less "
        "VmRSS before), the results included. What the masked peer would need is computed: the boolean mask and the "
        "copy of it as numbers in the inputs' dtype that the fused kernel makes.\n\n"
        "Results of over 32 MB (float32, 16/16) are fresh memory in every call. On a virtual machine that gives idle "
        "memory back to its host, a call that follows seconds of a peer waits until it is there again, which can take "
        "longer than the call: its share of the peak, measured among short calls (below), shows it without."
    ),
    "linear": (
        "The eager peer is chunked: batched matrix products inside chunks, the query heads of a group in one product, "
        "chunk states summed in float32 by a matrix product; the fastest of several chunk lengths C counts. The "
        "compiled peer is `torch.compile(dynamic=False)` of the same function, compile time not counted. With decay "
        "the peer is the function that transformers' Mamba-2 mixer calls between its convolution and its gate, "
        "`mamba2_chunk_scan`, alone and without projections, at the fastest of several chunk lengths, chosen on a "
        "quarter of the tokens (the mixer's default of 256 needs several times the memory), in float32 alone, as it "
        "computes in that whatever it is given. Ours gets the same x, dt, A, B, C, and the products x dt and dt A are "
        "part of its time. Heads are q/k/v there, and Dv is half of D."
    ),
    "peak": (
        "The peak is what a small C++ program ([`cpu_peak.cpp`](../cpu_peak.cpp)) reaches on data in registers: fused "
        "multiply-adds in float32, vdpbf16ps in bfloat16, on one thread and on all at once. matmul is torch's product "
        "of two square matrices of 1024. Counted for ours is only what no implementation can avoid: 4 D a visible pair "
        "and query head for segment attention; for linear attention 2 D D a token and query or key head, the reads and "
        "updates of the state. The triangle inside chunks is work that we do and do not count: the shares are "
        "conservative."
    ),
    "update": (
        "Far larger than the caches: bytes of states read and written a second, beside those of a copy of the same "
        "size (torch's copy_ or memcpy, whichever is faster, read + write). Inside the caches: time a head-state "
        "(D x D float32) without the cost of a call, which is that of the same call on states of 8 x 8."
    ),
    "growth": "Forward, prompt and steps as everywhere; linear time would be a ratio equal to that of the lengths.",
    "model": (
        "A Qwen2 model with random weights in float32 (torch's bfloat16 products of a single token are slower than "
        "its float32 ones), the same in both; ours is the state-transition model with its linear branches on top. "
        "The vocabulary is smaller than Qwen2.5's own to save time; its head costs both the same. Given token ids: a "
        "prompt of 256, then steps of 256 with their markers, so that the cache is really cleared. Prefill is one run "
        "each; in decoding the two take turns, and spread is that of the tokens. Peak memory as above, on top of the "
        "weights. Caches: keys, values and states, behind the prefill and at their largest between two decoded tokens."
    ),
    "others": (
        "The eager peers are SDPA with the mask and the chunked form whose carry holds the correction at step ends "
        "(its coefficients computed beforehand)."
    ),
}


def page(record: dict) -> str:
    """Markdown. record: {"sections": {name: {"date", "seconds", "machine", "rows"}}}."""
    sections = {name: record["sections"][name] for name in TITLES if name in record["sections"]}
    rows = {name: [from_json(fields) for fields in section["rows"]] for name, section in sections.items()}
    newest = max(sections.values(), key=lambda section: section["date"])
    minutes = sum(section["seconds"] for section in sections.values()) / 60
    lines = [
        "# Operators on the CPU", "",
        f"`python -m benchmarks.cpu`, {minutes:.0f} minutes. Both sides of every comparison run in one process and "
        "take turns; times are medians, spread is (slowest - fastest) / median without the tenth of the samples at "
        "either end, ratios above 1 mean that statecore is faster. Batch 1; prompt and steps of 256 tokens unless said "
        "otherwise.", "",
        *(f"- {name}: {value}" for name, value in newest["machine"].items()), f"- date: {newest['date']}", "",
        *summary([row for found in rows.values() for row in found]), "",
        "![ratios to the peers and their targets](cpu_ratios.png)", "",
    ]  # fmt: skip
    for number, (name, section) in enumerate(sections.items(), 1):
        lines += [f"## {number}. {TITLES[name]}", "", NOTES[name], ""]
        if lasting(section["machine"]) != lasting(newest["machine"]):
            lines += [f"Measured apart: {section['date']}, {'; '.join(section['machine'].values())}.", ""]
        if name == "growth":
            lines += ["![time against length](cpu_lengths.png)", ""]
        for found in tables(rows[name]):
            lines += [*found, ""]
        if name == "linear":
            lines += bound_table(rows["linear"], [row for row in rows.get("peak", []) if isinstance(row, Share)])
    return "\n".join(lines)


def summary(rows: list[Row]) -> list[str]:
    """How many targets are reached, and the range of values behind each."""
    aimed = [row for row in rows if row.target is not None]
    judged = [row for row in aimed if row.reached is not None]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in aimed:
        groups.setdefault((question(row), target(row)), []).append(row)
    lines = [
        f"**{sum(row.reached for row in judged)} of {len(judged)} targets reached.**", "",
        "| question | dtype | target | lowest ... highest | reached |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for (asked, wanted), found in groups.items():
        dtypes = ", ".join(dict.fromkeys(row.dtype for row in found))
        measured = sorted((row for row in found if row.reached is not None), key=lambda row: row.value)
        if not measured:
            lines.append(f"| {asked} | {dtypes} | {wanted} | not measured: {found[0].failure} | |")
            continue
        reached = sum(row.reached for row in measured)
        mark = "reached" if reached == len(measured) else f"not reached ({reached} of {len(measured)})"
        span = " ... ".join(dict.fromkeys((value(measured[0]), value(measured[-1]))))
        lines.append(f"| {asked} | {dtypes} | {wanted} | {span} | {mark} |")
    return lines


def question(row: Row) -> str:
    match row:
        case Comparison():
            return f"{row.operator}, {row.direction}, against {row.peer}"
        case Share():
            return f"{row.operator}, share of the peak"
        case Bandwidth():
            return f"{row.operator}, share of copy bandwidth"
        case HeadState():
            return f"{row.operator}, a head-state, {row.pool}"
        case Growth():
            return f"{row.operator}, time({row.time}) / time({row.short})"
        case Kernel():
            return f"{row.operator}, {row.direction}"
        case Launches():
            return f"{row.operator}, launches"
        case Preparation() | Ceiling():
            return row.what
        case Point():
            return f"{row.operator}, {row.side}"
    return row.operator


def value(row: Row) -> str:
    return "" if row.failure else UNITS[row.unit](row.value)


def target(row: Row) -> str:
    if row.target is None:
        return ""
    return f"{'<=' if row.at_most else '>='} {UNITS[row.unit](row.target)}"


def verdict(row: Row) -> str:
    return {None: "", True: "reached", False: "**not reached**"}[row.reached]


def tables(rows: list[Row]) -> list[list[str]]:
    """One table a kind of row; comparisons with a target get one a question, those without share one."""

    def key(row: Row) -> tuple[type[Row], str]:
        alone = isinstance(row, Comparison) and row.target is not None
        return type(row), question(row) if alone else ""

    order = list(dict.fromkeys(key(row) for row in rows))
    grouped = groupby(sorted(rows, key=lambda row: order.index(key(row))), key)
    return [TABLES[kind](list(found)) for (kind, _), found in grouped if kind in TABLES]


def comparison_table(rows: list[Row]) -> list[str]:
    alone = len({question(row) for row in rows}) == 1
    title = [f"{question(rows[0])}:", ""] if alone else []
    naming = [("operator", lambda r: r.operator), ("direction", lambda r: r.direction), ("peer", lambda r: r.peer)]
    columns = [
        *([] if alone else naming),
        *(ROWS_CASE if rows[0].operator == "state_update" else CASE),
        ("ms", lambda r: ms(r.ours_s)),
        ("spread", lambda r: percent(r.ours_spread)),
        ("its ms", lambda r: f"cannot run: {r.failure}" if r.failure else ms(r.peer_s)),
        ("its spread", lambda r: "" if r.failure else percent(r.peer_spread)),
        ("its ms of the CPU", lambda r: ms(r.peer_host) if r.peer_host else ""),
        ("its best form", lambda r: r.variant),
        ("ratio", lambda r: f"**{value(r)}**" if value(r) else ""),
        *VERDICT,
    ]
    return [*title, *table(rows, columns)]


def bound_table(comparisons: list[Row], shares: list[Row]) -> list[str]:
    """What the products alone take at the machine's peak: no ratio to the eager form can be higher than theirs."""

    def case(row: Row) -> tuple:
        return row.dtype, row.heads, row.width, row.threads

    peaks = {case(row): row.peak for row in shares if not row.failure}
    lines = []
    for row in comparisons:
        chunked = isinstance(row, Comparison) and row.operator == "linear_attention" and row.target is not None
        if not chunked or row.failure or case(row) not in peaks:
            continue
        flops = chunked_flops(row.time, tuple(map(int, row.heads.split("/"))), row.width, CHUNK[row.dtype])
        work = sum(flops[part] for part in row.direction.split(" + "))
        least = work / peaks[case(row)]
        lines.append(
            f"| {row.direction} | {row.dtype} | {row.heads} | {row.threads} | {work / 1e9:.2f} | {ms(least)} | "
            f"{ms(row.ours_s)} | {percent(least / row.ours_s)} | {value(row)} | {row.peer_s / least:.3g}x | "
            f"{target(row)} |"
        )
    if not lines:
        return []
    return [
        "What bounds it: the products of a chunked pass that stores no states (a backward without them computes them "
        "again), counted at our chunk lengths, in no more time than the machine's own peak (section below) allows, "
        "everything else free. The highest ratio is what a kernel at the peak would have against the same peer.", "",
        "| direction | dtype | heads | threads | GFLOP | ms at the peak | ours | share | ratio | highest | target |",
        "|" + "---|" * 11, *lines, "",
    ]  # fmt: skip


def preparation_table(rows: list[Row]) -> list[str]:
    """The slowest and fastest of each, as they depend on nothing but the length and the threads."""
    kinds = dict.fromkeys((row.what, row.time) for row in rows)
    lines = []
    for what, time in kinds:
        seconds = [row.seconds for row in rows if (row.what, row.time) == (what, time)]
        lines.append(f"- {what}: {ms(min(seconds))} to {ms(max(seconds))} ms at T = {time}")
    return ["What the peers build beforehand, not counted above:", "", *lines]


def long_sequence_table(rows: list[Row]) -> list[str]:
    return table(
        rows,
        [
            *CASE,
            ("ms", lambda r: ms(r.seconds)),
            ("peak memory growth", lambda r: mb(r.extra)),
            ("of it results", lambda r: mb(r.results)),
            ("mask of SDPA (computed)", lambda r: mb(r.peer_needs)),
        ],
    )


def share_table(rows: list[Row]) -> list[str]:
    return table(
        rows,
        [
            ("operator", lambda r: r.operator),
            *CASE,
            ("GFLOP/s", lambda r: giga(r.ours)),
            ("spread", lambda r: percent(r.spread)),
            ("peak", lambda r: f"none: {r.failure}" if r.failure else giga(r.peak)),
            ("matmul", lambda r: giga(r.matmul)),
            ("share of the peak", lambda r: f"**{value(r)}**" if value(r) else ""),
            *VERDICT,
        ],
    )


def bandwidth_table(rows: list[Row]) -> list[str]:
    return table(
        rows,
        [
            *ROWS_CASE,
            ("pool", lambda r: mb(r.pool)),
            ("GB/s", lambda r: f"{r.ours / 1e9:.1f}"),
            ("spread", lambda r: percent(r.spread)),
            ("copy GB/s", lambda r: f"{r.copy / 1e9:.1f}"),
            ("share", lambda r: f"**{value(r)}**"),
            *VERDICT,
        ],
    )


def head_state_table(rows: list[Row]) -> list[str]:
    return table(
        rows,
        [
            ("pool", lambda r: r.pool),
            *ROWS_CASE,
            ("head-states", lambda r: str(r.head_states)),
            ("a call", lambda r: us(r.seconds)),
            ("spread", lambda r: percent(r.spread)),
            ("a call on tiny states", lambda r: us(r.idle)),
            ("a head-state", lambda r: f"**{value(r)}**"),
            *VERDICT,
        ],
    )


def growth_table(rows: list[Row]) -> list[str]:
    return table(
        rows,
        [
            ("operator", lambda r: r.operator),
            *CASE,
            ("ms", lambda r: ms(r.long_s)),
            ("spread", lambda r: percent(r.spread)),
            ("at T", lambda r: str(r.short)),
            ("ms", lambda r: ms(r.short_s)),
            ("ratio", lambda r: f"**{value(r)}**"),
            *VERDICT,
        ],
    )


def phase_table(rows: list[Row]) -> list[str]:
    """Two lines a phase: ours and stock attention."""
    lines = [f"{rows[0].shape}; {rows[0].dtype}, {rows[0].threads} threads.", ""]
    lines += ["| phase | tokens | attention | s | tokens/s | spread | cache | peak memory growth | ratio |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        sides = (
            ("statecore", row.ours_s, row.ours_spread, row.ours_cache, row.ours_extra, f"**{value(row)}**"),
            ("stock sdpa", row.stock_s, row.stock_spread, row.stock_cache, row.stock_extra, ""),
        )
        for name, seconds, spread, cache, extra, ratio in sides:
            shown = "" if spread is None else percent(spread)
            growth = "" if extra is None else mb(extra)
            lines.append(
                f"| {row.operator} | {row.time} | {name} | {seconds:.2f} | {row.time / seconds:.1f} | {shown} "
                f"| {mb(cache)} | {growth} | {ratio} |"
            )
    return lines


TABLES = {
    Comparison: comparison_table,
    Preparation: preparation_table,
    LongSequence: long_sequence_table,
    Share: share_table,
    Bandwidth: bandwidth_table,
    HeadState: head_state_table,
    Growth: growth_table,
    Phase: phase_table,
}


def lasting(machine: dict[str, str]) -> dict[str, str]:
    """Without what is measured anew in every run."""
    return {name: fact for name, fact in machine.items() if name != "memory bandwidth"}
