"""Small new models and their tokenizers, for worlds too small to need pretrained ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)

from clseave_cli.core.models.weights import quiet


@dataclass(frozen=True)
class ClipShape:
    """Size of a new CLIP model; both towers are equally wide."""

    image_size: int = 64
    patch_size: int = 16
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    embedding_dim: int = 128
    max_tokens: int = 77
    vocab_size: int = 1000


@quiet()
def new_clip(
    folder: Path, captions: Iterable[str], shape: ClipShape = ClipShape(), seed: int = 0
) -> None:
    """Writes a random CLIP model, with a byte-level BPE tokenizer trained on captions."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # Every byte also at the end of a word, so that no text is unknown. Passed as special tokens,
    # because the trainer numbers what it finds in an order that differs from run to run.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab_size - 2,
        initial_alphabet=alphabet,
        special_tokens=[byte + "</w>" for byte in alphabet],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    vocabulary = tokenizer.get_vocab()
    # The terminal token is last, because CLIP's old configuration takes the highest id for it.
    vocabulary[start], vocabulary[end] = len(vocabulary), len(vocabulary) + 1
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    clip_tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    clip_tokenizer.model_max_length = shape.max_tokens
    tower = {
        "hidden_size": shape.width,
        "intermediate_size": 2 * shape.width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "projection_dim": shape.embedding_dim,
    }
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": shape.max_tokens,
            "bos_token_id": clip_tokenizer.bos_token_id,
            "eos_token_id": clip_tokenizer.eos_token_id,
            "pad_token_id": clip_tokenizer.pad_token_id,
        },
        vision_config={**tower, "image_size": shape.image_size, "patch_size": shape.patch_size},
        projection_dim=shape.embedding_dim,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
    model.save_pretrained(folder)
    clip_tokenizer.save_pretrained(folder)
    size = {"height": shape.image_size, "width": shape.image_size}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)


@quiet()
def new_encoder(
    folder: Path,
    sentences: Iterable[str],
    *,
    width: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    vocab_size: int = 2000,
    max_tokens: int = 128,
    seed: int = 0,
) -> None:
    """Writes a random small BERT, with a cased WordPiece tokenizer trained on sentences."""
    texts = list(sentences)
    empty = BertTokenizer(do_lower_case=False, strip_accents=False)
    trained, special = empty.backend_tokenizer, empty.get_vocab()
    # Passed as special tokens, as in `new_clip`.
    continuations = {
        f"##{character}"
        for text in map(trained.normalizer.normalize_str, texts)
        for word, _ in trained.pre_tokenizer.pre_tokenize_str(text)
        for character in word[1:]
    }
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*sorted(special, key=special.__getitem__), *sorted(continuations)],
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    tokenizer = BertTokenizer(vocab=trained.get_vocab(), do_lower_case=False, strip_accents=False)
    tokenizer.model_max_length = max_tokens
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=2 * width,
        max_position_embeddings=max_tokens,
        pad_token_id=tokenizer.pad_token_id,
        # BERT's 0.02 is meant for wide models. In a narrow one, all attention starts out uniform,
        # and some students took epochs to leave that plateau.
        initializer_range=width**-0.5,
        # Small models on small worlds underfit; dropout would only slow them down.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
