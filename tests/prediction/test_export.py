"""export: an ONNX folder answers as the models do, and without torch."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_world import flip_byte, labelled_pairs, record, reseal, tree

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from clseave_cli import VisualEntailment
from clseave_cli.core.config import ExportConfig
from clseave_cli.core.data.images import Preparation
from clseave_cli.core.models.calibration import Calibration, write_calibrations
from clseave_cli.core.models.folder import peek
from clseave_cli.core.prediction import export as exporting
from clseave_cli.core.prediction import onnx_model
from clseave_cli.core.prediction.export import export
from clseave_cli.core.prediction.inference import load_model
from clseave_cli.errors import ModelError
from clseave_cli.labels import LABELS

_REPOSITORY = Path(__file__).parents[2]
SENTENCES = ["Das Quadrat ist rot.", "Draußen wartet ein Hund.", "日本 🙂", "rot " * 200, "[SEP] x"]


@pytest.fixture(scope="session")
def exported(tmp_path_factory, trained):
    """The trained models as an exported folder; read only."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export(ExportConfig(runs=trained, out=folder))
    return folder


def _probabilities(answers):
    return np.array([[answer.probabilities[label] for label in LABELS] for answer in answers])


def _predict(folder, lang, pairs, **options):
    settings = {"device": "cpu", "precision": "fp32"} | options
    return VisualEntailment.from_pretrained(folder, lang, **settings).predict(pairs)


@pytest.mark.parametrize("lang", ["en", "de", "nl"])
def test_the_exported_folder_answers_as_the_models_do(world, trained, exported, lang):
    pairs, _ = labelled_pairs(world, lang)
    pairs += [(pairs[0][0], sentence) for sentence in SENTENCES]
    expected, actual = _predict(trained, lang, pairs), _predict(exported, lang, pairs)
    assert _probabilities(actual) == pytest.approx(_probabilities(expected), abs=1e-4)
    assert [a.truncated for a in actual] == [a.truncated for a in expected]
    assert [Path(a.model).name for a in actual] == [Path(a.model).name for a in expected]
    assert any(answer.truncated for answer in expected)


def test_a_model_for_one_answer_gives_others_too(world, exported):
    (first, *_, second), _ = labelled_pairs(world, "de")
    assert first[0] != second[0]
    model = VisualEntailment.from_pretrained(exported, "de", lasting=False)
    expected = _probabilities(_predict(exported, "de", [first, second]))
    assert _probabilities([model(*first), model(*second)]) == pytest.approx(expected, abs=1e-5)


def test_embeddings_are_those_of_torch(trained, exported):
    model, reference = load_model(exported), load_model(trained, device="cpu", precision="fp32")
    together, cut = model.embed_sentences("de", SENTENCES)
    expected, expected_cut = reference.embed_sentences("de", SENTENCES)
    assert together == pytest.approx(expected, abs=1e-4)
    assert cut.tolist() == expected_cut.tolist()


def test_embeddings_do_not_depend_on_their_batch_whose_size_is_bounded(exported, monkeypatch):
    shapes = record(monkeypatch, onnx_model, "_run", lambda _, **inputs: inputs["input_ids"].shape)
    model = load_model(exported, ["de"])
    sentences = [*SENTENCES, *(f"Das Quadrat {number} ist rot." for number in range(600))] * 2
    together, cut = model.embed_sentences("de", sentences)
    assert len(shapes) > 1 and all(rows * tokens <= 8192 for rows, tokens in shapes)
    assert sum(rows for rows, _ in shapes) == len(sentences)
    # Short sentences are not padded to the longest of the call.
    assert sum(rows * tokens for rows, tokens in shapes) < len(sentences) * shapes[0][1] / 2
    for row in (0, 1, 2, 3, 4, 300, 604, 605, 608, 1209):
        alone, alone_cut = model.embed_sentences("de", sentences[row : row + 1])
        assert alone[0] == pytest.approx(together[row], abs=1e-4)
        assert alone_cut[0] == cut[row]
    shapes.clear()
    monkeypatch.setattr(onnx_model, "_MOST_TOKENS", 3)
    assert model.embed_sentences("de", SENTENCES)[0] == pytest.approx(together[:5], abs=1e-4)
    assert [rows for rows, _ in shapes] == [1] * 5


def test_predictions_in_eight_bits_are_within_the_tolerance_of_torchs(world, tmp_path, trained):
    result = export(ExportConfig(runs=trained, out=tmp_path / "onnx", int8=True))
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert config["precision"] == "int8" and config["difference"] == result.difference
    assert 0 < result.difference <= config["tolerance"] == exporting.TOLERANCE["int8"] == 0.1
    differences = []
    for lang in ("en", "de", "nl"):
        pairs, _ = labelled_pairs(world, lang)
        answers = _predict(tmp_path / "onnx", lang, pairs)
        assert all(list(answer.probabilities) == list(LABELS) for answer in answers)
        expected = _probabilities(_predict(trained, lang, pairs))
        differences.append(np.abs(_probabilities(answers) - expected).max())
    # It is in 8 bits: not what float32 gives.
    assert 1e-6 < max(differences) <= config["tolerance"]


def test_predicting_with_it_imports_neither_torch_nor_transformers(world, exported, tmp_path):
    image, hypothesis = labelled_pairs(world, "de")[0][0]
    row = {"image": str(image), "hypothesis": hypothesis}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    script = """
import json, sys
for name in ("torch", "transformers", "safetensors"):
    sys.modules[name] = None  # importing it fails
from clseave_cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code
"""
    for arguments in (
        [image, hypothesis, "--json"],
        ["--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl"],
    ):
        command = ["-c", script, "predict", *arguments, "--runs", exported, "--lang", "de"]
        done = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": str(_REPOSITORY)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.jsonl").read_text())["label"]


def test_the_distribution_without_torch_asks_for_nothing_else():
    def project(folder):
        return tomllib.loads((folder / "pyproject.toml").read_text())["project"]

    whole, small = project(_REPOSITORY), project(_REPOSITORY / "docs" / "runtime")
    extras = whole["optional-dependencies"]
    assert small["version"] == whole["version"] and small["scripts"] == whole["scripts"]
    assert set(small["dependencies"]) <= {*whole["dependencies"], *extras["onnx"]}
    for name, needed in small["optional-dependencies"].items():
        assert needed == extras[name]


def test_the_manifest_names_what_it_was_made_from(trained, exported):
    config = json.loads((exported / "config.json").read_text())
    made_from = {
        name: json.loads((trained / name / "config.json").read_text())["fingerprint"]
        for name in ("clip-ve", "align-de", "align-nl")
    }
    assert config["sources"] == made_from
    assert config["languages"] == {"en": "clip-ve", "de": "align-de", "nl": "align-nl"}
    assert set(config["files"]) == set(tree(exported)) - {"config.json"}


def test_temperature_and_thresholds_are_exported(world, runs, tmp_path):
    calibration = Calibration(3.0, dict.fromkeys(LABELS, 1.0), 0.95)
    pairs, _ = labelled_pairs(world, "de")
    before = _predict(runs, "de", pairs)
    write_calibrations(runs / "align-de", {"de": calibration})
    export(ExportConfig(runs=runs, out=tmp_path / "onnx", lang=("de",)))
    expected = _predict(runs, "de", pairs)
    exported = _predict(tmp_path / "onnx", "de", pairs, unsure=True)
    assert _probabilities(exported) == pytest.approx(_probabilities(expected), abs=1e-4)
    assert [answer.label for answer in expected] == [answer.label for answer in before]
    assert expected[0].probabilities != before[0].probabilities
    assert {answer.label for answer in exported} == {"unsure"}


def test_a_damaged_folder_is_refused(exported, tmp_path, world):
    copy = shutil.copytree(exported, tmp_path / "onnx")
    flip_byte(copy / "image.onnx.data")
    with pytest.raises(ModelError, match=r"image\.onnx\.data: damaged"):
        load_model(copy)
    (copy / "image.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"image\.onnx\.data: missing"):
        VisualEntailment.from_pretrained(copy)
    with pytest.raises(ModelError, match=r"image\.onnx.*export it again"):
        VisualEntailment.from_pretrained(copy, lasting=False)(*labelled_pairs(world)[0][0])
    with pytest.raises(ModelError, match=r"no model for fr; available: en, de, nl"):
        VisualEntailment.from_pretrained(exported, "fr")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("languages", {"de": "../../elsewhere"}),
        ("languages", {"de\x1b[2J": "clip-ve"}),
        ("languages", ["de"]),
        ("languages", {"de": "gone"}),
        ("encoders", {"align-de": {"max_tokens": -1, "terminal_id": 0, "pad_id": 0}}),
        ("preparation", {"crop": [10**6, 10**6]}),
        ("preparation", []),
        ("calibrations", {"de": {"temperature": 0}}),
        ("calibrations", {"de": {"thresholds": ["neutral"]}}),
        ("image.onnx: missing or not a file", "pipe"),
        ("config.json: not a regular file", "pipe"),
    ],
)
def test_a_hostile_folder_is_refused(exported, tmp_path, world, refused, key, value):
    folder, message = shutil.copytree(exported, tmp_path / "onnx"), "config.json: damaged"
    if value == "pipe":
        path, message = folder / key.partition(":")[0], key
        path.unlink()
        os.mkfifo(path)
    else:
        config = peek(folder, onnx_model.FORMAT)
        value = config[key] | value if key == "preparation" and value else value
        reseal(folder, onnx_model.FORMAT, **{key: value})
    pair = labelled_pairs(world, "de")[0][0]
    error = refused("predict", *pair, "--lang", "de", "--runs", folder)
    assert message in error and "\x1b" not in error


def test_the_teachers_language_is_not_taken_for_another(tmp_path, trained, world, refused):
    """Exported without English, it reads none; a student would answer, and wrongly."""
    out = tmp_path / "onnx"
    export(ExportConfig(runs=trained, out=out, lang=("de",)))
    image = world / "images" / "test0.png"
    assert "no model for en" in refused("predict", image, "red", "--runs", out)
    reseal(out, onnx_model.FORMAT, without=("source_lang",))
    assert "give --lang, or export it again" in refused("predict", image, "red", "--runs", out)


@pytest.mark.parametrize("broken", [False, True])
def test_what_differs_too_much_is_not_written(tmp_path, trained, monkeypatch, broken):
    monkeypatch.setitem(exporting.TOLERANCE, "fp32", 1.0 if broken else 0.0)
    if broken:
        nan = np.full((15, 3), np.nan, np.float32)
        monkeypatch.setattr(onnx_model.OnnxModel, "probabilities", lambda *_: nan)
    with pytest.raises(ModelError, match=r"onnx: not written, because a probability differs"):
        export(ExportConfig(runs=trained, out=tmp_path / "onnx", lang=("de",)))
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_wrote(tmp_path, trained, clseave, refused):
    out = tmp_path / "onnx"
    command = ("export", "--runs", trained, "--out")
    code, text, _ = clseave(*command, out, "--lang", "nl", "--json")
    assert code == 0
    document = json.loads(text)
    assert document["languages"] == ["nl"] and document["folder"] == str(out)
    assert document["bytes"] == sum(len(content) for content in tree(out).values())
    code, _, err = clseave(*command, out, "--lang", "nl")
    assert code == 0 and "replaced" not in err
    code, _, err = clseave(*command, out, "--lang", "de")
    assert code == 0 and f"{out}: replaced an export that also read nl." in err
    (out / "config.json").write_text("{")  # nothing is known of a damaged one
    assert f"{out}: already exists" in refused(*command, out, "--lang", "nl", code=2)
    assert "is not an exported model" in refused(*command, trained / "clip-ve", code=2)
    assert "no model for xx" in refused(*command, tmp_path / "other", "--lang", "xx")


@pytest.mark.parametrize(
    "size", [(224, 224), (500, 375), (375, 500), (31, 200), (7, 5), (225, 225)]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {key: {"height": 96, "width": 96} for key in ("size", "crop_size")},
        {"size": {"height": 20, "width": 31}, "crop_size": {"height": 27, "width": 40}},
    ],
    ids=["CLIP's", "square", "black edges"],
)
def test_pixels_are_those_of_transformers(size, options):
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(**options)
    random = np.random.default_rng(1)
    image = Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))
    expected = processor(images=[image], return_tensors="np")["pixel_values"][0]
    pixels = Preparation.of(processor)(image)
    assert pixels.dtype == np.float32
    assert np.abs(pixels - expected).max() < 1e-6


def test_other_preprocessing_is_refused(tmp_path, trained, monkeypatch):
    from transformers import CLIPImageProcessorPil

    assert Preparation.of(CLIPImageProcessorPil(do_center_crop=False)) is None
    monkeypatch.setattr(Preparation, "of", lambda _: None)
    with pytest.raises(ModelError, match="preprocessing cannot be exported"):
        export(ExportConfig(runs=trained, out=tmp_path / "onnx"))
