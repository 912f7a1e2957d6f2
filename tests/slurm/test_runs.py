"""Which folder a command works on, and what a start resumes from."""

from pathlib import Path

import pytest
import yaml

from slurm.runs import ArgumentError, main, progress, run_folder, work_folder


@pytest.mark.parametrize("name", ["", "a/b", "new\nline", ".."])
def test_invalid_names_are_refused(name):
    with pytest.raises(ArgumentError, match="printable names are needed"):
        run_folder(["--run.name", name])


def test_the_run_folder_is_the_one_the_program_uses(tmp_path):
    assert str(run_folder([])) == "runs/run"
    (tmp_path / "named.yaml").write_text(yaml.safe_dump({"run": {"name": "named", "dir": "here"}, "optim": {}}))
    words = ["--config", str(tmp_path / "named.yaml")]
    assert str(run_folder(words)) == "here/named"
    assert str(run_folder([*words, "--run.dir=there"])) == "there/named"
    assert str(run_folder(["--run.name", "last", *words])) == "here/named"  # what comes later wins
    assert run_folder(["--config", "named.yaml"], start=tmp_path) == tmp_path / "here" / "named"


@pytest.mark.parametrize(
    ("program", "arguments", "folder"),
    [
        ("pretrain.train", ["--run.name", "a"], "runs/a"),
        ("finetune.vqa", ["--run.name=a"], "runs/a"),
        ("pretrain.export", ["runs/a", "--no-verify", "--out", "weights/a"], "weights/a.job"),
        ("pretrain.export", ["runs/a", "--out=weights/a/"], "weights/a.job"),
        ("pretrain.prepare_shards", ["coco", "--src", "s", "--out", "o"], "o.job"),
        ("pretrain.prepare_shards", ["index", "--src", "s/train"], "s/train"),
        ("pretrain.prepare_shards", ["coco", "--src", "s", "--out", "s3://b/sets/coco/"], "staging/b/sets/coco.job"),
        ("pretrain.prepare_shards", ["coco", "--out=s3://b/coco", "--staging", "here/coco"], "here/coco.job"),
    ],
)
def test_exports_and_conversions_keep_their_history_next_to_the_output(program, arguments, folder):
    assert work_folder(program, arguments) == Path(folder)
    assert work_folder(program, arguments, Path("/there")) == Path("/there") / folder


@pytest.mark.parametrize("arguments", [["runs/a"], ["runs/a", "--out"], ["runs/a", "--out", "x\ny"]])
def test_an_export_without_a_folder_is_refused(arguments):
    with pytest.raises(ArgumentError, match=r"--out .*: the printable name of a folder is needed"):
        work_folder("pretrain.export", arguments)


def test_progress_is_the_newest_checkpoint_or_finished_shards(tmp_path):
    for folder in (
        tmp_path / "run" / "checkpoints" / "step_00000012",
        tmp_path / "o.partial" / "train",
        tmp_path / "o.job",
    ):
        folder.mkdir(parents=True)
    assert progress(tmp_path / "run") is None
    assert progress(tmp_path / "o.job") is None
    (tmp_path / "run" / "checkpoints" / "step_00000012" / "MANIFEST.json").touch()
    for name in ("000000.unimo3-done", "000001.unimo3-done", "000002.tar"):
        (tmp_path / "o.partial" / "train" / name).touch()
    assert progress(tmp_path / "run") == 12
    assert progress(tmp_path / "o.job") == 2


def test_progress_of_an_upload_continues_that_of_its_conversion(tmp_path):
    (tmp_path / "o.partial" / "train").mkdir(parents=True)
    record = tmp_path / "o.upload"
    record.write_text("{}\n")
    assert progress(tmp_path / "o.job") is None
    (tmp_path / "o.partial" / "train" / "000000.unimo3-done").touch()
    assert progress(tmp_path / "o.job") == 1
    (tmp_path / "o.partial" / "train" / "000000.unimo3-done").rename(tmp_path / "o.partial" / "train" / "000000.tar")
    (tmp_path / "o.partial").rename(tmp_path / "o")
    assert progress(tmp_path / "o.job") == 1
    record.write_text("{}\n{}\n")
    assert progress(tmp_path / "o.job") == 2


@pytest.mark.parametrize("module", ["finetune.", "finetune.nothing", "finetune.program", "finetune.--config"])
def test_an_unknown_task_is_an_invalid_setting(module, capsys):
    assert main([module, "--config", "missing.yaml"]) == 78
    printed = capsys.readouterr()
    assert not printed.out
    assert (
        f"'{module}': there is no such program; finetune takes a task first: nlvr2, retrieval, snli_ve, vqa, choose"
        in printed.err
    )
    assert "--config missing.yaml: cannot be read" in printed.err
    assert main(["finetune.vqa"]) == 0
    assert capsys.readouterr().out == "\nanswer: runs/run\n"
