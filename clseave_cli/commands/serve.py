"""`clseave serve`: an HTTP service with a page to try it."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from clseave_cli.commands import terminal
from clseave_cli.core.config import ServeConfig
from clseave_cli.errors import ClseaveError, ExtraMissing, ModelError

if TYPE_CHECKING:
    from clseave_cli.core.prediction.inference import InferenceModel


def run(config: ServeConfig) -> None:
    """Predict over HTTP, with a page to try it.

    Reads the models under --runs, or a folder that `clseave export` wrote. Ctrl-C stops it.
    """
    try:
        from clseave_cli.core.prediction.service import create_app, make_server
    except ImportError as error:
        raise ExtraMissing(f"serve needs {error.name}: pip install -e '.[serve]'.") from None
    listening = _listen(config.host, config.port)
    model = _load(config)
    # The form parser warns about each bad request, which would let clients fill the log.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    server = make_server(create_app(model, config))
    host = f"[{config.host}]" if ":" in config.host else config.host
    terminal.say(f"http://{host}:{listening.getsockname()[1]} · {', '.join(model.sources)}")
    if config.host not in ("127.0.0.1", "::1", "localhost") and not config.allowed_host:
        terminal.say(
            "only requests to localhost are answered; add other names with --allowed-host NAME.",
            to_stderr=True,
        )
    with suppress(KeyboardInterrupt):  # the normal way to stop
        server.run(sockets=[listening])


def _load(config: ServeConfig) -> InferenceModel:
    """Loads every encoder now; without --lang, those that cannot be loaded are skipped."""
    from clseave_cli.core.prediction.inference import load_model
    from clseave_cli.core.prediction.predictor import AUTO

    languages = None if config.lang in ((), (AUTO,)) else config.lang
    model = load_model(
        config.runs, languages, device=config.device, precision=config.precision,
        progress=terminal.TerminalProgress(),
    )  # fmt: skip
    for lang in list(model.sources):
        try:
            model.embed_sentences(lang, ["."])
        except ModelError as error:
            if languages or len(model.sources) == 1:
                raise
            del model.sources[lang]
            terminal.say(f"{lang}: skipped: {error}", to_stderr=True)
    return model


def _listen(host: str, port: int) -> socket.socket:
    """Opens the port; called before the models are loaded, so that a used port fails at once."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ClseaveError(
            f"--host {host} --port {port}: cannot listen there ({reason}); choose another."
        ) from None
