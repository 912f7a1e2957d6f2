"""The one rule for a text's ends: in training, in conversion, in prediction and in the exported processor.

Source: the Unicode Standard, section 4.5, for the categories, and section 23.8 for byte order marks.
"""

import unicodedata

# Separators, control and format characters; none of them is visible.
_INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf")
_AROUND = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\ufeff"


def plain(text: str) -> str:
    """A text without white space and byte order marks around it; half a surrogate pair becomes "?"."""
    return text.encode("utf-8", "replace").decode().strip(_AROUND)


def is_blank(text: str) -> bool:
    """Whether a text has no visible character, such as one of zero-width spaces alone."""
    return all(unicodedata.category(character) in _INVISIBLE for character in plain(text))
