"""`retrieve`: ranks against all orders of equally near answers, and the command end to end."""

import itertools
import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_world import QUICK, Notes, read_jsonl, write_jsonl

import clseave_cli
from clseave_cli.core.config import PretrainConfig
from clseave_cli.core.models.ranking import Ranks, rank, rank_pairs
from clseave_cli.core.pretraining import pretrain
from clseave_cli.errors import DataError, ModelError


@pytest.fixture
def captioned(data):
    """Two captions a picture in en and de; the second is the same of all pictures."""
    for split, lang in itertools.product(("train", "dev", "test"), ("en", "de")):
        suffix = "" if lang == "en" else f".{lang}"
        rows = read_jsonl(data / f"snli_ve_{split}{suffix}.jsonl")
        captions = [
            {"image": row["Flickr30K_ID"], "caption": row["sentence2"]}
            for row in sorted(rows, key=lambda row: row["pairID"])
            if row["gold_label"] != "contradiction"
        ]
        write_jsonl(data / f"captions_{split}{suffix}.jsonl", captions)
    return data


def _retrieve(data, runs, progress=None, **options):
    defaults = {"resamples": 50, "device": "cpu", "precision": "fp32"}
    options = {"data": str(data), "runs": runs, **defaults, **options}
    return clseave_cli.retrieve(progress=progress or Notes(), **options)


@pytest.mark.parametrize(("ahead", "right", "wrong"), [(0, 1, 0), (2, 1, 0), (1, 1, 3), (0, 2, 4)])
def test_ties_count_as_all_orders_of_them_do_on_average(ahead, right, wrong):
    ranks = Ranks(*(np.array([value]) for value in (ahead, right, wrong)))
    orders = set(itertools.permutations([True] * right + [False] * wrong))
    firsts = np.array([ahead + 1 + order.index(True) for order in orders])
    assert ranks.mean[0] == pytest.approx(firsts.mean())
    for count in (1, 2, 3, 5, 10):
        assert ranks.within(count)[0] == pytest.approx((firsts <= count).mean())


def test_ranks_are_those_of_sorting_and_the_nearest_right_answer_counts():
    random = np.random.default_rng(0)
    images, texts = random.normal(size=(7, 4)), random.normal(size=(9, 4))
    # Text 0 belongs to images 0 and 3; image 6 has two texts.
    pairs = np.array([[0, 0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 3, 1, 2, 3, 4, 5, 6, 6, 2]])
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts)]
    of_images = rank_pairs(texts, images, *pairs)
    of_texts = rank_pairs(images, texts, *pairs[::-1])
    for ranks, cosine, (queries, answers) in (
        (of_images, units[1] @ units[0].T, pairs),
        (of_texts, units[0] @ units[1].T, pairs[::-1]),
    ):
        for query, row in enumerate(cosine):
            right = set(answers[queries == query])
            first = next(n for n, answer in enumerate(np.argsort(-row), 1) if answer in right)
            assert ranks.mean[query] == first


def test_embeddings_that_are_all_alike_score_chance():
    alike = np.ones((40, 3), dtype=np.float32) * np.linspace(0.1, 3, 40)[:, None]
    ranks = rank(alike, alike, lambda rows: np.eye(40, dtype=bool)[rows])
    assert ranks.within(1).mean() == pytest.approx(1 / 40)
    assert ranks.within(10).mean() == pytest.approx(10 / 40)
    assert (ranks.mean == 20.5).all()


def test_each_language_is_read_by_its_student_and_the_rest_by_clip_ve(
    captioned, runs, tmp_path, clseave
):
    report = tmp_path / "report"
    document = _retrieve(captioned, runs, report=report)
    read = {r.lang: (r.reader, r.trained, r.num_images, r.num_captions) for r in document.results}
    assert read == {"en": ("clip-ve", True, 4, 8), "de": ("align-de", True, 4, 8)}
    assert set(document.signature.checkpoints) == {"clip-ve", "align-de"}
    plain = json.loads(json.dumps(asdict(document)))
    assert json.loads((report / "retrieval.json").read_text()) == plain
    figures = {"recall.png", "ranks.png"}
    assert {path.name for path in report.iterdir()} == {"retrieval.json"} | figures
    # The command gives the same as Python.
    arguments = ("retrieve", "--data", captioned, "--runs", runs, "--precision", "fp32")
    code, out, err = clseave(*arguments, "--resamples", 50, "--device", "cpu", "--json")
    assert json.loads(out) == plain, err
    code, out, err = clseave(*arguments)
    assert code == 0, err
    assert "Images, given a caption" in out and "Captions, given an image" in out
    shutil.rmtree(runs / "align-de")
    (german,) = _retrieve(captioned, runs, lang=("de",)).results
    assert (german.reader, german.trained) == ("clip-ve", False)


def test_equal_captions_are_hits(captioned, clip, tmp_path):
    (result,) = _retrieve(captioned, tmp_path, clip=str(clip), lang=("en",)).results
    assert (result.trained, result.num_distinct) == (None, 5)
    # Half of the captions belong to every picture, the others to one of four.
    assert result.images.chance == pytest.approx((1 + 1 / 4) / 2)
    assert result.captions.chance == pytest.approx(2 / 5)
    assert result.images.recall_at[1].value >= 0.5 and result.images.recall_at[5].value == 1
    assert 1 <= result.images.lower_quartile <= result.images.median_rank <= 4


def test_a_pretrained_tower_finds_what_it_was_trained_on_and_says_so(captioned, tmp_path):
    shape = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "embedding_dim": 16}
    options = {"epochs": 25, "lang": ("en", "de"), **shape, **QUICK, "learning_rate": 3e-3}
    model = pretrain(PretrainConfig(data=captioned, runs=tmp_path, **options)).folder
    notes = Notes()
    document = _retrieve(captioned, tmp_path, notes, clip=str(model), split="train")
    assert [(r.lang, r.trained) for r in document.results] == [("en", True), ("de", True)]
    assert all(r.images.recall_at[1].value > 1.5 * r.images.chance for r in document.results)
    assert document.signature.seen == {"captions_train.jsonl": 8, "captions_train.de.jsonl": 8}
    seen = "8 images were seen in training or checkpoint selection"
    assert f"captions_train.de.jsonl: {seen}" in notes.text


def test_what_cannot_be_ranked_is_refused(captioned, runs, clip, tmp_path):
    broken = shutil.copytree(clip, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["text_projection.weight"].fill_(3e38)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    for options, error, message in (
        ({"split": "x"}, DataError, r"no captions_x.jsonl; choose another --split"),
        ({"lang": ("fr",)}, DataError, r"captions_test.fr.jsonl: no such file"),
        ({"clip": str(runs / "align-de")}, ModelError, r"align-de: not a clip-ve folder"),
        ({"clip": str(broken), "lang": ("en",)}, ModelError,
         r"captions_test.jsonl: embeddings .* are NaN or infinite"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            _retrieve(captioned, runs, **options)
