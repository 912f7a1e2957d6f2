"""The sample order: permutations, any position at once, the same batches at any number of ranks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimo3.data.order import SampleOrder, SequentialOrder, evaluation_positions, micro_batch_positions

UNEVEN = st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(sum)


@given(sizes=UNEVEN, window=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_every_unit_once(sizes, window, seed):
    order = SampleOrder(sizes, seed, window)
    everything = sorted((shard, unit) for shard, size in enumerate(sizes) for unit in range(size))
    for epoch in range(2):
        units = [order[epoch * order.num_units + offset] for offset in range(order.num_units)]
        assert {unit.epoch for unit in units} == {epoch}
        assert sorted((unit.shard, unit.unit) for unit in units) == everything


def test_epochs_and_seeds_differ_and_a_position_is_reached_at_once():
    order = SampleOrder([50, 50, 50], seed=0, window_shards=2)
    first = [order[position][1:] for position in range(150)]
    second = [order[position][1:] for position in range(150, 300)]
    assert first != second
    assert first != [SampleOrder([50, 50, 50], 1, 2)[position][1:] for position in range(150)]
    assert SampleOrder([50, 50, 50], 0, 2)[10**12] == order[10**12]


def test_samples_of_a_window_are_mixed_and_windows_are_not():
    order = SampleOrder([40] * 6, seed=0, window_shards=3)
    assert len({order[position].shard for position in range(20)}) == 3
    assert len({order[position].shard for position in range(120)}) == 3


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 12), (2, 6), (4, 3), (1, 3), (2, 3)])
def test_ranks_and_accumulation_share_out_the_same_global_batch(world_size, micro_batch):
    num_accumulation = 12 // (world_size * micro_batch)
    read = [
        position
        for micro_step in range(num_accumulation)
        for rank in range(world_size)
        for position in micro_batch_positions(5, micro_step, rank, 12, micro_batch, world_size)
    ]
    assert read == list(range(60, 72))


@pytest.mark.parametrize(("num_units", "world_size", "batch"), [(10, 3, 2), (1, 4, 8), (12, 2, 3), (7, 1, 4)])
def test_evaluation_counts_every_unit_once_and_no_rank_runs_out_early(num_units, world_size, batch):
    plans = [evaluation_positions(num_units, rank, world_size, batch) for rank in range(world_size)]
    assert len({len(plan) for plan in plans}) == 1
    assert all(len(positions) == batch for plan in plans for positions in plan)
    counted = sorted(p for plan in plans for positions in plan for p in positions if p >= 0)
    assert counted == list(range(num_units))


def test_sequential_order_follows_the_shards():
    order = SequentialOrder([2, 0, 3])
    assert [(order[p].shard, order[p].unit) for p in range(5)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    with pytest.raises(IndexError):
        order[5]


def test_an_order_without_units_is_refused():
    with pytest.raises(ValueError, match="holds no units"):
        SampleOrder([0, 0], 0, 1)
