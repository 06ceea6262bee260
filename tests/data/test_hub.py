import hashlib
import io
import json

import datasets
import huggingface_hub
import pytest
from PIL import Image
from tiny_world import Notes, read_jsonl

from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.images import ImageFolder, open_image
from clseave_cli.core.data.records import check_leak, join, languages, read_split
from clseave_cli.errors import DataError
from clseave_cli.labels import LABELS

#: Not in the order of ours, as on the hub.
_NAMES = ["contradiction", "entailment", "neutral"]


def _dataset(colours, labels):
    features = {
        "image": datasets.Image(),
        "hypothesis": datasets.Value("string"),
        "label": datasets.ClassLabel(names=_NAMES),
    }
    rows = {
        "image": [Image.new("RGB", (8, 8), colour) for colour in colours],
        "hypothesis": [f"Satz {n} über {colour}" for n, colour in enumerate(colours)],
        "label": labels,
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.fixture
def hub(monkeypatch):
    """Data sets by name; each can be asked for once."""
    held = {
        "org/ve": {
            "train": _dataset(["red", "green", "red"], [1, 0, -1]),
            "validation": _dataset(["blue"], [2]),
            "other": _dataset(["black"], [2]),
        }
    }

    def load(name):
        if name not in held:
            raise FileNotFoundError(f"Couldn't find {name}\nmore")
        return held.pop(name)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return held


def test_a_data_set_is_written_out_once_as_an_ordinary_folder(tmp_path, hub):
    folder = data_folder("hf:org/ve", root=tmp_path)
    assert folder == tmp_path / "org--ve"
    assert data_folder(str(folder)) == folder  # a local folder is itself
    names = sorted(path.name for path in folder.glob("*.jsonl"))
    assert names == ["snli_ve_dev.jsonl", "snli_ve_train.jsonl"]
    train = read_split(folder, "train", labelled=False)
    assert train.labels.tolist() == [0, 2, -1]
    assert train.image_index.tolist() == [0, 1, 0]  # a photo of several rows stays one photo
    assert train.hypotheses == ["Satz 0 über red", "Satz 1 über green", "Satz 2 über red"]
    images = ImageFolder.of(folder, None)
    photos = [open_image(images.find(name, "x")) for name in train.image_names]
    assert [photo.getpixel((4, 4)) for photo in photos] == [(255, 0, 0), (0, 128, 0)]
    assert read_split(folder, "dev").labels.tolist() == [1]

    assert data_folder("hf:org/ve", root=tmp_path) == folder and not hub  # not asked for again


def test_a_photo_in_two_splits_of_the_hub_is_a_leak(tmp_path, hub):
    hub["org/leaky"] = {"train": _dataset(["red"], [1]), "test": _dataset(["red"], [0])}
    folder = data_folder("hf:org/leaky", root=tmp_path)
    with pytest.raises(DataError, match="1 of its images are also in"):
        check_leak(read_split(folder, "train"), read_split(folder, "test"))


def _splits(**splits):
    """A data set whose columns are of whatever type their values are."""
    return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})


def _jpeg(colour):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "JPEG")
    return stream.getvalue()


def _xvnli(lang, colours=("red", "blue")):
    return [
        {"caption": "never", "hypothesis": f"{lang} {n} {c}", "label": _NAMES[n],
         "flikr30k_id": f"{c}7", "image": {"bytes": _jpeg(c)}}
        for n, c in enumerate(colours)
    ]  # fmt: skip


def test_xvnli_has_languages_as_splits_and_photos_as_bytes(tmp_path, hub):
    hub["floschne/xvnli"] = _splits(en=_xvnli("en"), fr=_xvnli("fr"), ru=_xvnli("ru")[::-1])
    folder = data_folder("hf:floschne/xvnli", root=tmp_path)
    assert languages(folder, "test") == ["en", "fr", "ru"]
    english, french, russian = (read_split(folder, "test", lang) for lang in ("en", "fr", "ru"))
    assert french.hypotheses == ["fr 0 red", "fr 1 blue"]
    assert french.labels.tolist() == [LABELS.index(name) for name in _NAMES[:2]]
    # The names that the leak guard compares with SNLI-VE's, and the bytes as they were.
    assert french.image_names == ["red7.jpeg", "blue7.jpeg"]
    assert (folder / "images" / "red7.jpeg").read_bytes() == _jpeg("red")
    assert join(french, english).sources == english.hypotheses
    # In another order, rows of one number do not belong together.
    assert not set(russian.pair_ids) & set(english.pair_ids)
    assert "never" not in french.path.read_text()


_SNLI = {"pairID": "1#0r1n", "hypothesis": "A dog.", "label": "neutral"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (_SNLI | {"premise": "x", "filename": "a.jpg", "image": _jpeg("red")}, "a.jpeg"),
        (_SNLI | {"sentence": "A dog.", "image_id": 12, "pic": {"bytes": _jpeg("red")}}, "12.jpeg"),
        (_SNLI | {"sentence2": "A dog.", "Flickr30K_ID": 12}, "12"),
        (_SNLI | {"filename": "../../evil.jpg", "image": _jpeg("red")}, "evil.jpeg"),
        (_SNLI | {"filename": "..", "image": _jpeg("red")}, None),
    ],
)  # fmt: skip
def test_rows_of_snli_ve_as_others_publish_them(tmp_path, hub, row, expected):
    if "sentence" in row:
        del row["hypothesis"]
    hub["org/snli"] = _splits(validation=[row])
    split = read_split(data_folder("hf:org/snli", root=tmp_path / "data"), "dev")
    assert (split.pair_ids, split.hypotheses) == (["1#0r1n"], ["A dog."])
    if expected is None:  # no name to trust: its content names it
        expected = hashlib.blake2b(_jpeg("red"), digest_size=16).hexdigest() + ".jpeg"
    assert split.image_names == [expected]
    assert [path.name for path in tmp_path.rglob("*.j*g")] == [expected] * ("image" in str(row))


def test_photos_that_lie_beside_the_rows(tmp_path, hub):
    """As `datasets` keeps those of a folder of images: their paths, not their bytes."""
    Image.new("L", (8, 8), 7).save(tmp_path / "a.tif")
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.tif")], "caption": ["A dog."]})
    hub["org/folder"] = {"test": rows.cast_column("image", datasets.Image())}
    folder = data_folder("hf:org/folder", root=tmp_path / "data")
    ((name, caption),) = _captions(folder, "test")
    assert caption == "A dog." and name.endswith(".png")
    assert open_image(folder / "images" / name).getpixel((4, 4)) == (7, 7, 7)


def test_two_photos_of_one_name_stay_two(tmp_path, hub):
    rows = [_SNLI | {"pairID": c, "filename": "a.jpg", "image": _jpeg(c)} for c in ("red", "blue")]
    hub["org/same"] = _splits(test=rows)
    folder = data_folder("hf:org/same", root=tmp_path)
    names = read_split(folder, "test").image_names
    contents = [(folder / "images" / name).read_bytes() for name in names]
    assert contents == [_jpeg("red"), _jpeg("blue")]


def _write_text_rows(folder, *splits):
    """A data set without photos; each split is one row that says its name."""
    folder.mkdir()
    for split in splits:
        row = {"pairID": split, "Flickr30K_ID": "1", "sentence2": split, "gold_label": "neutral"}
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_a_data_set_with_a_script_is_read_without_it(tmp_path, hub, monkeypatch):
    def refuse(name):
        raise RuntimeError("Dataset scripts are no longer supported, but found SNLI-VE.py")

    fetched = _write_text_rows(tmp_path / "fetched", "snli_ve_dev", "snli_ve_test")
    (fetched / "SNLI-VE.py").write_text("raise SystemExit")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(fetched))
    folder = data_folder("hf:HuggingFaceM4/SNLI-VE", root=tmp_path / "data")
    assert read_split(folder, "dev").hypotheses == ["snli_ve_dev"]
    assert read_split(folder, "test").image_names == ["1"]


def test_a_real_local_data_set_goes_through_datasets(tmp_path, monkeypatch):
    source = _write_text_rows(tmp_path / "set", "train")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = data_folder(f"hf:{source}", root=tmp_path / "data")
    split = read_split(folder, "train")
    assert (split.pair_ids, split.hypotheses, split.image_names) == (["train"], ["train"], ["1"])


def _captions(folder, name):
    return [(row["image"], row["caption"]) for row in read_jsonl(folder / f"captions_{name}.jsonl")]


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (  # floschne/xm3600
            {lang: [{"image_id": "0a", "image_locale": "cs", "captions": [f"{lang} 1", f"{lang} 2"],
                     "captions_tokenized": ["no"], "image": {"bytes": _jpeg("red"), "path": "x"}}]
             for lang in ("en", "quz")},
            {"test": [("0a.jpeg", "en 1"), ("0a.jpeg", "en 2")],
             "test.quz": [("0a.jpeg", "quz 1"), ("0a.jpeg", "quz 2")]},
        ),
        (  # floschne/xflickrco
            {lang: [{"id": "391895", "sentences": lang * 2, "image": {"bytes": _jpeg("red")}}]
             for lang in ("en", "ja")},
            {"test": [("391895.jpeg", "enen")], "test.ja": [("391895.jpeg", "jaja")]},
        ),
        (  # romrawinjp/multi30k
            {"train": [{"id": "7", "filename": "1.jpg", "en": "A dog.", "de": "Ein Hund.",
                        "image": _jpeg("red")}]},
            {"train": [("1.jpeg", "A dog.")], "train.de": [("1.jpeg", "Ein Hund.")]},
        ),
    ],
)  # fmt: skip
def test_captions_of_the_hub_in_several_languages(tmp_path, hub, splits, expected):
    hub["org/captions"] = _splits(**splits)
    folder = data_folder("hf:org/captions", root=tmp_path)
    for name, captions in expected.items():
        assert _captions(folder, name) == captions
    assert len(list(folder.iterdir())) == len(expected) + 1


_COCO = {
    "info": {}, "images": [{"id": 9, "file_name": "COCO_val2014_000000000009.jpg"}],
    "annotations": [{"id": 1, "image_id": 9, "caption": "A meal."}],
}  # fmt: skip
_SUGAR = {"0": {"filename": "9.jpg", "caption": "A red cup.", "negative_caption": "A blue cup."}}
_XM3600 = {
    "image/key": "0a", "image/locale": "cs", "en": {"caption": ["E 1.", "E 2."]},
    "id": {"caption": ["I."]}, "cs": {"caption": ["C."], "caption/tokenized": ["no"]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("files", "data", "expected"),
    [
        ({"captions_val2014.json": _COCO, "captions_train2014.json": _COCO}, "captions_*.json",
         {"captions_dev": ["A meal."], "captions_train": ["A meal."]}),
        ({"stair_captions_v1.2_val.json": _COCO}, "stair_captions_v1.2_val.json",
         {"captions_dev.ja": ["A meal."]}),
        ({"add_att.json": _SUGAR, "swap_obj.json": _SUGAR}, "*.json",
         {"snli_ve_test": ["A red cup.", "A blue cup."] * 2}),
        ({"captions.jsonl": _XM3600}, "captions.jsonl",
         {"captions_test": ["E 1.", "E 2."], "captions_test.id": ["I."],
          "captions_test.cs": ["C."]}),
        ({f"annotations/{lang}/test.jsonl": {"sentences": [lang], "id": "1", "img_path": "1.jpg"}
          for lang in ("de", "en")}, "annotations/*/test.jsonl",
         {"captions_test": ["en"], "captions_test.de": ["de"]}),
        ({"train.jsonl": {"en": "A dog.", "de": "Ein Hund."}}, "train.jsonl",
         {"snli_ve_train": ["A dog."], "snli_ve_train.de": ["Ein Hund."]}),
        ({"test.parquet": _SNLI | {"filename": "9.jpg"}}, "test.parquet",
         {"snli_ve_test": ["A dog."]}),
    ],
)  # fmt: skip
def test_files_of_other_layouts_are_named_by_one_flag(tmp_path, files, data, expected):
    for name, content in files.items():
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            datasets.Dataset.from_list([content]).to_parquet(path)
        else:
            path.write_text(json.dumps(content))
    data, root = str(tmp_path / "files" / data), tmp_path / "data"
    folder = data_folder(data, root=root)
    written = {path.stem: read_jsonl(path) for path in folder.iterdir()}
    assert expected == {
        stem: [row.get("caption", row.get("hypothesis")) for row in rows]
        for stem, rows in written.items()
    }
    if "add_att.json" in files:
        split = read_split(folder, "test")
        assert split.labels.tolist() == [0, 2, 0, 2] and split.image_names == ["9.jpg"]
    assert data_folder(data, root=root) == folder
    if path.suffix != ".parquet":  # another content is another folder
        path.write_text(json.dumps(content) + "\n")
        assert data_folder(data, root=root) != folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", r"a\.json: not readable as COCO captions or rows"),
        ('{"annotations": [{"caption": "x", "image_id": 3}], "images":[]}', "not readable as COCO"),
        ('[{"pic": "a", "says": "b"}]', r"a, row 1: no supported layout has these columns: pic"),
        ('[{"sentence2": "a"}, {"sentence2": ""}]', "row 2: sentence2 has no sentence"),
        ("[]", "a has no rows"),
    ],
)
def test_files_of_no_layout_are_one_error_and_leave_nothing(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        data_folder(str(tmp_path / "a.json"), root=tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/absent", r"--data hf:org/absent: cannot be loaded \(Couldn't find"),
        ("org/odd", "none of its splits"),
        ("org/none", r"hf:org/none: test, row 1: damaged, or not an image in JPEG"),
    ],
)
def test_what_cannot_be_used_is_refused_and_leaves_nothing_behind(tmp_path, hub, name, message):
    hub["org/odd"] = {"all": _dataset(["red"], [1])}
    hub["org/none"] = _splits(test=[_SNLI | {"filename": "a", "image": b"secret"}])
    with pytest.raises(DataError, match=message):
        data_folder(f"hf:{name}", Notes(), root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_command_evaluates_xvnli(clseave, trained, tmp_path, world, hub, monkeypatch):
    """Without the photos of Flickr30k, and without a training split."""
    monkeypatch.chdir(tmp_path)
    hub["floschne/xvnli"] = _splits(
        **{
            lang: [
                {"hypothesis": sentence, "label": "entailment", "flikr30k_id": path.stem,
                 "image": {"bytes": path.read_bytes()}}
                for path in (world / "images/test0.png", world / "images/test1.png")
            ]
            for lang, sentence in (("en", "The square is red."), ("de", "Das Quadrat ist rot."))
        }
    )  # fmt: skip
    options = ("--data", "hf:floschne/xvnli", "--runs", trained, "--resamples", 20)
    code, out, err = clseave("evaluate", *options, "--json")
    assert code == 0, err
    results = json.loads(out)["results"]
    assert [(each["lang"], each["num_examples"]) for each in results] == [("en", 2), ("de", 2)]


def test_a_name_cannot_leave_the_data_folder(tmp_path, hub):
    hub["../../evil"] = {"train": _dataset(["red"], [1])}
    root = tmp_path / "in" / "data"
    folder = data_folder("hf:../../evil", root=root)
    assert folder.parent == root and folder.is_dir()
