"""`clseave word-align`: which words of parallel sentences translate each other."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from clseave_cli.commands import terminal
from clseave_cli.core.config import WordAlignConfig

if TYPE_CHECKING:
    from clseave_cli.core.alignment.links import AlignmentScore


def run(
    config: WordAlignConfig,
    *,
    json: Annotated[bool, typer.Option("--json", help="Print the score as JSON.")] = False,
) -> None:
    """Find out which words of parallel sentences translate each other.

    Reads a split in two languages, or a file of source ||| target lines;
    prints or writes a line of links a pair, 0-0 1-2 …, words counted from 0.
    --gold scores them; with --alignments, those of another aligner.
    """
    from clseave_cli.core.alignment.word_links import align_words

    result = align_words(config, terminal.TerminalProgress())
    if result.score is not None:
        if json:
            best = {"layer": result.layer, "threshold": result.threshold} if config.search else {}
            terminal.print_json(asdict(result.score) | best)
        else:
            terminal.say(_summary(result.score))
            if config.search:
                terminal.say(
                    f"best: --aligner-layer {result.layer} --aligner-threshold {result.threshold}"
                )
    elif config.out is None:
        sys.stdout.writelines(f"{line}\n" for line in result.lines)
    if config.out is not None:
        counts = f"{result.num_links} links of {result.num_pairs} sentence pairs"
        terminal.say(f"{config.out}: {counts}", to_stderr=True)


def _summary(score: AlignmentScore) -> str:
    return (
        f"alignment error rate {score.error_rate:.2%} · precision {score.precision:.2%} · "
        f"recall {score.recall:.2%} ({score.num_pairs} pairs, {score.num_found} links; gold: "
        f"{score.num_sure} sure, {score.num_possible - score.num_sure} possible)"
    )
