import pytest

from clseave_cli.core.training.loop import learning_rate_factor


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Ten steps, four of warm-up: quarters up, then what is worked out by hand.
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        (
            "cosine",
            [0.25, 0.5, 0.75, 1.0, 1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873],
        ),
    ],
)
def test_ten_steps_by_hand(schedule, expected):
    factors = [
        learning_rate_factor(step, total=10, warmup=4, schedule=schedule) for step in range(10)
    ]
    assert factors == pytest.approx(expected)


def test_without_warm_up_the_first_step_is_at_the_peak():
    assert learning_rate_factor(0, total=3, warmup=0, schedule="linear") == 1.0
    assert learning_rate_factor(2, total=3, warmup=0, schedule="linear") == pytest.approx(1 / 3)


def test_a_run_that_is_all_warm_up():
    factors = [learning_rate_factor(s, total=2, warmup=2, schedule="cosine") for s in range(2)]
    assert factors == [0.5, 1.0]
