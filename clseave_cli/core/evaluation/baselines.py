"""Baselines that never see the photo, or see another one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn

from clseave_cli.core.config import EvaluateConfig
from clseave_cli.core.data.hypothesis_only import HypothesisClassifier, Ints
from clseave_cli.core.data.records import Split, check_leak, read_split, split_path
from clseave_cli.core.data.seen import UNSEEN
from clseave_cli.core.features import Photos
from clseave_cli.core.files import cache_root, file_digest, json_digest, read_json, write_json
from clseave_cli.errors import ModelError
from clseave_cli.labels import LABELS
from clseave_cli.progress import Progress

# Raised when `HypothesisClassifier` changes, to invalidate cached guesses.
_VERSION = 2


def shuffled_rows(images: npt.ArrayLike, seed: int) -> Ints:
    """A permutation of the rows that gives every row another photo.

    Scoring row i with the photo of row `shuffled_rows(...)[i]` keeps the hypotheses and the photos
    and breaks only their pairing.

    Rows are ordered by photo and shifted by the largest number of rows of a photo. A row keeps its
    photo only if more than half of all rows share it. Random swaps that respect this then mix the
    permutation.
    """
    generator = np.random.default_rng(seed)
    _, photo = np.unique(np.asarray(images), return_inverse=True)
    num_rows = len(photo)
    if num_rows == 0:
        return np.zeros(0, dtype=np.int64)
    photo = generator.permutation(int(photo.max()) + 1)[photo]
    by_photo = np.lexsort((generator.random(num_rows), photo))
    rows = np.empty(num_rows, dtype=np.int64)
    rows[by_photo] = np.roll(by_photo, -int(np.bincount(photo).max()))
    for _ in range(20):  # each round touches every row once
        first, second = generator.permutation(num_rows)[: num_rows // 2 * 2].reshape(2, -1)
        allowed = (photo[rows[second]] != photo[first]) & (photo[rows[first]] != photo[second])
        first, second = first[allowed], second[allowed]
        rows[first], rows[second] = rows[second], rows[first]
    return rows


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows to evaluate, as a model reads them."""

    split: Split
    lang: str  # language that the model reads
    hypotheses: Sequence[str]  # (N,) in that language
    photos: Photos  # of the split's images
    seen: npt.NDArray[np.int8]  # (N,) whether a model saw a row in training (`data.seen`)
    num_excluded: int = 0  # rows left out because a model saw their photos
    translator: str = ""  # of the hypotheses; empty: not translated

    @property
    def seen_images(self) -> list[str]:
        """The photos that a model saw in training."""
        numbers = np.unique(self.split.image_index[self.seen != UNSEEN])
        return [self.split.image_names[number] for number in numbers]


@dataclass(frozen=True, eq=False)
class Guesses:
    """Labels guessed without a photo."""

    counts: tuple[int, ...]  # (C,) training rows of each label
    labels: Ints  # (N,) int label ids by the hypothesis-only classifier

    @property
    def majority(self) -> int:
        """The most frequent label id of the training rows."""
        return int(np.argmax(self.counts))


class HypothesisOnly:
    """The hypothesis-only classifier of each language.

    It learns from the training file of the data folder, and its guesses are cached by the digests
    of that file and of the rows, because half a million rows take long. Without such a file, the
    classifier in the model's folder guesses, in the language that CLIP-VE reads.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        folder: Path,
        clip_ve: Path,
        source_lang: str,
        progress: Progress,
    ) -> None:
        self._config, self._folder, self._progress = config, folder, progress
        self._source_lang = source_lang
        self._in_model = functools.cache(lambda: HypothesisClassifier.read(clip_ve))
        self._must_not_leak = not config.allow_leak and config.train_split != config.split
        options: dict[str, Any] = {"with_images": False, "skip_bad": config.skip_bad}
        read = functools.partial(read_split, folder, config.train_split, **options)
        # The source language and one other, of half a million rows each.
        self._read = functools.lru_cache(maxsize=2)(read)

    def learnt_from(self, lang: str) -> tuple[str, str] | None:
        """Name and digest of the training rows of a language, if there are any."""
        if (training := self._training_file(lang)) is not None:
            return training.relative_to(self._folder).as_posix(), file_digest(training)
        if (classifier := self._classifier(lang)) is not None:
            return f"clip-ve: {classifier.file}", classifier.digest
        return None

    def _training_file(self, lang: str) -> Path | None:
        return split_path(self._folder, self._config.train_split, lang)

    def _classifier(self, lang: str) -> HypothesisClassifier | None:
        """The one in the model's folder, if it reads the language."""
        return self._in_model() if lang == self._source_lang else None

    def require(self, rows: Rows) -> None:
        """Raises what `guess` would raise, without learning from the training rows.

        Raises:
            DataError: a bad training row, or a photo of the rows among the training photos.
            ModelError: the classifier in the model's folder is damaged.
        """
        training = self._training_file(rows.lang)
        if training is None:
            self._classifier(rows.lang)
        elif self._cached(self._path(training, rows), rows) is None:
            self._training_rows(rows)

    def guess(self, rows: Rows) -> Guesses | None:
        """The guesses for rows; None without a classifier of the language that the model reads."""
        training = self._training_file(rows.lang)
        if training is None:
            classifier = self._classifier(rows.lang)
            if classifier is None:
                return None
            return Guesses(classifier.counts, classifier.predict(rows.hypotheses))
        path = self._path(training, rows)
        guesses = self._cached(path, rows)
        if guesses is None:
            train = self._training_rows(rows)
            with self._progress.task(f"{rows.lang}: hypothesis-only classifier", 1) as task:
                classifier = HypothesisClassifier.fit(train.hypotheses, train.labels)
                guesses = Guesses(classifier.counts, classifier.predict(rows.hypotheses))
                task.advance()
            write_json(path, {"counts": guesses.counts, "labels": guesses.labels.tolist()})
        return guesses

    def _training_rows(self, rows: Rows) -> Split:
        training = self._read(rows.lang)
        if self._must_not_leak:
            check_leak(training, rows.split)
        return training

    def _path(self, training: Path, rows: Rows) -> Path:
        names, skip_bad = rows.split.image_names, self._config.skip_bad
        query = [list(rows.hypotheses), names, skip_bad, self._must_not_leak]
        key = json_digest([_VERSION, sklearn.__version__, file_digest(training), query])
        return cache_root() / "hypothesis-only" / f"{key}.json"

    def _cached(self, path: Path, rows: Rows) -> Guesses | None:
        """Cached guesses; None if they are missing or damaged."""
        try:
            stored: Any = read_json(path) if path.is_file() else {}
            counts, labels = tuple(map(int, stored["counts"])), stored["labels"]
            sizes = len(counts), len(labels)
            if sizes != (len(LABELS), len(rows.split)) or not {*labels} <= {*range(len(LABELS))}:
                return None
        except (ModelError, TypeError, KeyError, ValueError):
            return None
        return Guesses(counts, np.array(labels, dtype=np.int64))
