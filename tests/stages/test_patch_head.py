"""The default head, which queries patches, through every command on a tiny world."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import (
    Notes,
    killed_at_step,
    labelled_pairs,
    quick_align,
    quick_finetune,
    weights,
)

from clseave_cli import VisualEntailment
from clseave_cli.core.config import EvaluateConfig, ExportConfig
from clseave_cli.core.data.heat_map import heat_map
from clseave_cli.core.data.images import ImageFolder, Preparation, open_image
from clseave_cli.core.data.records import read_split
from clseave_cli.core.evaluation.run import evaluate
from clseave_cli.core.features import Photos, image_features
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.training.device import autocast


@pytest.fixture(scope="module")
def looking(tmp_path_factory, world, clip, encoder):
    """Models whose head queries patches; read only."""
    runs = tmp_path_factory.mktemp("looking") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSEAVE_CACHE", str(runs.parent / "cache"))
        quick_finetune(world, runs, clip)
        quick_align(world, runs, runs, encoder, "de")
    return runs


def test_dev_and_test_accuracy_are_those_of_the_saved_model(world, looking, tmp_path):
    options = {"resamples": 50, "device": "cpu", "precision": "fp32"}
    options |= {"report": tmp_path / "report"}
    config = EvaluateConfig(data=str(world), runs=(looking,), **options)
    results = {result.lang: result for result in evaluate(config).results}
    for lang in ("en", "de"):
        pairs, labels = labelled_pairs(world, lang)
        answers = VisualEntailment.from_pretrained(looking, lang, "cpu", "fp32").predict(pairs)
        is_right = [a.label == label for a, label in zip(answers, labels, strict=True)]
        assert results[lang].accuracy == pytest.approx(np.mean(is_right))
    page = (tmp_path / "report" / "report.html").read_text()
    assert 'alt="where the model looked"' in page
    summary = json.loads((looking / "align-de" / "training" / "summary.json").read_text())
    assert 0 <= summary["dev"]["accuracy"] <= 1


def test_training_again_or_resumed_gives_the_same_weights(world, looking, clip, tmp_path):
    with killed_at_step(4):
        quick_finetune(world, tmp_path, clip)
    quick_finetune(world, tmp_path, clip, resume=True)
    assert weights(tmp_path / "clip-ve") == weights(looking / "clip-ve")


def test_patches_are_cached_in_half_precision_and_their_size_is_noted(world, clip):
    image = ClipVE.from_clip(clip, head="patches").image
    split = read_split(world, "train")
    photos = Photos.of(split, ImageFolder.of(world, None))
    exact, notes = autocast("fp32", torch.device("cpu")), Notes()
    features = image_features(image, split, photos, autocast=exact, progress=notes)
    assert "8 photos × 5 vectors × 16 × 2 bytes = 0.00 GB into" in notes.text
    assert features.of_rows().dtype == torch.float16 and features.vectors.width == 5 * 16
    again = image_features(image, split, photos, autocast=exact, progress=notes)
    assert len(notes.lines) == 1 and torch.equal(again.of_rows(), features.of_rows())
    with torch.no_grad():
        picture = open_image(world / "images" / split.image_names[split.image_index[0]])
        expected = image(image.preprocess([picture]))
    torch.testing.assert_close(again.of_rows()[:1].float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("int8", [False, True])
def test_an_exported_folder_answers_and_looks_as_the_models_do(world, looking, tmp_path, int8):
    pytest.importorskip("onnxruntime")
    from clseave_cli.core.prediction.export import TOLERANCE, export

    exported = export(ExportConfig(runs=looking, out=tmp_path / "onnx", int8=int8)).folder
    tolerance = TOLERANCE["int8" if int8 else "fp32"]
    for lang in ("en", "de"):
        model = VisualEntailment.from_pretrained(looking, lang, "cpu", "fp32")
        for name in ("test0.png", "test1.png"):
            pair = world / "images" / name, "Das Quadrat ist rot."
            expected = model(*pair)
            answer = VisualEntailment.from_pretrained(exported, lang)(*pair)
            assert list(answer.probabilities.values()) == pytest.approx(
                list(expected.probabilities.values()), abs=tolerance
            )
            np.testing.assert_allclose(answer.attention, expected.attention, atol=tolerance)


def test_predict_explains(world, looking, trained, clseave, refused, tmp_path):
    target = tmp_path / "looked.png"
    command = ("predict", world / "images" / "test0.png", "A square.", "--runs")
    for _ in range(2):  # a picture of ours is replaced
        code, out, _ = clseave(*command, looking, "--explain", target, "--json")
        assert code == 0 and "attention" not in json.loads(out)
        assert open_image(target).width == 480
    assert "--head patches" in refused(*command, trained, "--explain", target, code=2)
    Image.new("RGB", (4, 4)).save(target)
    assert "did not write it" in refused(*command, looking, "--explain", target, code=2)
    assert ".png" in refused(*command, looking, "--explain", tmp_path / "a.jpg", code=2)
    rows = ("--input", target, "--output", tmp_path / "o", "--explain", tmp_path / "b.png")
    assert "goes with IMAGE" in refused("predict", *rows, code=2)


def test_the_heat_map_colours_what_the_tower_saw():
    preparation = Preparation((100,), (100, 100), (0.5,) * 3, (0.5,) * 3)
    attention = np.zeros((2, 2), np.float32)
    attention[0, 1] = 1.0  # at the top right of the square in the middle
    drawn = np.asarray(heat_map(Image.new("RGB", (200, 100), "gray"), attention, preparation))
    bright = drawn[:240].sum(axis=2) > 450
    rows, columns = np.nonzero(bright)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 119, 240, 359)
    assert (drawn[:240, :120] == drawn[0, 0]).all() and drawn[0, 0].tolist() == [128] * 3


def test_a_patch_grid_without_patches_is_refused(world, clip, refused, tmp_path):
    options = ("--data", world, "--clip", clip, "--runs", tmp_path, "--head", "pooled")
    message = refused("finetune-ve", *options, "--patch-grid", 1, code=2)
    assert "--patch-grid goes with --head patches" in message
