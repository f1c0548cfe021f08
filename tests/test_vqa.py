"""VQA accuracy against values worked out by hand from the published formula and examples of the published rules."""

import pytest

from vlmq.exporter.evaluation.vqa import accuracy, by_answer_type, normalise


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("A Red Dog.", "red dog"),
        ("the theatre", "theatre"),
        ("two", "2"),
        ("Ten", "10"),
        ("none", "0"),
        ("2.5", "2.5"),
        ("3.", "3"),
        ("1,000", "1000"),
        ("cats, dogs", "cats dogs"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("really?!", "really"),
        ("10:30", "10:30"),
        ("it's", "it's"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("twas an oclock", "'twas o'clock"),
        (" yes\n", "yes"),
    ],
)
def test_an_answer_is_normalised_as_the_published_rules_say(answer, normal):
    assert normalise(answer) == normal


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_an_answer_counts_by_how_many_of_ten_annotators_gave_it(agreeing, expected):
    # Three agree: leaving out one of them 2/3, leaving out one of the other seven 1; (3 * 2/3 + 7) / 10 = 0.9.
    annotated = ["red"] * agreeing + [f"blue{number}" for number in range(10 - agreeing)]
    assert accuracy("Red.", annotated) == pytest.approx(expected)


def test_both_the_answer_and_the_annotations_are_normalised():
    assert accuracy("2", ["two"] * 10) == 1.0
    assert accuracy("the dont", ["dont"] * 5 + ["don't"] * 5) == 1.0


def test_with_one_known_answer_it_is_right_or_wrong():
    assert accuracy("a dog", ["Dog"]) == 1.0
    assert accuracy("cat", ["Dog"]) == 0.0


def test_an_empty_answer_is_wrong():
    assert accuracy("", ["yes"] * 10) == 0.0


def test_questions_are_grouped_by_answer_type_in_the_order_of_the_published_table():
    assert by_answer_type(["other", "yes/no", "unusual", "other", None]) == {
        "overall": [0, 1, 2, 3, 4],
        "yes/no": [1],
        "other": [0, 3],
        "unusual": [2],
    }
    assert list(by_answer_type(["other", "yes/no"])) == ["overall", "yes/no", "other"]
