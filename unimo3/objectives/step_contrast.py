"""Contrast over the complete step: every micro-step's pairs are compared with those of all micro-steps and ranks.

A first pass computes the features of all micro-batches without gradient. Their loss gives the gradient of each feature.
Each micro-batch then runs again. The product of its features with their gradients has the same derivative as the loss:

    dL/dw = sum over features f of (dL/df) (df/dw)

Both passes draw the same dropout, so they compute the same features.

Source: GradCache, arXiv 2101.06983; open_clip's accumulation of features.
"""

# Shapes: R ranks, M micro-steps, B samples of a micro-step and rank, N = R M B, D itc_size.

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from unimo3.distributed import gather_rows, sum_over_ranks, world
from unimo3.model.heads import ItcOutput
from unimo3.objectives.similarity import compare_rows, contrastive_loss


class Generators(NamedTuple):
    """States of the generators that dropout draws from: the CPU's and, on a GPU, that of the GPU."""

    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def current(cls, device: torch.device) -> "Generators":
        """The states now."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    @contextmanager
    def restored(self, device: torch.device) -> Iterator[None]:
        """Draw from these states inside; afterwards the generators continue as if nothing had been drawn."""
        with torch.random.fork_rng([device] if self.gpu is not None else []):
            torch.set_rng_state(self.cpu)
            if self.gpu is not None:
                torch.cuda.set_rng_state(self.gpu, device)
            yield


class StepContrast(NamedTuple):
    """What the first pass leaves for one micro-batch.

    Attributes:
        loss: [], of this rank's rows of the step, against all N.
        row_losses: [B], of this micro-batch's rows.
        text_grad: [B, D], of this micro-batch's features.
        image_grad: [B, D], the same.
        temperature_grad: [1], of the complete batch.
        generators: before the towers of the first pass.
    """

    loss: Tensor
    row_losses: Tensor
    text_grad: Tensor
    image_grad: Tensor
    temperature_grad: Tensor
    generators: Generators

    def loss_of(self, features: ItcOutput) -> Tensor:
        """The step's loss, whose gradient reaches the weights through this micro-batch's features.

        The mean of these gradients over micro-steps and ranks is that of one batch of N pairs.
        """
        products = (
            (features.text * self.text_grad).sum()
            + (features.image * self.image_grad).sum()
            + (features.temperature * self.temperature_grad).sum()
        )
        return self.loss + (products - products.detach())


def contrast_step(
    features: Sequence[ItcOutput], image_ids: Sequence[Tensor], generators: Sequence[Generators]
) -> list[StepContrast]:
    """Compute the loss of a step, and its gradient for each feature; every rank calls it.

    Only one micro-step's rows of similarities, [B, N], exist at a time.

    Args:
        features: of each micro-batch, without gradient.
        image_ids: [B] of each micro-batch.
        generators: of each micro-batch; see `StepContrast`.
    """
    num_steps, sizes = len(features), [len(ids) for ids in image_ids]
    text = gather_rows(torch.cat([each.text for each in features])).detach().requires_grad_()
    image = gather_rows(torch.cat([each.image for each in features])).detach().requires_grad_()
    temperature = features[0].temperature.detach().requires_grad_()
    ids = gather_rows(torch.cat([*image_ids]))
    rank, size = world()
    local_rows = torch.arange(sum(sizes), device=ids.device) + rank * sum(sizes)
    row_losses = []
    for indices in local_rows.split(sizes):
        with torch.enable_grad():
            rows = ItcOutput(text[indices], image[indices], temperature)
            batch = ItcOutput(text, image, temperature)
            of_rows = contrastive_loss(compare_rows(rows, ids[indices], batch, ids, indices), "none")
            (of_rows.mean() / num_steps).backward()
        row_losses.append(of_rows.detach())
    assert text.grad is not None
    assert image.grad is not None
    assert temperature.grad is not None
    # DeepSpeed averages over ranks and micro-steps, and each feature has its gradient in one micro-step of one rank.
    # The sum over ranks is already the number of ranks times the gradient of their mean.
    text_grads = (num_steps * sum_over_ranks(text.grad)[local_rows]).split(sizes)
    image_grads = (num_steps * sum_over_ranks(image.grad)[local_rows]).split(sizes)
    # The same on all ranks: the clamp of the temperature reads the sign of its gradient.
    temperature_grad = sum_over_ranks(temperature.grad) / size
    loss = torch.stack([of_rows.mean() for of_rows in row_losses]).mean()
    return [
        StepContrast(loss, of_rows, text_grad, image_grad, temperature_grad, state)
        for of_rows, text_grad, image_grad, state in zip(row_losses, text_grads, image_grads, generators, strict=True)
    ]
