"""Writes docs/cli.md, the reference of every command and flag, from the program itself.

python docs/generate_cli.py            write it
python docs/generate_cli.py --check    fail if the file is not what would be written
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from pathlib import Path
from typing import Any

import typer

from clseave_cli import main
from clseave_cli.core.config import StageConfig

REFERENCE = Path(__file__).with_name("cli.md")

_INTRODUCTION = """\
# Command line reference

Written by `python docs/generate_cli.py` from the program; do not edit by hand.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done; 1 an error, told in one
line; 2 wrong usage; 130 interrupted, with everything finished so far kept.

Where an option is set in several places, the order is: flag, `--config` file, `--preset`, default.
A key of the `--config` file is the flag without its dashes: `batch_size = 64` or `batch-size = 64`.
"""

_WORDS = {int: "number", float: "number", str: "text", Path: "path"}


def reference() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(main.app)
    lines = [_INTRODUCTION, "## clseave", "", "    clseave [OPTIONS] COMMAND [ARGS]...", ""]
    lines += _table(group.params, None)
    for name, command in group.commands.items():
        config_class, _ = main._COMMANDS[name]
        lines += _section(name, command, config_class)
    return "\n".join(lines).rstrip() + "\n"


def _section(name: str, command: Any, config_class: type[StageConfig]) -> list[str]:
    arguments = [p for p in command.params if _is_argument(p)]
    usage = ["clseave", name, "[OPTIONS]", *(f"[{p.name.upper()}]" for p in arguments)]
    lines = ["", f"## clseave {name}", "", command.help, "", "    " + " ".join(usage)]
    panels: dict[str | None, list[Any]] = {None: []}  # the command's own options go first
    for parameter in command.params:
        panels.setdefault(parameter.rich_help_panel, []).append(parameter)
    for title, parameters in panels.items():
        lines += [""] if title is None else ["", f"{title}:", ""]
        lines += _table(parameters, config_class)
    for preset, values in config_class.PRESETS.items():
        flags = ", ".join(f"`{_spelling(key)} {value}`" for key, value in values.items())
        lines += ["", f"`--preset {preset}` stands for {flags or "the defaults"}."]
    return lines


def _table(parameters: list[Any], config_class: type[StageConfig] | None) -> list[str]:
    fields = {field.name: field for field in dataclasses.fields(config_class or StageConfig)}
    hints = typing.get_type_hints(config_class or StageConfig)
    lines = ["| | value | default | |", "|---|---|---|---|"]
    for parameter in parameters:
        field = fields.get(parameter.name) if config_class else None
        shown = " ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        if _is_argument(parameter):
            shown = f"`{parameter.name.upper()}`"
        annotation = hints[parameter.name] if field else None
        is_flag = not _is_argument(parameter) and parameter.is_flag
        value = "" if is_flag else parameter.metavar or _value(annotation)
        default = "" if field is None else _default(field.default)
        meaning = parameter.help if field is None else field.metadata["help"]
        if parameter.envvar:
            meaning += f" Environment: `{parameter.envvar}`."
        lines.append(f"| {shown} | {value} | {default} | {meaning} |".replace("  ", " "))
    return lines


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _value(annotation: Any) -> str:
    """What a field's type asks the user for, in a word, or its choices."""
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is tuple:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    return _WORDS.get(annotation, "")


def _default(value: Any) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"`{value}`"


def _spelling(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def _main() -> None:
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit("usage: python docs/generate_cli.py [--check]")
    text = reference()
    if not sys.argv[1:]:
        REFERENCE.write_text(text, encoding="utf-8")
    elif not REFERENCE.exists() or REFERENCE.read_text(encoding="utf-8") != text:
        sys.exit("docs/cli.md is out of date: run python docs/generate_cli.py")


if __name__ == "__main__":
    _main()
