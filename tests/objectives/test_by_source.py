"""Losses of each source of a mixture: they add up to the loss of all, on any number of ranks."""

import pytest
import torch

from tests.spawn import run_ranks
from tests.tiny import rows, tiny_batch, tiny_pretraining_model
from unimo3.data.index import source_names
from unimo3.distributed import sum_over_ranks, world
from unimo3.objectives.args import ItcArgs, ItmArgs, MlmArgs, ObjectivesArgs
from unimo3.objectives.base import PretrainingLoss
from unimo3.objectives.by_source import means_by_source

BATCH = 8
SOURCES = torch.tensor([0, 1, 1, 2, 0, 1, 1, 0])
NAMES = ["coco", "vg", "own"]


def objectives(negatives):
    return ObjectivesArgs(MlmArgs(), ItmArgs(1.0, negatives), ItcArgs()).build(seed=0)


def batch():
    return tiny_batch(BATCH) | {"source": SOURCES}


def reported(names, negatives="random", training=True):
    torch.manual_seed(0)
    return PretrainingLoss(tiny_pretraining_model(), objectives(negatives), names).train(training)(batch())


@pytest.mark.parametrize("negatives", ["random", "hard"])
def test_sums_of_the_sources_are_those_of_the_batch(negatives):
    report = reported(NAMES, negatives)
    for name in ("mlm", "itm", "itc"):
        sums = torch.stack([report[f"sum of loss_{name}/{source}"] for source in NAMES])
        counts = torch.stack([report[f"count of loss_{name}/{source}"] for source in NAMES])
        torch.testing.assert_close(sums.sum() / counts.sum(), report[f"loss_{name}"], atol=1e-5, rtol=1e-5)
        assert counts.min() > 0
    assert [report[f"count of loss_itc/{source}"].item() for source in NAMES] == [3, 4, 1]
    assert not any(value.requires_grad for name, value in report.items() if " of " in name)


def test_a_source_alone_has_the_loss_of_its_rows():
    report = reported(NAMES)
    with torch.no_grad():
        torch.manual_seed(0)
        task = PretrainingLoss(tiny_pretraining_model(), ObjectivesArgs(MlmArgs(), ItmArgs(0.0), ItcArgs(0.0)).build(0))
        alone = task({key: value[SOURCES == 1] if hasattr(value, "shape") else value for key, value in batch().items()})
    mean = report["sum of loss_mlm/vg"] / report["count of loss_mlm/vg"]
    torch.testing.assert_close(mean, alone["loss_mlm"], atol=1e-5, rtol=1e-5)


def test_the_loss_keeps_its_bits_and_evaluations_report_no_sources():
    many, one, evaluated = reported(NAMES), reported(NAMES[:1]), reported(NAMES, training=False)
    assert torch.equal(many["loss"], one["loss"])
    assert not any(" of " in name for name in (*one, *evaluated))
    assert {name for name in many if " of " not in name} == one.keys()


def of_rank(names):
    rank, size = world()
    count = BATCH // size
    torch.manual_seed(0)
    task = PretrainingLoss(tiny_pretraining_model(), objectives("random"), names).train()
    report = task(rows(batch(), rank * count, (rank + 1) * count))
    scalars = {name: value.detach().float().reshape(1) for name, value in sorted(report.items()) if value.numel() == 1}
    return {name: (sum_over_ranks(value) / size).item() for name, value in scalars.items()}


@pytest.mark.integration
def test_ranks_with_other_sources_give_the_means_of_one_process():
    alone, together = run_ranks(1, of_rank, NAMES)[0], run_ranks(2, of_rank, NAMES)
    expected = means_by_source(alone)
    for means in together:
        actual = means_by_source(means)
        assert actual.keys() == expected.keys()
        for name in ("mlm", "itm", "itc"):
            for source in NAMES:
                assert actual[f"loss_{name}/{source}"] == pytest.approx(expected[f"loss_{name}/{source}"], rel=1e-4)


def test_a_source_that_no_rank_has_read_has_no_mean():
    means = {"loss": 1.5, "sum of loss_mlm/a": 6.0, "count of loss_mlm/a": 4.0}
    means |= {"sum of loss_mlm/b": 0.0, "count of loss_mlm/b": 0.0}
    assert means_by_source(means) == {"loss": 1.5, "loss_mlm/a": 1.5, "loss_mlm/b": None}


class Named:
    def __init__(self, dataset, split):
        self.dataset, self.split = dataset, split


def test_names_of_sources_are_short_and_differ():
    sources = [
        Named("coco", "train"),
        Named("vg", "train"),
        Named("vg", "val"),
        Named("own", "train"),
        Named("own", "train"),
    ]
    assert source_names(sources) == ["coco", "vg_train", "vg_val", "own_train", "own_train_4"]
