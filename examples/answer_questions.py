"""Answers questions about an image with exported weights of VQA.

python examples/answer_questions.py WEIGHTS IMAGE QUESTION...
"""

import argparse
import json
from pathlib import Path

# Before transformers; the Auto classes open what these two define.
import unimo3.model.downstream
import unimo3.model.processor  # noqa: F401

# isort: split
import torch
from PIL import Image
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

NUM_ANSWERS = 3


def main() -> None:
    """Print the best answers to each question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="folder that pretrain.export wrote")
    parser.add_argument("image", type=Path)
    parser.add_argument("questions", nargs="+", metavar="question")
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(args.weights)
    model = AutoModelForVisualQuestionAnswering.from_pretrained(args.weights).float().eval()
    answers = json.loads((args.weights / "answers.json").read_text())["answers"]

    # The image is encoded once for each question: pixel_values [B, 3, S, S], input_ids [B, T].
    images = [Image.open(args.image)] * len(args.questions)
    batch = processor(images=images, text=args.questions, return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits.sigmoid()  # [B, answers]
    for question, row in zip(args.questions, scores, strict=True):
        best = row.topk(min(NUM_ANSWERS, len(answers)))
        listed = ", ".join(f"{answers[index]} ({score:.2f})" for score, index in zip(*best, strict=True))
        print(f"{question} {listed}")


if __name__ == "__main__":
    main()
