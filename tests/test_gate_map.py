"""Gate maps: which levels a layer sees, and the colour and number of each."""

import json

import pytest

from unimo3.drawing import width_of
from unimo3.gate_map import colour_of, draw_gate_map, gates_by_layer, level_names, mean_over_heads, num_tower_levels

PADDED = [[[0.2, 0.8, 0.0], [0.4, 0.6, 0.0]], [[0.1, 0.2, 0.7], [0.3, 0.2, 0.5]]]


@pytest.mark.parametrize(("num_tower_levels", "first"), [(0, [[1.0]]), (1, [])])
def test_each_layer_has_the_levels_that_it_sees(num_tower_levels, first):
    layers = gates_by_layer(PADDED, num_tower_levels)
    assert [len(heads[0]) for heads in layers] == [*([1] * len(first)), 2, 3]
    means = mean_over_heads(layers)
    for row, expected in zip(means, [*first, [0.3, 0.7], [0.2, 0.2, 0.6]], strict=True):
        assert row == pytest.approx(expected)


def test_columns_are_tower_layers_and_then_levels():
    assert level_names(4, 2) == ["t1", "t2", "0", "1"]
    assert level_names(1, 2) == ["partner"]


def test_a_cell_has_the_colour_of_its_mean_and_unseen_ones_are_white():
    picture = draw_gate_map(PADDED, 0, "gates")
    corners = [
        [picture.getpixel((76 + 56 * level + 3, 56 + 56 * layer + 3)) for level in range(3)] for layer in range(3)
    ]
    white = (255, 255, 255)
    assert corners == [
        [colour_of(1.0), white, white],
        [colour_of(0.3), colour_of(0.7), white],
        [colour_of(0.2), colour_of(0.2), colour_of(0.6)],
    ]


def test_each_head_has_its_map_on_request():
    alone, all_heads = draw_gate_map(PADDED, 1, "gates"), draw_gate_map(PADDED, 1, "gates", by_head=True)
    # Three maps next to each other in place of one, and still one colour bar.
    assert all_heads.width - alone.width == 2 * (max(3 * 56, width_of("mean of the heads", 15) + 24) + 76)
    assert all_heads.height == alone.height


def test_tower_levels_are_those_of_the_runs_model(tmp_path, caplog):
    assert num_tower_levels(tmp_path) == 0
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"unimodal_levels": 2}))
    assert num_tower_levels(tmp_path) == 2
    (tmp_path / "model" / "config.json").write_text("{")
    assert num_tower_levels(tmp_path) == 0
    assert "config.json: cannot be read (JSONDecodeError: " in caplog.text
