"""finetune.predict: the answers of the run's evaluation, searches, files of many."""

import io
import json
import shutil
import subprocess
import sys

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from pretrain import export
from tests.data.conftest import draw_jpeg
from tests.data.mutations import mutated, property_settings
from tests.finetune.formats import read_lines
from tests.finetune.predicting import answers_to, image_of, run, scores_of, unpack
from tests.spawn import ROOT
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.xdist_group("finetune")


def test_vqa_answers_are_those_of_the_runs_predictions(tuned, vqa, tmp_path):
    entries = [
        {"image": image_of(tmp_path, key), "text": question["question"], "id": question["question_id"]}
        for key, sample in unpack(vqa / "val", tmp_path).items()
        for question in sample["questions"]
    ]
    records = answers_to("vqa", tuned, tmp_path, entries, "--batch", "4")
    expected = {
        entry["question_id"]: entry["answer"] for entry in json.loads((tuned / "vqa/predictions.json").read_text())
    }
    assert {record["input"]["id"]: record["answers"][0]["answer"] for record in records} == expected
    assert [record["line"] for record in records] == list(range(1, len(expected) + 1))


def test_nlvr2_answers_are_those_of_the_runs_predictions(tuned, nlvr2, tmp_path):
    entries = [
        {
            "image": [image_of(tmp_path, f"{key}.{side}") for side in range(2)],
            "text": sample["statement"],
            "id": sample["identifier"],
        }
        for key, sample in unpack(nlvr2 / "val", tmp_path).items()
    ]
    records = answers_to("nlvr2", tuned, tmp_path, entries, "--batch", "4")
    lines = (tuned / "nlvr2" / "predictions.csv").read_text().splitlines()
    assert {record["input"]["id"]: record["answers"][0]["answer"] for record in records} == dict(
        line.split(",") for line in lines
    )


def test_snli_ve_answers_are_those_of_the_runs_predictions(tuned, snli_ve, tmp_path):
    entries = [
        {"image": image_of(tmp_path, key), "text": hypothesis["text"], "id": hypothesis["pair_id"]}
        for key, sample in unpack(snli_ve / "val", tmp_path).items()
        for hypothesis in sample["hypotheses"]
    ]
    records = answers_to("snli_ve", tuned, tmp_path, entries, "--batch", "4")
    expected = {entry["pairID"]: entry["gold_label"] for entry in read_lines(tuned / "snli_ve" / "predictions.jsonl")}
    assert {record["input"]["id"]: record["answers"][0]["answer"] for record in records} == expected
    assert all(sum(answer["score"] for answer in record["answers"]) == pytest.approx(1) for record in records)


@pytest.fixture(scope="module")
def searched(tuned, coco, tmp_path_factory):
    """The held-out images in a folder with an index, and an index of all their captions."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "images").mkdir()
    samples = unpack(coco / "val", folder / "images")
    texts = [(key, caption) for key, sample in samples.items() for caption in sample["captions"]]
    (folder / "texts.txt").write_text("".join(f"{caption}\n" for _, caption in texts))
    common = ("index", "--weights", tuned / "retrieval_weights", "--batch", 4)
    assert run(*common, "--images", folder / "images", "--out", folder / "of_images") == 0
    assert run(*common, "--texts", folder / "texts.txt", "--out", folder / "of_texts") == 0
    return folder, texts


def test_a_search_ranks_images_as_the_runs_evaluation_does(tuned, searched, tmp_path):
    folder, texts = searched
    entries = [{"text": caption, "id": key} for key, caption in texts]
    records = answers_to("retrieval", tuned, tmp_path, entries, "--index", folder / "of_images", "--rerank", 99)
    ranks = []
    for record in records:
        names = [answer["image"].rpartition("/")[2].partition(".")[0] for answer in record["answers"]]
        ranks.append(names.index(record["input"]["id"]))
    recall = json.loads((tuned / "retrieval" / "recall.json").read_text())
    assert len(records[0]["answers"]) > 2
    for k in (1, 5, 10):
        assert sum(rank < k for rank in ranks) / len(ranks) == pytest.approx(recall[f"ir_at_{k}"])


def test_an_image_retrieves_texts_and_a_pair_has_the_searchs_metrics(tuned, searched, capsys):
    folder, _ = searched
    image = sorted((folder / "images").iterdir())[0]
    weights = ("--weights", tuned / "retrieval_weights", "--json")
    assert run("retrieval", *weights, "--index", folder / "of_texts", "--image", image, "--top", 3) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert len(answers) == 3
    assert [answer["match"] for answer in answers] == sorted((answer["match"] for answer in answers), reverse=True)
    assert run("retrieval", *weights, "--image", image, "--text", answers[1]["text"]) == 0
    (pair,) = json.loads(capsys.readouterr().out)["answers"]
    assert pair == pytest.approx({name: answers[1][name] for name in ("match", "similarity")}, abs=1e-5)


LINES = {
    "vqa": {"image": "photo.jpg", "text": "is it a dog?", "id": 1},
    "snli_ve": {"image": "photo.jpg", "text": "a dog", "id": [1]},
    "nlvr2": {"image": ["photo.jpg", "photo.jpg"], "text": "both show dogs"},
    "retrieval": {"text": "a dog"},
}


@settings(property_settings, max_examples=6, phases=[Phase.generate])
@given(data=st.data())
@pytest.mark.parametrize("task", LINES)
def test_any_lines_are_answered_or_have_their_errors(tuned, searched, tmp_path_factory, capsys, task, data):
    folder = tmp_path_factory.getbasetemp() / "lines"
    folder.mkdir(exist_ok=True)
    (folder / "photo.jpg").write_bytes(draw_jpeg(5))
    lines = [json.dumps(LINES[task])] + [json.dumps(data.draw(mutated(LINES[task]))) for _ in range(6)]
    lines.append(lines[0][: data.draw(st.integers(1, len(lines[0])))])
    (folder / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "out.jsonl").unlink(missing_ok=True)
    index = ("--index", searched[0] / "of_images") if task == "retrieval" else ()
    options = ("--input", folder / "in.jsonl", "--output", folder / "out.jsonl", "--batch", 3)
    status = run(task, "--weights", tuned / f"{task}_weights", *index, *options)
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    records = read_lines(folder / "out.jsonl")
    assert [record["line"] for record in records] == list(range(1, len(lines) + 1))
    errors = [record for record in records if "answers" not in record]
    assert "answers" in records[0]
    assert all(record["error"] for record in errors)
    assert status == (78 if errors else 0)
    assert (f"{len(errors)} of {len(records)} lines were not answered" in printed) == bool(errors)


def test_without_reranking_the_towers_alone_order(tuned, searched, capsys):
    folder, texts = searched
    weights = ("--weights", tuned / "retrieval_weights", "--json")
    options = ("--index", folder / "of_images", "--text", texts[0][1], "--rerank", 0)
    assert run("retrieval", *weights, *options) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert {answer["match"] for answer in answers} == {None}
    similarities = [answer["similarity"] for answer in answers]
    assert similarities == sorted(similarities, reverse=True)
    assert len(set(similarities)) > 1


def test_several_images_are_ranked_for_a_text(tuned, searched, capsys):
    folder, texts = searched
    images = [part for image in sorted((folder / "images").iterdir())[:2] for part in ("--image", image)]
    assert run("retrieval", "--weights", tuned / "retrieval_weights", *images, "--text", texts[0][1], "--json") == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert {answer["image"] for answer in answers} == {str(images[1]), str(images[3])}
    assert answers[0]["match"] >= answers[1]["match"]


def test_an_index_of_other_weights_or_the_wrong_query_is_refused(tuned, searched, photo, tmp_path, capsys):
    folder, _ = searched
    other = tmp_path / "other"
    shutil.copytree(tuned / "retrieval_weights", other)
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {"itc_head.text.bias": tensors["itc_head.text.bias"] + 1}, other / "model.safetensors")
    assert run("retrieval", "--weights", other, "--index", folder / "of_images", "--text", "a dog") == 78
    assert f"--index {folder / 'of_images'}: was made by other weights" in capsys.readouterr().err
    weights = ("--weights", tuned / "retrieval_weights")
    assert run("retrieval", *weights, "--index", folder / "of_images", "--image", photo) == 78
    assert "contains images, which a text searches" in capsys.readouterr().err


def test_an_undecodable_image_is_named_and_the_others_are_indexed(tuned, photo, tmp_path, capsys):
    (tmp_path / "a_bad.jpg").write_bytes(b"no image")
    command = ("index", "--weights", tuned / "retrieval_weights", "--images", tmp_path, "--out", tmp_path / "index")
    assert run(*command) == 78
    assert "1 of 2 files could not be decoded" in capsys.readouterr().err
    assert json.loads((tmp_path / "index" / "index.json").read_text())["names"] == ["photo.jpg"]
    assert run(*command) == 78
    assert f"--out {tmp_path / 'index'}: exists" in capsys.readouterr().err
    photo.unlink()
    search = ("retrieval", "--weights", tuned / "retrieval_weights", "--index", tmp_path / "index", "--text", "a dog")
    assert run(*search) == 78
    assert "photo.jpg: cannot be read" in (printed := capsys.readouterr().err)
    assert "it is in the index: put it back, or make the index again" in printed
    assert run(*search, "--rerank", 0) == 0  # reads no image
    (tmp_path / "index").rename(tmp_path / "moved")
    assert run(*search) == 78
    assert f"--index {tmp_path / 'index'}: no such folder; make one with" in capsys.readouterr().err


def test_a_bad_line_is_named_by_its_number_and_the_others_are_answered(tuned, photo, tmp_path, capsys):
    good = {"image": "photo.jpg", "text": "is it?"}
    (tmp_path / "no.jpg").write_bytes(b"no image")
    bad = [
        "{",
        "[1]",
        {"image": "photo.jpg"},
        good | {"text": " "},
        good | {"image": "gone.jpg"},
        good | {"image": "no.jpg"},
        good | {"image": ["a", "b"]},
    ]
    lines = [good, *bad, "", good]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    out.write_text("of before\n")
    assert run("vqa", "--weights", tuned / "vqa_weights", "--input", source, "--output", out, "--batch", 3) == 78
    records = read_lines(out)
    assert [record["line"] for record in records] == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert scores_of(records[0]) == pytest.approx(scores_of(records[-1]), abs=1e-5)
    printed = capsys.readouterr().err
    assert f"{source}: 7 of 9 lines were not answered; {out} has the others" in printed
    reasons = (
        "is no JSON",
        "is a list",
        'has no "text"',
        "is empty",
        "gone.jpg: cannot be read",
        "no image of a known kind",
        "a path is needed",
    )
    for record, reason in zip(records[1:-1], reasons, strict=True):
        assert reason in record["error"]
        assert f"line {record['line']}: {record['error']}" in printed
    assert list(tmp_path.glob("*.partial")) == []


def test_top_answers_are_printed_with_their_scores(tuned, photo, capsys):
    command = ("vqa", "--weights", tuned / "vqa_weights", "--image", photo, "--text", "is it?", "--top", 2)
    assert run(*command) == 0
    printed = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert run(*command, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["input"] == {"image": [str(photo)], "text": ["is it?"]}
    assert printed == [[f"{answer['score']:.4f}", answer["answer"]] for answer in record["answers"]]
    assert len(printed) == 2


def test_an_answer_does_not_depend_on_its_batch_or_on_a_phones_orientation(tuned, tmp_path):
    pixels = Image.open(io.BytesIO(draw_jpeg(1)))
    turned, exif = pixels.rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    pixels.save(tmp_path / "upright.png")
    turned.save(tmp_path / "turned.png", exif=exif)
    entries = [{"image": name, "text": "is it?"} for name in ("upright.png", "turned.png")]
    entries.append({"image": "upright.png", "text": "is it a dog or is it a picture?"})
    one, two = (answers_to("vqa", tuned, tmp_path, entries, "--batch", size)[:2] for size in (1, 3))
    assert scores_of(one[0]) == pytest.approx(scores_of(one[1]), abs=1e-5)
    assert scores_of(one[0]) == pytest.approx(scores_of(two[0]), abs=1e-5)


def test_fp16_weights_on_a_cpu_run_in_fp32_with_a_notice_or_in_bf16(tuned, photo, tmp_path, capsys, caplog):
    half = tmp_path / "half"
    with pytest.raises(SystemExit) as end:
        export.main([str(tuned / "vqa"), "--out", str(half), "--dtype", "fp16"])
    assert not end.value.code
    capsys.readouterr()
    command = ("vqa", "--weights", half, "--image", photo, "--text", "is it?", "--json", "--device", "cpu")
    scores = []
    for options in ((), ("--dtype", "fp32"), ("--dtype", "bf16")):
        caplog.clear()
        assert run(*command, *options) == 0
        scores.append(json.loads(capsys.readouterr().out)["answers"][0]["score"])
        assert ("the weights are fp16, which a CPU does not compute in: using fp32" in caplog.text) == (not options)
    assert scores[0] == scores[1] != scores[2]
    assert run(*command, "--dtype", "fp16") == 78
    assert "--dtype fp16: not supported on a CPU; use fp32, or bf16" in capsys.readouterr().err


@pytest.mark.integration
def test_the_program_runs_without_deepspeed_or_a_process_group(tuned, photo):
    code = (
        "import sys; from finetune import predict\n"
        "try: predict.main(sys.argv[1:])\n"
        "finally: import torch; assert 'deepspeed' not in sys.modules and not torch.distributed.is_initialized()"
    )
    arguments = ["vqa", "--weights", tuned / "vqa_weights", "--image", photo, "--text", "is it?", "--top", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""
