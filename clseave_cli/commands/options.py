"""Generates Typer commands from config dataclasses, and resolves options."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer
import typer.core

from clseave_cli.commands import terminal
from clseave_cli.core import config
from clseave_cli.core.config import StageConfig, flag_of, metavar_of, value_type
from clseave_cli.errors import UsageError

C = TypeVar("C", bound=StageConfig)

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE.toml", help="Options from a TOML file; flags win."),
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show fingerprints of data and models.")]

#: Headings of secondary options, in the order of `--help-all`.
_PANELS: dict[type, str] = {
    config.TokenConfig: "Token method",
    config.WordAlignerConfig: "Word alignment",
    config.EngineConfig: "Translation",
    config.GuidedConfig: "Guided pictures",
    config.TrainingConfig: "Training",
    config.DataConfig: "General",
    config.ModelsConfig: "General",
    config.SeededConfig: "General",
    StageConfig: "General",
}
_MORE = "More options"

_METAVARS = {int: "N", float: "N", str: "TEXT"}
#: Longer lists of choices go into the help text.
_LONGEST_METAVAR = 16


class Subcommand(typer.core.TyperCommand):
    """A subcommand with its main options in `--help`, and all in `--help-all`."""

    rich_markup_mode: Any
    _shows_all = False

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.rich_markup_mode = None  # plain text is not truncated at 80 columns
        for parameter in self.params:
            if parameter.metavar is None:  # Typer would show the Python type
                is_argument = parameter.param_type_name == "argument"
                parameter.metavar = (parameter.name or "").upper() if is_argument else "N"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        config_class = getattr(self.callback, "config_class", None)
        if config_class is not None and not ctx.resilient_parsing:
            config.refuse_removed(config_class, args)
            _refuse_keys(config_class, args)
        self._shows_all = "--help-all" in args
        return super().parse_args(ctx, ["--help"] if self._shows_all else args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [re.sub(r"[{}]|\.{3}", "", piece) for piece in super().collect_usage_pieces(ctx)]

    def get_short_help_str(self, limit: int = 0) -> str:
        return (self.help or "").partition("\n")[0]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        titles = ("Arguments", "Options", _MORE, *_PANELS.values())
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in titles}
        parameters: list[Any] = self.get_params(ctx)
        for parameter in parameters:
            is_argument = parameter.param_type_name == "argument"
            title = parameter.rich_help_panel or ("Arguments" if is_argument else "Options")
            record = parameter.get_help_record(ctx)
            if record is not None and (self._shows_all or title in ("Arguments", "Options")):
                names = record[0].partition(" / ")[0].partition(" <")[0]
                sections[title].append((names, record[1]))
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        if any(parameter.rich_help_panel for parameter in parameters) and not self._shows_all:
            formatter.write("\nclseave COMMAND --help-all shows every option.\n")
        if self._shows_all:
            formatter.write("\nA switch such as --resume is undone by --no-resume.\n")


def _refuse_keys(config_class: type[StageConfig], args: list[str]) -> None:
    """Raises `UsageError` for a flag that is now only a key of `--config`."""
    keys = {flag_of(part): part.name for part in dataclasses.fields(config_class)}
    for flag in (argument.partition("=")[0] for argument in args):
        if config_class.FLAGS and keys.get(flag, "") not in ("", *config_class.FLAGS):
            raise UsageError(f"{flag} was removed: put {keys[flag]} into a --config FILE.toml.")


def command(config_class: type[C], run: Callable[..., None], name: str) -> Callable[..., None]:
    """A Typer function that calls `run` with a config made from flags.

    There is a flag for each field of `config_class`, or those in its `FLAGS`. Other parameters of
    `run` have Typer annotations. Models of the hub are downloaded first. `name` is the command's
    table in clseave.toml.
    """
    others = list(inspect.signature(run, eval_str=True).parameters.values())[1:]
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    order = dict.fromkeys((*config_class.FIRST, *fields))
    flags = [
        _flag(config_class, fields[field], hints[field])
        for field in order
        if field in (config_class.FLAGS or fields)
    ]
    extra = [_keyword("config", ConfigFile)]
    if config_class.PRESETS:
        names = ", ".join(config_class.PRESETS)
        preset = typer.Option("--preset", metavar="NAME", help=f"A set of options: {names}.")
        extra.append(_keyword("preset", Annotated[str | None, preset]))

    def invoke(**values: Any) -> None:
        arguments = {parameter.name: values.pop(parameter.name) for parameter in others}
        config_file, preset = values.pop("config"), values.pop("preset", None)
        options = resolve(config_class, values, config_file, preset, name)
        from clseave_cli.core.data.hub import with_local_models

        run(with_local_models(options, terminal.TerminalProgress()), **arguments)

    parameters = [*others, *flags, *extra]
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {p.name: p.annotation for p in parameters}
    invoke.__doc__ = run.__doc__
    invoke.config_class = config_class  # type: ignore[attr-defined]
    return invoke


def resolve(
    config_class: type[C],
    flags: dict[str, Any],
    config_file: Path | None = None,
    preset: str | None = None,
    table: str = "",
) -> C:
    """A config from flags, which win over `--config`, the preset, and a table of clseave.toml.

    Flags that are None or an empty list are unset.

    Raises:
        UsageError: the preset or a key of a file does not exist, or a value has the wrong type.
    """
    values = config.project_options(config_class, table) if table else {}
    values |= config.preset_options(config_class, preset)
    if config_file is not None:
        values |= config.toml_options(config_class, config_file)
    for name, value in flags.items():
        if value is not None and value != []:
            values[name] = tuple(value) if isinstance(value, list) else value
    return config_class(**values)


def _flag(
    config_class: type[StageConfig], field: dataclasses.Field[Any], annotation: Any
) -> inspect.Parameter:
    spelling = flag_of(field)
    help_text, default, kind = field.metadata["help"], field.default, value_type(annotation)
    metavar = metavar_of(field) or _METAVARS.get(kind)
    if get_origin(kind) is typing.Literal:
        metavar = "|".join(get_args(kind))
        if len(metavar) > _LONGEST_METAVAR:
            metavar, help_text = "NAME", f"{help_text} One of {', '.join(get_args(kind))}."
    if kind is bool:
        spelling = f"{spelling}/--no-{spelling[2:]}"
        help_text += " Default: yes." if default else ""
    elif default is not None and default != ():
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        help_text += f" Default: {shown}."
    flag = typer.Option(
        spelling,
        help=help_text,
        metavar=metavar,
        show_default=False,
        envvar="CLSEAVE_RUNS" if field.name == "runs" else None,
        rich_help_panel=_panel(config_class, field.name),
    )
    return _keyword(field.name, Annotated[_optional(annotation), flag])


def _panel(config_class: type[StageConfig], name: str) -> str | None:
    """The heading of a secondary option."""
    first = config_class.FIRST
    if not first or name in first or config_class.FLAGS:
        return None
    for part, title in _PANELS.items():
        if issubclass(config_class, part) and name in part.__annotations__:
            return title
    return _MORE


def _optional(annotation: Any) -> Any:
    if get_origin(annotation) is tuple:
        annotation = list[get_args(annotation)[0]]  # type: ignore[misc]
    return annotation if type(None) in get_args(annotation) else annotation | None


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )
