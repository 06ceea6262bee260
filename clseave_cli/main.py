"""The Typer app: registers the subcommands and turns errors into one line and an exit code."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from clseave_cli import processes
from clseave_cli.commands import (
    align,
    autoencode,
    check,
    compare,
    curve,
    demo,
    evaluate,
    export,
    finetune_ve,
    options,
    predict,
    pretrain,
    serve,
    translate,
    word_align,
)
from clseave_cli.core import config
from clseave_cli.errors import ClseaveError, Interrupted, UsageError
from clseave_cli.version import __version__

app = typer.Typer(
    name="clseave",
    help="Cross-lingual visual entailment: does this photo entail that sentence, in any language?",
    no_args_is_help=True,
    add_completion=False,
    # Plain text here: rich's Markdown parser alone takes as long to import as everything else.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

#: Commands that several processes can share; the others would only do the same work again.
_SHARED = ("translate", "pretrain", "finetune-ve", "align")

_debug = False


class _Subcommand(typer.core.TyperCommand):
    """A subcommand, whose many options are worth rich's headings."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.rich_markup_mode = "rich"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"clseave {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    global _debug
    _debug = debug


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Lets SIGTERM end a command as Ctrl-C does; a training's own handlers come before it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _guarded(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """The command, with Ctrl-C and SIGTERM as an error, in one process where more are no use."""

    @functools.wraps(function)
    def call(**arguments: Any) -> None:
        if processes.process_count() > 1 and name not in _SHARED:
            raise UsageError(f"{name}: works in one process; start it without a launcher.")
        try:
            with _sigterm_as_ctrl_c():
                function(**arguments)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; everything finished so far is on disk.") from None

    return call


_COMMANDS: dict[str, tuple[type[config.StageConfig], Callable[..., None]]] = {
    "demo": (config.DemoConfig, demo.run),
    "translate": (config.TranslateConfig, translate.run),
    "pretrain": (config.PretrainConfig, pretrain.run),
    "finetune-ve": (config.FinetuneConfig, finetune_ve.run),
    "align": (config.AlignConfig, align.run),
    "curve": (config.CurveConfig, curve.run),
    "autoencode": (config.AutoencodeConfig, autoencode.run),
    "word-align": (config.WordAlignConfig, word_align.run),
    "evaluate": (config.EvaluateConfig, evaluate.run),
    "predict": (config.PredictConfig, predict.run),
    "check": (config.CheckConfig, check.run),
    "export": (config.ExportConfig, export.run),
    "serve": (config.ServeConfig, serve.run),
}

for _name, (_config_class, _run) in _COMMANDS.items():
    app.command(_name, cls=_Subcommand)(_guarded(_name, options.command(_config_class, _run)))

app.command("compare", cls=_Subcommand)(_guarded("compare", compare.run))


def _fail(message: str, exit_code: int) -> NoReturn:
    rank = processes.process_rank()
    speaker = "clseave" if rank == 0 else f"clseave (process {rank})"
    sys.stderr.write(f"{speaker}: {' '.join(message.splitlines())}\n")
    sys.exit(exit_code)


def main() -> None:
    """Runs the command line; every error ends in one line on stderr and its exit code."""
    try:
        app()
    except ClseaveError as error:
        if _debug:
            raise
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader went away (`clseave … | head`): nothing is wrong, and nobody listens.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if _debug:
            raise
        _fail(f"internal error: {type(error).__name__}: {error} (--debug shows where)", 1)
