"""Models as `predict` and `serve` see them: arrays in, arrays out, whatever computes.

Legend: B images or sentences · D embedding width · E width of a premise (an image's embedding, and
those of its patches if the head sees them) · G cells along a side of a photo · C labels (3).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from clseave_cli.core.config import Precision
from clseave_cli.core.data.images import Preparation
from clseave_cli.core.models.calibration import Calibration
from clseave_cli.core.models.folder import peek
from clseave_cli.core.prediction import Floats
from clseave_cli.errors import UsageError
from clseave_cli.progress import SILENT, Progress


class InferenceModel(Protocol):
    """An image tower, a sentence encoder per language, and the head.

    Attributes:
        sources: the folder of the model that reads each language, CLIP-VE's language first.
        calibrations: temperature and thresholds of each language.
    """

    sources: dict[str, str]
    calibrations: dict[str, Calibration]

    @property
    def preparation(self) -> Preparation | None:
        """How a photo is cut for the image tower; None: not as by CLIP's."""
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
        """(B, D) embeddings of B sentences, and (B,) which of them were cut at the limit."""
        ...

    def probabilities(self, lang: str, hypotheses: Floats, premises: Floats) -> Floats:
        """(B, C) calibrated probabilities, from (B, D) sentence embeddings and premises."""
        ...

    def attention(self, hypotheses: Floats, premises: Floats) -> Floats | None:
        """(B, G, G) shares of the cells of the photos; None: the head sees no cells."""
        ...


def own_language(runs: Path, student: Path | None = None) -> str:
    """The language CLIP-VE itself reads, which an exported folder may lack; or that of a student.

    Args:
        runs: as for `load_model`.
        student: likewise.

    Raises:
        ModelError: no such folder, or a damaged one.
        UsageError: the student reads several languages.
    """
    from clseave_cli.core.prediction import onnx_model

    if student is not None:
        languages: list[str] = peek(student, "student")["languages"]
        if len(languages) > 1:
            raise UsageError(f"--student {student}: reads {', '.join(languages)}; choose --lang.")
        return languages[0]
    if onnx_model.is_exported(runs):
        return onnx_model.own_language(runs)
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

    A sentence encoder may be loaded only when its language is first asked for.

    Args:
        runs: either folder. For an exported one, torch is not imported.
        languages: that will be asked for; None: every one there is a model for.
        device: where torch computes.
        precision: how torch computes.
        lasting: for many answers. An exported folder is then compared with its digests, and its
            weights are arranged for this processor: seconds at the start, and a copy in memory,
            for faster answers. Otherwise only its manifest is checked, and a tower's weights leave
            memory when it has answered. Torch's models are always loaded to last.
        student: what reads the sentences, instead of the models under `runs`.
        progress: told of languages without a temperature.

    Raises:
        ClseaveError: no model for a language, a damaged one, a missing extra, no such device.
    """
    from clseave_cli.core.prediction import onnx_model

    model: InferenceModel
    if onnx_model.is_exported(runs):
        if student is not None:
            raise UsageError(f"--student: {runs} is an exported folder, which has its encoders.")
        model = onnx_model.OnnxModel.from_folder(runs, languages, lasting=lasting)
    else:
        from clseave_cli.core.prediction.torch_model import TorchModel

        model = TorchModel.from_runs(runs, languages, device, precision, student)
    if without := [k for k, each in model.calibrations.items() if each.temperature == 1]:
        progress.note(
            f"{', '.join(without)}: no temperature was fitted, so probabilities may be too sure; "
            "`clseave calibrate` fits one on dev rows with images."
        )
    return model
