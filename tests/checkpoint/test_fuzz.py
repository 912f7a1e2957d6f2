"""Models of any make, saved by any number of ranks and loaded by any other: every value is as it was."""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.checkpoint.fuzz import differences

SHAPES = st.sampled_from([[1], [3], [5, 7], [2, 3, 4], [13], [64]])
# DeepSpeed 0.19.8 itself trains no scalar parameter (it views them as bytes); an empty one under ZeRO-2 alone, in a
# group with others. Under ZeRO-3 buffers may be either.
EMPTY = st.sampled_from([[0], [2, 0]])


@st.composite
def examples(draw: Any) -> dict[str, Any]:
    stage = draw(st.sampled_from([2, 3, 3]))
    groups = draw(st.integers(1, 3))
    further = st.one_of(SHAPES, SHAPES, EMPTY) if stage == 2 and groups == 1 else SHAPES
    shapes = [draw(SHAPES), *draw(st.lists(further, max_size=5))]
    leaves: list[dict[str, Any]] = []
    for number, shape in enumerate(shapes):
        tied_to = draw(st.one_of(st.none(), st.integers(0, number - 1))) if number else None
        while tied_to is not None and leaves[tied_to]["tied_to"] is not None:
            tied_to = leaves[tied_to]["tied_to"]
        trained = number == 0 or draw(st.booleans())
        leaves.append({"shape": shape, "trained": trained, "tied_to": tied_to})
    buffers = st.tuples(
        SHAPES if stage == 2 else st.one_of(SHAPES, st.sampled_from([[], [0]])),
        st.sampled_from(["float32", "int64", "bool", "bfloat16"]),
    )
    return {
        "leaves": leaves,
        "buffers": draw(st.lists(buffers, max_size=3)),
        "groups": groups,
        "stage": stage,
        "bf16": draw(st.booleans()),
        "persistent": draw(st.sampled_from([0, 0, 10])),
        "sub_group": draw(st.sampled_from([5, 40, 10**9])),
        "ranks": draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
    }


@pytest.mark.integration
@settings(
    max_examples=8, deadline=None, derandomize=True, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
)
@given(example=examples())
def test_loaded_values_equal_saved_ones(tmp_path_factory, example):
    assert differences(tmp_path_factory.getbasetemp() / "fuzz", example) == []
