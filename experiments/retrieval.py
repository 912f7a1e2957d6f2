"""Ranking 200 images and 1000 texts: cached tower states and a shortlist against the full model on every pair.

A small model is trained by contrast and hard-negative matching on toy images and ranks those of the test split. METER's
way runs towers and fusion encoder for each of the 200,000 pairs. What a pair costs the `base` model is measured apart.

Source: METER, arXiv 2111.02387, and its evaluation of retrieval, which scores every pair with the full model.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import unimo3  # noqa: F401  (before transformers: it makes torchvision importable)
from benchmarks.report import ROOT, usable_cores, write_report
from experiments.retrieval_cost import cost_of_base
from experiments.training import on_cpu
from experiments.variants import toy_model
from unimo3.data.captioned import CaptionedImages
from unimo3.data.index import ShardIndex
from unimo3.data.loader import ReaderArgs, TrainingLoader, evaluation_batches
from unimo3.data.order import SampleOrder
from unimo3.data.samples import PretrainSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.distributed import World
from unimo3.errors import CommandParser, ConfigError, exit_with_status
from unimo3.metrics.recall import first_ranks, recalls
from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval
from unimo3.model.initialization import initialize_weights
from unimo3.model.tokenizer_checks import resolve_tokens
from unimo3.objectives.base import PretrainingLoss
from unimo3.objectives.itc import ImageTextContrast
from unimo3.objectives.itm import ImageTextMatching
from unimo3.objectives.retrieval import RetrievalLoss
from unimo3.training.evaluation import Unguarded, to_device
from unimo3.training.lr_schedule import lr_scale, set_lr
from unimo3.training.optim import OptimArgs, build_optimizer
from unimo3.training.retrieval.args import RankingArgs
from unimo3.training.retrieval.evaluation import held_out_recall

CPU = torch.device("cpu")
VOCABULARY, IMAGE_SIZE, TOKENS, BATCH, PAIR_BATCH = 512, 64, 20, 32, 64
READER = ReaderArgs(num_workers=0, prefetch=1)
TEST_FRACTION = 0.08  # of the toy's images
ROUNDS = 3
TARGET = 20.0
EASY_FRACTION = 0.8  # of the training steps: with random negatives
NAMES = tuple(f"{way}_at_{k}" for way in ("tr", "ir") for k in (1, 5, 10))

METHOD = """\
{images} images and {texts} texts of the toy's test split. The model is {width} wide with {layers} layers in each tower
and in the fusion encoder, {pixels} pixels, {tokens} text tokens, float32, trained for {steps} steps of {batch} pairs,
the first {easy:.0%} of them with random negatives, the others with hard ones.
Times are the processor's for the full evaluation, reading included, so that other programs count less;
those of shortlists are medians of {rounds}. METER's way takes the pairs of an image in batches of {pair_batch}, all
with a pass of both towers, and reads no image twice. A correct candidate ranks after all incorrect ones of equal score,
in every row of the table. `towers` is the order without fusion."""


class Evaluation(NamedTuple):
    """An evaluation's processor seconds, pairs and metrics."""

    seconds: float
    num_pairs: int
    metrics: dict[str, float]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: something cannot be used; all errors in one message.
    """
    parser = CommandParser(prog="python -m experiments.retrieval", description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="test images; five texts each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of the model (default: %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="of towers and fusion encoder (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="of each of the three (default: %(default)s)")
    parser.add_argument("--shortlists", type=int, nargs="+", default=[4, 8, 16], help="numbers of candidates")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of one process (default: all cores)")
    parser.add_argument("--base-pairs", type=int, default=8, help="pairs a batch of `base`; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "retrieval.md")
    args = parser.parse_args(arguments)
    least = {"images": 4, "steps": 1, "width": 4, "layers": 1, "threads": 1, "base_pairs": 0}
    errors = [
        f"--{name.replace('_', '-')} {getattr(args, name)}: at least {number} is needed"
        for name, number in least.items()
        if getattr(args, name) < number
    ]
    if args.width % 4:
        errors.append(f"--width {args.width}: a multiple of 4, the number of heads, is needed")
    if min(args.shortlists) < 1:
        errors.append(f"--shortlists {min(args.shortlists)}: at least 1 is needed; all pairs are measured anyway")
    if errors:
        raise ConfigError(errors)
    return args


def make_shards(folder: Path, num_test_images: int) -> Path:
    """Draw toy images, so many that the test split has those asked for, and shard them."""
    num_images = max(50, math.ceil(num_test_images / TEST_FRACTION))
    drawn, shards = folder / "drawn", folder / "shards"
    toy = ("toy", str(drawn), "--images", str(num_images), "--size", str(IMAGE_SIZE))
    coco = ("prepare_shards", "coco", "--src", str(drawn / "coco"), "--out", str(shards))
    for program, *options in (toy, (*coco, "--tokenizer-vocab", str(VOCABULARY), "--shard-size", "256")):
        subprocess.run([sys.executable, "-m", f"pretrain.{program}", *options], cwd=ROOT, check=True)
    return shards


def train(shards: Path, args: argparse.Namespace) -> RetrievalLoss:
    """A small model, trained from random weights for retrieval alone."""
    tokenizer = load_tokenizer(str(shards / "tokenizer"))
    size = toy_model(args.width, args.layers, IMAGE_SIZE, VOCABULARY)
    model_config = size.to_config()
    resolve_tokens(model_config, tokenizer)
    model = Unimo3ForImageAndTextRetrieval(model_config)
    initialize_weights(model, 0, size.initializer_range)
    # Random negatives first: hard ones alone teach nothing about most of the pairs that METER's way compares.
    easy = PretrainingLoss(model, [ImageTextMatching(1.0, seed=0), ImageTextContrast(1.0)])
    hard = RetrievalLoss(model, seed=0)
    samples = PretrainSamples(ShardIndex(shards / "train"), tokenizer, TOKENS, ImageTransform(IMAGE_SIZE), 0.0, seed=0)
    batch = 2 * BATCH
    batches = iter(TrainingLoader([samples], SampleOrder(samples.units_per_shard, 0, 8), batch, batch, 0, 1, READER))
    optim = OptimArgs(lr=1e-3, fusion_factor=1.0, head_factor=1.0)
    optimizer = build_optimizer(model, optim)
    progress = tqdm(range(args.steps), desc="training", unit="step")
    for step in progress:
        (loaded,) = next(batches)
        set_lr(optimizer, lr_scale(step, args.steps, optim.warmup_ratio))
        report = (easy if step < EASY_FRACTION * args.steps else hard)(to_device(loaded, CPU))
        optimizer.zero_grad()
        report["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        progress.set_postfix({name: f"{report[name].item():.3f}" for name in ("loss", "accuracy_itm")}, refresh=False)
    return on_cpu(hard)


@torch.no_grad()
def meters_way(task: RetrievalLoss, samples: CaptionedImages) -> Evaluation:
    """Score every pair with the full model."""
    started = time.process_time()
    pixels: list[Tensor] = []
    captions: list[tuple[int, Tensor, Tensor]] = []
    for loaded, counts in evaluation_batches(samples, 0, 1, BATCH, READER):
        images = to_device({"images": loaded["images"]}, CPU)["pixel_values"]
        for image, texts, is_counted in zip(images, loaded["texts"], counts.tolist(), strict=True):
            if is_counted:
                captions += [(len(pixels), torch.from_numpy(ids), torch.from_numpy(mask)) for ids, mask in texts]
                pixels.append(image)
    image_of = torch.tensor([image for image, _, _ in captions])
    ids, mask = torch.stack([ids for _, ids, _ in captions]), torch.stack([mask for _, _, mask in captions])
    task.eval()
    scores = torch.empty(len(pixels), len(captions))
    for row, image in enumerate(tqdm(pixels, desc="METER's way", unit="image")):
        for texts in torch.arange(len(captions)).split(PAIR_BATCH):
            logits = task.model(ids[texts], image.expand(len(texts), -1, -1, -1), mask[texts]).logits
            scores[row, texts] = logits[:, 1] - logits[:, 0]
    is_right = torch.arange(len(pixels))[:, None] == image_of
    metrics = recalls(first_ranks(scores, is_right), first_ranks(scores.T, is_right.T))
    return Evaluation(time.process_time() - started, scores.numel(), metrics)


def ours(task: RetrievalLoss, samples: CaptionedImages, shortlist: int) -> Evaluation:
    """Evaluate with a shortlist, or exactly (0)."""
    started = time.process_time()
    ranking = RankingArgs(shortlist=shortlist, pair_batch=PAIR_BATCH)
    metrics = held_out_recall(task, samples, World(0, 0, 1), BATCH, READER, ranking, Unguarded())
    assert metrics is not None
    return Evaluation(time.process_time() - started, metrics.pop("num_pairs"), metrics)


def median_of(evaluate: Callable[[], Evaluation]) -> Evaluation:
    """The same evaluation several times: its metrics, and the median of the seconds."""
    runs = [evaluate() for _ in range(ROUNDS)]
    return runs[0]._replace(seconds=median(run.seconds for run in runs))


def table(evaluations: dict[str, Evaluation], reference: Evaluation) -> str:
    """The metrics as a markdown table."""
    lines = [f"| way | pairs fused | processor seconds | times less | {' | '.join(NAMES)} |", "| --- |" + " ---: |" * 9]
    for name, (seconds, num_pairs, metrics) in evaluations.items():
        cells = [name, f"{num_pairs:,}", f"{seconds:.1f}", f"{reference.seconds / seconds:.1f}"]
        lines.append(f"| {' | '.join(cells + [f'{metrics[metric]:.3f}' for metric in NAMES])} |")
    towers = [f"{next(reversed(evaluations.values())).metrics[f'{name}_towers']:.3f}" for name in NAMES]
    return "\n".join([*lines, f"| {' | '.join(['towers', '0', '', '', *towers])} |"])


def verdict(evaluations: dict[str, Evaluation], reference: Evaluation, exact: str) -> str:
    """Whether the exact way agrees with METER's, and what the shortlists do."""
    same = all(evaluations[exact].metrics[name] == reference.metrics[name] for name in NAMES)
    lines = [f"All pairs from cached states: {'the same' if same else 'not the same'} six metrics as METER's way."]
    for name, one in evaluations.items():
        if name.startswith("shortlist"):
            gaps = {metric: one.metrics[metric] - reference.metrics[metric] for metric in NAMES}
            metric = max(gaps, key=lambda metric: abs(gaps[metric]))
            reached = "reached" if reference.seconds / one.seconds >= TARGET else "not reached"
            gap = f"{metric} differs most from METER's way, by {gaps[metric]:+.3f}"
            gap = gap if gaps[metric] else "the same six metrics as METER's way"
            lines.append(f"{name.capitalize()}: {TARGET:.0f} times less time {reached}; {gap}.")
    return "\n".join(f"- {line}" for line in lines)


@exit_with_status
def main(arguments: list[str] | None = None) -> None:
    """Measure, write the result and print it."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder), args.images)
        task = train(shards, args)
        tokenizer = load_tokenizer(str(shards / "tokenizer"))
        samples = CaptionedImages(ShardIndex(shards / "test"), tokenizer, TOKENS, ImageTransform(IMAGE_SIZE))
        exact = "cached states, all pairs (exact)"
        reference = meters_way(task, samples)
        evaluations: dict[str, Evaluation] = {"METER's way, all pairs": reference, exact: ours(task, samples, 0)}
        for size in tqdm(sorted(args.shortlists), desc="shortlists", unit="size"):
            evaluations[f"shortlist of {size}"] = median_of(lambda size=size: ours(task, samples, size))  # type: ignore[misc]
        num_texts = reference.num_pairs // int(samples.units_per_shard.sum())
    tables = f"{table(evaluations, reference)}\n\n{verdict(evaluations, reference, exact)}"
    method = METHOD.format(
        images=int(samples.units_per_shard.sum()),
        texts=num_texts,
        width=args.width,
        layers=args.layers,
        pixels=IMAGE_SIZE,
        tokens=TOKENS,
        easy=EASY_FRACTION,
        steps=args.steps,
        batch=2 * BATCH,
        rounds=ROUNDS,
        pair_batch=PAIR_BATCH,
    )
    base = f"\n\n{cost_of_base(args.base_pairs)}" if args.base_pairs else ""
    write_report(args.out, "Retrieval: cached states and a shortlist", f"{tables}\n\n{method}{base}")
    print(f"\n{tables}{base}\n\n{args.out}")


if __name__ == "__main__":
    main()
