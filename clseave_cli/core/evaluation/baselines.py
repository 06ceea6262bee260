"""Baselines that never see the photo, and the shuffling of photos: what every accuracy needs beside
it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from clseave_cli.core.config import EvaluateConfig
from clseave_cli.core.data.records import Split, check_leak, distinct, read_split, split_path
from clseave_cli.core.data.seen import UNSEEN
from clseave_cli.core.evaluation.metrics import Ints
from clseave_cli.core.features import Photos
from clseave_cli.core.files import cache_root, file_digest, json_digest, read_json, write_json
from clseave_cli.errors import ModelError
from clseave_cli.labels import LABELS
from clseave_cli.progress import SILENT, Progress

# Raised when `predict_from_hypotheses` changes: kept guesses are then made again.
_VERSION = 2

# Thai to Lao, Burmese, Khmer, kana, Han, Hangul: one character is a token.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"

# Any other run of letters and digits is a token, and so is each punctuation mark.
_TOKEN = rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+|[^\w\s]"

# Rounds of random swaps that `shuffled_rows` mixes with; each touches every row once.
_SWAP_ROUNDS = 20


def predict_from_hypotheses(
    train_hypotheses: Sequence[str], train_labels: npt.ArrayLike, test_hypotheses: Sequence[str]
) -> Ints:
    """(M,) label ids of M test sentences, by a classifier that never sees the photo.

    Logistic regression on TF-IDF of 1- to 3-grams of tokens: words, but single characters in
    scripts without spaces between words (and in Hangul, where a word is stem and endings). It picks
    up what the wording alone gives away (Gururangan et al., "Annotation Artifacts in Natural
    Language Inference Data", 2018).

    Equal rows are counted, not repeated: the loss is that of all rows, at a fraction of the time
    where sentences recur. Inverse document frequencies are those of the distinct rows.

    Raises:
        ValueError: no training rows.
    """
    label_ids = np.asarray(train_labels, dtype=np.int64).tolist()
    counts = Counter(zip(map(_normalised, train_hypotheses), label_ids, strict=True))
    if not counts:
        raise ValueError("the hypothesis-only baseline needs training rows")
    texts = [text for text, _ in counts]
    labels = np.array([label for _, label in counts])
    weights = np.array(list(counts.values()), dtype=np.float64)
    if len(set(labels.tolist())) == 1 or not any(texts):
        fallback = np.bincount(labels, weights=weights).argmax()
        return np.full(len(test_hypotheses), fallback, dtype=np.int64)
    # Single precision: nothing here needs more, and it takes half the time.
    grams: dict[str, Any] = {"ngram_range": (1, 3), "dtype": np.float32}
    frequencies = TfidfVectorizer(token_pattern=_TOKEN, sublinear_tf=True, **grams)
    model = make_pipeline(frequencies, LogisticRegression(max_iter=1000, tol=1e-3))
    model.fit(texts, labels, logisticregression__sample_weight=weights)
    asked, index = distinct([_normalised(text) for text in test_hypotheses])
    guesses: Ints = model.predict(asked)[index]
    return guesses


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


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
    a million rows take long to learn from.
    """

    def __init__(self, config: EvaluateConfig, folder: Path, progress: Progress = SILENT) -> None:
        self._config, self._folder, self._progress = config, folder, progress
        self._must_not_leak = not config.allow_leak and config.train_split != config.split
        options: dict[str, Any] = {"with_images": False, "skip_bad": config.skip_bad}
        read = functools.partial(read_split, folder, config.train_split, **options)
        # The source language, and the language at hand: half a million rows each.
        self._read = functools.lru_cache(maxsize=2)(read)

    def training_file(self, lang: str) -> Path | None:
        """Where the training rows of a language are; None: there are none to learn from."""
        return split_path(self._folder, self._config.train_split, lang)

    def require(self, rows: Rows) -> None:
        """Refuses training rows that `guess` would refuse, without learning from them.

        Raises:
            DataError: a bad row, or a photo of the rows among the training photos.
        """
        training = self.training_file(rows.lang)
        if training is not None and self._kept(self._path(training, rows), rows) is None:
            self._training_rows(rows)

    def guess(self, rows: Rows) -> Guesses | None:
        """The guesses for some rows; None without training rows in the language the model reads.

        Raises:
            DataError: as `require`.
        """
        training = self.training_file(rows.lang)
        if training is None:
            return None
        path = self._path(training, rows)
        guesses = self._kept(path, rows)
        if guesses is None:
            learnt = self._training_rows(rows)
            with self._progress.task(f"{rows.lang}: hypothesis-only classifier", 1) as task:
                labels = predict_from_hypotheses(learnt.hypotheses, learnt.labels, rows.hypotheses)
                task.advance()
            counts = np.bincount(learnt.labels, minlength=len(LABELS)).tolist()
            guesses = Guesses(tuple(counts), labels)
            write_json(path, {"counts": counts, "labels": labels.tolist()})
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
