"""What a translation engine is, how it fails, and how one is found by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

from clseave_cli.core.config import TranslateConfig
from clseave_cli.errors import TranslationError, UsageError

#: Third parties register `name = "package.module:create"` under this entry-point group.
ENTRY_POINT_GROUP = "clseave.translation_engines"

_BUILT_IN = {
    "nmt": "clseave_cli.core.translation.nmt:create",
    "google": "clseave_cli.core.translation.google:create",
    "libre": "clseave_cli.core.translation.libre:create",
    "file": "clseave_cli.core.translation.imported:create",
}


class Fault(TranslationError):
    """A request went wrong in a way that may pass: asked again, after a wait.

    Attributes:
        retry_after: seconds the service asked to wait, None when it did not say.
    """

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Refusal(Fault):
    """The service refuses us rather than this text: 429, 403, a captcha page, nobody there.

    Many in a row with no success between them end the run.
    """


class Rejection(TranslationError):
    """This text cannot be translated; asking again would not help."""


@dataclass(frozen=True)
class Identity:
    """What a translation depends on besides the text: the key of the memory.

    Attributes:
        engine: the engine's name.
        model: the model or service behind it.
        revision: which version of the model; "" where the service does not tell.
        settings: what else changes the translations (beams, precision); "" for none.
        source: canonical code of the language translated from.
        target: canonical code of the language translated into.
    """

    engine: str
    model: str
    revision: str
    settings: str
    source: str
    target: str


@dataclass(frozen=True)
class Limits:
    """How an engine wants to be asked.

    Attributes:
        batch_size: texts in one call.
        batch_characters: characters in one call (a single longer text still goes alone).
        text_characters: characters in one text; longer ones are split at sentence ends, and all at
            line breaks. None: texts are passed exactly as they are.
        concurrency: calls under way at a time.
        requests_per_second: at most so many unless the user says otherwise; None: no limit.
        by_length: texts of one length together, the longest first (saves padding).
        by_pair_id: asked for the `pairID` of rows instead of for their text.
    """

    batch_size: int
    batch_characters: int
    text_characters: int | None
    concurrency: int
    requests_per_second: float | None = None
    by_length: bool = False
    by_pair_id: bool = False


@runtime_checkable
class Engine(Protocol):
    """A translator from one language into another; made by a `create` function, used by threads.

    Attributes:
        identity: the key of what it says in the memory.
        limits: how it wants to be asked.
        licence: one line on what the translations may be used for.
    """

    identity: Identity
    limits: Limits
    licence: str

    def translate(self, texts: Sequence[str], attempt: int) -> list[str]:
        """Translates each text; called from several threads when `limits.concurrency` > 1.

        Args:
            texts: non-empty, without line breaks and control characters.
            attempt: 0 first; 1 after the quality checks found fault with the first answer:
                an engine that can should then decode differently.

        Returns:
            one translation for every text, in their order.

        Raises:
            Fault: ask again later.
            Rejection: one of the texts cannot be translated.
            TranslationError: nothing can be translated; the run ends.
        """
        ...

    def close(self) -> None:
        """Frees what the engine holds."""


Create = Callable[[TranslateConfig, str, str], Engine]


def engine_names() -> list[str]:
    """Names of every engine there is, the built-in ones first."""
    return [*_BUILT_IN, *sorted(entry_points(group=ENTRY_POINT_GROUP).names - _BUILT_IN.keys())]


def find_engine(name: str) -> Create:
    """What makes the engine of a name.

    Raises:
        UsageError: no engine has that name.
    """
    if name in _BUILT_IN:
        module, function = _BUILT_IN[name].split(":")
        create: Create = getattr(importlib.import_module(module), function)
        return create
    found = list(entry_points(group=ENTRY_POINT_GROUP, name=name))
    if not found:
        known = ", ".join(engine_names())
        raise UsageError(f"--engine {name}: no such engine; there are: {known}.")
    create = found[0].load()
    return create


def create_engine(config: TranslateConfig, source: str, target: str) -> Engine:
    """The engine `config.engine` names, for canonical `source` and `target` languages.

    Raises:
        UsageError: no engine has that name.
        TranslationError: it does not know a language, or something it needs is missing.
    """
    return find_engine(config.engine)(config, source, target)


def check_numbers(config: TranslateConfig) -> None:
    """Refuses numbers that no engine can work with.

    Raises:
        UsageError: one is too small; names the flag.
    """
    positive = {
        "--beams": config.beams,
        "--timeout-seconds": config.timeout_seconds,
        "--retry-seconds": config.retry_seconds,
        "--batch-size": config.batch_size,
        "--concurrency": config.concurrency,
        "--requests-per-second": config.requests_per_second,
    }
    for flag, value in positive.items():
        if value is not None and not value > 0:
            raise UsageError(f"{flag} {value}: expected a number above 0.")
    for flag, count in {"--retries": config.retries, "--review": config.review}.items():
        if count < 0:
            raise UsageError(f"{flag} {count}: expected 0 or more.")


def language_code(table: dict[str, str], language: str, engine: str) -> str:
    """The engine's own code for a canonical language.

    Raises:
        TranslationError: the engine does not know the language.
    """
    if language in table:
        return table[language]
    known = " ".join(sorted(table))
    raise TranslationError(
        f"engine {engine}: does not know the language {language}; it knows: {known}."
    )
