"""The options of every stage, with defaults and help texts: a frozen dataclass each.

A field's name is its flag (`batch_size` → `--batch-size`) and its key in `--config FILE.toml` and
`run.json`. The command line is generated from here, so a flag means the same in every command. This
module imports nothing heavy, because `clseave --help` reads it.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import numbers
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

from clseave_cli.errors import UsageError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["constant", "linear", "cosine"]
Tracking = Literal["none", "tensorboard", "wandb", "trackio"]

Head = Literal["pooled", "patches"]  # the photo's embedding (thesis 3.1.2), or patches, too
GuidedBy = Literal["image", "pairID"]
#: The hidden state that represents a sentence: the last token's (thesis 3.3.1), the first token's
#: (BERT's [CLS]), or the mean over all tokens, including special ones (Sentence-BERT).
Pooling = Literal["terminal", "cls", "mean"]
ObjectiveName = Literal["mse", "cosine", "mse+cosine", "contrastive"]  # docs/methods.md
Method = Literal["sentence", "token", "sentence+token"]  # thesis 3.3, 3.2, both
#: The layer that maps the student's states to the teacher's width.
Code = Literal["linear", "relu"]
#: The token whose code represents the sentence; `pooler` is [CLS] through the pooling layer.
SentenceToken = Literal["terminal", "cls", "pooler"]
#: Initial value of the matrix after the word vectors of a student that starts from another one.
Translator = Literal["none", "random", "lexicon"]
#: The teacher's states that token pairs imitate: after its last normalisation, or before it.
TokenTarget = Literal["normalised", "encoder"]
#: How codes of the token method become embeddings: through the teacher's projection, through its
#: last layers, padded with zeros to the student's width, through the autoencoder's decoder and
#: then the same, or not at all (thesis 4.1).
TokenReader = Literal["projection", "padded", "decoder", "code"]
Sampling = Literal["proportional", "uniform", "temperature", "self-paced"]

#: The encoder of the thesis's students.
MULTILINGUAL_BERT = "google-bert/bert-base-multilingual-cased"

# By a field's type, the types it accepts, and their name in messages.
_ACCEPTED: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str | Path, "text"),
    Path: (str | Path, "text (a path)"),
}
# Placeholders of values in `--help`; that of other paths is DIR.
_METAVARS = {
    "data": "DIR",
    "allowed_host": "HOST",
    **dict.fromkeys(("image_column", "text_column"), "NAME"),
    **dict.fromkeys(("lang", "source_lang", "auxiliary"), "LANG"),
    **dict.fromkeys(("model", "clip", "text", "vision", "student", "aligner"), "NAME_OR_DIR"),
    **dict.fromkeys(("input", "translations", "memory", "alignments", "words", "gold"), "FILE"),
    **dict.fromkeys(("lexicon", "soft_labels", "baseline"), "FILE"),
}


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    metavar: str | None = None,
    least: float | None = None,
    most: float | None = None,
    zero_is_off: bool = False,
) -> Any:
    """A config field.

    Args:
        default: its value unless a flag, config file or preset sets it.
        help: one line for `--help`.
        flag: the flag, if it is not the field's name with hyphens.
        metavar: the value's placeholder in `--help`; None: `metavar_of` chooses it.
        least: the smallest valid number.
        most: the largest.
        zero_is_off: 0 means None, so that a flag can undo a preset or default.
    """
    metadata: dict[str, Any] = {"help": help, "flag": flag, "metavar": metavar}
    metadata |= {"least": least, "most": most, "zero_is_off": zero_is_off}
    return field(default=default, metadata=metadata)


def optional_number(help: str, least: float, default: float | None = None) -> Any:
    """A number that 0 turns off."""
    return option(default, help, least=least, zero_is_off=True)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The options of every stage."""

    #: Fields with a flag; empty: all. The others are set by `--config` only.
    FLAGS: ClassVar[tuple[str, ...]] = ()
    #: Options by preset.
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    #: The options that `--help` shows, in this order; `--help-all` shows all. Empty: all.
    FIRST: ClassVar[tuple[str, ...]] = ()
    #: Advice by removed `--flag` or `--flag value`; kept for one version.
    REMOVED: ClassVar[dict[str, str]] = {}

    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: Precision = option("auto", "Precision of the matrix products.")

    def __post_init__(self) -> None:
        """Converts values to the types of their fields, and a 0 that means "off" to None.

        Raises:
            UsageError: a value has another type, or a number is out of range; names the flag.
        """
        hints = typing.get_type_hints(type(self))
        for part in dataclasses.fields(self):
            value = _convert(flag_of(part), getattr(self, part.name), hints[part.name])
            least, most = part.metadata["least"], part.metadata["most"]
            object.__setattr__(self, part.name, value)
            if part.metadata["zero_is_off"] and value == 0:
                object.__setattr__(self, part.name, None)
            elif least is not None and value is not None and not value >= least:
                off = ", or 0 for off" if part.metadata["zero_is_off"] else ""
                raise UsageError(f"{flag_of(part)} {value}: expected at least {least}{off}.")
            elif most is not None and value is not None and not value <= most:
                raise UsageError(f"{flag_of(part)} {value}: expected at most {most}.")


def flag_of(part: dataclasses.Field[Any]) -> str:
    """The flag of a config's field."""
    flag: str | None = part.metadata["flag"]
    return flag or "--" + part.name.replace("_", "-")


def metavar_of(part: dataclasses.Field[Any]) -> str | None:
    """The placeholder of a field's value in `--help`; None if its type says enough."""
    metavar: str | None = part.metadata["metavar"] or _METAVARS.get(part.name)
    return metavar or ("DIR" if "Path" in str(part.type) else None)


def preset_options(config_class: type[StageConfig], preset: str | None) -> dict[str, Any]:
    """The options of a preset; none without one.

    Raises:
        UsageError: there is no such preset.
    """
    if preset is None:
        return {}
    if preset not in config_class.PRESETS:
        presets = ", ".join(config_class.PRESETS)
        raise UsageError(f"--preset {preset}: unknown; there are: {presets}.")
    return config_class.PRESETS[preset]


def named_options(
    config_class: type[StageConfig], options: dict[str, Any], where: str = ""
) -> dict[str, Any]:
    """Options by field; keys may have hyphens for underscores.

    Raises:
        UsageError: one does not exist; suggests the nearest name.
    """
    names = [part.name for part in dataclasses.fields(config_class)]
    values = {}
    for key, value in options.items():
        name = key.replace("-", "_")
        refuse_removed(config_class, ["--" + name.replace("_", "-"), str(value)], where)
        if name not in names:
            matches = difflib.get_close_matches(name, names, n=1)
            advice = f"did you mean {matches[0]}?" if matches else f"there are: {', '.join(names)}."
            raise UsageError(f"{where}no option named {key}; {advice}")
        values[name] = value
    return values


def toml_options(
    config_class: type[StageConfig], path: Path, flag: str = "--config ", table: Sequence[str] = ()
) -> dict[str, Any]:
    """The options in a table of a TOML file (empty: the top level), in the types of their fields.

    `flag` precedes the path in messages.

    Raises:
        UsageError: the file cannot be read, or has an unknown key or a value of another type.
    """
    shown = f"{flag}{path}"
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{shown}: cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{shown}: not valid TOML ({error}).") from None
    for key in table:
        raw = raw.get(key, {})
        if not isinstance(raw, dict):
            raise UsageError(f"{shown}: {key} is not a table.")
    named_options(config_class, raw, f"{shown}: ")
    hints = typing.get_type_hints(config_class)
    names = {key: key.replace("-", "_") for key in raw}
    return {names[key]: _convert(f"{shown}: {key} =", raw[key], hints[names[key]]) for key in raw}


def project_options(config_class: type[StageConfig], table: str) -> dict[str, Any]:
    """The options in [tool.clseave.TABLE] of ./clseave.toml or ./pyproject.toml.

    In clseave.toml the table may be called [TABLE].
    """
    path = ("tool", "clseave", table)
    for name, keys in (
        ("clseave.toml", path), ("clseave.toml", (table,)), ("pyproject.toml", path),
    ):  # fmt: skip
        if Path(name).is_file() and (options := toml_options(config_class, Path(name), "", keys)):
            return options
    return {}


def project_template(commands: Mapping[str, type[StageConfig]]) -> str:
    """A clseave.toml with the main options of commands and their defaults, commented out."""
    lines = [
        "# Options of clseave's commands here; flags, --config and --preset override them.",
        "# `clseave COMMAND --help-all` lists further options: --batch-size is batch_size here.",
    ]
    for name, config_class in commands.items():
        parts = {part.name: part for part in dataclasses.fields(config_class)}
        lines += ["", f"[{name}]"]
        for part in (parts[key] for key in config_class.FIRST or parts if key in parts):
            lines.append(f"# {part.name} = {_toml(part)}  # {part.metadata['help']}")
    return "\n".join(lines) + "\n"


def _toml(part: dataclasses.Field[Any]) -> str:
    """A field's default in TOML, or a placeholder if it is None."""
    value = part.default
    if value is None:
        is_number = "int" in str(part.type) or "float" in str(part.type)
        value = (part.metadata["least"] or 0) if is_number else metavar_of(part) or part.name
    return json.dumps(value, default=str)


def _convert(where: str, value: Any, annotation: Any) -> Any:
    """Converts a value to a field's type, or raises a UsageError that starts with `where`."""
    if get_origin(annotation) is tuple:
        is_single = isinstance(value, str | dict) or not isinstance(value, Iterable)
        items = [value] if is_single else value
        return tuple(_convert(where, item, value_type(annotation)) for item in items)
    if value is None and type(None) in get_args(annotation):
        return None
    kind = value_type(annotation)
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        expected = " or ".join(map(str, get_args(kind)))
    else:
        accepted, expected = _ACCEPTED[kind]
        if isinstance(value, accepted) and isinstance(value, bool) == (kind is bool):
            return kind(value)
    raise UsageError(f"{where} {value!r}, expected {expected}.")


def value_type(annotation: Any) -> Any:
    """A type without None; of a tuple, the type of its items."""
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return get_args(annotation)[0] if get_origin(annotation) is tuple else annotation


def refuse_removed(config_class: type[StageConfig], arguments: list[str], where: str = "") -> None:
    """Refuses flags, and values of flags, that an older version had.

    Raises:
        UsageError: one is among the arguments; says what to use instead.
    """
    words = [word for argument in arguments for word in argument.split("=", 1)]
    for word, value in itertools.pairwise([*words, ""]):
        for removed in (word, f"{word} {value}"):
            if advice := config_class.REMOVED.get(removed):
                raise UsageError(f"{where}{removed} was removed: {advice}.")


@dataclass(frozen=True, kw_only=True)
class SeededConfig(StageConfig):
    """The options of a stage that draws random numbers."""

    seed: int = option(0, "Seed of every random choice.", least=0, most=2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class ModelsConfig(StageConfig):
    """The options of a stage that reads or writes models."""

    runs: Path = option(Path("runs"), "Folder of the models, or ORG/NAME[@revision] of the hub.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The options of a stage that reads a data set."""

    data: str = option("data", "Data folder, hf:ORG/NAME, or files of another layout.")
    images: Path | None = option(None, "Image folder; unset: found in --data.")
    skip_bad: bool = option(False, "Skip bad rows (into .rejected.jsonl) and rows without image.")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(ModelsConfig, SeededConfig):
    """The options of every training stage."""

    runs: Path = option(Path("runs"), "Folder of the models.")
    epochs: int = option(10, "Passes over the training data.", least=1)
    batch_size: int = option(128, "Examples in one optimiser step.", least=1)
    learning_rate: float = option(1e-4, "Peak learning rate.", least=0)
    weight_decay: float = option(0.0, "Decoupled weight decay (AdamW).", least=0)
    warmup_fraction: float = option(0.1, "Share of steps for the warm-up.", least=0)
    schedule: Schedule = option("linear", "Learning rate after the warm-up.")
    accumulation: int = option(1, "Parts of a batch, to save memory.", least=1)
    clip_norm: float | None = optional_number("Largest gradient norm; 0: no clipping.", 0)
    patience: int | None = optional_number("Epochs to wait for a better dev metric; 0: no stop.", 1)
    stop_epoch: int | None = optional_number("Last epoch; schedule as for --epochs; 0: off.", 1)
    max_steps: int | None = option(None, "Stop after N steps; schedule as for --epochs.", least=1)
    keep: Literal["best", "last"] = option("best", "Epoch whose weights are published.")
    checkpoint_minutes: float = option(10.0, "Minutes between saved states.", least=0)
    resume: bool = option(False, "Continue an interrupted run.")
    tracker: Tracking = option("none", "Also send metrics there; each needs its extra.")
    train_split: str = option("train", "Split to train on.")
    dev_split: str = option("dev", "Split that selects the checkpoint.")
    allow_leak: bool = option(False, "Allow images that are in both splits.")


@dataclass(frozen=True, kw_only=True)
class GuidedConfig:
    """Pictures drawn from the text that supervise the photos in training (docs/methods.md)."""

    guided: Path | None = option(None, "Folder of guided pictures from illustrate; unset: none.")
    guided_kl: float = option(1.0, "Weight of KL(guided ‖ photo).", least=0)
    guided_cosine: float | None = option(
        None, "Weight of the embedding distance; unset: 0.5 with --guided-adapter.", least=0
    )
    guided_distance: Literal["cosine", "l2"] = option(
        "cosine", "Embedding distance; l2 is the paper's ablation."
    )
    guided_control: Literal["none", "noise", "shuffle"] = option(
        "none", "Control experiment: replace the pictures with noise or those of other rows."
    )


@dataclass(frozen=True, kw_only=True)
class DemoConfig(SeededConfig):
    """`demo`: the whole method on the built-in mini-VE world."""

    out: Path = option(Path("demo"), "Folder for data, models and report.")
    # For such small matrices, converting to bfloat16 takes longer than multiplying.
    precision: Precision = option("fp32", "Precision of the matrix products.")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The options of the translation engines."""

    engine: str = option("nmt", "nmt (local), google, libre, file, or an installed plug-in.")
    model: str | None = option(
        None, "nmt: seq2seq model; {lang} stands for the language; unset: facebook/m2m100_418M."
    )
    backend: Literal["auto", "transformers", "ctranslate2"] = option(
        "auto", "nmt: library to run the model; auto: ctranslate2 if installed and suitable."
    )
    beams: int = option(4, "nmt: width of the beam search.", least=1)
    int8: bool = option(False, "nmt, ctranslate2: 8-bit matrices; faster, words may differ.")
    url: str | None = option(None, "google, libre: address of the service.")
    translations: Path | None = option(
        None, "file: existing translations, .tsv or .jsonl; {lang} stands for the language."
    )
    match: Literal["auto", "pairID", "text"] = option(
        "auto", "file: what identifies a row; auto: pairID if the file has it."
    )
    requests_per_second: float | None = option(
        None, "Most requests a second; unset: google 5, otherwise no limit.", least=0.001
    )
    concurrency: int | None = option(None, "Requests at once; unset: the engine's choice.", least=1)
    timeout_seconds: float = option(30.0, "Longest wait for an answer.", least=0.001)
    retries: int = option(5, "Retries of a failed request.", least=0)
    retry_seconds: float = option(1.0, "Wait before the first retry; doubles each time.", least=0)
    memory: Path | None = option(None, "Memory file; unset: CACHE/translation/memory.sqlite.")


@dataclass(frozen=True, kw_only=True)
class TranslateConfig(SeededConfig, EngineConfig):
    """`translate`: translates the hypotheses of a data set."""

    FIRST: ClassVar[tuple[str, ...]] = (
        "lang", "data", "split", "input", "out", "engine", "model", "url", "translations",
        "on_suspect", "review", "memory",
    )  # fmt: skip
    data: Path = option(Path("data"), "Folder of the snli_ve_SPLIT files.")
    split: tuple[str, ...] = option(
        (), "Split to translate; repeat; unset: any of train, dev, test."
    )
    input: tuple[Path, ...] = option(
        (), "Translate this file instead (.jsonl, .csv, .tsv, .txt, .parquet); repeat."
    )
    out: Path | None = option(None, "Folder to write; unset: beside the input.")
    field: str | None = option(None, "Field to translate; unset: sentence2, hypothesis or text.")
    lang: tuple[str, ...] = option((), "Language to translate into; repeat for several.")
    source: str = option("en", "Language to translate from.")
    batch_size: int | None = option(None, "Texts in one call; unset: the engine's choice.", least=1)
    on_suspect: Literal["keep", "retry", "drop"] = option(
        "keep", "What to do with a translation that fails a check; kept ones are marked."
    )
    review: int = option(0, "Rows in a side-by-side sample for a speaker's review.", least=0)
    overwrite: bool = option(False, "Replace files not written by translate, or changed since.")


@dataclass(frozen=True, kw_only=True)
class IllustrateConfig(SeededConfig):
    """`illustrate`: draws pictures from the texts of a data set."""

    data: Path = option(Path("data"), "Data folder.")
    split: str = option("train", "Split to draw.")
    input: Path | None = option(
        None, "Rows to draw; unset: captions_SPLIT.jsonl, by pairID snli_ve_SPLIT."
    )
    guided_by: GuidedBy = option("image", "Draw a picture for each image, or each row (pairID).")
    template: str | None = option(
        None, "Prompt with fields in braces; unset: {caption}, by pairID {sentence1}."
    )
    out: Path | None = option(None, "Folder to write; unset: DATA/guided-image or -pairID.")
    engine: Literal["diffusers", "mini-ve"] = option("diffusers", "mini-ve: the built-in world.")
    model: str | None = option(None, "diffusers: text-to-image model (hub id or folder).")
    steps: int | None = option(None, "diffusers: denoising steps; unset: the model's.", least=1)
    guidance: float | None = option(None, "diffusers: guidance scale; unset: the model's.", least=0)
    size: int | None = option(None, "diffusers: pixels a side; unset: the model's.", least=8)
    limit: int | None = option(None, "Draw the first N pictures only; unset: all.", least=1)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig, GuidedConfig):
    """`pretrain`: contrastive training of a CLIP-family model from image-caption pairs."""

    FIRST: ClassVar[tuple[str, ...]] = (
        "lang", "data", "images", "clip", "text", "vision", "runs", "epochs", "batch_size",
        "learning_rate", "resume", "seed", "device",
    )  # fmt: skip
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # The built-in world, on two CPU cores (docs/experiments.md, 2026-11-20).
        "mini-ve": {
            "image_size": 64,
            "patch_size": 16,
            "width": 128,
            "layers": 2,
            "heads": 4,
            "vocabulary": 1000,
            "embedding_dim": 128,
            "captions_per_image": 1,
            "epochs": 8,
            "batch_size": 64,
            "learning_rate": 2e-3,
            "weight_decay": 0.05,
            "precision": "fp32",
        },
    }

    lang: tuple[str, ...] = option((), "Language of parallel captions; repeat; unset: en.")
    data: Path = option(Path("data"), "Folder of captions_train.jsonl and captions_dev.jsonl.")
    images: Path | None = option(None, "Image folder; unset: found in --data.")
    clip: str | None = option(None, "Model to start from (hub id or folder); unset: from scratch.")
    text: str | None = option(None, "Text encoder to start from; goes with --vision.")
    vision: str | None = option(None, "Vision encoder to start from; goes with --text.")
    freeze_epochs: float | None = optional_number(
        "Epochs that train only projections and logit scale; 0: none.", 0
    )
    out: Path | None = option(None, "Folder to write; unset: RUNS/clip.")
    captions_per_image: int = option(1, "Captions of an image in one step.", least=1)
    objective: Literal["contrastive", "triplet"] = option(
        "contrastive", "Loss: CLIP's, or triplet ranking (docs/training.md)."
    )
    margin: float = option(0.2, "triplet: margin, in cosine.", least=0)
    negatives: Literal["sum", "hardest"] = option(
        "sum", "triplet: count all negatives of the batch (VSE), or the hardest (VSE++)."
    )
    sampling: Literal["parallel", "uniform", "self-paced"] = option(
        "parallel", "Languages of a step: all; or one, uniformly or by how its dev recall lags."
    )
    guided_kl: float = option(0.5, "Weight of KL(guided ‖ photo).", least=0)
    guided_cosine: float | None = option(0.5, "Weight of the embedding distance.", least=0)
    image_size: int = option(224, "From scratch: picture size in pixels.")
    patch_size: int = option(16, "From scratch: patch size in pixels.")
    width: int = option(512, "From scratch: hidden width of both towers.")
    layers: int = option(12, "From scratch: layers of both towers.", least=1)
    heads: int = option(8, "From scratch: attention heads of both towers.", least=1)
    vocabulary: int = option(49408, "From scratch: largest vocabulary.", least=1000)
    embedding_dim: int = option(512, "New models: width of the shared space.")
    epochs: int = option(30, "Passes over the training data.", least=1)
    learning_rate: float = option(5e-4, "Peak learning rate.", least=0)
    weight_decay: float = option(0.1, "Decoupled weight decay (AdamW).", least=0)
    schedule: Schedule = option("cosine", "Learning rate after the warm-up.")
    clip_norm: float | None = optional_number("Largest gradient norm; 0: no clipping.", 0, 1.0)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig, DataConfig, GuidedConfig):
    """`finetune-ve`: CLIP-VE, the visual-entailment model of the source language (thesis 3.1.2)."""

    FIRST: ClassVar[tuple[str, ...]] = (
        "data", "images", "clip", "head", "source_lang", "runs", "epochs", "batch_size",
        "learning_rate", "skip_bad", "resume", "seed", "device",
    )  # fmt: skip
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "thesis": {
            "clip": "openai/clip-vit-base-patch16",
            "head": "pooled",
            "batch_size": 64,
            "learning_rate": 1e-6,
            "weight_decay": 0.0,
            "warmup_fraction": 0.0,
            "schedule": "constant",
            "patience": 1,
            "epochs": 20,
            "select": "loss",
        },
        "mini-ve": {
            "epochs": 3,
            "batch_size": 192,
            "learning_rate": 2.5e-3,
            "warmup_fraction": 0.1,
            "schedule": "cosine",
            "patience": None,
            "select": "accuracy",
            "precision": "fp32",
        },
    }

    clip: str = option(
        "openai/clip-vit-base-patch16",
        "CLIP, SigLIP, Chinese-CLIP, … model to fine-tune (hub id or folder).",
    )
    head: Head = option("patches", "The head's image features: one vector, or patches too.")
    patch_grid: int | None = option(None, "patches: average to N × N; unset: keep all.", least=1)
    guided_by: GuidedBy = option("image", "Key that names a guided picture.")
    guided_adapter: bool = option(False, "Train an adapter of photo and picture embeddings.")
    source_lang: str = option("en", "Language the model reads; all others are aligned to it.")
    freeze_epochs: float | None = optional_number("Epochs that train the head only; 0: none.", 0)
    out: Path | None = option(None, "Folder to write; unset: RUNS/clip-ve.")
    epochs: int = option(20, "Most passes over the training data.", least=1)
    batch_size: int = option(64, "Examples in one optimiser step.", least=1)
    learning_rate: float = option(1e-6, "Peak learning rate.", least=0)
    warmup_fraction: float = option(0.0, "Share of steps for the warm-up.", least=0)
    schedule: Schedule = option("constant", "Learning rate after the warm-up.")
    patience: int | None = optional_number(
        "Epochs to wait for a better dev metric; 0: no stop.", 1, 1
    )
    select: Literal["loss", "accuracy"] = option("loss", "Dev metric that selects the checkpoint.")
    label_smoothing: float = option(0.0, "Share of a label spread over all three.", least=0, most=1)
    soft_labels: tuple[Path, ...] = option(
        (), "A teacher's answers to the training rows; repeat to average several."
    )
    soft_weight: float = option(0.5, "Weight of --soft-labels in the loss.", least=0, most=1)
    unfreeze_blocks: int | None = optional_number("Also train the image tower's last N blocks.", 1)
    lora: int | None = optional_number("Train adapters of this rank in both towers (LoRA).", 1)
    image_learning_rate: float | None = option(
        None,
        "Peak rate of the image tower; unset: a tenth of the other; --lora: the same.",
        least=0,
    )
    dev_fraction: float = option(0.05, "Share of training images held out if there is no dev file.")


@dataclass(frozen=True, kw_only=True)
class WordAlignerConfig:
    """The options of word alignment, by an encoder or from a file."""

    aligner_layer: int | None = option(None, "Layer to compare; unset: 8, or the last.", least=1)
    aligner_threshold: float = option(1e-3, "Least probability in both directions.", least=0)
    alignments: Path | None = option(
        None, "Pharaoh file of links (0-0 1-2 …) to use instead; {lang} stands for the language."
    )


@dataclass(frozen=True, kw_only=True)
class TokenConfig(WordAlignerConfig):
    """The options of the token method (CLTEAVE, thesis 3.2); the defaults fix its faults."""

    token_weight: float = option(1.0, "Weight of the token loss in sentence+token.", least=0)
    code: Code = option("linear", "Layer to the teacher's width; thesis: relu.")
    terminal_pair: bool = option(True, "Pair terminal tokens; thesis: no.")
    sentence_token: SentenceToken = option("terminal", "Token of the sentence; thesis: pooler.")
    token_target: TokenTarget = option("normalised", "Teacher's states; thesis: encoder.")
    token_reader: TokenReader = option("projection", "How codes are read; thesis: code.")
    pretrained_code: bool = option(False, "Start from a trained autoencoder; thesis: yes.")
    autoencoder: Path | None = option(None, "Autoencoder to start from; unset: RUNS/autoencoder.")
    aligner: str | None = option(None, "Encoder to align words; unset: untrained --student.")


@dataclass(frozen=True, kw_only=True)
class StudentConfig(TrainingConfig, DataConfig, TokenConfig):
    """The options of training a student."""

    FIRST: ClassVar[tuple[str, ...]] = (
        "lang", "data", "images", "student", "method", "objective", "trim_vocabulary", "runs",
        "epochs", "batch_size", "learning_rate", "resume",
    )  # fmt: skip
    REMOVED: ClassVar[dict[str, str]] = {
        "--objective head-aware": "it gained nothing over --objective mse",
        "--head-weight": "it belonged to --objective head-aware, which is gone; use mse",
        "--projection mlp": "it gained nothing over --projection linear, the default",
        "--parallel-batches": "it gained nothing; leave it out",
        "--final-norm": "the thesis applies it once; --token-target encoder does so",
    }

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "thesis": {
            "student": MULTILINGUAL_BERT,
            "batch_size": 128,
            "learning_rate": 1e-4,
            "weight_decay": 0.01,
            "warmup_fraction": 0.1,
            "schedule": "linear",
            "epochs": 22,
            "stop_epoch": 9,
            "patience": 9,
            "select": "mse",
            # The token method:
            "code": "relu",
            "terminal_pair": False,
            "sentence_token": "pooler",
            "token_target": "encoder",
            "token_reader": "code",
            "pretrained_code": True,
        },
        "mini-ve": {"epochs": 8, "batch_size": 64, "learning_rate": 2.1e-3, "precision": "fp32"},
    }

    method: Method = option("sentence", "Align sentences, words (token), or both.")
    lang: tuple[str, ...] = option((), "Language to align; repeat: one student of several.")
    student: str = option(MULTILINGUAL_BERT, "Encoder to train (hub id or folder).")
    teacher: Path | None = option(None, "CLIP-VE folder or hub ORG/NAME; unset: RUNS/clip-ve.")
    init_from: Path | None = option(None, "Student of another language to start from.")
    keep_embeddings: bool = option(False, "--init-from: keep its word vectors, too.")
    translator: Translator = option("none", "Initial matrix after the word vectors.")
    translator_epochs: int | None = option(
        None, "Epochs that train the translator only; unset: 1.", least=0
    )
    lexicon: Path | None = option(None, "Word pairs; unset: words aligned in the text.")
    objective: ObjectiveName = option("mse", "Loss between student and teacher.")
    pooling: Pooling = option("terminal", "Hidden state that represents the sentence.")
    include_english: bool = option(False, "Train on the teacher's sentences, too.")
    auxiliary: tuple[str, ...] = option((), "Auxiliary language, a regulariser; repeat.")
    auxiliary_weight: float = option(0.3, "Weight of its pairs in the loss.", least=0)
    sampling: Sampling = option("proportional", "How often each language is sampled.")
    sampling_temperature: float = option(
        5.0, "temperature: T in shares of pairs^(1/T); 1: proportional.", least=1
    )
    epoch_pairs: int | None = option(None, "Pairs in an epoch; unset: every pair once.", least=1)
    trim_vocabulary: bool = option(False, "Keep only the tokens that the text needs.")
    epochs: int = option(9, "Passes over the training data.", least=1)
    weight_decay: float = option(0.01, "Decoupled weight decay (AdamW).", least=0)
    select: Literal["auto", "accuracy", "mse", "cosine", "recall_at_10"] = option(
        "auto", "Dev metric to select by; auto: accuracy, without images the objective's."
    )
    dev_fraction: float = option(0.05, "Share held out if there is no dev file.")
    skip_suspect: bool = option(False, "Skip rows marked translation_suspect.")


@dataclass(frozen=True, kw_only=True)
class AlignConfig(StudentConfig):
    """`align`: a multilingual student of the CLIP-VE text encoder (thesis 3.3)."""

    limit: int | None = option(None, "Distinct sentences of each language; unset: all.", least=1)
    out: Path | None = option(None, "Folder to write; unset: RUNS/align-LANG.")


@dataclass(frozen=True, kw_only=True)
class CurveConfig(StudentConfig):
    """`curve`: a student's accuracy by number of training sentences."""

    FLAGS: ClassVar[tuple[str, ...]] = (
        "lang", "limits", "together", "student", "data", "images", "runs", "split",
        "keep_models", "out", "seed", "device",
    )  # fmt: skip
    FIRST: ClassVar[tuple[str, ...]] = FLAGS
    limits: tuple[int, ...] = option(
        (100, 300, 1000, 3000),
        "Distinct sentences of each language; repeat; the last point always has all.",
        flag="--limit",
    )
    together: bool = option(False, "Also train one student of all languages at every point.")
    split: str = option("test", "Split to evaluate on; if missing: dev metrics only.")
    resamples: int = option(2000, "Bootstrap resamples behind every interval.", least=1)
    keep_models: bool = option(False, "Keep the student of every point.")
    out: Path | None = option(None, "Folder to write; unset: RUNS/curve.")


@dataclass(frozen=True, kw_only=True)
class AutoencodeConfig(TrainingConfig, DataConfig):
    """`autoencode`: the autoencoder of the token method (thesis 3.2.2 and Table A.1)."""

    FIRST: ClassVar[tuple[str, ...]] = (
        "lang", "data", "student", "teacher", "code", "runs", "epochs", "batch_size",
        "learning_rate", "resume", "seed", "device",
    )  # fmt: skip
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "thesis": {
            "student": MULTILINGUAL_BERT,
            "code": "relu",
            "epochs": 20,
            "batch_size": 256,
            "learning_rate": 1e-5,
            "weight_decay": 1e-6,
            "warmup_fraction": 0.0,
            "schedule": "constant",
        },
        "mini-ve": {"learning_rate": 1e-3, "precision": "fp32"},
    }

    lang: tuple[str, ...] = option((), "Language to train on; repeat for several.")
    student: str = option(MULTILINGUAL_BERT, "Encoder whose states are coded (hub id or folder).")
    teacher: Path | None = option(None, "CLIP-VE that sets the code's width; unset: RUNS/clip-ve.")
    code: Code = option("relu", "Output of both layers; thesis: relu.")
    out: Path | None = option(None, "Folder to write; unset: RUNS/autoencoder.")
    epochs: int = option(20, "Passes over the training data.", least=1)
    batch_size: int = option(256, "Sentences in one optimiser step.", least=1)
    learning_rate: float = option(1e-5, "Peak learning rate.", least=0)
    weight_decay: float = option(1e-6, "Decoupled weight decay (AdamW).", least=0)
    warmup_fraction: float = option(0.0, "Share of steps for the warm-up.", least=0)
    schedule: Schedule = option("constant", "Learning rate after the warm-up.")


@dataclass(frozen=True, kw_only=True)
class WordAlignConfig(StageConfig, WordAlignerConfig):
    """`word-align`: aligns the words of parallel sentences."""

    FIRST: ClassVar[tuple[str, ...]] = (
        "lang", "data", "split", "input", "out", "gold", "alignments", "words", "aligner",
        "aligner_layer", "aligner_threshold", "device",
    )  # fmt: skip
    data: str = option("data", "Data folder, hf:ORG/NAME, or files of another layout.")
    lang: str | None = option(None, "Language of the translations in --data.")
    source_lang: str = option("en", "Language they were translated from.")
    split: str = option("train", "Split to align.")
    input: Path | None = option(
        None, "Align this file of source ||| target lines instead, words separated by spaces."
    )
    skip_bad: bool = option(False, "Skip bad rows (into .rejected.jsonl) and bad links.")
    aligner: str = option(MULTILINGUAL_BERT, "Encoder whose states align words (hub id or folder).")
    out: Path | None = option(None, "File for the links; unset: printed.", metavar="FILE")
    words: Path | None = option(None, "Also write words, source ||| target, for other aligners.")
    gold: Path | None = option(None, "Score the links against those of this Pharaoh file.")
    search: bool = option(False, "With --gold: take the best of all layers and several thresholds.")
    gold_base: Literal["auto", "0", "1"] = option(
        "auto", "Number of the first word in --gold; auto: 1 if no word is 0."
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SeededConfig, DataConfig, EngineConfig):
    """`evaluate`: metrics of every language, with baselines that never see the photo."""

    FIRST: ClassVar[tuple[str, ...]] = (
        "lang", "data", "images", "split", "runs", "students", "mode", "report", "skip_bad",
        "batch_size", "seed", "device",
    )  # fmt: skip
    runs: tuple[Path, ...] = option(
        (Path("runs"),), "Folder of the models; repeat for the same models of several seeds."
    )
    students: Path | None = option(None, "Folder of the students, or hub ORG/NAME; unset: --runs.")
    lang: tuple[str, ...] = option((), "Language to evaluate; repeat; unset: all.")
    mode: Literal["zero-shot", "translate-test", "both"] = option(
        "zero-shot", "zero-shot: by the student; translate-test: by CLIP-VE, from translations."
    )
    reader: Literal["student", "source"] = option(
        "student", "Text encoder: the language's student, or CLIP-VE's (multilingual) text tower."
    )
    split: str = option("test", "Split to evaluate on.")
    batch_size: int = option(256, "Examples computed at once.", least=1)
    train_split: str = option("train", "Split the hypothesis-only baseline learns from.")
    exclude_seen: bool = option(False, "Skip rows whose photo a model saw in training.")
    allow_leak: bool = option(False, "Evaluate on photos that a model saw in training, too.")
    near_duplicates: int | None = option(
        None, "Photos count as seen if perceptual hashes differ in at most N of 64 bits.", least=0
    )
    resamples: int = option(2000, "Bootstrap resamples behind every interval.", least=1)
    report: Path | None = option(None, "Folder for the report; unset: none.")


@dataclass(frozen=True, kw_only=True)
class RetrieveConfig(ModelsConfig, SeededConfig):
    """`retrieve`: retrieval of images by captions, and of captions by images."""

    FIRST: ClassVar[tuple[str, ...]] = (
        "lang", "data", "images", "split", "clip", "runs", "report", "resamples", "seed", "device",
        "precision",
    )  # fmt: skip
    lang: tuple[str, ...] = option((), "Language to evaluate; repeat; unset: all.")
    data: str = option("data", "Data folder with captions_SPLIT.jsonl, or hf:ORG/NAME.")
    images: Path | None = option(None, "Image folder; unset: found in --data.")
    split: str = option("test", "Split to evaluate on.")
    clip: str | None = option(None, "Multilingual CLIP or CLIP-VE; unset: the models in --runs.")
    resamples: int = option(2000, "Bootstrap resamples behind every interval.", least=1)
    report: Path | None = option(None, "Folder for the document and figures; unset: none.")


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(EvaluateConfig):
    """`calibrate`: temperatures, and confidence thresholds for a promised precision."""

    FLAGS: ClassVar[tuple[str, ...]] = (
        "lang", "promise", "label", "data", "images", "split", "runs", "skip_bad", "batch_size",
        "device",
    )  # fmt: skip
    FIRST: ClassVar[tuple[str, ...]] = FLAGS
    promise: float | None = option(
        None, "Share of right answers to promise, such as 0.95; unset: none.", flag="--precision",
        metavar="SHARE", least=0.5, most=0.999,
    )  # fmt: skip
    label: tuple[str, ...] = option((), "Label to promise it for; repeat; unset: all together.")
    lang: tuple[str, ...] = option((), "Language to calibrate; repeat; unset: all.")
    split: str = option("dev", "Split to calibrate on, which no model was trained on.")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ModelsConfig):
    """`predict`: labels an image and sentence, or a file of them."""

    FIRST: ClassVar[tuple[str, ...]] = (
        "lang", "runs", "student", "images", "image_column", "text_column", "unsure", "batch_size",
        "resume", "device", "precision",
    )  # fmt: skip
    lang: str | None = option(None, "Language of the hypothesis; auto: identify; unset: CLIP-VE's.")
    student: Path | None = option(None, "Student to use; unset: that of --runs.", metavar="DIR")
    images: Path | None = option(None, "Image folder of --input; unset: paths are relative to it.")
    image_column: str | None = option(None, "Image column of --input; unset: image or SNLI-VE's.")
    text_column: str | None = option(None, "Text column; unset: hypothesis or sentence2.")
    batch_size: int = option(256, "Pairs computed at once.", least=1)
    resume: bool = option(False, "Continue an interrupted --output where it stopped.")
    unsure: bool = option(False, "Answer unsure below the thresholds that `calibrate` set.")


@dataclass(frozen=True, kw_only=True)
class CheckConfig(ModelsConfig):
    """`check`: finds texts that do not fit their pictures, in a page, folder or table."""

    FIRST: ClassVar[tuple[str, ...]] = (
        "lang", "runs", "min_confidence", "images", "image_column", "text_column", "format",
        "fail_on", "baseline",
    )  # fmt: skip
    lang: str = option("auto", "Language of the texts; auto: identify each.")
    min_confidence: float | None = option(
        None, "Answer unsure below it; unset: as `calibrate` promised, or 0.7.", least=0
    )
    max_characters: int = option(250, "Longest text.", least=1)
    max_same: int = option(3, "Most different pictures with the same text.", least=1)
    judge: bool = option(True, "Use the model; --no-judge: only checks without it.")
    root: Path | None = option(
        None, "Only pictures in it are opened; / in a page; unset: PATH or its folder."
    )
    images: Path | None = option(None, "Folder of a table's pictures; unset: that of the table.")
    image_column: str | None = option(None, "Picture column; unset: image, file_name, …")
    text_column: str | None = option(None, "Text column; unset: text, caption, alt, …")
    format: Literal["text", "json", "jsonl", "junit", "sarif", "github"] = option(
        "text", "What to print."
    )
    fail_on: Literal["contradicts", "unsure"] = option(
        "contradicts", "Findings that exit with 1; unsure: warnings too."
    )
    baseline: Path | None = option(
        None, "Findings accepted before: a report's decisions, or a run's --format json."
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelsConfig):
    """`export`: writes the models as a folder that runs without torch."""

    FIRST: ClassVar[tuple[str, ...]] = (
        "out", "lang", "runs", "int8", "format", "device", "precision",
    )  # fmt: skip
    out: Path = option(Path("exported"), "Folder to write.")
    format: Literal["onnx"] = option("onnx", "What to write.")
    lang: tuple[str, ...] = option((), "Language to export; repeat; unset: all.")
    int8: bool = option(False, "Store matrices in 8 bits: smaller, less exact.")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ModelsConfig):
    """`serve`: an HTTP service and a page to try it on."""

    FIRST: ClassVar[tuple[str, ...]] = (
        "lang", "host", "port", "allowed_host", "runs", "device", "precision", "batch_size",
        "max_waiting", "max_megabytes", "max_megapixels", "max_characters",
    )  # fmt: skip
    lang: tuple[str, ...] = option((), "Language to serve; repeat; auto: identified; unset: all.")
    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0: every network.")
    allowed_host: tuple[str, ...] = option(
        (), "Host name of this service, besides localhost; repeat; *: any."
    )
    port: int = option(8000, "Port to listen on; 0: any free one.", least=0)
    batch_size: int = option(16, "Most pairs computed at once.", least=1)
    max_waiting: int = option(256, "Requests that may wait; more are refused (503).", least=1)
    max_megabytes: float = option(10.0, "Largest upload.", least=0)
    max_megapixels: float = option(40.0, "Largest image.", least=0)
    max_characters: int = option(1000, "Longest sentence.", least=1)
