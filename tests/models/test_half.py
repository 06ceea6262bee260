"""Training in bfloat16 throughout, as on a GPU; errors are measured on one or two layers."""

import numpy as np
import pytest
import torch
from torch import nn

from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.half import in_bfloat16

SENTENCES = ["two dogs run", "a man in a red shirt", "yes .", "The square is blue."] * 3


@pytest.fixture
def text(sentence_encoder):
    for module in sentence_encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return sentence_encoder.requires_grad_(True).train()


def _gradients(text, monkeypatch, *, whole, autocast=True):
    monkeypatch.setattr(SentenceEncoder, "trains_in_bfloat16", whole)
    batch = text.pack(text.tokenize(SENTENCES), np.arange(len(SENTENCES)))
    text.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        embeddings = text(batch).float()
    (embeddings**2).mean().backward()
    gradients = [p.grad.flatten() for p in text.parameters() if p.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    return torch.cat(gradients)


def test_gradients_are_as_good_as_with_autocast(text, monkeypatch):
    exact = _gradients(text, monkeypatch, whole=False, autocast=False)
    cast, halved = (_gradients(text, monkeypatch, whole=whole) - exact for whole in (False, True))
    assert 0 < halved.norm() < 3 * cast.norm() < 0.1 * exact.norm()


def test_the_module_is_restored(text):
    before = dict(text.named_parameters())
    with pytest.raises(ZeroDivisionError), in_bfloat16(text.backbone):
        assert {p.dtype for p in text.backbone.parameters()} == {torch.bfloat16}
        raise ZeroDivisionError
    assert all(before[name] is weight for name, weight in text.named_parameters())
    assert not any("forward" in vars(module) for module in text.modules())


def test_frozen_weights_and_shared_ones():
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    layers[0].requires_grad_(False)
    layers[2].weight = layers[1].weight
    inputs = torch.randn(6, 4)
    expected = torch.autograd.grad(layers(inputs).sum(), layers[1].weight)[0]
    with in_bfloat16(layers):
        assert layers[2].weight is layers[1].weight
        layers(inputs).float().sum().backward()
    assert layers[0].weight.grad is None and layers[0].bias.grad is None
    torch.testing.assert_close(layers[1].weight.grad, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("num_embeddings", [3, 2000])
def test_tables_small_and_large(num_embeddings):
    table = nn.Embedding(num_embeddings, 8)
    ids = torch.tensor([[0, 2, 2], [1, 0, 0]])
    expected = table(ids).bfloat16()
    with in_bfloat16(table):
        output = table(ids)
        output.float().sum().backward()
    assert torch.equal(output, expected)
    assert table.weight.grad[:3].mean(dim=1).tolist() == [3, 1, 2]


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, True), (torch.float16, False)])
def test_only_training_by_bfloat16_on_a_gpu_uses_it(text, monkeypatch, dtype, expected):
    assert not text.trains_in_bfloat16
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: dtype)
    assert text.trains_in_bfloat16 == expected
    assert not text.eval().trains_in_bfloat16
