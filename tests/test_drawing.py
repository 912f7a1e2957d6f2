"""Text in pictures: what the font cannot show is an escape, and a line has a bounded length."""

import pytest

from unimo3 import drawing


@pytest.mark.parametrize("fonts", [(), drawing._FONTS])
def test_a_letter_without_a_glyph_is_an_escape(monkeypatch, fonts):
    monkeypatch.setattr(drawing, "_FONTS", fonts)
    drawing.font.cache_clear()
    drawing._has_glyph.cache_clear()
    try:
        assert drawing.shown("what is\n \u6771?", 15, 50) == "what is \\u6771?"
        assert drawing.shown("half \ud83d", 15, 50) == "half \\ud83d"
        assert drawing.shown("a" * 60, 15, 50) == "a" * 50 + " ..."
    finally:
        drawing.font.cache_clear()
        drawing._has_glyph.cache_clear()
