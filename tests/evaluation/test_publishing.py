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
from clseave_cli.core.models.clip_ve import fingerprint

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
def pushed(hub, runs, clseave):
    """The repository org/de with a student and its teacher."""
    code, _, err = clseave("push", runs / "align-de", "org/de", *_PUSH)
    assert code == 0, err
    return hub.repositories["org/de"]


@pytest.fixture
def photo(world):
    return world / "images" / "test0.png"


def shared(folders: list[Path]) -> dict[str, bytes]:
    """What is shared of model folders."""
    files = {}
    for folder in folders:
        contents = tree(folder)
        listed = json.loads(contents["config.json"])["files"]
        names = ("config.json", "calibration.json", *listed, "training/seen.safetensors")
        files |= {f"{folder.name}/{name}": contents[name] for name in names}
    return files


def test_push_pull_and_predict_through_hf_endpoint(tmp_path, runs, photo, clseave):
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

        def process(*arguments):
            return subprocess.run(
                [sys.executable, "-m", "clseave_cli", *map(str, arguments)],
                capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120,
            )  # fmt: skip

        pushed = process("push", "runs/align-de", "org/de", *_PUSH)
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.startswith(f"{server.url}/org/de/commit/")
        question = ("predict", photo, "Das Quadrat ist rot.", "--lang", "de", "--json", "--runs")
        fetched = process(*question, "org/de@main")
        # The same again, now that the hub is gone.
        environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
        again = process(*question, "org/de")
        never = process(*question, "org/never-fetched")
    outputs = (clseave(*question, runs)[1], fetched.stdout, again.stdout)
    answers = [json.loads(output) for output in outputs]
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
    pushed = {k: v for k, v in repository.files.items() if k not in (".gitattributes", "README.md")}
    assert pushed == shared([runs / name for name in ("clip-ve", "align-de", "align-nl")])
    everything = b"".join(repository.files.values())
    assert str(runs.parent.parent).encode() not in everything  # where all of it was made
    commit = f"{hub.url}/org/all/commit/{repository.commits[-1][0]}"
    assert out == f"{commit}: en, de, nl · {len(pushed)} files\n"


def test_the_card_has_metrics_with_intervals(hub, tmp_path, runs, world, clseave):
    from huggingface_hub import ModelCard

    report, student = tmp_path / "report", runs / "align-de"
    evaluation = ("evaluate", "--runs", runs, "--data", world, "--resamples", 20)
    assert clseave(*evaluation, "--report", report)[0] == 0
    assert clseave("push", student, "org/de", *_PUSH, "--report", report)[0] == 0
    text = hub.repositories["org/de"].files["README.md"].decode()
    card = ModelCard(text)
    assert card.data.language == ["en", "de"] and card.data.license == "cc-by-4.0"
    document = json.loads((report / "results.json").read_text())
    results = document["results"][:2]
    assert len(card.data.eval_results) == len(results)
    for each, result in zip(card.data.eval_results, results, strict=True):
        assert each.dataset_config == result["lang"]
        assert (each.dataset_name, each.dataset_split) == (world.name, "test")
        assert (each.metric_type, each.metric_value) == ("accuracy", result["accuracy"])
        assert each.metric_args == {
            "low": result["accuracy_low"],
            "high": result["accuracy_high"],
            "confidence": 0.95,
            "rows": result["num_examples"],
        }
    assert [result["lang"] for result in results] == ["en", "de"]
    assert f"| German | {100 * results[1]['accuracy']:.1f} |" in text
    assert "--lang de --runs org/de\n" in text and str(tmp_path) not in text

    # What CLIP-VE's own tower read is not what the student is worth.
    other = shutil.copytree(report, tmp_path / "other")
    by_source = {"signature": document["signature"] | {"reader": "source"}}
    for more in (by_source, {"sources": {"zh": {}}}):
        (other / "results.json").write_text(json.dumps(document | more))
        code, _, err = clseave("push", student, "org/de", *_PUSH, "--report", other)
        assert code == 1 and "evaluate the models by themselves" in err

    # The report is of these models; others of the same name are not what it measured.
    shutil.rmtree(student)
    shutil.copytree(runs / "align-nl", student)
    reseal(student, "student", languages=["de"])
    code, _, err = clseave("push", student, "org/de", *_PUSH, "--report", report)
    assert code == 1 and "its de was not measured with these models alone" in err


def test_a_second_push_removes_what_is_gone_and_keeps_other_files(
    hub, pushed, runs, refused, clseave
):
    extra = {"LICENSE": b"mine", "picture.png": b"x"}
    pushed.commit(pushed.files | extra | {"align-de/encoder/added_tokens.json": b"{}"})
    code, _, err = clseave("push", runs / "align-de", "org/de", *_PUSH)
    assert code == 0, err
    assert extra.items() <= pushed.files.items()
    assert "align-de/encoder/added_tokens.json" not in pushed.files

    before = pushed.files
    message = refused("push", runs / "align-nl", "org/de", *_PUSH, code=2)
    assert "org/de: holds other models too (align-de)" in message
    message = refused("push", runs / "align-de", "org/de", *_PUSH, "--private", code=2)
    assert "org/de: is public already" in message
    assert pushed.files == before


def test_pickles_are_never_fetched(hub, pushed, photo):
    evil = {name: b"evil" for name in ("pytorch_model.bin", "x.pt", "align-de/x.pkl", "x.py")}
    pushed.commit(pushed.files | evil)
    model = VisualEntailment.from_pretrained("org/de", lang="de")
    assert model(photo, "Das Quadrat ist rot.").lang == "de"
    fetched = [path for path in hub.requested if "/resolve/" in path]
    assert fetched and not any(name in path for path in fetched for name in evil)


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


@pytest.mark.parametrize(
    "arguments",
    [("push", "runs/align-de", "org/de", *_PUSH), ("predict", "x.png", "x", "--runs", "org/de")],
)
def test_without_a_connection_there_is_one_line_at_once(runs, refused, monkeypatch, arguments):
    client.hub_answers.cache_clear()  # HF_HUB_OFFLINE is set for all tests
    monkeypatch.chdir(runs.parent)
    assert "does not answer, or HF_HUB_OFFLINE is set" in refused(*arguments)


def test_teacher_students_and_a_commit_come_from_the_hub(
    hub, tmp_path, data, encoder, runs, clseave
):
    assert clseave("push", runs, "org/all", *_PUSH)[0] == 0
    sha = hub.repositories["org/all"].commits[-1][0]
    options = ("--student", encoder, "--epochs", 1, "--data", data, "--runs", tmp_path / "new")
    code, _, err = clseave("align", "--lang", "de", "--teacher", f"org/all@{sha}", *options)
    assert code == 0, err
    record = json.loads((tmp_path / "new/align-de/training/run.json").read_text())
    assert record["inputs"]["teacher"] == fingerprint(runs / "clip-ve")
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
