"""Model folders that are damaged or malicious: one line, before anything large is built."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import reseal

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


def _edit(path, change):
    """Changes the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def _configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _lacks_a_layer(tensors):
    for name in [name for name in tensors if ".0.attention" in name]:
        del tensors[name]


def _has_a_layer_more(tensors):
    for name in [name for name in tensors if "layer.0." in name]:
        tensors[name.replace("layer.0.", "layer.1.")] = tensors[name].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lacks_a_layer, "do not fit its config.json; missing: encoder.layer.0.attention"),
        (_has_a_layer_more, "do not fit its config.json; unexpected: encoder.layer.1.attention"),
    ],
)
def test_weights_of_another_architecture_are_refused(folder, change, message):
    _edit(folder / "model.safetensors", change)
    with pytest.raises(ModelError, match=message):
        load_encoder(folder)


def test_an_unused_head_in_the_files_is_accepted(folder):
    def add_heads(tensors):
        tensors["cls.predictions.bias"] = torch.zeros(3)
        tensors["pooler.dense.bias"] = torch.zeros(32)

    _edit(folder / "model.safetensors", add_heads)
    load_encoder(folder)


@pytest.mark.parametrize("load", [load_clip, ClipVE.from_clip])
def test_a_clip_model_without_its_towers_is_refused(tmp_path, clip, load):
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    _edit(
        tmp_path / "model.safetensors",
        lambda tensors: [tensors.pop(name) for name in [*tensors] if ".encoder." in name],
    )
    with pytest.raises(ModelError, match=r"missing: text_model\.encoder.* and \d+ more"):
        load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "part",
    [
        "clip-ve/text/model.safetensors",
        "clip-ve/image/model.safetensors",
        "clip-ve/head.safetensors",
        "align-de/encoder/model.safetensors",
        "align-de/projection.safetensors",
    ],
)
def test_weights_that_are_not_finite_are_refused(runs, world, refused, part, value):
    def spoil(tensors):
        name = max(name for name in tensors if tensors[name].is_floating_point())
        tensors[name].view(-1)[-1] = value

    _edit(runs / part, spoil)
    folder = runs / part.partition("/")[0]
    kind, lang = ("clip-ve", "en") if folder.name == "clip-ve" else ("student", "de")
    reseal(folder, kind)
    image = world / "images" / "test0.png"
    error = refused("predict", image, "x", "--lang", lang, "--runs", runs)
    assert "holds numbers that are not finite" in error


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
def test_invalid_languages_are_refused(runs, world, refused, kind, lang, languages):
    folder = runs / ("clip-ve" if kind == "clip-ve" else "align-de")
    reseal(folder, kind, languages=languages)
    image = world / "images" / "test0.png"
    assert "languages" in refused("predict", image, "x", "--lang", lang, "--runs", runs)
    reseal(folder, kind, without=("languages",))
    message = refused("predict", image, "x", "--lang", lang, "--runs", runs)
    assert "it names no languages" in message


def test_a_tokenizer_without_end_is_refused(runs, world, refused):
    path = runs / "align-de" / "encoder" / "tokenizer_config.json"
    path.write_text(
        path.read_text().replace('"model_max_length": ', '"model_max_length": 1e999, "x": ')
    )
    reseal(runs / "align-de", "student")
    image = world / "images" / "test0.png"
    error = refused("predict", image, "x", "--lang", "de", "--runs", runs)
    assert "not a valid student configuration" in error


def test_a_head_larger_than_its_file_is_not_built(runs, monkeypatch):
    folder = runs / "clip-ve"
    reseal(folder, "clip-ve", head={"embedding_dim": 2_000_000, "hidden_dim": 128})
    initialised = []
    initialise = torch.nn.init.kaiming_uniform_

    def watch(tensor, **options):
        initialised.append(tensor)
        return initialise(tensor, **options)

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", watch)
    with pytest.raises(ModelError, match=r"head\.safetensors: does not fit the model"):
        ClipVE.from_folder(folder)
    assert initialised and all(tensor.is_meta for tensor in initialised)
    reseal(folder, "clip-ve", head={"embedding_dim": 16, "colour": "red"})
    with pytest.raises(ModelError, match="not a valid clip-ve configuration"):
        ClipVE.from_folder(folder)


def test_the_attention_named_in_a_configuration_is_ignored(folder, monkeypatch):
    from transformers.integrations import hub_kernels

    asked = []
    monkeypatch.setattr(hub_kernels, "load_and_register_attn_kernel", lambda *a: asked.append(a))
    _configure(folder, _attn_implementation="somebody/kernel", attn_implementation="some/body")
    model, _ = load_encoder(folder)
    assert model.config._attn_implementation == "sdpa" and not asked


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
    "change",
    [
        lambda content: content["model"].update(vocab={"a": 3}),
        lambda content: content.update(post_processor={"type": "X"}),
    ],
)
def test_an_inconsistent_tokenizer_is_refused(runs, world, refused, change):
    path = runs / "align-de" / "encoder" / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    reseal(path.parents[1], "student")
    image = world / "images" / "test0.png"
    error = refused("predict", image, "Rot.", "--lang", "de", "--runs", runs)
    assert f"{path.parent}: cannot be loaded" in error


def test_control_characters_are_escaped(folder, runs, refused, world, clseave):
    _configure(folder, model_type="\x1b[2Jevil")
    error = refused("align", "--lang", "de", "--student", folder, "--data", world, "--runs", runs)
    assert "\x1b" not in error and r"\x1b[2Jevil" in error
    assert str(ClseaveError("a\rb\x9bc")) == r"a\rb\x9bc"
    reseal(runs / "align-nl", "student", languages=["\x1b[2J", "nl"])
    assert set(find_students(runs)) == {"de", "nl"}


def test_a_student_of_a_newer_format_leaves_other_languages_usable(
    runs, world, clseave, refused, capsys
):
    path = runs / "align-nl" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    image = world / "images" / "test0.png"
    for lang in ("en", "de"):
        assert VisualEntailment.from_pretrained(runs, lang)(image, "Rot.").label
    error = refused("predict", image, "Rood.", "--lang", "nl", "--runs", runs)
    assert "format version 99, this clseave reads 1; update clseave" in error
    assert serve._load(ServeConfig(runs=runs)).sources.keys() == {"en", "de"}
    assert "nl: skipped: " in capsys.readouterr().err
    with pytest.raises(ModelError, match="format version 99"):
        serve._load(ServeConfig(runs=runs, lang=("nl",)))
    out = runs.parent / "onnx"
    for command in (
        ("evaluate", "--runs", runs, "--data", world, "--resamples", "10"),
        ("export", "--runs", runs, "--out", out),
    ):
        code, printed, message = clseave(*command)
        note = f"{runs / 'align-nl'}: format version 99, this clseave reads 1; nl is left out."
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
