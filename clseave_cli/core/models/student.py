"""The student: a multilingual encoder that writes into the teacher's space (thesis 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from clseave_cli.core.models import backbones
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.folder import is_of_format, peek, seal, unsealed
from clseave_cli.core.models.weights import load_weights, save_weights
from clseave_cli.errors import ModelError

FORMAT = "student"


def new_student(name: str | Path, embedding_dim: int) -> SentenceEncoder:
    """A student around a pretrained encoder; LayerNorm and projection are untrained.

    Encoder → LayerNorm → terminal token → linear without bias (thesis 3.3.1; the [SEP] token, not
    [CLS]). The normalisation is applied to the terminal token alone, which is the same and cheaper.

    Args:
        name: hub id or folder of any bidirectional encoder with a fast tokenizer.
        embedding_dim: D, width of the teacher's embeddings.

    Raises:
        ModelError: the encoder cannot be loaded.
    """
    return _student(*backbones.load_encoder(name), embedding_dim)


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
        student = _student(model, tokenizer, config["embedding_dim"])
        load_weights(_added_parts(student), folder / "projection.safetensors")
        student.packs = config.get("packs", True)
    student.fingerprint = config["fingerprint"]
    return student.eval()


def save_student(
    student: SentenceEncoder, folder: Path, *, languages: Sequence[str], teacher: str
) -> str:
    """Writes a student into an existing folder; returns its fingerprint."""
    student.save_pretrained(folder / "encoder")
    save_weights(_added_parts(student), folder / "projection.safetensors")
    return seal(
        folder,
        FORMAT,
        {
            "languages": list(languages),
            "pooling": "terminal",
            "packs": student.packs,
            "embedding_dim": student.embedding_dim,
            "teacher": teacher,
        },
    )


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


def _student(model: Any, tokenizer: Any, embedding_dim: int) -> SentenceEncoder:
    width = model.config.hidden_size
    student = SentenceEncoder(
        model,
        tokenizer,
        nn.LayerNorm(width),
        nn.Linear(width, embedding_dim, bias=False),
        hub_model=model,
        causal=False,
        max_tokens=backbones.max_tokens(model, tokenizer),
        first_position=backbones.first_position(model),
        terminal_id=backbones.terminal_id(tokenizer),
    )
    return student


def _added_parts(student: SentenceEncoder) -> nn.ModuleDict:
    """What the student adds to its encoder."""
    return nn.ModuleDict({"layer_norm": student.norm, "projection": student.projection})
