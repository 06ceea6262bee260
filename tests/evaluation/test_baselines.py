import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from clseave_cli.core.data.hypothesis_only import HYPOTHESIS_ONLY_FILE, HypothesisClassifier
from clseave_cli.core.evaluation.baselines import Guesses, shuffled_rows
from clseave_cli.core.evaluation.metrics import accuracy_interval, compare_predictions
from clseave_cli.core.evaluation.results import SeedSummary
from clseave_cli.errors import ModelError


def predict_from_hypotheses(train, labels, test):
    return HypothesisClassifier.fit(train, labels).predict(test)


def test_majority_takes_the_first_of_equals():
    assert Guesses((1, 0, 2), np.zeros(0)).majority == 2
    assert Guesses((0, 2, 2), np.zeros(0)).majority == 1


@pytest.mark.parametrize(
    ("telling", "sentences"),
    [
        ({"nobody": 2, "outside": 0, "tall": 1}, "{} people are {} here"),
        ({"誰も": 2, "外に": 0, "背の高い": 1}, "{}人が{}います"),
        ({"没有人": 2, "户外": 0, "高个子": 1}, "{}个人在{}这里"),
        ({"아무도": 2, "밖에서": 0, "키가": 1}, "{}명이{}있습니다"),
    ],
    ids=["en", "ja", "zh", "ko"],
)
def test_finds_what_the_wording_gives_away(telling, sentences):
    train = [sentences.format(number, word) for number in "123" for word in telling]
    test = [sentences.format(9, word) for word in telling]
    labels = list(telling.values())
    assert predict_from_hypotheses(train, 3 * labels, test).tolist() == labels


def test_counting_equal_rows_is_training_on_every_row():
    generator = np.random.default_rng(0)
    words = ["red", "blue", "dog", "cat", "no", "two"]
    pool = [" ".join(generator.choice(words, 3)) for _ in range(40)]
    drawn = generator.integers(40, size=600)
    labels = (drawn + (generator.random(600) < 0.4)) % 3
    train = [pool[index] for index in drawn]
    ours = predict_from_hypotheses(train, labels, pool)
    # TF-IDF weights come from the distinct rows, so the reference takes them from those too.
    distinct = sorted(set(zip(train, labels.tolist(), strict=True)))
    vectors = TfidfVectorizer(ngram_range=(1, 3), sublinear_tf=True)
    vectors.fit([text for text, _ in distinct])
    reference = LogisticRegression(max_iter=1000, tol=1e-3).fit(vectors.transform(train), labels)
    assert (ours == reference.predict(vectors.transform(pool))).mean() >= 0.95


def test_sentences_without_anything_to_read_get_the_majority():
    assert predict_from_hypotheses(["", " "], [1, 1], ["x", ""]).tolist() == [1, 1]
    assert predict_from_hypotheses(["", " ", ""], [1, 2, 2], ["x"]).tolist() == [2]
    assert predict_from_hypotheses(["a b", "!"], [0, 0], ["zzz"]).tolist() == [0]
    # Punctuation alone is something to read.
    assert predict_from_hypotheses(["?", "?", "!"], [2, 2, 0], ["?", "!"])[0] == 2
    with pytest.raises(ValueError, match="needs training rows"):
        predict_from_hypotheses([], [], ["a"])


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_what_is_kept_in_a_model_folder_guesses_as_before(tmp_path, num_labels):
    generator = np.random.default_rng(0)
    words = ["red", "Blau", "犬", "!", "no", "두"]
    train, test = ([" ".join(generator.choice(words, 4)) for _ in range(200)] for _ in "ab")
    assert HypothesisClassifier.read(tmp_path) is None
    classifier = HypothesisClassifier.fit(train, generator.integers(num_labels, size=200))
    classifier.write(tmp_path)
    again = HypothesisClassifier.read(tmp_path)
    assert again.counts == classifier.counts and sum(again.counts) == 200
    assert again.predict(test).tolist() == classifier.predict(test).tolist()


@pytest.mark.parametrize(
    "spoilt", [{"weights": np.ones((3, 2))}, {"labels": np.array([0, 1, 7])}, {"idf": None}, None]
)
def test_a_damaged_classifier_is_refused(tmp_path, spoilt):
    HypothesisClassifier.fit(["a b", "c d", "e f"], [0, 1, 2]).write(tmp_path)
    path = tmp_path / HYPOTHESIS_ONLY_FILE
    if spoilt is None:
        path.write_bytes(path.read_bytes()[:-9])
    else:
        changed = {k: v for k, v in (load_file(path) | spoilt).items() if v is not None}
        save_file(changed, path, {"source": " "})
    with pytest.raises(ModelError, match=r"hypothesis_only\.safetensors: damaged"):
        HypothesisClassifier.read(tmp_path)


@given(st.lists(st.integers(0, 6), max_size=60), st.integers(0, 2**32 - 1))
def test_shuffling_keeps_as_few_photos_as_possible(images, seed):
    rows = shuffled_rows(images, seed)
    assert sorted(rows.tolist()) == list(range(len(images)))
    kept = sum(images[row] == image for row, image in zip(rows, images, strict=True))
    largest = max((images.count(image) for image in images), default=0)
    assert kept == max(0, 2 * largest - len(images))


def test_shuffling_depends_on_the_seed_only_and_mixes_rows_of_one_photo_apart():
    images = np.arange(900) // 9
    rows = shuffled_rows(images, 0)
    assert np.array_equal(shuffled_rows(images, 0), rows)
    assert not np.array_equal(shuffled_rows(images, 1), rows)
    photos = images[rows].reshape(100, 9)
    assert np.mean([len(set(row)) for row in photos.tolist()]) > 8


def test_seeds_worked_by_hand():
    assert SeedSummary.of([0.7]) == SeedSummary(1, 0.7, 0.0, 0.7, 0.7)
    mean, std = pytest.approx(0.8), pytest.approx(0.1)
    assert SeedSummary.of([0.7, 0.8, 0.9]) == SeedSummary(3, mean, std, 0.7, 0.9)


def test_the_interval_of_one_training_is_that_of_its_accuracy():
    generator = np.random.default_rng(0)
    images = np.arange(400) // 8
    options = {"resamples": 300, "seed": 3}
    # Three trainings that err on different rows: the mean is surer than any of them.
    several = [generator.random(400) < 0.7 for _ in range(3)]
    one = accuracy_interval(several[0], images, **options)
    assert accuracy_interval(np.mean(several[:1], axis=0), images, **options) == one
    mean = accuracy_interval(np.mean(several, axis=0), images, **options)
    assert mean.value == pytest.approx(np.mean(several))
    assert mean.high - mean.low < one.high - one.low
    # The same training three times is no more than the one.
    again = accuracy_interval(np.mean([several[0]] * 3, axis=0), images, **options)
    assert (again.low, again.high) == pytest.approx((one.low, one.high))


def test_the_difference_of_several_trainings_is_that_of_their_means():
    generator = np.random.default_rng(0)
    images = np.arange(400) // 8
    options = {"resamples": 300, "seed": 3}
    first, second = ([generator.random(400) < p for _ in range(3)] for p in (0.8, 0.7))
    alone = compare_predictions(first[0], second[0], images, **options)
    shares = [np.mean(rows, axis=0) for rows in (first, second)]
    mean = compare_predictions(*shares, images, **options)
    assert mean.value == pytest.approx(np.mean(first) - np.mean(second))
    assert mean.high - mean.low < alone.high - alone.low
    equal = compare_predictions(shares[0], shares[0], images, **options)
    assert (equal.value, equal.low, equal.high) == (0, 0, 0)
