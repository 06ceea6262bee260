"""Results as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from clseave_cli.core.results import Results

_MISSING = "–"


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal, without the sign; a dash for None."""
    return _MISSING if value is None else f"{100 * value:.1f}"


def results_table(results: Results) -> Table:
    """The language table: accuracy, how sure that is, and what is reached without looking."""
    signature = results.signature
    table = Table(
        title="Visual entailment by language (%)",
        caption=f"95 % intervals by bootstrap over photos · {signature}",
        caption_justify="left",
        header_style="bold",
    )
    table.add_column("language", no_wrap=True)
    table.add_column("accuracy", justify="right", style="bold", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    for name in (
        "ratio to English",
        "agrees with English",
        "majority",
        "hypothesis only",
        "shuffled image",
    ):
        table.add_column(name, justify="right", max_width=max(10, len(name.split()[0])))
    modes = {result.mode for result in results.results}
    for result in results.results:
        baselines = results.baselines.get(result.lang)
        interval = (
            _MISSING
            if result.accuracy_low is None
            else f"{percent(result.accuracy_low)} – {percent(result.accuracy_high)}"
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
