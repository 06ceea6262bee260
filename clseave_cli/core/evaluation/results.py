"""The results document of an evaluation: `results.json`, and the same in memory.

`docs/results.md` describes every key. Accuracies and their differences are fractions.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clseave_cli.core.evaluation.metrics import Difference, Interval, Scores
from clseave_cli.core.evaluation.transfer import DistanceAnalysis, Transfer
from clseave_cli.core.files import json_digest, read_json, write_json
from clseave_cli.errors import DataError

#: Version of the document's shape; raised when a key changes its meaning.
FORMAT = 1

RESULTS_FILE = "results.json"

#: What to say where `Results.of_training_rows`.
TRAINING_ROWS = (
    "The rows evaluated are those of the training split: the figures say what the models remember, "
    "not how good they are."
)


@dataclass(frozen=True)
class Overlap:
    """Rows whose photo a model saw: in training, or when its checkpoint was chosen."""

    num_images: int  # those photos
    num_examples: int  # their rows
    num_pairs: int  # of these, rows whose hypothesis was seen beside the photo
    share: float  # of all rows
    accuracy: float  # on these rows
    accuracy_pairs: float | None  # on the pairs seen
    accuracy_unseen: float | None  # on all other rows


@dataclass(frozen=True)
class Abstention:
    """What the thresholds of `clseave calibrate` come to on these rows."""

    precision: float  # the share of right answers that was promised
    labels: tuple[str, ...]  # of which answers; others are always given
    share: float  # of all rows, that are answered `unsure`
    num_answered: int  # rows answered with one of `labels`
    accuracy: Interval | None  # share of these that are right; None: there are none


Mode = Literal["zero-shot", "translate-test"]


def result_key(lang: str, mode: Mode) -> str:
    """What names one result among the others: `de`, or `de.translate-test`."""
    return lang if mode == "zero-shot" else f"{lang}.{mode}"


@dataclass(frozen=True, kw_only=True)
class LanguageResult(Scores):
    """One language's scores, and how they compare with other systems on the same rows."""

    lang: str  # language code
    split: str  # name of the split
    # `zero-shot` (`Signature.reader` reads the language; the source language: the source model) or
    # `translate-test` (the hypotheses are translated into the source language first).
    mode: Mode = "zero-shot"
    # Accuracy on the rows that the hypothesis-only baseline gets wrong, with its 95 %
    # interval.
    hard_accuracy: float | None = None
    hard_accuracy_low: float | None = None
    hard_accuracy_high: float | None = None
    num_hard: int | None = None  # how many those are
    # Accuracy divided by the source language's on the same rows; English unless
    # `Signature.source_lang` says otherwise.
    ratio_to_english: float | None = None
    # Share of rows given the same label as by the source model.
    agreement_with_english: float | None = None
    kappa_with_english: float | None = None  # the same beyond chance, Cohen's κ
    # Paired difference in accuracy, this language minus the source.
    difference_to_english: Difference | None = None
    # The same, translate-test minus this language's student.
    difference_to_zero_shot: Difference | None = None
    transfer: Transfer | None = None  # embeddings against those of the source sentences
    seen: Overlap | None = None  # rows of photos seen in training, where there are any
    # What probabilities were mended with, and what `ece` and `loss` were before; None: nothing.
    temperature: float | None = None
    ece_uncalibrated: float | None = None
    loss_uncalibrated: float | None = None
    unsure: Abstention | None = None  # where thresholds were set

    @property
    def key(self) -> str:
        """What names the result in `baselines`, `seeds` and the files of predictions."""
        return result_key(self.lang, self.mode)


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Accuracies on one language's rows without seeing the photo, or with another one.

    None stands for what was not measured. Each `difference_to_…` is the system's paired difference
    in accuracy to that baseline.
    """

    majority: float | None = None  # always the training rows' most frequent label
    # A classifier that reads only the hypothesis, trained on the same rows.
    hypothesis_only: float | None = None
    shuffled_image: float | None = None  # the model itself, every row with another row's photo
    difference_to_majority: Difference | None = None
    difference_to_hypothesis_only: Difference | None = None
    difference_to_shuffled_image: Difference | None = None
    # Training rows that the classifier learnt from, by label name; empty: not measured.
    train_labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SeedSummary:
    """A metric over several training seeds."""

    num_seeds: int  # trainings
    mean: float  # of the metric
    std: float  # sample deviation (n − 1), 0 for one seed: the luck of the training
    min: float  # the smallest
    max: float  # the largest
    # Lower end of the mean's 95 % interval by bootstrap over photos, for these trainings: the
    # choice of the photos. None where not measured.
    low: float | None = None
    high: float | None = None  # upper end

    @classmethod
    def of(cls, values: Sequence[float], interval: Interval | None = None) -> SeedSummary:
        """Summarises one value a seed.

        Raises:
            ValueError: no values.
        """
        if not values:
            raise ValueError("nothing to summarise")
        mean, std = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0
        ends = (interval.low, interval.high) if interval else ()
        return cls(len(values), float(mean), float(std), min(values), max(values), *ends)


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What it takes to say whether two results can be compared."""

    version: str  # clseave's version
    data: dict[str, str]  # fingerprint (hex) by data file
    # Fingerprint (hex) by model folder: `align-de`; of several trainings `runs-1/align-de`.
    checkpoints: dict[str, str]
    seed: int  # seed of the bootstrap and of the shuffling
    resamples: int  # bootstrap resamples
    num_examples: int  # rows of the largest result
    # By language, what translated its hypotheses into the source language.
    translators: dict[str, str] = field(default_factory=dict)
    source_lang: str = "en"  # the language CLIP-VE reads, with which the others are compared
    reader: str = "student"  # what read the other languages; `source`: CLIP-VE's own tower
    # Fingerprint (hex) by file of the rows that the baselines learnt from. With `data` it
    # fills a page, so figures do without it.
    training: dict[str, str] = field(default_factory=dict)
    # What the matrix products ran in: `fp32`, `bf16` or `fp16`; None: an older document.
    precision: str | None = None
    device: str | None = None  # `cpu` or `cuda`; None: an older document
    dataset: str | None = None  # name of the data folder, or `hf:ORG/NAME`; None: an older document
    # By data file, how many of its photos the models saw in training, and how many rows were left
    # out because of that.
    seen: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, int] = field(default_factory=dict)
    # Day of the evaluation, `YYYY-MM-DD` (UTC); None: an older document. The same evaluation
    # on another day is equal.
    date: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        """One line for the foot of a figure: fingerprints shortened to 8 digits, many made one."""
        parts = [f"clseave {self.version}", f"n {self.num_examples:,}"]
        parts += _digests(self.data, "files")
        parts += self._models()
        if self.precision is not None:
            parts.append(f"{self.precision} on {self.device}")
        if self.source_lang != "en":
            parts.append(f"source {self.source_lang}")
        if self.reader == "source":
            parts.append("CLIP-VE reads every language")
        if self.seen:
            parts.append(f"{max(self.seen.values()):,} photos seen in training")
        if self.excluded:
            parts.append(f"{max(self.excluded.values()):,} rows of seen photos left out")
        parts += [f"{lang} translated by {name}" for lang, name in self.translators.items()]
        parts += [f"seed {self.seed}", f"{self.resamples:,} resamples by photo"]
        return " · ".join(parts)

    def _models(self) -> list[str]:
        """The checkpoints; of several trainings one digest each, whatever its folder is called."""
        trainings: dict[str, dict[str, str]] = {}
        for name, digest in self.checkpoints.items():
            training, _, model = name.rpartition("/")
            trainings.setdefault(training, {})[model] = digest
        if len(trainings) < 2:
            return _digests(self.checkpoints, "models")
        digests = {f"training {name}": json_digest(models) for name, models in trainings.items()}
        return _digests(digests, "trainings")


# Names that a line lists: more would take a figure's place.
_MOST_LISTED = 8


def _digests(digests: dict[str, str], kind: str) -> list[str]:
    """Each name with its digest's first 8 digits; where there are many, one digest over all."""
    if len(digests) > _MOST_LISTED:
        return [f"{len(digests)} {kind} {json_digest(digests)[:8]}"]
    return [f"{name} {digest[:8]}" for name, digest in digests.items()]


@dataclass(frozen=True, kw_only=True)
class Results:
    """The whole document."""

    results: tuple[LanguageResult, ...]  # one entry a language (and mode), in the order to show
    baselines: dict[str, Baselines]  # by `LanguageResult.key`
    signature: Signature  # where the numbers come from
    # Transfer loss against linguistic distance, where measured.
    distances: DistanceAnalysis | None = None
    # Metrics over several trainings, by `LanguageResult.key` and name (`SEED_METRICS`), where
    # there are several; all other numbers are those of the first.
    seeds: dict[str, dict[str, SeedSummary]] = field(default_factory=dict)
    # Accuracy by source language and language of the hypotheses, where there are models of several
    # source languages; all other numbers are those of the first. Means over its trainings.
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    format: int = FORMAT  # version of the document's shape

    def shows_mode(self, result: LanguageResult) -> bool:
        """Whether a table must say how a result came about: where some languages are translated."""
        translated = any(r.mode != "zero-shot" for r in self.results)
        return result.lang != self.source_lang and translated

    @property
    def source_lang(self) -> str:
        """The language that the others are compared with."""
        return self.signature.source_lang

    @property
    def num_trainings(self) -> int:
        """How many trainings the document is of."""
        summaries = (summary for by_name in self.seeds.values() for summary in by_name.values())
        return max((summary.num_seeds for summary in summaries), default=1)

    def spread(self, result: LanguageResult) -> SeedSummary | None:
        """Mean and deviation of a result's accuracy over the trainings, where it has several."""
        return self.seeds.get(result.key, {}).get("accuracy")

    @property
    def accuracies(self) -> dict[str, float]:
        """By language, of those that are read and not translated; means over the trainings."""
        read = [result for result in means(self).results if result.mode == "zero-shot"]
        return {result.lang: result.accuracy for result in read}

    @property
    def of_training_rows(self) -> bool:
        """Whether the rows evaluated are, in some language, those of the training split."""
        return not set(self.signature.data.values()).isdisjoint(self.signature.training.values())

    def to_json(self) -> dict[str, Any]:
        """The document as plain dicts, lists, strings, numbers and None."""
        # Tuples become lists, so that the document equals what reading it back gives.
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return document

    @classmethod
    def from_json(cls, document: Any) -> Results:
        """The inverse of `to_json`.

        Raises:
            DataError: not a results document of this format; names the key.
        """
        version = document.get("format") if isinstance(document, dict) else None
        if version != FORMAT:
            raise DataError(
                f"not a results document of format {FORMAT} (format: {version!r}); "
                "evaluate again with this version of clseave."
            )
        results: Results = _decode(cls, document, "results document")
        return results

    def write(self, folder: Path) -> Path:
        """Writes `results.json` into `folder`, atomically, and returns its path."""
        write_json(folder / RESULTS_FILE, self.to_json())
        return folder / RESULTS_FILE

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Reads `results.json` from a report folder.

        Raises:
            DataError: there is none, or it is not a results document.
        """
        path = folder / RESULTS_FILE
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; write one with: clseave evaluate --report {folder}"
            )
        try:
            return cls.from_json(read_json(path))
        except DataError as error:
            raise DataError(f"{path}: {error}") from None


# --- retrieval ---


@dataclass(frozen=True, kw_only=True)
class RankScores:
    """How well the right answers to some queries are found; the nearest right one counts.

    Equally near answers stand in random order, and recall and ranks are the expected ones.
    """

    # By k (1, 5, 10): the share of queries with a right answer among the first k.
    recall_at: dict[int, Interval]
    chance: float  # recall at 1 of a random order
    lower_quartile: float  # of the ranks, which count from 1
    median_rank: float
    upper_quartile: float


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """One language's images and captions, found by each other."""

    lang: str  # language code
    split: str  # name of the split
    reader: str  # folder or hub id of the model that read the captions
    trained: bool | None  # whether it was trained in this language; None: unknown
    num_images: int
    num_captions: int
    num_distinct: int  # captions that differ, among which an image's are looked for
    images: RankScores  # images, given a caption
    captions: RankScores  # captions, given an image


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """The document of `retrieve`, `retrieval.json`."""

    results: tuple[RetrievalResult, ...]  # one a language, in the order to show
    signature: Signature  # where the numbers come from
    format: int = 1  # version of the document's shape


# --- several trainings ---

#: The metrics that `across_seeds` summarises: keys of a result, and one of its baselines.
SEED_METRICS = (
    *("accuracy", "macro_f1", "loss", "ece", "aurc", "ratio_to_english"),
    "agreement_with_english",
    *("difference_to_english", "difference_to_zero_shot", "shuffled_image"),
    *("difference_to_majority", "difference_to_hypothesis_only", "difference_to_shuffled_image"),
)


def across_seeds(
    runs: Sequence[Results], intervals: Mapping[str, Mapping[str, Interval]] | None = None
) -> dict[str, dict[str, SeedSummary]]:
    """Summarises the same evaluation of several training seeds.

    `runs` are one document a seed, `intervals` those of the means, where measured; these and what
    is returned are by `LanguageResult.key` and metric (`SEED_METRICS`). Results and metrics that a
    run lacks are left out.
    """
    measured = intervals or {}
    by_run = [{result.key: _seed_metrics(result, run) for result in run.results} for run in runs]
    return {
        key: {
            name: SeedSummary.of(
                [of_run[key][name] for of_run in by_run], measured.get(key, {}).get(name)
            )
            for name in SEED_METRICS
            if all(name in of_run[key] for of_run in by_run)
        }
        for key in (by_run[0] if by_run else ())
        if all(key in of_run for of_run in by_run)
    }


def _seed_metrics(result: LanguageResult, run: Results) -> dict[str, float]:
    """Those of `SEED_METRICS` that were measured."""
    baselines = run.baselines.get(result.key, Baselines())
    measured = {
        name: getattr(result if hasattr(result, name) else baselines, name, None)
        for name in SEED_METRICS
    }
    return {
        name: value.value if isinstance(value, Difference) else value
        for name, value in measured.items()
        if value is not None
    }


def means(results: Results) -> Results:
    """The document with means over trainings in the place of what `Results.seeds` summarises.

    Those are its accuracies, paired differences (value and interval; p and counts stay the
    first's), macro-F1 and loss, ratios, agreements and shuffled images. All else, and every
    language that not all trainings have, is of the first. A document of one training is itself.
    """
    baselines = dict(results.baselines)
    for key, summaries in results.seeds.items():
        if key in baselines:
            baselines[key] = replace(baselines[key], **_means(baselines[key], summaries))
    shown = tuple(_mean_result(r, results.seeds.get(r.key, {})) for r in results.results)
    return replace(results, results=shown, baselines=baselines)


def _mean_result(result: LanguageResult, summaries: Mapping[str, SeedSummary]) -> LanguageResult:
    changed = _means(result, summaries)
    if (accuracy := summaries.get("accuracy")) is not None:
        changed |= {"accuracy_low": accuracy.low, "accuracy_high": accuracy.high}
        changed["kappa_with_english"] = None
    return replace(result, **changed)


def _means(first: object, summaries: Mapping[str, SeedSummary]) -> dict[str, Any]:
    """What changes of a first training's numbers when they are to be means."""
    changed: dict[str, Any] = {}
    for name, summary in summaries.items():
        value = getattr(first, name, None)
        if isinstance(value, Difference):
            changed[name] = replace(value, value=summary.mean, low=summary.low, high=summary.high)
        elif value is not None:
            changed[name] = summary.mean
    return changed


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Builds a value of type `kind` from JSON, checking types on the way."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # of a type and None
        return None if value is None else _decode(arguments[0], value, where)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _decode(arguments[1], item, f"{where}.{k}") for k, item in value.items()}
    if is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        given: dict[str, Any] = {}
        # Keys that this version does not know are left alone: a later one may have added them.
        for item in fields(kind):
            key = f"{where}.{item.name}"
            if item.name in value:
                given[item.name] = _decode(hints[item.name], value[item.name], key)
            # Keys with a default may be missing: an earlier version did not know them yet.
            elif item.default is MISSING and item.default_factory is MISSING:
                raise DataError(f"{where}: the key {item.name!r} is missing.")
        return kind(**given)  # type: ignore[operator]
    if kind is float and type(value) in (int, float):
        return float(value)
    if type(value) is kind:
        return value
    raise DataError(f"{where}: unexpected value {str(value)[:60]!r}.")
