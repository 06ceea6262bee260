"""CLIP-VE and students on disk: saved and loaded bit for bit, and refused when damaged."""

import json
import os
import shutil

import pytest
import torch
from tiny_world import ENCODER_SHAPE, flip_byte, tree

from clseave_cli.core.models import backbones
from clseave_cli.core.models.clip_ve import ClipVE, EntailmentHead, HeadConfig, fingerprint
from clseave_cli.core.models.encoders import module_digest
from clseave_cli.core.models.listing import find_students
from clseave_cli.core.models.scratch import ClipShape, new_clip, new_encoder
from clseave_cli.core.models.student import load_student, new_student, save_student
from clseave_cli.errors import ModelError

SENTENCES = ["The square is red.", "Das Quadrat ist weiß.", "x"]


def _embed(encoder):
    with torch.no_grad():
        return torch.cat(list(encoder.embed(encoder.tokenize(SENTENCES))))


@pytest.fixture
def model(clip):
    torch.manual_seed(0)
    model = ClipVE.from_clip(clip)
    torch.nn.init.normal_(model.text.projection.weight)  # as training changes it
    model(torch.randn(8, 16), torch.randn(8, 16))  # running statistics of their own
    return model.eval()


def test_clip_ve_is_the_same_after_save_and_load(model, tmp_path):
    model.save(tmp_path)
    again = ClipVE.from_folder(tmp_path)
    assert module_digest(again) == module_digest(model)
    assert not again.training
    assert torch.equal(_embed(again.text), _embed(model.text))
    pixels = torch.randn(2, 3, 32, 32)
    h = torch.randn(2, 16)
    with torch.no_grad():
        assert torch.equal(again.image(pixels), model.image(pixels))
        assert torch.equal(again(h, h), model(h, h))
    assert again.fingerprint == model.fingerprint == fingerprint(tmp_path) != ""


def test_saving_twice_gives_the_same_bytes_and_fingerprint(model, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        model.save(tmp_path / name)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    torch.nn.init.normal_(model.head.layers[2].weight)
    (tmp_path / "c").mkdir()
    model.save(tmp_path / "c")
    assert fingerprint(tmp_path / "c") != fingerprint(tmp_path / "a")


def test_the_towers_of_a_saved_clip_ve_load_with_transformers_alone(model, tmp_path):
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessorPil,
        CLIPTextModelWithProjection,
        CLIPVisionModelWithProjection,
    )

    model.save(tmp_path)
    text = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text")
    with torch.no_grad():
        wanted = text(**tokenizer(SENTENCES, padding=True, return_tensors="pt")).text_embeds
        torch.testing.assert_close(_embed(model.text), wanted, rtol=1e-4, atol=1e-5)
        vision = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "image").eval()
        pixels = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(vision(pixel_values=pixels).image_embeds, model.image(pixels))
    assert CLIPImageProcessorPil.from_pretrained(tmp_path / "image").size == {
        "height": 32,
        "width": 32,
    }


def test_a_student_is_the_same_after_save_and_load(encoder, tmp_path):
    torch.manual_seed(0)
    student = new_student(encoder, 16).eval()
    torch.nn.init.normal_(student.norm.weight)
    digest = save_student(student, tmp_path, languages=["de"], teacher="t" * 64)
    again = load_student(tmp_path, "t" * 64)
    assert again.fingerprint == digest
    assert module_digest(again) == module_digest(student)
    assert torch.equal(_embed(again), _embed(student))
    assert not again.training
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["languages"] == ["de"] and config["pooling"] == "terminal"
    assert config["teacher"] == "t" * 64 and config["format_version"] == 1


def test_nothing_on_disk_is_a_pickle(trained):
    """G11."""
    names = [name for name in tree(trained) if not name.endswith((".json", ".jsonl", ".md"))]
    assert names and all(name.endswith(".safetensors") for name in names)


def test_a_student_of_another_teacher_is_refused(trained):
    with pytest.raises(ModelError, match="trained against another CLIP-VE"):
        load_student(trained / "align-de", "0" * 64)
    load_student(trained / "align-de", fingerprint(trained / "clip-ve"))


@pytest.mark.parametrize("kind", ["clip-ve", "align-de"])
def test_a_flipped_byte_in_any_file_is_noticed(runs, kind):
    """G10."""
    folder = runs / kind
    load = ClipVE.from_folder if kind == "clip-ve" else load_student
    load(folder)
    checked = 0
    for name, content in tree(folder).items():
        if name.startswith("training/") or name == "README.md":
            continue
        path = folder / name
        # The configuration ends in the version that wrote it, which changes nothing.
        for place in (0.0, 0.3, 0.5, 0.99) if name != "config.json" else (0.0, 0.3, 0.5):
            flip_byte(path, place)
            with pytest.raises(ModelError, match=str(path if name != "config.json" else folder)):
                load(folder)
            path.write_bytes(content)
        path.unlink()
        with pytest.raises(ModelError, match=str(path)):
            load(folder)
        path.write_bytes(content)
        checked += 1
    assert checked >= 5
    load(folder)


def test_every_byte_of_the_configuration_counts(runs):
    path = runs / "align-de" / "config.json"
    sound = path.read_bytes()
    version = sound.index(b'"clseave_version"')
    for place in range(0, len(sound) - 2, 7):
        if place >= version:
            break  # which version wrote it changes nothing that the model computes
        damaged = bytearray(sound)
        damaged[place] ^= 0x04
        path.write_bytes(damaged)
        if damaged[place] in b" \t\n\r" and sound[place] in b" \t\n\r":
            continue
        with pytest.raises(ModelError, match="align-de"):
            load_student(runs / "align-de")


def test_what_is_no_model_folder_is_refused(tmp_path, trained):
    with pytest.raises(ModelError, match=r"no such model folder; `clseave finetune-ve` makes it"):
        ClipVE.from_folder(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no such model folder; `clseave align --lang LANG` make"):
        load_student(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config.json: no such file"):
        ClipVE.from_folder(tmp_path)
    with pytest.raises(ModelError, match="not a clip-ve folder"):
        ClipVE.from_folder(trained / "align-de")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not a clip-ve folder"):
        ClipVE.from_folder(tmp_path)


def test_a_newer_format_is_refused(runs):
    path = runs / "clip-ve" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(ModelError, match=r"format version 2, this clseave reads 1; update clseave"):
        ClipVE.from_folder(runs / "clip-ve")


def test_a_configuration_cannot_reach_outside_its_folder(runs):
    """G11."""
    from clseave_cli.core.models.folder import seal

    path = runs / "align-de" / "config.json"
    config = json.loads(path.read_text())
    evil = config["files"] | {"../../secret": "0" * 64}
    seal(runs / "align-de", "student", {"languages": ["de"]})
    sealed = json.loads(path.read_text())
    from clseave_cli.core.files import json_digest

    content = {
        key: value
        for key, value in (sealed | {"files": evil}).items()
        if key not in ("fingerprint", "clseave_version")
    }
    path.write_text(json.dumps(content | {"fingerprint": json_digest(content)}))
    with pytest.raises(ModelError, match="names a file outside its folder"):
        load_student(runs / "align-de")


def test_widths_that_do_not_fit_are_refused(clip, tmp_path):
    shape = ClipShape(image_size=32, width=32, num_layers=1, num_heads=2, embedding_dim=24)
    new_clip(tmp_path, ["red"], shape)
    text, image = backbones.load_clip_text(clip), backbones.load_clip_image(tmp_path)
    head = EntailmentHead(HeadConfig(embedding_dim=16))
    with pytest.raises(ModelError, match=r"text tower projects to 16, the image tower to 24"):
        ClipVE(text, image, head)
    with pytest.raises(ModelError, match="head reads 16"):
        ClipVE(backbones.load_clip_text(tmp_path), image, head)


def test_the_image_tower_is_frozen_and_never_in_training_mode(clip):
    model = ClipVE.from_clip(clip)
    model.train()
    assert model.text.training and model.head.training
    assert not any(module.training for module in model.image.modules())
    assert not any(p.requires_grad for p in model.image.parameters())
    assert all(p.requires_grad for p in [*model.text.parameters(), *model.head.parameters()])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./nowhere", "no such model folder"),
        ("../../no/such", "no such model folder"),
        ("org/not-in-the-cache", "neither a folder here nor loadable as a hub id"),
    ],
)
def test_a_model_that_is_not_there(name, said):
    with pytest.raises(ModelError, match=said):
        backbones.load_clip_text(name)


def test_code_in_a_model_folder_is_never_run(encoder, tmp_path):
    """G11."""
    folder = tmp_path / "evil"
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="cannot be loaded"):
        backbones.load_encoder(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_never_read(encoder, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = tmp_path / "pickled"
    shutil.copytree(encoder, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"evil": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        backbones.load_encoder(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_architecture_are_refused(runs, tmp_path):
    new_encoder(tmp_path / "wider", SENTENCES, **{**ENCODER_SHAPE, "width": 64})
    shutil.copy(tmp_path / "wider" / "model.safetensors", runs / "align-de" / "encoder")
    with pytest.raises(ModelError, match=r"model.safetensors: damaged"):
        load_student(runs / "align-de")


def test_a_student_of_one_language_goes_before_one_of_several(runs):
    both = runs / "align-de+nl"
    both.mkdir()
    student = load_student(runs / "align-de")
    save_student(student, both, languages=["de", "fr"], teacher=fingerprint(runs / "clip-ve"))
    assert find_students(runs) == {
        "de": runs / "align-de",
        "fr": both,
        "nl": runs / "align-nl",
    }
    shutil.rmtree(both)
    assert find_students(runs) == {"de": runs / "align-de", "nl": runs / "align-nl"}
    assert find_students(runs / "nowhere") == {}
