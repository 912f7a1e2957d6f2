"""Writes toy scenes in the public data sets' file formats.

Source: Karpathy's splits (COCO, Flickr30K), https://visualqa.org (VQAv2), https://github.com/lil-lab/nlvr (NLVR2),
https://github.com/necla-ml/SNLI-VE.
"""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from unimo3.data.toy.language import Question, captions, pair_statement, questions, statement
from unimo3.data.toy.scene import Scene, draw_scene, render

# Streams of random numbers, one a data set, so that one's size does not change another.
_COCO, _FLICKR, _NLVR = 0, 1, 2
_COCO_SPLITS = (("train", 0.80), ("restval", 0.84), ("val", 0.92), ("test", 1.0))
_FLICKR_SPLITS = (("train", 0.80), ("val", 0.90), ("test", 1.0))

Progress = Callable[[Iterable[int], str], Iterable[int]]


def write_coco_and_vqav2(root: Path, num_images: int, size: int, seed: int, progress: Progress) -> dict[str, int]:
    """``coco/`` with Karpathy's JSON and JPEGs, ``vqav2/`` with questions and annotations about the same images.

    Questions about training images form VQAv2's training set, those about val and test images its validation set;
    restval images join caption training and are not asked about.
    """
    images, asked = [], {"train2014": ([], []), "val2014": ([], [])}  # type: ignore[var-annotated]
    for number in progress(range(num_images), "coco, vqav2"):
        rng = np.random.default_rng((seed, _COCO, number))
        scene = draw_scene(rng)
        split = _split_of(number, num_images, _COCO_SPLITS)
        year = "train2014" if split == "train" else "val2014"
        identity = number + 1
        name = f"COCO_{year}_{identity:012d}.jpg"
        save_jpeg(scene, root / "coco" / year / name, size, rng)
        images.append(
            {"filepath": year, "filename": name, "split": split, "cocoid": identity}
            | _sentences(captions(scene, rng), number)
        )
        if split == "restval":
            continue
        for index, question in enumerate(questions(scene, rng)):
            question_id = identity * 1000 + index
            asked[year][0].append({"image_id": identity, "question": question.text, "question_id": question_id})
            asked[year][1].append(_annotation(question, question_id, identity, rng))
    write_json(root / "coco" / "dataset_coco.json", {"dataset": "coco", "images": images})
    for year, (texts, notes) in asked.items():
        common = {"info": {"description": "toy scenes"}, "license": {}, "data_subtype": year, "data_type": "mscoco"}
        write_json(
            root / "vqav2" / f"v2_OpenEnded_mscoco_{year}_questions.json",
            common | {"task_type": "Open-Ended", "questions": texts},
        )
        write_json(root / "vqav2" / f"v2_mscoco_{year}_annotations.json", common | {"annotations": notes})
    return {
        "coco images": num_images,
        "coco captions": 5 * num_images,
        "vqav2 train questions": len(asked["train2014"][0]),
        "vqav2 val questions": len(asked["val2014"][0]),
    }


def write_flickr30k_and_snli_ve(
    root: Path, num_images: int, size: int, seed: int, progress: Progress
) -> dict[str, int]:
    """``flickr30k/`` with JPEGs, Karpathy's JSON and a CSV, ``snli_ve/`` with statements about the same images."""
    images: list[dict[str, Any]] = []
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
    for number in progress(range(num_images), "flickr30k, snli_ve"):
        rng = np.random.default_rng((seed, _FLICKR, number))
        scene = draw_scene(rng)
        split = _split_of(number, num_images, _FLICKR_SPLITS)
        identity = str(1_000_000 + number)
        save_jpeg(scene, root / "flickr30k" / "flickr30k-images" / f"{identity}.jpg", size, rng)
        texts = captions(scene, rng)
        images.append({"filename": f"{identity}.jpg", "split": split} | _sentences(texts, number))
        for index in range(3):
            sentence, label = statement(scene, rng)
            lines["dev" if split == "val" else split].append(
                {
                    "Flickr30K_ID": identity,
                    "sentence1": texts[0],
                    "sentence2": sentence,
                    "gold_label": label,
                    "annotator_labels": [label] * 5,
                    "pairID": f"{identity}.jpg#0r{index}",
                }
            )
    write_json(root / "flickr30k" / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": images})
    with (root / "flickr30k" / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for image in images:
            rows.writerows([f"flickr30k-images/{image['filename']}", text["raw"]] for text in image["sentences"])
    for split, records in lines.items():
        write_lines(root / "snli_ve" / f"snli_ve_{split}.jsonl", records)
    return {"flickr30k images": num_images, "snli_ve statements": sum(len(records) for records in lines.values())}


def write_nlvr2(root: Path, num_pairs: int, size: int, seed: int, progress: Progress) -> dict[str, int]:
    """``nlvr2/`` with JSON lines and PNG pairs, two sentences a pair."""
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test1": []}
    for number in progress(range(num_pairs), "nlvr2"):
        rng = np.random.default_rng((seed, _NLVR, number))
        split = _split_of(number, num_pairs, (("train", 0.80), ("dev", 0.90), ("test1", 1.0)))
        directory = number % 10
        folder = root / "nlvr2" / (f"images/train/{directory}" if split == "train" else split)
        folder.mkdir(parents=True, exist_ok=True)
        pair = draw_scene(rng), draw_scene(rng)
        for side, scene in enumerate(pair):
            render(scene, size, rng).save(folder / f"{split}-{number}-0-img{side}.png")
        for sentence_number in range(2):
            sentence, truth = pair_statement(*pair, rng)
            record: dict[str, Any] = {
                "identifier": f"{split}-{number}-0-{sentence_number}",
                "sentence": sentence,
                "label": str(truth),
            }
            lines[split].append(record | ({"directory": directory} if split == "train" else {}))
    for split, records in lines.items():
        write_lines(root / "nlvr2" / f"{split}.json", records)
    return {"nlvr2 pairs": num_pairs, "nlvr2 sentences": 2 * num_pairs}


def _split_of(number: int, total: int, splits: tuple[tuple[str, float], ...]) -> str:
    return next(name for name, end in splits if number < end * total)


def _sentences(texts: list[str], number: int) -> dict[str, Any]:
    identities = list(range(number * len(texts), (number + 1) * len(texts)))
    sentences = [
        {"raw": text, "tokens": text.split(), "imgid": number, "sentid": identity}
        for text, identity in zip(texts, identities, strict=True)
    ]
    return {"imgid": number, "sentids": identities, "sentences": sentences}


def _annotation(question: Question, question_id: int, image_id: int, rng: np.random.Generator) -> dict[str, Any]:
    # Up to two of the ten people see it otherwise; the majority is always right.
    others = [option for option in question.options if option != question.answer]
    answers = [question.answer] * 10
    for index in rng.choice(10, size=int(rng.integers(3)), replace=False):
        answers[int(index)] = str(rng.choice(others))
    return {
        "question_id": question_id,
        "image_id": image_id,
        "question_type": question.kind,
        "answer_type": question.answer_type,
        "multiple_choice_answer": question.answer,
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i, answer in enumerate(answers)
        ],
        "granularity": question.granularity,
    }


def save_jpeg(scene: Scene, path: Path, size: int, rng: np.random.Generator) -> None:
    """Draw a scene into a file of a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    render(scene, size, rng).save(path, quality=95, subsampling=0)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file into a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSON lines into a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
