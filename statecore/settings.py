"""Settings as commands take them: from YAML files, and as option groups.

An option group is a small frozen dataclass beside the code that it configures. A command takes it as one keyword; on
the command line, in YAML files and in reports its fields are options like any other (statecore/cli.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: str | Path, known: Collection[str] | None = None) -> dict[str, Any]:
    """The `name: value` lines of a YAML file; an empty file has none.

    Raises FileNotFoundError, or ValueError where the file holds something else or, if `known` is given, other names.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got {type(values).__name__}")
    unknown = sorted(str(name) for name in values if known is not None and name not in known)
    if unknown:
        hint = f"; known are {', '.join(sorted(known))}" if len(known) <= 50 else ""
        raise ValueError(f"{path} has unknown names: {', '.join(unknown)}{hint}")
    return values


def option_names(group: Any) -> dict[str, str]:
    """The field of a group behind each of its options. A field's metadata may name its option: two groups may both have
    an `id` field, and a command cannot have two `--id` options.
    """
    return {field.metadata.get("option", field.name): field.name for field in fields(group)}


def flat_settings(**given: Any) -> dict[str, Any]:
    """Settings as a report holds them: option groups flattened, all values as JSON has them."""
    flat: dict[str, Any] = {}
    for name, value in given.items():
        if is_dataclass(value):
            flat |= {option: _plain(getattr(value, name)) for option, name in option_names(value).items()}
        else:
            flat[name] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, type(None))):
        return value
    return str(value) if isinstance(value, Path) else [_plain(item) for item in value]
