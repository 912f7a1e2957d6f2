"""A planned fine-tuning step against the real one: its batches, operations and memory, of every task."""

import functools
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finetune.plan_settings import model_of_recipe, planned
from finetune.task import InputSettings
from finetune.tasks import TASKS, config_class
from finetune.vqa import PUBLISHED_ANSWERS
from tests.saved_tensors import bytes_saved_by_a_step
from unimo3 import config
from unimo3.data.args import DataArgs
from unimo3.data.index import ShardIndex
from unimo3.data.loader import ReaderArgs, TrainingLoader
from unimo3.data.order import training_order
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.model.initialization import initialize_weights
from unimo3.training.evaluation import to_device
from unimo3.training.plan.memory import model_sizes
from unimo3.training.plan.step_trace import trace_step

TOKENS, SIDE = 12, 16
FIXTURES = {"vqa": "vqa", "nlvr2": "nlvr2", "snli_ve": "snli_ve", "retrieval": "coco"}


def settings_of(task, weights, *arguments):
    shape = ("--data.max_text_tokens", str(TOKENS), "--image_size", str(SIDE))
    return config.parse(planned(config_class(task)), ["--init", str(weights), *shape, *map(str, arguments)], "", "")


@pytest.fixture(params=TASKS)
def run(request, pretrained):
    """Settings of a task, its step, and a maker of batches from its shards by the real loader."""
    shards: Path = request.getfixturevalue(FIXTURES[request.param])
    settings = settings_of(request.param, pretrained, "--data.train", shards / "train")
    reading = InputSettings(load_tokenizer(str(pretrained)), TOKENS, ImageTransform(SIDE), 0)
    samples = settings.build_task().samples(ShardIndex(str(shards / "train")), reading)

    def read(num_rows):
        order = training_order([samples.units_per_shard], [1.0], 0, DataArgs().window_shards)
        loader = TrainingLoader([samples], order, num_rows, num_rows, 0, 1, ReaderArgs(0, 1))
        return to_device(next(iter(loader))[0], torch.device("cpu"))

    return settings, settings.planned_run().step, read


def real_task(step):
    """The step's objective on the CPU; cross-layer attention with heads of this width is plain there as on a GPU."""
    model = step.model_class(step.model)
    initialize_weights(model, 0, std=0.1)
    model.unimo3.use_attention_kernel("reference")
    return step.objective(model).train()


@functools.cache
def cost_of(task, weights, *arguments):
    return trace_step(settings_of(task, weights, *arguments).planned_run().step, torch.float32, False)


def test_a_batch_has_the_shapes_that_the_loader_yields(run):
    _, step, read = run
    real = read(3)
    for name, blank in step.batch(3).items():
        assert (name, blank.shape, blank.dtype) == (name, real[name].shape, real[name].dtype)
    # The rest is for the loop: names, counts, and fields for scoring.
    further = {name for name, value in real.items() if isinstance(value, torch.Tensor)} - set(step.batch(3))
    assert further <= {"positions", "image_id", "source"}


def test_operations_and_activations_are_those_of_a_real_step(run):
    _, step, read = run
    task, cost = real_task(step), trace_step(step, torch.float32, False)
    few, many = read(16), read(32)
    # torch counts nothing for its CPU kernel of attention; the plain one is made of products, which it counts.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        task(many)
    assert cost.forward_flops == pytest.approx(counter.get_total_flops() / 32, rel=0.01)
    measured = (bytes_saved_by_a_step(task, many) - bytes_saved_by_a_step(task, few)) / 16
    assert cost.saved_bytes == pytest.approx(measured, rel=0.03)


def test_nlvr2_runs_images_and_fusion_twice_and_the_text_once(pretrained):
    model = settings_of("snli_ve", pretrained).model_config()
    pair, single = cost_of("nlvr2", pretrained), cost_of("snli_ve", pretrained)
    width, layers = model.text_config.hidden_size, model.text_config.num_hidden_layers
    inner = model.text_config.intermediate_size
    text = layers * (2 * TOKENS * (4 * width * width + 2 * width * inner) + 4 * TOKENS * TOKENS * width)
    # The heads: two of 2 D into 2 D into 3, less one of 4 D into 2 D into 2.
    heads = 2 * 2 * model.hidden_size * (2 * 3 - 2)
    assert 2 * single.forward_flops - pair.forward_flops == pytest.approx(text + heads, rel=1e-6)
    assert pair.peak_bytes == pytest.approx(2 * single.peak_bytes, rel=0.1)


def test_a_head_of_more_answers_costs_more(pretrained, vqa):
    few, published = (cost_of("vqa", pretrained, *extra) for extra in (("--data.train", vqa / "train"), ()))
    model = settings_of("vqa", pretrained).planned_run().step.model
    assert model.num_answers == PUBLISHED_ANSWERS == 3129
    num_answers = settings_of("vqa", pretrained, "--data.train", vqa / "train").planned_run().step.model.num_answers
    assert 0 < num_answers < 100
    further = 2 * 2 * model.hidden_size * (PUBLISHED_ANSWERS - num_answers)
    assert published.forward_flops - few.forward_flops == further


def test_an_image_size_is_the_tasks(pretrained):
    assert settings_of("nlvr2", pretrained, "--image_size", 32).planned_run().step.batch(5)["pixel_values"].shape == (
        5,
        2,
        3,
        32,
        32,
    )
    large, small = cost_of("snli_ve", pretrained, "--image_size", 32), cost_of("snli_ve", pretrained)
    # 17 image tokens for 5, with 12 of text.
    assert (12 + 17) / (12 + 5) < large.forward_flops / small.forward_flops < 17 / 5


def test_an_exported_folder_and_a_run_give_the_model(pretrained, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(pretrained, run / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = [model_sizes(settings_of("vqa", init).planned_run().step.build()) for init in (pretrained, run)]
    assert sizes[0] == sizes[1]
    # Two layers from 64 to 64 to as many answers as were published, and a layer norm.
    assert sizes[0].roles["heads"] == 64 * 65 + 65 * PUBLISHED_ANSWERS + 2 * 64


def test_a_recipes_model_is_that_of_pretraining():
    from pretrain.plan import parse_settings

    for size in ("tiny", "base"):
        path = f"pretrain/recipes/{size}.yaml"
        assert model_of_recipe(path).to_dict() == parse_settings(["--config", path]).model.to_config().to_dict()


@pytest.mark.parametrize("task", TASKS)
def test_settings_of_planning_are_those_of_training_and_the_models_recipe(task):
    trained = config_class(task)
    assert trained.task.__name__.lower() == task.replace("_", "")
    assert set(config.flatten_fields(planned(trained))) == {*config.flatten_fields(trained), "model_recipe"}
