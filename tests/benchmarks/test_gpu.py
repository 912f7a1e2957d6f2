"""The first run on a GPU, tried on a CPU: every stage reports, a failed one is named, and a second call continues."""

import json
import subprocess
import sys

import psutil
import pytest

from benchmarks import gpu, kernel
from tests.waiting import wait_for


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


@pytest.mark.integration
def test_a_budget_ends_a_stage_and_no_other_begins(tmp_path, capfd):
    assert run("--dry-run", "--budget", 0.05, "--out", tmp_path / "gpu.md") == 0
    printed = capfd.readouterr().out
    assert "right: the time is over; call again" in printed
    assert printed.count("no time is left; call again") == len(gpu.STAGES) - 1
    assert "## variants\n\nThis stage has not begun." in (tmp_path / "gpu.md").read_text()


@pytest.mark.integration
def test_what_a_stage_has_started_ends_with_it(tmp_path):
    child = tmp_path / "child"
    program = f"import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, file=open({str(child)!r}, 'w'))"
    stage = subprocess.Popen([sys.executable, "-c", f"{program}; time.sleep(600)"], start_new_session=True)
    wait_for(lambda: child.exists() and child.read_text().endswith("\n"), "the stage's child")
    gpu.end(stage)
    number = int(child.read_text())
    wait_for(lambda: not psutil.pid_exists(number) or psutil.Process(number).status() == "zombie", "the child's end")


def test_a_stage_that_was_cut_off_continues_with_the_next_case(tmp_path, monkeypatch):
    calls = []

    def cases(machine):
        for label in ("first", "second"):
            if label not in machine.measured:
                calls.append(label)
                yield f"{label}: a result"

    monkeypatch.setitem(gpu.STAGES, "right", cases)
    log = tmp_path / "gpu.jsonl"
    log.write_text(json.dumps({"stage": "right", "line": "first: a result"}) + "\n")
    gpu.do_stage("right", gpu.Machine(True), log)
    assert calls == ["second"]
    lines, ended = gpu.read_log(log)
    assert lines["right"] == ["first: a result", "second: a result"]
    assert ended == {"right"}


def test_a_contestant_with_wrong_gradients_is_not_the_best():
    def result(both_s, error):
        return kernel.Result(both_s / 3, both_s, None, None, error)

    results = {"ours": result(2e-6, 0.01), "cudnn": result(1e-6, float("nan")), "separate": result(3e-6, 0.01)}
    line = gpu.compared(results | {"flex": "RuntimeError: no"})
    assert line.startswith("1.50 times as fast as separate; us forward and backward: ours 2, cudnn 1, separate 3;")
    assert "flex failed (RuntimeError: no); cudnn is WRONG (error nan)" in line
    assert gpu.compared({"ours": "RuntimeError: no"}) == "ours failed (RuntimeError: no)"


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
