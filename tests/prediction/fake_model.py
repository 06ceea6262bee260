"""A model that tells what it was given, so that the service can be watched without one."""

from __future__ import annotations

import threading

import numpy as np

from clseave_cli.core.models.calibration import Calibration


class FakeModel:
    """Embeds an image as its mean colour, and a sentence as its length."""

    def __init__(self) -> None:
        self.sources = {"en": "runs/clip-ve", "de": "runs/align-de"}
        self.image_batches: list[int] = []
        self.sentence_batches: list[tuple[str, list[str]]] = []
        self.num_prepared = 0
        self.gate = threading.Event()
        self.gate.set()
        self.poison: float | None = None  # a red that fails its batch
        self.broken_scores = None  # what becomes of the probabilities
        self.cells = None  # (G, G) shares of a head that sees patches
        self.preparation = None
        self.calibrations = dict.fromkeys(self.sources, Calibration())

    def prepare(self, image):
        self.num_prepared += 1
        return np.asarray(image, np.float32).mean((0, 1))[:, None, None] / 255

    def embed_images(self, pixels):
        assert self.gate.wait(30)
        if self.poison is not None and (np.isclose(pixels[:, 0, 0, 0], self.poison)).any():
            raise RuntimeError("out of memory")
        self.image_batches.append(len(pixels))
        return pixels[:, :, 0, 0]

    def embed_sentences(self, lang, sentences):
        self.sentence_batches.append((lang, list(sentences)))
        lengths = np.array([len(sentence) for sentence in sentences])
        return np.repeat(lengths[:, None], 3, axis=1).astype(np.float32), lengths > 50

    def probabilities(self, lang, hypotheses, premises):
        scores = np.exp(premises)
        scores = scores / scores.sum(axis=1, keepdims=True)
        return scores if self.broken_scores is None else self.broken_scores(scores)

    def attention(self, hypotheses, premises):
        return None if self.cells is None else [self.cells] * len(hypotheses)
