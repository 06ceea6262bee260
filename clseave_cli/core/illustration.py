"""`illustrate`: pictures drawn from the texts of a data set, one file for each key.

A picture says in itself what it was made from. So the folder is the memory of what is done, however
a run ended, and no picture is drawn twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clseave_cli.core.config import IllustrateConfig
from clseave_cli.core.data.images import ImageFolder, picture_name
from clseave_cli.core.data.mini_ve.drawing import draw
from clseave_cli.core.data.mini_ve.generation import asked_of, guided
from clseave_cli.core.data.records import ENGLISH, require_split_path
from clseave_cli.core.data.rows import (
    HYPOTHESIS_KEYS,
    ID_KEYS,
    IMAGE_KEYS,
    LABEL_KEYS,
    BadRow,
    image_name,
    read_rows,
    require_text,
)
from clseave_cli.core.files import atomic_file, file_digest, json_digest, locked_target, sweep
from clseave_cli.core.training.precision import autocast, resolve_device
from clseave_cli.errors import ClseaveError, DataError, ExtraMissing, ModelError, UsageError
from clseave_cli.progress import SILENT, Progress

#: Where a PNG says what it was made from.
_RECORD = "clseave illustrate"
#: What a template may call values by, whatever a row's keys are.
_ALIASES = {
    "premise": ("sentence1", "premise"),
    "hypothesis": HYPOTHESIS_KEYS,
    "label": LABEL_KEYS,
    "image": IMAGE_KEYS,
}
_FIELD = re.compile(r"\{(\w+)\}")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Wanted:
    """A picture to draw: the key it is named by, its prompt, and its seed."""

    key: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Illustrations:
    """What `illustrate` came to.

    Attributes:
        folder: of the pictures.
        drawn: how many were drawn now.
        kept: how many were there before.
        withheld: how many the model did not give out.
    """

    folder: Path
    drawn: int
    kept: int
    withheld: int


class Engine(Protocol):
    """What draws.

    Attributes:
        identity: all that a picture depends on besides its prompt and seed.
    """

    identity: dict[str, Any]

    def draw(self, wanted: Sequence[Wanted]) -> list[Image.Image | None]:
        """A picture of each; None: withheld."""
        ...


def illustrate(config: IllustrateConfig, progress: Progress = SILENT) -> Illustrations:
    """Draws a picture for every key that has none yet.

    Raises:
        ClseaveError: bad rows, an unusable model, a full disk, or a file in the way.
    """
    out = config.out or config.data / f"guided-{config.guided_by}"
    wanted = _wanted(config)
    engine: Engine = (_Diffusers if config.engine == "diffusers" else _MiniVE)(config)
    with locked_target(out):
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
        todo = _todo(config, out, wanted, engine.identity)
        drawn = withheld = 0
        with progress.task(f"illustrate {config.split}", len(wanted), "pictures") as task:
            task.advance(len(wanted) - len(todo))
            # Batches of all pictures, whichever are there: what is drawn together is the same after
            # an interruption, and so are the pictures, to the bit.
            for start in range(0, len(wanted), config.batch_size):
                batch = wanted[start : start + config.batch_size]
                if todo.isdisjoint(each.key for each in batch):
                    continue
                for each, image in zip(batch, engine.draw(batch), strict=True):
                    if each.key in todo:
                        task.advance()
                        drawn += image is not None
                        withheld += image is None
                        if image is not None:
                            _write(_path(out, each), image, _record(each, engine.identity))
    return Illustrations(out, drawn, len(wanted) - len(todo), withheld)


def _wanted(config: IllustrateConfig) -> list[Wanted]:
    """The pictures to draw, in the order of the rows.

    Raises:
        DataError: a bad row, or one that lacks what the template names.
    """
    by_image = config.guided_by == "image"
    path = config.input
    if path is None and by_image:
        path = config.data / f"captions_{config.split}.jsonl"
    path = path or require_split_path(config.data, config.split, ENGLISH)
    template = config.template or ("{caption}" if by_image else "{premise}")
    parts: dict[str, dict[str, None]] = {}  # dictionaries, for they are sets in order
    for line, row, _ in read_rows(path, _columns(template)):
        try:
            if isinstance(row, BadRow):
                raise row
            row = {"image": image_name(row)} | row if by_image else row
            key = require_text(row, IMAGE_KEYS if by_image else ID_KEYS, "what names the picture")
            prompt = _filled(template, row)
        except BadRow as bad:
            raise DataError.at(path, line, str(bad)) from None
        if key not in parts and len(parts) == config.limit:
            break
        parts.setdefault(key, {})[prompt] = None
    if not parts:
        raise DataError(f"{path}: no rows in it.")
    return [
        Wanted(key, " ".join(prompts), _seed(config.seed, key)) for key, prompts in parts.items()
    ]


def _columns(template: str) -> set[str]:
    names = {*_FIELD.findall(template), *IMAGE_KEYS, *ID_KEYS}
    return names | {key for name in names for key in _ALIASES.get(name, ())}


def _filled(template: str, row: dict[str, Any]) -> str:
    def value(field: re.Match[str]) -> str:
        keys = (field[1], *_ALIASES.get(field[1], ()))
        return require_text(row, keys, "what --template names").strip()

    return _FIELD.sub(value, template)


def _seed(seed: int, key: str) -> int:
    """A picture's seed: that of no other, and the same whichever pictures are drawn."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=7).digest())


def _path(out: Path, wanted: Wanted) -> Path:
    return out / f"{picture_name(wanted.key)}.png"


def _record(wanted: Wanted, identity: dict[str, Any]) -> str:
    return json.dumps(dataclasses.asdict(wanted) | identity)


def _todo(
    config: IllustrateConfig, out: Path, wanted: Sequence[Wanted], identity: dict[str, Any]
) -> set[str]:
    """The keys whose picture is not there yet.

    Raises:
        UsageError: one is there that other options made, or something else did.
    """
    there, todo = ImageFolder(out), set()
    paths: dict[Path, str] = {}
    for each in wanted:
        path = _path(out, each)
        if (other := paths.setdefault(path, each.key)) != each.key:
            raise DataError(f"{path}: would be the picture of both {other!r} and {each.key!r}.")
        present = there.get(picture_name(each.key))
        record = None if present is None else _read_record(present)
        if present is not None and (record is None or present != path):
            raise UsageError(f"{present}: illustrate did not draw it; choose another --out.")
        if record != _record(each, identity):
            if record is not None and not config.overwrite:
                raise UsageError(
                    f"{present}: was drawn with other options, or from another text; --overwrite "
                    "draws such pictures again, or choose another --out."
                )
            todo.add(each.key)
    return todo


def _read_record(path: Path) -> str | None:
    """What a picture was made from; None where it does not say so."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.info.get(_RECORD)
    except (OSError, ValueError, SyntaxError):
        return None


def _write(path: Path, image: Image.Image, record: str) -> None:
    about = PngInfo()
    about.add_text(_RECORD, record)
    with atomic_file(path) as stream:
        image.save(stream, "PNG", pnginfo=about)


class _MiniVE:
    """The built-in world: another scene for which the same is true."""

    def __init__(self, config: IllustrateConfig) -> None:
        self._asked = asked_of(config.data, config.split, by_row=config.guided_by == "pairID")
        self.identity: dict[str, Any] = {"engine": "mini-ve"}

    def draw(self, wanted: Sequence[Wanted]) -> list[Image.Image | None]:
        """A picture of each."""
        return list(self._drawn(wanted))

    def _drawn(self, wanted: Sequence[Wanted]) -> Iterator[Image.Image]:
        for each in wanted:
            if each.key not in self._asked:
                raise DataError(f"{each.key}: the world of --data has no such picture or row.")
            random = Random(each.seed)
            yield draw(guided(*self._asked[each.key], random), random)


class _Diffusers:
    """A text-to-image model of the diffusers package."""

    def __init__(self, config: IllustrateConfig) -> None:
        if importlib.util.find_spec("diffusers") is None:
            raise ExtraMissing("illustrate needs diffusers: pip install -e '.[diffusers]'.")
        if config.model is None:
            raise UsageError("--model is missing: which text-to-image model, by hub id or folder?")
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        device = resolve_device(config.device)
        precision = autocast(config.precision, device).precision
        load: Any = DiffusionPipeline.from_pretrained
        folder, dtype = Path(config.model), _DTYPES[precision]
        try:
            with warnings.catch_warnings(action="ignore"):
                if not folder.is_dir():
                    folder = Path(DiffusionPipeline.download(config.model, use_safetensors=True))
                self._pipeline = load(folder, dtype=dtype, use_safetensors=True).to(device)
        except Exception as error:  # of the hub, of a damaged folder, or of one of another kind
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"--model {config.model}: not loaded as a pipeline of diffusers ({reason})."
            ) from None
        takes = inspect.signature(self._pipeline.__call__).parameters
        options = {
            "num_inference_steps": config.steps, "guidance_scale": config.guidance,
            "height": config.size, "width": config.size,
        }  # fmt: skip
        self._options = {name: value for name, value in options.items() if value is not None}
        if missing := [name for name in ("prompt", *self._options) if name not in takes]:
            raise ModelError(f"--model {config.model}: its pipeline takes no {missing[0]}.")
        self._pipeline.set_progress_bar_config(disable=True)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        weights = [[path.relative_to(folder).as_posix(), file_digest(path)] for path in files]
        self.identity: dict[str, Any] = {
            "engine": "diffusers", "model": config.model, "digest": json_digest(weights)[:16],
            "precision": precision, **self._options,
        }  # fmt: skip

    def draw(self, wanted: Sequence[Wanted]) -> list[Image.Image | None]:
        """A picture of each; None where the model's safety checker blackened it."""
        # Of the CPU: the same noise on every device.
        generators = [torch.Generator("cpu").manual_seed(each.seed) for each in wanted]
        prompts = [each.prompt for each in wanted]
        try:
            with warnings.catch_warnings(action="ignore"):
                output = self._pipeline(prompt=prompts, generator=generators, **self._options)
        except torch.OutOfMemoryError:
            raise ModelError(
                f"the memory is too small for {len(wanted)} pictures at once; lower --batch-size "
                "or --size."
            ) from None
        except ValueError as error:  # such as a size that is no multiple of 8
            raise ClseaveError(f"{wanted[0].key}: not drawn ({error}).") from None
        flags = getattr(output, "nsfw_content_detected", None) or [False] * len(wanted)
        return [
            None if is_flagged else image
            for image, is_flagged in zip(output.images, flags, strict=True)
        ]
