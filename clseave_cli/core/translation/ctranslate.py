"""The same models through CTranslate2: converted once, then several times faster on a CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ctranslate2
from ctranslate2.converters import TransformersConverter

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.files import atomic_folder, cache_root, json_digest
from clseave_cli.core.training.precision import resolve_device
from clseave_cli.core.translation.seq2seq import GUARD, Codec, local_precision
from clseave_cli.errors import ModelError
from clseave_cli.processes import usable_cores

_COMPUTE_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class _Converter(TransformersConverter):  # type: ignore[misc]
    """The converter, taught two things.

    It reads safetensors only, and it learns the language marks of M2M-100, which transformers 5 no
    longer reports under the name the converter looks for.
    """

    def load_model(self, model_class: Any, name: str, **arguments: Any) -> Any:
        return super().load_model(model_class, name, use_safetensors=True, **arguments)

    def load_tokenizer(self, tokenizer_class: Any, name: str, **arguments: Any) -> Any:
        tokenizer = super().load_tokenizer(tokenizer_class, name, **arguments)
        if hasattr(tokenizer, "lang_token_to_id"):
            marks = sorted(tokenizer.lang_token_to_id, key=tokenizer.lang_token_to_id.get)
            special = {**tokenizer.special_tokens_map, "additional_special_tokens": marks}
            tokenizer.__class__ = type(
                "Tokenizer", (type(tokenizer),), {"special_tokens_map": special}
            )
        return tokenizer


class CTranslateDecoder:
    """A converted model.

    Args:
        translator: CTranslate2's.
        codec: the model's words.
        beams: width of the search.
    """

    def __init__(self, translator: Any, codec: Codec, beams: int) -> None:
        self._translator = translator
        self._tokenizer = codec.tokenizer
        self._beams = beams
        self._prefix: list[str] | None = None
        if codec.prefix_id is not None:
            self._prefix = [self._tokenizer.convert_ids_to_tokens(codec.prefix_id)]

    def generate(self, ids: list[list[int]], max_new_tokens: int, guarded: bool) -> list[list[int]]:
        """See `Decoder`."""
        results = self._translator.translate_batch(
            [self._tokenizer.convert_ids_to_tokens(tokens) for tokens in ids],
            target_prefix=[self._prefix] * len(ids) if self._prefix else None,
            beam_size=self._beams,
            max_decoding_length=max_new_tokens,
            max_input_length=0,
            **(GUARD if guarded else {}),
        )
        return [self._tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]


def load_ctranslate_decoder(
    name: str, revision: str, codec: Codec, config: TranslateConfig
) -> CTranslateDecoder:
    """Loads a model into CTranslate2; the first time, it is converted into the cache.

    Raises:
        ModelError: it cannot be converted or loaded.
    """
    folder = _converted(name, revision)
    device = resolve_device(config.device)
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        translator = ctranslate2.Translator(
            str(folder),
            device=device.type,
            device_index=device.index or 0,
            compute_type=(
                "int8" if config.int8 else _COMPUTE_TYPES[local_precision(config.precision, device)]
            ),
            intra_threads=max(1, usable_cores() // num_processes),
        )
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{name}: CTranslate2 cannot run it ({error}); try --backend transformers."
        ) from None
    return CTranslateDecoder(translator, codec, config.beams)


def _converted(name: str, revision: str) -> Path:
    """The folder of the converted model."""
    key = json_digest([name, revision, ctranslate2.__version__])[:16]
    folder = cache_root() / "ctranslate2" / key
    if not folder.is_dir():
        converter = _Converter(name)
        try:
            with atomic_folder(folder) as aside:
                converter.convert(str(aside), force=True)
        except (RuntimeError, ValueError, KeyError, AttributeError, OSError) as error:
            lines = str(error).strip().splitlines() or [repr(error)]
            raise ModelError(
                f"{name}: CTranslate2 cannot convert it ({lines[0][:200]}); "
                "try --backend transformers."
            ) from None
    return folder
