"""Image-text contrast: its negatives, and its loss at extreme similarities."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.tiny import tiny_batch, tiny_pretraining_model
from unimo3.objectives.base import PretrainingLoss, TowerStates
from unimo3.objectives.itc import ImageTextContrast
from unimo3.objectives.similarity import Similarities


def test_two_captions_of_an_image_are_no_negatives():
    model, batch = tiny_pretraining_model(), tiny_batch(4)
    report = PretrainingLoss(model, [ImageTextContrast(1.0)])(batch)
    out = model.itc_head(
        model.unimo3.encode_text(batch["input_ids"], batch["attention_mask"]),
        model.unimo3.encode_image(batch["pixel_values"]),
    )
    logits = out.image @ out.text.T / out.temperature
    logits[0, 1] = logits[1, 0] = -torch.inf
    target = torch.arange(4)
    expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(report["loss_itc"], expected.detach(), atol=1e-5, rtol=1e-5)


def contrast(logits, image_id):
    """The loss for given logits of text to image."""
    similarities = Similarities(
        logits, logits.T, image_id[:, None] == image_id[None, :], torch.arange(len(image_id)), torch.tensor([0.01])
    )
    states = TowerStates({}, None, None, logits, similarities)
    return ImageTextContrast(1.0).losses(tiny_pretraining_model(), states, None)["loss"]


@pytest.mark.parametrize("size", [1e4, torch.finfo(torch.float16).max])
@pytest.mark.parametrize("right", [True, False])
def test_loss_and_gradient_are_finite_at_extreme_logits(size, right):
    partner = torch.eye(6).bool() if right else torch.eye(6).bool().roll(2, 1)
    logits = torch.where(partner, size, -size).requires_grad_()
    # Rows 0 and 1 are of one image: what row 1 is excluded from is as extreme as the rest.
    loss = contrast(logits, torch.tensor([0, 0, 1, 2, 3, 4]))
    loss.backward()
    assert loss.item() == pytest.approx(0.0 if right else 2 * size, rel=1e-6)
    # Each row's and each column's gradient sums to zero; the excluded pairs have none.
    assert logits.grad.isfinite().all()
    assert logits.grad.sum().abs() < 1e-6
    assert logits.grad[0, 1] == logits.grad[1, 0] == 0.0
    expected = torch.zeros(6, 6) if right else (partner.float() - torch.eye(6)) / 6
    torch.testing.assert_close(logits.grad, expected)


def test_a_batch_of_one_image_has_nothing_to_contrast():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = contrast(logits, torch.zeros(5, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(5, 5))
