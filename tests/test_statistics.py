"""The bootstrap interval against cases whose answer is known in closed form."""

import math
import subprocess
import sys

import numpy as np
import pytest

from vlmq.exporter.evaluation.statistics import paired_difference


def test_many_independent_questions_give_the_interval_of_the_normal_distribution():
    generator = np.random.default_rng(1)
    first = generator.integers(0, 2, 2000)
    second = np.where(generator.random(2000) < 0.1, 1 - first, first)
    found = paired_difference(first, second, range(2000))
    difference = 100.0 * (second - first)
    half = 1.959964 * difference.std() / math.sqrt(2000)
    assert found.points == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(difference.mean() + half, abs=0.06 * half)


def test_two_images_resample_to_one_or_the_other_or_both():
    # Means 0, 50 and 100 with probabilities 1/4, 1/2, 1/4: the 2.5 and 97.5 percentiles are the ends.
    found = paired_difference([0, 0], [0, 1], ["one", "two"])
    assert (found.points, found.low, found.high) == (50.0, 0.0, 100.0)


def test_asking_every_question_of_an_image_twice_makes_nothing_surer():
    first, second = np.arange(60) % 2, np.arange(60) % 3 == 0
    once = paired_difference(first, second, range(60))
    twice = paired_difference(np.tile(first, 2), np.tile(second, 2), [*range(60), *range(60)])
    assert (twice.points, twice.low, twice.high) == pytest.approx((once.points, once.low, once.high))
    assert (twice.samples, twice.clusters) == (120, 60)


def test_images_with_more_questions_weigh_more_in_the_difference():
    assert paired_difference([0, 0, 0, 0], [1, 1, 1, 0], ["a", "a", "a", "b"]).points == 75.0


def test_two_models_with_the_same_answers_do_not_differ_and_surely_so():
    found = paired_difference([1, 0, 1], [1, 0, 1], [1, 2, 3])
    assert (found.points, found.low, found.high) == (0.0, 0.0, 0.0)


def test_one_image_says_nothing_about_others():
    found = paired_difference([0, 1], [1, 1], ["a", "a"])
    assert (found.points, found.low, found.high) == (50.0, -100.0, 100.0)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        paired_difference([], [], [])


def test_the_interval_is_the_same_in_every_process():
    # Hashes of strings differ between processes; the interval of images named by strings must not.
    program = (
        "from vlmq.exporter.evaluation.statistics import paired_difference as p; "
        "print(p([0, 1, 0, 1, 1], [1, 1, 0, 0, 1], list('abcde')))"
    )
    one, two = (
        subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True)
        for seed in ("1", "2")
    )
    assert one.stdout == two.stdout
