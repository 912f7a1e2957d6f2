"""Conversions by several MPI ranks, killed ones, and ones with bad images: the same bytes in the end."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.data.conftest import convert, draw_jpeg, write_source
from tests.waiting import PATIENCE_S, wait_for
from unimo3.data.index import ShardIndex

ROOT = Path(__file__).parents[2]
MPIRUN = Path(sys.executable).parent / "mpirun"


def command(*arguments, ranks=1):
    program = [sys.executable, "-m", "pretrain.prepare_shards", *map(str, arguments)]
    if ranks == 1:
        return program
    return [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), *program]


def run(*arguments, ranks=1, environment=None):
    return subprocess.run(
        command(*arguments, ranks=ranks),
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def digests(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def spoil(root: Path) -> list[str]:
    """Damage one image and lose another, both of COCO's train2014."""
    damaged, lost, *_ = sorted((root / "train2014").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:300])
    lost.unlink()
    return [damaged.name, lost.name]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    root = write_source(tmp_path_factory.mktemp("spoiled"), num_images=40)
    return root, spoil(root)


@pytest.fixture(scope="module")
def alone(spoiled, tmp_path_factory):
    """What one process makes of it."""
    out = tmp_path_factory.mktemp("alone") / "coco"
    assert convert("coco", "--src", str(spoiled[0]), "--out", str(out), "--shard-size", "4", *TOLERANT) == 0
    return out


TOLERANT = ("--max-reject-ratio", "0.1")


@pytest.mark.integration
def test_three_ranks_write_what_one_writes(spoiled, alone, tmp_path):
    out = tmp_path / "coco"
    done = run("coco", "--src", spoiled[0], "--out", out, "--shard-size", 4, *TOLERANT, ranks=3)
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(alone)
    # Rank 0 alone speaks.
    assert done.stdout.count("samples in") == 3
    assert done.stderr.count("2 rejected") == 1


def test_rejects_are_listed_and_missing_from_the_shards(spoiled, alone, capsys):
    rejects = [json.loads(line) for line in (alone / "rejects.jsonl").read_text().splitlines()]
    assert [Path(reject["image"]).name for reject in rejects] == spoiled[1]
    assert [reject["reason"].split(" (")[0] for reject in rejects] == ["cannot be decoded", "cannot be read"]
    assert {reject["split"] for reject in rejects} == {"train"}
    index = ShardIndex(alone / "train")
    keys = {index.key(shard, sample) for shard, size in enumerate(index.samples_per_shard) for sample in range(size)}
    assert not keys & {reject["key"] for reject in rejects}
    # A shard is four records, whatever becomes of them.
    assert index.samples_per_shard[:2].tolist() == [2, 4]


def test_too_many_rejects_end_a_conversion_and_a_fixed_source_continues(tmp_path, capfd):
    root, out = write_source(tmp_path / "source", num_images=40), tmp_path / "out"
    names = spoil(root)
    arguments = ("coco", "--src", str(root), "--out", str(out), "--shard-size", "4")
    assert convert(*arguments) == 78
    error = capfd.readouterr().err
    assert "--max-reject-ratio 0.001: 2 of 28 records of train cannot be used (such as" in error
    assert "start the same command again: finished shards are not removed" in error
    assert not out.exists()
    assert len((tmp_path / "out.partial" / "rejects.jsonl").read_text().splitlines()) == 2
    for name in names:
        (root / "train2014" / name).write_bytes(draw_jpeg(int(name[-10:-4]) - 1))
    assert convert(*arguments) == 0
    assert not (tmp_path / "out.partial").exists()
    fresh = tmp_path / "fresh"
    assert convert("coco", "--src", str(root), "--out", str(fresh), "--shard-size", "4") == 0
    assert digests(out) == digests(fresh)
    assert not (out / "rejects.jsonl").exists()


@pytest.mark.integration
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_conversion_continues_where_it_stopped(tmp_path, ranks):
    root = write_source(tmp_path / "source", num_images=600)
    spoil(root)  # a shard with rejects is retained as well
    arguments = ("coco", "--src", root, "--out", tmp_path / "out", "--shard-size", 4, *TOLERANT)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(*arguments, ranks=ranks), cwd=ROOT, stdout=log, stderr=log)
        staging = tmp_path / "out.partial"
        wait_for(
            lambda: len(list(staging.glob("train/*.unimo3-done"))) >= 3 or process.poll() is not None,
            "three finished shards",
            poll_s=0.002,
        )
        # mpirun's ranks are separate process groups.
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
            each.wait()
    finished = len(list(staging.glob("*/*.unimo3-done")))
    assert 3 <= finished < 151
    assert not (tmp_path / "out").exists()
    done = run(*arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert f"600 records ({4 * finished} were there already)" in done.stderr
    assert convert(*map(str, arguments[:4]), str(tmp_path / "fresh"), *map(str, arguments[5:])) == 0
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 2
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "log", "out", "source"]


@pytest.mark.integration
def test_an_error_on_several_ranks_is_one_message_and_no_hang(tmp_path):
    root = write_source(tmp_path / "source", num_images=60)
    path = root / "dataset_coco.json"
    content = json.loads(path.read_text())
    del content["images"][50]["filename"]
    path.write_text(json.dumps(content))
    done = run("coco", "--src", root, "--out", tmp_path / "out", "--shard-size", 4, ranks=3)
    assert done.returncode == 78
    assert done.stderr.count("images[50]: field 'filename' is missing") == 1
    done = run("coco", "--src", tmp_path / "nowhere", "--out", tmp_path / "out", ranks=2)
    assert done.returncode == 78
    assert done.stderr.count("no such folder") == 1


def test_tasks_of_srun_without_mpi_are_refused(spoiled, tmp_path, monkeypatch, capfd):
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert convert("coco", "--src", str(spoiled[0]), "--out", str(tmp_path / "out")) == 78
    assert "use srun --mpi=pmix, or mpirun" in capfd.readouterr().err


def test_a_second_process_on_the_same_output_is_refused(spoiled, tmp_path, capfd):
    from filelock import FileLock

    with FileLock(tmp_path / "out.partial.lock"):
        assert convert("coco", "--src", str(spoiled[0]), "--out", str(tmp_path / "out")) == 78
    assert f"--out {tmp_path / 'out'}: another process is writing there" in capfd.readouterr().err


def test_an_attempt_with_other_arguments_leaves_nothing_in_the_result(tmp_path):
    root, out = write_source(tmp_path / "source", num_images=40), tmp_path / "out"
    names = spoil(root)
    assert convert("coco", "--src", str(root), "--out", str(out), "--shard-size", "2") == 78
    for name in names:
        (root / "train2014" / name).write_bytes(draw_jpeg(int(name[-10:-4]) - 1))
    fresh = tmp_path / "fresh"
    for target in (out, fresh):
        assert convert("coco", "--src", str(root), "--out", str(target), "--shard-size", "16") == 0
    assert digests(out) == digests(fresh)


def test_larger_images_are_scaled_by_their_longer_side_and_others_stay(tmp_path):
    root = write_source(tmp_path / "source", num_images=6)
    large, *_ = sorted((root / "train2014").iterdir())
    large.write_bytes(draw_jpeg(0, width=200, height=90))
    assert convert("coco", "--src", str(root), "--out", str(tmp_path / "out"), "--max-side", "100") == 0
    index = ShardIndex(tmp_path / "out" / "train")
    assert Image.open(io.BytesIO(index.read(0, 0)["jpg"])).size == (100, 45)
    assert index.read(0, 1)["jpg"] == draw_jpeg(1)


def test_images_are_stored_by_what_they_are_not_by_their_names(tmp_path):
    root = write_source(tmp_path / "source", num_images=6)
    first, second, *_ = sorted((root / "train2014").iterdir())
    for path, kind in ((first, "PNG"), (second, "GIF")):
        Image.new("RGB", (20, 10), "red").save(path, kind)
    assert convert("coco", "--src", str(root), "--out", str(tmp_path / "out")) == 0
    index = ShardIndex(tmp_path / "out" / "train")
    assert index.read(0, 0)["png"] == first.read_bytes()
    assert Image.open(io.BytesIO(index.read(0, 1)["jpg"])).format == "JPEG"


@pytest.mark.integration
def test_an_unwritable_path_is_an_error_on_all_ranks_and_no_hang(spoiled, tmp_path):
    (tmp_path / "file").write_text("")
    done = run("coco", "--src", spoiled[0], "--out", tmp_path / "file" / "out", ranks=2)
    assert done.returncode == 78
    assert done.stderr.count("cannot be made") == 1


def test_verify_reads_every_byte_again(alone, tmp_path, capfd):
    copy = tmp_path / "copy"
    shutil.copytree(alone, copy)
    assert convert("coco", "--out", str(copy), "--verify") == 0
    assert "shards are as indexed" in capfd.readouterr().out
    shard = copy / "train" / "000001.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (copy / "val" / "000000.tar").unlink()
    members = copy / "test" / "index.members"
    members.write_bytes(members.read_bytes()[::-1])
    assert convert("coco", "--out", str(copy), "--verify") == 78
    error = capfd.readouterr().err
    assert "3 errors, " in error
    assert "index.members: is not the one index.json was written with" in error
    assert "000001.tar: is not the shard that was indexed" in error
    assert "000000.tar: cannot be read (No such file or directory)" in error


def lose_an_index(folder):
    (folder / "val" / "index.json").unlink()
    return "val: contains tars and no index.json"


def break_an_index(folder):
    (folder / "val" / "index.json").write_text("[")
    return "index.json: is not JSON"


def add_a_tar(folder):
    shutil.copy(folder / "train" / "000000.tar", folder / "val" / "000077.tar")
    return "000077.tar: is not in index.json"


@pytest.mark.parametrize("damage", [lose_an_index, break_an_index, add_a_tar])
def test_verify_names_what_an_incomplete_copy_lacks(alone, tmp_path, capfd, damage):
    copy = tmp_path / "copy"
    shutil.copytree(alone, copy)
    expected = damage(copy)
    assert convert("coco", "--out", str(copy), "--verify") == 78
    error = capfd.readouterr().err
    assert expected in error
    assert "DataError: 1 errors, " in error
