import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from clseave_cli.core.evaluation.figures import LearningCurve, read_learning_curve
from clseave_cli.core.evaluation.gallery import THUMBNAIL_PIXELS, most_confident_errors, thumbnail
from clseave_cli.errors import DataError


def write_model(folder, lines, summary=None):
    (folder / "training").mkdir(parents=True)
    (folder / "training" / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if summary is not None:
        (folder / "training" / "summary.json").write_text(json.dumps(summary))
    return folder


RECORDS = [
    '{"stage": "align", "step": 5, "epoch": 1, "loss": 0.9, "learning_rate": 1e-4}',
    '{"stage": "align", "step": 10, "epoch": 1, "loss": 0.8, "accuracy": 0.5,'
    ' "dev": {"mse": 0.02, "accuracy": 0.6}}',
    '{"stage": "align", "step": 20, "epoch": 2, "loss": 0.5, "dev": {"mse": 0.01}}',
]


def test_reads_the_epochs_of_a_run(tmp_path):
    lines = {
        "train loss": [(1, 0.8), (2, 0.5)],
        "train accuracy": [(1, 0.5)],
        "dev mse": [(1, 0.02), (2, 0.01)],
        "dev accuracy": [(1, 0.6)],
        "learning rate": [(0.5, 1e-4)],
    }
    model = write_model(tmp_path / "align-de", RECORDS, {"best_epoch": 2})
    assert read_learning_curve(model) == LearningCurve("align", "align-de", lines, 2)
    # A model without a record has no curve.
    assert read_learning_curve(tmp_path) is None
    assert read_learning_curve(write_model(tmp_path / "m", RECORDS[:1])) is None


@pytest.mark.parametrize("line", ["{", "[1]", '"dev"', '{"dev": {}}', '{"dev": 3, "stage": "x"}'])
def test_a_damaged_record_is_named(tmp_path, line):
    model = write_model(tmp_path / "m", [RECORDS[1], line])
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a record of training"):
        read_learning_curve(model)


def test_most_confident_errors_worked_by_hand():
    labels, images = [0, 0, 1, 2, 2], ["a", "b", "c", "c", "b"]
    probabilities = np.array(
        [[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.95, 0.0, 0.05], [0.0, 0.7, 0.3], [0.85, 0.1, 0.05]]
    )
    # Wrong: rows 1 (0.8, b), 2 (0.95, c), 3 (0.7, c), 4 (0.85, b); the surest of each picture.
    assert most_confident_errors(labels, probabilities, images).tolist() == [2, 4]
    assert most_confident_errors(labels, probabilities, images, count=1).tolist() == [2]
    assert most_confident_errors([0], [[1.0, 0.0, 0.0]], ["a"]).tolist() == []


def test_photos_are_scaled_down_and_drawings_stay_exact(tmp_path, galleries):
    (drawing, photo) = (item.image for item in galleries[0].items)
    data, width = thumbnail(photo)
    assert width == THUMBNAIL_PIXELS and data.startswith("data:image/jpeg;base64,")
    (tmp_path / "scene.png").write_bytes(drawing)
    head, _, encoded = thumbnail(tmp_path / "scene.png")[0].partition(",")
    assert head == "data:image/png;base64"
    pixels = (Image.open(io.BytesIO(content)) for content in (base64.b64decode(encoded), drawing))
    assert len({image.convert("RGB").tobytes() for image in pixels}) == 1
    # What is no picture gives none.
    assert thumbnail(b"no picture") is thumbnail(tmp_path / "missing.jpg") is None
