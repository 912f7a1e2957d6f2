"""finetune.predict --explain: the weights are those that the model uses, and the picture shows them."""

import io

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.finetune.predicting import run
from unimo3.inference.explain import (
    MAX_WORDS,
    draw_explanation,
    read_attention,
    recorded_weights,
    words_of,
)
from unimo3.inference.exported_model import Loaded, load
from unimo3.inference.inputs import Row, prepare, tokens
from unimo3.model.config import Unimo3Config
from unimo3.model.downstream import Unimo3ForImagesAndTextClassification, Unimo3ForVisualQuestionAnswering
from unimo3.model.initialization import initialize_weights
from unimo3.model.processor import Unimo3Processor
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.training.metrics import read_metrics
from unimo3.training.sample_pictures import NUM_SAMPLES

pytestmark = pytest.mark.xdist_group("finetune")


def readings_of(loaded, prepared):
    images = prepared.pixels[None]
    inputs = tokens(loaded, [prepared.text]) | {"pixel_values": images[:, 0] if images.shape[1] == 1 else images}
    words = words_of(loaded.processor.tokenizer, inputs["input_ids"][0].tolist())
    return read_attention(loaded.model, inputs, words)


@pytest.mark.parametrize("gate", ["token", "uniform"])
def test_recorded_weights_give_the_attention_of_the_layer(pretrained, gate):
    model = Unimo3ForPreTraining(Unimo3Config.from_pretrained(pretrained)).eval()
    initialize_weights(model, 2, std=0.2)  # the fixture's are so large that float32 rounds their scores visibly
    generator = torch.Generator().manual_seed(0)
    attended = []
    layers = [layer.cross_attention for layer in model.unimo3.fusion.text.layers]
    seen = []
    for layer in layers:
        if gate == "uniform":
            layer.gate = None
        layer.out.register_forward_pre_hook(lambda _, args: attended.append(args[0]))
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    ids = torch.randint(5, 50, (2, 7), generator=generator)
    with torch.no_grad(), recorded_weights(model) as weights:
        model(ids, torch.randn(2, 3, *[model.config.vision_config.image_size] * 2, generator=generator))
    assert len(weights) == len(layers)
    for layer_weights, levels, output in zip(weights, seen, attended, strict=True):
        values = torch.stack([level[:, :, 1] for level in levels], dim=1)
        expected = torch.einsum("bthsv,bsvhd->bthd", layer_weights, values)
        torch.testing.assert_close(expected.flatten(2), output, rtol=1e-4, atol=1e-5)
    assert not any(layer._forward_hooks for layer in layers)


def not_blank(tokenizer, ids) -> list[int]:
    """Positions of tokens that are neither special nor white space."""
    return [at for at, number in enumerate(ids) if tokenizer.decode([number], skip_special_tokens=True).strip()]


def test_words_have_all_their_tokens_and_no_special_ones(tokenizer):
    text = "a striped circle, twice"
    ids = tokenizer(text)["input_ids"]
    for padding in ([], [tokenizer.pad_token_id] * 3):
        words = words_of(tokenizer, ids + padding)
        assert "".join(word for word, _ in words) == text.replace(" ", "")
        assert torch.cat([positions for _, positions in words]).tolist() == list(range(1, len(ids) - 1))
    assert len(words_of(tokenizer, tokenizer("word " * 30)["input_ids"])) == MAX_WORDS


def test_a_text_that_was_truncated_inside_a_word_has_its_tokens(tokenizer):
    ids = tokenizer("an extraordinarily striped")["input_ids"]
    assert [word for word, _ in words_of(tokenizer, ids, "an extraordinarily striped")] == [
        "an",
        "extraordinarily",
        "striped",
    ]
    for length in range(1, len(ids) - 1):
        cut = [*ids[:length], ids[-1]]
        positions = torch.cat([positions for _, positions in words_of(tokenizer, cut)]).tolist()
        assert set(not_blank(tokenizer, cut)) <= set(positions)
        assert set(positions) <= (set(range(1, length)) or {0})


def test_blank_words_have_no_row(tokenizer):
    words = words_of(tokenizer, tokenizer("a   red\n\ncircle")["input_ids"])
    assert [word for word, _ in words] == ["a", "red", "circle"]


def test_a_pair_of_images_has_a_reading_of_each(tuned, photo):
    loaded = load(tuned / "nlvr2_weights", Unimo3ForImagesAndTextClassification, "cpu", "auto")
    prepared = prepare(loaded, Row((photo, photo), "both are red"))
    readings = readings_of(loaded, prepared)
    assert [reading.words for reading in readings] == [["both", "are", "red"]] * 2
    assert not torch.equal(readings[0].weights, readings[1].weights)  # the second image's embedding is shifted
    for reading in readings:
        torch.testing.assert_close(reading.weights.sum(dim=(1, 2)), torch.ones(3))
        assert [len(levels) for levels in reading.gates] == list(range(1, len(reading.gates) + 1))
        assert [sum(levels) for levels in reading.gates] == pytest.approx([1.0] * len(reading.gates))


def test_the_picture_has_its_heat_where_the_word_reads(tuned, photo):
    loaded = load(tuned / "vqa_weights", Unimo3ForVisualQuestionAnswering, "cpu", "auto")
    prepared = prepare(loaded, Row((photo,), "what is it?"))
    (reading,) = readings_of(loaded, prepared)
    num_patches = reading.weights.shape[-1] - 1
    weights = torch.zeros_like(reading.weights)
    weights[:, 0, num_patches] = 1.0  # every word reads the last patch of the first level
    picture = draw_explanation(prepared.pixels, [reading._replace(weights=weights)], ["what is it?", "0.9  circle"])
    grid = picture.crop((0, picture.height - 134, 120 + 118, picture.height))  # the last word's row, its first level

    def redness(x: int, y: int) -> int:
        red, green, _ = grid.getpixel((x, y))
        return red - green

    assert redness(120 + 108, 108) > 100
    assert redness(120 + 4, 4) < 20
    even = reading._replace(weights=torch.full_like(weights, 1 / weights[0].numel()))
    flat = draw_explanation(prepared.pixels, [even], ["what is it?"])  # equal weights point nowhere
    red, green, _ = flat.getpixel((120 + 56, flat.height - 134 + 56))
    assert red - green < 20


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "snli_ve", "retrieval"])
def test_each_evaluation_shows_attention_and_predictions(tuned, task):
    events = EventAccumulator(str(tuned / task / "tensorboard"), size_guidance={"images": 0}).Reload()
    steps = [record["step"] for record in read_metrics(tuned / task, group="eval")]
    for name in ("attention", "predictions"):
        assert [event.step for event in events.Images(f"eval/{name}")] == steps
    rows = Image.open(io.BytesIO(events.Images("eval/predictions")[-1].encoded_image_string))
    assert rows.height == NUM_SAMPLES * (112 + 8)
    colours = rows.convert("RGB").getcolors(rows.width * rows.height)
    assert len(colours) > 50  # photographs, and not blank ones


@pytest.mark.parametrize(
    ("task", "more"),
    [("vqa", ()), ("nlvr2", ("--image",)), ("snli_ve", ("--json",)), ("retrieval", ())],
)
def test_each_task_explains_and_answers_as_without_it(tuned, photo, tmp_path, capsys, task, more):
    text = "a red\ncircle \U0001f534 " * 40
    arguments = [task, "--weights", tuned / f"{task}_weights", "--image", photo, "--text", text]
    arguments += [argument for option in more for argument in ([option, photo] if option == "--image" else [option])]
    assert run(*arguments) == 0
    alone = capsys.readouterr().out
    assert run(*arguments, "--explain", tmp_path / "out.png") == 0
    assert capsys.readouterr().out == alone
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["--text", "b", "--explain", "out.png"],
            "explains one text with its image; leave it out, or ask for one pair",
        ),
        (["--explain", "out.jpg"], "--explain out.jpg: is a PNG file; end its name in .png"),
        (["--explain", "nowhere/out.png"], "nowhere/out.png: cannot be written there; name a file in a folder"),
    ],
)
def test_what_cannot_be_explained_or_written_is_refused_at_once(tmp_path, capsys, arguments, error):
    command = ["retrieval", "--weights", tmp_path, "--image", "a.jpg", "--text", "a", *arguments]
    assert run(*command) == 78
    assert error in capsys.readouterr().err


def test_a_model_that_reads_in_layer_alone_is_explained(pretrained, photo):
    config = Unimo3Config.from_pretrained(pretrained)
    config.interaction = "in_layer"
    model = Unimo3ForPreTraining(config).eval()
    processor = Unimo3Processor.from_pretrained(pretrained)
    loaded = Loaded(pretrained, model, config, processor, torch.device("cpu"))
    prepared = prepare(loaded, Row((photo,), "a red circle"))
    (reading,) = readings_of(loaded, prepared)
    assert reading.weights.shape[1] == 1
    assert reading.gates == [pytest.approx([1.0])] * config.num_hidden_layers
    draw_explanation(prepared.pixels, [reading], ["a red circle"])
