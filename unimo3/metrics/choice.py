"""Scores of choices between captions, or between images, and what a guess scores.

A tie counts as wrong: the right one must have a higher score than every other. So does a score that is not a number.

Source: Winoground, arXiv 2204.03162, section 4, for the text, image and group score; SugarCrepe, arXiv 2306.14610, for
the accuracy of one image's choice.
"""

# Shapes: I images, X captions.

from collections.abc import Sequence

# Of two images with two captions: both images choose theirs, both captions choose theirs, both at once. For equally
# likely orders of four scores: the two right ones are the highest in 1 of 6.
_CHANCE_OF_TWO = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}


def choice_chance(num_images: int, num_texts: int) -> dict[str, float]:
    """What a guess is expected to have of each score of `choice_marks`."""
    return {"accuracy": 1 / num_texts} if num_images == 1 else dict(_CHANCE_OF_TWO)


def choice_marks(scores: Sequence[Sequence[float]], images: Sequence[int | None]) -> tuple[dict[str, bool], bool]:
    """What of an example is right, and whether a tie decides any of it.

    Args:
        scores: [I, X], the higher the better.
        images: [X], the image that each caption is of; None: of no image.

    Returns:
        ``accuracy`` of one image: whether it chooses its caption. Of two images ``text``, whether both choose their
        captions, ``image``, whether both captions choose their images, and ``group``, both.
    """
    texts = [images.index(image) for image in range(len(scores))]
    by_image = [_compare(row[text], [*row[:text], *row[text + 1 :]]) for row, text in zip(scores, texts, strict=True)]
    if len(scores) == 1:
        return {"accuracy": by_image[0][0]}, by_image[0][1]
    columns = [[row[text] for row in scores] for text in texts]
    by_text = [_compare(of[image], [*of[:image], *of[image + 1 :]]) for image, of in enumerate(columns)]
    marks = {name: all(is_right for is_right, _ in part) for name, part in (("text", by_image), ("image", by_text))}
    return marks | {"group": all(marks.values())}, any(tied for _, tied in (*by_image, *by_text))


def _compare(right: float, others: Sequence[float]) -> tuple[bool, bool]:
    """Whether the right one is above every other, and whether it shares the highest score with another."""
    return all(right > other for other in others), right == max(others)
