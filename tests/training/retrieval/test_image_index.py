"""The saved index of a folder of images: what it holds, what it finds, and what is refused."""

import json

import pytest
import torch

from tests.data.conftest import draw_jpeg
from tests.tiny import tiny_config
from unimo3.data.images import decode
from unimo3.data.tokenizer import load_tokenizer, train_tokenizer
from unimo3.data.transforms import image_processor
from unimo3.errors import ConfigError, DataError
from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval
from unimo3.model.init import initialize_weights
from unimo3.model.processor import Unimo3Processor
from unimo3.training.retrieval.image_index import ImageIndex, index_images, search_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven images, one of them in a folder of its own, and a file that is none."""
    root = tmp_path_factory.mktemp("images")
    (root / "more").mkdir()
    for number in range(6):
        (root / f"{number}.jpg").write_bytes(draw_jpeg(number))
    (root / "more" / "6.JPEG").write_bytes(draw_jpeg(6))
    (root / "3b.png").write_bytes(b"no image")
    (root / "notes.txt").write_text("not to be looked at")
    return root


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    where = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a red dog on a hill", "two dogs"] * 20, 300, where)
    return Unimo3Processor(image_processor(16), load_tokenizer(str(where)))


def model_of(seed):
    config = tiny_config()
    config.text_config.vocab_size = 300
    model = Unimo3ForImageAndTextRetrieval(config)
    initialize_weights(model, seed, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return model_of(0)


@pytest.fixture(scope="module")
def index(model, processor, folder):
    return index_images(model, processor, folder, batch=3)


def test_it_holds_every_image_that_can_be_decoded(index):
    assert index.names == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg", "more/6.JPEG"]
    assert index.unreadable == ["3b.png"]
    torch.testing.assert_close(index.embeds.norm(dim=-1), torch.ones(7))


def test_a_search_gives_the_models_cosines_best_first(index, model, processor, folder):
    found = search_images(index, model, processor, "two dogs", 4)
    expected = {}
    for name in index.names:
        inputs = processor(images=[decode((folder / name).read_bytes())], text=["two dogs"], return_tensors="pt")
        with torch.no_grad():
            out = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
        expected[name] = float((out.text_embeds * out.image_embeds).sum())
    best = sorted(expected, key=expected.__getitem__, reverse=True)[:4]
    assert [name for name, _ in found] == best
    assert [cosine for _, cosine in found] == pytest.approx([expected[name] for name in best], abs=1e-5)
    assert len(search_images(index, model, processor, "two dogs", 100)) == 7


def test_it_is_the_same_after_saving(index, tmp_path):
    index.save(tmp_path / "saved")
    again = ImageIndex.load(tmp_path / "saved")
    assert (again.names, again.unreadable, again.weights) == (index.names, index.unreadable, index.weights)
    assert torch.equal(again.embeds, index.embeds)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["embeddings.safetensors", "index.json"]


def test_an_index_of_other_weights_is_refused(index, processor):
    with pytest.raises(ConfigError, match="was made with other weights"):
        search_images(index, model_of(1), processor, "two dogs", 1)


def test_damage_is_told(index, tmp_path):
    with pytest.raises(DataError, match=r"index.json: cannot be read \(No such file"):
        ImageIndex.load(tmp_path)
    index.save(tmp_path)
    content = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({"names": content["names"]}))
    with pytest.raises(DataError, match=r"holds no index of images that can be read \(KeyError"):
        ImageIndex.load(tmp_path)
    index.save(tmp_path)
    data = bytearray((tmp_path / "embeddings.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "embeddings.safetensors").write_bytes(data)
    with pytest.raises(DataError, match=r"is not the file that index\.json was written with"):
        ImageIndex.load(tmp_path)


def test_a_folder_without_images_is_refused(model, processor, folder, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"holds no image that can be decoded \(jpg, jpeg, png, webp; 1 cannot\)"):
        index_images(model, processor, tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        index_images(model, processor, folder / "none")
