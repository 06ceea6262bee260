import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss
from sklearn.metrics import classification_report as sklearn_report

from clseave_cli.core.evaluation.metrics import (
    agreement,
    calibration,
    cluster_sums,
    macro_f1,
    probabilities,
    score,
)
from clseave_cli.labels import LABELS


def random_table(seed, num_rows=400, skill=1.0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(3, size=num_rows)
    logits = generator.normal(size=(num_rows, 3))
    logits[np.arange(num_rows), labels] += skill
    images = np.array([f"{number}.jpg" for number in generator.integers(40, size=num_rows)])
    return labels, logits, images


@pytest.mark.parametrize("seed", range(8))
def test_equals_scikit_learn_on_random_tables(seed):
    labels, logits, images = random_table(seed, num_rows=50 * (seed + 1), skill=seed / 4)
    scores = score(labels, logits, images, resamples=50, seed=seed)
    predicted = logits.argmax(axis=1)
    assert scores.accuracy == pytest.approx(accuracy_score(labels, predicted))
    assert scores.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert scores.loss == pytest.approx(log_loss(labels, probabilities(logits), labels=[0, 1, 2]))
    assert np.array_equal(scores.confusion, confusion_matrix(labels, predicted, labels=[0, 1, 2]))
    expected = sklearn_report(labels, predicted, target_names=LABELS, output_dict=True)
    for name in LABELS:
        ours = scores.per_class[name]
        assert ours.precision == pytest.approx(expected[name]["precision"])
        assert ours.recall == pytest.approx(expected[name]["recall"])
        assert ours.f1 == pytest.approx(expected[name]["f1-score"])
        assert ours.support == expected[name]["support"]


def test_macro_f1_of_resampled_counts_is_that_of_the_resampled_rows():
    labels, logits, images = random_table(3)
    predicted = logits.argmax(axis=1)
    cells = np.eye(9)[labels * 3 + predicted]
    names = np.unique(images)
    drawn = np.random.default_rng(0).integers(len(names), size=len(names))
    rows = np.concatenate([np.flatnonzero(images == names[index]) for index in drawn])
    weights = np.bincount(drawn, minlength=len(names)).astype(float)
    assert macro_f1(weights @ cluster_sums(cells, images)) == pytest.approx(
        f1_score(labels[rows], predicted[rows], average="macro")
    )


def test_a_label_that_is_neither_there_nor_predicted_has_f1_zero():
    logits = np.log([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    scores = score([0, 1], logits, ["a", "b"], resamples=10)
    assert scores.macro_f1 == pytest.approx(2 / 3)
    assert scores.per_class["contradiction"].f1 == 0
    assert scores.per_class["contradiction"].support == 0


def test_all_right_is_not_certainty():
    labels = np.arange(30) % 3
    scores = score(labels, np.eye(3)[labels], np.arange(30) // 3, resamples=50)
    assert scores.accuracy_low == pytest.approx(0.025**0.1)
    assert (scores.macro_f1, scores.macro_f1_low, scores.macro_f1_high) == (1.0, None, None)


def test_calibration_worked_by_hand():
    assert calibration([0, 1, 2], np.eye(3))[0] == 0  # always sure, always right
    # 2 bins: (0, 0.5] holds confidences 0.4 and 0.5, one of them right; (0.5, 1] holds 0.8, 0.9,
    # 1.0, two right. ECE = 2/5 · |0.5 − 0.45| + 3/5 · |2/3 − 0.9| = 0.02 + 0.14 = 0.16.
    p = np.array(
        [[0.4, 0.3, 0.3], [0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]]
    )
    ece, points = calibration([0, 1, 1, 0, 0], p, num_bins=2)
    assert ece == pytest.approx(0.16)
    assert [(point.confidence, point.accuracy, point.count) for point in points] == [
        (pytest.approx(0.45), 0.5, 2),
        (pytest.approx(0.9), pytest.approx(2 / 3), 3),
    ]


def test_logits_far_apart_have_a_finite_loss():
    scores = score([0, 1], [[0.0, 1000.0, 0.0], [0.0, 1000.0, 0.0]], ["a", "b"], resamples=10)
    assert scores.loss == pytest.approx(500)


def test_loss_does_not_change_with_a_constant_added_to_the_logits():
    labels, logits, images = random_table(1)
    shifted = score(labels, logits + 7, images, resamples=10)
    assert shifted.loss == pytest.approx(score(labels, logits, images, resamples=10).loss)


def test_agreement_and_kappa_worked_by_hand():
    # Labels 0 1 2 and 0 0 2: equal in 2 of 3 rows; by chance in (1·2 + 1·0 + 1·1) / 9.
    share, kappa = agreement(np.eye(3), [[1, 0, 0], [1, 0, 0], [0, 0, 1]])
    assert (share, kappa) == (pytest.approx(2 / 3), pytest.approx((2 / 3 - 1 / 3) / (2 / 3)))
    always = np.tile([1, 0, 0], (4, 1))
    assert agreement(always, always) == (1, 1)


@pytest.mark.parametrize(
    ("labels", "logits", "images", "message"),
    [
        ([], np.zeros((0, 3)), [], "non-empty"),
        ([0, 1], np.zeros((2, 2)), ["a", "b"], "need logits of shape"),
        ([0, 1], np.zeros((2, 3)), ["a"], "as many images"),
        ([0, -1], np.zeros((2, 3)), ["a", "b"], "every row needs a label"),
        ([0, 3], np.zeros((2, 3)), ["a", "b"], "every row needs a label"),
        ([0, 1], np.full((2, 3), np.nan), ["a", "b"], "not finite"),
    ],
)
def test_refuses_rows_it_cannot_score(labels, logits, images, message):
    with pytest.raises(ValueError, match=message):
        score(labels, logits, images)


def test_agreement_refuses_other_rows():
    with pytest.raises(ValueError, match="equal, non-empty"):
        agreement(np.zeros((2, 3)), np.zeros((3, 3)))
