"""Losses: weights count, negatives are negatives, and ranks compute what one process computes."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.spawn import run_ranks
from tests.tiny import VOCABULARY, rows, tiny_batch, tiny_pretraining_model
from unimo3.objectives.args import ItcArgs, ItmArgs, MlmArgs, ObjectivesArgs
from unimo3.objectives.base import PretrainingTask
from unimo3.objectives.exchange import take_rows
from unimo3.objectives.itm import draw_random_negatives

BATCH = 8


def args(mlm=1.0, itm=1.0, itc=1.0):
    return ObjectivesArgs(MlmArgs(weight=mlm), ItmArgs(weight=itm), ItcArgs(weight=itc))


def losses(objectives=None, model=None, batch=None):
    task = PretrainingTask(model or tiny_pretraining_model(), (objectives or args()).build(seed=0))
    return task(batch or tiny_batch(BATCH))


def test_the_total_is_the_weighted_sum():
    report = losses(args(0.5, 2.0, 3.0))
    expected = 0.5 * report["loss_mlm"] + 2.0 * report["loss_itm"] + 3.0 * report["loss_itc"]
    torch.testing.assert_close(report["loss"].detach(), expected)


@pytest.mark.parametrize("name", ["mlm", "itm", "itc"])
def test_changing_a_weight_changes_the_total_by_its_loss(name):
    one, more = losses(args()), losses(args(**{name: 1.75}))
    torch.testing.assert_close((more["loss"] - one["loss"]).detach(), 0.75 * one[f"loss_{name}"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mlm", "itm", "itc"])
def test_a_weight_of_zero_leaves_the_objective_out(name):
    report = losses(args(**{name: 0.0}))
    assert f"loss_{name}" not in report
    alone = losses(args(**({"mlm": 0.0, "itm": 0.0, "itc": 0.0} | {name: 1.0})))
    torch.testing.assert_close(alone["loss"].detach(), alone[f"loss_{name}"])


def test_each_tower_and_the_fusion_encoder_run_once_a_step():
    model = tiny_pretraining_model()
    calls = []
    for name in ("text_tower", "vision_tower", "fusion"):
        getattr(model.unimo3, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    losses(model=model)
    assert sorted(calls) == ["fusion", "text_tower", "vision_tower"]


def test_mlm_equals_the_heads_loss_over_whole_logits():
    model, batch = tiny_pretraining_model(), tiny_batch(BATCH)
    report = losses(args(itm=0.0, itc=0.0), model, batch)
    logits = model(batch["mlm_input_ids"], batch["pixel_values"], batch["attention_mask"]).prediction_logits
    expected = cross_entropy(logits.reshape(-1, VOCABULARY), batch["mlm_labels"].flatten(), ignore_index=-100)
    torch.testing.assert_close(report["loss_mlm"], expected.detach(), atol=1e-5, rtol=1e-5)


def test_itm_pairs_half_the_texts_with_another_image():
    ids = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7, 8])
    sources = [draw_random_negatives(ids, seed=0, position=position) for position in range(0, 200, 10)]
    for source in sources:
        changed = source != torch.arange(10)
        assert changed.sum() == 5
        assert (ids[source[changed]] != ids[changed.nonzero().flatten()]).all()
    assert len({tuple(source.tolist()) for source in sources}) > 15
    assert torch.equal(sources[3], draw_random_negatives(ids, seed=0, position=30))


def test_a_batch_of_one_image_has_no_negatives():
    same = draw_random_negatives(torch.zeros(6, dtype=torch.long), seed=0, position=0)
    assert torch.equal(same, torch.arange(6))


def test_itc_takes_two_captions_of_an_image_for_no_negatives():
    model, batch = tiny_pretraining_model(), tiny_batch(4)
    report = losses(args(mlm=0.0, itm=0.0), model, batch)
    out = model.itc_head(
        model.unimo3.encode_text(batch["input_ids"], batch["attention_mask"]),
        model.unimo3.encode_image(batch["pixel_values"]),
    )
    logits = out.image @ out.text.T / out.temperature
    logits[0, 1] = logits[1, 0] = -torch.inf
    target = torch.arange(4)
    expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(report["loss_itc"], expected.detach(), atol=1e-5, rtol=1e-5)


def test_no_masked_token_anywhere_gives_a_zero_loss():
    batch = tiny_batch(BATCH)
    batch["mlm_labels"] = torch.full_like(batch["mlm_labels"], -100)
    assert float(losses(batch=batch)["loss_mlm"]) == 0.0


# Several ranks.


def exchange_on_rank():
    from unimo3.distributed import world

    rank, size = world()
    whole = torch.arange(size * 3, dtype=torch.float64)[:, None] * torch.ones(1, 2, dtype=torch.float64)
    own = whole[rank * 3 : rank * 3 + 3].clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(5):
        source = torch.randint(size * 3, (size * 3,), generator=generator)
        taken = take_rows(own, source)
        (gradient,) = torch.autograd.grad((taken * (1 + rank)).sum(), own)
        results.append((source, taken.detach(), gradient))
    return results


@pytest.mark.integration
def test_rows_travel_between_three_ranks_with_their_gradient():
    ranks = run_ranks(3, exchange_on_rank)
    for results in zip(*ranks, strict=True):
        source = results[0][0]
        taken = torch.cat([result[1] for result in results])
        assert torch.equal(taken[:, 0], source.double())
        gradient = torch.cat([result[2] for result in results])[:, 0]
        expected = torch.zeros(9, dtype=torch.float64)
        for target, origin in enumerate(source.tolist()):
            expected[origin] += 1 + target // 3
        assert torch.equal(gradient, expected)


def losses_on_rank():
    from unimo3.distributed import world
    from unimo3.objectives.exchange import sum_over_ranks

    rank, size = world()
    share = BATCH // size
    model = tiny_pretraining_model().double()
    batch = tiny_batch(BATCH)
    batch["pixel_values"] = batch["pixel_values"].double()
    task = PretrainingTask(model, args().build(seed=0))
    report = task(rows(batch, rank * share, (rank + 1) * share))
    report["loss"].backward()
    means = {name: float(sum_over_ranks(value.detach().reshape(1))) / size for name, value in report.items()}
    gradients = {name: sum_over_ranks(p.grad) / size for name, p in model.named_parameters() if p.grad is not None}
    return means, gradients


@pytest.mark.integration
def test_four_ranks_give_the_losses_and_gradients_of_one_process():
    (one, gradients), *_ = run_ranks(1, losses_on_rank)
    for other, other_gradients in run_ranks(4, losses_on_rank):
        for name, value in one.items():
            assert math.isclose(other[name], value, rel_tol=1e-5), name
        assert other_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            # The heads' logits are float32, whatever the model's type.
            torch.testing.assert_close(other_gradients[name], gradient, atol=1e-5, rtol=1e-4)
