"""Local neural translation with any Hugging Face sequence-to-sequence model.

The model runs in torch or, converted once and several times faster on a CPU, in CTranslate2.
Neither is imported before there is a text to translate.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.data.hub import hub_answers, hub_reason
from clseave_cli.core.data.languages import canonical, spellings
from clseave_cli.core.files import atomic_folder, cache_root, file_digest, json_digest
from clseave_cli.core.translation.engine import Identity, Limits, Rejection
from clseave_cli.core.translation.quality import has_loop
from clseave_cli.errors import ClseaveError, ModelError, UsageError
from clseave_cli.processes import process_count, usable_cores

#: MIT licence, a hundred languages, 1.9 GB.
DEFAULT_MODEL = "facebook/m2m100_418M"

#: Licences of models, by the prefix of their names.
LICENCES = {
    "facebook/m2m100": "MIT: commercial use allowed",
    "google/madlad400": "Apache-2.0: commercial use allowed",
    "Helsinki-NLP/opus-mt": "CC-BY-4.0 or Apache-2.0, see its card: commercial use allowed",
    "facebook/nllb": "CC-BY-NC-4.0: NO commercial use",
    "facebook/seamless": "CC-BY-NC-4.0: NO commercial use",
}

_BATCH_SIZE = 64
_BATCH_CHARACTERS = 12_000
# These models were trained on single sentences; longer texts are split at sentence ends.
_TEXT_CHARACTERS = 400
# The longest translation has factor × the source's tokens + extra; more is a loop.
_LENGTH_FACTOR, _LENGTH_EXTRA = 2, 16
_CONVERTIBLE = {"marian", "m2m_100", "mbart", "t5", "bart", "pegasus"}
_WEIGHTS_AND_WORDS = ("*.safetensors", "*.json", "*.spm", "*.model", "*.txt")
# T5's relative positions have no limit, but its training texts did.
_MAX_TOKENS = 512
_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# One of these exists wherever torch could see a GPU on Linux (NVIDIA, WSL, AMD).
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")

#: Against loops: no three tokens occur twice in a translation.
GUARD = {"no_repeat_ngram_size": 3}

#: Beam search: token ids of source sentences, the longest translation and whether to apply `GUARD`
#: → token ids of the translations.
Decoder = Callable[[list[list[int]], int, bool], list[list[int]]]


class NmtEngine:
    """Translates with a local model, loaded for the first text."""

    def __init__(self, config: TranslateConfig, source: str, target: str) -> None:
        name = (config.model or DEFAULT_MODEL).replace("{lang}", target)
        self._config = config
        self._loaded: tuple[Codec, Decoder] | None = None
        revision = _revision(name)
        precision = "int8" if config.int8 else _precision(config)
        settings = f"beams={config.beams} {precision}"
        self.identity = Identity("nmt", name, revision, settings, source, target)
        licences = (text for start, text in LICENCES.items() if name.startswith(start))
        licence = next(licences, "see its model card for the licence")
        self.licence = f"model {name} ({licence})"
        self.limits = Limits(
            batch_size=config.batch_size or _BATCH_SIZE,
            batch_characters=_BATCH_CHARACTERS,
            text_characters=_TEXT_CHARACTERS,
            concurrency=1,
        )
        self._has_ctranslate2 = importlib.util.find_spec("ctranslate2") is not None
        if config.backend == "ctranslate2" and not self._has_ctranslate2:
            raise UsageError("--backend ctranslate2: run pip install -e '.[ctranslate2]' first.")

    def translate(self, texts: Sequence[str], attempt: int) -> list[str]:
        """Translates one batch, and decodes texts on which the model loops again with a guard."""
        codec, _ = self._load()
        ids = codec.encode(texts)
        for text, tokens in zip(texts, ids, strict=True):
            if len(tokens) > codec.max_tokens:
                raise Rejection(
                    f"{len(tokens)} tokens without a sentence end ({text[:20]}…); "
                    f"the model takes {codec.max_tokens}"
                )
        translations = self._decode(ids, guarded=attempt > 0)
        answers = enumerate(translations)
        loops = [n for n, text in answers if has_loop(text) and not has_loop(texts[n])]
        if loops and attempt == 0:
            guarded = self._decode([ids[n] for n in loops], guarded=True)
            for n, text in zip(loops, guarded, strict=True):
                translations[n] = text
        return translations

    def _decode(self, ids: list[list[int]], guarded: bool) -> list[str]:
        codec, decoder = self._load()
        longest = _LENGTH_FACTOR * max(map(len, ids)) + _LENGTH_EXTRA
        max_new_tokens = min(longest, codec.max_tokens - 2)
        try:
            return codec.decode(decoder(ids, max_new_tokens, guarded))
        except RuntimeError as error:  # of torch or CTranslate2
            if "out of memory" not in str(error).lower() or len(ids) == 1:
                raise
        half = len(ids) // 2
        return [*self._decode(ids[:half], guarded), *self._decode(ids[half:], guarded)]

    def _load(self) -> tuple[Codec, Decoder]:
        if self._loaded is None:
            name, identity = self.identity.model, self.identity
            codec = Codec(name, load_config(name), identity.source, identity.target)
            if self._uses_ctranslate2(codec.config.model_type):
                decoder = _ctranslate_decoder(name, identity.revision, codec, self._config)
            else:
                decoder = _torch_decoder(name, codec, self._config)
            self._loaded = codec, decoder
        return self._loaded

    def _uses_ctranslate2(self, kind: str) -> bool:
        name, fits = self.identity.model, kind in _CONVERTIBLE
        if self._config.backend == "ctranslate2" and not fits:
            raise ModelError(
                f"{name}: CTranslate2 does not support {kind} models; use --backend transformers."
            )
        uses = self._config.backend != "transformers" and fits and self._has_ctranslate2
        if self._config.int8 and not uses:
            raise UsageError(
                f"--int8: {name} would run in transformers, which lacks int8; it needs CTranslate2 "
                "(pip install -e '.[ctranslate2]') and a model that CTranslate2 supports."
            )
        return uses

    def close(self) -> None:
        """Frees the model."""
        self._loaded = None


class Codec:
    """Turns texts into token ids and back, with language marks as the model expects.

    Raises:
        ModelError: the model lacks one of the languages, or cannot be loaded.
    """

    def __init__(self, name: str, config: Any, source: str, target: str) -> None:
        from transformers import AutoTokenizer

        from clseave_cli.core.models.weights import load

        self.tokenizer = load(name, AutoTokenizer.from_pretrained)
        self._name, self.config = name, config
        self._text_prefix = ""
        self.prefix_id: int | None = None  # the first token of every translation
        self._marks: set[int] = set()
        self._mark_languages(source, target)
        positions = getattr(config, "max_position_embeddings", None) or _MAX_TOKENS
        self.max_tokens = min(positions, self.tokenizer.model_max_length)
        self._dropped = {*self.tokenizer.all_special_ids, *self._marks}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        marked = [self._text_prefix + text for text in texts]
        ids: list[list[int]] = self.tokenizer(marked)["input_ids"]
        return ids

    def decode(self, ids: list[list[int]]) -> list[str]:
        """The text of each translation."""
        return [
            self.tokenizer.decode([token for token in tokens if token not in self._dropped]).strip()
            for tokens in ids
        ]

    def _mark_languages(self, source: str, target: str) -> None:
        tokenizer, config = self.tokenizer, self.config
        if hasattr(tokenizer, "lang_code_to_id"):  # M2M-100: __de__
            codes = tokenizer.lang_code_to_id
            tokenizer.src_lang = self._code(source, codes)
            self.prefix_id = codes[self._code(target, codes)]
            self._marks = set(codes.values())
        elif hasattr(tokenizer, "src_lang"):  # NLLB: deu_Latn; mBART-50: de_DE
            vocabulary = tokenizer.get_vocab()
            tokenizer.src_lang = self._code(source, vocabulary)
            self.prefix_id = vocabulary[self._code(target, vocabulary)]
            self._marks = {self.prefix_id}
        elif getattr(tokenizer, "supported_language_codes", None):  # multilingual Marian: >>deu<<
            marks = {code.strip("<>"): code for code in tokenizer.supported_language_codes}
            self._text_prefix = marks[self._code(target, marks)] + " "
        elif config.model_type == "t5":
            tasks = getattr(config, "task_specific_params", None) or {}
            if task := tasks.get(f"translation_{source}_to_{target}"):
                self._text_prefix = task["prefix"]
            else:  # MADLAD-400: <2de>
                marks = {mark[2:-1]: mark for mark in tokenizer.get_vocab() if mark[:2] == "<2"}
                self._text_prefix = marks[self._code(target, marks)] + " "
        else:  # a model of one pair, which its tokenizer may name
            pair = (getattr(tokenizer, f"{side}_lang", None) for side in ("source", "target"))
            for language, code in zip((source, target), pair, strict=True):
                if code and canonical(code) != language:
                    raise ModelError(
                        f"{self._name}: translates {tokenizer.source_lang} into "
                        f"{tokenizer.target_lang}, not {source} into {target}; choose another "
                        "--model."
                    )

    def _code(self, language: str, names: Any) -> str:
        """The spelling of a language in `names`."""
        for spelling in spellings(language):
            if spelling in names:
                return spelling
        raise ModelError(
            f"{self._name}: does not know the language {language} "
            f"(tried {', '.join(spellings(language))}); choose another model with --model."
        )


def _torch_decoder(name: str, codec: Codec, config: TranslateConfig) -> Decoder:
    """A decoder in torch."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from clseave_cli.core.models.weights import load_model
    from clseave_cli.core.training.device import resolve_device

    device = resolve_device(config.device)
    dtype = getattr(torch, _TYPES[_precision(config)])
    model = load_model(name, AutoModelForSeq2SeqLM.from_pretrained, dtype=dtype)
    model.eval().to(device)
    # The model's default, often 200, would contradict the length chosen for each batch.
    model.generation_config.max_length = None
    prefix = {} if codec.prefix_id is None else {"forced_bos_token_id": codec.prefix_id}

    @torch.inference_mode()
    def decode(ids: list[list[int]], max_new_tokens: int, guarded: bool) -> list[list[int]]:
        longest = max(map(len, ids))
        pad_id = model.config.pad_token_id
        padded = [tokens + [pad_id] * (longest - len(tokens)) for tokens in ids]
        mask = [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in ids]
        output = model.generate(
            input_ids=torch.tensor(padded, device=device),  # (B, T)
            attention_mask=torch.tensor(mask, device=device),  # (B, T)
            max_new_tokens=max_new_tokens,
            num_beams=config.beams,
            do_sample=False,
            **prefix,
            **(GUARD if guarded else {}),
        )
        result: list[list[int]] = output.tolist()
        return result

    return decode


def _ctranslate_decoder(name: str, revision: str, codec: Codec, config: TranslateConfig) -> Decoder:
    """A decoder in CTranslate2."""
    import ctranslate2

    from clseave_cli.core.training.device import resolve_device

    folder = _converted(name, revision)
    device = resolve_device(config.device)
    try:
        translator = ctranslate2.Translator(
            str(folder),
            device=device.type,
            device_index=device.index or 0,
            compute_type="int8" if config.int8 else _TYPES[_precision(config)],
            intra_threads=max(1, usable_cores() // process_count()),
        )
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{name}: CTranslate2 cannot run it ({error}); try --backend transformers."
        ) from None
    to_words = codec.tokenizer.convert_ids_to_tokens
    prefix = None if codec.prefix_id is None else [to_words(codec.prefix_id)]

    def decode(ids: list[list[int]], max_new_tokens: int, guarded: bool) -> list[list[int]]:
        results = translator.translate_batch(
            [to_words(tokens) for tokens in ids],
            target_prefix=[prefix] * len(ids) if prefix else None,
            beam_size=config.beams,
            max_decoding_length=max_new_tokens,
            max_input_length=0,
            **(GUARD if guarded else {}),
        )
        return [codec.tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]

    return decode


def _converted(name: str, revision: str) -> Path:
    """The model's folder in the cache, converted for CTranslate2 the first time."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    from clseave_cli.core.models.weights import first_line, quiet

    class Converter(TransformersConverter):  # type: ignore[misc]
        """Reads safetensors only, downloads no attention code, and finds M2M-100's language marks.

        transformers 5 no longer lists these where the converter looks.
        """

        def load_model(self, model_class: Any, name: str, **arguments: Any) -> Any:
            arguments |= {"use_safetensors": True, "attn_implementation": "eager"}
            return super().load_model(model_class, name, **arguments)

        def load_tokenizer(self, tokenizer_class: Any, name: str, **arguments: Any) -> Any:
            tokenizer = super().load_tokenizer(tokenizer_class, name, **arguments)
            if hasattr(tokenizer, "lang_token_to_id"):
                marks = sorted(tokenizer.lang_token_to_id, key=tokenizer.lang_token_to_id.get)
                special = {**tokenizer.special_tokens_map, "additional_special_tokens": marks}
                tokenizer.__class__ = type(
                    "Tokenizer", (type(tokenizer),), {"special_tokens_map": special}
                )
            return tokenizer

    key = json_digest([name, revision, ctranslate2.__version__])[:16]
    folder = cache_root() / "ctranslate2" / key
    if not folder.is_dir():
        try:
            with atomic_folder(folder) as aside, quiet():
                Converter(name).convert(str(aside), force=True)
        except ClseaveError:
            raise  # the disk is full
        except Exception as error:
            raise ModelError(
                f"{name}: CTranslate2 cannot convert it ({first_line(error)}); "
                "try --backend transformers."
            ) from None
    return folder


def _precision(config: TranslateConfig) -> str:
    """The precision to use; `auto` is fp32 on a CPU, for exactness."""
    if config.precision != "auto":
        return config.precision
    is_linux = sys.platform == "linux"
    if config.device == "cpu" or (is_linux and not any(map(os.path.exists, _GPU_DEVICES))):
        return "fp32"  # saves the seconds of importing torch
    from clseave_cli.core.training.device import resolve_device, resolve_precision

    device = resolve_device(config.device)
    return "fp32" if device.type == "cpu" else resolve_precision("auto", device)


def load_config(name: str) -> Any:
    """A model's configuration; raises a UsageError unless it is a sequence-to-sequence model."""
    from transformers import AutoConfig

    from clseave_cli.core.models.weights import load

    config = load(name, AutoConfig.from_pretrained)
    if not config.is_encoder_decoder:
        raise UsageError(
            f"--model {name}: a {config.model_type} model; expected one that translates "
            "(Marian, M2M-100, NLLB, MADLAD-400, …)."
        )
    return config


def _revision(name: str) -> str:
    """The commit of a model on the hub, or a digest of its folder."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: has no config.json; is this a Hugging Face model folder?")
        files = sorted({path for pattern in _WEIGHTS_AND_WORDS for path in folder.glob(pattern)})
        return json_digest({path.name: file_digest(path) for path in files})[:16]
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such model folder.")
    from huggingface_hub import hf_hub_download

    try:
        config_file = hf_hub_download(name, "config.json", local_files_only=not hub_answers())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: is not a folder, and cannot be fetched from the hub ({hub_reason(error)}); "
            "choose another --model."
        ) from None
    return Path(config_file).parent.name  # …/snapshots/COMMIT/config.json
