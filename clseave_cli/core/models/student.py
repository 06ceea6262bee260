"""The student: a multilingual encoder that maps into the teacher's space (thesis 3.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from clseave_cli.core.config import Code, Pooling, SentenceToken, TokenReader, TokenTarget
from clseave_cli.core.models import backbones
from clseave_cli.core.models.calibration import write_fitted
from clseave_cli.core.models.encoders import SentenceEncoder, backbone_digest
from clseave_cli.core.models.folder import peek, seal, unsealed
from clseave_cli.core.models.tokens import Trimmed
from clseave_cli.core.models.weights import load_weights, save_weights
from clseave_cli.errors import ModelError

FORMAT = "student"
_VOCABULARY = "vocabulary.safetensors"


@dataclass(frozen=True)
class Coding:
    """How a student of the token method turns its states into the teacher's."""

    code: Code  # whether codes can be negative
    width: int  # K, of the teacher's states
    norm_eps: float | None  # of the teacher's last normalisation, if it is applied to the code
    # Folders of earlier versions lack the following.
    pools: bool = False  # the sentence's state first passes through BERT's pooling layer
    reader: TokenReader = "projection"  # how a code becomes an embedding

    @property
    def reads_states(self) -> bool:
        """Whether the teacher's last layers are padded to read H numbers instead of a code's K."""
        return self.reader in ("padded", "decoder")


class CodedState(nn.Module):
    """The layers between a token student's state and its projection."""

    def __init__(self, state_width: int, coding: Coding) -> None:
        super().__init__()
        self.coding = coding
        self.pooler: nn.Module = nn.Identity()
        if coding.pools:  # as BERT does; token pairs bypass it
            self.pooler = nn.Sequential(nn.Linear(state_width, state_width), nn.Tanh())
        self.coder = coder(state_width, coding.width, coding.code)  # trained on token pairs
        self.decoder: nn.Module = nn.Identity()
        if coding.reader == "decoder":  # the autoencoder's
            self.decoder = coder(coding.width, state_width, coding.code)
        self.width = state_width if coding.reads_states else coding.width
        self.final_norm: nn.Module = nn.Identity()
        if coding.norm_eps is not None:  # the teacher's
            self.final_norm = nn.LayerNorm(self.width, eps=coding.norm_eps)

    def forward(self, states: Tensor) -> Tensor:
        """(B, width) from (B, H)."""
        read: Tensor = self.pooler(states)
        if self.coding.reader != "padded":
            read = self.decoder(self.coder(read))
        normalised: Tensor = self.final_norm(read)
        return normalised


def new_student(
    name: str | Path, embedding_dim: int, pooling: Pooling = "terminal"
) -> SentenceEncoder:
    """A student around a pretrained encoder; LayerNorm and projection are untrained.

    Encoder → LayerNorm → terminal token → linear without bias (thesis 3.3.1; the [SEP] token, not
    [CLS]). The normalisation is applied after pooling: the same for one token, and cheaper. Any
    bidirectional encoder with a fast tokenizer will do.

    Raises:
        ModelError: the encoder cannot be loaded.
    """
    return _student(*backbones.load_encoder(name), embedding_dim, pooling)


def new_token_student(
    name: str | Path,
    teacher: SentenceEncoder,
    code: Code,
    *,
    target: TokenTarget = "normalised",
    reader: TokenReader = "projection",
    sentence_token: SentenceToken = "terminal",
) -> SentenceEncoder:
    """A student of the token method (thesis 3.2), trained to code each token as the teacher does.

    Encoder → code → (the teacher's last normalisation →) the teacher's projection. The teacher's
    layers are copied and frozen.

    Args:
        name: hub id or folder of any bidirectional encoder with a fast tokenizer.
        teacher: the text tower to imitate.
        code: whether codes can be negative.
        target: whether codes imitate the teacher's states before or after its last normalisation;
            if before, it is applied to the code.
        reader: how a code becomes an embedding. An autoencoder's decoder is untrained here.
        sentence_token: whose code represents a sentence.

    Raises:
        ModelError: the encoder cannot be loaded or has no pooling layer, the teacher's text tower
            does not end like CLIP's, or the reader does not fit the widths.
    """
    last = getattr(teacher.backbone, "final_layer_norm", None)
    if not (
        isinstance(last, nn.LayerNorm)
        and isinstance(teacher.norm, nn.Identity)
        and isinstance(teacher.projection, nn.Linear)
        and teacher.projection.bias is None
    ):
        raise ModelError(
            "the token method needs a teacher whose text tower ends in a normalisation of every "
            "token and one projection, as CLIP's does; --method sentence does not."
        )
    pools = sentence_token == "pooler"
    reads_norm = reader in ("padded", "decoder") or (reader, target) == ("projection", "encoder")
    coding = Coding(code, len(last.weight), last.eps if reads_norm else None, pools, reader)
    pooling: Pooling = "terminal" if sentence_token == "terminal" else "cls"
    model, tokenizer = backbones.load_encoder(name)
    state_width = model.config.hidden_size
    if reader == "code" and coding.width != teacher.embedding_dim:
        raise ModelError(
            f"--token-reader code: the head reads {teacher.embedding_dim} numbers, but a code of "
            f"this teacher has {coding.width}; use --token-reader projection."
        )
    if coding.reads_states and state_width < coding.width:
        raise ModelError(
            f"--token-reader {reader}: pads the teacher's {coding.width} numbers to the width of "
            f"the student's states, which is {state_width}; use a wider --student."
        )
    student = _student(model, tokenizer, teacher.embedding_dim, pooling, coding=coding)
    if pools:
        student.norm.pooler[0].load_state_dict(backbones.load_pooler(name).state_dict())
    matrix = torch.eye(coding.width) if reader == "code" else teacher.projection.weight
    copied = [(student.projection.weight, matrix)]
    if reads_norm:
        norm = student.norm.final_norm
        copied += [(norm.weight, last.weight), (norm.bias, last.bias)]
    with torch.no_grad():
        for part, original in copied:
            part.copy_(functional.pad(original, (0, part.shape[-1] - original.shape[-1])))
            part.requires_grad_(False)
    return student


def load_student(folder: Path, teacher: str | None = None) -> SentenceEncoder:
    """Loads a folder that `save_student` wrote, in eval mode.

    A `teacher`, the fingerprint of a CLIP-VE, must be the one it was trained against.

    Raises:
        ModelError: missing, damaged, or trained against another teacher.
    """
    if teacher is not None:
        require_teacher(folder, teacher)
    with unsealed(folder, FORMAT) as config:
        if config.get("projection", "linear") != "linear":
            raise ModelError(
                f"{folder}: its projection is of a kind that this clseave no longer has (mlp); "
                "align it again."
            )
        model, tokenizer = backbones.load_encoder(folder / "encoder")
        student = _student(
            model,
            tokenizer,
            config["embedding_dim"],
            config["pooling"],
            Coding(**config["coding"]) if "coding" in config else None,
            config,
            added_on="meta",  # its config may claim larger sizes than its file has
        )
        load_weights(_added_parts(student), folder / "projection.safetensors")
        if "vocabulary" in config:
            kept = load_file(folder / _VOCABULARY)["kept"].numpy()
            student.trimmed = Trimmed(kept, **config["vocabulary"])
    student.fingerprint = config["fingerprint"]
    student.pretrained = config.get("pretrained", "")
    return student.eval()


def init_student(
    folder: Path, name: str | Path, *, teacher: str, keep_words: bool
) -> tuple[SentenceEncoder, Tensor]:
    """A student initialised from a trained one of another language ("all for one").

    Args:
        folder: the trained student's folder; its vocabulary may be trimmed.
        name: hub id or folder of the pretrained encoder that it was trained from.
        teacher: fingerprint of the CLIP-VE.
        keep_words: keep its word vectors instead of resetting them to the pretrained ones.

    Returns:
        The student, and the trained word vectors, (V, H).

    Raises:
        ModelError: as `load_student`, or it was trained from another encoder or by the token
            method.
    """
    require_teacher(folder, teacher)
    config = peek(folder, FORMAT)
    if "coding" in config:
        raise ModelError(f"{folder}: a student of --method token; --init-from needs a sentence's.")
    student = restore_student(folder, name) if "vocabulary" in config else load_student(folder)
    model, tokenizer = backbones.load_encoder(name)
    digest, pretrained = backbone_digest(model), model.get_input_embeddings().weight
    words = student.backbone.get_input_embeddings().weight
    if (
        config.get("pretrained", digest) != digest
        or words.shape != pretrained.shape
        or tokenizer.get_vocab() != student.tokenizer.get_vocab()
    ):
        raise ModelError(
            f"{folder}: was trained from another encoder than {name}, whose word vectors mean "
            "nothing to it; name the encoder it was trained from with --student."
        )
    student.fingerprint, student.pretrained = "", digest
    trained = words.detach().clone()
    if not keep_words:
        with torch.no_grad():
            words.copy_(pretrained)
    return student, trained


def save_student(
    student: SentenceEncoder,
    folder: Path,
    *,
    languages: Sequence[str],
    teacher: str,
    dev: Mapping[str, float] | None = None,
) -> str:
    """Writes a student and the temperatures in its dev metrics; returns its fingerprint."""
    student.save_pretrained(folder / "encoder")
    save_weights(_added_parts(student), folder / "projection.safetensors")
    config: dict[str, Any] = {
        "languages": list(languages),
        "pooling": student.pooling,
        **student.packing,
        "projection": "linear",  # for earlier versions, which had another
        "embedding_dim": student.embedding_dim,
        "teacher": teacher,
    }
    if student.pretrained:
        config["pretrained"] = student.pretrained
    if (trimmed := student.trimmed) is not None:
        save_file({"kept": torch.from_numpy(trimmed.kept)}, folder / _VOCABULARY)
        config["vocabulary"] = {"num_tokens": trimmed.num_tokens, "encoder": trimmed.encoder}
    if isinstance(student.norm, CodedState):
        config["coding"] = dataclasses.asdict(student.norm.coding)
    fingerprint = seal(folder, FORMAT, config)
    write_fitted(folder, languages, dev or {})
    return fingerprint


def restore_student(folder: Path, encoder: str | Path | None = None) -> SentenceEncoder:
    """Loads a student and undoes the trimming of its vocabulary, in eval mode.

    `encoder` is the one it was trained from; by default it is looked up under its name in training.

    Raises:
        ModelError: as `load_student`, or its vocabulary is whole, or it is another encoder.
    """
    student = load_student(folder)
    trimmed = student.trimmed
    if trimmed is None:
        raise ModelError(f"{folder}: its vocabulary is whole already; nothing to restore.")
    whole = _student(
        *backbones.load_encoder(encoder or trimmed.encoder),
        student.embedding_dim,
        student.pooling,
        student.norm.coding if isinstance(student.norm, CodedState) else None,
        student.packing,
    )
    table = whole.backbone.get_input_embeddings()
    names = whole.tokenizer.convert_ids_to_tokens(trimmed.kept.tolist())
    if (
        table.num_embeddings != trimmed.num_tokens
        or names != student.tokenizer.convert_ids_to_tokens(list(range(len(names))))
    ):
        raise ModelError(
            f"{whole.tokenizer.name_or_path}: not the encoder that was trimmed "
            f"({trimmed.encoder}, {trimmed.num_tokens} tokens)."
        )
    state = student.state_dict()
    rows = student.backbone.get_input_embeddings().weight.detach()
    (key,) = (name for name, value in whole.named_parameters() if value is table.weight)
    state[key] = table.weight.detach().clone()
    state[key][torch.from_numpy(trimmed.kept)] = rows.to(state[key].device)
    whole.load_state_dict(state)
    return whole.eval()


def student_fingerprint(folder: Path) -> str:
    """The fingerprint of a saved student; raises ModelError for any other folder."""
    return str(peek(folder, FORMAT)["fingerprint"])


def require_teacher(folder: Path, teacher: str) -> None:
    """Refuses a saved student of another CLIP-VE.

    Raises:
        ModelError: it was trained against another one, or this is no student's folder.
    """
    expected = str(peek(folder, FORMAT)["teacher"])
    if expected != teacher:
        raise ModelError(
            f"{folder}: this student was trained against another CLIP-VE ({expected[:12]}, here "
            f"{teacher[:12]}); its embeddings mean nothing to this one. Align it again, or use the "
            "CLIP-VE it belongs to."
        )


def _student(
    model: Any,
    tokenizer: Any,
    embedding_dim: int,
    pooling: Pooling = "terminal",
    coding: Coding | None = None,
    saved: Mapping[str, Any] | None = None,
    added_on: str = "cpu",
) -> SentenceEncoder:
    """An encoder with a student's added layers, untrained and on the device `added_on`."""
    width = model.config.hidden_size
    with torch.device(added_on):
        norm = nn.LayerNorm(width) if coding is None else CodedState(width, coding)
        read_width = norm.width if isinstance(norm, CodedState) else width
        projection = nn.Linear(read_width, embedding_dim, bias=False)
    return SentenceEncoder(
        model,
        tokenizer,
        norm,
        projection,
        save=model.save_pretrained,
        causal=False,
        pooling=pooling,
        **backbones.input_settings(model, tokenizer, saved or {}),
    )


def _added_parts(student: SentenceEncoder) -> nn.ModuleDict:
    name = "coded_state" if isinstance(student.norm, CodedState) else "layer_norm"
    return nn.ModuleDict({name: student.norm, "projection": student.projection})


AUTOENCODER = "autoencoder"
_AUTOENCODER_WEIGHTS = "autoencoder.safetensors"


def coder(state_width: int, code_width: int, code: Code) -> nn.Sequential:
    """Maps states to codes, H → K, in one layer (thesis 3.2.2: followed by a ReLU)."""
    activation = [nn.ReLU()] if code == "relu" else []
    return nn.Sequential(nn.Linear(state_width, code_width), *activation)


class Autoencoder(nn.Module):
    """Linear H → K, linear K → H, each followed by a ReLU unless the code is linear."""

    def __init__(self, state_width: int, code_width: int, code: Code = "relu") -> None:
        super().__init__()
        self.encoder = coder(state_width, code_width, code)
        self.decoder = coder(code_width, state_width, code)
        self.widths = state_width, code_width  # H and K
        self.code = code

    def forward(self, states: Tensor) -> Tensor:
        """(N, H) states reconstructed from their codes."""
        restored: Tensor = self.decoder(self.encoder(states))
        return restored


def save_autoencoder(autoencoder: Autoencoder, folder: Path, *, languages: Sequence[str]) -> str:
    """Writes an autoencoder into an existing folder; returns its fingerprint."""
    save_weights(autoencoder, folder / _AUTOENCODER_WEIGHTS)
    shape = dict(zip(("state_width", "code_width"), autoencoder.widths, strict=True))
    config = {"languages": list(languages), **shape, "code": autoencoder.code}
    return seal(folder, AUTOENCODER, config)


def load_autoencoder(folder: Path, autoencoder: Autoencoder) -> tuple[Autoencoder, str]:
    """Loads a folder that `save_autoencoder` wrote into an autoencoder of the required shape.

    Returns it, in eval mode, and the folder's fingerprint.

    Raises:
        ModelError: missing, damaged, or of another shape.
    """
    widths = autoencoder.widths
    with unsealed(folder, AUTOENCODER) as config:
        shape = config["state_width"], config["code_width"], config["code"]
        if shape != (*widths, autoencoder.code):
            raise ModelError(
                f"{folder}: an autoencoder of {shape[0]} to {shape[1]}, code {shape[2]}; needed "
                f"here: {widths[0]} to {widths[1]}, code {autoencoder.code} (--student, --teacher "
                "and --code decide)."
            )
        load_weights(autoencoder, folder / _AUTOENCODER_WEIGHTS)
    return autoencoder.eval(), str(config["fingerprint"])
