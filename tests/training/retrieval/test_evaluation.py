"""Retrieval's evaluation: against scoring every pair by the full model, at any number of ranks, in little memory."""

import json

import pytest
import torch

from tests.data.conftest import convert, draw_jpeg, index_again, write_source, write_tar
from tests.spawn import run_ranks
from tests.training.retrieval.ranks import (
    BATCH,
    READER,
    SETTINGS,
    CutAfter,
    captioned,
    metrics_and_cuts,
    metrics_of_engine,
    plain_task,
    scores_of,
)
from unimo3.data.captioned import CaptionedImages
from unimo3.data.index import ShardIndex
from unimo3.data.loader import evaluation_batches
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.distributed import World
from unimo3.errors import ConfigError, DataError
from unimo3.training.evaluation import Unguarded, to_device
from unimo3.training.retrieval.args import RankingArgs
from unimo3.training.retrieval.evaluation import held_out_recall

ALONE = World(0, 0, 1)
NUM_IMAGES = 11


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many as each rank has: sums over several threads differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """11 training images with six captions each, one of which is the same for all."""
    root = tmp_path_factory.mktemp("retrieval")
    write_source(root / "source", 15)
    out = root / "coco"
    arguments = ("coco", "--src", str(root / "source"), "--out", str(out), "--shard-size", "8")
    assert convert(*arguments, "--tokenizer-vocab", "300") == 0
    return out


def evaluate(shards, ranking, task=None, guard=None):
    samples, _ = captioned(shards)
    return held_out_recall(task or plain_task(shards), samples, ALONE, BATCH, READER, ranking, guard or Unguarded())


@pytest.fixture(scope="module")
def alone(shards):
    """Metrics of one process, by the settings' name."""
    return {name: evaluate(shards, ranking) for name, ranking in SETTINGS.items()}


@torch.no_grad()
def full_model_scores(shards, task):
    """Similarities and matching logits of every pair, [images, texts], the full model run for each; texts' images."""
    samples, _ = captioned(shards)
    pixels, texts = [], []
    for loaded, counts in evaluation_batches(samples, 0, 1, BATCH, READER):
        moved = to_device({"images": loaded["images"]}, torch.device("cpu"))["pixel_values"]
        for image, captions, is_counted in zip(moved, loaded["texts"], counts.tolist(), strict=True):
            if is_counted:
                texts += [(len(pixels), *map(torch.from_numpy, text)) for text in captions]
                pixels.append(image)
    similarities, scores = torch.zeros(2, len(pixels), len(texts)).unbind()
    ids, mask = (torch.stack([text[part] for text in texts]) for part in (1, 2))
    for row, image in enumerate(pixels):
        out = task.model(ids, image.expand(len(texts), -1, -1, -1), mask)
        similarities[row] = (out.text_embeds * out.image_embeds).sum(-1)
        scores[row] = out.logits[:, 1] - out.logits[:, 0]
    return similarities, scores, torch.tensor([text[0] for text in texts])


def naive_recall(order_of, is_right, num_queries):
    """Recall at 1, 5 and 10 of `order_of`(query), all candidates from best to worst."""
    orders = [order_of(query) for query in range(num_queries)]
    return [
        sum(any(is_right(query, candidate) for candidate in order[:k]) for query, order in enumerate(orders))
        / num_queries
        for k in (1, 5, 10)
    ]


@pytest.mark.parametrize("shortlist", [0, 3])
def test_recall_is_that_of_scoring_every_pair_by_the_complete_model(shards, shortlist):
    # In float64, rounded to float32 by the heads: ties are the same in both.
    task = plain_task(shards).double().eval()
    similarities, scores, image_of = full_model_scores(shards, task)
    metrics = evaluate(shards, RankingArgs(shortlist=shortlist, pair_batch=7), task)

    def order(similarities, scores, is_right):
        """Candidates of one query: the shortlist by scores, the others by similarity; incorrect ones first if equal."""
        size = min(shortlist, len(scores)) if shortlist else len(scores)
        chosen = sorted(range(len(scores)), key=lambda c: (-float(similarities[c]), c))[:size]
        rest = [c for c in range(len(scores)) if c not in chosen]
        chosen.sort(key=lambda c: (-float(scores[c]), is_right(c)))
        return chosen + sorted(rest, key=lambda c: (-float(similarities[c]), is_right(c)))

    by_image = naive_recall(
        lambda image: order(similarities[image], scores[image], lambda text: image == image_of[text]),
        lambda image, text: image == image_of[text],
        len(scores),
    )
    by_text = naive_recall(
        lambda text: order(similarities[:, text], scores[:, text], lambda image: image == image_of[text]),
        lambda text, image: image == image_of[text],
        len(image_of),
    )
    assert [metrics[f"tr_at_{k}"] for k in (1, 5, 10)] == pytest.approx(by_image)
    assert [metrics[f"ir_at_{k}"] for k in (1, 5, 10)] == pytest.approx(by_text)
    assert 0 < metrics["ir_at_10"] < 1
    assert shortlist or metrics["num_pairs"] == NUM_IMAGES * len(image_of)


def test_little_memory_gives_the_same_metrics_and_scores(shards, alone):
    task = plain_task(shards)
    roomy, *others = (scores_of(task, shards, SETTINGS[name]) for name in ("shortlist", "blocks", "some_blocks"))
    for other in others:
        assert torch.equal(other.pairs, roomy.pairs)
        # Other blocks make other batches of pairs, which round differently.
        torch.testing.assert_close(other.scores, roomy.scores, atol=1e-5, rtol=1e-5)
    assert alone["blocks"] == alone["shortlist"] == alone["some_blocks"]
    assert alone["shortlist"]["num_pairs"] < alone["exact"]["num_pairs"]


def test_a_shortlist_of_all_is_exact(shards, alone):
    assert evaluate(shards, RankingArgs(shortlist=10_000, pair_batch=16)) == alone["exact"]


@pytest.fixture(scope="module")
def spread(shards, tmp_path_factory):
    """The same images and captions, a sample for each caption: every image's samples are in all six tars."""
    index, root = ShardIndex(shards / "train"), tmp_path_factory.mktemp("spread")
    (root / "train").mkdir()
    (root / "tokenizer").symlink_to(shards / "tokenizer")
    members = [index.read(shard, n) for shard, size in enumerate(index.samples_per_shard) for n in range(size)]
    contents = [json.loads(sample["json"]) for sample in members]
    for number, written in enumerate((int, str, float, int, str, float)):
        samples = []
        for sample, content in zip(members, contents, strict=True):
            described = {"image_id": written(content["image_id"]), "caption": content["captions"][number]}
            samples.append((str(len(samples)), {"jpg": sample["jpg"], "json": json.dumps(described).encode()}))
        write_tar(root / "train" / f"{number}.tar", samples)
    index_again(root / "train")
    return root


@pytest.mark.parametrize("name", ["shortlist", "exact", "folds"])
def test_samples_of_one_image_id_are_one_image(shards, spread, alone, name):
    assert evaluate(spread, SETTINGS[name]) == alone[name]


def test_towers_run_once_an_image_and_once_a_text(shards):
    task, rows = plain_task(shards), {"image": 0, "text": 0}
    task.model.unimo3.vision_tower.register_forward_hook(
        lambda _, inputs, output: rows.update(image=rows["image"] + len(output))
    )
    task.model.unimo3.text_tower.register_forward_hook(
        lambda _, inputs, output: rows.update(text=rows["text"] + len(output.last_hidden_state))
    )
    evaluate(shards, SETTINGS["exact"], task)
    num_texts = NUM_IMAGES * 6
    assert rows == {"image": -(-NUM_IMAGES // BATCH) * BATCH, "text": -(-num_texts // BATCH) * BATCH}


def test_folds_are_ranked_separately(shards, alone):
    metrics = alone["folds"]
    # The one fold is the complete set.
    assert {name: value for name, value in metrics.items() if name.endswith("_fold")} == {
        f"{name}_fold": value for name, value in metrics.items() if not name.endswith("_fold") and name != "num_pairs"
    }
    ones = evaluate(shards, RankingArgs(shortlist=2, pair_batch=8, fold_images=1))
    # A fold of one image has only its texts.
    assert (ones["tr_at_1_fold"], ones["ir_at_1_fold"], ones["ir_at_1_towers_fold"]) == (1, 1, 1)
    assert ones["ir_at_1"] == metrics["ir_at_1"]


def test_a_number_of_images_that_folds_do_not_divide_is_refused(shards):
    with pytest.raises(ConfigError, match=r"ranking.fold_images: 5: the 11 images of data.val are no whole number"):
        evaluate(shards, RankingArgs(fold_images=5))


def test_samples_of_a_single_image_are_no_ranking(shards, tmp_path):
    samples = {f"{row}": {"jpg": draw_jpeg(row, 8, 8), "txt": b"a", "json": b'{"image_id": 0}'} for row in range(5)}
    write_tar(tmp_path / "0.tar", samples)
    index_again(tmp_path)
    tokenizer = load_tokenizer(str(shards / "tokenizer"))
    held_out = CaptionedImages(ShardIndex(tmp_path), tokenizer, 12, ImageTransform(16))
    task = plain_task(shards)
    with pytest.raises(DataError, match="has 1 image by the image_id of its samples; a ranking needs several"):
        held_out_recall(task, held_out, ALONE, BATCH, READER, RankingArgs(), Unguarded())


def test_bad_settings_are_named_together():
    errors = RankingArgs(shortlist=-1, fold_images=-1, pair_batch=0, cache_gb=float("nan")).validate()
    assert [problem.split(":")[0] for problem in errors] == [
        "ranking.shortlist",
        "ranking.fold_images",
        "ranking.pair_batch",
        "ranking.cache_gb",
    ]


def test_a_cut_evaluation_has_no_metrics(shards):
    task = plain_task(shards)
    # In the images, in the texts, among the pairs, never.
    for number, is_stopped in ((0, True), (4, True), (9, True), (40, True), (10_000, False)):
        guard = CutAfter(number)
        metrics = evaluate(shards, SETTINGS["some_blocks"], task, guard)
        assert (guard.is_stopped, metrics is None) == (is_stopped, is_stopped)


@pytest.mark.integration
@pytest.mark.parametrize(("world_size", "names"), [(2, ["some_blocks"]), (3, list(SETTINGS))])
def test_ranks_give_the_metrics_of_one_process_and_are_cut_together(shards, alone, world_size, names):
    ranks = run_ranks(world_size, metrics_and_cuts, shards, names, [0, 4, 12])
    expected = scores_of(plain_task(shards), shards, SETTINGS["some_blocks"])
    pairs, order = torch.cat([scored.pairs for _, scored, _ in ranks]).sort()
    assert torch.equal(pairs, expected.pairs)
    assert torch.equal(torch.cat([scored.scores for _, scored, _ in ranks])[order], expected.scores)
    for metrics, _, cuts in ranks:
        assert metrics == {name: alone[name] for name in names}
        assert cuts == [(True, True)] * 3


@pytest.mark.integration
def test_a_zero3_engine_gives_the_same_metrics_between_its_steps(shards, alone):
    for metrics, losses in run_ranks(2, metrics_of_engine, shards, "few_batches"):
        assert metrics == [alone["few_batches"]] * 2
        assert losses == pytest.approx([losses[0]] * 2)
