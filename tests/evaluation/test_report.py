import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from clseave_cli.core.evaluation.figures import (
    Drawing,
    _confusion,
    _curves,
    _languages,
    draw_figures,
)  # fmt: skip
from clseave_cli.core.evaluation.gallery import Gallery
from clseave_cli.core.evaluation.metrics import ClassScores
from clseave_cli.core.evaluation.report import escape_latex, html_page, latex_table, write_report
from clseave_cli.core.evaluation.results import Baselines, Results, across_seeds

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Collects tags, addresses and text, and checks that tags close in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.hypotheses = set(), [], {}
        #: Rows of cells of every table, heads included, by the title of the section.
        self.rows = {}
        self._open, self._texts = [], []
        self.feed(html)
        self.close()
        assert not self._open
        self.text = "".join(self._texts)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "section":
            self.rows[None] = []
        elif tag == "tr" and None in self.rows:
            self.rows[None].append([])
        elif tag in ("td", "th") and None in self.rows:
            self.rows[None][-1].append("")
        attribute = dict(attributes)
        self.addresses += [attribute[name] for name in ("src", "href") if name in attribute]
        if tag not in VOID:
            self._open.append((tag, attribute))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        self._texts.append(data)
        inside = [tag for tag, _ in self._open]
        if "h2" in inside and None in self.rows:
            self.rows[data] = self.rows[None]
        if None in self.rows and {"td", "th"} & set(inside):
            self.rows[None][-1][-1] += data
        if self._open and self._open[-1][1].get("class") == "hypothesis":
            self.hypotheses.setdefault(self._open[-1][1]["lang"], set()).add(data)


@pytest.fixture(scope="session")
def folder(results, curves, galleries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    results.write(folder)
    (folder / "figures").mkdir()
    (folder / "figures" / "old.png").write_bytes(b"of an older report")
    path = write_report(results, folder, curves=curves, galleries=galleries)
    assert path == folder / "report.html"
    return folder


def read(path):
    return path.read_text(encoding="utf-8")


def test_writes_every_part_and_replaces_what_was_there(folder, results):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    figures = ("languages", "confusion", "reliability", "risk-coverage", "distances")
    curves = ("curves-pretrain", "curves-finetune-ve", "curves-align")
    expected = {f"figures/{name}.png" for name in figures + curves}
    assert names == {"results.json", "report.html", "table.tex"} | expected
    assert Results.read(folder) == results


def test_the_page_needs_nothing_but_itself_and_text_from_data_is_text(folder, galleries):
    html = read(folder / "report.html")
    page = Page(html)
    assert not page.tags & {"script", "link", "iframe", "object"} and "<script" not in html
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not re.search(r"url\(|@import|https?:", html)
    # One chart of languages, six panels each of confusion, reliability, risk and distance; one, two
    # and four panels of curves; and two readable pictures.
    assert sum(address.startswith("data:") for address in page.addresses) == 1 + 24 + 7 + 2
    hostile = galleries[1].introduction
    assert page.hypotheses["de"] == {hostile} and page.text.count(hostile) == 4
    assert page.hypotheses["ja"] == {"赤い円があります。"}


def test_every_figure_carries_the_signature_in_small_print(folder, results):
    for path in (folder / "figures").iterdir():
        with Image.open(path) as image:
            assert image.info["Description"] == str(results.signature)
            assert image.width > 1000
            foot = image.convert("L").crop((0, image.height - 30, image.width, image.height))
            assert foot.getextrema()[0] < 160


def test_latex_is_escaped_and_aligned(results):
    table = latex_table(replace(results, results=(replace(results.results[0], split="a_b & c%"),)))
    assert r"a\_b \& c\%" in table
    assert table.count(r"\begin{") == table.count(r"\end{") == 2
    assert escape_latex("\\{x}^~$#") == (
        r"\textbackslash{}\{x\}\textasciicircum{}\textasciitilde{}\$\#"
    )
    rows = [line for line in latex_table(results).splitlines() if line.endswith(r" \\")]
    assert {line.count("&") for line in rows if "multicolumn" not in line} == {8}
    columns = "lrcrrrrrr"
    assert len(columns) == 9 and columns in table


def test_latex_of_several_trainings_is_of_their_means(trainings, results):
    table = latex_table(trainings)
    assert r"en & 80.0 $\pm$ 10.0 & [77.0, 83.0] & " in table
    assert r"Means over 3 trainings, $\pm$ sample standard deviation. Intervals" in table
    assert "trainings" not in latex_table(results)
    more = replace(trainings, results=(*trainings.results, results.results[2]))
    assert "(rows without it: the first training)" in latex_table(more)


def test_baselines_that_are_equal_do_not_hide_each_other(results):
    equal = Baselines(majority=0.33, hypothesis_only=0.33, shuffled_image=0.33)
    axes = _languages(replace(results, baselines=dict.fromkeys(results.baselines, equal))).axes[0]
    spans = sorted(
        (min(line.get_xdata()), max(line.get_xdata()))
        for line in axes.get_lines()
        if set(line.get_ydata()) == {33.0}
    )
    assert len(spans) == 3 * len(results.results)
    assert all(end < start for (_, end), (start, _) in pairwise(spans))


def test_every_panel_of_the_alignment_says_its_scale(curves):
    panels = _curves([curve for curve in curves if curve.stage == "align"]).axes
    scales = {panel.get_title(loc="left"): panel.get_yscale() for panel in panels}
    assert set(scales.values()) == {"log", "linear"}
    assert scales["dev MSE per dimension"] == scales["dev MAE per dimension"] == "log"
    for panel in panels:
        names = {"log": "logarithmic scale", "linear": "linear scale"}
        assert panel.get_ylabel() == names[panel.get_yscale()]
        rings = [line for line in panel.get_lines() if line.get_fillstyle() == "none"]
        assert len({ring.get_markersize() for ring in rings}) == len(rings)


def test_figures_are_deterministic_and_small_print_takes_no_room_from_them(results):
    def drawn(**changes):
        few = replace(results, results=results.results[:1], distances=None)
        return draw_figures(replace(few, **changes), [])

    def size(encoded):
        with Image.open(io.BytesIO(encoded)) as image:
            return image.size

    figures = drawn()
    assert drawn() == figures
    # Several trainings are drawn differently.
    several = drawn(seeds=across_seeds([results, results]))
    assert several["languages"].encoded != figures["languages"].encoded
    checkpoints = {f"{number}-{'model' * 9}": "ab" * 32 for number in range(8)}
    more = drawn(signature=replace(results.signature, checkpoints=checkpoints))["languages"]
    (width, height), (same, higher) = size(figures["languages"].encoded), size(more.encoded)
    assert width == same and higher > height + 30
    # The figures on the page have none.
    assert size(figures["languages"].panels[0])[1] < height


def test_one_language_fills_its_figures(results):
    alone = replace(results, results=results.results[:1])
    (axes,) = _confusion(alone).axes
    assert axes.get_subplotspec().get_gridspec().ncols == 1
    empty = replace(results.results[0], confusion=((3, 1, 0), (0, 0, 0), (1, 0, 4)))
    texts = [t.get_text() for t in _confusion(replace(alone, results=(empty,))).axes[0].texts]
    assert texts[6:12:2] == ["–", "–", "–"] and texts[:2] == ["75 %", "3"]


def test_the_page_shows_the_figures_of_the_results_and_fits_what_it_is_shown_on(folder, results):
    html = read(folder / "report.html")
    text = Page(html).text
    accuracies = [f"{100 * result.accuracy:.1f}" for result in results.results]
    for shown in ("German", "Korean", "cannot be read", *accuracies):
        assert shown in text
    # One signature, in the footer.
    assert all(text.count(digest) == 1 for digest in results.signature.checkpoints.values())
    # Groups of labels over P, R and F1; a shadow where a table goes on; cards that stack; print.
    assert html.count('scope="colgroup" colspan="3"') == 3
    assert "background:" in html.split(".scroll {")[1].split("}")[0]
    assert "article { flex-direction: column" in html.split("@media (max-width: 40rem)")[1]
    assert ".scroll { overflow: visible" in html.split("@media print")[1]


def test_little_was_measured(results, tmp_path):
    unmeasured = (
        *("accuracy_low", "accuracy_high", "macro_f1_low", "macro_f1_high", "hard_accuracy"),
        *("num_hard", "ratio_to_english", "agreement_with_english", "difference_to_english"),
        "transfer",
    )
    bare = replace(results.results[1], **dict.fromkeys(unmeasured))
    small = replace(results, results=(bare,), baselines={}, distances=None)
    write_report(small, tmp_path, galleries=[Gallery("No errors", "Nothing here.", ())])
    shown = Page(read(tmp_path / "report.html"))
    absent = ("Transfer", "Linguistic distance", "Learning curves", "Against English", "No errors")
    assert not any(title in shown.text for title in absent)
    assert "de & " in read(tmp_path / "table.tex")


def test_names_from_outside_cannot_break_a_figure(results):
    hostile = replace(
        results, results=(replace(results.results[1], lang="$^$"),), distances=None,
        baselines={"$^$": Baselines(majority=0.3)},
        signature=replace(results.signature, data={"$\\frac{ 円.jsonl": "ab" * 32}),
    )  # fmt: skip
    figures = draw_figures(hostile, [])
    assert set(figures) == {"languages", "confusion", "reliability", "risk-coverage"}


# --- sections ---


def page(results, figures=()):
    """The page of a document, without drawing anything."""
    drawn = dict.fromkeys(figures, Drawing(b"", (b"",)))
    return Page(html_page(results, drawn, []))


def test_sections_show_what_was_measured(results):
    several = replace(results, seeds=across_seeds([results, results]))
    shown = page(several, ["languages", "distances", "curves-align"])
    accuracy = "Accuracy by language, first training"
    assert [title for title in shown.rows if title is not None] == [
        *("Over seeds", accuracy, "Against English", "Did it look?", "By label", "Calibration"),
        *("Transfer", "Linguistic distance", "Learning curves", "Signature"),
    ]
    assert sum(address.startswith("data:") for address in shown.addresses) == 3
    for title in (accuracy, "Against English", "Transfer"):
        assert len({len(row) for row in shown.rows[title]}) == 1
    cells = [row[4] for row in shown.rows["Against English"]]
    assert any(cell.startswith("−") for cell in cells) and not any("-" in cell for cell in cells)


def test_what_the_thesis_tables(results, curves):
    """Table 4.1's mean, Figure 2.1, Tables A.2 and A.3, and the answers of a constant model."""
    counts = {"entailment": 1200, "neutral": 30, "contradiction": 7}
    baselines = {"en": replace(results.baselines["en"], train_labels=counts)}
    constant = replace(results.results[1], most_frequent=1.0)
    shown = replace(
        results, results=(results.results[0], constant, results.results[2]), baselines=baselines,
        sources={"en": {"en": 0.9, "de": 0.85}, "zh": {"de": 0.8}}, distances=None,
    )  # fmt: skip
    shown_page = Page(html_page(shown, {"curves-align": Drawing(b"", ())}, [], curves))
    others = 50 * (results.results[1].accuracy + results.results[2].accuracy)
    assert f"Mean of de, nl: {others:.1f} %." in shown_page.text
    assert "German gives 100.0 % of the rows the same label." in shown_page.text
    confusion = np.array(results.results[0].confusion)
    shares = [row[-1] for row in shown_page.rows["By label"][2:]]
    assert shares[:2] == [f"{100 * confusion.sum(axis=0).max() / confusion.sum():.1f}", "100.0"]
    assert shown_page.rows["The data"][1:] == [
        ["training", "1,200", "30", "7"], ["test", *map(str, confusion.sum(axis=1))],
    ]  # fmt: skip
    assert shown_page.rows["By source language"] == [
        ["source", "en", "de"], ["English", "90.0", "85.0"], ["Chinese", "–", "80.0"],
    ]  # fmt: skip
    assert shown_page.rows["Learning curves"][:2] == [
        ["dev mse, epoch", "1", "2", "3", "4"], ["align-de", "0.03", "0.015", "0.01", "0.0075"],
    ]  # fmt: skip
    assert html_page(results, {}, []).count("of the rows the same label") == 0


def test_a_label_that_no_row_has_is_told_and_english_alone_is_not_compared_with_itself(results):
    english = results.results[0]
    assert english.agreement_with_english == 1
    per_class = english.per_class | {"neutral": ClassScores(0.0, 0.0, 0.0, 0)}
    two = page(replace(results, results=(replace(english, per_class=per_class),), distances=None))
    assert "Against English" not in two.rows
    assert "No row has the gold label neutral: macro-F1 counts a 0 for it." in two.text
    assert "No row has the gold label neutral: there is no recall" in two.text
    assert two.rows["By label"][-1][4:7] == ["0.0", "–", "0.0"]
    assert "No row has" not in page(results).text


def test_several_trainings_are_shown_by_their_means(trainings):
    shown = page(trainings, ["languages"])
    paired = ["German", "English", "−2.0 ± 0.0", "−2.8 to −1.2", "lower"]
    assert shown.rows["Over seeds"][-1] == paired
    assert shown.rows["Over seeds"][1][:3] == ["English", "3", "80.0 ± 10.0"]
    assert "mean of 3 trainings" in shown.text
    # The tables of the first are those of the first.
    assert shown.rows["Accuracy by language, first training"][1][3] == "70.0"


def test_gains_over_the_baselines_worked_by_hand(results):
    german = replace(results.results[1], accuracy=0.7319)
    paired = replace(german.difference_to_english, value=0.3199, low=0.29, high=0.35)
    baselines = replace(results.baselines["de"], difference_to_hypothesis_only=paired)
    shown = page(replace(results, results=(german,), baselines={"de": baselines}))
    row = shown.rows["Did it look?"][2]
    # 73.19 − 33.4 and 73.19 − 41.2; an older document has no paired difference.
    assert row[:6] == ["German", "73.2", "33.4", "+39.8", "–", "–"]
    assert row[6:10] == ["41.2", "+32.0", "+29.0 to +35.0", "higher"]


def test_unsure_and_seen_stand_beside_the_baselines(calibrated):
    english, german = page(calibrated).rows["Did it look?"][2:4]
    assert english[-5:] == ["–"] * 5
    assert german[-5:] == ["10.0", "97.0", "96.0 – 98.0", "5.0", "80.0"]
    assert page(calibrated).rows["Calibration"][2] == [
        "German", "1.300", "2.0", "6.0", "0.400", "0.500", "3.0",
    ]  # fmt: skip


def test_distances_are_drawn_only_where_a_language_differs(results):
    level = tuple(
        replace(r, difference_to_english=replace(r.difference_to_english, low=-0.1, high=0.1))
        for r in results.results[1:3]
    )
    tied = replace(results, results=(results.results[0], *level))
    assert "distances" not in draw_figures(tied, [])
    assert "by more than its interval, so there is nothing to plot" in page(tied).text


def test_colour_says_right_or_wrong_and_the_page_what_it_is_of(folder, results):
    html = read(folder / "report.html")
    assert re.findall(r'<b class="(right|wrong)">(.)</b> (\w+)</span>', html)[:3] == [
        ("right", "✓", "entailment"), ("wrong", "✗", "neutral"), ("right", "✓", "entailment"),
    ]  # fmt: skip
    named = replace(results.signature, dataset="XVNLI", date="2026-11-26")
    assert "XVNLI · test split · 2026-11-26" in page(replace(results, signature=named)).text
