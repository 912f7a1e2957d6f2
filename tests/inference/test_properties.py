"""Whatever predict is given ends in a right value, or in one error of the project's; every line is counted."""

import argparse
import contextlib
import io
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.predict_program import _read_texts, answer_lines
from tests.tiny import tiny_config
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.samples import BadSampleError, image_of
from unimo3.data.stored_images import ImageOptions, UnusableImageError, read_image
from unimo3.data.tokenizer import load_tokenizer, train_tokenizer
from unimo3.data.transforms import ImageTransform, image_processor, normalize
from unimo3.errors import CheckpointError, ConfigError, DataError
from unimo3.images import decode
from unimo3.inference.exported_model import load
from unimo3.inference.inputs import Row, prepare, read_pixels
from unimo3.inference.predictors import VqaPredictor
from unimo3.inference.search_index import images_in
from unimo3.model.downstream import Unimo3ForVisualQuestionAnswering
from unimo3.model.initialization import initialize_weights
from unimo3.model.processor import Unimo3Processor

quickly = settings(
    max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """An export of VQA with random weights, around a ModernBERT and an image tower with registers."""
    folder = tmp_path_factory.mktemp("weights")
    train_tokenizer(["a red dog on a hill", "two dogs"] * 20, 300, folder / "tokenizer")
    text = {"model_type": "modernbert", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 18, "pad_token_id": 1}
    vision = tiny_config().vision_config.to_dict() | {"architecture": "vit_base_patch14_reg4_dinov2"}
    model = Unimo3ForVisualQuestionAnswering(tiny_config(text_config=text, vision_config=vision, num_answers=3))
    initialize_weights(model, 0, std=0.1)
    model.save_pretrained(folder)
    Unimo3Processor(image_processor(16), load_tokenizer(str(folder / "tokenizer"))).save_pretrained(folder)
    AnswerVocabulary(["yes", "no", "2"]).save(folder / "answers.json")
    shutil.rmtree(folder / "tokenizer")
    photo().save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def predictor(exported) -> VqaPredictor:
    return VqaPredictor(load(str(exported), Unimo3ForVisualQuestionAnswering, device="cpu"))


def photo(width: int = 12, height: int = 9) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


texts = st.text(max_size=12) | st.sampled_from(["is it?", "\ud83d", "\0", "\ufeff", "<mask>", "é" * 40, " "])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
images = st.sampled_from(["photo.png", "gone.png", "answers.json", ".", "", "a\0", "\ud83d", "\udc80/x"]) | values
good_line = st.fixed_dictionaries({"image": st.just("photo.png"), "text": st.just("is it?")}, optional={"id": values})
odd_line = st.fixed_dictionaries({"image": images, "text": st.just("is it?") | texts})
any_line = st.dictionaries(st.sampled_from(["image", "text", "id"]), images | texts | values)
encodings = st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-16-le"])


@st.composite
def line(draw: Any) -> bytes:
    entry = draw(good_line | odd_line | any_line | values)
    encoded = json.dumps(entry, ensure_ascii=draw(st.booleans())).encode(draw(encodings), "replace")
    damage = draw(st.sampled_from(["none"] * 5 + ["cut", "byte", "blank", "deep"]))
    if damage == "cut":
        return encoded[: draw(st.integers(0, len(encoded)))]
    if damage == "byte":
        return encoded + draw(st.binary(max_size=3)).replace(b"\n", b"")
    return {"none": encoded, "blank": b" \t\r", "deep": b"[" * draw(st.integers(900, 3000))}[damage]


@quickly
@given(lines=st.lists(line(), max_size=6))
def test_every_line_is_answered_or_has_its_error(exported, predictor, lines):
    source, target = exported / "in.jsonl", exported / "out.jsonl"
    source.write_bytes(b"\n".join(lines))
    target.unlink(missing_ok=True)
    options = argparse.Namespace(input=source, output=target, top=2, batch=3)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            answer_lines(options, predictor, 1, None)
        problem = ""
    except (ConfigError, DataError) as error:
        problem = str(error)
    content = source.read_bytes()
    if not target.exists():
        assert "contains no line" in problem or "is UTF-16" in problem
        return
    records = [json.loads(text) for text in target.read_text().splitlines()]
    numbers = [
        n for n, part in enumerate(content.split(b"\n"), 1) if part.strip().removeprefix(b"\xef\xbb\xbf").strip()
    ]
    assert [record["line"] for record in records] == numbers
    bad = [record for record in records if "error" in record]
    assert all(("error" in record) != ("answers" in record) for record in records)
    assert (f"{len(bad)} of {len(records)} lines were not answered" in problem) == bool(bad)
    assert all(0 <= entry["score"] <= 1 for record in records for entry in record.get("answers", []))


@quickly
@given(parts=st.lists(texts, max_size=5), encoding=encodings, tail=st.binary(max_size=4))
def test_texts_equal_those_of_the_file_or_the_file_is_refused(exported, parts, encoding, tail):
    path = exported / "texts"
    content = "\n".join(parts).encode(encoding, "replace") + tail
    path.write_bytes(content)
    try:
        read = _read_texts(path)
    except ConfigError:
        return
    assert read
    assert all(text and text == text.strip() and "\0" not in text and text[0] != "\ufeff" for text in read)
    assert len(read) <= content.count(b"\n") + content.count(b"\r") + 1


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "ICO", "PCX", "EPS", "PDF", "AVIF")


@st.composite
def image_file(draw: Any) -> bytes:
    """An image of any mode, format and EXIF, undamaged, cut off, or with other bytes."""
    mode, kind = draw(st.sampled_from(MODES)), draw(st.sampled_from(KINDS))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["exif"] = draw(
            st.binary(max_size=30).map(lambda tail: b"Exif\0\0II*\0\x08\0\0\0" + tail) | st.binary(max_size=20)
        )
    if draw(st.booleans()):
        options["transparency"] = draw(st.sampled_from([0, 3, (1, 2, 3), bytes(range(256))]))
    try:
        image = Image.fromarray(np.asarray(photo())[..., 0].astype(np.uint16) * 257) if mode == "I;16" else photo()
        image = image if mode in ("I;16", "RGB") else image.convert(mode)
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the EXIF, which saving reads
            image.save(file, kind, **options)
        content = file.getvalue()
    except Exception:  # Pillow writes no such file
        content = draw(st.binary(max_size=40))
    damage = draw(st.sampled_from(["none"] * 4 + ["cut", "bytes"]))
    if damage == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if damage == "bytes" and content:
        changed = bytearray(content)
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
        return bytes(changed)
    return content


@settings(quickly, max_examples=120)
@given(content=image_file())
def test_an_image_has_the_same_pixels_everywhere_or_is_refused_everywhere(exported, predictor, content):
    path = exported / "mutated"
    path.write_bytes(content)
    results: list[torch.Tensor | None] = []
    try:
        results.append(read_pixels(predictor.loaded, path))
    except DataError:
        results.append(None)
    try:
        trained = image_of({"jpg": content}, ImageTransform(16), np.random.default_rng(0))()
        results.append(normalize(torch.tensor(trained)))
    except BadSampleError:
        results.append(None)
    try:
        read_image(path, ImageOptions())
        is_usable = True
    except UnusableImageError:
        is_usable = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = [Image.open(path)]
            results.append(predictor.loaded.processor(images=opened, return_tensors="pt")["pixel_values"][0])
    except Exception:  # Pillow's own, or the rule's
        results.append(None)
    by_file, trained_on, by_hand = results
    assert (by_file is None) == (trained_on is None) == (by_hand is None) == (not is_usable)
    if by_file is not None and trained_on is not None and by_hand is not None:
        assert torch.equal(by_file, by_hand)
        torch.testing.assert_close(by_file, trained_on, atol=1e-6, rtol=0)


@quickly
@given(files=st.dictionaries(st.sampled_from(["a.jpg", "b", "c.heic", "d.txt", "e.jfif", "f.PNG"]), image_file()))
def test_every_file_is_indexed_or_named(tmp_path_factory, files):
    folder = tmp_path_factory.getbasetemp() / "files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    decodable = []
    for name, content in files.items():
        (folder / name).write_bytes(content)
        with contextlib.suppress(Exception):
            decode(content)
            decodable.append(name)
    try:
        images, skipped = images_in(folder)
    except ConfigError:
        images, skipped = [], sorted(files)
    assert sorted([*images, *skipped]) == sorted(files)
    assert set(decodable) <= set(images)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of each value in a JSON, the keys and numbers that lead to it."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(below for key, entry in entries for below in paths_in(entry, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


@settings(quickly, max_examples=50)
@given(data=st.data())
def test_a_changed_export_is_used_rightly_or_refused(exported, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(exported, folder)
    names = ("config.json", "config.json", "processor_config.json", "tokenizer_config.json", "answers.json")
    file = folder / data.draw(st.sampled_from(names))
    content = json.loads(file.read_text())
    if data.draw(st.booleans()):
        path = data.draw(st.sampled_from(paths_in(content)))
        file.write_text(json.dumps(changed(content, path, data.draw(values))))
    else:
        written = file.read_bytes()
        file.write_bytes(written[: data.draw(st.integers(0, len(written)))] + data.draw(st.binary(max_size=3)))
    try:
        predictor = VqaPredictor(load(str(folder), Unimo3ForVisualQuestionAnswering, device="cpu"))
        (answers,) = predictor.predict([prepare(predictor.loaded, Row((exported / "photo.png",), "is it?"))], top=3)
    except (ConfigError, CheckpointError, DataError):
        return
    assert len(answers) == 3
    assert all(isinstance(entry["answer"], str) for entry in answers)
