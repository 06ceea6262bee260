"""`evaluate`: its two modes, several seeds, real files, and what it keeps."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_world import Notes, edit_row, read_jsonl

from clseave_cli.core.config import EvaluateConfig
from clseave_cli.core.data.hypothesis_only import HYPOTHESIS_ONLY_FILE, HypothesisClassifier
from clseave_cli.core.data.records import read_split
from clseave_cli.core.evaluation import run as evaluation
from clseave_cli.core.evaluation.comparison import compare_reports
from clseave_cli.core.evaluation.metrics import Interval, accuracy_interval
from clseave_cli.core.evaluation.results import Results, means
from clseave_cli.core.evaluation.run import evaluate
from clseave_cli.core.files import file_digest
from clseave_cli.core.models.clip_ve import ClipVE, fingerprint
from clseave_cli.core.models.student import load_student, new_student, save_student
from clseave_cli.core.translation import engine as engines
from clseave_cli.core.translation.engine import Identity, Limits, Rejection
from clseave_cli.errors import ClseaveError, DataError, TranslationError, UsageError
from clseave_cli.labels import LABELS
from clseave_cli.progress import SILENT


class Glossary:
    """An engine that knows the tiny world's sentences, and notes what it was asked."""

    licence = "public domain"
    limits = Limits(batch_size=2, batch_characters=4000, text_characters=500, concurrency=1)

    def __init__(self, known, source, target):
        self.identity = Identity("glossary", "", "1", "", source, target)
        self.known, self.asked = known, []

    def translate(self, texts, attempt):
        self.asked += texts
        for text in texts:
            if text not in self.known:
                raise Rejection(f"no entry for {text!r}")
        return [self.known[text] for text in texts]

    def close(self):
        pass


@pytest.fixture
def glossary(world, monkeypatch):
    """The engine `glossary`, which gives the English sentences of the world back."""
    english = {row["pairID"]: row["sentence2"] for row in read_jsonl(_test_file(world, "en"))}
    known = {
        row["sentence2"]: english[row["pairID"]]
        for lang in ("de", "nl")
        for row in read_jsonl(_test_file(world, lang))
    }
    started, find_engine = [], engines.find_engine

    def create(config, source, target):
        started.append(Glossary(known, source, target))
        return started[-1]

    monkeypatch.setattr(
        engines, "find_engine", lambda name: create if name == "glossary" else find_engine(name)
    )
    return known, started


def _test_file(data, lang):
    return data / f"snli_ve_test{'' if lang == 'en' else f'.{lang}'}.jsonl"


def _evaluate(data, *runs, progress=SILENT, **options):
    defaults = {"resamples": 20, "device": "cpu", "precision": "fp32"}
    config = EvaluateConfig(data=str(data), runs=runs, **(defaults | options))
    return evaluate(config, progress)


# --- CLIP-VE's own tower ---


def test_the_source_tower_reads_a_language_as_if_it_were_its_own(data, trained):
    document = _evaluate(data, trained, reader="source")
    assert [result.lang for result in document.results] == ["en", "de", "nl"]
    german = document.results[1]
    # The same rows, taken for English.
    shutil.copyfile(_test_file(data, "de"), _test_file(data, "en"))
    (expected,) = _evaluate(data, trained, lang="en").results
    assert (german.accuracy, german.confusion) == (expected.accuracy, expected.confusion)
    # A temperature is fitted for the language that the tower was trained in.
    assert german.loss == pytest.approx(expected.loss_uncalibrated)
    assert german.transfer is not None and document.results[0].transfer is None
    assert document.signature.checkpoints.keys() == {"clip-ve"}
    assert "CLIP-VE reads every language" in str(document.signature)
    assert Results.from_json(document.to_json()) == document
    for others in ({"students": trained}, {"mode": "translate-test"}):
        with pytest.raises(UsageError, match="--reader source has CLIP-VE read the rows as they"):
            _evaluate(data, trained, reader="source", **others)


# --- translate-test ---


def test_a_perfect_translation_gives_the_english_results(world, trained, glossary):
    _, started = glossary
    options = {"mode": "both", "engine": "glossary"}
    document = _evaluate(world, trained, **options)
    english, *others = document.results
    keys = [result.key for result in document.results]
    assert keys == ["en", "de", "de.translate-test", "nl", "nl.translate-test"]
    assert list(document.baselines) == keys
    for student, translated in zip(others[::2], others[1::2], strict=True):
        accuracy = translated.accuracy
        assert (accuracy, translated.confusion) == (english.accuracy, english.confusion)
        assert translated.loss == pytest.approx(english.loss, rel=1e-4)
        assert translated.agreement_with_english == 1 and translated.transfer is None
        # Its hypothesis-only classifier reads English, as the model does.
        guesses = (document.baselines[key].hypothesis_only for key in ("en", translated.key))
        assert len({round(share, 9) for share in guesses}) == 1
        assert translated.difference_to_zero_shot.num_examples == 12
        gain = translated.difference_to_zero_shot.value
        assert gain == pytest.approx(accuracy - student.accuracy)
        assert student.difference_to_zero_shot is None and student.transfer is not None
    assert document.signature.translators == {"de": "glossary 1", "nl": "glossary 1"}
    assert document.distances.losses.keys() == {"de", "nl"}
    # Each distinct sentence once, and never again.
    sentences = {row["sentence2"] for row in read_jsonl(_test_file(world, "de"))}
    assert sorted(started[0].asked) == sorted(sentences)
    again = _evaluate(world, trained, **options)
    assert [engine.asked for engine in started[2:]] == [[], []] and again == document


def test_translate_test_needs_no_student(data, runs, glossary):
    for lang in ("de", "nl"):
        shutil.rmtree(runs / f"align-{lang}")
    document = _evaluate(data, runs, mode="translate-test", engine="glossary", lang=("de",))
    (german,) = document.results
    assert (german.lang, german.mode) == ("de", "translate-test")
    assert document.signature.checkpoints.keys() == {"clip-ve"} and document.distances is None
    # Both models read English, the classifier without pictures too.
    training = data / "snli_ve_train.jsonl"
    assert document.signature.training == {training.name: file_digest(training)}


def test_failed_translations_are_an_error_and_suspect_ones_are_told(data, trained, glossary):
    known, _ = glossary
    suspect = "Das ist gar nicht übersetzt worden. Und noch ein Satz. Und noch einer."
    known |= dict.fromkeys(known, suspect)
    edit_row(_test_file(data, "de"), 3, sentence2="Ein neuer Satz.")
    options = {"mode": "translate-test", "engine": "glossary", "lang": ("de",)}
    message = r"test.de.jsonl:3: 1 of 12 hypotheses .*no entry for 'Ein neuer Sa"
    with pytest.raises(TranslationError, match=message):
        _evaluate(data, trained, **options)
    known["Ein neuer Satz."] = suspect
    document = _evaluate(data, trained, progress=(notes := Notes()), **options)
    assert document.results[0].num_examples == 12
    assert "12 of 12 translations look suspect (" in notes.text


@pytest.fixture
def translations(data, tmp_path):
    """IGLUE's machine translations: a folder a language, rows of the same shape, in English."""
    for lang in ("de", "nl"):
        (tmp_path / lang).mkdir()
        shutil.copy(_test_file(data, "en"), tmp_path / lang / "test.jsonl")
    return tmp_path / "{lang}" / "test.jsonl"


def test_translations_of_a_file_by_pair_id(data, trained, translations):
    options = {"mode": "translate-test", "engine": "file", "translations": translations}
    document = _evaluate(data, trained, **options)
    assert [r.key for r in document.results] == ["en", "de.translate-test", "nl.translate-test"]
    assert len({r.accuracy for r in document.results}) == 1
    with pytest.raises(UsageError, match=r"--beams 0: expected at least 1"):
        _evaluate(data, trained, **options, beams=0)


def test_both_modes_are_in_table_and_report(clseave, data, trained, tmp_path, translations):
    report = tmp_path / "report"
    code, out, err = clseave(
        "evaluate", "--data", data, "--runs", trained, "--resamples", "20", "--mode", "both",
        "--engine", "file", "--translations", translations, "--report", report,
    )  # fmt: skip
    assert code == 0, err
    table = [line.split()[:3] for line in out.splitlines()]
    assert {line[0] for line in table if line} >= {"en", "de", "nl"}
    assert [line[0] for line in table if line[1:] == ["→", "en"]] == ["de", "nl"]
    assert "“→ en”: translated into English first" in out and "…" not in out
    page = (report / "report.html").read_text()
    assert "German (translate-test)" in page and "German (zero-shot)" in page
    assert "English (zero-shot)" not in page and "Translate-test against zero-shot" in page
    assert "de (translate-test)" in (report / "table.tex").read_text()
    assert Results.read(report).signature.translators["de"].startswith("file test.jsonl ")
    names = {path.name for path in report.glob("predictions.*")}
    assert "predictions.de.translate-test.jsonl" in names and len(names) == 5
    comparison = compare_reports(report, report, resamples=10)
    assert [entry.lang for entry in comparison.languages][:3] == ["en", "de", "de.translate-test"]
    # An evaluation without translations leaves none of the older ones behind.
    _evaluate(data, trained, lang=("de",), report=report)
    assert [path.name for path in report.glob("predictions.*")] == ["predictions.de.jsonl"]


# --- refused before anything is computed ---


def _no_translations(data, runs, tmp_path):
    return {"engine": "file", "translations": tmp_path / "{lang}.tsv"}


def _report_below_a_file(data, runs, tmp_path):
    (tmp_path / "file").write_text("mine")
    return {"report": tmp_path / "file" / "report"}


def _photo_is_missing(data, runs, tmp_path):
    (data / "images" / "test1.png").unlink()
    return {}


def _edited(line, **changes):
    def damage(data, runs, tmp_path):
        edit_row(_test_file(data, "nl"), line, **changes)  # the last language
        return {}

    return damage


def _student_of_another_teacher(data, runs, tmp_path):
    _rewrite_teacher(shutil.copytree(runs, tmp_path / "runs") / "align-nl", "0" * 64, "nl")
    return {"runs": (tmp_path / "runs",)}


def _calibration_of_the_last_language_is_damaged(data, runs, tmp_path):
    copy = shutil.copytree(runs, tmp_path / "runs")
    (copy / "align-nl" / "calibration.json").write_text("{")
    return {"runs": (copy,)}


@pytest.mark.parametrize(
    ("mode", "damage", "message"),
    [
        ("both", _no_translations, "no such file; check --translations"),
        ("zero-shot", _report_below_a_file, "file: is not a folder"),
        ("zero-shot", _photo_is_missing, "image 'test1.png' is not in"),
        ("translate-test", _photo_is_missing, "image 'test1.png' is not in"),
        ("zero-shot", _edited(3, gold_label="perhaps"), r"test.nl.jsonl:3: .*perhaps"),
        ("zero-shot", _edited(1, Flickr30K_ID="train0"), "also in"),
        ("translate-test", _edited(1, Flickr30K_ID="train0"), "also in"),
        ("zero-shot", _student_of_another_teacher, "align-nl: this student was trained against"),
        ("zero-shot", _calibration_of_the_last_language_is_damaged, "calibration.json: damaged"),
    ],
)
def test_what_can_be_known_is_refused_before_a_model_runs_or_anything_is_translated(
    data, trained, tmp_path, monkeypatch, glossary, mode, damage, message
):
    monkeypatch.setattr(ClipVE, "from_folder", lambda *_: pytest.fail("a model was loaded"))
    options = {"runs": (trained,), "engine": "glossary"} | damage(data, trained, tmp_path)
    with pytest.raises(ClseaveError, match=message):
        evaluate(EvaluateConfig(data=str(data), mode=mode, **options))
    assert not glossary[1]


@pytest.mark.parametrize(("lang", "name"), [("en", "clip-ve"), ("de", "align-de")])
def test_nan_is_an_error_and_no_metric(data, runs, refused, lang, name):
    """Weights that a diverged training left: every row would be called entailment."""
    if lang == "de":
        student, teacher = load_student(runs / name), fingerprint(runs / "clip-ve")
        student.projection.weight.data[:] = float("nan")
        save_student(student, runs / name, languages=["de"], teacher=teacher)
    else:
        model = ClipVE.from_folder(runs / name)
        next(model.head.parameters()).data[:] = float("nan")
        model.save(runs / name)
    message = refused("evaluate", "--data", data, "--runs", runs, "--lang", lang)
    assert "NaN" in message and name in message


# --- one language, many languages ---


def test_one_language_alone_is_compared_with_the_source_unless_it_cannot_be_read(data, trained):
    (german,) = _evaluate(data, trained, lang=("de",)).results
    document = _evaluate(data, trained)
    assert german == next(r for r in document.results if r.lang == "de")
    assert german.transfer is not None and german.ratio_to_english is not None
    assert 0 <= german.agreement_with_english <= 1 and german.kappa_with_english <= 1
    # Each baseline is compared on the same rows, with an interval by photo.
    baselines = document.baselines["de"]
    for name in ("majority", "hypothesis_only", "shuffled_image"):
        difference = getattr(baselines, f"difference_to_{name}")
        assert difference.value == pytest.approx(german.accuracy - getattr(baselines, name))
        assert difference.num_examples == german.num_examples and difference.p is not None
    edit_row(_test_file(data, "en"), 1, gold_label="perhaps")
    notes = Notes()
    (german,) = _evaluate(data, trained, lang=("de",), progress=notes).results
    assert german.ratio_to_english is None and "Nothing is compared with en" in notes.text


def test_a_student_of_several_languages_is_loaded_once(world, runs, monkeypatch):
    shutil.rmtree(runs / "align-nl")
    student = runs / "align-de"
    teacher = fingerprint(runs / "clip-ve")
    save_student(load_student(student), student, languages=["de", "nl"], teacher=teacher)
    loaded = []

    def watched(folder, *arguments):
        loaded.append(folder.name)
        return load_student(folder, *arguments)

    monkeypatch.setattr("clseave_cli.core.evaluation.outputs.load_student", watched)
    document = _evaluate(world, runs)
    assert [r.lang for r in document.results] == ["en", "de", "nl"] and loaded == ["align-de"]


# --- pictures ---


def test_errors_of_every_language_are_shown(world, trained, tmp_path, monkeypatch):
    shown = {}
    write = evaluation.write_report

    def watched(document, folder, *, galleries, **more):
        shown[folder.name] = [item.entries[0] for item in galleries[-1].items]
        return write(document, folder, galleries=galleries, **more)

    monkeypatch.setattr(evaluation, "write_report", watched)
    _evaluate(world, trained, report=tmp_path / "several")
    _evaluate(world, trained, lang=("de",), report=tmp_path / "alone")
    for folder, languages, most in (("several", ("en", "de", "nl"), 3), ("alone", ("de",), 12)):
        assert all(entry.predicted != entry.label for entry in shown[folder])
        expected = []
        for lang in languages:
            rows = read_jsonl(tmp_path / folder / f"predictions.{lang}.jsonl")
            wrong = {row["image"] for row in rows if row["label"] != row["predicted"]}
            expected += [lang] * min(most, len(wrong))
        assert expected and [entry.lang for entry in shown[folder]] == expected
    assert len({entry.lang for entry in shown["several"]}) > 1
    page = (tmp_path / "several" / "report.html").read_text()
    assert "German · test" in page and "Dutch · test" in page
    assert "at most 3 a language" in page


# --- several seeds ---


@pytest.fixture
def seeds(trained, tmp_path):
    """Three folders of models; the others' heads differ."""
    folders = [shutil.copytree(trained, tmp_path / f"runs-{number}") for number in range(3)]
    for number, folder in enumerate(folders[1:], 1):
        model = ClipVE.from_folder(folder / "clip-ve")
        for parameter in model.head.parameters():
            parameter.data += 0.5 * number * np.random.default_rng(number).standard_normal()
        shutil.rmtree(folder / "clip-ve")
        (folder / "clip-ve").mkdir()
        model.save(folder / "clip-ve")
        for lang in ("de", "nl"):
            _rewrite_teacher(folder / f"align-{lang}", model.fingerprint, lang)
    return folders


def _rewrite_teacher(folder, fingerprint, lang):
    save_student(load_student(folder), folder, languages=[lang], teacher=fingerprint)


def test_several_seeds(world, seeds, clseave, tmp_path):
    alone = [_evaluate(world, folder, resamples=10_000) for folder in seeds]
    report = tmp_path / "report"
    code, out, err = clseave(
        "evaluate", "--data", world, "--device", "cpu", "--precision", "fp32", "--resamples",
        10_000, "--report", report, *(f"--runs={folder}" for folder in seeds),
    )  # fmt: skip
    assert code == 0, err
    assert "Over several seeds" in out and "±" in out and "…" not in out
    page = (report / "report.html").read_text()
    assert "Over seeds" in page and "±" in page
    assert page.count("those of the first training") == 1
    # The folder that holds them all is nobody's business.
    for path in report.rglob("*"):
        if path.is_file() and path.name != "results.json":
            assert str(tmp_path).encode() not in path.read_bytes(), path

    document = Results.read(report)
    german = document.seeds["de"]["difference_to_english"]
    differences = [run.results[1].difference_to_english.value for run in alone]
    assert german.mean == pytest.approx(np.mean(differences))
    assert german.low - 1e-9 <= german.mean <= german.high + 1e-9
    shuffled = [run.baselines["nl"].shuffled_image for run in alone]
    assert document.seeds["nl"]["shuffled_image"].mean == pytest.approx(np.mean(shuffled))
    for name in ("majority", "hypothesis_only", "shuffled_image"):
        gain = document.seeds["nl"][f"difference_to_{name}"]
        gains = [getattr(run.baselines["nl"], f"difference_to_{name}").value for run in alone]
        assert gain.mean == pytest.approx(np.mean(gains))
        assert getattr(means(document).baselines["nl"], f"difference_to_{name}").low == gain.low
    assert document.results == alone[0].results and document.baselines == alone[0].baselines
    assert list(document.seeds) == ["en", "de", "nl"]
    for number, summaries in enumerate(document.seeds.values()):
        values = [run.results[number].accuracy for run in alone]
        accuracy = summaries["accuracy"]
        assert accuracy.num_seeds == 3 and accuracy.mean == pytest.approx(np.mean(values))
        assert accuracy.std == pytest.approx(np.std(values, ddof=1))
        assert (accuracy.min, accuracy.max) == (min(values), max(values))
        assert accuracy.low - 1e-9 <= accuracy.mean <= accuracy.high + 1e-9
    checkpoints = document.signature.checkpoints
    assert len(checkpoints) == 9
    assert checkpoints["runs-1/clip-ve"] == alone[1].signature.checkpoints["clip-ve"]


def test_one_training_is_not_two_seeds_and_equal_names_become_numbers(world, seeds, tmp_path):
    (tmp_path / "other").mkdir()
    copy = shutil.copytree(seeds[1], tmp_path / "other" / seeds[0].name)
    message = re.escape(f"--runs {seeds[1]} and --runs {copy} hold the same models")
    with pytest.raises(UsageError, match=message):
        _evaluate(world, *seeds, copy)
    document = _evaluate(world, seeds[0], copy, lang=("de",))
    assert sorted(document.signature.checkpoints) == [
        f"{number}/{name}" for number in (1, 2) for name in ("align-de", "clip-ve")
    ]
    assert str(tmp_path) not in json.dumps(document.to_json())
    # Another student of the same teacher is another training, where a student is asked.
    student = copy / "align-de"
    teacher = ClipVE.from_folder(copy / "clip-ve").fingerprint
    encoder = load_student(student)
    encoder.projection.weight.data += 0.1
    save_student(encoder, student, languages=["de"], teacher=teacher)
    assert _evaluate(world, seeds[1], copy, lang=("de",)).seeds["de"]
    with pytest.raises(UsageError, match="hold the same models"):
        _evaluate(world, seeds[1], copy, lang=("en",))


def test_the_classifier_in_the_model_is_asked_once_for_all_trainings(data, seeds, monkeypatch):
    predict, calls = HypothesisClassifier.predict, []
    monkeypatch.setattr(
        HypothesisClassifier, "predict", lambda *texts: calls.append(texts) or predict(*texts)
    )
    (data / "snli_ve_train.jsonl").unlink()
    document = _evaluate(data, *seeds[:2], lang=("en",))
    assert document.seeds["en"]["difference_to_hypothesis_only"].num_seeds == 2
    assert len(calls) == 1


def test_rows_of_training_are_told(data, trained, tmp_path):
    options = {"lang": ("en", "de"), "report": tmp_path / "report"}
    _evaluate(data, trained, split="train", **options, progress=(notes := Notes()))
    assert notes.text.count("those of the training split") == 1
    page = tmp_path / "report" / "report.html"
    assert "those of the training split" in page.read_text()
    _evaluate(data, trained, **options, progress=(quiet := Notes()))
    assert "training split" not in quiet.text + page.read_text()
    (data / "snli_ve_train.jsonl").replace(data / "snli_ve_test.jsonl")
    assert _evaluate(data, trained, lang=("en",), allow_leak=True).of_training_rows


def test_the_signature_tells_precision_and_device(world, trained):
    for precision, actual in (("fp32", {"fp32"}), ("bf16", {"bf16"}), ("auto", {"fp32", "bf16"})):
        signature = _evaluate(world, trained, lang=("en",), precision=precision).signature
        assert signature.precision in actual and signature.device == "cpu"


# --- the hypothesis-only classifier ---


@pytest.fixture
def learned(monkeypatch):
    """How many rows the classifier was given, each time it learned."""
    counts, learn = [], HypothesisClassifier.fit
    monkeypatch.setattr(
        HypothesisClassifier, "fit", lambda *rows: counts.append(len(rows[0])) or learn(*rows)
    )
    return counts


def test_the_classifier_learns_once_until_anything_changes(data, trained, cache, learned):
    def measured(**options):
        return _evaluate(data, trained, lang=("en",), **options)

    first = measured()
    assert measured() == first and learned == [24]
    (kept,) = (cache / "hypothesis-only").iterdir()
    whole = json.loads(kept.read_text())
    for damaged in ([0, 1], {"counts": [8]}, whole | {"labels": [0]}, whole | {"counts": [8]}):
        kept.write_text(json.dumps(damaged))
        assert measured() == first
    assert learned == [24] * 5 and json.loads(kept.read_text()) == whole
    edit_row(data / "snli_ve_train.jsonl", 1, sentence2="Something else.")
    measured()
    edit_row(_test_file(data, "en"), 1, sentence2="Something else.")
    measured()
    assert learned == [24] * 7
    edit_row(_test_file(data, "en"), 1, Flickr30K_ID="train0")
    with pytest.raises(DataError, match="also in"):
        measured()
    measured(allow_leak=True)
    with pytest.raises(DataError, match="also in"):
        measured()


def test_without_the_training_file_the_models_own_classifier_guesses(data, trained, runs):
    document = _evaluate(data, trained)
    training = (data / "snli_ve_train.jsonl").rename(data / "elsewhere.jsonl")
    without = _evaluate(data, trained)
    assert without.baselines == document.baselines and without.results == document.results
    name = "snli_ve_train.jsonl"
    assert without.signature.training[f"clip-ve: {name}"] == document.signature.training[name]
    training.rename(data / name)
    (data / "snli_ve_train.de.jsonl").unlink()  # it reads English only
    assert _evaluate(data, trained, lang=("de",)).baselines["de"].hypothesis_only is None
    (data / name).unlink()
    (runs / "clip-ve" / HYPOTHESIS_ONLY_FILE).unlink()  # as in a folder of an earlier version
    assert _evaluate(data, runs, lang=("en",)).baselines["en"].majority is None


# --- real files ---


def test_xvnli_as_it_is_in_both_modes(assets, tmp_path, trained, encoder):
    """Its files as they are, made-up photos for every name, and an untrained student."""
    runs, images = tmp_path / "runs", tmp_path / "photos"
    model = ClipVE.from_folder(shutil.copytree(trained / "clip-ve", runs / "clip-ve"))
    student = runs / "european and arabic"
    student.mkdir()
    save_student(
        new_student(encoder, model.text.embedding_dim), student,
        languages=["ar", "es", "fr", "ru"], teacher=model.fingerprint,
    )  # fmt: skip
    images.mkdir()
    data = assets / "text" / "xvnli"
    for number, name in enumerate(read_split(data, "test").image_names):
        Image.new("RGB", (8, 8), (number % 256, 90, 120)).save(images / f"{name}.jpg")
    # The English file stands in for a translation: the same rows by pairID.
    notes = Notes()
    document = _evaluate(
        data, runs, progress=notes, images=images, mode="both", engine="file",
        translations=data / "test.en.jsonl", resamples=50,
    )  # fmt: skip
    languages = [result.lang for result in document.results]
    assert languages == ["en", "ar", "ar", "es", "es", "fr", "fr", "ru", "ru"]
    unlabelled = sum(row["gold_label"] == "-" for row in read_jsonl(data / "test.en.jsonl"))
    assert unlabelled > 0
    for result in document.results:
        assert result.num_examples == 1164 - unlabelled
        if result.mode == "translate-test":
            assert result.accuracy == document.results[0].accuracy
            assert result.agreement_with_english == 1
    assert f"{unlabelled} rows without a majority label (-) skipped" in notes.text
    # As IGLUE lays them out.
    for lang in ("en", "fr"):
        (tmp_path / "annotations" / lang).mkdir(parents=True)
        shutil.copy(data / f"test.{lang}.jsonl", tmp_path / "annotations" / lang / "test.jsonl")
    laid_out = _evaluate(tmp_path / "annotations", runs, images=images, resamples=50)
    assert laid_out.results == (document.results[0], document.results[5])
    assert laid_out.signature.data.keys() == {"en/test.jsonl", "fr/test.jsonl"}


def test_nlvr_as_it_is(assets, trained):
    """Real pictures and sentences; of the three labels two occur."""
    document = _evaluate(assets / "nlvr_ve", trained, split="dev", resamples=50)
    (english,) = document.results
    assert english.num_examples == sum(map(sum, english.confusion)) == 199
    assert english.per_class["neutral"].support == 0
    assert document.baselines["en"].hypothesis_only is not None


def test_hard_rows_are_those_that_the_wording_does_not_give_away(
    data, trained, tmp_path, monkeypatch
):
    neutral = LABELS.index("neutral")
    monkeypatch.setattr(
        HypothesisClassifier, "predict", lambda _, texts: np.full(len(texts), neutral)
    )
    options = {"lang": ("en",), "report": tmp_path / "report", "resamples": 10_000}
    (english,) = _evaluate(data, trained, **options).results
    rows = read_jsonl(tmp_path / "report" / "predictions.en.jsonl")
    hard = [row for row in rows if row["label"] != "neutral"]
    right = [row["predicted"] == row["label"] for row in hard]
    assert english.num_hard == len(hard) < english.num_examples
    expected = accuracy_interval(right, [row["image"] for row in hard], resamples=10_000, seed=0)
    assert expected == Interval(
        english.hard_accuracy, english.hard_accuracy_low, english.hard_accuracy_high
    )
    assert english.loss_low <= english.loss <= english.loss_high
