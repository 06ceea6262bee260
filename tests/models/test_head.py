import pytest
import torch
from torch import nn

from clseave_cli.core.models.clip_ve import EntailmentHead, HeadConfig


@pytest.fixture
def embeddings():
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


def _reference(head, h, p):
    """Eq. 3.1–3.3 spelled out, for a head in eval mode."""
    h, p = (v / v.norm(dim=1, keepdim=True) for v in (h, p))
    x = torch.cat([h, p, (h - p).abs(), h * p], dim=1)

    def batch_norm(layer, x):
        scale = layer.weight / torch.sqrt(layer.running_var + layer.eps)
        return (x - layer.running_mean) * scale + layer.bias

    norm_in, _, first, _, second, _, norm_out, _, last = head.layers
    x = batch_norm(norm_in, x)
    x = torch.clamp(x @ first.weight.T + first.bias, min=0)
    x = torch.clamp(x @ second.weight.T + second.bias, min=0)
    return batch_norm(norm_out, x) @ last.weight.T + last.bias


def test_the_head_equals_the_equations_spelled_out(embeddings):
    torch.manual_seed(1)
    head = EntailmentHead(HeadConfig(embedding_dim=8, hidden_dim=16))
    for _ in range(3):  # so that the running statistics are not the initial ones
        head(*embeddings)
    head.eval()
    torch.testing.assert_close(head(*embeddings), _reference(head, *embeddings))


@pytest.fixture
def read(monkeypatch):
    """The inputs of a head's layers."""
    read = []
    monkeypatch.setattr(
        nn.Sequential, "forward", lambda layers, features: read.append(features) or features[:, :3]
    )
    return read


@pytest.mark.parametrize(
    ("normalize", "h", "p", "expected"),
    [
        # [h, p, |h − p|, h ∘ p]
        (False, [1.0, -2.0], [3.0, 0.5], [1.0, -2.0, 3.0, 0.5, 2.0, 2.5, 3.0, -1.0]),
        (True, [3.0, 4.0], [0.0, -5.0], [0.6, 0.8, 0.0, -1.0, 0.6, 1.8, 0.0, -0.8]),
    ],
)
def test_features_by_hand(read, normalize, h, p, expected):
    head = EntailmentHead(HeadConfig(embedding_dim=2, normalize=normalize, dropout=0.0))
    head(torch.tensor([h]), torch.tensor([p]))
    torch.testing.assert_close(read[0], torch.tensor([expected]))


def test_the_layers_are_those_of_the_thesis():
    head = EntailmentHead(HeadConfig())
    norm, drop, linear, relu = nn.BatchNorm1d, nn.Dropout, nn.Linear, nn.ReLU
    kinds = [norm, drop, linear, relu, linear, relu, norm, drop, linear]
    assert [type(m) for m in head.layers] == kinds
    shapes = [tuple(m.weight.shape) for m in head.layers if isinstance(m, linear)]
    assert shapes == [(128, 2048), (128, 128), (3, 128)]
    assert [m.p for m in head.layers if isinstance(m, drop)] == [0.1, 0.1]


def test_logits_are_float32_for_any_input_type(embeddings):
    head = EntailmentHead(HeadConfig(embedding_dim=8)).eval()
    h, p = embeddings
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(h.bfloat16(), p)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head(h.bfloat16().float(), p))


def test_dropout_acts_on_each_embedding_in_training_only(embeddings, read):
    head = EntailmentHead(HeadConfig(embedding_dim=8, dropout=0.5))
    torch.manual_seed(0)
    head.train()(*embeddings)
    head.eval()(*embeddings)
    dropped, kept = read
    assert (dropped[:, :16] == 0).any() and not (kept[:, :16] == 0).any()
