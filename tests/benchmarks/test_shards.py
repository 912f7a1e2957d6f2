"""The conversion benchmark: a run at the smallest sizes fills every row of its report; what cannot be run is named."""

import json
from pathlib import Path

import pytest

from benchmarks import shards


def run(num_images: int, num_rounds: int, out: Path) -> int:
    with pytest.raises(SystemExit) as end:
        shards.main(["--images", str(num_images), "--rounds", str(num_rounds), "--out", str(out)])
    return end.value.code


def test_the_source_has_an_image_and_captions_for_each_number(tmp_path):
    shards.make_source(tmp_path, 3)
    images = json.loads((tmp_path / "dataset_coco.json").read_text())["images"]
    assert [image["cocoid"] for image in images] == [0, 1, 2]
    files = {(tmp_path / image["filepath"] / image["filename"]).read_bytes() for image in images}
    assert len(files) == 3
    assert all(70_000 < len(content) < 80_000 for content in files)


@pytest.mark.integration
def test_a_small_run_compares_one_rank_with_two_each_way(tmp_path):
    out = tmp_path / "shards.md"
    assert not run(64, 1, out)
    report = out.read_text()
    lines = report.partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("|")][2:]
    assert [row[0] for row in rows] == list(shards.WAYS)
    for _, alone, both, times in rows:
        assert float(alone) > 0
        assert float(both) > 0
        # With one round the medians are the rates themselves, which are integers.
        assert float(times) == pytest.approx(float(both) / float(alone), abs=0.006)
    assert "Medians of 1 conversions of 64 JPEGs" in report
    assert "| processor |" in report


@pytest.mark.parametrize(("images", "rounds"), [(63, 1), (64, 0)])
def test_bad_arguments_are_named(tmp_path, capsys, images, rounds):
    assert run(images, rounds, tmp_path / "shards.md") == 78
    assert f"--images {images} --rounds {rounds}: at least 64 and 1 are needed" in capsys.readouterr().err
