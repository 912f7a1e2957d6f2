"""What pretraining refuses before it starts: tokenizers that do not fit the text tower it will train."""

import numpy as np
import pytest
from transformers import BridgeTowerModel, RobertaModel

from pretrain.train import PretrainConfig
from tests.data.test_tokenizer import SPECIAL, write_tokenizer
from tests.model.test_bridgetower import draw_config
from tests.tiny import tiny_config
from unimo3.data.args import DataArgs
from unimo3.model.args import ModelArgs, TextArgs, VisionArgs


def text_args(**changes) -> ModelArgs:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = VisionArgs(image_size=16, patch_size=8, width=32, depth=2, num_heads=2)
    return ModelArgs(TextArgs(**{"intermediate_size": 64, **sizes, **changes}), vision, **sizes)


def errors_of(model: ModelArgs, tokenizer: str, max_tokens: int) -> list[str]:
    assert model.validate() == []
    settings = PretrainConfig(model=model, data=DataArgs(tokenizer=tokenizer, max_text_tokens=max_tokens))
    return [
        line for line in settings.slow_errors() if line.startswith(("model.text", "data.tokenizer", "data.max_text"))
    ]


@pytest.fixture
def roberta(tmp_path) -> str:
    sizes = tiny_config().text_config
    RobertaModel(sizes, add_pooling_layer=False).save_pretrained(tmp_path / "roberta")
    return str(tmp_path / "roberta")


def test_a_tokenizer_is_compared_with_the_tower_that_init_gives(tmp_path, roberta):
    bridgetower = draw_config(np.random.default_rng(2), vision={"patch_size": 8, "image_size": 16})
    BridgeTowerModel(bridgetower).save_pretrained(tmp_path / "bridgetower")
    towers = {
        70: ModelArgs(vision=VisionArgs(image_size=16), init=str(tmp_path / "bridgetower")),
        60: text_args(init=roberta),
        50: text_args(vocab_size=50),
    }
    tokenizer = write_tokenizer(tmp_path / "tokenizer", SPECIAL | {"<mask>": 75})
    for size, model in towers.items():
        (problem,) = errors_of(model, tokenizer, 8)
        assert problem.startswith(f"model.text.vocab_size: {size}: data.tokenizer has 45 entries, the largest id is 75")


def test_initial_weights_decide_the_padding_id_and_new_ones_do_not(tmp_path, roberta):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", SPECIAL | {"<pad>": 3, "<unk>": 1})
    new = text_args(vocab_size=50, max_position_embeddings=20)
    assert errors_of(new, tokenizer, 16) == []
    (problem,) = errors_of(new, tokenizer, 17)
    assert problem.startswith("data.max_text_tokens: 17: model.text.max_position_embeddings 20 allows 16, since")
    (problem,) = errors_of(text_args(init=roberta), tokenizer, 16)
    assert problem.startswith("data.tokenizer: pads with the id 3, the weights with 1")
