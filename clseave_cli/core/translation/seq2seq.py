"""Hugging Face's sequence-to-sequence models: their words, language marks and decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from clseave_cli.core.config import Precision, TranslateConfig
from clseave_cli.core.data.languages import canonical, spellings
from clseave_cli.core.training.precision import resolve_device, resolve_precision
from clseave_cli.errors import ModelError, UsageError

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_UNLIMITED = 1 << 20
# T5's relative positions have no end; what its family was trained on has.
_MAX_TOKENS = 512

#: What the guard against repetition forbids: the same three tokens twice in one translation.
GUARD = {"no_repeat_ngram_size": 3}


class Decoder(Protocol):
    """A model that turns source tokens into target tokens."""

    def generate(self, ids: list[list[int]], max_new_tokens: int, guarded: bool) -> list[list[int]]:
        """Decodes a batch by beam search.

        Args:
            ids: token ids of each source sentence, marks and end included.
            max_new_tokens: the longest translation.
            guarded: forbid repetition (`GUARD`).

        Returns:
            token ids of each translation; special ones may be among them.
        """
        ...


class Codec:
    """Between texts and token ids, with the languages marked the way the model wants it.

    Args:
        name: model folder or hub id.
        config: the model's configuration.
        source: canonical code of the language translated from.
        target: canonical code of the language translated into.

    Attributes:
        tokenizer: the model's own.
        prefix_id: the token every translation starts with, None where there is none.
        max_tokens: the longest source or target.

    Raises:
        ModelError: the model does not know one of the languages, or cannot be loaded.
    """

    def __init__(self, name: str, config: Any, source: str, target: str) -> None:
        self.tokenizer = load(name, AutoTokenizer.from_pretrained)
        self._name = name
        self._text_prefix = ""
        self.prefix_id: int | None = None
        self._marks: set[int] = set()
        self._mark_languages(config, source, target)
        positions = getattr(config, "max_position_embeddings", None) or _MAX_TOKENS
        self.max_tokens = min(positions, getattr(self.tokenizer, "model_max_length", _UNLIMITED))
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

    def _mark_languages(self, config: Any, source: str, target: str) -> None:
        tokenizer = self.tokenizer
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
            known = {code.strip("<>"): code for code in tokenizer.supported_language_codes}
            self._text_prefix = known[self._code(target, known)] + " "
        elif config.model_type == "t5":
            self._text_prefix = self._t5_prefix(config, source, target)
        else:  # a model of one pair; its card may say which
            pair = (getattr(tokenizer, f"{side}_lang", None) for side in ("source", "target"))
            for wanted, given in zip((source, target), pair, strict=True):
                if given and canonical(given) != wanted:
                    raise ModelError(
                        f"{self._name}: translates {tokenizer.source_lang} into "
                        f"{tokenizer.target_lang}, not {source} into {target}; choose with --model."
                    )

    def _t5_prefix(self, config: Any, source: str, target: str) -> str:
        vocabulary = self.tokenizer.get_vocab()
        for spelling in spellings(target):  # MADLAD-400: <2de>
            if f"<2{spelling}>" in vocabulary:
                return f"<2{spelling}> "
        tasks = config.task_specific_params or {}
        task = tasks.get(f"translation_{source}_to_{target}")
        if task is None:
            raise ModelError(
                f"{self._name}: does not know how to translate {source} into {target}; "
                "choose another model with --model."
            )
        return str(task["prefix"])

    def _code(self, language: str, known: Any) -> str:
        """The model's spelling of a language, out of those it knows."""
        for spelling in spellings(language):
            if spelling in known:
                return spelling
        raise ModelError(
            f"{self._name}: does not know the language {language} "
            f"(tried {', '.join(spellings(language))}); choose another model with --model."
        )


class TransformersDecoder:
    """The model in torch.

    Args:
        model: a sequence-to-sequence model in eval mode.
        prefix_id: see `Codec`.
        beams: width of the search.
    """

    def __init__(self, model: Any, prefix_id: int | None, beams: int) -> None:
        self._model = model
        self._pad_id = model.config.pad_token_id
        self._arguments: dict[str, Any] = {"num_beams": beams, "do_sample": False}
        if prefix_id is not None:
            self._arguments["forced_bos_token_id"] = prefix_id
        # The model's own length, often 200, would contradict the one chosen for each batch.
        model.generation_config.max_length = None

    @torch.inference_mode()
    def generate(self, ids: list[list[int]], max_new_tokens: int, guarded: bool) -> list[list[int]]:
        """See `Decoder`."""
        longest = max(map(len, ids))
        padded = [tokens + [self._pad_id] * (longest - len(tokens)) for tokens in ids]
        mask = [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in ids]
        device = self._model.device
        output = self._model.generate(
            input_ids=torch.tensor(padded, device=device),  # (B, T)
            attention_mask=torch.tensor(mask, device=device),  # (B, T)
            max_new_tokens=max_new_tokens,
            **self._arguments,
            **(GUARD if guarded else {}),
        )
        result: list[list[int]] = output.tolist()
        return result


def load_decoder(name: str, codec: Codec, config: TranslateConfig) -> TransformersDecoder:
    """Loads a model into torch, on the device and in the precision of `config`.

    Raises:
        ModelError: it cannot be loaded.
    """
    device = resolve_device(config.device)
    model = load(
        name,
        AutoModelForSeq2SeqLM.from_pretrained,
        dtype=_TYPES[local_precision(config.precision, device)],
        use_safetensors=True,
    )
    return TransformersDecoder(model.eval().to(device), codec.prefix_id, config.beams)


def local_precision(precision: Precision, device: torch.device) -> Precision:
    """What `precision` means on a device; `auto` is float32 on a CPU, for exactness."""
    if precision == "auto" and device.type == "cpu":
        return "fp32"
    return resolve_precision(precision, device)


def load_config(name: str) -> Any:
    """A model's configuration.

    Raises:
        UsageError: it is not a sequence-to-sequence model.
    """
    config = load(name, AutoConfig.from_pretrained)
    if not config.is_encoder_decoder:
        raise UsageError(
            f"--model {name}: a {config.model_type} model; expected one that translates "
            "(Marian, M2M-100, NLLB, MADLAD-400, …)."
        )
    return config


def load(name: str, loader: Callable[..., Any], **arguments: Any) -> Any:
    """Whatever `loader` loads from a folder or the hub, never running code from there.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        return loader(name, trust_remote_code=False, **arguments)
    except (
        SafetensorError,
        ImportError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        OSError,
    ) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        raise ModelError(
            f"{name}: cannot be loaded ({lines[0][:200]}); expected a Hugging Face folder with "
            "safetensors weights (pickled ones are not read) and a tokenizer."
        ) from None
