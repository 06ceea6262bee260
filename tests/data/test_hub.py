import json

import datasets
import pytest
from PIL import Image
from tiny_world import Notes

from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.images import ImageFolder, open_image
from clseave_cli.core.data.records import check_leak, read_split
from clseave_cli.errors import DataError

#: Not in the order of ours, as on the hub.
_NAMES = ["contradiction", "entailment", "neutral"]


def _dataset(colours, labels):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=_NAMES),
        }
    )
    rows = {
        "image": [Image.new("RGB", (8, 8), colour) for colour in colours],
        "hypothesis": [f"Satz {n} über {colour}" for n, colour in enumerate(colours)],
        "label": labels,
    }
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def hub(monkeypatch):
    """Data sets by name; each can be asked for once."""
    held = {
        "org/ve": datasets.DatasetDict(
            train=_dataset(["red", "green", "red"], [1, 0, -1]),
            validation=_dataset(["blue"], [2]),
            other=_dataset(["black"], [2]),
        )
    }

    def load(name):
        if name not in held:
            raise FileNotFoundError(f"Couldn't find {name}\nmore")
        return held.pop(name)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return held


def test_a_local_folder_is_itself(tmp_path, hub):
    assert data_folder(str(tmp_path)) == tmp_path


def test_a_data_set_is_written_out_once_as_an_ordinary_folder(tmp_path, hub):
    folder = data_folder("hf:org/ve", root=tmp_path)
    assert folder == tmp_path / "org--ve"
    names = sorted(path.name for path in folder.glob("*.jsonl"))
    assert names == ["snli_ve_dev.jsonl", "snli_ve_train.jsonl"]
    train = read_split(folder, "train", labelled=False)
    assert train.labels.tolist() == [0, 2, -1]
    assert train.image_index.tolist() == [0, 1, 0]  # a photo of several rows stays one photo
    assert train.hypotheses == ["Satz 0 über red", "Satz 1 über green", "Satz 2 über red"]
    images = ImageFolder.of(folder, None)
    colours = [
        open_image(images.find(train.image_names[i], "x")).getpixel((4, 4))
        for i in train.image_index
    ]
    assert colours == [(255, 0, 0), (0, 128, 0), (255, 0, 0)]
    assert read_split(folder, "dev").labels.tolist() == [1]

    assert data_folder("hf:org/ve", root=tmp_path) == folder and not hub  # not asked for again


def test_a_photo_in_two_splits_of_the_hub_is_a_leak(tmp_path, hub):
    hub["org/leaky"] = datasets.DatasetDict(
        train=_dataset(["red"], [1]), test=_dataset(["red"], [0])
    )
    folder = data_folder("hf:org/leaky", root=tmp_path)
    with pytest.raises(DataError, match="1 of its images are also in"):
        check_leak(read_split(folder, "train"), read_split(folder, "test"))


def test_a_name_cannot_leave_the_data_folder(tmp_path, hub):
    hub["../../evil"] = {"train": _dataset(["red"], [1])}
    root = tmp_path / "in" / "data"
    folder = data_folder("hf:../../evil", root=root)
    assert folder.parent == root and folder.is_dir()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/none", r"--data hf:org/none: cannot be loaded \(Couldn't find"),
        ("org/odd", "none of its splits"),
    ],
)
def test_what_cannot_be_used_leaves_nothing_behind(tmp_path, hub, name, said):
    hub["org/odd"] = {"all": _dataset(["red"], [1])}
    with pytest.raises(DataError, match=said):
        data_folder(f"hf:{name}", Notes(), root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_real_local_data_set_goes_through_datasets(tmp_path):
    source = tmp_path / "set"
    source.mkdir()
    row = {"pairID": "a", "Flickr30K_ID": "1", "sentence2": "x y", "gold_label": "neutral"}
    (source / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        folder = data_folder(f"hf:{source}", root=tmp_path / "data")
    split = read_split(folder, "train")
    assert (split.pair_ids, split.hypotheses, split.image_names) == (["a"], ["x y"], ["1"])
