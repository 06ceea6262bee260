"""The figures, as PNG files, and the curves that some of them show.

pyplot is avoided because a library must not touch its global state. Labels use language codes,
because matplotlib's fonts have no CJK.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from PIL import Image

from clseave_cli.core.data.rows import read_rows
from clseave_cli.core.evaluation.results import RankScores, Results, Retrieval, means
from clseave_cli.core.evaluation.summary import BASELINES, DASH
from clseave_cli.core.files import read_json
from clseave_cli.errors import DataError
from clseave_cli.labels import LABELS

_INK, _MUTED, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
_SOURCE, _OTHER = "#334155", "#3b76d6"
_SERIES = ("#3b76d6", "#c2410c", "#0f8a6d", "#8b5cf6", "#b7791f", "#be185d", "#0e7490", "#4d7c0f")
_BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#bcd3f5", "#3b76d6", "#1e3a78"])
_DOTS_PER_INCH = 160
_WIDTH = 7.6
_LETTERS = [name[0].upper() for name in LABELS]
_THIN: dict[str, Any] = {"color": _MUTED, "linewidth": 0.8, "linestyle": ":"}
_OFFSET: dict[str, Any] = {"textcoords": "offset points", "color": _INK}
_CORNER: dict[str, Any] = {"size": 8, "color": _INK, "va": "top"}
_LEGEND: dict[str, Any] = {"frameon": False, "labelcolor": _MUTED}
_ON_TOP = _LEGEND | {"loc": "outside upper left", "fontsize": 8}


@dataclass(frozen=True)
class LearningCurve:
    """The record of one training run."""

    stage: str  # `pretrain`, `finetune-ve` or `align`
    name: str  # of the model folder, such as `align-de`
    # (epochs done, value) by metric: `train loss`, `dev mse`, … and the `learning rate`.
    lines: dict[str, list[tuple[float, float]]]
    best_epoch: int | None = None  # the epoch whose weights were kept, if recorded


def read_learning_curve(model: Path) -> LearningCurve | None:
    """Reads the learning curve of a model folder, such as `runs/align-de`.

    Returns:
        None without a record of training.

    Raises:
        DataError: the record is damaged.
    """
    path = model / "training" / "metrics.jsonl"
    if not path.is_file():
        return None
    lines: dict[str, list[tuple[float, float]]] = {}
    stage, steps = "", []
    for number, record, _ in read_rows(path, ()):
        try:
            stage = str(record["stage"])
            if "dev" in record:
                epoch, metrics = int(record["epoch"]), {"train loss": record["loss"]}
                if "accuracy" in record:
                    metrics["train accuracy"] = record["accuracy"]
                metrics |= {f"dev {name}": value for name, value in record["dev"].items()}
                for name, value in metrics.items():
                    lines.setdefault(name, []).append((epoch, float(value)))
                steps_per_epoch = int(record["step"]) / epoch
            else:
                steps.append((int(record["step"]), float(record["learning_rate"])))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError.at(path, number, "not a record of training; train again.") from None
    if not lines:
        return None
    if steps:
        lines["learning rate"] = [(step / steps_per_epoch, rate) for step, rate in steps]
    summary = path.with_name("summary.json")
    best = read_json(summary).get("best_epoch") if summary.is_file() else None
    return LearningCurve(stage, model.name, lines, best)


@dataclass(frozen=True)
class DataPoint:
    """One student in one of its languages; None: not measured."""

    lang: str
    languages: list[str]  # all languages of the student
    num_sentences: int  # training sentences of each language
    dev: dict[str, float]  # dev metrics in `lang`
    seconds: float
    accuracy: float | None = None  # on the test split, with its 95 % interval
    accuracy_low: float | None = None
    accuracy_high: float | None = None


@dataclass(frozen=True)
class DataCurves:
    """Students by number of training sentences: the document `curve.json`."""

    split: str
    english: float | None  # the teacher's accuracy in its language
    points: list[DataPoint]
    signature: str

    @property
    def metric(self) -> str:
        """The most telling metric that every point has."""
        if all(point.accuracy is not None for point in self.points):
            return f"accuracy on {self.split}, %"
        has_accuracy = all("accuracy" in point.dev for point in self.points)
        return "dev accuracy, %" if has_accuracy else "dev retrieval among the nearest ten, %"

    def lines(self) -> dict[str, list[tuple[int, float, float, float]]]:
        """(sentences, metric, low and high end of its interval) in per cent.

        By `de`, or `de of de+nl` for a student of several languages.
        """
        lines: dict[str, list[tuple[int, float, float, float]]] = {}
        key = "accuracy" if "accuracy" in self.metric else "recall_at_10"
        for p in sorted(self.points, key=lambda p: (len(p.languages), p.lang, p.num_sentences)):
            ends = p.accuracy, p.accuracy_low, p.accuracy_high
            value, low, high = (p.dev[key],) * 3 if self.metric.startswith("dev") else ends
            assert value is not None
            low, high = (value if end is None else end for end in (low, high))
            name = p.lang if len(p.languages) == 1 else f"{p.lang} of {'+'.join(p.languages)}"
            lines.setdefault(name, []).append((p.num_sentences, 100 * value, 100 * low, 100 * high))
        return lines


@dataclass(frozen=True)
class Drawing:
    """A figure for its file and for the page."""

    encoded: bytes  # PNG with the signature in small print at the bottom
    panels: tuple[bytes, ...]  # PNG of each panel, or of the whole, without the signature


def draw_figures(results: Results, curves: Sequence[LearningCurve]) -> dict[str, Drawing]:
    """Draws every figure that has data.

    Returns:
        By name: `languages`, `confusion`, `reliability`, `risk-coverage`, `distances`,
        `curves-pretrain`, `curves-finetune-ve`, `curves-align`. Distances are drawn only if a
        language differs from the source by more than its interval.
    """
    signature = str(results.signature)
    figures = {"confusion": _confusion(results), "reliability": _reliability(results)}
    if any(r.risk_coverage for r in results.results):
        figures["risk-coverage"] = _risk_coverage(results)
    compared = [r.difference_to_english for r in results.results if r.mode == "zero-shot"]
    if any(d is not None and not d.is_tie for d in compared) and (drawn := _distances(results)):
        figures["distances"] = drawn
    for stage in dict.fromkeys(curve.stage for curve in curves):
        figures[f"curves-{stage}"] = _curves([curve for curve in curves if curve.stage == stage])
    languages = draw(_languages(results), signature, whole=True)
    return {"languages": languages} | {k: draw(f, signature) for k, f in figures.items()}


def draw_data_curves(curves: DataCurves) -> bytes:
    """PNG of the students' metric by number of sentences, with the teacher's accuracy."""
    figure, (axes,) = _panels(3.4, [""], ("sentences", curves.metric), grid="y")
    lines = curves.lines()
    for (name, points), colour in zip(lines.items(), cycle(_SERIES), strict=False):
        numbers, values, low, high = zip(*points, strict=True)
        axes.plot(numbers, values, "o-", color=colour, markersize=3.5, label=_plain(name))
        axes.fill_between(numbers, low, high, color=colour, alpha=0.12, linewidth=0)
    if curves.english is not None:
        axes.axhline(100 * curves.english, label="teacher", **_THIN)
    axes.set_xscale("log")
    axes.set_xticks(sorted({point[0] for points in lines.values() for point in points}))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(ncols=6, **_ON_TOP)
    return draw(figure, curves.signature, whole=True).encoded


def draw_recall(document: Retrieval) -> bytes:
    """PNG of R@1, R@5 and R@10 by language (Krasner and Lanuzo, Figure 3), in both directions."""
    figure, panels = _retrieval_panels(document, "recall, %")
    for axes, scores in panels:
        for number, k in enumerate(scores[0].recall_at):
            recalls = [each.recall_at[k] for each in scores]
            places = [x + 0.27 * (number - 1) for x in range(len(scores))]
            style: dict[str, Any] = {"color": _BLUES(0.35 + 0.3 * number), "label": f"R@{k}"}
            axes.bar(places, [100 * r.value for r in recalls], 0.25, zorder=2, **style)
            for x, r in zip(places, recalls, strict=True):
                if r.low is not None and r.high is not None:
                    axes.vlines(x, 100 * r.low, 100 * r.high, color=_INK, linewidth=0.9, zorder=3)
        axes.set_ylim(0, 104)
    figure.legend(handles=panels[0][0].containers, ncols=3, **_ON_TOP)
    return draw(figure, str(document.signature), whole=True).encoded


def draw_ranks(document: Retrieval) -> bytes:
    """PNG of median and quartiles of the ranks by language (Figure 4 there)."""
    figure, panels = _retrieval_panels(document, "rank: median and quartiles")
    for axes, scores in panels:
        for x, ranks in enumerate(scores):
            axes.vlines(x, ranks.lower_quartile, ranks.upper_quartile, color=_OTHER, linewidth=7)
            axes.plot(x, ranks.median_rank, "_", color=_INK, markersize=14, zorder=3)
        _logarithmic(axes)
        axes.set_ylim(0.8, max(10.0, axes.get_ylim()[1]))
    return draw(figure, str(document.signature), whole=True).encoded


def _retrieval_panels(
    document: Retrieval, y: str
) -> tuple[Figure, list[tuple[Axes, list[RankScores]]]]:
    """A panel a direction, with its scores by language; * marks languages not trained in."""
    titles = "images, given a caption", "captions, given an image"
    figure, panels = _panels(2.6, titles, ("", y), columns=1, grid="y")
    names = [_plain(r.lang + "*" * (r.trained is False)) for r in document.results]
    for axes in panels:
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, max(len(names), 4) - 0.4)
    scores = [[getattr(r, side) for r in document.results] for side in ("images", "captions")]
    return figure, list(zip(panels, scores, strict=True))


def draw(figure: Figure, signature: str, *, whole: bool = False) -> Drawing:
    """Encodes a figure with its signature below; the page shows it `whole` or panel by panel."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(_plain(signature), width=int(20 * width), break_on_hyphens=False)
    # The figure grows, so the small print takes no space from the plot.
    foot = 0.13 * len(lines) + 0.08
    height += foot
    figure.set_size_inches(width, height)
    engine = figure.get_layout_engine()
    assert engine is not None
    x, y = 0.07 / width, (foot + 0.07) / height  # a margin all around
    engine.set(rect=(x, foot / height, 1 - 2 * x, 1 - y))  # type: ignore[call-arg]
    style: dict[str, Any] = {"size": 6, "color": _MUTED, "va": "bottom", "linespacing": 1.4}
    figure.text(0.012, 0.05 / height, "\n".join(lines), **style)
    stream = io.BytesIO()
    # Without software name and date, the same results give the same bytes.
    figure.savefig(stream, format="png", metadata={"Software": None, "Description": signature})
    panels = []
    with Image.open(stream) as image:
        if whole:
            boxes = [(0, int(foot * _DOTS_PER_INCH), image.width, image.height)]
        else:  # titles and ticks included, with a margin
            boxes = [_pixels(axes.get_tightbbox(), image) for axes in figure.axes]
        for left, bottom, right, top in boxes:
            panel = io.BytesIO()
            image.crop((left, image.height - top, right, image.height - bottom)).save(panel, "PNG")
            panels.append(panel.getvalue())
    return Drawing(stream.getvalue(), tuple(panels))


def _pixels(box: Any, image: Image.Image) -> tuple[int, int, int, int]:
    left, bottom = max(0, int(box.x0) - 8), max(0, int(box.y0) - 8)
    return left, bottom, min(image.width, int(box.x1) + 8), min(image.height, int(box.y1) + 8)


def _panels(
    height: float,
    titles: Iterable[str],
    labels: tuple[str, str],
    *,
    columns: int = 3,
    grid: Any = "both",
) -> tuple[Figure, list[Axes]]:
    """Panels of a height in inches with titles and axis labels, at most `columns` in a row."""
    titles = list(titles)
    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    size = _WIDTH, height * rows + 0.2 * (titles != [""])
    figure = Figure(size, dpi=_DOTS_PER_INCH, layout="constrained", facecolor="white")
    for number, title in enumerate(titles, 1):
        axes = figure.add_subplot(rows, columns, number, xlabel=labels[0], ylabel=labels[1])
        axes.set_title(_plain(title), loc="left", size=9, color=_INK, weight="bold")
        axes.tick_params(which="both", colors=_MUTED, labelsize=8, length=0)
        axes.set_axisbelow(True)
        axes.grid(axis=grid, color=_GRID, linewidth=0.7)
        for side, spine in axes.spines.items():
            spine.set(color=_GRID, visible=side in ("left", "bottom"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set(size=8, color=_MUTED)
    return figure, figure.axes


def _plain(text: str) -> str:
    """A name from outside without formulas and characters that the font lacks."""
    return text.encode("latin-1", "replace").decode("latin-1").replace("$", r"\$")


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _names(results: Results, separator: str = ", ") -> list[str]:
    return [
        r.lang + (f"{separator}{r.mode}" if results.shows_mode(r) else "") for r in results.results
    ]


def _languages(document: Results) -> Figure:
    """Accuracy by language with its interval, and the baselines as marks on each bar."""
    results = means(document)
    of = f", mean ± sd of {document.num_trainings} trainings" if document.seeds else ""
    figure, (axes,) = _panels(3.4, [""], ("", f"accuracy, %{of}"), grid="y")
    for x, result in enumerate(results.results):
        top = value = 100 * result.accuracy
        colour = _SOURCE if result.lang == results.source_lang else _OTHER
        axes.bar(x, value, width=0.56, color=colour, zorder=2)
        if result.accuracy_low is not None and result.accuracy_high is not None:
            top = 100 * result.accuracy_high
            ends = [[value - 100 * result.accuracy_low], [top - value]]
            axes.errorbar(x, value, yerr=ends, color=_INK, capsize=4, linewidth=1.1, zorder=4)
        deviation = ""
        if document.seeds:
            summary = document.seed_accuracy(result)
            deviation = "first alone" if summary is None else f"± {100 * summary.std:.1f}"
        bold: dict[str, Any] = _OFFSET | {"ha": "center", "size": 9, "weight": "bold"}
        axes.annotate(f"{value:.1f}", (x, top), (0, 11 if deviation else 3), **bold)
        axes.annotate(deviation, (x, top), (0, 3), size=7, ha="center", **_OFFSET)
    if handles := _baseline_marks(axes, results):
        figure.legend(handles=handles, ncols=3, **_ON_TOP)
    names = [_plain(name) for name in _names(results, "\n")]
    many = len(names) > 6
    axes.set_xticks(range(len(names)), [n.replace("-", "-\n") if many else n for n in names])
    axes.tick_params(axis="x", labelsize=7 if many else 10, labelcolor=_INK)
    aside = 0.6 if len(names) > 1 else 1.0
    top = 112 if document.seeds else 106
    axes.set(xlim=(-aside, len(names) - 1 + aside), ylim=(0, top), yticks=range(0, 101, 20))
    return figure


def _baseline_marks(axes: Axes, results: Results) -> list[Line2D]:
    # Side by side, a third of the bar each, because they are often equal.
    looks = (("s", "#fcd9b6", -0.24), ("o", "#f08a3c", 0.0), ("^", "#f7c948", 0.24))
    handles = []
    for (key, name), (marker, colour, aside) in zip(BASELINES.items(), looks, strict=True):
        style: dict[str, Any] = {"color": colour, "linewidth": 1.8, "marker": marker}
        style |= {"markersize": 4.5, "markeredgecolor": _INK, "markeredgewidth": 0.5}
        values = [getattr(results.baselines.get(r.key), key, None) for r in results.results]
        for x, value in enumerate(values):
            if value is not None:
                places = [x + aside + place for place in (-0.11, 0, 0.11)]
                axes.plot(places, [100 * value] * 3, markevery=[1], zorder=3, **style)
        if set(values) - {None}:
            handles.append(Line2D([], [], label=name, **style))
    return handles


def _confusion(results: Results) -> Figure:
    figure, panels = _panels(2.2, _names(results), ("predicted", "gold"))
    for axes, result in zip(panels, results.results, strict=True):
        counts = np.array(result.confusion, dtype=np.float64)
        rows = counts.sum(axis=1, keepdims=True)
        shares = counts / np.maximum(rows, 1)
        axes.imshow(shares, cmap=_BLUES, vmin=0, vmax=1, aspect="auto")
        for row, column in np.ndindex(*counts.shape):
            share = shares[row, column]
            style: dict[str, Any] = {"color": "white" if share > 0.55 else _INK, "va": "center"}
            texts = (
                (row - 0.08, f"{100 * share:.0f} %" if rows[row, 0] else DASH, 9.0, 1.0),
                (row + 0.24, f"{counts[row, column]:,.0f}", 6.5, 0.75),
            )
            for y, text, size, alpha in texts:
                cell = axes.text(column, y, text, size=size, alpha=alpha, ha="center", **style)
                cell.set_in_layout(False)  # measuring it would take half the time
        axes.set_xticks(range(len(LABELS)), _LETTERS)
        axes.set_yticks(range(len(LABELS)), _LETTERS)
        axes.grid(visible=False)
        axes.spines[:].set_visible(True)
    return figure


def _reliability(results: Results) -> Figure:
    figure, panels = _panels(2.1, _names(results), ("confidence, %", "accuracy, %"))
    for axes, result in zip(panels, results.results, strict=True):
        axes.plot([0, 100], [0, 100], **_THIN)
        x = [100 * point.confidence for point in result.reliability]
        y = [100 * point.accuracy for point in result.reliability]
        share = np.array([point.count for point in result.reliability]) / result.num_examples
        axes.plot(x, y, color=_OTHER, linewidth=1.2, zorder=3)
        axes.scatter(x, y, s=8 + 160 * share, color=_OTHER, edgecolor="white", zorder=4)
        axes.text(0.04, 0.93, f"ECE {100 * result.ece:.1f} %", **_CORNER, transform=axes.transAxes)
        # The largest of three probabilities is never below a third.
        axes.set(xlim=(30, 102), xticks=range(40, 101, 20), ylim=(0, 104), yticks=range(0, 101, 25))
    return figure


def _risk_coverage(results: Results) -> Figure:
    """The share of wrong answers by the share of rows answered, and thresholds."""
    figure, panels = _panels(2.1, _names(results), ("answered, %", "wrong of these, %"))
    for axes, result in zip(panels, results.results, strict=True):
        x = [100 * point.count / result.num_examples for point in result.risk_coverage]
        y = [100 - 100 * point.accuracy for point in result.risk_coverage]
        axes.plot(x, y, color=_OTHER, linewidth=1.2, zorder=3)
        if result.unsure is not None and result.unsure.labels == LABELS:  # one for all answers
            answered = 100 * (1 - result.unsure.share)
            ring = answered, np.interp(answered, x, y)
            axes.plot(*ring, "o", color=_INK, fillstyle="none", zorder=4)
        aurc = f"AURC {100 * (result.aurc or 0):.1f} %"
        axes.text(0.04, 0.93, aurc, **_CORNER, transform=axes.transAxes)
        axes.set(xlim=(0, 102), ylim=(0, None))
    return figure


def _distances(results: Results) -> Figure | None:
    """Points lost to the source by each distance that at least two languages have."""
    analysis = results.distances
    correlations = analysis.correlations if analysis is not None else {}
    kinds = {kind: c for kind, c in correlations.items() if c.num_languages > 1}
    if analysis is None or not kinds:
        return None
    figure, panels = _panels(2.1, kinds, (f"distance to {results.source_lang}", "points lost"))
    for axes, correlation in zip(panels, kinds.values(), strict=True):
        for lang, distance in correlation.distances.items():
            if distance is not None:
                place = distance, 100 * analysis.losses[lang]
                axes.scatter(*place, s=22, color=_OTHER, zorder=3)
                axes.annotate(_plain(lang), place, (4, 3), size=8, **_OFFSET)
        axes.axhline(0, **_THIN)
        axes.margins(0.18)
        note = f"n {correlation.num_languages}"
        if correlation.spearman is not None and correlation.pearson is not None:
            note = f"ρ {correlation.spearman:+.2f} · r {correlation.pearson:+.2f} · {note}"
        axes.text(1, 1.03, note, transform=axes.transAxes, size=6.5, color=_MUTED, ha="right")
    return figure


# Recorded metrics by panel.
_CURVES = {
    "loss": ("train loss", "dev loss"),
    "accuracy, %": ("train accuracy", "dev accuracy"),
    "dev MSE per dimension": ("dev mse",),
    "dev MAE per dimension": ("dev mae",),
    "learning rate": ("learning rate",),
}


def _curves(curves: Sequence[LearningCurve]) -> Figure:
    """Metrics by epoch: the thesis's Figures 3.2 and 4.1."""
    recorded = {name for curve in curves for name in curve.lines}
    drawn = {title: names for title, names in _CURVES.items() if recorded.intersection(names)}
    # Alignment errors fall over orders of magnitude; classifier losses do not.
    errors = {"loss", "dev MSE per dimension", "dev MAE per dimension"}
    logarithmic = errors if "dev mse" in recorded else set()
    figure, panels = _panels(2.4, drawn, ("epoch", "linear scale"), columns=2, grid="y")
    for axes, (title, names) in zip(panels, drawn.items(), strict=True):
        for number, curve in enumerate(curves):
            colour = _SERIES[number % len(_SERIES)]
            for name in (name for name in names if name in curve.lines):
                points = {x: 100 * y if "%" in title else y for x, y in curve.lines[name]}
                kind = "" if name == title else name.split()[0]
                label = " ".join([*[curve.name.removeprefix("align-")] * (len(curves) > 1), kind])
                style = {"train": "o--", "dev": "o-"}.get(kind, "-")
                line: dict[str, Any] = {"color": colour, "markersize": 3, "linewidth": 1.3}
                axes.plot(*zip(*points.items(), strict=True), style, label=_plain(label), **line)
                if kind == "dev" and curve.best_epoch in points:
                    best = curve.best_epoch, points[curve.best_epoch]
                    # Rings of growing size, so that none hides another at the same point.
                    size = 6 + 1.6 * (number % len(_SERIES))
                    (ring,) = axes.plot(*best, "o", color=colour, fillstyle="none", ms=size)
                    ring.set_clip_on(False)
        if title in logarithmic:
            _logarithmic(axes)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.set_ylabel("logarithmic scale")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if title != "learning rate" or len(curves) > 1:
            axes.legend(fontsize=7, **_LEGEND)
    return figure
