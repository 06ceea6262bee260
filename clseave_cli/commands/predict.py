"""`clseave predict`: does this photo entail that sentence?"""

from __future__ import annotations

import os
import sys
import time
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clseave_cli.commands import terminal
from clseave_cli.commands.options import Json
from clseave_cli.core.config import PredictConfig
from clseave_cli.errors import ClseaveError, DataError, UsageError
from clseave_cli.processes import use_one_thread

if TYPE_CHECKING:
    from clseave_cli.core.prediction.predictor import Prediction

_BAR_WIDTH = 30
_STREAM = Path("-")


def run(
    config: PredictConfig,
    image: Annotated[Path | None, typer.Argument(help="The picture.", show_default=False)] = None,
    hypothesis: Annotated[
        str | None, typer.Argument(help="The sentence.", show_default=False)
    ] = None,
    *,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", metavar="FILE", help="Rows of image and hypothesis, any format; -: stdin."
        ),
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="JSONL to write; -: stdout.")
    ] = None,
    explain: Annotated[
        Path | None,
        typer.Option("--explain", metavar="FILE", help="PNG to write: where the model looked."),
    ] = None,
    json: Json = False,
) -> None:
    """Say whether an image entails, contradicts or leaves open a sentence.

    Either IMAGE and HYPOTHESIS, or --input FILE and --output FILE.
    """
    if (source is None) != (target is None):
        raise UsageError("--input and --output go together.")
    if (source is None) == (image is None or hypothesis is None):
        raise UsageError("give IMAGE and HYPOTHESIS, or --input FILE and --output FILE.")
    if explain is not None and source is not None:
        raise UsageError("--explain goes with IMAGE and HYPOTHESIS.")
    if source is not None and target is not None:
        _predict_file(config, source, target, json)
        return
    assert image is not None and hypothesis is not None
    if config.resume:
        raise UsageError("--resume goes with --input and --output.")
    if config.images is not None:
        raise UsageError("--images goes with --input and --output; IMAGE is a path.")

    # One pair is so little work that two threads would mostly wait for each other.
    use_one_thread()
    from clseave_cli.core.data.heat_map import require_writable, write_png
    from clseave_cli.core.prediction.predictor import VisualEntailment

    if explain is not None:
        require_writable(explain)
    model = VisualEntailment.from_pretrained(
        config.runs, config.lang, config.device, config.precision, lasting=False
    )
    start = time.perf_counter()
    result = model.predict([(image, hypothesis)])[0]
    seconds = time.perf_counter() - start
    if isinstance(result, ClseaveError):
        raise result
    if explain is not None:
        require_writable(explain)
        write_png(model.explain(image, result), explain)
    if result.truncated:
        terminal.say(
            "the hypothesis is too long and was cut at the encoder's limit.", to_stderr=True
        )
    if result.warning:
        terminal.say(f"warning: {result.warning}", to_stderr=True)
    if json:
        terminal.print_json(result.to_json())
    else:
        _show(result, seconds)


def _predict_file(config: PredictConfig, source: Path, target: Path, json: bool) -> None:
    if json and target == _STREAM:
        raise UsageError("--json and --output - both write to stdout; choose one.")

    from clseave_cli.core.prediction.predictor import predict_file

    for path, stream, name in ((source, sys.stdin, "--input"), (target, sys.stdout, "--output")):
        # `main` has put the null device in the place of a closed stdout.
        if path == _STREAM and (stream is None or getattr(stream, "name", "") == os.devnull):
            raise UsageError(f"{name} -: the stream is closed; give a file.")
    done = predict_file(
        config,
        sys.stdin.buffer if source == _STREAM else source,
        sys.stdout.buffer if target == _STREAM else target,
        terminal.TerminalProgress(),
    )
    if json:
        terminal.print_json(
            {"predicted": done.num_predicted, "errors": done.num_errors, "output": str(target)}
        )
    else:
        # Only answers go to a stdout that others read.
        name = "stdout" if target == _STREAM else str(target)
        counts = f"{done.num_predicted} predicted, {done.num_errors} with an error"
        terminal.say(f"{name}: {counts}", to_stderr=target == _STREAM)
    if done.num_errors and not done.num_predicted:
        raise DataError(f"no row could be judged; the first: {done.first_error}")


def _show(result: Prediction, seconds: float) -> None:
    if isinstance(sys.stdout, TextIOWrapper):  # a folder's name may need letters stdout lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    out = terminal.stdout()
    block = "█" if out.encoding.startswith("utf") else "#"
    out.print(result.label, style="bold")
    for label, probability in result.probabilities.items():
        bar = block * round(_BAR_WIDTH * probability)
        out.print(f"  {label:<13} {100 * probability:5.1f} %  {bar}")
    dot = "·" if out.encoding.startswith("utf") else "-"
    out.print(
        f"  {result.lang} {dot} {result.model} {dot} {1000 * seconds:.0f} ms",
        style="dim",
        soft_wrap=True,
        markup=False,
    )
