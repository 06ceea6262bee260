"""`predict`: the label of one image and sentence, or of many.

Legend: N pairs · E width of a premise · G cells along a side of a photo.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from os.path import samestat
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from clseave_cli.core.config import Precision, PredictConfig
from clseave_cli.core.data.heat_map import heat_map
from clseave_cli.core.data.hub import model_folder
from clseave_cli.core.data.images import ImageFolder, open_image, require_shape
from clseave_cli.core.data.languages import LanguageIdentifier, language_warning
from clseave_cli.core.data.pairs import ANSWER_COLUMNS, AnswerFile, AnswerTable, Pair, Pairs
from clseave_cli.core.data.records import require_language
from clseave_cli.core.data.rows import json_line
from clseave_cli.core.files import writing
from clseave_cli.core.prediction import Floats
from clseave_cli.core.prediction.inference import (
    InferenceModel,
    default_language,
    embed_in_batches,
    load_model,
    not_finite,
)
from clseave_cli.errors import ClseaveError, DataError, UsageError
from clseave_cli.labels import LABELS, Answer, Label
from clseave_cli.progress import SILENT, Progress

#: In place of a language: identify that of each sentence.
AUTO = "auto"

#: Memory for cached image embeddings: 32,768 at D = 512, or 166 with the patches of a ViT-B/16.
_KEPT_BYTES = 64 * 2**20
#: Identifying a language takes a millisecond: too long for each of a million rows.
_FEW_SENTENCES = 64

#: A path, the content of an image file, an open one, a Pillow image, or uint8 (height, width, 3).
ImageSource = str | Path | bytes | BinaryIO | Image.Image | npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Prediction:
    """The answer for one image and sentence.

    Attributes:
        image: the image's path, or `the image` if it has none.
        hypothesis: the sentence.
        lang: its language.
        label: the most likely label, or `unsure`.
        probabilities: of every label, adding up to 1.
        model: folder of the model that read the sentence.
        truncated: whether the sentence was too long and was truncated.
        warning: why the sentence is probably not in `lang`.
        attention: (G, G) attention to the cells of the photo, adding up to 1; None: no patches.
    """

    image: str
    hypothesis: str
    lang: str
    label: Answer
    probabilities: dict[Label, float]
    model: str
    truncated: bool = False
    warning: str | None = None
    attention: Floats | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The object `predict --json` prints; `truncated` and `warning` only if they are set."""
        optional = ("truncated", "warning", "attention")
        fields = dataclasses.asdict(replace(self, attention=None))
        return {key: value for key, value in fields.items() if value or key not in optional}


@dataclass(frozen=True)
class Photo:
    """An image that is not decoded yet.

    Attributes:
        name: its path, or another name for messages and answers.
        content: its source, or why it cannot be read.
        key: equal for equal images; for a file: path, modification time, size.
    """

    name: str
    content: Path | bytes | Image.Image | DataError
    key: Hashable

    @classmethod
    def of(cls, source: ImageSource) -> Photo:
        """Reads a source, unless it is a path."""
        # The name of an open file may be missing, None, or a number.
        name = source if isinstance(source, str | Path) else getattr(source, "name", None)
        name = str(name) if isinstance(name, str | Path) else "the image"
        try:
            if isinstance(source, str | Path):
                return cls(name, Path(source), _stamp(name))
            if isinstance(source, np.ndarray):
                source = Image.fromarray(source.astype(np.uint8, casting="safe"))
            elif not isinstance(source, bytes | Image.Image):
                source = source.read()
            if isinstance(source, Image.Image):
                content, shape = source.tobytes(), (source.mode, source.size)
            else:
                content, shape = source, None
            return cls(name, source, (shape, hashlib.blake2b(content, digest_size=32).digest()))
        except DataError as error:
            problem = error
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            problem = DataError(
                f"{name}: expected a path, the bytes of an image file, an open binary file, a "
                f"Pillow image or a uint8 array of (height, width, 3) ({error!s:.100})."
            )
        return cls(name, problem, problem)

    def decode(self) -> Image.Image:
        """The image in RGB, upright; raises `DataError` if it is damaged or too large."""
        if isinstance(self.content, DataError):
            raise self.content
        if isinstance(self.content, Image.Image):
            require_shape(self.content, self.name)
            return ImageOps.exif_transpose(self.content).convert("RGB")
        return open_image(self.content, self.name)


class VisualEntailment:
    """Predicts whether images entail sentences.

    Example:
        >>> model = VisualEntailment.from_pretrained("runs", lang="ja")
        >>> model("photo.jpg", "犬が走っている").label

    Attributes:
        lang: the default language; `auto`: identified; None: name one with each sentence.
    """

    def __init__(
        self,
        model: InferenceModel,
        lang: str | None,
        identifier: LanguageIdentifier | None = None,
        unsure: bool = False,
    ) -> None:
        """Wraps a loaded model; `from_pretrained` loads one."""
        self.lang = lang
        self._model = model
        self._unsure = unsure
        self._identifier = identifier
        self._images: dict[Hashable, Floats] = {}

    @classmethod
    def from_pretrained(
        cls,
        runs: str | Path = "runs",
        lang: str | Sequence[str] | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        student: str | Path | None = None,
        *,
        lasting: bool = True,
        unsure: bool = False,
        progress: Progress = SILENT,
    ) -> VisualEntailment:
        """Loads the models under `runs` for one or several languages.

        Args:
            runs: folder of models, an exported folder, or a hub repository, `ORG/NAME[@revision]`.
            lang: language of the sentences, or several; `auto`: identified among those that have a
                model (needs the extra `langid`); None: CLIP-VE's language.
            device: `auto`, `cpu`, `cuda` or `cuda:N`; an exported model runs on the CPU.
            precision: of matrix products; an exported model's is fixed.
            student: folder or hub repository of a student that reads every sentence.
            lasting: False: start faster and use less memory, for one answer (`load_model`).
            unsure: answer `unsure` below the thresholds that `clseave calibrate` set.
            progress: receives notes about languages without a temperature.

        Raises:
            ClseaveError: a model is missing or damaged, the device is unknown, or `unsure` has no
                thresholds.
        """
        runs = model_folder(Path(runs))
        student = model_folder(Path(student)) if student else None
        if lang is None:
            lang = default_language(runs, student)
        languages = [lang] if isinstance(lang, str) else list(lang)
        auto = languages == [AUTO]
        for each in languages if not auto else ():
            require_language(each)
        model = load_model(
            runs,
            None if auto else languages,
            device=device,
            precision=precision,
            lasting=lasting,
            student=student,
            progress=progress,
        )
        for each in model.sources if unsure else ():
            if not model.calibrations[each].thresholds:
                raise UsageError(
                    f"{model.sources[each]}: has no threshold for {each}; `clseave calibrate "
                    f"--lang {each} --precision 0.95` sets one."
                )
        identifier = LanguageIdentifier(model.sources) if auto else None
        return cls(model, languages[0] if len(languages) == 1 else None, identifier, unsure)

    def __call__(self, image: ImageSource, hypothesis: str, lang: str | None = None) -> Prediction:
        """Predicts one pair, and warns if the sentence is probably in another language.

        Raises:
            ClseaveError: the image cannot be read, the hypothesis is empty, no model is loaded for
                the language, or its probabilities are not finite.
        """
        result = self.predict([(image, hypothesis)], lang)[0]
        if isinstance(result, ClseaveError):
            raise result
        if result.warning:
            warnings.warn(result.warning, stacklevel=2)
        return result

    def predict(
        self,
        pairs: Iterable[tuple[ImageSource, str]],
        lang: str | Sequence[str | None] | None = None,
    ) -> list[Prediction | ClseaveError]:
        """Predicts many pairs together.

        Args:
            pairs: N images and sentences; an image is encoded again only if its file changes.
            lang: language of all sentences, or of each; None: the default.

        Returns:
            N predictions in the same order, with an error for each pair that has none.

        Raises:
            UsageError: no model is loaded for a language, or none is named.
        """
        pairs = list(pairs)
        languages = self._languages(lang, len(pairs))
        photos = [Photo.of(image) for image, _ in pairs]
        vectors, problems = self._embed({photo.key: photo for photo in photos})
        results: dict[int, Prediction | ClseaveError] = {}
        rows_of: dict[str, list[int]] = {}
        for row, (photo, sentence_lang) in enumerate(zip(photos, languages, strict=True)):
            sentence = pairs[row][1]
            if photo.key in problems:
                results[row] = problems[photo.key]
            elif problem := sentence_problem(sentence):
                results[row] = DataError(f"{photo.name}: {problem}")
            else:
                if sentence_lang == AUTO and self._identifier:
                    sentence_lang = self._identifier.identify(sentence)[0]
                rows_of.setdefault(sentence_lang, []).append(row)
        for each, rows in rows_of.items():
            source, sentences = self._model.sources[each], [pairs[row][1] for row in rows]
            hypotheses, truncated = self._model.embed_sentences(each, sentences)
            premises = np.stack([vectors[photos[row].key] for row in rows])
            probabilities = self._model.probabilities(each, hypotheses, premises)
            unsure = self._model.calibrations[each].is_unsure(probabilities) & self._unsure
            attention = self._model.attention(hypotheses, premises)
            cells = [None] * len(rows) if attention is None else attention
            for row, sentence, scores, is_unsure, is_truncated, cell_shares in zip(
                rows, sentences, probabilities, unsure, truncated, cells, strict=True
            ):
                if not np.isfinite(scores).all():
                    results[row] = not_finite(source)
                    continue
                results[row] = Prediction(
                    image=photos[row].name,
                    hypothesis=sentence,
                    lang=each,
                    label="unsure" if is_unsure else LABELS[int(scores.argmax())],
                    probabilities=dict(zip(LABELS, scores.tolist(), strict=True)),
                    model=source,
                    truncated=bool(is_truncated),
                    warning=language_warning(sentence, each, len(pairs) <= _FEW_SENTENCES),
                    attention=cell_shares,
                )
        return [results[row] for row in range(len(pairs))]

    def batch(
        self,
        pairs: Iterable[tuple[ImageSource, str]],
        lang: str | Iterable[str | None] | None = None,
        batch_size: int = 256,
    ) -> Iterator[Prediction | ClseaveError]:
        """Predicts a stream of pairs as `predict` does, `batch_size` at a time."""
        pairs = iter(pairs)
        languages = repeat(lang) if lang is None or isinstance(lang, str) else iter(lang)
        while batch := list(islice(pairs, batch_size)):
            yield from self.predict(batch, list(islice(languages, len(batch))))

    def explain(self, image: ImageSource, prediction: Prediction) -> Image.Image:
        """A heat map of the head's attention for a prediction, over the photo.

        Raises:
            UsageError: the head sees no patches.
            DataError: the image cannot be read.
        """
        if prediction.attention is None:
            raise UsageError(
                "this CLIP-VE reads the photo as one vector, so there is no attention to show; "
                "`clseave finetune-ve --head patches` trains one that reads patches."
            )
        photo = Photo.of(image).decode()
        return heat_map(photo, prediction.attention, self._model.preparation)

    def _embed(
        self, photos: Mapping[Hashable, Photo]
    ) -> tuple[dict[Hashable, Floats], dict[Hashable, DataError]]:
        """(E,) vectors of the photos that can be read, and errors for the others."""
        vectors = {key: self._images[key] for key in photos if key in self._images}
        problems: dict[Hashable, DataError] = {}
        new = [photo for key, photo in photos.items() if key not in vectors]
        for photo, (vector, problem) in embed_in_batches(self._model, new, self._load):
            if problem is not None:
                problems[photo.key] = problem
            elif vector is not None:
                vectors[photo.key] = self._images[photo.key] = vector
        num_bytes = next(iter(self._images.values())).nbytes if self._images else 0
        while len(self._images) * num_bytes > _KEPT_BYTES:
            del self._images[next(iter(self._images))]
        return vectors, problems

    def _load(self, photo: Photo) -> tuple[Floats | None, DataError | None]:
        try:
            return self._model.prepare(photo.decode()), None
        except DataError as error:
            return None, error

    def _languages(self, lang: str | Sequence[str | None] | None, count: int) -> list[str]:
        """The language of each of `count` sentences."""
        requested = [lang] * count if lang is None or isinstance(lang, str) else list(lang)
        if len(requested) != count:
            raise UsageError(
                f"lang: {len(requested)} languages for {count} pairs; give one for each."
            )
        allowed = {*self._model.sources, *([AUTO] if self._identifier else [])}
        languages = []
        for each in (self.lang if each is None else each for each in requested):
            if each not in allowed:
                raise UsageError(
                    f"lang {each!r}: expected a loaded language ({', '.join(sorted(allowed))}); "
                    "from_pretrained(…, lang=[…]) loads several."
                )
            languages.append(each)
        return languages


@dataclass
class BatchResult:
    """Counts of answers, and the first warning and error."""

    num_predicted: int = 0
    num_errors: int = 0
    num_truncated: int = 0
    num_warnings: int = 0
    first_warning: str | None = None
    first_error: str | None = None

    def count(self, answers: Iterable[dict[str, Any]]) -> None:
        for answer in answers:
            self.num_predicted += "error" not in answer
            self.num_errors += "error" in answer
            self.num_truncated += answer.get("truncated", False)
            self.num_warnings += "warning" in answer
            self.first_warning = self.first_warning or answer.get("warning")
            self.first_error = self.first_error or answer.get("error")


def predict_file(
    config: PredictConfig,
    source: Path | BinaryIO,
    target: Path | BinaryIO,
    progress: Progress = SILENT,
) -> BatchResult:
    """Predicts every row of a file or stream, in order and in constant memory.

    A row has `image` (relative to the file) and `hypothesis`. A row without a prediction gets
    `error` instead of `label`. The target appears when it is complete; until then,
    `TARGET.partial` holds the answers. `config.resume` continues either file after checking that
    its answers belong to the input.

    Args:
        config: models, language, and whether to resume.
        source: input of `data.pairs.Pairs`.
        target: for the answers, in the format of its name or else of the source.
        progress: receives notes about truncated sentences and warnings.

    Raises:
        ClseaveError: the input cannot be read, a model is missing, or the answers to resume are
            damaged or from another run.
    """
    tally = BatchResult()
    lang = config.lang or default_language(config.runs, config.student)
    name = str(source) if isinstance(source, Path) else "stdin"
    base: Path | ImageFolder = source.parent if isinstance(source, Path) else Path()
    if config.images is not None:
        base = ImageFolder(config.images)
    try:
        reader = _opened(source, "rb")
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}).") from None
    with reader as stream, ExitStack() as stack:
        pairs = Pairs(stream, name, config.batch_size, config.image_column, config.text_column)
        batches = iter(pairs)
        answers = _answer_file(config, target, stream, pairs)
        if answers is not None:
            stack.enter_context(answers)
            batches = _unanswered(pairs, answers, lang, tally)
            if answers.finished:
                # The first unanswered row comes only after all answers were checked.
                first = next(batches, None)
                if first is None:
                    return tally
                answers.reopen()
                batches = chain([first], batches)
        model = VisualEntailment.from_pretrained(
            config.runs, lang, config.device, config.precision, config.student,
            unsure=config.unsure, progress=progress,
        )  # fmt: skip
        writer = answers.open() if answers else _opened(target, "wb")
        with writer as out, progress.task("predict", unit="pairs") as task:
            for batch in batches:
                rows = list(_answer_rows(model, base, batch, bool(pairs.whole)))
                if answers is None and (table := AnswerTable.of(pairs, None)):
                    is_first = not (tally.num_predicted or tally.num_errors)
                    out.write(table.encode(rows, with_header=is_first))
                else:
                    out.write(b"".join(map(json_line, rows)))
                out.flush()
                tally.count(rows)
                task.advance(len(rows))
    if tally.num_truncated:
        progress.note(
            f"{name}: {tally.num_truncated} hypotheses were too long and were truncated "
            "(`truncated`)."
        )
    if tally.num_warnings:
        progress.note(
            f"{name}: {tally.num_warnings} answers with a `warning`: {tally.first_warning}"
        )
    return tally


def _opened(file: Path | BinaryIO, mode: str) -> AbstractContextManager[BinaryIO]:
    return cast(BinaryIO, file.open(mode)) if isinstance(file, Path) else nullcontext(file)


def _answer_file(
    config: PredictConfig, target: Path | BinaryIO, source: BinaryIO, pairs: Pairs
) -> AnswerFile | None:
    """The file of the answers; None: a pipe or device, which cannot be resumed."""
    if isinstance(target, Path) and (target.is_file() or not target.exists()):
        if target.exists() and samestat(target.stat(), os.fstat(source.fileno())):
            raise UsageError(f"{target}: is both input and output; choose another --output.")
        table = AnswerTable.of(pairs, target)
        pairs.whole = table is not None
        with writing(target):
            return AnswerFile(target.resolve(), config.resume, table)
    if isinstance(target, Path) and target.is_dir():
        raise UsageError(f"{target}: is a folder; expected a file.")
    if config.resume:
        raise UsageError("--resume needs a file as --output.")
    return None


def _unanswered(
    pairs: Pairs, answers: AnswerFile, lang: str, tally: BatchResult
) -> Iterator[list[Pair | DataError]]:
    """The rows without an answer; raises `ClseaveError` if an answer belongs to another row."""
    earlier = answers.earlier()
    number = 0
    for batch in pairs:
        unanswered = []
        for row in batch:
            number += 1
            answer = next(earlier, None)
            if answer is None:
                unanswered.append(row)
            elif _is_answer_to(answer, row, lang, pairs):
                tally.count([answer])
            else:
                raise _mismatch(answers, number)
        if unanswered:
            yield unanswered
    if next(earlier, None) is not None:
        raise _mismatch(answers, number + 1)


def _is_answer_to(answer: dict[str, Any], row: Pair | DataError, lang: str, pairs: Pairs) -> bool:
    if isinstance(row, DataError):
        return answer.keys() == {"error"}
    if pairs.whole:  # a table keeps the columns of its input
        pair = pairs.named_by(answer)
    else:
        pair = answer.get("image"), answer.get("hypothesis")
    is_complete = "label" in answer or "error" in answer
    return is_complete and pair == row[:2] and lang in (AUTO, answer.get("lang"))


def _mismatch(answers: AnswerFile, number: int) -> ClseaveError:
    message = "does not answer this row of the input, or is in another language;"
    if answers.finished:
        message += " choose another --output, or omit --resume to replace the file."
        return DataError.at(answers.target, number, message)
    message += " resume with the original input and --lang, or delete the file."
    return UsageError(f"{answers.partial}:{number}: {message}")


def _answer_rows(
    model: VisualEntailment, base: Path | ImageFolder, rows: list[Pair | DataError], as_table: bool
) -> Iterator[dict[str, Any]]:
    """Yields an answer to each row, with the row's other columns."""
    locate = base.get if isinstance(base, ImageFolder) else base.joinpath
    paths = [locate(row.image) if isinstance(row, Pair) else None for row in rows]
    pairs = [
        (path, row.hypothesis)
        for path, row in zip(paths, rows, strict=True)
        if path is not None and isinstance(row, Pair)
    ]
    results = iter(model.predict(pairs))
    for path, row in zip(paths, rows, strict=True):
        if isinstance(row, DataError):
            yield {"error": str(row)}
            continue
        result = next(results) if path else DataError(f"{row.image}: not in --images.")
        answer: dict[str, Any] = {"image": row.image, "hypothesis": row.hypothesis}
        if isinstance(result, ClseaveError):
            answer |= {"lang": model.lang, "error": str(result)}
        else:
            answer = result.to_json() | answer
        if as_table:
            cells = answer | answer.get("probabilities", {})
            answer = {name: cells[name] for name in ANSWER_COLUMNS if name in cells}
        yield row.others | answer if as_table else answer | row.others


def _stamp(name: str) -> tuple[str, int, int]:
    """Path, modification time and size of an image file."""
    try:
        status = os.stat(name)  # noqa: PTH116 - Path would normalise the name
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{name}: no such image.") from None
    except (OSError, ValueError) as error:  # such as a name too long, or with a NUL in it
        raise DataError(f"{name}: cannot be read ({error}).") from None
    # Opening a pipe or a device could block forever.
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{name}: damaged or not an image (not a regular file).")
    return name, status.st_mtime_ns, status.st_size


def sentence_problem(hypothesis: str) -> str | None:
    """Why a sentence is refused."""
    if not hypothesis.strip():
        return "the hypothesis is empty; expected a sentence."
    try:
        hypothesis.encode()
    except UnicodeEncodeError:
        return "the hypothesis is not valid Unicode."
    return None
