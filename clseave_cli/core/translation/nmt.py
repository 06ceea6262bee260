"""Local neural translation: any Hugging Face sequence-to-sequence model, on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.files import file_digest, json_digest
from clseave_cli.core.translation.engine import Identity, Limits, Rejection
from clseave_cli.core.translation.quality import has_loop
from clseave_cli.errors import ModelError, UsageError

if TYPE_CHECKING:
    from clseave_cli.core.translation.seq2seq import Codec, Decoder

#: MIT licence, a hundred languages, 1.9 GB: usable by everyone for everything.
DEFAULT_MODEL = "facebook/m2m100_418M"

#: What is known of the licences of models, by the beginning of their names.
LICENCES = {
    "facebook/m2m100": "MIT: commercial use allowed",
    "google/madlad400": "Apache-2.0: commercial use allowed",
    "Helsinki-NLP/opus-mt": "CC-BY-4.0 or Apache-2.0, see its card: commercial use allowed",
    "facebook/nllb": "CC-BY-NC-4.0: NO commercial use",
    "facebook/seamless": "CC-BY-NC-4.0: NO commercial use",
}

_BATCH_SIZE = 64
_BATCH_CHARACTERS = 12_000
# These models know single sentences; what is longer is cut at sentence ends.
_TEXT_CHARACTERS = 400
# A translation has at most so many tokens for the source's; more is a loop.
_LENGTH_FACTOR, _LENGTH_EXTRA = 2, 16
_CONVERTIBLE = {"marian", "m2m_100", "mbart", "t5", "bart", "pegasus"}
_WEIGHTS_AND_WORDS = ("*.safetensors", "*.json", "*.spm", "*.model", "*.txt")


class NmtEngine:
    """A model that is loaded when the first text comes."""

    def __init__(self, config: TranslateConfig, source: str, target: str) -> None:
        name = (config.model or DEFAULT_MODEL).replace("{lang}", target)
        self._config = config
        self._name = name
        self._loaded: tuple[Codec, Decoder] | None = None
        revision = _revision(name)
        settings = f"beams={config.beams}" + (" int8" if config.int8 else "")
        self.identity = Identity("nmt", name, revision, settings, source, target)
        self.licence = f"model {name} ({_licence(name)})"
        self.limits = Limits(
            batch_size=config.batch_size or _BATCH_SIZE,
            batch_characters=_BATCH_CHARACTERS,
            text_characters=_TEXT_CHARACTERS,
            concurrency=1,
            by_length=True,
        )
        if config.backend == "ctranslate2" and not _has_ctranslate2():
            raise UsageError(
                '--backend ctranslate2: not installed; pip install "clseave-cli[ctranslate2]".'
            )

    def translate(self, texts: Sequence[str], attempt: int) -> list[str]:
        """Translates one batch; a text that the model loops on is decoded again with a guard."""
        codec, decoder = self._load()
        ids = codec.encode(texts)
        for text, tokens in zip(texts, ids, strict=True):
            if len(tokens) > codec.max_tokens:
                raise Rejection(
                    f"{len(tokens)} tokens without a sentence end ({text[:20]}…); "
                    f"the model takes {codec.max_tokens}"
                )
        translations = self._decode(codec, decoder, ids, guarded=attempt > 0)
        if attempt == 0:
            loops = [
                index
                for index, translation in enumerate(translations)
                if has_loop(translation) and not has_loop(texts[index])
            ]
            again = [ids[index] for index in loops]
            guarded = self._decode(codec, decoder, again, guarded=True) if again else []
            for index, translation in zip(loops, guarded, strict=True):
                translations[index] = translation
        return translations

    def _decode(
        self, codec: Codec, decoder: Decoder, ids: list[list[int]], guarded: bool
    ) -> list[str]:
        longest = _LENGTH_FACTOR * max(map(len, ids)) + _LENGTH_EXTRA
        max_new_tokens = min(longest, codec.max_tokens - 2)
        try:
            return codec.decode(decoder.generate(ids, max_new_tokens, guarded))
        except RuntimeError as error:  # torch's and CTranslate2's
            if "out of memory" not in str(error).lower() or len(ids) == 1:
                raise
        half = len(ids) // 2
        return [
            *self._decode(codec, decoder, ids[:half], guarded),
            *self._decode(codec, decoder, ids[half:], guarded),
        ]

    def _load(self) -> tuple[Codec, Decoder]:
        if self._loaded is None:
            from clseave_cli.core.translation.seq2seq import Codec, load_config, load_decoder

            model_config = load_config(self._name)
            codec = Codec(self._name, model_config, self.identity.source, self.identity.target)
            if self._uses_ctranslate2(model_config):
                from clseave_cli.core.translation.ctranslate import load_ctranslate_decoder

                decoder: Decoder = load_ctranslate_decoder(
                    self._name, self.identity.revision, codec, self._config
                )
            else:
                decoder = load_decoder(self._name, codec, self._config)
            self._loaded = codec, decoder
        return self._loaded

    def _uses_ctranslate2(self, model_config: Any) -> bool:
        fits = model_config.model_type in _CONVERTIBLE
        if self._config.backend == "ctranslate2" and not fits:
            raise ModelError(
                f"{self._name}: CTranslate2 does not know {model_config.model_type} models; "
                "use --backend transformers."
            )
        uses = self._config.backend != "transformers" and fits and _has_ctranslate2()
        if self._config.int8 and not uses:
            raise UsageError(
                f"--int8: {self._name} would run in transformers, which does not have it; it needs "
                'CTranslate2 (pip install "clseave-cli[ctranslate2]") and a model that it knows.'
            )
        return uses

    def close(self) -> None:
        """Frees the model."""
        self._loaded = None


def create(config: TranslateConfig, source: str, target: str) -> NmtEngine:
    """The engine, for `create_engine`."""
    return NmtEngine(config, source, target)


def _has_ctranslate2() -> bool:
    return importlib.util.find_spec("ctranslate2") is not None


def _licence(name: str) -> str:
    for beginning, licence in LICENCES.items():
        if name.startswith(beginning):
            return licence
    return "see its model card for the licence"


def _revision(name: str) -> str:
    """What tells one version of the model from the next: a commit, or a digest of the folder.

    Raises:
        ModelError: there is no such model, here or on the hub.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: no config.json in it; is this a Hugging Face model folder?")
        files = sorted({path for pattern in _WEIGHTS_AND_WORDS for path in folder.glob(pattern)})
        return json_digest({path.name: file_digest(path) for path in files})[:16]
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such model folder.")
    from huggingface_hub import hf_hub_download

    try:
        config_file = hf_hub_download(name, "config.json")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{name}: neither a folder here nor to be had from the hub ({reason}); "
            "name another with --model."
        ) from None
    return Path(config_file).parent.name  # …/snapshots/COMMIT/config.json
