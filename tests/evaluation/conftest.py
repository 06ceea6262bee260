"""Simulated results, learning curves and galleries."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clseave_cli.core.evaluation.figures import LearningCurve
from clseave_cli.core.evaluation.gallery import Gallery, GalleryEntry, GalleryItem
from clseave_cli.core.evaluation.metrics import Interval, agreement, compare_predictions, score
from clseave_cli.core.evaluation.results import (
    Abstention,
    Baselines,
    LanguageResult,
    Overlap,
    Results,
    Signature,
    across_seeds,
)
from clseave_cli.core.evaluation.transfer import analyse_distances, measure_transfer
from clseave_cli.labels import LABELS

LANGUAGES = ("en", "de", "nl", "ja", "zh", "ko")


def make_results(languages=LANGUAGES, seed=0, num_rows=600):
    """Metrics of simulated predictions, each language worse than the one before."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(3, size=num_rows)
    images = np.array([f"{index:05d}.jpg" for index in generator.integers(60, size=num_rows)])
    english = generator.normal(size=(num_rows, 3))
    english[np.arange(num_rows), labels] += 2.4
    english_right = english.argmax(axis=1) == labels
    teacher = generator.normal(size=(num_rows, 32))
    results = []
    for index, lang in enumerate(languages):
        logits = english + 0.35 * index * generator.normal(size=english.shape)
        scores = score(labels, logits, images, resamples=200, seed=0)
        right = logits.argmax(axis=1) == labels
        more = {}
        if index:
            student = teacher + 0.2 * index * generator.normal(size=teacher.shape)
            difference = compare_predictions(right, english_right, images, resamples=200, seed=0)
            transfer = measure_transfer(student, teacher, np.arange(num_rows))
            more = {"difference_to_english": difference, "transfer": transfer}
        share, kappa = agreement(logits, english)
        results.append(
            LanguageResult(
                **vars(scores), lang=lang, split="test", hard_accuracy=float(right[::2].mean()),
                num_hard=num_rows // 2, agreement_with_english=share, kappa_with_english=kappa,
                ratio_to_english=scores.accuracy / float(english_right.mean()), **more,
            )
        )  # fmt: skip
    baselines = Baselines(majority=0.334, hypothesis_only=0.412, shuffled_image=0.371)
    signature = Signature(
        version="0.1.0", data={"snli_ve_test.jsonl": "3f2a9c1b" * 8},
        checkpoints={"clip-ve": "91ab44e0" * 8, "align-de": "77de01c2" * 8}, seed=0,
        resamples=200, num_examples=num_rows, precision="fp32", device="cpu",
    )  # fmt: skip
    return Results(
        results=tuple(results),
        baselines=dict.fromkeys(languages, baselines),
        signature=signature,
        distances=analyse_distances({result.lang: result.accuracy for result in results}),
    )


@pytest.fixture(scope="session")
def results():
    return make_results()


@pytest.fixture
def calibrated(results):
    """English, and German with calibration, thresholds and photos seen in training."""
    german = replace(
        results.results[1], ece=0.02, ece_uncalibrated=0.06, loss=0.4, loss_uncalibrated=0.5,
        aurc=0.03, temperature=1.3, seen=Overlap(3, 30, 6, 0.05, 0.9, 1.0, 0.8),
        unsure=Abstention(0.95, LABELS, 0.1, 540, Interval(0.97, 0.96, 0.98)),
    )  # fmt: skip
    return replace(results, results=(results.results[0], german))


HOSTILE = "<script>alert('1')</script> | $x_1$ & 100 % 円 \\ `code` [a](b)"


def encoded_image(width, height, *, noise):
    """A PNG drawing of two colours, or a JPEG of noise."""
    stream = io.BytesIO()
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (2, 2, width // 2, height // 2))
    if noise:
        pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
    image.save(stream, "JPEG" if noise else "PNG")
    return stream.getvalue()


@pytest.fixture(scope="session")
def curves():
    def lines(**values):
        values = {"train loss": 1.0} | {f"dev {name}": value for name, value in values.items()}
        return {name: [(n, value / n) for n in range(1, 5)] for name, value in values.items()}

    return [
        LearningCurve("pretrain", "clip", lines(loss=2.0), 4),
        LearningCurve("finetune-ve", "clip-ve", lines(loss=1.1, accuracy=0.8), 3),
        LearningCurve("align", "align-de", lines(mse=0.03, mae=0.1, accuracy=0.8), None),
        LearningCurve("align", "align-$ja$-円", lines(mse=0.04, mae=0.2, accuracy=0.7), 4),
    ]


@pytest.fixture(scope="session")
def galleries():
    entries = tuple(
        GalleryEntry(lang, text, "entailment", predicted, (0.7, 0.2, 0.1))
        for lang, text, predicted in (
            ("en", "There is a red circle.", "entailment"),
            ("ja", "赤い円があります。", "neutral"),
            ("de", HOSTILE, "entailment"),
        )
    )
    items = (
        GalleryItem("scene.png", encoded_image(64, 64, noise=False), entries),
        GalleryItem("photo.jpg", encoded_image(900, 600, noise=True), entries),
    )
    return [
        Gallery("Scenes", "One scene, every language.", items),
        Gallery("Errors", HOSTILE, (GalleryItem(HOSTILE, b"not an image", entries[:1]),)),
    ]


@pytest.fixture
def trainings(results):
    """Three seeds with English at 70, 80 and 90 %, and German two points lower."""
    runs = []
    for accuracy in (0.7, 0.8, 0.9):
        english, german = (
            replace(result, accuracy=accuracy - lost)
            for result, lost in zip(results.results[:2], (0, 0.02), strict=True)
        )
        paired = replace(german.difference_to_english, value=-0.02, low=-0.03, high=0.01)
        pair = (english, replace(german, difference_to_english=paired))
        runs.append(replace(results, results=pair, distances=None))
    intervals = {
        "en": {"accuracy": Interval(0.8, 0.77, 0.83)},
        "de": {
            "accuracy": Interval(0.78, 0.75, 0.81),
            "difference_to_english": Interval(-0.02, -0.028, -0.012),
        },
    }
    return replace(runs[0], seeds=across_seeds(runs, intervals))
