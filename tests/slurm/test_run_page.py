"""The page of a run: every chart is drawn by a real browser without an error, and shows what the files contain."""

import json
import os
import re
import shutil
import subprocess

import pytest

from slurm import history, run_page, status
from tests.waiting import PATIENCE_S

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
GATES = [[[0.25, 0.75, 0.0], [0.75, 0.25, 0.0]], [[0.5, 0.25, 0.25], [0.0, 0.75, 0.25]]]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Of 30 steps with two evaluations and three starts, whose name would be HTML."""
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue
    folder = tmp_path / "runs" / "a<b>&c"
    (folder / "checkpoints" / "step_00000020").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000020" / "MANIFEST.json").write_text('{"files": []}')
    (folder / "config.yaml").write_text("training: {steps: 40}\n")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"unimodal_levels": 0}')
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 31):
            record = {"step": step, "loss": None if step == 7 else 3 / step, "loss_mlm": 2 / step, "lr": 1e-4}
            record |= {"accuracy_mlm": step / 40, "grad_norm": 1.0, "pairs_per_s": 50.0, "step_s": 0.1, "data_s": 0.01}
            gates = {"gates_text": GATES, "gates_image": GATES} if step % 10 == 0 else {}
            file.write(json.dumps(record | {"memory_bytes": 10**9, "skipped_steps": 0} | gates) + "\n")
            if step % 15 == 0:
                evaluation = {"group": "eval", "step": step, "data": "abc", "loss_mlm": 1.0 + 1 / step}
                file.write(json.dumps(evaluation) + "\n")
    history.append(folder, "begin", job="7", restart=0, nodes="n[1-2]", checkpoint=None)
    history.append(folder, "end", job="7", status=75, action="requeue", reason="asked to <stop>", checkpoint=20)
    history.append(folder, "begin", job="7", restart=1, nodes="n[1-2]", checkpoint=20)
    history.append(folder, "begin", job="7", restart=2, nodes="n[3-4]", checkpoint=20)
    return folder


def written(run, *options) -> str:
    path = run.parents[1] / "out.html"
    with pytest.raises(SystemExit) as end:
        status.main([str(run), "--html", str(path), *options])
    assert not end.value.code
    return path.read_text()


def charts_of(page: str) -> dict[str, list[dict]]:
    """The curves and bars of each chart by its title, as plotly's own program gets them."""
    charts = {}
    for section in re.findall(r"<section>.*?</section>", page, re.DOTALL):
        title = re.search("<h2>(.*?)</h2>", section)[1]
        call = section.index("Plotly.newPlot(")
        traces = section.index("[{", call)
        charts[title] = json.JSONDecoder().raw_decode(section[traces:])[0]
    return charts


def test_charts_have_the_values_of_the_files(run):
    charts = charts_of(written(run))
    assert [trace["name"] for trace in charts["Loss"]] == ["loss", "loss_mlm"]
    assert charts["Loss"][0]["x"] == [step for step in range(1, 31) if step != 7]
    assert charts["Held-out losses"][0]["x"] == [15, 30]
    assert charts["Held-out losses"][0]["y"] == pytest.approx([1 + 1 / 15, 1 + 1 / 30])
    gates = charts["Gates: the words read the image"][0]
    assert gates["y"] == [f"layer {layer + 1} level {level}" for layer in (1, 2) for level in range(layer + 1)]
    assert [row[-1] for row in gates["z"]] == pytest.approx([0.5, 0.5, 0.25, 0.5, 0.25])
    bars = charts["Starts, nodes and checkpoints"]
    assert [bar["name"] for bar in bars] == ["requeue", "cut off", "running", "checkpoints"]
    assert bars[0]["hovertext"] == "requeue, status 75<br>asked to &lt;stop&gt;<br>nodes: n[1-2]"
    assert "Operations of a GPU: MFU" not in charts  # counted on GPUs alone


def test_data_sets_and_older_checkpoints_have_curves_of_their_own(run):
    with (run / "metrics.jsonl").open("a") as file:
        for step, split, accuracy in ((30, "test", 0.1), (30, "val", 0.5), (20, "val", 0.4)):
            record = {"group": "eval", "step": step, "data": split * 9, "split": split, "accuracy_overall": accuracy}
            file.write(json.dumps(record) + "\n")
    curves = {trace["name"]: (trace["x"], trace["y"]) for trace in charts_of(written(run))["Held-out metrics"]}
    assert curves == {"accuracy_overall (test)": ([30], [0.1]), "accuracy_overall (val)": ([20, 30], [0.4, 0.5])}


def test_gates_of_long_runs_are_every_nth(run):
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(31, 1031):
            file.write(json.dumps({"step": step, "gates_text": GATES}) + "\n")
    (chart,) = charts_of(written(run))["Gates: the words read the image"]
    assert len(chart["x"]) <= run_page.MAX_MAPS
    assert len(chart["z"][0]) == len(chart["x"])


def test_a_long_run_shows_means_of_neighbouring_steps():
    x, y = run_page.thinned([(step, float(step)) for step in range(1, 5001)])
    assert len(x) <= run_page.MAX_POINTS
    assert x[:2] == [3, 6]
    assert y[:2] == [2.0, 5.0]
    assert x[-1] == 5000
    assert run_page.thinned([(1, 2.0), (2, 3.0)]) == ([1, 2], [2.0, 3.0])


def test_a_run_without_a_step_has_a_page(run):
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "slurm")
    shutil.rmtree(run / "checkpoints")
    page = written(run)
    assert "no step, no evaluation and no start by Slurm yet" in page
    assert "<h1>a&lt;b&gt;&amp;c</h1>" in page


def test_a_damaged_record_costs_itself_alone(run):
    with (run / "metrics.jsonl").open("a") as file:
        for gates in ([[0.5]], "high", [[[0.5, "x"]]], [[[0.5], [0.5, 0.5]]], [], [[]], [[[]]]):
            file.write(json.dumps({"step": 31, "gates_text": gates, "gates_image": gates}) + "\n")
        file.write('{"step": "x", "loss": 1}\n{"loss": 2}\n[1]\n{"step": 31, "loss": "high", "loss_mlm": 9.0}\n{"st')
    assert charts_of(written(run))["Loss"][1]["y"][-1] == 9.0


def test_what_cannot_be_written_is_refused(run, tmp_path, capsys):
    for arguments, error in (
        ([run, "--html", tmp_path / "gone" / "out.html"], "cannot be written there; name a file in a folder"),
        ([run, "--html", tmp_path], "cannot be written there; name a file in a folder that exists"),
        ([run, "--html", ""], "cannot be written there; name a file in a folder that exists"),
        ([run, "--html", tmp_path / ("x" * 300)], "cannot be written there; name a file in a folder"),
        ([run, "--html", tmp_path / "out.html", "--every", "nan"], "--every nan: a number of seconds above 0"),
        ([run, run, "--html", tmp_path / "out.html"], "writes a page for one run, but 2 runs are given; give one RUN"),
    ):
        with pytest.raises(SystemExit) as end:
            status.main([str(argument) for argument in arguments])
        assert end.value.code == 78
        assert error in capsys.readouterr().err


@pytest.mark.integration
def test_a_browser_draws_all_charts_without_an_error(run, tmp_path):
    if CHROMIUM is None:
        assert not os.environ.get("REQUIRE_CHROMIUM"), "REQUIRE_CHROMIUM is set, and there is no chromium"
        pytest.skip("no chromium")
    titles = list(charts_of(written(run)))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--virtual-time-budget=60000", "--enable-logging=stderr", "--dump-dom", f"file://{tmp_path}/out.html"]
    browser = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    console = [line for line in browser.stderr.splitlines() if ":CONSOLE" in line]
    assert not console
    drawn = re.findall(r"<section>.*?</section>", browser.stdout, re.DOTALL)
    assert len(drawn) == len(titles)
    for section, title in zip(drawn, titles, strict=True):
        assert 'class="main-svg"' in section, title
