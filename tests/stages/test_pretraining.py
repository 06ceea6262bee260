"""pretrain: the contrastive loss against a reference, and the stage end to end."""

import pytest
import torch
from tiny_world import CLIP_SHAPE, QUICK, killed_at_step, read_jsonl, tree, weights, write_jsonl
from torch.nn import functional

from clseave_cli.core import pretraining
from clseave_cli.core.config import FinetuneConfig, PretrainConfig
from clseave_cli.core.finetuning import finetune
from clseave_cli.core.pretraining import contrastive_loss, pretrain
from clseave_cli.errors import DataError, UsageError

SHAPE = {
    "image_size": CLIP_SHAPE["image_size"],
    "patch_size": CLIP_SHAPE["patch_size"],
    "width": 32,
    "layers": 1,
    "embedding_dim": 16,
}


@pytest.fixture
def captioned(data):
    """The tiny world with two captions a picture; four pictures share theirs with four others."""
    for split in ("train", "dev"):
        rows = []
        for row in read_jsonl(data / f"snli_ve_{split}.jsonl"):
            if row["gold_label"] == "entailment":
                image, sentence = row["Flickr30K_ID"], row["sentence2"]
                rows.append({"image": image, "caption": sentence})
                rows.append({"image": image, "caption": sentence.replace("square", "picture")})
        write_jsonl(data / f"captions_{split}.jsonl", rows)
    return data


def _pretrain(data, runs, **options):
    defaults = {"epochs": 2, **SHAPE, **QUICK}
    return pretrain(PretrainConfig(data=data, runs=runs, **(defaults | options)))


def test_with_distinct_captions_the_loss_is_clips_own():
    generator = torch.Generator().manual_seed(0)
    images, captions = (
        functional.normalize(torch.randn(5, 8, generator=generator), dim=1) for _ in range(2)
    )
    scale = torch.tensor(7.0)
    loss = contrastive_loss(images, captions[None], torch.arange(5)[None], scale)
    logits = 7.0 * images @ captions.T
    own = torch.arange(5)
    wanted = functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)
    torch.testing.assert_close(loss, wanted / 2)


def test_equal_captions_are_matches_of_both_images():
    # Images 0 and 1 share a caption; by hand, each is a match of both, half and half.
    generator = torch.Generator().manual_seed(1)
    images = functional.normalize(torch.randn(3, 4, generator=generator), dim=1)
    captions = functional.normalize(torch.randn(2, 4, generator=generator), dim=1)[[0, 0, 1]]
    ids = torch.tensor([[5, 5, 2]])
    loss = contrastive_loss(images, captions[None], ids, torch.tensor(3.0))
    log_rows = (3 * images @ captions.T).log_softmax(dim=1)
    log_columns = (3 * images @ captions.T).log_softmax(dim=0).T
    wanted = []
    for table in (log_rows, log_columns):
        first = -(table[0, 0] + table[0, 1]) / 2
        second = -(table[1, 0] + table[1, 1]) / 2
        wanted.append((first + second - table[2, 2]) / 3)
    torch.testing.assert_close(loss, sum(wanted) / 2)


def test_a_pretrained_model_is_a_clip_of_transformers_and_of_ours(captioned, tmp_path):
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    result = _pretrain(captioned, tmp_path)
    model = CLIPModel.from_pretrained(result.folder)
    assert model.projection_dim == 16
    assert len(AutoTokenizer.from_pretrained(result.folder)) == model.config.text_config.vocab_size
    assert CLIPImageProcessorPil.from_pretrained(result.folder).size["height"] == 32
    config = FinetuneConfig(
        data=str(captioned), runs=tmp_path, clip=str(result.folder), epochs=1, **QUICK
    )
    assert finetune(config).folder == tmp_path / "clip-ve"


def test_training_brings_the_loss_down(captioned, tmp_path):
    result = _pretrain(captioned, tmp_path, epochs=12, learning_rate=3e-3)
    records = read_jsonl(result.folder / "training" / "metrics.jsonl")
    losses = [record["loss"] for record in records if "dev" in record]
    assert losses[-1] < 0.7 * losses[0]


def test_the_same_seed_gives_the_same_model(captioned, tmp_path):
    models = [
        tree(_pretrain(captioned, tmp_path / name, seed=seed).folder)["model.safetensors"]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert models[0] == models[1] != models[2]


def test_a_killed_run_ends_in_the_same_model_and_sees_the_same_photos(captioned, tmp_path):
    options = {"epochs": 4, "batch_size": 4, "checkpoint_minutes": 0}
    whole = _pretrain(captioned, tmp_path / "whole", **options)
    with killed_at_step(6):
        _pretrain(captioned, tmp_path / "killed", **options)
    (state,) = (tmp_path / "killed" / "clip.partial" / "training").glob("state-*")
    assert state.name == "state-00000005"
    photo = captioned / "images" / "train0.png"
    shown = photo.read_bytes()
    photo.write_bytes((captioned / "images" / "train1.png").read_bytes())
    with pytest.raises(UsageError, match="was run with photos: train = "):
        _pretrain(captioned, tmp_path / "killed", resume=True, **options)
    photo.write_bytes(shown)
    resumed = _pretrain(captioned, tmp_path / "killed", resume=True, **options)
    assert weights(resumed.folder) == weights(whole.folder)
    assert resumed.training.steps == whole.training.steps == 8


def test_training_goes_on_from_a_given_model(captioned, clip, tmp_path):
    result = _pretrain(captioned, tmp_path, clip=str(clip), learning_rate=0.0, weight_decay=0.0)
    from transformers import CLIPModel

    before, after = (CLIPModel.from_pretrained(path).state_dict() for path in (clip, result.folder))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_image_is_encoded_once_however_many_captions_it_meets(captioned, tmp_path, monkeypatch):
    counts = []
    forward = pretraining.ImageEncoder.forward

    def counting(encoder, pixels):
        counts.append(len(pixels))
        return forward(encoder, pixels)

    monkeypatch.setattr(pretraining.ImageEncoder, "forward", counting)
    _pretrain(captioned, tmp_path, epochs=1, batch_size=4, captions_per_image=2)
    assert sum(counts) == 8 + 4  # every training and every dev image once


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", r"captions_train.jsonl:2: not valid JSON"),
        ('{"image": "train0.png"}', r"captions_train.jsonl:2: no caption; expected a sentence"),
        ('{"image": 3, "caption": "x"}', r"captions_train.jsonl:2: image is 3; expected the image"),
        ('{"image": "train0.png", "caption": " "}', r"captions_train.jsonl:2: caption is empty"),
        (
            '{"image": "no.png", "caption": "x"}',
            r"captions_train.jsonl:2: image 'no.png' is not in",
        ),
    ],
)
def test_a_bad_caption_is_refused_by_file_and_line(captioned, tmp_path, line, said):
    path = captioned / "captions_train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(DataError, match=said):
        _pretrain(captioned, tmp_path)


def test_missing_captions_are_named(data, tmp_path):
    with pytest.raises(DataError, match=r"captions_train.jsonl: no such file; expected lines such"):
        _pretrain(data, tmp_path)
