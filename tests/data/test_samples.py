"""From bytes to inputs: masks, pixels, captions, answers, and what happens to bad samples."""

import io
import json
import multiprocessing
import random
import shutil
import tarfile
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tests.data.conftest import draw_jpeg, index_again, saved
from tests.waiting import PATIENCE_S
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.index import ShardIndex
from unimo3.data.loader import ReaderArgs, TrainingLoader, evaluation_batches
from unimo3.data.masking import Masking
from unimo3.data.order import SampleOrder, Unit
from unimo3.data.samples import PretrainSamples, TextEncoder, VqaSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform, image_processor, normalize
from unimo3.errors import _READER_DIED, ConfigError, DataError, exit_with_status
from unimo3.metrics.vqa import normalize_answer

READER = ReaderArgs(num_workers=0, prefetch=1)


@pytest.fixture(scope="module")
def tokenizer(coco):
    return load_tokenizer(str(coco / "tokenizer"))


def pretrain_samples(folder, tokenizer, augment="none", seed=0):
    return PretrainSamples(ShardIndex(folder), tokenizer, 16, ImageTransform(32, augment), 0.15, seed)


def loader(samples, **changes):
    order = SampleOrder(samples.units_per_shard, 0, 2)
    settings = {"global_batch": 8, "micro_batch": 4, "rank": 0, "world_size": 1, "reader": READER} | changes
    return iter(TrainingLoader([samples], order, **settings))


def assert_equal_batches(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("start_step", [0, 1, 2, 3])
def test_skipped_batches_are_read_by_no_step(coco, tokenizer, world_size, start_step):
    samples = pretrain_samples(coco / "train", tokenizer)
    ranks = [
        loader(samples, rank=rank, world_size=world_size, start_step=start_step, skipped=[[1, 3], [4, 5]])
        for rank in range(world_size)
    ]
    for number in (0, 3, 5, 6)[start_step:]:
        micro_batches = [batch for rank in ranks for batch in next(rank)]
        positions = sorted(int(position) for batch in micro_batches for position in batch["positions"])
        assert positions == list(range(8 * number, 8 * number + 8))


# Tokenizer and masking.


def test_a_trained_tokenizer_has_robertas_form(tokenizer):
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    once, twice = tokenizer("picture")["input_ids"], tokenizer("picture picture")["input_ids"]
    assert once[0] == 0
    assert once[-1] == 2
    assert twice[1:-1] == 2 * once[1:-1]
    assert tokenizer.decode(tokenizer("déjà vu 7")["input_ids"], skip_special_tokens=True).strip() == "déjà vu 7"


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    for folder in (str(tmp_path / "nowhere"), str(tmp_path), ""):
        with pytest.raises(ConfigError, match=r"data\.tokenizer: '"):
            load_tokenizer(folder)


def test_masking_follows_its_ratios_and_skips_special_tokens():
    masking = Masking(0.15, mask_id=4, special_ids=frozenset(range(5)), vocab_size=1000)
    rng = np.random.default_rng(0)
    ids = np.concatenate([[0], rng.integers(5, 1000, 60), [2], [1] * 10])
    chosen = masked = unchanged = replaced = 0
    for _ in range(2000):
        out, labels = masking(ids, rng)
        where = labels != -100
        assert not where[[0, 61, *range(62, 72)]].any()
        assert (labels[where] == ids[where]).all()
        assert (out[~where] == ids[~where]).all()
        assert not np.isin(out[where & (out != 4)], range(5)).any()
        chosen += where.sum()
        masked += (out[where] == 4).sum()
        unchanged += (out[where] == ids[where]).sum()
        replaced += ((out[where] != 4) & (out[where] != ids[where])).sum()
    assert chosen / (2000 * 60) == pytest.approx(0.15, abs=0.005)
    assert masked / chosen == pytest.approx(0.8, abs=0.02)
    assert replaced / chosen == pytest.approx(0.1, abs=0.02)
    assert unchanged / chosen == pytest.approx(0.1, abs=0.02)


def test_masking_predicts_at_least_one_token():
    masking = Masking(1e-9, mask_id=4, special_ids=frozenset(range(5)), vocab_size=20)
    _, labels = masking(np.array([0, 7, 8, 2, 1]), np.random.default_rng(0))
    assert (labels != -100).sum() == 1


@pytest.mark.parametrize("text", ["a red dog", "", "a " * 40, "<mask> dog</s> \u00e9\u4e2d"])
def test_texts_are_encoded_as_the_tokenizer_does(tokenizer, text):
    expected = tokenizer(text, truncation=True, max_length=16, padding="max_length")
    ids, mask = TextEncoder(tokenizer, 16)(text)
    assert (ids.tolist(), mask.tolist()) == (expected["input_ids"], expected["attention_mask"])
    # Another length of the same tokenizer leaves the first alone.
    TextEncoder(tokenizer, 8)
    assert TextEncoder(tokenizer, 16)(text)[0].tolist() == ids.tolist()


# Pixels.


def photo(width: int, height: int, seed: int = 0, kind: str = "JPEG") -> bytes:
    """Smooth colours with sharp edges."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    draw = ImageDraw.Draw(image)
    for x, y in rng.integers(0, min(width, height), (12, 2)).tolist():
        draw.ellipse((x, y, x + width // 5, y + height // 5), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return saved(image, kind, quality=95)


@pytest.mark.parametrize("size", [(40, 30), (20, 64), (32, 32)])
def test_pixels_equal_the_exported_processors(size):
    content = draw_jpeg(3, *size)
    expected = image_processor(32)(Image.open(io.BytesIO(content)), return_tensors="pt")["pixel_values"][0]
    pixels = normalize(torch.tensor(ImageTransform(32)(content, np.random.default_rng(0))))
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=1e-5)


def test_augmentation_is_a_function_of_the_samples_generator():
    transform, content = ImageTransform(32, "randaugment"), draw_jpeg(1)
    random.seed(1)
    one = transform(content, np.random.default_rng(5))
    random.seed(2)
    before = random.getstate()
    assert np.array_equal(one, transform(content, np.random.default_rng(5)))
    assert random.getstate() == before
    others = [transform(content, np.random.default_rng(seed)) for seed in range(4)]
    assert any(not np.array_equal(one, other) for other in others)


@pytest.mark.parametrize("is_reduced", [False, True])
def test_a_decompression_bomb_is_refused(monkeypatch, is_reduced):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match="exceeds limit"):
        ImageTransform(4, reduced_decode=is_reduced)(draw_jpeg(1), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("size", "crop_scale", "decoded"),
    [
        ((640, 480), 1.0, (160, 120)),
        ((480, 640), 1.0, (120, 160)),
        ((1024, 128), 1.0, (1024, 128)),
        ((639, 255), 1.0, (320, 128)),
        ((1280, 960), 0.25, (640, 480)),
        ((96, 127), 1.0, (96, 127)),
    ],
)
def test_large_jpegs_are_decoded_at_a_reduced_size(monkeypatch, size, crop_scale, decoded):
    content, sizes = photo(*size), []
    load = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda image, mode: sizes.append(image.size) or load(image, mode))
    pixels = ImageTransform(60, crop_scale=crop_scale, reduced_decode=True)(content, np.random.default_rng(0))
    assert sizes == [decoded]
    assert pixels.shape == (60, 60, 3)


def test_a_reduced_decode_changes_pixels_little_and_no_other_kind_of_image():
    rng = np.random.default_rng(0)
    for kind, is_equal in (("JPEG", False), ("PNG", True), ("WEBP", True)):
        differences = []
        for seed in range(4):
            content = photo(1024, 768, seed, kind)
            full, reduced = (
                ImageTransform(64, reduced_decode=is_reduced)(content, rng) for is_reduced in (False, True)
            )
            differences.append(np.abs(full.astype(int) - reduced))
        assert (np.max(differences) == 0) == is_equal
        assert np.mean(differences) < 0.5
        assert np.max(differences) < 32


@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_reduced_decode_changes_noise_and_saturated_patterns_little(subsampling):
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:1600, :1600]
    colors = np.array([[255, 0, 0], [0, 255, 255]], dtype=np.uint8)
    for pixels in (
        rng.integers(0, 256, (1600, 1600, 3), dtype=np.uint8),
        colors[rng.integers(0, 2, (1600, 1600))],
        colors[(x // 5 + y // 5) % 2],
    ):
        content = saved(Image.fromarray(pixels), "JPEG", quality=90, subsampling=subsampling)
        full, reduced = (ImageTransform(384, reduced_decode=is_reduced)(content, rng) for is_reduced in (False, True))
        difference = np.abs(full.astype(int) - reduced)
        assert 0 < difference.mean() < 8
        assert difference.max() < 48


def test_a_jpeg_of_several_pictures_is_decoded_at_a_reduced_size():
    pictures, content = [Image.open(io.BytesIO(photo(*size))) for size in ((1024, 768), (64, 48))], io.BytesIO()
    pictures[0].save(content, "MPO", save_all=True, append_images=pictures[1:], quality=95)
    rng = np.random.default_rng(0)
    assert Image.open(io.BytesIO(content.getvalue())).format == "MPO"
    full, reduced = (
        ImageTransform(64, reduced_decode=is_reduced)(content.getvalue(), rng) for is_reduced in (False, True)
    )
    assert 0 < np.abs(full.astype(int) - reduced).mean() < 0.5


def test_a_reduced_decode_turns_upright_and_reports_damage():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(photo(400, 300)))
    turned = io.BytesIO()
    image.save(turned, "JPEG", quality=95, exif=exif)
    transform, rng = ImageTransform(32, reduced_decode=True), np.random.default_rng(0)
    upright = ImageTransform(32)(saved(image.transpose(Image.Transpose.ROTATE_270), "PNG"), rng)
    assert np.abs(upright.astype(int) - transform(turned.getvalue(), rng)).mean() < 1
    with pytest.raises(OSError, match="truncated"):
        transform(photo(400, 300)[:-3000], rng)


# Captions, questions, batches.


def test_every_caption_of_an_image_is_used_before_one_repeats(coco, tokenizer):
    samples = pretrain_samples(coco / "train", tokenizer)
    num_captions = 6  # of seven in the source two are alike
    seen = [tuple(samples.build(Unit(epoch, 0, 1))["input_ids"].tolist()) for epoch in range(2 * num_captions)]
    assert sorted(Counter(seen[:num_captions]).values()) == [1] * num_captions
    assert Counter(seen[num_captions:]) == Counter(seen[:num_captions])


@pytest.mark.integration
@pytest.mark.parametrize("augment", ["none", "randaugment"])
def test_two_workers_read_what_none_reads(coco, tokenizer, augment):
    samples = pretrain_samples(coco / "train", tokenizer, augment)
    alone = loader(samples)
    helped = loader(samples, reader=ReaderArgs(2, 2))
    for _ in range(4):
        for one, other in zip(next(alone), next(helped), strict=True):
            assert_equal_batches(one, other)


def test_starting_at_a_step_equals_skipping_to_it(coco, tokenizer):
    samples = pretrain_samples(coco / "train", tokenizer)
    straight = loader(samples)
    for _ in range(5):
        next(straight)
    resumed = loader(samples, start_step=5)
    for one, other in zip(next(straight), next(resumed), strict=True):
        assert_equal_batches(one, other)


def test_ranks_together_read_what_one_rank_reads(coco, tokenizer):
    samples = pretrain_samples(coco / "train", tokenizer)
    alone = loader(samples, micro_batch=8)
    ranks = [loader(samples, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(7):
        (expected,) = next(alone)
        parts = [next(rank)[0] for rank in ranks]
        assert torch.equal(expected["mlm_input_ids"], torch.cat([part["mlm_input_ids"] for part in parts]))
        assert torch.equal(expected["images"], torch.cat([part["images"] for part in parts]))


def test_vqa_targets_and_questions(vqav2, tokenizer):
    answers = AnswerVocabulary.load(vqav2 / "answers.json")
    samples = VqaSamples(ShardIndex(vqav2 / "val"), tokenizer, 16, ImageTransform(32), answers, 0)
    total = sum(samples.units_per_shard)
    seen = Counter()
    for rank in range(3):
        for batch, counts in evaluation_batches(samples, rank, 3, 2, READER):
            for question, counted, targets in zip(batch["question"], counts.tolist(), batch["targets"], strict=True):
                seen[question["question_id"]] += counted
                right = answers.answers.index(normalize_answer(question["multiple_choice_answer"]))
                assert targets[right] == 1.0
    assert len(seen) == total
    assert set(seen.values()) == {1}


# Bad samples.


@pytest.fixture
def damaged(coco, tmp_path):
    """Shards in which two images were overwritten after indexing, and one has no caption."""
    folder = tmp_path / "train"
    shutil.copytree(coco / "train", folder)
    index = ShardIndex(folder)
    keys = [index.key(0, 1), index.key(1, 2), index.key(2, 0)]
    for shard in (0, 1, 2):
        members = {}
        with tarfile.open(folder / index.shards[shard].name) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        if shard < 2:
            members[f"{keys[shard]}.jpg"] = b"no image"
        else:
            members[f"{keys[shard]}.json"] = json.dumps({"image_id": 1, "captions": [" "]}).encode()
        with tarfile.open(folder / index.shards[shard].name, "w") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    index_again(folder)
    return folder, keys


def test_bad_samples_are_replaced_alike_counted_and_named(damaged, tokenizer, caplog):
    folder, keys = damaged
    samples = pretrain_samples(folder, tokenizer)
    runs = []
    for _ in range(2):
        batches = [batch for step in range(2) for batch in next(loader(samples, start_step=step))]
        runs.append([key for batch in batches for key in batch["keys"]])
        assert sum(batch["num_replaced"] for batch in batches) == 3
    assert runs[0] == runs[1]
    assert not set(keys) & set(runs[0])
    for key, reason in zip(keys, ("cannot be decoded", "cannot be decoded", "has no caption"), strict=True):
        assert f"/{key} " in caplog.text
        assert reason in caplog.text


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_of_an_evaluation_is_an_error_never_replaced(damaged, tokenizer, workers):
    folder, keys = damaged
    with pytest.raises(DataError) as error:
        list(evaluation_batches(pretrain_samples(folder, tokenizer), 0, 1, 4, ReaderArgs(workers, 1)))
    assert f"000000.tar: sample {keys[0]} its image cannot be decoded" in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 1])
def test_reading_draws_nothing_from_the_generator_of_dropout(coco, tokenizer, workers):
    samples = pretrain_samples(coco / "val", tokenizer)
    before = torch.get_rng_state()
    next(loader(samples, reader=ReaderArgs(workers, 1)))
    list(evaluation_batches(samples, 0, 1, 4, ReaderArgs(workers, 1)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.integration
def test_readers_are_forked_whatever_the_default_start_method_is(coco, tokenizer):
    default = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        next(loader(pretrain_samples(coco / "train", tokenizer), reader=ReaderArgs(1, 1)))
    finally:
        multiprocessing.set_start_method(default, force=True)


@pytest.mark.integration
@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_reader_is_an_error_not_a_hang(coco, tokenizer, capfd, busy):
    before = set(multiprocessing.active_children())  # of other tests
    batches = loader(pretrain_samples(coco / "train", tokenizer), reader=ReaderArgs(1, 1))
    next(batches)
    (reader,) = set(multiprocessing.active_children()) - before
    reader.kill()
    deadline = time.monotonic() + PATIENCE_S

    @exit_with_status
    def main():
        if busy:  # torch raises it in the middle of whatever runs
            while time.monotonic() < deadline:
                sum(range(1000))
        for _ in range(50):
            next(batches)

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    error = capfd.readouterr().err
    assert error.startswith("ReaderDied: a reader process ended before its time (DataLoader worker (pid")
    assert "lower data.num_workers or data.prefetch" in error


@pytest.mark.integration
def test_an_error_in_a_reader_is_not_reported_as_a_dead_reader(coco, tokenizer):
    samples = pretrain_samples(coco / "train", tokenizer)

    def fails(text):
        raise RuntimeError("of another kind")

    samples._encode = fails
    with pytest.raises(RuntimeError, match="of another kind") as error:
        next(loader(samples, reader=ReaderArgs(1, 1)))
    assert not _READER_DIED.search(str(error.value))


@pytest.mark.integration
def test_a_loader_that_is_dropped_ends_its_readers(coco, tokenizer):
    before = set(multiprocessing.active_children())
    batches = loader(pretrain_samples(coco / "train", tokenizer), reader=ReaderArgs(2, 1))
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    del batches
    assert not set(multiprocessing.active_children()) - before


# Answers: expected values are of the official program's rules, worked out by hand.


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("The Dog", "dog"),
        ("none", "0"),
        ("Ten apples", "10 apples"),
        ("dont know", "don't know"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("what?!", "what"),
        ("an 'ows'at", "'ow's'at"),
    ],
)
def test_normalization_case_by_case(raw, normal):
    assert normalize_answer(raw) == normal


def test_soft_targets_follow_the_counts():
    vocabulary = AnswerVocabulary(["yes", "no", "2"])
    assert vocabulary.soft_targets(["yes"] * 7 + ["no"] * 2 + ["two"]) == pytest.approx([1.0, 0.6, 0.3])
    assert vocabulary.soft_targets(["maybe"] * 10) == pytest.approx([0, 0, 0])
