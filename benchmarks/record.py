"""A row of results, and what is kept of a run: a record in JSON, {"sections": {name: section}}.

Times are in seconds, sizes in bytes, rates per second.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
KERNEL, COMPARISON, QUANTITY = "kernel", "comparison", "quantity"  # ours alone, ours against a peer, other numbers
Number = tuple[float | str | None, str]  # with the unit that page.UNITS shows it in
AT_MOST = ("ms", "us", "growth", "launches")  # units whose targets are upper limits


@dataclass(frozen=True, kw_only=True)
class Row:
    """kind: one of the three above. what: the peer, or the quantity. case: Case.labels(). judged, unit: the number that
    the target is about. failure: why nothing was measured, else empty. tried: seconds of every variant of the peer.
    """

    kind: str
    operator: str
    direction: str = ""
    what: str = ""
    case: dict[str, str | int]
    numbers: dict[str, Number] = field(default_factory=dict)
    judged: str = ""
    unit: str = ""
    target: float | None = None
    failure: str = ""
    tried: dict[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        return self.numbers[self.judged][0]

    @property
    def reached(self) -> bool | None:
        """None where there is no target or nothing was measured."""
        if self.target is None or self.judged not in self.numbers:
            return None
        return self.value <= self.target if self.unit in AT_MOST else self.value >= self.target


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def section(machine: dict[str, str], rows: Sequence[Row] = (), seconds: float = 0.0) -> dict:
    """Of a record, measured now. left_out: names of questions that there was no time for."""
    return {"date": now(), "seconds": seconds, "machine": machine, "rows": list(map(asdict, rows)), "left_out": []}


def stored(folder: Path, name: str) -> dict:
    """The record on disk, an empty one where there is none."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"sections": {}}


def write(record: dict, folder: Path, name: str, page: str, draw: Callable[[dict, Path], None] | None = None) -> None:
    """JSON (of what is not empty), page and pictures: all are made before any takes its place."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as working:
        made = Path(working)
        if record != {"sections": {}}:
            (made / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        (made / f"{name}.md").write_text(page)
        if draw is not None:
            draw(record, made)
        for path in made.iterdir():
            os.replace(path, folder / path.name)
