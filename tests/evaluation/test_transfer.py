import numpy as np
import pytest

from clseave_cli.core.evaluation import transfer
from clseave_cli.core.evaluation.transfer import measure_transfer


def test_distances_worked_by_hand():
    student = [[1.0, 0.0], [0.0, 2.0]]
    teacher = [[1.0, 1.0], [0.0, -1.0]]
    measured = measure_transfer(student, teacher, ["a", "b"])
    # Errors 0, −1, 0, 3: squares 10 over 4 numbers; absolutes 4 over 4.
    assert (measured.mse, measured.mse_sum) == (2.5, 5.0)
    assert (measured.mae, measured.mae_sum) == (1.0, 2.0)
    assert measured.cosine == pytest.approx((np.sqrt(0.5) - 1) / 2)
    # Over sentences: variances 0.25 and 1 (student), 0.25 and 1 (teacher).
    assert measured.variance_student == measured.variance_teacher == pytest.approx(0.625)


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
    monkeypatch.setattr(transfer, "_SIMILARITIES_AT_ONCE", 130)
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


@pytest.mark.parametrize(
    ("student", "teacher", "sentences"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4)), ["a", "b"]),
        (np.zeros((0, 3)), np.zeros((0, 3)), []),
        (np.zeros((2, 3)), np.zeros((2, 3)), ["a"]),
    ],
)
def test_refuses_embeddings_that_do_not_match(student, teacher, sentences):
    with pytest.raises(ValueError, match="need"):
        measure_transfer(student, teacher, sentences)
