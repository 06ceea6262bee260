"""Each check finds what it is for, and leaves good translations alone."""

import importlib.util

import pytest

from clseave_cli.core.translation.quality import CHECKS, Checks, has_loop

_SOURCE = "A man in a red shirt is riding a bicycle."


@pytest.mark.parametrize(
    ("target", "source", "translation", "expected"),
    [
        ("de", _SOURCE, "  ", {"empty"}),
        ("de", _SOURCE, _SOURCE, {"copy"}),
        ("de", _SOURCE, "a man in a red shirt is riding a bicycle. ", {"copy"}),
        ("ja", "pizza.", "pizza.", {"copy", "script"}),
        ("ja", "Mary sleeps.", "Mary", {"script"}),
        ("ja", "A man with a Nikon camera.", "Nikon とCanon", {"script"}),
        ("ja", _SOURCE, "Ein Mann in einem roten Hemd.", {"script"}),
        ("ru", _SOURCE, "Chelovek v krasnoy rubashke edet.", {"script"}),
        ("zh", _SOURCE, "あかいシャツをきたおとこのひと", {"script"}),
        ("de", _SOURCE, "Mann.", {"length"}),
        ("ja", "A dog.", "シャツを着た男性が自転車に乗っているところ" * 2, {"length"}),
        ("de", "A dog is here today.", "Ein Hund Hund Hund Hund Hund Hund.", {"repetition"}),
        ("de", "A dog sees 12 men.", "Ein Hund sieht Männer.", {"numerals"}),
        ("de", "A dog sees 12 and 12 men.", "Ein Hund sieht 12 Männer.", {"numerals"}),
        ("ja", "A dog sees 15 men.", "犬-男性を見ている。", {"numerals"}),
        ("de", "A dog sees a man.", "Ein Hund. Er sieht einen Mann.", {"added-sentence"}),
        ("ja", "A dog sees a man.", "犬がいる。男を見ている。", {"added-sentence"}),
    ],
)  # fmt: skip
def test_finds(target, source, translation, expected):
    suspicions = set(Checks("en", target).find(source, translation)) - {"language"}
    assert suspicions == expected
    assert suspicions <= set(CHECKS)


@pytest.mark.parametrize(
    ("target", "source", "translation"),
    [
        ("de", _SOURCE, "Ein Mann in einem roten Hemd fährt Fahrrad."),
        ("de", "Pizza.", "Pizza."),
        ("de", "Mr. Smith has 1,000 dogs.", "Mr. Smith hat 1.000 Hunde."),
        ("de", "It is 3.5 metres wide.", "Es ist 3,5 Meter breit."),
        ("nl", "A man. A dog.", "Een man. Een hond."),
        ("ja", _SOURCE, "赤いTシャツを着た男性が自転車に乗っている。"),
        ("ja", "There are 3 dogs.", "犬が三匹いる。"),
        ("zh", "There are 12 dogs.", "有十二只狗。"),
        ("ko", _SOURCE, "빨간 셔츠를 입은 남자가 자전거를 타고 있다."),
        ("ar", "There are 12 dogs.", "هناك ١٢ كلبا."),
        ("ru", "There are 2 dogs.", "Там 2 собаки."),
        ("ja", "Pizza.", "Pizza."),
        ("zh", "A man with a Nikon.", "男人拿Nikon。"),
        ("de", "...", "..."),
        ("de", "haha haha haha haha haha", "haha haha haha haha haha"[:19] + " hihi"),
    ],
)  # fmt: skip
def test_leaves_good_ones_alone(target, source, translation):
    assert set(Checks("en", target).find(source, translation)) - {"language"} == set()


def test_a_language_without_known_script_is_not_judged_by_it():
    assert Checks("en", "tlh").find("A man sees a dog.", "loD legh targh'e'") == ()


@pytest.mark.parametrize(
    ("text", "loops"),
    [("ha ha ha ha ha", True), ("aaaaaaaa", True), ("a very very very good dog", False),
     ("der der der der", True), ("赤い赤い赤い赤い", True), ("1000000000", True), ("", False)],
)  # fmt: skip
def test_loops(text, loops):
    assert has_loop(text) is loops


@pytest.mark.skipif(importlib.util.find_spec("lingua") is None, reason="needs the langid extra")
def test_language_identification():
    checks = Checks("en", "nl")
    assert checks.version.endswith("+language")
    assert "language" in checks.find(_SOURCE, "Ein Mann in einem roten Hemd fährt mit dem Fahrrad.")
    assert checks.find(_SOURCE, "Een man in een rood shirt rijdt op een fiets.") == ()
    assert checks.find("A man.", "Mann.") == ()  # too short to be sure
    assert "language" in Checks("en", "ja").find(_SOURCE, "一个穿红衬衫的男人在骑自行车。")
