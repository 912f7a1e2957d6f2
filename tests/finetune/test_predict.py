"""finetune.predict: the answers of the run's evaluation, searches, files of many, and one clear error each."""

import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune import predict
from finetune.vqa import VqaConfig
from pretrain import export
from tests.data.conftest import draw_jpeg
from tests.data.mutations import mutated, property_settings
from tests.finetune.formats import read_lines
from tests.spawn import ROOT
from tests.waiting import PATIENCE_S
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.args import DataArgs

pytestmark = pytest.mark.xdist_group("finetune")


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        predict.main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def members(shards):
    """Contents of a split's tars, by name."""
    contents = {}
    for tar in sorted(shards.glob("*.tar")):
        with tarfile.open(tar) as archive:
            contents |= {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
    return contents


def unpack(shards, folder):
    """Write a split's images into a folder; return the JSON of its samples, by key."""
    samples = {}
    for name, content in members(shards).items():
        key, _, ending = name.partition(".")
        if ending == "json":
            samples[key] = json.loads(content)
        elif ending.rpartition(".")[2] in ("jpg", "png"):
            (folder / name).write_bytes(content)
    return samples


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def answers_to(task, tuned, folder, entries, *options):
    """Run predict on a file of these lines."""
    source = write_lines(folder / "in.jsonl", entries)
    weights = tuned / f"{task}_weights"
    assert run(task, "--weights", weights, "--input", source, "--output", folder / "out.jsonl", *options) == 0
    return read_lines(folder / "out.jsonl")


def scores_of(record):
    return {answer["answer"]: answer["score"] for answer in record["answers"]}


def image_of(folder, key):
    (path,) = folder.glob(f"{key}.*")
    return path.name


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(draw_jpeg(5))
    return path


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
    assert "--dtype fp16: is not computed in on a CPU; use fp32, or bf16" in capsys.readouterr().err


def broken(tuned, tmp_path, **changes):
    """VQA's export with another file in it."""
    folder = tmp_path / "broken"
    shutil.copytree(tuned / "vqa_weights", folder)
    (folder / "export_report.json").unlink()  # which shows any change of a file
    for name, content in changes.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    return folder


def refused(weights, photo, capsys, *options, task="vqa", text="is it?"):
    """What is printed of a command that ends with status 78."""
    assert run(task, "--weights", weights, "--image", photo, "--text", text, *options) == 78
    return capsys.readouterr().err


def test_weights_of_another_task_are_named(tuned, pretrained, photo, capsys):
    for weights, kind in (("vqa_weights", "Unimo3ForVisualQuestionAnswering"), (pretrained, "Unimo3ForPreTraining")):
        printed = refused(tuned / weights, photo, capsys, task="snli_ve")
        assert f"contains weights of {kind}, Unimo3ForImageTextClassification is needed" in printed
        assert printed.count("  - ") == 1


def test_pretrainings_weights_retrieve(pretrained, photo):
    assert run("retrieval", "--weights", pretrained, "--image", photo, "--text", "a dog") == 0


def test_a_folder_without_weights_is_named(tmp_path, photo, capsys):
    assert f"--weights: '{tmp_path}': no config.json there" in refused(tmp_path, photo, capsys)


def test_a_run_given_as_weights_and_a_missing_folder_are_named(tuned, photo, tmp_path, capsys):
    assert f"--weights '{tuned / 'vqa'}': is a run; name what python -m pretrain.export" in refused(
        tuned / "vqa", photo, capsys
    )
    source = write_lines(tmp_path / "in.jsonl", [{"image": str(photo), "text": "is it?"}])
    target = tmp_path / "gone" / "out.jsonl"
    assert run("vqa", "--weights", tuned / "vqa_weights", "--input", source, "--output", target) == 78
    assert f"--output {target}: its folder is not there" in capsys.readouterr().err


def test_only_a_plain_file_is_replaced_by_the_output_and_a_link_stays(tuned, photo, tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", [{"image": str(photo), "text": "is it?"}])
    common = ("vqa", "--weights", tuned / "vqa_weights", "--input", source, "--output")
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", tmp_path, "/dev/null"):
        assert run(*common, target) == 78
        assert f"--output {target}: is no plain file" in capsys.readouterr().err
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "link").symlink_to(tmp_path / "out.jsonl")
    for _ in range(2):
        assert run(*common, tmp_path / "link") == 0
        assert (tmp_path / "link").is_symlink()
        assert len(read_lines(tmp_path / "out.jsonl")) == 1


def test_a_missing_image_one_that_is_none_and_an_empty_text_are_named(tuned, photo, capsys):
    weights = tuned / "vqa_weights"
    printed = refused(weights, photo.with_name("gone.jpg"), capsys)
    assert printed.endswith("gone.jpg: cannot be read (No such file or directory); name an image file\n")
    photo.write_bytes(b"no image")
    assert "photo.jpg: cannot be decoded (it is no image of a known kind)" in refused(weights, photo, capsys)
    assert "DataError: --text: '  ': is empty" in refused(weights, photo, capsys, text="  ")


def test_a_processor_of_another_make_or_none_is_named(tuned, photo, tmp_path, capsys):
    folder = broken(tuned, tmp_path)
    path = folder / "processor_config.json"
    content = json.loads(path.read_text())
    changes = {
        "size": ({"height": 32, "width": 32}, "makes 32 x 32 pixels, its config.json has the model read 16 x 16"),
        "do_normalize": (False, "has do_normalize False, training had True; export the run again"),
        "resample": (2, "has resample 2, training had 3; export the run again"),
        "image_mean": ([0.5, 0.5, 0.5], "has image_mean (0.5, 0.5, 0.5), training had (0.4"),
    }
    for name, (value, message) in changes.items():
        path.write_text(json.dumps(content | {"image_processor": content["image_processor"] | {name: value}}))
        assert f"its image processor {message}" in refused(folder, photo, capsys)
    path.unlink()
    assert "contains no tokenizer and image processor" in refused(folder, photo, capsys)


def test_answers_of_another_number_than_the_head_are_named(tuned, photo, tmp_path, capsys):
    folder = broken(tuned, tmp_path)
    AnswerVocabulary(["yes"]).save(folder / "answers.json")
    assert "answers.json lists 1 answers, the model scores" in refused(folder, photo, capsys)
    (folder / "answers.json").unlink()
    assert "answers.json cannot be read" in refused(folder, photo, capsys)


def test_weights_that_lack_the_head_are_named(tuned, photo, tmp_path, capsys):
    folder = broken(tuned, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith("vqa_head.")}
    save_file(others, folder / "model.safetensors", metadata={"format": "pt"})
    assert "do not fit Unimo3ForVisualQuestionAnswering; missing: vqa_head." in refused(folder, photo, capsys)


def test_no_code_of_a_folder_is_run(tuned, photo, tmp_path, capsys):
    folder = broken(tuned, tmp_path, config={"model_type": "other", "auto_map": {"AutoConfig": "code.Other"}})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    torch.save({}, folder / "pytorch_model.bin")
    assert run("vqa", "--weights", folder, "--image", photo, "--text", "is it?") == 78
    printed = capsys.readouterr()
    assert "custom code" in printed.err
    assert printed.out == ""  # nobody is asked whether to run it
    (folder / "config.json").write_text((tuned / "vqa_weights" / "config.json").read_text())
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors there" in refused(folder, photo, capsys)
    assert not (tmp_path / "ran").exists()


def test_impossible_settings_are_reported_in_one_message(tuned, photo, capsys):
    printed = refused(tuned / "vqa_weights", photo, capsys, "--image", photo, "--batch", 0, "--output", "x")
    for problem in ("--batch 0: at least 1", "--image: given 2 times; vqa takes 1", "--output x: is for --input"):
        assert problem in printed
    assert "this machine has" in refused(tuned / "vqa_weights", photo, capsys, "--device", "cuda:7")


def test_options_that_would_do_nothing_are_refused(tuned, photo, tmp_path, capsys):
    printed = refused(tuned / "retrieval_weights", photo, capsys, "--rerank", 3, task="retrieval", text="a dog")
    assert "--rerank 3: is for --index" in printed
    source = write_lines(tmp_path / "in.jsonl", [{"image": str(photo), "text": "is it?"}])
    weights = tuned / "vqa_weights"
    assert run("vqa", "--weights", weights, "--input", source, "--output", tmp_path / "out", "--json") == 78
    assert "--json: --output is JSON lines in any case; leave it out" in capsys.readouterr().err


def test_a_file_without_a_line_leaves_earlier_answers(tuned, tmp_path, capsys):
    source, target = write_lines(tmp_path / "in.jsonl", []), tmp_path / "out.jsonl"
    target.write_text("kept")
    assert run("vqa", "--weights", tuned / "vqa_weights", "--input", source, "--output", target) == 78
    assert f"--input {source}: contains no line; write one object a line" in capsys.readouterr().err
    assert target.read_text() == "kept"


def test_only_line_feeds_separate_texts_and_byte_order_marks_are_dropped(tuned, tmp_path, capsys):
    lines = "\ufeffa dog\x0bthat sleeps\r\ntwo\u2028dogs\n\n\ufeff \n \ufeffa cat\n"
    (tmp_path / "texts").write_text(lines, encoding="utf-8", newline="")
    weights = tuned / "retrieval_weights"
    assert run("index", "--weights", weights, "--texts", tmp_path / "texts", "--out", tmp_path / "index") == 0
    assert "3 texts" in capsys.readouterr().out
    names = json.loads((tmp_path / "index" / "index.json").read_text())["names"]
    assert names == ["a dog\x0bthat sleeps", "two\u2028dogs", "a cat"]


@pytest.mark.parametrize(("encoding", "text"), [("utf-16", "a cat"), ("utf-16-le", "a cat"), ("latin-1", "déjà vu")])
def test_texts_of_another_encoding_are_refused(tuned, tmp_path, capsys, encoding, text):
    (tmp_path / "texts").write_bytes(f"{text}\na dog\n".encode(encoding))
    command = ("index", "--weights", tuned / "retrieval_weights", "--texts", tmp_path / "texts")
    assert run(*command, "--out", tmp_path / "index") == 78
    assert re.search(
        r"texts: (cannot be read .*name a UTF-8 file|has zero bytes.*save it as UTF-8)", capsys.readouterr().err
    )


def test_skipped_files_are_named_and_images_are_detected_by_content(tuned, photo, tmp_path, caplog):
    (tmp_path / "images").mkdir()
    for name in ("a.jfif", "b", "c.heic"):
        (tmp_path / "images" / name).write_bytes(photo.read_bytes())
    for number in range(12):
        (tmp_path / "images" / f"notes{number:02d}.txt").write_text("no image")
    command = ("index", "--weights", tuned / "retrieval_weights", "--images", tmp_path / "images")
    assert run(*command, "--out", tmp_path / "index") == 0
    assert json.loads((tmp_path / "index" / "index.json").read_text())["names"] == ["a.jfif", "b", "c.heic"]
    assert "skipped 12 files that are no images:\n  notes00.txt" in caplog.text
    assert "notes09.txt\n  and 2 more" in caplog.text


def test_a_tokenizer_that_pads_and_cuts_on_the_left_is_used_on_the_right(tuned, tmp_path):
    long = " ".join(["is it a dog"] * 20)
    (tmp_path / "photo.jpg").write_bytes(draw_jpeg(1))
    entries = [{"image": "photo.jpg", "text": text} for text in ("is it?", f"how many {long}")]
    expected = answers_to("vqa", tuned, tmp_path, entries)
    left = broken(tuned, tmp_path, tokenizer_config={"padding_side": "left", "truncation_side": "left"})
    for size in (1, 2):
        options = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "left.jsonl", "--batch", size)
        assert run("vqa", "--weights", left, *options) == 0
        for record, wanted in zip(read_lines(tmp_path / "left.jsonl"), expected, strict=True):
            assert scores_of(record) == pytest.approx(scores_of(wanted), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_config": {"pad_token": "</s>"}}, "its tokenizer pads with the id 2, its model with 1"),
        ({"answers": {"answers": [1, 2, 3]}}, "answers.json cannot be read"),
        ({"config": {"text_config": 5}}, "its config.json is none of transformers'"),
        ({"config": {"hidden_size": "wide"}}, "config.json"),
    ],
)
def test_changed_files_of_an_export_are_refused(tuned, photo, tmp_path, capsys, changes, message):
    assert message in refused(broken(tuned, tmp_path, **changes), photo, capsys)


def permuted_answers(folder):
    path = folder / "answers.json"
    AnswerVocabulary(AnswerVocabulary.load(path).answers[::-1]).save(path)
    return "answers.json"


def permuted_vocabulary(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    return "tokenizer.json"


def other_computation(folder):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["text_config"] |= {"num_attention_heads": 1}
    path.write_text(json.dumps(content | {"layer_norm_eps": 0.1}))
    return "config.json"


@pytest.mark.parametrize("change", [permuted_answers, permuted_vocabulary, other_computation])
def test_files_that_still_fit_the_weights_are_refused_if_changed(tuned, vqa, photo, tmp_path, capsys, change):
    folder = tmp_path / "changed"
    shutil.copytree(tuned / "vqa_weights", folder)
    with (folder / "README.md").open("a") as card:  # users complete the model card
        card.write("license: other\n")
    options = {"init": str(folder), "data": DataArgs(train=str(vqa / "train"), tokenizer=str(folder))}
    assert not [error for error in VqaConfig(**options).validate() if error.startswith("init: ")]
    name = change(folder)
    message = f"'{folder}': its {name} is not the one that was exported; copy it again"
    assert f"--weights {message}" in refused(folder, photo, capsys)
    assert [error for error in VqaConfig(**options).validate() if error.startswith(f"init: {message}")]
    (folder / "export_report.json").unlink()
    assert run("vqa", "--weights", folder, "--image", photo, "--text", "is it?") == 0


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
