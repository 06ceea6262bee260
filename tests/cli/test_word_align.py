"""`clseave word-align`: from text to links to a score, and what bad input gets."""

import json

import pytest
from tiny_world import edit_row, read_jsonl, write_jsonl, write_world


@pytest.fixture
def text(tmp_path):
    (tmp_path / "gold").write_text("1-1 2-2 3p4\n1-1 2p2\n")
    path = tmp_path / "text"
    path.write_text(
        "The square is red . ||| Das Quadrat ist rot .\nA dog waits . ||| Ein Hund wartet .\n"
    )
    return path


@pytest.fixture
def word_align(clseave):
    def run(*arguments):
        code, out, err = clseave("word-align", *arguments, "--device", "cpu")
        assert code == 0, err
        return out.splitlines()

    return run


def test_a_file_of_sentence_pairs(word_align, text, encoder, tmp_path):
    printed = word_align("--input", text, "--aligner", encoder)
    assert len(printed) == 2 and all("-" in link for line in printed for link in line.split())
    links = tmp_path / "links"
    assert word_align("--input", text, "--aligner", encoder, "--out", links) == []
    assert links.read_text().splitlines() == printed


def test_the_languages_of_a_data_folder(word_align, data, encoder, tmp_path):
    # The German file is in another order, and has a row that English has not.
    edit_row(data / "snli_ve_train.de.jsonl", 2, pairID="stray")
    words = tmp_path / "words"
    links = word_align("--data", data, "--lang", "de", "--aligner", encoder, "--words", words)
    german = [row["sentence2"] for row in read_jsonl(data / "snli_ve_train.de.jsonl")]
    shown = words.read_text().splitlines()
    assert len(links) == len(shown) == len(german) == 24
    assert (links[1], shown[1]) == ("", "")
    for line, sentence in zip(shown, german, strict=True):
        assert not line or line.endswith(f"||| {sentence}")
    assert [line for line in shown if line.startswith("A dog waits outside. ||| Draußen")]


def test_another_source_language(word_align, encoder, tmp_path):
    pytest.importorskip("rjieba")
    data = write_world(tmp_path / "data", languages=("en", "de", "zh"))
    edit_row(data / "snli_ve_train.de.jsonl", 2, pairID="stray")
    chinese = {r["pairID"]: r["sentence2"] for r in read_jsonl(data / "snli_ve_train.zh.jsonl")}
    rows = read_jsonl(data / "snli_ve_train.de.jsonl")
    words = tmp_path / "words"
    command = ["--data", data, "--source-lang", "zh", "--lang", "de", "--aligner", encoder]
    links = word_align(*command, "--words", words)
    shown = words.read_text().splitlines()
    assert (links[1], shown[1]) == ("", "")
    for row, line in zip(rows, shown, strict=True):
        if line:
            source, target = line.split(" ||| ")
            assert source.replace(" ", "") == chinese[row["pairID"]]
            assert target == row["sentence2"]
    # A segmenter found them: no spaces stand between them.
    assert any(line.startswith("方块 是 ") for line in shown)
    # Other aligners count the same words.
    text = ["--input", words, "--aligner", encoder]
    words.write_text("".join(f"{line}\n" for line in shown if line))
    assert word_align(*text) == [line for line in links if line]
    # Kept beside the translations, in place of a file.
    write_jsonl(
        data / "snli_ve_train.de.jsonl",
        [r | {"sentence2_zh": chinese.get(r["pairID"], "是")} for r in rows],
    )
    (data / "snli_ve_train.zh.jsonl").unlink()
    beside = word_align(*command)
    assert beside[1] and [*beside[:1], *beside[2:]] == [*links[:1], *links[2:]]
    # English is a language like any other.
    english = ["--data", data, "--source-lang", "de", "--lang", "en", "--aligner", encoder]
    assert len(word_align(*english)) == 24


def test_scoring_without_a_model(clseave, text, tmp_path):
    # Worked by hand: 4 links, 3 of them possible; 3 sure ones, 2 of them found.
    (tmp_path / "links").write_text("0-0 1-1 2-3\n1-1\n")
    arguments = ["--input", text, "--alignments", tmp_path / "links", "--gold", tmp_path / "gold"]
    code, out, err = clseave("word-align", *arguments, "--json")
    assert code == 0 and "words are counted from 1" in err
    assert json.loads(out) == {
        "precision": 1.0, "recall": 2 / 3, "error_rate": pytest.approx(1 - 6 / 7),
        "num_pairs": 2, "num_found": 4, "num_sure": 3, "num_possible": 5,
    }  # fmt: skip
    code, out, _ = clseave("word-align", *arguments)
    assert "alignment error rate 14.29% · precision 100.00% · recall 66.67%" in out


def test_the_best_layer_and_threshold_are_searched_on_gold(clseave, text, encoder, tmp_path):
    arguments = ["word-align", "--input", text, "--aligner", encoder, "--gold", tmp_path / "gold"]
    rates = {}
    for threshold in (0.001, 0.01, 0.05, 0.1, 0.2, 0.3):
        code, out, _ = clseave(*arguments, "--json", "--aligner-threshold", threshold)
        rates[threshold] = json.loads(out)["error_rate"]
    code, out, _ = clseave(*arguments, "--json", "--search")
    best = json.loads(out)
    assert code == 0 and best["layer"] == 1
    assert best["error_rate"] == min(rates.values()) == rates[best["threshold"]]
    options = f"best: --aligner-layer 1 --aligner-threshold {best['threshold']}"
    assert options in clseave(*arguments, "--search")[1]


@pytest.mark.parametrize(("name", "num_misnumbered"), [("enfr", 0), ("zhen", 0), ("jaen", 6)])
def test_real_gold_files(clseave, assets, tmp_path, name, num_misnumbered):
    """Human links, scored against themselves without an error."""
    text, gold = (assets / "alignment" / f"{name}.{kind}" for kind in ("src-tgt", "gold"))
    # As an aligner would write them: sure links alone, counted from 0.
    path, lines = tmp_path / "links", []
    sentences = text.read_text().splitlines()
    for line, pair in zip(gold.read_text().splitlines(), sentences, strict=True):
        source, target = (len(side.split()) for side in pair.split("|||"))
        links = [tuple(map(int, link.split("-"))) for link in line.split() if "-" in link]
        lines.append(
            " ".join(f"{i - 1}-{j - 1}" for i, j in links if i <= source and j <= target) + "\n"
        )
    path.write_text("".join(lines))
    arguments = ["word-align", "--input", text, "--alignments", path, "--gold", gold, "--json"]
    code, out, err = clseave(*arguments)
    assert code == 0 and "words are counted from 1" in err
    assert (f"{num_misnumbered} bad links skipped" in err) == (num_misnumbered > 0)
    score = json.loads(out)
    assert (score["precision"], score["recall"], score["error_rate"]) == (1, 1, 0)
    assert score["num_pairs"] == len(lines) and score["num_possible"] >= score["num_sure"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--input empty", 1, "empty:1: ||| occurs 0 times; expected source ||| target"),
        ("--input twice", 1, "twice:2: ||| occurs 2 times"),
        ("--input nowhere", 1, "nowhere: cannot be read"),
        ("--input text --aligner a/b/c", 1, "no such model folder"),
        ("--input text --aligner-layer 9", 2, "--aligner-layer 9: … has 1; choose from 1 to 1"),
        ("--input text --out data", 2, "--out data: is a folder; name a file, such as data/"),
        ("--input text --words data", 2, "--words data: is a folder; name a file, such as data/"),
        ("--input text --out new --words ./new", 2, "--out and --words: both are new; name two"),
        ("--data data", 2, "--lang is missing"),
        ("--data data --lang ko", 1, "no snli_ve_train.ko.jsonl"),
        ("--data data --lang en", 2, "--lang en: is --source-lang, too"),
        ("--data data --lang en --source-lang en", 2, "--lang en: is --source-lang, too"),
        ("--data data --lang de --source-lang ../x", 2, "--source-lang ../x: not a language code"),
        *(
            (f"--input text --gold-base 0 --alignments links {option} {name}", 1, message)
            for option, name, message in (
                ("--alignments", "long", "long:3: more lines than sentences"),
                ("--alignments", "word", "word:2: 0-9 names a word that does not exist; the target "
                 "sentence has 4"),
                ("--alignments", "none", "none:2: 'none' is no link"),
                ("--gold", "long", "long:3: more lines than sentences"),
                ("--gold", "none", "none:2: 'none' is no link"),
            )
        ),
    ],
)  # fmt: skip
def test_refusals(refused, text, encoder, data, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "empty": "a b c\n", "twice": "a ||| b\na ||| b ||| c\n", "links": "0-0\n0-0\n",
        "long": "0-0\n0-0\n0-0\n", "word": "0-0\n0-9\n", "none": "0-0\nnone\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content)
    aligner = [] if "--alignments" in arguments else ["--aligner", encoder]
    error = refused("word-align", *aligner, *arguments.split(), code=code)
    assert all(part in error for part in message.split(" … "))
