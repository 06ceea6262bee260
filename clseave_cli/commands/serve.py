"""`clseave serve`: an HTTP service and a page to try it on."""

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
    """Answer over HTTP, with a page to drop a photo on.

    Reads the models under --runs, or a folder that `clseave export` wrote. Ctrl-C ends it.
    """
    try:
        from clseave_cli.core.prediction.service import create_app, make_server
    except ImportError as error:
        raise ExtraMissing(f"serve needs {error.name}: pip install -e '.[serve]'.") from None
    listening = _listen(config.host, config.port)
    model = _load(config)
    # What the form's parser says of each bad request: whoever sends many would fill the log.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    server = make_server(create_app(model, config))
    host = f"[{config.host}]" if ":" in config.host else config.host
    terminal.say(f"http://{host}:{listening.getsockname()[1]} · {', '.join(model.sources)}")
    if config.host not in ("127.0.0.1", "::1", "localhost") and not config.allowed_host:
        terminal.say(
            "only requests to localhost are answered; --allowed-host NAME allows another name.",
            to_stderr=True,
        )
    # Ctrl-C is how this command is meant to end.
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


def _load(config: ServeConfig) -> InferenceModel:
    """Loads every encoder now, not with its first request.

    Where no language is named, those whose model cannot be loaded are left out, with a note.
    """
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
            terminal.say(f"{lang} is left out: {error}", to_stderr=True)
    return model


def _listen(host: str, port: int) -> socket.socket:
    """Takes the port before the models are loaded, which may be long.

    Raises:
        ClseaveError: it is taken, or the address is not this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ClseaveError(
            f"--host {host} --port {port}: cannot listen there ({reason}); choose another."
        ) from None
