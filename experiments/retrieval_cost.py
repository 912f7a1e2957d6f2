"""What an image, a text and a pair cost the `base` model here, and how long COCO's 5K test takes at that.

Source: METER, arXiv 2111.02387, for scoring every pair; Karpathy's splits for the sizes of the test.
"""

import time
from statistics import median

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.report import ROOT
from unimo3.model.args import ModelArgs, TextArgs, VisionArgs
from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval
from unimo3.model.initialization import initialize_weights
from unimo3.objectives.retrieval import RetrievalLoss

# COCO's test split by Karpathy: five captions an image, ten images with one more.
COCO_IMAGES, COCO_TEXTS = 5000, 25010
ROUNDS = 3

BASE = """\
## The 5K test of COCO on the `base` model

Measured on this CPU in float32, at {pixels} pixels and {tokens} text tokens, random weights, batches of {batch}: an
image {image:.2f} s, a text {text:.3f} s, a pair of cached states {pair:.2f} s ({flops:.0f} GFLOP by torch's counter),
the processor's time over {threads} threads.

{table}

A shortlist of k takes at most k pairs a query, fewer as those of images and of texts have pairs in common, and as many
again for the five folds of 1000 images. On other hardware the hours go with the time of a pair."""


@torch.no_grad()
def cost_of_base(num_pairs: int) -> str:
    """What images, texts and pairs cost the `base` recipe's model here, and the hours of COCO's test that follow."""
    tuning = yaml.safe_load((ROOT / "finetune/recipes/retrieval_coco_base.yaml").read_text())
    recipe = yaml.safe_load((ROOT / "pretrain/recipes/base.yaml").read_text())
    sizes = recipe["model"]
    size = ModelArgs(text=TextArgs(**sizes.pop("text")), vision=VisionArgs(**sizes.pop("vision")), **sizes)
    model_config = size.to_config()
    model_config.vision_config.image_size = pixels = tuning["image_size"]
    tokens = tuning["data"]["max_text_tokens"]
    model = Unimo3ForImageAndTextRetrieval(model_config)
    initialize_weights(model, 0, size.initializer_range)
    task = RetrievalLoss(model, seed=0).eval()
    ids = torch.randint(5, 1000, (num_pairs, tokens))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    image = {"pixel_values": torch.randn(num_pairs, 3, pixels, pixels)}
    pair = {"text_states": task(text)["states"], "image_states": task(image)["states"]}
    pair["attention_mask"] = text["attention_mask"]
    seconds = {}
    for name, batch in (("image", image), ("text", text), ("pair", pair)):
        runs = []
        for _ in tqdm(range(ROUNDS + 1), desc=f"base: {name}", unit="batch"):
            started = time.process_time()
            task(batch)
            runs.append((time.process_time() - started) / torch.get_num_threads() / num_pairs)
        seconds[name] = median(runs[1:])
    with FlopCounterMode(display=False) as counter:
        task(pair)
    return BASE.format(
        pixels=pixels,
        tokens=tokens,
        batch=num_pairs,
        table=hours(seconds, tuning["ranking"]["shortlist"]),
        **seconds,
        threads=torch.get_num_threads(),
        flops=counter.get_total_flops() / num_pairs / 1e9,
    )


def hours(seconds: dict[str, float], shortlist: int) -> str:
    """How long COCO's test takes each way, as a markdown table.

    Args:
        seconds: of an ``image``, a ``text`` and a ``pair`` of cached states.
    """
    num_queries, num_all = COCO_IMAGES + COCO_TEXTS, COCO_IMAGES * COCO_TEXTS
    towers_s = COCO_IMAGES * seconds["image"] + COCO_TEXTS * seconds["text"]
    lines = ["| way | pairs, at most | hours on this CPU with as many threads, at most |", "| --- | ---: | ---: |"]
    for way, num_pairs, total_s in (
        ("METER's way, all pairs", num_all, num_all * sum(seconds.values())),
        *(
            (way, count, towers_s + count * seconds["pair"])
            for way, count in (
                ("cached states, all pairs (exact)", num_all),
                (f"shortlist of {shortlist}, 5K alone", num_queries * shortlist),
                (f"shortlist of {shortlist}, 5K and five folds", 2 * num_queries * shortlist),
            )
        ),
    ):
        lines.append(f"| {way} | {num_pairs:,} | {total_s / 3600:,.0f} |")
    return "\n".join(lines)
