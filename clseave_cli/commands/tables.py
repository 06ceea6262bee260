"""Results as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from clseave_cli.core.reporting.numbers import DASH, p_value, percent, points

if TYPE_CHECKING:
    from clseave_cli.core.comparison import Comparison
    from clseave_cli.core.results import Results


def results_table(results: Results) -> Table:
    """The language table: accuracy, how sure that is, and what is reached without looking."""
    table = Table(
        title="Visual entailment by language, in %",
        caption=f"95 % intervals by bootstrap over photos · {escape(str(results.signature))}",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("\nlang", no_wrap=True)
    table.add_column("\naccuracy", justify="right", style="bold", no_wrap=True)
    # Broken by hand, so that the table fits 80 columns: what a pipe or a small terminal has.
    for header in (
        "95 %\ninterval",
        "ratio to\nEnglish",
        "agrees w.\nEnglish",
        "\nmajority",
        "hypothesis\nonly",
        "shuffled\nimage",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    modes = {result.mode for result in results.results}
    for result in results.results:
        baselines = results.baselines.get(result.lang)
        interval = (
            DASH
            if result.accuracy_low is None
            else f"{percent(result.accuracy_low)}–{percent(result.accuracy_high)}"
        )
        table.add_row(
            f"{result.lang} ({result.mode})" if len(modes) > 1 else result.lang,
            percent(result.accuracy),
            interval,
            percent(result.ratio_to_english),
            percent(result.agreement_with_english),
            percent(baselines.majority if baselines else None),
            percent(baselines.hypothesis_only if baselines else None),
            percent(baselines.shuffled_image if baselines else None),
        )
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Two evaluations side by side: the paired difference, and whether it is one."""
    table = Table(
        title=escape(f"A: {comparison.first}\nB: {comparison.second}"),
        caption=(
            f"A minus B on the same rows, in points; 95 % intervals by paired bootstrap over "
            f"photos ({comparison.resamples:,} resamples, seed {comparison.seed})"
        ),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
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
