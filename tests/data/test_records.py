import csv
import errno
import gzip
import io
import json
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny_world import Notes, read_jsonl, write_jsonl

from clseave_cli.core.data.records import (
    check_leak,
    hold_out_images,
    image_stem,
    join,
    languages,
    read_split,
    require_language,
    split_path,
)
from clseave_cli.errors import DataError, UsageError
from clseave_cli.labels import LABEL_IDS, UNLABELLED


def row(number, **changes):
    base = {
        "pairID": f"p{number}",
        "Flickr30K_ID": f"{number}.jpg",
        "sentence1": "a caption",
        "sentence2": f"sentence {number}",
        "gold_label": "neutral",
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


@pytest.fixture
def write(tmp_path):
    def write(rows, name="snli_ve_train.jsonl"):
        write_jsonl(tmp_path / name, rows)
        return tmp_path

    return write


def test_columns_hold_what_the_rows_say_without_byte_order_mark_and_empty_lines(tmp_path):
    second = row(2, gold_label="contradiction", Flickr30K_ID="1.jpg")
    lines = [
        json.dumps(each).encode() for each in (row(1, gold_label="entailment"), second, row(3))
    ]
    path = tmp_path / "snli_ve_train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n\n  \n")
    split = read_split(tmp_path, "train")
    assert split.pair_ids == ["p1", "p2", "p3"]
    assert split.hypotheses == ["sentence 1", "sentence 2", "sentence 3"]
    assert split.labels.tolist() == [0, 2, 1]
    assert split.image_names == ["1.jpg", "3.jpg"]
    assert split.image_index.tolist() == [0, 0, 1]
    assert split.lines.tolist() == [1, 2, 3]
    assert split.where(1) == f"{path}:2"


@pytest.mark.parametrize("key", ["Flickr30K_ID", "Flikr30kID", "Flickr30kID", "image"])
def test_every_spelling_of_the_image_key_is_read_and_a_number_is_a_name(write, key):
    rows = [row(1, **{"Flickr30K_ID": None, key: 7}), row(2, **{"Flickr30K_ID": None, key: "8"})]
    assert read_split(write(rows), "train").image_names == ["7", "8"]


def test_rows_without_majority_are_dropped_and_counted(write):
    folder = write([row(1), row(2, gold_label="-"), row(3, gold_label="-"), row(4)])
    notes = Notes()
    split = read_split(folder, "train", progress=notes)
    assert split.pair_ids == ["p1", "p4"]
    assert split.lines.tolist() == [1, 4]
    assert "2 rows without a majority label" in notes.text
    text = read_split(folder, "train", labelled=False)
    assert text.labels.tolist() == [1, UNLABELLED, UNLABELLED, 1]


@pytest.mark.parametrize(("kind", "line"), [("jsonl", 1), ("csv", 2)])
def test_text_needs_neither_label_nor_image(tmp_path, write, kind, line):
    if kind == "csv":
        _csv(tmp_path, ("p1", "", "a", "", ""), ("p2", "", "b", "neutral", ""), _cells(3))
    else:
        write([row(1, gold_label=None, Flickr30K_ID=None), row(2, Flickr30K_ID=None), row(3)])
    split = read_split(tmp_path, "train", labelled=False, with_images=False)
    assert split.labels.tolist() == [UNLABELLED, LABEL_IDS["neutral"], LABEL_IDS["neutral"]]
    assert split.image_index.tolist() == [-1, -1, 0] and split.image_names == ["3.jpg"]
    with pytest.raises(DataError, match=rf"train.{kind}:{line}: no gold_label; expected one of"):
        read_split(tmp_path, "train")


_DEEP_LIST = json.loads("[" * 900 + "]" * 900)
#: A second line, as text or JSON, by a part of its error.
BAD_ROWS = {
    "not valid JSON": '{"pairID": "p2", ',
    "not valid JSON (Exceeds": '{"pairID": ' + "1" * 5000 + "}",
    "expected a JSON object, found list": [1, 2],
    "no pairID": row(2, pairID=None),
    "pairID is 2; expected": row(2, pairID=2),
    "no sentence2; expected the hypothesis": row(2, sentence2=None),
    "no sentence2 (the row has 'sentense2')": row(2, sentence2=None, sentense2="x"),
    "sentence2 is empty": row(2, sentence2="  \t"),
    "sentence2 has half a surrogate pair": row(2, sentence2="a \ud83d b"),
    "sentence2_en has half a surrogate pair": row(2, sentence2_en="a \ud83d b"),
    "sentence2_en is empty; expected the sentence": row(2, sentence2_en=" "),
    "no gold_label (the row has 'gold_lable')": row(2, gold_label=None, gold_lable="neutral"),
    "gold_label is [[[[[[[...]]]]]]]; expected": row(2, gold_label=_DEEP_LIST),
    "no gold_label": row(2, gold_label=None),
    "'maybe'; expected one of entailment, neutral, contradiction": row(2, gold_label="maybe"),
    "no Flickr30K_ID": row(2, Flickr30K_ID=None),
    "Flickr30K_ID is ['x']": row(2, Flickr30K_ID=["x"]),
    "pairID 'p1' is also in line 1": row(1, sentence2="again"),
    "not valid JSON (": "[" * 100_000,
}


@pytest.mark.parametrize(("reason", "bad"), BAD_ROWS.items(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_by_file_and_line(tmp_path, reason, bad):
    path = tmp_path / "snli_ve_train.jsonl"
    text = bad if isinstance(bad, str) else json.dumps(bad)
    path.write_text("\n".join([json.dumps(row(1)), text, json.dumps(row(3))]) + "\n")
    if reason == "not valid JSON (":
        reason = ""  # nested too deeply or a syntax error, depending on the Python
    with pytest.raises(DataError) as refusal:
        read_split(tmp_path, "train")
    message = str(refusal.value)
    assert message.startswith(f"{path}:2: ") and reason in message and "--skip-bad" in message

    notes = Notes()
    split = read_split(tmp_path, "train", skip_bad=True, progress=notes)
    assert split.pair_ids == ["p1", "p3"]
    (rejected,) = read_jsonl(tmp_path / "snli_ve_train.rejected.jsonl")
    assert rejected["line"] == 2 and reason in rejected["reason"]
    assert rejected["row"] in (text, bad)
    assert "1 bad rows set aside" in notes.text and "snli_ve_train.rejected.jsonl" in notes.text

    read_split(tmp_path, "train", skip_bad=True)  # replaces its file, but none of the user's
    write_jsonl(tmp_path / "snli_ve_train.rejected.jsonl", [{"line": 2, "note": "the user's"}])
    with pytest.raises(DataError, match="--skip-bad did not write it; move it away"):
        read_split(tmp_path, "train", skip_bad=True)
    assert "the user's" in (tmp_path / "snli_ve_train.rejected.jsonl").read_text()


def _impossible_date():
    ids = pyarrow.array([2**62], pyarrow.timestamp("us"))
    table = pyarrow.table({"pairID": ids, "sentence2": ["a"], "gold_label": ["neutral"]})
    pyarrow.parquet.write_table(table, stream := io.BytesIO())
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b'\n{"pairID": "\xff\xfe"}\n', r"train\.jsonl:2: not UTF-8; convert"),
        ("train.csv", b"pairID,sentence2\np1,\xff\xfe\n", r"train\.csv:2: not UTF-8"),
        ("train.jsonl", b"\n", r"train\.jsonl: no usable rows; expected one JSON object a line"),
        ("train.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-9], r"jsonl\.gz: damaged or cut short"),
        ("train.parquet", _impossible_date(), r"not a readable Parquet file \(date"),
    ],
)
def test_bytes_that_are_no_rows_are_one_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_split(tmp_path, "train", labelled=False, with_images=False)


def test_skipping_bad_rows_where_all_are_bad_says_what_is_wrong_with_them(write):
    folder = write([row(1, gold_label=None), row(2, gold_label=None)])
    with pytest.raises(DataError, match=r"no usable rows; all 2 are bad, as line 1: no gold_label"):
        read_split(folder, "train", skip_bad=True)
    assert [path.name for path in folder.iterdir()] == ["snli_ve_train.jsonl"]


@pytest.mark.parametrize(
    ("skip", "ids", "note"),
    [
        (None, ["p1", "p2", "p3"], None),
        (False, ["p1", "p2", "p3"], "1 rows marked translation_suspect used; --skip-suspect"),
        (True, ["p2", "p3"], "1 rows marked translation_suspect skipped."),
    ],
)
def test_suspect_translations_are_counted_or_left_out(write, skip, ids, note):
    folder = write([row(1, translation_suspect=["copy"]), row(2), row(3, translation_suspect=[])])
    notes = Notes()
    assert read_split(folder, "train", skip_suspect=skip, progress=notes).pair_ids == ids
    assert note in notes.text if note else not notes.text


def _csv(folder, *cells, delimiter=",", name="train.csv"):
    lines = [("pairID", "Flickr30K_ID", "sentence2", "gold_label", "comment"), *cells]
    (folder / name).write_text("".join(delimiter.join(line) + "\n" for line in lines))
    return folder


def _cells(number, comment="c"):
    return (f"p{number}", f"{number}.jpg", f"sentence {number}", "neutral", comment)


@pytest.mark.parametrize(
    ("comments", "line", "message"),
    [
        # A stray quote that nothing closes; one that another closes, in the middle of a cell, or at
        # the end of one; and one that closes in front of other text.
        (["c", '"c', "c", "c"], 3, "unexpected end of data"),
        (["c", '"c', "c", '"c'], 3, "expected after"),
        (["c", '"c', "c", 'c"'], 3, "the lines of several rows in one cell"),
        (["c", "c", '"c" c', "c"], 4, "expected after"),
        (["c", "c", "c,c", "c"], 4, "6 cells; expected 5, as in the header"),
    ],
)
def test_a_stray_quote_in_a_column_nobody_reads_costs_one_row(tmp_path, comments, line, message):
    _csv(tmp_path, *(_cells(n, comment) for n, comment in enumerate(comments)))
    with pytest.raises(DataError, match=rf"train\.csv:{line}: .*{message}.*--skip-bad"):
        read_split(tmp_path, "train")
    bad = {line, 5} if comments[3] == '"c' else {line}  # the other stray quote
    split = read_split(tmp_path, "train", skip_bad=True)
    assert split.lines.tolist() == [n for n in range(2, 6) if n not in bad]
    assert split.num_lines == 5


def test_cells_of_several_lines_are_no_stray_quotes(tmp_path):
    prose = '"one, two, three, four,\nfive, six, seven, eight, nine\nand ""ten"",a,b,c,d"'
    split = read_split(_csv(tmp_path, _cells(1, prose), _cells(2)), "train")
    assert split.lines.tolist() == [2, 5]


@pytest.mark.parametrize("name", ["train.tsv", "train.csv.gz", "train.jsonl.gz"])
def test_packed_files_and_other_delimiters(tmp_path, name):
    _csv(tmp_path, _cells(1), _cells(2), delimiter="\t" if "tsv" in name else ";", name="train.tsv")
    if name.endswith(".gz"):
        content = (tmp_path / "train.tsv").read_bytes()
        (tmp_path / "train.tsv").unlink()
        if "jsonl" in name:
            content = json.dumps(row(1)).encode() + b"\n" + json.dumps(row(2)).encode()
        (tmp_path / name).write_bytes(gzip.compress(content))
    split = read_split(tmp_path, "train")
    assert split.pair_ids == ["p1", "p2"] and split.image_names == ["1.jpg", "2.jpg"]
    assert languages(tmp_path, "train") == ["en"]


def test_a_wide_column_that_nobody_reads_takes_no_memory(tmp_path):
    rows = [row(n) | {"wide": "x" * (1 << 20)} for n in range(1000)]
    table = pyarrow.Table.from_pylist(rows[:1])
    with pyarrow.parquet.ParquetWriter(tmp_path / "train.parquet", table.schema) as writer:
        for start in range(0, len(rows), 50):
            writer.write_table(pyarrow.Table.from_pylist(rows[start : start + 50]))
    assert (tmp_path / "train.parquet").stat().st_size < 10 << 20
    script = """
import pathlib, re, sys
from clseave_cli.core.data.records import read_split
assert len(read_split(pathlib.Path(sys.argv[1]), "train")) == 1000
print(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""
    peak = subprocess.check_output([sys.executable, "-c", script, tmp_path], text=True)
    assert int(peak) < 500_000, "KiB"


@pytest.mark.parametrize("method", ["open", "is_file"])
def test_a_file_that_may_not_be_read_is_one_error(write, monkeypatch, method):
    folder = write([row(1)])

    def refuse(self, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(folder), method, refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        read_split(folder, "train")


def test_images_are_held_out_with_all_their_rows(write):
    folder = write([row(n, Flickr30K_ID=f"{n % 10}{'.jpg' * (n < 30)}") for n in range(60)])
    split, notes = read_split(folder, "train"), Notes()
    kept, held = hold_out_images(split, "dev", 0.2, 0, notes)
    assert (kept.name, held.name) == ("train", "dev")
    assert len(kept) == 48 and len(held) == 12
    assert sorted(kept.pair_ids + held.pair_ids) == sorted(split.pair_ids)
    check_leak(kept, held)
    assert "no file for the split dev; holding out 2 of 10 images" in notes.text
    again = hold_out_images(split.take(np.arange(59, -1, -1)), "dev", 0.2, 0)[1]
    assert set(again.pair_ids) == set(held.pair_ids)
    assert set(hold_out_images(split, "dev", 0.2, 1)[1].pair_ids) != set(held.pair_ids)
    with pytest.raises(DataError, match=r"10 images are too few to hold out 100% of them"):
        hold_out_images(split, "dev", 1.0, 0)


def test_csv_and_parquet_equal_jsonl(tmp_path):
    rows = [
        row(1, sentence2='He said "no", twice.'),
        row(2, sentence2="zwei\nZeilen; 日本語", gold_label="entailment"),
        row(3, gold_label="-"),
        row(4, Flickr30K_ID="1.jpg", gold_label="contradiction"),
    ]
    write_jsonl(tmp_path / "jsonl.jsonl", rows)
    with (tmp_path / "csv.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "parquet.parquet")

    reference, *others = (read_split(tmp_path, kind) for kind in ("jsonl", "csv", "parquet"))
    for split in others:
        assert split.pair_ids == reference.pair_ids == ["p1", "p2", "p4"]
        assert split.hypotheses == reference.hypotheses
        assert split.labels.tolist() == reference.labels.tolist() == [1, 0, 2]
        assert split.image_names == reference.image_names
        assert split.image_index.tolist() == reference.image_index.tolist()


def test_a_damaged_parquet_file_is_refused_wherever_the_damage_is(tmp_path):
    path = tmp_path / "snli_ve_train.parquet"
    table = pyarrow.Table.from_pylist([row(n) for n in range(20)])
    pyarrow.parquet.write_table(table, path, compression="none")
    sound = path.read_bytes()
    refusals = 0
    for place in range(0, len(sound), 11):
        damaged = bytearray(sound)
        damaged[place] ^= 0x80
        path.write_bytes(damaged)
        try:
            read_split(tmp_path, "train")
        except DataError as error:
            refusals += 1
            assert str(path) in str(error)
    assert refusals > 5
    path.write_bytes(sound[:-30])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_split(tmp_path, "train")


def test_what_is_missing_is_named(tmp_path, write):
    with pytest.raises(DataError, match="no such data folder"):
        read_split(tmp_path / "nowhere", "train")
    write([row(1)], "snli_ve_train.nl.jsonl")
    with pytest.raises(DataError, match=r"no snli_ve_train.de.jsonl \(.*: en, nl\).*--lang de"):
        read_split(write([row(1)]), "train", "de")


def test_files_of_a_language(write):
    folder = write([row(1)])
    for suffix in ("train.zh-Hant", "train.rejected", "dev.nl"):
        write([row(1)], f"snli_ve_{suffix}.jsonl")
    write([row(1)], "train.de.csv")
    assert languages(folder, "train") == ["en", "de", "zh-Hant"]
    assert split_path(folder, "train", "de") == folder / "train.de.csv"
    assert split_path(folder, "train", "ja") is None


def test_a_folder_a_language(tmp_path):
    """As IGLUE lays XVNLI out: annotations/fr/test.jsonl."""
    for lang in ("en", "fr", "zh-Hant", "images", "ru"):
        (tmp_path / lang).mkdir()
        if lang != "ru":
            write_jsonl(tmp_path / lang / "test.jsonl", [row(1, sentence2=lang)])
    assert languages(tmp_path, "test") == ["en", "fr", "zh-Hant"]
    assert read_split(tmp_path, "test", "fr").hypotheses == ["fr"]
    assert read_split(tmp_path, "test").hypotheses == ["en"]


@pytest.mark.parametrize("lang", ["", "german", "../de", "DE", "de.jsonl", "d", "de-"])
def test_what_is_no_language_code_is_refused(lang):
    with pytest.raises(UsageError, match="not a language code"):
        require_language(lang)


@pytest.fixture
def joined(write):
    """German rows joined with English ones."""

    def joined(german, english):
        folder = write(german, "snli_ve_train.de.jsonl")
        source = read_split(write(english), "train") if english else None
        return join(read_split(folder, "train", "de"), source)

    return joined


def test_languages_meet_by_pair_id_in_any_order_and_unmatched_rows_are_named(joined):
    order = np.random.default_rng(3).permutation(20)
    pairs = joined([row(n, sentence2=f"Satz {n}") for n in order], [row(n) for n in range(20)])
    assert pairs.target.hypotheses == [f"Satz {n}" for n in order]
    assert pairs.sources == [f"sentence {n}" for n in order]
    assert (pairs.num_unmatched_target, pairs.num_unmatched_source) == (0, 0)
    pairs = joined([row(n) for n in (9, 4, 2, 8, 7)], [row(n) for n in (1, 2, 3, 4)])
    assert pairs.target.pair_ids == ["p4", "p2"]
    assert pairs.sources == ["sentence 4", "sentence 2"]
    assert (pairs.num_unmatched_target, pairs.num_unmatched_source) == (3, 2)
    assert set(pairs.unmatched_examples) <= {"p9", "p8", "p7", "p1", "p3"}
    assert len(pairs.unmatched_examples) == 3


def test_languages_that_share_no_row_are_refused(joined):
    with pytest.raises(DataError, match=r"none of its pairIDs occurs.*'p2'.*'p1'"):
        joined([row(2)], [row(1)])


def test_the_english_sentence_kept_beside_a_translation_will_do(joined):
    translated = row(1, sentence2="Satz", sentence2_en="sentence")
    assert joined([translated], None).sources == ["sentence"]
    with pytest.raises(DataError, match=r"de\.jsonl:2: no sentence2_en, nor in 0 other rows of 2"):
        joined([translated, row(2)], None)
    assert len(joined([translated, row(2)], [row(1), row(2)]).sources) == 2


def test_taking_rows_keeps_columns_together(write):
    folder = write([row(1), row(2, Flickr30K_ID=None), row(3), row(4, Flickr30K_ID="3.jpg")])
    split = read_split(folder, "train", with_images=False)
    taken = split.take(np.array([3, 1, 2]))
    assert taken.pair_ids == ["p4", "p2", "p3"]
    assert taken.lines.tolist() == [4, 2, 3]
    names = [taken.image_names[i] if i >= 0 else None for i in taken.image_index]
    assert names == ["3.jpg", None, "3.jpg"]
    assert split.take(np.array([2])).image_index.tolist() == [0]


def test_an_image_in_two_splits_is_a_leak(write):
    train = read_split(write([row(1), row(2)]), "train")
    write([row(2, Flickr30K_ID="2"), row(3)], "snli_ve_dev.jsonl")
    with pytest.raises(DataError, match=r"1 of its images are also in .*such as 2; .*--allow-leak"):
        check_leak(train, read_split(train.path.parent, "dev"))
    check_leak(train, read_split(write([row(3)], "snli_ve_dev.jsonl"), "dev"))


@pytest.mark.parametrize("extension", ["", ".jpg", ".jpeg", ".png", ".JPG"])
@pytest.mark.parametrize("stem", ["123", "a.b", "scene-1-0", ".jpg", "x.longextension", "IMG.2019"])
def test_the_stem_of_an_image_name_is_all_before_its_extension(stem, extension):
    assert image_stem(stem + extension) == stem


def test_xvnli_is_read_as_it_is(assets):
    folder = assets / "text" / "xvnli"
    rows = {row["pairID"]: row for row in read_jsonl(folder / "test.en.jsonl")}
    notes = Notes()
    english = read_split(folder, "test", "en", progress=notes)
    unlabelled = sum(row["gold_label"] == "-" for row in rows.values())
    assert unlabelled > 0 and len(english) == len(rows) - unlabelled
    assert f"{unlabelled} rows without a majority label" in notes.text
    assert languages(folder, "test") == ["en", "ar", "es", "fr", "ru"]

    pairs = join(read_split(folder, "test", "fr"), english)
    for number in range(0, len(pairs.sources), 97):
        row = rows[pairs.target.pair_ids[number]]
        assert pairs.sources[number] == row["sentence2"]
        image = pairs.target.image_names[pairs.target.image_index[number]]
        assert image == row["Flikr30kID"]


def test_sick_is_parallel_text_without_images(assets):
    folder = assets / "text" / "sick"
    english, dutch = (
        read_split(folder, "sick", lang, labelled=False, with_images=False) for lang in ("en", "nl")
    )
    pairs = join(dutch, english)
    raw = {r["pairID"]: r["sentence2"] for r in read_jsonl(folder / "sick.en.jsonl")}
    assert len(pairs.sources) > 9000
    assert [raw[pair_id] for pair_id in pairs.target.pair_ids] == pairs.sources
    assert dutch.image_names == []


def test_nlvr_has_two_labels_and_no_leak(assets):
    folder = assets / "nlvr_ve"
    train, dev = read_split(folder, "train"), read_split(folder, "dev")
    assert set(train.labels.tolist()) == {LABEL_IDS["entailment"], LABEL_IDS["contradiction"]}
    check_leak(train, dev)
