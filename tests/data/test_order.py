"""The sample order: permutations, any position at once, the same batches at any number of ranks."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimo3.data.args import DataArgs
from unimo3.data.order import (
    MIX_WINDOW,
    MixedOrder,
    SampleOrder,
    SequentialOrder,
    batch_of_step,
    batches_read,
    evaluation_positions,
    micro_batch_positions,
    training_order,
)

UNEVEN = st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(sum)


@given(sizes=UNEVEN, window=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_every_epoch_contains_every_unit_once(sizes, window, seed):
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


RANGES = st.lists(st.integers(0, 30), max_size=6, unique=True).map(
    lambda ends: [list(pair) for pair in zip(sorted(ends)[::2], sorted(ends)[1::2], strict=False)]
)


@given(skipped=RANGES, num_steps=st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_steps_read_all_batches_but_the_skipped_ones(skipped, num_steps):
    expected = [number for number in range(80) if not any(first <= number < end for first, end in skipped)]
    assert [batch_of_step(step, skipped) for step in range(num_steps)] == expected[:num_steps]
    ranges = batches_read(num_steps, skipped)
    assert [number for first, end in ranges for number in range(first, end)] == expected[:num_steps]
    assert all(earlier[1] < later[0] for earlier, later in itertools.pairwise(ranges))


@pytest.mark.parametrize(
    ("skip", "error"),
    [
        ([[5, 5]], "[5, 5]: two steps [a, b] are needed, a at least 0 and below b"),
        ([[-1, 5]], "[-1, 5]: two steps [a, b] are needed"),
        ([[1, 2, 3]], "[1, 2, 3]: two steps [a, b] are needed"),
        ([[4, 6], [1, 2]], "[1, 2]: begins before the end of [4, 6]; list ranges in ascending order, without overlap"),
        ([[4, 6], [5, 7]], "[5, 7]: begins before the end of [4, 6]"),
    ],
)
def test_ranges_that_cannot_be_skipped_are_named(skip, error):
    data = DataArgs(skip=skip)
    (line,) = [line for line in data.quick_errors() if "skip" in line]
    assert line.startswith(f"data.skip: {error}")
    assert data.stream_length(3, 8) == 24


@given(sizes=UNEVEN, window=st.integers(1, 9), seed=st.integers(0, 1000), epoch=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_order_is_that_of_earlier_versions(sizes, window, seed, epoch):
    order = SampleOrder(sizes, seed, window)
    units = [order[epoch * order.num_units + offset] for offset in range(order.num_units)]
    shards = np.random.default_rng((seed, epoch, 0)).permutation(len(sizes)).tolist()
    expected = []
    for number, start in enumerate(range(0, len(shards), window)):
        of_window = [(shard, unit) for shard in shards[start : start + window] for unit in range(sizes[shard])]
        drawn = np.random.default_rng((seed, epoch, 1, number)).permutation(len(of_window))
        expected += [of_window[local] for local in drawn.tolist()]
    assert [(unit.shard, unit.unit) for unit in units] == expected


def test_the_first_units_of_a_large_order_stay_what_they_are():
    order = SampleOrder(np.arange(100_000) % 7, 3, 16)
    positions = [0, 1, order.num_units - 1, order.num_units, 5 * order.num_units + 123_456]
    expected = [(0, 56387, 1), (0, 56387, 0), (0, 76039, 4), (1, 33612, 4), (5, 52716, 2)]
    assert [tuple(order[position][:3]) for position in positions] == expected


def test_samples_of_a_window_are_mixed_and_windows_are_not():
    order = SampleOrder([40] * 6, seed=0, window_shards=3)
    assert len({order[position].shard for position in range(20)}) == 3
    assert len({order[position].shard for position in range(120)}) == 3


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 12), (2, 6), (4, 3), (1, 3), (2, 3)])
def test_ranks_and_accumulation_divide_the_same_global_batch(world_size, micro_batch):
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
    with pytest.raises(ValueError, match="contains no units"):
        SampleOrder([0, 0], 0, 1)


WEIGHTS = st.lists(st.floats(0.01, 50).map(lambda weight: round(weight, 3)), min_size=1, max_size=5)


@given(weights=WEIGHTS, seed=st.integers(0, 1000), window=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_every_window_of_a_mixture_follows_the_weights_to_within_one(weights, seed, window):
    order = mixture([7] * len(weights), weights, seed)
    given_before, given_after = order._counts_before(window), order._counts_before(window + 1)
    for fraction, before, after in zip(order._segments[0].fractions, given_before, given_after, strict=True):
        assert abs((after - before) - MIX_WINDOW * fraction) < 1
        assert abs(before - window * MIX_WINDOW * fraction) < 1
    start, end = sum(given_before), sum(given_after)
    sources = Counter(order[position].source for position in (start, (start + end) // 2, end - 1))
    assert set(sources) <= set(range(len(weights)))


def mixture(sizes, weights, seed=0, max_epochs=0):
    orders = [SampleOrder([size], seed + number, 1) for number, size in enumerate(sizes)]
    return MixedOrder(orders, weights, seed, max_epochs)


def test_a_mixture_preserves_each_sources_order_and_skips_nothing():
    sizes, weights = [37, 1000, 5], [1, 2.5, 0.02]
    order, alone = mixture(sizes, weights), [SampleOrder([size], number, 1) for number, size in enumerate(sizes)]
    taken = Counter()
    for position in range(5 * MIX_WINDOW):
        unit = order[position]
        expected = alone[unit.source][taken[unit.source]]
        assert unit == expected._replace(source=unit.source)
        taken[unit.source] += 1
    total = sum(weights)
    for source, weight in enumerate(weights):
        assert abs(taken[source] - 5 * MIX_WINDOW * weight / total) < 2
    # Neither source comes in one block.
    sources = [order[position].source for position in range(MIX_WINDOW)]
    assert max(len(list(group)) for _, group in itertools.groupby(sources)) < 40


def test_each_window_of_a_mixture_has_another_sequence_of_sources():
    mixed = mixture([50_000, 50_000], [1.0, 1.0])
    first, second = ([mixed[window * MIX_WINDOW + i].source for i in range(MIX_WINDOW)] for window in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_mixture_can_start_at_any_position_and_differs_by_seed():
    order = mixture([50, 70], [1, 3])
    assert mixture([50, 70], [1, 3])[10**13 + 7] == order[10**13 + 7]
    assert [order[p] for p in range(200)] != [mixture([50, 70], [1, 3], seed=9)[p] for p in range(200)]
    # Only ratios count.
    assert [order[p] for p in range(200)] == [mixture([50, 70], [2, 6])[p] for p in range(200)]


@given(
    sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.1, 1, 1, 2.5, 7]), min_size=4, max_size=4),
    max_epochs=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_no_source_exceeds_its_epochs_and_the_others_continue(sizes, weights, max_epochs):
    weights = weights[: len(sizes)]
    order, alone = mixture(sizes, weights, max_epochs=max_epochs), mixture(sizes, weights)
    alone_of = [SampleOrder([size], number, 1) for number, size in enumerate(sizes)]
    units = [order[position] for position in range(int(order.num_units))]
    taken = Counter()
    for unit in units:
        assert unit == alone_of[unit.source][taken[unit.source]]._replace(source=unit.source)
        taken[unit.source] += 1
    for source, size in enumerate(sizes):
        # Less than a window's worth of it is missing.
        assert max_epochs * size - MIX_WINDOW <= taken[source] <= max_epochs * size
    # Until the first one leaves, the stream is that without a limit.
    first = order._segments[1].window
    assert units[: first * (MIX_WINDOW - len(sizes))] == [alone[p] for p in range(first * (MIX_WINDOW - len(sizes)))]
    with pytest.raises(IndexError):
        order[int(order.num_units)]


def test_weights_of_the_sources_that_stay_keep_their_ratio():
    order = mixture([3 * MIX_WINDOW, 10**6, 10**6], [2, 1, 3], max_epochs=1)
    first, second = order._segments[:2]
    assert [float(part) for part in first.fractions] == pytest.approx([2 / 6, 1 / 6, 3 / 6])
    assert [float(part) for part in second.fractions] == pytest.approx([0, 1 / 4, 3 / 4])
    assert second.window == 9
    assert second.counts == (3 * MIX_WINDOW, 1536, 4608)
    position = 9 * MIX_WINDOW + 5 * MIX_WINDOW
    assert Counter(order[p].source for p in range(position, position + MIX_WINDOW)) == {1: 256, 2: 768}


@pytest.mark.parametrize("weights", [[1, 0], [1, -2], [1, float("nan")], [1], []])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights: "):
        mixture([5, 5], weights) if len(weights) == 2 else MixedOrder([SampleOrder([5], 0, 1)] * 2, weights, 0)


def test_one_source_is_not_mixed_and_several_are_shuffled_separately():
    assert isinstance(training_order([[3, 4]], [2.0], 5, 2), SampleOrder)
    order = training_order([[300], [300]], [1, 1], 5, 2)
    units = {source: [] for source in (0, 1)}
    for position in range(400):
        units[order[position].source].append(order[position].unit)
    assert units[0][:150] != units[1][:150]


def webdataset_shuffle(order_of_shards, samples_per_shard, buffer):
    from webdataset.filters import _shuffle

    stream = ((shard, sample) for shard in order_of_shards for sample in range(samples_per_shard))
    return list(_shuffle(stream, bufsize=buffer, initial=buffer, seed=0))


def neighbours_of_one_shard(units) -> float:
    return sum(one[0] == other[0] for one, other in itertools.pairwise(units)) / len(units)


@pytest.mark.parametrize(("window", "buffer_shards", "least"), [(8, 8, 0.45), (16, 8, 0.95)])
def test_shuffle_quality_against_webdatasets(window, buffer_shards, least):
    """Two measures: how far a sample is moved, and how seldom neighbours are of one shard.

    At the same buffer webdataset's moves samples twice as far: some stay in it for long. Ours stores numbers instead of
    samples, so the default window is twice a large buffer of webdataset's, and as good by both.
    """
    num_shards, size = 96, 250
    order = SampleOrder([size] * num_shards, seed=0, window_shards=window)
    ours = [order[position][1:3] for position in range(order.num_units)]
    shards = list(dict.fromkeys(shard for shard, _ in ours))
    starts = {shard: number * size for number, shard in enumerate(shards)}
    theirs = webdataset_shuffle(shards, size, buffer_shards * size)

    def displacement(units):
        moved = (abs(position - starts[shard] - unit) for position, (shard, unit) in enumerate(units))
        return sum(moved) / len(units)

    # A permutation of a window moves a sample by a third of it on average, and its shards are mixed evenly.
    assert displacement(ours) == pytest.approx(window * size / 3, rel=0.05)
    assert neighbours_of_one_shard(ours) == pytest.approx(1 / window, rel=0.06)
    assert displacement(ours) > least * displacement(theirs)
    assert neighbours_of_one_shard(theirs) > least * neighbours_of_one_shard(ours)
    assert max(len(list(group)) for _, group in itertools.groupby(shard for shard, _ in ours)) <= 7


def test_every_epoch_has_another_order_of_shards():
    order = SampleOrder([1] * 50, seed=0, window_shards=1)
    epochs = [[order[50 * epoch + position].shard for position in range(50)] for epoch in range(3)]
    assert len(set(map(tuple, epochs))) == 3
