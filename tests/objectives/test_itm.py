"""Image-text matching with hard negatives: which pairs are fused, with which masks and labels, also over ranks."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.spawn import run_ranks
from tests.tiny import tiny_batch, tiny_pretraining_model
from unimo3.objectives.base import PretrainingLoss, TowerStates
from unimo3.objectives.itc import ImageTextContrast
from unimo3.objectives.itm import IGNORED, ImageTextMatching
from unimo3.objectives.negatives import draw_hard_negatives, hard_negative_quantiles
from unimo3.objectives.similarity import Similarities, compare

BATCH = 8


def hard_task(model):
    return PretrainingLoss(model, [ImageTextMatching(1.0, 0, "hard"), ImageTextContrast(1.0)])


def encode(model, batch):
    text = model.unimo3.encode_text(batch["input_ids"], batch["attention_mask"])
    image = model.unimo3.encode_image(batch["pixel_values"])
    return TowerStates(batch, text, None, image, compare(model.itc_head(text, image), batch["image_id"]))


@torch.no_grad()
def test_the_loss_is_that_of_pairs_built_by_hand():
    model, batch = tiny_pretraining_model(), tiny_batch(BATCH)
    text, image, similarities = (encode(model, batch)[index] for index in (1, 3, 4))
    quantiles = hard_negative_quantiles(0, 0, BATCH)
    image_of = draw_hard_negatives(similarities.text_to_image, similarities.same_image, quantiles[:, 0]).tolist()
    text_of = draw_hard_negatives(similarities.image_to_text, similarities.same_image, quantiles[:, 1]).tolist()
    pairs = [(row, row, 1) for row in range(BATCH)]
    pairs += [(row, image_of[row], 0) for row in range(BATCH)]
    pairs += [(text_of[row], row, 0) for row in range(BATCH)]
    losses, right = [], 0
    # One pair at a time, so that each text can have no mask but its own; a text of the batch differs in length.
    for of_text, of_image, label in pairs:
        assert label == 1 or batch["image_id"][of_text] != batch["image_id"][of_image]
        length = int(batch["attention_mask"][of_text].sum())
        fused = model.unimo3.fuse(
            text[of_text, None, :, :length], image[of_image, None], torch.ones(1, length, dtype=torch.long)
        )
        logits = model.itm_head(model.unimo3.pool(fused))
        losses.append(cross_entropy(logits, torch.tensor([label])))
        right += int(logits.argmax()) == label
    report = hard_task(model)(batch)
    torch.testing.assert_close(report["loss_itm"], torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(report["accuracy_itm"], torch.tensor(right / len(pairs)))


def test_a_third_of_the_pairs_is_right():
    model = tiny_pretraining_model()
    request = ImageTextMatching(1.0, 0, "hard").fusion_input(encode(model, tiny_batch(BATCH)))
    assert request.labels.tolist() == [1] * BATCH + [0] * 2 * BATCH
    assert len(request.text) == len(request.image) == len(request.mask) == 3 * BATCH


def test_a_batch_of_one_image_counts_only_its_correct_pairs():
    model, batch = tiny_pretraining_model(), tiny_batch(BATCH)
    batch["image_id"] = torch.full((BATCH,), 7)
    request = ImageTextMatching(1.0, 0, "hard").fusion_input(encode(model, batch))
    assert request.labels.tolist() == [1] * BATCH + [IGNORED] * 2 * BATCH
    report = hard_task(model)(batch)
    report["loss"].backward()
    logits = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"]).matching_logits
    expected = cross_entropy(logits, torch.ones(BATCH, dtype=torch.long))
    torch.testing.assert_close(report["loss_itm"], expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(report["accuracy_itm"], (logits.argmax(-1) == 1).float().mean())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_draw_sends_no_gradient_to_the_contrastive_head():
    model = tiny_pretraining_model()
    PretrainingLoss(model, [ImageTextMatching(1.0, 0, "hard")])(tiny_batch(BATCH))["loss"].backward()
    assert all(p.grad is None for p in model.itc_head.parameters())
    assert model.itm_head.classifier.weight.grad.any()


@pytest.mark.parametrize("negatives", ["random", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradients_are_finite_at_extreme_logits(negatives, dtype):
    model, batch = tiny_pretraining_model().to(dtype), tiny_batch(BATCH)
    with torch.no_grad():
        # The classifier's logits are +-1e4 whatever it reads; the temperature is clamped to the lowest allowed.
        model.itm_head.classifier.bias.copy_(torch.tensor([1e4, -1e4]))
        model.itc_head.temperature.fill_(1e-6)
    task = PretrainingLoss(model, [ImageTextMatching(1.0, 0, negatives), ImageTextContrast(1.0)])
    report = task(batch)
    # Cosines over 0.001 make the temperature's gradient about 1e6, beyond the unscaled range of float16.
    (report["loss"] / 1e3).backward()
    assert report["loss_itm"] > 1e3
    assert report["loss"].isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


# Several ranks.


def disagreeing_rank():
    """Every rank draws different similarities; states and masks contain the number of their row."""
    from unimo3.distributed import gather_rows, world

    rank, size = world()
    num_rows = 4
    local_rows = torch.arange(num_rows) + rank * num_rows
    all_rows = torch.arange(size * num_rows)
    ids = all_rows // 2
    generator = torch.Generator().manual_seed(rank)
    similarities = Similarities(
        torch.randn(num_rows, size * num_rows, generator=generator) * 5,
        torch.randn(num_rows, size * num_rows, generator=generator) * 5,
        ids[local_rows][:, None] == ids[None, :],
        local_rows,
        torch.ones(1),
    )
    named = local_rows.double()[:, None, None, None].expand(num_rows, 1, 3, 2).clone().requires_grad_()
    pictured = named.detach().clone().requires_grad_()
    mask = local_rows[:, None].expand(num_rows, 3).clone()
    batch = {"positions": local_rows, "image_id": ids[local_rows], "attention_mask": mask}
    states = TowerStates(batch, named, None, pictured, similarities)
    requests = [ImageTextMatching(1.0, seed, "hard").fusion_input(states) for seed in range(5)]
    gradients = torch.autograd.grad(sum(r.text.sum() + 2 * r.image.sum() for r in requests), (named, pictured))
    columns = [
        torch.stack([r.text[:, 0, 0, 0].long(), r.image[:, 0, 0, 0].long(), r.mask[:, 0], r.labels]) for r in requests
    ]
    return torch.stack(columns).detach(), [gather_rows(gradient)[:, 0, 0, 0] for gradient in gradients]


@pytest.mark.integration
def test_ranks_agree_on_who_sends_which_row():
    ranks = run_ranks(3, disagreeing_rank)
    uses = torch.zeros(2, 12, dtype=torch.float64)
    travelled = 0
    for rank, (columns, _) in enumerate(ranks):
        local_rows = torch.arange(4) + 4 * rank
        for text, image, mask, label in columns:
            assert torch.equal(text[:8], local_rows.repeat(2))
            assert torch.equal(image[:4], local_rows)
            assert torch.equal(image[8:], local_rows)
            assert torch.equal(mask, text)
            assert label.tolist() == [1] * 4 + [0] * 8
            assert (text[4:] // 2 != image[4:] // 2).all()
            travelled += int((text[8:] // 4 != rank).sum())
            uses += torch.stack([torch.bincount(text, minlength=12), torch.bincount(image, minlength=12)])
    assert travelled > 20
    for _, (to_texts, to_images) in ranks:
        assert torch.equal(to_texts, uses[0])
        assert torch.equal(to_images, 2 * uses[1])
