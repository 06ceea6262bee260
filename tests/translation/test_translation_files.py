"""Formats: the text is replaced, and everything else stays as it was."""

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clseave_cli.core.data.rows import packing, split_name
from clseave_cli.core.data.text_files import open_text_file
from clseave_cli.errors import DataError, UsageError

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)
_ANY_TEXT = st.text(st.characters(codec=None), max_size=30)


def _rewrite(path, answers=str.upper):
    """Translates a file by `answers`, leaving out the rows it has None for."""
    file = open_text_file(path, None, "en")
    buffer = io.BytesIO()
    with packing(path, buffer) as stream, file.writer(stream) as write:
        for row in file.rows():
            answer = answers(row.text)
            if answer is not None:
                write(row, answer, ("length",) if "odd" in row.text else ())
            elif not file.marks_rows:
                write(row, "", ())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.jsonl",
         '{"pairID":1.50,  "sentence2" : "a \\u00e4 dog" ,"x": [1e5, {"sentence2": "inner"}]}\r\n'
         "\n"
         '{"sentence2": "odd", "big": 123456789012345678901234567890, "e": "\\ud83d\\ude00"}\n'
         '{"q": "\\"sentence2\\": \\"no\\"", "sentence2": "first", "sentence2": "last"}',
         '{"pairID":1.50,  "sentence2" : "A Ä DOG" ,"x": [1e5, {"sentence2": "inner"}]'
         ', "sentence2_en": "a \\u00e4 dog"}\r\n'
         '{"sentence2": "ODD", "big": 123456789012345678901234567890, "e": "\\ud83d\\ude00"'
         ', "sentence2_en": "odd", "translation_suspect": ["length"]}\n'
         '{"q": "\\"sentence2\\": \\"no\\"", "sentence2": "first", "sentence2": "LAST"'
         ', "sentence2_en": "last"}\n'),
        ("x.tsv", '\ufeff"text"\t"n"\n"a"\t"1"\n',
         '\ufeff"text"\t"n"\t"text_en"\t"translation_suspect"\n"A"\t"1"\t"a"\t""\n'),
        ("x.txt", "a\r\n\ngone\nzwei\u2028drei\ntwo\nlast", "A\r\n\n\nZWEI DREI\nTW O\nLAST"),
    ],
)  # fmt: skip
def test_bytes_around_the_text_are_untouched(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    answers = {"gone": None, "two": "TW\nO"}
    written = _rewrite(tmp_path / name, lambda text: answers.get(text, text.upper()))
    assert written.decode() == expected


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(_ANY_TEXT, _JSON, max_size=4), _ANY_TEXT, _ANY_TEXT,
    st.booleans(), st.sampled_from([None, 1]),
)  # fmt: skip
def test_jsonl_of_any_shape(others, text, answer, ascii, indent):
    others.pop("sentence2_en", None)
    values = {**others, "sentence2": text, "last": {"sentence2": 1}}
    line = json.dumps(values, ensure_ascii=True, separators=(", ", " :  ") if indent else None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        if ascii:
            path.write_text(line + "\n")
        else:
            line = json.dumps(values, ensure_ascii=False)
            path.write_bytes(line.encode("utf-8", "ignore") + b"\n")
            values = json.loads(path.read_bytes())
        written = _rewrite(path, lambda _: answer)
    assert written.endswith(b"\n") and written.count(b"\n") == 1
    expected = {**values, "sentence2": answer, "sentence2_en": values["sentence2"]}
    marks = {"translation_suspect": ["length"]} if "odd" in values["sentence2"] else {}
    assert json.loads(written) == {**expected, **marks}
    assert list(json.loads(written)) == [*expected, *marks]


def test_csv_like_e_snli_ve(tmp_path):
    path = tmp_path / "esnlive_dev.csv"
    rows = [
        ["", "Flickr30kID", "hypothesis", "gold_label", "Explanation_1"],
        ["0", "1.jpg", 'A man, "tall".', "neutral", "two\nlines"],
        ["1", "2.jpg", "odd", "entailment", "nul\0"],
        ["2", "3.jpg", "gone", "entailment", "x" * 200_000],
    ]
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    path.write_text(text.getvalue(), newline="")
    written = _rewrite(path, lambda text: None if text == "gone" else text.upper())
    assert list(csv.reader(io.StringIO(written.decode(), newline=""))) == [
        [*rows[0], "hypothesis_en", "translation_suspect"],
        ["0", "1.jpg", 'A MAN, "TALL".', "neutral", "two\nlines", 'A man, "tall".', ""],
        ["1", "2.jpg", "ODD", "entailment", "nul\0", "odd", "length"],
    ]
    assert b'\r\n0,1.jpg,"A MAN, ""TALL"".",neutral' in written
    lines = [row.line for row in open_text_file(path, None, "en").rows()]
    assert lines == [2, 4, 5]


def test_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    columns = {
        "id": pa.array(range(5_000), pa.int16()),
        "hypothesis": pa.array([f"text {i}" for i in range(5_000)], pa.large_string()),
        "more": [{"a": [i, None]} for i in range(5_000)],
    }
    table = pa.table(columns).replace_schema_metadata({"origin": "here"})
    pq.write_table(table, path, compression="zstd", row_group_size=700)
    written = _rewrite(path, lambda text: None if text == "text 7" else text.upper())
    result = pq.read_table(io.BytesIO(written))
    kept = table.filter(pa.array(i != 7 for i in range(5_000)))
    texts = kept["hypothesis"].to_pylist()
    assert result.select(["id", "more"]) == kept.select(["id", "more"])
    assert result["hypothesis"].to_pylist() == [text.upper() for text in texts]
    assert result["hypothesis_en"].to_pylist() == texts
    assert result.schema.field("hypothesis").type == pa.large_string()
    assert result.schema.metadata == {b"origin": b"here"}
    metadata = pq.read_metadata(io.BytesIO(written))
    assert metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.jsonl", b'{"text": "a"}\n'), ("x.csv", b"text\na\n"), ("x.txt", b"a\n")],
)
def test_packed_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    written = _rewrite(tmp_path / f"{name}.gz")
    assert gzip.decompress(written) == _rewrite(tmp_path / name)
    assert written == _rewrite(tmp_path / f"{name}.gz")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"x\.jsonl:2: not valid JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r'x\.jsonl:2: "text" is missing'),
        ("x.jsonl", b'{"text": "a"}\n{"text": null}\n', r'x\.jsonl:2: "text" is null; expected a'),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"x\.jsonl:2: not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xed\xa0\x80"}\n', r"x\.jsonl:2: not UTF-8"),
        ("x.jsonl", '{"text": "é"}\n'.encode("utf-16-be"), r"x\.jsonl:1: not"),
        ("x.jsonl", b'{"id": 1}\n', "no field sentence2 or hypothesis or text; the fields"),
        ("x.csv", b"id,text\n1,a\n2,b,c\n", r"x\.csv:3: 3 cells; expected 2"),
        ("x.csv", b'id,text\n1,"a\n', r"x\.csv:2: not valid CSV"),
        ("x.csv", b"id,text\n1,\xff\n", r"x\.csv:2: not UTF-8"),
        ("x.csv", b"gr\xf6\xdfe,text\n1,a\n", r"x\.csv:1: not UTF-8"),
        ("x.csv", "id,text\n".encode("utf-16"), r"x\.csv:1: not UTF-8; convert the file\.$"),
        ("x.csv", "id,text\n".encode("utf-16-be"), r"x\.csv:1: not UTF-8; convert the file\.$"),
        ("x.csv", b"", "no field .* the fields are none. Choose one with --field"),
        ("x.txt", b"a\n\xff\n", r"x\.txt:2: not UTF-8"),
        ("x.parquet", b"PAR1 not really", "not a readable Parquet file"),
    ],
)
def test_damaged_files(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        list(open_text_file(tmp_path / name, None, "en").rows())


def test_files_of_no_known_kind(tmp_path):
    with pytest.raises(UsageError, match="unknown format; expected a name"):
        open_text_file(tmp_path / "x.docx", None, "en")
    with pytest.raises(DataError, match="no such file"):
        open_text_file(tmp_path / "x.jsonl", None, "en")
    assert split_name(Path("a/x.train.jsonl.gz")) == ("x.train", ".jsonl.gz")
    assert split_name(Path("a/notes.txt")) == ("notes", ".txt")
