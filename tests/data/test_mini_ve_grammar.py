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
    with Path(__file__).with_name("mini_ve_sentences.tsv").open(encoding="utf-8") as table:
        for row in csv.DictReader(table, delimiter="\t"):
            match row["form"], row["about"]:
                case "Count", number:
                    hypothesis = Count(int(number))
                case "Conjunction", items:
                    hypothesis = Conjunction(*(Item(*item.split()) for item in items.split(", ")))
                case form, words:
                    what = Description(*(None if word == "-" else word for word in words.split()))
                    hypothesis = {"Presence": Presence, "Absence": Absence}[form](what)
            yield hypothesis, int(row["template"]), [row[language] for language in LANGUAGES]


@pytest.mark.parametrize(
    ("hypothesis", "template", "sentences"),
    [pytest.param(*row, id=row[2][0]) for row in _by_hand()],
)
def test_sentences_written_by_hand(hypothesis, template, sentences):
    assert [say(hypothesis, template, language) for language in LANGUAGES] == sentences


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_hypotheses_share_a_sentence_and_all_are_well_formed(language):
    """So a translation back and forth returns the same row, and a label can be looked up."""
    hypotheses = [
        *(form(what) for what in DESCRIPTIONS for form in (Presence, Absence)),
        *(Count(number) for number in COUNTS),
        *(Conjunction(*pair) for one, other in ITEM_PAIRS for pair in ((one, other), (other, one))),
    ]
    sentences = {
        say(hypothesis, template, language)
        for hypothesis in hypotheses
        for template in range(NUM_TEMPLATES)
    }
    assert len(sentences) == len(hypotheses) * NUM_TEMPLATES
    letters = (
        r"a-zA-ZäöüÄÖÜßèé" if language in ("en", "de", "nl") else r"\u3040-\u9fff\uac00-\ud7a3"
    )
    space, stop = ("", "。") if language in ("ja", "zh") else (" ", ".")
    pattern = re.compile(rf"[{letters}]+(?:[{space}，][{letters}]+)*{re.escape(stop)}")
    assert [sentence for sentence in sentences if not pattern.fullmatch(sentence)] == []
