"""Checkers of prediction files and metrics, written from the official programs' definitions, not from our writers."""

import csv
import json
from collections import defaultdict
from pathlib import Path


def check_vqa(text: str, questions: list[dict]) -> None:
    """A submission to VQA's server: a JSON list of {question_id: int, answer: str}, each question of the split once."""
    entries = json.loads(text)
    assert isinstance(entries, list)
    for entry in entries:
        assert set(entry) == {"question_id", "answer"}
        assert type(entry["question_id"]) is int
        assert type(entry["answer"]) is str
    assert sorted(entry["question_id"] for entry in entries) == sorted(
        question["question_id"] for question in questions
    )


def nlvr2_metrics(text: str, examples: list[dict]) -> dict[str, float]:
    """What NLVR2's program prints: it splits each line at its commas into identifier and label, without a header.

    A sentence is an identifier without its third part, the pair; it is consistent if all its pairs are right.
    """
    predicted = {}
    for line in csv.reader(text.splitlines()):
        assert len(line) == 2
        assert line[1] in ("True", "False")
        assert line[0] not in predicted
        predicted[line[0]] = line[1]
    assert set(predicted) == {example["identifier"] for example in examples}
    right = {example["identifier"]: predicted[example["identifier"]] == example["label"] for example in examples}
    of_sentence = defaultdict(list)
    for identifier, is_right in right.items():
        split, number, _pair, sentence = identifier.split("-")
        of_sentence[split, number, sentence].append(is_right)
    return {
        "accuracy": sum(right.values()) / len(right),
        "consistency": sum(all(marks) for marks in of_sentence.values()) / len(of_sentence),
    }


def snli_ve_metrics(text: str, examples: list[dict]) -> dict[str, float]:
    """Accuracy over all and of each gold label, of JSON lines with a pair's id and its label."""
    predicted = {}
    for line in text.splitlines():
        entry = json.loads(line)
        assert set(entry) == {"pairID", "gold_label"}
        assert entry["gold_label"] in ("entailment", "neutral", "contradiction")
        assert entry["pairID"] not in predicted
        predicted[entry["pairID"]] = entry["gold_label"]
    assert set(predicted) == {example["pairID"] for example in examples}
    marks = defaultdict(list)
    for example in examples:
        is_right = predicted[example["pairID"]] == example["gold_label"]
        marks["overall"].append(is_right)
        marks[example["gold_label"]].append(is_right)
    return {group: sum(values) / len(values) for group, values in marks.items()}


def choice_metrics(entries: list[dict], head: str) -> dict[str, float]:
    """SugarCrepe's accuracy of each category, or Winoground's three scores, of each example's scores by one head."""
    marks, ties = defaultdict(list), 0
    for entry in entries:
        scores = entry[head]
        if len(scores) == 1:
            first, second = scores[0]
            right, tied = {"accuracy": first > second}, first == second
        else:
            (c0_i0, c1_i0), (c0_i1, c1_i1) = scores
            text, image = c0_i0 > c1_i0 and c1_i1 > c0_i1, c0_i0 > c0_i1 and c1_i1 > c1_i0
            right = {"text": text, "image": image, "group": text and image}
            tied = c0_i0 in (c1_i0, c0_i1) or c1_i1 in (c1_i0, c0_i1)
        ties += tied
        for score, is_right in right.items():
            marks[f"{head}_{score}"].append(is_right)
            marks[f"{head}_{score}_{entry['category']}"].append(is_right)
    metrics = {name: sum(values) / len(values) for name, values in marks.items()}
    for name in [name for name in metrics if name.count("_") == 1]:
        parts = [value for other, value in metrics.items() if other.startswith(f"{name}_")]
        metrics[f"{name}_average"] = sum(parts) / len(parts)
    return metrics | {f"{head}_ties": ties}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
