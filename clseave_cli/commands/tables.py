"""Results as tables, with as many columns as the terminal has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from clseave_cli.commands import terminal
from clseave_cli.core.data.languages import language_name
from clseave_cli.core.evaluation.summary import (
    DASH,
    difference_span,
    mean_and_spread,
    mean_of_others,
    not_above,
    one_answer,
    p_value,
    percent,
    points,
)

if TYPE_CHECKING:
    from clseave_cli.core.evaluation.comparison import Comparison
    from clseave_cli.core.evaluation.figures import DataCurves
    from clseave_cli.core.evaluation.results import LanguageResult, Results, Retrieval


@dataclass(frozen=True)
class _Column:
    """A column; `cell` formats a row. If space is short, the highest ranks are dropped first.

    Columns of rank 0 are never dropped.
    """

    head: str
    cell: Callable[[Any], str]
    rank: int = 0
    style: str | None = None


def _table(
    title: str,
    caption: Sequence[str],
    columns: Sequence[_Column],
    rows: Iterable[Any],
    width: int | None = None,
) -> Table:
    console, rows, shown = terminal.stdout(), list(rows), list(columns)
    width = console.width if width is None else width
    while True:
        table = Table(title=title, title_justify="left", caption_justify="left")
        table.box, table.collapse_padding, table.pad_edge = box.SIMPLE_HEAD, True, False
        for number, column in enumerate(shown):
            justify: Any = "right" if number else "left"
            table.add_column(column.head, justify=justify, style=column.style, no_wrap=True)
        for row in rows:
            table.add_row(*(column.cell(row) for column in shown))
        options = console.options.update(max_width=1000)
        last = max(shown, key=lambda column: column.rank)
        if Measurement.get(console, options, table).maximum <= width or not last.rank:
            break
        shown.remove(last)
    table.caption = escape("\n".join(caption))
    if dropped := [" ".join(c.head.split()) for c in columns if c not in shown]:
        table.caption += f"\nNot shown (terminal too narrow): {', '.join(dropped)}."
    return table


def _name(result: LanguageResult, results: Results) -> str:
    """The language, and the one it was translated into, if any."""
    return result.lang + (f" → {results.source_lang}" if result.mode == "translate-test" else "")


def _range(low: float | None, high: float | None) -> str:
    return DASH if low is None else f"{percent(low)}–{percent(high)}"


def results_table(results: Results, width: int | None = None, *, verbose: bool = False) -> Table:
    """Accuracy by language, with intervals and baselines.

    `width` is the terminal's (None: stdout's); `verbose` shows fingerprints.
    """
    source = results.source_lang
    baselines = {r.key: results.baselines.get(r.key) for r in results.results}

    def baseline(name: str) -> Callable[[LanguageResult], str]:
        return lambda r: percent(getattr(baselines[r.key], name, None))

    # With these line breaks in heads, the table fits 80 columns.
    columns = [
        _Column("\nlang", lambda r: _name(r, results)),
        _Column("\naccuracy", lambda r: percent(r.accuracy), style="bold"),
        _Column("95 %\ninterval", lambda r: _range(r.accuracy_low, r.accuracy_high), 1),
        _Column(f"ratio\nto {source}", lambda r: percent(r.ratio_to_english), 8),
        _Column(f"agrees\nwith {source}", lambda r: percent(r.agreement_with_english), 3),
        _Column("\nmajority", baseline("majority"), 7),
        _Column("hypothesis\nonly", baseline("hypothesis_only"), 2),
        _Column("shuffled\nimage", baseline("shuffled_image"), 4),
    ]
    caption = [*not_above(results), *one_answer(results)]
    if mean := mean_of_others(results):
        caption.append(f"{mean[0].upper()}{mean[1:]}.")
    optional = [
        _Column("\nunsure", lambda r: percent(r.unsure and r.unsure.share), 5),
        _Column(
            "right\nif sure",
            lambda r: percent(getattr(r.unsure and r.unsure.accuracy, "value", None)),
            5,
        ),
        _Column("photos\nseen", lambda r: percent(r.seen and r.seen.share), 6),
        _Column("unseen\nphotos", lambda r: percent(r.seen and r.seen.accuracy_unseen), 6),
    ]
    columns += [c for c in optional if {c.cell(r) for r in results.results} - {DASH}]
    if any(result.mode == "translate-test" for result in results.results):
        caption.append(f"“→ {source}”: translated into {language_name(source)} first.")
    caption.append(
        f"95 % intervals by bootstrap over photos, {results.signature.num_examples:,} rows."
    )
    if verbose:
        caption.append(str(results.signature))
    title = "Visual entailment by language, in %"
    title += " (the first training)" if results.seeds else ""
    return _table(title, caption, columns, results.results, width)


def sources_table(results: Results) -> Table:
    """Accuracy by source language and language of the hypotheses (thesis 6.2)."""

    def accuracy(target: str) -> Callable[[str], str]:
        return lambda source: percent(results.sources[source].get(target))

    targets = dict.fromkeys(lang for of_source in results.sources.values() for lang in of_source)
    columns = [_Column("source", str), *(_Column(lang, accuracy(lang)) for lang in targets)]
    caption = "`clseave compare` shows the paired differences of two reports."
    return _table("Accuracy by source language, in %", [caption], columns, results.sources)


def seeds_table(results: Results, width: int | None = None) -> Table:
    """Mean and spread over several trainings, with intervals of the mean."""

    def summary(r: LanguageResult, name: str = "accuracy") -> Any:
        return results.seeds[r.key].get(name)

    ratio = f"ratio to {results.source_lang}"
    columns = [
        _Column("lang", lambda r: _name(r, results)),
        _Column("seeds", lambda r: str(summary(r).num_seeds), 2),
        _Column("accuracy", lambda r: mean_and_spread(summary(r))),
        _Column("95 % interval", lambda r: _range(summary(r).low, summary(r).high), 1),
        _Column("min – max", lambda r: _range(summary(r).min, summary(r).max), 4),
        _Column(ratio, lambda r: mean_and_spread(summary(r, "ratio_to_english")), 3),
        _Column("macro-F1", lambda r: mean_and_spread(summary(r, "macro_f1")), 5),
    ]
    caption = (
        "± sample standard deviation over trainings; 95 % interval of the mean accuracy by "
        "bootstrap over photos, with the trainings fixed."
    )
    rows = [r for r in results.results if "accuracy" in results.seeds.get(r.key, {})]
    return _table("Over several seeds, in %", [caption], columns, rows, width)


def data_curves_table(curves: DataCurves) -> Table:
    """The metric of students by number of training sentences."""

    def metric(line: Sequence[tuple[Any, ...]]) -> Callable[[int], str]:
        values = {number: value for number, value, *_ in line}
        return lambda number: f"{values[number]:.1f}" if number in values else DASH

    columns = [_Column("sentences", lambda number: f"{number:,}")]
    columns += [_Column(name, metric(line)) for name, line in curves.lines().items()]
    teacher = "" if curves.english is None else f"; the teacher: {percent(curves.english)}"
    numbers = sorted({point.num_sentences for point in curves.points})
    caption = [f"{curves.metric}{teacher}"]
    return _table("Students by number of sentences", caption, columns, numbers)


def comparison_table(comparison: Comparison, *, verbose: bool = False) -> Table:
    """Two evaluations side by side, with paired differences and verdicts."""
    caption = [
        "A minus B on the same rows, in points; 95 % intervals by paired bootstrap over "
        f"photos ({comparison.resamples:,} resamples, seed {comparison.seed})."
    ]
    signatures = {"A": comparison.signature_first, "B": comparison.signature_second}
    if verbose:
        caption += [f"{name}: {s}" for name, s in signatures.items() if s is not None]
    verdicts = {"tie": "tie", "first": "A better", "second": "B better"}
    columns = [
        _Column("lang", lambda entry: entry.lang),
        _Column("n", lambda entry: f"{entry.num_examples:,}", 3),
        _Column("A, %", lambda entry: percent(entry.accuracy_first), 2),
        _Column("B, %", lambda entry: percent(entry.accuracy_second), 2),
        _Column("A − B", lambda entry: points(entry.difference.value)),
        _Column("95 % interval", lambda entry: difference_span(entry.difference), 1),
        _Column("p", lambda entry: p_value(entry.difference.p), 4),
        _Column("McNemar p", lambda entry: p_value(entry.difference.mcnemar_p), 5),
        _Column("verdict", lambda entry: verdicts[entry.verdict], style="bold"),
    ]
    title = escape(f"A: {comparison.first}\nB: {comparison.second}")
    return _table(title, caption, columns, comparison.languages)


def retrieval_table(
    document: Retrieval, target: Literal["images", "captions"], *, verbose: bool = False
) -> Table:
    """Recall and ranks by language, of images given captions or captions given images."""
    trained = {True: "yes", False: "no", None: DASH}

    def recall(k: int) -> Callable[[Any], str]:
        return lambda r: percent(r[1].recall_at[k].value)

    columns = [
        _Column("lang", lambda r: r[0].lang),
        _Column("trained", lambda r: trained[r[0].trained], 1),
        _Column("R@1", recall(1), style="bold"),
        _Column("95 % interval", lambda r: _range(r[2].low, r[2].high), 3),
        _Column("R@5", recall(5)),
        _Column("R@10", recall(10)),
        _Column("median rank", lambda r: f"{r[1].median_rank:.4g}"),
        _Column("quartiles", lambda r: f"{r[1].lower_quartile:.4g}–{r[1].upper_quartile:.4g}", 2),
        _Column("chance", lambda r: percent(r[1].chance), 4),
        _Column("read by", lambda r: r[0].reader, 5),
    ]
    first = document.results[0]
    sizes = f"{first.num_images:,} images and {first.num_captions:,} captions ({first.lang})"
    caption = [f"R@k in %; 95 % intervals by bootstrap over images; {sizes}."]
    if verbose:
        caption.append(str(document.signature))
    title = {"images": "Images, given a caption", "captions": "Captions, given an image"}[target]
    rows = [(r, scores := getattr(r, target), scores.recall_at[1]) for r in document.results]
    return _table(title, caption, columns, rows)
