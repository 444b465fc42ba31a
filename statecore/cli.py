"""The `statecore` command.

Every subcommand is a function of the package, or several by name: its signature gives the options, its docstring the
help. They are imported when they are called, so `statecore --help` and `statecore info` do not wait for transformers.
"""

import importlib
import inspect
import platform
import re
import sys
import typing
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from typer.core import TyperGroup

COMMANDS = {
    "info": ("statecore.cli:info", "Print versions, the compiled library and what this machine offers."),
    "demo": ("statecore.demo:demo", "Run the whole path on a built-in example, with a page of results."),
    "prepare": ("statecore.prepare:prepare", "Turn long chains of thought into a training set."),
    "train": ("statecore.train:main", "Distil a base model into a state-transition model."),
    "generate": ("statecore.generate:generate", "Decode step by step with constant memory."),
    "metastable": (
        {"world": "statecore.metastable.world_command:world", "traces": "statecore.metastable.traces_command:traces"},
        "Chains of dense clusters and rare edges: a made world, and the chain of real traces.",
    ),
    "flow": ("statecore.flow.command:flow", "Show how much each step of a trace tells about its answer."),
    "ssd": ("statecore.ssd.train:ssd", "Train an attention-free SSD model in phases."),
    "dynamics": (
        {
            "record": "statecore.dynamics.command:record",
            "prune": "statecore.dynamics.command:prune",
            "lower": "statecore.dynamics.command:lower",
        },
        "Ranks and norms of states while a model reads, and smaller states by them.",
    ),
}


class Commands(TyperGroup):
    """Commands by name, built when they are asked for."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, name: str) -> Any:
        if name not in COMMANDS:
            return None
        target, summary = COMMANDS[name]
        app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
        if sys.argv[1:] in ([], ["--help"]):  # the list of commands needs no more than this
            app.command(name, help=summary)(lambda: None)
            return typer.main.get_command(app)
        if isinstance(target, dict):
            app.callback(help=summary)(lambda: None)
            for part, function in target.items():
                app.command(part)(report_errors(documented(load(function))))
            return typer.main.get_command(app)
        function = load(target)
        if name == "train":  # transformers' own parser reads the options of TrainingArguments
            every = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
            app.command(name, help=summary, context_settings=every)(report_errors(with_rest_of_line(function)))
        else:
            app.command(name)(report_errors(documented(function)))
        return typer.main.get_command(app)


def load(target: str) -> Callable:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


def with_rest_of_line(function: Callable) -> Callable:
    def command(ctx: typer.Context) -> None:
        function(ctx.args)

    return command


def documented(function: Callable) -> Callable:
    """`function` with a signature that typer understands: options in place of keywords, help out of its `Args:`."""
    summary, _, rest = inspect.getdoc(function).partition("\nArgs:\n")
    helps = argument_help(rest)
    hints = typing.get_type_hints(function)
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        kind = command_line_type(hints[parameter.name])
        if kind is None:
            continue
        text = helps.get(parameter.name, "")
        if parameter.kind is parameter.KEYWORD_ONLY:
            info: Any = typer.Option(help=text, show_default=parameter.default not in (None, ""))
        else:
            info = typer.Argument(help=text)
        default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        default = str(default) if isinstance(default, Path) else default
        parameters.append(parameter.replace(annotation=Annotated[kind, info], default=default))
    if parameters:
        text = "a YAML file with any of these options; the command line has the last word."
        option = typer.Option(help=text, callback=read_defaults, is_eager=True)
        parameters.append(
            inspect.Parameter(
                "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
            )
        )

    @wraps(function)
    def command(**options):
        options.pop("config", None)
        function(**options)

    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = summary.strip()
    return command


def read_defaults(ctx: typer.Context, config: str | None) -> None:
    """Options of a YAML file become the command's defaults."""
    if config is None:
        return
    if not Path(config).is_file():
        raise typer.BadParameter(f"there is no file {config}")
    values = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{config} must hold `name: value` lines")
    known = sorted({p.name for p in ctx.command.params} - {"config"})
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise typer.BadParameter(f"{config} has the unknown {', '.join(unknown)}; known are {', '.join(known)}")
    ctx.default_map = values


def command_line_type(hint: Any) -> Any:
    """What a typed keyword is on the command line; None where it cannot be given there."""
    options = [x for x in typing.get_args(hint) if x is not type(None)] if is_union(hint) else [hint]
    optional = is_union(hint) and type(None) in typing.get_args(hint)
    for option in options:
        origin, inner = typing.get_origin(option), typing.get_args(option)
        if option in (str, int, float, bool) or origin is typing.Literal:
            kind = option
        elif option is Path:
            kind = str
        elif origin is not None and origin is not tuple and issubclass(origin, typing.Sequence):
            kind = list[inner[0]]
        elif origin is tuple:
            kind = option
        else:
            continue
        return kind | None if optional else kind
    return None


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, type(int | str))


def argument_help(section: str) -> dict[str, str]:
    """The entries of a docstring's `Args:` section; one entry may name several arguments."""
    helps: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if not line.strip():
            continue
        if not line.startswith(" "):
            break  # the next section
        entry = re.match(r" {4}([\w, ]+): (.*)", line)
        if entry:
            names = [name.strip() for name in entry[1].split(",")]
            helps |= dict.fromkeys(names, entry[2])
        else:
            helps |= {name: f"{helps[name]} {line.strip()}" for name in names}
    return helps


def report_errors(function: Callable) -> Callable:
    """Mistakes of the user end in one line; anything else keeps its traceback."""

    @wraps(function)
    def run(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            typer.echo(f"statecore: {error}", err=True)
            raise SystemExit(1) from None

    return run


def info() -> None:
    """Print versions, the compiled library and what this machine offers."""
    import torch

    from . import ops

    build = ops.build_info()
    rows = {
        "statecore": version("statecore"),
        "library": build["library"],
        "CPU instruction set": build["cpu_isa"],
        "CUDA architectures": build["cuda_architectures"],
        "torch": f"{torch.__version__}, {'with' if build['torch_has_cuda'] else 'without'} CUDA",
        "CUDA devices": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
        "transformers": version("transformers"),
        "Python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    for name, value in rows.items():
        typer.echo(f"{name:<20} {value}")


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, help="Reasoning models that think in states."
)


@app.callback()
def _root() -> None:
    pass


def main() -> None:
    app(prog_name="statecore")


if __name__ == "__main__":
    main()
