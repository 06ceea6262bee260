"""Findings, baselines, and the output and exit status of `clseave check`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from tiny_world import COLOURS, png

from clseave_cli.core.config import CheckConfig
from clseave_cli.core.models.calibration import Calibration
from clseave_cli.core.prediction.checking import findings
from clseave_cli.core.prediction.checking.findings import check
from clseave_cli.core.prediction.checking.output import render, write_report
from clseave_cli.errors import ModelError, UsageError

_PAGE = """\
<html lang=en>
<img src=red.png alt="A red square.">
<img src=red.png alt="A blue square.">
<img src=blue.png alt="A square.">
<img src=blue.png>
<img src=gone.png alt="Something blue.">
"""


@pytest.fixture
def page(site, model):
    (site / "page.html").write_text(_PAGE)
    return site / "page.html"


def rules(path, **options):
    """(line, rule) of every finding."""
    result = check([path], CheckConfig(**options))
    return [(c.text.place, f.rule) for c in result.texts for f in c.findings]


def test_verdicts_of_pictures_that_are_encoded_once(page, model):
    result = check([page, page], CheckConfig())
    assert [c.verdict for c in result.texts] == ["fits", "contradicts", "unsure", None, None] * 2
    assert model.num_images == 2
    assert rules(page) == [(3, "contradicts"), (4, "unsure"), (5, "empty")]
    assert rules(page, min_confidence=0.98) == [
        (2, "unsure"), (3, "unsure"), (4, "unsure"), (5, "empty"),
    ]  # fmt: skip
    assert result.summary()["skipped"] == {"missing": 2}
    assert rules(page, judge=False) == [(5, "empty")]
    assert check([page], CheckConfig(judge=False)).summary()["skipped"] == {"missing": 1}


def test_thresholds_of_calibrate_decide_unless_an_option_does(page, model):
    model.calibrations["en"] = Calibration(thresholds={"contradiction": 0.98}, precision=0.95)
    assert rules(page) == [(3, "unsure"), (4, "unsure"), (5, "empty")]  # 0.97, and 0.4 < 0.7
    assert rules(page, min_confidence=0.0) == [(3, "contradicts"), (5, "empty")]


def test_the_cache_counts_thumbnails(page, model, monkeypatch):
    monkeypatch.setattr(findings, "_AT_ONCE", 1)
    monkeypatch.setattr(findings, "_KEPT_BYTES", 2 * findings._LEAST_BYTES)
    for thumbnails, num_images in ((False, 2), (True, 4)):
        model.num_images = 0
        check([page, page], CheckConfig(), thumbnails=thumbnails)
        assert model.num_images == num_images


def test_a_damaged_model_is_no_verdict(page, model, monkeypatch):
    monkeypatch.setattr(model, "probabilities", lambda *rows: np.full((len(rows[1]), 3), np.nan))
    with pytest.raises(ModelError, match="clip-ve: probabilities are not finite"):
        check([page], CheckConfig())


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("image", "placeholder"), ("Image 3:", "placeholder"), ("画像", "placeholder"),
        ("…", "placeholder"), ("{{ alt }}", "placeholder"), ("Lorem ipsum dolor", "placeholder"),
        ("n/a", "placeholder"),
        ("red.png", "file-name"), ("IMG_2034", "file-name"), ("DSC00012.JPG", "file-name"),
        ("red-2", "file-name"),
        ("red", None), ("A red photo", None), ("赤い円", None), ("Foto: red", None),
        ("red " * 70, "too-long"), ("red, cut", "too-long"),
    ],
)  # fmt: skip
def test_texts_that_need_no_model(site, model, text, rule):
    Image.new("RGB", (32, 32), COLOURS["red"]).save(site / "red-2.png")
    rows = [{"image": name, "text": text} for name in ("red.png", "red-2.png")]
    (site / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reported = {rule for line, rule in rules(site / "rows.jsonl") if line == 2 or text != "red-2"}
    assert reported - {"unsure"} == ({rule} if rule else set())


def test_the_same_text_on_many_pictures(site, model):
    for number in range(4):
        Image.new("RGB", (32, 32), COLOURS["red"]).save(site / f"p{number}.png")
    names = ["p0", "p0", "p1", "p2", "p3", "p0", "p1"]
    (site / "rows.csv").write_text("image,text\n" + "".join(f"{name}.png,Red\n" for name in names))
    assert rules(site / "rows.csv") == [(6, "same-text")]
    assert rules(site / "rows.csv", max_same=4) == []
    assert rules(site / "rows.csv", max_same=1) == [(4, "same-text")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<svg/>", "damaged or not an image"),
        (b"", "damaged or not an image"),
        (png(15, 40, bytes(1840)), "smaller than 16 pixels"),
        (png(99, 99), "more pixels than the limit"),
    ],
    ids=["SVG", "empty", "tiny", "bomb"],
)
def test_pictures_that_cannot_be_judged_are_counted(site, model, monkeypatch, content, reason):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    (site / "a.png").write_bytes(content)
    (site / "page.md").write_text("![Red](a.png)")
    result = check([site / "page.md"], CheckConfig())
    assert not result.flagged
    assert next(iter(result.summary()["skipped"])).startswith(reason)


def test_the_language_is_that_of_each_text(site, trained, monkeypatch):
    class Identifier:
        def __init__(self, languages):
            assert list(languages) == ["en", "de", "nl"]

        def identify(self, text):
            return ("de", 0.99) if "Quadrat" in text else ("en", 0.5)

    monkeypatch.setattr(findings, "LanguageIdentifier", Identifier)
    (site / "page.html").write_text(
        "<html lang=nl-BE><img src=red.png alt='Das Quadrat'><img src=red.png alt='Het vierkant'>"
        "<img src=red.png alt='square' lang=fr>"
    )
    settings = {"runs": trained, "device": "cpu", "precision": "fp32"}
    result = check([site / "page.html"], CheckConfig(**settings))
    assert [c.lang for c in result.texts] == ["de", "nl", "en"]
    result = check([site / "page.html"], CheckConfig(lang="de", **settings))
    assert [c.lang for c in result.texts] == ["de", "de", "de"]


def test_what_was_accepted_is_no_finding_until_text_or_picture_change(page, site):
    first = check([page], CheckConfig())
    (site / "run.json").write_text(render(first, "json"))
    decisions = [
        {"fingerprint": flagged.findings[0].fingerprint, "decision": decision}
        for flagged, decision in zip(first.flagged, ("accept", "reject"), strict=False)
    ]
    (site / "decisions.json").write_text(json.dumps({"decisions": decisions}))
    again = check([page], CheckConfig(baseline=site / "run.json"))
    assert (again.flagged, again.num_accepted, again.fails("unsure")) == ([], 3, False)
    assert rules(page, baseline=site / "decisions.json") == [(4, "unsure"), (5, "empty")]
    page.write_text("\n" + _PAGE)  # lines move
    assert rules(page, baseline=site / "run.json") == []
    page.write_text(_PAGE.replace("A blue", "One blue"))
    assert rules(page, baseline=site / "run.json") == [(3, "contradicts")]
    page.write_text(_PAGE)
    Image.new("RGB", (32, 40), COLOURS["red"]).save(site / "red.png")
    assert rules(page, baseline=site / "run.json") == [(3, "contradicts")]
    (site / "broken.json").write_text("[]")
    for name in ("broken.json", "nowhere.json"):
        with pytest.raises(UsageError, match=name):
            check([page], CheckConfig(baseline=site / name))


def test_formats_of_the_output(page, clseave):
    def printed(*options):
        code, out, _ = clseave("check", page.name, *options)
        assert code == 1
        return out

    assert printed().splitlines() == [
        "page.html",
        '     3  contradicts  red.png                       "A blue square." · the picture '
        "contradicts it (97 %)",
        '     4  unsure       blue.png                      "A square." · most likely: fits (40 %)',
        "     5  empty        blue.png                      no text; describe the picture",
        "",
        "5 texts · 1 fits · 1 contradicts · 1 unsure · 1 empty · not judged: 1 missing",
    ]

    document = json.loads(printed("--format", "json"))
    assert document["summary"]["findings"] == {"contradicts": 1, "unsure": 1, "empty": 1}
    rows = [json.loads(line) for line in printed("--format", "jsonl").splitlines()]
    assert rows == document["texts"]
    assert (rows[1]["file"], rows[1]["line"], rows[1]["verdict"]) == ("page.html", 3, "contradicts")
    suites = ElementTree.fromstring(printed("--format", "junit"))
    assert [suite.get("failures") for suite in suites] == ["3"]
    assert len(suites.findall(".//testcase")) == 5 and len(suites.findall(".//skipped")) == 1
    (run,) = json.loads(printed("--format", "sarif"))["runs"]
    assert {r["ruleId"] for r in run["results"]} <= {
        r["id"] for r in run["tool"]["driver"]["rules"]
    }
    location = run["results"][0]["locations"][0]["physicalLocation"]
    assert location == {"artifactLocation": {"uri": "page.html"}, "region": {"startLine": 3}}
    lines = printed("--format", "github").splitlines()
    assert lines[0].startswith("::error file=page.html,line=3,title=clseave contradicts::red.png")
    assert "(97 %25)" in lines[0] and lines[1].startswith("::warning file=page.html,line=4,")


def test_exit_status(site, model, clseave):
    # A decorative picture needs no text.
    page = "<img src=red.png alt='A red square.'><img src=blue.png alt=''>"
    (site / "fine.html").write_text(page)
    assert rules(site / "fine.html") == []
    (site / "unsure.html").write_text("<img src=red.png alt='A square.'>")
    assert clseave("check", "fine.html")[0] == 0
    (site / "one.html").write_text("<img src=red.png alt='A red square.'>")
    assert clseave("check", "one.html")[:2] == (0, "1 text · 1 fits\n")
    assert clseave("check", "unsure.html")[0] == 0
    assert clseave("check", "unsure.html", "--fail-on", "unsure")[0] == 1
    assert clseave("check", "nothing.html")[0] == 2
    assert clseave("check")[0] == 2
    (site / "broken.csv").write_text("image,text\nred.png\n")
    code, out, _ = clseave("check", "broken.csv")
    assert code == 1 and "2  unreadable" in out


@pytest.mark.parametrize(
    ("name", "table"),
    [("pyproject.toml", "tool.clseave.check"), ("clseave.toml", "tool.clseave.check"),
     ("clseave.toml", "check")],
)  # fmt: skip
def test_options_of_the_project(page, site, clseave, refused, name, table):
    (site / name).write_text(f"[{table}]\nmin-confidence = 0.98\nfail_on = 'unsure'\n")
    (site / "lenient.toml").write_text("min_confidence = 0.3\n")
    assert "3 unsure" in clseave("check", page.name)[1]
    assert "2 fits" in clseave("check", page.name, "--config", "lenient.toml")[1]
    assert "1 unsure" in clseave("check", page.name, "--min-confidence", 0.7)[1]
    (site / name).write_text(f"[{table}]\nfetch = true\n")  # a project may not ask for requests
    assert f"{name}: no option named fetch" in refused("check", page.name, code=2)


def test_nothing_in_a_text_commands_a_terminal_or_breaks_a_format(site, model):
    evil = "\x1b[2J\u202e]]>\0 ::error::x</script><!--%0A,:\ud83d\ufffe"
    (site / "a,b:c%.jsonl").write_text(json.dumps({"image": evil + ".png", "text": evil}))
    result = check([site / "a,b:c%.jsonl"], CheckConfig(max_characters=1))
    for format in ("text", "json", "jsonl", "junit", "sarif", "github"):
        out = render(result, format)
        out.encode()
        assert "\x1b" not in out and "\0" not in out
        assert "\u202e" not in out or format in ("json", "jsonl")
    ElementTree.fromstring(render(result, "junit"))
    assert render(result, "github").startswith("::warning file=a%2Cb%3Ac%25.jsonl,line=1,")
    write_report(site / "report.html", result)
    report = (site / "report.html").read_text()
    assert report.count("</script>") == 1 and evil[:4] not in report


def test_the_report_has_the_worst_first_and_replaces_only_reports(page, clseave, site, refused):
    assert clseave("check", page.name, "--report", "report")[0] == 1
    text = (site / "report" / "index.html").read_text()
    line = next(line for line in text.splitlines() if line.startswith("const DATA = "))
    data = json.loads(line.removeprefix("const DATA = ").removesuffix(";"))
    assert [e["findings"][0]["rule"] for e in data["entries"]] == ["contradicts", "empty", "unsure"]
    assert all(e["thumbnail"] for e in data["entries"])
    assert clseave("check", page.name, "--report", "report")[0] == 1
    (site / "index.html").write_text("somebody's page")
    assert "index.html is not a report" in refused("check", page.name, "--report", ".", code=2)
    assert (site / "index.html").read_text() == "somebody's page"


def test_without_the_extra_one_line_says_how_to_get_it(site, model, refused, monkeypatch):
    (site / "page.md").write_text("<img src=red.png>")
    for module in ("lxml", "markdown_it"):
        monkeypatch.setitem(sys.modules, module, None)
        message = f"check needs {module}; run: pip install -e '.[check]'"
        assert message in refused("check", "page.md")
    model.sources = {"en": "clip-ve", "de": "align-de"}
    monkeypatch.setitem(sys.modules, "lingua", None)
    assert "Or name the language: --lang LANG." in refused("check", "page.md")


def test_real_models_judge_a_folder(site, trained, world, clseave):
    code, out, _ = clseave(
        "check", world, "--images", world / "images", "--runs", trained, "--lang", "en",
        "--image-column", "Flickr30K_ID", "--format", "jsonl",
    )  # fmt: skip
    rows = [json.loads(line) for line in out.splitlines()]
    with_verdict = [row for row in rows if row["verdict"]]
    assert code in (0, 1) and len(with_verdict) == len(rows) > 40
    assert all(abs(sum(row["probabilities"].values()) - 1) < 1e-5 for row in with_verdict)
    assert {Path(row["file"]).suffix for row in rows} == {".jsonl"}
