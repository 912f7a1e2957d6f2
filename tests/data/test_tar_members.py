"""Tars of any make: joined, damaged, sparse, with links, with dots in their keys."""

import io
import logging
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import convert, draw_jpeg, write_tar
from unimo3.data.index import ShardIndex
from unimo3.data.members import scan
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
def test_what_is_no_tar_to_its_end_is_refused(tmp_path, name, capfd):
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


@pytest.mark.parametrize("place", ["alone", "last", "joined"])
def test_a_sparse_member_is_named_with_the_fix(tmp_path, place):
    member = sparse_header("a.jpg") + b"x" * 512
    content = {"alone": member, "last": without_end(ONE) + member, "joined": ONE + member}[place] + bytes(1024)
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"member 'a\.jpg' is stored without its zeros; make the tar without --sparse"):
        scan(tmp_path / "0.tar")


def test_sparse_members_that_are_not_read_are_no_damage(tmp_path):
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
    assert messages[2].startswith("1 members are not read, such as 'a.mask.png': a sample's key ends at the first dot")
    assert len(messages) == 3


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
    assert len(members.to_bytes()) < 500 * 64
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
