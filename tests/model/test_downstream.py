"""Downstream classes: loaded from pretraining weights, losses, two images, retrieval, processor, Auto classes."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
)

from tests.tiny import spread_gates, tiny_batch, tiny_config, tiny_pretraining_model
from unimo3.data.samples import TextEncoder
from unimo3.data.tokenizer import load_tokenizer, train_tokenizer
from unimo3.data.transforms import ImageTransform, image_processor, normalize
from unimo3.errors import ConfigError
from unimo3.images import decode
from unimo3.model.downstream import (
    Unimo3ForImageAndTextRetrieval,
    Unimo3ForImagesAndTextClassification,
    Unimo3ForImageTextClassification,
    Unimo3ForVisualQuestionAnswering,
)
from unimo3.model.processor import Unimo3Processor
from unimo3.model.unimo3 import Unimo3ForPreTraining, Unimo3Model

CLASSES = (
    Unimo3ForVisualQuestionAnswering,
    Unimo3ForImageTextClassification,
    Unimo3ForImagesAndTextClassification,
    Unimo3ForImageAndTextRetrieval,
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    tiny_pretraining_model(num_answers=4, num_labels=3).save_pretrained(folder)
    return folder


def inputs(num_samples=3):
    batch = tiny_batch(num_samples)
    return batch["input_ids"], batch["pixel_values"], batch["attention_mask"]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_each_class_starts_from_pretraining_weights_and_saves_its_head(exported, tmp_path, kind):
    model, report = kind.from_pretrained(exported, output_loading_info=True)
    heads = ("vqa_head.", "entailment_head.", "pair_head.", "image_shift.")
    assert all(name.startswith(heads) for name in report["missing_keys"])
    assert not report["unexpected_keys"]
    source = Unimo3ForPreTraining.from_pretrained(exported)
    for name, parameter in model.unimo3.named_parameters():
        assert torch.equal(parameter, source.unimo3.get_parameter(name)), name
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, Unimo3Model)
    assert torch.equal(base.text_pooler.weight, model.unimo3.text_pooler.weight)


def test_the_vocabulary_can_be_resized(exported):
    model = Unimo3ForPreTraining.from_pretrained(exported)
    model.resize_token_embeddings(64)
    assert model.mlm_head.decoder.weight.shape[0] == 64
    assert model.unimo3.get_input_embeddings().weight.shape[0] == 64


def test_auto_classes_find_the_models(exported):
    assert isinstance(AutoModelForPreTraining.from_pretrained(exported), Unimo3ForPreTraining)
    assert isinstance(AutoModelForVisualQuestionAnswering.from_pretrained(exported), Unimo3ForVisualQuestionAnswering)


def test_losses_are_those_of_the_logits(exported):
    ids, pixels, mask = inputs()
    soft = torch.rand(3, 4)
    out = Unimo3ForVisualQuestionAnswering.from_pretrained(exported)(ids, pixels, mask, labels=soft)
    torch.testing.assert_close(out.loss, binary_cross_entropy_with_logits(out.logits, soft) * 4)
    labels = torch.tensor([2, 0, 1])
    out = Unimo3ForImageTextClassification.from_pretrained(exported)(ids, pixels, mask, labels=labels)
    torch.testing.assert_close(out.loss, cross_entropy(out.logits, labels))
    matches = torch.tensor([1, 0, 1])
    out = Unimo3ForImageAndTextRetrieval.from_pretrained(exported)(ids, pixels, mask, labels=matches)
    torch.testing.assert_close(out.loss, cross_entropy(out.logits, matches))
    assert Unimo3ForImageTextClassification.from_pretrained(exported)(ids, pixels, mask).loss is None


def test_two_images_are_fused_separately_and_distinguished_by_the_shift(exported):
    model = Unimo3ForImagesAndTextClassification.from_pretrained(exported).eval()
    spread_gates(model)
    ids, first, mask = inputs()
    second = torch.randn_like(first)
    out = model(ids, torch.stack([first, second], dim=1), mask, labels=torch.tensor([0, 1, 1]), output_gates=True)
    base = model.unimo3
    pooled = torch.cat([base(ids, images, mask).pooler_output for images in (first, second)], dim=-1)
    torch.testing.assert_close(out.logits, model.pair_head(pooled), atol=1e-6, rtol=1e-5)
    assert out.text_gates[1].shape[0] == 6
    out.loss.backward()
    assert model.image_shift.vector.grad.abs().max() > 0
    with torch.no_grad():
        model.image_shift.vector.fill_(0.5)
    shifted = model(ids, torch.stack([first, second], dim=1), mask, output_gates=True)
    assert not torch.allclose(shifted.logits, out.logits)
    # The first images' half of the batch does not know of it.
    torch.testing.assert_close(shifted.text_gates[2][:3], out.text_gates[2][:3], atol=0, rtol=0)
    assert not torch.equal(shifted.text_gates[2][3:], out.text_gates[2][3:])
    with pytest.raises(ValueError, match="two images a text"):
        model(ids, first, mask)


def test_retrieval_scores_are_pretrainings(exported):
    ids, pixels, mask = inputs()
    expected = Unimo3ForPreTraining.from_pretrained(exported)(ids, pixels, mask)
    actual = Unimo3ForImageAndTextRetrieval.from_pretrained(exported)(ids, pixels, mask)
    assert torch.equal(actual.logits, expected.matching_logits)
    assert torch.equal(actual.logits_per_image, expected.logits_per_image)
    torch.testing.assert_close(actual.text_embeds.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("kind", [*CLASSES, Unimo3ForPreTraining, Unimo3Model], ids=lambda kind: kind.__name__)
def test_gates_are_returned_only_on_request(exported, kind):
    ids, pixels, mask = inputs()
    if kind is Unimo3ForImagesAndTextClassification:
        pixels = torch.stack([pixels, pixels], dim=1)
    model = kind.from_pretrained(exported)
    assert model(ids, pixels, mask).text_gates is None
    gates = model(ids, pixels, mask, output_gates=True)
    for gate in (gates.text_gates[2], gates.image_gates[2]):
        torch.testing.assert_close(gate.sum(-1), torch.ones(gate.shape[:-1]))


def test_heads_without_classes_are_refused():
    with pytest.raises(ConfigError, match="num_labels: 0: at least one class"):
        Unimo3ForImageTextClassification(tiny_config(num_labels=0))


@pytest.fixture(scope="module")
def processor(exported):
    train_tokenizer(["a red dog on a hill", "two dogs"] * 20, 300, exported / "tokenizer")
    tokenizer = load_tokenizer(str(exported / "tokenizer"))
    tokenizer.model_max_length = 8
    Unimo3Processor(image_processor(16), tokenizer).save_pretrained(exported)
    return AutoProcessor.from_pretrained(exported)


def test_the_processor_gives_a_models_inputs(exported, processor):
    assert isinstance(processor, Unimo3Processor)
    images = [np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)] * 2
    batch = processor(images=images, text=["two dogs", "a red dog on a hill and on and on"], return_tensors="pt")
    assert sorted(batch) == ["attention_mask", "input_ids", "pixel_values"]
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum(-1).tolist() == [4, 8]
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    batch["input_ids"] = batch["input_ids"] % 50  # the tiny model's vocabulary
    assert Unimo3Model.from_pretrained(exported)(**batch).pooler_output.shape == (2, 64)


def file_of(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def odd_files() -> dict[str, bytes]:
    """Images of all modes, most of them with a transparent ground."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    clear = colours.convert("RGBA")
    clear.putalpha(Image.fromarray(rng.integers(0, 2, (40, 60), dtype=np.uint8) * 255))
    deep = Image.fromarray(rng.integers(0, 65535, (40, 60), dtype=np.uint16))
    palette = colours.quantize(64)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "RGB": file_of(colours),
        "RGBA": file_of(clear),
        "RGBA WebP": file_of(clear, "WEBP", lossless=True, exact=True),
        "LA": file_of(clear.convert("LA")),
        "P with alpha": file_of(palette, transparency=bytes(range(64))),
        "P with a colour key": file_of(palette, transparency=3),
        "L with a colour key": file_of(colours.convert("L"), transparency=7),
        "RGB with a colour key": file_of(colours, transparency=colours.getpixel((0, 0))),
        "GIF with a colour key": file_of(palette, "GIF", transparency=3),
        "16 bits": file_of(deep),
        "16 bits TIFF": file_of(deep, "TIFF"),
        "1 bit": file_of(colours.convert("1")),
        "CMYK": file_of(colours.convert("CMYK"), "JPEG"),
        "turned": file_of(colours, "JPEG", exif=exif),
        "turned, damaged": file_of(colours, "JPEG", exif=b"Exif\0\0no TIFF"),
    }


def test_the_processors_pixels_are_trainings_in_every_mode(processor, tmp_path):
    for name, content in odd_files().items():
        path = tmp_path / "photo"
        path.write_bytes(content)
        forms = [Image.open(io.BytesIO(content)), decode(content), str(path), path]
        first, *others = (processor(images=[form], return_tensors="pt")["pixel_values"][0] for form in forms)
        assert all(torch.equal(first, other) for other in others), name
        # Resizing keeps integer grey values in both; two different ones are 0.015 apart.
        expected = normalize(torch.tensor(ImageTransform(16)(content, np.random.default_rng(0))))
        torch.testing.assert_close(first, expected, atol=1e-6, rtol=0, msg=name)


def test_arrays_are_read_as_files_of_them_would_be(processor):
    files = odd_files()
    for name in ("RGB", "RGBA", "LA", "16 bits"):
        image = Image.open(io.BytesIO(files[name]))
        by_file, by_array = (processor(images=form, return_tensors="pt") for form in ([[image]], [np.asarray(image)]))
        assert torch.equal(by_file["pixel_values"], by_array["pixel_values"]), name
    grey = np.asarray(Image.open(io.BytesIO(files["RGB"])).convert("L"))
    colours = np.asarray(Image.open(io.BytesIO(files["RGB"])))
    wanted = {2: pixels_of(processor, [Image.fromarray(grey)]), 3: pixels_of(processor, [Image.fromarray(colours)])}
    for plain in (grey, colours):
        for kind in (np.int32, np.int64, np.uint32, np.int16):
            assert torch.equal(pixels_of(processor, plain.astype(kind)), wanted[plain.ndim])
        assert torch.equal(pixels_of(processor, plain.astype(np.uint16) * 257), wanted[plain.ndim])
        assert torch.equal(pixels_of(processor, torch.tensor(plain)), wanted[plain.ndim])
    assert torch.equal(pixels_of(processor, grey > 99), pixels_of(processor, (grey > 99).astype(np.uint8) * 255))
    with pytest.raises(OSError, match=r"gone\.jpg"):
        processor(images=["gone.jpg"])


def pixels_of(processor, images, **options) -> torch.Tensor:
    return processor(images=images, return_tensors="pt", **options)["pixel_values"]


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4])
@pytest.mark.parametrize("form", [np.asarray, torch.tensor])
def test_arrays_have_their_channels_first_or_last_alone_or_in_a_batch(processor, num_channels, form):
    batch = np.random.default_rng(0).integers(0, 255, (2, 20, 30, num_channels), dtype=np.uint8)
    modes = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
    wanted = pixels_of(processor, [Image.fromarray(image.squeeze(), modes[num_channels]) for image in batch])
    first = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
    for images in (batch, first, list(batch), list(first)):
        assert torch.equal(pixels_of(processor, [form(image) for image in images]), wanted)
        assert torch.equal(pixels_of(processor, form(np.stack(images))), wanted)
    assert torch.equal(pixels_of(processor, form(first[0])), wanted[:1])


@pytest.mark.parametrize("shape", [(3, 20, 4), (3, 20, 2), (3, 20, 3), (1, 20, 3), (4, 2, 2)])
def test_an_array_of_two_possible_layouts_needs_its_layout(processor, shape):
    array = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"channels may be first or last; .*input_data_format"):
        processor(images=array)
    for layout, last in (("channels_first", array.transpose(1, 2, 0)), ("channels_last", array)):
        image = Image.fromarray(np.ascontiguousarray(last[..., 0] if last.shape[-1] == 1 else last))
        assert torch.equal(pixels_of(processor, array, input_data_format=layout), pixels_of(processor, [image]))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((20, 30), 256), "reach from 256 to 256"),
        (np.full((20, 30, 3), -1, dtype=np.int8), "reach from -1 to -1"),
        (np.full((20, 30, 3), 0.5), "float64"),
        (torch.full((2, 3, 20, 30), 0.5), "float32"),
        (np.full((20, 30, 3), "a"), "<U1"),
        (np.zeros((20, 30, 5), dtype=np.uint8), r"\[20, 30, 5\]"),
        (np.zeros((0, 30, 3), dtype=np.uint8), r"\[0, 30, 3\]"),
        (np.zeros(30, dtype=np.uint8), r"\[30\]"),
    ],
)
def test_arrays_that_are_no_image_are_refused(processor, array, message):
    with pytest.raises(ValueError, match=message):
        processor(images=array)


def test_values_from_zero_to_one_are_accepted_on_request(processor):
    array = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    actual = pixels_of(processor, (array / 255).astype(np.float32), do_rescale=False)
    torch.testing.assert_close(actual, pixels_of(processor, array), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="three channels"):
        processor(images=np.zeros((20, 30, 4)), do_rescale=False)


@pytest.mark.parametrize("limit", [1199, 500])
def test_the_pixel_limit_applies_to_all_inputs_of_the_processor(processor, tmp_path, monkeypatch, limit):
    image = Image.new("RGB", (40, 30))
    image.save(tmp_path / "photo.png")
    forms = (image, np.asarray(image), str(tmp_path / "photo.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert all(pixels_of(processor, [form]).shape == (1, 3, 16, 16) for form in forms)
    opened = Image.open(tmp_path / "photo.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for form in (*forms, opened):
        with pytest.raises(ValueError, match="exceeds limit of"):
            processor(images=[form])
    with pytest.raises(ValueError, match="exceeds limit of"):
        decode((tmp_path / "photo.png").read_bytes())


def test_the_processor_pads_and_cuts_on_the_right(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left", "truncation_side": "left"}))
    texts = ["two dogs", "a red dog on a hill and on and on"]
    actual = Unimo3Processor.from_pretrained(tmp_path)(text=texts)
    assert actual["input_ids"] == processor(text=texts)["input_ids"]
    assert actual["attention_mask"][0] == [1] * 4 + [0] * 4
    # A training text is cut at the same end.
    assert actual["input_ids"][1] == TextEncoder(load_tokenizer(str(tmp_path)), 8)(texts[1])[0].tolist()


def test_eight_bits_are_refused_where_values_from_zero_to_one_are_needed(processor, tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    for image in (array, Image.fromarray(array), tmp_path / "a.png", torch.from_numpy(array)):
        for options in ({"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}):
            with pytest.raises(ValueError, match="do_rescale=False: floating-point RGB from 0 to 1 is needed"):
                processor(images=image, **options)


def test_options_may_be_in_the_groups_of_transformers(processor):
    array = np.random.default_rng(0).random((20, 30, 3), dtype=np.float32)
    expected = pixels_of(processor, array, do_rescale=False)
    assert torch.equal(pixels_of(processor, array, images_kwargs={"do_rescale": False}), expected)
    padded = processor(text=["a dog"], text_kwargs={"padding": "max_length", "max_length": 9}, return_tensors="pt")
    assert padded["input_ids"].shape == (1, 9)
