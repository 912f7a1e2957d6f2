"""Tokenizers of other makers: used rightly, or refused before a reader meets what they cannot do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig

from tests.data.mutations import mutated, property_settings
from tests.tiny import tiny_config
from unimo3.data.args import DataArgs
from unimo3.data.masking import Masking
from unimo3.data.samples import PretrainSamples, TextEncoder
from unimo3.data.tokenizer import load_tokenizer, train_tokenizer
from unimo3.data.transforms import ImageTransform, image_processor
from unimo3.errors import ConfigError
from unimo3.model.processor import Unimo3Processor
from unimo3.model.tokenizer_checks import resolve_tokens, tokenizer_errors
from unimo3.model.unimo3 import Unimo3Model

SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
WORDS = [f"word{number}" for number in range(40)]
TEXT = " ".join(WORDS)


def write_tokenizer(folder: Path, ids: dict[str, int], unknown: str | None = "<unk>", model=None, **options) -> str:
    """A tokenizer of complete words with these ids of its special tokens; other words follow, or stand before."""
    free = (number for number in range(1000) if number not in ids.values())
    vocabulary = ids | {word: next(free) for word in WORDS if word not in ids}
    tokenizer = Tokenizer(model(vocabulary) if model else models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
    names = {"cls": "<s>", "bos": "<s>", "sep": "</s>", "eos": "</s>", "pad": "<pad>", "mask": "<mask>"}
    special = {f"{role}_token": token for role, token in names.items()}
    special |= {"unk_token": unknown} if unknown else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **options).save_pretrained(folder)
    return str(folder)


def errors_of(folder: str, max_tokens: int, is_trained: bool = False, **sizes) -> list[str]:
    text = RobertaConfig(**({"vocab_size": 50, "max_position_embeddings": 20} | sizes))
    return tokenizer_errors(text, load_tokenizer(folder), max_tokens, is_trained)


def longest(folder: str, max_tokens: int, **sizes):
    """The text states of a text longer than `max_tokens`."""
    text = tiny_config().text_config.to_dict() | {"vocab_size": 50, "max_position_embeddings": 20} | sizes
    config, tokenizer = tiny_config(text_config=text), load_tokenizer(folder)
    resolve_tokens(config, tokenizer)
    batch = tokenizer([TEXT], truncation=True, max_length=max_tokens, return_tensors="pt")
    assert batch["input_ids"].shape == (1, max_tokens)
    assert tokenizer.model_max_length >= max_tokens
    return Unimo3Model(config).encode_text(batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize("padding_id", [1, 0, 3, 7])
def test_texts_are_as_long_as_positions_behind_the_padding_id_allow(tmp_path, padding_id):
    ids = SPECIAL | {"<pad>": padding_id}
    for number, token in enumerate(token for token in SPECIAL if token != "<pad>"):
        ids[token] = 10 + number
    folder, most = write_tokenizer(tmp_path, ids), 20 - padding_id - 1
    assert errors_of(folder, most) == []
    assert longest(folder, most).shape[2] == most
    (problem,) = errors_of(folder, most + 1)
    assert f"data.max_text_tokens: {most + 1}: model.text.max_position_embeddings 20 allows {most}, since" in problem
    assert "or pretrain with model.text.max_position_embeddings 21" in problem


def test_texts_of_a_modernbert_have_all_positions_and_the_tokenizers_ids(tmp_path):
    folder = write_tokenizer(tmp_path, SPECIAL | {"<pad>": 7, "<s>": 9})
    text = {"model_type": "modernbert", "vocab_size": 50, "max_position_embeddings": 20}
    config, tokenizer = tiny_config(text_config=text), load_tokenizer(folder)
    assert tokenizer_errors(config.text_config, tokenizer, 20, is_trained=False) == []
    (problem,) = tokenizer_errors(config.text_config, tokenizer, 21, is_trained=False)
    assert problem.endswith("model.text.max_position_embeddings 20 allows 20; lower it")
    resolve_tokens(config, tokenizer)
    text = config.text_config
    assert (text.pad_token_id, text.cls_token_id, text.sep_token_id) == (7, 9, 2)
    assert tokenizer.model_max_length == 20


def test_special_tokens_at_the_end_of_the_vocabulary_are_an_error(tmp_path):
    folder = write_tokenizer(tmp_path, {token: 40 + number for number, token in enumerate(SPECIAL)})
    (problem,) = errors_of(folder, 8)
    assert "data.max_text_tokens: 8: model.text.max_position_embeddings 20 allows 0, since" in problem
    assert "the padding id 41; lower it, use a tokenizer with a lower padding id" in problem
    assert errors_of(folder, 8, max_position_embeddings=50) == []
    assert longest(folder, 8, max_position_embeddings=50).shape[2] == 8


@pytest.mark.parametrize("token", ["<mask>", "word39"])
def test_the_largest_id_decides_and_gaps_are_neither_masked_nor_drawn(tmp_path, token):
    folder = write_tokenizer(tmp_path, SPECIAL | {token: 60})
    (problem,) = errors_of(folder, 8)
    assert (
        "model.text.vocab_size: 50: data.tokenizer has 45 entries, the largest id is 60; set it to at least 61"
        in problem
    )
    assert errors_of(folder, 8, vocab_size=61) == []
    tokenizer = load_tokenizer(folder)
    mask = PretrainSamples(None, tokenizer, 50, ImageTransform(8), 0.9, 0)._mask
    ids, _ = TextEncoder(tokenizer, 50)(TEXT)
    drawn = {int(number) for seed in range(200) for number in mask(ids, np.random.default_rng(seed))[0]}
    assert drawn <= set(tokenizer.get_vocab().values())
    assert len(drawn) > 40


def test_a_vocabulary_without_gaps_gives_unchanged_masks(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, SPECIAL))
    mask = PretrainSamples(None, tokenizer, 50, ImageTransform(8), 0.5, 0)._mask
    assert mask == Masking(0.5, 4, frozenset(SPECIAL.values()), len(tokenizer))


def test_weights_keep_the_padding_id_that_they_were_trained_with(tmp_path):
    folder = write_tokenizer(tmp_path, SPECIAL | {"<pad>": 3, "<unk>": 1})
    assert errors_of(folder, 8) == []
    (problem,) = errors_of(folder, 8, is_trained=True)
    assert problem.startswith("data.tokenizer: pads with the id 3, the weights with 1; use the tokenizer that belongs")


def word_piece(vocabulary):
    return models.WordPiece(vocabulary, unk_token="[UNK]")


def unigram(vocabulary):
    return models.Unigram([(word, -1.0) for word in sorted(vocabulary, key=vocabulary.get)], unk_id=None)


@pytest.mark.parametrize("model", [None, word_piece, unigram], ids=["words", "word pieces", "unigrams"])
def test_a_tokenizer_without_an_entry_for_unknown_words_is_refused(tmp_path, model):
    ids = {token: number for number, token in enumerate(("<s>", "<pad>", "</s>", "<mask>"))}
    folder = write_tokenizer(tmp_path, ids, unknown=None, model=model)
    with pytest.raises(ConfigError, match="cannot encode a text with rare characters"):
        load_tokenizer(folder)


def test_texts_are_padded_and_cut_on_the_right_whatever_the_folder_has(tmp_path):
    sides = {"padding_side": "left", "truncation_side": "left"}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, SPECIAL, **sides))
    batch = tokenizer(["word1 word2", TEXT], padding=True, truncation=True, max_length=6)
    ids = tokenizer.convert_tokens_to_ids
    assert batch["input_ids"] == [
        [0, ids("word1"), ids("word2"), 2, 1, 1],
        [0, *(ids(f"word{number}") for number in range(4)), 2],
    ]
    assert [TextEncoder(tokenizer, 6)(text)[0].tolist() for text in ("word1 word2", TEXT)] == batch["input_ids"]


def ids_in_and_after_training(folder: str, exported: Path, texts: list[str]) -> list[list[list[int]]]:
    """The ids of texts, without padding, as training reads them and as the exported folder's processor does."""
    tokenizer = load_tokenizer(folder)
    tokenizer.model_max_length = 12
    encode = TextEncoder(tokenizer, 12)
    trained = [ids[mask.astype(bool)].tolist() for ids, mask in map(encode, texts)]
    Unimo3Processor(image_processor(16), tokenizer).save_pretrained(exported)
    batch = Unimo3Processor.from_pretrained(exported)(text=texts, return_tensors="np")
    masks = batch["attention_mask"].astype(bool)
    return [trained, [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=True)]]


TEXTS = ["word1 word2", TEXT, "word3 <mask> word4", "\ufeff", "<s> </s>"]
FIELDS = {
    "max_length": [6, 30, 0],
    "stride": [2],
    "truncation": [False, True],
    "padding": [False, "max_length"],
    "pad_to_multiple_of": [16],
    "model_input_names": [["input_ids"], ["input_ids", "token_type_ids", "attention_mask"]],
    "return_attention_mask": [False],
    "return_token_type_ids": [True],
    "return_overflowing_tokens": [True],
    "return_offsets_mapping": [True],
    "return_length": [True],
    "split_special_tokens": [True],
    "add_special_tokens": [False],
    "is_split_into_words": [True],
    "padding_side": ["left"],
    "truncation_side": ["left"],
    "clean_up_tokenization_spaces": [True],
    "model_max_length": [5, 512],
    "add_prefix_space": [True],
    "add_bos_token": [False],
    "add_eos_token": [False],
    "do_lower_case": [True],
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in FIELDS.items() for value in values])
def test_a_field_of_the_folder_changes_no_text_after_training(tmp_path, field, value):
    folder = changed(tmp_path / "tokenizer", "tokenizer_config.json", field, value=value)
    try:
        trained, exported = ids_in_and_after_training(folder, tmp_path / "exported", TEXTS)
    except ConfigError:
        return
    assert exported == trained


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("truncation", {"direction": "Left", "max_length": 6, "strategy": "LongestFirst", "stride": 1}),
        ("padding", {"strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 1}),
    ],
)
def test_lengths_in_tokenizer_json_change_no_text_after_training(tmp_path, name, value):
    value |= {"pad_type_id": 0, "pad_token": "<pad>"} if name == "padding" else {}
    folder = changed(tmp_path / "tokenizer", "tokenizer.json", name, value=value)
    trained, exported = ids_in_and_after_training(folder, tmp_path / "exported", TEXTS)
    assert exported == trained
    assert max(map(len, trained)) == 12


def test_bpe_dropout_is_off_in_and_after_training(tmp_path):
    train_tokenizer(["several dogs run over a hill"] * 9, 300, tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["dropout"] = 0.9
    path.write_text(json.dumps(content))
    text = "several dogs run over a hill"
    trained, exported = ids_in_and_after_training(str(path.parent), tmp_path / "exported", [text] * 20)
    assert exported == trained
    assert all(ids == trained[0] for ids in trained)


@pytest.mark.parametrize("name", ["LayoutLMv3TokenizerFast", "LayoutXLMTokenizerFast"])
def test_a_class_that_needs_more_than_a_text_is_refused(tmp_path, name):
    folder = changed(tmp_path, "tokenizer_config.json", "tokenizer_class", value=name)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: "):
        load_tokenizer(folder)


def test_a_text_has_room_for_a_word_between_special_tokens(tmp_path):
    folder = write_tokenizer(tmp_path, SPECIAL)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    ends = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ("<s>", "</s>", "</s>")]
    tokens = {token: {"id": token, "ids": [SPECIAL[token]], "tokens": [token]} for token in ("<s>", "</s>")}
    single = [ends[0], {"Sequence": {"id": "A", "type_id": 0}}, *ends[1:]]
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}
    path.write_text(json.dumps(content | {"post_processor": template}))
    (problem,) = DataArgs("train", tokenizer=folder, max_text_tokens=3).slow_errors()
    assert "data.max_text_tokens: 3: data.tokenizer puts 3 special tokens around a text; at least 4" in problem
    assert DataArgs("train", tokenizer=folder, max_text_tokens=4).slow_errors() == []


@property_settings
@given(data=st.data())
def test_any_tokenizer_folder_is_used_alike_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "mutated_tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    write_tokenizer(folder / "tokenizer", SPECIAL)
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    path = folder / "tokenizer" / name
    content = json.loads(path.read_text())
    path.write_text(json.dumps(data.draw(mutated(content))))
    try:
        trained, exported = ids_in_and_after_training(str(folder / "tokenizer"), folder / "exported", TEXTS)
    except ConfigError:
        return
    assert exported == trained


def changed(folder: Path, name: str, *path: str, value) -> str:
    """A tokenizer's folder with another value in one of its files."""
    write_tokenizer(folder, SPECIAL)
    content = entry = json.loads((folder / name).read_text())
    for field in path[:-1]:
        entry = entry[field]
    entry[path[-1]] = value
    (folder / name).write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("entry", "number", "named"),
    [
        ("word5", 11, "'word5' and 'word6' have the id 11"),
        ("<mask>", 3, "'<mask>' and '<unk>' have the id 3"),
        ("word7", 2, "'</s>' and 'word7' have the id 2"),
    ],
)
def test_two_entries_with_one_id_are_refused(tmp_path, entry, number, named):
    with pytest.raises(ConfigError, match=f"data.tokenizer: .*: its entries {named}; "):
        load_tokenizer(changed(tmp_path, "tokenizer.json", "model", "vocab", entry, value=number))


@pytest.mark.parametrize("value", ["abc", "512", [512], {}])
def test_a_longest_text_that_is_no_number_is_refused(tmp_path, value):
    with pytest.raises(ConfigError, match=r"data.tokenizer: .*: has model_max_length .*; a number"):
        load_tokenizer(changed(tmp_path, "tokenizer_config.json", "model_max_length", value=value))


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<mask>", 4]},
        {
            "type": "RobertaProcessing",
            "sep": ["<s>", 0],
            "cls": ["</s>", 2],
            "trim_offsets": True,
            "add_prefix_space": False,
        },
    ],
)
def test_a_tokenizer_that_does_not_enclose_texts_is_refused(tmp_path, value):
    with pytest.raises(ConfigError, match=r"data.tokenizer: .*: does not put '<s>' before a text and '</s>' behind it"):
        load_tokenizer(changed(tmp_path, "tokenizer.json", "post_processor", value=value))


@pytest.mark.parametrize(
    ("role", "token", "named"),
    [
        ("pad", "</s>", "its sep_token and its pad_token are both '</s>'"),
        ("pad", "<s>", "its cls_token and its pad_token are both '<s>'"),
        ("pad", "<mask>", "its pad_token and its mask_token are both '<mask>'"),
        ("pad", "<unk>", "its pad_token and its unk_token are both '<unk>'"),
        ("mask", "<unk>", "its mask_token and its unk_token are both '<unk>'"),
        ("mask", "</s>", "its sep_token and its mask_token are both '</s>'"),
        ("sep", "<s>", "its cls_token and its sep_token are both '<s>'"),
        ("unk", "</s>", "its sep_token and its unk_token are both '</s>'"),
    ],
)
def test_two_roles_of_one_token_are_refused(tmp_path, role, token, named):
    with pytest.raises(ConfigError, match=f"data.tokenizer: .*: {named}; padding"):
        load_tokenizer(changed(tmp_path, "tokenizer_config.json", f"{role}_token", value=token))
    # As RoBERTa's, whose first and last token have two names each.
    assert load_tokenizer(write_tokenizer(tmp_path / "right", SPECIAL)).bos_token == "<s>"
