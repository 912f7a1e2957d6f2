"""Official metrics; expected values are worked out by hand from the official rules and programs."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from unimo3.metrics.nlvr2 import pair_metrics, sentence_of
from unimo3.metrics.vqa import vqa_accuracy


def test_a_sentence_is_an_identifier_without_its_pair():
    assert sentence_of("test1-17-2-0") == sentence_of("test1-17-0-0") == "test1-17-0"
    assert sentence_of("test1-17-2-1") != sentence_of("test1-17-2-0")


@pytest.mark.parametrize(
    "identifier",
    [
        *("test1-17", "test1-17-0", "dev--0-1", "-17-0-1", "dev-17-0-", "dev-17-0-1 ", " dev-17-0-1", "dev-17-0-1\n"),
        *("dev-1,7-0-1", "dev-17-0-1\r", "dev-1\u20287-0-1", "dev-17-0-1\0", "dev-17-0-\ud83d"),
    ],
)
def test_identifiers_that_a_file_of_predictions_cannot_have(identifier):
    with pytest.raises(ValueError, match="split-set-pair-sentence expected, without commas, line ends and spaces"):
        sentence_of(identifier)


@pytest.mark.parametrize(
    ("marks", "accuracy", "consistency"),
    [
        ({"dev-0-0-0": True}, 1.0, 1.0),
        ({"dev-0-0-0": True, "dev-0-1-0": True, "dev-0-2-0": False}, 2 / 3, 0.0),
        ({"dev-0-0-0": False, "dev-0-1-0": True}, 0.5, 0.0),
        ({"dev-0-0-0": True, "dev-0-0-1": False}, 0.5, 0.5),
        # Of another set, or of another split, it is another sentence.
        ({"dev-0-0-0": False, "dev-1-0-0": True, "test1-0-0-0": True}, 2 / 3, 2 / 3),
    ],
)
def test_accuracy_is_over_examples_and_consistency_over_sentences(marks, accuracy, consistency):
    assert pair_metrics(marks.items()) == pytest.approx({"accuracy": accuracy, "consistency": consistency})


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["yes"] * 8 + ["no"] * 2, {"yes": 1.0, "no": 0.6, "maybe": 0.0}),
        (["red"] * 4 + ["blue"] * 3 + ["green"] * 3, {"red": 1.0, "blue": 0.9, "green": 0.9}),
        (["yes"] * 9 + ["no"], {"yes": 1.0, "no": 0.3}),
    ],
)
def test_an_answer_counts_by_how_many_of_ten_gave_it(answers, expected):
    for prediction, accuracy in expected.items():
        assert vqa_accuracy(prediction, answers) == pytest.approx(accuracy)


def test_accuracy_is_the_mean_over_every_nine_of_the_ten_answers():
    rng = np.random.default_rng(0)
    for _ in range(200):
        answers = rng.choice(["cat", "dog", "cow", "hen"], size=10, p=rng.dirichlet([0.6] * 4)).tolist()
        for prediction in ("cat", "dog", "cow", "hen"):
            nines = list(combinations(answers, 9))
            expected = sum(min(Fraction(1), Fraction(nine.count(prediction), 3)) for nine in nines) / len(nines)
            assert vqa_accuracy(prediction, answers) == pytest.approx(float(expected))


def test_answers_that_differ_are_compared_normalized():
    assert vqa_accuracy("Two", ["2"] * 9 + ["3"]) == 1.0
    assert vqa_accuracy("the cat", ["a cat"] * 9 + ["dog"]) == 1.0
    assert vqa_accuracy("dont know", ["don't know"] * 9 + ["no"]) == 1.0


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["yes"] * 8 + ["no"] * 2, {"yes": 1.0, "no": 0.6}),
        (["a cat"] * 4 + ["dog"] * 3 + ["cow"] * 3, {"cat": 1.0, "dog": 0.9, "cow": 0.9, "bird": 0.0}),
        (["one"] * 1 + ["2"] * 9, {"1": 0.3, "two": 1.0}),
    ],
)
def test_accuracy_by_the_official_rule(answers, expected):
    for prediction, accuracy in expected.items():
        assert vqa_accuracy(prediction, answers) == pytest.approx(accuracy)


def test_unanimous_answers_are_compared_without_normalization():
    assert vqa_accuracy("the cat", ["cat"] * 10) == 0.0
    assert vqa_accuracy("cat\n", ["cat"] * 10) == 1.0
