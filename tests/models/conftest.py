"""Encoders and damage that several of these tests need."""

from __future__ import annotations

import pytest
import torch

from clseave_cli.core.models import backbones
from clseave_cli.core.models.student import new_student


@pytest.fixture(params=["clip", "bert"])
def sentence_encoder(request, clip, encoder):
    """An untrained text tower or student, in eval mode."""
    torch.manual_seed(0)
    model = backbones.load_clip_text(clip) if request.param == "clip" else new_student(encoder, 16)
    return model.eval()
