"""The losses of `align`, against values worked by hand and against independent formulas."""

import math

import pytest
import torch
from tiny_world import quick_align, read_jsonl

from clseave_cli.core.alignment import objectives
from clseave_cli.core.alignment.objectives import SentenceBatch
from clseave_cli.core.config import AlignConfig, ExportConfig
from clseave_cli.core.models.clip_ve import ClipVE, HeadConfig
from clseave_cli.core.prediction.export import export
from clseave_cli.errors import UsageError


def _batch(teacher, source):
    weights = torch.ones(len(source))
    return SentenceBatch(None, torch.tensor(teacher), torch.tensor(source), weights)


def test_errors_and_cosines_by_hand():
    batch = _batch([[3.0, 4.0], [1.0, 0.0]], [0, 1, 1])
    student = torch.tensor([[3.0, 2.0], [0.0, 2.0], [5.0, 0.0]])
    assert objectives.squared_error(student, batch).tolist() == [2.0, 2.5, 8.0]
    first = 1 - (9 + 8) / (5 * math.sqrt(13))
    distances = objectives.cosine_distance(student, batch).tolist()
    assert distances == pytest.approx([first, 1, 0], abs=1e-6)


def test_the_contrastive_loss_is_the_mean_of_two_cross_entropies():
    torch.manual_seed(0)
    teacher, student = torch.randn(3, 4), torch.randn(5, 4)
    source = [0, 1, 2, 1, 0]  # sentences 0 and 1 in two languages each
    losses = objectives.contrastive(student, _batch(teacher.tolist(), source))
    cosines = torch.nn.functional.cosine_similarity(student[:, None], teacher[None], dim=2) / 0.05
    for pair, s in enumerate(source):
        to_teacher = torch.logsumexp(cosines[pair], 0) - cosines[pair, s]
        to_student = torch.logsumexp(cosines[:, s], 0) - cosines[pair, s]
        assert losses[pair].item() == pytest.approx((to_teacher + to_student).item() / 2, abs=1e-5)


@pytest.mark.parametrize("objective", ["mse", "cosine", "mse+cosine", "contrastive"])
def test_every_objective_pulls_towards_the_teacher(world, tmp_path, trained, encoder, objective):
    options = {"objective": objective, "epochs": 25, "weight_decay": 0.0}
    result = quick_align(world, tmp_path, trained, encoder, "de", **options)
    records = read_jsonl(result.folder / "training" / "metrics.jsonl")
    epochs = [record for record in records if "dev" in record]
    assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]
    # Telling sentences apart leaves open where all of them lie together.
    if objective != "contrastive":
        assert epochs[-1]["dev"]["cosine"] > max(0.5, epochs[0]["dev"]["cosine"] + 0.1)


def test_the_objective_of_the_thesis_is_the_default():
    assert AlignConfig().objective == "mse"


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
        options = {"objective": objective, "epochs": 3}
        result = quick_align(data, tmp_path / objective, trained, encoder, "de", **options)
        records = read_jsonl(result.folder / "training" / "metrics.jsonl")
        values = [record["dev"][metric] for record in records if "dev" in record]
        assert result.training.dev[metric] == max(values)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_other_students_can_be_exported(world, tmp_path, runs, encoder, pooling):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    (runs / "align-de").rename(tmp_path / "old")
    quick_align(world, runs, runs, encoder, "de", out=runs / "align-de", pooling=pooling)
    result = export(ExportConfig(runs=runs, out=tmp_path / "onnx", lang=("de",)))
    assert result.difference < 1e-4
