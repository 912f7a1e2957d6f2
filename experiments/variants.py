"""The fusion encoders that the experiments compare; all but the interaction is equal.

Source: METER, arXiv 2111.02387 (in_layer); BridgeTower, arXiv 2206.08657 (bridge); arXiv 2305.13697 (cross_layer).
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from experiments.contestant import Contestant, Unimo3Contestant
from experiments.peer import PEER, BridgeTowerContestant
from unimo3.model.args import ModelArgs, TextArgs, VisionArgs

REFERENCE = "in_layer"
VARIANTS: dict[str, dict[str, Any]] = {
    REFERENCE: {"interaction": "in_layer", "bridge": False},
    "bridge": {"interaction": "in_layer", "bridge": True},
    "cross_layer_bridge": {"interaction": "cross_layer", "gate": "token", "bridge": True},
    "cross_layer_bridge_even": {"interaction": "cross_layer", "gate": "token", "bridge": True, "gate_init": 0.5},
    "cross_layer_bridge_fast": {"interaction": "cross_layer", "gate": "token", "bridge": True, "gate_rate": 10.0},
    "cross_layer_bridge_joint": {
        "interaction": "cross_layer",
        "gate": "static",
        "bridge": True,
        "gate_init": 0.5,
        "joint_gate": True,
    },
}
TRIALS = ("gate_rate", "joint_gate")
"""Of a variant: what `gate_trials` does to the model. All other entries are the model's settings."""
TWIN = "bridge"
"""The variant whose depths and widths the peer has."""
MOST_SIZE_DIFFERENCE = 0.02
"""Relative difference to the reference's parameters up to which a variant is of equal size."""
PATCH_SIZE = 16


def toy_model(width: int, num_layers: int, image_size: int, vocab_size: int, **others: Any) -> ModelArgs:
    """A model of towers and a fusion encoder of one size; all but that is as in pretrain/recipes/tiny.yaml."""
    sizes = {"hidden_size": width, "num_hidden_layers": num_layers, "num_attention_heads": 4}
    return ModelArgs(
        text=TextArgs(
            vocab_size=vocab_size, intermediate_size=4 * width, max_position_embeddings=40, dropout=0.0, **sizes
        ),
        vision=VisionArgs(image_size=image_size, patch_size=PATCH_SIZE, width=width, depth=num_layers, num_heads=4),
        initializer_range=0.08,
        dropout=0.0,
        itc_size=64,
        **sizes,
        **others,
    )


@dataclass(frozen=True)
class RunSettings:
    """What the runs on one data set have in common."""

    image_size: int = 64
    """Height and width of a picture in pixels."""
    layers: int = 3
    """Layers of each tower and of the fusion encoder."""
    width: int = 128
    """Width of all three."""
    pretraining_steps: int = 250
    """Optimizer steps of MLM, ITM and ITC together."""
    batch: int = 64
    """Pairs or questions a step."""
    pretraining_lr: float = 1e-3
    """Peak learning rate of pretraining."""
    vocabulary: int = 512
    """Entries of the tokenizer, which is trained on the training captions."""

    def model(self, variant: str) -> ModelArgs:
        """A variant's model."""
        arguments = {name: value for name, value in VARIANTS[variant].items() if name not in TRIALS}
        return toy_model(self.width, self.layers, self.image_size, self.vocabulary, **arguments)

    def contestant(self, variant: str) -> Contestant:
        """How a variant, or the peer, is built."""
        if variant == PEER:
            return BridgeTowerContestant(self.model(TWIN))
        return Unimo3Contestant(self.model(variant), VARIANTS[variant])

    def validate(self) -> list[str]:
        """Return the errors of these settings, one line each."""
        least = {"images": 40, "batch": 2, "gallery": 2}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        errors = [
            f"{name} {value!r}: a whole number of {least.get(name, 1)} or more is needed"
            for name, value in values.items()
            if isinstance(getattr(type(self), name), int)
            and not (isinstance(value, int) and value >= least.get(name, 1))
        ]
        errors += [
            f"{name} {value!r}: a number {'of 0 or more' if name == 'dropout' else 'above 0'} is needed"
            for name, value in values.items()
            if isinstance(getattr(type(self), name), float)
            and not (isinstance(value, int | float) and (value > 0 or (value == 0 and name == "dropout")))
        ]
        if errors:
            return errors
        models = {name: self.model(name) for name in VARIANTS}
        # An error that all variants have is reported once.
        quick = dict.fromkeys(error for model in models.values() for error in model.quick_errors())
        # Of one variant: these checks take long, and the towers of all variants are equal.
        return list(quick) or models[REFERENCE].slow_errors()

    def size_errors(self, variants: Iterable[str]) -> list[str]:
        """Return which variants cannot be built, or differ in size, one line each."""
        contestants = {name: self.contestant(name) for name in dict.fromkeys((REFERENCE, *variants))}
        if errors := [error for contestant in contestants.values() for error in contestant.errors()]:
            return errors
        sizes = {name: contestant.num_parameters() for name, contestant in contestants.items()}
        excess = {name: size / sizes[REFERENCE] - 1 for name, size in sizes.items()}
        return [
            f"layers {self.layers}, width {self.width}: {name} has {part:+.1%} parameters compared with {REFERENCE}; "
            f"sizes within {MOST_SIZE_DIFFERENCE:.0%} compare: use fewer layers or more width"
            for name, part in excess.items()
            if abs(part) > MOST_SIZE_DIFFERENCE
        ]
