"""Training only the word vectors that the data use.

Half of a multilingual encoder's weights are vectors of tokens that never occur in one language's
data: mBERT has 119,547 of them, a hundred thousand sentences use a tenth. Their gradient is zero,
yet the optimiser would read and write them, and its two moments, in every step, and every saved
state would hold them.

Legend: V vocabulary · K kept tokens · H hidden width.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
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
    """Within the block, an encoder has word vectors for the tokens of some sentences only.

    The optimiser works on each weight by itself, so the K kept vectors are trained as they would
    be among all V. The others stay as they are; in the whole table weight decay alone would have
    moved them. Afterwards the encoder is whole again, whatever happened in the block.

    Args:
        encoder: left alone if its word vectors are not a plain table.
        tables: all sentences that the encoder will be given in the block.
        translator: H → H without bias, which the word vectors pass through within the block;
            afterwards all V are what it makes of them.
    """
    whole = encoder.backbone.get_input_embeddings()
    if type(whole) is not nn.Embedding:
        yield
        return
    always = [encoder.pad_id] + ([] if whole.padding_idx is None else [whole.padding_idx])
    if not encoder.packs:
        # Some count positions over the ids that are not padding's: no other token may take its id.
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
    """The vectors of the kept tokens, in order; the padding token is among them."""
    padding = whole.padding_idx
    return nn.Embedding(
        len(kept),
        whole.embedding_dim,
        padding_idx=None if padding is None else int(np.searchsorted(kept, padding)),
        _weight=whole.weight.detach()[torch.from_numpy(kept).to(whole.weight.device)],
    ).requires_grad_(whole.weight.requires_grad)


#: Special ids that a model's own configuration names.
_CONFIG_IDS = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")


def trim_vocabulary(
    encoder: SentenceEncoder, used: npt.NDArray[np.integer[Any]], name: str
) -> npt.NDArray[np.intp]:
    """Reduces an encoder, in place, to the tokens some text uses.

    Special tokens and single characters (or bytes) are kept with them.

    Args:
        encoder: its tokenizer, word vectors and configured ids are replaced.
        used: ids that the text uses.
        name: of the encoder, to find the rest again.

    Returns:
        (V,) the new id of every old one; -1 where it is gone.

    Raises:
        ModelError: its tokenizer is of a kind that cannot be trimmed, or it is trimmed already.
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
    """Used tokens, and all that must stay with them."""
    model = content["model"]
    kind = model.get("type")
    if kind not in ("WordPiece", "Unigram", "BPE"):
        raise ModelError(
            f"{name}: --trim-vocabulary knows WordPiece, Unigram and BPE tokenizers, not {kind}."
        )
    ids = _ids(model)
    kept = used | {token["id"] for token in content["added_tokens"]}
    affixes = ("Ġ", "▁", model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    kept |= {i for token, i in ids.items() if _is_single(token, affixes)}
    unknown = model.get("unk_id") if kind == "Unigram" else ids.get(model.get("unk_token"))
    if unknown is not None:
        kept.add(unknown)
    if kind == "Unigram":
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
    """Whether a token is one character (with or without a mark of its place), or one byte."""
    if len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">"):
        return True
    for affix in affixes:
        if affix and len(token) > len(affix):
            token = token.removeprefix(affix).removesuffix(affix)
    return len(token) <= 1


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Merges in order; older files write a pair as one string."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second) for first, second in pairs]


def _joined(first: str, second: str, model: dict[str, Any]) -> str:
    """What a merge makes of two tokens: the mark of a continuation stands at the front only."""
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def _add_parts(kept: set[int], ids: dict[str, int], model: dict[str, Any]) -> None:
    """Adds the parts that kept tokens are merged from, and theirs."""
    made_of: dict[str, list[tuple[str, str]]] = {}
    for first, second in _merges(model):
        made_of.setdefault(_joined(first, second, model), []).append((first, second))
    names = {number: token for token, number in ids.items()}
    todo = [names[number] for number in kept if number in names]
    while todo:
        for pair in made_of.get(todo.pop(), ()):
            for part in pair:
                if ids[part] not in kept:
                    kept.add(ids[part])
                    todo.append(part)


def _renumbered(content: dict[str, Any], new_id: dict[int, int]) -> dict[str, Any]:
    """The tokenizer with the kept tokens only, under their new ids."""
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
            list(pair)
            for pair in _merges(model)
            if all(token in vocabulary for token in (*pair, _joined(*pair, model)))
        ]
    return {
        **content,
        "model": model,
        "added_tokens": [{**token, "id": new_id[token["id"]]} for token in content["added_tokens"]],
        "post_processor": _renumbered_processor(content["post_processor"], new_id.__getitem__),
        "padding": None,
        "truncation": None,
    }


def _renumbered_processor(processor: Any, new_id: Callable[[int], int]) -> Any:
    """A post-processor whose special tokens have their new ids, whatever its kind."""
    if processor is None:
        return None
    processor = dict(processor)
    if "processors" in processor:  # a sequence of them
        processor["processors"] = [
            _renumbered_processor(part, new_id) for part in processor["processors"]
        ]
    if isinstance(processor.get("special_tokens"), dict):  # a template
        processor["special_tokens"] = {
            name: {**token, "ids": [new_id(i) for i in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    for key in ("cls", "sep"):  # BERT's and RoBERTa's own: token and id
        if key in processor:
            token, number = processor[key]
            processor[key] = [token, new_id(number)]
    return processor


def _reloaded(tokenizer: Any, content: dict[str, Any], name: str) -> Any:
    """The transformers tokenizer of new content, as it will be loaded from the saved folder."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder, "tokenizer.json")
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        settings = Path(folder, "tokenizer_config.json")
        # Old files repeat the added tokens there, under their old ids.
        rest = json.loads(settings.read_text(encoding="utf-8"))
        rest.pop("added_tokens_decoder", None)
        settings.write_text(json.dumps(rest, ensure_ascii=False, indent=2), encoding="utf-8")
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    again.name_or_path = tokenizer.name_or_path
    expected = _ids(content["model"]) | {t["content"]: t["id"] for t in content["added_tokens"]}
    if again.get_vocab() != expected:
        raise ModelError(f"{name}: transformers does not load its tokenizer with fewer tokens.")
    return again
