"""`illustrate`: pictures drawn from the texts of a data set, one file for each key.

A picture says in itself what it was made from. So the folder is the memory of what is done, however
a run ended, and no picture is drawn twice.
"""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from PIL import Image

from clseave_cli.core.config import IllustrateConfig
from clseave_cli.core.data.heat_map import png_software, write_png
from clseave_cli.core.data.images import ImageFolder, picture_name
from clseave_cli.core.data.mini_ve.drawing import draw
from clseave_cli.core.data.mini_ve.generation import guided, scenes_of
from clseave_cli.core.data.records import ENGLISH, image_stem, require_split_path
from clseave_cli.core.data.rows import (
    ID_KEYS,
    IMAGE_KEYS,
    BadRow,
    image_name,
    read_rows,
    require_text,
)
from clseave_cli.core.files import file_digest, json_digest, locked_target, sweep
from clseave_cli.core.training.precision import autocast, resolve_device
from clseave_cli.errors import ClseaveError, DataError, ExtraMissing, ModelError, UsageError
from clseave_cli.progress import SILENT, Progress

_FIELD = re.compile(r"\{(\w+)\}")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Wanted(NamedTuple):
    """A picture to draw."""

    key: str  # of the data, by which the picture is named
    prompt: str
    seed: int


class Engine(NamedTuple):
    """What draws."""

    identity: dict[str, Any]  # all that a picture depends on besides its prompt and seed
    draw: Callable[[Wanted], Image.Image | None]  # None: the model withholds it


class Illustrations(NamedTuple):
    """What `illustrate` came to."""

    folder: Path
    drawn: int
    kept: int  # there before
    withheld: int  # by the model's safety checker


def illustrate(config: IllustrateConfig, progress: Progress = SILENT) -> Illustrations:
    """Draws a picture for every key that has none yet.

    Raises:
        ClseaveError: bad rows, an unusable model, a full disk, or a file in the way.
    """
    out = config.out or config.data / f"guided-{config.guided_by}"
    wanted = _wanted(config)
    engine = (_diffusers if config.engine == "diffusers" else _mini_ve)(config)
    with locked_target(out):
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
        missing = _missing(out, wanted, engine)
        drawn = 0
        with progress.task(f"illustrate {config.split}", len(missing), "pictures") as task:
            for each, record in missing:
                image = engine.draw(each)
                if image is not None:
                    write_png(image, out / f"{picture_name(each.key)}.png", record)
                    drawn += 1
                task.advance()
    return Illustrations(out, drawn, len(wanted) - len(missing), len(missing) - drawn)


def _wanted(config: IllustrateConfig) -> list[Wanted]:
    """The pictures to draw, in the order of the rows.

    Raises:
        DataError: a bad row, or one that lacks what the template names.
    """
    by_image = config.guided_by == "image"
    template = config.template or ("{caption}" if by_image else "{sentence1}")
    path = config.input
    if path is None and by_image:
        path = config.data / f"captions_{config.split}.jsonl"
    path = path or require_split_path(config.data, config.split, ENGLISH)
    fields = _FIELD.findall(template)
    prompts: dict[str, dict[str, None]] = {}  # dictionaries as sets in order
    for line, row, _ in read_rows(path, {*IMAGE_KEYS, *ID_KEYS, *fields}):
        try:
            if by_image and not isinstance(row, BadRow):
                row = row | {"image": image_name(row)}
            key = require_text(row, ("image",) if by_image else ID_KEYS, "the picture's name")
            values = {name: require_text(row, (name,), "what --template names") for name in fields}
        except BadRow as bad:
            raise DataError.at(path, line, str(bad)) from None
        key = image_stem(key) if by_image else key
        if key not in prompts and len(prompts) == config.limit:
            break
        # Names of fields stand at odd places.
        parts = _FIELD.split(template)
        parts[1::2] = [values[name].strip() for name in fields]
        prompts.setdefault(key, {})["".join(parts)] = None
    if not prompts:
        raise DataError(f"{path}: no rows in it.")
    # A picture's seed is the same whichever others are drawn.
    return [
        Wanted(key, " ".join(parts), zlib.crc32(f"{config.seed} {key}".encode()))
        for key, parts in prompts.items()
    ]


def _missing(out: Path, wanted: list[Wanted], engine: Engine) -> list[tuple[Wanted, str]]:
    """The pictures that are not there yet, and what each will say it was made by.

    Raises:
        UsageError: a picture is there that other options made, or something else did.
    """
    there, missing = ImageFolder(out), []
    for each in wanted:
        record = "clseave illustrate " + json.dumps(each._asdict() | engine.identity)
        present = there.get(picture_name(each.key))
        if present is None:
            missing.append((each, record))
        elif png_software(present) != record:
            raise UsageError(
                f"{present}: was not drawn by illustrate from this text with these options; delete "
                "it, or choose another --out."
            )
    return missing


def _mini_ve(config: IllustrateConfig) -> Engine:
    """The built-in world: other scenes of which the same is true."""
    asked = scenes_of(config.data, config.split, by_row=config.guided_by == "pairID")

    def picture(wanted: Wanted) -> Image.Image:
        if wanted.key not in asked:
            raise DataError(f"{config.data}: the world has no picture or row {wanted.key!r}.")
        (scene, hypothesis), random = asked[wanted.key], Random(wanted.seed)
        return draw(guided(scene, hypothesis, random), random)

    return Engine({"engine": "mini-ve"}, picture)


def _diffusers(config: IllustrateConfig) -> Engine:
    """A text-to-image model of the diffusers package."""
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
            pipeline = load(folder, dtype=dtype, use_safetensors=True).to(device)
    except Exception as error:  # of the hub, of a damaged folder, or of one of another kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"--model {config.model}: not loaded as a pipeline of diffusers ({reason})."
        ) from None
    pipeline.set_progress_bar_config(disable=True)
    options = {
        "num_inference_steps": config.steps, "guidance_scale": config.guidance,
        "height": config.size, "width": config.size,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}

    def picture(wanted: Wanted) -> Image.Image | None:
        # Of the CPU: the same noise on every device.
        generator = torch.Generator("cpu").manual_seed(wanted.seed)
        try:
            with warnings.catch_warnings(action="ignore"):
                output = pipeline(prompt=wanted.prompt, generator=generator, **options)
        # A size that does not fit the model, or a pipeline that takes no prompt or no such option.
        except (torch.OutOfMemoryError, ValueError, TypeError) as error:
            raise ClseaveError(
                f"{wanted.key}: not drawn ({error}). Try another --size, or another --model."
            ) from None
        is_black = getattr(output, "nsfw_content_detected", None) or [False]
        image: Image.Image = output.images[0]
        return None if is_black[0] else image

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = json_digest([[path.name, file_digest(path)] for path in files])[:16]
    identity = {"engine": "diffusers", "model": config.model, "digest": digest}
    return Engine(identity | {"precision": precision, **options}, picture)
