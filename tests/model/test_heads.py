"""Heads: the learned temperature stays within its bounds and comes back from beyond them."""

import pytest
import torch

from tests.tiny import tiny_config
from unimo3.model.heads import TEMPERATURE_BOUNDS, ItcHead

LOW, HIGH = TEMPERATURE_BOUNDS


@pytest.mark.parametrize(
    ("value", "used", "gradient_up", "gradient_down"),
    [(0.2, 0.2, -1.0, 1.0), (0.0005, LOW, -1.0, 0.0), (0.6, HIGH, 0.0, 1.0)],
)
def test_the_temperature_is_bounded_and_can_return(value, used, gradient_up, gradient_down):
    head = ItcHead(tiny_config(), image_width=32)
    states = torch.zeros(1, 1, 3, 32)
    for sign, expected in ((-1.0, gradient_up), (1.0, gradient_down)):
        head.temperature.data.fill_(value)
        head.temperature.grad = None
        temperature = head(states, states).temperature
        assert temperature.item() == pytest.approx(used)
        (sign * temperature).sum().backward()
        assert head.temperature.grad.item() == expected
