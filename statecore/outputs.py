"""Outputs are written whole or not at all: to a hidden sibling, which is renamed once it is complete."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def new_folder(output: str | Path, overwrite: bool, *, marker: str) -> Iterator[Path]:
    """A folder to write into, which becomes `output` at the end.

    `marker` is a file that every folder of this kind contains. Only such folders are ever overwritten.
    """
    output = Path(output)
    if output.exists() and not (overwrite and (output / marker).is_file()):
        raise FileExistsError(
            f"{output} exists already: choose another output folder, or allow overwriting (of a folder with {marker})"
        )
    working = output.with_name(f".{output.name}.{os.getpid()}.partial")
    working.mkdir(parents=True)
    try:
        yield working
        if output.exists():
            shutil.rmtree(output)
        working.rename(output)
    finally:
        shutil.rmtree(working, ignore_errors=True)


@contextmanager
def new_file(output: str | Path, overwrite: bool = True) -> Iterator[TextIO]:
    """A text file to write into, which becomes `output` at the end."""
    output = Path(output)
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists already: choose another file, or allow overwriting")
    output.parent.mkdir(parents=True, exist_ok=True)
    working = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        with open(working, "w", encoding="utf-8") as file:
            yield file
        os.replace(working, output)
    finally:
        working.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with new_file(path) as file:
        file.write(text)


def write_json(path: str | Path, content: Any) -> None:
    """Writes infinities and NaN as null, since JSON has neither."""
    write_text(path, json.dumps(_finite(content), ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    match content:
        case float():
            return content if math.isfinite(content) else None
        case dict():
            return {key: _finite(value) for key, value in content.items()}
        case list() | tuple():
            return [_finite(value) for value in content]
    return content
