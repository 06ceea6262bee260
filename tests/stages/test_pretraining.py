"""pretrain: the contrastive loss against a reference, and the stage end to end."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_backbones import STUDENTS, new_vit
from tiny_world import (
    QUICK,
    killed_at_step,
    quick_finetune,
    read_jsonl,
    record,
    sentences,
    weights,
    write_captions,
    write_jsonl,
)
from torch.nn import functional
from transformers import AutoModel, VisionTextDualEncoderModel

from clseave_cli.core import pretraining
from clseave_cli.core.config import PretrainConfig
from clseave_cli.core.data.captions import read_captions
from clseave_cli.core.files import read_json
from clseave_cli.core.models.backbones import load_clip
from clseave_cli.core.pretraining import contrastive_loss, pretrain, triplet_loss
from clseave_cli.errors import ClseaveError, DataError, UsageError

SHAPE = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "embedding_dim": 16}


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


def _unit_vectors(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def test_with_distinct_captions_the_loss_is_clips_own():
    images, captions = _unit_vectors(2, 5, 8, seed=0)
    scale = torch.tensor(7.0)
    loss = contrastive_loss(images, captions[None], torch.arange(5)[None], scale)
    logits = 7.0 * images @ captions.T
    matches = torch.arange(5)
    expected = sum(functional.cross_entropy(each, matches) for each in (logits, logits.T)) / 2
    torch.testing.assert_close(loss, expected)


def test_equal_captions_are_matches_of_both_images():
    # Images 0 and 1 share a caption; by hand, each is a match of both, half and half.
    vectors = _unit_vectors(5, 4, seed=1)
    images, captions = vectors[:3], vectors[[3, 3, 4]]
    ids = torch.tensor([[5, 5, 2]])
    loss = contrastive_loss(images, captions[None], ids, torch.tensor(3.0))
    logits = 3 * images @ captions.T
    expected = []
    for table in (logits.log_softmax(dim=1), logits.T.log_softmax(dim=1)):
        first = -(table[0, 0] + table[0, 1]) / 2
        second = -(table[1, 0] + table[1, 1]) / 2
        expected.append((first + second - table[2, 2]) / 3)
    torch.testing.assert_close(loss, sum(expected) / 2)


@pytest.mark.parametrize("hardest", [False, True])
def test_the_triplet_loss_is_that_of_its_papers_in_each_language(hardest):
    images, first, second = _unit_vectors(3, 4, 6, seed=2)
    # In the second language, images 0 and 3 share a caption: neither is the other's negative.
    second[3] = second[0]
    ids = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 4]])
    pick, expected = (max if hardest else sum), 0.0
    for captions, of_language in ((first, ids[0]), (second, ids[1])):
        cosine = (images @ captions.T).tolist()
        for i in range(4):
            others = [j for j in range(4) if of_language[j] != of_language[i]]
            of_image = [max(0, 0.2 + cosine[i][j] - cosine[i][i]) for j in others]
            of_caption = [max(0, 0.2 + cosine[j][i] - cosine[i][i]) for j in others]
            expected += (pick(of_image) + pick(of_caption)) / 4 / 2
    captions, scale = torch.stack([first, second]), torch.tensor(3.0)
    loss = triplet_loss(images, captions, ids, scale, margin=0.2, hardest=hardest)
    assert expected > 0 and loss.item() == pytest.approx(expected, rel=1e-5)


def test_in_several_languages_the_loss_is_that_of_the_definition():
    # Images 0 and 1 share their first caption; the third image's two captions are one word.
    images, sentences = _unit_vectors(8, 4, seed=2).split([3, 5])
    ids = torch.tensor([[0, 0, 1], [2, 3, 1]])
    scale, rows = 3.0, range(3)
    columns = [(lang, j) for lang in range(2) for j in rows]
    mine = [{int(ids[lang, i]) for lang in range(2)} for i in rows]
    expected = 0.0
    for i in rows:
        logits = torch.stack([scale * images[i] @ sentences[ids[column]] for column in columns])
        hits = [k for k, column in enumerate(columns) if int(ids[column]) in mine[i]]
        expected -= logits.log_softmax(dim=0)[hits].mean() / 3
    for lang, j in columns:
        logits = scale * images @ sentences[ids[lang, j]]
        hits = [i for i in rows if int(ids[lang, j]) in mine[i]]
        expected -= logits.log_softmax(dim=0)[hits].mean() / 6
    loss = contrastive_loss(images, sentences[ids], ids, torch.tensor(scale))
    torch.testing.assert_close(loss, expected / 2)


def test_dev_loss_is_recorded_by_language_as_if_there_were_no_other(captioned, tmp_path):
    for split in ("train", "dev"):
        rows = read_jsonl(captioned / f"captions_{split}.jsonl")
        for lang, caption in (("xx", "{}"), ("yy", "y {}")):
            translated = [row | {"caption": caption.format(row["caption"])} for row in rows]
            write_jsonl(captioned / f"captions_{split}.{lang}.jsonl", translated)
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
    name = "embeddings.word_embeddings.weight"
    words = load_file(whole.folder / "model.safetensors")[f"text_model.{name}"]
    is_same = (words == start[name]).all(dim=1)
    assert is_same.any() and not is_same.all()
    assert isinstance(AutoModel.from_pretrained(whole.folder), VisionTextDualEncoderModel)


def test_options_that_contradict_each_other_are_refused(captioned, tmp_path, encoders, clip, runs):
    text, vision = encoders["text"], encoders["vision"]
    for options, message in (
        ({"margin": 0.3}, "--margin and --negatives go with --objective triplet"),
        ({"negatives": "hardest"}, "--margin and --negatives go with --objective triplet"),
        ({"sampling": "self-paced"}, "--sampling self-paced needs several --lang"),
        ({"text": text}, "--text and --vision go together"),
        ({"clip": str(clip), "text": text, "vision": vision}, "--clip is a whole model"),
        ({"freeze_epochs": 0.5}, "--freeze-epochs freezes pretrained encoders"),
        ({"text": text, "vision": text}, "a xlm-roberta model; expected a vision encoder such as"),
        ({"text": vision, "vision": vision}, "a vit model; expected a text encoder"),
        ({"text": str(runs / "clip-ve" / "text"), "vision": vision}, "has the same state in every"),
    ):
        with pytest.raises(ClseaveError, match=re.escape(message)):
            _pretrain(captioned, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_pretrained_model_is_a_clip_of_transformers_and_of_ours(captioned, tmp_path):
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    result = _pretrain(captioned, tmp_path)
    model = CLIPModel.from_pretrained(result.folder)
    assert model.projection_dim == 16
    assert len(AutoTokenizer.from_pretrained(result.folder)) == model.config.text_config.vocab_size
    assert CLIPImageProcessorPil.from_pretrained(result.folder).size["height"] == 32
    finetuned = quick_finetune(captioned, tmp_path, result.folder, epochs=1)
    assert finetuned.folder == tmp_path / "clip-ve"


def _losses(result):
    """The training loss of every epoch."""
    records = read_jsonl(result.folder / "training" / "metrics.jsonl")
    return [record["loss"] for record in records if "dev" in record]


def test_training_brings_the_loss_down(captioned, tmp_path):
    losses = _losses(_pretrain(captioned, tmp_path, epochs=12, learning_rate=3e-3))
    assert losses[-1] < 0.7 * losses[0]


def test_the_seed_decides_the_model_also_after_a_kill_and_photos_may_not_change(
    captioned, tmp_path
):
    options = {"epochs": 4, "batch_size": 4, "checkpoint_minutes": 0}
    whole = _pretrain(captioned, tmp_path / "whole", **options)
    other = _pretrain(captioned, tmp_path / "other", seed=1, **options)
    assert weights(other.folder) != weights(whole.folder)
    with killed_at_step(6):
        _pretrain(captioned, tmp_path / "killed", **options)
    (state,) = (tmp_path / "killed" / "clip.partial" / "training").glob("state-*")
    assert state.name == "state-00000005"
    photo = captioned / "images" / "train0.png"
    original = photo.read_bytes()
    photo.write_bytes((captioned / "images" / "train1.png").read_bytes())
    with pytest.raises(UsageError, match="was run with photos: train = "):
        _pretrain(captioned, tmp_path / "killed", resume=True, **options)
    photo.write_bytes(original)
    resumed = _pretrain(captioned, tmp_path / "killed", resume=True, **options)
    assert weights(resumed.folder) == weights(whole.folder)
    assert resumed.training.steps == whole.training.steps == 8


@pytest.fixture
def bilingual(captioned):
    """The same captions in German, as its words would have it."""
    for split in ("train", "dev"):
        rows = read_jsonl(captioned / f"captions_{split}.jsonl")
        for row in rows:
            row["caption"] = "Hier: " + row["caption"][::-1]
        write_jsonl(captioned / f"captions_{split}.de.jsonl", rows)
    return captioned


def test_self_paced_batches_are_of_one_language_and_follow_the_dev_recall(bilingual, tmp_path):
    options = {"lang": ("en", "de"), "sampling": "self-paced", "objective": "triplet"}
    options |= {"epochs": 3, "batch_size": 2, "negatives": "hardest", "checkpoint_minutes": 0}
    whole = _pretrain(bilingual, tmp_path / "whole", **options)
    records = read_jsonl(whole.folder / "training" / "metrics.jsonl")
    epochs = {r["epoch"]: r["dev"] for r in records if "dev" in r}
    assert whole.training.steps == 3 * 8  # 8 images in two languages, two at a time
    reached = {}
    for lang in ("en", "de"):
        recalls = {epoch: dev[f"recall_at_10/{lang}"] for epoch, dev in epochs.items()}
        last = list(recalls.values())[-1]
        reached[lang] = next(e for e, recall in recalls.items() if recall >= 0.95 * last)
    assert whole.training.epochs_to_95 == reached
    assert read_json(whole.folder / "training" / "summary.json")["epochs_to_95"] == reached
    with killed_at_step(19):  # in the third epoch, which goes by the second one's recall
        _pretrain(bilingual, tmp_path / "killed", **options)
    resumed = _pretrain(bilingual, tmp_path / "killed", resume=True, **options)
    assert weights(resumed.folder) == weights(whole.folder)


def test_a_language_that_lags_gets_more_batches(bilingual, clip):
    config = PretrainConfig(data=bilingual, lang=("en", "de"), sampling="self-paced", batch_size=2)
    captions = read_captions(bilingual, "train", config.lang)
    photos = [bilingual / "images" / name for name in captions.images]
    _, text, image = load_clip(clip)
    examples = pretraining._Examples(config, captions, photos, text, image)
    for dev, share in (({}, 0.5), ({"recall_at_10/en": 0.3, "recall_at_10/de": 0.2}, 0.731)):
        batches = examples.batches(1, dev)
        assert len(batches) == 8 and sum(map(len, batches)) == 16
        languages = [set((rows // 8).tolist()) for rows in batches]
        assert languages.count({1}) == round(share * 8) == 8 - languages.count({0})
    (german,) = [rows for rows in batches if 1 in rows // 8][:1]
    shown = {f"Hier: {text[::-1]}" for texts in captions.texts["en"] for text in texts}
    sentences = list(dict.fromkeys(captions.all_texts()))
    met = examples.monolingual_batch(german).caption_ids  # (K, L, B)
    assert met.shape == (1, 1, 2)
    assert {sentences[number] for number in met.flatten()} <= shown


def test_a_triplet_has_no_temperature_to_train(captioned, clip, tmp_path):
    from transformers import CLIPModel

    options = {"objective": "triplet", "epochs": 6, "learning_rate": 3e-3, "weight_decay": 0.5}
    result = _pretrain(captioned, tmp_path, clip=str(clip), **options)
    before, after = (CLIPModel.from_pretrained(path) for path in (clip, result.folder))
    assert torch.equal(before.logit_scale, after.logit_scale)
    losses = _losses(result)
    assert losses[-1] < 0.9 * losses[0]


def test_training_starts_from_a_given_model_and_encodes_an_image_once(
    captioned, clip, tmp_path, monkeypatch
):
    from transformers import CLIPModel

    encoder = pretraining.ImageEncoder
    counts = record(monkeypatch, encoder, "forward", lambda _, pixels: len(pixels))
    options = {"epochs": 1, "batch_size": 4, "captions_per_image": 2, "clip": str(clip)}
    result = _pretrain(captioned, tmp_path, learning_rate=0.0, weight_decay=0.0, **options)
    assert sum(counts) == 8 + 4  # every training and every dev image once
    before, after = (CLIPModel.from_pretrained(path).state_dict() for path in (clip, result.folder))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "not valid JSON"),
        ('{"image": "train0.png"}', "no caption; expected a sentence"),
        ('{"image": 3, "caption": "x"}', "image is 3; expected the image"),
        ('{"image": "train0.png", "caption": " "}', "caption is empty"),
        ('{"image": "no.png", "caption": "x"}', "image 'no.png' is not in"),
    ],
)
def test_a_bad_caption_is_refused_by_file_and_line(captioned, tmp_path, line, message):
    path = captioned / "captions_train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(DataError, match=f"captions_train.jsonl:2: {message}"):
        _pretrain(captioned, tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"captions_train.jsonl: no such file; expected lines such"):
        _pretrain(captioned, tmp_path)
