"""`clseave evaluate`, `retrieve` and `calibrate`."""

from __future__ import annotations

from dataclasses import asdict

from clseave_cli.commands import terminal
from clseave_cli.commands.options import Json, Verbose
from clseave_cli.core.config import CalibrateConfig, EvaluateConfig, RetrieveConfig


def run(config: EvaluateConfig, *, json: Json = False, verbose: Verbose = False) -> None:
    """Evaluate the models on a split: a table, JSON, or a report.

    Every accuracy comes with baselines that never see the photo. --report
    DIR writes an HTML page, figures and a LaTeX table. Several --runs are
    the same training with several seeds: the table shows the first, and
    another one mean and spread. If their source languages differ, a third
    shows the accuracy by source and target.
    """
    from clseave_cli.commands.tables import results_table, seeds_table, sources_table
    from clseave_cli.core.evaluation.run import evaluate

    results = evaluate(config, terminal.TerminalProgress())
    if json:
        terminal.print_json(results.to_json())
        return
    terminal.stdout().print(results_table(results, verbose=verbose))
    if results.seeds:
        terminal.stdout().print(seeds_table(results))
    if results.sources:
        terminal.stdout().print(sources_table(results))
    if config.report is not None:
        terminal.say(f"report: {config.report / 'report.html'}")


def retrieve(config: RetrieveConfig, *, json: Json = False, verbose: Verbose = False) -> None:
    """Rank all images for each caption, and all captions for each image.

    Reads captions_SPLIT.jsonl and captions_SPLIT.LANG.jsonl. Reports recall
    at 1, 5 and 10, and median and quartiles of the ranks, for every
    language: a table, JSON, or figures with --report DIR.
    """
    from clseave_cli.commands.tables import retrieval_table
    from clseave_cli.core.evaluation import retrieval

    document = retrieval.retrieve(config, terminal.TerminalProgress())
    if json:
        terminal.print_json(asdict(document))
        return
    for target in ("images", "captions"):
        terminal.stdout().print(retrieval_table(document, target, verbose=verbose))
    if config.report is not None:
        terminal.say(f"report: {config.report / 'retrieval.json'}, recall.png, ranks.png")


def calibrate(config: CalibrateConfig, *, json: Json = False) -> None:
    """Calibrate the probabilities, and set the thresholds of unsure answers.

    Fits a temperature for each language on a labelled split with images, and stores it in the
    model's folder. --precision also sets thresholds above which at least that share of the answers
    is right, with 95 % confidence. Below, `predict --unsure`, `serve` and `check` answer unsure.
    Earlier thresholds of the language are replaced.
    """
    from clseave_cli.core.evaluation.abstention import calibrate
    from clseave_cli.core.evaluation.summary import percent

    results = calibrate(config, terminal.TerminalProgress())
    if json:
        terminal.print_json({"calibrated": list(map(asdict, results))})
        return
    for result in results:
        terminal.say(f"{result.lang} · {result.folder} · temperature {result.temperature:.3f}")
        for label, threshold in result.thresholds.items():
            terminal.say(
                f"   {label}: threshold {percent(threshold.least)} %, reached by "
                f"{percent(threshold.coverage)} % of these answers, of which "
                f"{percent(threshold.accuracy)} % are right on this split"
            )
