"""Emoji and clip art as a data set: what becomes a picture, and that no near-duplicates are in two splits."""

import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFont

from experiments import clip_art, emoji, pictures
from experiments.near_duplicates import FLAGS, Picture, group_numbers, stem
from unimo3.data.formats import CONVERTERS

SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
  xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/" width="400" height="200">
  <metadata><rdf:RDF><cc:Work><dc:title>{title}</dc:title><dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject>
  <dc:creator><cc:Agent><dc:title>An artist</dc:title></cc:Agent></dc:creator></cc:Work></rdf:RDF></metadata>
  {drawing}</svg>"""
DRAWING = '<rect x="20" y="20" width="60" height="30" fill="red"/>'


def svg(path, title, keywords=(), drawing=DRAWING):
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    path.write_text(SVG.format(title=title, items=items, drawing=drawing))
    return path


def write_annotations(path, names, keywords=None):
    lines = [f'<annotation cp="{text}" type="tts">{name}</annotation>' for text, name in names.items()]
    lines += [f'<annotation cp="{text}">{" | ".join(words)}</annotation>' for text, words in (keywords or {}).items()]
    path.write_text(f"<ldml><annotations>{''.join(lines)}</annotations></ldml>")
    return path


@pytest.fixture(scope="module")
def font(tmp_path_factory):
    """The font that Pillow has for letters; it has no emoji, so letters are drawn in their stead."""
    path = tmp_path_factory.mktemp("font") / "letters.ttf"
    path.write_bytes(ImageFont.load_default(20).path.getvalue())
    return path


def picture(name, *keys, bits=0):
    """One that looks unlike any of other `bits`."""
    image = Image.new("RGB", (136, 136), "white")
    cells = np.random.default_rng(bits).integers(0, 256, (17, 17, 3), dtype=np.uint8)
    image.paste(Image.fromarray(cells).resize((136, 136), Image.Resampling.NEAREST))
    return Picture(name, image, (name,), frozenset(keys))


def test_emoji_have_names_and_keywords_and_one_skin_tone(tmp_path, font):
    names = {
        "A": "letter a",
        "B": "letter b",
        "A\U0001f3fd": "letter a: medium skin tone",
        "AB": "two",
    }
    file = write_annotations(tmp_path / "en.xml", names, {"A": ["first", "letter a", "vowel"]})
    skipped = Counter()
    drawn = list(emoji.noto_pictures(font, emoji.read_annotations((file,)), skipped))
    assert [one.captions for one in drawn] == [("letter a", "first, vowel"), ("letter b",)]
    assert drawn[0].image.size == (136, 136)
    assert skipped == {"noto: emoji with another skin tone": 1, "noto: no picture of a named emoji": 1}  # two are wide


def test_emoji_of_files_have_the_names_of_their_characters(tmp_path):
    names = {"\U0001f34e": "red apple", "\u2764": "red heart", "\U0001f44d\U0001f3fd": "thumbs up: medium skin tone"}
    cldr = emoji.read_annotations((write_annotations(tmp_path / "en.xml", names, {"\U0001f34e": ["fruit", "red"]}),))
    codes = {"apple": "1F34E", "heart": "2764-FE0F", "thumbsup_tone3": "1F44D-1F3FD", "tone": "E000"}
    gem, emojify = tmp_path / "gem", tmp_path / "emojify"
    for folder in (gem / "config", gem / "assets" / "png", emojify):
        folder.mkdir(parents=True)
    (gem / "config" / "index.json").write_text(json.dumps({name: {"unicode": code} for name, code in codes.items()}))
    apple = Image.new("RGBA", (64, 64))
    apple.paste((255, 0, 0, 255), (0, 0, 32, 64))
    apple.save(gem / "assets" / "png" / "1F34E.png")
    apple.save(gem / "assets" / "png" / "2764-FE0F.png")
    apple.save(emojify / "heart.png")
    skipped = Counter()
    one = list(emoji.emoji_one_pictures(gem, cldr, skipped))
    assert [each.captions for each in one] == [("red apple", "fruit, red"), ("red heart",)]
    assert one[0].image.getpixel((10, 10)) == (255, 0, 0)
    assert one[0].image.getpixel((50, 10)) == (255, 255, 255)
    assert skipped == {"emoji_one: emoji with another skin tone": 1, "emoji_one: emoji without a name": 1}
    (other,) = emoji.emojify_pictures(emojify, gem, cldr, skipped)
    assert other.captions == ("red heart",)
    # Another artist's picture of the same emoji is no near-duplicate by its name.
    assert not other.keys & one[1].keys


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\U0001f468\u200d\U0001f692", "\U0001f469\u200d\U0001f692"),  # man and woman firefighter
        ("\U0001f46e\u200d\u2642\ufe0f", "\U0001f46e"),  # man police officer, police officer
        ("\U0001f590\U0001f3fb", "\U0001f590\U0001f3ff"),  # hand: light and dark skin tone
        ("\U0001f468\u200d\U0001f469\u200d\U0001f466", "\U0001f46a"),  # family: man, woman, boy; family
        ("\U0001f469\u200d\u2764\u200d\U0001f468", "\U0001f491"),  # couple with heart
    ],
)
def test_variants_of_an_emoji_have_one_base(one, other):
    assert emoji.base_of(one) == emoji.base_of(other)
    assert emoji.base_of(one) != emoji.base_of("\U0001f600")


def test_a_stem_lacks_what_variants_differ_in():
    assert stem("Woman firefighter") == stem("man firefighter") == "firefighter"
    assert stem("blue_heart 2") == stem("red heart") == "heart"
    assert stem("seven") == "seven"  # nothing else is left
    assert stem("tiger") != stem("tiger face")


def test_flags_are_one_group_whatever_they_are_from(tmp_path):
    described = clip_art.describe(svg(tmp_path / "f.svg", "Chad", ["united nations", "national flag"]))
    assert FLAGS in described.keys
    assert FLAGS not in clip_art.describe(svg(tmp_path / "g.svg", "Chad", ["lake", "flagstone"])).keys
    assert FLAGS in emoji.keys_of("noto", "\U0001f1eb\U0001f1f7", "flag: France")
    assert FLAGS in emoji.keys_of("noto", "\U0001f3f4\u200d\u2620", "pirate flag")
    assert FLAGS not in emoji.keys_of("noto", "\U0001f600", "grinning face")


def test_pictures_of_a_key_and_look_alikes_are_one_group():
    same_look = picture("d", bits=4)
    darker = Picture("e", same_look.image.point(lambda value: value * 7 // 8), ("e",), frozenset(("y",)))
    groups = group_numbers(
        [picture("a", "x"), picture("b", "x", "z", bits=1), picture("c", "z", bits=2), same_look, darker]
    )
    assert groups == [0, 0, 0, 3, 3]


def test_groups_are_in_one_split_and_large_ones_in_training():
    groups = [number // 4 for number in range(200)] + [50] * 40
    splits = pictures.split_names(groups, seed=0)
    of_group = {group: {split for one, split in zip(groups, splits, strict=True) if one == group} for group in groups}
    assert all(len(of) == 1 for of in of_group.values())
    assert of_group[50] == {"train"}
    counts = Counter(splits)
    assert 30 <= counts["val"] <= 33
    assert 30 <= counts["test"] <= 33
    assert splits == pictures.split_names(groups, seed=0) != pictures.split_names(groups, seed=1)


def test_clip_art_is_described_by_its_metadata(tmp_path):
    art = svg(
        tmp_path / "a.svg", "Clipart by Some One - red_apple", ["fruit", "hash", "0x9f", "", "Red Fruit", "fruit"]
    )
    described = clip_art.describe(art)
    assert described.title == "red apple"
    assert described.keywords == ("fruit", "red fruit")
    assert clip_art.describe(svg(tmp_path / "b.svg", " ")) is None
    assert clip_art.describe(svg(tmp_path / "c.svg", "12")) is None
    (tmp_path / "d.svg").write_text("<svg>")
    assert clip_art.describe(tmp_path / "d.svg") is None


def test_titles_of_collections_and_links_are_no_captions(tmp_path):
    for number in range(11):
        svg(tmp_path / f"theme_{number}.svg", "Theme")
    svg(tmp_path / "z.svg", "Apple")
    (tmp_path / "zz.svg").symlink_to(tmp_path / "z.svg")
    skipped = Counter()
    described = clip_art.select(sorted(tmp_path.glob("*.svg")), skipped)
    assert [one.title for one in described] == ["Apple"]
    assert skipped == {"clip art with the title of a collection": 11, "clip art that is a link to another": 1}


@pytest.mark.integration
@pytest.mark.skipif(
    shutil.which("rsvg-convert") is None and not os.environ.get("REQUIRE_RSVG"), reason="needs rsvg-convert"
)
def test_clip_art_is_drawn_without_margins_on_white(tmp_path):
    svg(tmp_path / "apple.svg", "Apple", ["fruit"])
    svg(tmp_path / "blank.svg", "Nothing", drawing="")
    (tmp_path / "pear.svg").write_text(svg(tmp_path / "pear.svg", "Pear").read_text().replace("</svg>", "<g></svg>"))
    skipped = Counter()
    (apple,) = clip_art.clip_art_pictures(tmp_path, 1, skipped)
    assert apple.captions == ("Apple", "fruit")
    assert apple.name == "clip_art_apple"
    assert apple.keys == {"clip art apple", "clip art file apple"}
    assert apple.image.size == (136, 136)
    # A box twice as wide as high fills the width, and half of the height in the middle.
    assert apple.image.getpixel((2, 68))[0] > 200 > apple.image.getpixel((2, 68))[1]
    assert apple.image.getpixel((68, 10)) == apple.image.getpixel((68, 126)) == (255, 255, 255)
    assert skipped["clip art that cannot be drawn or is blank"] == 1
    assert skipped["clip art without a title"] == 1


def test_the_command_writes_what_the_coco_converter_reads(tmp_path, font, capsys):
    names = {letter: f"letter {letter}" for letter in "ABCDEFGHJKLMNOPQRSTUVXYZ"}
    file = write_annotations(tmp_path / "en.xml", names, {letter: ["glyph"] for letter in names})
    out = tmp_path / "out"
    arguments = [str(out), "--kinds", "noto", "--font", str(font), "--annotations", str(file)]
    with pytest.raises(SystemExit) as end:
        pictures.main(arguments)
    assert not end.value.code, capsys.readouterr().err
    samples = list(CONVERTERS["coco"](out, out))
    assert len(samples) == len({sample.key for _, sample in samples}) >= 16
    assert {split for split, _ in samples} == {"train", "val", "test"}
    assert all(sample.images[0].exists() for _, sample in samples)
    listed = json.loads((out / "dataset_coco.json").read_text())["images"]
    assert {tuple(sentence["raw"] for sentence in image["sentences"]) for image in listed} >= {("letter A", "glyph")}
    assert f"pictures: {len(samples)}" in capsys.readouterr().out


def test_missing_packages_are_named_together(tmp_path, capsys):
    missing = tmp_path / "nowhere"
    with pytest.raises(SystemExit) as end:
        pictures.main(
            [
                str(tmp_path),
                *(f"--{name}={missing}" for name in ("font", "annotations", "emoji-one", "emojify", "clip-art")),
            ]
        )
    assert end.value.code == 78
    message = capsys.readouterr().err
    packages = ("fonts-noto-color-emoji", "unicode-cldr-core", "ruby-gemojione", "libjs-emojify", "openclipart-svg")
    for part in (*packages, f"out {tmp_path}: exists"):
        assert message.count(part) == 1


def test_too_few_pictures_are_an_error_with_the_reasons(tmp_path, font, capsys):
    file = write_annotations(tmp_path / "en.xml", {"A": "letter a", "A\U0001f3fd": "letter a: medium skin tone"})
    with pytest.raises(SystemExit) as end:
        pictures.main([str(tmp_path / "o"), "--kinds", "noto", "--font", str(font), "--annotations", str(file)])
    assert end.value.code == 78
    assert "1 pictures: at least 16 are needed for three splits; skipped: 1 noto: emoji with" in capsys.readouterr().err
