"""Names of prediction files: one for each split, whatever is evaluated after."""

import json

import pytest

from finetune.results import write_files
from finetune.vqa import Vqa
from unimo3.data.answers import AnswerVocabulary
from unimo3.errors import CheckpointError

FILES = {"predictions.json": "[]", "accuracy.json": "{}"}


def record(folder, step, split, data):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"group": "eval", "step": step, "split": split, "data": data}) + "\n")


def test_each_split_has_separate_files_and_val_the_plain_names(tmp_path):
    write_files(tmp_path, FILES, "val", "aaaaaaaaaa")
    write_files(tmp_path, {"predictions.json": "[1]"}, "test-dev", "bbbbbbbbbb")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "predictions.json": "[]",
        "accuracy.json": "{}",
        "predictions_test-dev.json": "[1]",
    }


def test_other_shards_of_a_splits_name_do_not_overwrite_the_first(tmp_path):
    write_files(tmp_path, FILES, "val", "aaaaaaaaaa")
    record(tmp_path, 3, "val", "aaaaaaaaaa")
    write_files(tmp_path, {"predictions.json": "[2]"}, "val", "cccccccccc")
    record(tmp_path, 3, "val", "cccccccccc")
    assert (tmp_path / "predictions.json").read_text() == "[]"
    assert (tmp_path / "predictions_val_cccccccc.json").read_text() == "[2]"
    # The first's name stays the first's.
    write_files(tmp_path, {"predictions.json": "[3]"}, "val", "aaaaaaaaaa")
    assert (tmp_path / "predictions.json").read_text() == "[3]"


def test_results_on_a_full_disk_are_one_error_with_the_files_name(tmp_path):
    (tmp_path / "accuracy.json.tmp").symlink_to("/dev/full")
    expected = (
        rf"writing the results for val failed .*No space left on device: '{tmp_path}/accuracy.json'\); check space"
    )
    with pytest.raises(CheckpointError, match=expected):
        write_files(tmp_path, FILES, "val", "aaaaaaaaaa")
    assert not (tmp_path / "accuracy.json").exists()


def test_predictions_may_contain_half_a_surrogate_pair(tmp_path):
    write_files(tmp_path, {"predictions.csv": "a-\ud83d-0-0,True\n"}, "val", "aaaaaaaaaa")
    assert (tmp_path / "predictions.csv").read_text(encoding="utf-8") == "a-?-0-0,True\n"


def test_questions_without_answers_are_counted_in_the_log(caplog):
    answered = {"question_id": 1, "answer": "a", "groups": ("", ""), "accuracy": 1.0}
    rows = [answered, answered | {"question_id": 2, "accuracy": None}]
    results = Vqa(AnswerVocabulary(["a"])).results(rows)
    assert results.metrics == {"accuracy_overall": 1.0}
    assert "1 of 2 questions have no answers: the accuracies are of the others" in caplog.text
    caplog.clear()
    Vqa(AnswerVocabulary(["a"])).results([answered])
    assert not caplog.text
