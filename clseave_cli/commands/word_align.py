"""`clseave word-align`: aligns the words of parallel sentences."""

from __future__ import annotations

import sys
from dataclasses import asdict

from clseave_cli.commands import terminal
from clseave_cli.commands.options import Json
from clseave_cli.core.config import WordAlignConfig


def run(config: WordAlignConfig, *, json: Json = False) -> None:
    """Align the words of parallel sentences.

    Reads a split in two languages, or a file of source ||| target lines.
    Prints or writes a line of links per pair, 0-0 1-2 …, with words counted
    from 0. --gold scores them, or the --alignments of another aligner.
    """
    from clseave_cli.core.alignment.word_links import align_words

    result = align_words(config, terminal.TerminalProgress())
    score = result.score
    if score is not None and json:
        best = {"layer": result.layer, "threshold": result.threshold} if config.search else {}
        terminal.print_json(asdict(score) | best)
    elif score is not None:
        terminal.say(
            f"alignment error rate {score.error_rate:.2%} · precision {score.precision:.2%} · "
            f"recall {score.recall:.2%} ({score.num_pairs} pairs, {score.num_found} links; gold: "
            f"{score.num_sure} sure, {score.num_possible - score.num_sure} possible)"
        )
        if config.search:
            terminal.say(
                f"best: --aligner-layer {result.layer} --aligner-threshold {result.threshold}"
            )
    elif config.out is None:
        sys.stdout.writelines(f"{line}\n" for line in result.lines)
    if config.out is not None:
        counts = f"{result.num_links} links of {result.num_pairs} sentence pairs"
        terminal.say(f"{config.out}: {counts}", to_stderr=True)
