"""What the gates of a trained model do: their means over groups of samples, and what it costs to force them.

Source: none; forcing replaces a gate's weights after training, as ablations of attention heads do, arXiv 1905.10650.
"""

# Shapes: B samples, T tokens, H heads, S levels that a layer sees.

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from unimo3.model.fusion import FusionEncoder, Stream
from unimo3.model.level_gate import LevelGate

PARTNER = "partner"
STREAMS = ("text", "image")
Hook = Callable[[nn.Module, Any, Tensor], Tensor | None]
"""Of a gate's forward pass: module, inputs and weights -> weights that replace them."""
GateMeans = dict[str, list[list[float]]]
"""For each stream [layers, levels that the layer sees, the partner last]; a layer without a gate has [1.0]."""
GateSpreads = dict[str, list[float]]
"""For each stream [layers]: standard deviation of the partner's weight over tokens and heads; 0 without a gate."""


def forcings(fusion: FusionEncoder | None) -> list[str]:
    """How the gates can be forced: ``partner``, or ``level 0`` and so on up to the last earlier level; none if there
    are no gates."""
    gates = [gate for stream in _streams(fusion).values() for gate in _gates(stream) if gate is not None]
    most = max((gate.num_levels for gate in gates), default=1)
    return [PARTNER, *(f"level {level}" for level in range(most - 1))] if gates else []


@contextmanager
def forced(fusion: FusionEncoder | None, forcing: str) -> Iterator[None]:
    """Give one level all of the weight, in every gate, for every token and head.

    Args:
        forcing: one of `forcings`. A layer that does not see the level reads its partner.
    """

    def replace(gate: nn.Module, _: object, weights: Tensor) -> Tensor:
        partner = weights.shape[-1] - 1
        level = partner if forcing == PARTNER else min(int(forcing.removeprefix("level ")), partner)
        return one_hot(torch.tensor(level), weights.shape[-1]).to(weights).expand_as(weights)

    with _hooked(_streams(fusion), lambda stream, layer: replace):
        yield


class GateRecorder:
    """Means of the gates over the tokens of samples, by group."""

    def __init__(self, fusion: FusionEncoder | None):
        self._streams = _streams(fusion)
        self._last: dict[tuple[str, int], Tensor] = {}
        self._sums: dict[str, dict[tuple[str, int], Tensor]] = defaultdict(dict)
        self._counts: dict[str, int] = defaultdict(int)
        # Of the partner's weight, over tokens and heads: number, sum and sum of squares.
        self._moments: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The gates of the latest pass of the model can be added within this context."""
        with _hooked(self._streams, self._store):
            yield

    def add(self, groups: Sequence[str | None], text_mask: Tensor) -> None:
        """Count the samples of the latest pass.

        Args:
            groups: [B], of each sample; None: it does not count.
            text_mask: [B, T], 1 where a text's token is real.
        """
        counted = torch.tensor([group is not None for group in groups])
        for key, weights in self._last.items():
            mask = text_mask if key[0] == "text" else torch.ones(weights.shape[:2])
            partner = weights[..., -1][mask.bool() & counted[:, None]].double()
            self._moments[key] += torch.stack([torch.tensor(partner.numel()), partner.sum(), partner.square().sum()])
            mean = (weights * mask.to(weights)[:, :, None, None]).sum(dim=(1, 2)) / mask.sum(1)[:, None]
            mean = mean / weights.shape[2]
            for row, group in enumerate(groups):
                if group is not None:
                    sums = self._sums[group]
                    sums[key] = sums.get(key, 0.0) + mean[row].double()
        for group in groups:
            if group is not None:
                self._counts[group] += 1

    def means(self) -> dict[str, GateMeans]:
        """The mean gates of each group, and of all as ``overall``; empty for a model without gates."""
        if not self._sums:
            return {}
        of_group = {group: self._mean([group]) for group in sorted(self._sums)}
        return {"overall": self._mean(list(self._sums)), **of_group}

    def spreads(self) -> GateSpreads:
        """How much the partner's weight differs between tokens and heads; empty for a model without gates."""
        if not self._moments:
            return {}
        return {
            name: [self._spread(name, layer) if gate is not None else 0.0 for layer, gate in enumerate(_gates(stream))]
            for name, stream in self._streams.items()
        }

    def _spread(self, stream: str, layer: int) -> float:
        number, total, squares = self._moments[stream, layer].tolist()
        return math.sqrt(max(0.0, squares / number - (total / number) ** 2))

    def _mean(self, groups: list[str]) -> GateMeans:
        number = sum(self._counts[group] for group in groups)
        return {
            name: [
                (sum(self._sums[group][name, layer] for group in groups) / number).tolist()
                if gate is not None
                else [1.0]
                for layer, gate in enumerate(_gates(stream))
            ]
            for name, stream in self._streams.items()
        }

    def _store(self, stream: str, layer: int) -> Hook:
        def hook(gate: nn.Module, _: object, weights: Tensor) -> None:
            self._last[stream, layer] = weights.detach()

        return hook


def _streams(fusion: FusionEncoder | None) -> dict[str, Stream]:
    """Empty without a fusion encoder."""
    return {} if fusion is None else {"text": fusion.text, "image": fusion.image}


@contextmanager
def _hooked(streams: Mapping[str, Stream], hook_of: Callable[[str, int], Hook]) -> Iterator[None]:
    """Every gate has the hook of its stream and layer within this context."""
    hooks = [
        gate.register_forward_hook(hook_of(name, layer))
        for name, stream in streams.items()
        for layer, gate in enumerate(_gates(stream))
        if gate is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _gates(stream: Stream) -> list[LevelGate | None]:
    return [layer.cross_attention.gate for layer in stream.layers]
