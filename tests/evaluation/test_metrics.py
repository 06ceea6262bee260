import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss
from sklearn.metrics import classification_report as sklearn_report

from clseave_cli.core.evaluation.metrics import (
    accuracy_interval,
    agreement,
    calibration,
    cluster_sums,
    compare_predictions,
    interval,
    macro_f1,
    mcnemar,
    mean_interval,
    probabilities,
    resampled_sums,
    score,
)
from clseave_cli.labels import LABELS


def clustered_rows(generator, num_images, rows_per_image, accuracy, spread=2.0):
    """Right or wrong per row; each image has its own accuracy, Beta with the given mean."""
    per_image = generator.beta(spread * accuracy, spread * (1 - accuracy), size=num_images)
    sizes = generator.poisson(rows_per_image, size=num_images) + 1
    images = np.repeat(np.arange(num_images), sizes)
    return generator.random(len(images)) < per_image[images], images


def test_a_resample_draws_as_many_photos_as_there_are():
    sums = np.eye(7)
    weights = resampled_sums(sums, 500, seed=1)
    assert (weights.sum(axis=1) == 7).all()
    assert np.allclose(weights.mean(axis=0), 1, atol=0.15)
    # Multinomial: variance 1 − 1/G, covariance −1/G.
    covariance = np.cov(weights.T)
    assert np.allclose(np.diag(covariance), 6 / 7, atol=0.25)
    assert np.allclose(covariance[~np.eye(7, dtype=bool)].mean(), -1 / 7, atol=0.03)


def test_resamples_do_not_depend_on_how_many_are_held_at_once(monkeypatch):
    sums = np.random.default_rng(0).random((20, 2))
    whole = resampled_sums(sums, 50, seed=3)
    monkeypatch.setattr("clseave_cli.core.evaluation.metrics._WEIGHTS_AT_ONCE", 60)
    assert np.allclose(resampled_sums(sums, 50, seed=3), whole)


def test_the_same_seed_gives_the_same_interval():
    right, images = clustered_rows(np.random.default_rng(0), 50, 5, 0.7)
    first = accuracy_interval(right, images, resamples=200, seed=4)
    assert accuracy_interval(right, images, resamples=200, seed=4) == first
    assert accuracy_interval(right, images, resamples=200, seed=5) != first
    # In any order of the rows.
    order = np.random.default_rng(1).permutation(len(right))
    assert accuracy_interval(right[order], images[order], resamples=200, seed=4) == first


@pytest.mark.parametrize(
    ("measure", "values", "within"),
    [
        (accuracy_interval, np.arange(2000) % 10 < 7, 0.0015),
        (mean_interval, np.random.default_rng(4).exponential(2.0, size=2000), 0.01),
    ],
)
def test_independent_rows_give_the_textbook_standard_error(measure, values, within):
    found = measure(values, np.arange(2000), resamples=4000, seed=0)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=within)
    assert found.high == pytest.approx(values.mean() + half, abs=within)


# Clopper-Pearson for 10 of 10: the lower end is 0.025 to the power of 1/10.
ALIKE = 0.025**0.1


@pytest.mark.parametrize(
    ("right", "images", "value", "low", "high"),
    [
        (np.ones(40), np.arange(40) % 10, 1, ALIKE, 1),
        (np.zeros(40), np.arange(40) % 10, 0, 0, 1 - ALIKE),
        # One of three rows right in each of ten photos; others could be all wrong, or all right.
        (np.arange(30) % 3 == 0, np.arange(30) // 3, 1 / 3, ALIKE / 3, ALIKE / 3 + 1 - ALIKE),
        (np.array([True, False]), ["a", "a"], 0.5, None, None),
        # Four photos need a tail further out than 2,000 resamples reach.
        (np.array([1, 1, 1, 0]), list("abcd"), 0.75, None, None),
    ],
)
def test_where_the_bootstrap_would_claim_certainty(right, images, value, low, high):
    options = {"resamples": 2000, "seed": 0}
    for found in (
        accuracy_interval(right, images, **options),
        accuracy_interval(np.mean([right] * 3, axis=0), images, **options),
    ):
        assert (found.value, found.low, found.high) == pytest.approx((value, low, high))
    # A mean, and a difference of one photo, then have no interval.
    assert mean_interval(right, images, **options).low is None
    if len(set(images)) == 1:
        difference = compare_predictions(right, ~right, images, **options)
        assert (difference.low, difference.high, difference.p) == (None, None, None)
        assert difference.is_tie


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(2024)
    covered = by_row = 0
    for seed in range(600):
        right, images = clustered_rows(generator, 80, 8, 0.7)
        found = accuracy_interval(right, images, resamples=400, seed=seed)
        covered += found.low <= 0.7 <= found.high
        if seed < 200:
            naive = accuracy_interval(right, np.arange(len(right)), resamples=400, seed=seed)
            by_row += naive.low <= 0.7 <= naive.high
    assert 0.93 <= covered / 600 <= 0.97
    # What resampling rows would have claimed: the reason for clustering.
    assert by_row / 200 < 0.85


def test_macro_f1_intervals_cover_the_truth():
    # Labels uniform and errors symmetric: macro-F1 is the accuracy, 0.7.
    generator = np.random.default_rng(7)
    covered = 0
    for seed in range(600):
        right, images = clustered_rows(generator, 80, 8, 0.7)
        labels = generator.integers(3, size=len(right))
        predicted = np.where(right, labels, (labels + generator.integers(1, 3, len(right))) % 3)
        sums = cluster_sums(np.eye(9)[labels * 3 + predicted], images)
        found = interval(sums, macro_f1, resamples=400, seed=seed)
        covered += found.low <= 0.7 <= found.high
    assert 0.93 <= covered / 600 <= 0.97


def test_differences_cover_the_truth_and_p_is_right_under_the_null():
    generator = np.random.default_rng(11)
    covered = significant = 0
    for seed in range(600):
        # Two models of the same accuracy on every photo, which agree on most rows.
        images = np.repeat(np.arange(80), generator.poisson(8, size=80) + 1)
        hard = generator.beta(1.4, 0.6, size=(2, 80))
        first, other = generator.random(len(images)) < hard[:, images]
        second = np.where(generator.random(len(images)) < 0.6, first, other)
        difference = compare_predictions(first, second, images, resamples=400, seed=seed)
        covered += difference.low <= 0 <= difference.high
        significant += difference.p < 0.05
    assert 0.93 <= covered / 600 <= 0.97
    assert 0.03 <= significant / 600 <= 0.07


def test_p_and_interval_say_the_same():
    generator = np.random.default_rng(5)
    for seed in range(60):
        first, images = clustered_rows(generator, 30, 8, 0.7)
        second = generator.random(len(first)) < 0.62
        difference = compare_predictions(first, second, images, resamples=999, seed=seed)
        if abs(difference.p - 0.05) > 0.01:  # at the border, a resample more or less decides
            assert (difference.p < 0.05) == (not difference.is_tie)


@pytest.mark.parametrize("resamples", [20, 200, 2000])
def test_p_and_interval_say_the_same_of_few_photos(resamples):
    generator = np.random.default_rng(6)
    for seed in range(150):
        num_images = generator.integers(2, 13)
        images = np.repeat(np.arange(num_images), generator.integers(1, 5, size=num_images))
        first = generator.random(len(images)) < 0.9
        second = generator.random(len(images)) < generator.choice([0.0, 0.1, 0.4])
        found = compare_predictions(first, second, images, resamples=resamples, seed=seed)
        assert (found.p < 0.05) == (not found.is_tie)


def test_a_clear_difference_is_no_tie():
    first, images = np.ones(300, dtype=bool), np.arange(300) // 3
    second = np.arange(300) % 5 > 0
    difference = compare_predictions(first, second, images, resamples=500, seed=0)
    assert difference.value == pytest.approx(0.2)
    assert (difference.only_first, difference.only_second) == (60, 0)
    assert difference.low > 0 and difference.p < 0.01 and not difference.is_tie
    swapped = compare_predictions(second, first, images, resamples=500, seed=0)
    assert (swapped.value, swapped.low, swapped.high) == (
        -difference.value,
        pytest.approx(-difference.high),
        pytest.approx(-difference.low),
    )
    assert swapped.p == pytest.approx(difference.p)


def test_equal_predictions_are_a_tie_with_p_one():
    right = np.arange(30) % 3 > 0
    difference = compare_predictions(right, right, np.arange(30) // 3, resamples=200, seed=0)
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    assert difference.p == difference.mcnemar_p == 1.0
    assert difference.is_tie


def test_a_statistic_that_is_the_same_in_all_resamples_has_no_interval():
    cells = np.tile(np.eye(9)[[0, 4, 8]].sum(axis=0), (20, 1))  # one row of each label a photo
    found = interval(cells, macro_f1, resamples=100, seed=0)
    assert (found.value, found.low, found.high) == (1.0, None, None)
    # Two of three rows right in every photo, of one size or another.
    sums = np.array([[2.0, 3.0], [4.0, 6.0], [6.0, 9.0]])
    found = interval(sums, lambda s: s[:, 0] / s[:, 1], resamples=100, seed=0)
    assert (found.value, found.low, found.high) == (pytest.approx(2 / 3), None, None)


@pytest.mark.parametrize("num_photos", [2, 3, 4, 5, 6, 7, 50])
def test_one_all_right_the_other_all_wrong_is_the_sign_test(num_photos):
    ones, images = np.ones(2 * num_photos), np.arange(2 * num_photos) // 2
    found = compare_predictions(ones, 1 - ones, images, resamples=2000, seed=0)
    # By hand: the share of photos where the first wins is at least 0.025 to the power of 1/G.
    assert (found.low, found.high) == (pytest.approx(2 * 0.025 ** (1 / num_photos) - 1), 1.0)
    assert found.p == pytest.approx(2 * 0.5**num_photos)
    assert (found.p < 0.05) == (not found.is_tie) == (num_photos >= 6)
    swapped = compare_predictions(1 - ones, ones, images, resamples=2000, seed=0)
    assert (swapped.low, swapped.high, swapped.p) == (-1.0, -found.low, found.p)


@pytest.mark.parametrize("num_photos", [2, 3, 4])
def test_few_photos_that_all_gain_are_no_proof(num_photos):
    images = np.arange(4 * num_photos) // 4
    first = np.ones(len(images), dtype=bool)
    second = np.arange(len(images)) % 5 == 0
    found = compare_predictions(first, second, images, resamples=2000, seed=0)
    assert found.value > 0.7 and found.p > 0.05
    assert (found.low, found.high) == (None, None) and found.is_tie


def test_resamples_that_do_not_reach_the_tail_tell_no_interval():
    # 39 resamples of many photos: the first and the last leave out 2.5 % each.
    right, images = np.arange(20_000) % 3 == 0, np.arange(20_000)
    for resamples, told in ((1, False), (38, False), (40, True)):
        found = accuracy_interval(right, images, resamples=resamples, seed=0)
        assert found.value == pytest.approx(1 / 3, abs=1e-4)
        assert (found.low is not None) == (found.high is not None) == told
        difference = compare_predictions(right, ~right, images, resamples=resamples, seed=0)
        assert (difference.low is not None) == told and (difference.p < 0.05) == told


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        # Wikipedia, "McNemar's test", second example (discordant 6 and 16): exact p = 0.053.
        (6, 16, 0.0525),
        # Presidential approval ratings, Agresti, "Categorical Data Analysis" (1990), p. 350,
        # discordant 150 and 86: z = −4.17, p ≈ 3e−5; the exact p is a little larger.
        (150, 86, 3.7e-5),
        # By hand: 2 · (1 + 5) / 2⁵.
        (1, 4, 0.375),
        (0, 0, 1.0),
        (3, 3, 1.0),
    ],
)
def test_mcnemar_on_published_tables(only_first, only_second, p):
    assert mcnemar(only_first, only_second) == pytest.approx(p, rel=0.02)
    assert mcnemar(only_second, only_first) == pytest.approx(p, rel=0.02)


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
        ([], np.zeros((0, 3)), [], "need "),
        ([0, 1], np.zeros((2, 2)), ["a", "b"], "need "),
        ([0, 1], np.zeros((2, 3)), ["a"], "same length"),
        ([[0], [1]], np.zeros((2, 3)), ["a", "b"], "need "),
        ([0, -1], np.zeros((2, 3)), ["a", "b"], "every row needs a label"),
        ([0, 3], np.zeros((2, 3)), ["a", "b"], "every row needs a label"),
        ([0, 1], np.full((2, 3), np.nan), ["a", "b"], "finite logits"),
    ],
)
def test_refuses_rows_it_cannot_score(labels, logits, images, message):
    with pytest.raises(ValueError, match=message):
        score(labels, logits, images)


@pytest.mark.parametrize(("rows", "others"), [(3, 1), (1, 3), (3, 2), (0, 0)])
def test_rows_are_never_broadcast(rows, others):
    sampling = {"resamples": 10, "seed": 0}
    for images in {rows, others}:
        with pytest.raises(ValueError, match="equal, non-empty shapes"):
            compare_predictions(np.ones(rows), np.ones(others), range(images), **sampling)
    with pytest.raises(ValueError, match="equal, non-empty shapes"):
        agreement(np.ones((rows, 3)), np.ones((others, 3)))
