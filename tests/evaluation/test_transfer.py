import sys
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

from clseave_cli.core.evaluation import transfer
from clseave_cli.core.evaluation.transfer import (
    LANG2VEC_SOURCE,
    THESIS_DISTANCES,
    THESIS_SOURCE,
    ExtraMissing,
    analyse_distances,
    describe_power,
    lang2vec_distances,
    measure_transfer,
)
from clseave_cli.core.models import ranking

# The thesis's test accuracies.
THESIS = {"en": 0.7317, "de": 0.7319, "nl": 0.7135, "ja": 0.7082, "zh": 0.6994, "ko": 0.6875}


def test_the_thesis_accuracies_against_its_distances():
    analysis = analyse_distances(THESIS)
    assert analysis.source == THESIS_SOURCE
    assert analysis.losses["ko"] == pytest.approx(0.0442)
    languages = ["de", "nl", "ja", "zh", "ko"]
    losses = [THESIS["en"] - THESIS[lang] for lang in languages]
    for kind in ("featural", "syntactic", "phonological", "inventory"):
        distances = [THESIS_DISTANCES[kind][lang] for lang in languages]
        found = analysis.correlations[kind]
        assert found.pearson == pytest.approx(stats.pearsonr(distances, losses).statistic)
        assert found.spearman == pytest.approx(stats.spearmanr(distances, losses).statistic)
        assert found.num_languages == 5
    # By hand: ranks of the syntactic distance 1, 2, 3.5, 3.5, 5 and of the loss 1, 2, 3, 4, 5.
    assert analysis.correlations["syntactic"].spearman == pytest.approx(9.5 / np.sqrt(95))


def test_lost_cells_are_left_out_and_two_points_give_no_correlation():
    analysis = analyse_distances(THESIS)
    assert analysis.correlations["genetic"].distances["ja"] is None
    assert analysis.correlations["genetic"].num_languages == 2
    assert analysis.correlations["genetic"].pearson is None
    assert analysis.correlations["geographic"].spearman_p is None


def test_p_counts_all_orders():
    # Five points in perfect order: 2 of 120 orders are as extreme. One neighbouring swap: the
    # table of Spearman's rho (n = 5) gives 0.0833 (two-sided) for 0.9.
    perfect = {"en": 0.9, "de": 0.8, "nl": 0.7, "ja": 0.5, "zh": 0.5, "ko": 0.4}
    order = analyse_distances({**perfect, "ja": 0.6}).correlations["syntactic"]
    assert order.spearman < 1  # ja and zh are equally far: no perfect ranking is possible
    distances = {kind: dict.fromkeys(("de", "nl", "ja", "zh", "ko")) for kind in ("x",)}
    distances["x"] = {"de": 0.1, "nl": 0.2, "ja": 0.3, "zh": 0.4, "ko": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "THESIS_DISTANCES", {"featural": distances["x"]})
        ranked = analyse_distances({**perfect, "ja": 0.6}).correlations["featural"]
        assert (ranked.spearman, ranked.spearman_p) == (pytest.approx(1), pytest.approx(2 / 120))
        swapped = analyse_distances({**perfect, "ja": 0.45, "zh": 0.55}).correlations["featural"]
        assert swapped.spearman == pytest.approx(0.9)
        assert swapped.spearman_p == pytest.approx(0.0833, abs=1e-4)


def test_equal_losses_give_no_correlation():
    assert analyse_distances(dict.fromkeys(THESIS, 0.7)).correlations["syntactic"].pearson is None


def test_without_english_or_another_language_there_is_nothing_to_analyse():
    assert analyse_distances({"de": 0.7, "nl": 0.6}) is None
    assert analyse_distances({"en": 0.7}) is None


def test_the_note_says_what_n_points_can_show():
    assert "too few" in describe_power(2, {})
    assert "below 0.05 for none" in describe_power(4, {"syntactic": 2 / 24, "genetic": None})
    five = describe_power(5, {"syntactic": 4 / 120, "featural": 8 / 120, "inventory": 4 / 120})
    assert "below 0.05 for syntactic, inventory." in five and "cannot show a cause" in five
    assert "smallest p" not in describe_power(3, {"syntactic": None, "genetic": None})
    assert describe_power(12, {}).startswith("12 languages")


def test_the_smallest_p_counts_ties_of_distances():
    found = analyse_distances(THESIS).correlations
    # By hand: 5! orders; two equal distances may swap, three in six ways; and all that reversed.
    assert found["syntactic"].smallest_p == pytest.approx(2 * 2 / 120)
    assert found["inventory"].smallest_p == pytest.approx(2 * 2 / 120)
    assert found["featural"].smallest_p == pytest.approx(2 * 2 * 2 / 120)
    assert found["phonological"].smallest_p == pytest.approx(2 * 6 / 120)
    assert found["genetic"].smallest_p is None
    # As good a ranking as there can be has that p.
    perfect = {"en": 0.9, "de": 0.8, "nl": 0.7, "ja": 0.6, "zh": 0.5, "ko": 0.4}
    syntactic = analyse_distances(perfect).correlations["syntactic"]
    assert syntactic.spearman_p == syntactic.smallest_p


def test_many_languages_use_the_approximation(monkeypatch):
    generator = np.random.default_rng(0)
    languages = [f"l{index}" for index in range(12)]
    distances = dict(zip(languages, generator.random(12).tolist(), strict=True))
    monkeypatch.setattr(transfer, "THESIS_DISTANCES", {"featural": distances})
    losses = generator.random(12)
    accuracies = {"en": 1.0, **dict(zip(languages, (1 - losses).tolist(), strict=True))}
    found = analyse_distances(accuracies).correlations["featural"]
    assert found.pearson_p == pytest.approx(stats.pearsonr(list(distances.values()), losses).pvalue)
    assert found.smallest_p is None


KINDS = ("featural", "syntactic", "genetic", "geographic", "phonological", "inventory")


@pytest.fixture
def fake_lang2vec(monkeypatch):
    """A stand-in with the interface of lang2vec's distances, which PyPI's 1.1.2 lacks."""
    module = ModuleType("lang2vec.lang2vec")
    module.LETTER_CODES = {"fr": "fra", "de": "deu", "ar": "ara", "en": "eng", "zh": "zho"}
    places = {"eng": 0, "deu": 1, "fra": 5, "ara": 9}
    module.DISTANCE_LANGUAGES = list(places)

    def distance(kinds, first, second):
        apart = abs(places[first] - places[second])
        return [apart / 10 + KINDS.index(kind) / 100 for kind in kinds]

    module.distance = distance
    package = ModuleType("lang2vec")
    package.lang2vec = module
    monkeypatch.setitem(sys.modules, "lang2vec", package)
    monkeypatch.setitem(sys.modules, "lang2vec.lang2vec", module)
    return module


def test_other_languages_come_from_lang2vecs_own_distances(fake_lang2vec):
    distances = lang2vec_distances(["fr", "de", "ara", "zh"])
    assert tuple(distances) == KINDS  # all six
    assert distances["featural"] == {"fr": 0.5, "de": 0.1, "ara": 0.9, "zh": None}
    assert distances["inventory"] == pytest.approx(
        {"fr": 0.55, "de": 0.15, "ara": 0.95, "zh": None}
    )


def test_one_source_for_all_languages(fake_lang2vec):
    analysis = analyse_distances({"en": 0.8, "de": 0.7, "fr": 0.6, "ar": 0.5})
    assert analysis.source == LANG2VEC_SOURCE
    assert analysis.correlations["syntactic"].distances["de"] == pytest.approx(0.11)
    assert analysis.correlations["genetic"].spearman == pytest.approx(1)


def test_distances_are_to_the_source_language(fake_lang2vec, monkeypatch):
    accuracies = {"fr": 0.8, "en": 0.7, "ar": 0.6}
    analysis = analyse_distances(accuracies, "fr")
    assert analysis.source == LANG2VEC_SOURCE
    assert analysis.losses == pytest.approx({"en": 0.1, "ar": 0.2})
    assert analysis.correlations["featural"].distances == pytest.approx({"en": 0.5, "ar": 0.4})
    unknown = analyse_distances({"tlh": 0.8, "en": 0.7}, "tlh")
    assert unknown.correlations["syntactic"].distances == {"en": None}
    monkeypatch.setitem(sys.modules, "lang2vec.lang2vec", None)
    assert analyse_distances(accuracies, "fr") is None  # the table has English alone


def test_a_script_or_region_is_the_same_language(fake_lang2vec):
    assert lang2vec_distances(["fr-CA"])["featural"]["fr-CA"] == pytest.approx(0.5)


def test_an_unknown_language_is_a_gap_that_is_named(fake_lang2vec):
    analysis = analyse_distances({"en": 0.8, "fr": 0.7, "tlh": 0.6})
    assert analysis.correlations["syntactic"].distances["tlh"] is None
    assert "lang2vec does not know tlh." in analysis.note


def test_the_real_lang2vec_where_it_is_installed():
    module = pytest.importorskip("lang2vec.lang2vec", exc_type=ImportError)
    if not hasattr(module, "distance"):
        pytest.skip("PyPI's lang2vec has no distances")
    distances = lang2vec_distances(["fr", "ar", "zh-Hant", "tlh"])["syntactic"]
    assert 0 < distances["fr"] < distances["ar"] < 1
    assert distances["tlh"] is None


@pytest.mark.parametrize("installed", [False, True])
def test_without_its_distances_the_table_is_used_with_gaps(monkeypatch, fake_lang2vec, installed):
    if installed:  # PyPI's version has no distances
        del fake_lang2vec.DISTANCE_LANGUAGES
    else:
        monkeypatch.setitem(sys.modules, "lang2vec.lang2vec", None)
    with pytest.raises(ExtraMissing, match=r"pip install .* git\+https://github.com/antonisa/"):
        lang2vec_distances(["fr"])
    analysis = analyse_distances({"en": 0.8, "de": 0.7, "fr": 0.6})
    assert analysis.source == THESIS_SOURCE
    assert analysis.correlations["syntactic"].distances == {"de": 0.42, "fr": None}
    assert "No distances of fr" in analysis.note


def test_errors_worked_by_hand():
    student = [[1.0, 0.0], [0.0, 2.0]]
    teacher = [[1.0, 1.0], [0.0, -1.0]]
    measured = measure_transfer(student, teacher, ["a", "b"])
    # Errors 0, −1, 0, 3: squares 10 over 4 numbers; absolutes 4 over 4.
    assert (measured.mse, measured.mse_sum) == (2.5, 5.0)
    assert (measured.mae, measured.mae_sum) == (1.0, 2.0)
    assert measured.cosine == pytest.approx((np.sqrt(0.5) - 1) / 2)
    # One answer does best along the mean of (√½, √½) and (0, −1).
    assert measured.cosine_constant == pytest.approx(np.hypot(np.sqrt(0.5), np.sqrt(0.5) - 1) / 2)
    # Over sentences: variances 0.25 and 1 (student), 0.25 and 1 (teacher).
    assert measured.variance_student == measured.variance_teacher == pytest.approx(0.625)


@pytest.mark.parametrize(
    ("student", "teacher", "num_sentences"),
    [((3, 2), (1, 2), 3), ((3, 2), (3, 2), 1), ((0, 2), (0, 2), 0), ((3,), (3,), 3)],
)
def test_embeddings_are_never_broadcast(student, teacher, num_sentences):
    with pytest.raises(ValueError, match="equal, non-empty shapes"):
        measure_transfer(np.ones(student), np.ones(teacher), range(num_sentences))


def test_the_thesis_summed_figure():
    # FACTS: validation "MSE" 7.62 at 512 dimensions is 0.0149 per dimension.
    teacher = np.random.default_rng(0).normal(size=(30, 512))
    student = teacher + np.sqrt(7.62 / 512)
    measured = measure_transfer(student, teacher, np.arange(30))
    assert measured.mse_sum == pytest.approx(7.62, rel=1e-5)
    assert measured.mse == pytest.approx(0.01488, rel=1e-3)


def test_retrieval_equals_a_plain_loop():
    generator = np.random.default_rng(1)
    teacher = generator.normal(size=(60, 8))
    student = teacher + 0.9 * generator.normal(size=(60, 8))
    measured = measure_transfer(student, teacher, np.arange(60))

    def cosine(x, y):
        return x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    to_teacher = [max(range(60), key=lambda j: cosine(student[i], teacher[j])) for i in range(60)]
    to_student = [max(range(60), key=lambda j: cosine(student[j], teacher[i])) for i in range(60)]
    assert measured.retrieval_to_teacher == np.mean(np.array(to_teacher) == np.arange(60))
    assert measured.retrieval_to_student == np.mean(np.array(to_student) == np.arange(60))
    assert measured.retrieval_to_teacher != measured.retrieval_to_student
    assert 0.2 < measured.retrieval_to_teacher < 0.9


def test_retrieval_does_not_depend_on_the_chunks(monkeypatch):
    generator = np.random.default_rng(2)
    teacher = generator.normal(size=(50, 4))
    student = teacher + 0.5 * generator.normal(size=(50, 4))
    whole = measure_transfer(student, teacher, np.arange(50) // 2)
    monkeypatch.setattr(ranking, "_SIMILARITIES_AT_ONCE", 130)
    assert measure_transfer(student, teacher, np.arange(50) // 2) == whole


def test_another_row_with_the_same_sentence_is_a_hit():
    teacher = np.repeat(np.eye(3), 2, axis=0)
    student = teacher + 0.1
    assert measure_transfer(student, teacher, list("aabbcc")).retrieval_to_teacher == 1.0
    # Were they six different sentences, one of two equal candidates would be wrong.
    assert measure_transfer(student, teacher, list("abcdef")).retrieval_to_teacher == 0.5


def test_collapsed_embeddings_score_chance_and_show_no_variance():
    teacher = np.random.default_rng(3).normal(size=(40, 16))
    collapsed = np.full((40, 16), 0.3)
    measured = measure_transfer(collapsed, teacher, np.arange(40))
    assert measured.retrieval_to_student == pytest.approx(1 / 40)
    assert measured.retrieval_to_teacher == pytest.approx(1 / 40)
    assert measured.variance_student == pytest.approx(0, abs=1e-12)
    assert measured.variance_teacher > 0.5


def test_zero_vectors_do_not_divide_by_zero():
    measured = measure_transfer(np.zeros((4, 3)), np.zeros((4, 3)), np.arange(4))
    assert (measured.mse, measured.cosine) == (0, 0)
    assert measured.retrieval_to_teacher == 0.25
