"""The scripts of examples/ and the Python of the pages run as they stand."""

import csv
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import BridgeTowerModel

from tests.commands import start_command
from tests.data.conftest import draw_jpeg
from tests.model.test_bridgetower import draw_config
from tests.spawn import ROOT
from tests.test_docs import PAGES
from tests.test_documented_commands import CONSOLE, commands
from tests.waiting import text_of, wait_for_end
from unimo3.inference.search_index import open_search_index

pytestmark = pytest.mark.xdist_group("finetune")
EXAMPLES = Path(__file__).parents[2] / "examples"


PYTHON = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python$(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL))
]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script on weights and an image, from any folder; what it prints."""

    def run_script(name, weights, *texts):
        (tmp_path / "photo.jpg").write_bytes(draw_jpeg(3))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, str(weights), "photo.jpg", *texts])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run_script


@pytest.mark.integration
def test_an_example_starts_in_a_fresh_interpreter():
    # unimo3 makes torchvision importable next to a CPU build of torch, so it comes first.
    for path in EXAMPLES.glob("*.py"):
        others = re.findall(r"^(?:import|from) (unimo3|transformers|torch|timm)\b", path.read_text(), re.MULTILINE)
        assert others[:1] in (["unimo3"], []), path
    command = [sys.executable, str(EXAMPLES / "inspect_gates.py"), "--help"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith("usage: inspect_gates.py")


def test_questions_are_answered_with_answers_of_the_vocabulary(run, tuned):
    weights = tuned / "vqa_weights"
    lines = run("answer_questions.py", weights, "how many dogs are there?", "what is it?")
    known = json.loads((weights / "answers.json").read_text())["answers"]
    assert [line.partition("?")[0] for line in lines] == ["how many dogs are there", "what is it"]
    for line in lines:
        answers = re.findall(r"([^,?]+) \((\d\.\d\d)\)", line.partition("?")[2])
        assert answers
        assert all(answer.strip() in known for answer, _ in answers)
        scores = [float(score) for _, score in answers]
        assert scores == sorted(scores, reverse=True)


def test_gates_of_each_layer_sum_to_one(run, pretrained):
    lines = run("inspect_gates.py", pretrained, "two dogs")
    assert lines[0] == "words read the image"
    assert lines[3] == "the image reads the words"
    rows = [re.findall(r"level (\d) (\d\.\d\d)", line) for line in lines if line.startswith("  layer ")]
    assert [[int(level) for level, _ in row] for row in rows] == [[0], [0, 1]] * 2
    assert all(sum(float(weight) for _, weight in row) == pytest.approx(1, abs=0.02) for row in rows)


def test_the_recipe_of_own_pairs_is_there():
    (name,) = re.findall(r'default="(finetune/recipes/\w+.yaml)"', (EXAMPLES / "search_own_pairs.py").read_text())
    assert (ROOT / name).is_file()


@pytest.mark.integration
def test_own_pairs_become_a_search_in_their_images(pretrained, tmp_path):
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for number in range(40):
            (tmp_path / f"{number}.JPG").write_bytes(draw_jpeg(number))
            rows.writerows([[f"{number}.JPG", f"photo {number}, of a dog"], [f"{number}.JPG", "it is\nred"]])
    paths, log = (tmp_path / "pairs.csv", pretrained, tmp_path / "out"), tmp_path / "output.log"
    settings = ["--config", "finetune/recipes/retrieval_tiny.yaml", "--training.steps", 2, "--training.global_batch", 4]
    settings += ["--training.micro_batch", 4, "--data.num_workers", 0, "--ranking.shortlist", 2]
    script = start_command("examples.search_own_pairs", [*paths, *settings], os.environ, log)
    wait_for_end(script, "search_own_pairs.py", text_of(log))
    assert script.exitcode == 0, log.read_text()
    splits = [json.loads((tmp_path / "out" / "shards" / name / "index.json").read_text()) for name in ("train", "val")]
    assert [split["num_samples"] for split in splits] == [36, 4]
    assert f"{tmp_path / 'out' / 'index'}: 40 images" in log.read_text()


@pytest.mark.parametrize("block", PYTHON)
def test_python_of_the_pages_runs(block, tuned, pretrained, tmp_path, monkeypatch):
    (tmp_path / "photo.jpg").write_bytes(draw_jpeg(3))
    (tmp_path / "weights").mkdir()
    for name, folder in (("weights/base", pretrained), ("weights/vqa", tuned / "vqa_weights"), ("W", pretrained)):
        (tmp_path / name).symlink_to(folder)
    if "bridgetower-base" in block:
        BridgeTowerModel(draw_config(np.random.default_rng(0))).save_pretrained(tmp_path / "bridgetower-base")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "<page>", "exec"), {})


@pytest.mark.integration
def test_the_readme_goes_from_a_csv_to_an_answered_search(pretrained, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "tiny").symlink_to(pretrained)
    photos = tmp_path / "data" / "flickr30k" / "flickr30k-images"
    photos.mkdir(parents=True)
    rows = ["image,caption"]
    for number in range(200):
        (photos / f"{number}.jpg").write_bytes(draw_jpeg(number, 24, 24))
        rows += [
            f"flickr30k-images/{number}.jpg,photo {number} of a {color} dog"
            for color in "red blue one two three".split()
        ]
    (photos.parent / "pairs.csv").write_text("\n".join(rows))
    lines = commands(ROOT / "README.md")
    first = next(index for index, words in enumerate(lines) if words[:2] == ["unimo3-shards", "pairs"])
    output = tmp_path / "output"
    for words in lines[first : first + 5]:
        fewer = ["--training.steps", "4", "--training.global_batch", "8", "--training.micro_batch", "4"]
        words += (
            [*fewer, "--data.num_workers", "0", "--ranking.shortlist", "4"] if "finetune.retrieval" in words else []
        )
        output.unlink(missing_ok=True)
        process = start_command(CONSOLE[words[0]], words[1:], os.environ, output, folder=tmp_path)
        process.join()
        assert process.exitcode == 0, output.read_text()
    names = re.findall(r"(\d+)\.jpg", output.read_text())
    assert len(names) == len(set(names)) > 1
    assert len(open_search_index(tmp_path / "index" / "own", tmp_path / "weights" / "own").names) == 200
