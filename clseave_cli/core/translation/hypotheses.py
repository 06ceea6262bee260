"""A split's hypotheses in the source model's language, for translate-test.

They come out of the translation memory, or from an engine.

Nothing is written but the memory: the translations are as lasting there as in a file, and the next
evaluation asks for none of them again.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from clseave_cli.core.config import EngineConfig, EvaluateConfig, TranslateConfig
from clseave_cli.core.data.languages import canonical
from clseave_cli.core.data.records import Split
from clseave_cli.core.translation.driver import Driver, Patience
from clseave_cli.core.translation.engine import Engine, check_numbers, create_engine
from clseave_cli.core.translation.memory import Entry, Memory, default_path
from clseave_cli.core.translation.quality import CHECKS, Checks
from clseave_cli.core.translation.segments import needs_translation
from clseave_cli.core.translation.work import Item, Work
from clseave_cli.errors import TranslationError
from clseave_cli.progress import SILENT, Progress


@dataclass(frozen=True)
class TranslatedHypotheses:
    """A split's hypotheses in another language.

    Attributes:
        sentences: N of them, in the split's order.
        translator: the engine, its model, the model's revision and the settings, in one line.
    """

    sentences: list[str]
    translator: str


def translate_hypotheses(
    config: EvaluateConfig, split: Split, into: str, progress: Progress = SILENT
) -> TranslatedHypotheses:
    """Translates a split's hypotheses; each distinct one once, and never again.

    `{lang}` in `--model` and `--translations` stands for the split's language.

    Args:
        config: names the engine and how it is asked.
        split: rows of another language than `into`.
        into: the source model's language.
        progress: told how far things are, and of translations that look suspect.

    Raises:
        UsageError: the configuration makes no sense.
        TranslationError: the engine cannot work, or a hypothesis stays without translation.
        Interrupted: by Ctrl-C; what was answered is kept.
    """
    asked = _translate_config(config, split.lang)
    check_numbers(asked)
    engine = create_engine(asked, canonical(split.lang), canonical(into))
    progress.note(f"{split.path} into {into}, engine {asked.engine}: {engine.licence}")
    with Memory(asked.memory or default_path()) as memory:
        try:
            entries = _Translation(asked, engine, memory, split).entries(progress)
        finally:
            engine.close()
    _tell_suspect(split, entries, progress)
    identity = engine.identity
    parts = (identity.engine, identity.model, identity.revision[:12], identity.settings)
    # A file of translations may hold half a surrogate pair, which no tokenizer takes.
    sentences = [entry.translation.encode(errors="replace").decode() for entry in entries]
    return TranslatedHypotheses(sentences, " ".join(part for part in parts if part))


def _translate_config(config: EvaluateConfig, lang: str) -> TranslateConfig:
    shared = {part.name: getattr(config, part.name) for part in dataclasses.fields(EngineConfig)}
    if config.model is not None:
        shared["model"] = config.model.replace("{lang}", lang)
    if config.translations is not None:
        shared["translations"] = Path(str(config.translations).replace("{lang}", lang))
    return TranslateConfig(
        seed=config.seed, device=config.device, precision=config.precision, **shared
    )


class _Translation:
    """One split on its way through the memory and, for what is missing there, the engine."""

    def __init__(
        self, config: TranslateConfig, engine: Engine, memory: Memory, split: Split
    ) -> None:
        self._config, self._engine, self._memory, self._split = config, engine, memory, split
        self._identity = memory.identity_id(engine.identity)
        exact = engine.limits.text_characters is None
        # By row: what the memory knows it by; None for a text that is the same in every language.
        self._keys = (
            list(split.pair_ids)
            if engine.limits.by_pair_id
            else [text if exact or needs_translation(text) else None for text in split.hypotheses]
        )

    def entries(self, progress: Progress) -> list[Entry]:
        """What there is for every row.

        Raises:
            TranslationError: for some row there is nothing; names the first one.
        """
        wanted = {key: None for key in self._keys if key is not None}
        known = self._memory.find(self._identity, wanted)
        work = Work(self._engine.limits.by_length)
        try:
            work.add(Item(key, 0) for key in wanted if key not in known)
            if work.num_texts:
                stopped = self._fill(work, progress)
                known = self._memory.find(self._identity, wanted)
                self._require_all(known, work, stopped)
        finally:
            work.close()
        return [
            Entry(text, 0, "", ()) if key is None else known[key]
            for key, text in zip(self._keys, self._split.hypotheses, strict=True)
        ]

    def _fill(self, work: Work, progress: Progress) -> str | None:
        """Has translated what is missing; returns why that ended early, if it did."""
        driver = Driver(
            self._engine,
            self._memory,
            self._identity,
            Checks(self._engine.identity.source, self._engine.identity.target),
            Patience.of(self._config, self._engine.limits),
            retry_suspect=False,
        )
        title = f"{self._split.path.name} into {self._engine.identity.target}"
        with progress.task(title, total=work.num_texts, unit="texts") as task:
            return driver.run(work, task).stopped

    def _require_all(self, known: dict[str, Entry], work: Work, stopped: str | None) -> None:
        without = [
            row for row, key in enumerate(self._keys) if key is not None and key not in known
        ]
        if without:
            first = without[0]
            reason = work.reason(self._keys[first] or "") or stopped or "another process gave it up"
            raise TranslationError(
                f"{self._split.where(first)}: {len(without)} of {len(self._keys)} hypotheses "
                f"could not be translated ({reason}); what was is kept: run the same command "
                "again to try only those, or choose another --engine."
            )


def _tell_suspect(split: Split, entries: list[Entry], progress: Progress) -> None:
    """Says how many translations the checks found suspect: they are scored all the same."""
    counts = Counter(name for entry in entries for name in entry.suspicions)
    num_suspect = sum(bool(entry.suspicions) for entry in entries)
    if num_suspect:
        named = ", ".join(f"{name} {counts[name]}" for name in CHECKS if counts[name])
        progress.note(
            f"{split.path}: {num_suspect} of {len(entries)} translations look suspect ({named}); "
            "they are scored as they are."
        )
