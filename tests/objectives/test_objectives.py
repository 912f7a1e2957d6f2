"""Losses: weights count, negatives are negatives, and ranks compute what one process computes."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.spawn import run_ranks
from tests.tiny import VOCABULARY, rows, spread_gates, tiny_batch, tiny_pretraining_model
from unimo3.distributed import sum_over_ranks, take_rows, world
from unimo3.model.fusion import mean_gates
from unimo3.objectives.args import ItcArgs, ItmArgs, MlmArgs, ObjectivesArgs
from unimo3.objectives.base import PretrainingLoss

BATCH = 8


def args(mlm=1.0, itm=1.0, itc=1.0, negatives="random"):
    return ObjectivesArgs(MlmArgs(weight=mlm), ItmArgs(itm, negatives), ItcArgs(weight=itc))


def losses(objectives=None, model=None, batch=None):
    task = PretrainingLoss(model or tiny_pretraining_model(), (objectives or args()).build(seed=0))
    return task(batch or tiny_batch(BATCH))


@pytest.mark.parametrize("negatives", ["random", "hard"])
def test_the_total_is_the_weighted_sum(negatives):
    report = losses(args(0.5, 2.0, 3.0, negatives))
    expected = 0.5 * report["loss_mlm"] + 2.0 * report["loss_itm"] + 3.0 * report["loss_itc"]
    torch.testing.assert_close(report["loss"].detach(), expected)


@pytest.mark.parametrize("negatives", ["random", "hard"])
@pytest.mark.parametrize("name", ["mlm", "itm", "itc"])
def test_changing_a_weight_changes_the_total_by_its_loss(name, negatives):
    one, more = losses(args(negatives=negatives)), losses(args(**{name: 1.75}, negatives=negatives))
    torch.testing.assert_close((more["loss"] - one["loss"]).detach(), 0.75 * one[f"loss_{name}"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mlm", "itm", "itc"])
def test_a_weight_of_zero_disables_the_objective(name):
    report = losses(args(**{name: 0.0}))
    assert f"loss_{name}" not in report
    alone = losses(args(**({"mlm": 0.0, "itm": 0.0, "itc": 0.0} | {name: 1.0})))
    torch.testing.assert_close(alone["loss"].detach(), alone[f"loss_{name}"])


@pytest.mark.parametrize("negatives", ["random", "hard"])
def test_towers_fusion_encoder_and_heads_run_once_a_step(negatives):
    model = tiny_pretraining_model()
    calls = []
    modules = ["itc_head", "itm_head", "mlm_head", "unimo3.fusion", "unimo3.text_tower", "unimo3.vision_tower"]
    for name in modules:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    losses(args(negatives=negatives), model)
    assert sorted(calls) == modules


@pytest.mark.parametrize("negatives", ["random", "hard"])
def test_sharing_a_call_of_the_fusion_encoder_leaves_each_loss_as_it_is(negatives):
    together = losses(args(negatives=negatives))
    for omitted in ("mlm", "itm"):
        apart = losses(args(**{omitted: 0.0}, negatives=negatives))
        for name in apart.keys() - {"loss", "gates_text", "gates_image"}:
            torch.testing.assert_close(together[name], apart[name], atol=1e-5, rtol=1e-5)


def test_mlm_equals_the_heads_loss_over_all_logits():
    model, batch = tiny_pretraining_model(), tiny_batch(BATCH)
    report = losses(args(itm=0.0, itc=0.0), model, batch)
    logits = model(batch["mlm_input_ids"], batch["pixel_values"], batch["attention_mask"]).prediction_logits
    expected = cross_entropy(logits.reshape(-1, VOCABULARY), batch["mlm_labels"].flatten(), ignore_index=-100)
    torch.testing.assert_close(report["loss_mlm"], expected.detach(), atol=1e-5, rtol=1e-5)


def test_gate_maps_equal_the_models_gates_of_each_stream():
    model, batch = tiny_pretraining_model(), tiny_batch(BATCH)
    spread_gates(model)
    report = losses(args(itm=0.0, itc=0.0), model, batch)
    out = model(batch["mlm_input_ids"], batch["pixel_values"], batch["attention_mask"], output_gates=True)
    torch.testing.assert_close(report["gates_text"], mean_gates(out.text_gates, batch["attention_mask"]))
    torch.testing.assert_close(report["gates_image"], mean_gates(out.image_gates, None))
    assert not torch.allclose(report["gates_text"], report["gates_image"], atol=1e-4)


@pytest.mark.parametrize("settings", [args(), args(itc=0.0), args(itm=0.0), args(negatives="hard")])
def test_a_batch_of_one_image_is_counted(settings):
    batch = tiny_batch(BATCH)
    assert losses(settings, batch=batch)["single_image_ratio"] == 0
    assert losses(settings, batch=batch | {"image_id": torch.full((BATCH,), 3)})["single_image_ratio"] == 1
    assert "single_image_ratio" not in losses(args(itm=0.0, itc=0.0), batch=batch)


def test_no_masked_token_anywhere_gives_a_zero_loss():
    batch = tiny_batch(BATCH)
    batch["mlm_labels"] = torch.full_like(batch["mlm_labels"], -100)
    assert float(losses(batch=batch)["loss_mlm"]) == 0.0


# Several ranks.


def exchange_on_rank():
    rank, size = world()
    all_rows = torch.arange(size * 3, dtype=torch.float64)[:, None] * torch.ones(1, 2, dtype=torch.float64)
    local_rows = all_rows[rank * 3 : rank * 3 + 3].clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(5):
        source = torch.randint(size * 3, (size * 3,), generator=generator)
        taken = take_rows(local_rows, source)
        (gradient,) = torch.autograd.grad((taken * (1 + rank)).sum(), local_rows)
        results.append((source, taken.detach(), gradient))
    return results, rows_sent_for(local_rows.detach(), torch.full((size * 3,), 4))


def rows_sent_for(local_rows, source):
    exchange, sizes = torch.distributed.all_to_all_single, []

    def counted(received, sent, *args):
        sizes.append(len(sent))
        return exchange(received, sent, *args)

    torch.distributed.all_to_all_single = counted
    assert (take_rows(local_rows, source) == float(source[0])).all()
    torch.distributed.all_to_all_single = exchange
    return sizes


@pytest.fixture(scope="module")
def exchanges():
    return run_ranks(3, exchange_on_rank)


@pytest.mark.integration
def test_a_row_that_all_ranks_need_is_sent_to_each_rank_once(exchanges):
    assert [sizes for _, sizes in exchanges] == [[0], [2], [0]]


@pytest.mark.integration
def test_rows_travel_between_three_ranks_with_their_gradient(exchanges):
    for results in zip(*(results for results, _ in exchanges), strict=True):
        source = results[0][0]
        taken = torch.cat([result[1] for result in results])
        assert torch.equal(taken[:, 0], source.double())
        gradient = torch.cat([result[2] for result in results])[:, 0]
        expected = torch.zeros(9, dtype=torch.float64)
        for target, origin in enumerate(source.tolist()):
            expected[origin] += 1 + target // 3
        assert torch.equal(gradient, expected)


def losses_on_rank(negatives):
    rank, size = world()
    micro_batch = BATCH // size
    model = tiny_pretraining_model().double()
    batch = tiny_batch(BATCH)
    batch["pixel_values"] = batch["pixel_values"].double()
    task = PretrainingLoss(model, args(negatives=negatives).build(seed=0))
    report = task(rows(batch, rank * micro_batch, (rank + 1) * micro_batch))
    report["loss"].backward()
    # Gates are a metric of each rank; the rest are means.
    metrics = {name: value.detach() for name, value in report.items() if not name.startswith("gates")}
    means = {name: float(sum_over_ranks(value.reshape(1))) / size for name, value in metrics.items()}
    gradients = {name: sum_over_ranks(p.grad) / size for name, p in model.named_parameters() if p.grad is not None}
    return means, gradients


def losses_of_both_on_rank():
    return {negatives: losses_on_rank(negatives) for negatives in ("random", "hard")}


@pytest.fixture(scope="module")
def four_ranks():
    return run_ranks(4, losses_of_both_on_rank)


@pytest.mark.integration
@pytest.mark.parametrize("negatives", ["random", "hard"])
def test_four_ranks_give_the_losses_and_gradients_of_one_process(negatives, four_ranks):
    one, gradients = losses_on_rank(negatives)
    for rank in four_ranks:
        other, other_gradients = rank[negatives]
        for name, value in one.items():
            assert math.isclose(other[name], value, rel_tol=1e-5), name
        assert other_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            # The heads' logits are float32, whatever the model's type.
            torch.testing.assert_close(other_gradients[name], gradient, atol=1e-5, rtol=1e-4)
