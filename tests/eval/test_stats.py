"""Statistics against closed forms and a brute-force bootstrap."""

import math
import random
import statistics

import pytest

from longcot.eval.stats import clustered_standard_error, mean, quantile


def test_one_sample_per_question_is_the_usual_standard_error() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    clusters = {str(i): [value] for i, value in enumerate(values)}
    usual = statistics.stdev(values) / math.sqrt(len(values))
    assert clustered_standard_error(clusters) == pytest.approx(usual, rel=1e-12)


def test_of_a_share_it_is_the_binomial_form() -> None:
    # p = 30 / 100; sqrt(p (1 - p) / (n - 1))
    clusters = {str(i): [float(i < 30)] for i in range(100)}
    assert clustered_standard_error(clusters) == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_repeating_a_sample_adds_no_certainty() -> None:
    rng = random.Random(0)
    once = {str(i): [rng.random()] for i in range(50)}
    often = {key: values * 8 for key, values in once.items()}
    assert clustered_standard_error(often) == pytest.approx(clustered_standard_error(once))


def test_independent_samples_of_equal_questions_are_as_good_as_more_questions() -> None:
    rng = random.Random(0)
    errors = []
    for _ in range(300):
        draws = [float(rng.random() < 0.5) for _ in range(200)]
        clusters = {str(i): draws[4 * i : 4 * i + 4] for i in range(50)}
        errors.append(clustered_standard_error(clusters))
    assert mean(errors) == pytest.approx(math.sqrt(0.25 / 200), rel=0.03)


def test_clusters_of_unequal_size() -> None:
    # Mean 0.6, sums of deviations (-0.6, 0.8 - 0.6 ... ) written out by hand:
    # a: 0 - 0.6 = -0.6; b: (1 - 0.6) + (1 - 0.6) = 0.8; c: (1 - 0.6) + (0 - 0.6) = -0.2
    clusters = {"a": [0.0], "b": [1.0, 1.0], "c": [1.0, 0.0]}
    expected = math.sqrt((0.36 + 0.64 + 0.04) / 25 * 3 / 2)
    assert clustered_standard_error(clusters) == pytest.approx(expected)


@pytest.mark.parametrize("clusters", [{}, {"a": [1.0, 0.0]}])
def test_fewer_than_two_questions_have_none(clusters: dict[str, list[float]]) -> None:
    assert math.isnan(clustered_standard_error(clusters))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("num", [1, 2, 7, 100])
def test_quantile_is_numpys(num: int, share: float) -> None:
    import numpy

    values = [random.Random(i).random() for i in range(num)]
    assert quantile(values, share) == pytest.approx(float(numpy.quantile(values, share)))


def test_nothing_has_no_mean() -> None:
    assert math.isnan(mean([]))
    assert math.isnan(quantile([], 0.5))
