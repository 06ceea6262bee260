"""Tiny translation models with random weights and real tokenizers, made on the fly."""

from __future__ import annotations

import io
import json
from pathlib import Path

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


def _sentencepiece_model(vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES * 20),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    return model.getvalue()


def _pieces(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(index) for index in range(3, processor.get_piece_size())]


def make_marian(folder: Path, languages: tuple[str, ...] = ()) -> Path:
    """An OPUS-MT-like folder; `languages` are the codes of a multilingual one (`deu`)."""
    folder.mkdir(parents=True)
    spm = _sentencepiece_model(120)
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(spm)
    tags = [f">>{language}<<" for language in languages]
    names = ["</s>", "<unk>", *tags, *_pieces(spm)]
    vocab = {piece: index for index, piece in enumerate([*names, "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = MarianTokenizer(
        str(folder / "source.spm"), str(folder / "target.spm"), str(folder / "vocab.json")
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = MarianMTModel(
        MarianConfig(
            **_SHAPE,
            vocab_size=len(vocab),
            pad_token_id=vocab["<pad>"],
            eos_token_id=0,
            bos_token_id=0,
            decoder_start_token_id=vocab["<pad>"],
            forced_eos_token_id=0,
            scale_embedding=True,
        )
    )
    model.save_pretrained(folder)
    return folder


def make_m2m100(folder: Path) -> Path:
    """A folder like that of `facebook/m2m100_418M`, all hundred languages included."""
    folder.mkdir(parents=True)
    spm = _sentencepiece_model(120)
    (folder / "sentencepiece.bpe.model").write_bytes(spm)
    names = ["<s>", "<pad>", "</s>", "<unk>", *_pieces(spm)]
    vocab = {piece: index for index, piece in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = M2M100Tokenizer(str(folder / "vocab.json"), str(folder / "sentencepiece.bpe.model"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = M2M100ForConditionalGeneration(
        M2M100Config(**_SHAPE, vocab_size=len(vocab) + 100 + tokenizer.num_madeup_words)
    )
    model.save_pretrained(folder)
    return folder
