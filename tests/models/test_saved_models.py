"""CLIP-VE and students on disk: saved and loaded bit for bit, and refused when damaged."""

import json
import os
import shutil

import pytest
import torch
from tiny_world import flip_byte, model_files, tree

from clseave_cli.core.files import json_digest
from clseave_cli.core.models import backbones
from clseave_cli.core.models.clip_ve import ClipVE, EntailmentHead, HeadConfig, fingerprint
from clseave_cli.core.models.listing import find_students
from clseave_cli.core.models.student import load_student, save_student
from clseave_cli.errors import ModelError


def test_saving_twice_gives_the_same_bytes_and_fingerprint(clip, tmp_path):
    model = ClipVE.from_clip(clip)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        if name == "c":
            torch.nn.init.normal_(model.head.layers[2].weight)
        model.save(tmp_path / name)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert fingerprint(tmp_path / "c") != fingerprint(tmp_path / "a")


def test_nothing_on_disk_is_a_pickle(trained):
    """G11."""
    names = [name for name in tree(trained) if not name.endswith((".json", ".jsonl", ".md"))]
    assert names and all(name.endswith(".safetensors") for name in names)


def test_a_student_of_another_teacher_is_refused(trained):
    with pytest.raises(ModelError, match="trained against another CLIP-VE"):
        load_student(trained / "align-de", "0" * 64)
    load_student(trained / "align-de", fingerprint(trained / "clip-ve"))


@pytest.fixture(params=["clip-ve", "align-de"])
def saved(request, runs):
    """A model folder, to damage, and its loader."""
    return runs / request.param, ClipVE.from_folder if request.param == "clip-ve" else load_student


def test_a_flipped_byte_in_any_file_is_noticed(saved):
    """G10."""
    folder, load = saved
    files = model_files(folder)
    assert len(files) >= 5
    del files["calibration.json"]  # tests/evaluation/test_abstention.py
    for name, content in files.items():
        path = folder / name
        # Bytes of the configuration are tried below.
        for place in (0.0, 0.3, 0.5, 0.99) if name != "config.json" else ():
            flip_byte(path, place)
            with pytest.raises(ModelError, match=str(path)):
                load(folder)
        path.unlink()
        with pytest.raises(ModelError, match=str(path)):
            load(folder)
        path.write_bytes(content)
    load(folder)


def test_every_byte_of_the_configuration_counts(saved):
    folder, load = saved
    path = folder / "config.json"
    sound = path.read_bytes()
    # Which version wrote it, at the end, changes nothing that the model computes.
    for place in range(0, sound.index(b'"clseave_version"'), 7):
        damaged = bytearray(sound)
        damaged[place] ^= 0x04
        if bytes([sound[place], damaged[place]]).isspace():
            continue
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=str(folder)):
            load(folder)


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (ClipVE.from_folder, "nowhere", "no such model folder; `clseave finetune-ve` creates it"),
        (load_student, "nowhere", "no such model folder; `clseave align --lang LANG` creates"),
        (ClipVE.from_folder, ".", r"config.json: no such file"),
        (ClipVE.from_folder, "align-de", "not a clip-ve folder"),
        (ClipVE.from_folder, "list", "not a clip-ve folder"),
    ],
)
def test_other_folders_are_refused(runs, load, name, message):
    (runs / "list").mkdir()
    (runs / "list" / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=message):
        load(runs / name)


def test_a_configuration_cannot_reach_outside_its_folder(runs):
    """G11."""
    path = runs / "align-de" / "config.json"
    content = json.loads(path.read_text())
    content["files"]["../../secret"] = "0" * 64
    del content["fingerprint"], content["clseave_version"]
    path.write_text(json.dumps(content | {"fingerprint": json_digest(content)}))
    with pytest.raises(ModelError, match="names a file outside its folder"):
        load_student(runs / "align-de")


def test_a_head_of_another_width_is_refused(clip):
    text, image = backbones.load_clip_text(clip), backbones.load_clip_image(clip)
    with pytest.raises(ModelError, match="head reads 24"):
        ClipVE(text, image, EntailmentHead(HeadConfig(embedding_dim=24)))


def test_the_image_tower_is_frozen_and_never_in_training_mode(clip):
    model = ClipVE.from_clip(clip).train()
    assert model.text.training and model.head.training
    assert not any(module.training for module in model.image.modules())
    assert not any(p.requires_grad for p in model.image.parameters())
    assert all(p.requires_grad for p in [*model.text.parameters(), *model.head.parameters()])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such model folder"),
        ("../../no/such", "no such model folder"),
        ("org/not-in-the-cache", "neither a folder here nor loadable as a hub id"),
    ],
)
def test_a_missing_model(name, message):
    with pytest.raises(ModelError, match=message):
        backbones.load_clip_text(name)


@pytest.mark.parametrize("pickled", [False, True])
def test_code_in_a_model_folder_is_never_run(encoder, tmp_path, pickled):
    """G11."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = shutil.copytree(encoder, tmp_path / "evil")
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save({"evil": Evil()}, folder / "pytorch_model.bin")
    else:
        config = json.loads((folder / "config.json").read_text())
        classes = {"AutoConfig": "evil.Evil", "AutoModel": "evil.M"}
        config |= {"model_type": "evil", "auto_map": classes}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="cannot be loaded"):
        backbones.load_encoder(folder)
    assert not (tmp_path / "ran").exists()


def test_a_student_of_one_language_goes_before_one_of_several(runs):
    both = runs / "align-de+nl"
    both.mkdir()
    student = load_student(runs / "align-de")
    save_student(student, both, languages=["de", "fr"], teacher=fingerprint(runs / "clip-ve"))
    assert find_students(runs) == {"de": runs / "align-de", "fr": both, "nl": runs / "align-nl"}
    shutil.rmtree(both)
    assert find_students(runs) == {"de": runs / "align-de", "nl": runs / "align-nl"}
    assert find_students(runs / "nowhere") == {}
