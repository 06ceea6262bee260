"""`clseave retrieve`: are images found by their captions, and captions by their images?"""

from __future__ import annotations

from clseave_cli.commands import terminal
from clseave_cli.commands.options import Json, Verbose
from clseave_cli.core.config import RetrieveConfig


def run(config: RetrieveConfig, *, json: Json = False, verbose: Verbose = False) -> None:
    """Rank all images for each caption, and all captions for each image.

    Reads captions_SPLIT.jsonl and captions_SPLIT.LANG.jsonl. Gives recall
    among the first 1, 5 and 10, and median and quartiles of the ranks, for
    every language: a table, JSON, or figures with --report DIR.
    """
    from clseave_cli.commands.tables import retrieval_table
    from clseave_cli.core.evaluation.retrieval import retrieve

    document = retrieve(config, terminal.TerminalProgress())
    if json:
        terminal.print_json(document.to_json())
        return
    for found in ("images", "captions"):
        terminal.stdout().print(retrieval_table(document, found, verbose=verbose))
    if config.report is not None:
        terminal.say(f"report: {config.report / 'retrieval.json'}, recall.png, ranks.png")
