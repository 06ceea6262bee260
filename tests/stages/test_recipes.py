"""Recipes of `finetune-ve` beyond the thesis's: what is learnt, and which weights are trained."""

import json
import shutil

import numpy as np
import pytest
import tiny_backbones
import torch
from tiny_world import (
    Notes,
    edit_row,
    killed_at_step,
    quick_finetune,
    read_jsonl,
    record,
    sentences,
    weights,
    write_jsonl,
)
from torch.nn import functional

from clseave_cli.core import finetuning
from clseave_cli.core.config import FinetuneConfig
from clseave_cli.core.data.records import read_split
from clseave_cli.core.files import cache_sizes
from clseave_cli.core.models import adapters, backbones
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import module_digest
from clseave_cli.errors import DataError, ExtraMissing, UsageError
from clseave_cli.labels import LABELS


@pytest.fixture
def answers(world, tmp_path):
    """Two teachers' answers to the training rows: by label, and as a list."""
    generator = np.random.default_rng(0)
    rows = read_jsonl(world / "snli_ve_train.jsonl")
    tables = generator.dirichlet([1, 1, 1], (2, len(rows)))
    files = []
    for number, table in enumerate(tables.tolist()):
        values = [triple if number else dict(zip(LABELS, triple, strict=True)) for triple in table]
        lines = [{"pairID": "of another file", "error": "no such image"}]
        for row, probabilities in zip(rows[::-1], values[::-1], strict=True):
            lines.append({"pairID": row["pairID"], "probabilities": probabilities})
        files.append(write_jsonl(tmp_path / f"answers{number}.jsonl", lines))
    return files, torch.from_numpy(tables).float()


# --- what is learnt ---


def test_soft_labels_are_kl_beside_cross_entropy(world, answers):
    files, tables = answers
    split = read_split(world, "train")
    config = FinetuneConfig(soft_labels=files, soft_weight=0.3, label_smoothing=0.2)
    targets = finetuning._targets(config, split)
    assert finetuning._targets(FinetuneConfig(), split).dtype == torch.int64  # the labels
    logits = torch.randn(len(split), 3, generator=torch.manual_seed(0), requires_grad=True)
    labels, teacher = torch.from_numpy(split.labels).long(), tables.mean(dim=0)
    expected = 0.7 * functional.cross_entropy(logits, labels, label_smoothing=0.2)
    kl = functional.kl_div(logits.log_softmax(1), teacher, reduction="batchmean")
    entropy = -(teacher * teacher.log()).sum(1).mean()
    loss = functional.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, expected + 0.3 * (kl + entropy))
    gradients = [torch.autograd.grad(each, logits)[0] for each in (loss, expected + 0.3 * kl)]
    torch.testing.assert_close(*gradients)


def _predict(clseave, world, split, target, runs):
    rows, images = world / f"snli_ve_{split}.jsonl", world / "images"
    code, _, err = clseave(
        "predict", "--input", rows, "--output", target, "--runs", runs, "--images", images
    )
    assert code == 0, err


def test_what_predict_writes_of_any_model_teaches(world, trained, clip, clseave, tmp_path):
    """Through the real commands: two teachers' answers, then a student of both."""
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    _predict(clseave, world, "train", files[0], trained)
    shutil.copy(*files)
    learn = ("finetune-ve", "--data", world, "--clip", clip, "--epochs", 1, "--batch-size", 8)
    soft = ("--soft-labels", files[0], "--soft-labels", files[1])
    code, _, err = clseave(*learn, "--runs", tmp_path / "runs", *soft, "--label-smoothing", "0.1")
    assert code == 0, err
    record = json.loads((tmp_path / "runs/clip-ve/training/run.json").read_bytes())
    assert {"soft labels 1", "soft labels 2"} < record["inputs"].keys()
    assert record["options"]["soft_weight"] == 0.5


@pytest.mark.parametrize("spoilt", ["lacking", "sum", "label", "torn", "id"])
def test_soft_labels_that_do_not_fit_are_refused(world, answers, clip, tmp_path, spoilt):
    path = answers[0][0]
    lines = path.read_text().splitlines()
    expected = r"answers0.jsonl:3: expected pairID and the probabilities of three labels"
    if spoilt == "lacking":
        first = read_jsonl(path)[-1]["pairID"]
        path.write_text("\n".join(lines[:-1]))
        expected = rf"no probabilities for 1 of 24 training rows, such as pairID '{first}'"
    elif spoilt == "torn":
        path.write_text("\n".join([*lines[:2], lines[2][:20], *lines[3:]]))
    elif spoilt == "id":
        edit_row(path, 3, pairID=None)
    else:
        bad = {"sum": [0.5, 0.5, 0.5], "label": {"yes": 0.5, "no": 0.5}}[spoilt]
        edit_row(path, 3, probabilities=bad)
    with pytest.raises(DataError, match=expected):
        quick_finetune(world, tmp_path / "runs", clip, soft_labels=(path,))
    assert not (tmp_path / "runs").exists()


# --- which weights are trained ---

#: What each recipe trains of the image tower and of the text tower's backbone.
RECIPES = {
    "smoothing": {"label_smoothing": 0.1},
    "blocks": {"unfreeze_blocks": 1},
    "blocks, pooled": {"unfreeze_blocks": 1, "head": "pooled", "image_learning_rate": 1e-3},
    "adapters": {"lora": 2},
    "adapters, pooled": {"lora": 2, "head": "pooled"},
}


@pytest.fixture
def recipe(request):
    if "lora" in (options := RECIPES[request.param]):
        pytest.importorskip("peft")
    return options


@pytest.mark.parametrize("recipe", RECIPES, indirect=True)
def test_a_recipe_trains_what_it_should_and_resumes_to_the_same_bits(world, tmp_path, clip, recipe):
    """G6."""
    before = ClipVE.from_clip(clip)
    result = quick_finetune(world, tmp_path / "a", clip, **recipe)
    with killed_at_step(4):
        quick_finetune(world, tmp_path / "b", clip, checkpoint_minutes=0, **recipe)
    quick_finetune(world, tmp_path / "b", clip, checkpoint_minutes=0, resume=True, **recipe)
    assert weights(tmp_path / "a" / "clip-ve") == weights(tmp_path / "b" / "clip-ve")
    after = ClipVE.from_folder(result.folder)
    towers = {n: p for n, p in before.named_parameters() if not n.startswith("head")}
    trained = dict(after.named_parameters())
    assert towers.keys() <= trained.keys()  # nothing is left of the adapters
    changed = {name for name, value in towers.items() if not torch.equal(value, trained[name])}
    image = {name for name in changed if name.startswith("image")}
    of_blocks = {name for name in image if ".layers.0." in name}
    assert image == of_blocks and bool(image) == ("smoothing" not in str(recipe.keys()))
    if "lora" in recipe:
        text = {name for name in changed if name.startswith("text.backbone")}
        assert {name.split(".")[-2] for name in image | text} == {"q_proj", "v_proj"} and text
    # What was chosen on dev is what was saved, but for the half precision of the cache.
    assert 0 < result.training.dev["accuracy"] <= 1
    assert module_digest(after.text) != module_digest(before.text)


@pytest.mark.parametrize("layout", ["clip", "siglip", "chinese_clip", "altclip"])
@pytest.mark.parametrize("grid", [0, 1, 2])
def test_the_trained_blocks_give_what_the_whole_tower_gives(layout, grid, world, tmp_path):
    image = backbones.load_clip_image(tiny_backbones.TEACHERS[layout](tmp_path, sentences(world)))
    image.eval().patch_grid = grid
    pixels = torch.randn(3, 3, 32, 32)
    for count in range(1, len(image.blocks) + 1):
        adapters.train_blocks(image, count, "--unfreeze-blocks")
        states = image.states(pixels)
        assert states.shape == (3, image.states_width)
        torch.testing.assert_close(image.from_states(states), image(pixels))
    assert all(p.requires_grad for p in image.blocks.parameters())


def test_states_are_cached_and_the_dev_loss_is_that_of_the_saved_model(
    world, tmp_path, clip, clseave, cache
):
    """The tower is trained, so dev photos are encoded anew in every epoch."""
    notes, options = Notes(), {"learning_rate": 1e-2, "image_learning_rate": 1e-2}
    result = quick_finetune(world, tmp_path, clip, progress=notes, unfreeze_blocks=1, **options)
    assert "train: 8 photos × 5 vectors × 32 × 2 bytes = 0.00 GB into" in notes.text
    assert "--patch-grid" not in notes.text
    assert [folder.name for folder in cache.iterdir()] == ["states"]
    assert cache_sizes()["states"] > 8 * 5 * 32 * 2
    _predict(clseave, world, "dev", tmp_path / "dev.jsonl", tmp_path)
    answers = read_jsonl(tmp_path / "dev.jsonl")
    losses = [-np.log(row["probabilities"][row["gold_label"]]) for row in answers]
    assert np.mean(losses) == pytest.approx(result.training.dev["loss"], rel=5e-3)


def test_the_image_tower_has_its_learning_rate(world, tmp_path, clip, monkeypatch):
    def learning_rates(optimizer, *_):
        return [group["lr"] for group in optimizer.param_groups if group["params"]]

    rates = record(monkeypatch, torch.optim.AdamW, "step", learning_rates)
    for options, factor in (({}, 0.1), ({"image_learning_rate": 1e-3}, 0.5)):
        rates.clear()
        quick_finetune(world, tmp_path / str(factor), clip, unfreeze_blocks=1, **options)
        assert rates and all(r == pytest.approx([2e-3] * 2 + [2e-3 * factor] * 2) for r in rates)


def test_recipes_that_do_not_go_together_are_refused(world, tmp_path, clip, monkeypatch):
    for options, message in (
        ({"unfreeze_blocks": 1, "lora": 2}, "choose one"),
        ({"image_learning_rate": 1e-5}, "goes with --unfreeze-blocks or --lora"),
        ({"unfreeze_blocks": 2}, r"--unfreeze-blocks 2: the image tower has only 1"),
    ):
        with pytest.raises(UsageError, match=message):
            quick_finetune(world, tmp_path, clip, **options)
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExtraMissing, match=r"pip install -e '\.\[lora\]'"):
        quick_finetune(world, tmp_path, clip, lora=2)
    naflex = tiny_backbones.new_siglip2(tmp_path, sentences(world))
    with pytest.raises(UsageError, match="which see every picture as a square"):
        quick_finetune(world, tmp_path, naflex, unfreeze_blocks=1, head="pooled")
