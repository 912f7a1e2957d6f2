"""What finetune.predict cannot use: one clear error each, and nothing half-written."""

import json
import os
import re
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.vqa import VqaConfig
from tests.data.conftest import draw_jpeg
from tests.finetune.formats import read_lines
from tests.finetune.predicting import answers_to, run, scores_of, write_lines
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.args import DataArgs

pytestmark = pytest.mark.xdist_group("finetune")


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
    """What is printed of a command that exits with status 78."""
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
    assert f"--output {target}: cannot be written there; name a file in a folder" in capsys.readouterr().err


def test_only_a_plain_file_is_replaced_by_the_output_and_a_link_stays(tuned, photo, tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", [{"image": str(photo), "text": "is it?"}])
    common = ("vqa", "--weights", tuned / "vqa_weights", "--input", source, "--output")
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", "/dev/null"):
        assert run(*common, target) == 78
        assert f"--output {target}: is no plain file" in capsys.readouterr().err
    for target in (tmp_path, tmp_path / ("x" * 300)):
        assert run(*common, target) == 78
        assert f"--output {target}: cannot be written there" in capsys.readouterr().err
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
    target.write_text("unchanged")
    assert run("vqa", "--weights", tuned / "vqa_weights", "--input", source, "--output", target) == 78
    assert f"--input {source}: contains no line; write one object a line" in capsys.readouterr().err
    assert target.read_text() == "unchanged"


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
