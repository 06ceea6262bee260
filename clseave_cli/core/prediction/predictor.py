"""`predict`: the label of one image and sentence, or of many.

Legend: N pairs · B images at once · D embedding width.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from os.path import samestat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clseave_cli.core.config import Precision, PredictConfig
from clseave_cli.core.data.answers import AnswerFile, answer_line
from clseave_cli.core.data.identification import LanguageIdentifier
from clseave_cli.core.data.images import open_image
from clseave_cli.core.data.pairs import Pair, read_pairs
from clseave_cli.core.data.records import require_language
from clseave_cli.core.prediction.inference import InferenceModel, load_model, own_language
from clseave_cli.core.prediction.pixels import Floats
from clseave_cli.errors import ClseaveError, DataError, UsageError
from clseave_cli.labels import LABELS, Label
from clseave_cli.processes import ahead, usable_cores
from clseave_cli.progress import SILENT, Progress

#: In place of a language: that of each sentence, identified.
AUTO = "auto"

#: Image embeddings kept, so that a picture used often is encoded once: 2 KiB each at D = 512.
_KEPT_IMAGES = 32_768
_IMAGE_BATCH = 32
_IMAGES_AHEAD = 64


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
        """The object that `predict --json` prints; `truncated` only where it is true."""
        return {
            "image": self.image,
            "hypothesis": self.hypothesis,
            "lang": self.lang,
            "label": self.label,
            "probabilities": self.probabilities,
            "model": self.model,
        } | ({"truncated": True} if self.truncated else {})


class VisualEntailment:
    """Says whether images entail sentences of one language.

    Example:
        >>> model = VisualEntailment.from_pretrained("runs", lang="ja")
        >>> model("photo.jpg", "犬が走っている").label

    Attributes:
        lang: the language; `auto` where it is identified sentence by sentence.
    """

    def __init__(
        self, model: InferenceModel, lang: str, identifier: LanguageIdentifier | None = None
    ) -> None:
        """Wraps a loaded model; `from_pretrained` loads one.

        Args:
            model: reads `lang`, or all languages of the identifier.
            lang: the language, or `auto`.
            identifier: tells which language a sentence is in, for `auto`.
        """
        self.lang = lang
        self._model = model
        self._identifier = identifier
        self._images: dict[_Stamp, Floats | DataError] = {}

    @classmethod
    def from_pretrained(
        cls,
        runs: str | Path = "runs",
        lang: str | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        *,
        lasting: bool = True,
    ) -> VisualEntailment:
        """Loads the models under `runs` that read a language.

        Args:
            runs: folder of the models, or one that `clseave export` wrote.
            lang: language of the sentences; `auto` identifies it among those there is a model for
                (needs the extra `langid`); None: the one CLIP-VE itself reads.
            device: `auto`, `cpu`, `cuda` or `cuda:N`; an exported model computes on the CPU.
            precision: arithmetic of the matrix products; an exported model has its own.
            lasting: as for `load_model`; False for one answer, soon and in little memory.

        Raises:
            ClseaveError: no model for the language, a damaged one, or an unknown device.
        """
        if lang is None:
            lang = own_language(Path(runs))
        elif lang != AUTO:
            require_language(lang)
        languages = None if lang == AUTO else (lang,)
        model = load_model(
            Path(runs), languages, device=device, precision=precision, lasting=lasting
        )
        return cls(model, lang, LanguageIdentifier(model.sources) if lang == AUTO else None)

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
            pairs: N images and sentences; an image that occurs often is encoded once, and again
                only when its file has changed.

        Returns:
            N predictions in the same order; a `DataError` stands where a pair cannot be judged.
        """
        images = self._encode_images([str(image) for image, _ in pairs])
        results: list[Prediction | DataError | None] = []
        rows_of: dict[str, list[int]] = {}
        for row, (image, hypothesis) in enumerate(pairs):
            refusal = _refusal(str(image), hypothesis, images[str(image)])
            results.append(refusal)
            if refusal is None:
                rows_of.setdefault(self._language_of(hypothesis), []).append(row)
        for lang, rows in rows_of.items():
            for row, prediction in zip(rows, self._judge(lang, pairs, rows, images), strict=True):
                results[row] = prediction
        return [result for result in results if result is not None]

    def _language_of(self, hypothesis: str) -> str:
        return self._identifier.identify(hypothesis)[0] if self._identifier else self.lang

    def _encode_images(self, names: list[str]) -> dict[str, Floats | DataError]:
        """(D,) embedding of every image; those met before are not opened again."""
        stamps = {name: _stamp(name) for name in dict.fromkeys(names)}
        found: dict[str, Floats | DataError] = {}
        new: list[tuple[str, _Stamp]] = []
        for name, stamp in stamps.items():
            if isinstance(stamp, DataError):
                found[name] = stamp
            elif stamp in self._images:
                found[name] = self._images[stamp]
            else:
                new.append((name, stamp))
        with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
            decoded = ahead(pool, self._decode, [name for name, _ in new], _IMAGES_AHEAD)
            items = zip(new, decoded, strict=True)
            while batch := list(islice(items, _IMAGE_BATCH)):
                vectors = self._embed_images([pixels for _, pixels in batch])
                for ((name, stamp), _), vector in zip(batch, vectors, strict=True):
                    found[name] = self._images[stamp] = vector
        while len(self._images) > _KEPT_IMAGES:
            del self._images[next(iter(self._images))]
        return found

    def _decode(self, name: str) -> Floats | DataError:
        """(3, height, width) pixels, or why there are none."""
        try:
            return self._model.prepare(open_image(Path(name)))
        except DataError as error:
            return error

    def _embed_images(self, images: list[Floats | DataError]) -> Iterator[Floats | DataError]:
        """(D,) float32 embedding of each decoded image; an error stays one."""
        pixels = [image for image in images if isinstance(image, np.ndarray)]
        vectors: Iterator[Floats] = iter(())
        if pixels:
            vectors = iter(self._model.embed_images(np.stack(pixels)))
        for image in images:
            yield image if isinstance(image, DataError) else next(vectors)

    def _judge(
        self,
        lang: str,
        pairs: Sequence[tuple[str | Path, str]],
        rows: list[int],
        images: dict[str, Floats | DataError],
    ) -> Iterator[Prediction]:
        """The predictions of some rows, all in one language and with an image."""
        embeddings, truncated = self._model.embed_sentences(lang, [pairs[row][1] for row in rows])
        # Rows whose image failed were refused before.
        premises = np.stack([np.asarray(images[str(pairs[row][0])]) for row in rows])
        probabilities = self._model.probabilities(embeddings, premises)
        for row, scores, cut in zip(rows, probabilities, truncated, strict=True):
            image, hypothesis = pairs[row]
            yield Prediction(
                image=str(image),
                hypothesis=hypothesis,
                lang=lang,
                label=LABELS[int(scores.argmax())],
                probabilities=dict(zip(LABELS, scores.tolist(), strict=True)),
                model=self._model.sources[lang],
                truncated=bool(cut),
            )


@dataclass(frozen=True)
class BatchResult:
    """What became of an input: rows judged, rows with an error, and the first of the errors."""

    num_predicted: int
    num_errors: int
    first_error: str | None


def predict_file(
    config: PredictConfig,
    source: Path | BinaryIO,
    target: Path | BinaryIO,
    progress: Progress = SILENT,
) -> BatchResult:
    """Judges every row of a file or stream, in order; memory does not grow with their number.

    A row names `image` (a file's relative paths are looked up beside it) and `hypothesis`. A row
    that cannot be judged gets an object with `error` instead of `label`. A target file appears when
    it is complete; until then, `TARGET.partial` holds the answers so far, for `config.resume`. With
    it, a complete target is compared with the input in the same way, and gets the rows it lacks.

    Args:
        config: models, language, and whether to go on with what an earlier run wrote.
        source: JSON Lines or CSV, as `data.pairs.read_pairs` takes them.
        target: where the answers go, as JSON Lines.
        progress: told how many rows are done, and of sentences that were cut.

    Raises:
        ClseaveError: the input cannot be read, a model is missing, or the answers to go on with are
            damaged or of another run.
    """
    tally = _Tally()
    lang = config.lang or own_language(config.runs)
    name = str(source) if isinstance(source, Path) else "stdin"
    base = source.parent if isinstance(source, Path) else Path()
    with _reading(source) as stream, ExitStack() as stack:
        answers = _answer_file(config, target, stream)
        if answers is not None:
            stack.enter_context(answers)
        batches = read_pairs(stream, name, config.batch_size)
        if answers is not None:
            batches = _unanswered(batches, answers, lang, tally)
        if answers is not None and answers.finished:
            # The first rows left to do come after all answers were compared with theirs.
            first = next(batches, None)
            if first is None:
                return tally.result()
            answers.reopen()
            batches = chain([first], batches)
        model = VisualEntailment.from_pretrained(config.runs, lang, config.device, config.precision)
        with _writing(answers, target) as out, progress.task("predict", unit="pairs") as task:
            for batch in batches:
                outcomes = list(_judge_rows(model, base, batch))
                out.write(b"".join(map(answer_line, outcomes)))
                out.flush()
                tally.count(outcomes)
                task.advance(len(outcomes))
    if tally.num_truncated:
        progress.note(
            f"{name}: {tally.num_truncated} hypotheses were too long and were cut at the encoder's "
            "limit (`truncated`)."
        )
    return tally.result()


@dataclass
class _Tally:
    num_predicted: int = 0
    num_errors: int = 0
    num_truncated: int = 0
    first_error: str | None = None

    def count(self, answers: Iterable[dict[str, Any]]) -> None:
        for answer in answers:
            self.num_predicted += "error" not in answer
            self.num_errors += "error" in answer
            self.num_truncated += answer.get("truncated", False)
            self.first_error = self.first_error or answer.get("error")

    def result(self) -> BatchResult:
        return BatchResult(self.num_predicted, self.num_errors, self.first_error)


def _reading(source: Path | BinaryIO) -> AbstractContextManager[BinaryIO]:
    if not isinstance(source, Path):
        return nullcontext(source)
    try:
        return source.open("rb")
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}).") from None


def _answer_file(
    config: PredictConfig, target: Path | BinaryIO, source: BinaryIO
) -> AnswerFile | None:
    """The file of the answers; None for a pipe or device, which nothing can be added to later."""
    if isinstance(target, Path) and (target.is_file() or not target.exists()):
        if target.exists() and samestat(target.stat(), os.fstat(source.fileno())):
            raise UsageError(f"{target}: is both input and output; choose another --output.")
        return AnswerFile(target.resolve(), config.resume)
    if isinstance(target, Path) and target.is_dir():
        raise UsageError(f"{target}: is a folder; expected a file for the answers.")
    if config.resume:
        raise UsageError("--resume needs a file as --output.")
    return None


@contextmanager
def _writing(answers: AnswerFile | None, target: Path | BinaryIO) -> Iterator[BinaryIO]:
    if answers is not None:
        with answers.open() as out:
            yield out
    elif isinstance(target, Path):
        with target.open("wb") as out:
            yield out
    else:
        yield target


def _unanswered(
    batches: Iterable[list[Pair | DataError]],
    answers: AnswerFile,
    lang: str,
    tally: _Tally,
) -> Iterator[list[Pair | DataError]]:
    """The rows that an earlier run left to do.

    Raises:
        ClseaveError: its answers are damaged, or those of other rows.
    """
    earlier = answers.earlier()
    number = 0
    for batch in batches:
        todo = []
        for row in batch:
            number += 1
            answer = next(earlier, None)
            if answer is None:
                todo.append(row)
            elif _answers(answer, row, lang):
                tally.count([answer])
            else:
                raise _another_run(answers, number)
        if todo:
            yield todo
    if next(earlier, None) is not None:
        raise _another_run(answers, number + 1)


def _answers(answer: dict[str, Any], row: Pair | DataError, lang: str) -> bool:
    if isinstance(row, DataError):
        return "error" in answer and "image" not in answer
    same_language = lang == AUTO or answer.get("lang") == lang
    answered = "label" in answer or "error" in answer
    return answered and same_language and (answer.get("image"), answer.get("hypothesis")) == row


def _another_run(answers: AnswerFile, number: int) -> ClseaveError:
    if answers.finished:
        return DataError.at(
            answers.target,
            number,
            "answers another row than the input has there, or in another language; choose another "
            "--output, or leave out --resume to replace that file.",
        )
    return UsageError(
        f"{answers.partial}:{number}: answers another row than the input has there, or in another "
        "language; resume with what it was started with, or delete that file."
    )


def _judge_rows(
    model: VisualEntailment, base: Path, rows: list[Pair | DataError]
) -> Iterator[dict[str, Any]]:
    pairs = [(base / row.image, row.hypothesis) for row in rows if isinstance(row, Pair)]
    results = iter(model.predict(pairs))
    for row in rows:
        if isinstance(row, DataError):
            yield {"error": str(row)}
            continue
        result = next(results)
        if isinstance(result, DataError):
            yield {**row._asdict(), "lang": model.lang, "error": str(result)}
        else:
            yield {**result.to_json(), "image": row.image}


#: What tells one state of an image file from another: path, time of change, size.
_Stamp = tuple[str, int, int]


def _stamp(name: str) -> _Stamp | DataError:
    try:
        status = os.stat(name)  # noqa: PTH116 - of the name as it is given
    except (FileNotFoundError, NotADirectoryError):
        return DataError(f"{name}: no such image.")
    except (OSError, ValueError) as error:  # such as a name too long, or with a NUL in it
        return DataError(f"{name}: cannot be read ({error}).")
    # Opening a pipe or a device could wait for ever.
    if not stat.S_ISREG(status.st_mode):
        return DataError(f"{name}: damaged or not an image (not a regular file).")
    return name, status.st_mtime_ns, status.st_size


def _refusal(image: str, hypothesis: str, found: Floats | DataError) -> DataError | None:
    """Why a pair cannot be judged."""
    if isinstance(found, DataError):
        return found
    if not hypothesis.strip():
        return DataError(f"{image}: the hypothesis is empty; expected a sentence.")
    try:
        hypothesis.encode()
    except UnicodeEncodeError:
        return DataError(f"{image}: the hypothesis is not valid Unicode.")
    return None
