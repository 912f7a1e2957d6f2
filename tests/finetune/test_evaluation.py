"""Evaluation of each task: the same metrics on any number of ranks, every unit once, official metrics and files."""

import json
import shutil

import numpy as np
import pytest
import torch

from benchmarks.scale_data import write_version_3
from finetune.choose import Choose
from finetune.nlvr2 import Nlvr2
from finetune.snli_ve import SnliVe
from finetune.task import HeldOut, InputSettings
from finetune.vqa import Vqa
from tests.data.conftest import index_again, write_tar
from tests.data.test_identity import described
from tests.finetune.conftest import NLVR2, NUM_HYPOTHESES
from tests.finetune.evaluating import DS_CONFIG, evaluate
from tests.finetune.formats import check_vqa, choice_metrics, nlvr2_metrics, read_lines, snli_ve_metrics
from tests.spawn import run_ranks
from tests.tiny import tiny_config
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.formats.sugarcrepe import CATEGORIES
from unimo3.data.index import ShardIndex
from unimo3.data.loader import ReaderArgs
from unimo3.data.transforms import ImageTransform, normalize
from unimo3.distributed import World
from unimo3.errors import DataError
from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval, Unimo3ForVisualQuestionAnswering
from unimo3.model.pretrained import read_exported_config
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.training.evaluation import Unguarded


@pytest.fixture(scope="module")
def asked(vqa):
    return json.loads((vqa.parent / "source" / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]


@pytest.fixture(scope="module")
def evaluated(pretrained, vqa, nlvr2, snli_ve, choices, tmp_path_factory):
    """By number of ranks, each rank's metrics and files of every task."""
    folder = tmp_path_factory.mktemp("evaluated")
    made = {"vqa": vqa, "nlvr2": nlvr2, "snli_ve": snli_ve}
    for name, shards in (made | {name: choices / name for name in ("sugarcrepe", "winoground")}).items():
        (folder / name).symlink_to(shards)
    # Before any rank starts: one that reads it must not find what another has half written.
    ds_config = folder / "fp32.json"
    ds_config.write_text(json.dumps(DS_CONFIG))
    return {size: run_ranks(size, evaluate, pretrained, folder, ds_config) for size in (1, 2, 3)}


@pytest.mark.integration
def test_one_two_and_three_ranks_give_the_same_metrics_and_files(evaluated, asked):
    assert all(number % ranks for number in (len(asked), len(NLVR2), NUM_HYPOTHESES) for ranks in (2, 3))
    (alone,) = evaluated[1]
    assert set(alone) == {"vqa", "nlvr2", "snli_ve", "sugarcrepe", "winoground"}
    assert evaluated[2] == [alone] * 2
    assert evaluated[3] == [alone] * 3


@pytest.mark.integration
def test_predictions_differ_from_row_to_row(evaluated):
    (results,) = evaluated[1]
    assert len({entry["answer"] for entry in json.loads(results["vqa"][1]["predictions.json"])}) > 1
    assert len({line.split(",")[1] for line in results["nlvr2"][1]["predictions.csv"].splitlines()}) > 1
    lines = results["snli_ve"][1]["predictions.jsonl"].splitlines()
    assert len({json.loads(line)["gold_label"] for line in lines}) > 1


@pytest.mark.integration
def test_vqa_predictions_are_a_submission(evaluated, asked):
    check_vqa(evaluated[3][0]["vqa"][1]["predictions.json"], asked)


@pytest.mark.integration
def test_nlvr2_predictions_give_the_official_programs_metrics(evaluated, nlvr2):
    metrics, files = evaluated[3][0]["nlvr2"]
    examples = read_lines(nlvr2.parent / "source" / "dev.json")
    assert metrics == pytest.approx(nlvr2_metrics(files["predictions.csv"], examples))
    assert json.loads(files["accuracy.json"]) == metrics


@pytest.mark.integration
def test_snli_ve_predictions_give_the_metrics_of_each_class(evaluated, snli_ve):
    metrics, files = evaluated[3][0]["snli_ve"]
    examples = read_lines(snli_ve.parent / "source" / "snli_ve_dev.jsonl")
    expected = snli_ve_metrics(files["predictions.jsonl"], examples)
    assert len(expected) == 4
    assert json.loads(files["accuracy.json"]) == pytest.approx(expected)
    assert metrics == pytest.approx({f"accuracy_{group}": value for group, value in expected.items()})


@pytest.mark.integration
def test_choices_have_the_scores_of_pretrainings_heads(evaluated, pretrained, choices, tokenizer):
    model = Unimo3ForPreTraining.from_pretrained(pretrained).eval()
    source = choices.parent / "source"

    def scores(texts, files):
        pairs = [(file, text) for file in files for text in texts]
        text = tokenizer([text for _, text in pairs], padding="max_length", max_length=12, return_tensors="pt")
        pixels = [ImageTransform(16)((source / file).read_bytes(), np.random.default_rng(0)) for file, _ in pairs]
        with torch.no_grad():
            out = model(text["input_ids"], normalize(torch.tensor(np.stack(pixels))), text["attention_mask"])
        itc = out.logits_per_image.diagonal() * model.itc_head.temperature
        shape = (len(files), len(texts))
        return (out.matching_logits[:, 1] - out.matching_logits[:, 0]).reshape(shape), itc.reshape(shape)

    records = {
        f"{category}-{number}": ([record["caption"], record["negative_caption"]], [f"val2017/{record['filename']}"])
        for category in CATEGORIES
        for number, record in json.loads((source / f"{category}.json").read_text()).items()
    }
    for record in read_lines(source / "examples.jsonl"):
        files = [f"images/{record[f'image_{side}']}.png" for side in range(2)]
        records[str(record["id"])] = [record[f"caption_{side}"] for side in range(2)], files
    seen = set()
    for name in ("sugarcrepe", "winoground"):
        for line in evaluated[2][0][name][1]["predictions.jsonl"].splitlines():
            entry = json.loads(line)
            seen.add(entry["identifier"])
            for head, expected in zip(("itm", "itc"), scores(*records[entry["identifier"]]), strict=True):
                torch.testing.assert_close(torch.tensor(entry[head]), expected, rtol=1e-4, atol=1e-5)
    assert seen == records.keys()


@pytest.mark.integration
def test_choices_give_sugarcrepes_and_winogrounds_metrics_next_to_chance(evaluated, choices):
    for name, count in (("sugarcrepe", 13), ("winoground", 3)):
        metrics, files = evaluated[3][0][name]
        entries = [json.loads(line) for line in files["predictions.jsonl"].splitlines()]
        assert len({entry["identifier"] for entry in entries}) == len(entries) == count
        content = json.loads(files["accuracy.json"])
        assert content["examples"] == count
        for head in ("itm", "itc"):
            expected = choice_metrics(entries, head)
            assert {key: value for key, value in metrics.items() if key.startswith(head)} == pytest.approx(expected)
            for score in ("accuracy",) if name == "sugarcrepe" else ("text", "image", "group"):
                assert content[score][head]["overall"] == pytest.approx(expected[f"{head}_{score}"])
    assert content["group"]["chance"] == pytest.approx(
        {"overall": 1 / 6, "average": 1 / 6, **content["group"]["chance"]}
    )
    report = evaluated[3][0]["winoground"][1]["report.md"]
    assert "| group, Relation | 1 | " in report
    assert report.count("| 0.1667 |") == report.count("| group, ") == 4


@pytest.mark.integration
def test_choices_that_lack_examples_get_another_name(choices, pretrained, tokenizer, caplog):
    config = read_exported_config(str(pretrained))
    objective = Choose().objective(Unimo3ForImageAndTextRetrieval(config))
    objective.device = torch.device("cpu")
    index = ShardIndex(choices / "winoground" / "test")
    index._missing_ids = ["7"]
    reading = InputSettings(tokenizer, 12, ImageTransform(16), 0)
    results = Choose().evaluate(objective, HeldOut(index, reading, World(0, 0, 1), 2, ReaderArgs(0, 1)), Unguarded())
    assert results.files.keys() == {"predictions_incomplete.jsonl", "accuracy.json", "report.md"}
    assert "lacks 1 ids of its split, such as '7'" in caplog.text


def rows(*entries):
    return [dict(zip(("question_id", "answer", "groups", "accuracy"), entry, strict=True)) for entry in entries]


def test_questions_without_answers_give_predictions_and_no_accuracy():
    task = Vqa(AnswerVocabulary(["yes"]))
    results = task.results(rows((2, "yes", ("", ""), None), (1, "yes", ("", ""), None)))
    assert results.metrics == {}
    assert list(results.files) == ["predictions.json"]
    check_vqa(results.files["predictions.json"], [{"question_id": 1}, {"question_id": 2}])


def test_vqa_accuracy_is_over_all_and_of_each_answer_type_and_granularity():
    task = Vqa(AnswerVocabulary(["yes"]))
    kinds = ("yes/no", "fine"), ("other", "scene"), ("other", "fine")
    results = task.results(rows(*((i, "yes", kinds[i], accuracy) for i, accuracy in enumerate((1.0, 0.3, 0.6)))))
    expected = {"overall": 1.9 / 3, "yes/no": 1.0, "other": 0.45, "fine": 0.8, "scene": 0.3}
    assert results.metrics == pytest.approx({f"accuracy_{group}": value for group, value in expected.items()})


def test_a_sentence_is_consistent_if_all_its_pairs_are_right():
    def judged(*marks):
        return [{"identifier": name, "label": "True", "is_right": is_right} for name, is_right in marks]

    # Two sentences about the set 7 with two pairs each, one about the set 8.
    marks = (
        ("test1-7-0-0", True),
        ("test1-7-1-0", True),
        ("test1-7-0-1", True),
        ("test1-7-1-1", False),
        ("test1-8-0-0", True),
    )
    assert Nlvr2().results(judged(*marks)).metrics == {"accuracy": 0.8, "consistency": pytest.approx(2 / 3)}


def evaluate_vqa(folder, tokenizer, missing_ids=()):
    """Results of a model with random weights."""
    answers = AnswerVocabulary(["yes", "no"])
    text = tiny_config().text_config.to_dict() | {"vocab_size": 400}
    task = Vqa(answers)
    torch.manual_seed(0)
    objective = task.objective(Unimo3ForVisualQuestionAnswering(tiny_config(text_config=text, num_answers=2)))
    objective.device = torch.device("cpu")
    index = ShardIndex(folder)
    if missing_ids:
        index._missing_ids = list(missing_ids)
    reading = InputSettings(tokenizer, 12, ImageTransform(16), 0)
    return task.evaluate(objective, HeldOut(index, reading, World(0, 0, 1), 2, ReaderArgs(0, 1)), Unguarded())


def write_questions(folder, ids):
    """A test split of one question a sample."""
    contents = [{"questions": [{"question_id": identity, "question": "what?"}]} for identity in ids]
    write_tar(folder / "0.tar", [(str(number), described(number, content)) for number, content in enumerate(contents)])
    index_again(folder, split="test")


def test_predictions_that_lack_ids_get_another_name(vqa, tokenizer, asked, caplog):
    results = evaluate_vqa(vqa / "val", tokenizer)
    check_vqa(results.files["predictions.json"], asked)
    assert not caplog.text
    lacking = evaluate_vqa(vqa / "val", tokenizer, missing_ids=[901, 902])
    assert lacking.files == {
        "predictions_incomplete.json": results.files["predictions.json"],
        "accuracy.json": results.files["accuracy.json"],
    }
    assert "lacks 2 ids of its split, such as 901, 902" in caplog.text


def test_rejects_next_to_an_older_index_are_missing_ids(vqa, tmp_path):
    (tmp_path / "shards").mkdir()
    shutil.copytree(vqa / "val", tmp_path / "shards" / "val")
    path = tmp_path / "shards" / "val" / "index.json"
    content = json.loads(path.read_text())
    del content["missing_ids"]
    path.write_text(json.dumps(content))
    assert ShardIndex(path.parent).missing_ids == []
    rejects = [{"split": split, "key": split, "image": "a.jpg", "reason": "?"} for split in ("train", "val")]
    (tmp_path / "shards" / "rejects.jsonl").write_text("".join(json.dumps(reject) + "\n" for reject in rejects))
    assert ShardIndex(path.parent).missing_ids == ["val"]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((1, 2, 1), "1 question_id occurs more than once, such as 1"),
        (("a", "b", "b"), "1 question_id occurs more than once, such as 'b'"),
        ((5, 6, "5"), "1 question_id occurs more than once, such as 5"),
        (("a", "-7", -7), "1 question_id occurs more than once, such as '-7'"),
        ((1, None, 2), "sample 1#0: question_id is None; held-out questions need a number or a text"),
        ((1, [1], 2), r"sample 1#0: question_id is \[1\]; held-out questions need a number or a text"),
    ],
)
def test_a_question_without_an_id_is_refused(tokenizer, tmp_path, ids, expected):
    write_questions(tmp_path, ids)
    with pytest.raises(DataError, match=expected):
        evaluate_vqa(tmp_path, tokenizer)


def test_question_ids_of_both_types_are_one_file(tokenizer, tmp_path):
    write_questions(tmp_path, ("b", 2, 1))
    predicted = json.loads(evaluate_vqa(tmp_path, tokenizer).files["predictions.json"])
    assert [entry["question_id"] for entry in predicted] == [1, 2, "b"]


def test_repeated_statements_are_refused_and_hypotheses_are_not(tmp_path):
    shards = index_of_nothing(tmp_path)
    rows = [{"identifier": "dev-1-0-0", "pair_id": "a"}] * 2
    with pytest.raises(DataError, match="1 identifier occurs more than once, such as 'dev-1-0-0'"):
        Nlvr2()._check_ids(rows, shards)
    SnliVe()._check_ids(rows, shards)


def index_of_nothing(folder):
    write_tar(folder / "0.tar", [("0", described(0, {}))])
    index_again(folder)
    return ShardIndex(folder)


def test_held_out_shards_with_nothing_to_score_are_named(snli_ve, tokenizer, tmp_path):
    shutil.copytree(snli_ve / "val", tmp_path / "val")
    path = tmp_path / "val" / "index.json"
    content = json.loads(write_version_3(path.parent).read_text())
    for shard in content["shards"]:
        shard["num_items"] = dict.fromkeys(shard["num_items"], 0)
    path.write_text(json.dumps(content))
    reading = InputSettings(tokenizer, 12, ImageTransform(16), 0)
    held_out = HeldOut(ShardIndex(tmp_path / "val"), reading, World(0, 0, 1), 2, ReaderArgs(0, 1))
    with pytest.raises(DataError, match=r"data\.val: '.*val': contains no hypotheses to score; name other shards"):
        SnliVe().evaluate(None, held_out, Unguarded())
