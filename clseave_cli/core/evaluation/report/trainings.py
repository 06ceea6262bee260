"""What several trainings reach together, in the place of what the first one reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from clseave_cli.core.evaluation.metrics.bootstrap import Difference
from clseave_cli.core.evaluation.metrics.seeds import SeedSummary
from clseave_cli.core.evaluation.results import Baselines, LanguageResult, Results


def num_trainings(results: Results) -> int:
    """How many trainings the document is of."""
    figures = (summary for by_name in results.seeds.values() for summary in by_name.values())
    return max((summary.num_seeds for summary in figures), default=1)


def spread(results: Results, result: LanguageResult) -> SeedSummary | None:
    """Mean and deviation of a result's accuracy over the trainings, where it has several."""
    return results.seeds.get(result.key, {}).get("accuracy")


def means(results: Results) -> Results:
    """The document with means over trainings for the figures that `Results.seeds` knows.

    Those are its accuracies, paired differences (value and interval; p and counts stay the
    first's), macro-F1 and loss, ratios, agreements and shuffled images. All else, and every
    language that not all trainings have, is of the first. A document of one training is itself.
    """
    return replace(
        results,
        results=tuple(_mean_result(r, results.seeds.get(r.key, {})) for r in results.results),
        baselines={
            key: _mean_baselines(own, results.seeds.get(key, {}))
            for key, own in results.baselines.items()
        },
    )


def _mean_result(result: LanguageResult, figures: Mapping[str, SeedSummary]) -> LanguageResult:
    names = ("macro_f1", "loss", "ratio_to_english", "agreement_with_english")
    changed: dict[str, Any] = {name: figures[name].mean for name in names if name in figures}
    if (own := figures.get("accuracy")) is not None:
        changed |= {"accuracy": own.mean, "accuracy_low": own.low, "accuracy_high": own.high}
    for name in ("difference_to_english", "difference_to_zero_shot"):
        changed[name] = _mean_difference(getattr(result, name), figures.get(name))
    return replace(result, **changed)


def _mean_difference(first: Difference | None, mean: SeedSummary | None) -> Difference | None:
    if first is None or mean is None:
        return first
    return replace(first, value=mean.mean, low=mean.low, high=mean.high)


def _mean_baselines(first: Baselines, figures: Mapping[str, SeedSummary]) -> Baselines:
    shuffled = figures.get("shuffled_image")
    return first if shuffled is None else replace(first, shuffled_image=shuffled.mean)
