"""Shards with good samples of each task, and damaged ones among them."""

import io
import json
from copy import deepcopy

from hypothesis import strategies as st
from PIL import Image

from tests.data.conftest import draw_jpeg, index_again, write_tar
from unimo3.data.index import ShardIndex

NUM_GOOD = 4
GOOD = draw_jpeg(0, 8, 8)
JUNK = [None, True, 0, 2**70, 1.5, float("nan"), "", " ", "\ud83d", "\ufeffa", "\0", "a " * 99, [], [[]], [None], {}]


def saved(mode, kind):
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, kind)
    return file.getvalue()


# None: the member is missing.
PICTURES = st.sampled_from(
    [GOOD] * 8
    + [GOOD[:200], b"", b"<html>not found</html>", None, saved("CMYK", "JPEG"), saved("P", "GIF")]
    + [saved(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGBA", "I;16")]
)


def pretraining_content(number):
    return {"image_id": number, "captions": [f"dog {number}", f"cat {number}"], "caption": "a dog"}


def vqa_content(number):
    asked = {"question": f"is it {number}?", "answers": ["yes", "no"], "answer_type": "other", "granularity": "fine"}
    questions = [asked | {"question_id": 10 * number + item} for item in range(2)]
    return {"image_id": number, "captions": ["a dog"], "questions": questions}


def snli_ve_content(number):
    hypotheses = [{"pair_id": f"{number}#{item}", "text": f"dog {item}", "label": "neutral"} for item in range(2)]
    return {"image_id": number, "hypotheses": hypotheses, "captions": ["a dog"] * 3}


def nlvr2_content(number):
    return {"image_id": number, "identifier": f"dev-{number}-0-0", "statement": "both show dogs", "label": True}


def paths(content, start=()):
    """All paths of keys and numbers in a content."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path for key, value in inner for path in [(*start, key), *paths(value, (*start, key))]]


@st.composite
def damaged(draw, content):
    """A json member: a content with up to two changes, in some encoding, perhaps cut off."""
    content = deepcopy(content)
    for _ in range(draw(st.integers(0, 2))):
        if not content:
            break
        *parents, last = draw(st.sampled_from(paths(content)))
        parent = content
        for step in parents:
            parent = parent[step]
        match draw(st.sampled_from(["delete", "repeat", "wrap", "junk", "junk"])):
            case "delete":
                del parent[last]
            case "repeat" if isinstance(parent, list):
                parent.append(deepcopy(parent[last]))
            case "wrap":
                parent[last] = [parent[last]]
            case _:
                parent[last] = deepcopy(draw(st.sampled_from(JUNK)))
    encoding = draw(st.sampled_from(["utf-8"] * 4 + ["utf-8-sig", "utf-16", "utf-32"]))
    data = json.dumps(content).encode(encoding)
    half = data[: len(data) // 2]
    return draw(st.sampled_from([data] * 6 + [half, data + b"]", b"", b"[" * 50_000, b"[1]", b"\xff"]))


def num_units(kind, data):
    """Units of reading of a json member: entries of the list, or one that is a bad sample."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return 1
    if not isinstance(content, dict) or kind is None:
        return 1
    entries = content.get(kind)
    return len(entries) if isinstance(entries, list) else int(entries is not None)


def write_shards(folder, content_of, images, damage):
    """Two tars: four good samples, and damaged ones of a json member and a picture for each of their images.

    Args:
        content_of: gives the json of a good sample, by its number.
        images: names of a sample's image members.
        damage: where each damaged sample is inserted, its json member, and its pictures' content.
    """
    samples = [dict.fromkeys(images, GOOD) | {"json": json.dumps(content_of(n)).encode()} for n in range(NUM_GOOD)]
    for position, member, picture in damage:
        samples.insert(position, ({} if picture is None else dict.fromkeys(images, picture)) | {"json": member})
    named = [(str(number), members) for number, members in enumerate(samples)]
    for number, part in enumerate((named[:2], named[2:])):
        write_tar(folder / f"{number}.tar", part)
    index_again(folder)
    return ShardIndex(folder)
