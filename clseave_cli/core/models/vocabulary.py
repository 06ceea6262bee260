"""Training only the word vectors that the data use.

Half of a multilingual encoder's weights are vectors of tokens that never occur in the data of one
language: a hundred thousand sentences use a tenth of mBERT's 119,547. Their gradients are zero, but
the optimiser would still read and write them and its two moments in every step, and every
checkpoint would store them.

Legend: V vocabulary · K kept tokens · H hidden width.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AutoTokenizer

from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.tokens import TokenTable, Trimmed
from clseave_cli.errors import ModelError


@contextmanager
def reduced_vocabulary(
    encoder: SentenceEncoder, *tables: TokenTable, translator: nn.Linear | None = None
) -> Iterator[None]:
    """Within the block, an encoder has word vectors for the tokens of these sentences only.

    The optimiser treats each weight separately, so the K kept vectors are trained as in the whole
    table. The others stay as they are; in the whole table, weight decay would have changed them.
    The encoder is whole again after the block, even if that failed.

    Args:
        encoder: unchanged if its word vectors are not a plain table.
        tables: all sentences that the encoder will be given in the block.
        translator: H → H without bias, applied to the word vectors within the block and merged into
            all V afterwards.
    """
    whole = encoder.backbone.get_input_embeddings()
    if type(whole) is not nn.Embedding:
        yield
        return
    always = [encoder.pad_id] + ([] if whole.padding_idx is None else [whole.padding_idx])
    if not encoder.packs:
        # Some models count only ids other than the padding's, so no token may take that id.
        always = list(range(max(always) + 1))
    kept = np.unique(np.concatenate([always, *(table.ids for table in tables)]))
    places = np.full(whole.num_embeddings, -1)
    places[kept] = np.arange(len(kept))
    part = _part(whole, kept)
    encoder.backbone.set_input_embeddings(
        part if translator is None else nn.Sequential(part, translator)
    )
    encoder.token_places = torch.from_numpy(places)
    try:
        yield
    finally:
        with torch.no_grad():
            rows = torch.from_numpy(kept).to(whole.weight.device)
            whole.weight[rows] = part.weight.to(whole.weight.device)
            if translator is not None:
                whole.weight.copy_(translator(whole.weight))
        encoder.backbone.set_input_embeddings(whole)
        encoder.token_places = None


def _part(whole: nn.Embedding, kept: npt.NDArray[np.integer[Any]]) -> nn.Embedding:
    """The vectors of the kept tokens, in order; the padding token must be one of them."""
    padding = whole.padding_idx
    return nn.Embedding(
        len(kept),
        whole.embedding_dim,
        padding_idx=None if padding is None else int(np.searchsorted(kept, padding)),
        _weight=whole.weight.detach()[torch.from_numpy(kept).to(whole.weight.device)],
    ).requires_grad_(whole.weight.requires_grad)


#: Special tokens whose ids are in a model's configuration.
_CONFIG_IDS = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")


def trim_vocabulary(
    encoder: SentenceEncoder, used: npt.NDArray[np.integer[Any]], name: str
) -> npt.NDArray[np.intp]:
    """Reduces an encoder, in place, to the tokens that some text uses.

    Special tokens and single characters (or bytes) are kept, too.

    Args:
        encoder: its tokenizer, word vectors and configured ids are replaced.
        used: ids that the text uses.
        name: of the encoder, to restore the rest from.

    Returns:
        (V,) new ids by the old ones; -1 if removed.

    Raises:
        ModelError: its kind of tokenizer cannot be trimmed, or it is trimmed already.
    """
    if encoder.trimmed is not None:
        raise ModelError(f"{name}: its vocabulary is trimmed already; start from the whole one.")
    whole = encoder.backbone.get_input_embeddings()
    content = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    kept = np.array(sorted(_closure(content, set(map(int, used)), name)), dtype=np.int64)
    places = np.full(max(whole.num_embeddings, len(encoder.tokenizer)), -1, dtype=np.intp)
    places[kept] = np.arange(len(kept))
    new_id = {int(old): new for new, old in enumerate(kept)}
    tokenizer = _reloaded(encoder.tokenizer, _renumbered(content, new_id), name)
    config = encoder.backbone.config
    encoder.backbone.set_input_embeddings(_part(whole, kept))
    config.vocab_size = len(kept)
    for key in (f"{kind}_token_id" for kind in _CONFIG_IDS):
        if getattr(config, key, None) in new_id:
            setattr(config, key, new_id[getattr(config, key)])
    if encoder.first_position != 0 and new_id[encoder.pad_id] != encoder.pad_id:
        raise ModelError(
            f"{name}: its positions count, or may count, from its padding id, which would change."
        )
    encoder.tokenizer = tokenizer
    encoder.pad_id = new_id[encoder.pad_id]
    encoder.terminal_id = new_id[encoder.terminal_id]
    encoder.trimmed = Trimmed(kept, whole.num_embeddings, name)
    return places


def _closure(content: dict[str, Any], used: set[int], name: str) -> set[int]:
    """The used tokens and all that must be kept with them."""
    model = content["model"]
    kind = model.get("type")
    if kind not in ("WordPiece", "Unigram", "BPE"):
        raise ModelError(
            f"{name}: --trim-vocabulary works with WordPiece, Unigram and BPE tokenizers, not "
            f"{kind}."
        )
    ids = _ids(model)
    kept = used | {token["id"] for token in content["added_tokens"]}
    affixes = ("Ġ", "▁", model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    kept |= {i for token, i in ids.items() if _is_single(token, affixes)}
    unknown = model.get("unk_id") if kind == "Unigram" else ids.get(model.get("unk_token"))
    if unknown is not None:
        kept.add(unknown)
    if kind == "Unigram":
        # The score of unknown characters depends on the lowest one.
        scores = [score for _, score in model["vocab"]]
        kept.add(scores.index(min(scores)))
    if kind == "BPE":
        _add_parts(kept, ids, model)
    return kept


def _ids(model: dict[str, Any]) -> dict[str, int]:
    if isinstance(model["vocab"], dict):
        return dict(model["vocab"])
    return {token: number for number, (token, _) in enumerate(model["vocab"])}


def _is_single(token: str, affixes: Iterable[str | None]) -> bool:
    """Whether a token is one character, with or without an affix, or one byte."""
    if re.fullmatch("<0x..>", token):
        return True
    for affix in affixes:
        if affix and len(token) > len(affix):
            token = token.removeprefix(affix).removesuffix(affix)
    return len(token) <= 1


def _merges(model: dict[str, Any]) -> list[tuple[list[str], str]]:
    """The merges in order: a pair and its result, in which only the first keeps its prefix."""
    prefix = model.get("continuing_subword_prefix") or ""
    # Older files write a pair as one string.
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    return [([first, second], first + second.removeprefix(prefix)) for first, second in pairs]


def _add_parts(kept: set[int], ids: dict[str, int], model: dict[str, Any]) -> None:
    """Adds the parts that kept tokens are merged from, recursively."""
    parts: dict[str, list[str]] = {}
    for pair, result in _merges(model):
        parts.setdefault(result, []).extend(pair)
    names = {number: token for token, number in ids.items()}
    pending = [names[number] for number in kept if number in names]
    while pending:
        for part in parts.get(pending.pop(), ()):
            if ids[part] not in kept:
                kept.add(ids[part])
                pending.append(part)


def _renumbered(content: dict[str, Any], new_id: dict[int, int]) -> dict[str, Any]:
    """The tokenizer with only the kept tokens, under their new ids."""
    model = dict(content["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {t: new_id[i] for t, i in model["vocab"].items() if i in new_id}
    else:
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new_id]
    if model.get("unk_id") is not None:
        model["unk_id"] = new_id[model["unk_id"]]
    if model["type"] == "BPE":
        vocabulary = model["vocab"]
        model["merges"] = [
            pair
            for pair, result in _merges(model)
            if all(token in vocabulary for token in (*pair, result))
        ]
    return {
        **content,
        "model": model,
        "added_tokens": [{**token, "id": new_id[token["id"]]} for token in content["added_tokens"]],
        "post_processor": _renumbered_processor(content["post_processor"], new_id),
        "padding": None,
        "truncation": None,
    }


def _renumbered_processor(processor: Any, new_id: dict[int, int]) -> Any:
    """A post-processor of any kind with the new ids of its special tokens."""
    if processor is None:
        return None
    processor = dict(processor)
    if "processors" in processor:  # a sequence of processors
        processor["processors"] = [
            _renumbered_processor(part, new_id) for part in processor["processors"]
        ]
    if isinstance(processor.get("special_tokens"), dict):  # a template
        processor["special_tokens"] = {
            name: {**token, "ids": [new_id[i] for i in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    for key in ("cls", "sep"):  # BERT's and RoBERTa's: token and id
        if key in processor:
            token, number = processor[key]
            processor[key] = [token, new_id[number]]
    return processor


def _reloaded(tokenizer: Any, content: dict[str, Any], name: str) -> Any:
    """A transformers tokenizer with new content, as it will be loaded from the saved folder."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder, "tokenizer.json")
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        settings = Path(folder, "tokenizer_config.json")
        # Old files repeat the added tokens there, under their old ids.
        rest = json.loads(settings.read_text(encoding="utf-8"))
        rest.pop("added_tokens_decoder", None)
        settings.write_text(json.dumps(rest, ensure_ascii=False, indent=2), encoding="utf-8")
        reloaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    reloaded.name_or_path = tokenizer.name_or_path
    expected = _ids(content["model"]) | {t["content"]: t["id"] for t in content["added_tokens"]}
    if reloaded.get_vocab() != expected:
        raise ModelError(f"{name}: transformers does not load its tokenizer with fewer tokens.")
    return reloaded
