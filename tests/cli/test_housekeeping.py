"""`clseave models`, `cache`, `doctor` and `init`."""

import errno
import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from tiny_world import reseal

from clseave_cli.commands.options import resolve
from clseave_cli.core.config import AlignConfig
from clseave_cli.core.training import machine
from clseave_cli.main import _COMMANDS


def listed(clseave, runs):
    code, out, err = clseave("models", "--runs", runs, "--json")
    assert code == 0, err
    document = json.loads(out)
    chosen = {lang: (each["model"], each["why"]) for lang, each in document["predict"].items()}
    return {entry["name"]: entry for entry in document["models"]}, chosen


def test_models_says_what_is_there_and_which_one_predict_takes(clseave, runs, world):
    shutil.copytree(runs / "align-de", runs / "both")
    reseal(runs / "both", "student", languages=["de", "ja"])
    shutil.copytree(runs / "align-nl", runs / "stranger")
    reseal(runs / "stranger", "student", languages=["fr"], teacher="0" * 64)
    (runs / "align-ko").mkdir()
    (runs / "align-ko" / "config.json").write_text("{")

    entries, chosen = listed(clseave, runs)
    assert list(entries) == ["align-de", "align-ko", "align-nl", "both", "clip-ve", "stranger"]
    assert chosen == {
        "en": ("clip-ve", "the language it was trained in"),
        "de": ("align-de", "before both: fewest languages, then by name"),
        "fr": ("stranger", "the only student"),
        "ja": ("both", "the only student"),
        "ko": ("align-ko", "the only student"),
        "nl": ("align-nl", "the only student"),
    }
    photo = world / "images" / "test0.png"
    for lang in ("en", "de", "ja", "nl"):  # what predict takes indeed
        answer = json.loads(clseave("predict", photo, "x", "--lang", lang, "--runs", runs,
                                    "--json")[1])  # fmt: skip
        assert Path(answer["model"]).name == chosen[lang][0]
    clip_ve = entries["clip-ve"]
    assert entries["align-de"]["teacher"] == clip_ve["fingerprint"]
    assert entries["stranger"]["problem"] == "belongs to another CLIP-VE"
    assert "damaged, not valid JSON" in entries["align-ko"]["problem"]
    summary = json.loads((runs / "align-de" / "training" / "summary.json").read_text())
    assert entries["align-de"]["dev"].items() <= summary["dev"].items()
    size = sum(path.stat().st_size for path in (runs / "clip-ve").rglob("*") if path.is_file())
    assert (clip_ve["kind"], clip_ve["languages"], clip_ve["num_bytes"]) == (
        "clip-ve",
        ["en"],
        size,
    )

    text = clseave("models", "--runs", runs)[1]
    assert "\npredict --lang de: align-de (before both: fewest languages, then by name)\n" in text


def test_models_without_any_of_ours(clseave, tmp_path, refused):
    assert listed(clseave, tmp_path) == ({}, {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"languages": 5, "teacher": true}')
    assert listed(clseave, tmp_path)[0]["other"]["languages"] == []
    assert "no such folder" in refused("models", "--runs", tmp_path / "none")


def test_cache_shows_and_clears(clseave, cache, data, runs, refused):
    code, _, err = clseave("evaluate", "--runs", runs, "--data", data, "--resamples", 20)
    assert code == 0, err
    (cache / "translation").mkdir()
    (cache / "translation" / "memory.sqlite").write_bytes(b"paid for")
    (cache / "mine").mkdir()
    document = json.loads(clseave("cache", "--json")[1])
    assert document["folder"] == str(cache)
    assert document["bytes"]["translation"] == 8 and document["bytes"]["image"] > 0
    assert f"{cache}: " in clseave("cache")[1]

    assert "images: no such cache; there are: image, " in refused(
        "cache", "--clear", "images", code=2
    )
    assert clseave("cache", "--clear", "all")[0] == 0
    sizes = json.loads(clseave("cache", "--json")[1])["bytes"]
    assert {kind for kind, size in sizes.items() if size} == {"translation"}
    assert sorted(path.name for path in cache.iterdir()) == ["mine", "translation"]
    assert clseave("cache", "--clear", "translation")[1] == "0.0 MiB freed\n"
    assert not (cache / "translation").exists()


def test_a_cache_that_loses_files_meanwhile_is_not_called_cleared(refused, cache, monkeypatch):
    def vanished(folder):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder / "shard")

    (cache / "image").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", vanished)
    assert "image: cannot be deleted" in refused("cache", "--clear", "image")


@pytest.mark.parametrize("torch", [True, False], ids=["torch", "without torch"])
def test_doctor_sees_versions_devices_and_extras(clseave, monkeypatch, torch):
    if not torch:
        monkeypatch.setitem(sys.modules, "torch", None)
    real = machine.importlib.util.find_spec
    monkeypatch.setattr(
        machine.importlib.util, "find_spec", lambda name: None if name == "lxml" else real(name)
    )
    code, out, err = clseave("doctor", "--no-speed", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["versions"]["python"] == sys.version.split()[0]
    assert document["devices"][0].startswith("cpu (") and document["speed"] == {}
    assert document["missing"]["check"] == ["lxml"] and document["missing"]["serve"] == []
    text = clseave("doctor", "--no-speed")[1]
    assert "check reads HTML and Markdown: pip install -e '.[check]'\n" in text
    speed = machine.examine(seconds=0.01).speed
    assert set(speed) >= {"cpu fp32"} and all(rate > 0 for rate in speed.values())


def test_doctor_knows_every_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(machine.EXTRAS) == set(project["optional-dependencies"]) - {"test", "dev"}


def test_init_writes_what_every_command_takes_and_never_overwrites(
    clseave, refused, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert clseave("init")[0] == 0
    path = tmp_path / "clseave.toml"
    text = path.read_text()
    for name, (config_class, _) in _COMMANDS.items():
        assert resolve(config_class, {}, table=name) == config_class()
    path.write_text(text + "mine = 1\n")
    assert "already exists" in refused("init", code=2)
    assert path.read_text() == text + "mine = 1\n"

    path.write_text(re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE))
    for name, (config_class, _) in _COMMANDS.items():
        assert f"\n[{name}]\n" in text
        resolve(config_class, {}, table=name)  # each default is of its option's type


def test_the_project_file_loses_to_preset_config_and_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clseave.toml").write_text("[align]\nepochs = 3\nbatch_size = 5\nseed = 7\n")
    (tmp_path / "options.toml").write_text("batch_size = 6\n")

    def values(*arguments):
        config = resolve(AlignConfig, *arguments, table="align")
        return config.epochs, config.batch_size, config.seed

    assert values({}) == (3, 5, 7)
    assert values({}, None, "thesis") == (22, 128, 7)
    assert values({"seed": 1}, tmp_path / "options.toml", "thesis") == (22, 6, 1)


@pytest.mark.parametrize(
    ("shell", "variables", "expected"),
    [
        ("bash", {"COMP_WORDS": "clseave align --stud", "COMP_CWORD": "2"}, "--student"),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "clseave cac"}, '_arguments \'*: :(("cache":"Show the'),
        (
            "fish",
            {
                "_TYPER_COMPLETE_ARGS": "clseave align --stud",
                "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            },
            "--student\tEncoder to train (hub id or folder). Default: google-bert/bert",
        ),
    ],
)
def test_completion(clseave, monkeypatch, shell, variables, expected):
    monkeypatch.setenv("COLUMNS", "80")
    for name, value in (variables | {"_CLSEAVE_COMPLETE": f"complete_{shell}"}).items():
        monkeypatch.setenv(name, value)
    code, out, _ = clseave()
    assert code == 0
    (line,) = out.splitlines()  # one candidate, whatever its help is
    assert line.startswith(expected)
