"""SNLI-VE: whether a photo of Flickr30K entails a hypothesis, contradicts it, or does neither.

    SOURCE/snli_ve_{train,dev,test}.jsonl
    IMAGES/flickr30k-images/, or the photos in IMAGES itself

Source: https://github.com/necla-ml/SNLI-VE.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from unimo3.data.formats.flickr30k import photo_folder, photo_number
from unimo3.data.formats.record import Sample, choice, read_records, text

_SPLITS = {"train": "train", "val": "dev", "test": "test"}
_NO_AGREEMENT = "-"
_LABELS = ("entailment", "neutral", "contradiction", _NO_AGREEMENT)


def convert(source: Path, images: Path, omitted: Counter[str] | None = None) -> Iterator[tuple[str, Sample]]:
    """One sample an image and split, with its ``hypotheses``, each a ``text``, a ``label`` and its ``pair_id``.

    Hypotheses on whose label the annotators did not agree are skipped.
    """
    omitted = Counter() if omitted is None else omitted
    folder = photo_folder(images)
    for split, name in _SPLITS.items():
        # By photo: a photo's lines may be apart in the file.
        of_photo: dict[str, list[dict[str, str]]] = {}
        for where, record in read_records(source / f"snli_ve_{name}.jsonl"):
            photo = photo_number(record, "Flickr30K_ID", where)
            label = choice(record, "gold_label", where, _LABELS)
            hypothesis = text(record, "sentence2", where)
            if label == _NO_AGREEMENT:
                omitted["no gold label"] += 1
            else:
                entry = {"text": hypothesis, "label": label, "pair_id": text(record, "pairID", where)}
                of_photo.setdefault(photo, []).append(entry)
        for photo, hypotheses in of_photo.items():
            content = {"image_id": int(photo), "hypotheses": hypotheses}
            yield split, Sample(f"{int(photo):012d}", (folder / f"{photo}.jpg",), content)
