"""Guided pictures in `finetune-ve` and `pretrain`: the losses, the controls, resuming, refusals."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from tiny_world import (
    QUICK,
    Notes,
    killed_at_step,
    metrics_of,
    quick_finetune,
    read_jsonl,
    weights,
    write_captions,
)
from torch.nn import functional

from clseave_cli import VisualEntailment
from clseave_cli.core import guided
from clseave_cli.core.config import ExportConfig, PretrainConfig
from clseave_cli.core.data.images import picture_name
from clseave_cli.core.features import Features, Vectors
from clseave_cli.core.models import clip_ve
from clseave_cli.core.models.clip_ve import ClipVE, EntailmentHead, HeadConfig
from clseave_cli.core.pretraining import pretrain
from clseave_cli.errors import UsageError


def _draw(world, folder, condition):
    """Pictures by pairID, those of other photos, for training rows by number and row."""
    for number, row in enumerate(read_jsonl(world / "snli_ve_train.jsonl")):
        if condition(number, row):
            name = f"{picture_name(row['pairID'])}.png"
            shutil.copy(world / "images" / f"test{number % 4}.png", folder / name)
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, world):
    """Pictures for two thirds of the training rows."""
    return _draw(world, tmp_path_factory.mktemp("drawn"), lambda number, row: number % 3)


@pytest.fixture
def captioned(world, tmp_path):
    return write_captions(world, tmp_path / "captions")


def _pretrain(captioned, world, runs, clip, **options):
    shared = {"data": captioned, "images": world / "images", "runs": runs, "clip": str(clip)}
    return pretrain(PretrainConfig(**(shared | QUICK | {"epochs": 2} | options)))


# --- the losses ---


def test_divergence_and_gap_are_those_of_the_equations():
    torch.manual_seed(0)
    guided_logits, logits = torch.randn(2, 5, 3)
    log_probabilities, guided_probabilities = logits.log_softmax(1), guided_logits.softmax(1)
    # torch's order: KL(second ‖ first)
    kl = functional.kl_div(log_probabilities, guided_probabilities, reduction="none").sum(1)
    torch.testing.assert_close(guided.divergence(guided_logits, logits), kl)
    # By hand: KL((1/2, 1/2) ‖ (1/4, 3/4)) = ln 2 − ½ ln 3.
    halves, quarters = torch.zeros(1, 2), torch.tensor([[0.0, np.log(3.0)]])
    assert guided.divergence(halves, quarters).item() == pytest.approx(np.log(2) - np.log(3) / 2)
    x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    assert guided.gap(y, x, "cosine").item() == pytest.approx(1 - 3 / 5)
    assert guided.gap(y, x, "l2").item() == pytest.approx(8.0)


def test_the_guided_pass_uses_batch_statistics_and_records_none():
    torch.manual_seed(0)
    head = EntailmentHead(HeadConfig(embedding_dim=8, dropout=0.0))
    pair = torch.randn(2, 6, 8).unbind()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    with guided.fixed_running_statistics(head):
        logits = head(*pair)
    assert all(value.equal(before[name]) for name, value in head.state_dict().items())
    torch.testing.assert_close(logits, head(*pair), rtol=0, atol=0)
    assert not head.layers[0].running_mean.equal(before["layers.0.running_mean"])


@pytest.fixture
def no_dropout(monkeypatch):
    monkeypatch.setattr(clip_ve, "HeadConfig", functools.partial(HeadConfig, dropout=0.0))


@pytest.mark.parametrize("head", ["pooled", "patches"])
def test_photos_in_their_own_place_double_the_loss(world, tmp_path, clip, head, no_dropout):
    """Then p_y = p_x, so that CE(p_x) + CE(p_y) + γ KL(p_y ‖ p_x) = 2 CE(p_x)."""
    losses = []
    for name, options in (("plain", {}), ("guided", {"guided": world / "images"})):
        result = quick_finetune(world, tmp_path / name, clip, head=head, max_steps=1, **options)
        losses.append(metrics_of(result.folder / "training")[0]["loss"])
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)


def test_rows_without_a_guided_picture_have_the_plain_loss(world, tmp_path, clip, no_dropout):
    """One picture of 8, the photo itself: its rows count twice, the others once."""
    (tmp_path / "one").mkdir()
    shutil.copy(world / "images" / "train0.png", tmp_path / "one")
    notes, options = Notes(), {"batch_size": 24, "max_steps": 1}
    first = quick_finetune(world, tmp_path / "a", clip, **options)
    options |= {"guided": tmp_path / "one", "progress": notes}
    second = quick_finetune(world, tmp_path / "b", clip, **options)
    assert "guided pictures of 3 of 24 rows" in notes.text
    plain, mixed = (metrics_of(each.folder / "training")[0]["loss"] for each in (first, second))
    assert plain < mixed < 1.5 * plain


def test_pretrain_adds_nothing_for_photos_in_their_own_place(captioned, world, tmp_path, clip):
    def loss(name, **options):
        result = _pretrain(captioned, world, tmp_path / name, clip, max_steps=1, **options)
        return metrics_of(result.folder / "training")[0]["loss"]

    plain, itself = loss("plain"), loss("itself", guided=world / "images")
    assert itself == pytest.approx(plain, rel=1e-5)
    parts = [{}, {"guided_kl": 0}, {"guided_cosine": 0}, {"guided_distance": "l2"}]
    controls = [{"guided_control": "shuffle"} | part for part in parts]
    controls.append({"guided_control": "noise"})
    others = [loss(str(n), guided=world / "images", **more) for n, more in enumerate(controls)]
    assert len(set(others)) == 5 and min(others) > plain


# --- stages ---


@pytest.mark.parametrize(
    "options",
    [
        {"head": "patches", "guided_control": "shuffle"},
        {"head": "pooled", "guided_adapter": True, "accumulation": 2},
        {"head": "patches", "guided_control": "noise"},
    ],
    ids=["shuffle", "adapter", "noise"],
)
def test_a_killed_run_ends_in_the_same_weights(world, drawn, clip, tmp_path, options):
    options |= {"guided": drawn, "guided_by": "pairID", "checkpoint_minutes": 0}
    whole = quick_finetune(world, tmp_path / "whole", clip, **options)
    with killed_at_step(4):
        quick_finetune(world, tmp_path / "killed", clip, **options)
    resumed = quick_finetune(world, tmp_path / "killed", clip, resume=True, **options)
    assert weights(resumed.folder) == weights(whole.folder)
    plain = quick_finetune(world, tmp_path / "plain", clip, head=options["head"])
    assert weights(plain.folder) != weights(whole.folder)
    config = json.loads((whole.folder / "config.json").read_text())
    assert ("adapter" in config["head"]) == bool(options.get("guided_adapter"))


def test_pretrain_killed_and_resumed_and_its_pictures_changed(captioned, world, clip, tmp_path):
    pictures = tmp_path / "guided"
    shutil.copytree(world / "images", pictures)
    options = {"guided": pictures, "guided_control": "shuffle", "checkpoint_minutes": 0}
    whole = _pretrain(captioned, world, tmp_path / "whole", clip, **options)
    with killed_at_step(2):
        _pretrain(captioned, world, tmp_path / "killed", clip, **options)
    shown = (pictures / "train0.png").read_bytes()
    shutil.copy(pictures / "train1.png", pictures / "train0.png")
    with pytest.raises(UsageError, match="was run with guided pictures = "):
        _pretrain(captioned, world, tmp_path / "killed", clip, resume=True, **options)
    (pictures / "train0.png").write_bytes(shown)
    resumed = _pretrain(captioned, world, tmp_path / "killed", clip, resume=True, **options)
    assert weights(resumed.folder) == weights(whole.folder)


def test_an_adapter_begins_as_nothing_learns_and_is_exported(world, drawn, clip, tmp_path):
    pytest.importorskip("onnxruntime")
    from clseave_cli.core.prediction.export import export

    new = ClipVE.from_clip(clip, adapter=True).head
    assert new.embedding(torch.ones(1, 16)).equal(torch.ones(1, 16))
    options = {"guided": drawn, "guided_by": "pairID", "guided_adapter": True}
    folder = quick_finetune(world, tmp_path, clip, **options).folder
    assert ClipVE.from_folder(folder).head.adapter.weight.abs().max() > 0
    exported = export(ExportConfig(runs=tmp_path, out=tmp_path / "onnx")).folder
    pair = world / "images" / "test0.png", "The square is red."
    expected, actual = (
        VisualEntailment.from_pretrained(runs, "en")(*pair) for runs in (tmp_path, exported)
    )
    assert actual.probabilities == pytest.approx(expected.probabilities, abs=1e-3)


def test_what_pictures_give_away_is_reported(world, drawn, clip, tmp_path):
    notes = Notes()
    options = {"guided": drawn, "guided_by": "pairID", "epochs": 1}
    result = quick_finetune(world, tmp_path, clip, progress=notes, **options)
    line = next(line for line in notes.lines if "sees only the picture" in line)
    assert line in (result.folder / "README.md").read_text()
    folder = tmp_path / "entailed"
    folder.mkdir()
    _draw(world, folder, lambda number, row: row["gold_label"] == "entailment")
    quick_finetune(world, tmp_path / "again", clip, progress=notes, **options | {"guided": folder})
    assert "100.0% of guided pictures" in notes.text and "Guided pictures give labels" in notes.text


def test_image_only_accuracy_is_high_where_pictures_tell_the_label_and_chance_otherwise():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 600).astype(np.int8)
    features = random.normal(size=(600, 4)).astype(np.float32)
    features[np.arange(600), labels] += 6
    every, accuracies = np.arange(600), []
    for offset in (0, 1):
        vectors = Vectors(600, 4)
        vectors.add(torch.from_numpy(np.roll(features, offset, axis=0)), every, every)
        accuracies.append(guided.image_only_accuracy(Features(vectors, every), labels, 4))
    assert accuracies[0] > 0.9 and accuracies[1] == pytest.approx(1 / 3, abs=0.1)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--guided-adapter", 2, "--guided-adapter goes with --guided DIR."),
        ("--guided-kl 2", 2, "--guided-kl goes with --guided DIR."),
        ("--guided IMAGES --guided-cosine 1", 2, "go with --guided-adapter: the tower is frozen."),
        ("--guided IMAGES --guided-distance l2", 2,
         "go with --guided-adapter: the tower is frozen."),
        ("--guided nowhere", 1, "no such folder; `clseave illustrate`"),
        ("--guided IMAGES --guided-by pairID", 1,
         "no picture of any of 24 rows; expected files such as train0.png#e.png."),
    ],
)  # fmt: skip
def test_options_and_folders_that_make_no_sense_are_refused(
    world, clip, tmp_path, refused, options, code, message
):
    options = options.replace("IMAGES", str(world / "images")).split()
    command = ("finetune-ve", "--data", world, "--clip", clip, "--runs", tmp_path)
    assert message in refused(*command, *options, code=code)
