"""BridgeTower of transformers at the experiment's size, trained as a variant is: one more row of the tables.

The towers, the fusion encoder and the heads are transformers' classes. Batches, negatives, masks, losses, steps, rates
and metrics are those of the variants. `cross_layer_design.md` lists what differs from the variant ``bridge``.

Source: BridgeTower, arXiv 2206.08657; transformers' models/bridgetower.
"""

import unimo3  # noqa: F401, I001  (before transformers: it makes torchvision importable)

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize
from transformers import BridgeTowerConfig, BridgeTowerModel, BridgeTowerPreTrainedModel, PreTrainedTokenizerBase
from transformers.models.bridgetower.modeling_bridgetower import (
    BridgeTowerContrastiveHead,
    BridgeTowerITMHead,
    BridgeTowerMLMHead,
)

from experiments.contestant import Contestant
from experiments.training import num_parameters
from unimo3.model.args import ModelArgs
from unimo3.model.downstream import Unimo3ClassifierOutput
from unimo3.model.heads import ItcOutput
from unimo3.objectives.base import Losses
from unimo3.objectives.negatives import draw_random_negatives
from unimo3.objectives.similarity import compare, contrastive_loss
from unimo3.training.adam import build_adam
from unimo3.training.args import OptimArgs

PEER = "bridgetower"
"""The row's name."""
IMAGE_HEAD_WIDTH = 64
# Linear maps of text tower and fusion encoder then start with the variants' standard deviation, .08, instead of
# transformers' .05. Those of the image tower follow from its width and start close to that.
INITIALIZER_FACTOR = 1.6


class PeerForPreTraining(BridgeTowerPreTrainedModel):
    """BridgeTower with transformers' heads of masked language modeling, matching and contrast."""

    _tied_weights_keys = {"mlm_head.decoder.weight": "bridgetower.text_model.embeddings.word_embeddings.weight"}

    def __init__(self, config: BridgeTowerConfig, itc_size: int, temperature: float):
        super().__init__(config)
        width = config.hidden_size
        self.bridgetower = BridgeTowerModel(config)
        self.mlm_head = BridgeTowerMLMHead(config)
        self.itm_head = BridgeTowerITMHead(2 * width)
        self.itc_text_head = BridgeTowerContrastiveHead(width, itc_size)
        self.itc_image_head = BridgeTowerContrastiveHead(width, itc_size)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The MLM decoder, whose weight is tied."""
        return self.mlm_head.decoder

    def embed(self, text_states: Tensor, image_states: Tensor) -> ItcOutput:
        """Unit vectors of the towers' last states, [B, T, D] and [V, B, D]; see BridgeTowerForContrastiveLearning."""
        base = self.bridgetower
        image = base.cross_modal_image_transform(base.vision_model.visual.forward_post(image_states))
        image = image + base.token_type_embeddings.weight[1]
        return ItcOutput(
            normalize(self.itc_text_head(text_states[:, 0]), dim=-1),
            normalize(self.itc_image_head(image[:, 0]), dim=-1),
            self.logit_scale.neg().exp().reshape(1),
        )


class PeerPretrainingLoss(nn.Module):
    """Batch -> the losses and metrics of `PretrainingLoss`, on the same masks and the same random negatives.

    Args:
        seed: of the run; it draws the negatives.
    """

    def __init__(self, model: PeerForPreTraining, seed: int):
        super().__init__()
        self.model = model
        self.seed = seed

    def forward(self, batch: dict[str, Any]) -> Losses:
        """Compute every loss; for the keys of `batch` see `PretrainingLoss`."""
        model, ids, images, mask = self.model, batch["image_id"], batch["pixel_values"], batch["attention_mask"]
        num_rows = len(ids)
        source = draw_random_negatives(ids, self.seed, int(batch["positions"][0]))
        out = model.bridgetower(
            input_ids=torch.cat([batch["mlm_input_ids"], batch["input_ids"]]),
            attention_mask=mask.repeat(2, 1),
            pixel_values=torch.cat([images, images[source]]),
        )
        is_target = batch["mlm_labels"] != -100
        targets = batch["mlm_labels"][is_target]
        words = model.mlm_head(out.text_features[:num_rows][is_target])
        labels = (source == torch.arange(num_rows)).long()
        matches = model.itm_head(out.pooler_output[num_rows:])
        # Images in the batch's order are those of the masked texts, whose own states are of no use to contrast.
        text_layers, image_layers = out.hidden_states[:2]
        similarities = compare(model.embed(text_layers[-1][num_rows:], image_layers[-1][:, :num_rows]), ids)
        losses = {
            "mlm": cross_entropy(words, targets, reduction="sum") / max(1, len(targets)),
            "itm": cross_entropy(matches, labels),
            "itc": contrastive_loss(similarities),
        }
        return {
            "loss": sum(losses.values(), torch.zeros(())),
            **{f"loss_{name}": loss.detach() for name, loss in losses.items()},
            "accuracy_mlm": (words.argmax(-1) == targets).sum() / max(1, len(targets)),
            "accuracy_itm": (matches.argmax(-1) == labels).float().mean(),
            "temperature_itc": similarities.temperature.detach().squeeze(),
            "single_image_ratio": (ids == ids[0]).all().float(),
        }


class PeerForVqa(BridgeTowerPreTrainedModel):
    """BridgeTower with the classifier over answers of its VQA fine-tuning."""

    def __init__(self, config: BridgeTowerConfig, num_answers: int):
        super().__init__(config)
        width = 2 * config.hidden_size
        self.bridgetower = BridgeTowerModel(config)
        self.vqa_head = nn.Sequential(
            nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, num_answers)
        )
        self.post_init()

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor, labels: Tensor, output_gates: bool
    ) -> Unimo3ClassifierOutput:
        """Logits [B, answers] and the loss, as `VqaLoss` reads them; there are no gates."""
        out = self.bridgetower(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
        logits = self.vqa_head(out.pooler_output)
        loss = binary_cross_entropy_with_logits(logits, labels) * labels.shape[-1]
        return Unimo3ClassifierOutput(loss, logits, (), ())


class BridgeTowerContestant(Contestant):
    """BridgeTower of a variant's depths and widths.

    Args:
        args: of the variant.
    """

    def __init__(self, args: ModelArgs):
        self._args = args
        text = {
            name: getattr(args.text, name)
            for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        }
        text |= {
            "max_position_embeddings": args.text.max_position_embeddings,
            "hidden_dropout_prob": args.dropout,
            "attention_probs_dropout_prob": args.dropout,
            "initializer_factor": INITIALIZER_FACTOR,
        }
        vision = {"hidden_size": args.vision.width, "num_hidden_layers": args.vision.depth}
        vision |= {"image_size": args.vision.image_size, "patch_size": args.vision.patch_size}
        # Of a `BridgeTowerConfig`.
        self.interaction = {
            "hidden_size": args.hidden_size,
            "num_hidden_layers": args.num_hidden_layers,
            "num_attention_heads": args.num_attention_heads,
            "text_config": text,
            "vision_config": vision,
            "initializer_factor": INITIALIZER_FACTOR,
            "tie_word_embeddings": True,
        }

    def errors(self) -> list[str]:
        """See `Contestant`."""
        width = self._args.vision.width
        if width % IMAGE_HEAD_WIDTH == 0:
            return []
        return [f"width {width}: {PEER}'s image heads are {IMAGE_HEAD_WIDTH} wide; a multiple of that is needed"]

    def num_parameters(self) -> int:
        """See `Contestant`."""
        with torch.device("meta"):
            return num_parameters(self.pretraining_model())

    def pretraining_model(self) -> PeerForPreTraining:
        """Initial values come from torch's generator."""
        config = BridgeTowerConfig(**self.interaction)
        return PeerForPreTraining(config, self._args.itc_size, self._args.itc_temperature_init)

    def build_pretraining(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> PeerPretrainingLoss:
        """See `Contestant`."""
        torch.manual_seed(seed)
        return PeerPretrainingLoss(self.pretraining_model(), seed)

    def build_vqa(self, pretrained: Any, num_answers: int, seed: int) -> PeerForVqa:
        """See `Contestant`."""
        torch.manual_seed(seed)
        model = PeerForVqa(pretrained.config, num_answers)
        model.bridgetower.load_state_dict(pretrained.bridgetower.state_dict())
        return model

    def optimizer(self, model: Any, args: OptimArgs) -> torch.optim.Optimizer:
        """See `Contestant`: AdamW at one rate; matrices decay, as of the variants."""
        groups = [
            {
                "params": [parameter for parameter in model.parameters() if (parameter.dim() > 1) == is_matrix],
                "lr": args.lr,
                "peak_lr": args.lr,
                "weight_decay": args.weight_decay if is_matrix else 0.0,
            }
            for is_matrix in (True, False)
        ]
        return build_adam(groups, (args.beta1, args.beta2), args.eps, args.fused)
