"""`clseave models`, `cache`, `doctor` and `init`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from clseave_cli.commands import terminal
from clseave_cli.commands.options import Json
from clseave_cli.core.config import StageConfig, project_template
from clseave_cli.errors import UsageError

_PROJECT_FILE = Path("clseave.toml")
#: Expensive to recompute, so `--clear all` keeps it.
_KEPT = "translation"


def models(
    runs: Annotated[
        Path,
        typer.Option("--runs", envvar="CLSEAVE_RUNS", metavar="DIR", help="Folder of the models."),
    ] = Path("runs"),
    *,
    json: Json = False,
) -> None:
    """List the models: languages, teacher, dev metrics, size, and which one predict uses."""
    from clseave_cli.core.data.hub import model_folder
    from clseave_cli.core.models.listing import list_models

    listing = list_models(model_folder(runs, terminal.TerminalProgress()))
    if json:
        chosen = {k: {"model": name, "why": why} for k, (name, why) in listing.predict.items()}
        terminal.print_json({"models": list(map(asdict, listing.entries)), "predict": chosen})
        return
    for entry in listing.entries:
        parts = [entry.kind, ", ".join(entry.languages), _size(entry.num_bytes)]
        parts += [f"teacher {entry.teacher[:12]}"] if entry.teacher else []
        parts += [f"fingerprint {entry.fingerprint[:12]}"] if entry.fingerprint else []
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in entry.dev.items())
        parts += [f"dev {metrics}"] if metrics else []
        parts += [f"unusable: {entry.problem}"] if entry.problem else []
        terminal.say(f"{entry.name}: {' · '.join(filter(None, parts))}")
    for lang, (name, why) in listing.predict.items():
        terminal.say(f"predict --lang {lang}: {name} ({why})")


def cache(
    clear: Annotated[
        list[str] | None,
        typer.Option(
            "--clear", metavar="KIND", help=f"Cache to delete; repeatable; all: all but {_KEPT}."
        ),
    ] = None,
    *,
    json: Json = False,
) -> None:
    """Show the sizes of the caches, or delete some; they are computed again when needed.

    CLSEAVE_CACHE sets the folder. Models from the hub are in another cache:
    see hf cache --help.
    """
    from clseave_cli.core.files import CACHES, cache_root, cache_sizes, clear_caches

    if clear:
        cheap = [kind for kind in CACHES if kind != _KEPT]
        kinds = [each for kind in clear for each in (cheap if kind == "all" else [kind])]
        terminal.say(f"{_size(clear_caches(kinds))} freed")
        return
    sizes = cache_sizes()
    if json:
        terminal.print_json({"folder": cache_root(), "bytes": sizes})
        return
    terminal.say(f"{cache_root()}: {_size(sum(sizes.values()))}")
    for kind, size in sizes.items():
        terminal.say(f"  {kind:<16} {_size(size):>10}  {CACHES[kind]}")


def doctor(
    *,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure for five seconds. Default: yes.")
    ] = True,
    json: Json = False,
) -> None:
    """Show versions, devices, threads, extras, and the speed of matrix products."""
    from clseave_cli.core.training.machine import EXTRAS, examine

    report = examine(seconds=5.0 if speed else 0.0)
    if json:
        terminal.print_json(asdict(report))
        return
    terminal.say(" · ".join(f"{name} {version}" for name, version in report.versions.items()))
    terminal.say(f"devices: {', '.join(report.devices)}")
    terminal.say(f"threads: {report.threads}")
    for extra, missing in report.missing.items():
        state = f"pip install -e '.[{extra}]'" if missing else "installed"
        terminal.say(f"  {extra:<12} {EXTRAS[extra][0]}: {state}")
    for name, rate in report.speed.items():
        terminal.say(f"{name}: {rate:,.0f} billion operations per second")


def init(commands: Mapping[str, type[StageConfig]]) -> Callable[[], None]:
    """The command `init`, for the options of these commands."""

    def run() -> None:
        """Write a clseave.toml with every main option and its default, commented out.

        An existing file is never overwritten.
        """
        from clseave_cli.core.files import writing

        if _PROJECT_FILE.exists():
            raise UsageError(f"{_PROJECT_FILE}: already exists and was not changed.")
        with writing(_PROJECT_FILE), _PROJECT_FILE.open("x", encoding="utf-8") as stream:
            stream.write(project_template(commands))
        terminal.say(f"{_PROJECT_FILE}: remove the # in front of options you change")

    return run


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
