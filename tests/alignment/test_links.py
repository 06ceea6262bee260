"""Pharaoh files, and the score of links against gold ones."""

import numpy as np
import pytest
from tiny_world import Notes

from clseave_cli.core.alignment.links import AlignmentScore, Links, read_links, score
from clseave_cli.errors import DataError


def _read(tmp_path, content, num_words, **options):
    path = tmp_path / "links.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    num_lines = len(num_words)
    options = {"lines": np.arange(1, num_lines + 1), "num_lines": num_lines} | options
    return read_links(path, np.array(num_words), text="pairs.txt", **options)


def _pairs(links):
    pairs = [[] for _ in range(len(links))]
    for pair, (i, j), sure in zip(links.pairs, links.words.tolist(), links.sure, strict=True):
        pairs[pair].append((i, j, bool(sure)))
    return pairs


def test_what_is_written_is_read_again(tmp_path):
    links = Links(
        np.array([[0, 0], [1, 2], [2, 0]]), np.array([True, False, True]), np.array([0, 2, 2, 3])
    )
    assert list(links.lines()) == ["0-0 1p2", "", "2-0"]
    again = _read(tmp_path, "".join(f"{line}\n" for line in links.lines()), [[3, 3]] * 3)
    assert _pairs(again) == [[(0, 0, True), (1, 2, False)], [], [(2, 0, True)]]
    assert again.pairs.tolist() == [0, 0, 2]
    taken = again.take(np.array([2, 1, 0, 2]))
    first, second, third = _pairs(again)
    assert _pairs(taken) == [third, second, first, third]
    assert _pairs(_read(tmp_path, "0-0\n\n", [[2, 2]] * 2)) == [[(0, 0, True)], []]


@pytest.mark.parametrize(
    ("content", "options", "note"),
    [
        ("0-0\n1-1", {}, ""),  # the last line needs no end
        # Line 2 belongs to a skipped row.
        ("0-0\n7-9 what?\n1-1\n", {"lines": np.array([1, 3]), "num_lines": 3}, ""),
        ("0-0 5-5\nx 1-1\n", {"skip_bad": True},
         "2 bad links skipped, the first in line 1: 5-5 names a word"),
        ("0-0 0-9\n1-1\n", {"gold": True},
         "1 bad links skipped, the first in line 1: 0-9 names a word"),
    ],
)  # fmt: skip
def test_the_good_links_of_a_file_are_read(tmp_path, content, options, note):
    notes = Notes()
    links = _read(tmp_path, content, [[2, 2]] * 2, progress=notes, **options)
    assert _pairs(links) == [[(0, 0, True)], [(1, 1, True)]] and note in notes.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "links.txt: not UTF-8 text"),
        ("0-0\n0-0\n0-0\n", r"links.txt:3: more lines than sentences; pairs.txt has 2"),
        ("0-0\n", r"links.txt: 1 lines; expected 2, as in pairs.txt"),
        ("", r"links.txt: 0 lines; expected 2"),
        ("0-0\n0-3\n", r"links.txt:2: 0-3 names a word that does not exist; the target sentence "
         r"has 3, counted from 0"),
        ("2-0\n0-0\n", r"links.txt:1: 2-0 .* the source sentence has 2"),
        ("0-0 1:2\n0-0\n", r"links.txt:1: '1:2' is no link; expected two word numbers such as 0-2"),
        ("0-0\n-1-0\n", r"links.txt:2: '-1-0' is no link"),
        ("0-0\n1- 2\n", r"links.txt:2: '1-' is no link"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        _read(tmp_path, content, [[2, 3]] * 2)


def test_a_gold_file_may_misnumber_one_link_alone(tmp_path):
    with pytest.raises(DataError, match="2 links name words that do not exist: line 1: 0-9 names"):
        _read(tmp_path, "0-0 0-9\n5-1\n", [[2, 2]] * 2, gold=True)
    with pytest.raises(DataError, match=r"links.txt:1: '0:1' is no link"):
        _read(tmp_path, "0-0 0:1\n1-1\n", [[2, 2]] * 2, gold=True)


@pytest.mark.parametrize(
    ("content", "first"), [("1-1 2p2\n", 1), ("0-1 1-1\n", 0), ("1-0\n", 0), ("10-1 2-10\n", 1)]
)
def test_how_words_are_counted_is_found_out(tmp_path, content, first):
    notes = Notes()
    links = _read(tmp_path, content, [[11, 11]], first_word=None, progress=notes)
    assert f"words are counted from {first}" in notes.text
    explicit = _read(tmp_path, content, [[11, 11]], first_word=first)
    assert (links.words == explicit.words).all()


def test_a_score_worked_by_hand(tmp_path):
    # Pair 1: found 0-0 1-1 2-1; sure 0-0 1-1, possible also 2-2. Two of three found are possible,
    # both sure ones are found. Pair 2: found 0-1; sure 0-0, possible also 0-1.
    # In all |A| = 4, |S| = 3, |A ∩ S| = 2, |A ∩ P| = 3.
    gold = _read(tmp_path, "0-0 1-1 2p2\n0-0 0p1\n", [[3, 3]] * 2)
    links = _read(tmp_path, "0-0 1-1 2-1 0-0\n0-1\n", [[3, 3]] * 2)
    assert score(links, gold) == AlignmentScore(
        precision=3 / 4, recall=2 / 3, error_rate=pytest.approx(1 - (2 + 3) / (4 + 3)),
        num_pairs=2, num_found=4, num_sure=3, num_possible=5,
    )  # fmt: skip


def test_the_gold_itself_has_no_errors_and_nothing_found_has_only_errors(tmp_path):
    gold = _read(tmp_path, "0-0 1-1\n2-2\n", [[3, 3]] * 2)
    perfect = score(gold, gold)
    assert (perfect.precision, perfect.recall, perfect.error_rate) == (1, 1, 0)
    nothing = score(_read(tmp_path, "\n\n", [[3, 3]] * 2), gold)
    assert (nothing.precision, nothing.recall, nothing.error_rate) == (0, 0, 1)
    with pytest.raises(DataError, match="no sure link"):
        score(gold, _read(tmp_path, "0p0\n\n", [[3, 3]] * 2))
