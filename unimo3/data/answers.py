"""Answers of VQAv2: their official normalization, vocabulary, and soft training targets.

Source: VQA, arXiv 1505.00468, and the rules of the official evaluation at https://visualqa.org/evaluation.html.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unimo3.errors import DataError
from unimo3.versions import check_version

_VERSION = 1
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD_BEFORE_NO_DIGIT = re.compile(r"\.(?!\d)")
_CONTRACTIONS = dict(
    entry.split("=")
    for entry in """
    aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
    couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've
    hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's
    Id've=I'd've I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've itll=it'll
    maam=ma'am mightnt=mightn't mightnt've=mightn't've mightn'tve=mightn't've mightve=might've mustnt=mustn't
    mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at
    'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've shouldve=should've shouldnt=shouldn't
    shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd somebodyd've=somebody'd've
    somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's someoned=someone'd
    someoned've=someone'd've someone'dve=someone'd've someonell=someone'll someones=someone's somethingd=something'd
    somethingd've=something'd've something'dve=something'd've somethingll=something'll thats=that's thered=there'd
    thered've=there'd've there'dve=there'd've therere=there're theres=there's theyd=they'd theyd've=they'd've
    they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've
    we'dve=we'd've weve=we've werent=weren't whatll=what'll whatre=what're whats=what's whatve=what've whens=when's
    whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll
    whos=who's whove=who've whyll=why'll whyre=why're whys=why's wont=won't wouldve=would've wouldnt=wouldn't
    wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've
    y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've you'dve=you'd've youll=you'll youre=you're
    youve=you've
    """.split()
)
# Training targets by how many of the ten gave an answer, as METER and its forerunners.
_SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)


def normalize_answer(answer: str) -> str:
    """The official normalization: punctuation, case, number words, articles, contractions."""
    return _normalize_words(_strip_punctuation(strip_spaces(answer)))


def strip_spaces(text: str) -> str:
    """A text without spaces around it and without line ends and tabs."""
    return text.replace("\n", " ").replace("\t", " ").strip()


class AnswerVocabulary:
    """The answers a model chooses among.

    Args:
        answers: normalized, in the order of the head's classes.
    """

    def __init__(self, answers: Sequence[str]):
        self.answers = list(answers)
        self._number = {answer: number for number, answer in enumerate(self.answers)}

    def __len__(self) -> int:
        return len(self.answers)

    def soft_targets(self, answers: Sequence[str]) -> np.ndarray:
        """[answers] float32: 0.3, 0.6, 0.9 or 1 for an answer of one, two, three or more people."""
        targets = np.zeros(len(self.answers), dtype=np.float32)
        for answer, count in Counter(normalize_answer(answer) for answer in answers).items():
            if answer in self._number:
                targets[self._number[answer]] = _SOFT_SCORES[min(count, 4)]
        return targets

    def save(self, path: Path) -> None:
        """Write as JSON."""
        text = json.dumps({"version": _VERSION, "answers": self.answers}, ensure_ascii=False, indent=0) + "\n"
        path.write_text(text, encoding="utf-8", errors="replace")

    def save_pretrained(self, save_directory: Path) -> None:
        """Write ``answers.json`` into a folder, next to what transformers' classes write there."""
        self.save(save_directory / "answers.json")

    @classmethod
    def load(cls, path: Path) -> "AnswerVocabulary":
        """Read what `save` wrote, in UTF-8 with or without a byte order mark; half a surrogate pair becomes "?".

        Raises:
            DataError: the file is missing or damaged, contains no answers, or one twice.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            check_version(path, content, (_VERSION,), kind=DataError)
            answers = content["answers"]
            if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
                raise TypeError("its answers are no list of texts")
        except DataError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path}: is no answer vocabulary ({type(error).__name__}: {error}); python -m pretrain.prepare_shards "
                "vqav2 writes one next to its shards"
            ) from error
        if not answers:
            raise DataError(f"{path}: lists no answers; prepare the shards with a lower --min-answer-count")
        vocabulary = cls([answer.encode("utf-8", "replace").decode() for answer in answers])
        if len(vocabulary._number) < len(vocabulary):
            (repeated, count), *_ = Counter(vocabulary.answers).most_common(1)
            raise DataError(
                f"{path}: lists {repeated!r} {count} times, so its classes would share their questions; copy the file "
                "again, or prepare the shards again"
            )
        return vocabulary


def _strip_punctuation(text: str) -> str:
    # A mark next to a space, or any mark in a text with a number like 1,000, vanishes; others become a space.
    out = text
    for mark in _PUNCTUATION:
        vanishes = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text)
        out = out.replace(mark, "" if vanishes else " ")
    return _PERIOD_BEFORE_NO_DIGIT.sub("", out)


def _normalize_words(text: str) -> str:
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
