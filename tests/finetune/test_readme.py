"""The README's Python example runs as it stands there, on a small folder."""

import ast
import re

import pytest

from experiments.finetuning import README_MARKS
from tests.data.conftest import draw_jpeg
from tests.spawn import ROOT
from unimo3.inference.folder import load
from unimo3.inference.inputs import Row, prepare
from unimo3.inference.predictors import VqaPredictor


def example() -> str:
    """The block of the section on Python."""
    section = (ROOT / "README.md").read_text().partition("## From Python\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    return str(block)


def test_the_readmes_table_of_tasks_is_the_experiments():
    table = (ROOT / "README.md").read_text().partition(README_MARKS[0])[2].partition(README_MARKS[1])[0]
    assert table.count("\n") == 6
    assert table in (ROOT / "experiments" / "results" / "finetuning.md").read_text()


def test_the_readmes_example_has_about_ten_lines_and_predicts(tuned, tmp_path, capsys):
    code = example()
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(draw_jpeg(3))
    folder = str(tuned / "vqa_weights")
    code = code.replace("weights/vqa", folder).replace("photo.jpg", str(photo))
    exec(code, {})
    predictor = VqaPredictor(load(folder, VqaPredictor.model_class, device="cpu"))
    row = prepare(predictor.loaded, Row((photo,), "how many dogs are there?"))
    (expected,) = predictor.predict([row], top=3)
    assert ast.literal_eval(capsys.readouterr().out) == [
        (answer["answer"], pytest.approx(answer["score"], abs=1e-5)) for answer in expected
    ]
