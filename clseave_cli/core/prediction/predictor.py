"""`predict`: the label of one image and sentence, or of many.

Legend: N pairs · B images at once · D embedding width · G cells along a side of a photo.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from os.path import samestat
from pathlib import Path
from typing import Any, BinaryIO

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
from clseave_cli.core.prediction.inference import InferenceModel, load_model, own_language
from clseave_cli.errors import ClseaveError, DataError, ModelError, UsageError
from clseave_cli.labels import LABELS, Answer, Label
from clseave_cli.processes import ahead, usable_cores
from clseave_cli.progress import SILENT, Progress

#: In place of a language: that of each sentence, identified.
AUTO = "auto"

#: Memory for image embeddings that are kept, so that a picture used often is encoded once: 32,768
#: of 2 KiB at D = 512, or 166 with the patches of a ViT-B/16.
_KEPT_BYTES = 64 * 2**20
_IMAGE_BATCH = 32
_IMAGES_AHEAD = 64
#: Identifying the language of a sentence takes a millisecond: too long for each of a million rows.
_FEW_SENTENCES = 64

#: A path, the content of an image file, an open one, a Pillow image, or uint8 (height, width, 3).
ImageSource = str | Path | bytes | BinaryIO | Image.Image | npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image and sentence.

    Attributes:
        image: the image's path; the kind of object for an image that has none.
        hypothesis: the sentence.
        lang: its language.
        label: the likeliest label, or `unsure`.
        probabilities: of every label, adding up to 1.
        model: folder of the model that read the sentence.
        truncated: whether the sentence was too long and was cut.
        warning: why the sentence is probably not in that language.
        attention: (G, G) shares of the cells of the photo, where the head looked; None: it sees one
            vector of the photo.
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
        """The object `predict --json` prints; `truncated` and `warning` only where there is one."""
        optional = ("truncated", "warning")
        fields = dataclasses.asdict(replace(self, attention=None))
        return {k: v for k, v in fields.items() if v or k not in (*optional, "attention")}


@dataclass(frozen=True)
class Photo:
    """An image to judge, not decoded yet.

    Attributes:
        name: what messages and answers call it.
        content: where it comes from, or why it cannot be read.
        key: equal for equal pictures; of a file: path, time of change, size.
    """

    name: str
    content: Path | bytes | Image.Image | DataError
    key: Hashable

    @classmethod
    def of(cls, source: ImageSource) -> Photo:
        """Looks at a source, and reads it unless it is a path."""
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
        """The picture in RGB, upright.

        Raises:
            DataError: it cannot be read, is damaged, or too large.
        """
        if isinstance(self.content, DataError):
            raise self.content
        if isinstance(self.content, Image.Image):
            require_shape(self.content, self.name)
            return ImageOps.exif_transpose(self.content).convert("RGB")
        return open_image(self.content, self.name)


class VisualEntailment:
    """Says whether images entail sentences.

    Example:
        >>> model = VisualEntailment.from_pretrained("runs", lang="ja")
        >>> model("photo.jpg", "犬が走っている").label

    Attributes:
        lang: the language of sentences for which none is named; `auto` where it is identified,
            None where several were loaded.
    """

    def __init__(
        self,
        model: InferenceModel,
        lang: str | None,
        identifier: LanguageIdentifier | None = None,
        unsure: bool = False,
    ) -> None:
        """Wraps a loaded model; `from_pretrained` loads one.

        Args:
            model: reads `lang`, or all languages of the identifier.
            lang: the language, `auto`, or None: it has to be named with each sentence.
            identifier: tells which language a sentence is in, for `auto`.
            unsure: whether to answer `unsure` below the thresholds of languages that have any.
        """
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
        """Loads the models under `runs` that read a language, or several.

        Args:
            runs: folder of the models, one that `clseave export` wrote, or a repository of the
                hub, `ORG/NAME[@revision]`.
            lang: language of the sentences, or several; `auto` identifies it among those there is
                a model for (needs the extra `langid`); None: the one CLIP-VE itself reads.
            device: `auto`, `cpu`, `cuda` or `cuda:N`; an exported model computes on the CPU.
            precision: arithmetic of the matrix products; an exported model has its own.
            student: a student's folder, or a repository of the hub: it reads every sentence.
            lasting: as for `load_model`; False for one answer, soon and in little memory.
            unsure: answer `unsure` below the thresholds that `clseave calibrate` set.
            progress: told of languages without a temperature.

        Raises:
            ClseaveError: no model for the language, a damaged one, an unknown device, or `unsure`
                without thresholds.
        """
        runs, only = model_folder(Path(runs)), model_folder(Path(student)) if student else None
        if lang is None:
            lang = own_language(runs, only)
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
            student=only,
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
        """Judges one pair, and warns if the sentence is probably not in its language.

        Raises:
            ClseaveError: the image cannot be read, the hypothesis is empty, no model for the
                language is loaded, or the model gives no finite probabilities.
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
        """Judges many pairs, computed together.

        Args:
            pairs: N images and sentences; an image that occurs often is encoded once, and again
                only when its file has changed.
            lang: of all sentences, or of each; None: the one that was loaded.

        Returns:
            N predictions in the same order; an error stands where a pair cannot be judged.

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
            elif problem := problem_of(sentence):
                results[row] = DataError(f"{photo.name}: {problem}")
            else:
                if sentence_lang == AUTO and self._identifier:
                    sentence_lang = self._identifier.identify(sentence)[0]
                rows_of.setdefault(sentence_lang, []).append(row)
        for each, rows in rows_of.items():
            source, sentences = self._model.sources[each], [pairs[row][1] for row in rows]
            hypotheses, truncated = self._model.embed_sentences(each, sentences)
            premises = np.stack([vectors[photos[row].key] for row in rows])
            judged = self._model.probabilities(each, hypotheses, premises)
            unsure = self._model.calibrations[each].is_unsure(judged) & self._unsure
            attention = self._model.attention(hypotheses, premises)
            looked = [None] * len(rows) if attention is None else attention
            for row, sentence, scores, is_unsure, cut, where in zip(
                rows, sentences, judged, unsure, truncated, looked, strict=True
            ):
                if not np.isfinite(scores).all():
                    results[row] = ModelError(
                        f"{source}: gives probabilities that are not finite numbers; its weights "
                        "or CLIP-VE's are damaged: copy or train it again. With --precision fp16, "
                        "try fp32."
                    )
                    continue
                results[row] = Prediction(
                    image=photos[row].name,
                    hypothesis=sentence,
                    lang=each,
                    label="unsure" if is_unsure else LABELS[int(scores.argmax())],
                    probabilities=dict(zip(LABELS, scores.tolist(), strict=True)),
                    model=source,
                    truncated=bool(cut),
                    warning=language_warning(sentence, each, len(pairs) <= _FEW_SENTENCES),
                    attention=where,
                )
        return [results[row] for row in range(len(pairs))]

    def batch(
        self,
        pairs: Iterable[tuple[ImageSource, str]],
        lang: str | Iterable[str | None] | None = None,
        batch_size: int = 256,
    ) -> Iterator[Prediction | ClseaveError]:
        """Judges pairs as `predict` does, but as they come, `batch_size` in memory at once."""
        pairs = iter(pairs)
        languages = repeat(lang) if lang is None or isinstance(lang, str) else iter(lang)
        while some := list(islice(pairs, batch_size)):
            yield from self.predict(some, list(islice(languages, len(some))))

    def explain(self, image: ImageSource, prediction: Prediction) -> Image.Image:
        """The photo, coloured by where the head looked for a prediction, above its scale.

        Raises:
            UsageError: the head sees one vector of the photo, and no parts of it.
            DataError: the image cannot be read.
        """
        if prediction.attention is None:
            raise UsageError(
                "this CLIP-VE sees one vector of the photo, so it looks nowhere in particular; "
                "`clseave finetune-ve --head patches` trains one that sees its parts."
            )
        photo = Photo.of(image).decode()
        return heat_map(photo, prediction.attention, self._model.preparation)

    def _embed(
        self, photos: Mapping[Hashable, Photo]
    ) -> tuple[dict[Hashable, Floats], dict[Hashable, DataError]]:
        """(E,) vectors of the photos that can be read, and what is wrong with the others."""
        vectors = {key: self._images[key] for key in photos if key in self._images}
        problems: dict[Hashable, DataError] = {}
        new = [photo for key, photo in photos.items() if key not in vectors]
        with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
            decoded = zip(new, ahead(pool, self._prepare, new, _IMAGES_AHEAD), strict=True)
            while batch := list(islice(decoded, _IMAGE_BATCH)):
                problems |= {p.key: each for p, each in batch if isinstance(each, DataError)}
                pixels = {p.key: each for p, each in batch if not isinstance(each, DataError)}
                if pixels:
                    embedded = self._model.embed_images(np.stack(list(pixels.values())))
                    # Copies, so that what is kept does not keep the whole batch.
                    vectors |= dict(zip(pixels, (each.copy() for each in embedded), strict=True))
                    self._images |= vectors
        num_bytes = next(iter(self._images.values())).nbytes if self._images else 0
        while len(self._images) * num_bytes > _KEPT_BYTES:
            del self._images[next(iter(self._images))]
        return vectors, problems

    def _prepare(self, photo: Photo) -> Floats | DataError:
        """(3, height, width) pixels; called from several threads."""
        try:
            return self._model.prepare(photo.decode())
        except DataError as error:
            return error

    def _languages(self, lang: str | Sequence[str | None] | None, count: int) -> list[str]:
        """The language of each of N sentences."""
        given = [lang] * count if lang is None or isinstance(lang, str) else list(lang)
        if len(given) != count:
            raise UsageError(f"lang: {len(given)} languages for {count} pairs; give one for each.")
        allowed = {*self._model.sources, *([AUTO] if self._identifier else [])}
        languages = []
        for each in (self.lang if each is None else each for each in given):
            if each not in allowed:
                raise UsageError(
                    f"lang {each!r}: expected one of those loaded ({', '.join(sorted(allowed))}); "
                    "from_pretrained(…, lang=[…]) loads several."
                )
            languages.append(each)
        return languages


@dataclass
class BatchResult:
    """What became of an input: how many rows of each kind, and the first message of each."""

    num_predicted: int = 0
    num_errors: int = 0
    num_truncated: int = 0
    num_warnings: int = 0
    first_warning: str | None = None
    first_error: str | None = None

    def count(self, answers: Iterable[dict[str, Any]]) -> None:
        """Counts answers, as they are written."""
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
    """Judges every row of a file or stream, in order; memory does not grow with their number.

    A row names `image` (a file's relative paths are looked up beside it) and `hypothesis`. A row
    that cannot be judged gets `error` instead of `label`. A target file appears when it is
    complete; until then, `TARGET.partial` holds the answers so far, for `config.resume`. With it, a
    complete target is compared with the input in the same way, and gets the rows it lacks.

    Args:
        config: models, language, and whether to go on with what an earlier run wrote.
        source: as `data.pairs.Pairs` takes it.
        target: where the answers go, in the format its name tells, or that of the source.
        progress: told how many rows are done, and of sentences that were cut.

    Raises:
        ClseaveError: the input cannot be read, a model is missing, or the answers to go on with are
            damaged or of another run.
    """
    tally = BatchResult()
    lang = config.lang or own_language(config.runs, config.student)
    name = str(source) if isinstance(source, Path) else "stdin"
    base: Path | ImageFolder = source.parent if isinstance(source, Path) else Path()
    if config.images is not None:
        base = ImageFolder(config.images)
    with _reading(source) as stream, ExitStack() as stack:
        pairs = Pairs(stream, name, config.batch_size, config.image_column, config.text_column)
        batches = iter(pairs)
        answers = _answer_file(config, target, stream, pairs)
        if answers is not None:
            stack.enter_context(answers)
            batches = _unanswered(pairs, answers, lang, tally)
            if answers.finished:
                # The first rows left to do come after all answers were compared with theirs.
                first = next(batches, None)
                if first is None:
                    return tally
                answers.reopen()
                batches = chain([first], batches)
        model = VisualEntailment.from_pretrained(
            config.runs, lang, config.device, config.precision, config.student,
            unsure=config.unsure, progress=progress,
        )  # fmt: skip
        with _writing(answers, target) as out, progress.task("predict", unit="pairs") as task:
            for batch in batches:
                outcomes = list(_judge_rows(model, base, batch, bool(pairs.whole)))
                if answers is None and (table := AnswerTable.of(pairs, None)):
                    is_first = not (tally.num_predicted or tally.num_errors)
                    out.write(table.encode(outcomes, with_header=is_first))
                else:
                    out.write(b"".join(map(json_line, outcomes)))
                out.flush()
                tally.count(outcomes)
                task.advance(len(outcomes))
    if tally.num_truncated:
        progress.note(
            f"{name}: {tally.num_truncated} hypotheses were too long and were cut at the encoder's "
            "limit (`truncated`)."
        )
    if tally.num_warnings:
        progress.note(
            f"{name}: {tally.num_warnings} answers with a `warning`: {tally.first_warning}"
        )
    return tally


def _reading(source: Path | BinaryIO) -> AbstractContextManager[BinaryIO]:
    if not isinstance(source, Path):
        return nullcontext(source)
    try:
        return source.open("rb")
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}).") from None


def _answer_file(
    config: PredictConfig, target: Path | BinaryIO, source: BinaryIO, pairs: Pairs
) -> AnswerFile | None:
    """The file of the answers; None for a pipe or device, which nothing can be added to later."""
    if isinstance(target, Path) and (target.is_file() or not target.exists()):
        if target.exists() and samestat(target.stat(), os.fstat(source.fileno())):
            raise UsageError(f"{target}: is both input and output; choose another --output.")
        table = AnswerTable.of(pairs, target)
        pairs.whole = table is not None
        with writing(target):
            return AnswerFile(target.resolve(), config.resume, table)
    if isinstance(target, Path) and target.is_dir():
        raise UsageError(f"{target}: is a folder; expected a file for the answers.")
    if config.resume:
        raise UsageError("--resume needs a file as --output.")
    return None


def _writing(
    answers: AnswerFile | None, target: Path | BinaryIO
) -> AbstractContextManager[BinaryIO]:
    if answers is not None:
        return answers.open()
    return target.open("wb") if isinstance(target, Path) else nullcontext(target)


def _unanswered(
    pairs: Pairs, answers: AnswerFile, lang: str, tally: BatchResult
) -> Iterator[list[Pair | DataError]]:
    """The rows that an earlier run left to do.

    Raises:
        ClseaveError: its answers are damaged, or those of other rows.
    """
    earlier = answers.earlier()
    number = 0
    for batch in pairs:
        todo = []
        for row in batch:
            number += 1
            answer = next(earlier, None)
            if answer is None:
                todo.append(row)
            elif _answers(answer, row, lang, pairs):
                tally.count([answer])
            else:
                raise _another_run(answers, number)
        if todo:
            yield todo
    if next(earlier, None) is not None:
        raise _another_run(answers, number + 1)


def _answers(answer: dict[str, Any], row: Pair | DataError, lang: str, pairs: Pairs) -> bool:
    if isinstance(row, DataError):
        return answer.keys() == {"error"}
    same_language = lang == AUTO or answer.get("lang") == lang
    answered = "label" in answer or "error" in answer
    judged = answer.get("image"), answer.get("hypothesis")
    if pairs.whole:  # a table keeps the columns of its input
        judged = pairs.named_by(answer)
    return answered and same_language and judged == row[:2]


def _another_run(answers: AnswerFile, number: int) -> ClseaveError:
    what = "answers another row than the input has there, or in another language;"
    if answers.finished:
        what += " choose another --output, or leave out --resume to replace that file."
        return DataError.at(answers.target, number, what)
    what += " resume with what it was started with, or delete that file."
    return UsageError(f"{answers.partial}:{number}: {what}")


def _judge_rows(
    model: VisualEntailment, base: Path | ImageFolder, rows: list[Pair | DataError], as_table: bool
) -> Iterator[dict[str, Any]]:
    """The answers to some rows, each with the row's other columns, or as a row of a table."""
    find = base.get if isinstance(base, ImageFolder) else base.joinpath
    paths = [find(row.image) if isinstance(row, Pair) else None for row in rows]
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
    """What tells one state of an image file from another: path, time of change, size."""
    try:
        status = os.stat(name)  # noqa: PTH116 - of the name as it is given
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{name}: no such image.") from None
    except (OSError, ValueError) as error:  # such as a name too long, or with a NUL in it
        raise DataError(f"{name}: cannot be read ({error}).") from None
    # Opening a pipe or a device could wait for ever.
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{name}: damaged or not an image (not a regular file).")
    return name, status.st_mtime_ns, status.st_size


def problem_of(hypothesis: str) -> str | None:
    """Why a sentence cannot be judged."""
    if not hypothesis.strip():
        return "the hypothesis is empty; expected a sentence."
    try:
        hypothesis.encode()
    except UnicodeEncodeError:
        return "the hypothesis is not valid Unicode."
    return None
