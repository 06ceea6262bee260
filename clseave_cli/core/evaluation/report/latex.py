r"""The language table for a paper: LaTeX with the booktabs package."""

from __future__ import annotations

from clseave_cli.core.evaluation.metrics.seeds import SeedSummary
from clseave_cli.core.evaluation.report.names import language_name
from clseave_cli.core.evaluation.report.trainings import means, num_trainings, spread
from clseave_cli.core.evaluation.results import Results

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def escape_latex(text: str) -> str:
    """Text with every character that LaTeX reads as a command made literal."""
    return "".join(_SPECIAL.get(character, character) for character in text)


def latex_table(document: Results) -> str:
    r"""A `table` environment; it needs `\usepackage{booktabs}`. Several trainings: their means."""
    results = means(document)
    rows = []
    source = escape_latex(language_name(results.source_lang))
    for result in results.results:
        baselines = results.baselines.get(result.key)
        low, high = result.accuracy_low, result.accuracy_high
        cells = [
            escape_latex(
                f"{result.lang} ({result.mode})" if results.shows_mode(result) else result.lang
            ),
            _percent(result.accuracy) + _deviation(spread(document, result)),
            "--" if low is None else f"[{_percent(low)}, {_percent(high)}]",
            _percent(result.macro_f1),
            _percent(result.ratio_to_english),
            _percent(result.agreement_with_english),
            _percent(baselines.majority if baselines else None),
            _percent(baselines.hypothesis_only if baselines else None),
            _percent(baselines.shuffled_image if baselines else None),
        ]
        rows.append("    " + " & ".join(cells) + r" \\")
    split = escape_latex(results.results[0].split) if results.results else ""
    of = ""
    if document.seeds:
        of = f"Means over {num_trainings(document)} trainings, $\\pm$ sample standard deviation"
        alone = any(spread(document, result) is None for result in document.results)
        of += " (rows without it: the first training). " if alone else ". "
    count = f"{results.signature.num_examples:,}".replace(",", "{,}")
    resamples = f"{results.signature.resamples:,}".replace(",", "{,}")
    return "\n".join(
        [
            f"% {' '.join(str(results.signature).split())}",
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            r"  \begin{tabular}{lrcrrrrrr}",
            r"    \toprule",
            rf"    & & & & \multicolumn{{2}}{{c}}{{{source}}} "
            r"& \multicolumn{3}{c}{without looking} \\",
            r"    \cmidrule(lr){5-6} \cmidrule(lr){7-9}",
            "    Language & Acc. & 95\\% interval & F1 & ratio & agrees & majority & hyp.~only "
            r"& shuffled \\",
            r"    \midrule",
            *rows,
            r"    \bottomrule",
            r"  \end{tabular}",
            rf"  \caption{{Visual entailment on the {split} split ($n = {count}$), in \%. {of}"
            rf"Intervals: bootstrap over photos, {resamples} resamples. F1: macro-averaged.}}",
            r"  \label{tab:languages}",
            r"\end{table}",
            "",
        ]
    )


def _deviation(own: SeedSummary | None) -> str:
    return "" if own is None else rf" $\pm$ {_percent(own.std)}"


def _percent(value: float | None) -> str:
    return "--" if value is None else f"{100 * value:.1f}"
