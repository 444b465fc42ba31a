"""What is kept of a run: the record in JSON, and what is made of it. A record is {"sections": {name: section}}."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.rows import Row, to_json

RESULTS = Path(__file__).parent / "results"


def section(rows: Sequence[Row], seconds: float, machine: dict[str, str]) -> dict:
    """One section of a record that was measured just now."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": seconds,
        "machine": machine,
        "rows": [to_json(row) for row in rows],
    }


def stored(folder: Path, name: str) -> dict:
    """The record on disk, empty where there is none of this form."""
    path = folder / f"{name}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    return record if "sections" in record else {"sections": {}}


def write(
    record: dict, folder: Path, name: str, page: Callable[[dict], str], draw: Callable[[dict, Path], None] | None = None
) -> None:
    """JSON, page and pictures: all are made before any takes its place."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as working:
        made = Path(working)
        (made / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        (made / f"{name}.md").write_text(page(record))
        if draw is not None:
            draw(record, made)
        for path in made.iterdir():
            os.replace(path, folder / path.name)
