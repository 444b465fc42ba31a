"""The command line: options and help come from the functions, mistakes end in one line."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from statecore.cli import COMMANDS, app, argument_help, report_errors


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


def test_config_gives_defaults_and_the_command_line_wins(run, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setitem(COMMANDS, "try", (f"{__name__}:try_options", ""))
    monkeypatch.setattr(sys.modules[__name__], "seen", seen, raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("count: 3\nnames: [a, b]\n")
    assert run("try", "folder", "--config", str(recipe)).exit_code == 0
    assert seen == {"folder": "folder", "count": 3, "names": ["a", "b"], "fast": False}
    assert run("try", "folder", "--config", str(recipe), "--count", "5", "--fast").exit_code == 0
    assert seen == {"folder": "folder", "count": 5, "names": ["a", "b"], "fast": True}


def try_options(folder: Path, *, count: int = 1, names: Sequence[str] = (), fast: bool = False) -> None:
    """A command."""
    sys.modules[__name__].seen.update(folder=folder, count=count, names=names, fast=fast)


@pytest.mark.parametrize(("text", "message"), [("colour: red\n", "colour"), ("- 1\n", "name: value")])
def test_bad_config_is_refused(run, tmp_path, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    result = run("prepare", "a", "b", "--config", str(recipe))
    assert result.exit_code == 2
    assert message in result.output


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
