"""The demo's orchestration: what it takes up, what it advises, which examples it ends on."""

from dataclasses import replace

import numpy as np
import pytest

from clseave_cli.core.config import DemoConfig
from clseave_cli.core.data.records import read_split
from clseave_cli.core.evaluation import demo as module
from clseave_cli.core.evaluation.comparison import PredictedRows
from clseave_cli.errors import Interrupted
from clseave_cli.labels import LABELS


def test_examples_are_rows_that_every_language_answers_rightly(world, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LANGUAGES", ("en", "de"))
    split = read_split(world, "test", "en")
    labels = split.labels.astype(np.int64)
    probabilities = np.full((len(split), 3), 0.1)
    probabilities[np.arange(len(split)), labels] = 0.8
    english = PredictedRows("en", split.pair_ids, split.pair_ids, labels, probabilities)
    of_label = [np.flatnonzero(labels == label) for label in range(3)]
    german = probabilities.copy()
    german[of_label[0][0]] = np.roll(german[of_label[0][0]], 1)  # wrong in German
    german[of_label[1][-1], 1] = 0.9  # right, but English is no surer of it than of the others
    german[of_label[2]] = np.roll(german[of_label[2]], 1, axis=1)  # all wrong
    english.write(tmp_path)
    replace(english, lang="de", probabilities=german).write(tmp_path)

    examples = module._examples(world, tmp_path)
    assert [example.label for example in examples] == list(LABELS[:2])
    row = split.hypotheses.index(examples[0].hypotheses["en"], of_label[0][1])
    assert row == of_label[0][1]
    assert examples[0].image.is_relative_to(world / "images")
    other = read_split(world, "test", "de")
    number = other.pair_ids.index(split.pair_ids[row])  # its rows are in another order
    assert examples[0].hypotheses["de"] == other.hypotheses[number]


@pytest.mark.parametrize("error", [Interrupted("state saved; --resume"), KeyboardInterrupt()])
def test_an_interrupted_demo_says_what_continues_it_and_does(tmp_path, monkeypatch, error):
    resumed = []

    def pretrain(config, _):
        resumed.append(config.resume)
        (config.runs / "clip.partial").mkdir(parents=True, exist_ok=True)
        raise error

    monkeypatch.setattr(module, "_world", lambda *_: None)
    monkeypatch.setattr(module, "pretrain", pretrain)
    for _ in range(2):
        with pytest.raises(Interrupted, match="run the same command again"):
            module.demo(DemoConfig(out=tmp_path / "demo"))
    assert resumed == [False, True]
