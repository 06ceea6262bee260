"""Typer commands generated from config dataclasses, and the order in which options win."""

from __future__ import annotations

import dataclasses
import inspect
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer

from clseave_cli.core.config import (
    DataConfig,
    EngineConfig,
    ModelsConfig,
    SeededConfig,
    StageConfig,
    TrainingConfig,
    WordAlignerConfig,
)
from clseave_cli.errors import UsageError

C = TypeVar("C", bound=StageConfig)

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE.toml", help="Options from a TOML file; flags win."),
]


#: Headings of the options that several stages share.
_PANELS: dict[type, str] = {
    DataConfig: "Data",
    EngineConfig: "Translation",
    WordAlignerConfig: "Word alignment",
    TrainingConfig: "Training",
    ModelsConfig: "General",
    SeededConfig: "General",
    StageConfig: "General",
}


def command(config_class: type[C], run: Callable[..., None]) -> Callable[..., None]:
    """The function Typer needs for `run(config, **own)`: one flag per field of `config_class`.

    Parameters of `run` after the first are flags and arguments of the command itself, declared
    with Typer's own annotations. Options win in this order: flag, `--config` file, `--preset`,
    default.
    """
    own = list(inspect.signature(run, eval_str=True).parameters.values())[1:]
    flags = [_flag(config_class, field, annotation) for field, annotation in _fields(config_class)]
    extra = [_keyword("config", ConfigFile)]
    if config_class.PRESETS:
        names = ", ".join(config_class.PRESETS)
        preset = typer.Option("--preset", metavar="NAME", help=f"A set of options: {names}.")
        extra.append(_keyword("preset", Annotated[str | None, preset]))

    def invoke(**given: Any) -> None:
        own_values = {parameter.name: given.pop(parameter.name) for parameter in own}
        config_file, preset = given.pop("config"), given.pop("preset", None)
        run(resolve(config_class, given, config_file, preset), **own_values)

    parameters = [*own, *flags, *extra]
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {p.name: p.annotation for p in parameters}
    invoke.__doc__ = run.__doc__
    return invoke


def resolve(
    config_class: type[C],
    flags: dict[str, Any],
    config_file: Path | None = None,
    preset: str | None = None,
) -> C:
    """The config that flags, file, preset and defaults make together.

    Raises:
        UsageError: the preset or a key of the file does not exist, or a value has the wrong type.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        if preset not in config_class.PRESETS:
            known = ", ".join(config_class.PRESETS)
            raise UsageError(f"--preset {preset}: unknown; there are: {known}.")
        values |= config_class.PRESETS[preset]
    if config_class.PROJECT_TABLE is not None:
        values |= _read_project(config_class, config_class.PROJECT_TABLE)
    if config_file is not None:
        values |= _read_toml(config_class, config_file, f"--config {config_file}")
    for name, value in flags.items():
        if value is not None and value != []:
            values[name] = tuple(value) if isinstance(value, list) else value
    return config_class(**values)


def _fields(config_class: type[StageConfig]) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(config_class)
    return [(field, hints[field.name]) for field in dataclasses.fields(config_class)]


def _flag(
    config_class: type[StageConfig], field: dataclasses.Field[Any], annotation: Any
) -> inspect.Parameter:
    spelling = field.metadata["flag"] or "--" + field.name.replace("_", "-")
    help_text, default = field.metadata["help"], field.default
    if annotation is bool:
        spelling = f"{spelling}/--no-{spelling[2:]}"
    elif default is not None and default != ():
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        help_text += f" (default: {shown})"
    flag = typer.Option(
        spelling,
        help=help_text,
        metavar=field.metadata["metavar"],
        show_default=False,
        envvar="CLSEAVE_RUNS" if field.name == "runs" else None,
        rich_help_panel=_panel(config_class, field.name),
    )
    return _keyword(field.name, Annotated[_optional(annotation), flag])


def _panel(config_class: type[StageConfig], name: str) -> str | None:
    """The heading an option stands under in `--help`: what the first class to have it is for."""
    for part, title in _PANELS.items():
        if issubclass(config_class, part) and name in part.__annotations__:
            return title
    return None


def _optional(annotation: Any) -> Any:
    if get_origin(annotation) is tuple:
        annotation = list[get_args(annotation)[0]]  # type: ignore[misc]
    return annotation if _admits_none(annotation) else annotation | None


def _admits_none(annotation: Any) -> bool:
    return isinstance(annotation, types.UnionType) and type(None) in get_args(annotation)


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _read_project(config_class: type[StageConfig], table: str) -> dict[str, Any]:
    """What the table of the working directory's clseave.toml or pyproject.toml sets."""
    within = ("tool", "clseave", table)
    for name, keys in (
        ("clseave.toml", within), ("clseave.toml", (table,)), ("pyproject.toml", within),
    ):  # fmt: skip
        if Path(name).is_file() and (values := _read_toml(config_class, Path(name), name, keys)):
            return values
    return {}


def _read_toml(
    config_class: type[StageConfig], path: Path, shown: str, table: Sequence[str] = ()
) -> dict[str, Any]:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{shown}: cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{shown}: not valid TOML ({error}).") from None
    for key in table:
        raw = raw.get(key, {})
        if not isinstance(raw, dict):
            raise UsageError(f"{shown}: {key} is not a table.")
    annotations = {field.name: annotation for field, annotation in _fields(config_class)}
    values = {}
    for key, value in raw.items():
        name = key.replace("-", "_")
        if name not in annotations:
            known = ", ".join(annotations)
            raise UsageError(f"{shown}: no option named {key}; there are: {known}.")
        values[name] = _convert(shown, key, value, annotations[name])
    return values


def _convert(shown: str, key: str, value: Any, annotation: Any) -> Any:
    """`value` as the field's type, by the few types that config fields have."""
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(shown, key, item, get_args(annotation)[0]) for item in items)
    if get_origin(annotation) is typing.Literal:
        if value in get_args(annotation):
            return value
        expected = " or ".join(map(str, get_args(annotation)))
    elif annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif annotation is Path and isinstance(value, str):
        return Path(value)
    elif type(value) is annotation:
        return value
    else:
        expected = annotation.__name__
    raise UsageError(f"{shown}: {key} = {value!r}, expected {expected}.")
