"""`illustrate`: draws pictures from the texts of a data set, one file for each key.

Each picture records what it was drawn from. So an interrupted run can be repeated, and no picture
is drawn twice.
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
from clseave_cli.core.training.device import autocast, resolve_device
from clseave_cli.errors import ClseaveError, DataError, ExtraMissing, ModelError, UsageError
from clseave_cli.progress import SILENT, Progress

_FIELD = re.compile(r"\{(\w+)\}")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Wanted(NamedTuple):
    """A picture to draw."""

    key: str  # of the data; names the picture
    prompt: str
    seed: int


class Engine(NamedTuple):
    """Draws pictures."""

    identity: dict[str, Any]  # everything a picture depends on besides its prompt and seed
    draw: Callable[[Wanted], Image.Image | None]  # None: the model withholds it


class Illustrations(NamedTuple):
    """The result of `illustrate`: its folder and numbers of pictures."""

    folder: Path
    drawn: int
    kept: int  # existed before
    withheld: int  # by the model's safety checker


def illustrate(config: IllustrateConfig, progress: Progress = SILENT) -> Illustrations:
    """Draws a picture for every key that has none.

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
            for picture, record in missing:
                image = engine.draw(picture)
                if image is not None:
                    write_png(image, out / f"{picture_name(picture.key)}.png", record)
                    drawn += 1
                task.advance()
    return Illustrations(out, drawn, len(wanted) - len(missing), len(missing) - drawn)


def _wanted(config: IllustrateConfig) -> list[Wanted]:
    """The pictures of all rows, in order; raises a DataError for a bad or incomplete row."""
    by_image = config.guided_by == "image"
    template = config.template or ("{caption}" if by_image else "{sentence1}")
    path = config.input
    if path is None and by_image:
        path = config.data / f"captions_{config.split}.jsonl"
    path = path or require_split_path(config.data, config.split, ENGLISH)
    fields = _FIELD.findall(template)
    prompts: dict[str, dict[str, None]] = {}  # the inner dictionaries are ordered sets
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
        parts = _FIELD.split(template)  # the odd ones are names of fields
        parts[1::2] = [values[name].strip() for name in fields]
        prompts.setdefault(key, {})["".join(parts)] = None
    if not prompts:
        raise DataError(f"{path}: it has no rows.")
    # A picture's seed does not depend on which others are drawn.
    return [
        Wanted(key, " ".join(parts), zlib.crc32(f"{config.seed} {key}".encode()))
        for key, parts in prompts.items()
    ]


def _missing(out: Path, wanted: list[Wanted], engine: Engine) -> list[tuple[Wanted, str]]:
    """The pictures that do not exist yet, each with its record; refuses those of another run."""
    folder, missing = ImageFolder(out), []
    for picture in wanted:
        record = "clseave illustrate " + json.dumps(picture._asdict() | engine.identity)
        existing = folder.get(picture_name(picture.key))
        if existing is None:
            missing.append((picture, record))
        elif png_software(existing) != record:
            raise UsageError(
                f"{existing}: was not drawn by illustrate from this text with these options; "
                "delete it, or choose another --out."
            )
    return missing


def _mini_ve(config: IllustrateConfig) -> Engine:
    """The built-in world, which draws other scenes with the same answer."""
    scenes = scenes_of(config.data, config.split, by_row=config.guided_by == "pairID")

    def draw_scene(wanted: Wanted) -> Image.Image:
        if wanted.key not in scenes:
            raise DataError(f"{config.data}: the world has no picture or row {wanted.key!r}.")
        (scene, hypothesis), random = scenes[wanted.key], Random(wanted.seed)
        return draw(guided(scene, hypothesis, random), random)

    return Engine({"engine": "mini-ve"}, draw_scene)


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
    except Exception as error:  # from the hub, or because the folder is damaged or no pipeline
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"--model {config.model}: cannot be loaded as a diffusers pipeline ({reason})."
        ) from None
    pipeline.set_progress_bar_config(disable=True)
    options = {
        "num_inference_steps": config.steps, "guidance_scale": config.guidance,
        "height": config.size, "width": config.size,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}

    def generate(wanted: Wanted) -> Image.Image | None:
        # On the CPU, for the same noise on every device.
        generator = torch.Generator("cpu").manual_seed(wanted.seed)
        try:
            with warnings.catch_warnings(action="ignore"):
                output = pipeline(prompt=wanted.prompt, generator=generator, **options)
        # The size does not suit the model, or the pipeline takes no prompt or no such option.
        except (torch.OutOfMemoryError, ValueError, TypeError) as error:
            raise ClseaveError(
                f"{wanted.key}: not drawn ({error}). Try another --size or --model."
            ) from None
        is_withheld = getattr(output, "nsfw_content_detected", None) or [False]
        image: Image.Image = output.images[0]
        return None if is_withheld[0] else image

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = json_digest([[path.name, file_digest(path)] for path in files])[:16]
    identity = {"engine": "diffusers", "model": config.model, "digest": digest}
    return Engine(identity | {"precision": precision, **options}, generate)
