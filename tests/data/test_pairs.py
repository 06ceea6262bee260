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
    path.write_bytes(
        b'{"image": "a", "hypothesis": "b"}\n{broken\n\n[1]\n{"image": "a"}\n'
        b'{"image": 3, "hypothesis": "b"}\n\xff\xfe\n' + b"[" * 100_000 + b"\n"
        b'{"image": "", "hypothesis": "b"}'
    )
    rows = _flat(path)
    assert rows[0] == Pair("a", "b", {}) and rows[-1] == Pair("", "b", {})
    assert rows[4] == Pair("3", "b", {})  # as in a split, a number is a name
    assert [str(row).removeprefix(f"{path}:")[:9] for row in rows[1:4] + rows[5:-1]] == [
        "2: not va", "4: expect", "5: expect", "7: not UT", "8: not va",
    ]  # fmt: skip


_SNLI_VE = {"Flickr30K_ID": "1", "pairID": "1#0r1n", "sentence2": "Hi.", "gold_label": "neutral"}
_OTHERS = {"pairID": "1#0r1n", "gold_label": "neutral"}


def _packed_json(path, row):
    path.write_bytes(gzip.compress(json.dumps(row).encode()))


def _csv(path, row):
    path.write_text("\n".join(",".join(cells) for cells in (row, row.values())))


def _parquet(path, row):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {"none": None}]), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl.gz", _packed_json), ("a.csv", _csv), ("a.parquet", _parquet)],
)
def test_a_row_of_snli_ve_is_a_pair_in_every_format(tmp_path, name, write):
    write(tmp_path / name, _SNLI_VE)
    (pair,) = _flat(tmp_path / name)
    assert pair[:2] == ("1", "Hi.")
    assert {key: pair.others[key] for key in _OTHERS} == _OTHERS
    # The keys of `predict` count where both are there.
    write(tmp_path / name, _SNLI_VE | {"image": "a.png", "hypothesis": "Ho."})
    assert _flat(tmp_path / name)[0][:2] == ("a.png", "Ho.")


def test_a_damaged_archive_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"image": "a", "hypothesis": "b"}\n' * 500)[:-9])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read"):
        _flat(path)


def test_json_too_deep_to_write_again_is_a_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"image": "a", "hypothesis": "b", "x": ' + "[" * 990 + "]" * 990 + "}")
    assert "nested too deeply" in str(_flat(path)[0])


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(tmp_path, delimiter):
    path = tmp_path / "pairs.csv"
    lines = [
        ["\ufeffid", "hypothesis", '"image"'],
        ["1", '"Two dogs\nrun, or; do\tthey ""run""?"', "a.png"],
        [],
        ["2", "short"],
        ["3", "Ein Hund.", "b.png", "more"],
    ]
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
    path.write_bytes("image,hypothesis\na.png,x\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"pairs\.csv:1: not UTF-8; convert the file\.$"):
        _flat(path)
    path.write_text("pic,sentence\na.png,x\n")
    said = r"pairs\.csv:1: columns pic, sentence; expected image and hypothesis, or SNLI-VE's\."
    for columns in ((), ("pic", "text"), (None, "sentence")):
        with pytest.raises(DataError, match=said):
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


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "_LONGEST_LINE_BYTES", 1 << 20)
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"0" * (2 << 20))
    with pytest.raises(DataError, match="a line of more than 1 MiB; expected JSON Lines or CSV"):
        _read(path)


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
