"""The whole use case: files in, files out, nothing lost and nothing asked for twice."""

import functools
import gzip
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from loopback import misbehave_at_random, translated
from tiny_world import CommandProcess, read_jsonl, write_jsonl

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.data.captions import read_captions
from clseave_cli.core.files import locked_target
from clseave_cli.core.translation.corpus import translate
from clseave_cli.core.translation.engine import Identity
from clseave_cli.core.translation.memory import Memory
from clseave_cli.errors import ClseaveError, DataError, TranslationError, UsageError

_ODD = [
    "emoji 😀 and 👩‍🚀 here",
    "combining e\u0301 and a\u030a\u0323 marks",
    "right-to-left עברית and العربية and \u202emirrored\u202c",
    "a line\nbreak and\r\nanother\u2028one",
    "a nul \0 inside",
    "six thousand " * 461,
    '{"sentence2": "looks like JSON", "a": [1]}',
    "<b>HTML &amp; entities</b>",
    "percent %41 + plus & and = ?",
    "back\\slash \\u0041 \\n and \"quotes\"",
    "\ufeffbyte order mark",
    "non\u00a0breaking \u3000 spaces",
    "...", "", "   ", "42", "😀", "\n\n",
]  # fmt: skip


def _write(path, texts, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"pairID": f"{index}.jpg", "sentence2": text, "gold_label": "neutral", **more}
        for index, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _numbered(count):
    return [f"A man number {index} sleeps." for index in range(count)]


def _run(folder, server=None, **options):
    defaults = {
        "data": folder, "lang": ("de",), "engine": "google", "requests_per_second": 1e6,
        "retry_seconds": 0.001, "timeout_seconds": 5.0, "url": server and server.url,
    }  # fmt: skip
    return translate(TranslateConfig(**{**defaults, **options}))


def test_all_splits_that_exist_in_several_languages(tmp_path, google, monkeypatch):
    _write(tmp_path / "snli_ve_train.jsonl", ["A man.", "A dog.", "A man."])
    _write(tmp_path / "snli_ve_test.jsonl", ["A dog.", "A cat."])
    summary = _run(tmp_path, google, lang=("de", "zh_CN"))
    assert [(f.output.name, f.num_rows, f.num_from_memory) for f in summary.files] == [
        ("snli_ve_train.de.jsonl", 3, 0), ("snli_ve_test.de.jsonl", 2, 1),
        ("snli_ve_train.zh.jsonl", 3, 0), ("snli_ve_test.zh.jsonl", 2, 1),
    ]  # fmt: skip
    assert read_jsonl(tmp_path / "snli_ve_train.de.jsonl")[2] == {
        "pairID": "2.jpg", "sentence2": "deA deman.", "gold_label": "neutral",
        "sentence2_en": "A man.",
    }  # fmt: skip
    assert Counter(google.requested) == {"A man.": 2, "A dog.": 2, "A cat.": 2}  # twice: two langs
    before = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    lookups, find = [], Memory.find
    monkeypatch.setattr(Memory, "find", lambda *a: lookups.append(a) or find(*a))
    again = _run(tmp_path, google, lang=("de", "zh"))
    assert len(google.requested) == 6 and len(lookups) == 4  # what is in the memory is read once
    assert [f.num_from_memory for f in again.files] == [3, 2, 3, 2]
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}


def test_captions_are_translated_for_pretraining(tmp_path, google):
    rows = [{"image": name, "caption": text} for name, text in (("a", "A man."), ("b", "A dog."))]
    write_jsonl(tmp_path / "captions_train.jsonl", rows)
    for split in ("train", "test"):  # of which only one has captions
        _write(tmp_path / f"snli_ve_{split}.jsonl", ["A man."])
    summary = _run(tmp_path, google, field="caption")
    assert [file.output.name for file in summary.files] == ["captions_train.de.jsonl"]
    captions = read_captions(tmp_path, "train", ("en", "de"))
    assert captions.texts["de"] == [["deA deman."], ["deA dedog."]]


def test_odd_text_goes_round(tmp_path, server):
    _write(tmp_path / "snli_ve_dev.jsonl", [*_ODD, "lone \ud800 surrogate"], note="\udfff")
    summary = _run(tmp_path, server, engine=server.kind)
    written = (tmp_path / "snli_ve_dev.de.jsonl").read_bytes().decode("utf-8", "surrogatepass")
    rows = [json.loads(line) for line in written.split("\n") if line]
    assert [row["sentence2_en"] for row in rows] == [*_ODD, "lone \ud800 surrogate"]
    assert {row["note"] for row in rows} == {"\udfff"}
    # Each word comes back with its mark, everything between words as it was.
    assert [row["sentence2"].replace("de", "") for row in rows] == [
        text.replace("de", "") for text in [*_ODD, "lone \ufffd surrogate"]
    ]
    assert all("de" in row["sentence2"] for row in rows[:12])
    assert summary.files[0].num_unchanged == 6 and summary.files[0].num_failed == 0
    assert rows[13]["translation_suspect"] == ["empty"]
    assert not any("\n" in text or "\0" in text for text in server.requested)


def test_faulty_server_every_row_ends_somewhere(tmp_path, libre):
    texts = _numbered(150)
    texts[40] = texts[90] = "A poison sentence."
    _write(tmp_path / "snli_ve_test.jsonl", texts)
    libre.fault = misbehave_at_random(seed=1)
    options = {"engine": "libre", "batch_size": 8, "timeout_seconds": 0.4, "retries": 8}
    summary = _run(tmp_path, libre, **options)
    (file,) = summary.files
    assert summary.stopped is None and file.num_failed == 2
    rows = read_jsonl(file.output)
    assert [(row["pairID"], row["sentence2"]) for row in rows] == [
        (f"{index}.jpg", translated(text))
        for index, text in enumerate(texts) if "poison" not in text
    ]  # fmt: skip
    failed = read_jsonl(file.failed)
    assert [(row["line"], row["pairID"], row["text"]) for row in failed] == [
        (41, "40.jpg", texts[40]), (91, "90.jpg", texts[40]),
    ]  # fmt: skip
    assert all("HTTP 500, 9 times" in row["reason"] for row in failed)
    libre.fault = None
    libre.requested.clear()
    healed = _run(tmp_path, libre, **options)
    assert libre.requested == ["A poison sentence."]  # only what had failed
    assert healed.files[0].failed is None and not file.failed.exists()
    assert len(read_jsonl(file.output)) == 150


def test_shut_out_half_way(tmp_path, google):
    texts = _numbered(200)
    _write(tmp_path / "snli_ve_dev.jsonl", texts)
    _write(tmp_path / "snli_ve_test.jsonl", texts)

    def shut(handler, body, asked):
        if len(google.requested) <= 50:
            return False
        handler.send(429, b"")
        return True

    google.fault = shut
    summary = _run(tmp_path, google)
    assert summary.stopped is not None and "keeps refusing" in summary.stopped
    (file,) = summary.files  # the second is not even tried
    rows, failed = read_jsonl(file.output), read_jsonl(file.failed)
    assert len(rows) + len(failed) == 200 and len(rows) >= 40
    assert sum(row["reason"].startswith("not asked: the service") for row in failed) > 100


def _prepare(rank=None):
    """What a process does first; of a rank, as torchrun would have it."""
    sys.modules["lingua"] = None  # slow to load, and not needed here
    if rank is not None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}


def _start(google, folder, *arguments, before=_prepare):
    command = ["translate", "--lang", "de", "--engine", "google", "--url", google.url,
               "--requests-per-second", 1e6, *arguments]  # fmt: skip
    return CommandProcess(*map(str, command), folder=folder, before=before)


def test_killed_again_and_again(tmp_path, google):
    """G8."""
    generator, concurrency = random.Random(3), 4
    data, memory = tmp_path / "data", tmp_path / "memory.sqlite"
    _write(data / "snli_ve_train.jsonl", [*_numbered(300), *_numbered(100)])
    output = data / "snli_ve_train.de.jsonl"

    def start(memory):
        options = ["--data", data, "--memory", memory, "--concurrency", concurrency]
        return _start(google, tmp_path, *options)

    assert start(tmp_path / "undisturbed.sqlite").wait() == 0
    expected = output.read_bytes()
    output.unlink()
    google.requested.clear()
    num_lost = 0
    for number in range(5):
        before = len(google.requested)
        # So far into the work, on average, that what is left lasts for the kills to come.
        left = (300 - len(set(google.requested))) / (5 - number + 1)
        wanted, process = before + generator.uniform(1, 1.5 * left), start(memory)
        while len(google.requested) < wanted and process.alive:
            time.sleep(0.0005)
        time.sleep(generator.uniform(0, 0.003))
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
        google.settle()
        asked = set(google.requested[before:])
        with Memory(memory) as kept:
            identity = kept.identity_id(Identity("google", google.url, "", "", "en", "de"))
            lost = asked - kept.find(identity, asked).keys()
        assert len(lost) <= concurrency
        num_lost += len(lost)
    assert start(memory).wait() == 0
    assert output.read_bytes() == expected
    assert len(google.requested) == 300 + num_lost
    assert {path.name for path in data.iterdir()} == {"snli_ve_train.jsonl", output.name}


@pytest.mark.parametrize("torchrun", [False, True])
def test_two_processes_divide_the_work(tmp_path, google, torchrun):
    texts = _numbered(600)
    _write(tmp_path / "snli_ve_dev.jsonl", texts)
    google.delay_seconds = 0.005
    outputs = [tmp_path / f"out{rank}" / "snli_ve_dev.de.jsonl" for rank in range(2)]
    processes = [
        _start(
            google, tmp_path / f"said{rank}", "--data", tmp_path, "--out", output.parent,
            before=functools.partial(_prepare, rank if torchrun else None),
        )
        for rank, output in enumerate(outputs)
    ]  # fmt: skip
    assert [process.wait() for process in processes] == [0, 0]
    # Asked for twice is only what both had under way.
    assert set(google.requested) == set(texts) and len(google.requested) < 1.1 * len(texts)
    assert outputs[1].exists() != torchrun
    for output in outputs[: 1 if torchrun else 2]:
        assert [row["sentence2"] for row in read_jsonl(output)] == [translated(t) for t in texts]


def test_suspect_rows(tmp_path, google):
    texts = ["A man sees 12 dogs.", "A cat sleeps in the sun."]
    _write(tmp_path / "snli_ve_dev.jsonl", texts)

    def lose_numbers(handler, body, asked):
        handler.send(200, body.replace(b"de12 ", b""), "text/html")
        return True

    google.fault = lose_numbers
    kept = _run(tmp_path, google).files[0]
    assert kept.suspicions["numerals"] == 1 and kept.num_dropped == 0
    rows = read_jsonl(kept.output)
    assert kept.num_suspect == sum("translation_suspect" in row for row in rows)
    assert "numerals" in rows[0]["translation_suspect"]
    dropped = _run(tmp_path, google, on_suspect="drop").files[0]
    assert dropped.num_dropped >= 1 and "12" not in dropped.output.read_text()
    rejected = read_jsonl(dropped.rejected)[0]
    assert list(rejected) == ["line", "pairID", "text", "translation", "reason"]
    assert [*rejected.values()][:4] == [1, "0.jpg", texts[0], "deA deman desees dedogs."]
    assert sorted(google.requested) == sorted(texts)
    google.fault = None
    retried = _run(tmp_path, google, on_suspect="retry").files[0]
    assert texts[0] in google.requested[2:] and "numerals" not in retried.suspicions
    assert read_jsonl(retried.output)[0]["sentence2"] == translated(texts[0])
    assert retried.rejected is None and not dropped.rejected.exists()
    num_requests = len(google.requested)
    _run(tmp_path, google, on_suspect="retry")
    assert len(google.requested) == num_requests  # a second chance, not a third


def test_a_file_of_somebody_else_is_not_replaced(tmp_path, google):
    """G2."""
    _write(tmp_path / "snli_ve_dev.jsonl", ["A man.", "A dog."])
    output = tmp_path / "snli_ve_dev.de.jsonl"
    review = tmp_path / "snli_ve_dev.de.review.md"
    output.write_text("made by hand\n")
    with pytest.raises(DataError, match=r"snli_ve_dev\.de\.jsonl: exists already.*--overwrite"):
        _run(tmp_path, google)
    assert output.read_text() == "made by hand\n" and google.requested == []
    _run(tmp_path, google, overwrite=True, review=2)
    written = output.read_bytes()
    _run(tmp_path, google, review=2)  # this one is ours
    assert output.read_bytes() == written and len(google.requested) == 2
    for path in (output, review):  # a correction, or an x where a translation is wrong
        content = path.read_text()
        path.write_text(content.replace("dog", "Hund"))
        with pytest.raises(DataError, match=rf"{path.name}: exists already"):
            _run(tmp_path, google, review=2)
        assert "Hund" in path.read_text()
        path.write_text(content)
    rejected = tmp_path / "snli_ve_dev.de.rejected.jsonl"
    rejected.write_text("set aside by another command\n")
    _run(tmp_path, google)
    assert rejected.exists()


@pytest.mark.parametrize("reason", ["no match", "dead server", "all suspect", "no rows"])
def test_a_result_without_a_translated_row_replaces_nothing(tmp_path, reason):
    source, output = tmp_path / "snli_ve_dev.jsonl", tmp_path / "snli_ve_dev.de.jsonl"
    _write(source, ["A man sees 3 dogs.", "42"])
    (tmp_path / "t.tsv").write_text("A man sees 3 dogs.\tEin Mann sieht Hunde.\n42\t42\n")
    options = {"engine": "file", "translations": tmp_path / "t.tsv"}
    _run(tmp_path, **options)
    before = output.read_bytes()
    if reason == "no match":
        (tmp_path / "t.tsv").write_text("A cat.\tEine Katze.\n")
    elif reason == "dead server":
        options = {"engine": "libre", "url": "http://127.0.0.1:9"}
    elif reason == "all suspect":
        _write(source, ["A man sees 3 dogs."])
        options["on_suspect"] = "drop"
    else:
        source.write_text("")
    summary = _run(tmp_path, **options).files[0]
    assert not summary.is_written and output.read_bytes() == before
    assert (summary.failed is not None) == (reason in ("no match", "dead server"))
    output.unlink()
    assert _run(tmp_path, **options).files[0].is_written == output.exists() == (reason == "no rows")


def test_google_is_asked_five_times_a_second_at_most(tmp_path, google):
    _write(tmp_path / "snli_ve_dev.jsonl", _numbered(4))
    _write(tmp_path / "snli_ve_test.jsonl", ["A dog.", "A cat."])
    start = time.monotonic()
    translate(TranslateConfig(data=tmp_path, lang=("de",), engine="google", url=google.url))
    # A busy machine makes requests late, never early.
    assert len(google.requested) == 6 and time.monotonic() - start >= 5 / 5


def test_a_wrong_address_ends_at_once(tmp_path, google):
    _write(tmp_path / "snli_ve_dev.jsonl", ["A man."] * 3)
    google.fault = lambda handler, body, texts: handler.send(404, b"") is None
    with pytest.raises(TranslationError, match=r"HTTP 404: is this the address of the service"):
        _run(tmp_path, google)
    assert not (tmp_path / "snli_ve_dev.de.jsonl").exists()


def test_two_at_one_output(tmp_path, google, monkeypatch):
    """G3."""
    monkeypatch.setenv("RANK", "1")  # left in the environment, without a launcher
    _write(tmp_path / "snli_ve_dev.jsonl", ["A man."])
    with (
        locked_target(tmp_path / "snli_ve_dev.de.jsonl"),
        pytest.raises(ClseaveError, match=r"snli_ve_dev\.de\.jsonl: another process is wri"),
    ):
        _run(tmp_path, google)
    assert google.requested == []
    assert _run(tmp_path, google).files[0].num_translated == 1


def test_review_sample(tmp_path, google):
    _write(tmp_path / "snli_ve_dev.jsonl", [f"A | man\n{i} <b>." for i in range(50)])
    review = _run(tmp_path, google, review=6).files[0].review
    first = review.read_text(encoding="utf-8")
    lines = [line for line in first.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 6
    assert r"A \| man<br>" in first and r"\<b>" in first
    _run(tmp_path, google, review=6)
    assert review.read_text(encoding="utf-8") == first
    _run(tmp_path, google, review=6, seed=1)
    assert review.read_text(encoding="utf-8") != first


def test_the_suspect_half_of_a_sample_is_drawn_at_random(tmp_path):
    texts = [f"A man sees {n} dogs." for n in range(6)] + [f"Man {c}." for c in "abcdef"]
    _write(tmp_path / "snli_ve_dev.jsonl", texts)
    translations = [text.replace("A man sees", "Mann").rstrip("0123456789 dogs.") for text in texts]
    lines = [f"{text}\t{answer}\n" for text, answer in zip(texts, translations, strict=True)]
    (tmp_path / "t.tsv").write_text("".join(lines))
    options = {"engine": "file", "translations": tmp_path / "t.tsv", "review": 6}
    drawn = set()
    for seed in range(8):
        review = _run(tmp_path, **options, seed=seed).files[0].review
        rows = [line for line in review.read_text().splitlines() if "numerals" in line]
        assert len(rows) == 3
        drawn.add(tuple(rows))
    assert len(drawn) > 4


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dev.txt", "A man.\n\nA dog.\n"),
        ("dev.csv.gz", "id,text\n1,A man.\n2,A dog.\n"),
        ("dev.tsv", "id\ttext\n1\tA man.\n2\tA dog.\n"),
    ],
)
def test_other_files(tmp_path, google, name, content):
    pack, unpack = (gzip.compress, gzip.decompress) if name.endswith("gz") else (bytes, bytes)
    (tmp_path / name).write_bytes(pack(content.encode()))
    file = _run(tmp_path, google, input=(tmp_path / name,), out=tmp_path / "out").files[0]
    assert file.output == tmp_path / "out" / name.replace("dev.", "dev.de.")
    text = unpack(file.output.read_bytes()).decode()
    assert "deA deman." in text and "deA dedog." in text
    assert len(text.splitlines()) == len(content.splitlines())
    if name == "dev.txt":
        assert text == "deA deman.\n\ndeA dedog.\n"
        assert read_jsonl(file.suspect)[0]["reason"] == "suspect: empty"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("t.tsv", "pairID\ttranslation\n1.jpg\tHund\n0.jpg\tMann\n", "auto"),
        ("t.tsv", "A dog.\tHund\nA man.\tMann\nA dog.\tRüde\n", "auto"),
        ("t.tsv", "0.jpg\tMann\n1.jpg\tHund\n", "pairID"),
        ("t.jsonl", '{"pairID": "0.jpg", "sentence2": "Mann"}\n'
         '{"pairID": "1.jpg", "sentence2": "Hund"}\n', "auto"),
        ("t.jsonl", '{"pairID": "9", "sentence2": "Mann", "sentence2_en": "A man."}\n'
         '{"pairID": "8", "sentence2": "Hund", "sentence2_en": "A dog."}\n', "text"),
        ("t.jsonl", '{"source": "A man.", "translation": "Mann"}\n'
         '{"source": "A dog.", "translation": "Hund"}\n', "auto"),
    ],
)  # fmt: skip
def test_existing_translations(tmp_path, name, content, match):
    _write(tmp_path / "snli_ve_dev.jsonl", ["A man.", "A dog.", "A cat\nsleeps."])
    (tmp_path / name).write_text(content, encoding="utf-8")
    summary = _run(tmp_path, engine="file", translations=tmp_path / name, match=match)
    (file,) = summary.files
    assert [row["sentence2"] for row in read_jsonl(file.output)] == ["Mann", "Hund"]
    assert "has no translation for it" in read_jsonl(file.failed)[0]["reason"]
    assert summary.engine == "file" and len(summary.revision) == 16  # the file's digest


def test_a_gap_far_into_a_file_is_filled(tmp_path):
    """The rows before it have been written when it is met; they are written anew."""
    translations = tmp_path / "t.tsv"
    translations.write_text("".join(f"man {n}\tMann {n}\n" for n in range(10_050)))
    options = {"engine": "file", "translations": translations}
    for num_rows in (10_020, 10_050):
        _write(tmp_path / "snli_ve_dev.jsonl", [f"man {n}" for n in range(num_rows)])
        file = _run(tmp_path, **options).files[0]
        written = [row["sentence2"] for row in read_jsonl(file.output)]
        assert written == [f"Mann {n}" for n in range(num_rows)]
    assert (file.num_rows, file.num_from_memory, file.num_translated) == (10_050, 10_020, 30)
    assert len(list(tmp_path.glob(".*"))) == 0  # nothing half-written


def test_an_engine_of_another_package(tmp_path, monkeypatch):
    info = tmp_path / "shouting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[clseave.translation_engines]\nshout = shouting_engine:Engine\n"
    )
    (tmp_path / "shouting_engine.py").write_text(
        "from clseave_cli.core.translation.engine import Identity, Limits\n"
        "class Engine:\n"
        "    licence = 'public domain'\n"
        "    limits = Limits(5, 1000, 100, 1)\n"
        "    def __init__(self, config, source, target):\n"
        "        self.identity = Identity('shout', '', '1', '', source, target)\n"
        "    def translate(self, texts, attempt):\n"
        "        return [text.upper() for text in texts]\n"
        "    def close(self): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _write(tmp_path / "snli_ve_dev.jsonl", ["A man.", "A dog."])
    summary = _run(tmp_path, engine="shout")
    assert [row["sentence2"] for row in read_jsonl(summary.files[0].output)] == ["A MAN.", "A DOG."]
    assert summary.licence == "public domain"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "babel", "data": Path("nowhere")}, UsageError, "no such engine"),
        ({"lang": ()}, UsageError, "--lang is missing"),
        ({"lang": ("en",)}, UsageError, "the language of the input"),
        ({"lang": ("german",)}, UsageError, "not a language code"),
        ({"split": ("train",)}, DataError, r"snli_ve_train\.jsonl: no such file"),
        ({"data": Path("nowhere")}, DataError, r"nowhere: no snli_ve_train\.jsonl"),
        ({"field": "caption"}, DataError, r'snli_ve_dev\.jsonl:1: "caption" is missing'),
        ({"beams": 0}, UsageError, "--beams 0: expected at least 1"),
        ({"requests_per_second": -1.0}, UsageError, "--requests-per-second"),
        ({"retries": -1}, UsageError, "--retries -1: expected at least 0"),
        ({"engine": "file"}, UsageError, "--translations is missing"),
        ({"input": (Path("a/x.txt"), Path("b/x.txt")), "out": Path("c")}, UsageError, "two inputs"),
        ({"data": Path("damaged")}, DataError, r"snli_ve_dev\.jsonl:3: not valid JSON"),
        ({"engine": "file", "translations": "different.tsv"}, DataError,
         r"different\.tsv:3: a second, different translation for pairID 1"),
        ({"engine": "file", "translations": "wide.tsv"}, DataError,
         r"wide\.tsv:1: 3 columns; expected two"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, google, monkeypatch, options, error, message):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "snli_ve_dev.jsonl", ["A man."])
    _write(tmp_path / "damaged" / "snli_ve_dev.jsonl", ["A man.", "A dog."])
    with (tmp_path / "damaged" / "snli_ve_dev.jsonl").open("a") as stream:
        stream.write("{oops\n")
    (tmp_path / "different.tsv").write_text("pairID\tx\n1\tHund\n1\tKatze\n")
    (tmp_path / "wide.tsv").write_text("a\tb\tc\n")
    with pytest.raises(error, match=message):
        _run(tmp_path, google, **options)
    assert google.requested == [] and not list(tmp_path.rglob("*.de.*"))
