"""Whatever predict and evaluate are given, they answer or refuse in one line.

A few examples of each kind; tests/benchmarks/fuzz.py tries thousands.
"""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_world import COLOURS

from clseave_cli import Prediction, VisualEntailment
from clseave_cli.core.config import EvaluateConfig, PredictConfig
from clseave_cli.core.evaluation.run import evaluate
from clseave_cli.core.prediction.predictor import predict_file
from clseave_cli.errors import ClseaveError, DataError

_TEXTS = st.text(max_size=30)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | _TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_TEXTS, inner, max_size=2),
    max_leaves=3,
)


def _fuzz(max_examples):
    # The folders are shared by all examples of a test; each writes its own input there.
    checks = [HealthCheck.function_scoped_fixture]
    return settings(deadline=None, max_examples=max_examples, suppress_health_check=checks)


_PAIRS = st.one_of(
    st.fixed_dictionaries({"image": st.just("test0.png"), "hypothesis": _TEXTS}),
    st.fixed_dictionaries({"image": _TEXTS, "hypothesis": _TEXTS}),
    _VALUES,
).map(lambda row: json.dumps(row).encode())


@_fuzz(40)
@given(lines=st.lists(_PAIRS | st.binary(max_size=40), max_size=6))
def test_every_row_gets_its_answer(data, trained, lines):
    lines = [line.replace(b"\n", b"") for line in lines]
    source, target = data / "images" / "pairs.jsonl", data / "answers.jsonl"
    source.write_bytes(b"\n".join(lines))
    config = PredictConfig(runs=trained, device="cpu", precision="fp32", batch_size=4)
    done = predict_file(config, source, target)
    answers = [json.loads(line) for line in target.read_bytes().split(b"\n")[:-1]]
    assert len(answers) == sum(bool(line.strip()) for line in lines)
    assert done.num_predicted == sum("label" in answer for answer in answers)
    assert done.num_errors == sum("error" in answer for answer in answers)


@pytest.fixture(scope="module")
def english(trained):
    return VisualEntailment.from_pretrained(trained, device="cpu", precision="fp32")


def _encoded(kind):
    content = io.BytesIO()
    Image.new("RGB", (24, 16), COLOURS["red"]).save(content, kind)
    return content.getvalue()


_IMAGES = st.sampled_from([_encoded(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP")])
_EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=6)), max_size=4)


@_fuzz(60)
@given(content=_IMAGES, edits=_EDITS, length=st.floats(0.3, 1))
def test_every_image_is_judged_or_refused(english, tmp_path, content, edits, length):
    changed = bytearray(content[: int(len(content) * length) if length < 0.9 else None])
    for place, replacement in edits:
        start = int(place * len(changed))
        changed[start : start + len(replacement)] = replacement
    (tmp_path / "image").write_bytes(changed)
    (answer,) = english.predict([(tmp_path / "image", "The square is red.")])
    assert isinstance(answer, Prediction | DataError)


_KEYS = ("pairID", "Flickr30K_ID", "sentence2", "gold_label")


@_fuzz(20)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 11), st.sampled_from(_KEYS), _VALUES) | st.binary(max_size=30),
        min_size=1, max_size=3,
    ),
    skip_bad=st.booleans(),
)  # fmt: skip
def test_evaluate_measures_or_refuses(data, world, trained, changes, skip_bad):
    rows = [json.loads(line) for line in (world / "snli_ve_test.jsonl").read_bytes().splitlines()]
    more = [change for change in changes if isinstance(change, bytes)]
    for change in changes:
        if not isinstance(change, bytes):
            row, key, value = change
            rows[row][key] = value
    lines = [*(json.dumps(row).encode() for row in rows), *more]
    (data / "snli_ve_test.jsonl").write_bytes(b"\n".join(lines))
    config = EvaluateConfig(
        data=str(data), runs=(trained,), lang=("en",), resamples=5, skip_bad=skip_bad
    )
    try:
        (result,) = evaluate(config).results
    except ClseaveError as refusal:
        assert str(data) in str(refusal)
    else:
        assert 0 <= result.accuracy <= 1 and result.num_examples <= len(lines)
