"""What an evaluation says, in numbers as they are written and in sentences.

The page, the terminal and LaTeX take both from here, so that they cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from clseave_cli.core.data.languages import language_name
from clseave_cli.core.evaluation.metrics import Difference
from clseave_cli.core.evaluation.results import (
    TRAINING_ROWS,
    Baselines,
    LanguageResult,
    Results,
    SeedSummary,
    means,
)
from clseave_cli.labels import LABELS

#: What stands for a number that was not measured.
DASH = "–"

# Languages that a sentence names; of more it tells the number.
_MOST_NAMED = 6

# Share of rows with the same answer from which a model is said to give one answer to all.
_ONE_ANSWER = 0.99

#: What an accuracy is compared with: fields of `Baselines`, and their names.
BASELINES = {
    "majority": "majority label",
    "hypothesis_only": "hypothesis only",
    "shuffled_image": "shuffled image",
}


# --- numbers ---


def percent(value: float | None) -> str:
    """A fraction in per cent with one decimal, without the sign; a dash for None."""
    return DASH if value is None else f"{100 * value:.1f}"


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


def mean_and_spread(
    summary: SeedSummary | None, number: Callable[[float | None], str] = percent
) -> str:
    """Mean ± sample standard deviation; a dash for None."""
    return f"{number(summary.mean)} ± {number(summary.std)}" if summary else DASH


def span(
    low: float | None, high: float | None, number: Callable[[float | None], str] = percent
) -> str:
    """An interval; a dash where there is none."""
    return DASH if low is None else f"{number(low)} – {number(high)}"


def difference_span(difference: Difference | None) -> str:
    """The interval of a difference, in points; a dash where there is none."""
    if difference is None or difference.low is None:
        return DASH
    return f"{points(difference.low)} to {points(difference.high)}"


def verdict(difference: Difference | None) -> str:
    """`tie`, `higher` or `lower`: what the interval of a difference allows to say."""
    if difference is None:
        return DASH
    if difference.is_tie:
        return "tie"
    return "higher" if difference.value > 0 else "lower"


# --- the outcome in words ---


@dataclass(frozen=True)
class Highlight:
    """One number to see first."""

    label: str
    value: str
    note: str


def result_name(result: LanguageResult, results: Results) -> str:
    """The language, with the mode where some languages are translated."""
    name = language_name(result.lang)
    return f"{name} ({result.mode})" if results.shows_mode(result) else name


def joined(items: Iterable[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def _is(several: Sequence[object]) -> str:
    return "is" if len(several) == 1 else "are"


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
    compared = [(result_name(r, mean), r, r.difference_to_english) for r in others]
    modes = [(language_name(r.lang), r, r.difference_to_zero_shot) for r in others]
    if source is not None:
        sentences += _verdicts(compared, "level with it")
    elif verdicts := _verdicts(modes, "level"):
        sentences += [f"Translate-test against zero-shot: {verdicts[0]}", *verdicts[1:]]
    else:
        sentences += _verdicts(compared, f"level with {language_name(mean.source_lang)}")
    return " ".join([*sentences, *not_above(results), *one_answer(results)])


def _reached(
    results: Results, mean: Results, source: LanguageResult | None, others: list[LanguageResult]
) -> str:
    """The accuracy of the source language, or of all where it was not evaluated."""
    shown = [source] if source is not None else others
    if len(shown) > 3:
        low, high = (percent(f(r.accuracy for r in shown)) for f in (min, max))
        text = f"{len(shown)} results lie between {low} and {high} %"
    else:
        names = [result_name(r, mean) for r in shown]
        accuracies = [f"{percent(r.accuracy)} %" for r in shown]
        text = f"{joined(names)} {'reaches' if len(names) == 1 else 'reach'} {joined(accuracies)}"
    if of := _mean_of(results, shown):
        text += f", the {of}"
        spread = results.spread(source) if source is not None else None
        text += f" (± {percent(spread.std)})" if spread is not None else ""
    return f"{text}."


def _mean_of(results: Results, shown: Iterable[LanguageResult]) -> str:
    """Says of how many trainings some numbers are the mean; empty where some of them are not."""
    if not results.seeds or any(results.spread(r) is None for r in shown):
        return ""
    return f"mean of {results.num_trainings} trainings"


def _verdicts(
    compared: list[tuple[str, LanguageResult, Difference | None]], level: str
) -> list[str]:
    """Who is level (and gives how many rows the same label), lower or higher; a sentence each."""
    measured = [(name, r, d) for name, r, d in compared if d is not None]
    sentences = []
    if tied := [(name, r) for name, r, d in measured if d.is_tie]:
        names = [name for name, _ in tied]
        few = len(tied) <= _MOST_NAMED
        named = joined(names) if few else f"{len(tied)} of {len(measured)} others"
        same = _same_labels([r for _, r in tied])
        sentences.append(f"{named} {_is(tied)} {level}, within the uncertainty{same}.")
    for word in ("lower", "higher"):
        if differing := [(name, d) for name, _, d in measured if verdict(d) == word]:
            by = joined(percent(abs(d.value)) for _, d in differing)
            names = [name for name, _ in differing]
            sentences.append(f"{joined(names)} {_is(names)} {word}, by {by} points.")
    return sentences


def _same_labels(tied: Sequence[LanguageResult]) -> str:
    """How often a tie is agreement: equal accuracies may come from different rows."""
    if any(r.agreement_with_english is None or r.kappa_with_english is None for r in tied):
        return ""
    share = _range(percent(r.agreement_with_english) for r in tied)
    kappa = _range(decimal(r.kappa_with_english, 2) for r in tied)
    return f" (same label on {share} % of the rows, κ {kappa})"


def _range(numbers: Iterable[str]) -> str:
    low, *_, high = sorted([*numbers] * 2, key=lambda n: float(n.replace("−", "-")))
    return low if low == high else f"{low} to {high}"


def not_above(results: Results) -> list[str]:
    """A sentence where an accuracy may be no more than a baseline without the right photo has.

    The paired difference decides; where there is none, the lower end of the accuracy's interval;
    where there is none either, the accuracy itself.
    """
    mean = means(results)
    level = []
    for r in mean.results:
        baselines = compared_with(mean, r).items()
        if without := [
            (value, name, d) for name, (value, d) in baselines if not _is_above(r, value, d)
        ]:
            level.append((r, *max(without, key=lambda baseline: baseline[:2])))
    if not level:
        return []
    names = joined(result_name(r, mean) for r, *_ in level)
    close = any(r.accuracy > most for r, most, *_ in level)
    word = "worse" if all(verdict(d) == "lower" for *_, d in level) else "no better"
    _, most, by, d = max(level, key=lambda entry: entry[1:3])
    if len(level) == 1 and d is not None:
        by += f"; {points(d.value)} points, {difference_span(d)}"
    return [
        f"{names} {_is(level)}{', within the uncertainty,' if close else ''} {word} than a "
        f"baseline without the right photo: {'up to ' if len(level) > 1 else ''}"
        f"{percent(most)} % ({by})."
    ]


def one_answer(results: Results) -> list[str]:
    """A sentence where a model gives nearly every row the same label, as the thesis's CLTEAVE."""
    constant = [r for r in results.results if (r.most_frequent or 0) >= _ONE_ANSWER]
    if not constant:
        return []
    names = joined(result_name(r, results) for r in constant)
    share = _range(percent(r.most_frequent) for r in constant)
    gives = "gives" if len(constant) == 1 else "give"
    return [f"{names} {gives} {share} % of the rows the same label."]


def mean_of_others(results: Results) -> str:
    """The mean accuracy of the students' languages (thesis chapter 5), or nothing if there is one.

    Of several trainings, of their means.
    """
    read = {lang: a for lang, a in results.accuracies.items() if lang != results.source_lang}
    if len(read) < 2:
        return ""
    return f"mean of {', '.join(read)}: {percent(sum(read.values()) / len(read))} %"


def compared_with(
    results: Results, result: LanguageResult
) -> dict[str, tuple[float, Difference | None]]:
    """The baselines that were measured: accuracy and the paired difference to it, by name."""
    baselines = results.baselines.get(result.key) or Baselines()
    return {
        name: (value, getattr(baselines, f"difference_to_{key}"))
        for key, name in BASELINES.items()
        if (value := getattr(baselines, key)) is not None
    }


def _is_above(result: LanguageResult, value: float, difference: Difference | None) -> bool:
    if difference is not None and difference.low is not None:
        return difference.low > 0
    return (result.accuracy if result.accuracy_low is None else result.accuracy_low) > value


def highlights(results: Results) -> tuple[Highlight, ...]:
    """The numbers to see first: as many of four as were measured, means of several trainings."""
    tiles = []
    name = language_name(results.source_lang)
    mean = means(results)
    source, others = _source_and_others(mean)
    if source is not None:
        note = f"95 % interval {span(source.accuracy_low, source.accuracy_high)}"
        if spread := results.spread(source):
            note = f"± {percent(spread.std)}, {_mean_of(results, [source])}; {note}"
        tiles.append(Highlight(name, f"{percent(source.accuracy)} %", note))
    if others:
        low, high = (percent(f(r.accuracy for r in others)) for f in (min, max))
        names = ", ".join(dict.fromkeys(r.lang for r in others))
        note = "; ".join(
            filter(None, [mean_of_others(results) or names, _mean_of(results, others)])
        )
        value = f"{low} – {high} %" if low != high else f"{low} %"
        tiles.append(Highlight("Other languages", value, note))
    compared = [r.difference_to_english for r in others if r.difference_to_english is not None]
    if compared:
        of = _mean_of(results, others)
        tied = sum(difference.is_tie for difference in compared)
        note = f"zero in the interval{f' of the {of}' if of else ''}"
        tiles.append(Highlight(f"Level with {name}", f"{tied} of {len(compared)}", note))
    without = [
        (value, by) for r in mean.results for by, (value, _) in compared_with(mean, r).items()
    ]
    if without:
        most, by = max(without)
        tiles.append(Highlight("Best baseline", f"{percent(most)} %", f"at most, by {by}"))
    return tuple(tiles)


def leaks(results: Results) -> list[str]:
    """What to say where rows or photos that were evaluated had been seen in training."""
    sentences = [TRAINING_ROWS] if results.of_training_rows else []
    if overlaps := [(r, r.seen) for r in results.results if r.seen is not None]:
        accuracies = [
            f"{result_name(r, results)} {percent(seen.accuracy)} / {percent(seen.accuracy_pairs)} "
            f"/ {percent(seen.accuracy_unseen)} ({seen.num_images:,} of {r.num_images:,} photos, "
            f"{percent(seen.share)} % of the rows)"
            for r, seen in overlaps
        ]
        sentences.append(
            "A model was trained on photos of these rows, or its checkpoint was chosen on them. "
            "Accuracy in % on seen photos / on seen pairs of photo and hypothesis / on all other "
            f"rows: {'; '.join(accuracies)}."
        )
    return sentences


def notes(results: Results) -> tuple[str, ...]:
    """What a reader must know before the numbers; mostly nothing."""
    sentences = leaks(results)
    if results.seeds:
        sentences.append(
            f"Of {results.num_trainings} trainings: the numbers above, the section Over seeds and "
            "table.tex show means over all of them (± sample standard deviation). All other "
            "numbers, tables and pictures are those of the first training."
        )
        alone = [result_name(r, results) for r in results.results if results.spread(r) is None]
        if alone:
            sentences.append(
                f"Not every training has {joined(alone)}: numbers of the first throughout."
            )
    return tuple(sentences)


def absent_labels(results: Results) -> str:
    """Labels that no row has as its gold label, in any language; empty: none."""
    support = {name: sum(r.per_class[name].support for r in results.results) for name in LABELS}
    absent = [name for name, num_rows in support.items() if not num_rows]
    return joined(absent) if absent else ""
