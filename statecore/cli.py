"""The `statecore` command.

Every subcommand is a function of the package, or several by name: the signature gives the options, the docstring the
help. A keyword whose type is a dataclass, an option group, stands for an option for each of its fields. Functions are
imported when they are called, so `statecore --help` and `statecore info` do not wait for transformers.
"""

import importlib
import inspect
import platform
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .settings import option_names, read_yaml

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

# Deprecated spellings of `--output-dir`: another option, or the last positional argument. They still work, with a
# warning, and so do their names in YAML files.
OLD_SPELLINGS = {
    "demo": "output",
    "prepare": "output",
    "metastable world": "output",
    "metastable traces": "output",
    "flow": "--out",
    "ssd": "--output",
    "dynamics record": "--out",
    "dynamics prune": "--out",
    "dynamics lower": "--out",
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
        if sys.argv[1:] in ([], ["--help"]):  # the list of commands takes no more, and imports nothing
            app.command(name, help=summary)(lambda: None)
        elif isinstance(target, dict):
            app.callback(help=summary)(lambda: None)
            for part, function in target.items():
                add_command(app, part, load(function))
        elif name == "train":  # transformers' own parser reads the options of TrainingArguments
            everything = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
            command = report_errors(with_rest_of_line(load(target)))
            app.command(name, help=summary, context_settings=everything)(command)
        else:
            add_command(app, name, load(target))
        return typer.main.get_command(app)


def load(target: str) -> Callable:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


def with_rest_of_line(function: Callable) -> Callable:
    def command(ctx: typer.Context) -> None:
        function(ctx.args)

    return command


def add_command(app: typer.Typer, name: str, function: Callable) -> None:
    app.command(name, cls=Command)(report_errors(documented(function)))


def report_errors(function: Callable) -> Callable:
    """Users' mistakes end in one line; anything else keeps its traceback."""

    @wraps(function)
    def run(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            typer.echo(f"statecore: {error}", err=True)
            raise SystemExit(1) from None

    return run


# ----------------------------------------------------------------------------------------------------------------------
# From the command line to options


class Command(TyperCommand):
    """A command that takes defaults from `--config`, underscores for dashes, and old spellings of its output folder."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        old = OLD_SPELLINGS.get(ctx.command_path.partition(" ")[2])
        args = [self.current_spelling(arg, old) for arg in args]
        given, extra, _ = self.make_parser(ctx).parse_args(list(args))
        ctx.default_map = self.read_defaults(given.get("config"), old)
        if old == "output" and "output_dir" not in given and "output_dir" not in ctx.default_map:
            return self.parse_positional_folder(ctx, args, given, extra)
        return super().parse_args(ctx, args)

    def current_spelling(self, arg: str, old: str | None) -> str:
        """`--some_name=value` as `--some-name=value`, and an old option for the output folder as `--output-dir`."""
        name, equals, value = arg.partition("=")
        if not name.startswith("--"):
            return arg
        name = name.replace("_", "-")
        if name == old:
            warn_of(name)
            name = "--output-dir"
        known = {option for parameter in self.params for option in (*parameter.opts, *parameter.secondary_opts)}
        return name + equals + value if name in known else arg  # else it is a value, or refused as it was typed

    def read_defaults(self, config: str | None, old: str | None) -> dict[str, Any]:
        """Options from a YAML file."""
        if config is None:
            return {}
        known = {parameter.name for parameter in self.params} - {"config"}
        old_name = old.removeprefix("--") if old else "output_dir"
        try:
            values = read_yaml(config, known | {old_name})
        except (ValueError, OSError) as error:
            raise typer.BadParameter(str(error)) from error
        if old_name != "output_dir" and old_name in values:
            warn_of(f"`{old_name}` in {config}")
            values.setdefault("output_dir", values.pop(old_name))
        return values

    def parse_positional_folder(
        self, ctx: typer.Context, args: list[str], given: dict[str, Any], extra: list[str]
    ) -> list[str]:
        """Takes the last positional argument for the output folder: one too many, or the last of any number."""
        several = next((p.name for p in self.params if p.param_type_name == "argument" and p.nargs == -1), None)
        values = given.get(several)
        if len(extra) == 1:
            ctx.default_map["output_dir"] = extra[0]
            ctx.allow_extra_args = True
        elif isinstance(values, (list, tuple)) and len(values) > 1:
            ctx.default_map["output_dir"] = values[-1]
        else:
            return super().parse_args(ctx, args)
        warn_of("a positional output folder")
        super().parse_args(ctx, args)
        if not extra:
            ctx.params[several] = ctx.params[several][:-1]
        ctx.args = []
        return ctx.args


def warn_of(spelling: str) -> None:
    typer.echo(f"statecore: {spelling} is deprecated, use --output-dir", err=True)


# ----------------------------------------------------------------------------------------------------------------------
# From functions to commands

CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None, typer.Option(help="a YAML file with any of these options; the command line has the last word.")
    ],
)


def documented(function: Callable) -> Callable:
    """`function` with a signature for typer: keywords and the fields of option groups become options, with the help
    from their `Args:`.
    """
    summary, helps = described(function)
    hints = typing.get_type_hints(function)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(hints[name]):
            groups[name] = hints[name]
            parameters += group_parameters(hints[name], parameter.default, helps)
        else:
            parameters += command_line_parameter(parameter, hints[name], helps.get(name, ""))
    if parameters:
        parameters.append(CONFIG)

    @wraps(function)
    def command(**options):
        options.pop("config", None)
        for name, group in groups.items():
            options[name] = group(**{field: options.pop(option) for option, field in option_names(group).items()})
        function(**options)

    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = summary
    return command


def group_parameters(group: type, default: Any, helps: Mapping[str, str]) -> Iterator[inspect.Parameter]:
    """The fields of an option group as options. The command's help (`helps`) takes precedence over the group's, and
    that over the help of the groups it extends.
    """
    group_helps = {name: text for base in reversed(group.__mro__) for name, text in described(base)[1].items()}
    hints = typing.get_type_hints(group)
    fields = inspect.signature(group).parameters
    for option, name in option_names(group).items():
        value = fields[name].default if default is inspect.Parameter.empty else getattr(default, name)
        parameter = inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=value)
        yield from command_line_parameter(parameter, hints[name], helps.get(option) or group_helps.get(name, ""))


def command_line_parameter(parameter: inspect.Parameter, hint: Any, text: str) -> Iterator[inspect.Parameter]:
    """The parameter as typer reads it; none if a command line cannot give its value."""
    kind = command_line_type(hint)
    if kind is None:
        return
    default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    default = str(default) if isinstance(default, Path) else default
    text = text.replace("[", r"\[")  # typer's help would take it for markup
    if parameter.kind is parameter.KEYWORD_ONLY or parameter.name == "output_dir":
        info: Any = typer.Option(help=text, show_default=parameter.default not in (None, ""))
        parameter = parameter.replace(kind=parameter.KEYWORD_ONLY)
    else:
        info = typer.Argument(help=text)
    yield parameter.replace(annotation=Annotated[kind, info], default=default)


def command_line_type(hint: Any) -> Any:
    """The type for typer that stands for a keyword's; None if a command line cannot give such a value."""
    options = [x for x in typing.get_args(hint) if x is not type(None)] if is_union(hint) else [hint]
    optional = is_union(hint) and type(None) in typing.get_args(hint)
    for option in options:
        origin, inner = typing.get_origin(option), typing.get_args(option)
        if option in (str, int, float, bool) or origin is typing.Literal:
            kind = option
        elif option is Path:
            kind = str
        elif origin is not None and origin is not tuple and issubclass(origin, Sequence):
            kind = list[inner[0]]
        elif origin is tuple:
            kind = option
        else:
            continue
        return kind | None if optional else kind
    return None


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, type(int | str))


def described(documented_object: Any) -> tuple[str, dict[str, str]]:
    """What a docstring says before its `Args:`, and the help for each of them."""
    summary, _, rest = (inspect.getdoc(documented_object) or "").partition("\nArgs:\n")
    return summary.strip(), argument_help(rest)


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


# ----------------------------------------------------------------------------------------------------------------------
# The program


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
