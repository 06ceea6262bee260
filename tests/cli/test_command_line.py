"""The command line itself: what loads, what is printed where, and which option wins."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from tiny_world import read_jsonl, write_jsonl

from clseave_cli import __version__, processes
from clseave_cli.commands.options import resolve
from clseave_cli.core.config import (
    AlignConfig,
    CurveConfig,
    FinetuneConfig,
    PretrainConfig,
    flag_of,
)
from clseave_cli.errors import UsageError
from clseave_cli.main import _COMMANDS, app

_REPOSITORY = Path(__file__).parents[2]
COMMANDS = {name: config_class for name, (config_class, _) in _COMMANDS.items()}


def _run(command, folder, **environment):
    paths = os.pathsep.join([str(_REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200", **environment}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=folder, env=environment
    )


def _python(*arguments, folder, **environment):
    return _run([sys.executable, *arguments], folder, **environment)


@pytest.mark.parametrize("command", [(), ("align",), ("demo",)])
def test_help_loads_nothing_heavy(tmp_path, command):
    script = f"""
import sys
from clseave_cli.main import main
sys.argv = ["clseave", *{command!r}, "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
heavy = {{
    "torch", "onnxruntime", "transformers", "datasets", "sklearn", "scipy", "matplotlib", "numpy",
    "PIL", "fastapi", "uvicorn",
}}
print("LOADED", sorted(heavy & set(sys.modules)))
"""
    done = _python("-c", script, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"
    assert "--help" in done.stdout


def test_the_package_runs_as_a_module(tmp_path):
    done = _python("-m", "clseave_cli", "--version", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"clseave {__version__}\n", "")
    done = _python("-m", "clseave_cli", "predict", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "clseave: give IMAGE and HYPOTHESIS, or --input FILE.\n"


def test_without_torch_a_command_names_the_missing_package(tmp_path):
    script = (
        "import sys\nsys.modules['torch'] = None\nfrom clseave_cli import main\n"
        "sys.argv = ['clseave', 'predict', 'image.png', 'Red.']\nmain.main()"
    )
    done = _python("-c", script, folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "clseave: torch is not installed, and this needs it: pip install -e .\n"


@pytest.mark.parametrize("speak", ["print", "main.terminal.say"])
@pytest.mark.parametrize("inside", [False, True], ids=["main", "a command"])
def test_a_reader_that_goes_away_is_no_error(tmp_path, inside, speak):
    script = (
        "import sys\n"
        "from clseave_cli import main, commands\n"
        "def talk(*_, **__):\n"
        f"    for _ in range(10000): {speak}('x' * 100)\n"
        + ("main.options.Subcommand.invoke = talk\n"
           "sys.argv = ['clseave', 'align']\n" if inside else "main.app = talk\n")
        + "main.main()\n"
    )  # fmt: skip
    head = 'set -o pipefail; "$@" | head -c 10'
    done = _run(["bash", "-c", head, "bash", sys.executable, "-c", script], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "x" * 10, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_behind_stdout_is_one_line(tmp_path):
    write = '"$@" > /dev/full'
    done = _run(["sh", "-c", write, "sh", sys.executable, "-m", "clseave_cli", "init", "--help"],
                tmp_path)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("clseave: standard output: the disk is full")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stdout_that_lacks_letters_loses_no_result(tmp_path, encoding):
    script = (
        "from clseave_cli import main\n"
        "main.app = lambda **_: main.terminal.say('実行/align-ja: 100 – 200')\n"
        "main.main()\n"
    )
    done = _python("-c", script, folder=tmp_path, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(r"\u5b9f\u884c/align-ja: 100 ")


def test_closed_streams_and_threads_that_wait(tmp_path):
    command = [sys.executable, "-m", "clseave_cli", "--debug", "align"]
    close = 'exec "$@" <&- >&-'
    done = _run(["sh", "-c", close, "sh", *command], tmp_path, OMP_NUM_THREADS="3")
    assert done.returncode == 1 and "--lang is missing" in done.stderr
    assert done.stderr.startswith(
        "threads: 3, GOMP_SPINCOUNT=1000, OMP_WAIT_POLICY=active, KMP_BLOCKTIME=1\n"
    )


@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_spin_only_briefly_unless_the_user_says_how(monkeypatch, chosen):
    brief = {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "active", "KMP_BLOCKTIME": "1"}
    for name in (*brief, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    processes.spin_briefly()
    waits = ", ".join(f"{name}={value}" for name, value in (chosen or brief).items())
    cores = processes.usable_cores()
    assert processes.thread_policy() == f"{cores} (every usable core), {waits}"


def test_importing_changes_nothing_global(tmp_path):
    script = """
import logging, os, signal, warnings
def state():
    import huggingface_hub, torch, transformers
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    ours = ("OMP_", "GOMP_", "TRANSFORMERS_", "HF_")  # torch, sympy and scipy set some of theirs
    return ({name: os.environ[name] for name in os.environ if name.startswith(ours)},
            [each for each in warnings.filters if "PIL" in str(each)],
            handlers, torch.get_num_threads(), transformers.logging.get_verbosity(),
            transformers.logging.is_progress_bar_enabled(),
            logging.root.level, torch.is_grad_enabled())
before = state()
import clseave_cli
from clseave_cli import VisualEntailment, align, evaluate, finetune, pretrain, translate
import clseave_cli.core.alignment, clseave_cli.core.evaluation.demo, clseave_cli.main
print([(a, b) for a, b in zip(before, state()) if a != b])
"""
    done = _python("-W", "ignore", "-c", script, folder=tmp_path)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_long_help_of_its_command(clseave, command):
    code, out, err = clseave(command, "--help-all")
    assert (code, err) == (0, "")
    config_class = COMMANDS[command]
    for field in dataclasses.fields(config_class):
        if not config_class.FLAGS or field.name in config_class.FLAGS:
            assert f"{flag_of(field)} " in out
    assert "--config" in out and ("--preset" in out) == bool(config_class.PRESETS)


@pytest.mark.parametrize("command", typer.main.get_command(app).commands)
@pytest.mark.parametrize(("flag", "most_lines"), [("--help", 45), ("--help-all", 110)])
def test_help_fits_80_columns(clseave, monkeypatch, command, flag, most_lines):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = clseave(command, flag)
    lines = out.splitlines()
    assert code == 0 and max(map(len, lines)) <= 80
    assert len(lines) <= most_lines
    assert "<" not in out and "..." not in out  # no types of Python's, nothing cut


def test_the_options_that_matter_come_first(clseave):
    _, short, _ = clseave("align", "--help")
    flags = re.findall(r"^  (--[\w-]+)", short, flags=re.MULTILINE)
    assert flags[:4] == ["--lang", "--data", "--images", "--student"] and len(flags) <= 15
    assert "--help-all" in short and "--token-reader" not in short


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "head-aware"], "--objective head-aware was removed: "),
        (["--objective=head-aware"], "--objective head-aware was removed: "),
        (["--projection", "mlp"], "--projection mlp was removed: "),
        (["--parallel-batches"], "--parallel-batches was removed: "),
        (["--final-norm", "twice"], "--final-norm was removed: "),
    ],
)
def test_what_was_removed_is_refused_with_advice(refused, tmp_path, arguments, message):
    assert message in refused("align", "--lang", "de", *arguments, code=2)
    key, _, value = " ".join(arguments).removeprefix("--").replace("=", " ").partition(" ")
    path = tmp_path / "old.toml"
    path.write_text(f"{key} = {json.dumps(value or True)}\n")
    assert f"{path}: {message}" in refused("align", "--config", path, code=2)


def test_an_option_for_the_config_file_alone_is_no_flag(refused, monkeypatch):
    monkeypatch.setattr(AlignConfig, "FLAGS", ("lang",), raising=False)
    message = "--code was removed: put code into a --config FILE.toml."
    assert message in refused("align", "--lang", "de", "--code=relu", code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["align", "--langs", "de"], "no such option: --langs (Possible options: "),
        (["align", "--epochs", "x"], "invalid value for '--epochs': "),
        (["align", "--precision", "x"], "invalid value for '--precision': 'x' is not one of"),
        (["align"], "--lang is missing; for example --lang de"),
        (["compare", "A"], "missing argument"),
        (["finetune-ve", "--seed", 10**20], f"--seed {10**20}: expected at most 4294967295"),
        (["demo", "--seed", 10**20], f"--seed {10**20}: expected at most 4294967295"),
        (["predict", "image.jpg", "x", "--images", "."], "--images goes with --input."),
        (["predict"], "give IMAGE and HYPOTHESIS, or --input FILE"),
        (["predict", "image.jpg"], "give IMAGE and HYPOTHESIS, or --input FILE"),
        (
            ["predict", "image.jpg", "x", "--input", "a", "--output", "b"],
            "give IMAGE and HYPOTHESIS, or --input FILE",
        ),
    ],
)
def test_wrong_usage_is_one_line(refused, arguments, message):
    assert message in refused(*arguments, code=2)


def test_without_a_command_there_is_help(clseave, refused):
    _, out, err = clseave()
    assert all(command in out + err for command in COMMANDS)
    assert "finetune" in refused("finetune", code=2)


# --- results on stdout, everything else on stderr ---


def test_predict_json_is_one_document_and_the_text_shows_the_same(
    clseave, world, trained, monkeypatch
):
    """The folder of the models may come from the environment."""
    image, hypothesis = world / "images" / "test0.png", "Das Quadrat ist rot."
    arguments = ["predict", image, hypothesis, "--lang", "de"]
    code, out, _ = clseave(*arguments, "--runs", trained, "--json")
    assert code == 0
    document = json.loads(out)
    assert list(document) == ["image", "hypothesis", "lang", "label", "probabilities", "model"]
    probabilities = document.pop("probabilities")
    assert list(probabilities) == ["entailment", "neutral", "contradiction"]
    assert sum(probabilities.values()) == pytest.approx(1)
    assert document == {
        "image": str(image), "hypothesis": hypothesis, "lang": "de", "label": document["label"],
        "model": str(trained / "align-de"),
    }  # fmt: skip
    monkeypatch.setenv("CLSEAVE_RUNS", str(trained))
    code, out, err = clseave(*arguments)
    assert (code, err) == (0, "")
    label, *lines = out.splitlines()
    assert label == document["label"]
    for line, (name, probability) in zip(lines, probabilities.items(), strict=False):
        shown, percent = line.split()[:2]
        assert shown == name and float(percent) == pytest.approx(100 * probability, abs=0.06)
    assert json.loads(clseave(*arguments, "--json")[1])["model"] == str(trained / "align-de")


def test_predict_on_files(clseave, data, trained, tmp_path):
    images, target = data / "images", tmp_path / "new" / "answers.jsonl"
    rows = [
        {"image": str(images / "test0.png"), "hypothesis": "red"},
        {"image": "test1.png", "hypothesis": "red"},  # beside the file of rows
        {"image": "test0.png", "hypothesis": "red " * 300},
        {"image": "none.png", "hypothesis": "x"},
        {"image": "test0.png", "hypothesis": ""},
        {"image": 3},
    ]
    source = write_jsonl(images / "pairs.jsonl", rows)
    source.write_text(source.read_text() + "{broken\n")
    arguments = ["--input", source, "--output", target, "--runs", trained]
    code, out, err = clseave("predict", *arguments, "--json")
    assert code == 0 and "1 hypotheses were too long" in err
    assert json.loads(out) == {"predicted": 3, "errors": 4, "output": str(target)}
    answers = read_jsonl(target)
    assert [answer.get("image") for answer in answers[:5]] == [row["image"] for row in rows[:5]]
    assert all(answer["label"] in answer["probabilities"] for answer in answers[:3])
    assert [answer.get("truncated") for answer in answers[:3]] == [None, None, True]
    errors = [
        "none.png: no such image", "the hypothesis is empty", "pairs.jsonl:6: expected an object",
        "pairs.jsonl:7: not valid JSON",
    ]  # fmt: skip
    for answer, error in zip(answers[3:], errors, strict=True):
        assert error in answer["error"] and "label" not in answer
    code, out, _ = clseave("predict", *arguments)
    assert out == f"{target}: 3 predicted, 4 with an error\n"


def test_a_file_of_which_nothing_can_be_judged_is_an_error(clseave, trained, tmp_path):
    """The answers are there all the same."""
    pairs, answers = tmp_path / "pairs.jsonl", tmp_path / "answers.jsonl"
    write_jsonl(pairs, [{"photo": "test0", "sentence": "red"}] * 2)
    code, out, err = clseave("predict", "--input", pairs, "--output", answers, "--runs", trained)
    assert code == 1 and out == f"{answers}: 0 predicted, 2 with an error\n"
    assert (
        f"no row has a prediction; the first error: {pairs}:1: expected an object with texts for "
        "image and hypothesis (keys ['photo', 'sentence'])."
    ) in " ".join(err.split())
    assert len(read_jsonl(answers)) == 2


def test_evaluate_json_is_the_document_of_its_report(clseave, world, trained, tmp_path):
    arguments = ["evaluate", "--data", world, "--runs", trained, "--resamples", "20"]
    code, out, err = clseave(*arguments, "--json", "--report", tmp_path / "report")
    assert code == 0, err
    document = json.loads(out)
    assert json.loads((tmp_path / "report" / "results.json").read_text()) == document
    assert [result["lang"] for result in document["results"]] == ["en", "de", "nl"]
    for result in document["results"]:
        assert {"lang", "split", "num_examples", "accuracy", "accuracy_low", "accuracy_high",
                "loss", "macro_f1", "confusion"} <= set(result)  # fmt: skip
        assert 0 <= result["accuracy_low"] <= result["accuracy"] <= result["accuracy_high"] <= 1
    assert set(document["baselines"]) == {"en", "de", "nl"}
    assert {"version", "data", "checkpoints", "seed"} <= set(document["signature"])


def test_training_says_where_the_model_lies(clseave, world, clip, tmp_path):
    quick = ["--data", world, "--epochs", "1", "--batch-size", "8", "--device", "cpu"]
    arguments = ["finetune-ve", "--clip", clip, "--out", tmp_path / "model", *quick]
    code, out, err = clseave(*arguments)
    assert code == 0
    assert len(out.splitlines()) == 1
    assert out.startswith(f"{tmp_path / 'model'}: epoch 1 of 1 kept (dev loss ")
    assert "finetune-ve: epoch 1" in err
    code, out, _ = clseave(*arguments, "--resume")
    assert (code, out) == (0, f"{tmp_path / 'model'}: complete\n")


# --- which option wins ---


def _config(clseave, monkeypatch, *arguments):
    """The config that `finetune-ve` is called with."""
    configs = []
    monkeypatch.setattr("clseave_cli.commands.terminal.print_training", lambda *_: None)

    class Result:
        folder = training = None

    monkeypatch.setattr(
        "clseave_cli.core.finetuning.finetune",
        lambda config, progress: configs.append(config) or Result,
    )
    code, _, err = clseave("finetune-ve", *arguments)
    assert code == 0, err
    return configs[0]


def test_flags_win_over_file_over_preset_over_default(clseave, monkeypatch, tmp_path):
    path = tmp_path / "options.toml"
    path.write_text(
        'epochs = 3\nlearning-rate = 1\nbatch_size = 16\nimages = "photos"\nallow-leak = true\n'
    )
    assert _config(clseave, monkeypatch) == FinetuneConfig()
    preset = _config(clseave, monkeypatch, "--preset", "thesis")
    assert (preset.batch_size, preset.learning_rate, preset.patience) == (64, 1e-6, 1)
    file = _config(clseave, monkeypatch, "--preset", "thesis", "--config", path)
    assert (file.epochs, file.learning_rate, file.batch_size) == (3, 1.0, 16)
    assert file.images == Path("photos") and file.allow_leak and not file.skip_bad
    assert (file.select, file.schedule) == (preset.select, preset.schedule)
    flag = _config(
        clseave, monkeypatch, "--config", path, "--batch-size", "5", "--preset", "thesis",
        "--epochs", "9", "--skip-bad", "--no-allow-leak",
    )  # fmt: skip
    assert (flag.epochs, flag.learning_rate, flag.batch_size) == (9, 1.0, 5)
    assert flag.skip_bad and not flag.allow_leak


def test_the_presets_are_those_of_the_thesis():
    finetune = resolve(FinetuneConfig, {}, preset="thesis")
    assert finetune.clip == "openai/clip-vit-base-patch16"
    assert (finetune.batch_size, finetune.learning_rate, finetune.weight_decay) == (64, 1e-6, 0.0)
    assert (finetune.patience, finetune.select, finetune.schedule) == (1, "loss", "constant")
    align = resolve(AlignConfig, {}, preset="thesis")
    assert align.student == "google-bert/bert-base-multilingual-cased"
    assert (align.batch_size, align.learning_rate) == (128, 1e-4)
    assert (align.epochs, align.stop_epoch, align.patience) == (22, 9, 9)
    assert (align.warmup_fraction, align.schedule, align.clip_norm) == (0.1, "linear", None)


def test_a_file_may_name_several_languages_or_one(tmp_path):
    path = tmp_path / "options.toml"
    path.write_text('lang = ["de", "nl"]\n')
    assert resolve(AlignConfig, {}, path).lang == ("de", "nl")
    path.write_text('lang = "ja"\n')
    assert resolve(AlignConfig, {}, path).lang == ("ja",)
    assert resolve(AlignConfig, {"lang": ["ko"]}, path).lang == ("ko",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch = 3", "no option named epoch; did you mean epochs?"),
        ("zzz = 3", "no option named zzz; there are: "),
        ("epochs = 'many'", "epochs = 'many', expected a whole number."),
        ("epochs = true", "epochs = True, expected a whole number."),
        ("epochs = 2.5", "epochs = 2.5, expected a whole number."),
        ("epochs = [3]", "epochs = [3], expected a whole number."),
        ("learning-rate = '1'", "learning-rate = '1', expected a number."),
        ("select = 'best'", "select = 'best', expected loss or accuracy"),
        ("skip-bad = 1", "skip-bad = 1, expected true or false."),
        ("clip = 3", "clip = 3, expected text."),
        ("out = 3", "out = 3, expected text (a path)."),
        ("[finetune-ve]\nepochs = 3", "no option named finetune-ve"),
        ("epochs = ", "not valid TOML"),
        ("lang = 'de'", "no option named lang"),
        ("epochs = 0", "--epochs 0: expected at least 1"),
        (b"clip = '\xff'", "not valid TOML"),
    ],
)
def test_a_file_with_a_mistake_is_refused(refused, tmp_path, content, message):
    path = tmp_path / "options.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refused("finetune-ve", "--config", path, code=2)
    assert message in error
    assert str(path) in error or message.startswith("--epochs")


def test_a_library_caller_meets_the_same_refusals():
    with pytest.raises(UsageError, match="--batch-size 0: expected at least 1"):
        FinetuneConfig(batch_size=0)
    with pytest.raises(UsageError, match="--epochs -1: expected at least 1"):
        dataclasses.replace(FinetuneConfig(), epochs=-1)
    with pytest.raises(UsageError, match=r"^--select 'best', expected loss or accuracy\.$"):
        FinetuneConfig(select="best")
    with pytest.raises(UsageError, match=r"^--lang 3, expected text\.$"):
        AlignConfig(lang=["de", 3])


def test_numbers_become_those_of_their_field():
    """An optimiser would keep a rate of 1 as an integer on a GPU."""
    config = FinetuneConfig(learning_rate=1, clip_norm=2, epochs=np.int64(3), patience=None)
    numbers = config.learning_rate, config.clip_norm, config.epochs
    assert numbers == (1, 2, 3) and [type(number) for number in numbers] == [float, float, int]
    assert CurveConfig(limits=[np.int32(5)]).limits == (5,) and config.patience is None


def test_zero_takes_back_what_a_preset_or_a_default_sets(clseave, monkeypatch, tmp_path):
    assert _config(clseave, monkeypatch, "--preset", "thesis").patience == 1
    config = _config(clseave, monkeypatch, "--preset", "thesis", "--patience", "0")
    assert config.patience is None and config.batch_size == 64
    path = tmp_path / "options.toml"
    path.write_text("clip_norm = 0\n")
    assert PretrainConfig().clip_norm == 1.0
    assert resolve(PretrainConfig, {}, path).clip_norm is None
    assert resolve(PretrainConfig, {"clip_norm": 0.0}).clip_norm is None
    with pytest.raises(UsageError, match=r"--patience -1: expected at least 1, or 0 for off\."):
        resolve(FinetuneConfig, {"patience": -1})
    with pytest.raises(UsageError, match=r"--clip-norm -0.5: expected at least 0, or 0 for off"):
        resolve(PretrainConfig, {"clip_norm": -0.5})
