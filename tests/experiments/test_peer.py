"""BridgeTower of transformers as one more row of the ablation."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
)

from experiments.ablation_report import MOST_SIZE_DIFFERENCE
from experiments.ablation_settings import Data, Settings
from experiments.peer import PEER, PeerForPreTraining, PeerPretrainingLoss, peer_run, sizes
from tests.experiments.conftest import TINY
from unimo3.errors import ConfigError

pytestmark = pytest.mark.xdist_group("ablation")
# Its image heads are 64 wide.
SETTINGS = replace(TINY, width=64, pretraining_steps=12, vqa_steps=8, pretraining_lr=2e-3, vqa_lr=2e-3)


@pytest.mark.integration
def test_a_run_learns_and_its_result_has_the_form_of_a_variants(work, finished):
    result = peer_run(SETTINGS, 0).compute(Data(work, SETTINGS))
    variant = finished.result(work)
    assert result.keys() == variant.keys()
    assert result["variant"] == PEER
    assert result["metrics"].keys() == variant["metrics"].keys()
    assert result["gates"] == {"text": None, "image": None}
    for stage in ("pretraining", "vqa"):
        losses = result[stage]["loss_by_tenth"]
        assert losses[-1] < 0.9 * losses[0], stage


def test_the_sizes_differ_by_less_than_two_percent():
    of_both = sizes(Settings())
    assert abs(of_both["bridgetower"] / of_both["bridge"] - 1) < MOST_SIZE_DIFFERENCE


def test_a_width_that_its_image_heads_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match="--width 32: BridgeTower's image heads are 64 wide; a multiple is needed"):
        peer_run(TINY, 0)


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 500, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:], ids[1, 6:] = 0, 1
    return ids, mask, torch.randn(4, 3, 32, 32, generator=generator)


def test_heads_and_losses_are_those_of_transformers_models(inputs):
    ids, mask, pixels = inputs
    config = peer_run(SETTINGS, 0).config
    config.contrastive_hidden_size, config.logit_scale_init_value = 16, 2.0
    torch.manual_seed(0)
    peer = PeerForPreTraining(config, itc_size=16, temperature=0.07).eval()
    renamed = {"mlm_head.": "mlm_score.", "itm_head.": "itm_score."}
    state = {
        next(
            (theirs + name.removeprefix(ours) for ours, theirs in renamed.items() if name.startswith(ours)), name
        ): value
        for name, value in peer.state_dict().items()
    }
    arguments = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    outside = {}
    for kind in (BridgeTowerForMaskedLM, BridgeTowerForImageAndTextRetrieval, BridgeTowerForContrastiveLearning):
        model = kind(config).eval()
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert all("cross_modal_head" in name for name in missing)
        with torch.no_grad():
            outside[kind] = model(**arguments)
    # The first half of the rows are masked texts, here the texts themselves; all labels but one are ignored.
    labels = torch.full_like(ids, -100)
    labels[:, 2] = ids[:, 2]
    batch = {"input_ids": ids, "mlm_input_ids": ids, "mlm_labels": labels, "attention_mask": mask}
    batch |= {"pixel_values": pixels, "image_id": torch.arange(4), "positions": torch.arange(4)}
    with torch.no_grad():
        report = PeerPretrainingLoss(peer, seed=0)(batch)
    words = outside[BridgeTowerForMaskedLM].logits[:, 2]
    expected = torch.nn.functional.cross_entropy(words, ids[:, 2])
    torch.testing.assert_close(report["loss_mlm"], expected, rtol=1e-4, atol=1e-5)
    contrast = outside[BridgeTowerForContrastiveLearning]
    similarities = contrast.text_embeds @ contrast.image_embeds.T / 0.07
    rows = torch.arange(4)
    both = [torch.nn.functional.cross_entropy(logits, rows) for logits in (similarities, similarities.T)]
    torch.testing.assert_close(report["loss_itc"], sum(both) / 2, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        matches = peer.itm_head(peer.bridgetower(**arguments).pooler_output)
    torch.testing.assert_close(matches, outside[BridgeTowerForImageAndTextRetrieval].logits, rtol=1e-4, atol=1e-5)
