"""The report's figures, as PNG files.

Drawn with matplotlib's objects, never with pyplot, whose global state a library must not touch.
Only language codes are written in them: the fonts that matplotlib brings know no CJK.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from clseave_cli.core.evaluation.report.curves import LearningCurve
from clseave_cli.core.evaluation.report.numbers import DASH
from clseave_cli.core.evaluation.report.trainings import means, num_trainings, spread
from clseave_cli.core.evaluation.results import LanguageResult, Results
from clseave_cli.labels import LABELS

if TYPE_CHECKING:
    from clseave_cli.core.evaluation.report.data_curves import DataCurves

_INK, _MUTED, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
_SOURCE, _OTHER, _ACCENT = "#334155", "#3b76d6", "#c2410c"
_SERIES = ("#3b76d6", "#c2410c", "#0f8a6d", "#8b5cf6", "#b7791f", "#be185d", "#0e7490", "#4d7c0f")
_BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#bcd3f5", "#3b76d6", "#1e3a78"])
_DOTS_PER_INCH = 160
_WIDTH = 7.6
_LETTERS = [name[0].upper() for name in LABELS]


def draw_figures(results: Results, curves: Sequence[LearningCurve]) -> dict[str, bytes]:
    """Draws every figure for which there is something to show.

    Returns:
        PNG bytes by name: `languages`, `confusion`, `reliability`, `distances`, `curves-pretrain`,
        `curves-finetune-ve`, `curves-align`.
    """
    figures: dict[str, Figure] = {
        "languages": _languages(results),
        "confusion": _confusion(results),
        "reliability": _reliability(results),
    }
    distances = _distances(results)
    if distances is not None:
        figures["distances"] = distances
    by_stage: dict[str, list[LearningCurve]] = {}
    for curve in curves:
        by_stage.setdefault(curve.stage, []).append(curve)
    for stage, runs in by_stage.items():
        figures[f"curves-{stage}"] = _alignment(runs) if _has_mse(runs) else _loss_accuracy(runs)
    return {name: _png(figure, str(results.signature)) for name, figure in figures.items()}


def draw_data_curves(curves: DataCurves) -> bytes:
    """The PNG of what students reach by the number of sentences they learnt from.

    A language has one colour; students of several languages are dashed.
    """
    figure = _figure(3.4)
    axes = figure.add_subplot()
    _tidy(axes)
    languages = sorted({point.lang for point in curves.points})
    for name in curves.series:
        points = [point for point in curves.points if point.series == name]
        points.sort(key=lambda point: point.num_sentences)
        colour = _SERIES[languages.index(points[0].lang) % len(_SERIES)]
        x = [point.num_sentences for point in points]
        style = "o-" if len(points[0].languages) == 1 else "s--"
        y = [100 * curves.value(point) for point in points]
        axes.plot(x, y, style, color=colour, markersize=3.5, linewidth=1.4, label=_plain(name))
        if curves.figure[0] == "accuracy":
            low, high = (
                [100 * (getattr(point, end) or curves.value(point)) for point in points]
                for end in ("accuracy_low", "accuracy_high")
            )
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    if curves.english is not None and curves.figure[0] == "accuracy":
        axes.axhline(
            100 * curves.english, color=_MUTED, linewidth=0.8, linestyle=":", label="teacher"
        )
    axes.set_xscale("log")
    numbers = sorted({point.num_sentences for point in curves.points})
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.xaxis.set_minor_formatter(NullFormatter())
    _axis_names(axes, "distinct sentences", curves.figure[1])
    figure.legend(loc="outside upper left", ncols=6, frameon=False, fontsize=8, labelcolor=_MUTED)
    return _png(figure, curves.signature)


def _png(figure: Figure, signature: str) -> bytes:
    """The figure with its signature under it, in small print."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(_plain(signature), width=int(20 * width), break_on_hyphens=False)
    # Room of its own: the small print takes none from the plot.
    foot = 0.13 * len(lines) + 0.08
    height += foot
    figure.set_size_inches(width, height)
    engine = figure.get_layout_engine()
    assert engine is not None
    # A margin all around, so that nothing touches the edge.
    margin = 0.07
    rect = (
        margin / width,
        foot / height,
        1 - 2 * margin / width,
        1 - (foot + margin) / height,
    )
    engine.set(rect=rect)  # type: ignore[call-arg]
    figure.text(
        0.012, 0.05 / height, "\n".join(lines), size=6, color=_MUTED, va="bottom", linespacing=1.4
    )
    stream = io.BytesIO()
    # No software name or date: the same results give the same bytes.
    figure.savefig(stream, format="png", metadata={"Software": None, "Description": signature})
    return stream.getvalue()


def _figure(height: float, width: float = _WIDTH) -> Figure:
    return Figure((width, height), dpi=_DOTS_PER_INCH, layout="constrained", facecolor="white")


def _plain(text: str) -> str:
    """A name from outside, made fit to draw: no formulas, and no characters the font lacks."""
    return text.encode("latin-1", "replace").decode("latin-1").replace("$", r"\$")


def _tidy(axes: Axes, grid: str | None = "y") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)
    axes.tick_params(which="both", colors=_MUTED, labelsize=8, length=0)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=_GRID, linewidth=0.7)  # type: ignore[arg-type]


def _title(axes: Axes, text: str) -> None:
    axes.set_title(_plain(text), loc="left", size=9, color=_INK, weight="bold")


def _axis_names(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, size=8, color=_MUTED)
    axes.set_ylabel(y, size=8, color=_MUTED)


def _shown_name(result: LanguageResult, results: Results) -> str:
    shown = results.shows_mode(result)
    return _plain(f"{result.lang}\n{result.mode}" if shown else result.lang)


def _languages(document: Results) -> Figure:
    """Accuracy by language with its interval, and on each bar what needs no looking."""
    results = means(document)
    figure = _figure(3.4)
    axes = figure.add_subplot()
    _tidy(axes)
    positions = np.arange(len(results.results))
    for x, result in zip(positions, results.results, strict=True):
        value = 100 * result.accuracy
        colour = _SOURCE if result.lang == results.source_lang else _OTHER
        axes.bar(x, value, width=0.56, color=colour, zorder=2)
        top = value
        if result.accuracy_low is not None and result.accuracy_high is not None:
            top = 100 * result.accuracy_high
            ends = [[value - 100 * result.accuracy_low], [top - value]]
            axes.errorbar(x, value, yerr=ends, color=_INK, capsize=4, linewidth=1.1, zorder=4)
        beside = ""
        if document.seeds:
            own = spread(document, result)
            beside = "first alone" if own is None else f"± {100 * own.std:.1f}"
        for text, size, weight, height in (
            (f"{value:.1f}", 9, "bold", 11 if beside else 3),
            (beside, 7, "normal", 3),
        ):
            axes.annotate(
                text,
                (x, top),
                xytext=(0, height),
                textcoords="offset points",
                ha="center",
                size=size,
                weight=weight,
                color=_INK,
            )
    handles = _baseline_marks(axes, results)
    names = [_shown_name(result, results) for result in results.results]
    many = len(names) > 6
    axes.set_xticks(positions, [name.replace("-", "-\n") if many else name for name in names])
    axes.tick_params(axis="x", labelsize=7 if many else 10, labelcolor=_INK)
    aside = 0.6 if len(positions) > 1 else 1.0
    axes.set_xlim(-aside, len(positions) - 1 + aside)
    axes.set_ylim(0, 112 if document.seeds else 106)
    axes.set_yticks(range(0, 101, 20))
    of = f", mean ± sd of {num_trainings(document)} trainings" if document.seeds else ""
    _axis_names(axes, "", f"accuracy, %{of}")
    if handles:
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=3,
            frameon=False,
            fontsize=8,
            labelcolor=_MUTED,
        )
    return figure


def _baseline_marks(axes: Axes, results: Results) -> list[Line2D]:
    # Side by side, a third of the bar each: they are often equal.
    kinds = (
        ("majority", "majority label", "s", "#fcd9b6", -0.24),
        ("hypothesis_only", "hypothesis only", "o", "#f08a3c", 0.0),
        ("shuffled_image", "shuffled image", "^", "#f7c948", 0.24),
    )
    handles = []
    for field, name, marker, colour, aside in kinds:
        style: dict[str, Any] = {"color": colour, "linewidth": 1.8, "marker": marker}
        style |= {"markersize": 4.5, "markeredgecolor": _INK, "markeredgewidth": 0.5}
        drawn = False
        for x, result in enumerate(results.results):
            baselines = results.baselines.get(result.key)
            value = getattr(baselines, field) if baselines else None
            if value is not None:
                places = [x + aside + place for place in (-0.11, 0, 0.11)]
                axes.plot(places, [100 * value] * 3, markevery=[1], zorder=3, **style)
                drawn = True
        if drawn:
            handles.append(Line2D([], [], label=name, **style))
    return handles


def _grid(results: Results, draw: Callable[[Axes, LanguageResult], None], height: float) -> Figure:
    """One small panel a language, at most three in a row."""
    columns = min(3, len(results.results))
    rows = math.ceil(len(results.results) / columns)
    figure = _figure(height * rows + 0.2)
    for index, result in enumerate(results.results, start=1):
        axes = figure.add_subplot(rows, columns, index)
        _title(axes, _shown_name(result, results).replace("\n", ", "))
        draw(axes, result)
    return figure


def _confusion(results: Results) -> Figure:
    def draw(axes: Axes, result: LanguageResult) -> None:
        counts = np.array(result.confusion, dtype=np.float64)
        rows = counts.sum(axis=1, keepdims=True)
        shares = counts / np.maximum(rows, 1)
        axes.imshow(shares, cmap=_BLUES, vmin=0, vmax=1, aspect="auto")
        for row, column in np.ndindex(*counts.shape):
            share = shares[row, column]
            ink = "white" if share > 0.55 else _INK
            texts = (
                (row - 0.08, f"{100 * share:.0f} %" if rows[row, 0] else DASH, 9.0, 1.0),
                (row + 0.24, f"{counts[row, column]:,.0f}", 6.5, 0.75),
            )
            for y, text, size, alpha in texts:
                shown = axes.text(
                    column, y, text, size=size, color=ink, alpha=alpha, ha="center", va="center"
                )
                shown.set_in_layout(False)  # it lies inside; measuring it takes half the time
        axes.set_xticks(range(len(LABELS)), _LETTERS)
        axes.set_yticks(range(len(LABELS)), _LETTERS)
        axes.tick_params(colors=_MUTED, labelsize=8, length=0)
        for spine in axes.spines.values():
            spine.set_color(_GRID)
        _axis_names(axes, "predicted", "gold")

    return _grid(results, draw, 2.2)


def _reliability(results: Results) -> Figure:
    def draw(axes: Axes, result: LanguageResult) -> None:
        _tidy(axes, "both")
        axes.plot([0, 100], [0, 100], color=_MUTED, linewidth=0.8, linestyle=":")
        x = [100 * point.confidence for point in result.reliability]
        y = [100 * point.accuracy for point in result.reliability]
        share = np.array([point.count for point in result.reliability]) / result.num_examples
        axes.plot(x, y, color=_OTHER, linewidth=1.2, zorder=3)
        axes.scatter(x, y, s=8 + 160 * share, color=_OTHER, edgecolor="white", zorder=4)
        axes.text(
            0.04,
            0.93,
            f"ECE {100 * result.ece:.1f} %",
            transform=axes.transAxes,
            size=8,
            color=_INK,
            va="top",
        )
        # Three labels: the largest probability is never below a third.
        axes.set_xlim(30, 102)
        axes.set_ylim(0, 104)
        axes.set_xticks([40, 60, 80, 100])
        axes.set_yticks([0, 25, 50, 75, 100])
        _axis_names(axes, "confidence, %", "accuracy, %")

    return _grid(results, draw, 2.1)


def _distances(results: Results) -> Figure | None:
    """Points lost to English against each distance that at least two languages have."""
    analysis = results.distances
    if analysis is None:
        return None
    kinds = {k: c for k, c in analysis.correlations.items() if c.num_languages > 1}
    if not kinds:
        return None
    columns = min(3, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = _figure(2.1 * rows + 0.2)
    for index, (kind, found) in enumerate(kinds.items(), start=1):
        axes = figure.add_subplot(rows, columns, index)
        _tidy(axes, "both")
        for lang, distance in found.distances.items():
            if distance is not None:
                loss = 100 * analysis.losses[lang]
                axes.scatter(distance, loss, s=22, color=_OTHER, zorder=3)
                axes.annotate(
                    _plain(lang),
                    (distance, loss),
                    xytext=(4, 3),
                    textcoords="offset points",
                    size=8,
                    color=_INK,
                )
        axes.axhline(0, color=_MUTED, linewidth=0.8, linestyle=":")
        axes.margins(0.18)
        note = f"n {found.num_languages}"
        if found.spearman is not None and found.pearson is not None:
            note = f"ρ {found.spearman:+.2f} · r {found.pearson:+.2f} · {note}"
        _title(axes, kind)
        axes.text(1, 1.03, note, transform=axes.transAxes, size=6.5, color=_MUTED, ha="right")
        _axis_names(axes, f"distance to {results.source_lang}", "points lost")
    return figure


def _has_mse(runs: Sequence[LearningCurve]) -> bool:
    return any("mse" in point.dev for run in runs for point in run.points)


def _loss_accuracy(runs: Sequence[LearningCurve]) -> Figure:
    """Losses on the left, accuracy on the right, by epoch: the thesis's Figure 3.2."""
    figure = _figure(2.9 * len(runs))
    for index, run in enumerate(runs, start=1):
        axes = figure.add_subplot(len(runs), 1, index)
        _tidy(axes)
        _title(axes, run.name)
        epochs = [point.epoch for point in run.points]
        axes.plot(
            epochs,
            [p.train_loss for p in run.points],
            "o-",
            color=_OTHER,
            markersize=3.5,
            linewidth=1.4,
            label="train loss",
        )
        handles = list(axes.get_lines())
        if all("loss" in point.dev for point in run.points):
            handles += axes.plot(
                epochs,
                [p.dev["loss"] for p in run.points],
                "s-",
                color=_ACCENT,
                markersize=3.5,
                linewidth=1.4,
                label="dev loss",
            )
        _axis_names(axes, "epoch", "loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if all("accuracy" in point.dev for point in run.points):
            right = axes.twinx()
            _tidy(right, None)
            trained = [p.train_accuracy for p in run.points if p.train_accuracy is not None]
            lines = [("dev accuracy", "^--", _SERIES[2], [p.dev["accuracy"] for p in run.points])]
            if len(trained) == len(epochs):
                lines.insert(0, ("train accuracy", "v:", _SERIES[4], trained))
            for label, style, colour, values in lines:
                handles += right.plot(
                    epochs,
                    [100 * value for value in values],
                    style,
                    color=colour,
                    markersize=3.5,
                    linewidth=1.4,
                    label=label,
                )
            right.set_ylabel("accuracy, %", size=8, color=_MUTED)
        if run.best_epoch is not None:
            handles.append(
                axes.axvline(
                    run.best_epoch, color=_MUTED, linewidth=0.8, linestyle=":", label="kept"
                )
            )
        axes.legend(
            handles=handles,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=5,
            frameon=False,
            fontsize=7.5,
            labelcolor=_MUTED,
            borderaxespad=0.2,
        )
    return figure


def _dev(run: LearningCurve, name: str) -> list[tuple[float, float]]:
    """A dev figure by epoch."""
    return [(point.epoch, point.dev[name]) for point in run.points if name in point.dev]


def _alignment(runs: Sequence[LearningCurve]) -> Figure:
    """Errors and learning rate of every run: the thesis's Figure 4.1; accuracy beside them.

    The training loss is the objective's: the mean squared error for `mse`.
    """
    panels: dict[str, Callable[[LearningCurve], list[tuple[float, float]]]] = {
        "training loss": lambda run: [(p.epoch, p.train_loss) for p in run.points],
        "dev MSE per dimension": lambda run: _dev(run, "mse"),
        "dev MAE per dimension": lambda run: _dev(run, "mae"),
        "dev accuracy, %": lambda run: [(x, 100 * y) for x, y in _dev(run, "accuracy")],
        "learning rate": lambda run: list(run.rates),
    }
    drawn = [(title, read) for title, read in panels.items() if any(map(read, runs))]
    num_rows = math.ceil(len(drawn) / 2)
    figure = _figure(0.5 + 2.4 * num_rows)
    for index, (title, read) in enumerate(drawn, start=1):
        axes = figure.add_subplot(num_rows, 2, index)
        _tidy(axes)
        _title(axes, title)
        by_epoch = title != "learning rate"
        for number, run in enumerate(runs):
            colour = _SERIES[number % len(_SERIES)]
            points = read(run)
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                "o-" if by_epoch else "-",
                color=colour,
                markersize=3,
                linewidth=1.3,
                label=_plain(run.name.removeprefix("align-")),
            )
            kept = [point for point in points if by_epoch and point[0] == run.best_epoch]
            if kept:
                # Rings of growing size: where several runs meet, none hides another.
                size = 6 + 1.6 * (number % len(_SERIES))
                (ring,) = axes.plot(*kept[0], "o", color=colour, fillstyle="none", markersize=size)
                ring.set_clip_on(False)
        logarithmic = title in ("training loss", "dev MSE per dimension")
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        _axis_names(axes, "epoch", "logarithmic scale" if logarithmic else "linear scale")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=8,
        frameon=False,
        fontsize=8,
        labelcolor=_MUTED,
    )
    return figure
