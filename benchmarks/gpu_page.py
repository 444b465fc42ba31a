"""The pages of results on a GPU: what was measured, made of the record alone, and what was calculated beforehand."""

from benchmarks import roofline
from benchmarks.gpu_contest import ABSENT, STATE_UPDATE, Question
from benchmarks.markdown import Column, mb, ms, percent, plain, table
from benchmarks.page import (
    CASE,
    ROWS_CASE,
    VERDICT,
    comparison_table,
    lasting,
    preparation_table,
    question,
    summary,
    target,
    value,
    verdict,
)
from benchmarks.rows import Ceiling, Comparison, Kernel, Launches, Preparation, Row, from_json

TITLES = {
    "ceilings": "What the GPU itself does",
    "linear_attention": "Linear attention",
    "segment_attention": "Segment attention",
    "mixed_attention": "Mixed attention",
    "state_update": "state_update: one decoding token",
}
NOTES = {
    "ceilings": "Measured in the same run; rooflines below are calculated from these.",
    "linear_attention": (
        "flash-linear-attention (fla-core) is `chunk_linear_attn` without normalisation, with decay `chunk_simple_gla` "
        "(`g_gamma` constant, `g` a token), its final state included. It has no groups: it gets k and v repeated for "
        "every query head, made beforehand, and is spared the summing of their gradients. The eager peer is the "
        "chunked form of the CPU's page. Forward + backward goes from q, k, v to their gradients."
    ),
    "segment_attention": (
        "Prompt of 256 tokens, then steps; TFLOP/s are those of visible work, 4 D a visible pair and query head "
        "forward, 10 D backward. FlexAttention is compiled, its block mask built beforehand. Two varlen_attn calls "
        "are causal attention inside prompt and steps, and attention of all behind the prompt to it, merged by the "
        "logarithms of their denominators; backward both calls get the merged ones. Causal peers do all of causal "
        "attention, so their ratio is that of visible FLOP a second. Where there are no steps the task is the same."
    ),
    "mixed_attention": (
        "The same result by `segment_attention`, `step_linear_attention` and element-wise `a + sigmoid(g) * b`, eager "
        "and compiled by torch.compile."
    ),
    "state_update": (
        "Replayed from a CUDA graph of as many calls as it takes for their states to exceed the second-level cache. "
        "flash-linear-attention is `fused_recurrent_simple_gla` with states in and out; it has no groups and gets as "
        "many states as query heads."
    ),
}
KERNEL: list[Column] = [
    ("direction", lambda r: r.direction),
    ("ms", lambda r: f"none: {r.failure}" if r.failure else ms(r.seconds)),
    ("spread", lambda r: "" if r.failure else percent(r.spread)),
    ("ms of the CPU", lambda r: "" if r.failure or not r.host else ms(r.host)),
    ("TFLOP/s", lambda r: "" if r.failure else f"{r.flops / r.seconds / 1e12:.3g}"),
    ("TB/s", lambda r: "" if r.failure else f"{r.moved / r.seconds / 1e12:.3g}"),
    ("roofline ms", lambda r: ms(r.bound)),
    ("share of it", lambda r: "" if r.failure else f"**{percent(r.bound / r.seconds)}**"),
    ("memory beyond", lambda r: "" if r.failure else mb(r.extra)),
    *VERDICT,
]
CEILING: list[Column] = [
    ("what", lambda r: r.what),
    ("a second", lambda r: f"**{value(r)}**"),
    ("spread", lambda r: percent(r.spread)),
]
LAUNCHES: list[Column] = [("in a graph", value), *VERDICT]
CHECKS = {
    "build": "the library for this GPU, by nvcc",
    "conformance": "instructions as the emulator has them, byte by byte",
    "operators": "values and gradients against float64",
    "cuda_graphs": "captured, and replayed on other contents",
    "same_bits": "200 runs, one result",
    "memcheck": "compute-sanitizer: accesses out of bounds",
    "racecheck": "compute-sanitizer: races in shared memory",
    "synccheck": "compute-sanitizer: barriers",
    "benchmarks": "what is measured on this page",
}
CHECK: list[Column] = [
    ("stage", lambda stage: stage["name"]),
    ("what is checked", lambda stage: CHECKS[stage["name"]]),
    ("verdict", lambda stage: f"**{stage['verdict']}**"),
    ("seconds", lambda stage: stage["seconds"]),
    ("what it said last", lambda stage: stage["said"].replace("|", "\\|")),
]


def of_cases(rows: list[Row], columns: list[Column]) -> list[str]:
    """A table that begins with operator and case; what is a length elsewhere counts the rows of a state update."""
    case = ROWS_CASE if rows[0].operator == STATE_UPDATE else CASE
    return table(rows, [("operator", lambda r: r.operator), *case, *columns])


TABLES = {
    Ceiling: lambda rows: table(rows, CEILING),
    Kernel: lambda rows: of_cases(rows, KERNEL),
    Launches: lambda rows: of_cases(rows, LAUNCHES),
    Comparison: comparison_table,
    Preparation: preparation_table,
}


def page(record: dict) -> str:
    """Markdown. record: {"sections": {name: {"date", "seconds", "machine", "rows", "left_out"}}}, and of `make gpu`
    "checks": {"date", "machine", "stages"}.
    """
    checks = checked(record["checks"]) if "checks" in record else []
    sections = {name: record["sections"][name] for name in TITLES if name in record["sections"]}
    if not sections:
        return "\n".join(["# Operators on a GPU", "", "Nothing was timed.", "", *checks])
    newest = max(sections.values(), key=lambda section: section["date"])
    rows = [from_json(fields) for section in sections.values() for fields in section["rows"]]
    seconds = sum(section["seconds"] for section in sections.values())
    left_out = [name for section in sections.values() for name in section.get("left_out", [])]
    lines = [
        "# Operators on a GPU", "",
        f"`python -m benchmarks.gpu`, {seconds:.0f} seconds. All sides of a comparison run in one process and take "
        "turns; times are between two events on the GPU, with the whole call issued before the first and the "
        "second-level cache filled with something else: medians of 20 to 100, spread is (slowest - fastest) / median "
        "without the tenth of the samples at either end. Ratios above 1 mean that statecore is faster. Before it is "
        "timed, ours is compared with its definition in float64, and every peer with ours. Roofline: the least of work "
        "and bytes ([`roofline.py`](../roofline.py)) at the ceilings of the same run. Memory is what torch allocates "
        "beyond inputs and results; where there is a backward, that includes what the forward keeps.", "",
        *(f"- {name}: {fact}" for name, fact in newest["machine"].items()), f"- date: {newest['date']}", "",
        *summary(rows), "", *checks,
    ]  # fmt: skip
    if left_out:
        lines += ["Left out, as the time given to the run was spent:", "", *(f"- {name}" for name in left_out), ""]
    for number, (name, section) in enumerate(sections.items(), 1):
        lines += [f"## {number}. {TITLES[name]}", "", NOTES[name], ""]
        if lasting(section["machine"]) != lasting(newest["machine"]):
            lines += [f"Measured apart: {section['date']}, {'; '.join(section['machine'].values())}.", ""]
        lines += tables_of(section)
    return "\n".join(lines)


def checked(checks: dict) -> list[str]:
    machine = "; ".join(f"{name} {fact}" for name, fact in checks["machine"].items())
    return ["## Checks", "", f"`make gpu`, {checks['date']}: {machine}.", "", *table(checks["stages"], CHECK), ""]


def tables_of(section: dict) -> list[str]:
    """One a kind of row, and the peers that did not run."""
    rows = [from_json(fields) for fields in section["rows"]]
    refused = [row for row in rows if isinstance(row, Comparison) and row.failure]
    lines = []
    for kind, made in TABLES.items():
        if found := [row for row in rows if type(row) is kind and row not in refused]:
            lines += [*made(found), ""]
    return lines + refusals(refused)


def refusals(rows: list[Comparison]) -> list[str]:
    """Every reason once, with what it kept from being timed; a missing package is missing everywhere."""
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        directions = reasons.setdefault((row.peer, row.failure), {}).setdefault(row.operator, [])
        if row.direction not in directions:
            directions.append(row.direction)
    if not reasons:
        return []
    lines = ["Peers that were not timed:", ""]
    for (peer, failure), operators in reasons.items():
        where = "; ".join(f"{operator} ({', '.join(directions)})" for operator, directions in operators.items())
        lines.append(f"- {peer}: {failure}" + ("" if failure.startswith(ABSENT) else f", in {where}"))
    return [*lines, ""]


def line(row: Row) -> str:
    """Of a row, while the suite runs."""
    length = "rows" if row.operator == STATE_UPDATE else "T"
    size = f"B {row.batch}, {length} {row.time}, heads {row.heads}, D {row.width}"
    return f"{question(row)}: {size}: {row.failure or value(row)} {verdict(row)}".rstrip()


# ---- beforehand


EXPECTED: list[Column] = [
    ("direction", lambda r: r.direction),
    ("GFLOP", lambda r: plain(r.flops / 1e9)),
    ("bytes", lambda r: mb(r.moved)),
    ("us of work", lambda r: plain(r.flops / roofline.H200.flops * 1e6)),
    ("us of bytes", lambda r: plain(r.moved / roofline.H200.bytes * 1e6)),
    ("bound us", lambda r: f"**{plain(r.bound * 1e6)}**"),
    ("target", target),
    ("its share of the bound", lambda r: "" if r.target is None else percent(r.bound / _seconds_aimed_at(r))),
]


def expected_page(asked: dict[str, list[Question]]) -> str:
    """What the ceilings of an H200 allow for everything that is asked, and the targets beside it."""
    flops, moved = roofline.H200.flops, roofline.H200.bytes
    lines = [
        "# Operators on an H200: calculated, not measured", "",
        "`python -m benchmarks.gpu --expected`. Nothing here has run on a GPU. The bound of an operator is its work at "
        f"{flops / 1e12:.0f} TFLOP/s of bfloat16 or its bytes at {moved / 1e12:.1f} TB/s, what a matrix product and a "
        "copy reach on such a GPU, whichever takes longer, pass by pass. How both are counted stands in "
        "[`roofline.py`](../roofline.py). The share of a target is that of the bound which it asks for.", "",
    ]  # fmt: skip
    for name, found in asked.items():
        rows = [question.kernel(direction, roofline.H200) for question in found for direction in question.passes]
        lines += [f"## {TITLES[name]}", "", *of_cases(rows, EXPECTED), ""]
        ratios = dict.fromkeys(
            f"{question.operator}, {direction}: at least {ratio:g} times {peer}"
            for question in found
            for (direction, peer), ratio in question.ratios.items()
        )
        if ratios:
            lines += ["Beside these, as fast as peers in the same run:", "", *(f"- {ratio}" for ratio in ratios), ""]
    return "\n".join(lines)


def _seconds_aimed_at(row: Kernel) -> float:
    return row.target if row.at_most else row.flops / row.target
