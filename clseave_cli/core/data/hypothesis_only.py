"""A classifier that never sees the photo: what the wording of a hypothesis alone gives away."""

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

#: Where in a model's folder; it does not count in the model's fingerprint.
HYPOTHESIS_ONLY_FILE = "training/hypothesis_only.safetensors"

Ints = npt.NDArray[np.int64]

# Thai to Lao, Burmese, Khmer, kana, Han, Hangul: one character is a token.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"

# Any other run of letters and digits is a token, and so is each punctuation mark.
_TOKEN = rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+|[^\w\s]"

_GRAMS: dict[str, Any] = {"token_pattern": _TOKEN, "ngram_range": (1, 3), "sublinear_tf": True}
# Single precision: nothing here needs more, and it takes half the time.
_GRAMS["dtype"] = np.float32


@dataclass(frozen=True, eq=False)
class HypothesisClassifier:
    """Logistic regression on TF-IDF of 1- to 3-grams of tokens.

    Tokens are words, but single characters in scripts without spaces between words (and in Hangul,
    where a word is stem and endings). It picks up what the wording alone gives away (Gururangan et
    al., "Annotation Artifacts in Natural Language Inference Data", 2018).

    Attributes:
        counts: (C,) training rows of each label.
        file: name of the file that it learnt from; empty where it is not kept.
        digest: BLAKE2b-256 of that file.
    """

    counts: tuple[int, ...]
    _grams: TfidfVectorizer | None  # None: nothing to learn; the most frequent label is the answer
    _model: LogisticRegression
    file: str = ""
    digest: str = ""

    @classmethod
    def fit(
        cls, hypotheses: Sequence[str], labels: npt.ArrayLike, split: Split | None = None
    ) -> HypothesisClassifier:
        """Learns from N sentences and their label ids; `split` is where they come from.

        Equal rows are counted, not repeated: the loss is that of all rows, at a fraction of the
        time where sentences recur. Inverse document frequencies are those of the distinct rows.

        Raises:
            ValueError: no training rows.
        """
        label_ids = np.asarray(labels, dtype=np.int64).tolist()
        counts = Counter(zip(map(_normalised, hypotheses), label_ids, strict=True))
        if not counts:
            raise ValueError("the hypothesis-only baseline needs training rows")
        texts, distinct_labels = zip(*counts, strict=True)
        grams, model = None, LogisticRegression(max_iter=1000, tol=1e-3)
        if len(set(distinct_labels)) > 1 and any(texts):
            grams = TfidfVectorizer(**_GRAMS)
            weights = np.array(list(counts.values()), dtype=np.float64)
            model.fit(grams.fit_transform(texts), np.array(distinct_labels), weights)
        source = ("", "") if split is None else (split.path.name, split.digest)
        of_labels = np.bincount(label_ids, minlength=len(LABELS))
        return cls(tuple(of_labels.tolist()), grams, model, *source)

    def predict(self, hypotheses: Sequence[str]) -> Ints:
        """(M,) label ids of M sentences."""
        if self._grams is None:
            return np.full(len(hypotheses), np.argmax(self.counts), dtype=np.int64)
        asked, index = distinct([_normalised(text) for text in hypotheses])
        guesses: Ints = self._model.predict(self._grams.transform(asked))[index]
        return guesses

    def write(self, folder: Path) -> None:
        """Writes it into a model's folder, as numbers and text."""
        arrays = {"counts": np.array(self.counts)}
        if self._grams is not None:
            terms = sorted(self._grams.vocabulary_, key=self._grams.vocabulary_.__getitem__)
            arrays |= {
                # No token holds white space, and grams are tokens with a space between them.
                "grams": np.frombuffer("\n".join(terms).encode(), np.uint8),
                "idf": self._grams.idf_,
                "labels": self._model.classes_,
                # Row by row, or the bytes would be saved in the wrong order.
                "weights": np.ascontiguousarray(self._model.coef_),
                "bias": self._model.intercept_,
            }
        path = folder / HYPOTHESIS_ONLY_FILE
        path.parent.mkdir(exist_ok=True)
        # One entry: of several, the order would be another one each time.
        save_file(arrays, path, {"source": f"{self.digest} {self.file}"})

    @classmethod
    def read(cls, folder: Path) -> HypothesisClassifier | None:
        """What `write` left in a model's folder; None: nothing.

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
            return cls(tuple(arrays["counts"].tolist()), *_rebuilt(arrays), file, digest)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: damaged ({error}); copy the model folder again.") from None


def _rebuilt(arrays: dict[str, Any]) -> tuple[TfidfVectorizer | None, LogisticRegression]:
    """Vectoriser and model of numbers that were stored.

    Raises:
        ValueError: they do not fit together.
    """
    grams, model = None, LogisticRegression()
    if arrays["counts"].shape != (len(LABELS),):
        raise ValueError("its numbers do not fit together")
    if "grams" in arrays:
        terms = arrays["grams"].tobytes().decode().split("\n")
        labels, weights, bias = arrays["labels"], arrays["weights"], arrays["bias"]
        rows = 1 if len(labels) == 2 else len(labels)
        finite = all(np.isfinite(arrays[name]).all() for name in ("idf", "weights", "bias"))
        known = set(labels.tolist()) <= {*range(len(LABELS))}
        if not (finite and known and weights.shape == (rows, len(terms)) and len(bias) == rows):
            raise ValueError("its numbers do not fit together")
        grams = TfidfVectorizer(**_GRAMS, vocabulary=terms)
        grams.idf_ = arrays["idf"]
        model.classes_, model.coef_, model.intercept_ = labels, weights, bias
    return grams, model


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())
