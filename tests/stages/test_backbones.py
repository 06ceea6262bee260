"""Every layout of teacher and kind of student through the stages, and a source that is Chinese."""

import shutil

import numpy as np
import pytest
import torch
from tiny_backbones import CANNOT_BE_PACKED, STUDENTS, TEACHERS, new_siglip, save_word_tokenizer
from tiny_world import (
    QUICK,
    labelled_pairs,
    quick_align,
    quick_finetune,
    read_jsonl,
    reseal,
    sentences,
    write_captions,
    write_jsonl,
    write_world,
)

from clseave_cli import VisualEntailment
from clseave_cli.core.config import (
    EvaluateConfig,
    ExportConfig,
    PredictConfig,
    PretrainConfig,
)
from clseave_cli.core.data.images import open_image
from clseave_cli.core.evaluation.results import Results
from clseave_cli.core.evaluation.run import evaluate
from clseave_cli.core.files import read_json
from clseave_cli.core.models.backbones import load_encoder
from clseave_cli.core.models.clip_ve import (
    ClipVE,
    EntailmentHead,
    HeadConfig,
    fingerprint,
    source_language,
)
from clseave_cli.core.models.encoders import module_digest
from clseave_cli.core.models.student import load_student
from clseave_cli.core.models.weights import save_weights
from clseave_cli.core.prediction.export import export
from clseave_cli.core.prediction.inference import load_model
from clseave_cli.core.prediction.predictor import predict_file
from clseave_cli.core.prediction.torch_model import TorchModel
from clseave_cli.core.pretraining import pretrain
from clseave_cli.errors import ModelError


def _train(data, runs, clip, encoder, *languages, **more):
    quick_finetune(data, runs, clip, epochs=1, **more)
    quick_align(data, runs, runs, encoder, *languages)


def _evaluate(data, runs, *languages, **more):
    shared = {"resamples": 50, "device": "cpu", "precision": "fp32", **more}
    return evaluate(EvaluateConfig(data=str(data), runs=(runs,), lang=languages, **shared))


def _predict_right(data, runs, lang):
    """The share of test rows that `predict` gets right."""
    pairs, labels = labelled_pairs(data, lang)
    answers = VisualEntailment.from_pretrained(runs, lang, "cpu", "fp32").predict(pairs)
    return np.mean([a.label == label for a, label in zip(answers, labels, strict=True)])


@pytest.mark.parametrize("layout", list(TEACHERS))
def test_a_teacher_of_any_layout_goes_through_all_stages_and_is_exported_or_refused(
    layout, world, tmp_path, encoder
):
    clip = TEACHERS[layout](tmp_path / "clip", sentences(world))
    before = ClipVE.from_clip(clip)
    head = "pooled" if layout == "siglip2" else "patches"  # its pictures vary in their patches
    _train(world, tmp_path, clip, encoder, "de", head=head)
    after = ClipVE.from_folder(tmp_path / "clip-ve")
    assert module_digest(after.image) == module_digest(before.image)
    assert module_digest(after.text) != module_digest(before.text)
    results = _evaluate(world, tmp_path)
    assert [result.lang for result in results.results] == ["en", "de"]
    for result in results.results:
        assert result.accuracy == pytest.approx(_predict_right(world, tmp_path, result.lang))

    pytest.importorskip("onnxruntime")
    config = ExportConfig(runs=tmp_path, out=tmp_path / "onnx", lang=("en",))
    if layout == "siglip2":
        with pytest.raises(ModelError, match="preprocessing cannot be exported"):
            export(config)
        assert not (tmp_path / "onnx").exists()
        return
    assert export(config).difference < 1e-4
    torch_model = TorchModel(tmp_path, ["en"], "cpu", "fp32")
    onnx_model = load_model(tmp_path / "onnx")
    texts = ["The square is red.", "x", "The square is " + "green. The square is blue. " * 30]
    expected, cut = torch_model.embed_sentences("en", texts)
    actual, actual_cut = onnx_model.embed_sentences("en", texts)
    assert actual == pytest.approx(expected, abs=1e-3) and actual_cut.tolist() == cut.tolist()
    picture = open_image(world / "images" / "test0.png").resize((50, 35))
    pixels = torch_model.prepare(picture)
    assert onnx_model.prepare(picture) == pytest.approx(pixels, abs=1e-5)
    batch = np.stack([pixels, pixels[:, ::-1].copy()])
    assert onnx_model.embed_images(batch) == pytest.approx(
        torch_model.embed_images(batch), abs=1e-3
    )


@pytest.mark.parametrize("name", list(STUDENTS))
def test_a_student_of_any_kind_goes_through_all_stages_and_is_exported(name, world, tmp_path, runs):
    backbone = STUDENTS[name](tmp_path / "encoder", sentences(world))
    folder = quick_align(world, runs, runs, backbone, "nl").folder
    results = _evaluate(world, runs, "en", "nl", batch_size=5)
    assert results.results[1].accuracy == pytest.approx(_predict_right(world, runs, "nl"))
    student = load_student(folder)
    assert student.packs == (name not in CANNOT_BE_PACKED)
    assert module_digest(student.backbone) != module_digest(load_encoder(backbone)[0])
    pytest.importorskip("onnxruntime")
    config = ExportConfig(runs=runs, out=tmp_path / "onnx", lang=("nl",))
    assert export(config).difference < 1e-3


# --- pretrain ---


@pytest.mark.parametrize("layout", ["chinese_clip", "altclip"])
def test_pretraining_goes_on_from_other_layouts(layout, world, tmp_path):
    clip = TEACHERS[layout](tmp_path / "clip", sentences(world))
    data = write_captions(world, tmp_path / "captions")
    config = PretrainConfig(
        data=data, images=world / "images", clip=str(clip), runs=tmp_path / "runs", epochs=1,
        **QUICK,
    )  # fmt: skip
    folder = pretrain(config).folder
    before, after = ClipVE.from_clip(clip), ClipVE.from_clip(folder)
    assert module_digest(after.text) != module_digest(before.text)
    assert module_digest(after.image) != module_digest(before.image)


# --- bad models ---


def test_bad_teachers_and_students_get_one_line(world, tmp_path, runs, refused):
    siglip = new_siglip(tmp_path / "wide", sentences(world), projection_size=24)
    finetuning = ("finetune-ve", "--data", world, "--runs", tmp_path / "new", "--clip")
    line = refused(*finetuning, siglip)
    assert "text tower projects to 24, the image tower to 16" in line
    other = STUDENTS["XLM-R"](tmp_path / "encoder", sentences(world))
    line = refused(*finetuning, other)
    assert "a xlm-roberta model; expected one of CLIP layout, or of SigLIP's" in line
    pretraining = ("pretrain", "--data", write_captions(world, tmp_path / "captions"), "--images")
    line = refused(*pretraining, world / "images", "--runs", tmp_path / "new", "--clip", siglip)
    assert "SigLIP was trained with another loss than CLIP's" in line
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").iterdir())
    aligning = ("align", "--data", world, "--runs", runs, "--lang", "de", "--student")
    assert "a siglip model; expected a text encoder" in refused(*aligning, siglip)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    save_word_tokenizer(other, sentences(world), special=special, template="<s> $A")
    assert "its tokenizer does not end a text in its [SEP]" in refused(*aligning, other)


def test_a_head_of_another_width_is_refused(world, tmp_path, runs, refused):
    folder = runs / "clip-ve"
    save_weights(EntailmentHead(HeadConfig(embedding_dim=20)), folder / "head.safetensors")
    reseal(folder, "clip-ve", head={"embedding_dim": 20})
    command = ("align", "--lang", "de", "--data", world, "--runs", tmp_path / "new")
    line = refused(*command, "--teacher", folder)
    assert "the text tower projects to 16, the image tower to 16, the head reads 20" in line
    assert str(folder) in line and not list(tmp_path.glob("new/align*"))


# --- a source language other than English ---


@pytest.fixture(scope="module")
def chinese_world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("zh") / "data", languages=("en", "de", "zh"))


@pytest.fixture(scope="module")
def chinese(tmp_path_factory, chinese_world, encoder):
    """Models with Chinese as their source, aligned to English and German; read only."""
    base = tmp_path_factory.mktemp("chinese")
    clip = TEACHERS["chinese_clip"](base / "clip", sentences(chinese_world))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSEAVE_CACHE", str(base / "cache"))
        _train(chinese_world, base / "runs", clip, encoder, "en", "de", source_lang="zh")
    return base / "runs"


def test_the_source_language_is_a_property_of_the_teacher(chinese):
    assert source_language(chinese / "clip-ve") == "zh"
    assert ClipVE.from_folder(chinese / "clip-ve").source_lang == "zh"
    card = (chinese / "clip-ve" / "README.md").read_text()
    assert "language: [zh]" in card and "--lang zh" in card
    for name, inputs in (
        ("clip-ve", {"snli_ve_train.zh.jsonl", "snli_ve_dev.zh.jsonl"}),
        ("align-en+de", {"train: zh of en", "dev: zh of de", "snli_ve_train.jsonl"}),
    ):
        assert inputs <= set(read_json(chinese / name / "training" / "run.json")["inputs"])
    assert "translation in zh" in (chinese / "align-en+de" / "README.md").read_text()


def test_students_imitate_the_chinese_original(chinese, chinese_world):
    """The mean squared error on dev, computed anew from the rows that belong together."""
    teacher = ClipVE.from_folder(chinese / "clip-ve").text
    student = load_student(chinese / "align-en+de")
    errors = []
    for suffix in ("", ".de"):
        target, source = (
            {row["pairID"]: row["sentence2"] for row in read_jsonl(chinese_world / name)}
            for name in (f"snli_ve_dev{suffix}.jsonl", "snli_ve_dev.zh.jsonl")
        )
        expected = _embed(teacher, [source[pair] for pair in target])
        actual = _embed(student, list(target.values()))
        errors.append(float(((actual - expected) ** 2).mean()))
    summary = read_json(chinese / "align-en+de" / "training" / "summary.json")
    assert summary["dev"]["mse"] == pytest.approx(np.mean(errors), rel=1e-3)


def test_without_a_language_sentences_are_in_the_source_models(chinese, chinese_world, tmp_path):
    image = chinese_world / "images" / "test0.png"
    answer = VisualEntailment.from_pretrained(chinese)(image, "红色的圆。")
    assert answer.lang == "zh" and answer.model == str(chinese / "clip-ve")
    both, german = tmp_path / "both", tmp_path / "german"
    export(ExportConfig(runs=chinese, out=both, lang=("de", "zh"), device="cpu"))
    assert VisualEntailment.from_pretrained(both)(image, "红色的圆。").lang == "zh"
    export(ExportConfig(runs=chinese, out=german, lang=("de",), device="cpu"))
    with pytest.raises(ModelError, match="no model for zh; available: de"):
        VisualEntailment.from_pretrained(german)
    rows = [{"image": str(image), "hypothesis": "红色的圆。"}]
    source, target = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "answers.jsonl"
    predict_file(PredictConfig(runs=chinese), source, target)
    assert read_jsonl(target)[0]["lang"] == "zh"


@pytest.fixture(scope="module")
def chinese_results(chinese, chinese_world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSEAVE_CACHE", str(chinese.parent / "cache"))
        return _evaluate(chinese_world, chinese)


def test_evaluate_compares_with_the_source_language(
    chinese, chinese_results, chinese_world, clseave, tmp_path
):
    results = chinese_results
    assert [result.lang for result in results.results] == ["zh", "en", "de"]
    source, *others = results.results
    assert results.signature.source_lang == "zh" and source.ratio_to_english == 1
    assert source.transfer is None and source.difference_to_english is None
    for result in others:
        assert result.ratio_to_english == pytest.approx(result.accuracy / source.accuracy)
        difference = result.difference_to_english.value
        assert difference == pytest.approx(result.accuracy - source.accuracy)
        assert result.transfer is not None
        assert result.accuracy == pytest.approx(_predict_right(chinese_world, chinese, result.lang))
    assert source.accuracy == pytest.approx(_predict_right(chinese_world, chinese, "zh"))
    assert Results.from_json(results.to_json()) == results
    older = results.to_json()
    del older["signature"]["source_lang"]
    assert Results.from_json(older).source_lang == "en"

    code, out, _ = clseave(
        "evaluate", "--data", chinese_world, "--runs", chinese, "--device", "cpu",
        "--report", tmp_path / "report", "--resamples", 50, "--verbose",
    )  # fmt: skip
    assert code == 0 and "to zh" in out and "with zh" in out and "to en" not in out
    assert "source zh" in out
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Chinese reaches" in page and "Against Chinese" in page
    assert "Against English" not in page and "the English" not in page
    assert "{Chinese}" in (tmp_path / "report" / "table.tex").read_text()


def test_translations_go_into_the_source_language(chinese, chinese_world, tmp_path):
    translations = tmp_path / "de.jsonl"
    shutil.copy(chinese_world / "snli_ve_test.zh.jsonl", translations)
    results = _evaluate(
        chinese_world, chinese, "zh", "de", mode="translate-test", engine="file",
        translations=translations, memory=tmp_path / "memory.sqlite",
    )  # fmt: skip
    source, translated = results.results
    assert translated.mode == "translate-test"
    assert translated.accuracy == source.accuracy and translated.agreement_with_english == 1
    first, second = results.baselines["zh"], results.baselines["de.translate-test"]
    assert (first.hypothesis_only, first.majority) == (second.hypothesis_only, second.majority)


def test_a_student_can_read_the_source_language_too(chinese, chinese_world, tmp_path, encoder):
    options = {"include_english": True, "out": tmp_path / "out"}
    result = quick_align(chinese_world, chinese, chinese, encoder, "de", **options)
    assert result.languages == ("de", "zh")


def test_align_needs_the_source_language_and_another_one(chinese, tmp_path, refused, encoder):
    folder = write_world(tmp_path / "data", languages=("en", "de"))
    command = ("align", "--data", folder, "--runs", chinese, "--student", encoder, "--lang")
    assert "--lang zh: is the teacher's language" in refused(*command, "zh", code=2)
    line = refused(*command, "de", "--out", tmp_path / "out")
    assert "no sentence2_zh" in line and "or a file of the split train in zh" in line
    line = refused("finetune-ve", "--source-lang", "zh", "--data", folder, "--runs", tmp_path)
    assert "no snli_ve_train.zh.jsonl (languages of the split train: en, de)" in line
    line = refused("finetune-ve", "--source-lang", "../x", "--data", folder, code=2)
    assert "--source-lang ../x: not a language code" in line


def test_source_sentences_kept_beside_translations_are_taken(chinese, tmp_path, encoder):
    folder = write_world(tmp_path / "data", languages=("de", "zh"))
    for split in ("train", "dev"):
        originals = folder / f"snli_ve_{split}.zh.jsonl"
        source = {row["pairID"]: row["sentence2"] for row in read_jsonl(originals)}
        path = folder / f"snli_ve_{split}.de.jsonl"
        rows = [row | {"sentence2_zh": source[row["pairID"]]} for row in read_jsonl(path)]
        write_jsonl(path, rows)
        originals.unlink()
    out = tmp_path / "out"
    assert quick_align(folder, chinese, chinese, encoder, "de", out=out).folder == out


def test_models_of_several_sources_give_a_table_of_source_by_target(
    chinese, chinese_results, chinese_world, trained, clseave, tmp_path
):
    report = tmp_path / "report"
    folders = ("--runs", chinese, "--runs", trained)
    code, out, err = clseave(
        "evaluate", *folders, "--data", chinese_world, "--report", report, "--device", "cpu",
        "--resamples", 50,
    )  # fmt: skip
    assert code == 0 and "Accuracy by source language" in " ".join(out.split()), err
    alone = {"zh": chinese_results.accuracies}
    alone["en"] = _evaluate(chinese_world, trained).accuracies
    assert [*alone["zh"]] == ["zh", "en", "de"] and [*alone["en"]] == ["en", "de"]
    document = read_json(report / "results.json")
    # The rest is about the first source, alone.
    assert document["sources"] == alone and document["signature"]["source_lang"] == "zh"
    models = document["signature"]["checkpoints"]
    assert models["clip-ve"] != models["clip-ve (source en)"] == fingerprint(trained / "clip-ve")
    assert "By source language" in (report / "report.html").read_text()


# --- helpers ---


def _embed(encoder, texts):
    with torch.no_grad():
        return torch.cat(list(encoder.embed(encoder.tokenize(texts)))).numpy()
