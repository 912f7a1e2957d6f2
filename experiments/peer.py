"""BridgeTower of transformers at the ablation's size, trained as a variant is: one more row of its tables.

The towers, the fusion encoder and the heads are transformers' classes with their own initial values. Batches,
negatives, masks, losses, steps, rates and metrics are those of `experiments.ablation_run`. These differences to the
variant ``bridge`` remain:

- transformers runs both towers inside the fusion encoder: a step encodes the image of each matching pair again, where
  this project encodes an image once,
- image heads are 64 wide, whatever the configuration is: two of them at a width of 128, where the variants have four,
- norms of all layers have eps 1e-5; the variants' text tower and fusion encoder have 1e-12,
- contrast reads the mapped image tower, as BridgeTowerForContrastiveLearning does, and has no upper temperature.

Source: BridgeTower, arXiv 2206.08657; transformers' models/bridgetower.
"""

import unimo3  # noqa: F401, I001  (before transformers: it makes torchvision importable)

import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize
from transformers import BridgeTowerConfig, BridgeTowerModel, BridgeTowerPreTrainedModel
from transformers.models.bridgetower.modeling_bridgetower import (
    BridgeTowerContrastiveHead,
    BridgeTowerITMHead,
    BridgeTowerMLMHead,
)

from benchmarks.report import ROOT
from experiments.ablation_run import TrainingRun, num_parameters
from experiments.ablation_settings import PATCH_SIZE, Data, Settings, option
from unimo3.errors import CommandParser, ConfigError, exit_with_status
from unimo3.model.downstream import Unimo3ClassifierOutput
from unimo3.model.heads import ItcOutput
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.objectives.base import Losses
from unimo3.objectives.negatives import draw_random_negatives
from unimo3.objectives.similarity import compare, contrastive_loss
from unimo3.objectives.vqa import VqaLoss
from unimo3.training.adam import build_adam
from unimo3.training.args import OptimArgs

PEER = "bridgetower"
"""The row's name."""
# The variant of the same architecture.
TWIN = "bridge"
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


class PeerRun(TrainingRun):
    """BridgeTower with one seed; `peer_run` makes it."""

    @property
    def config(self) -> BridgeTowerConfig:
        """Of the variants' depths and widths."""
        model = self.settings.model(TWIN)
        text = {
            name: getattr(model.text, name)
            for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        }
        text |= {
            "max_position_embeddings": model.text.max_position_embeddings,
            "hidden_dropout_prob": model.dropout,
            "attention_probs_dropout_prob": model.dropout,
            "initializer_factor": INITIALIZER_FACTOR,
        }
        vision = {"hidden_size": model.vision.width, "num_hidden_layers": model.vision.depth}
        vision |= {"image_size": model.vision.image_size, "patch_size": PATCH_SIZE}
        return BridgeTowerConfig(
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            text_config=text,
            vision_config=vision,
            initializer_factor=INITIALIZER_FACTOR,
            tie_word_embeddings=True,
        )

    def identity(self) -> dict[str, Any]:
        """See `TrainingRun`."""
        model = self.config.to_diff_dict()
        return {"variant": self.variant, "seed": self.seed, "settings": asdict(self.settings), "model": model}

    def pretraining_task(self, data: Data) -> nn.Module:
        """See `TrainingRun`."""
        twin = self.settings.model(TWIN)
        return PeerPretrainingLoss(PeerForPreTraining(self.config, twin.itc_size, twin.itc_temperature_init), self.seed)

    def vqa_task(self, pretrained: nn.Module, num_answers: int) -> nn.Module:
        """See `TrainingRun`."""
        model = PeerForVqa(self.config, num_answers)
        base: Any = pretrained
        model.bridgetower.load_state_dict(base.bridgetower.state_dict())
        return VqaLoss(model)  # type: ignore[arg-type]

    def optimizer(self, model: nn.Module, args: OptimArgs) -> torch.optim.Optimizer:
        """AdamW at one rate; matrices decay, as of the variants."""
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


def peer_run(settings: Settings, seed: int) -> PeerRun:
    """The peer's run.

    Raises:
        ConfigError: BridgeTower cannot have this width.
    """
    if settings.width % IMAGE_HEAD_WIDTH:
        raise ConfigError(
            f"--width {settings.width}: BridgeTower's image heads are {IMAGE_HEAD_WIDTH} wide; a multiple is needed"
        )
    return PeerRun(settings, PEER, seed)


def sizes(settings: Settings) -> dict[str, int]:
    """Parameters of the peer and of the variant of the same architecture."""
    twin = settings.model(TWIN)
    with torch.device("meta"):
        peer = PeerForPreTraining(peer_run(settings, 0).config, twin.itc_size, twin.itc_temperature_init)
        return {PEER: num_parameters(peer), TWIN: num_parameters(Unimo3ForPreTraining(twin.to_config()))}


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Do the peer's run of one seed, unless it was done before, and print its metrics."""
    parser = CommandParser(prog="python -m experiments.peer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="as of the ablation's runs (default: 0)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "ablation", help="folder of data and finished runs"
    )
    for field in fields(Settings):
        parser.add_argument(option(field.name), type=type(field.default), default=field.default)
    args = parser.parse_args(argv)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    if errors := settings.validate():
        raise ConfigError(errors)
    run = peer_run(settings, args.seed)
    for name, size in sizes(settings).items():
        print(f"{name}: {size:,} parameters", flush=True)
    torch.set_num_threads(1)
    data = Data(args.work, settings)
    data.make()
    if run.result(args.work) is None:
        run.do(args.work)
    result = run.result(args.work)
    assert result is not None
    print(" ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items()))
    print(f"seconds a step: pretraining {result['pretraining']['step_s']:.3f}, VQA {result['vqa']['step_s']:.3f}")


if __name__ == "__main__":
    main()
