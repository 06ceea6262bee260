"""The losses of `align`, against values worked by hand and against independent formulas."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_world import QUICK, edit_row, read_jsonl, tree, write_jsonl

from clseave_cli.core.alignment import align, corpus, objectives
from clseave_cli.core.alignment.objectives import SentenceBatch
from clseave_cli.core.config import AlignConfig
from clseave_cli.core.features import Vectors
from clseave_cli.core.models.clip_ve import ClipVE, EntailmentHead, HeadConfig
from clseave_cli.core.prediction.export import export
from clseave_cli.errors import DataError, UsageError

OBJECTIVES = ["mse", "cosine", "mse+cosine", "contrastive", "head-aware"]


def _batch(teacher, source, **more):
    weights = torch.ones(len(source))
    return SentenceBatch(None, torch.tensor(teacher), torch.tensor(source), weights, **more)


def _align(data, runs, trained, encoder, *languages, **options):
    defaults = {"epochs": 1, "teacher": trained / "clip-ve", **QUICK}
    return align(
        AlignConfig(
            data=str(data), runs=runs, lang=languages, student=str(encoder), **(defaults | options)
        )
    )


def test_errors_and_cosines_by_hand():
    batch = _batch([[3.0, 4.0], [1.0, 0.0]], [0, 1, 1])
    own = torch.tensor([[3.0, 2.0], [0.0, 2.0], [5.0, 0.0]])
    assert objectives.squared_error(own, batch).tolist() == [2.0, 2.5, 8.0]
    first = 1 - (9 + 8) / (5 * math.sqrt(13))
    assert objectives.cosine_distance(own, batch).tolist() == pytest.approx([first, 1, 0], abs=1e-6)


def test_the_contrastive_loss_is_the_mean_of_two_cross_entropies():
    torch.manual_seed(0)
    teacher, own = torch.randn(3, 4), torch.randn(5, 4)
    source = [0, 1, 2, 1, 0]  # sentences 0 and 1 in two languages each
    found = objectives.contrastive(own, _batch(teacher.tolist(), source))
    cosines = torch.nn.functional.cosine_similarity(own[:, None], teacher[None], dim=2) / 0.05
    for pair, s in enumerate(source):
        to_teacher = torch.logsumexp(cosines[pair], 0) - cosines[pair, s]
        to_student = torch.logsumexp(cosines[:, s], 0) - cosines[pair, s]
        assert found[pair].item() == pytest.approx((to_teacher + to_student).item() / 2, abs=1e-5)


def test_head_divergence_is_the_kl_of_the_heads_predictions():
    torch.manual_seed(0)
    head = EntailmentHead(HeadConfig(embedding_dim=4, hidden_dim=8)).eval()
    teacher, own, premises = torch.randn(2, 4), torch.randn(3, 4), torch.randn(3, 4)
    source = torch.tensor([0, 1, 1])
    is_seen = torch.tensor([True, False, True])
    batch = SentenceBatch(None, teacher, source, torch.ones(3), premises, is_seen)
    found = objectives.head_divergence(own, batch, head)
    p = head(teacher[source], premises).softmax(1)
    q = head(own, premises).softmax(1)
    expected = (p * (p / q).log()).sum(1) * is_seen
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found[1] == 0 and found[0] > 0
    same = objectives.head_divergence(teacher[source], batch, head)
    torch.testing.assert_close(same, torch.zeros(3))


def test_head_aware_is_the_squared_error_and_the_heads_divergence_on_its_scale():
    torch.manual_seed(0)
    head = EntailmentHead(HeadConfig(embedding_dim=4, hidden_dim=8)).eval()
    teacher, own, premises = 3 * torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 4)
    batch = SentenceBatch(
        None, teacher, torch.arange(2), torch.ones(2), premises, torch.tensor([True, True])
    )
    vectors = Vectors(2, 4)
    vectors.add(teacher, np.arange(2), np.arange(2))
    pairs = SimpleNamespace(teacher=SimpleNamespace(vectors=vectors))
    error = objectives.squared_error(own, batch)
    for weight in (0.0, 0.5):
        config = AlignConfig(objective="head-aware", head_weight=weight)
        compare = objectives.comparison(config, SimpleNamespace(head=head), pairs)
        scale = teacher.var(dim=0, correction=0).mean()
        wanted = error + weight * scale * objectives.head_divergence(own, batch, head)
        torch.testing.assert_close(compare(own, batch), wanted)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_pulls_towards_the_teacher(world, tmp_path, trained, encoder, objective):
    result = _align(
        world, tmp_path, trained, encoder, "de", objective=objective, epochs=25,
        weight_decay=0.0,
    )  # fmt: skip
    records = read_jsonl(result.folder / "training" / "metrics.jsonl")
    epochs = [record for record in records if "dev" in record]
    assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]
    # Telling sentences apart leaves open where all of them lie together.
    if objective != "contrastive":
        assert epochs[-1]["dev"]["cosine"] > max(0.5, epochs[0]["dev"]["cosine"] + 0.1)


def test_mse_alone_learns_as_ever(world, tmp_path, trained, encoder):
    """The objective of the thesis is the default, to the bit."""
    named = _align(world, tmp_path / "a", trained, encoder, "de", objective="mse")
    default = _align(world, tmp_path / "b", trained, encoder, "de")
    for name in ("projection.safetensors", "encoder/model.safetensors"):
        assert (named.folder / name).read_bytes() == (default.folder / name).read_bytes()


def test_images_are_drawn_among_those_beside_the_sentence():
    vectors = corpus.Vectors(4, 2)
    table = torch.arange(8.0).view(4, 2)
    vectors.add(table, np.arange(4), np.arange(4))
    # Sentence 0 stands beside images 1 and 3, 1 beside none, 2 beside 2; 3, the last, beside none.
    images = corpus.PairedImages(vectors, np.array([1, 3, 2]), np.array([0, 2, 2, 3, 3]))
    sources = np.array([0, 1, 2, 3] * 50)
    drawn, is_seen = images.draw(sources, np.random.default_rng(0))
    assert is_seen.tolist() == [True, False, True, False] * 50
    rows = {tuple(row) for row in drawn[sources == 0].tolist()}
    assert rows == {tuple(table[1].tolist()), tuple(table[3].tolist())}
    assert {tuple(row) for row in drawn[sources == 2].tolist()} == {tuple(table[2].tolist())}
    again, _ = images.draw(sources, np.random.default_rng(0))
    assert torch.equal(again, drawn)


def test_the_images_of_a_sentence_are_those_of_its_rows(world, trained, encoder):
    from clseave_cli.core.data.images import ImageFolder
    from clseave_cli.core.models.student import new_student
    from clseave_cli.core.training.precision import autocast
    from clseave_cli.progress import SILENT

    teacher = ClipVE.from_folder(trained / "clip-ve")
    student = new_student(encoder, 16)
    config = AlignConfig(data=str(world))
    reader = corpus.ParallelReader(world, config, SILENT)
    taken = corpus.Corpus(student, SILENT, with_images=True)
    expected = {}
    for lang in ("de", "nl"):
        training, _ = reader.read(lang)
        taken.add(training)
        names, index = training.target.image_names, training.target.image_index
        for source, image in zip(training.sources, index, strict=True):
            expected.setdefault(source, set()).add(names[image])
    exact = autocast("fp32", torch.device("cpu"))
    photos = taken.photos(ImageFolder.of(world, None))
    pairs = taken.pairs(teacher, photos, exact, SILENT)
    images = pairs.images
    for number, names in enumerate(expected.values()):  # sources are numbered as they come
        items = images.items[images.offsets[number] : images.offsets[number + 1]]
        found = {tuple(row) for row in images.vectors.rows(items).tolist()}
        with torch.no_grad():
            wanted = teacher.image(
                teacher.image.preprocess([_picture(world, name) for name in sorted(names)])
            )
        assert len(found) == len(names)
        distance = torch.cdist(torch.tensor(sorted(found)), wanted).min(dim=1).values
        assert distance.max() < 1e-4


def _picture(world, name):
    from PIL import Image

    return Image.open(world / "images" / name).convert("RGB")


def test_the_head_is_left_as_it_is(world, tmp_path, runs, encoder):
    before = tree(runs / "clip-ve")
    _align(world, tmp_path, runs, encoder, "de", objective="head-aware", epochs=2)
    assert tree(runs / "clip-ve") == before


def test_head_aware_needs_images(data, tmp_path, trained, encoder):
    for split in ("train", "dev"):
        rows = read_jsonl(data / f"snli_ve_{split}.de.jsonl")
        kept = [{k: v for k, v in row.items() if k != "Flickr30K_ID"} for row in rows]
        write_jsonl(data / f"snli_ve_{split}.de.jsonl", kept)
    with pytest.raises(DataError, match="no training row names an image; --objective mse needs"):
        _align(data, tmp_path, trained, encoder, "de", objective="head-aware")
    (data / "images").rename(data / "elsewhere")
    with pytest.raises(DataError, match="no image folder in it"):
        _align(data, tmp_path, trained, encoder, "de", objective="head-aware")
    _align(data, tmp_path, trained, encoder, "de", objective="contrastive")


def test_a_row_without_image_still_counts(data, tmp_path, trained, encoder):
    for line in range(1, 9):
        edit_row(data / "snli_ve_train.de.jsonl", line, Flickr30K_ID=None)
    result = _align(data, tmp_path, trained, encoder, "de", objective="head-aware")
    assert result.training.pairs == 5


def test_an_objective_that_leaves_lengths_open_needs_a_head_that_does(trained):
    teacher = ClipVE.from_folder(trained / "clip-ve")
    teacher.head.config = HeadConfig(embedding_dim=16, normalize=False)
    for name in ("cosine", "contrastive"):
        config = AlignConfig(objective=name)
        with pytest.raises(UsageError, match=f"--objective {name}: leaves the length"):
            objectives.require_fitting(config, teacher)


def test_without_images_the_objective_says_what_chooses(data, tmp_path, trained, encoder):
    (data / "images").rename(data / "elsewhere")
    for objective, metric in (("cosine", "cosine"), ("contrastive", "recall_at_10")):
        result = _align(data, tmp_path / objective, trained, encoder, "de", objective=objective,
                        epochs=3)  # fmt: skip
        records = read_jsonl(result.folder / "training" / "metrics.jsonl")
        values = [record["dev"][metric] for record in records if "dev" in record]
        assert result.training.dev[metric] == max(values)


@pytest.mark.parametrize(("pooling", "projection"), [("mean", "mlp"), ("cls", "linear")])
def test_other_students_can_be_exported(
    world, tmp_path, runs, encoder, pooling, projection, clseave
):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from clseave_cli.core.config import ExportConfig

    options = {"out": runs / "align-de", "pooling": pooling, "projection": projection}
    (runs / "align-de").rename(tmp_path / "old")
    _align(world, runs, runs, encoder, "de", **options)
    result = export(ExportConfig(runs=runs, out=tmp_path / "onnx", lang=("de",)))
    assert result.difference < 1e-4
