"""The loader benchmark: a run at the smallest sizes fills every row of its report; what cannot be run is named."""

import importlib.util
from pathlib import Path

import pytest

from benchmarks import loader, loader_store

SMALLEST = "--rounds 1 --seconds 0.2 --shards 1 --workers 1 --photos 1 --index-samples 1000".split()


@pytest.fixture(scope="module")
def report(tmp_path_factory, program) -> str:
    """The report of one run, in a separate process: it forks readers and sets the number of threads."""
    out = tmp_path_factory.mktemp("loader") / "loader.md"
    program.check(0, "benchmarks.loader", *SMALLEST, "--out", out)
    return out.read_text()


def rows_under(heading: str, report: str) -> list[list[str]]:
    """The rows of a heading's table, cell by cell, without its head."""
    part = report.partition(f"# {heading}\n")[2].partition("\n## ")[0]
    table = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table[2:]]


@pytest.mark.integration
def test_each_contestant_has_a_rate_and_ours_is_compared_with_it(report):
    rows = rows_under("Reading training samples", report)
    assert [row[:2] for row in rows] == [["1", loader.OURS], ["1", loader.WEBDATASET], ["1", loader.BARE]]
    ours, *others = [float(row[2]) for row in rows]
    assert min(ours, *others) > 0
    assert rows[0][3:] == ["", ""]
    for (_, _, _, printed, spread), other in zip(rows[1:], others, strict=True):
        ratio = float(printed.removesuffix(" times as fast"))
        # Rates are rounded to integers, ratios to two decimals.
        assert (ours - 0.5) / (other + 0.5) - 0.006 < ratio < (ours + 0.5) / (other - 0.5) + 0.006
        assert spread == f"{ratio:.2f} to {ratio:.2f}"  # of one round


@pytest.mark.integration
def test_reading_from_a_bucket_is_compared_with_the_folder(report):
    rows = rows_under("From an object store", report)
    assert [row[0] for row in rows] == [
        loader.LOCAL,
        loader.CACHED,
        f"{loader.LOCAL}, first pass",
        "S3, first pass, cache empty",
    ]
    local, cached, first, empty = (float(row[1]) for row in rows)
    assert min(local, cached, first, empty) > 0
    for row, one, other in ((rows[1], cached, local), (rows[3], empty, first)):
        assert (one - 0.5) / (other + 0.5) - 0.006 < float(row[2]) < (one + 0.5) / (other - 0.5) + 0.006


@pytest.mark.integration
def test_the_table_of_the_store_alone_is_replaced(report):
    rates = loader_store.StoreRates(7, (100.0, 50.0), {loader.LOCAL: [200.0], loader.CACHED: [190.0]})
    rows = [
        [loader.LOCAL, "200", "", ""],
        [loader.CACHED, "190", "0.95", "0.95 to 0.95"],
        [f"{loader.LOCAL}, first pass", "100", "", ""],
        ["S3, first pass, cache empty", "50", "0.50", ""],
    ]
    replaced = loader.replace_store(report, rates)
    section = replaced[replaced.index(loader.STORE_HEADING) : replaced.index("## Where a reader")]
    for text in (report, report.replace(section, ""), replaced.replace(section, "")):
        other = loader.replace_store(text, rates)
        assert rows_under("From an object store", other) == rows
        headings = [line for line in other.splitlines() if line.startswith("#")]
        assert headings == [line for line in report.splitlines() if line.startswith("#")]
        assert rows_under("Where a reader's time goes", other) == rows_under("Where a reader's time goes", report)


def test_without_moto_the_report_names_what_is_missing(monkeypatch, tmp_path, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "moto" else find_spec(name))
    assert loader_store.missing_packages() == ["moto"]
    assert "Not measured: moto was not installed." in loader._store_lines(None)
    assert status_of("--only-store", tmp_path) == 78
    errors = capsys.readouterr().err
    assert "loader.md: no such file; --only-store replaces one of its tables" in errors
    assert "--only-store: moto is not installed; type: pip install 'moto[server]' s3fs" in errors


@pytest.mark.integration
def test_parts_of_a_readers_time_and_photos_are_measured(report):
    parts = {name: float(ratio) for name, _, ratio in rows_under("Where a reader's time goes", report)}
    assert parts.pop("complete batches") == 1
    assert len(parts) == 4
    assert max(parts, key=parts.get).startswith("decoding")
    photos = rows_under("Large photos", report)
    assert [(photo, size) for photo, size, *_ in photos] == [
        (photo, size) for photo in ("1024 x 768", "2048 x 1536") for size in ("224", "288", "384")
    ]
    differences = [float(mean) for _, _, _, mean, _ in photos]
    assert differences[:3] == [0, 0, 0]  # decoded in full: below twice the square
    assert all(0 < difference < 0.5 for difference in differences[3:])


@pytest.mark.integration
def test_each_position_in_an_epoch_has_its_time_to_resume(report):
    rows = rows_under("Resuming", report)
    assert [row[0] for row in rows] == ["0% of an epoch", "50% of an epoch", "99% of an epoch"]
    assert all(float(ours_s) > 0 and float(replay_s) >= 0 for _, ours_s, replay_s in rows)
    assert float(rows[-1][2]) > 0


@pytest.mark.integration
def test_each_size_of_the_index_has_its_memory_time_and_bytes(report):
    [(size, memory_mb, open_s, disk_mb)] = rows_under("Size of the index", report)
    assert size == "1,000"
    assert float(memory_mb) > 10  # as much as Python alone
    assert float(open_s) >= 0
    assert float(disk_mb) > 0


@pytest.mark.integration
def test_the_report_names_the_settings_and_the_machine(report):
    assert f"python -m benchmarks.loader {' '.join(SMALLEST)} --out loader.md" in report
    assert dict(rows_under("Measured on", report))["processor"]


def status_of(arguments: str, folder: Path) -> int:
    with pytest.raises(SystemExit) as end:
        loader.main([*SMALLEST, *arguments.split(), "--out", str(folder / "loader.md")])
    return end.value.code


def test_bad_arguments_are_named_together(tmp_path, capsys):
    assert status_of("--rounds 0 --seconds -1 --shards 0 --workers 2 0 --index-samples 0 1000", tmp_path) == 78
    printed = capsys.readouterr().err
    for problem in ("--rounds 0", "--seconds -1.0", "--shards 0", "--workers 0", "--index-samples 0"):
        assert f"{problem}: a number above 0 is needed" in printed


def test_an_unknown_augmentation_is_named(tmp_path, capsys):
    assert status_of("--augment mixup", tmp_path) == 78
    assert "argument --augment: invalid choice: 'mixup'" in capsys.readouterr().err
