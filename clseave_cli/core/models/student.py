"""The student: a multilingual encoder that writes into the teacher's space (thesis 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from clseave_cli.core.config import Pooling, Projection
from clseave_cli.core.models import backbones
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.folder import is_of_format, peek, seal, unsealed
from clseave_cli.core.models.tokens import Trimmed
from clseave_cli.core.models.trimming import restore_vocabulary
from clseave_cli.core.models.weights import load_weights, save_weights
from clseave_cli.errors import ModelError

FORMAT = "student"
_VOCABULARY = "vocabulary.safetensors"


def new_student(
    name: str | Path,
    embedding_dim: int,
    pooling: Pooling = "terminal",
    projection: Projection = "linear",
) -> SentenceEncoder:
    """A student around a pretrained encoder; LayerNorm and projection are untrained.

    Encoder → LayerNorm → terminal token → linear without bias (thesis 3.3.1; the [SEP] token, not
    [CLS]). The normalisation is applied to the terminal token alone, which is the same and cheaper;
    of a mean over tokens, to the mean.

    Args:
        name: hub id or folder of any bidirectional encoder with a fast tokenizer.
        embedding_dim: D, width of the teacher's embeddings.
        pooling: which hidden state stands for a sentence.
        projection: how it becomes the embedding.

    Raises:
        ModelError: the encoder cannot be loaded.
    """
    return _student(*backbones.load_encoder(name), embedding_dim, pooling, projection)


def load_student(folder: Path, teacher: str | None = None) -> SentenceEncoder:
    """Loads a folder that `save_student` wrote, in eval mode.

    Args:
        folder: the student's folder.
        teacher: fingerprint of the CLIP-VE it will be used with; None skips the check.

    Raises:
        ModelError: missing, damaged, or trained against another teacher.
    """
    with unsealed(folder, FORMAT) as config:
        if teacher is not None and config["teacher"] != teacher:
            raise ModelError(
                f"{folder}: this student was trained against another CLIP-VE "
                f"({config['teacher'][:12]}, here {teacher[:12]}); its embeddings mean nothing to "
                "this one. Align it again, or use the CLIP-VE it belongs to."
            )
        model, tokenizer = backbones.load_encoder(folder / "encoder")
        student = _student(
            model,
            tokenizer,
            config["embedding_dim"],
            config["pooling"],
            config.get("projection", "linear"),  # not named by earlier versions, which had no other
        )
        load_weights(_added_parts(student), folder / "projection.safetensors")
        if "vocabulary" in config:
            kept = load_file(folder / _VOCABULARY)["kept"].numpy()
            student.trimmed = Trimmed(kept, **config["vocabulary"])
        student.packs = config.get("packs", True)  # not named by earlier versions either
    student.fingerprint = config["fingerprint"]
    return student.eval()


def save_student(
    student: SentenceEncoder, folder: Path, *, languages: Sequence[str], teacher: str
) -> str:
    """Writes a student into an existing folder; returns its fingerprint."""
    student.save_pretrained(folder / "encoder")
    save_weights(_added_parts(student), folder / "projection.safetensors")
    vocabulary = {}
    if (trimmed := student.trimmed) is not None:
        save_file({"kept": torch.from_numpy(trimmed.kept)}, folder / _VOCABULARY)
        vocabulary = {"vocabulary": {"num_tokens": trimmed.num_tokens, "encoder": trimmed.encoder}}
    return seal(
        folder,
        FORMAT,
        {
            **vocabulary,
            "languages": list(languages),
            "pooling": student.pooling,
            "packs": student.packs,
            "projection": "mlp" if isinstance(student.projection, nn.Sequential) else "linear",
            "embedding_dim": student.embedding_dim,
            "teacher": teacher,
        },
    )


def restore_student(folder: Path, encoder: str | Path | None = None) -> SentenceEncoder:
    """A student of a trimmed vocabulary as if it had been trained without trimming, in eval mode.

    Args:
        folder: the student's folder.
        encoder: the encoder it was trained from; None: where it was then.

    Raises:
        ModelError: as `load_student`, or its vocabulary is whole, or that is another encoder.
    """
    student = load_student(folder)
    if student.trimmed is None:
        raise ModelError(f"{folder}: its vocabulary is whole already; nothing to restore.")
    kind: Projection = "mlp" if isinstance(student.projection, nn.Sequential) else "linear"
    whole = new_student(
        encoder or student.trimmed.encoder, student.embedding_dim, student.pooling, kind
    )
    return restore_vocabulary(student, whole).eval()


def find_students(runs: Path) -> dict[str, Path]:
    """The student folders under `runs`, by language; one of a single language goes first.

    A folder may have any name: what it holds, and for which languages, stands in its config.

    Raises:
        ModelError: a student's config is damaged, or a folder named as `align` does is no student.
    """
    found: dict[str, tuple[int, Path]] = {}
    for path in sorted(runs.glob("[!.]*/config.json")):
        if not (path.parent.name.startswith("align-") or is_of_format(path.parent, FORMAT)):
            continue
        languages = peek(path.parent, FORMAT)["languages"]
        for language in languages:
            if language not in found or len(languages) < found[language][0]:
                found[language] = (len(languages), path.parent)
    return {language: folder for language, (_, folder) in sorted(found.items())}


def _student(
    model: Any, tokenizer: Any, embedding_dim: int, pooling: Pooling, projection: Projection
) -> SentenceEncoder:
    width = model.config.hidden_size
    last = nn.Linear(width, embedding_dim, bias=False)
    return SentenceEncoder(
        model,
        tokenizer,
        nn.LayerNorm(width),
        last if projection == "linear" else nn.Sequential(nn.Linear(width, width), nn.GELU(), last),
        hub_model=model,
        causal=False,
        max_tokens=backbones.max_tokens(model, tokenizer),
        first_position=backbones.first_position(model),
        terminal_id=backbones.terminal_id(tokenizer),
        pooling=pooling,
    )


def _added_parts(student: SentenceEncoder) -> nn.ModuleDict:
    """What the student adds to its encoder."""
    return nn.ModuleDict({"layer_norm": student.norm, "projection": student.projection})
