"""`clseave translate`: translates the hypotheses of a data set."""

from __future__ import annotations

import dataclasses
from typing import Any

from clseave_cli.commands import terminal
from clseave_cli.commands.options import Json
from clseave_cli.core.config import TranslateConfig
from clseave_cli.errors import TranslationError
from clseave_cli.processes import is_first_process


def run(config: TranslateConfig, *, json: Json = False) -> None:
    """Translate the hypotheses of a data set.

    Reads snli_ve_{train,dev,test}.jsonl (or --input FILE) and writes
    snli_ve_train.de.jsonl and so on next to them. A memory keeps all
    translations: after a crash, a kill or Ctrl-C, run the same command again
    to resume. Files that this command did not write, or that were changed
    since, are replaced only with --overwrite.
    """
    from clseave_cli.core.translation.corpus import translate

    summary = translate(config, terminal.TerminalProgress())
    if not is_first_process():
        return  # under torchrun every process translates, and rank 0 reports
    if json:
        terminal.print_json(dataclasses.asdict(summary))
    else:
        for file in summary.files:
            terminal.say(_line(file))
    num_failed = sum(file.num_failed for file in summary.files)
    lists = ", ".join(str(file.failed) for file in summary.files if file.failed)
    if summary.stopped:
        raise TranslationError(
            f"stopped: {summary.stopped}. {num_failed} rows are not translated ({lists}); "
            "run the same command again later to resume, or choose another --engine."
        )
    if num_failed:
        raise TranslationError(
            f"{num_failed} rows could not be translated; {lists} says why. "
            "Run the same command again to retry only those."
        )
    if not all(file.is_written for file in summary.files if file.num_rows):
        raise TranslationError(
            "nothing was written: the checks flagged every translation as suspect."
        )


def _line(file: Any) -> str:
    counts = {
        "from memory": file.num_from_memory,
        "translated": file.num_translated,
        "unchanged": file.num_unchanged,
        "failed": file.num_failed,
        "dropped": file.num_dropped,
        "suspect": file.num_suspect,
    }
    parts = [] if file.is_written else ["not written, because no row is translated"]
    parts.append(f"{file.num_rows} rows")
    parts += [f"{count} {name}" for name, count in counts.items() if count]
    if file.suspicions:
        checks = ", ".join(f"{name} {count}" for name, count in file.suspicions.items())
        parts[-1] += f" ({checks})"
    for name in ("failed", "rejected", "suspect", "review"):
        if path := getattr(file, name):
            parts.append(str(path))
    return f"{file.output}: " + " · ".join(parts)
