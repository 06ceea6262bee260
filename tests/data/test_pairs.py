"""Rows of `predict`: JSON Lines, CSV and pipes, bad rows in their places."""

import gzip
import json
import os
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clseave_cli.core.data import pairs, rows
from clseave_cli.core.data.pairs import Pair, Pairs
from clseave_cli.errors import DataError


def _read(path, batch_size=100, columns=()):
    with path.open("rb") as stream:
        return list(Pairs(stream, str(path), batch_size, *columns))


def _flat(path, *columns):
    return [row for batch in _read(path, columns=columns) for row in batch]


def test_json_lines_in_order_and_in_whole_batches(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"image": f"{n}.png", "hypothesis": "Ein Löwe.", "more": n} for n in range(7)]
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows) + "\n  \n")
    assert [len(batch) for batch in _read(path, 3)] == [3, 3, 1]
    assert _flat(path) == [Pair(f"{n}.png", "Ein Löwe.", {"more": n}) for n in range(7)]


def test_a_bad_line_is_an_error_in_its_place(tmp_path):
    path = tmp_path / "pairs.jsonl"
    too_deep_to_write_again = b'{"image": "a", "hypothesis": "b", "x": ' + b"[" * 990 + b"]" * 990
    lines = [
        (b'{"image": "a", "hypothesis": "b"}', Pair("a", "b", {})),
        (b"{broken", "not va"), (b"", None), (b"[1]", "expect"), (b'{"image": "a"}', "expect"),
        (b'{"image": 3, "hypothesis": "b"}', Pair("3", "b", {})),  # as in a split, a name
        (b"\xff\xfe", "not UT"), (b"[" * 100_000, "not va"),
        (too_deep_to_write_again + b"}", "JSON nested too deeply"),
        (b'{"image": "", "hypothesis": "b"}', Pair("", "b", {})),
    ]  # fmt: skip
    path.write_bytes(b"\n".join(line for line, _ in lines))
    rows = iter(_flat(path))
    for number, (_, expected) in enumerate(lines, 1):
        if isinstance(expected, Pair):
            assert next(rows) == expected
        elif expected:
            assert str(next(rows)).startswith(f"{path}:{number}: {expected}")
    assert list(rows) == []


_SNLI_VE = {"Flickr30K_ID": "1", "pairID": "1#0r1n", "sentence2": "Hi.", "gold_label": "neutral"}


def _write(path, row):
    if path.suffix == ".csv":
        path.write_text("\n".join(",".join(cells) for cells in (row, row.values())))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(json.dumps(row).encode()))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {"none": None}]), path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv", "a.parquet"])
def test_a_row_of_snli_ve_is_a_pair_in_every_format(tmp_path, name):
    path = tmp_path / name
    _write(path, _SNLI_VE)
    (pair,) = _flat(path)
    assert pair[:2] == ("1", "Hi.")
    assert (pair.others["pairID"], pair.others["gold_label"]) == ("1#0r1n", "neutral")
    # The keys of `predict` count where both are there.
    _write(path, _SNLI_VE | {"image": "a.png", "hypothesis": "Ho."})
    assert _flat(path)[0][:2] == ("a.png", "Ho.")


#: Without a time in it: the processes of a test run must collect the same tests.
_TORN_GZIP = gzip.compress(b'{"image": "a"}\n' * 500, mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", _TORN_GZIP, r"a\.jsonl\.gz: cannot be r"),
        ("a.jsonl", b"0" * (2 << 20), "a line of more than 1 MiB; expected JSON Lines or CSV"),
        ("a.csv", "image,hypothesis\na.png,x\n".encode("utf-16"), r"a\.csv:1: not UTF-8; convert"),
    ],
)
def test_files_that_hold_no_rows_are_refused(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(pairs, "_LONGEST_LINE_BYTES", 1 << 20)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        _read(tmp_path / name)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(tmp_path, delimiter):
    path = tmp_path / "pairs.csv"
    quoted = '"Two dogs\nrun, or; do\tthey ""run""?"'
    lines = [["\ufeffid", "hypothesis", '"image"'], ["1", quoted, "a.png"], [], ["2", "short"],
             ["3", "Ein Hund.", "b.png", "more"]]  # fmt: skip
    path.write_text("\r\n".join(delimiter.join(cells) for cells in lines))
    first, second, third = _flat(path)
    assert first[:2] == ("a.png", 'Two dogs\nrun, or; do\tthey "run"?')
    assert first.others == {"id": "1", "image": first.image, "hypothesis": first.hypothesis}
    assert str(second) == f"{path}:5: 2 cells; expected 3, as in the header."
    assert str(third) == f"{path}:6: 4 cells; expected 3, as in the header."


def test_csv_that_breaks_goes_on_with_the_next_row(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_MAX_CELL_CHARACTERS", 1000)
    path = tmp_path / "pairs.csv"
    path.write_bytes(
        b"image,hypothesis\na.png,one\rtwo\n" + b"b.png," + b"x" * 2000 + b"\nc\xff.png,\xff\n"
    )
    broken, long, odd = _flat(path)
    assert str(broken).startswith(f"{path}:2: not valid CSV")
    assert str(long).startswith(f"{path}:3: not valid CSV (field larger")
    assert os.fsencode(odd.image) == b"c\xff.png" and odd.hypothesis == "\udcff"


def test_a_csv_file_needs_the_two_columns(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("pic,sentence\na.png,x\n")
    message = r"pairs\.csv:1: columns pic, sentence; expected image and hypothesis, or SNLI-VE's\."
    for columns in ((), ("pic", "text"), (None, "sentence")):
        with pytest.raises(DataError, match=message):
            _read(path, columns=columns)
    assert _flat(path, "pic", "sentence")[0][:2] == ("a.png", "x")
    (tmp_path / "empty.jsonl").touch()
    assert _read(tmp_path / "empty.jsonl") == []


def test_a_row_that_came_down_a_pipe_is_not_kept_waiting():
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb", buffering=0) as sender:
        batches = iter(Pairs(stream, "stdin", 10))
        line = b'{"image": "%d", "hypothesis": "x"}\n'
        sender.write(line % 0)
        assert next(batches) == [Pair("0", "x", {})]
        sender.write(line % 1 + line % 2 + (line % 3)[:9])
        assert next(batches) == [Pair("1", "x", {}), Pair("2", "x", {})]
        sender.write((line % 3)[9:-1])
        sender.close()
        assert list(batches) == [[Pair("3", "x", {})]]


_CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
_CSV = st.lists(st.lists(_CELLS, max_size=4).map(",".join), max_size=8).map(
    lambda lines: "\n".join(["image,hypothesis", *lines]).encode()
)


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.binary(max_size=300), _CSV), st.integers(1, 4))
def test_whatever_is_in_the_file_there_are_rows(content, batch_size):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pairs")
        path.write_bytes(content)
        rows = [row for batch in _read(path, batch_size) for row in batch]
    assert all(isinstance(row, Pair | DataError) for row in rows)
    if not content.startswith(b"image,hypothesis"):
        lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert len(rows) == sum(bool(line.strip()) for line in lines)
