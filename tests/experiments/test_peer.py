"""The peer's heads and losses against transformers' own models of BridgeTower."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
)

from experiments.peer import BridgeTowerContestant, PeerPretrainingLoss
from experiments.variants import toy_model
from unimo3.objectives.negatives import draw_random_negatives


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 500, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:], ids[1, 6:] = 0, 1
    return ids, mask, torch.randn(4, 3, 32, 32, generator=generator)


def test_heads_and_losses_are_those_of_transformers_models(inputs):
    ids, mask, pixels = inputs
    torch.manual_seed(0)
    peer = BridgeTowerContestant(toy_model(64, 2, 32, 500)).pretraining_model().eval()
    config = peer.config
    config.contrastive_hidden_size, config.logit_scale_init_value = 64, 2.0
    renamed = {"mlm_head.": "mlm_score.", "itm_head.": "itm_score."}
    state = {
        next(
            (theirs + name.removeprefix(ours) for ours, theirs in renamed.items() if name.startswith(ours)), name
        ): value
        for name, value in peer.state_dict().items()
    }
    arguments = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    source = draw_random_negatives(torch.arange(4), 0, 8)
    assert not torch.equal(source, torch.arange(4))
    outside = {}
    for kind in (BridgeTowerForMaskedLM, BridgeTowerForImageAndTextRetrieval, BridgeTowerForContrastiveLearning):
        model = kind(config).eval()
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert all("cross_modal_head" in name for name in missing)
        with torch.no_grad():
            is_matching = kind is BridgeTowerForImageAndTextRetrieval
            outside[kind] = model(**arguments | ({"pixel_values": pixels[source]} if is_matching else {}))
    # The first half of the rows are masked texts, here the texts themselves; all labels but one are ignored.
    labels = torch.full_like(ids, -100)
    labels[:, 2] = ids[:, 2]
    batch = {"input_ids": ids, "mlm_input_ids": ids, "mlm_labels": labels, "attention_mask": mask}
    batch |= {"pixel_values": pixels, "image_id": torch.arange(4), "positions": torch.arange(8, 12)}
    with torch.no_grad():
        report = PeerPretrainingLoss(peer, seed=0)(batch)
    words = outside[BridgeTowerForMaskedLM].logits[:, 2]
    expected = cross_entropy(words, ids[:, 2])
    torch.testing.assert_close(report["loss_mlm"], expected, rtol=1e-4, atol=1e-5)
    contrast = outside[BridgeTowerForContrastiveLearning]
    similarities = contrast.text_embeds @ contrast.image_embeds.T / 0.07
    rows = torch.arange(4)
    both = [cross_entropy(logits, rows) for logits in (similarities, similarities.T)]
    torch.testing.assert_close(report["loss_itc"], sum(both) / 2, rtol=1e-4, atol=1e-5)
    is_pair = (source == rows).long()
    expected = cross_entropy(outside[BridgeTowerForImageAndTextRetrieval].logits, is_pair)
    torch.testing.assert_close(report["loss_itm"], expected, rtol=1e-4, atol=1e-5)


def test_the_vqa_model_starts_from_the_pretrained_one():
    contestant = BridgeTowerContestant(toy_model(64, 1, 32, 500))
    torch.manual_seed(1)
    pretrained = contestant.pretraining_model()
    tuned = contestant.build_vqa(pretrained, num_answers=7, seed=0)
    for name, value in pretrained.bridgetower.state_dict().items():
        assert torch.equal(tuned.bridgetower.state_dict()[name], value), name
