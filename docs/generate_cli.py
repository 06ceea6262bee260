"""Writes docs/cli.md, the reference of every command and flag, from the program itself.

python docs/generate_cli.py            write it
python docs/generate_cli.py --check    fail if the file is not what would be written
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from pathlib import Path
from typing import Any

import typer

from clseave_cli import main
from clseave_cli.core.config import StageConfig, metavar_of

REFERENCE = Path(__file__).with_name("cli.md")

_INTRODUCTION = """\
# Command line reference

Written by `python docs/generate_cli.py` from the program; do not edit by hand.

`--help` shows the options that matter most, `--help-all` every one. A switch such as `--resume` is
undone by `--no-resume`. `clseave --install-completion` sets up completion in bash, zsh and fish.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done; 1 an error, in one line;
2 wrong usage; 130 interrupted, with everything finished so far kept.

Beside other programs, threads that wait by spinning slow torch down. clseave soon lets them sleep
(`GOMP_SPINCOUNT=1000 OMP_WAIT_POLICY=active`, and `KMP_BLOCKTIME=1` for other runtimes) unless you
set one of the three; `OMP_NUM_THREADS` sets their number. `clseave --debug COMMAND` shows them all.

Options win in this order: flag, `--config` file, `--preset`, the command's table in `clseave.toml`
(`clseave init` writes one), default. A key of a file is the flag without its dashes:
`batch_size = 64` or `batch-size = 64`.
"""

_WORDS = {int: "number", float: "number", str: "text", Path: "path"}


def reference() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(main.app)
    lines = [_INTRODUCTION, "## clseave", "", "    clseave [OPTIONS] COMMAND [ARGS]...", ""]
    lines += _table(group.params, {}, None)
    for name, command in group.commands.items():
        lines += _section(
            name, command, main._COMMANDS[name][0] if name in main._COMMANDS else None
        )
    return "\n".join(lines).rstrip() + "\n"


def _section(name: str, command: Any, config_class: type[StageConfig] | None) -> list[str]:
    arguments = [p for p in command.params if _is_argument(p)]
    names = [p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments]
    usage = ["clseave", name, "[OPTIONS]", *names]
    hints = typing.get_type_hints(inspect.unwrap(command.callback))
    lines = ["", f"## clseave {name}", "", command.help, "", "    " + " ".join(usage)]
    panels: dict[str | None, list[Any]] = {None: []}  # the command's own options go first
    for parameter in command.params:
        panels.setdefault(parameter.rich_help_panel, []).append(parameter)
    for title, parameters in panels.items():
        lines += [""] if title is None else ["", f"{title}:", ""]
        lines += _table(parameters, hints, config_class)
    for preset, values in (config_class.PRESETS if config_class else {}).items():
        flags = ", ".join(_setting(key, value) for key, value in values.items())
        flags = flags or "the defaults"
        lines += ["", f"`--preset {preset}` stands for {flags}."]
    return lines


def _table(
    parameters: list[Any], hints: dict[str, Any], config_class: type[StageConfig] | None
) -> list[str]:
    fields = {field.name: field for field in dataclasses.fields(config_class or _NoOptions)}
    lines = ["| | value | default | |", "|---|---|---|---|"]
    for parameter in parameters:
        field = fields.get(parameter.name)
        is_argument = _is_argument(parameter)
        names = [parameter.name.upper()] if is_argument else _flags(parameter)
        shown = " ".join(f"`{name}`" for name in names)
        is_flag = not is_argument and parameter.is_flag
        declared = metavar_of(field) if field else parameter.metavar
        if is_argument or declared == "N":  # as `--help` has it
            declared = None
        value = "" if is_flag else declared or _value(hints[parameter.name])
        default = _default(field.default) if field else "" if is_flag else parameter.default
        default = "" if default in (None, "") else f"`{default}`"
        meaning = field.metadata["help"] if field else parameter.help
        if parameter.envvar:
            meaning += f" Environment: `{parameter.envvar}`."
        lines.append(f"| {shown} | {value} | {default} | {meaning} |".replace("  ", " "))
    return lines


@dataclasses.dataclass(frozen=True)
class _NoOptions:
    """Stands in where a command has no config."""


def _flags(parameter: Any) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _value(annotation: Any) -> str:
    """What a parameter's type asks the user for, in a word, or its choices."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is list:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    return _WORDS.get(annotation, "")


def _default(value: Any) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _setting(field_name: str, value: Any) -> str:
    flag = "--" + field_name.replace("_", "-")
    return f"no `{flag}`" if value is None else f"`{flag} {value}`"


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
