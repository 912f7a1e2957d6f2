"""What counts as a text of a sample, and how a folder is judged by several of its samples."""

import codecs
import json

import numpy as np
import pytest

from tests.data.conftest import draw_jpeg, index_again, write_tar
from unimo3.data.args import DataArgs
from unimo3.data.captioned import CaptionedImages
from unimo3.data.formats.record import distinct
from unimo3.data.index import ShardIndex
from unimo3.data.order import Unit
from unimo3.data.sample_texts import BadSampleError, captions_of, content_of, texts_of
from unimo3.data.samples import PretrainSamples, TextEncoder
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform, image_processor
from unimo3.model.processor import Unimo3Processor
from unimo3.texts import is_blank, plain

FIVE = ["a dog runs", "two dogs", "ein Fuchs, müde", "犬", "a dog  again"]
BOM = "\ufeff"


@pytest.fixture(scope="module")
def tokenizer(coco):
    return load_tokenizer(str(coco / "tokenizer"))


def captions(**members) -> list[str]:
    """A sample's captions as they are encoded; ``json`` is given as its value."""
    members = {
        name: value if isinstance(value, bytes) else json.dumps(value).encode() for name, value in members.items()
    }
    return [plain(text) for text in captions_of(members, content_of(members))]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("utf-32-be", codecs.BOM_UTF32_BE),
    ],
)
def test_each_line_of_a_txt_is_a_caption_in_any_marked_encoding(encoding, mark, end):
    for text in (end.join(FIVE), end.join([*FIVE, ""]), end.join(["", *FIVE[:2], " ", *FIVE[2:], "", ""])):
        assert captions(txt=mark + text.encode(encoding)) == FIVE
    assert captions(txt=mark + FIVE[0].encode(encoding)) == [FIVE[0]]


def test_only_line_ends_separate_the_captions_of_a_txt():
    for separator in ("\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\t"):
        assert captions(txt=f"a{separator}b\n".encode()) == [f"a{separator}b"]
    # Files that were joined have their marks in the middle.
    assert captions(txt=f"{BOM}one\n{BOM}two\n{BOM}\n".encode()) == ["one", "two"]


@pytest.mark.parametrize(
    ("txt", "reason"),
    [
        ("café".encode("latin-1"), "its txt cannot be read"),
        (codecs.BOM_UTF16_LE + b"odd", "its txt cannot be read"),
        (codecs.BOM_UTF16_BE + b"\xd8\x00", "its txt cannot be read"),
        ("a dog".encode("utf-16-le"), "its txt has zero bytes, as UTF-16 without a byte order mark has"),
        ("a dog".encode("utf-16-be"), "its txt has zero bytes"),
        ("a dog".encode("utf-32-be"), "its txt has zero bytes"),
    ],
)
def test_a_txt_of_unknown_encoding_is_bad_only_where_it_counts(txt, reason):
    with pytest.raises(BadSampleError, match=reason):
        captions(txt=txt)
    assert captions(txt=txt, json={"caption": "a cat"}) == ["a cat"]


@pytest.mark.parametrize(
    "unusable",
    [
        *[None, 5, float("nan"), {"en": "a cat"}, [], [None], ["", " \n", BOM], "", [["a"]], True],
        *[f" {BOM} ", "\u200b", ["\u200b \u2060", "\xa0\u3000"], "\u200e\u200f", "\0", "\xad"],
    ],
)
def test_a_field_without_a_text_hides_no_other(unusable):
    good = ["a dog"]
    assert captions(json={"captions": unusable, "caption": "a dog"}) == good
    assert captions(json={"captions": unusable, "caption": unusable}, txt=b"a dog\n") == good
    assert captions(json={"caption": unusable}, txt=b"a dog") == good
    assert captions(json={"captions": unusable}) == []
    # Of several fields with a text the first counts.
    assert captions(json={"captions": good, "caption": "two dogs"}, txt=b"three dogs") == good


AROUND = [
    "{}\n",
    "{}\r\n",
    BOM + "{}",
    f"\r\n{BOM}{{}}",
    f" {BOM}{{}}",
    f"{{}} {BOM} ",
    "{}  ",
    "\t{}\xa0",
    "\u2028{}\x85",
]


@pytest.mark.parametrize("around", AROUND)
def test_what_surrounds_a_text_is_no_token_in_training_nor_processor(tokenizer, around):
    encode, processor = TextEncoder(tokenizer, 16), Unimo3Processor(image_processor(32), tokenizer)
    text, ids = around.format("a dog"), tokenizer("a dog")["input_ids"]
    assert (
        encode(text)[0].tolist() == encode("a dog")[0].tolist() == [*ids, *[tokenizer.pad_token_id] * (16 - len(ids))]
    )
    assert processor(text=text)["input_ids"] == ids
    assert processor(text=[text, "a dog"])["input_ids"] == [ids, ids]
    assert captions(json={"captions": [text]}) == captions(json={"caption": text}) == ["a dog"]
    assert distinct([text, "a dog", BOM, "\u200b"]) == ["a dog"]


@pytest.mark.parametrize(
    "text", ["a\ndog", "a  dog", f"a {BOM} dog", "a dog\u200d", "\u200fa dog", "\U0001f3f4\U000e0067\U000e007f", "?"]
)
def test_characters_inside_a_text_stay(tokenizer, text):
    assert plain(text) == text
    assert not is_blank(text)
    raw = tokenizer.backend_tokenizer.encode(text).ids
    assert Unimo3Processor(image_processor(32), tokenizer)(text=text)["input_ids"] == raw
    ids, mask = TextEncoder(tokenizer, 64)(text)
    assert ids[mask == 1].tolist() == raw


def test_half_a_surrogate_pair_is_a_question_mark_for_the_processor(tokenizer):
    processor = Unimo3Processor(image_processor(32), tokenizer)
    for half in ("a \ud83d dog", "a \udce9 dog"):
        assert processor(text=[half])["input_ids"] == processor(text=["a ? dog"])["input_ids"]


def test_a_txt_of_five_lines_is_five_captions_in_training_and_scoring(tokenizer, tmp_path):
    write_tar(tmp_path / "0.tar", {"a": {"jpg": draw_jpeg(0), "txt": "\r\n".join(FIVE).encode("utf-16")}})
    index_again(tmp_path)
    index, transform = ShardIndex(tmp_path), ImageTransform(32)
    wanted = [TextEncoder(tokenizer, 16)(caption)[0].tolist() for caption in FIVE]
    texts = CaptionedImages(index, tokenizer, 16, transform).build(Unit(0, 0, 0))["texts"]
    assert [ids.tolist() for ids, _ in texts] == wanted
    samples = PretrainSamples(index, tokenizer, 16, transform, 0.15, 0)
    seen = [samples.build(Unit(epoch, 0, 0))["input_ids"].tolist() for epoch in range(5)]
    assert sorted(seen) == sorted(wanted)


# Sets.

GOOD = {"jpg": b"", "json": b'{"captions": ["a dog"]}'}
LACKING = {
    "null": {"jpg": b"", "json": b'{"captions": null}'},
    "blank": {"jpg": b"", "json": b'{"captions": [" "]}'},
    "broken": {"jpg": b"", "json": b'{"captions": ['},
    "list": {"jpg": b"", "json": b"[1]"},
    "image alone": {"jpg": b""},
    "deep": {"jpg": b"", "json": b"[" * 100_000},
    "number": {"jpg": b"", "json": b'{"caption": 5}'},
    "not UTF-8": {"jpg": b"", "txt": b"\xe9"},
}


def errors_of(folder, kind="captions") -> list[str]:
    index_again(folder)
    return DataArgs(train=str(folder)).shard_errors(kind)


@pytest.mark.parametrize("lacking", LACKING)
def test_one_sample_does_not_decide_whether_a_set_is_accepted(tmp_path, lacking):
    bad = LACKING[lacking]
    write_tar(tmp_path / "0.tar", {"first": bad, **{str(number): GOOD for number in range(40)}})
    assert errors_of(tmp_path) == []
    write_tar(tmp_path / "0.tar", {"first": GOOD, **{str(number): bad for number in range(40)}})
    (problem,) = errors_of(tmp_path)
    assert "31 of 32 samples that were read have no captions (coco, train); name other shards (sample 0 " in problem
    write_tar(tmp_path / "0.tar", {str(number): bad for number in range(3)})
    (problem,) = errors_of(tmp_path)
    assert "its samples have no captions (coco, train); name other shards (sample 0 " in problem


def test_a_set_is_accepted_despite_a_bad_first_shard(tmp_path):
    for number in range(8):
        write_tar(
            tmp_path / f"{number}.tar", {f"{number}{i}": LACKING["null"] if number < 1 else GOOD for i in range(9)}
        )
    assert errors_of(tmp_path) == []
    # A shard that would have to be copied is not read for it.
    cached = DataArgs(train=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert cached.shard_errors("captions") == []
    assert len(list((tmp_path / "cache").glob("*.shard"))) == 4


def test_a_set_with_some_questions_is_accepted(tmp_path):
    asked = {"jpg": b"", "json": b'{"questions": [{"question": "is it?"}]}'}
    write_tar(tmp_path / "0.tar", {**{str(number): GOOD for number in range(9)}, "last": asked})
    assert errors_of(tmp_path, "questions") == []
    assert errors_of(tmp_path, "captions") == []
    (problem,) = errors_of(tmp_path, "hypotheses")
    assert "its samples have no hypotheses" in problem


def test_an_image_id_of_half_a_surrogate_pair_is_a_number(tokenizer, tmp_path):
    content = b'{"image_id": "\\ud83d", "captions": ["a"]}'
    write_tar(tmp_path / "0.tar", {"a": {"jpg": draw_jpeg(0), "json": content}})
    index_again(tmp_path)
    sample = PretrainSamples(ShardIndex(tmp_path), tokenizer, 16, ImageTransform(32), 0.15, 0).build(Unit(0, 0, 0))
    assert sample["image_id"].dtype == np.int64


@pytest.mark.parametrize(
    ("kind", "content", "texts"),
    [
        ("captions", {"captions": ["a", None, " "], "caption": "b"}, ["a"]),
        ("questions", {"questions": [{"question": "a?"}, {"question": 5}, 7]}, ["a?"]),
        ("questions", {"questions": "a?"}, []),
        ("hypotheses", {"hypotheses": [{"text": "a"}, {}]}, ["a"]),
        ("statement", {"statement": "a"}, ["a"]),
        ("statement", {"statement": ["a"]}, []),
    ],
)
def test_the_texts_of_each_kind_are_listed(kind, content, texts):
    assert texts_of(kind, {"json": json.dumps(content).encode()}) == texts
    assert texts_of(kind, {"json": b"["}) == []
