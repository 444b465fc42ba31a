"""The command line: options and help come from the functions, mistakes end in one line."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer.testing import CliRunner

from statecore.cli import COMMANDS, OLD_SPELLINGS, app, argument_help, report_errors
from statecore.settings import flat_settings, read_yaml


@pytest.fixture
def run(monkeypatch):
    def invoke(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["statecore", *arguments])
        return CliRunner().invoke(app, list(arguments))

    return invoke


def test_info_names_library_and_versions(run):
    result = run("info")
    assert result.exit_code == 0
    for word in ("statecore", "_C.so", "CPU instruction set", "CUDA architectures", "torch", "transformers"):
        assert word in result.output


def test_help_lists_every_command(run):
    output = run("--help").output
    assert all(name in output for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run, name):
    result = run(name, "--help")
    assert result.exit_code == 0, result.output
    assert name == "info" or "--" in result.output


def test_unknown_command_is_named(run):
    result = run("nothing")
    assert result.exit_code == 2
    assert "nothing" in result.output


# ----------------------------------------------------------------------------------------------------------------------
# Options


@pytest.fixture
def seen(monkeypatch) -> dict:
    """What the command `try` was called with."""
    seen = {}
    monkeypatch.setattr(sys.modules[__name__], "seen", seen, raising=False)

    def add(function, old_folder: str | None = None) -> dict:
        monkeypatch.setitem(COMMANDS, "try", (f"{__name__}:{function.__name__}", ""))
        monkeypatch.setitem(OLD_SPELLINGS, "try", old_folder)
        return seen

    return add


def try_options(folder: Path, *, count: int = 1, names: Sequence[str] = (), fast: bool = False) -> None:
    """A command."""
    sys.modules[__name__].seen.update(folder=folder, count=count, names=names, fast=fast)


def test_config_gives_defaults_and_the_command_line_wins(run, seen, tmp_path):
    seen = seen(try_options)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("count: 3\nnames: [a, b]\n")
    assert run("try", "folder", "--config", str(recipe)).exit_code == 0
    assert seen == {"folder": "folder", "count": 3, "names": ["a", "b"], "fast": False}
    assert run("try", "folder", "--config", str(recipe), "--count", "5", "--fast").exit_code == 0
    assert seen == {"folder": "folder", "count": 5, "names": ["a", "b"], "fast": True}


@dataclass(frozen=True)
class Fields:
    """Where a row keeps its parts.

    Args:
        id: where the id is.
        tags: around the thinking.
        step_tokens: of a step.
    """

    id: str = field(default="id", metadata={"option": "id_field"})
    tags: tuple[str, str] = ("<a>", "</a>")
    step_tokens: int = 32

    def __post_init__(self):
        if self.step_tokens < 1:
            raise ValueError(f"step_tokens must be positive, got {self.step_tokens}")


def try_group(source: str, *, fields: Fields = Fields(step_tokens=8), step_size: int = 1) -> None:
    """A command.

    Args:
        source: what is read.
        tags: of this command.
    """
    sys.modules[__name__].seen.update(flat_settings(source=source, fields=fields, step_size=step_size))


def test_fields_of_an_option_group_are_options(run, seen, tmp_path):
    seen = seen(try_group)
    given = {"source": "a", "id_field": "id", "tags": ["<a>", "</a>"], "step_tokens": 8, "step_size": 1}
    assert run("try", "a").exit_code == 0
    assert seen == given  # the default is the command's, not the class's
    assert run("try", "a", "--id-field", "name", "--tags", "(", ")", "--step-tokens", "4").exit_code == 0
    assert seen == given | {"id_field": "name", "tags": ["(", ")"], "step_tokens": 4}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("id_field: name\ntags: [b, c]\n")
    assert run("try", "a", "--config", str(recipe), "--tags", "d", "e").exit_code == 0
    assert seen == given | {"id_field": "name", "tags": ["d", "e"]}
    refused = run("try", "a", "--step-tokens", "0")
    assert refused.exit_code == 1
    assert "step_tokens must be positive" in refused.output
    shown = run("try", "--help").output
    assert "where the id is." in shown
    assert "of this command." in shown  # the command's own words go before the group's
    assert "around the thinking" not in shown


@dataclass(frozen=True)
class MoreFields(Fields):
    """A group that extends another.

    Args:
        id: another id.
        depth: of more.
    """

    depth: int = 2


def try_more(*, fields: MoreFields = MoreFields()) -> None:
    """A command."""


def test_a_group_has_the_help_of_the_group_it_extends(run, seen):
    seen(try_more)
    shown = run("try", "--help").output
    assert all(text in shown for text in ("another id.", "around the thinking.", "of a step.", "of more."))
    assert "where the id is." not in shown


def test_options_may_be_written_with_underscores(run, seen):
    seen = seen(try_group)
    assert run("try", "a", "--step_tokens", "4", "--step_size=2", "--id_field", "--my_id").exit_code == 0
    assert (seen["step_tokens"], seen["step_size"], seen["id_field"]) == (4, 2, "--my_id")
    assert "--step-tokens" in run("try", "--help").output


# ----------------------------------------------------------------------------------------------------------------------
# The output folder


def try_option(source: str, *, output_dir: Path | None = None) -> None:
    """A command."""
    sys.modules[__name__].seen.update(sources=[source], output_dir=output_dir)


def try_last(source: str, output_dir: Path) -> None:
    """A command."""
    try_option(source, output_dir=output_dir)


def try_many(sources: Sequence[str], output_dir: Path, *, fast: bool = False) -> None:
    """A command."""
    sys.modules[__name__].seen.update(sources=list(sources), output_dir=output_dir)


def try_default(output_dir: Path = Path("here")) -> None:
    """A command."""
    sys.modules[__name__].seen.update(sources=[], output_dir=output_dir)


@pytest.mark.parametrize(
    ("function", "old", "arguments", "old_arguments", "sources"),
    [
        (try_option, "--out", ["a", "--output-dir", "o"], ["a", "--out", "o"], ["a"]),
        (try_option, "--out", ["--output_dir=o", "a"], ["--out=o", "a"], ["a"]),
        (try_last, "--output", ["a", "--output-dir", "o"], ["--output", "o", "a"], ["a"]),
        (try_last, "output", ["--output-dir", "o", "a"], ["a", "o"], ["a"]),
        (try_many, "output", ["a", "b", "--fast", "--output-dir", "o"], ["a", "b", "--fast", "o"], ["a", "b"]),
        (try_many, "output", ["a", "--output-dir", "o"], ["a", "o", "--fast"], ["a"]),
        (try_default, "output", ["--output-dir", "o"], ["o"], []),
    ],
)
def test_one_spelling_of_the_output_folder_and_old_ones_with_a_warning(
    run, seen, tmp_path, function, old, arguments, old_arguments, sources
):
    seen = seen(function, old)
    result = run("try", *arguments)
    assert result.exit_code == 0, result.output
    assert result.output == ""
    assert seen == {"sources": sources, "output_dir": "o"}
    seen.clear()
    result = run("try", *old_arguments)
    assert result.exit_code == 0, result.output
    assert result.output.count("deprecated, use --output-dir") == 1
    assert seen == {"sources": sources, "output_dir": "o"}
    shown = run("try", "--help").output
    assert "--output-dir" in shown
    assert f"{old} " not in shown


@pytest.mark.parametrize(
    ("old", "key", "warns"), [("--out", "out", 1), ("output", "output", 1), (None, "output_dir", 0)]
)
def test_output_folder_of_a_config(run, seen, tmp_path, old, key, warns):
    seen = seen(try_many, old)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{key}: o\n")
    result = run("try", "a", "b", "--config", str(recipe))
    assert result.exit_code == 0, result.output
    assert result.output.count("deprecated") == warns
    assert seen == {"sources": ["a", "b"], "output_dir": "o"}
    assert run("try", "a", "b", "--config", str(recipe), "--output-dir", "p").exit_code == 0
    assert seen == {"sources": ["a", "b"], "output_dir": "p"}


def test_output_folder_that_is_missing_is_asked_for(run, seen):
    for function, arguments in ((try_last, ["a"]), (try_many, ["a"]), (try_many, [])):
        seen(function, "output")
        result = run("try", *arguments)
        assert result.exit_code == 2
        assert ("--output-dir" in result.output) or ("sources" in result.output.lower())
    seen(try_last, "output")
    assert run("try", "a", "b", "c").exit_code == 2


@pytest.mark.parametrize("name", OLD_SPELLINGS)
def test_every_command_that_writes_a_folder_calls_it_output_dir(run, name):
    assert "--output-dir" in run(*name.split(), "--help").output


# ----------------------------------------------------------------------------------------------------------------------
# YAML files, docstrings, mistakes


@pytest.mark.parametrize(("text", "message"), [("colour: red\n", "colour"), ("- 1\n", "name: value")])
def test_bad_config_is_refused(run, tmp_path, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    result = run("prepare", "a", "b", "--config", str(recipe))
    assert result.exit_code == 2
    assert message in result.output


def test_yaml_files(tmp_path):
    file = tmp_path / "a.yaml"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_yaml(file)
    file.write_text("# nothing\n")
    assert read_yaml(file, ["a"]) == {}
    file.write_text("a: 1\nb: [2, 3]\n")
    assert read_yaml(file) == read_yaml(file, ["a", "b", "c"]) == {"a": 1, "b": [2, 3]}
    with pytest.raises(ValueError, match=r"unknown names: b; known are a, c"):
        read_yaml(file, ["a", "c"])
    for text, message in (("- 1\n", "must hold `name: value` lines, got list"), ("a: [\n", "is not valid YAML")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_yaml(file)


def test_mistakes_end_in_one_line_and_bugs_keep_their_traceback(capsys):
    def mistake():
        raise ValueError("alpha must be >= 0, got -1")

    with pytest.raises(SystemExit):
        report_errors(mistake)()
    assert capsys.readouterr().err == "statecore: alpha must be >= 0, got -1\n"
    with pytest.raises(ZeroDivisionError):
        report_errors(lambda: 1 / 0)()


def test_argument_help_reads_several_names_and_continued_lines():
    section = "    a, b: first\n        and more.\n    c: other\n\nReturns:\n    d: not an argument"
    assert argument_help(section) == {"a": "first and more.", "b": "first and more.", "c": "other"}
