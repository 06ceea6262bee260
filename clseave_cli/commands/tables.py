"""Results as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from clseave_cli.core.evaluation.report.names import language_name
from clseave_cli.core.evaluation.report.numbers import (
    DASH,
    mean_and_spread,
    p_value,
    percent,
    points,
)

if TYPE_CHECKING:
    from clseave_cli.core.evaluation.comparison import Comparison
    from clseave_cli.core.evaluation.report.data_curves import DataCurves
    from clseave_cli.core.evaluation.results import LanguageResult, Results


def _name(result: LanguageResult, results: Results) -> str:
    """The language, and if it was translated, into which: short, so that 80 columns will do."""
    return result.lang + (f" → {results.source_lang}" if result.mode == "translate-test" else "")


def _range(low: float | None, high: float | None) -> str:
    return DASH if low is None else f"{percent(low)}–{percent(high)}"


def _table(title: str, caption: str) -> Table:
    """An empty table in the look that all of them share."""
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )


def results_table(results: Results) -> Table:
    """The language table: accuracy, how sure that is, and what is reached without looking."""
    source = results.source_lang
    caption = f"95 % intervals by bootstrap over photos · {escape(str(results.signature))}"
    if any(result.mode == "translate-test" for result in results.results):
        name = language_name(source)
        caption = f"“→ {source}”: translated into {name} first · {caption}"
    of = " (the first training)" if results.seeds else ""
    table = _table(f"Visual entailment by language, in %{of}", caption)
    table.add_column("\nlang", no_wrap=True)
    table.add_column("\naccuracy", justify="right", style="bold", no_wrap=True)
    # Broken by hand, so that the table fits 80 columns: what a pipe or a small terminal has.
    for header in (
        "95 %\ninterval",
        f"ratio\nto {source}",
        f"agrees\nwith {source}",
        "\nmajority",
        "hypothesis\nonly",
        "shuffled\nimage",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results.results:
        baselines = results.baselines.get(result.key)
        table.add_row(
            _name(result, results),
            percent(result.accuracy),
            _range(result.accuracy_low, result.accuracy_high),
            percent(result.ratio_to_english),
            percent(result.agreement_with_english),
            percent(baselines.majority if baselines else None),
            percent(baselines.hypothesis_only if baselines else None),
            percent(baselines.shuffled_image if baselines else None),
        )
    return table


def seeds_table(results: Results) -> Table:
    """What several trainings reach: the mean, how far they lie apart, and how sure the mean is."""
    table = _table(
        "Over several seeds, in %",
        "± sample standard deviation over trainings; 95 % interval of the mean accuracy by "
        "bootstrap over photos, the trainings as they are",
    )
    table.add_column("lang", no_wrap=True)
    ratio = f"ratio to {results.source_lang}"
    for header in ("seeds", "accuracy", "95 % interval", "min – max", ratio, "macro-F1"):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results.results:
        figures = results.seeds.get(result.key, {})
        if accuracy := figures.get("accuracy"):
            table.add_row(
                _name(result, results),
                str(accuracy.num_seeds),
                mean_and_spread(accuracy),
                _range(accuracy.low, accuracy.high),
                _range(accuracy.min, accuracy.max),
                mean_and_spread(figures.get("ratio_to_english")),
                mean_and_spread(figures.get("macro_f1")),
            )
    return table


def data_curves_table(curves: DataCurves) -> Table:
    """What students reach by the number of sentences they learnt from."""
    english = "" if curves.english is None else f"; the teacher: {percent(curves.english)}"
    table = _table("Students by number of sentences", f"{curves.figure[1]}{english}")
    table.add_column("sentences", justify="right", no_wrap=True)
    for name in curves.series:
        table.add_column(name, justify="right")
    for row in curves.rows():
        table.add_row(*row)
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Two evaluations side by side: the paired difference, and whether it is one."""
    caption = (
        "A minus B on the same rows, in points; 95 % intervals by paired bootstrap over "
        f"photos ({comparison.resamples:,} resamples, seed {comparison.seed})"
    )
    signatures = {"A": comparison.signature_first, "B": comparison.signature_second}
    for name, signature in signatures.items():
        if signature is not None:
            caption += f"\n{name}: {escape(str(signature))}"
    table = _table(escape(f"A: {comparison.first}\nB: {comparison.second}"), caption)
    table.add_column("lang", no_wrap=True)
    for header in ("n", "A, %", "B, %", "A − B", "95 % interval", "p", "McNemar p"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict", style="bold", no_wrap=True)
    for entry in comparison.languages:
        difference = entry.difference
        table.add_row(
            entry.lang,
            f"{entry.num_examples:,}",
            percent(entry.accuracy_first),
            percent(entry.accuracy_second),
            points(difference.value),
            DASH
            if difference.low is None
            else f"{points(difference.low)} to {points(difference.high)}",
            p_value(difference.p),
            p_value(difference.mcnemar_p),
            {"tie": "tie", "first": "A better", "second": "B better"}[entry.verdict],
        )
    return table
