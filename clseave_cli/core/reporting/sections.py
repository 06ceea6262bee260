"""What a report says, section by section, before it becomes Markdown or HTML.

Every figure is formatted here, once, so that the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from clseave_cli.core.metrics.bootstrap import Difference
from clseave_cli.core.metrics.seeds import SeedSummary
from clseave_cli.core.reporting.curves import LearningCurve
from clseave_cli.core.reporting.names import language_name
from clseave_cli.core.reporting.numbers import (
    DASH,
    decimal,
    mean_and_spread,
    p_value,
    percent,
    points,
)
from clseave_cli.core.results import LanguageResult, Results
from clseave_cli.labels import LABELS


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column names the row, the others are figures."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class FigureReference:
    """A figure by its name in `figures.draw_figures`, and what it shows."""

    name: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading with its text, tables and figures."""

    title: str
    text: str
    tables: tuple[Table, ...] = ()
    figures: tuple[FigureReference, ...] = ()


@dataclass(frozen=True)
class Highlight:
    """One number to see first."""

    label: str
    value: str
    note: str


def verdict(difference: Difference | None) -> str:
    """`tie`, `higher` or `lower`: what the interval of a difference allows to say."""
    if difference is None:
        return DASH
    if difference.is_tie:
        return "tie"
    return "higher" if difference.value > 0 else "lower"


def _interval(low: float | None, high: float | None) -> str:
    return DASH if low is None else f"{percent(low)} – {percent(high)}"


def _decimal_interval(low: float | None, high: float | None) -> str:
    return DASH if low is None else f"{decimal(low)} – {decimal(high)}"


def _difference_interval(difference: Difference | None) -> str:
    if difference is None or difference.low is None:
        return DASH
    return f"{points(difference.low)} to {points(difference.high)}"


def _label(result: LanguageResult, results: Results) -> str:
    name = language_name(result.lang)
    return f"{name} ({result.mode})" if results.shows_mode(result) else name


def _joined(items: Iterable[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def _source_and_others(results: Results) -> tuple[LanguageResult | None, list[LanguageResult]]:
    source = next((r for r in results.results if r.lang == results.source_lang), None)
    return source, [r for r in results.results if r.lang != results.source_lang]


def headline(results: Results) -> str:
    """The outcome in one or two sentences."""
    source, others = _source_and_others(results)
    if not results.results:
        return "Nothing was evaluated."
    if source is None:
        best = max(others, key=lambda r: r.accuracy)
        return f"{_label(best, results)} is highest, with {percent(best.accuracy)} % right."
    name = language_name(source.lang)
    text = f"{name} reaches {percent(source.accuracy)} %."
    tied = [r for r in others if r.difference_to_english and r.difference_to_english.is_tie]
    if tied:
        verb = "is" if len(tied) == 1 else "are"
        text += f" {_joined(_label(r, results) for r in tied)} {verb} level with it, within the"
        text += " uncertainty."
    if others:
        lowest = min(others, key=lambda r: r.accuracy)
        text += f" {_label(lowest, results)} is lowest, with {percent(lowest.accuracy)} %"
        if lowest.ratio_to_english is not None:
            text += f", {percent(lowest.ratio_to_english)} % of the {name} accuracy"
        text += "."
    return text


def highlights(results: Results) -> tuple[Highlight, ...]:
    """The numbers to see first: as many of four as were measured."""
    found = []
    name = language_name(results.source_lang)
    source, others = _source_and_others(results)
    if source is not None:
        found.append(
            Highlight(
                name,
                f"{percent(source.accuracy)} %",
                f"95 % interval {_interval(source.accuracy_low, source.accuracy_high)}",
            )
        )
    if others:
        low, high = (percent(f(r.accuracy for r in others)) for f in (min, max))
        names = ", ".join(dict.fromkeys(r.lang for r in others))
        value = f"{low} – {high} %" if low != high else f"{low} %"
        found.append(Highlight("Other languages", value, names))
    compared = [r.difference_to_english for r in others if r.difference_to_english is not None]
    if compared:
        tied = sum(difference.is_tie for difference in compared)
        found.append(
            Highlight(f"Level with {name}", f"{tied} of {len(compared)}", "zero in the interval")
        )
    without = [
        (value, name)
        for baselines in results.baselines.values()
        for name, value in (
            ("majority label", baselines.majority),
            ("hypothesis only", baselines.hypothesis_only),
            ("shuffled image", baselines.shuffled_image),
        )
        if value is not None
    ]
    if without:
        best, name = max(without)
        found.append(Highlight("Without looking", f"{percent(best)} %", f"at most, by {name}"))
    return tuple(found)


def build_sections(
    results: Results, curves: tuple[LearningCurve, ...], figures: Iterable[str]
) -> tuple[Section, ...]:
    """The report's sections, in order; what was not measured is left out.

    Args:
        results: the document.
        curves: learning curves drawn.
        figures: names of the figures there are.
    """
    drawn = set(figures)
    sections = [_accuracy(results)]
    if any(r.difference_to_english or r.agreement_with_english for r in results.results):
        sections.append(_against_source(results))
    if any(r.difference_to_zero_shot for r in results.results):
        sections.append(_modes(results))
    sections.append(_baselines(results))
    sections += [_labels(results), _calibration(results)]
    if any(r.transfer for r in results.results):
        sections.append(_transfer(results))
    if results.distances is not None:
        sections.append(_distances(results, "distances" in drawn))
    if results.seeds:
        sections.append(_seeds(results))
    if curves:
        sections.append(_curves(curves, drawn))
    return tuple(sections)


def _accuracy(results: Results) -> Section:
    return Section(
        "Accuracy by language",
        "Share of rows whose most probable label is the gold label. Rows that share a photo are "
        "not independent, so the 95 % intervals come from resampling photos, not rows.",
        (
            Table(
                (
                    "language",
                    "n",
                    "photos",
                    "accuracy, %",
                    "95 % interval",
                    "macro-F1, %",
                    "95 % interval",
                    "loss",
                    "95 % interval",
                ),
                tuple(
                    (
                        _label(r, results),
                        f"{r.num_examples:,}",
                        f"{r.num_images:,}",
                        percent(r.accuracy),
                        _interval(r.accuracy_low, r.accuracy_high),
                        percent(r.macro_f1),
                        _interval(r.macro_f1_low, r.macro_f1_high),
                        decimal(r.loss),
                        _decimal_interval(r.loss_low, r.loss_high),
                    )
                    for r in results.results
                ),
            ),
        ),
        (
            FigureReference(
                "languages",
                "Accuracy with 95 % intervals; the lines across each bar are what is reached "
                "without looking at the photo.",
            ),
        ),
    )


def _against_source(results: Results) -> Section:
    return Section(
        f"Against {language_name(results.source_lang)}",
        "Differences are paired: both languages are scored on the same rows and the same resampled "
        "photos. Where the interval holds zero, the rows cannot tell the two apart: a tie. "
        "McNemar's p is given for comparison; it takes rows for independent, which they are not.",
        (
            Table(
                (
                    "language",
                    "ratio, %",
                    "same label, %",
                    "difference, points",
                    "95 % interval",
                    "p",
                    "McNemar p",
                    "verdict",
                ),
                tuple(
                    (
                        _label(r, results),
                        percent(r.ratio_to_english),
                        percent(r.agreement_with_english),
                        points(d.value if d else None),
                        _difference_interval(d),
                        p_value(d.p if d else None),
                        p_value(d.mcnemar_p if d else None),
                        verdict(d),
                    )
                    for r in results.results
                    if r.lang != results.source_lang
                    for d in (r.difference_to_english,)
                ),
            ),
        ),
    )


def _modes(results: Results) -> Section:
    name = language_name(results.source_lang)
    return Section(
        "Translate-test against zero-shot",
        f"Translate-test: the hypotheses are translated into {name}, and the {name} model reads "
        "the translation. Zero-shot: the student reads the language itself. Differences are paired "
        "(translate-test minus zero-shot) on the same rows and the same resampled photos.",
        (
            Table(
                ("language", "difference, points", "95 % interval", "p", "McNemar p", "verdict"),
                tuple(
                    (
                        language_name(r.lang),
                        points(d.value),
                        _difference_interval(d),
                        p_value(d.p),
                        p_value(d.mcnemar_p),
                        verdict(d),
                    )
                    for r in results.results
                    if (d := r.difference_to_zero_shot) is not None
                ),
            ),
        ),
    )


def _baselines(results: Results) -> Section:
    rows = []
    for r in results.results:
        b = results.baselines.get(r.key)
        values = (b.majority, b.hypothesis_only, b.shuffled_image) if b else (None,) * 3
        known = [value for value in values if value is not None]
        rows.append(
            (
                _label(r, results),
                percent(r.accuracy),
                *(percent(value) for value in values),
                points(r.accuracy - max(known)) if known else DASH,
                percent(r.hard_accuracy),
                _interval(r.hard_accuracy_low, r.hard_accuracy_high),
                DASH if r.num_hard is None else f"{r.num_hard:,}",
            )
        )
    return Section(
        "Did it look?",
        "What is reached without looking at the photo: always the most frequent label; a "
        "classifier that reads only the hypothesis, trained on the same rows; the model itself "
        "with every row's photo exchanged for another. Hard rows are those that the "
        "hypothesis-only classifier gets wrong.",
        (
            Table(
                (
                    "language",
                    "accuracy, %",
                    "majority, %",
                    "hypothesis only, %",
                    "shuffled image, %",
                    "gain over best, points",
                    "on hard rows, %",
                    "95 % interval",
                    "hard rows",
                ),
                tuple(rows),
            ),
        ),
    )


def _labels(results: Results) -> Section:
    return Section(
        "By label",
        "Precision (P), recall (R) and F1 of each label, in %, and where the predictions go.",
        (
            Table(
                (
                    "language",
                    *(f"{name} {figure}" for name in LABELS for figure in ("P", "R", "F1")),
                ),
                tuple(
                    (
                        _label(r, results),
                        *(
                            percent(value)
                            for name in LABELS
                            for scores in (r.per_class[name],)
                            for value in (scores.precision, scores.recall, scores.f1)
                        ),
                    )
                    for r in results.results
                ),
            ),
        ),
        (
            FigureReference(
                "confusion",
                "Confusion: share of each gold label's rows (a row of the matrix), and counts. "
                "E entailment, N neutral, C contradiction.",
            ),
        ),
    )


def _calibration(results: Results) -> Section:
    return Section(
        "Calibration",
        "Is the model right as often as it is sure? ECE is the mean distance between confidence "
        "and accuracy over 15 bins of confidence.",
        (
            Table(
                ("language", "ECE, %", "loss"),
                tuple(
                    (_label(r, results), percent(r.ece), decimal(r.loss)) for r in results.results
                ),
            ),
        ),
        (
            FigureReference(
                "reliability",
                "Reliability: accuracy against confidence. Below the diagonal the model is surer "
                "than it is right; a dot's size is its share of the rows.",
            ),
        ),
    )


def _transfer(results: Results) -> Section:
    return Section(
        "Transfer",
        "How close the student's sentence embeddings come to the teacher's. MSE and MAE are per "
        "dimension; “summed” is over all dimensions, the thesis's form. Retrieval: share of "
        "sentences whose nearest embedding on the other side is their own translation. A variance "
        "far below the teacher's means collapse.",
        (
            Table(
                (
                    "language",
                    "MSE",
                    "MAE",
                    "MSE, summed",
                    "MAE, summed",
                    "cosine",
                    "finds teacher, %",
                    "finds student, %",
                    "variance",
                    "teacher's",
                ),
                tuple(
                    (
                        _label(r, results),
                        f"{t.mse:.4g}",
                        f"{t.mae:.4g}",
                        f"{t.mse_sum:.4g}",
                        f"{t.mae_sum:.4g}",
                        decimal(t.cosine),
                        percent(t.retrieval_to_teacher),
                        percent(t.retrieval_to_student),
                        f"{t.variance_student:.3g}",
                        f"{t.variance_teacher:.3g}",
                    )
                    for r in results.results
                    if (t := r.transfer) is not None
                ),
            ),
        ),
    )


def _distances(results: Results, drawn: bool) -> Section:
    analysis = results.distances
    assert analysis is not None
    languages = tuple(analysis.losses)
    name = language_name(results.source_lang)
    return Section(
        "Linguistic distance",
        f"Points lost to {name} against the distance to {name}. Source: {analysis.source}. "
        f"{analysis.note}",
        (
            Table(
                ("distance", *languages, "rank correlation", "p", "linear correlation", "p", "n"),
                tuple(
                    (
                        kind,
                        *(decimal(found.distances.get(lang), 2) for lang in languages),
                        decimal(found.spearman, 2),
                        p_value(found.spearman_p),
                        decimal(found.pearson, 2),
                        p_value(found.pearson_p),
                        str(found.num_languages),
                    )
                    for kind, found in analysis.correlations.items()
                ),
            ),
        ),
        (
            FigureReference(
                "distances",
                f"Points lost to {name} by distance, one dot a language. ρ rank correlation, "
                "r linear correlation.",
            ),
        )
        if drawn
        else (),
    )


def _seeds(results: Results) -> Section:
    labels = {result.key: _label(result, results) for result in results.results}

    def extremes(summary: SeedSummary | None) -> str:
        return _interval(summary.min, summary.max) if summary else DASH

    def interval(summary: SeedSummary | None) -> str:
        return _interval(summary.low, summary.high) if summary else DASH

    def loss(summary: SeedSummary | None) -> str:
        return f"{decimal(summary.mean)} ± {decimal(summary.std)}" if summary else DASH

    return Section(
        "Over seeds",
        "The same training with several seeds: mean ± sample standard deviation, the spread "
        "between trainings. The interval is that of the mean accuracy over the choice of photos, "
        "the trainings as they are. All other sections show the first seed.",
        (
            Table(
                (
                    "language",
                    "seeds",
                    "accuracy, %",
                    "95 % interval",
                    "min – max",
                    "macro-F1, %",
                    "ratio, %",
                    "same label, %",
                    "loss",
                ),
                tuple(
                    (
                        labels[key],
                        str(next(iter(figures.values())).num_seeds),
                        mean_and_spread(figures.get("accuracy")),
                        interval(figures.get("accuracy")),
                        extremes(figures.get("accuracy")),
                        mean_and_spread(figures.get("macro_f1")),
                        mean_and_spread(figures.get("ratio_to_english")),
                        mean_and_spread(figures.get("agreement_with_english")),
                        loss(figures.get("loss")),
                    )
                    for key, figures in results.seeds.items()
                    if figures
                ),
            ),
        ),
    )


def _curves(curves: tuple[LearningCurve, ...], drawn: set[str]) -> Section:
    captions = {
        "pretrain": "Contrastive pre-training from captions.",
        "finetune-ve": "Fine-tuning on visual entailment: losses (left) and dev accuracy (right). "
        "The dotted line marks the epoch that was kept.",
        "align": "Alignment of the students: dev error by epoch, on a logarithmic scale. A hollow "
        "dot marks the epoch that was kept.",
    }
    return Section(
        "Learning curves",
        "What training recorded after every epoch.",
        figures=tuple(
            FigureReference(f"curves-{stage}", captions.get(stage, stage))
            for stage in dict.fromkeys(curve.stage for curve in curves)
            if f"curves-{stage}" in drawn
        ),
    )
