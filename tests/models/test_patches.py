"""The head that queries patches, and the states that it gets from the image tower."""

import json
import math

import pytest
import tiny_backbones
import torch
from tiny_world import sentences
from torch.nn import functional

from clseave_cli.core.models import backbones
from clseave_cli.core.models.clip_ve import ClipVE, EntailmentHead, HeadConfig
from clseave_cli.core.models.encoders import module_digest
from clseave_cli.errors import ModelError


def _reference(patches, h, x):
    """Multi-head cross-attention, row by row and head by head: keys and values of every patch."""
    cells = functional.layer_norm(x, x.shape[1:]) + patches.position
    normed = functional.layer_norm(h, h.shape)
    gathered, seen = patches.value.bias, []
    queries, biases = patches.query.weight.split(len(h)), patches.query.bias.split(len(h))
    all_values = patches.value.weight.split(len(h), dim=1)
    for query, bias, value in zip(queries, biases, all_values, strict=True):
        keys, values = cells @ query, cells @ value.T  # (P, D)
        scores = (keys @ normed + cells @ bias) / math.sqrt(len(h))
        weights = scores.exp() / scores.exp().sum()
        gathered = gathered + sum(w * each for w, each in zip(weights, values, strict=True))
        seen.append(weights)
    return gathered, torch.stack(seen)


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = EntailmentHead(HeadConfig(embedding_dim=8, patch_grid=3, patch_heads=2))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head.eval()


def test_the_attention_equals_the_equations_spelled_out(head):
    h, premise = torch.randn(5, 8), torch.randn(5, 10 * 8)
    p, x = premise[:, :8], premise[:, 8:].reshape(5, 9, 8)
    with torch.no_grad():
        state, weights = head.patches(h, x)
        for row in range(5):
            expected, expected_weights = _reference(head.patches, h[row], x[row])
            torch.testing.assert_close(state[row], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(weights[row], expected_weights, rtol=1e-4, atol=1e-5)
        seen = []
        head.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        head(h, premise)
        attention = head.attention(h, premise)
    h, p = functional.normalize(h), functional.normalize(p)
    torch.testing.assert_close(seen[0], torch.cat([h, p, (h - p).abs(), h * p, state], dim=1))
    torch.testing.assert_close(attention, weights.mean(dim=1).reshape(5, 3, 3))


def test_the_attention_learns_to_find_what_is_named():
    """A planted world: does one of nine cells show the thing that the hypothesis is?"""
    generator = torch.Generator().manual_seed(0)
    things = torch.randn(12, 16, generator=generator)

    def pairs(count):
        cells = torch.rand(count, 12, generator=generator).argsort(dim=1)[:, :9]
        named = torch.randint(12, (count,), generator=generator)
        premise = torch.cat([torch.zeros(count, 1, 16), things[cells]], dim=1).flatten(1)
        return things[named], premise, cells == named[:, None]

    torch.manual_seed(0)
    head = EntailmentHead(HeadConfig(embedding_dim=16, patch_grid=3, dropout=0.0))
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    h, premise, shows = pairs(1000)

    def mass_over_area():
        return head.attention(h, premise).flatten(1)[shows].mean().item() * 9

    assert 0.7 < mass_over_area() < 1.4
    for _ in range(100):
        batch = pairs(128)
        loss = functional.cross_entropy(head(*batch[:2]), batch[2].any(dim=1).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mass_over_area() > 3


def test_patches_may_be_in_half_precision_and_their_order_counts(head):
    h, premise = torch.randn(1, 8), torch.randn(1, 10 * 8)
    with torch.no_grad():
        whole = head(h, premise)
        torch.testing.assert_close(head(h, premise.half()), whole, rtol=2e-2, atol=2e-2)
        moved = premise.clone()
        moved[:, 8:16], moved[:, 16:24] = premise[:, 16:24], premise[:, 8:16]
        assert not torch.allclose(head(h, moved), whole, atol=1e-3)


@pytest.mark.parametrize("layout", ["clip", "siglip", "chinese_clip", "altclip"])
def test_the_patches_are_the_last_layers_inputs(layout, world, tmp_path):
    folder = tiny_backbones.TEACHERS[layout](tmp_path, sentences(world))
    image = backbones.load_clip_image(folder).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled = image(pixels)
        image.patch_grid = 2
        premise = image(pixels)
        read = []
        last = image.backbone.encoder.layers[-1]
        last.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        image.backbone(pixel_values=pixels)
        states = image.projection(image.backbone.post_layernorm(read[0][:, -4:]))
        image.patch_grid = 1
        averaged = image(pixels)
    assert premise.shape == (2, image.embedding_dim * 5) and image.grid == 2
    torch.testing.assert_close(premise, torch.cat([pooled, states.flatten(1)], dim=1))
    torch.testing.assert_close(averaged, torch.cat([pooled, states.mean(dim=1)], dim=1))


def test_grids_that_do_not_fit_are_refused(clip, world, tmp_path):
    for grid in (3, 4):
        with pytest.raises(ModelError, match=rf"reads {grid} × {grid} patches, .* tower's 2 × 2"):
            ClipVE.from_clip(clip, head="patches", patch_grid=grid)
    folder = tiny_backbones.new_siglip2(tmp_path, sentences(world))
    with pytest.raises(ModelError, match="no fixed grid of patches; use --head pooled"):
        ClipVE.from_clip(folder, head="patches")


def test_a_head_with_patches_is_the_same_after_save_and_load(clip, tmp_path):
    torch.manual_seed(0)
    model = ClipVE.from_clip(clip, head="patches").eval()
    model.save(tmp_path)
    again = ClipVE.from_folder(tmp_path)
    assert module_digest(again) == module_digest(model)
    assert again.image.patch_grid == 2 and again.fingerprint == model.fingerprint


def test_a_pooled_head_is_saved_without_patch_options(clip, tmp_path):
    ClipVE.from_clip(clip).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    pooled = {"embedding_dim": 16, "hidden_dim": 128, "dropout": 0.1, "normalize": True}
    assert config["head"] == pooled
