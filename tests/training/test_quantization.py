"""ZeRO++: what is refused before a step would fail."""

from unimo3.training.quantization import part_errors

SIZES = {"positions": 577 * 768, "attention": 768 * 768, "small": 1001}
QWZ = {"zero_quantized_weights": True, "stage3_param_persistence_threshold": 100_000}


def errors_of(num_ranks, **changes):
    return part_errors(SIZES, {"zero_optimization": QWZ | changes}, num_ranks)


def test_parts_of_weights_must_be_multiples_of_eight():
    assert [errors_of(num_ranks) for num_ranks in (1, 8, 16, 32)] == [[]] * 4
    (error,) = errors_of(64)
    assert "on 64 ranks the parts of positions are no multiples of 8 values" in error
    assert error.endswith("or set stage3_param_persistence_threshold to 443136")
    assert errors_of(64, stage3_param_persistence_threshold=443_136) == []
    assert errors_of(64, zero_quantized_weights=False) == []


def test_parts_of_a_secondary_copy_too():
    assert errors_of(16, zero_hpz_partition_size=8) == []
    assert "on 192 ranks the parts of positions" in errors_of(192, zero_hpz_partition_size=64)[0]
    assert "parts of positions, attention" in errors_of(8, zero_hpz_partition_size=5)[0]
