"""The architectures of ViT-B/16 and mBERT with random weights and real vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)


def write_clip(folder: Path, vocabulary: Path, **layers: int) -> None:
    """Writes CLIP ViT-B/16, or one with fewer layers, with random weights."""
    tokenizer = CLIPTokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))
    config = CLIPConfig(
        text_config=layers, vision_config={"patch_size": 16, **layers}, projection_dim=512
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)


def write_bert(folder: Path, vocabulary: Path, **shape: Any) -> None:
    """Writes mBERT (cased), or a BERT of another shape, with random weights."""
    tokenizer = BertTokenizer(str(vocabulary), do_lower_case=False)
    config = BertConfig(vocab_size=len(tokenizer), **shape)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
