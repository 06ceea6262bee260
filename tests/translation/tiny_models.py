"""Tiny translation models with random weights and real tokenizers."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
)

_SHAPE = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "max_position_embeddings": 128, "init_std": 1.0,
}  # fmt: skip
_SENTENCES = [
    "A man in a red shirt is riding a bicycle.",
    "Two dogs are running across the green field.",
    "There is exactly one blue square under the yellow star.",
    "Ein Mann in einem roten Hemd fährt Fahrrad.",
    "Zwei Hunde laufen über die grüne Wiese, 12 Kinder sehen zu!",
    "The woman is not sleeping; she cooks dinner for 3 people.",
]


def _write_vocabulary(folder: Path, spm: str, *special: str, last: tuple[str, ...] = ()) -> Any:
    """Trains sentencepiece, writes `spm` and vocab.json, and returns the numbers of the pieces."""
    folder.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES * 20), model_writer=model, vocab_size=120,
        hard_vocab_limit=False, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    (folder / spm).write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(index) for index in range(3, processor.get_piece_size())]
    vocab = {piece: index for index, piece in enumerate([*special, *pieces, *last])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    return vocab


def make_marian(folder: Path, languages: tuple[str, ...] = ()) -> Path:
    """An OPUS-MT-like folder; a multilingual one with `languages` such as `deu`."""
    tags = [f">>{language}<<" for language in languages]
    vocab = _write_vocabulary(folder, "source.spm", "</s>", "<unk>", *tags, last=("<pad>",))
    shutil.copy(folder / "source.spm", folder / "target.spm")
    files = (str(folder / name) for name in ("source.spm", "target.spm", "vocab.json"))
    MarianTokenizer(*files).save_pretrained(folder)
    torch.manual_seed(0)
    config = MarianConfig(
        **_SHAPE,
        vocab_size=len(vocab),
        pad_token_id=vocab["<pad>"],
        eos_token_id=0,
        bos_token_id=0,
        decoder_start_token_id=vocab["<pad>"],
        forced_eos_token_id=0,
        scale_embedding=True,
    )
    MarianMTModel(config).save_pretrained(folder)
    return folder


def make_m2m100(folder: Path) -> Path:
    """A folder like that of `facebook/m2m100_418M`, with all its hundred languages."""
    spm = "sentencepiece.bpe.model"
    vocab = _write_vocabulary(folder, spm, "<s>", "<pad>", "</s>", "<unk>")
    tokenizer = M2M100Tokenizer(str(folder / "vocab.json"), str(folder / spm))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = M2M100Config(**_SHAPE, vocab_size=len(vocab) + 100 + tokenizer.num_madeup_words)
    M2M100ForConditionalGeneration(config).save_pretrained(folder)
    return folder
