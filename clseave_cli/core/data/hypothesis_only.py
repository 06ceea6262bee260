"""A classifier that never sees the photo, to measure what the wording alone gives away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from clseave_cli.core.data.records import Split, distinct
from clseave_cli.errors import ModelError
from clseave_cli.labels import LABELS

#: Path in a model's folder; not part of the model's fingerprint.
HYPOTHESIS_ONLY_FILE = "training/hypothesis_only.safetensors"

Ints = npt.NDArray[np.int64]

# Thai, Lao, Burmese, Khmer, kana, Han, Hangul: one character is a token.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"

# Any other run of letters and digits is a token, and so is each punctuation mark.
_TOKEN = rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+|[^\w\s]"

# Single precision takes half the time.
_TFIDF: dict[str, Any] = {
    "token_pattern": _TOKEN, "ngram_range": (1, 3), "sublinear_tf": True, "dtype": np.float32,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class HypothesisClassifier:
    """Logistic regression on TF-IDF of 1- to 3-grams of tokens.

    Tokens are words, but single characters in scripts without spaces between words (and in Hangul,
    where a word is a stem with endings). Such a baseline detects annotation artifacts (Gururangan
    et al., "Annotation Artifacts in Natural Language Inference Data", 2018).
    """

    counts: tuple[int, ...]  # (C,) training rows of each label
    _tfidf: TfidfVectorizer | None  # None: nothing to learn; predicts the most frequent label
    _model: LogisticRegression
    file: str = ""  # name of its training file; empty if unknown
    digest: str = ""  # BLAKE2b-256 of that file

    @classmethod
    def fit(
        cls, hypotheses: Sequence[str], labels: npt.ArrayLike, split: Split | None = None
    ) -> HypothesisClassifier:
        """Trains on N sentences and their label ids, taken from `split`.

        Equal rows become one weighted row: the loss is the same, in a fraction of the time if
        sentences recur. Inverse document frequencies are those of the distinct rows.

        Raises:
            ValueError: no training rows.
        """
        label_ids = np.asarray(labels, dtype=np.int64).tolist()
        counts = Counter(zip(map(_normalised, hypotheses), label_ids, strict=True))
        if not counts:
            raise ValueError("the hypothesis-only baseline needs training rows")
        texts, distinct_labels = zip(*counts, strict=True)
        tfidf, model = None, LogisticRegression(max_iter=1000, tol=1e-3)
        if len(set(distinct_labels)) > 1 and any(texts):
            tfidf = TfidfVectorizer(**_TFIDF)
            weights = np.array(list(counts.values()), dtype=np.float64)
            model.fit(tfidf.fit_transform(texts), np.array(distinct_labels), weights)
        source = ("", "") if split is None else (split.path.name, split.digest)
        label_counts = np.bincount(label_ids, minlength=len(LABELS))
        return cls(tuple(label_counts.tolist()), tfidf, model, *source)

    def predict(self, hypotheses: Sequence[str]) -> Ints:
        """(M,) label ids of M sentences."""
        if self._tfidf is None:
            return np.full(len(hypotheses), np.argmax(self.counts), dtype=np.int64)
        texts, index = distinct([_normalised(text) for text in hypotheses])
        labels: Ints = self._model.predict(self._tfidf.transform(texts))
        return labels[index]

    def write(self, folder: Path) -> None:
        """Writes the classifier into a model's folder, as numbers and text."""
        arrays = {"counts": np.array(self.counts)}
        if self._tfidf is not None:
            terms = sorted(self._tfidf.vocabulary_, key=self._tfidf.vocabulary_.__getitem__)
            arrays |= {
                # No token contains white space; the tokens of a term are separated by a space.
                "grams": np.frombuffer("\n".join(terms).encode(), np.uint8),
                "idf": self._tfidf.idf_,
                "labels": self._model.classes_,
                # safetensors would write the bytes of a transposed array in the wrong order.
                "weights": np.ascontiguousarray(self._model.coef_),
                "bias": self._model.intercept_,
            }
        path = folder / HYPOTHESIS_ONLY_FILE
        path.parent.mkdir(exist_ok=True)
        # A single entry: the order of several would differ from file to file.
        save_file(arrays, path, {"source": f"{self.digest} {self.file}"})

    @classmethod
    def read(cls, folder: Path) -> HypothesisClassifier | None:
        """The classifier in a model's folder; None: there is none.

        Raises:
            ModelError: the file is damaged.
        """
        path = folder / HYPOTHESIS_ONLY_FILE
        if not path.is_file():
            return None
        try:
            arrays = load_file(path)
            with safe_open(path, framework="numpy") as stored:
                digest, _, file = (stored.metadata() or {})["source"].partition(" ")
            return cls(tuple(arrays["counts"].tolist()), *_from_arrays(arrays), file, digest)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: damaged ({error}); copy the model folder again.") from None


def _from_arrays(arrays: dict[str, Any]) -> tuple[TfidfVectorizer | None, LogisticRegression]:
    """The vectoriser and model of stored arrays.

    Raises:
        ValueError: the arrays are inconsistent.
    """
    tfidf, model = None, LogisticRegression()
    is_valid = arrays["counts"].shape == (len(LABELS),)
    if is_valid and "grams" in arrays:
        terms = arrays["grams"].tobytes().decode().split("\n")
        labels, weights, bias = arrays["labels"], arrays["weights"], arrays["bias"]
        num_rows = 1 if len(labels) == 2 else len(labels)
        is_valid = (
            all(np.isfinite(arrays[name]).all() for name in ("idf", "weights", "bias"))
            and set(labels.tolist()) <= {*range(len(LABELS))}
            and weights.shape == (num_rows, len(terms))
            and len(bias) == num_rows
        )
        tfidf = TfidfVectorizer(**_TFIDF, vocabulary=terms)
        tfidf.idf_ = arrays["idf"]
        model.classes_, model.coef_, model.intercept_ = labels, weights, bias
    if not is_valid:
        raise ValueError("inconsistent arrays")
    return tfidf, model


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())
