import copy
import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from clseave_cli.commands.tables import results_table, seeds_table
from clseave_cli.core.evaluation.results import Baselines, Results, across_seeds
from clseave_cli.core.evaluation.summary import not_above
from clseave_cli.errors import DataError


def rendered(results, width=80, table=results_table, **options):
    """What a terminal of `width` columns shows."""
    console = Console(width=width, file=io.StringIO())
    console.print(table(results, width, **options))
    return console.file.getvalue()


def cells_of(lang, text):
    """The cells beside a language in a table."""
    (cells,) = (cells for line in text.splitlines() if (cells := line.split())[:1] == [lang])
    return cells[1:]


def test_json_and_back_is_the_same_and_keys_of_a_later_version_are_left_alone(results):
    document = json.loads(json.dumps(results.to_json(), allow_nan=False))
    assert document == results.to_json()
    assert Results.from_json(document) == results
    document["results"][0]["brier"] = 0.3
    assert Results.from_json(document) == results


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(format=2), "format: 2"),
        (lambda d: d["results"][1].pop("loss"), r"results\[1\]: the key 'loss' is missing"),
        (lambda d: d["results"][0].update(accuracy="high"), r"results\[0\].accuracy.*'high'"),
        (lambda d: d["results"][0].update(mode="guess"), r"results\[0\].mode.*'guess'"),
        (lambda d: d.update(results={}), r"results: unexpected"),
        (lambda d: d["signature"].update(seed=True), r"signature.seed"),
        (lambda d: d["results"][0].update(confusion=[1]), r"confusion\[0\]"),
        (lambda d: d.update(baselines=[]), "baselines"),
        (lambda d: d.update(signature=None), "signature"),
    ],
)
def test_a_damaged_document_names_the_key(results, damage, message):
    document = copy.deepcopy(results.to_json())
    damage(document)
    with pytest.raises(DataError, match=message):
        Results.from_json(document)


def test_what_is_no_document_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a results document"):
        Results.from_json([])
    with pytest.raises(DataError, match=r"no such file; write one with: clseave evaluate"):
        Results.read(tmp_path)
    (tmp_path / "results.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match=r"results\.json: .*'results' is missing"):
        Results.read(tmp_path)


def test_the_signature_is_one_line(results):
    line = (
        "clseave 0.1.0 · n 600 · snli_ve_test.jsonl 3f2a9c1b · clip-ve 91ab44e0 · "
        "align-de 77de01c2 · fp32 on cpu · seed 0 · 200 resamples by photo"
    )
    assert str(results.signature) == line
    # Of an older version.
    document = results.to_json()
    del document["signature"]["precision"], document["signature"]["device"]
    older = Results.from_json(document).signature
    assert (older.precision, older.device) == (None, None)
    assert str(older) == line.replace(" · fp32 on cpu", "")
    # Many models are few words.
    many = {f"align-{number}": f"{number:064x}" for number in range(20)}
    signature = replace(results.signature, checkpoints=many)
    assert re.search(r"3f2a9c1b · 20 models \w{8} · fp32", str(signature))
    assert str(signature) != str(replace(signature, checkpoints=many | {"align-3": "00" * 32}))


def test_training_rows_are_known_by_their_file(results):
    assert not results.of_training_rows
    training = replace(results.signature, training={"snli_ve_train.jsonl": "ab" * 32})
    assert not replace(results, signature=training).of_training_rows
    copied = replace(training, data={"copied.jsonl": "ab" * 32})
    assert replace(results, signature=copied).of_training_rows


def test_several_seeds_are_summarised(results):
    german = replace(results.results[1], ratio_to_english=None)
    trainings = [
        replace(results, results=(replace(german, accuracy=value),)) for value in (0.7, 0.8, 0.9)
    ]
    summary = across_seeds(trainings)
    assert summary.keys() == {"de"} and "ratio_to_english" not in summary["de"]
    means = {name: each.mean for name, each in summary["de"].items()}
    assert means["accuracy"] == pytest.approx(0.8)
    assert summary["de"]["accuracy"].std == pytest.approx(0.1)
    # The same in all three, and paired.
    assert means["shuffled_image"] == pytest.approx(0.371)
    assert means["difference_to_english"] == pytest.approx(german.difference_to_english.value)
    both = replace(results, seeds=summary)
    assert Results.from_json(both.to_json()) == both
    assert across_seeds([]) == {}


def test_the_table_shows_percentages_with_one_decimal(results):
    german = replace(
        results.results[1], accuracy=0.7319, accuracy_low=0.7254, accuracy_high=0.7384,
        ratio_to_english=1.0003, agreement_with_english=0.875, most_frequent=1.0,
    )  # fmt: skip
    document = replace(results, results=(results.results[0], german))
    text = rendered(document)
    expected = ["73.2", "72.5–73.8", "100.0", "87.5", "33.4", "41.2", "37.1"]
    assert cells_of("de", text) == expected and "…" not in text
    caption = results_table(document).caption
    assert "German gives 100.0 % of the rows the same label." in caption
    # Fingerprints are for those who ask; there are paragraphs of them.
    assert "3f2a9c1b" not in text and "3f2a9c1b" in rendered(results, verbose=True)


def test_unsure_and_seen_stand_in_the_table_of_the_baselines(calibrated):
    assert cells_of("de", rendered(calibrated, 120))[-5:] == ["37.1", "10.0", "97.0", "5.0", "80.0"]
    # Before them go what a reader misses less.
    shown, _, left_out = rendered(calibrated, 80).partition("Not shown")
    assert "unsure" in shown and "ratio to en" in left_out
    assert "unsure" not in rendered(replace(calibrated, results=calibrated.results[:1]), 120)
    assert Results.from_json(calibrated.to_json()) == calibrated


@pytest.mark.parametrize("table", [results_table, seeds_table])
def test_a_narrow_terminal_gets_fewer_columns_and_whole_numbers(results, table):
    several = replace(results, seeds=across_seeds([results, results]))
    for width in (40, 60, 120):
        text = rendered(several, width, table)
        assert "…" not in text and max(map(len, text.splitlines())) <= width
        assert ("Not shown" in text) == (width < 120)
        assert all(f"{100 * r.accuracy:.1f}" in text for r in results.results)


def test_the_table_says_where_a_baseline_is_as_good(results):
    # NLVR: of two labels one is the more frequent.
    low = replace(results.results[0], accuracy=0.44, accuracy_low=0.41, accuracy_high=0.47)
    weak = replace(results, results=(low,), baselines={"en": Baselines(majority=0.562)})
    (sentence,) = not_above(weak)
    assert sentence in " ".join(rendered(weak).split())
    assert "no better" not in rendered(results)


def test_the_table_has_dashes_for_what_was_not_measured(results):
    unmeasured = ("accuracy_low", "accuracy_high", "ratio_to_english", "agreement_with_english")
    english = replace(results.results[0], **dict.fromkeys(unmeasured))
    text = rendered(replace(results, results=(english,), baselines={}))
    assert cells_of("en", text)[1:] == ["–"] * 6
