"""Baselines that never see the photo, and the shuffling of photos: what every accuracy needs beside
it.
"""

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
from clseave_cli.progress import SILENT, Progress

# Raised when `HypothesisClassifier` changes: kept guesses are then made again.
_VERSION = 2

# Rounds of random swaps that `shuffled_rows` mixes with; each touches every row once.
_SWAP_ROUNDS = 20


def shuffled_rows(images: npt.ArrayLike, seed: int) -> Ints:
    """A permutation of the rows that gives every row another photo.

    Scoring row i with the image feature of row `shuffled_rows(...)[i]` keeps both margins (the
    hypotheses and the photos) and breaks only what joins them.

    Rows are ordered by photo and shifted by the largest number of rows that share one, which leaves
    a row with its own photo only where that photo holds more than half of all rows and it cannot be
    otherwise. Random swaps that keep this property then mix the permutation.
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
    for _ in range(_SWAP_ROUNDS):
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
    seen: npt.NDArray[np.int8]  # (N,) what of each row the models saw in training (`data.seen`)
    num_excluded: int = 0  # rows left out because the models saw their photos
    translator: str = ""  # what translated them, if anything did

    @property
    def seen_images(self) -> list[str]:
        """The photos that the models saw in training."""
        numbers = np.unique(self.split.image_index[self.seen != UNSEEN])
        return [self.split.image_names[number] for number in numbers]


@dataclass(frozen=True, eq=False)
class Guesses:
    """Labels guessed without a photo."""

    counts: tuple[int, ...]  # (C,) training rows of each label
    labels: Ints  # (N,) int label ids by the hypothesis-only classifier

    @property
    def majority(self) -> int:
        """The training rows' most frequent label id; of equals, the first."""
        return int(np.argmax(self.counts))


class HypothesisOnly:
    """Guesses from the rows a model was trained on.

    They are kept in the cache by the digest of the training file and of the rows asked about: half
    a million rows take long to learn from. Where the data folder lacks that file, the classifier in
    the model's folder guesses, in the language that CLIP-VE reads.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        folder: Path,
        clip_ve: Path,
        source_lang: str,
        progress: Progress = SILENT,
    ) -> None:
        self._config, self._folder, self._progress = config, folder, progress
        self._source_lang = source_lang
        self._in_model = functools.cache(lambda: HypothesisClassifier.read(clip_ve))
        self._must_not_leak = not config.allow_leak and config.train_split != config.split
        options: dict[str, Any] = {"with_images": False, "skip_bad": config.skip_bad}
        read = functools.partial(read_split, folder, config.train_split, **options)
        # The source language, and the language at hand: half a million rows each.
        self._read = functools.lru_cache(maxsize=2)(read)
        # Every training that is evaluated asks about the same rows.
        self.guess = functools.cache(self._guess)

    def learnt_from(self, lang: str) -> tuple[str, str] | None:
        """Name and digest of the training rows of a language; None: there are none."""
        if (training := self._training_file(lang)) is not None:
            return training.relative_to(self._folder).as_posix(), file_digest(training)
        if (kept := self._classifier(lang)) is not None:
            return f"clip-ve: {kept.file}", kept.digest
        return None

    def _training_file(self, lang: str) -> Path | None:
        return split_path(self._folder, self._config.train_split, lang)

    def _classifier(self, lang: str) -> HypothesisClassifier | None:
        """The one in the model's folder, if it reads the language."""
        return self._in_model() if lang == self._source_lang else None

    def require(self, rows: Rows) -> None:
        """Refuses training rows that `guess` would refuse, without learning from them.

        Raises:
            DataError: a bad row, or a photo of the rows among the training photos.
            ModelError: there are none, and the classifier in the model's folder is damaged.
        """
        training = self._training_file(rows.lang)
        if training is None:
            self._classifier(rows.lang)
        elif self._kept(self._path(training, rows), rows) is None:
            self._training_rows(rows)

    def _guess(self, rows: Rows) -> Guesses | None:
        """The guesses for some rows; None without a classifier of the language the model reads.

        Raises:
            DataError: as `require`.
        """
        training = self._training_file(rows.lang)
        if training is None:
            kept = self._classifier(rows.lang)
            return None if kept is None else Guesses(kept.counts, kept.predict(rows.hypotheses))
        path = self._path(training, rows)
        guesses = self._kept(path, rows)
        if guesses is None:
            learnt = self._training_rows(rows)
            with self._progress.task(f"{rows.lang}: hypothesis-only classifier", 1) as task:
                classifier = HypothesisClassifier.fit(learnt.hypotheses, learnt.labels)
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
        asked = [list(rows.hypotheses), names, skip_bad, self._must_not_leak]
        key = json_digest([_VERSION, sklearn.__version__, file_digest(training), asked])
        return cache_root() / "hypothesis-only" / f"{key}.json"

    def _kept(self, path: Path, rows: Rows) -> Guesses | None:
        """What the cache holds; None where it holds nothing, or a damaged file."""
        try:
            stored: Any = read_json(path) if path.is_file() else {}
            counts, labels = tuple(map(int, stored["counts"])), stored["labels"]
            sizes = len(counts), len(labels)
            if sizes != (len(LABELS), len(rows.split)) or not {*labels} <= {*range(len(LABELS))}:
                return None
        except (ModelError, TypeError, KeyError, ValueError):
            return None
        return Guesses(counts, np.array(labels, dtype=np.int64))
