"""The interface that torch models and exported models share: arrays in, arrays out.

Legend: B images or sentences · D embedding width · E width of a premise (an image's embedding, and
those of its patches if the head sees them) · G cells along a side of a photo · C labels (3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from clseave_cli.core.config import Precision
from clseave_cli.core.data.images import Preparation
from clseave_cli.core.models.calibration import Calibration
from clseave_cli.core.models.folder import peek
from clseave_cli.core.prediction import Floats
from clseave_cli.errors import ModelError, UsageError
from clseave_cli.processes import ahead, usable_cores
from clseave_cli.progress import SILENT, Progress

_IMAGE_BATCH = 32
_IMAGES_AHEAD = 64

Source = TypeVar("Source")
Details = TypeVar("Details")


class InferenceModel(Protocol):
    """An image tower, a sentence encoder per language, and the head.

    Attributes:
        sources: folder of the model that reads each language, CLIP-VE's language first.
        calibrations: temperature and thresholds of each language.
    """

    sources: dict[str, str]
    calibrations: dict[str, Calibration]

    @property
    def preparation(self) -> Preparation | None:
        """How a photo is resized and cropped; None: not as CLIP does."""
        ...

    def prepare(self, image: Image.Image) -> Floats:
        """(3, height, width) pixels of a decoded RGB image. May be called from any thread."""
        ...

    def embed_images(self, pixels: Floats) -> Floats:
        """(B, E) premises of (B, 3, height, width) pixels."""
        ...

    def embed_sentences(
        self, lang: str, sentences: Sequence[str]
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """(B, D) embeddings of B sentences, and (B,) whether each was truncated."""
        ...

    def probabilities(self, lang: str, hypotheses: Floats, premises: Floats) -> Floats:
        """(B, C) calibrated probabilities, from (B, D) sentence embeddings and premises."""
        ...

    def attention(self, hypotheses: Floats, premises: Floats) -> Floats | None:
        """(B, G, G) attention to the cells of each photo, adding up to 1; None: no patches."""
        ...


def embed_in_batches(
    model: InferenceModel,
    sources: Sequence[Source],
    load: Callable[[Source], tuple[Floats | None, Details]],
) -> Iterator[tuple[Source, tuple[Floats | None, Details]]]:
    """Yields each source with an (E,) embedding and details; loads ahead in several threads.

    `load` returns an image's (3, height, width) pixels and details. Without pixels, there is no
    embedding.
    """
    with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
        loaded = zip(sources, ahead(pool, load, sources, _IMAGES_AHEAD), strict=True)
        while batch := list(islice(loaded, _IMAGE_BATCH)):
            pixels = [each for _, (each, _) in batch if each is not None]
            embeddings = iter(model.embed_images(np.stack(pixels)) if pixels else ())
            for source, (each, details) in batch:
                # A copy, so that a cached embedding does not keep its whole batch in memory.
                yield source, (None if each is None else next(embeddings).copy(), details)


def not_finite(source: str) -> ModelError:
    """The error if a model in `source` gives NaN or infinite probabilities."""
    return ModelError(
        f"{source}: probabilities are not finite; its weights or CLIP-VE's are damaged: copy or "
        "train it again. With --precision fp16, try fp32."
    )


def default_language(runs: Path, student: Path | None = None) -> str:
    """The language of CLIP-VE, even if the exported folder cannot read it; or of a student.

    Raises:
        ModelError: the folder is missing or damaged.
        UsageError: the student reads several languages.
    """
    from clseave_cli.core.prediction import onnx_model

    if student is not None:
        languages: list[str] = peek(student, "student")["languages"]
        if len(languages) > 1:
            raise UsageError(f"--student {student}: reads {', '.join(languages)}; choose --lang.")
        return languages[0]
    if onnx_model.is_exported(runs):
        return onnx_model.source_language(runs)
    from clseave_cli.core.models.clip_ve import source_language

    return source_language(runs / "clip-ve")


def load_model(
    runs: Path,
    languages: Sequence[str] | None = None,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    lasting: bool = True,
    student: Path | None = None,
    progress: Progress = SILENT,
) -> InferenceModel:
    """Loads the models under `runs`, or a folder that `clseave export` wrote.

    Some sentence encoders are loaded only when their language is first used.

    Args:
        runs: either folder; torch is not imported for an exported one.
        languages: to read; None: every language that has a model.
        device: torch's device.
        precision: torch's precision.
        lasting: whether many predictions follow. If so, an exported folder is verified against its
            digests, and its weights are copied and rearranged for this processor: a slower start
            for faster answers. If not, only the manifest is verified, and the image tower's weights
            are released after use. Torch models ignore this.
        student: folder of the student that reads the sentences, instead of those under `runs`.
        progress: receives notes about languages without a temperature.

    Raises:
        ClseaveError: a model or an extra is missing, a model is damaged, or the device is unknown.
    """
    from clseave_cli.core.prediction import onnx_model

    model: InferenceModel
    if onnx_model.is_exported(runs):
        if student is not None:
            raise UsageError(f"--student: {runs} is an exported folder, which has its encoders.")
        model = onnx_model.OnnxModel.from_folder(runs, languages, lasting=lasting)
    else:
        from clseave_cli.core.prediction.torch_model import TorchModel

        model = TorchModel(runs, languages, device, precision, student)
    if without := [k for k, each in model.calibrations.items() if each.temperature == 1]:
        progress.note(
            f"{', '.join(without)}: no temperature was fitted, so probabilities may be too sure; "
            "`clseave calibrate` fits one on dev rows with images."
        )
    return model
