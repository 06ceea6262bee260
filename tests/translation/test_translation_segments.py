"""What an engine is shown, and that the rest comes back in its place."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clseave_cli.core.translation.driver import segments
from clseave_cli.core.translation.quality import needs_translation

_ANY_TEXT = st.text(st.characters(codec=None), max_size=200)


@given(_ANY_TEXT, st.integers(1, 60))
def test_parts_are_clean_and_join_to_the_text(text: str, limit: int) -> None:
    pieces = segments(text, limit)
    for part in pieces[1::2]:
        assert part == part.strip() and 0 < len(part) <= limit
        assert needs_translation(part)
        assert not any(unicodedata.category(character) in ("Cc", "Cs", "Zl") for character in part)
    # Only lone surrogates are replaced, for no engine could be sent one, and no reader takes one.
    assert "".join(pieces) == re.sub("[\ud800-\udfff]", "\ufffd", text)


@given(_ANY_TEXT)
def test_without_a_limit_the_text_is_passed_as_it_is(text: str) -> None:
    assert segments(text, None) == ["", text, ""]


@pytest.mark.parametrize(
    ("text", "limit", "parts"),
    [
        ("A man.\nA dog.\r\n", 100, ["A man.", "A dog."]),
        ("  A man\0sleeps \t", 100, ["A man", "sleeps"]),
        ("A man.\n42\n…\nA dog.", 100, ["A man.", "A dog."]),
        ("", 100, []), ("…", 100, []), ("42 %", 100, []), ("😀👩‍🚀", 100, []),
        # Cut at sentence ends, then at spaces, then anywhere.
        ("One two. Three four. Five", 14, ["One two.", "Three four.", "Five"]),
        ("one two three four", 9, ["one two", "three", "four"]),
        ("一二三。四五六。七", 5, ["一二三。", "四五六。七"]),
        ("abcdefghij", 4, ["abcd", "efgh", "ij"]),
    ],
)  # fmt: skip
def test_parts(text: str, limit: int, parts: list[str]) -> None:
    assert segments(text, limit)[1::2] == parts
