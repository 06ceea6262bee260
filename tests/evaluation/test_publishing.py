"""`push`, and models of the hub in place of folders, against a hub on loopback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, Repository, serve_hub
from tiny_world import flip_byte, reseal, tree

from clseave_cli import VisualEntailment
from clseave_cli.core.data import hub as client

_REPOSITORY = Path(__file__).parents[2]
_PUSH = ("--license", "cc-by-4.0")
#: Of huggingface_hub, which calls its HTTP client in a way that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, which the commands of this process reach, with a token; nothing is fetched yet."""
    from huggingface_hub import constants

    with serve_hub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        client.hub_answers.cache_clear()
        yield server
    client.hub_answers.cache_clear()


@pytest.fixture
def photo(world):
    return world / "images" / "test0.png"


def contents(folder: Path) -> dict[str, bytes]:
    """What is shared of a model folder."""
    listed = json.loads((folder / "config.json").read_bytes())["files"]
    files = tree(folder)
    return {
        name: files[name]
        for name in ["config.json", "calibration.json", *listed, "training/seen.safetensors"]
    }


def shared(folders: list[Path]) -> dict[str, bytes]:
    return {f"{f.name}/{name}": c for f in folders for name, c in contents(f).items()}


def test_push_pull_and_predict_through_hf_endpoint(tmp_path, runs, photo):
    """In processes of their own, as HF_ENDPOINT is read when the hub's client is loaded."""
    with serve_hub() as server:
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # a protocol of its own
            "HF_TOKEN": TOKEN,
            "PYTHONPATH": str(_REPOSITORY),
        }

        def clseave(*arguments):
            return subprocess.run(
                [sys.executable, "-m", "clseave_cli", *map(str, arguments)],
                capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120,
            )  # fmt: skip

        pushed = clseave("push", "runs/align-de", "org/de", *_PUSH)
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.startswith(f"{server.url}/org/de/commit/")
        question = (photo, "Das Quadrat ist rot.", "--lang", "de", "--json")
        here, there = (
            clseave("predict", *question, "--runs", where) for where in ("runs", "org/de@main")
        )
        # The same again, now that the hub is gone.
        environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
        again = clseave("predict", *question, "--runs", "org/de")
        never = clseave("predict", *question, "--runs", "org/never-fetched")
    answers = [json.loads(done.stdout) for done in (here, there, again)]
    folders = [answer.pop("model") for answer in answers]
    assert answers[0] == answers[1] == answers[2]
    assert folders[1] == folders[2] != folders[0]
    models = [runs / "clip-ve", runs / "align-de"]
    assert shared(models) == shared([Path(folders[1]).with_name(m.name) for m in models])
    assert (never.returncode, never.stdout) == (1, "")
    assert never.stderr == (
        "clseave: org/never-fetched: no such folder, and cannot be fetched from the hub "
        "(http://127.0.0.1:9 does not answer, or HF_HUB_OFFLINE is set).\n"
    )


def test_a_push_is_one_commit_of_the_models_alone(hub, runs, clseave):
    code, out, err = clseave("push", runs, "org/all", *_PUSH, "--private")
    assert code == 0, err
    repository = hub.repositories["org/all"]
    assert repository.private and len(repository.commits) == 2
    models = [runs / name for name in ("clip-ve", "align-de", "align-nl")]
    pushed = {k: v for k, v in repository.files.items() if k not in (".gitattributes", "README.md")}
    assert pushed == shared(models)
    everything = b"".join(repository.files.values())
    assert str(runs.parent.parent).encode() not in everything  # where all of it was made
    assert out == f"{hub.url}/org/all/commit/{repository.commits[-1][0]}: en, de, nl · " + (
        f"{len(pushed)} files\n"
    )


def test_the_card_has_metrics_with_intervals(hub, tmp_path, runs, world, clseave):
    from huggingface_hub import ModelCard

    report = tmp_path / "report"
    evaluation = ("evaluate", "--runs", runs, "--data", world, "--resamples", 20)
    assert clseave(*evaluation, "--report", report)[0] == 0
    assert clseave("push", runs / "align-de", "org/de", *_PUSH, "--report", report)[0] == 0
    text = hub.repositories["org/de"].files["README.md"].decode()
    card = ModelCard(text)
    assert card.data.language == ["en", "de"] and card.data.license == "cc-by-4.0"
    results = json.loads((report / "results.json").read_text())["results"]
    by_lang = {result["lang"]: result for result in results}
    assert [each.dataset_config for each in card.data.eval_results] == ["en", "de"]
    for each in card.data.eval_results:
        result = by_lang[each.dataset_config]
        assert (each.dataset_name, each.dataset_split) == (world.name, "test")
        assert (each.metric_type, each.metric_value) == ("accuracy", result["accuracy"])
        assert each.metric_args == {
            "low": result["accuracy_low"],
            "high": result["accuracy_high"],
            "confidence": 0.95,
            "rows": result["num_examples"],
        }
    assert f"| German | {100 * by_lang['de']['accuracy']:.1f} |" in text
    assert "--lang de --runs org/de\n" in text and str(tmp_path) not in text

    # What CLIP-VE's own tower read is not what the student is worth.
    document = json.loads((report / "results.json").read_text())
    by_source = {"signature": document["signature"] | {"reader": "source"}}
    for more in (by_source, {"sources": {"zh": {}}}):
        other = tmp_path / "other"
        shutil.copytree(report, other, dirs_exist_ok=True)
        (other / "results.json").write_text(json.dumps(document | more))
        code, _, err = clseave("push", runs / "align-de", "org/de", *_PUSH, "--report", other)
        assert code == 1 and "evaluate the models by themselves" in err

    # The report is of these models; others of the same name are not what it measured.
    shutil.rmtree(runs / "align-de")
    shutil.copytree(runs / "align-nl", runs / "align-de")
    reseal(runs / "align-de", "student", languages=["de"])
    code, _, err = clseave("push", runs / "align-de", "org/de", *_PUSH, "--report", report)
    assert code == 1 and "its de was not measured with these models alone" in err


def test_a_second_push_removes_what_is_gone_and_keeps_other_files(hub, runs, refused, clseave):
    done = clseave("push", runs / "align-de", "org/de", *_PUSH)
    assert done[0] == 0, done[2]
    repository = hub.repositories["org/de"]
    kept = {"LICENSE": b"mine", "picture.png": b"x"}
    repository.commit(repository.files | kept | {"align-de/encoder/added_tokens.json": b"{}"})
    done = clseave("push", runs / "align-de", "org/de", *_PUSH)
    assert done[0] == 0, done[2]
    assert kept.items() <= repository.files.items()
    assert "align-de/encoder/added_tokens.json" not in repository.files

    before = repository.files
    message = refused("push", runs / "align-nl", "org/de", *_PUSH, code=2)
    assert "org/de: holds other models too (align-de)" in message
    message = refused("push", runs / "align-de", "org/de", *_PUSH, "--private", code=2)
    assert "org/de: is public already" in message
    assert repository.files == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("runs/align-de", "org/de"), 2, "--license: required"),
        (("runs/align-de", "de", *_PUSH), 2, "de: not a name of a repository"),
        (("runs/align-de", "../de", *_PUSH), 2, "../de: not a name of a repository"),
        (("data", "org/de", *_PUSH), 1, "data/clip-ve: no such model folder"),
        (("runs/align-nl", "org/nl", *_PUSH), 1, "damaged, its content is not what was saved"),
        (("runs/align-de", "org/de", *_PUSH, "--report", "data"), 1, "results.json: no such file"),
        (
            ("runs/align-de", "org/de", *_PUSH, "--teacher", "runs/align-de"), 1,
            "not a clip-ve folder",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_pushed_is_refused_before_the_hub_is_asked(
    hub, data, runs, refused, monkeypatch, arguments, code, message
):
    flip_byte(runs / "align-nl" / "projection.safetensors")
    monkeypatch.chdir(runs.parent)
    assert message in refused("push", *arguments, code=code)
    assert hub.requested == []


def test_the_hub_refuses_in_one_line(hub, runs, monkeypatch, refused):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refused("push", runs / "align-de", "org/de", *_PUSH)
    assert "org/de: not pushed (no such repository, or no access: run `hf auth login`" in message
    message = refused("predict", "x.png", "x", "--runs", "org/none")
    assert "org/none: no such folder, and cannot be fetched from the hub (no such" in message
    hub.repositories["org/de"] = Repository(private=False)
    message = refused("predict", "x.png", "x", "--runs", "org/de@v9")
    assert "(no such branch, tag or commit)" in message


@pytest.mark.parametrize("command", ["push", "predict"])
def test_without_a_connection_there_is_one_line_at_once(runs, refused, monkeypatch, command):
    client.hub_answers.cache_clear()  # HF_HUB_OFFLINE is set for all tests
    monkeypatch.chdir(runs.parent)
    arguments = {"push": ("runs/align-de", "org/de", *_PUSH), "predict": ("x.png", "x", "--runs",
                 "org/de")}  # fmt: skip
    message = refused(command, *arguments[command])
    assert "does not answer, or HF_HUB_OFFLINE is set" in message
    assert "\n" not in message


def test_pickles_are_never_fetched(hub, runs, photo, clseave):
    done = clseave("push", runs / "align-de", "org/de", *_PUSH)
    assert done[0] == 0, done[2]
    repository = hub.repositories["org/de"]
    evil = {name: b"evil" for name in ("pytorch_model.bin", "x.pt", "align-de/x.pkl", "x.py")}
    repository.commit(repository.files | evil)
    model = VisualEntailment.from_pretrained("org/de", lang="de")
    assert model(photo, "Das Quadrat ist rot.").lang == "de"
    fetched = [path for path in hub.requested if "/resolve/" in path]
    assert fetched and not any(name in path for path in fetched for name in evil)


def test_teacher_students_and_a_commit_come_from_the_hub(
    hub, tmp_path, data, encoder, runs, clseave
):
    assert clseave("push", runs, "org/all", *_PUSH)[0] == 0
    sha = hub.repositories["org/all"].commits[-1][0]
    options = ("--student", encoder, "--epochs", 1, "--data", data, "--runs", tmp_path / "new")
    code, _, err = clseave("align", "--lang", "de", "--teacher", f"org/all@{sha}", *options)
    assert code == 0, err
    record = json.loads((tmp_path / "new/align-de/training/run.json").read_text())
    teacher = json.loads((runs / "clip-ve" / "config.json").read_text())["fingerprint"]
    assert record["inputs"]["teacher"] == teacher
    shutil.rmtree(runs / "align-de")
    evaluation = ("evaluate", "--runs", runs, "--students", "org/all", "--data", data)
    code, out, err = clseave(*evaluation, "--lang", "de", "--resamples", 20, "--json")
    assert code == 0, err
    assert [result["lang"] for result in json.loads(out)["results"]] == ["de"]


def test_a_local_folder_of_that_name_wins(hub, tmp_path, runs, photo, clseave, monkeypatch):
    shutil.copytree(runs, tmp_path / "org" / "de")
    monkeypatch.chdir(tmp_path)
    code, out, _ = clseave("predict", photo, "Rot.", "--lang", "de", "--runs", "org/de", "--json")
    assert (code, json.loads(out)["model"]) == (0, "org/de/align-de")
    assert hub.requested == []
