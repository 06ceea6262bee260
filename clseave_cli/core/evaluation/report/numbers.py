"""How figures are written, in the terminal, in Markdown, in HTML and in LaTeX alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clseave_cli.core.evaluation.metrics.seeds import SeedSummary

#: What stands for a figure that was not measured.
DASH = "–"


def percent(value: float | None) -> str:
    """A fraction in per cent with one decimal, without the sign; a dash for None."""
    return DASH if value is None else f"{100 * value:.1f}"


def mean_and_spread(summary: SeedSummary | None) -> str:
    """Mean ± sample standard deviation of fractions, in per cent; a dash for None."""
    return f"{percent(summary.mean)} ± {percent(summary.std)}" if summary else DASH


def points(value: float | None) -> str:
    """A difference of fractions in points, signed with a true minus; a dash for None."""
    return DASH if value is None else f"{100 * value:+.1f}".replace("-", "−")


def p_value(value: float | None) -> str:
    """Three decimals, or `<0.001`; a dash for None."""
    if value is None:
        return DASH
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def decimal(value: float | None, digits: int = 3) -> str:
    """A number with that many decimals and a true minus; a dash for None."""
    return DASH if value is None else f"{value:.{digits}f}".replace("-", "−")
