"""The numbers and sentences of an evaluation, shared by the page, the terminal and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from clseave_cli.core.data.languages import language_name
from clseave_cli.core.evaluation.metrics import Difference
from clseave_cli.core.evaluation.results import (
    Baselines,
    LanguageResult,
    Results,
    SeedSummary,
    means,
)
from clseave_cli.labels import LABELS

#: Shown in place of a number that was not measured.
DASH = "–"

#: Display names of the baselines, by field of `Baselines`.
BASELINES = {
    "majority": "majority label",
    "hypothesis_only": "hypothesis only",
    "shuffled_image": "shuffled image",
}


def percent(value: float | None) -> str:
    """A fraction in per cent with one decimal, without the sign."""
    return DASH if value is None else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """A difference of fractions in points, signed, with a true minus."""
    return DASH if value is None else f"{100 * value:+.1f}".replace("-", "−")


def p_value(value: float | None) -> str:
    """Three decimals, or `<0.001`."""
    return "<0.001" if value is not None and value < 0.001 else decimal(value)


def decimal(value: float | None, digits: int = 3) -> str:
    """A number with that many decimals and a true minus."""
    return DASH if value is None else f"{value:.{digits}f}".replace("-", "−")


def mean_and_spread(
    summary: SeedSummary | None, number: Callable[[float | None], str] = percent
) -> str:
    """Mean ± sample standard deviation."""
    return f"{number(summary.mean)} ± {number(summary.std)}" if summary else DASH


def span(
    low: float | None, high: float | None, number: Callable[[float | None], str] = percent
) -> str:
    """An interval."""
    return DASH if low is None else f"{number(low)} – {number(high)}"


def difference_span(difference: Difference | None) -> str:
    """The interval of a difference, in points."""
    if difference is None or difference.low is None:
        return DASH
    return f"{points(difference.low)} to {points(difference.high)}"


def verdict(difference: Difference | None) -> str:
    """`tie`, `higher` or `lower`, by the interval of a difference."""
    if difference is None:
        return DASH
    return "tie" if difference.is_tie else "higher" if difference.value > 0 else "lower"


@dataclass(frozen=True)
class Highlight:
    """A number at the top of the page."""

    label: str
    value: str
    note: str


def result_name(result: LanguageResult, results: Results) -> str:
    """The language, with the mode if some languages are translated."""
    name = language_name(result.lang)
    return f"{name} ({result.mode})" if results.shows_mode(result) else name


def joined(items: Iterable[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def _is(items: Sequence[object]) -> str:
    return "is" if len(items) == 1 else "are"


def _source_and_others(results: Results) -> tuple[LanguageResult | None, list[LanguageResult]]:
    source = next((r for r in results.results if r.lang == results.source_lang), None)
    return source, [r for r in results.results if r.lang != results.source_lang]


def headline(results: Results) -> str:
    """The outcome in a few sentences; for several trainings, of their means."""
    if not results.results:
        return "Nothing was evaluated."
    mean = means(results)
    source, others = _source_and_others(mean)
    sentences = [_accuracies(results, mean, others if source is None else [source])]
    compared = [(result_name(r, mean), r, r.difference_to_english) for r in others]
    modes = [(language_name(r.lang), r, r.difference_to_zero_shot) for r in others]
    if source is not None:
        sentences += _verdicts(compared, "tied with it")
    elif verdicts := _verdicts(modes, "tied"):
        sentences += [f"Translate-test against zero-shot: {verdicts[0]}", *verdicts[1:]]
    else:
        sentences += _verdicts(compared, f"tied with {language_name(mean.source_lang)}")
    return " ".join([*sentences, *not_above(results), *one_answer(results)])


def _accuracies(results: Results, mean: Results, shown: Sequence[LanguageResult]) -> str:
    if len(shown) > 3:
        low, high = (percent(end(r.accuracy for r in shown)) for end in (min, max))
        text = f"{len(shown)} results lie between {low} and {high} %"
    else:
        reach = "reaches" if len(shown) == 1 else "reach"
        accuracies = joined(f"{percent(r.accuracy)} %" for r in shown)
        text = f"{joined(result_name(r, mean) for r in shown)} {reach} {accuracies}"
    if mean_of := _mean_of(results, shown):
        text += f", the {mean_of}"
        if shown[0].lang == results.source_lang and (summary := results.seed_accuracy(shown[0])):
            text += f" (± {percent(summary.std)})"
    return f"{text}."


def _mean_of(results: Results, shown: Iterable[LanguageResult]) -> str:
    """`mean of 3 trainings` if that is true of all the results shown, or nothing."""
    if not results.seeds or any(results.seed_accuracy(r) is None for r in shown):
        return ""
    return f"mean of {results.num_trainings} trainings"


def _verdicts(
    compared: list[tuple[str, LanguageResult, Difference | None]], tied_with: str
) -> list[str]:
    """A sentence each on the results that are tied, lower and higher."""
    sentences = []
    groups: dict[str, list[tuple[str, LanguageResult, float]]] = {}
    for name, r, difference in compared:
        if difference is not None:
            groups.setdefault(verdict(difference), []).append((name, r, difference.value))
    if tied := groups.get("tie"):
        names = joined(name for name, *_ in tied)
        if len(tied) > 6:
            names = f"{len(tied)} of {sum(map(len, groups.values()))} others"
        sentences.append(f"{names} {_is(tied)} {tied_with}{_same_labels([r for _, r, _ in tied])}.")
    for word in ("lower", "higher"):
        if differing := groups.get(word):
            names = joined(name for name, *_ in differing)
            by = joined(percent(abs(value)) for *_, value in differing)
            sentences.append(f"{names} {_is(differing)} {word}, by {by} points.")
    return sentences


def _same_labels(tied: Sequence[LanguageResult]) -> str:
    """The agreement behind a tie: equal accuracies may come from different rows."""
    if any(r.agreement_with_english is None or r.kappa_with_english is None for r in tied):
        return ""
    share = _range(percent(r.agreement_with_english) for r in tied)
    kappa = _range(decimal(r.kappa_with_english, 2) for r in tied)
    return f" (same label on {share} % of the rows, κ {kappa})"


def _range(numbers: Iterable[str]) -> str:
    ordered = sorted(numbers, key=lambda number: float(number.replace("−", "-")))
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def not_above(results: Results) -> list[str]:
    """A sentence on the results that do not clearly beat a baseline without the right photo.

    The paired difference decides; without one, the lower end of the accuracy's interval; without
    that, the accuracy itself.
    """
    mean = means(results)
    failing = []
    for r in mean.results:
        if unbeaten := [
            (value, name, difference)
            for name, (value, difference) in compared_with(mean, r).items()
            if not _is_above(r, value, difference)
        ]:
            failing.append((r, *max(unbeaten, key=lambda baseline: baseline[:2])))
    if not failing:
        return []
    word = "no better"
    if any(r.accuracy > value for r, value, *_ in failing):
        word = "not reliably better"
    elif all(verdict(difference) == "lower" for *_, difference in failing):
        word = "worse"
    _, most, baseline, difference = max(failing, key=lambda entry: entry[1:3])
    if len(failing) == 1 and difference is not None:
        baseline += f"; {points(difference.value)} points, {difference_span(difference)}"
    names = joined(result_name(r, mean) for r, *_ in failing)
    return [
        f"{names} {_is(failing)} {word} than a baseline without the right photo: "
        f"{'up to ' if len(failing) > 1 else ''}{percent(most)} % ({baseline})."
    ]


def one_answer(results: Results) -> list[str]:
    """A sentence on models that give nearly every row the same label, as the thesis's CLTEAVE."""
    constant = [r for r in results.results if (r.most_frequent or 0) >= 0.99]
    if not constant:
        return []
    names = joined(result_name(r, results) for r in constant)
    give = "gives" if len(constant) == 1 else "give"
    share = _range(percent(r.most_frequent) for r in constant)
    return [f"{names} {give} {share} % of the rows the same label."]


def mean_of_others(results: Results) -> str:
    """The mean zero-shot accuracy of at least two students' languages (thesis, chapter 5)."""
    students = {lang: a for lang, a in results.accuracies.items() if lang != results.source_lang}
    if len(students) < 2:
        return ""
    return f"mean of {', '.join(students)}: {percent(sum(students.values()) / len(students))} %"


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
    """Up to four numbers for the top of the page; for several trainings, their means."""
    tiles = []
    name = language_name(results.source_lang)
    mean = means(results)
    source, others = _source_and_others(mean)
    mean_of = _mean_of(results, others)
    if source is not None:
        note = f"95 % interval {span(source.accuracy_low, source.accuracy_high)}"
        if summary := results.seed_accuracy(source):
            note = f"± {percent(summary.std)}, {_mean_of(results, [source])}; {note}"
        tiles.append(Highlight(name, f"{percent(source.accuracy)} %", note))
    if others:
        low, high = (percent(end(r.accuracy for r in others)) for end in (min, max))
        langs = mean_of_others(results) or ", ".join(dict.fromkeys(r.lang for r in others))
        value = f"{low} – {high} %" if low != high else f"{low} %"
        note = "; ".join(filter(None, [langs, mean_of]))
        tiles.append(Highlight("Other languages", value, note))
    if compared := [d for r in others if (d := r.difference_to_english) is not None]:
        ties = f"{sum(difference.is_tie for difference in compared)} of {len(compared)}"
        note = f"interval of the {mean_of or 'difference'} contains zero"
        tiles.append(Highlight(f"Tied with {name}", ties, note))
    if measured := [
        (value, by) for r in mean.results for by, (value, _) in compared_with(mean, r).items()
    ]:
        most, by = max(measured)
        tiles.append(Highlight("Best baseline", f"{percent(most)} %", f"the highest: {by}"))
    return tuple(tiles)


def leaks(results: Results) -> list[str]:
    """Warnings that evaluated rows or photos had been seen in training."""
    sentences = []
    if results.of_training_rows:
        sentences.append(
            "The evaluated rows are those of the training split: the numbers show what the models "
            "remember, not how good they are."
        )
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
    """Warnings that a reader must see before the numbers."""
    sentences = leaks(results)
    if results.seeds:
        sentences.append(
            f"There are {results.num_trainings} trainings. The numbers above, the section Over "
            "seeds and table.tex show means over all of them (± sample standard deviation). All "
            "other numbers, tables and figures are those of the first training."
        )
        partial = [r for r in results.results if results.seed_accuracy(r) is None]
        if partial:
            names = joined(result_name(r, results) for r in partial)
            sentences.append(f"Not every training has {names}: shown from the first throughout.")
    return tuple(sentences)


def absent_labels(results: Results) -> str:
    """The labels that no row of any language has as its gold label."""
    absent = [
        name for name in LABELS if not any(r.per_class[name].support for r in results.results)
    ]
    return joined(absent) if absent else ""
