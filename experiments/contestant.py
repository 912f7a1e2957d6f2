"""How a row of the experiment is built: its models and its optimizer. Data, loop and metrics are those of all rows.

Source: none.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from experiments.gate_trials import multiply_gate_rate, use_joint_gates
from experiments.training import build_downstream_model, build_pretraining_model, num_parameters
from unimo3.model.args import ModelArgs
from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval, Unimo3ForVisualQuestionAnswering
from unimo3.model.fusion import FusionEncoder
from unimo3.model.unimo3 import Unimo3ForPreTraining, Unimo3PreTrainedModel
from unimo3.objectives.args import ObjectivesArgs
from unimo3.objectives.base import PretrainingLoss
from unimo3.training.args import OptimArgs
from unimo3.training.optim import build_optimizer


class Contestant(ABC):
    """A row of the tables.

    Attributes:
        interaction: what makes it different from other rows, for the line of a run.
    """

    interaction: dict[str, Any]

    def errors(self) -> list[str]:
        """Return why its models cannot be built, one line each."""
        return []

    @abstractmethod
    def num_parameters(self) -> int:
        """Of the model of pretraining; nothing is allocated."""

    @abstractmethod
    def build_pretraining(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> nn.Module:
        """A task for `train`, batch -> losses, whose ``model`` has initial values of the seed."""

    @abstractmethod
    def build_vqa(self, pretrained: Any, num_answers: int, seed: int) -> Any:
        """The pretrained model with a new head, for `VqaLoss`."""

    def build_retrieval(self, pretrained: Any, seed: int) -> Any:
        """The same for `RetrievalLoss`.

        Raises:
            NotImplementedError: it has no such head.
        """
        raise NotImplementedError(f"{type(self).__name__} has no head for retrieval")

    @abstractmethod
    def optimizer(self, model: Any, args: OptimArgs) -> torch.optim.Optimizer:
        """Of a model that this contestant has built."""

    def fusion(self, model: Any) -> FusionEncoder | None:
        """Where the gates of a model are that this contestant has built; None: it has none."""
        return None


class Unimo3Contestant(Contestant):
    """This project's model with one of its fusion encoders.

    Args:
        interaction: see `Contestant`; of its entries those of `gate_trials` take effect here.
    """

    def __init__(self, args: ModelArgs, interaction: dict[str, Any]):
        self._args = args
        self.interaction = interaction

    def num_parameters(self) -> int:
        """See `Contestant`."""
        with torch.device("meta"):
            model = Unimo3ForPreTraining(self._args.to_config())
            self._change(model)
            return num_parameters(model)

    def build_pretraining(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> PretrainingLoss:
        """See `Contestant`."""
        model = build_pretraining_model(self._args, tokenizer, seed, self._change)
        return PretrainingLoss(model, ObjectivesArgs().build(seed))

    def build_vqa(self, pretrained: Any, num_answers: int, seed: int) -> Unimo3ForVisualQuestionAnswering:
        """See `Contestant`."""
        model: Unimo3ForVisualQuestionAnswering = build_downstream_model(
            Unimo3ForVisualQuestionAnswering, pretrained, seed, self._change, num_answers=num_answers
        )
        return model

    def build_retrieval(self, pretrained: Any, seed: int) -> Unimo3ForImageAndTextRetrieval:
        """See `Contestant`."""
        model: Unimo3ForImageAndTextRetrieval = build_downstream_model(
            Unimo3ForImageAndTextRetrieval, pretrained, seed, self._change
        )
        return model

    def optimizer(self, model: Any, args: OptimArgs) -> torch.optim.Optimizer:
        """See `Contestant`."""
        optimizer = build_optimizer(model, args)
        if factor := self.interaction.get("gate_rate"):
            multiply_gate_rate(optimizer, model, factor)
        return optimizer

    def fusion(self, model: Any) -> FusionEncoder:
        """See `Contestant`."""
        fusion: FusionEncoder = model.unimo3.fusion
        return fusion

    def _change(self, model: Unimo3PreTrainedModel) -> None:
        if self.interaction.get("joint_gate"):
            use_joint_gates(self.fusion(model), model.config)
