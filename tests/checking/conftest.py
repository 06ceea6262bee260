"""A folder of pictures, and a model that knows their colours."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny_world import COLOURS

from clseave_cli.core.models.calibration import Calibration
from clseave_cli.core.prediction.checking import findings


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The working directory: red.png and blue.png, 32 pixels wide; a secret lies beside it."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), COLOURS[name]).save(folder / f"{name}.png")
        Image.new("RGB", (32, 32), COLOURS[name]).save(tmp_path / f"secret-{name}.png")
    monkeypatch.chdir(folder)
    return folder


class ColourModel:
    """Sees whether a picture is red; a text that says so fits, one that says blue does not."""

    sources = {"en": "clip-ve"}  # noqa: RUF012

    def __init__(self) -> None:
        self.num_images = 0
        self.calibrations = {"en": Calibration()}

    def prepare(self, image):
        return np.asarray(image.resize((32, 32)), np.float32).transpose(2, 0, 1)

    def embed_images(self, pixels):
        self.num_images += len(pixels)
        return pixels.mean((2, 3)) > 128  # (B, 3)

    def embed_sentences(self, lang, sentences):
        words = [[word in text.lower() for word in ("red", "green", "blue")] for text in sentences]
        return np.array(words), np.array(["cut" in text for text in sentences])

    def probabilities(self, lang, hypotheses, premises):
        rows = {"fits": (0.9, 0.06, 0.04), "no": (0.01, 0.02, 0.97), "?": (0.4, 0.3, 0.3)}
        return np.array(
            [
                rows["?" if not text.any() else "fits" if (text == image).all() else "no"]
                for text, image in zip(hypotheses, premises, strict=True)
            ]
        )


@pytest.fixture
def model(monkeypatch):
    """Takes the place of the trained models."""
    colours = ColourModel()
    monkeypatch.setattr(findings, "load_model", lambda *arguments, **more: colours)
    return colours
