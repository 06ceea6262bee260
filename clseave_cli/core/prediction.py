"""`predict`: the label of one image and sentence, or of many.

Legend: N pairs · D embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clseave_cli.core.config import Precision, PredictConfig
from clseave_cli.core.data.images import open_image
from clseave_cli.core.data.records import ENGLISH, require_language
from clseave_cli.core.files import atomic_file
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.student import find_students, load_student
from clseave_cli.core.progress import SILENT, Progress
from clseave_cli.core.training.precision import autocast, resolve_device
from clseave_cli.errors import ClseaveError, DataError, ModelError
from clseave_cli.labels import LABELS, Label

#: Image embeddings kept, so that a picture used often is encoded once.
_KEPT_IMAGES = 4096


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image and sentence.

    Attributes:
        image: the image's path.
        hypothesis: the sentence.
        lang: its language.
        label: the likeliest label.
        probabilities: of every label, adding up to 1.
        model: folder of the model that read the sentence.
        truncated: whether the sentence was too long and was cut.
    """

    image: str
    hypothesis: str
    lang: str
    label: Label
    probabilities: dict[str, float]
    model: str
    truncated: bool = False

    def to_json(self) -> dict[str, Any]:
        """The object that `predict --json` prints."""
        return {
            "image": self.image,
            "hypothesis": self.hypothesis,
            "lang": self.lang,
            "label": self.label,
            "probabilities": self.probabilities,
            "model": self.model,
        }


class VisualEntailment:
    """Says whether images entail sentences of one language.

    Example:
        >>> model = VisualEntailment.from_pretrained("runs", lang="ja")
        >>> model("photo.jpg", "犬が走っている").label
    """

    def __init__(
        self,
        clip_ve: ClipVE,
        encoder: SentenceEncoder,
        lang: str,
        name: str,
        precision: Precision = "auto",
    ) -> None:
        """Puts loaded models together; `from_pretrained` does so from folders."""
        self.lang = lang
        self.name = name
        self._model = clip_ve.eval()
        self._encoder = encoder.eval()
        self._device = clip_ve.text.device
        self._autocast = autocast(precision, self._device)
        self._premises: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        runs: str | Path = "runs",
        lang: str = ENGLISH,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> VisualEntailment:
        """Loads the models under `runs` that read a language.

        Raises:
            ClseaveError: no model for the language, a damaged one, or an unknown device.
        """
        require_language(lang)
        runs = Path(runs)
        target = resolve_device(device)
        folder = runs / "clip-ve"
        student_folder = None
        if lang != ENGLISH:
            students = find_students(runs)
            if lang not in students:
                known = ", ".join([ENGLISH, *students]) if folder.is_dir() else "none"
                raise ModelError(
                    f"{runs}: no model for {lang}; languages there: {known}. "
                    f"`clseave align --lang {lang}` makes one."
                )
            student_folder = students[lang]
        clip_ve = ClipVE.from_folder(folder).to(target)
        if student_folder is None:
            return cls(clip_ve, clip_ve.text, lang, str(folder), precision)
        encoder = load_student(student_folder, clip_ve.fingerprint).to(target)
        return cls(clip_ve, encoder, lang, str(student_folder), precision)

    def __call__(self, image: str | Path, hypothesis: str) -> Prediction:
        """Judges one pair.

        Raises:
            DataError: the image cannot be read, or the hypothesis is empty.
        """
        result = self.predict([(image, hypothesis)])[0]
        if isinstance(result, ClseaveError):
            raise result
        return result

    def predict(self, pairs: Sequence[tuple[str | Path, str]]) -> list[Prediction | DataError]:
        """Judges many pairs, computed together.

        Args:
            pairs: N images and sentences; an image that occurs often is encoded once.

        Returns:
            N predictions in the same order; a `DataError` stands where a pair cannot be judged.
        """
        errors = self._encode_images(list(dict.fromkeys(str(image) for image, _ in pairs)))
        results: list[Prediction | DataError | None] = []
        for image, hypothesis in pairs:
            if str(image) in errors:
                results.append(errors[str(image)])
            elif not hypothesis.strip():
                results.append(DataError(f"{image}: the hypothesis is empty; expected a sentence."))
            elif not _is_unicode(hypothesis):
                results.append(DataError(f"{image}: the hypothesis is not valid Unicode."))
            else:
                results.append(None)
        todo = [row for row, result in enumerate(results) if result is None]
        if todo:
            for row, prediction in zip(
                todo, self._judge([pairs[row] for row in todo]), strict=True
            ):
                results[row] = prediction
        self._forget_images()
        return [result for result in results if result is not None]

    def _encode_images(self, names: list[str]) -> dict[str, DataError]:
        """Fills in the embeddings of images not met before; returns those that failed."""

        def decode(name: str) -> Tensor | DataError:
            try:
                return self._model.image.preprocess([open_image(Path(name))])
            except DataError as error:
                return error

        errors: dict[str, DataError] = {}
        new = [name for name in names if name not in self._premises]
        with ThreadPoolExecutor() as pool:
            decoded = dict(zip(new, pool.map(decode, new), strict=True))
        good = {name: pixels for name, pixels in decoded.items() if isinstance(pixels, Tensor)}
        if good:
            with torch.no_grad(), self._autocast():
                vectors = self._model.image(torch.cat(list(good.values())).to(self._device))
            self._premises |= dict(zip(good, vectors.float(), strict=True))
        for name, outcome in decoded.items():
            if isinstance(outcome, DataError):
                errors[name] = outcome
        return errors

    def _judge(self, pairs: list[tuple[str | Path, str]]) -> Iterator[Prediction]:
        tokens = self._encoder.tokenize([hypothesis for _, hypothesis in pairs])
        premises = torch.stack([self._premises[str(image)] for image, _ in pairs])
        with torch.no_grad():
            with self._autocast():
                embeddings = torch.cat([part.float() for part in self._encoder.embed(tokens)])
            probabilities = self._model(embeddings, premises).softmax(dim=1).cpu()
        lengths = tokens.lengths(np.arange(len(tokens)))
        for (image, hypothesis), row, length in zip(pairs, probabilities, lengths, strict=True):
            yield Prediction(
                image=str(image),
                hypothesis=hypothesis,
                lang=self.lang,
                label=LABELS[int(row.argmax())],
                probabilities=dict(zip(LABELS, row.tolist(), strict=True)),
                model=self.name,
                truncated=bool(tokens.num_truncated and length == self._encoder.max_tokens),
            )

    def _forget_images(self) -> None:
        while len(self._premises) > _KEPT_IMAGES:
            del self._premises[next(iter(self._premises))]


@dataclass(frozen=True)
class BatchResult:
    """What became of an input file: rows judged, and rows with an error."""

    num_predicted: int
    num_errors: int


def predict_file(
    config: PredictConfig, source: Path, target: Path, progress: Progress = SILENT
) -> BatchResult:
    """Judges every line of a JSONL file, in order.

    Each line names `image` (relative paths are looked up beside the file) and `hypothesis`. A line
    that cannot be judged gets an object with `error` instead of `label`.

    Raises:
        ClseaveError: the input cannot be read, or a model is missing.
    """
    model = VisualEntailment.from_pretrained(
        config.runs, config.lang, config.device, config.precision
    )
    num_predicted = num_errors = 0
    try:
        stream = source.open("rb")
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}).") from None
    with stream, atomic_file(target) as out, progress.task("predict", unit="pairs") as task:
        lines = enumerate(stream, start=1)
        while chunk := list(islice(lines, config.batch_size)):
            for outcome in _judge_lines(model, source, chunk):
                num_errors += "error" in outcome
                num_predicted += "error" not in outcome
                out.write((json.dumps(outcome, ensure_ascii=False) + "\n").encode())
            task.advance(len(chunk))
    return BatchResult(num_predicted, num_errors)


def _judge_lines(
    model: VisualEntailment, source: Path, lines: Iterable[tuple[int, bytes]]
) -> Iterator[dict[str, Any]]:
    rows = [_input_row(source, line, raw) for line, raw in lines]
    pairs = [row for row in rows if not isinstance(row, DataError)]
    results = iter(model.predict([(source.parent / image, text) for image, text in pairs]))
    for row in rows:
        if isinstance(row, DataError):
            yield {"error": str(row)}
            continue
        image, hypothesis = row
        result = next(results)
        if isinstance(result, DataError):
            yield {
                "image": image,
                "hypothesis": hypothesis,
                "lang": model.lang,
                "error": str(result),
            }
        else:
            yield {**result.to_json(), "image": image}


def _input_row(source: Path, line: int, raw: bytes) -> tuple[str, str] | DataError:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return DataError.at(source, line, "not valid JSON.")
    image = row.get("image") if isinstance(row, dict) else None
    hypothesis = row.get("hypothesis") if isinstance(row, dict) else None
    if not isinstance(image, str) or not isinstance(hypothesis, str):
        return DataError.at(source, line, "expected an object with texts for image and hypothesis.")
    return image, hypothesis


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
