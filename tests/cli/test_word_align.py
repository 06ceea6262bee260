"""`clseave word-align`: from text to links to a score, and what bad input gets."""

import json

import pytest
from tiny_world import edit_row, read_jsonl, write_jsonl, write_world

SOURCE_TARGET = """The square is red . ||| Das Quadrat ist rot .
A dog waits . ||| Ein Hund wartet .
"""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text(SOURCE_TARGET)
    return path


def _links(clseave, *arguments):
    code, out, err = clseave("word-align", *arguments, "--device", "cpu")
    assert code == 0, err
    return out.splitlines()


def test_a_file_of_sentence_pairs(clseave, text, encoder, tmp_path):
    printed = _links(clseave, "--input", text, "--aligner", encoder)
    assert len(printed) == 2
    assert all("-" in link for line in printed for link in line.split())
    links = tmp_path / "links"
    assert _links(clseave, "--input", text, "--aligner", encoder, "--out", links) == []
    assert links.read_text().splitlines() == printed


def test_the_languages_of_a_data_folder(clseave, data, encoder, tmp_path):
    # The German file is in another order, and has a row that English has not.
    edit_row(data / "snli_ve_train.de.jsonl", 2, pairID="stray")
    words = tmp_path / "words"
    links = _links(clseave, "--data", data, "--lang", "de", "--aligner", encoder, "--words", words)
    german = [row["sentence2"] for row in read_jsonl(data / "snli_ve_train.de.jsonl")]
    shown = words.read_text().splitlines()
    assert len(links) == len(shown) == len(german) == 24
    assert (links[1], shown[1]) == ("", "")
    for line, sentence in zip(shown, german, strict=True):
        assert not line or line.endswith(f"||| {sentence}")
    assert [line for line in shown if line.startswith("A dog waits outside. ||| Draußen")]


def test_another_source_language(clseave, refused, encoder, tmp_path):
    pytest.importorskip("rjieba")
    data = write_world(tmp_path / "data", languages=("en", "de", "zh"))
    edit_row(data / "snli_ve_train.de.jsonl", 2, pairID="stray")
    chinese = {r["pairID"]: r["sentence2"] for r in read_jsonl(data / "snli_ve_train.zh.jsonl")}
    rows = read_jsonl(data / "snli_ve_train.de.jsonl")
    words = tmp_path / "words"
    command = ["--data", data, "--source-lang", "zh", "--lang", "de", "--aligner", encoder]
    links = _links(clseave, *command, "--words", words)
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
    assert _links(clseave, *text) == [line for line in links if line]
    # Kept beside the translations, in place of a file.
    write_jsonl(
        data / "snli_ve_train.de.jsonl",
        [r | {"sentence2_zh": chinese.get(r["pairID"], "是")} for r in rows],
    )
    (data / "snli_ve_train.zh.jsonl").unlink()
    beside = _links(clseave, *command)
    assert beside[1] and [*beside[:1], *beside[2:]] == [*links[:1], *links[2:]]
    # English is a language like any other.
    english = ["--data", data, "--source-lang", "de", "--lang", "en", "--aligner", encoder]
    assert len(_links(clseave, *english)) == 24
    for source in ([], ["--source-lang", "en"]):
        error = refused("word-align", "--data", data, "--lang", "en", *source, code=2)
        assert "--lang en: is --source-lang, too" in error
    error = refused("word-align", "--data", data, "--lang", "de", "--source-lang", "../x", code=2)
    assert "--source-lang ../x: not a language code" in error


def test_scoring_without_a_model(clseave, text, tmp_path):
    # Worked by hand: 4 links, 3 of them possible; 3 sure ones, 2 of them found.
    (tmp_path / "found").write_text("0-0 1-1 2-3\n1-1\n")
    (tmp_path / "gold").write_text("1-1 2-2 3p4\n1-1 2p2\n")
    arguments = ["--input", text, "--alignments", tmp_path / "found", "--gold", tmp_path / "gold"]
    code, out, err = clseave("word-align", *arguments, "--json")
    assert code == 0 and "words are counted from 1" in err
    score = json.loads(out)
    assert score == {
        "precision": 1.0, "recall": 2 / 3, "error_rate": pytest.approx(1 - 6 / 7),
        "num_pairs": 2, "num_found": 4, "num_sure": 3, "num_possible": 5,
    }  # fmt: skip
    code, out, _ = clseave("word-align", *arguments)
    assert "alignment error rate 14.29% · precision 100.00% · recall 66.67%" in out


def test_the_best_layer_and_threshold_are_searched_on_gold(clseave, text, encoder, tmp_path):
    (tmp_path / "gold").write_text("1-1 2-2 3p4\n1-1 2p2\n")
    arguments = ["word-align", "--input", text, "--aligner", encoder, "--gold", tmp_path / "gold"]
    rates = {}
    for threshold in ("0.001", "0.01", "0.05", "0.1", "0.2", "0.3"):
        code, out, _ = clseave(*arguments, "--json", "--aligner-threshold", threshold)
        rates[float(threshold)] = json.loads(out)["error_rate"]
    code, out, _ = clseave(*arguments, "--json", "--search")
    best = json.loads(out)
    assert code == 0 and best["layer"] == 1
    assert best["error_rate"] == min(rates.values()) == rates[best["threshold"]]
    assert (
        f"best: --aligner-layer 1 --aligner-threshold {best['threshold']}"
        in clseave(*arguments, "--search")[1]
    )


@pytest.mark.parametrize(("name", "num_misnumbered"), [("enfr", 0), ("zhen", 0), ("jaen", 6)])
def test_real_gold_files(clseave, assets, tmp_path, name, num_misnumbered):
    """Human links are read, and scored against themselves as found ones: nothing is wrong."""
    text, gold = (assets / "alignment" / f"{name}.{kind}" for kind in ("src-tgt", "gold"))
    # As an aligner would write them: sure links alone, counted from 0.
    found = tmp_path / "found"
    lines = []
    sizes = [
        [len(side.split()) for side in line.split("|||")] for line in text.read_text().splitlines()
    ]
    for line, (source, target) in zip(gold.read_text().splitlines(), sizes, strict=True):
        pairs = [tuple(map(int, link.split("-"))) for link in line.split() if "-" in link]
        kept = [(i, j) for i, j in pairs if i <= source and j <= target]
        lines.append(" ".join(f"{i - 1}-{j - 1}" for i, j in kept))
    found.write_text("\n".join(lines) + "\n")
    arguments = ["word-align", "--input", text, "--alignments", found, "--gold", gold, "--json"]
    code, out, err = clseave(*arguments)
    assert code == 0 and "words are counted from 1" in err
    assert (f"{num_misnumbered} bad links skipped" in err) == (num_misnumbered > 0)
    score = json.loads(out)
    assert (score["precision"], score["recall"], score["error_rate"]) == (1, 1, 0)
    assert score["num_pairs"] == len(lines) and score["num_possible"] >= score["num_sure"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a b c\n", "text:1: ||| occurs 0 times; expected source ||| target"),
        ("a ||| b\na ||| b ||| c\n", "text:2: ||| occurs 2 times"),
    ],
)
def test_bad_text(refused, text, encoder, content, message):
    text.write_text(content)
    assert message in refused("word-align", "--input", text, "--aligner", encoder)


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ("0-0\n0-0\n0-0\n", "links:3: more lines than sentences"),
        ("0-0\n0-9\n", "links:2: 0-9 names a word that does not exist; the target sentence has 4"),
        ("0-0\nnone\n", "links:2: 'none' is no link"),
    ],
)
def test_bad_links(refused, text, tmp_path, links, message):
    (tmp_path / "links").write_text(links)
    for option in ("--alignments", "--gold"):
        more = ["--gold-base", "0", "--alignments", tmp_path / "links"]
        error = refused("word-align", "--input", text, *more, option, tmp_path / "links")
        assert message in error


def test_other_refusals(refused, text, encoder, data, tmp_path):
    assert "--lang is missing" in refused("word-align", "--data", data, code=2)
    assert "no snli_ve_train.ko.jsonl" in refused("word-align", "--data", data, "--lang", "ko")
    error = refused(
        "word-align", "--input", text, "--aligner", encoder, "--aligner-layer", 9, code=2
    )
    assert "--aligner-layer 9" in error and "choose from 1 to 1" in error
    assert "no such model folder" in refused("word-align", "--input", text, "--aligner", "a/b/c")
    missing = refused("word-align", "--input", tmp_path / "nowhere", "--aligner", encoder)
    assert "nowhere: cannot be read" in missing


@pytest.mark.parametrize("option", ["--out", "--words"])
def test_an_output_is_a_file(refused, text, encoder, tmp_path, option):
    error = refused("word-align", "--input", text, "--aligner", encoder, option, tmp_path, code=2)
    assert f"{option} {tmp_path}: is a folder; name a file, such as {tmp_path}/" in error
