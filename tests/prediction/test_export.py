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
from tiny_world import flip_byte, read_jsonl, reseal, tree

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
SENTENCES = [
    "Das Quadrat ist rot.",
    "Draußen wartet ein Hund.",
    "日本語 🙂",
    "rot " * 200,
    "[SEP] x",
]


@pytest.fixture(scope="session")
def exported(tmp_path_factory, trained):
    """The trained models as an exported folder; read only."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export(ExportConfig(runs=trained, out=folder))
    return folder


def _pairs(world, lang):
    suffix = "" if lang == "en" else f".{lang}"
    rows = read_jsonl(world / f"snli_ve_test{suffix}.jsonl")
    return [(world / "images" / row["Flickr30K_ID"], row["sentence2"]) for row in rows]


def _assert_close(answers, others, tolerance):
    for answer, other in zip(answers, others, strict=True):
        expected = pytest.approx(list(other.probabilities.values()), abs=tolerance)
        assert list(answer.probabilities.values()) == expected


@pytest.mark.parametrize("lang", ["en", "de", "nl"])
def test_the_exported_folder_answers_as_the_models_do(world, trained, exported, lang):
    pairs = _pairs(world, lang)
    pairs += [(pairs[0][0], sentence) for sentence in SENTENCES]
    ours = VisualEntailment.from_pretrained(trained, lang, "cpu", "fp32").predict(pairs)
    theirs = VisualEntailment.from_pretrained(exported, lang).predict(pairs)
    _assert_close(theirs, ours, 1e-4)
    for first, second in zip(ours, theirs, strict=True):
        assert second.truncated == first.truncated
        assert Path(second.model).name == Path(first.model).name
    assert any(answer.truncated for answer in ours)


def test_a_model_for_one_answer_gives_others_too(world, exported):
    first, second = _pairs(world, "de")[0], _pairs(world, "de")[-1]
    assert first[0] != second[0]
    model = VisualEntailment.from_pretrained(exported, "de", lasting=False)
    answers = [model(*first), model(*second)]
    wanted = VisualEntailment.from_pretrained(exported, "de").predict([first, second])
    _assert_close(answers, wanted, 1e-5)


def test_embeddings_do_not_depend_on_their_batch(trained, exported):
    model, reference = load_model(exported), load_model(trained, device="cpu", precision="fp32")
    together, cut = model.embed_sentences("de", SENTENCES)
    for sentence, vector in zip(SENTENCES, together, strict=True):
        alone, _ = model.embed_sentences("de", [sentence])
        assert alone[0] == pytest.approx(vector, abs=1e-4)
    torchs, torchs_cut = reference.embed_sentences("de", SENTENCES)
    assert together == pytest.approx(torchs, abs=1e-4)
    assert cut.tolist() == torchs_cut.tolist()


def test_sentences_are_computed_in_parts_of_bounded_size(exported, monkeypatch):
    shapes = []
    compute = onnx_model._run

    def watched(session, **inputs):
        shapes.append(inputs["input_ids"].shape)
        return compute(session, **inputs)

    monkeypatch.setattr(onnx_model, "_run", watched)
    model = load_model(exported, ["de"])
    sentences = [*SENTENCES, *(f"Das Quadrat {number} ist rot." for number in range(600))] * 2
    together, cut = model.embed_sentences("de", sentences)
    assert len(shapes) > 1 and all(rows * tokens <= 8192 for rows, tokens in shapes)
    assert sum(rows for rows, _ in shapes) == len(sentences)
    # Short sentences are not padded to the longest of the call.
    assert sum(rows * tokens for rows, tokens in shapes) < len(sentences) * shapes[0][1] / 2
    for row in (0, 1, 2, 3, 300, 604, 605, 608, 1209):
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
        pairs = _pairs(world, lang)
        ours = VisualEntailment.from_pretrained(trained, lang, "cpu", "fp32").predict(pairs)
        theirs = VisualEntailment.from_pretrained(tmp_path / "onnx", lang).predict(pairs)
        for first, second in zip(ours, theirs, strict=True):
            assert list(second.probabilities) == list(first.probabilities)
            differences += [
                abs(second.probabilities[label] - first.probabilities[label])
                for label in first.probabilities
            ]
    # It is in 8 bits: not what float32 gives.
    assert 1e-6 < max(differences) <= config["tolerance"]


def test_predicting_with_it_imports_neither_torch_nor_transformers(world, exported, tmp_path):
    image, hypothesis = _pairs(world, "de")[0]
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"image": str(image), "hypothesis": hypothesis})
    )
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
    pairs = _pairs(world, "de")
    before = VisualEntailment.from_pretrained(runs, "de", "cpu", "fp32").predict(pairs)
    write_calibrations(runs / "align-de", {"de": calibration})
    export(ExportConfig(runs=runs, out=tmp_path / "onnx", lang=("de",)))
    ours = VisualEntailment.from_pretrained(runs, "de", "cpu", "fp32").predict(pairs)
    theirs = VisualEntailment.from_pretrained(tmp_path / "onnx", "de", unsure=True).predict(pairs)
    _assert_close(theirs, ours, 1e-4)
    assert [a.label for a in ours] == [a.label for a in before]
    assert ours[0].probabilities != before[0].probabilities
    assert {a.label for a in theirs} == {"unsure"}


def test_a_damaged_folder_is_refused(exported, tmp_path, world):
    copy = tmp_path / "onnx"
    shutil.copytree(exported, copy)
    flip_byte(copy / "image.onnx.data")
    with pytest.raises(ModelError, match=r"image\.onnx\.data: damaged"):
        load_model(copy)
    (copy / "image.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"image\.onnx\.data: missing"):
        VisualEntailment.from_pretrained(copy)
    with pytest.raises(ModelError, match=r"image\.onnx.*export it again"):
        VisualEntailment.from_pretrained(copy, lasting=False)(*_pairs(world, "en")[0])
    with pytest.raises(ModelError, match=r"no model for fr; available: en, de, nl"):
        VisualEntailment.from_pretrained(exported, "fr")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("languages", {"de": "../../elsewhere"}, "config.json: damaged"),
        ("languages", {"de\x1b[2J": "clip-ve"}, "config.json: damaged"),
        ("languages", ["de"], "config.json: damaged"),
        ("languages", {"de": "gone"}, "config.json: damaged"),
        ("encoders", {"align-de": {"max_tokens": -1, "terminal_id": 0, "pad_id": 0}}, "damaged"),
        ("preparation", {"crop": [10**6, 10**6]}, "config.json: damaged"),
        ("preparation", [], "config.json: damaged"),
        ("calibrations", {"de": {"temperature": 0}}, "config.json: damaged"),
        ("calibrations", {"de": {"thresholds": ["neutral"]}}, "config.json: damaged"),
        ("image.onnx", "pipe", "image.onnx: missing or not a file"),
        ("config.json", "pipe", "config.json: not a regular file"),
    ],
)
def test_a_hostile_folder_is_refused(exported, tmp_path, world, refused, key, value, message):
    folder = tmp_path / "onnx"
    shutil.copytree(exported, folder)
    if value == "pipe":
        (folder / key).unlink()
        os.mkfifo(folder / key)
    else:
        config = peek(folder, onnx_model.FORMAT)
        value = config[key] | value if key == "preparation" and value else value
        reseal(folder, onnx_model.FORMAT, **{key: value})
    error = refused("predict", *_pairs(world, "de")[0], "--lang", "de", "--runs", folder)
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
    code, text, _ = clseave("export", "--runs", trained, "--out", out, "--lang", "nl", "--json")
    assert code == 0
    document = json.loads(text)
    assert document["languages"] == ["nl"] and document["folder"] == str(out)
    assert document["bytes"] == sum(len(content) for content in tree(out).values())
    code, _, err = clseave("export", "--runs", trained, "--out", out, "--lang", "nl")
    assert code == 0 and "replaced" not in err
    code, _, err = clseave("export", "--runs", trained, "--out", out, "--lang", "de")
    assert code == 0 and f"{out}: replaced an export that also read nl." in err
    (out / "config.json").write_text("{")
    error = refused("export", "--runs", trained, "--out", out, "--lang", "nl", code=2)
    assert f"{out}: already exists" in error  # nothing is known of a damaged one
    assert "is not an exported model" in refused(
        "export", "--runs", trained, "--out", trained / "clip-ve", code=2
    )
    other = tmp_path / "other"
    assert "no model for xx" in refused("export", "--runs", trained, "--out", other, "--lang", "xx")


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
