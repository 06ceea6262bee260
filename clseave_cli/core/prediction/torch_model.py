"""The trained models in torch, as an `InferenceModel`."""

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

#: Image towers with fewer weights encode one example fastest in one thread.
_SMALL = 20_000_000


class TorchModel:
    """CLIP-VE and its students.

    Attributes:
        clip_ve: image tower and head; its text tower may be a student.
    """

    def __init__(
        self,
        runs: Path,
        languages: Sequence[str] | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        student: Path | None = None,
    ) -> None:
        """Loads CLIP-VE, or CLIP-VE with the first student; other students when they are needed.

        Args and errors are those of `load_model`.
        """
        target = resolve_device(device)
        folder = runs / "clip-ve"
        source_lang = source_language(folder)
        available = {source_lang: folder}
        if student is not None:
            available = dict.fromkeys(peek(student, "student")["languages"], student)
        elif list(languages or ()) != [source_lang]:  # otherwise skip the search for students
            # CLIP-VE reads its language even if a student can, too.
            available |= find_students(runs) | available
        for lang in languages or ():
            if lang not in available:
                raise ModelError(
                    f"{student or runs}: no model for {lang}; available: {', '.join(available)}. "
                    f"`clseave align --lang {lang}` makes one."
                )
        self._folders = {lang: available[lang] for lang in languages or available}
        self.sources = {lang: str(each) for lang, each in self._folders.items()}
        self.calibrations = dict.fromkeys(self._folders, Calibration())
        # Damage is reported when its language is used; other languages still work.
        self._damaged: dict[str, ModelError] = {}
        for lang, each in self._folders.items():
            try:
                self.calibrations[lang] = read_calibrations(each).get(lang, Calibration())
            except ModelError as error:
                self._damaged[lang] = error
        reads_source = self._folders.get(source_lang) == folder
        first = folder if reads_source else next(iter(self._folders.values()))
        text = None if reads_source else load_student(first, fingerprint(folder))
        self.clip_ve = ClipVE.from_folder(folder, text=text).to(target).eval()
        self._encoders = {first: self.clip_ve.text}
        self.preparation = self.clip_ve.image.preparation
        self._device = self.clip_ve.image.device
        self._autocast = autocast(precision, self._device)
        self._is_small = sum(part.numel() for part in self.clip_ve.image.parameters()) < _SMALL

    def encoder(self, lang: str) -> SentenceEncoder:
        """The encoder of a language; raises `ModelError` if it is damaged or of another teacher."""
        if lang in self._damaged:
            raise self._damaged[lang]
        folder = self._folders[lang]
        if folder not in self._encoders:
            self._encoders[folder] = load_student(folder, self.clip_ve.fingerprint).to(self._device)
        return self._encoders[folder]

    def prepare(self, image: Image.Image) -> Floats:
        return _array(self.clip_ve.image.preprocess([image])[0])

    def embed_images(self, pixels: Floats) -> Floats:
        with torch.no_grad(), self._autocast(), self._threads(len(pixels)):
            return _array(self.clip_ve.image(torch.from_numpy(pixels).to(self._device)))

    def embed_sentences(
        self, lang: str, sentences: Sequence[str]
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        encoder = self.encoder(lang)
        tokens = encoder.tokenize(list(sentences))
        with torch.no_grad(), self._autocast(), self._threads(len(sentences)):
            embeddings = torch.cat([part.float() for part in encoder.embed(tokens)])
        return _array(embeddings), tokens.truncated

    def probabilities(self, lang: str, hypotheses: Floats, premises: Floats) -> Floats:
        inputs = (torch.from_numpy(part).to(self._device) for part in (hypotheses, premises))
        with torch.no_grad(), self._threads(len(hypotheses)):
            probabilities = _array(self.clip_ve(*inputs).softmax(dim=1))
        return self.calibrations[lang].apply(probabilities)

    def attention(self, hypotheses: Floats, premises: Floats) -> Floats | None:
        if not self.clip_ve.head.config.patch_grid:
            return None
        inputs = (torch.from_numpy(part).to(self._device) for part in (hypotheses, premises))
        with torch.no_grad(), self._threads(len(hypotheses)):
            return _array(self.clip_ve.head.attention(*inputs))

    @contextmanager
    def _threads(self, num_examples: int) -> Iterator[None]:
        """Uses one thread for one example of a small model: several would mostly wait.

        While other programs run, waiting takes up to a hundred times as long as the work
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
