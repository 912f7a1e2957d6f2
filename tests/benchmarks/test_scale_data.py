"""The benchmark of large indexes, at a small size."""

import pytest

from benchmarks.scale_data import data_table, measure_data


@pytest.mark.integration
def test_each_layout_is_opened_and_read_by_a_fresh_process(tmp_path):
    results = measure_data(tmp_path, num_shards=10_000, num_old_shards=100, num_seeks=10)
    assert [(one.layout, one.num_shards, one.num_samples) for one in results] == [
        ("version 3", 100, 100_000),
        ("version 4", 100, 100_000),
        ("version 4", 10_000, 10_000_000),
    ]
    for one in results:
        assert 0 < one.seek_median_s <= one.seek_max_s
        assert one.resume_s <= one.seek_max_s
        assert min(one.open_s, one.plan_s) > 0
        assert one.private_bytes < one.peak_bytes
    assert results[1].index_bytes < results[0].index_bytes
    assert 100 < results[2].index_bytes / 10_000 < 150  # bytes a shard
    (row,) = [line for line in data_table(results).splitlines() if line.startswith("| samples")]
    assert row == "| samples | 100,000 | 100,000 | 10,000,000 |"
