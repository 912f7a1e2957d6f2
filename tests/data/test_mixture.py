"""Several sources by weight: temperature, a limit of epochs, and what a run records of them."""

import hashlib
import json
import math
from collections import Counter

import pytest

from unimo3.data.args import DataArgs
from unimo3.data.samples import PretrainSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform


@pytest.fixture
def sources(coco):
    """Of different sizes."""
    return {str(coco / "train"): 1.0, str(coco / "val"): 2.0}


def num_samples(data):
    return [index.num_samples for index in data.open_train()]


def drawn(data, coco, num_steps, global_batch=4):
    """The number of samples of each source that steps read."""
    tokenizer = load_tokenizer(str(coco / "tokenizer"))
    sources = [PretrainSamples(index, tokenizer, 16, ImageTransform(8), 0.15, 0) for index in data.open_train()]
    loader = iter(data.training_loader(sources, global_batch, global_batch, 0, 1, seed=0, start_step=0))
    counts = Counter()
    for _ in range(num_steps):
        for batch in next(loader):
            counts.update(source for source, *_ in batch["samples"])
    return counts


def test_a_temperature_weighs_sources_by_their_size(sources):
    sizes = num_samples(DataArgs(train=sources))
    for temperature, expected in (
        (0.0, [1, 2]),
        (1.0, [sizes[0], 2 * sizes[1]]),
        (2.0, [sizes[0] ** 0.5, 2 * sizes[1] ** 0.5]),
    ):
        data = DataArgs(train=sources, mix_temperature=temperature)
        assert data.weights(data.open_train()) == pytest.approx(expected, rel=1e-11)
        assert [fact["weight"] for fact in data.facts(data.open_train())] == data.weights(data.open_train())


def test_what_decides_the_stream_is_in_the_fingerprint(sources):
    def fingerprint(**settings):
        data = DataArgs(train=sources, **settings)
        return data.fingerprint(data.open_train())

    changed = [fingerprint(), fingerprint(mix_temperature=2.0), fingerprint(max_epochs=3), fingerprint(max_epochs=4)]
    assert len(set(changed)) == 4
    # As before there were these settings: checkpoints have it.
    data = DataArgs(train=sources)
    weights, parts = ["1.0", "2.0"], [index.fingerprint for index in data.open_train()]
    expected = hashlib.sha256(json.dumps(list(zip(parts, weights, strict=True))).encode()).hexdigest()
    assert fingerprint() == expected


def test_a_run_that_needs_more_epochs_than_allowed_is_refused(sources):
    sizes = num_samples(DataArgs(train=sources))
    data = DataArgs(train=next(iter(sources)), max_epochs=2)
    assert data.shard_errors("captions", 2 * sizes[0]) == []
    (error,) = data.shard_errors("captions", 2 * sizes[0] + 1)
    assert error == (
        f"data.max_epochs: 2: the run reads {2 * sizes[0] + 1} samples (training.steps times training.global_batch), "
        f"and the sources end after {2 * sizes[0]}; lower training.steps or raise it"
    )
    # Skipped data counts.
    skipping = DataArgs(train=next(iter(sources)), max_epochs=2, skip=[[0, 1]])
    length = skipping.stream_length(2, sizes[0])
    assert length == 3 * sizes[0]
    (error,) = skipping.shard_errors("captions", length)
    assert "(training.steps times training.global_batch, and data.skip), and the sources end" in error
    mixed = DataArgs(train=sources, max_epochs=300)
    (error,) = mixed.shard_errors("captions", 10**6)
    assert f"data.max_epochs: 300: the run reads {10**6} samples" in error
    assert mixed.shard_errors("captions", 10**3) == []


def test_a_source_that_has_left_is_read_no_more(sources, coco):
    small, large = sorted(sources, key=lambda name: sum(DataArgs(train=name).open_train()[0].samples_per_shard))
    size = sum(DataArgs(train=small).open_train()[0].samples_per_shard)
    # Two windows have 512 units each of the small source, and a third would exceed the limit.
    epochs = math.ceil(2 * 512 / size)
    assert epochs * size < 3 * 512
    data = DataArgs(train={small: 1, large: 1}, max_epochs=epochs, num_workers=0)
    assert drawn(data, coco, 3, global_batch=1024) == {small: 2 * 512, large: 4 * 512}


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"mix_temperature": -1.0}, "data.mix_temperature: -1.0: 0 or a number above 0 is needed"),
        ({"mix_temperature": float("inf")}, "data.mix_temperature: inf: 0 or a number above 0 is needed"),
        ({"max_epochs": -1}, "data.max_epochs: -1: 0 or more is needed"),
    ],
)
def test_invalid_settings_of_a_mixture_are_refused(sources, settings, error):
    assert error in DataArgs(train=sources, **settings).quick_errors()
