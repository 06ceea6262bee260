"""pretrain: the contrastive loss against a reference, and the stage end to end."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_backbones import STUDENTS, new_vit
from tiny_world import (
    CLIP_SHAPE,
    QUICK,
    killed_at_step,
    read_jsonl,
    sentences,
    tree,
    weights,
    write_captions,
    write_jsonl,
)
from torch.nn import functional
from transformers import AutoModel, VisionTextDualEncoderModel

from clseave_cli.core import pretraining
from clseave_cli.core.config import FinetuneConfig, PretrainConfig
from clseave_cli.core.finetuning import finetune
from clseave_cli.core.pretraining import contrastive_loss, pretrain
from clseave_cli.errors import ClseaveError, DataError, UsageError

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


def test_in_several_languages_the_loss_is_that_of_the_definition():
    # Images 0 and 1 share their first caption; the third image's two captions are one word.
    generator = torch.Generator().manual_seed(2)
    images = functional.normalize(torch.randn(3, 4, generator=generator), dim=1)
    sentences = functional.normalize(torch.randn(5, 4, generator=generator), dim=1)
    ids = torch.tensor([[0, 0, 1], [2, 3, 1]])
    scale, rows = 3.0, range(3)
    columns = [(lang, j) for lang in range(2) for j in rows]
    mine = [{int(ids[lang, i]) for lang in range(2)} for i in rows]
    wanted = 0.0
    for i in rows:
        logits = torch.stack([scale * images[i] @ sentences[ids[column]] for column in columns])
        hits = [k for k, column in enumerate(columns) if int(ids[column]) in mine[i]]
        wanted -= logits.log_softmax(dim=0)[hits].mean() / 3
    for lang, j in columns:
        logits = scale * images @ sentences[ids[lang, j]]
        hits = [i for i in rows if int(ids[lang, j]) in mine[i]]
        wanted -= logits.log_softmax(dim=0)[hits].mean() / 6
    loss = contrastive_loss(images, sentences[ids], ids, torch.tensor(scale))
    torch.testing.assert_close(loss, wanted / 2)


def test_dev_loss_is_recorded_by_language_as_if_there_were_no_other(captioned, tmp_path):
    for split in ("train", "dev"):
        rows = read_jsonl(captioned / f"captions_{split}.jsonl")
        for lang, caption in (("xx", "{}"), ("yy", "y {}")):
            told = [row | {"caption": caption.format(row["caption"])} for row in rows]
            write_jsonl(captioned / f"captions_{split}.{lang}.jsonl", told)
    untrained = {"learning_rate": 0.0, "epochs": 1}
    alone = {
        lang: _pretrain(captioned, tmp_path / lang, lang=lang, **untrained).training.dev["loss"]
        for lang in ("en", "xx")
    }
    # The same captions once more are no negatives, and change nothing.
    double = _pretrain(captioned, tmp_path / "double", lang=("en", "xx"), **untrained)
    assert double.training.dev["loss/en"] == double.training.dev["loss/xx"]
    assert double.training.dev["loss/en"] == pytest.approx(alone["en"], abs=1e-6)
    result = _pretrain(captioned, tmp_path / "two", lang=("en", "yy"), epochs=8)
    dev = result.training.dev
    assert dev["loss"] == pytest.approx((dev["loss/en"] + dev["loss/yy"]) / 2)
    assert max(dev["loss/en"], dev["loss/yy"]) < alone["en"]
    assert "language: [en, yy]" in (result.folder / "README.md").read_text()


@pytest.fixture(scope="module")
def encoders(world, tmp_path_factory):
    """An XLM-R and a ViT, and their flags."""
    folder = tmp_path_factory.mktemp("encoders")
    text = STUDENTS["XLM-R"](folder / "xlm-r", sentences(world))
    return {"text": str(text), "vision": str(new_vit(folder / "vit")), "embedding_dim": 16}


def test_frozen_encoders_have_no_gradient_and_a_killed_run_thaws_at_the_same_step(
    world, tmp_path, encoders
):
    data = write_captions(world, tmp_path / "captions", "de")
    options = {
        **encoders, "lang": ("en", "de"), "images": world / "images", "freeze_epochs": 1.5,
        "batch_size": 4, "epochs": 3, "checkpoint_minutes": 0,
    }  # fmt: skip
    whole = _pretrain(data, tmp_path / "whole", **options)
    starts = []
    for step in (4, 5):  # of two steps an epoch, three are frozen
        with killed_at_step(step):
            _pretrain(data, tmp_path / f"{step}", **options)
        (state,) = (tmp_path / f"{step}" / "clip.partial" / "training").glob("state-*")
        moments = load_file(state / "optimizer.safetensors")
        starts.append((load_file(state / "module.safetensors"), len(moments) // 3))
        resumed = _pretrain(data, tmp_path / f"{step}", resume=True, **options)
        assert weights(resumed.folder) == weights(whole.folder)
    (frozen, num_trained), (thawed, num_all) = starts
    assert num_trained == 3 and num_all > 20
    name = "text_model.encoder.layer.0.output.dense.weight"
    start = load_file(Path(encoders["text"]) / "model.safetensors")
    assert torch.equal(frozen[name], start[name.removeprefix("text_model.")])
    assert not torch.equal(thawed[name], frozen[name])
    assert not torch.equal(frozen["text_projection.weight"], thawed["text_projection.weight"])
    # Neither are words moved that no caption has.
    words = load_file(whole.folder / "model.safetensors")[
        "text_model.embeddings.word_embeddings.weight"
    ]
    before = start["embeddings.word_embeddings.weight"]
    is_same = (words == before).all(dim=1)
    assert is_same.any() and not is_same.all()
    assert isinstance(AutoModel.from_pretrained(whole.folder), VisionTextDualEncoderModel)


def test_starts_that_contradict_each_other_are_refused(captioned, tmp_path, encoders, clip, runs):
    text, vision = encoders["text"], encoders["vision"]
    for options, said in (
        ({"text": text}, "--text and --vision go together"),
        ({"clip": str(clip), "text": text, "vision": vision}, "--clip is a whole model"),
        ({"freeze_epochs": 0.5}, "--freeze-epochs keeps pretrained encoders"),
        ({"text": text, "vision": text}, "a xlm-roberta model; expected a vision encoder such as"),
        ({"text": vision, "vision": vision}, "a vit model; expected a text encoder"),
        ({"text": str(runs / "clip-ve" / "text"), "vision": vision}, "has the same state whatever"),
    ):
        with pytest.raises(ClseaveError, match=re.escape(said)):
            _pretrain(captioned, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


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
