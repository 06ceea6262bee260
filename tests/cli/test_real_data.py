"""Data as they come: a CSV with a stray quote, photos that are missing, no dev split."""

import csv
import json

import pytest
from tiny_world import QUICK, edit_row, read_jsonl

_QUICK = [f"--{key.replace('_', '-')}={value}" for key, value in QUICK.items()]


@pytest.fixture
def finetune(clseave, data, tmp_path, clip):
    def run(*more):
        arguments = ["--data", data, "--runs", tmp_path / "runs", "--clip", clip, "--epochs=1"]
        code, _, err = clseave("finetune-ve", *arguments, *_QUICK, *more)
        return code, err.replace("\n", " ")

    return run


def _as_csv(path, stray_quote_in):
    rows = read_jsonl(path)
    path.unlink()
    path = path.with_suffix(".csv")
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow([*rows[0], "comment"])
        for number, row in enumerate(rows, 2):
            writer.writerow([*row.values(), "stray" if number == stray_quote_in else ""])
    path.write_text(path.read_text().replace("stray", '"stray'))
    return path


def test_missing_photos_a_stray_quote_and_no_dev_split(finetune, data, tmp_path):
    """An error or one row each; without a dev split photos are held out, always the same."""
    photos = {"train1.png", "train3.png"}
    for photo in photos:
        (data / "images" / photo).unlink()
    rows = read_jsonl(data / "snli_ve_train.jsonl")
    lacking = sum(row["Flickr30K_ID"] in photos for row in rows)
    code, err = finetune()
    assert code == 1 and f"images are missing, in {lacking} of {len(rows)} rows" in err
    path = _as_csv(data / "snli_ve_train.jsonl", stray_quote_in=2)
    code, err = finetune()
    assert code == 1 and f"{path}:2: not valid CSV" in err and "Is a quote opened here" in err
    code, err = finetune("--skip-bad")
    assert code == 0 and f"{path}: 1 bad rows set aside" in err
    assert f"in {lacking} of {len(rows) - 1} rows; skipped." in err
    (rejected,) = read_jsonl(data / "snli_ve_train.rejected.jsonl")
    assert rejected["line"] == 2 and '"stray' in rejected["row"]
    model = tmp_path / "runs" / "clip-ve"
    summary = json.loads((model / "training" / "summary.json").read_text())
    assert summary["pairs"] == len(rows) - 1 - lacking

    (data / "snli_ve_dev.jsonl").unlink()
    heads = set()
    for _ in range(2):
        code, err = finetune("--skip-bad", "--dev-fraction=0.3")
        assert code == 0, err
        assert f"{data}: no file for the split dev; holding out 2 of 8 images" in err
        heads.add((model / "head.safetensors").read_bytes())
    assert len(heads) == 1


def test_rows_of_snli_ve_are_judged_as_they_are(clseave, data, trained, tmp_path):
    source, target = data / "snli_ve_test.de.jsonl", tmp_path / "answers.jsonl"
    edit_row(source, 2, Flickr30K_ID="../../nowhere")
    code, _, err = clseave(
        "predict", "--input", source, "--images", data / "images", "--output", target,
        "--runs", trained, "--lang", "de",
    )  # fmt: skip
    assert code == 0, err
    rows, answers = read_jsonl(source), read_jsonl(target)
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        assert answer["pairID"] == row["pairID"] and answer["gold_label"] == row["gold_label"]
        assert (answer["image"], answer["hypothesis"]) == (row["Flickr30K_ID"], row["sentence2"])
        assert ("label" in answer) == (number != 1)
    assert answers[1]["error"] == "../../nowhere: not in --images."


def test_a_stray_quote_in_the_input_of_predict_is_one_error(clseave, data, trained, tmp_path):
    path = data / "pairs.csv"
    lines = [f"images/test0.png,Das Quadrat ist rot.,{'' if n != 3 else chr(34)}" for n in range(9)]
    path.write_text("\n".join(["image,hypothesis,comment", *lines]))
    code, out, err = clseave(
        "predict", "--input", path, "--output", "-", "--runs", trained, "--lang", "de"
    )
    assert code == 0 and "8 predicted, 1 with an error" in err
    answers = list(csv.DictReader(out.splitlines()))
    assert [n for n, answer in enumerate(answers) if answer["error"]] == [3]
    assert answers[3]["error"].startswith(f"{path}:5: not valid CSV")


def test_suspect_translations_are_noted_and_skipped_on_request(
    clseave, data, trained, tmp_path, encoder
):
    path = data / "snli_ve_train.de.jsonl"
    for line in (1, 2, 3):
        edit_row(path, line, translation_suspect=["copy"])
    arguments = [
        "align", "--lang", "de", "--data", data, "--teacher", trained / "clip-ve",
        "--runs", tmp_path / "runs", "--student", encoder, "--epochs=1", *_QUICK,
    ]  # fmt: skip
    for more, use in (([], "used; --skip-suspect"), (["--skip-suspect"], "skipped")):
        code, _, err = clseave(*arguments, *more)
        assert code == 0, err
        message = f"{path}: 3 rows marked translation_suspect {use}"
        assert message in " ".join(err.split())
