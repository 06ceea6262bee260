"""The trained models, computed by torch.

Legend: B images or sentences · D embedding width · E width of a premise, D or (1 + G²) · D ·
G cells along a side of a photo · C labels (3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from clseave_cli.core.config import Precision
from clseave_cli.core.models.calibration import Calibration, read_calibrations
from clseave_cli.core.models.clip_ve import ClipVE, fingerprint, source_language
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.folder import peek
from clseave_cli.core.models.listing import find_students
from clseave_cli.core.models.student import load_student
from clseave_cli.core.prediction import Floats
from clseave_cli.core.training.device import autocast, resolve_device
from clseave_cli.errors import ModelError

#: Weights of the image tower below which a second thread does not pay for one example.
_SMALL = 20_000_000


class TorchModel:
    """CLIP-VE and its students, as an `InferenceModel`.

    Attributes:
        clip_ve: image tower and head; its text tower may be a student.
        sources: the folder each language's encoder comes from.
        calibrations: temperature and thresholds of each language.
        preparation: how a photo is cut for the image tower; None: not as CLIP's.
    """

    def __init__(
        self,
        clip_ve: ClipVE,
        folders: dict[str, Path],
        loaded: dict[Path, SentenceEncoder],
        precision: Precision = "auto",
    ) -> None:
        """Puts loaded models together; `from_runs` does so from folders.

        Args:
            clip_ve: image tower and head.
            folders: of the encoder that reads each language.
            loaded: the encoders of some of these folders; the others are loaded when needed.
            precision: arithmetic of the matrix products.
        """
        self.clip_ve = clip_ve.eval()
        self.sources = {lang: str(folder) for lang, folder in folders.items()}
        self.calibrations = dict.fromkeys(folders, Calibration())
        # A language is held up by its own model's damage only, once it is asked for.
        self._damaged: dict[str, ModelError] = {}
        for lang, folder in folders.items():
            try:
                self.calibrations[lang] = read_calibrations(folder).get(lang, Calibration())
            except ModelError as error:
                self._damaged[lang] = error
        self.preparation = clip_ve.image.preparation
        self._folders = folders
        self._loaded = {folder: encoder.eval() for folder, encoder in loaded.items()}
        self._device = clip_ve.image.device
        self._autocast = autocast(precision, self._device)
        self._is_small = sum(part.numel() for part in clip_ve.image.parameters()) < _SMALL

    @classmethod
    def from_runs(
        cls,
        runs: Path,
        languages: Sequence[str] | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        only: Path | None = None,
    ) -> TorchModel:
        """Loads CLIP-VE and the first student needed; further ones when they are.

        Args:
            runs: folder of the models.
            languages: that will be asked for; None: every one there is a model for.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            precision: arithmetic of the matrix products.
            only: a student that reads every sentence; None: whichever under `runs` reads it.

        Raises:
            ClseaveError: no model for a language, a damaged one, or an unknown device.
        """
        target = resolve_device(device)
        folder = runs / "clip-ve"
        source_lang = source_language(folder)
        there = {source_lang: folder}
        if only is not None:
            there = dict.fromkeys(peek(only, "student")["languages"], only)
        elif list(languages or ()) != [source_lang]:  # otherwise no student is so much as looked at
            # A student that reads the source language too leaves it to its teacher.
            there |= find_students(runs) | there
        for lang in languages or ():
            if lang not in there:
                raise ModelError(
                    f"{only or runs}: no model for {lang}; languages there: {', '.join(there)}. "
                    f"`clseave align --lang {lang}` makes one."
                )
        wanted = there if languages is None else {lang: there[lang] for lang in languages}
        if wanted.get(source_lang) == folder:
            clip_ve = ClipVE.from_folder(folder).to(target)
            return cls(clip_ve, wanted, {folder: clip_ve.text}, precision)
        first = next(iter(wanted.values()))
        student = load_student(first, fingerprint(folder))
        clip_ve = ClipVE.from_folder(folder, text=student).to(target)
        return cls(clip_ve, wanted, {first: student}, precision)

    def encoder(self, lang: str) -> SentenceEncoder:
        """The encoder that reads a language.

        Raises:
            ModelError: it is loaded now, and damaged or of another teacher.
        """
        if lang in self._damaged:
            raise self._damaged[lang]
        folder = self._folders[lang]
        if folder not in self._loaded:
            student = load_student(folder, self.clip_ve.fingerprint)
            self._loaded[folder] = student.to(self._device)
        return self._loaded[folder]

    def prepare(self, image: Image.Image) -> Floats:
        """(3, height, width) pixels of a decoded RGB image. May be called from any thread."""
        return _array(self.clip_ve.image.preprocess([image])[0])

    def embed_images(self, pixels: Floats) -> Floats:
        """(B, E) premises of (B, 3, height, width) pixels."""
        with torch.no_grad(), self._autocast(), self._threads(len(pixels)):
            return _array(self.clip_ve.image(torch.from_numpy(pixels).to(self._device)))

    def embed_sentences(
        self, lang: str, sentences: Sequence[str]
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """(B, D) embeddings of B sentences, and (B,) which of them were cut at the limit."""
        encoder = self.encoder(lang)
        tokens = encoder.tokenize(list(sentences))
        with torch.no_grad(), self._autocast(), self._threads(len(sentences)):
            embeddings = torch.cat([part.float() for part in encoder.embed(tokens)])
        return _array(embeddings), tokens.truncated

    def probabilities(self, lang: str, hypotheses: Floats, premises: Floats) -> Floats:
        """(B, C) calibrated probabilities, from (B, D) sentence embeddings and premises."""
        both = (torch.from_numpy(part).to(self._device) for part in (hypotheses, premises))
        with torch.no_grad(), self._threads(len(hypotheses)):
            probabilities = _array(self.clip_ve(*both).softmax(dim=1))
        return self.calibrations[lang].apply(probabilities)

    def attention(self, hypotheses: Floats, premises: Floats) -> Floats | None:
        """(B, G, G) shares of the cells of the photos; None: the head sees no cells."""
        if not self.clip_ve.head.config.patch_grid:
            return None
        both = (torch.from_numpy(part).to(self._device) for part in (hypotheses, premises))
        with torch.no_grad(), self._threads(len(hypotheses)):
            return _array(self.clip_ve.head.attention(*both))

    @contextmanager
    def _threads(self, num_examples: int) -> Iterator[None]:
        """One thread for one example of a small model: several would mostly wait for each other.

        Beside other programs that waiting takes up to a hundred times as long as the work
        (docs/experiments.md, 2026-11-26).
        """
        before = torch.get_num_threads()
        if self._is_small and num_examples == 1:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.float().cpu().numpy()
    return array
