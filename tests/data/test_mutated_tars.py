"""Any tar is indexed with all of its samples and texts, or refused with one message."""

import io
import json
import operator
import shutil
import tarfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.data.conftest import draw_jpeg
from tests.data.mutations import JUNK, TEXTS, damaged, property_settings, result_of
from unimo3.data.args import DataArgs
from unimo3.data.index import ShardIndex
from unimo3.data.sample_texts import BadSampleError, captions_of, content_of
from unimo3.texts import plain

JPEG = draw_jpeg(0, 8, 8)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "latin-1")


@st.composite
def samples(draw: Any) -> dict[str, dict[str, bytes]]:
    """Samples by key, with members by extension."""
    keys = draw(st.lists(st.sampled_from(["a", "b", "c", "é", "\udce9", "x" * 120, "v1.0/a"]), min_size=1, unique=True))
    made: dict[str, dict[str, bytes]] = {}
    for key in keys:
        members = made[key] = {}
        if draw(st.integers(0, 5)):
            members[draw(st.sampled_from(["jpg", "JPEG", "png", "0.webp", "v1.jpg"]))] = JPEG
        if draw(st.booleans()):
            lines = draw(st.lists(st.sampled_from(TEXTS), max_size=3))
            text = draw(st.sampled_from(["\n", "\r\n", "\r"])).join(lines)
            members["txt"] = text.encode(draw(st.sampled_from(ENCODINGS)), "replace")
        if draw(st.booleans()):
            fields = {name: draw(JUNK) for name in draw(st.sets(st.sampled_from(["captions", "caption", "image_id"])))}
            content = json.dumps(draw(st.one_of(st.just(fields), JUNK))).encode()
            members["json"] = content if draw(st.integers(0, 3)) else draw(damaged(content))
    return {key: members for key, members in made.items() if members} or {"a": {"jpg": JPEG}}


def tar_of(made: dict[str, dict[str, bytes]], form: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, errors="surrogateescape") as tar:
        for key, members in made.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def index(folder: Path, content: bytes) -> tuple[int, str]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "0.tar").write_bytes(content)
    status, error = result_of("index", "--src", str(folder))
    if status:
        assert str(folder) in error
        assert not (folder / "index.json").exists()
    return status, error


def texts_of(folder: Path) -> list[list[str] | None]:
    """The captions of each sample; None of a bad one."""
    made: list[list[str] | None] = []
    read = ShardIndex(folder)
    for sample in range(read.samples_per_shard[0]):
        members = read.read(0, sample)
        try:
            made.append([plain(text) for text in captions_of(members, content_of(members))])
        except BadSampleError:
            made.append(None)
    read.close()
    return made


@property_settings
@given(made=samples(), form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_samples_of_any_content_are_read_or_bad(tmp_path_factory, made, form):
    folder = tmp_path_factory.getbasetemp() / "mutated"
    try:
        content = tar_of(made, form)
    except ValueError:  # a name that the form cannot store
        return
    status, error = index(folder, content)
    names = [{extension.lower() for extension in members} for members in made.values()]
    is_complete = [bool(kinds & {"jpg", "jpeg", "png"} and kinds & {"txt", "json"}) for kinds in names]
    assert (status == 78) == (not any(is_complete))
    if status:
        return
    read = ShardIndex(folder)
    assert read.samples_per_shard == [len(made)]
    for sample, (key, members) in enumerate(made.items()):
        assert read.key(0, sample) == key.encode("utf-8", "backslashreplace").decode()
        wanted = {extension.lower(): content for extension, content in members.items() if extension != "v1.jpg"}
        assert read.read(0, sample) == wanted
    read.close()
    # What is not read is counted.
    num_dotted = sum("v1.jpg" in members for members in made.values())
    assert f"{num_dotted} members are not read" in error or not num_dotted
    has_text = [bool(texts) for texts in texts_of(folder)]
    for texts, members in zip(texts_of(folder), made.values(), strict=True):
        assert all(isinstance(text, str) and text.strip("\ufeff\r\n").strip() for text in texts or [])
        if set(members) & {"txt", "json"} == set():
            assert texts is None
    errors = DataArgs(train=str(folder)).shard_errors("captions")
    num_good = sum(map(operator.and_, has_text, is_complete))
    assert bool(errors) == (num_good < len(made) - len(made) // 2)


@property_settings
@given(data=st.data())
def test_a_damaged_tar_is_refused_or_has_all_its_samples(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "mutated"
    made = {key: {"jpg": JPEG, "txt": key.encode(), "json": b'{"image_id": 1}'} for key in ("a", "b" * 90)}
    form = data.draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    content = tar_of(made, form)
    status, _ = index(folder, data.draw(damaged(content)))
    if status == 0:
        texts_of(folder)  # nothing else is raised
        assert len(DataArgs(train=str(folder)).shard_errors("captions")) <= 1


@property_settings
@given(parts=st.lists(st.sampled_from(["tar", "empty", "zeros", "other"]), min_size=1, max_size=5))
def test_any_number_of_joined_tars_is_read_completely(tmp_path_factory, parts):
    folder = tmp_path_factory.getbasetemp() / "mutated"
    of_part = {
        "tar": tar_of({"a": {"jpg": JPEG, "txt": b"one"}}, tarfile.PAX_FORMAT),
        "other": tar_of({"b" * 110: {"jpg": JPEG, "txt": b"two\nthree"}}, tarfile.GNU_FORMAT),
        "empty": tar_of({}, tarfile.PAX_FORMAT),
        "zeros": bytes(1536),
    }
    status, error = index(folder, b"".join(of_part[part] for part in parts))
    wanted = [{"tar": ["one"], "other": ["two", "three"]}[part] for part in parts if part in ("tar", "other")]
    if wanted:
        assert status == 0
        assert texts_of(folder) == wanted
    else:
        assert "contain no samples" in error
