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
    """A hub with one data set; gives the names that were asked for."""
    loaded = datasets.DatasetDict(
        train=_dataset(["red", "green", "red"], [1, 0, -1]),
        validation=_dataset(["blue"], [2]),
        other=_dataset(["black"], [2]),
    )
    asked = []

    def load(name):
        asked.append(name)
        if name != "org/ve":
            raise FileNotFoundError(f"Couldn't find {name}\nmore")
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_local_folder_is_itself(tmp_path, hub):
    assert data_folder(str(tmp_path)) == tmp_path
    assert hub == []


def test_a_data_set_is_written_out_once_as_an_ordinary_folder(tmp_path, hub):
    folder = data_folder("hf:org/ve", root=tmp_path)
    assert folder == tmp_path / "org--ve"
    assert sorted(path.name for path in folder.glob("*.jsonl")) == [
        "snli_ve_dev.jsonl",
        "snli_ve_train.jsonl",
    ]
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

    assert data_folder("hf:org/ve", root=tmp_path) == folder
    assert hub == ["org/ve"]


def test_a_photo_in_two_splits_of_the_hub_is_a_leak(tmp_path, monkeypatch):
    loaded = datasets.DatasetDict(train=_dataset(["red"], [1]), test=_dataset(["red"], [0]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded)
    folder = data_folder("hf:org/leaky", root=tmp_path)
    with pytest.raises(DataError, match="1 of its images are also in"):
        check_leak(read_split(folder, "train"), read_split(folder, "test"))


def test_a_name_cannot_leave_the_data_folder(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": _dataset(["red"], [1])})
    root = tmp_path / "in" / "data"
    folder = data_folder("hf:../../evil", root=root)
    assert folder.parent == root and folder.is_dir()


def test_what_cannot_be_loaded_leaves_nothing_behind(tmp_path, hub):
    with pytest.raises(DataError, match=r"--data hf:org/none: cannot be loaded \(Couldn't find"):
        data_folder("hf:org/none", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_splits_we_do_not_know_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"all": _dataset(["red"], [1])})
    with pytest.raises(DataError, match="none of its splits"):
        data_folder("hf:org/odd", Notes(), root=tmp_path)
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
