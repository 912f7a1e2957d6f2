"""Contrast over the complete step: its loss and gradients are those of one large batch, whatever the micro-steps."""

from contextlib import contextmanager

import pytest
import torch

from tests.spawn import run_ranks
from tests.tiny import rows, tiny_batch, tiny_config, tiny_pretraining_model
from unimo3.distributed import sum_over_ranks, world
from unimo3.objectives.args import ItcArgs, ItmArgs, MlmArgs, ObjectivesArgs
from unimo3.objectives.base import PretrainingLoss
from unimo3.objectives.similarity import compare, contrastive_loss
from unimo3.objectives.step_contrast import Generators, ItcOutput

ITC = ObjectivesArgs(MlmArgs(0.0), ItmArgs(0.0), ItcArgs(2.0, over="step"))
OTHERS = ObjectivesArgs(MlmArgs(0.5), ItmArgs(0.7), ItcArgs(0.0))
ALL = ObjectivesArgs(MlmArgs(0.5), ItmArgs(0.7), ItcArgs(2.0, over="step"))

# (micro-steps, rows of a micro-step and rank)
SHAPES = [(1, 5), (2, 3), (3, 3)]


def changes(dropout):
    """Dropout of the text tower; the fusion encoder's would need its own seeds."""
    text = tiny_config().text_config.to_dict()
    return {"text_config": text | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}}


def build(dropout):
    return tiny_pretraining_model(**changes(dropout)).train()


def step_batch(num_rows):
    """Rows of a step: three images have several pairs, in one micro-step and in several."""
    batch = tiny_batch(num_rows)
    batch["image_id"][[2, -1]] = 7
    batch["image_id"][-2] = 0
    return batch


def split(batch, num_steps, first=0, of=1):
    """A rank's micro-batches: neighbouring rows, first all ranks' of the first micro-step."""
    size = len(batch["positions"]) // (num_steps * of)
    return [rows(batch, (step * of + first) * size, (step * of + first + 1) * size) for step in range(num_steps)]


def seeded(batches, seeds):
    """Each micro-batch, its dropout drawn from a seed of its own."""
    for batch, seed in zip(batches, seeds, strict=True):
        torch.manual_seed(seed)
        yield batch


@contextmanager
def outputs_of(module):
    """What a module returns inside, with its graph."""
    outputs = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    yield outputs
    handle.remove()


def gradients_of(model):
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def of_one_batch(batch, num_parts, dropout, others=False):
    """The ITC loss, and gradients, of one process and one graph; each part has dropout of its own."""
    model = build(dropout)
    task = PretrainingLoss(model, (ALL if others else ITC).build(0))
    parts = split(batch, num_parts)
    with outputs_of(model.itc_head) as features:
        for part in seeded(parts, range(num_parts)):
            task(part)
    together = ItcOutput(
        torch.cat([each.text for each in features]),
        torch.cat([each.image for each in features]),
        features[0].temperature,
    )
    loss = contrastive_loss(compare(together, batch["image_id"]))
    (2.0 * loss).backward()
    if others:
        rest = PretrainingLoss(model, OTHERS.build(0))
        for part in seeded(parts, range(num_parts)):
            (rest(part)["loss"] / num_parts).backward()
    return loss.detach(), gradients_of(model)


def assert_same(gradients, expected):
    assert gradients.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        # Some gradients are zero but for rounding, such as those of the keys' biases.
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-5, atol=1e-6 * largest, msg=lambda m, n=name: n + m
        )
        difference = float((gradients[name] - gradient).norm())
        assert difference <= 1e-5 * float(gradient.norm()) + 1e-8 * largest, name


@pytest.mark.parametrize(("num_steps", "size"), SHAPES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("objectives", [ITC, ALL])
def test_micro_steps_have_the_loss_and_gradients_of_one_batch(num_steps, size, dropout, objectives):
    batch = step_batch(num_steps * size)
    expected_loss, expected = of_one_batch(batch, num_steps, dropout, others=objectives is ALL)
    model = build(dropout)
    task = PretrainingLoss(model, objectives.build(0))
    parts = split(batch, num_steps)
    prepared = task.prepare_step(seeded(parts, range(num_steps)), run=task)
    for part, more in zip(parts, prepared, strict=True):
        report = task(part | more)
        torch.testing.assert_close(report["loss_itc"], expected_loss, rtol=1e-5, atol=0)
        (report["loss"] / num_steps).backward()
    assert_same(gradients_of(model), expected)


def test_losses_of_sources_are_those_of_one_batch():
    batch = step_batch(6) | {"source": torch.tensor([0, 1, 1, 0, 1, 1])}
    task = PretrainingLoss(tiny_pretraining_model(), ITC.build(0), ["coco", "vg"])
    parts = split(batch, 2)
    reports = [task(part | more) for part, more in zip(parts, task.prepare_step(parts, run=task), strict=True)]
    together = task(batch)
    for name in ("coco", "vg"):
        key = f"sum of loss_itc/{name}"
        torch.testing.assert_close(sum(report[key] for report in reports), together[key], rtol=1e-5, atol=0)


def test_both_passes_compute_the_same_features_and_draws_continue():
    model = build(0.3)
    task = PretrainingLoss(model, ALL.build(0))
    parts = split(step_batch(6), 2)
    with outputs_of(model.itc_head) as features:
        prepared = task.prepare_step(parts, run=task)
        after = torch.get_rng_state()
        for part, more in zip(parts, prepared, strict=True):
            task(part | more)
            # The fusion encoder draws nothing here; what did draw there would draw what no tower has drawn.
            assert torch.equal(torch.get_rng_state(), after)
    first, second = features[:2], features[2:]
    assert not any(each.text.requires_grad for each in first)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.text, other.text)
        assert torch.equal(one.image, other.image)


def test_draws_inside_restored_generators_are_those_of_their_time():
    generators = Generators.current(torch.device("cpu"))
    one = torch.rand(3)
    torch.rand(2)
    before = torch.get_rng_state()
    with generators.restored(torch.device("cpu")):
        assert torch.equal(torch.rand(3), one)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_first_pass_runs_towers_and_contrastive_head_alone():
    model = tiny_pretraining_model()
    calls = []
    modules = ["itc_head", "itm_head", "mlm_head", "unimo3.fusion", "unimo3.text_tower", "unimo3.vision_tower"]
    for name in modules:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    task = PretrainingLoss(model, ALL.build(0))
    task.prepare_step(split(step_batch(6), 2), run=task)
    assert sorted(calls) == sorted(["itc_head", "unimo3.text_tower", "unimo3.vision_tower"] * 2)


# Several ranks, under ZeRO-3. (micro-steps, rows of a micro-step and rank, dropout, optim.freeze)
RUNS: list[tuple[int, int, float, list]] = [(*shape, dropout, []) for shape in SHAPES for dropout in (0.0, 0.3)]
RUNS.append((2, 3, 0.3, [{"text_tower": 1}, "vision_tower"]))
FROZEN = ("unimo3.text_tower.embeddings.", "unimo3.text_tower.encoder.layer.0.", "unimo3.vision_tower.")


def gradients_on_rank():
    from deepspeed.utils import safe_get_full_grad

    from tests.training.test_engine import FOLDER
    from unimo3.model.initialization import initialize_weights
    from unimo3.model.unimo3 import Unimo3ForPreTraining
    from unimo3.training.ds_config import BatchPlan, read_ds_config
    from unimo3.training.engine import build_engine, build_model
    from unimo3.training.optim import OptimArgs

    rank, size = world()
    results = {}
    for number, (num_steps, micro_batch, dropout, freeze) in enumerate(RUNS):
        plan = BatchPlan(num_steps * micro_batch * size, micro_batch, size)
        ds_config = read_ds_config(str(FOLDER / "zero3_fp32.json"), plan, clip_norm=0.0)
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        model = build_model(ds_config, lambda d=dropout: Unimo3ForPreTraining(tiny_config(**changes(d))))
        initialize_weights(model, 0, std=0.1)
        task = PretrainingLoss(model, ITC.build(0))
        engine = build_engine(task, model, ds_config, OptimArgs(freeze=freeze))
        engine.train()
        parts = split(step_batch(plan.global_batch), num_steps, rank, size)
        seeds = [step * size + rank for step in range(num_steps)]
        prepared = task.prepare_step(seeded(parts, seeds), run=engine)
        for step, (part, more) in enumerate(zip(parts, prepared, strict=True), 1):
            report = engine(part | more)
            engine.backward(report["loss"])
            if step < num_steps:
                engine.step()
        gradients = {name: safe_get_full_grad(p) for name, p in model.named_parameters() if p.requires_grad}
        used = {name: gradient for name, gradient in gradients.items() if gradient is not None and gradient.any()}
        # At its bounds the temperature stops by the sign of its gradient, on which ranks must agree.
        of_temperature = prepared[0]["step_contrast"].temperature_grad
        assert sum_over_ranks(of_temperature).equal(size * of_temperature)
        results[number] = float(sum_over_ranks(report["loss_itc"])) / size, used
    return results


@pytest.mark.integration
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_sharded_ranks_have_the_loss_and_gradients_of_one_batch(num_ranks):
    for results in run_ranks(num_ranks, gradients_on_rank):
        for number, (loss, gradients) in results.items():
            num_steps, size, dropout, freeze = RUNS[number]
            batch = step_batch(num_steps * size * num_ranks)
            expected_loss, expected = of_one_batch(batch, num_steps * num_ranks, dropout)
            assert loss == pytest.approx(float(expected_loss), rel=1e-5)
            frozen = FROZEN if freeze else ()
            assert all(any(name.startswith(prefix) for name in expected) for prefix in frozen)
            used = {name for name, gradient in expected.items() if gradient.any() and not name.startswith(frozen)}
            assert_same(gradients, {name: expected[name] for name in used})
