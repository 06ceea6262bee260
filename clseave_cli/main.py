"""The Typer app: registers the subcommands and turns errors into one line and an exit code."""

from __future__ import annotations

import atexit
import errno
import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from clseave_cli import processes
from clseave_cli.commands import (
    check,
    compare,
    curve,
    demo,
    evaluate,
    export,
    housekeeping,
    illustrate,
    options,
    predict,
    push,
    serve,
    stages,
    terminal,
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
    # Plain text is not truncated at 80 columns; importing rich would double the start-up time.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

#: Commands that share their work between processes; the others would repeat it.
_SHARED = ("translate", "pretrain", "finetune-ve", "align")

_debug = False


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
    if debug:
        terminal.say(f"threads: {processes.thread_policy()}", to_stderr=True)


def _guarded(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """The command with Ctrl-C and SIGTERM as an error, refused in several processes if useless."""

    @functools.wraps(function)
    def call(**arguments: Any) -> None:
        if processes.process_count() > 1 and name not in _SHARED:
            raise UsageError(f"{name}: runs in one process; start it without a launcher.")
        try:
            with processes.sigterm_as_ctrl_c():
                function(**arguments)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; everything finished so far is on disk.") from None

    return call


_COMMANDS: dict[str, tuple[type[config.StageConfig], Callable[..., None]]] = {
    "demo": (config.DemoConfig, demo.run),
    "translate": (config.TranslateConfig, translate.run),
    "illustrate": (config.IllustrateConfig, illustrate.run),
    "pretrain": (config.PretrainConfig, stages.pretrain),
    "finetune-ve": (config.FinetuneConfig, stages.finetune_ve),
    "align": (config.AlignConfig, stages.align),
    "curve": (config.CurveConfig, curve.run),
    "autoencode": (config.AutoencodeConfig, stages.autoencode),
    "word-align": (config.WordAlignConfig, word_align.run),
    "evaluate": (config.EvaluateConfig, evaluate.run),
    "retrieve": (config.RetrieveConfig, evaluate.retrieve),
    "calibrate": (config.CalibrateConfig, evaluate.calibrate),
    "predict": (config.PredictConfig, predict.run),
    "check": (config.CheckConfig, check.run),
    "export": (config.ExportConfig, export.run),
    "serve": (config.ServeConfig, serve.run),
}

_FUNCTIONS: dict[str, Callable[..., None]] = {
    **{name: options.command(kind, run, name) for name, (kind, run) in _COMMANDS.items()},
    "compare": compare.run,
    "push": push.run,
    "models": housekeeping.models,
    "cache": housekeeping.cache,
    "doctor": housekeeping.doctor,
    "init": housekeeping.init({name: kind for name, (kind, _) in _COMMANDS.items()}),
}

for _name, _function in _FUNCTIONS.items():
    app.command(_name, cls=options.Subcommand)(_guarded(_name, _function))


def _fail(message: str, exit_code: int) -> NoReturn:
    rank = processes.process_rank()
    prefix = "clseave" if rank == 0 else f"clseave (process {rank})"
    sys.stderr.write(f"{prefix}: {terminal.printable(' '.join(message.splitlines()))}\n")
    sys.exit(exit_code)


def _refuse_usage(error: Any) -> NoReturn:
    """Exits with one line about a wrong option, or with the help if there is no command."""
    if len(sys.argv) == 1:
        error.show()
        sys.exit(error.exit_code)
    command = error.ctx.command_path if error.ctx else "clseave"
    message = error.format_message().rstrip(".").replace("Value error, ", "")
    _fail(f"{message[:1].lower()}{message[1:]}; see `{command} --help`.", error.exit_code)


def _silence_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Nobody can act on Pillow's warnings about broken EXIF data or odd palettes.
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _exit_after_broken_pipe() -> NoReturn:
    """Exits without an error: the reader closed the pipe (`clseave … | head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(0)


def _exit_distributed(code: Any) -> None:
    """Exits one of several processes without finalising the interpreter.

    Threads of the communication library may still hold tensors; releasing the last one during
    finalisation aborts the process, and the launcher reports a finished run as failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def main() -> None:
    """Runs the command line; an error prints one line on stderr and sets the exit code."""
    try:
        _run_command()
    except SystemExit as end:
        distributed = sys.modules.get("torch.distributed")
        if processes.process_count() > 1 and distributed and distributed.is_initialized():
            _exit_distributed(end.code)
        raise


def _run_command() -> None:
    processes.prepare_streams()
    _silence_libraries()
    processes.spin_briefly()
    if "_CLSEAVE_COMPLETE" in os.environ:  # fish takes each wrapped line of help for a candidate
        os.environ["COLUMNS"] = "10000"
    stdout = sys.stdout
    try:
        try:
            code = app(standalone_mode=False)
        finally:
            stdout.flush()
        sys.exit(code)
    except SystemExit:
        if sys.stdout is stdout:
            raise
        _exit_after_broken_pipe()  # Typer has replaced stdout and exits with 1
    except BrokenPipeError:
        _exit_after_broken_pipe()
    except ClseaveError as error:
        if _debug:
            raise
        _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:  # such as torch, which some commands do not need
        if _debug:
            raise
        _fail(f"{error.name} is not installed, and this needs it: pip install -e .", 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # Typer's usage errors
            _refuse_usage(error)
        if _debug:
            raise
        # The core turns those of its files into a `ClseaveError`.
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _fail("standard output: the disk is full; free some space and run it again.", 1)
        _fail(f"internal error: {type(error).__name__}: {error} (--debug shows where)", 1)
