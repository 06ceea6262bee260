"""The head that queries patches, and the states that the image tower gives it."""

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
    state, seen = functional.layer_norm(h, h.shape), []
    for block in patches.blocks:
        normed, gathered = block.norm(state), []
        for query, bias in zip(
            block.query.weight.split(len(h)), block.query.bias.split(len(h)), strict=True
        ):
            keys = cells @ query  # (P, D)
            scores = (keys @ normed + cells @ bias) / math.sqrt(len(h))
            weights = scores.exp() / scores.exp().sum()
            gathered.append(sum(w * cell for w, cell in zip(weights, cells, strict=True)))
            seen.append(weights)
        state = state + block.value.weight @ torch.cat(gathered) + block.value.bias
    return state, torch.stack(seen)


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
            wanted, wanted_weights = _reference(head.patches, h[row], x[row])
            torch.testing.assert_close(state[row], wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(weights[row], wanted_weights, rtol=1e-4, atol=1e-5)
        # What is gathered stands behind the thesis's features, and the mean of all heads is shown.
        h, p = functional.normalize(h), functional.normalize(p)
        features = torch.cat([h, p, (h - p).abs(), h * p, state], dim=1)
        torch.testing.assert_close(head(state * 0 + h, premise).shape, (5, 3))
        attention = head.attention(torch.zeros(5, 8), premise)
    assert features.shape == (5, head.layers[0].num_features)
    assert attention.shape == (5, 3, 3)
    torch.testing.assert_close(attention.sum(dim=(1, 2)), torch.ones(5))


def test_the_patches_come_in_half_precision_and_each_at_its_place(head):
    h, premise = torch.randn(1, 8), torch.randn(1, 10 * 8)
    with torch.no_grad():
        whole = head(h, premise)
        torch.testing.assert_close(head(h, premise.half()), whole, rtol=2e-2, atol=2e-2)
        moved = premise.clone()
        moved[:, 8:16], moved[:, 16:24] = premise[:, 16:24], premise[:, 8:16]
        assert not torch.allclose(head(h, moved), whole, atol=1e-3)


@pytest.mark.parametrize("layout", ["clip", "siglip", "chinese_clip", "altclip"])
def test_the_patches_are_the_last_states_as_the_tower_ends_them(layout, world, tmp_path):
    folder = getattr(tiny_backbones, f"new_{layout}")(tmp_path, sentences(world))
    image = backbones.load_clip_image(folder).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled = image(pixels)
        image.patch_grid = 2
        premise = image(pixels)
        states = image.backbone(pixel_values=pixels).last_hidden_state
        if layout != "siglip":
            states = image.projection(image.backbone.post_layernorm(states[:, 1:]))
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
    with pytest.raises(ModelError, match="number of patches varies; use --head pooled"):
        ClipVE.from_clip(folder, head="patches")


def test_a_head_with_patches_is_the_same_after_save_and_load(clip, tmp_path):
    torch.manual_seed(0)
    model = ClipVE.from_clip(clip, head="patches").eval()
    model.save(tmp_path)
    again = ClipVE.from_folder(tmp_path)
    assert module_digest(again) == module_digest(model)
    assert again.image.patch_grid == 2 and again.fingerprint == model.fingerprint


def test_a_pooled_head_is_saved_as_before_there_were_patches(clip, tmp_path):
    ClipVE.from_clip(clip).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["head"] == {
        "embedding_dim": 16, "hidden_dim": 128, "dropout": 0.1, "normalize": True,
    }  # fmt: skip
