"""The pages of results, made from the record alone. Their prose is in pages/*.md; a section of a template appears where
there are results for its placeholder.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks import roofline
from benchmarks.contest import ABSENT, NO_TIME, OTHER, Question
from benchmarks.record import AT_MOST, COMPARISON, QUANTITY, Number, Row

TEMPLATES = Path(__file__).with_name("pages")
PLACEHOLDER = re.compile(r"\{(\w+)\}")
LAST = ("target", "")  # columns
UNITS = {  # scale, suffix, significant digits
    "times": (1, "x", 3), "growth": (1, "x", 3), "count": (1, "", 3), "tokens/s": (1, " tokens/s", 4),
    "us": (1e-6, " us", 3), "ms": (1e-3, " ms", 3), "MB": (1e6, " MB", 3), "GFLOP": (1e9, " GFLOP", 4),
    "GB/s": (1e9, " GB/s", 3), "TB/s": (1e12, " TB/s", 3), "GFLOP/s": (1e9, " GFLOP/s", 3),
    "TFLOP/s": (1e12, " TFLOP/s", 3),
}  # fmt: skip


def shown(number: float | str | None, unit: str) -> str:
    if number is None:
        return "" if unit == "percent" else "not measurable here"
    if unit == "text":
        return number
    if unit == "percent":
        return f"{number:.0%}"
    if unit == "launches":
        return "one launch per call" if number == 1 else f"{number:g} launches per call"
    one, behind, digits = UNITS[unit]
    number /= one
    return (f"{number:.{digits}g}" if number < 1000 else f"{number:,.0f}") + behind


# ---- rows


def question(row: Row) -> str:
    """What a row answers; rows of different cases may share it."""
    what = f"against {row.what}" if row.kind == COMPARISON else row.what
    parts = (row.operator, "share of the peak") if row.unit == "percent" else (row.operator, row.direction, what)
    return ", ".join(part for part in parts if part)


def target(row: Row) -> str:
    return "" if row.target is None else f"{'<=' if row.unit in AT_MOST else '>='} {shown(row.target, row.unit)}"


def verdict(row: Row) -> str:
    return {None: "", True: "reached", False: "**not reached**"}[row.reached]


def line(row: Row) -> str:
    """A row on the console."""
    return f"{question(row)}: " + ", ".join(f"{name} {cell}" for name, cell in cells(row, named=False).items() if cell)


def cells(row: Row, named: bool = True) -> dict[str, str]:
    """{column: cell} of a row; units that follow a number are part of the column's name."""
    found = {"operator": row.operator, "direction": row.direction} if named else {}
    if named:
        found["peer" if row.kind == COMPARISON else "what"] = row.what
    found |= {name: str(label) for name, label in row.case.items()}
    for name, (number, unit) in row.numbers.items():
        behind = UNITS.get(unit, (1, "", 0))[1].strip("x")
        cell = shown(number, unit).removesuffix(behind)
        found[name + behind] = f"**{cell}**" if name == row.judged else cell
    return found | {"failure": row.failure, "target": target(row), "": verdict(row)}


# ---- tables


def table(rows: Iterable[dict[str, str]]) -> list[str]:
    """rows: {column: cell}. Empty columns are left out."""
    rows = list(rows)
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)]
    names.sort(key=LAST.__contains__)
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def tables(rows: Sequence[Row]) -> list[str]:
    """One per kind of row; comparisons with a target have one per question. Then the peers that were not timed."""

    def key(row: Row) -> tuple[str, str]:
        if row.kind == COMPARISON:
            return row.kind, question(row) if row.target is not None else ""
        return row.kind + row.direction * (row.kind == QUANTITY), ""

    refused = [row for row in rows if row.kind == COMPARISON and row.failure]
    rows = [row for row in rows if row not in refused]
    order = list(dict.fromkeys(map(key, rows)))
    lines = []
    for (_, title), found in groupby(sorted(rows, key=lambda row: order.index(key(row))), key):
        lines += [f"{title}:", ""] if title else []
        lines += table(cells(row, named=not title) for row in found)
    return lines + refusals(refused)


def refusals(rows: Sequence[Row]) -> list[str]:
    """Every reason once, with the operators and directions concerned; a missing package concerns all."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        said = row.failure if row.failure.startswith((ABSENT, NO_TIME, OTHER)) else f"cannot run: {row.failure}"
        reasons.setdefault(f"- {row.what}: {said}", {})[f"{row.operator} ({row.direction})"] = None
    lines = [why if f": {ABSENT}" in why else f"{why}, in {'; '.join(where)}" for why, where in reasons.items()]
    return ["Peers that were not timed:", "", *lines, ""] if lines else []


def summary(rows: Sequence[Row]) -> list[str]:
    """How many targets are reached, and the range of values behind each."""
    aimed = [row for row in rows if row.target is not None]
    judged = [row.reached for row in aimed if row.reached is not None]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in aimed:
        groups.setdefault((question(row), target(row)), []).append(row)
    lines = []
    for (asked, wanted), found in groups.items():
        values = sorted(row.value for row in found if row.reached is not None)
        reached = sum(row.reached is True for row in found)
        mark = "reached" if reached == len(values) else f"not reached ({reached} of {len(values)})"
        span = " ... ".join(dict.fromkeys(shown(number, found[0].unit) for number in (values[:1] + values[-1:])))
        lines.append(
            {
                "question": asked, "dtype": ", ".join(dict.fromkeys(row.case["dtype"] for row in found)),
                "target": wanted, "lowest ... highest": span or f"not measured: {found[0].failure}",
                "": mark if values else "",
            }
        )  # fmt: skip
    return [f"**{sum(judged)} of {len(judged)} targets reached.**", "", *(table(lines) if lines else [])]


# ---- pages


def page(record: dict, name: str) -> str:
    """Markdown. record: {"sections": {name: section}}, and of `make gpu` "checks": {"date", "machine", "stages"}."""
    sections, checks = record["sections"], checked(record["checks"]) if "checks" in record else ""
    if not sections:
        title = template(name).splitlines()[0]
        return f"{title}\n\nNothing was timed.\n\n{checks}" if checks else template(f"{name}_unmeasured")
    newest = max(sections.values(), key=lambda section: section["date"])
    rows = {key: [Row(**fields) for fields in section["rows"]] for key, section in sections.items()}
    texts = {}
    for key, section in sections.items():
        ours, other = (
            found["machine"] | {"memory bandwidth": ""} for found in (section, newest)
        )  # measured every time
        apart = (
            f"Measured apart: {section['date']}, {'; '.join(section['machine'].values())}.\n\n" if ours != other else ""
        )
        texts[key] = apart + "\n".join(tables(rows[key]))
    seconds = sum(section["seconds"] for section in sections.values())
    left_out = [f"- {left}" for section in sections.values() for left in section["left_out"]]
    facts = newest["machine"] | {"date": newest["date"]}
    return filled(
        name, texts, checks=checks, minutes=f"{seconds / 60:.0f}", seconds=f"{seconds:.0f}",
        machine="\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
        summary="\n".join(summary([row for key in PLACEHOLDER.findall(template(name)) for row in rows.get(key, [])])),
        left_out="\n".join(["Left out, as the time of the run was spent:", "", *left_out]) if left_out else "",
    )  # fmt: skip


def checked(checks: dict) -> str:
    """What `make gpu` ran."""
    said = dict.fromkeys(PLACEHOLDER.findall(template("gpu_checks")), "not run |  | ") | {
        stage["name"]: f"**{stage['verdict']}** | {stage['seconds']} | " + stage["said"].replace("|", "\\|")
        for stage in checks["stages"]
    }
    machine = "; ".join(f"{name} {fact}" for name, fact in checks["machine"].items())
    return template("gpu_checks").format(**said | {"date": checks["date"], "machine": machine})


def expected_page(asked: Sequence[Question]) -> str:
    """What the ceilings of an H200 allow for every question, and the targets beside it."""
    texts = {}
    for section, found in groupby(asked, key=lambda question: question.section):
        found = list(found)
        lines = table(cells(expected(question, way)) for question in found for way in question.directions)
        ratios = [(question.operator, *aim, ratio) for question in found for aim, ratio in question.ratios.items()]
        if ratios:
            beside = (f"- {name}, {way}: at least {ratio:g} times {peer}" for name, way, peer, ratio in ratios)
            lines += ["Beside these, as fast as peers in the same run:", "", *dict.fromkeys(beside)]
        texts[section] = "\n".join(lines)
    flops, moved = shown(roofline.H200.flops, "TFLOP/s"), shown(roofline.H200.bytes, "TB/s")
    return filled("gpu_expected", texts, flops=flops, bytes=moved)


def expected(question: Question, direction: str) -> Row:
    passes = question.work(question.case)[direction]
    work, moved = sum(one.flops for one in passes), sum(one.bytes for one in passes)
    bound = roofline.bound(passes, roofline.H200)
    numbers: dict[str, Number] = {
        "work": (work, "GFLOP"), "bytes": (moved, "MB"), "bound of work": (work / roofline.H200.flops, "us"),
        "bound of bytes": (moved / roofline.H200.bytes, "us"), "bound": (bound, "us"),
    }  # fmt: skip
    unit, aim = question.aims.get(direction, ("ms", None))
    if aim is not None:
        numbers["target's share of it"] = bound / (aim if unit in AT_MOST else work / aim), "percent"
    return question.kernel(direction, numbers)


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.md").read_text()


def filled(name: str, sections: dict[str, str], **head: str) -> str:
    """A template's head, and its sections that have results, numbered."""
    first, *rest = template(name).split("\n## ")
    parts = [first.format(**head)]
    for text in rest:
        wanted = {key: sections.get(key, "") for key in PLACEHOLDER.findall(text)}
        if any(wanted.values()):
            parts.append(f"## {len(parts)}. {text.format(**wanted)}")
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(parts)).rstrip() + "\n"
