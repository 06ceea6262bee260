"""`clseave predict`: does this photo entail that sentence?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clseave_cli.commands import terminal
from clseave_cli.core.config import PredictConfig
from clseave_cli.errors import UsageError

if TYPE_CHECKING:
    from clseave_cli.core.prediction import Prediction

_BAR_WIDTH = 30


def run(
    config: PredictConfig,
    image: Annotated[Path | None, typer.Argument(help="The picture.", show_default=False)] = None,
    hypothesis: Annotated[
        str | None, typer.Argument(help="The sentence.", show_default=False)
    ] = None,
    *,
    source: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="JSONL file of image and hypothesis."),
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="JSONL file to write.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say whether an image entails, contradicts or leaves open a sentence.

    Either IMAGE and HYPOTHESIS, or --input FILE and --output FILE.
    """
    if (source is None) != (target is None):
        raise UsageError("--input and --output go together.")
    if (source is None) == (image is None or hypothesis is None):
        raise UsageError("give IMAGE and HYPOTHESIS, or --input FILE and --output FILE.")

    from clseave_cli.core import prediction

    if source is not None and target is not None:
        done = prediction.predict_file(config, source, target, terminal.TerminalProgress())
        counts = {"predicted": done.num_predicted, "errors": done.num_errors, "output": str(target)}
        if json:
            terminal.print_json(counts)
        else:
            terminal.stdout().print(
                f"{target}: {done.num_predicted} predicted, {done.num_errors} with an error",
                soft_wrap=True,
            )
        return
    assert image is not None and hypothesis is not None
    model = prediction.VisualEntailment.from_pretrained(
        config.runs, config.lang, config.device, config.precision
    )
    start = time.perf_counter()
    result = model(image, hypothesis)
    seconds = time.perf_counter() - start
    if result.truncated:
        terminal.stderr().print("the hypothesis is too long and was cut at the encoder's limit.")
    if json:
        terminal.print_json(result.to_json())
    else:
        _show(result, seconds)


def _show(result: Prediction, seconds: float) -> None:
    terminal.stdout().print(f"[bold]{result.label}[/bold]")
    for label, probability in result.probabilities.items():
        bar = "█" * round(_BAR_WIDTH * probability)
        terminal.stdout().print(f"  {label:<13} {100 * probability:5.1f} %  {bar}")
    terminal.stdout().print(
        f"  {result.lang} · {result.model} · {1000 * seconds:.0f} ms", style="dim", soft_wrap=True
    )
