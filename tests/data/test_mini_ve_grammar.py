"""The six grammars, against sentences written by hand."""

import csv
import re
from pathlib import Path

import pytest

from clseave_cli.core.data.mini_ve.grammar import LANGUAGES, NUM_TEMPLATES, say
from clseave_cli.core.data.mini_ve.world import (
    COUNTS,
    DESCRIPTIONS,
    ITEM_PAIRS,
    Absence,
    Conjunction,
    Count,
    Description,
    Item,
    Presence,
)


def _by_hand():
    """Hypothesis, paraphrase, and its sentence in each language."""
    forms = {"Presence": Presence, "Absence": Absence}
    with Path(__file__).with_name("mini_ve_sentences.tsv").open(encoding="utf-8") as table:
        for row in csv.DictReader(table, delimiter="\t"):
            if row["form"] == "Count":
                hypothesis = Count(int(row["about"]))
            elif row["form"] == "Conjunction":
                hypothesis = Conjunction(
                    *(Item(*item.split()) for item in row["about"].split(", "))
                )
            else:
                words = (None if word == "-" else word for word in row["about"].split())
                hypothesis = forms[row["form"]](Description(*words))
            yield hypothesis, int(row["template"]), [row[language] for language in LANGUAGES]


@pytest.mark.parametrize(
    ("hypothesis", "template", "sentences"),
    [pytest.param(*row, id=row[2][0]) for row in _by_hand()],
)
def test_sentences_written_by_hand(hypothesis, template, sentences):
    assert [say(hypothesis, template, language) for language in LANGUAGES] == sentences


def every_hypothesis():
    return [
        *(Presence(what) for what in DESCRIPTIONS),
        *(Absence(what) for what in DESCRIPTIONS),
        *(Count(number) for number in COUNTS),
        *(Conjunction(*pair) for pair in ITEM_PAIRS),
        *(Conjunction(*reversed(pair)) for pair in ITEM_PAIRS),
    ]


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_hypotheses_share_a_sentence(language):
    """So a translation back and forth returns the same row, and a label can be looked up."""
    hypotheses = every_hypothesis()
    sentences = {
        say(hypothesis, template, language)
        for hypothesis in hypotheses
        for template in range(NUM_TEMPLATES)
    }
    assert len(sentences) == len(hypotheses) * NUM_TEMPLATES


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_well_formed(language):
    letters = (
        r"a-zA-ZäöüÄÖÜßèé" if language in ("en", "de", "nl") else r"\u3040-\u9fff\uac00-\ud7a3"
    )
    space = "" if language in ("ja", "zh") else " "
    stop = "。" if language in ("ja", "zh") else "."
    pattern = re.compile(rf"[{letters}]+(?:[{space}，][{letters}]+)*{re.escape(stop)}")
    for hypothesis in every_hypothesis():
        for template in range(NUM_TEMPLATES):
            sentence = say(hypothesis, template, language)
            assert pattern.fullmatch(sentence), sentence
