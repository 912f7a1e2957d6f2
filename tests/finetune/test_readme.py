"""The README's Python example runs as it stands there, on a small folder."""

import ast
import io
import re

import numpy as np
from PIL import Image

from experiments.finetuning import README_MARKS
from tests.data.conftest import draw_jpeg
from tests.spawn import ROOT
from unimo3.inference.exported_model import load
from unimo3.inference.inputs import Row, prepare
from unimo3.inference.predictors import VqaPredictor
from unimo3.model.downstream import Unimo3ForVisualQuestionAnswering


def example() -> str:
    """The block of the section on Python."""
    section = (ROOT / "README.md").read_text().partition("## From Python\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    return str(block)


def test_the_readmes_table_of_tasks_is_the_experiments():
    table = (ROOT / "README.md").read_text().partition(README_MARKS[0])[2].partition(README_MARKS[1])[0]
    assert table.count("\n") == 6
    assert table in (ROOT / "experiments" / "results" / "finetuning.md").read_text()


def odd_photos() -> list[bytes]:
    """A JPEG, one with damaged EXIF that is to be turned, a transparent PNG, and one of 16 bits."""
    colours = Image.open(io.BytesIO(draw_jpeg(3)))
    clear = colours.convert("RGBA")
    clear.putalpha(colours.getchannel("R").point(lambda value: 255 * (value > 99)))
    deep = Image.fromarray(np.asarray(colours)[..., 0].astype(np.uint16) * 257)
    # Orientation 6, and a resolution in ASCII.
    turned = b"Exif\0\0II*\0\x08\0\0\0\2\0\x12\1\3\0\1\0\0\0\6\0\0\0\x1a\1\2\0\4\0\0\x00072\0\0\0\0\0\0"
    files = []
    for image, kind, options in ((colours, "JPEG", {"exif": turned}), (clear, "PNG", {}), (deep, "PNG", {})):
        files.append(io.BytesIO())
        image.save(files[-1], kind, **options)
    return [draw_jpeg(3), *(file.getvalue() for file in files)]


def test_the_readmes_example_has_about_ten_lines_and_predicts(tuned, tmp_path, capsys):
    code = example()
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    photo = tmp_path / "photo.jpg"
    folder = str(tuned / "vqa_weights")
    code = code.replace("weights/vqa", folder).replace("photo.jpg", str(photo))
    predictor = VqaPredictor(load(folder, Unimo3ForVisualQuestionAnswering, device="cpu"))
    for content in odd_photos():
        photo.write_bytes(content)
        exec(code, {})
        row = prepare(predictor.loaded, Row((photo,), "how many dogs are there?"))
        (expected,) = predictor.predict([row], top=3)
        # To the bit.
        assert ast.literal_eval(capsys.readouterr().out) == [(answer["answer"], answer["score"]) for answer in expected]
