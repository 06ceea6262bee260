"""`clseave evaluate`: how good, in every language, and did it look?"""

from __future__ import annotations

from clseave_cli.commands import terminal
from clseave_cli.commands.options import Json, Verbose
from clseave_cli.core.config import EvaluateConfig


def run(config: EvaluateConfig, *, json: Json = False, verbose: Verbose = False) -> None:
    """Measure the models on a split: a table, JSON, or a report.

    Every accuracy comes with baselines that never see the photo. --report
    DIR writes an HTML page, figures and a LaTeX table. Several --runs are
    the same training with several seeds: the table is that of the first,
    and a second one shows mean and spread. If their source languages
    differ, one more shows the accuracy by source and target.
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
