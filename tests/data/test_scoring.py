"""NLVR2's metrics against a run of the official program's steps by hand."""

import pytest

from unimo3.data.scoring import pair_metrics, sentence_of


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
