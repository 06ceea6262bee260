"""Batches filled up to few shapes, as captured steps want them; on a CPU here."""

import numpy as np
import pytest
import torch
from PIL import Image

from clseave_cli.core.data.images import Preparation
from clseave_cli.core.models import backbones
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.student import new_student


@pytest.mark.parametrize("pooling", ["terminal", "cls", "mean"])
def test_filled_batches_have_few_shapes_and_the_same_embeddings(encoder, monkeypatch, pooling):
    student = new_student(encoder, 16, pooling).eval()
    random = np.random.default_rng(0)
    sentences = [" ".join(["red", "circle"] * n) for n in random.integers(1, 9, size=400)]
    tokens = student.tokenize(sentences)
    shapes = {False: set(), True: set()}
    for _ in range(40):
        rows = random.choice(len(sentences), size=48, replace=False)
        embeddings = {}
        for filled in (False, True):
            monkeypatch.setattr(SentenceEncoder, "few_shapes", filled)
            batch = student.pack(tokens, rows, places=50)
            shapes[filled].add((tuple(batch.input_ids.shape), len(batch.terminals)))
            with torch.no_grad():
                embeddings[filled] = student(batch)
        assert embeddings[True].shape == (50, 16) and torch.isfinite(embeddings[True]).all()
        torch.testing.assert_close(embeddings[True][:48], embeddings[False], atol=1e-5, rtol=1e-4)
    assert len(shapes[True]) < len(shapes[False]) and len(shapes[True]) <= 5


def test_filling_has_no_gradient(encoder, monkeypatch):
    student = new_student(encoder, 16, "mean")
    monkeypatch.setattr(SentenceEncoder, "few_shapes", True)
    tokens = student.tokenize(["red circle", "a blue square"])
    student(student.pack(tokens, np.arange(2), places=5))[:2].square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("size", [(500, 375), (40, 60), (32, 32)])
def test_uint8_pixels_have_the_features_of_the_processors_own(clip, monkeypatch, size):
    """What a GPU normalises itself: the same pixels but for rounding, so the same features."""
    tower = backbones.load_clip_image(clip).eval()
    random = np.random.default_rng(1)
    picture = Image.fromarray(random.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(size)
    pixels = tower.preprocess([picture])
    cut = torch.from_numpy(np.stack([Preparation.of(tower.processor).cut(picture)]))
    assert cut.dtype == torch.uint8 and pixels.dtype == torch.float32
    with torch.no_grad():
        features = tower(pixels), tower(cut)
    torch.testing.assert_close(features[1], features[0], atol=1e-5, rtol=1e-5)
    assert torch.cosine_similarity(*features).item() > 1 - 1e-5
