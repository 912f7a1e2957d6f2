"""Tars of any make: joined, damaged, sparse, with links, with dots in their keys."""

import io
import logging
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import convert, draw_jpeg, index_again, write_tar
from unimo3.data import members
from unimo3.data.args import DataArgs
from unimo3.data.index import ShardIndex
from unimo3.data.members import scan
from unimo3.data.samples import image_of
from unimo3.errors import DataError


def tar_of(*keys: str, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar with the samples `keys`, an image and a text each."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for number, key in enumerate(keys):
            for extension, content in (("jpg", draw_jpeg(number)), ("txt", key.encode())):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def without_end(content: bytes) -> bytes:
    """A tar as its writer leaves it before it is closed."""
    return content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512)


ONE, TWO, THREE = tar_of("one", "two"), tar_of("x" * 150), tar_of("three", form=tarfile.USTAR_FORMAT)
EMPTY = tar_of()
JOINED = {
    "two tars": (ONE + TWO, ["one", "two", "x" * 150]),
    "three tars": (ONE + TWO + THREE, ["one", "two", "x" * 150, "three"]),
    "the same twice": (ONE + ONE, ["one", "two", "one", "two"]),
    "an empty one first": (EMPTY + ONE, ["one", "two"]),
    "an empty one between": (ONE + EMPTY + THREE, ["one", "two", "three"]),
    "one block of end": (without_end(ONE) + bytes(512) + THREE, ["one", "two", "three"]),
    "much padding": (ONE + bytes(3 * 2**20) + THREE + bytes(700), ["one", "two", "three"]),
}


@pytest.mark.parametrize("name", JOINED)
def test_joined_tars_are_read_to_the_end_of_the_file(tmp_path, name):
    content, keys = JOINED[name]
    (tmp_path / "0.tar").write_bytes(content)
    assert convert("index", "--src", str(tmp_path)) == 0
    index = ShardIndex(tmp_path)
    assert index.samples_per_shard == [len(keys)]
    assert [index.key(0, sample) for sample in range(len(keys))] == keys
    assert [index.read(0, sample)["txt"] for sample in range(len(keys))] == [key.encode() for key in keys]
    assert all(index.read(0, sample)["jpg"].startswith(b"\xff\xd8") for sample in range(len(keys)))


NOISE = np.random.default_rng(0).bytes(7000)
DAMAGED = {
    "garbage at the end": (ONE + NOISE, "7000 bytes after its end are no tar"),
    "garbage after padding": (ONE + bytes(2**20 + 512) + b"<html>" + bytes(512), r"\d+ bytes after its end are no tar"),
    "garbage off the blocks": (ONE + bytes(100) + TWO, "bytes after its end are no tar"),
    "garbage after two tars": (ONE + TWO + b"x", "1 bytes after its end are no tar"),
    "garbage instead of the end": (without_end(ONE) + NOISE, "is damaged after 4 members: none begins at byte"),
    "no end": (without_end(ONE), "is cut off after 4 members"),
    "half of the second": (ONE + TWO[:700], "empty header"),
    "an empty file": (b"", "empty file"),
    "text": (b"no tar at all" * 100, "invalid header"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_tar_with_garbage_at_its_end_is_refused(tmp_path, name, capfd):
    content, reason = DAMAGED[name]
    (tmp_path / "0.tar").write_bytes(content)
    assert convert("index", "--src", str(tmp_path)) == 78
    error = capfd.readouterr().err
    assert re.search(
        rf"DataError: {tmp_path}/0\.tar: is no readable tar \(.*({reason}).*\); make or copy it again", error
    )
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]


def test_a_size_below_zero_ends_the_reading(tmp_path):
    info = tarfile.TarInfo("one.txt")
    info.pax_headers = {"size": "-1024"}
    header = info.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "0.tar").write_bytes(header + bytes(1024))
    with pytest.raises(DataError, match=r"0\.tar: is no readable tar \(the size of 'one\.txt' is below 0\)"):
        scan(tmp_path / "0.tar")


def sparse_header(name: str) -> bytes:
    """A member of 4096 bytes of which the first 512 are stored, in GNU's old form."""
    info = tarfile.TarInfo(name)
    info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"%011o\0" % 4096
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("position", ["alone", "last", "joined"])
def test_a_sparse_member_is_named_with_the_fix(tmp_path, position):
    member = sparse_header("a.jpg") + b"x" * 512
    content = {"alone": member, "last": without_end(ONE) + member, "joined": ONE + member}[position] + bytes(1024)
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"member 'a\.jpg' is stored without its zeros; make the tar without --sparse"):
        scan(tmp_path / "0.tar")


def test_sparse_members_that_are_not_read_are_ignored(tmp_path):
    for name in ("README", "__info__.json", "._a.jpg", "one.cls"):
        member = sparse_header(name) + b"x" * 512
        (tmp_path / "0.tar").write_bytes(member + ONE)
        assert [scan(tmp_path / "0.tar").key(row) for row in range(2)] == ["one", "two"]


def test_members_that_are_not_read_are_counted_in_the_log(tmp_path, caplog):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (
            ("a.jpg", tarfile.REGTYPE),
            ("a.txt", tarfile.REGTYPE),
            ("b.jpg", tarfile.LNKTYPE),
            ("c.jpg", tarfile.SYMTYPE),
            ("README", tarfile.REGTYPE),
            ("folder.x", tarfile.DIRTYPE),
            ("__info__.json", tarfile.REGTYPE),
            ("._a.jpg", tarfile.REGTYPE),
            ("a.json", tarfile.REGTYPE),
            ("a.cls", tarfile.REGTYPE),
            ("a.mask.png", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg" if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
            tar.addfile(info, io.BytesIO())
    with caplog.at_level(logging.WARNING):
        scan(tmp_path / "0.tar")
    messages = [record.getMessage().removeprefix(f"{tmp_path}/0.tar: ") for record in caplog.records]
    assert messages[:2] == [
        "2 members are not read, such as 'b.jpg': it is a link or a device",
        "1 members are not read, such as 'README': its name has no ending",
    ]
    assert messages[2].startswith("2 members are not read, such as '__info__.json': its name begins with a dot, or is")
    assert messages[3].startswith("1 members are not read, such as 'a.mask.png': a sample's key ends at the first dot")
    assert len(messages) == 4


DOTTED = {
    "two versions": [("photo", "v1.jpg"), ("photo", "v1.txt"), ("photo", "v2.jpg"), ("photo", "v2.txt")],
    "distinct stems": [(f"a{n}", f"v{n}.{kind}") for n in range(2000) for kind in ("jpg", "json")],
    "one stem": [("img", f"{n:04d}.{kind}") for n in range(2, 2000) for kind in ("jpg", "txt")],
    "decimals": [(f"{n}", f"5.{kind}") for n in range(50) for kind in ("webp", "txt")],
}


@pytest.mark.parametrize("name", DOTTED)
def test_a_tar_with_dots_in_all_its_keys_is_refused(tmp_path, name, capfd):
    samples: dict[str, dict[str, bytes]] = {}
    for key, extension in DOTTED[name]:
        samples.setdefault(key, {})[extension] = b""
    write_tar(tmp_path / "0.tar", samples)
    assert convert("index", "--src", str(tmp_path)) == 78
    key, ending = DOTTED[name][0]
    error = capfd.readouterr().err
    assert f"no member of its {len(samples)} samples is read, such as '{key}' with the ending '{ending}'" in error
    assert "where keys contain dots, rename the files" in error


def test_dots_in_some_keys_are_counted_and_the_table_stays_small(tmp_path, caplog):
    samples = {
        f"{number}": {"jpg": b"", "txt": b"", f"v{number}.jpg": b"", f"{number}.cls": b""} for number in range(500)
    }
    members = scan(write_tar(tmp_path / "0.tar", samples))
    assert members.extensions == ["jpg", "txt"]
    assert members.offsets.shape == members.sizes.shape == (500, 2)
    assert len(members.to_bytes()) < 500 * 80
    (message,) = [record.getMessage() for record in caplog.records]
    assert "500 members are not read, such as '0.v0.jpg': a sample's key ends at the first dot" in message


def test_folders_may_have_dots(tmp_path):
    write_tar(tmp_path / "0.tar", {"v1.0/a": {"jpg": b"", "txt": b"x"}, "v1.1/a": {"jpg": b"", "txt": b"y"}})
    members = scan(tmp_path / "0.tar")
    assert [members.key(row) for row in range(2)] == ["v1.0/a", "v1.1/a"]


def test_a_folder_of_names_that_are_no_utf8_is_indexed(tmp_path: Path, capsys):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    write_tar(folder / "\udcff.tar", {"\udce9": {"jpg": b"", "txt": b"x"}})
    write_tar(tmp_path / "again.tar", {"\udce9": {"jpg": b"", "txt": b"y"}})
    with (folder / "\udcff.tar").open("ab") as file:
        file.write((tmp_path / "again.tar").read_bytes())
    assert convert("index", "--src", str(folder)) == 0
    assert r"such as '\udce9'" in capsys.readouterr().out
    index = ShardIndex(folder)
    assert index.read(0, 0) == {"jpg": b"", "txt": b"x"}
    assert index.key(0, 0) == r"\udce9"
    assert convert("index", "--src", str(folder), "--verify") == 0


def joined(*parts: list[str]) -> bytes:
    """Tars of these names, joined to one file; each member's content is the number of its part and its name."""
    content = b""
    for number, names in enumerate(parts):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                data = f"{number}{name}".encode()
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        content += file.getvalue()
    return content


# Names of each joined tar -> the names of each sample, after the number of their tar.
GROUPED = {
    "other kinds in a second tar": (
        [["s.jpg", "s.txt", "t.jpg", "t.txt"], ["s.json", "s.png"]],
        [["0s.jpg", "0s.txt"], ["0t.jpg", "0t.txt"], ["1s.json", "1s.png"]],
    ),
    "an image alone before": ([["s.jpg"], ["s.txt", "s.jpg"]], [["0s.jpg"], ["1s.txt", "1s.jpg"]]),
    "another kind of image": ([["s.jpg", "s.txt"], ["s.png", "s.txt"]], [["0s.jpg", "0s.txt"], ["1s.png", "1s.txt"]]),
    "at the seam": ([["s.jpg", "s.txt"], ["s.json", "t.jpg"]], [["0s.jpg", "0s.txt"], ["1s.json"], ["1t.jpg"]]),
    "other kinds in one tar": (
        [["s.jpg", "s.txt", "t.jpg", "s.json", "s.png"]],
        [["0s.jpg", "0s.txt"], ["0t.jpg"], ["0s.json", "0s.png"]],
    ),
    "an image first and a complete sample later": (
        [["s.jpg", "t.txt", "s.webp", "s.txt"]],
        [["0s.jpg"], ["0t.txt"], ["0s.webp", "0s.txt"]],
    ),
    "images first": (
        [["s.jpg", "t.png", "s.txt", "t.txt", "s.json", "t.json"]],
        [["0s.jpg", "0s.txt", "0s.json"], ["0t.png", "0t.txt", "0t.json"]],
    ),
    "first images, second images, texts": (
        [["s.0.jpg", "t.0.jpg", "s.1.png", "t.1.png", "s.json", "t.json"]],
        [["0s.0.jpg", "0s.1.png", "0s.json"], ["0t.0.jpg", "0t.1.png", "0t.json"]],
    ),
    "neighbours twice": ([["s.jpg", "s.txt", "s.jpg", "s.txt"]], [["0s.jpg", "0s.txt"], ["0s.jpg", "0s.txt"]]),
}


@pytest.mark.parametrize("name", GROUPED)
def test_neighbours_with_one_key_are_a_sample(tmp_path, name, caplog):
    parts, expected = GROUPED[name]
    (tmp_path / "0.tar").write_bytes(joined(*parts))
    assert convert("index", "--src", str(tmp_path)) == 0
    index = ShardIndex(tmp_path)
    assert index.samples_per_shard == [len(expected)]
    actual = [sorted(content.decode() for content in index.read(0, row).values()) for row in range(len(expected))]
    assert actual == [sorted(names) for names in expected]
    is_counted = "members of 2 samples are not neighbours, such as 's'" in caplog.text
    assert is_counted == name.startswith(("images first", "first images"))


@pytest.mark.parametrize(
    "parts", [[["s.jpg", "t.jpg"], ["s.json", "t.json"]], [["a.jpg", "b.txt"]], [["s.txt"], ["s.0.png", "s.1.png"]]]
)
def test_images_and_texts_without_a_common_sample_are_refused(tmp_path, parts, capfd):
    (tmp_path / "0.tar").write_bytes(joined(*parts))
    assert convert("index", "--src", str(tmp_path)) == 78
    assert re.search(r"0\.tar: \d samples have an image, .* and none has both; .*--sort=name", capfd.readouterr().err)


def messages_of(caplog, tar: Path) -> list[str]:
    """Warnings about a tar."""
    return [record.getMessage().removeprefix(f"{tar}: ") for record in caplog.records]


@pytest.mark.parametrize(
    ("names", "read", "unread"),
    [
        (["cat.jpg", "cat.png", "cat.txt"], "cat.jpg", "cat.png"),
        (["cat.webp", "cat.txt", "cat.gif"], "cat.webp", "cat.gif"),
        (["cat.0.png", "cat.0.jpeg", "cat.1.jpg", "cat.json"], "cat.0.jpeg", "cat.0.png"),
    ],
)
def test_a_second_image_under_one_key_is_counted(tmp_path, caplog, names, read, unread):
    (tmp_path / "0.tar").write_bytes(joined(names))
    assert convert("index", "--src", str(tmp_path)) == 0
    (message,) = messages_of(caplog, tmp_path / "0.tar")
    assert message == f"1 members are not read, such as {unread!r}: its sample has another image, which is read"
    members = ShardIndex(tmp_path).read(0, 0)
    number = 0 if ".0." in read else None
    assert image_of(members, lambda content, _: content, None, number)() == f"0{read}".encode()


@pytest.mark.parametrize(
    "ending", ["jpg", "JPEG", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "j2k", "ppm", "pgm"]
)
def test_images_of_every_documented_format_are_read_from_tars(tmp_path, ending, caplog):
    content = draw_jpeg(0)
    write_tar(
        tmp_path / "0.tar",
        {
            "k": {ending: content, "txt": b"a"},
            "pair": {f"{number}.{ending}": content for number in range(2)} | {"json": b"{}"},
        },
    )
    assert convert("index", "--src", str(tmp_path)) == 0
    index = ShardIndex(tmp_path)
    assert image_of(index.read(0, 0), lambda content, _: content, None)() == content
    assert image_of(index.read(0, 1), lambda content, _: content, None, 1)() == content
    assert messages_of(caplog, tmp_path / "0.tar") == []


def test_samples_without_an_image_are_counted(tmp_path, caplog, capfd):
    write_tar(tmp_path / "0.tar", {f"{number}": {"heic": b"", "txt": b"a"} for number in range(20)})
    write_tar(
        tmp_path / "1.tar",
        {
            "a": {"jpg": b"", "txt": b"a"},
            "b": {"json": b"{}"},
            "c": {"cls": b"", "txt": b"c"},
            "d": {"0.jpg": b"", "json": b"{}"},
            "e": {"png": b""},
        },
    )
    assert convert("index", "--src", str(tmp_path)) == 0
    assert f"{tmp_path}: 23 samples have no image, 1 no json and no txt; they are bad samples" in capfd.readouterr().out
    messages = [record.getMessage() for record in caplog.records]
    for name, number in (("0.tar", 20), ("1.tar", 3)):
        start = f"{tmp_path}/{name}: {number} samples have no image, or one of a pair (jpg, jpeg, png, webp,"
        assert any(message.startswith(start) for message in messages)
    assert any(message.endswith("such as 'b' with the ending 'json'") for message in messages)
    assert len(messages) == 2


IMAGELESS = {"a": {"heic": b"", "txt": b"a"}}, {"b": {"json": b"{}"}, "c": {"0.jpg": b"", "json": b"{}"}}
TEXTLESS = ({"a": {"jpg": b""}}, {"b": {"0.jpg": b"", "1.jpg": b""}, "c": {"png": b"", "cls": b""}})


@pytest.mark.parametrize(
    ("tars", "counts"),
    [
        (IMAGELESS, "3 samples can be read: 3 have no image (jpg, "),
        (TEXTLESS, "3 samples can be read: 0 have no image (jpg, "),
        ((IMAGELESS[0], TEXTLESS[0]), "2 samples can be read: 1 have no image (jpg, "),
    ],
)
def test_tars_of_which_no_sample_can_be_read_are_refused(tmp_path, tars, counts, capfd):
    for number, samples in enumerate(tars):
        write_tar(tmp_path / f"{number}.tar", samples)
    for _ in range(2):  # the second finds the notes of the first
        assert convert("index", "--src", str(tmp_path)) == 78
        assert f"DataError: --src {tmp_path}: none of its {counts}" in capfd.readouterr().err
        assert not (tmp_path / "index.json").exists()
    index_again(tmp_path)  # as an earlier version did
    (error,) = DataArgs(train=str(tmp_path)).shard_errors("captions")
    assert f"its samples have no {'captions' if tars is TEXTLESS else 'image'} (coco, train)" in error
    # One that can be read is enough.
    write_tar(tmp_path / "9.tar", {"good": {"webp": b"", "txt": b"a"}})
    assert convert("index", "--src", str(tmp_path)) == 0
    assert f"{tmp_path}: {sum(map(len, tars)) + 1} samples in" in capfd.readouterr().out


def test_a_tar_of_keys_that_come_again_is_read_in_linear_time(tmp_path, monkeypatch):
    calls, stock = [], members._role

    def role(extension):
        calls.append(extension)
        return stock(extension)

    monkeypatch.setattr(members, "_role", role)
    num_calls = []
    for num_frames in (100, 400):
        frames = [(f"cam{side}", {f"{number:05d}.jpg": b"x"}) for number in range(num_frames) for side in "AB"]
        write_tar(tmp_path / "0.tar", frames)
        calls.clear()
        with pytest.raises(DataError, match="no member of its 2 samples is read"):
            scan(tmp_path / "0.tar")
        num_calls.append(len(calls))
    assert num_calls[1] <= 4 * num_calls[0]
