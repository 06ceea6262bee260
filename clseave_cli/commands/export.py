"""`clseave export`: writes the models as a folder that runs without torch."""

from __future__ import annotations

from clseave_cli.commands import terminal
from clseave_cli.commands.options import Json
from clseave_cli.core.config import ExportConfig


def run(config: ExportConfig, *, json: Json = False) -> None:
    """Write the models as one folder that runs without torch.

    `clseave predict` and `clseave serve` read it with --runs, start faster and use less memory.
    Before the folder appears, it is compared with the original models.
    """
    from clseave_cli.core.prediction.export import TOLERANCE, export

    result = export(config, terminal.TerminalProgress())
    if json:
        document = {"folder": result.folder, "languages": result.languages}
        document |= {"bytes": result.num_bytes, "difference": result.difference}
        terminal.print_json(document)
        return
    allowed = TOLERANCE["int8" if config.int8 else "fp32"]
    terminal.say(
        f"{result.folder}: {', '.join(result.languages)} · {result.num_bytes / 2**20:.1f} MiB · "
        f"probabilities within {result.difference:.1g} of torch's (allowed: {allowed:g})"
    )
