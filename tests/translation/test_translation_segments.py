"""What an engine is shown, and that the rest comes back in its place."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clseave_cli.core.translation.driver import Segmented
from clseave_cli.core.translation.quality import needs_translation

_ANY_TEXT = st.text(st.characters(codec=None), max_size=200)


@given(_ANY_TEXT, st.integers(1, 60))
def test_parts_are_clean_and_join_to_the_text(text: str, limit: int) -> None:
    segmented = Segmented(text, limit)
    for part in segmented.parts:
        assert part == part.strip() and 0 < len(part) <= limit
        assert needs_translation(part)
        assert not any(unicodedata.category(character) in ("Cc", "Cs", "Zl") for character in part)
    joined = segmented.join(segmented.parts)
    clean = "".join(
        "�" if "\ud800" <= c <= "\udfff" and needs_translation(text) else c for c in text
    )
    # Only lone surrogates within a part are replaced, for no engine could be sent one.
    assert len(joined) == len(text)
    assert all(a == b or b == "�" for a, b in zip(text, joined, strict=True)), clean


@given(_ANY_TEXT)
def test_without_a_limit_the_text_is_passed_as_it_is(text: str) -> None:
    assert Segmented(text, None).parts == [text]
    assert Segmented(text, None).join(["x"]) == "x"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("A man.\nA dog.\r\n", ["A man.", "A dog."]),
        ("  A man\0sleeps \t", ["A man", "sleeps"]),
        ("A man.\n42\n…\nA dog.", ["A man.", "A dog."]),
        ("", []), ("…", []), ("42 %", []), ("😀👩‍🚀", []),
    ],
)  # fmt: skip
def test_lines_and_controls(text: str, parts: list[str]) -> None:
    segmented = Segmented(text, 100)
    assert segmented.parts == parts
    assert segmented.join(parts) == text


def test_cuts_at_sentence_ends_then_at_spaces_then_anywhere() -> None:
    assert Segmented("One two. Three four. Five", 14).parts == ["One two.", "Three four.", "Five"]
    assert Segmented("one two three four", 9).parts == ["one two", "three", "four"]
    assert Segmented("一二三。四五六。七", 5).parts == ["一二三。", "四五六。七"]
    assert Segmented("abcdefghij", 4).parts == ["abcd", "efgh", "ij"]
