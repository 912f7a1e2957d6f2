"""The first run on a GPU, tried on a CPU: every stage reports, a failed one is named, and a second call continues."""

import json

import pytest

from benchmarks import gpu


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        gpu.main([str(word) for word in arguments])
    return end.value.code


def test_every_stage_reports_on_a_cpu_and_ended_ones_are_not_repeated(tmp_path, program):
    out = tmp_path / "gpu.md"
    program.check(0, "benchmarks.gpu", "--dry-run", "--budget", 3600, "--out", out)
    report = out.read_text()
    for part in (
        "same bits twice",
        "times as fast as separate",
        "TFLOP/s",
        "killed after step",
        "to 8 in",
        "exported in fp16",
        "activation checkpointing: three steps",
    ):
        assert part in report, part
    assert "resumed from step 8" not in report
    assert "did not end" not in report
    log = out.with_suffix(".jsonl")
    before = log.read_text()
    program.check(0, "benchmarks.gpu", "--dry-run", "--out", out)
    assert log.read_text() == before
    assert program.output.count("ended before") == len(gpu.STAGES)


@pytest.mark.integration  # the report asks git for the commit
def test_a_stage_that_fails_is_reported_without_an_end(tmp_path, monkeypatch):
    def broken(machine):
        yield "a first result"
        raise RuntimeError("the GPU fell off the bus")

    monkeypatch.setitem(gpu.STAGES, "right", broken)
    log = tmp_path / "gpu.jsonl"
    with pytest.raises(RuntimeError):
        gpu.do_stage("right", gpu.Machine(True), log)
    gpu.write(tmp_path / "gpu.md", log)
    report = (tmp_path / "gpu.md").read_text()
    assert "- a first result\n\nThis stage did not end." in report
    assert "## contestants\n\nThis stage has not begun." in report


def test_a_stage_without_its_packages_names_them(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.NEEDS, "run", ("no_such_package",))
    log = tmp_path / "gpu.jsonl"
    gpu.do_stage("run", gpu.Machine(True), log)
    assert json.loads(log.read_text())["line"] == "not run: no_such_package is not installed"


def test_what_cannot_be_used_is_named(capsys, tmp_path):
    assert run("--dry-run", "--budget", 0, "--out", tmp_path / "x.md") == 78
    assert "--budget 0.0: more than 0 seconds are needed" in capsys.readouterr().err
    assert run("--dry-run") == 78
    assert "--out: is needed with --dry-run" in capsys.readouterr().err
