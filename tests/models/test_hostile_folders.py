"""Model folders that are damaged or malicious: one line, before anything large is built."""

import json
import os
import re
import shutil
import subprocess
import sys
from math import inf, nan
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import reseal
from transformers.integrations import hub_kernels

from clseave_cli import VisualEntailment
from clseave_cli.commands import serve
from clseave_cli.core.config import ServeConfig
from clseave_cli.core.models.backbones import load_clip, load_encoder
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.listing import find_students
from clseave_cli.core.models.student import load_student
from clseave_cli.errors import ClseaveError, ModelError


@pytest.fixture
def folder(tmp_path, encoder):
    """A copy of a tiny encoder, to damage."""
    return shutil.copytree(encoder, tmp_path / "model")


@pytest.fixture
def predict_error(runs, world, refused):
    """Runs `predict` on the damaged models; gives the line in which it fails."""
    image = world / "images" / "test0.png"
    return lambda lang: refused("predict", image, "Rot.", "--lang", lang, "--runs", runs)


def _edit(path, change):
    """Replaces the tensors of a safetensors file."""
    save_file(change(load_file(path)), path, {"format": "pt"})


def _configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _lacks(part):
    return lambda tensors: {name: tensors[name] for name in tensors if part not in name}


def _has_a_layer_more(tensors):
    return tensors | {n.replace("layer.0.", "layer.1."): t.clone() for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lacks(".0.attention"), "do not fit its config.json; missing: encoder.layer.0.attention"),
        (_has_a_layer_more, "do not fit its config.json; unexpected: encoder.layer.1.attention"),
    ],
)
def test_weights_of_another_architecture_are_refused(folder, change, message):
    _edit(folder / "model.safetensors", change)
    with pytest.raises(ModelError, match=message):
        load_encoder(folder)


def test_an_unused_head_in_the_files_is_accepted(folder):
    heads = {"cls.predictions.bias": torch.zeros(3), "pooler.dense.bias": torch.zeros(32)}
    _edit(folder / "model.safetensors", lambda tensors: tensors | heads)
    load_encoder(folder)


def test_a_clip_model_without_its_towers_is_refused(tmp_path, clip):
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    _edit(tmp_path / "model.safetensors", _lacks(".encoder."))
    for load in (load_clip, ClipVE.from_clip):
        with pytest.raises(ModelError, match=r"missing: text_model\.encoder.* and \d+ more"):
            load(tmp_path)


@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize(
    ("kind", "lang", "folder", "file"),
    [
        ("clip-ve", "en", "clip-ve", "text/model.safetensors"),
        ("clip-ve", "en", "clip-ve", "image/model.safetensors"),
        ("clip-ve", "en", "clip-ve", "head.safetensors"),
        ("student", "de", "align-de", "encoder/model.safetensors"),
        ("student", "de", "align-de", "projection.safetensors"),
    ],
)
def test_weights_that_are_not_finite_are_refused(
    runs, predict_error, kind, lang, folder, file, value
):
    def spoil(tensors):
        name = max(name for name in tensors if tensors[name].is_floating_point())
        tensors[name].view(-1)[-1] = value
        return tensors

    _edit(runs / folder / file, spoil)
    reseal(runs / folder, kind)
    assert "holds numbers that are not finite" in predict_error(lang)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers is 1000000; its weight files hold"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000; its weight files hold less"),
        ({"hidden_size": 9000, "intermediate_size": 9000}, "far larger than its weight files"),
        ({"num_labels": 10**8}, "num_labels is 100000000"),
        ({"vision": {"image_size": 9000, "patch_size": 1}}, "far larger than its weight files"),
    ],
)
def test_sizes_are_checked_before_anything_is_built(folder, monkeypatch, changes, message):
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_: pytest.fail("built"))
    _configure(folder, **changes)
    with pytest.raises(ModelError, match=message):
        load_encoder(folder)


@pytest.mark.parametrize(("kind", "lang"), [("clip-ve", "en"), ("student", "de")])
@pytest.mark.parametrize("languages", [7, [], [7], "de", None, {"de": 0}])
def test_invalid_languages_are_refused(runs, predict_error, kind, lang, languages):
    folder = runs / ("clip-ve" if kind == "clip-ve" else "align-de")
    reseal(folder, kind, languages=languages)
    assert "languages" in predict_error(lang)
    reseal(folder, kind, without=("languages",))
    assert "it names no languages" in predict_error(lang)


def test_a_head_larger_than_its_file_is_not_built(runs, monkeypatch):
    folder = runs / "clip-ve"
    reseal(folder, "clip-ve", head={"embedding_dim": 2_000_000, "hidden_dim": 128})
    initialised = []

    def initialise(tensor, **_options):
        initialised.append(tensor)

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", initialise)
    with pytest.raises(ModelError, match=r"head\.safetensors: does not fit the model"):
        ClipVE.from_folder(folder)
    assert initialised and all(tensor.is_meta for tensor in initialised)
    reseal(folder, "clip-ve", head={"embedding_dim": 16, "colour": "red"})
    with pytest.raises(ModelError, match="not a valid clip-ve configuration"):
        ClipVE.from_folder(folder)


def test_the_attention_named_in_a_configuration_is_ignored(folder, monkeypatch):
    monkeypatch.setattr(hub_kernels, "load_and_register_attn_kernel", load := Mock())
    _configure(folder, _attn_implementation="somebody/kernel", attn_implementation="some/body")
    model, _ = load_encoder(folder)
    assert model.config._attn_implementation == "sdpa" and not load.called


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, r"config\.json: not a regular file"),
        (lambda path: path.write_text("[" * 100_000), "not valid JSON"),
        (lambda path: path.write_text('{"a": ' + "9" * 5000 + "}"), "not valid JSON"),
        (lambda path: path.write_text("{"), "not valid JSON"),
    ],
)
def test_a_configuration_that_is_not_valid_json(folder, runs, make, message):
    for path, load in ((folder, load_encoder), (runs / "align-de", load_student)):
        (path / "config.json").unlink()
        make(path / "config.json")
        with pytest.raises(ModelError, match=message):
            load(path)
    assert set(find_students(runs)) == {"de", "nl"}  # by name: asking for it says what is wrong


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("", lambda c: c["model"].update(vocab={"a": 3}), "{encoder}: cannot be loaded"),
        ("", lambda c: c.update(post_processor={"type": "X"}), "{encoder}: cannot be loaded"),
        ("_config", lambda c: c.update(model_max_length=inf), "not a valid student configuration"),
    ],
)
def test_an_invalid_tokenizer_is_refused(runs, predict_error, name, change, message):
    encoder = runs / "align-de" / "encoder"
    path = encoder / f"tokenizer{name}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content).replace("Infinity", "1e999"))
    reseal(runs / "align-de", "student")
    assert message.format(encoder=encoder) in predict_error("de")


def test_control_characters_are_escaped(folder, runs, refused, world):
    _configure(folder, model_type="\x1b[2Jevil")
    error = refused("align", "--lang", "de", "--student", folder, "--data", world, "--runs", runs)
    assert "\x1b" not in error and r"\x1b[2Jevil" in error
    assert str(ClseaveError("a\rb\x9bc")) == r"a\rb\x9bc"
    reseal(runs / "align-nl", "student", languages=["\x1b[2J", "nl"])
    assert set(find_students(runs)) == {"de", "nl"}


def test_a_student_of_a_newer_format_leaves_other_languages_usable(
    runs, world, clseave, refused, predict_error, capsys
):
    _configure(runs / "align-nl", format_version=99)
    for lang in ("en", "de"):
        model = VisualEntailment.from_pretrained(runs, lang)
        assert model(world / "images" / "test0.png", "Rot.").label
    assert "format version 99, this clseave reads 1; update clseave" in predict_error("nl")
    assert serve._load(ServeConfig(runs=runs)).sources.keys() == {"en", "de"}
    assert "nl: skipped: " in capsys.readouterr().err
    with pytest.raises(ModelError, match="format version 99"):
        serve._load(ServeConfig(runs=runs, lang=("nl",)))
    for command in (
        ("evaluate", "--runs", runs, "--data", world, "--resamples", "10"),
        ("export", "--runs", runs, "--out", runs.parent / "onnx"),
    ):
        code, printed, message = clseave(*command)
        note = f"{runs / 'align-nl'}: format version 99, this clseave reads 1; nl is skipped."
        assert code == 0 and note in message.replace("\n", " ")
        assert "clseave align" not in message  # it has a student
        assert re.search(r"\bde\b", printed) and not re.search(r"\bnl\b", printed)
        assert "format version 99" in refused(*command, "--lang", "nl")


@pytest.mark.parametrize(
    "command",
    [
        ("finetune-ve", "--clip", "some/model", "--data", "{world}"),
        ("finetune-ve", "--data", "hf:some/data"),
        ("translate", "--lang", "fr", "--split", "dev", "--data", "{world}"),
    ],
)
def test_without_network_the_hub_fails_at_once(tmp_path, world, command):
    # Nobody listens on port 9.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-m", "clseave_cli", *(part.format(world=world) for part in command)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "http://127.0.0.1:9 does not answer" in done.stderr
    assert "Retry" not in done.stderr and len(done.stderr.splitlines()) == 1
