"""The results document of an evaluation: `results.json`, and the same in memory.

`docs/results.md` describes every key. Accuracies and their differences are fractions.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from clseave_cli.core.evaluation.distances import DistanceAnalysis
from clseave_cli.core.evaluation.metrics.bootstrap import Difference, Interval
from clseave_cli.core.evaluation.metrics.classification import ClassScores, ReliabilityPoint, Scores
from clseave_cli.core.evaluation.metrics.seeds import SeedSummary, summarise_seeds
from clseave_cli.core.evaluation.metrics.transfer import Transfer
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

Mode = Literal["zero-shot", "translate-test"]


def result_key(lang: str, mode: Mode) -> str:
    """What names one result among the others: `de`, or `de.translate-test`."""
    return lang if mode == "zero-shot" else f"{lang}.{mode}"


@dataclass(frozen=True, kw_only=True)
class LanguageResult:
    """One language's figures.

    Attributes:
        lang: language code.
        split: name of the split.
        mode: `zero-shot` (a student reads the language; the source language: the source model) or
            `translate-test` (the hypotheses are translated into the source language first).
        num_examples: rows.
        num_images: photos that the rows share.
        accuracy: fraction right, with the ends of its 95 % interval (None: one photo only).
        loss: mean cross-entropy in nats, with its 95 % interval.
        macro_f1: unweighted mean of the labels' F1, with its 95 % interval.
        per_class: precision, recall, F1 and support by label name.
        confusion: counts; row: gold label, column: predicted, in the order of `LABELS`.
        ece: expected calibration error, 15 bins.
        reliability: the non-empty bins behind `ece`.
        hard_accuracy: accuracy on the rows that the hypothesis-only baseline gets wrong, with its
            95 % interval.
        num_hard: how many those are.
        ratio_to_english: accuracy divided by the source language's on the same rows; English
            unless `Signature.source_lang` says otherwise.
        agreement_with_english: share of rows given the same label as by the source model.
        difference_to_english: paired difference in accuracy, this language minus the source.
        difference_to_zero_shot: the same, translate-test minus this language's student.
        transfer: student against teacher embeddings.
    """

    lang: str
    split: str
    mode: Mode
    num_examples: int
    num_images: int
    accuracy: float
    accuracy_low: float | None
    accuracy_high: float | None
    loss: float
    macro_f1: float
    macro_f1_low: float | None
    macro_f1_high: float | None
    per_class: dict[str, ClassScores]
    confusion: tuple[tuple[int, ...], ...]
    ece: float
    reliability: tuple[ReliabilityPoint, ...]
    loss_low: float | None = None
    loss_high: float | None = None
    hard_accuracy: float | None = None
    hard_accuracy_low: float | None = None
    hard_accuracy_high: float | None = None
    num_hard: int | None = None
    ratio_to_english: float | None = None
    agreement_with_english: float | None = None
    difference_to_english: Difference | None = None
    difference_to_zero_shot: Difference | None = None
    transfer: Transfer | None = None

    @property
    def key(self) -> str:
        """What names the result in `baselines`, `seeds` and the files of predictions."""
        return result_key(self.lang, self.mode)

    @classmethod
    def from_scores(
        cls, scores: Scores, *, lang: str, split: str, mode: Mode = "zero-shot", **more: Any
    ) -> LanguageResult:
        """A result from `metrics.classification.score`; `more`: the optional fields above."""
        return cls(
            lang=lang,
            split=split,
            mode=mode,
            num_examples=scores.num_examples,
            num_images=scores.num_images,
            accuracy=scores.accuracy.value,
            accuracy_low=scores.accuracy.low,
            accuracy_high=scores.accuracy.high,
            loss=scores.loss.value,
            loss_low=scores.loss.low,
            loss_high=scores.loss.high,
            macro_f1=scores.macro_f1.value,
            macro_f1_low=scores.macro_f1.low,
            macro_f1_high=scores.macro_f1.high,
            per_class=scores.per_class,
            confusion=scores.confusion,
            ece=scores.ece,
            reliability=scores.reliability,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """What one language's rows give away without looking, as accuracies (None: not measured).

    Attributes:
        majority: always the training rows' most frequent label.
        hypothesis_only: a classifier that reads only the hypothesis, trained on the same rows.
        shuffled_image: the model itself, every row with another row's photo.
    """

    majority: float | None = None
    hypothesis_only: float | None = None
    shuffled_image: float | None = None


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What it takes to say whether two results can be compared.

    Attributes:
        version: clseave's version.
        data: fingerprint (hex) by data file.
        checkpoints: fingerprint (hex) by model folder: `align-de`; of several trainings
            `runs-1/align-de`.
        seed: seed of the bootstrap and of the shuffling.
        resamples: bootstrap resamples.
        num_examples: rows of the largest result.
        translators: by language, what translated its hypotheses into the source language.
        source_lang: the language CLIP-VE reads, with which the others are compared.
        training: fingerprint (hex) by file of the rows that the baselines learnt from. With `data`
            it fills a page, so figures do without it.
        precision: what the matrix products ran in: `fp32`, `bf16` or `fp16`; None: an older
            document.
        device: `cpu` or `cuda`; None: an older document.
    """

    version: str
    data: dict[str, str]
    checkpoints: dict[str, str]
    seed: int
    resamples: int
    num_examples: int
    translators: dict[str, str] = field(default_factory=dict)
    source_lang: str = "en"
    training: dict[str, str] = field(default_factory=dict)
    precision: str | None = None
    device: str | None = None

    def __str__(self) -> str:
        """One line for the foot of a figure: fingerprints shortened to 8 digits, many made one."""
        parts = [f"clseave {self.version}", f"n {self.num_examples:,}"]
        parts += _digests(self.data, "files")
        parts += self._models()
        if self.precision is not None:
            parts.append(f"{self.precision} on {self.device}")
        if self.source_lang != "en":
            parts.append(f"source {self.source_lang}")
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
        digests = {f"training {name}": json_digest(own) for name, own in trainings.items()}
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
    """The whole document.

    Attributes:
        results: one entry a language (and mode), in the order to show.
        baselines: by `LanguageResult.key`.
        signature: where the figures come from.
        distances: transfer loss against linguistic distance, where measured.
        seeds: figures over several trainings, by `LanguageResult.key` and figure (`SEED_FIGURES`),
            where there are several; all other figures are those of the first.
        format: version of the document's shape.
    """

    results: tuple[LanguageResult, ...]
    baselines: dict[str, Baselines]
    signature: Signature
    distances: DistanceAnalysis | None = None
    seeds: dict[str, dict[str, SeedSummary]] = field(default_factory=dict)
    format: int = FORMAT

    def shows_mode(self, result: LanguageResult) -> bool:
        """Whether a table must say how a result came about: where some languages are translated."""
        translated = any(r.mode != "zero-shot" for r in self.results)
        return result.lang != self.source_lang and translated

    @property
    def source_lang(self) -> str:
        """The language that the others are compared with."""
        return self.signature.source_lang

    @property
    def of_training_rows(self) -> bool:
        """Whether the rows evaluated are, in some language, those of the training split."""
        return not set(self.signature.data.values()).isdisjoint(self.signature.training.values())

    def to_json(self) -> dict[str, Any]:
        """The document as plain dicts, lists, strings, numbers and None."""
        document: dict[str, Any] = _encode(asdict(self))
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


#: The figures that `across_seeds` summarises: keys of a result, and one of its baselines.
SEED_FIGURES = (
    "accuracy",
    "macro_f1",
    "loss",
    "ratio_to_english",
    "agreement_with_english",
    "difference_to_english",
    "difference_to_zero_shot",
    "shuffled_image",
)


def across_seeds(
    runs: Sequence[Results], intervals: Mapping[str, Mapping[str, Interval]] | None = None
) -> dict[str, dict[str, SeedSummary]]:
    """Summarises the same evaluation of several training seeds.

    Args:
        runs: one document a seed.
        intervals: of the means, by `LanguageResult.key` and figure, where known.

    Returns:
        By `LanguageResult.key` and name of the figure (`SEED_FIGURES`); results and figures that
        some run lacks are left out.
    """
    summary: dict[str, dict[str, SeedSummary]] = {}
    by_key = [{result.key: _seed_figures(result, run) for result in run.results} for run in runs]
    for key in by_key[0] if by_key else ():
        if not all(key in results for results in by_key):
            continue
        figures = {}
        for name in SEED_FIGURES:
            values = [results[key][name] for results in by_key if name in results[key]]
            if len(values) == len(runs):
                figures[name] = summarise_seeds(values)
        for name, known in (intervals or {}).get(key, {}).items():
            figures[name] = replace(figures[name], low=known.low, high=known.high)
        summary[key] = figures
    return summary


def _seed_figures(result: LanguageResult, run: Results) -> dict[str, float]:
    """Those of `SEED_FIGURES` that were measured."""
    baselines = run.baselines.get(result.key)
    found = {name: getattr(result, name, None) for name in SEED_FIGURES}
    found["shuffled_image"] = baselines.shuffled_image if baselines else None
    return {
        name: value.value if isinstance(value, Difference) else value
        for name, value in found.items()
        if value is not None
    }


def _encode(value: Any) -> Any:
    """Tuples become lists, so that a document equals what reading it back gives."""
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return value


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Builds a value of type `kind` from JSON, checking types on the way."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _decode(inner, value, where)
    if origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(
                _decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)
            )
    elif origin is dict:
        if isinstance(value, dict):
            return {
                key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()
            }
    elif is_dataclass(kind):
        if isinstance(value, dict):
            return _decode_dataclass(kind, value, where)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise DataError(f"{where}: unexpected value {str(value)[:60]!r}.")


def _decode_dataclass(kind: Any, value: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    # Keys with a default may be missing: an earlier version did not know them yet.
    missing = [
        item.name
        for item in fields(kind)
        if item.name not in value and item.default is MISSING and item.default_factory is MISSING
    ]
    if missing:
        raise DataError(f"{where}: the key {missing[0]!r} is missing.")
    # Keys that this version does not know are left alone: a later one may have added them.
    return kind(
        **{
            item.name: _decode(hints[item.name], value[item.name], f"{where}.{item.name}")
            for item in fields(kind)
            if item.name in value
        }
    )
