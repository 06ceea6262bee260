"""`clseave predict`: does this photo entail that sentence?"""

from __future__ import annotations

import glob
import itertools
import os
import sys
import time
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from clseave_cli.commands import terminal
from clseave_cli.commands.options import Json
from clseave_cli.core.config import PredictConfig
from clseave_cli.errors import ClseaveError, DataError, UsageError
from clseave_cli.processes import use_one_thread

if TYPE_CHECKING:
    from clseave_cli.core.prediction.predictor import Prediction, VisualEntailment

_BAR_WIDTH = 30
_STREAM = Path("-")


def run(
    config: PredictConfig,
    image: Annotated[
        str | None,
        typer.Argument(help="Picture, folder, 'pattern*.jpg', or -: stdin.", show_default=False),
    ] = None,
    hypothesis: Annotated[
        list[str] | None, typer.Argument(help="Sentence, or several.", show_default=False)
    ] = None,
    *,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", metavar="FILE", help="Rows with image and hypothesis, any format; -: stdin."
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FILE", help="Answers in the format of --input; unset, -: stdout."
        ),
    ] = None,
    explain: Annotated[
        Path | None,
        typer.Option("--explain", metavar="FILE", help="PNG to write: where the model looked."),
    ] = None,
    json: Json = False,
) -> None:
    """Predict whether an image entails, contradicts or leaves open a sentence.

    Give IMAGE and HYPOTHESIS, or several of both, or --input FILE.
    """
    if (source is None) == (image is None or not hypothesis) or (source and image):
        raise UsageError("give IMAGE and HYPOTHESIS, or --input FILE.")
    if source is not None and explain is not None:
        raise UsageError("--explain goes with IMAGE and HYPOTHESIS.")
    if source is not None:
        _predict_file(config, source, target or _STREAM, json)
        return
    assert image is not None and hypothesis
    for name in ("resume", "images", "image_column", "text_column"):
        if getattr(config, name):
            raise UsageError(f"--{name.replace('_', '-')} goes with --input.")
    if target is not None:
        raise UsageError("--output goes with --input.")
    pictures, sentences = _split_arguments(image, hypothesis)
    is_single = len(pictures) * len(sentences) == 1
    if explain is not None and not is_single:
        raise UsageError("--explain goes with one IMAGE and one HYPOTHESIS.")
    if is_single:  # too little work for several threads, which would mostly wait
        use_one_thread()
    from clseave_cli.core.data.heat_map import require_writable
    from clseave_cli.core.prediction.predictor import VisualEntailment

    if explain is not None:
        require_writable(explain)
    model = VisualEntailment.from_pretrained(
        config.runs, config.lang, config.device, config.precision, config.student,
        lasting=not is_single, unsure=config.unsure, progress=terminal.TerminalProgress(),
    )  # fmt: skip
    if is_single:
        _predict_one(model, pictures[0], sentences[0], explain, json)
    else:
        _predict_several(model, config.batch_size, pictures, sentences, json)


def _split_arguments(image: str, words: list[str]) -> tuple[list[str | bytes], list[str]]:
    """The pictures and the sentences among the arguments."""
    from clseave_cli.core.data.records import IMAGE_EXTENSIONS

    def is_picture(name: str) -> bool:
        with suppress(OSError):  # a sentence, too long for a path
            return name.lower().endswith(IMAGE_EXTENSIONS) and Path(name).is_file()
        return False

    if image == "-":
        _require_open(sys.stdin, "IMAGE")
        return [sys.stdin.buffer.read()], words
    paths = [image]
    with suppress(OSError):  # `predict` reports what is wrong with the path
        if image and Path(image).is_dir():
            paths = [str(path) for path in sorted(Path(image).iterdir())]
        elif glob.has_magic(image) and not Path(image).exists():
            paths = sorted(glob.glob(image, recursive=True))  # noqa: PTH207 - also from the root
    if paths != [image] and not (paths := list(filter(is_picture, paths))):
        raise DataError(f"{image}: no pictures; expected files such as a.jpg.")
    # The shell expands a pattern to several arguments.
    more = list(itertools.takewhile(is_picture, words[:-1]))
    return [*paths, *more], words[len(more) :]


def _predict_one(
    model: VisualEntailment, picture: str | bytes, sentence: str, explain: Path | None, json: bool
) -> None:
    from clseave_cli.core.data.heat_map import write_png

    start = time.perf_counter()
    result = model.predict([(picture, sentence)])[0]
    seconds = time.perf_counter() - start
    if isinstance(result, ClseaveError):
        raise result
    if explain is not None:
        write_png(model.explain(picture, result), explain)
    if result.truncated:
        terminal.say("the hypothesis was too long and was truncated.", to_stderr=True)
    if result.warning:
        terminal.say(f"warning: {result.warning}", to_stderr=True)
    if json:
        terminal.print_json(result.to_json())
    else:
        _print_bars(result, seconds)


def _predict_several(
    model: VisualEntailment,
    batch_size: int,
    pictures: list[str | bytes],
    sentences: list[str],
    json: bool,
) -> None:
    pairs = list(itertools.product(pictures, sentences))
    results = model.batch(pairs, batch_size=batch_size)
    answers: list[dict[str, Any]] = []
    _escape_unencodable()
    for (picture, sentence), result in zip(pairs, results, strict=True):
        name = picture if isinstance(picture, str) else "the image"
        if isinstance(result, ClseaveError):
            answers.append({"image": name, "hypothesis": sentence, "error": str(result)})
            line = f"{'error':<24}{result}"
        else:
            answers.append(result.to_json())
            pair = [name] * (len(pictures) > 1) + [sentence] * (len(sentences) > 1)
            percent = 100 * max(result.probabilities.values())
            line = f"{result.label:<14}{percent:6.1f} %  {': '.join(pair)}"
        if not json:
            terminal.say(line)
    for warning in dict.fromkeys(each["warning"] for each in answers if "warning" in each):
        terminal.say(f"warning: {warning}", to_stderr=True)
    if json:
        terminal.print_json(answers)
    if all("error" in answer for answer in answers):
        raise DataError(f"no pair has a prediction; the first error: {answers[0]['error']}")


def _predict_file(config: PredictConfig, source: Path, target: Path, json: bool) -> None:
    if json and target == _STREAM:
        raise UsageError("--json and the answers both go to stdout; give --output FILE.")

    from clseave_cli.core.prediction.predictor import predict_file

    for path, stream, name in ((source, sys.stdin, "--input"), (target, sys.stdout, "--output")):
        if path == _STREAM:
            _require_open(stream, name)
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
        # If the answers go to stdout, nothing else does.
        name = "stdout" if target == _STREAM else str(target)
        counts = f"{done.num_predicted} predicted, {done.num_errors} with an error"
        terminal.say(f"{name}: {counts}", to_stderr=target == _STREAM)
    if done.num_errors and not done.num_predicted:
        raise DataError(f"no row has a prediction; the first error: {done.first_error}")


def _require_open(stream: TextIO | None, name: str) -> None:
    # `main` replaces a closed stdout with the null device.
    if stream is None or getattr(stream, "name", "") == os.devnull:
        raise UsageError(f"{name} -: the stream is closed; give a file.")


def _escape_unencodable() -> None:
    if isinstance(sys.stdout, TextIOWrapper):  # its encoding may lack letters of file names
        sys.stdout.reconfigure(errors="backslashreplace")


def _print_bars(result: Prediction, seconds: float) -> None:
    _escape_unencodable()
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
