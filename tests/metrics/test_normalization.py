"""VQAv2's official normalization; expected values are worked out by hand from the official rules."""

import pytest

from unimo3.metrics.vqa import normalize_answer

CONTRACTIONS = {
    "arent": "aren't",
    "couldve": "could've",
    "couldnt've": "couldn't've",
    "hed": "he'd",
    "isnt": "isn't",
    "itll": "it'll",
    "maam": "ma'am",
    "oclock": "o'clock",
    "shant": "shan't",
    "somebody'd": "somebodyd",
    "someones": "someone's",
    "thats": "that's",
    "theyre": "they're",
    "twas": "'twas",
    "weve": "we've",
    "whats": "what's",
    "whod've": "who'd've",
    "wont": "won't",
    "wouldntve": "wouldntve",
    "yall": "y'all",
    "youre": "you're",
    # Lower case comes first, so the entries with a capital never apply; "its" and "lets" are separate words.
    "Im": "im",
    "Ive": "ive",
    "its": "its",
    "lets": "lets",
    "it's": "it's",
}
NUMBERS = {
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
    "none": "0",
    "None": "0",
    "eleven": "eleven",
    "twenty one": "twenty 1",
    "first": "first",
    "someone": "someone",
}
ARTICLES = {
    "a dog": "dog",
    "An Apple": "apple",
    "the": "",
    "the cat and a dog": "cat and dog",
    "another one": "another 1",
    "vitamin a": "vitamin",
    "theatre": "theatre",
}
PUNCTUATION = {
    # Next to a space a mark vanishes, else it becomes a space.
    "cat, dog": "cat dog",
    "cat,dog": "cat dog",
    "yes;no": "yes no",
    "black-and-white": "black and white",
    "black - white": "black white",
    "(left)": "left",
    '"stop"': "stop",
    "a/c": "c",
    "snow_board": "snow board",
    "<b>": "b",
    "x@y": "x y",
    "2+2=4": "2 2 4",
    "back\\slash": "back slash",
    "really?!": "really",
    "{x} [y]": "x y",
    # With a number like 1,000 in the text every mark vanishes.
    "1,000": "1000",
    "1,000 red/blue": "1000 redblue",
    "10,20,30": "102030",
    # A period goes unless a digit follows.
    "mr. smith": "mr smith",
    "u.s.a.": "usa",
    "3.5": "3.5",
    "5.": "5",
    ".5": ".5",
    "no...": "no",
    # Marks that are none of the official ones stay.
    "10:30": "10:30",
    "50%": "50%",
    "$5": "$5",
    "#1": "#1",
    "rock & roll": "rock & roll",
    "dog's": "dog's",
}
SPACES = {"  yes ": "yes", "new\nyork": "new york", "new\tyork": "new york", "new   york": "new york", "": ""}


@pytest.mark.parametrize(
    ("raw", "normal"),
    [case for cases in (CONTRACTIONS, NUMBERS, ARTICLES, PUNCTUATION, SPACES) for case in cases.items()],
)
def test_normalization_follows_the_official_rules(raw, normal):
    assert normalize_answer(raw) == normal
