"""What a report says, section by section, before it becomes Markdown or HTML.

Every figure is formatted here, once, so that the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clseave_cli.core.evaluation.metrics.bootstrap import Difference
from clseave_cli.core.evaluation.metrics.seeds import SeedSummary
from clseave_cli.core.evaluation.report.curves import LearningCurve
from clseave_cli.core.evaluation.report.names import language_name
from clseave_cli.core.evaluation.report.numbers import (
    DASH,
    decimal,
    mean_and_spread,
    p_value,
    percent,
    points,
)
from clseave_cli.core.evaluation.report.trainings import means, num_trainings, spread
from clseave_cli.core.evaluation.results import TRAINING_ROWS, Baselines, LanguageResult, Results
from clseave_cli.labels import LABELS


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column names the row, the others are figures.

    Attributes:
        columns: heads of the columns.
        rows: cells.
        groups: heads over several columns each, and how many; empty: none.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    groups: tuple[tuple[str, int], ...] = ()

    @property
    def full_columns(self) -> tuple[str, ...]:
        """Heads that say everything in one line: with their group's before them."""
        groups = [name for name, width in self.groups for _ in range(width)]
        if not groups:
            return self.columns
        return tuple(
            f"{group} {column}".strip() for group, column in zip(groups, self.columns, strict=True)
        )


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


# Languages that are level; of more the headline tells the number.
_MOST_NAMED = 6


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
    """The outcome in a few sentences; of several trainings, of their means."""
    if not results.results:
        return "Nothing was evaluated."
    mean = means(results)
    source, others = _source_and_others(mean)
    sentences = [_reached(results, mean, source, others)]
    if source is not None:
        compared = [(_label(r, mean), r.difference_to_english) for r in others]
        sentences += _verdicts(compared, "level with it", "")
    else:
        compared = [(language_name(r.lang), r.difference_to_zero_shot) for r in others]
        sentences += _verdicts(compared, "level", "Translate-test against zero-shot: ")
    sentences += _not_above(mean)
    return " ".join(sentences)


def _reached(
    results: Results, mean: Results, source: LanguageResult | None, others: list[LanguageResult]
) -> str:
    """The accuracy of the source language, or of all where it was not evaluated."""
    shown = [source] if source is not None else others
    if len(shown) > 3:
        low, high = (percent(f(r.accuracy for r in shown)) for f in (min, max))
        text = f"{len(shown)} results lie between {low} and {high} %"
    else:
        names = [_label(r, mean) for r in shown]
        accuracies = [f"{percent(r.accuracy)} %" for r in shown]
        text = f"{_joined(names)} {'reaches' if len(names) == 1 else 'reach'} {_joined(accuracies)}"
    if of := _mean_of(results, shown):
        text += f", the {of}"
        own = spread(results, source) if source is not None else None
        text += f" (± {percent(own.std)})" if own is not None else ""
    return f"{text}."


def _mean_of(results: Results, shown: Iterable[LanguageResult]) -> str:
    """Says of how many trainings some figures are the mean; empty where some of them are not."""
    if not results.seeds or any(spread(results, r) is None for r in shown):
        return ""
    return f"mean of {num_trainings(results)} trainings"


def _verdicts(compared: list[tuple[str, Difference | None]], level: str, before: str) -> list[str]:
    """Who is level, who is lower or higher and by how much; a sentence each."""
    known = [(name, d) for name, d in compared if d is not None]
    sentences = []
    if tied := [name for name, d in known if d.is_tie]:
        named = _joined(tied) if len(tied) <= _MOST_NAMED else f"{len(tied)} of {len(known)} others"
        sentences.append(f"{named} {_is(tied)} {level}, within the uncertainty.")
    for word in ("lower", "higher"):
        if found := [(name, d) for name, d in known if verdict(d) == word]:
            names, amounts = zip(*found, strict=True)
            by = _joined(percent(abs(d.value)) for d in amounts)
            sentences.append(f"{_joined(names)} {_is(names)} {word}, by {by} points.")
    return [before + sentences[0], *sentences[1:]] if sentences else []


def _is(several: Sequence[object]) -> str:
    return "is" if len(several) == 1 else "are"


def _not_above(mean: Results) -> list[str]:
    """A sentence where an accuracy may be no more than what needs no look at the photo.

    Its interval's lower end decides; where there is no interval, the accuracy itself.
    """
    found = [
        (r, *best)
        for r in mean.results
        if (best := _best_baseline(mean, r)) is not None
        and (r.accuracy if r.accuracy_low is None else r.accuracy_low) <= best[0]
    ]
    if not found:
        return []
    names = _joined(_label(r, mean) for r, _, _ in found)
    close = any(r.accuracy > most for r, most, _ in found)
    most, by = max((most, by) for _, most, by in found)
    return [
        f"{names} {_is(found)}{', within the uncertainty,' if close else ''} no better than what "
        f"is reached without looking at the photo: {'up to ' if len(found) > 1 else ''}"
        f"{percent(most)} % ({by})."
    ]


def _best_baseline(results: Results, result: LanguageResult) -> tuple[float, str] | None:
    """The most that is reached without looking, and by what."""
    baselines = results.baselines.get(result.key) or Baselines()
    known = [
        (value, name)
        for name, value in (
            ("majority label", baselines.majority),
            ("hypothesis only", baselines.hypothesis_only),
            ("shuffled image", baselines.shuffled_image),
        )
        if value is not None
    ]
    return max(known, default=None)


def highlights(results: Results) -> tuple[Highlight, ...]:
    """The numbers to see first: as many of four as were measured, means of several trainings."""
    found = []
    name = language_name(results.source_lang)
    mean = means(results)
    source, others = _source_and_others(mean)
    if source is not None:
        note = f"95 % interval {_interval(source.accuracy_low, source.accuracy_high)}"
        if own := spread(results, source):
            note = f"± {percent(own.std)}, {_mean_of(results, [source])}; {note}"
        found.append(Highlight(name, f"{percent(source.accuracy)} %", note))
    if others:
        low, high = (percent(f(r.accuracy for r in others)) for f in (min, max))
        names = ", ".join(dict.fromkeys(r.lang for r in others))
        value = f"{low} – {high} %" if low != high else f"{low} %"
        note = f"{names}; {of}" if (of := _mean_of(results, others)) else names
        found.append(Highlight("Other languages", value, note))
    compared = [r.difference_to_english for r in others if r.difference_to_english is not None]
    if compared:
        tied = sum(difference.is_tie for difference in compared)
        of = _mean_of(results, others)
        note = f"zero in the interval{f' of the {of}' if of else ''}"
        found.append(Highlight(f"Level with {name}", f"{tied} of {len(compared)}", note))
    without = [best for r in mean.results if (best := _best_baseline(mean, r)) is not None]
    if without:
        most, by = max(without)
        found.append(Highlight("Without looking", f"{percent(most)} %", f"at most, by {by}"))
    return tuple(found)


def notes(results: Results) -> tuple[str, ...]:
    """What a reader must know before the figures; mostly nothing."""
    found = []
    if results.of_training_rows:
        found.append(TRAINING_ROWS)
    if results.seeds:
        found.append(
            f"Of {num_trainings(results)} trainings: the figures above, the section Over seeds and "
            "table.tex show means over all of them (± sample standard deviation). All other "
            "figures, tables and pictures are those of the first training."
        )
        alone = [_label(r, results) for r in results.results if spread(results, r) is None]
        if alone:
            found.append(
                f"Not every training has {_joined(alone)}: figures of the first throughout."
            )
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
    sections = [_seeds(results)] if results.seeds else []
    sections.append(_accuracy(results))
    if any(r.agreement_with_english is not None for r in _source_and_others(results)[1]):
        sections.append(_against_source(results))
    if any(r.difference_to_zero_shot for r in results.results):
        sections.append(_modes(results))
    sections.append(_baselines(results))
    sections += [_labels(results), _calibration(results)]
    if any(r.transfer for r in results.results):
        sections.append(_transfer(results))
    if results.distances is not None:
        sections.append(_distances(results, "distances" in drawn))
    if curves:
        sections.append(_curves(curves, drawn))
    return tuple(sections)


def _absent_labels(results: Results) -> list[str]:
    """Labels that no row has as its gold label, in any language."""
    return [name for name in LABELS if not any(r.per_class[name].support for r in results.results)]


def _languages_figure(of: str) -> FigureReference:
    return FigureReference(
        "languages",
        f"Accuracy{of} with 95 % intervals; the marks on each bar are what is reached without "
        "looking at the photo.",
    )


def _accuracy(results: Results) -> Section:
    text = (
        "Share of rows whose most probable label is the gold label. Rows that share a photo are "
        "not independent, so the 95 % intervals come from resampling photos, not rows."
    )
    if absent := _absent_labels(results):
        text += f" No row has the gold label {_joined(absent)}: macro-F1 counts a 0 for it."
    return Section(
        "Accuracy by language" + (", first training" if results.seeds else ""),
        text,
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
        () if results.seeds else (_languages_figure(""),),
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
        b = results.baselines.get(r.key) or Baselines()
        best = _best_baseline(results, r)
        rows.append(
            (
                _label(r, results),
                percent(r.accuracy),
                percent(b.majority),
                percent(b.hypothesis_only),
                percent(b.shuffled_image),
                points(r.accuracy - best[0]) if best else DASH,
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
    text = "Precision (P), recall (R) and F1 of each label, in %, and where the predictions go."
    if absent := _absent_labels(results):
        text += (
            f" No row has the gold label {_joined(absent)}: there is no recall, F1 counts as 0, "
            "and its row of the matrix is empty."
        )
    return Section(
        "By label",
        text,
        (
            Table(
                ("language", *(("P", "R", "F1") * len(LABELS))),
                tuple(
                    (
                        _label(r, results),
                        *(
                            percent(value)
                            for name in LABELS
                            for scores in (r.per_class[name],)
                            for value in (
                                scores.precision,
                                scores.recall if scores.support else None,
                                scores.f1,
                            )
                        ),
                    )
                    for r in results.results
                ),
                (("", 1), *((name, 3) for name in LABELS)),
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
                (
                    "distance",
                    *languages,
                    "rank correlation",
                    "p",
                    "smallest p",
                    "linear correlation",
                    "p",
                    "n",
                ),
                tuple(
                    (
                        kind,
                        *(decimal(found.distances.get(lang), 2) for lang in languages),
                        decimal(found.spearman, 2),
                        p_value(found.spearman_p),
                        p_value(found.smallest_p),
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
        "the trainings as they are.",
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
            *_mean_differences(results),
        ),
        figures=(_languages_figure(f", the mean of {num_trainings(results)} trainings,"),),
    )


def _mean_differences(results: Results) -> tuple[Table, ...]:
    """What the paired differences are on average over trainings; nothing where there are none."""
    rows = []
    for mean in means(results).results:
        for name, other in (
            ("difference_to_english", language_name(results.source_lang)),
            ("difference_to_zero_shot", f"{language_name(mean.lang)} (zero-shot)"),
        ):
            if own := results.seeds.get(mean.key, {}).get(name):
                difference = getattr(mean, name)
                rows.append(
                    (
                        _label(mean, results),
                        other,
                        f"{points(own.mean)} ± {percent(own.std)}",
                        _difference_interval(difference),
                        verdict(difference),
                    )
                )
    columns = ("language", "against", "difference, points", "95 % interval", "verdict")
    return (Table(columns, tuple(rows)),) if rows else ()


def _curves(curves: tuple[LearningCurve, ...], drawn: set[str]) -> Section:
    captions = {
        "pretrain": "Contrastive pre-training from captions.",
        "finetune-ve": "Fine-tuning on visual entailment: losses (left) and dev accuracy (right). "
        "The dotted line marks the epoch that was kept.",
        "align": "Alignment of the students: loss, dev errors and learning rate by epoch; each "
        "axis says whether its scale is logarithmic. A ring marks the epoch that was kept.",
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
