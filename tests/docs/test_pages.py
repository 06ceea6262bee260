"""README.md and docs/: links have targets, and the program accepts every command."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_world
import typer

from clseave_cli.commands import options
from clseave_cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^    (\S.*)$", re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_TOML = re.compile(r"^```toml\n# (\w+\.toml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


def commands(text: str) -> list[list[str]]:
    """The arguments of every clseave command in a page's blocks and sentences."""
    shown = [line for _, block in _FENCE.findall(text) for line in joined(block)]
    rest = _FENCE.sub("", text)
    shown += [*_INDENTED.findall(rest), *_INLINE.findall(rest)]
    return [arguments for line in shown for arguments in clseave_arguments(line)]


def joined(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


def clseave_arguments(line: str) -> list[list[str]]:
    """The words after `clseave` (or `-m clseave_cli`) in each simple command of a shell line."""
    if "clseave" not in line:
        return []
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:
        return []  # a sentence with an apostrophe
    calls: list[list[str]] = []
    current: list[str] | None = None
    for number, word in enumerate(words):
        start_of_command = number == 0 or words[number - 1] in ("&&", "||", "|", ";")
        after_variables = all(re.fullmatch(r"\w+=.*", each) for each in words[:number])
        if word in ("&&", "||", "|", ";", ">", "<"):
            current = None
        elif (word == "clseave" and (start_of_command or after_variables)) or (
            word == "clseave_cli" and words[number - 1 : number] == ["-m"]
        ):
            current = []
            calls.append(current)
        elif current is not None:
            current.append(word)
    # `clseave` alone is the program's name; an upper-case word or an ellipsis is a placeholder.
    return [words for words in calls if words and re.fullmatch(r"[a-z-]+", words[0])]


class _Understood(Exception):
    pass


def parse(arguments: list[str]) -> None:
    """Runs a command until its options are resolved.

    Raises:
        _Understood: they are valid. Any other error says what is wrong with them.
    """
    group: Any = typer.main.get_command(app)
    for command in group.commands.values():
        if all(parameter.name != "config" for parameter in command.params):
            command.callback = stop  # the others stop when their config is resolved
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "resolve", stop_after(options.resolve))
        group.main(arguments, "clseave", standalone_mode=False)


#: Parts of commands that are not run here, and why.
_NOT_RUN = {
    "demo": "tests/evaluation/test_demo.py does",
    "serve": "does not end; tests/prediction/test_service.py",
    "translate": "hub; tests/cli/test_translate.py",
    "illustrate": "hub; tests/stages/test_illustrate.py",
    "--guided": "tests/stages/test_guided.py",
    "--data nli": "needs generated pictures",
    "Helsinki-NLP/": "hub",
    "OFA-Sys/": "hub",
    "sentence-transformers/": "hub",
    "ORG/NAME": "hub; tests/evaluation/test_publishing.py",
    "XVNLI/": "not in the tiny world",
    "hf:": "hub; tests/data/test_hub.py",
    "predict photos": "tests/prediction/test_predict_rows.py",
    "--lang auto": "needs the extra langid",
    "--tracker": "needs the extra tensorboard",
    "--source-lang": "tests/stages/test_backbones.py",
    "--input -": "tests/prediction/test_predict_rows.py",
    "--gold": "not in the tiny world; tests/cli/test_word_align.py",
    "--input sentences.txt": "the same",
    "--alignments": "the same",
    "runs-0": "tests/cli/test_command_line.py and tests/evaluation do",
    "--debug": "an example of an error",
    "pretrain": "tests/stages/test_pretraining.py",
    "compare": "tests/evaluation/test_comparison.py",
    "retrieve": "needs captions; tests/evaluation/test_retrieval.py",
    "--explain": "tests/stages/test_patch_head.py",
    "calibrate --precision": "needs more photos; tests/evaluation/test_abstention.py",
    "--unsure": "the same",
    "check docs": "its exit status depends on findings; tests/checking",
}

#: Local models instead of the hub's, and options that make a command quick.
_QUICK = {
    "finetune-ve": "--clip models/clip --epochs 1 --batch-size 8",
    # The thesis's reader needs a teacher whose states are as wide as its embeddings.
    "align": "--student models/encoder --epochs 1 --batch-size 8 --token-reader projection",
    "autoencode": "--student models/encoder --epochs 1 --batch-size 8",
    "curve": "--student models/encoder --config quick.toml",
    "word-align": "--aligner models/encoder",
    "evaluate": "--resamples 20",
}


def commands_to_run(page: Path) -> list[list[str]]:
    """The commands in a page's blocks without those in `_NOT_RUN`.

    The reference has patterns, the experiments belong to their commits, and the page about
    backbones needs models of the hub (tests/stages/test_backbones.py).
    """
    if page.name in ("cli.md", "experiments.md", "backbones.md"):
        return []
    blocks = _FENCE.findall(page.read_text(encoding="utf-8"))
    lines = [line for _, block in blocks for line in joined(block)]
    every = [arguments for line in lines for arguments in clseave_arguments(line)]
    return [each for each in every if not any(part in " ".join(each) for part in _NOT_RUN)]


@pytest.mark.parametrize("page", [page for page in PAGES if commands_to_run(page)], ids=page_id)
def test_the_commands_of_a_page_run_in_order(
    page, tmp_path, clip, encoder, trained, monkeypatch, clseave
):
    text = page.read_text(encoding="utf-8")
    every = commands_to_run(page)
    data = tiny_world.write_world(tmp_path / "data", languages=("en", "de", "nl", "ja", "ko", "zh"))
    for source, folder in ((clip, "models/clip"), (encoder, "models/encoder")):
        shutil.copytree(source, tmp_path / folder)
    if ["finetune-ve"] not in every:  # otherwise the page trains its models
        shutil.copytree(trained, tmp_path / "runs")
    for photo in ("photo.jpg", "image.jpg"):
        shutil.copy(data / "images" / "test0.png", tmp_path / photo)
    (tmp_path / "pairs.jsonl").write_text('{"image": "photo.jpg", "hypothesis": "Ein Hund."}\n')
    (tmp_path / "quick.toml").write_text("epochs = 1\nbatch_size = 8\n")
    for file, body in _TOML.findall(text):
        (tmp_path / file).write_text(body, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for arguments in every:
        code, _, err = clseave(*arguments, *_QUICK.get(arguments[0], "").split())
        assert code == 0, f"{' '.join(arguments)}: {err}"


def stop(**_: Any) -> None:
    raise _Understood


def stop_after(resolve: Callable[..., Any]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        resolve(*arguments)
        raise _Understood

    return call


def test_commands_are_distinguished_from_sentences():
    text = """\
Type `clseave predict image.jpg "a man's dog" --lang ja`; `clseave` is its name.
```bash
pip install -e . && clseave demo
CLSEAVE_RUNS=x clseave align \\
  --lang de | cat
torchrun --nproc-per-node 8 -m clseave_cli align --lang nl
```
`clseave COMMAND` `clseave … | head`"""
    assert commands(text) == [
        ["demo"],
        ["align", "--lang", "de"],
        ["align", "--lang", "nl"],
        ["predict", "image.jpg", "a man's dog", "--lang", "ja"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_have_targets(page):
    text = page.read_text(encoding="utf-8")
    for target in _LINK.findall(_FENCE.sub("", text)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page_id(page)}: {target} does not exist"
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_the_program_accepts_every_command(page, tmp_path, monkeypatch):
    if page.name == "cli.md":
        return  # its usage lines are patterns; see test_cli_reference.py
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name, body in _TOML.findall(text):
        (tmp_path / name).write_text(body, encoding="utf-8")
    for arguments in commands(text):
        if {"--help", "--version", "--install-completion"} & set(arguments):
            continue
        try:
            parse(arguments)
        except _Understood:
            continue
        except Exception as error:
            if page.name == "experiments.md" and "was removed" in str(error):
                continue  # a log keeps old commands
            pytest.fail(f"{page_id(page)}: {shlex.join(['clseave', *arguments])}: {error}")


@pytest.mark.parametrize(
    "wrong",
    [
        "align --langs de",
        "finetune-ve --preset x",
        "finetune-ve --epochs 0",
        "compare A",
        "nothing",
    ],
)
def test_the_parse_check_refuses_what_the_program_refuses(wrong):
    with pytest.raises(Exception) as caught:
        parse(wrong.split())
    assert not isinstance(caught.value, _Understood)


def test_the_readme_has_the_two_commands_each_in_a_block_of_its_own():
    blocks = [body for _, body in _FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))]
    assert "pip install -e . && clseave demo\n" in blocks
    assert 'pip install -e ".[test]" && pytest\n' in blocks


def test_extras_named_in_the_pages_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for page in PAGES:
        for names in re.findall(r"pip install [^\n`]*?\[([\w,-]+)\]", page.read_text("utf-8")):
            assert set(names.split(",")) <= set(project["optional-dependencies"]), page_id(page)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_of_the_repository_named_in_the_pages_exist(page):
    for name in _INLINE.findall(page.read_text(encoding="utf-8")):
        if re.fullmatch(r"(clseave_cli|tests|docs|\.ci|commands|core)(/[\w.]+)+/?", name):
            candidates = (ROOT / name, ROOT / "clseave_cli" / name)
            assert any(path.exists() for path in candidates), f"{page_id(page)}: {name}"


def test_every_guarantee_is_cited_by_a_test():
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    promised = set(re.findall(r"^- \*\*(G\d+)\.", page, re.MULTILINE))
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    cited = {number for text in tests for number in re.findall(r"\bG\d+\b", text)}
    assert promised == cited != set()
