"""`calibrate`: temperatures, and promises that hold where the rows of a photo are alike."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, ndtr, softmax
from tiny_world import read_jsonl, tree, write_jsonl

from clseave_cli.core.config import EvaluateConfig
from clseave_cli.core.evaluation import run as evaluation
from clseave_cli.core.evaluation.abstention import find_threshold
from clseave_cli.core.evaluation.metrics import calibration, risk_coverage
from clseave_cli.core.evaluation.run import evaluate
from clseave_cli.core.files import json_digest
from clseave_cli.core.models.calibration import (
    CALIBRATION_FILE,
    Calibration,
    fit_temperature,
    read_calibrations,
    write_calibrations,
    write_fitted,
)
from clseave_cli.core.models.clip_ve import ClipVE, fingerprint
from clseave_cli.errors import ModelError
from clseave_cli.labels import LABELS

# --- temperature ---


def overconfident(num_rows, factor, seed=0):
    """Labels, and logits that are `factor` times as large as those the labels were drawn from."""
    generator = np.random.default_rng(seed)
    honest = 2 * generator.normal(size=(num_rows, 3))
    labels = (generator.random(num_rows)[:, None] > softmax(honest, 1).cumsum(1)).sum(1)
    return honest * factor, labels


def test_the_temperature_is_what_made_the_model_too_sure():
    logits, labels = overconfident(10_000, 2.5)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(2.5, rel=0.03)
    raw = softmax(logits, 1)
    mended = Calibration(temperature).apply(raw.astype(np.float32))
    assert mended == pytest.approx(softmax(logits / temperature, 1), abs=1e-5)
    assert (mended.argmax(1) == raw.argmax(1)).all()
    assert calibration(labels, mended)[0] < 0.01 < 0.1 < calibration(labels, raw)[0]


def test_labels_stay_where_probabilities_nearly_tie():
    near = np.array([[0.3333333, 0.33333334, 0.3333333], [0.5, 0.0, 0.5 + 6e-8]], np.float32)
    for temperature in (0.01, 1.0, 3.0, 100.0):
        assert Calibration(temperature).apply(near).argmax(1).tolist() == near.argmax(1).tolist()


@pytest.mark.parametrize("logits", [np.eye(3) * 4, np.full((3, 3), np.nan)])
def test_rows_that_are_all_right_or_no_numbers_fit_no_temperature(logits):
    assert fit_temperature(logits, np.arange(3)) == 1.0


def test_a_student_of_several_languages_has_a_temperature_for_each(tmp_path):
    def stored(languages, **dev):
        write_fitted(tmp_path, languages, dev)
        return read_calibrations(tmp_path)

    assert stored(["de"], mse=0.1) == {}
    assert stored(["de"], temperature=1.5) == {"de": Calibration(1.5)}
    dev = {"temperature": 1.5, "temperature/de": 1.2, "temperature/nl": 1.8}
    both = {"de": Calibration(1.2), "nl": Calibration(1.8)}
    assert stored(["de", "nl"], **dev) == both


# --- the risk-coverage curve ---


def test_risk_and_coverage_worked_by_hand():
    # Of the surest 1, 2, 3, 4 rows 0, 1/2, 1/3 and 2/4 are wrong.
    area, curve = risk_coverage([False, True, False, True], [0.5, 0.9, 0.8, 0.7])
    assert area == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert [(p.count, p.confidence) for p in curve] == [(1, 0.9), (2, 0.8), (3, 0.7), (4, 0.5)]
    assert [p.accuracy for p in curve] == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
    # Equally sure rows count alike, in whatever order they stand.
    for correct in ([True, False, True], [False, True, True]):
        assert risk_coverage(correct, [0.9, 0.9, 0.1])[0] == pytest.approx((0.5 + 0.5 + 1 / 3) / 3)


# --- promises ---


def clustered(generator, draws, photos, rows):
    """(draws, photos · rows) confidence and whether right.

    A row is right as often as it is sure, but the errors of a photo come together.
    """
    shape, share = (draws, photos, rows), 0.8
    hard = np.sqrt(share) * generator.normal(size=(*shape[:2], 1))
    luck = ndtr(hard + np.sqrt(1 - share) * generator.normal(size=shape))
    sure = expit(np.abs(generator.normal(1.2, 1.2, size=shape)))
    return sure.reshape(draws, -1), (luck < sure).reshape(draws, -1)


def test_the_promise_holds_in_95_of_100_draws_with_clustered_rows():
    generator = np.random.default_rng(5)
    photos, rows, precision = 200, 4, 0.8
    draws = list(zip(*clustered(generator, 1000, photos, rows), strict=True))
    (everyone,), (everyone_right,) = clustered(generator, 1, 50_000, rows)
    order = np.argsort(-everyone)
    reached = np.cumsum(everyone_right[order]) / np.arange(1, len(order) + 1)
    steps = -everyone[order]

    def kept(least):
        return reached[max(0, np.searchsorted(steps, -least, side="right") - 1)] >= precision

    images = np.repeat(np.arange(photos), rows)
    thresholds = [find_threshold(sure, right, images, precision).least for sure, right in draws]
    promised = [least for least in thresholds if least is not None]
    assert sum(not kept(least) for least in promised) <= 50
    assert len(promised) > 750  # it is no promise to say nothing
    # An exact bound that takes the same rows for independent breaks its promise far more often.
    candidates = np.linspace(precision, 1 / 3, 40)
    num_broken = 0
    for sure, right in draws:
        answered = sure[:, None] >= candidates
        wrong = (~right[:, None] & answered).sum(0)
        passed = stats.binom.cdf(wrong, answered.sum(0), 1 - precision) <= 0.05
        num_passed = int(np.cumprod(passed).sum())
        num_broken += num_passed > 0 and not kept(candidates[num_passed - 1])
    assert num_broken > 60


def all_right(num_photos, rows=2, wrong=0):
    correct = np.ones(num_photos * rows, bool)
    correct[:wrong] = False
    images = np.repeat([f"{n}.jpg" for n in range(num_photos)], rows)
    return np.full(len(correct), 0.99), correct, images


def test_repeated_rows_and_their_order_change_nothing():
    sure, right = (each[0] for each in clustered(np.random.default_rng(1), 1, 300, 4))
    images = np.repeat(np.arange(300), 4)
    threshold = find_threshold(sure, right, images, 0.75)
    order = np.random.default_rng(2).permutation(3 * len(sure))
    again = [np.tile(each, 3)[order] for each in (sure, right, images)]
    assert threshold.least is not None and find_threshold(*again, 0.75) == threshold


def test_too_few_photos_say_how_many_would_do():
    few = find_threshold(*all_right(40), 0.95)
    assert few.least is None and 40 < few.num_needed < 200
    enough = find_threshold(*all_right(few.num_needed), 0.95)
    assert enough.least == pytest.approx(1 / 3) and enough.num_needed is None
    assert (enough.coverage, enough.accuracy) == (1.0, 1.0)
    # Rows are no photos: more of them add nothing.
    assert find_threshold(*all_right(40, rows=50), 0.95).least is None
    # Where most of the surest are wrong, no number of photos helps.
    hopeless = find_threshold(*all_right(200, wrong=300), 0.95)
    assert (hopeless.least, hopeless.num_needed) == (None, None)
    # Rows of other labels do not count.
    sure, right, images = all_right(200, rows=4)
    of_label = np.tile([True, True, True, False], 200)
    of_one = find_threshold(np.where(of_label, sure, -1), right & of_label, images, 0.95)
    assert (of_one.accuracy, of_one.coverage) == (1.0, 1.0)


# --- the command ---


def test_training_fits_what_calibrate_fits_again(clseave, world, runs):
    before = {name: read_calibrations(runs / name) for name in ("clip-ve", "align-de", "align-nl")}
    assert [list(each) for each in before.values()] == [["en"], ["de"], ["nl"]]
    fingerprint_before, files = fingerprint(runs / "clip-ve"), tree(runs)
    code, out, err = clseave("calibrate", "--data", world, "--runs", runs, "--json")
    assert code == 0, err
    document = {each["lang"]: each for each in json.loads(out)["calibrated"]}
    for name, fitted in before.items():
        for lang, again in read_calibrations(runs / name).items():
            assert again.temperature == document[lang]["temperature"]
            assert again.temperature == pytest.approx(fitted[lang].temperature, rel=0.02)
    assert document.keys() == {"en", "de", "nl"}
    assert fingerprint(runs / "clip-ve") == fingerprint_before
    changed = {name for name, content in tree(runs).items() if content != files[name]}
    assert {name.rpartition("/")[2] for name in changed} <= {CALIBRATION_FILE}


def test_a_promise_that_dev_cannot_support_is_refused_and_nothing_stored(refused, world, runs):
    files = tree(runs)
    options = ["--data", world, "--runs", runs, "--precision"]
    message = refused("calibrate", *options, "0.95")
    reason = "the dev split cannot support it; nothing was stored. en, all answers: 4 photos, "
    assert reason in message
    message = refused("calibrate", *options, "0.9", "--split", "train")
    assert "was trained on these rows" in message
    message = refused("calibrate", "--runs", runs, "--label", "neutral", code=2)
    assert message == "clseave: --label goes with --precision."
    message = refused("calibrate", *options, "0.9", "--label", "maybe", code=2)
    assert "--label maybe: expected entailment, neutral, contradiction." in message
    assert tree(runs) == files


def test_thresholds_reach_predict_and_evaluate_and_a_missing_temperature_is_told_once(
    clseave, refused, world, runs, tmp_path
):
    row = read_jsonl(world / "snli_ve_test.jsonl")[0]
    pair = {"image": row["Flickr30K_ID"], "hypothesis": row["sentence2"]}
    rows = write_jsonl(tmp_path / "pairs.jsonl", [pair, pair])
    images, output = world / "images", tmp_path / "out.jsonl"
    one = ["predict", images / pair["image"], pair["hypothesis"], "--runs", runs, "--json"]
    many = ["predict", "--input", rows, "--output", output, "--images", images, "--runs", runs]
    message = refused(*one, "--unsure", code=2)
    assert "has no threshold for en" in message and "calibrate --lang en" in message
    write_calibrations(runs / "clip-ve", {"en": Calibration(3.0, dict.fromkeys(LABELS, 1.0), 0.95)})
    code, out, err = clseave(*one, "--unsure")
    assert (code, json.loads(out)["label"]) == (0, "unsure"), err
    assert json.loads(clseave(*one)[1])["label"] in LABELS
    assert clseave(*many, "--unsure")[0] == 0
    assert read_jsonl(output)[0]["label"] == "unsure"
    document = evaluate(EvaluateConfig(data=str(world), runs=(runs,), resamples=20))
    english, german = document.results[:2]
    assert (english.unsure.share, english.unsure.num_answered, english.temperature) == (1, 0, 3)
    assert german.unsure is None
    output.unlink()
    (runs / "clip-ve" / CALIBRATION_FILE).unlink()
    for command in (one, many):
        code, _, err = clseave(*command)
        assert (code, err.count("en: no temperature was fitted")) == (0, 1)


def test_probabilities_are_those_of_the_temperature_and_labels_stay(world, runs):
    config = EvaluateConfig(data=str(world), runs=(runs,), resamples=20, precision="fp32")
    for model in runs.iterdir():
        (model / CALIBRATION_FILE).unlink()
    before = evaluate(config).results
    assert {r.temperature for r in before} == {None}
    write_calibrations(runs / "clip-ve", {"en": Calibration(0.5)})
    after = evaluate(config).results
    assert after[0].ece_uncalibrated == before[0].ece != after[0].ece
    assert after[0].loss_uncalibrated == before[0].loss != after[0].loss
    assert [r.confusion for r in after] == [r.confusion for r in before]
    assert after[1].loss == before[1].loss


@pytest.mark.parametrize("damage", ["digest", "temperature", "model", "json"])
def test_a_damaged_calibration_is_refused(runs, damage):
    path = runs / "clip-ve" / CALIBRATION_FILE
    content = json.loads(path.read_text())
    if damage == "model":
        write_calibrations(runs / "align-de", {"en": Calibration(2.0)})
        content = json.loads((runs / "align-de" / CALIBRATION_FILE).read_text())
    elif damage == "temperature":
        del content["digest"]
        content["languages"]["en"]["temperature"] = -2.0
        content["digest"] = json_digest(content)
    else:
        content["languages"]["en"]["temperature"] += 1
    path.write_text("{" if damage == "json" else json.dumps(content))
    with pytest.raises(ModelError, match="damaged"):
        read_calibrations(runs / "clip-ve")


def test_calibrate_refuses_a_damaged_calibration_before_a_model_runs(
    world, runs, refused, monkeypatch, tmp_path
):
    (runs / "align-nl" / CALIBRATION_FILE).write_text("{")
    monkeypatch.setattr(ClipVE, "from_folder", lambda *_: pytest.fail("a model was loaded"))
    message = refused("calibrate", "--data", world, "--runs", runs)
    assert f"align-nl/{CALIBRATION_FILE}: damaged" in message
    # With several folders, all are checked before the first one is computed.
    intact = shutil.copytree(runs, tmp_path / "intact")
    (intact / "align-nl" / CALIBRATION_FILE).unlink()
    message = refused("calibrate", "--data", world, "--runs", intact, "--runs", runs)
    assert f"{runs}/align-nl/{CALIBRATION_FILE}: damaged" in message


def test_evaluate_reads_each_calibration_once(world, runs, monkeypatch):
    models = []
    monkeypatch.setattr(
        evaluation, "read_calibrations", lambda m: models.append(m) or read_calibrations(m)
    )
    evaluate(EvaluateConfig(data=str(world), runs=(runs,), lang=("en", "de"), resamples=10))
    assert models == [runs / "clip-ve", runs / "align-de"]
