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


@dataclass(frozen=True)
class Overlap:
    """Rows whose photo a model saw in training, or when its checkpoint was chosen."""

    num_images: int  # seen photos
    num_examples: int  # their rows
    num_pairs: int  # rows whose hypothesis was seen with the photo
    share: float  # seen rows as a share of all rows
    accuracy: float  # on seen rows
    accuracy_pairs: float | None  # on seen pairs
    accuracy_unseen: float | None  # on all other rows


@dataclass(frozen=True)
class Abstention:
    """The effect of the thresholds of `clseave calibrate` on these rows."""

    precision: float  # the promised share of right answers
    labels: tuple[str, ...]  # labels with a threshold; other answers are always given
    share: float  # share of all rows answered `unsure`
    num_answered: int  # rows answered with one of `labels`
    accuracy: Interval | None  # share of these that are right; None: there are none


Mode = Literal["zero-shot", "translate-test"]


def result_key(lang: str, mode: Mode) -> str:
    """The key of a result: `de`, or `de.translate-test`."""
    return lang if mode == "zero-shot" else f"{lang}.{mode}"


@dataclass(frozen=True, kw_only=True)
class LanguageResult(Scores):
    """One language's scores, compared with other systems on the same rows."""

    lang: str  # language code
    split: str  # name of the split
    # `zero-shot`: `Signature.reader` reads the language itself; `translate-test`: the hypotheses
    # are translated into the source language first.
    mode: Mode = "zero-shot"
    # Accuracy, with its 95 % interval, on the rows that the hypothesis-only baseline gets wrong.
    hard_accuracy: float | None = None
    hard_accuracy_low: float | None = None
    hard_accuracy_high: float | None = None
    num_hard: int | None = None  # the number of those rows
    # “English” stands for `Signature.source_lang`, on the rows that both languages have.
    ratio_to_english: float | None = None  # of the accuracies
    agreement_with_english: float | None = None  # share of rows given the same label
    kappa_with_english: float | None = None  # agreement beyond chance, Cohen's κ
    # Paired difference in accuracy: this language minus the source.
    difference_to_english: Difference | None = None
    # The same: translate-test minus this language's student.
    difference_to_zero_shot: Difference | None = None
    transfer: Transfer | None = None  # embeddings against those of the source sentences
    seen: Overlap | None = None  # rows of photos seen in training, if any
    # The temperature, and `ece` and `loss` without it; None: not calibrated.
    temperature: float | None = None
    ece_uncalibrated: float | None = None
    loss_uncalibrated: float | None = None
    unsure: Abstention | None = None  # if thresholds were set

    @property
    def key(self) -> str:
        """The key in `baselines`, `seeds` and the names of prediction files."""
        return result_key(self.lang, self.mode)


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Accuracies on one language's rows without the right photo; None: not measured.

    Each `difference_to_…` is the paired difference in accuracy: the system minus the baseline.
    """

    majority: float | None = None  # always the training rows' most frequent label
    hypothesis_only: float | None = None  # a classifier trained on the hypotheses alone
    shuffled_image: float | None = None  # the model itself, each row with another row's photo
    difference_to_majority: Difference | None = None
    difference_to_hypothesis_only: Difference | None = None
    difference_to_shuffled_image: Difference | None = None
    # The classifier's training rows by label name; empty: not measured.
    train_labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SeedSummary:
    """A metric over several training seeds."""

    num_seeds: int
    mean: float
    std: float  # sample standard deviation (n − 1) over trainings; 0 for one
    min: float
    max: float
    # The mean's 95 % interval by bootstrap over photos, for these trainings; None: not measured.
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float], interval: Interval | None = None) -> SeedSummary:
        """Summarises one value a seed, of at least one."""
        mean, std = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0
        ends = (interval.low, interval.high) if interval else ()
        return cls(len(values), float(mean), float(std), min(values), max(values), *ends)


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Everything that decides whether two results can be compared."""

    version: str  # clseave's version
    data: dict[str, str]  # fingerprint (hex) by data file
    # Fingerprint (hex) by model folder: `align-de`; of several trainings `runs-1/align-de`.
    checkpoints: dict[str, str]
    seed: int  # seed of the bootstrap and of the shuffling
    resamples: int  # bootstrap resamples
    num_examples: int  # rows of the largest result
    # By language, the translator of its hypotheses into the source language.
    translators: dict[str, str] = field(default_factory=dict)
    source_lang: str = "en"  # the language that CLIP-VE reads
    reader: str = "student"  # reads the other languages; `source`: CLIP-VE's text encoder
    # Fingerprint (hex) by file of the baselines' training rows. Figures leave it out for space.
    training: dict[str, str] = field(default_factory=dict)
    # None in these three and `date`: an older document.
    precision: str | None = None  # of matrix products: `fp32`, `bf16` or `fp16`
    device: str | None = None  # `cpu` or `cuda`
    dataset: str | None = None  # name of the data folder, or `hf:ORG/NAME`
    # By data file: photos that the models saw in training, and rows excluded for that reason.
    seen: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, int] = field(default_factory=dict)
    date: str | None = field(default=None, compare=False)  # of the evaluation, `YYYY-MM-DD` (UTC)

    def __str__(self) -> str:
        """One line for a figure's footer, with fingerprints shortened to 8 digits."""
        parts = [f"clseave {self.version}", f"n {self.num_examples:,}"]
        parts += _digests(self.data, "files") + _digests(self.checkpoints, "models")
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


def _digests(digests: dict[str, str], kind: str) -> list[str]:
    """Names with the first 8 digits of their digests; one digest of all if there are many."""
    if len(digests) > 8:  # a list of more would crowd out the figure
        return [f"{len(digests)} {kind} {json_digest(digests)[:8]}"]
    return [f"{name} {digest[:8]}" for name, digest in digests.items()]


@dataclass(frozen=True, kw_only=True)
class Results:
    """The document `results.json`."""

    results: tuple[LanguageResult, ...]  # one a language and mode, in display order
    baselines: dict[str, Baselines]  # by `LanguageResult.key`
    signature: Signature  # where the numbers come from
    distances: DistanceAnalysis | None = None  # transfer loss against linguistic distance
    # Metrics over several trainings, by `LanguageResult.key` and name (`SEED_METRICS`). All other
    # numbers are those of the first training.
    seeds: dict[str, dict[str, SeedSummary]] = field(default_factory=dict)
    # Mean accuracy by source language and language of the hypotheses, for models of several source
    # languages. All other numbers are those of the first source language.
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    format: int = FORMAT

    def shows_mode(self, result: LanguageResult) -> bool:
        """Whether a table must show the mode of a result, because some languages are translated."""
        translated = any(r.mode != "zero-shot" for r in self.results)
        return result.lang != self.source_lang and translated

    @property
    def source_lang(self) -> str:
        """The language that CLIP-VE reads."""
        return self.signature.source_lang

    @property
    def num_trainings(self) -> int:
        """Number of trainings that the document summarises."""
        summaries = (summary for by_name in self.seeds.values() for summary in by_name.values())
        return max((summary.num_seeds for summary in summaries), default=1)

    def seed_accuracy(self, result: LanguageResult) -> SeedSummary | None:
        """The accuracy of a result over the trainings; None if not all have it, or there is one."""
        return self.seeds.get(result.key, {}).get("accuracy")

    @property
    def accuracies(self) -> dict[str, float]:
        """Zero-shot accuracy by language, averaged over the trainings."""
        return {r.lang: r.accuracy for r in means(self).results if r.mode == "zero-shot"}

    @property
    def of_training_rows(self) -> bool:
        """Whether the rows of some language are those of the training split."""
        return not set(self.signature.data.values()).isdisjoint(self.signature.training.values())

    def to_json(self) -> dict[str, Any]:
        """The document as plain JSON values: lists for tuples, as if read back."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return document

    @classmethod
    def from_json(cls, document: Any) -> Results:
        """The inverse of `to_json`.

        Raises:
            DataError: not a results document of this format, or a bad value; names the key.
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
        path, command = folder / RESULTS_FILE, f"clseave evaluate --report {folder}"
        if not path.is_file():
            raise DataError(f"{path}: no such file; write one with: {command}")
        try:
            return cls.from_json(read_json(path))
        except DataError as error:
            raise DataError(f"{path}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class RankScores:
    """Recall and ranks of the nearest right answer to each query; expected values under ties."""

    recall_at: dict[int, Interval]  # by k = 1, 5, 10
    chance: float  # recall at 1 of a random order
    lower_quartile: float  # of the ranks, which count from 1
    median_rank: float
    upper_quartile: float


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Retrieval between the images and the captions of one language."""

    lang: str  # language code
    split: str  # name of the split
    reader: str  # folder or hub id of the model that reads the captions
    trained: bool | None  # whether it was trained in this language; None: unknown
    num_images: int
    num_captions: int
    num_distinct: int  # distinct captions, the candidates for an image
    images: RankScores  # images, given a caption
    captions: RankScores  # captions, given an image


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """The document of `retrieve`, `retrieval.json`."""

    results: tuple[RetrievalResult, ...]  # one a language, in display order
    signature: Signature
    format: int = 1


#: The metrics that `across_seeds` summarises: keys of a result or of its baselines.
SEED_METRICS = (
    *("accuracy", "macro_f1", "loss", "ece", "aurc", "ratio_to_english"),
    "agreement_with_english",
    *("difference_to_english", "difference_to_zero_shot", "shuffled_image"),
    *("difference_to_majority", "difference_to_hypothesis_only", "difference_to_shuffled_image"),
)


def across_seeds(
    runs: Sequence[Results], intervals: Mapping[str, Mapping[str, Interval]] | None = None
) -> dict[str, dict[str, SeedSummary]]:
    """Summarises one document a seed, by `LanguageResult.key` and metric (`SEED_METRICS`).

    `intervals` are those of the means. Results and metrics that a run lacks are left out.
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
    """The document with means over trainings in place of everything in `Results.seeds`.

    Paired differences keep the p and the counts of the first training. All else, and every language
    that not all trainings have, is of the first training.
    """
    averaged, baselines = [], dict(results.baselines)
    for result in results.results:
        summaries = results.seeds.get(result.key, {})
        changed = _means(result, summaries)
        if (accuracy := summaries.get("accuracy")) is not None:
            changed |= {"accuracy_low": accuracy.low, "accuracy_high": accuracy.high}
            changed["kappa_with_english"] = None
        averaged.append(replace(result, **changed))
        if result.key in baselines:
            of_first = baselines[result.key]
            baselines[result.key] = replace(of_first, **_means(of_first, summaries))
    return replace(results, results=tuple(averaged), baselines=baselines)


def _means(first: object, summaries: Mapping[str, SeedSummary]) -> dict[str, Any]:
    """The fields of a first training's numbers that become means."""
    changed: dict[str, Any] = {}
    for name, summary in summaries.items():
        value = getattr(first, name, None)
        if isinstance(value, Difference):
            changed[name] = replace(value, value=summary.mean, low=summary.low, high=summary.high)
        elif value is not None:
            changed[name] = summary.mean
    return changed


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Builds a value of type `kind` from JSON, or raises DataError."""
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
        values: dict[str, Any] = {}
        # Unknown keys are ignored: a later version may have added them.
        for item in fields(kind):
            key = f"{where}.{item.name}"
            if item.name in value:
                values[item.name] = _decode(hints[item.name], value[item.name], key)
            # Keys with a default may be missing from documents of an earlier version.
            elif item.default is MISSING and item.default_factory is MISSING:
                raise DataError(f"{where}: the key {item.name!r} is missing.")
        return kind(**values)  # type: ignore[operator]
    if kind is float and type(value) in (int, float):
        return float(value)
    if type(value) is kind:
        return value
    raise DataError(f"{where}: unexpected value {str(value)[:60]!r}.")
