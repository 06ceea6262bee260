"""Tiny models of every layout that clseave reads, with random weights and real tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import tiny_world
import torch

#: Longest text of every model here, terminal token included.
MAX_TOKENS = 24
EMBEDDING_DIM = 16

_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2, "hidden_act": "gelu"}  # fmt: skip
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_NO_POOLING = {"add_pooling_layer": False}
_IMAGE = {"image_size": 32, "patch_size": 16}


def save_word_tokenizer(
    folder: Path, sentences: Iterable[str], *, special: dict[str, str], template: str
) -> Any:
    """Writes a tokenizer that splits the words of `sentences` at spaces.

    Args:
        special: token by its role in transformers; numbered in this order.
        template: how a text is framed, such as `<s> $A </s>`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = list(dict.fromkeys(special.values()))
    words = sorted({word for text in sentences for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(tokens + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in tokens]
    )
    written = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_TOKENS, **special
    )
    written.save_pretrained(folder)
    return written


_ROBERTA_TOKENS = {"bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>",
                   "eos_token": "</s>", "sep_token": "</s>", "unk_token": "<unk>"}  # fmt: skip
_GEMMA_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>",
                 "unk_token": "<unk>"}  # fmt: skip
_DEBERTA_TOKENS = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]",
                   "unk_token": "[UNK]"}  # fmt: skip

_save_roberta_tokenizer = partial(
    save_word_tokenizer, special=_ROBERTA_TOKENS, template="<s> $A </s>"
)
_save_deberta_tokenizer = partial(
    save_word_tokenizer, special=_DEBERTA_TOKENS, template="[CLS] $A [SEP]"
)
_save_mmbert_tokenizer = partial(
    save_word_tokenizer, special=_GEMMA_TOKENS, template="<bos> $A <eos>"
)


def _bert(folder: Path, sentences: Iterable[str]) -> Path:
    return tiny_world.write_encoder(folder, sentences, max_tokens=MAX_TOKENS)


def _save_bert_tokenizer(folder: Path, sentences: Iterable[str]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_bert(folder, sentences))


def _save(folder: Path, model: Any, processor: Any = None, factor: float = 3.0) -> Path:
    """Writes a model with weights and biases large enough that embeddings differ."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "projection" not in name:
                weight.mul_(factor)
            elif name.endswith("bias"):
                weight.normal_(std=0.3)  # as training leaves them
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def new_clip(folder: Path, sentences: Iterable[str]) -> Path:
    shape = {"max_tokens": MAX_TOKENS, "embedding_dim": EMBEDDING_DIM}
    return tiny_world.write_clip(folder, sentences, **shape)


def _save_gemma_tokenizer(folder: Path, sentences: Iterable[str]) -> Any:
    """SigLIP 2's: lower-cased, without a first token, padded on the left as the class does."""
    from tokenizers import Tokenizer, models, normalizers, processors, trainers
    from transformers import Siglip2Tokenizer

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(" ", "▁")]
    )
    special = [*_GEMMA_TOKENS.values(), "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    trained.train_from_iterator(sentences, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Siglip2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    tokenizer.model_max_length = MAX_TOKENS
    tokenizer.save_pretrained(folder)
    return tokenizer


def _siglip_text(tokenizer: Any) -> dict[str, Any]:
    return {
        **_TOWER,
        "hidden_size": EMBEDDING_DIM,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "projection_size": EMBEDDING_DIM,
        "pad_token_id": tokenizer.pad_token_id,
    }


def new_siglip(folder: Path, sentences: Iterable[str], **text: Any) -> Path:
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    tokenizer = save_word_tokenizer(folder, sentences, special=_GEMMA_TOKENS, template="$A <eos>")
    torch.manual_seed(0)
    config = SiglipConfig(
        text_config=_siglip_text(tokenizer) | text,
        vision_config={**_TOWER, **_IMAGE, "hidden_size": EMBEDDING_DIM},
    )
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return _save(folder, SiglipModel(config), processor, factor=1.0)


def new_siglip2(folder: Path, sentences: Iterable[str]) -> Path:
    """SigLIP 2 that keeps the proportions of pictures (NaFlex)."""
    from transformers import Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model

    tokenizer = _save_gemma_tokenizer(folder, sentences)
    torch.manual_seed(0)
    config = Siglip2Config(
        text_config=_siglip_text(tokenizer),
        vision_config=_TOWER | {"hidden_size": EMBEDDING_DIM, "patch_size": 8, "num_patches": 16},
    )
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    return _save(folder, Siglip2Model(config), processor, factor=1.0)


def _teacher(
    kind: str,
    processor_kind: str,
    save_tokenizer: Callable[[Path, Iterable[str]], Any],
    max_positions: int = MAX_TOKENS,
    **text: Any,
) -> Callable[[Path, Iterable[str]], Path]:
    """Returns a function that writes a CLIP of a kind, such as `AltCLIP`."""

    def make(folder: Path, sentences: Iterable[str]) -> Path:
        import transformers

        tokenizer = save_tokenizer(folder, sentences)
        torch.manual_seed(0)
        tower = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": max_positions,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = getattr(transformers, f"{kind}Config")(
            text_config=_TOWER | _NO_DROPOUT | tower | text,
            vision_config={**_TOWER, **_IMAGE, "projection_dim": EMBEDDING_DIM},
            projection_dim=EMBEDDING_DIM,
        )
        size = {"height": 32, "width": 32}
        processor = getattr(transformers, f"{processor_kind}ImageProcessorPil")
        model = getattr(transformers, f"{kind}Model")(config)
        return _save(folder, model, processor(size=size, crop_size=size))

    return make


def new_vit(folder: Path) -> Path:
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(0)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return _save(folder, ViTModel(ViTConfig(**_TOWER, **_IMAGE)), processor)


def new_dual_encoder(folder: Path, sentences: Iterable[str]) -> Path:
    """A BERT read through its pooling layer, as LaBSE is, and a ViT."""
    from clseave_cli.core.models.backbones import new_dual_encoder as join

    text = STUDENTS["LaBSE"](folder.with_name("text"), sentences)
    torch.manual_seed(0)
    model, encoder, image = join(str(text), str(new_vit(folder.with_name("vit"))), EMBEDDING_DIM)
    model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    image.processor.save_pretrained(folder)
    return folder


#: Teachers by the `model_type` of their configuration.
TEACHERS: dict[str, Callable[[Path, Iterable[str]], Path]] = {
    "clip": new_clip,
    "siglip": new_siglip,
    "siglip2": new_siglip2,
    "chinese_clip": _teacher("ChineseCLIP", "ChineseCLIP", _save_bert_tokenizer),
    "altclip": _teacher("AltCLIP", "CLIP", _save_roberta_tokenizer, MAX_TOKENS + 2, project_dim=24),
    "metaclip_2": _teacher("MetaClip2", "CLIP", _save_roberta_tokenizer, bos_token_id=0,
                           eos_token_id=2, projection_dim=EMBEDDING_DIM),
    "vision-text-dual-encoder": new_dual_encoder,
}  # fmt: skip


def _student(
    kind: str,
    save_tokenizer: Callable[[Path, Iterable[str]], Any],
    tower: dict[str, Any] = _TOWER | _NO_DROPOUT,
    max_positions: int = MAX_TOKENS,
    model: dict[str, bool] | None = None,
    **shape: Any,
) -> Callable[[Path, Iterable[str]], Path]:
    """Returns a function that writes an encoder.

    Args:
        kind: prefix of its classes in transformers, such as `Bert`.
        save_tokenizer: writes its tokenizer.
        tower: width, layers and heads, with the names that its configuration uses.
        max_positions: rows of its position table.
        model: more arguments of its model class.
        shape: more keys of its configuration.
    """

    def make(folder: Path, sentences: Iterable[str]) -> Path:
        import transformers

        tokenizer = save_tokenizer(folder, sentences)
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(
            **tower,
            vocab_size=len(tokenizer),
            max_position_embeddings=max_positions,
            pad_token_id=tokenizer.pad_token_id,
            **shape,
        )
        encoder = getattr(transformers, f"{kind}Model")(config, **model or {})
        return _save(folder, encoder, factor=9.0)

    return make


def new_mpnet(
    folder: Path, sentences: Iterable[str], special: dict[str, str] = _ROBERTA_TOKENS
) -> Path:
    """Positions start where RoBERTa's do; a bias depends on places in the row, too."""
    save_tokenizer = partial(save_word_tokenizer, special=special, template="<s> $A </s>")
    pad = list(dict.fromkeys(special.values())).index(special["pad_token"])
    make = _student("MPNet", save_tokenizer, max_positions=MAX_TOKENS + pad + 1, model=_NO_POOLING)
    return make(folder, sentences)


#: mDeBERTa takes no mask of token pairs; MPNet's bias reaches across sentences.
CANNOT_BE_PACKED = ("mDeBERTa", "MPNet")

#: Students by the name of the model that they are like.
STUDENTS: dict[str, Callable[[Path, Iterable[str]], Path]] = {
    "mBERT": _bert,
    "DistilmBERT": _student(
        "DistilBert", _save_bert_tokenizer,
        {"n_layers": 2, "n_heads": 2, "dim": 32, "hidden_dim": 64, "dropout": 0.0,
         "attention_dropout": 0.0},
    ),
    # Positions of both start where RoBERTa's do; data2vec is saved with its pooling layer.
    "XLM-R": _student("XLMRoberta", _save_roberta_tokenizer, max_positions=MAX_TOKENS + 2,
                      model=_NO_POOLING, type_vocab_size=1),
    "data2vec": _student("Data2VecText", _save_roberta_tokenizer, max_positions=MAX_TOKENS + 2,
                         type_vocab_size=1),
    # A BERT, saved with its pooling layer.
    "LaBSE": _student("Bert", _save_bert_tokenizer),
    "MPNet": new_mpnet,
    # As mDeBERTa-v3: relative positions only, in buckets, shared with the content.
    "mDeBERTa": _student(
        "DebertaV2", _save_deberta_tokenizer, relative_attention=True, position_buckets=8,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type="p2c|c2p",
        position_biased_input=False, type_vocab_size=0,
    ),
    # A ModernBERT with Gemma's special tokens, and windows shorter than a text.
    "mmBERT": _student(
        "ModernBert", _save_mmbert_tokenizer,
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
         "num_attention_heads": 2},
        local_attention=8, eos_token_id=1, bos_token_id=2, cls_token_id=2, sep_token_id=1,
    ),
}  # fmt: skip


def embeddings(encoder: Any, texts: Iterable[str]) -> torch.Tensor:
    """(B, D) embeddings of texts by a sentence encoder of the package."""
    with torch.no_grad():
        return torch.cat(list(encoder.embed(encoder.tokenize(texts))))
