"""Worlds on disk: labels, balance, disjoint splits, parallel languages, determinism.

The tests read the files as a user would. A row's label is worked out anew from its English text and
the caption, which says all there is to know about a scene.
"""

import csv
import json
import re
from collections import Counter, defaultdict
from contextlib import contextmanager
from itertools import combinations, product
from pathlib import Path

import pytest
from PIL import Image
from tiny_world import read_jsonl, tree

from clseave_cli.core.data.mini_ve import Sizes, generate
from clseave_cli.core.data.mini_ve.generation import sample_scenes
from clseave_cli.core.data.mini_ve.world import COLORS, SHAPES
from clseave_cli.errors import ClseaveError, UsageError
from clseave_cli.labels import LABELS

SPLITS = ("train", "dev", "test")
TRANSLATIONS = ("de", "nl", "ja", "zh", "ko")
SIZES = Sizes(train_scenes=200, dev_scenes=60, test_scenes=100)
SMALL = Sizes(
    train_scenes=50,
    dev_scenes=40,
    test_scenes=40,
    train_hypotheses=2,
    dev_hypotheses=3,
    test_hypotheses=3,
)


@pytest.fixture(scope="module", params=[0, 1, 2], ids="seed {}".format)
def world(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini-ve") / "world"
    return generate(folder, seed=request.param, sizes=SIZES)


def rows_of(world, split, language="en", kind="snli_ve"):
    suffix = "" if language == "en" else f".{language}"
    return read_jsonl(world.folder / f"{kind}_{split}{suffix}.jsonl")


def captions_of(world, split, language="en"):
    return rows_of(world, split, language, kind="captions")


# --- an independent reading of the English ------------------------------------------------------

THING = re.compile(rf"\b(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)}|shape)\b")
ABSENT = re.compile(r"\b(?:but no|Nowhere in view is there an?) (?:(\w+) shape|(\w+))\b")
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


def things(text):
    return [
        (color or None, None if shape == "shape" else shape)
        for color, shape in THING.findall(text)
        if color or shape != "shape"
    ]


def is_covered(caption):
    return "curtain" in caption and "no curtain" not in caption


def form_of(sentence):
    if "exactly" in sentence:
        return "count"
    if re.search(r"\b(no|Nowhere)\b", sentence):
        return "absence"
    return "conjunction" if " and " in sentence else "presence"


def label_of(sentence, caption):
    """The label, given that a curtain always hides more cells than a sentence speaks of."""
    shown, covered = things(caption), is_covered(caption)

    def in_view(color, shape):
        return any(color in (None, c) and shape in (None, s) for c, s in shown)

    form = form_of(sentence)
    if form == "count":
        [number] = [NUMBERS[word] for word in re.findall(r"\w+", sentence) if word in NUMBERS]
        if len(shown) > number or (len(shown) < number and not covered):
            return "contradiction"
        return "neutral" if covered else "entailment"
    all_in_view = all(in_view(*thing) for thing in things(sentence))
    if all_in_view:
        return "contradiction" if form == "absence" else "entailment"
    if covered:
        return "neutral"
    return "entailment" if form == "absence" else "contradiction"


# --- what the rows say --------------------------------------------------------------------------


def test_labels_follow_from_the_caption_and_are_equally_frequent_for_every_sentence(world):
    """So whatever a function of the text answers, it is right in one row of three."""
    for split in SPLITS:
        by_sentence = defaultdict(Counter)
        for row in rows_of(world, split):
            by_sentence[row["sentence2"]][row["gold_label"]] += 1
            assert row["gold_label"] == label_of(row["sentence2"], row["sentence1"]), row
        for sentence, counts in by_sentence.items():
            assert len({counts[label] for label in LABELS}) == 1, (sentence, counts)


def test_a_perfect_reader_of_the_wrong_pictures_is_near_chance(world):
    rows = rows_of(world, "test")
    hits = [
        label_of(row["sentence2"], rows[(index + shift) % len(rows)]["sentence1"])
        == row["gold_label"]
        for shift in range(50, len(rows) - 50, 150)
        for index, row in enumerate(rows)
    ]
    assert sum(hits) / len(hits) < 0.4


def test_the_curtain_alone_is_not_enough(world):
    labels = defaultdict(Counter)
    rows = rows_of(world, "test")
    for row in rows:
        labels[form_of(row["sentence2"]), is_covered(row["sentence1"])][row["gold_label"]] += 1
    num_right = sum(max(counts.values()) for counts in labels.values())
    # Neutral is always covered, and one of the other two labels needs an open scene in every form.
    assert num_right / len(rows) == pytest.approx(2 / 3, abs=0.03)


def test_half_of_the_tested_conjunctions_are_new(world):
    train, dev, test = (
        [
            frozenset(things(row["sentence2"]))
            for row in rows_of(world, split)
            if form_of(row["sentence2"]) == "conjunction"
        ]
        for split in SPLITS
    )
    num_new = sum(pair not in {*train, *dev} for pair in test)
    assert num_new >= world.num_unseen == len(test) // 2


# --- what the files hold ------------------------------------------------------------------------


def test_no_scene_or_picture_is_in_two_splits_and_no_id_twice(world):
    images = {split: {row["Flickr30K_ID"] for row in rows_of(world, split)} for split in SPLITS}
    scenes = {split: set(drawn) for split, drawn in sample_scenes(world.seed, SIZES).items()}
    for one, other in combinations(SPLITS, 2):
        assert not images[one] & images[other]
        assert not scenes[one] & scenes[other]
    contents = [path.read_bytes() for path in (world.folder / "images").iterdir()]
    assert len(set(contents)) == len(contents) == sum(world.num_scenes.values())
    rows = [row for split in SPLITS for row in rows_of(world, split)]
    assert len({row["pairID"] for row in rows}) == len(rows)
    for row in rows:
        assert row["captionID"] == row["Flickr30K_ID"] + "#0"
        assert row["pairID"].startswith(row["captionID"])
    for name in {row["Flickr30K_ID"] for row in rows[::50]}:
        with Image.open(world.folder / "images" / name) as picture:
            assert (picture.format, picture.size, picture.mode) == ("PNG", (64, 64), "RGB")


def test_every_scene_is_asked_about(world):
    for split, per_scene in (("train", 5), ("dev", 6), ("test", 6)):
        rows = rows_of(world, split)
        asked = Counter(row["Flickr30K_ID"] for row in rows)
        assert len(asked) == world.num_scenes[split]
        assert abs(len(rows) - per_scene * len(asked)) <= 6  # rounded to threes, form by form
        assert min(asked.values()) >= per_scene - 3
        assert max(asked.values()) <= per_scene + 3
        assert max(Counter((r["Flickr30K_ID"], r["sentence2"]) for r in rows).values()) == 1


def test_the_languages_are_parallel(world):
    for split, language in product(SPLITS, TRANSLATIONS):
        translations = {}
        rows = zip(rows_of(world, split), rows_of(world, split, language), strict=True)
        for row, translated in rows:
            sentence = translated["sentence2"]
            assert translated == {**row, "sentence2": sentence, "sentence2_en": row["sentence2"]}
            assert sentence != row["sentence2"]
            assert translations.setdefault(row["sentence2"], sentence) == sentence


def test_captions_tell_the_truth(world):
    for split in ("train", "dev"):
        descriptions = {row["Flickr30K_ID"]: row["sentence1"] for row in rows_of(world, split)}
        lines = captions_of(world, split)
        assert len(lines) == world.num_captions[split] == 4 * world.num_scenes[split]
        complete = Counter()
        for line in lines:
            image, caption = line["image"], line["caption"]
            shown, covered = set(things(descriptions[image])), is_covered(descriptions[image])
            # A single thing need not be the curtain; what is said of it must be so.
            assert covered or not is_covered(caption)
            for number in re.findall(rf"\b({'|'.join(NUMBERS)})\b", caption.lower()):
                assert NUMBERS[number] == len(shown)
            named = things(caption)
            if absent := ABSENT.search(caption):
                color, shape = absent.groups()
                assert not any(color == c or shape == s for c, s in shown)
                named.remove((color, shape))
            assert set(named) <= shown
            complete[image] += set(named) == shown and is_covered(caption) == covered
        assert min(complete.values()) >= 2


def test_the_captions_of_all_languages_are_parallel(world):
    """A list names as many things in every language, and a thing has one name in each."""
    for language in TRANSLATIONS:
        names, sentences = defaultdict(set), defaultdict(set)
        for split in ("train", "dev"):
            english, translated = captions_of(world, split), captions_of(world, split, language)
            for line, other in zip(english, translated, strict=True):
                assert other.keys() == line.keys() and other["image"] == line["image"]
                if line["caption"].endswith("."):
                    sentences[line["caption"]].add(other["caption"])
                    continue
                things = line["caption"].split(", "), re.split(", |、", other["caption"])
                for thing, name in zip(*things, strict=True):
                    names[thing].add(name)
        for meanings in (names, sentences):  # one translation each, and no two alike
            assert len({name for (name,) in meanings.values()}) == len(meanings)
        assert not names.keys() & {name for (name,) in names.values()}


def test_captions_written_by_hand(world):
    if world.seed:
        return
    languages = ("en", *TRANSLATIONS)
    with Path(__file__).with_name("mini_ve_captions.tsv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    captions = (
        [line["caption"] for split in ("train", "dev") for line in captions_of(world, split, lang)]
        for lang in languages
    )
    assert {tuple(row[lang] for lang in languages) for row in rows} <= set(
        zip(*captions, strict=True)
    )


def test_the_report_counts_what_is_written(world):
    written = json.loads((world.folder / "world.json").read_text(encoding="utf-8"))
    assert written["seed"] == world.seed
    assert written["num_scenes"] == {"train": 200, "dev": 60, "test": 100}
    for split in SPLITS:
        rows = rows_of(world, split)
        counts = Counter((form_of(row["sentence2"]), row["gold_label"]) for row in rows)
        for form, by_label in world.num_pairs[split].items():
            assert by_label == {label: counts[form, label] for label in LABELS}
            assert len(set(by_label.values())) == 1 and min(by_label.values()) > 0
        assert written["num_pairs"][split] == world.num_pairs[split]
        assert world.num_sentences[split] == len({row["sentence2"] for row in rows})


# --- how it is written --------------------------------------------------------------------------


class Counting:
    """A `Progress` that adds up."""

    @contextmanager
    def task(self, description, total=None, unit="", *, summary=True):
        self.total, self.done = total, 0
        yield self

    def advance(self, amount=1, **fields):
        self.done += amount


def test_a_seed_gives_the_same_bytes_and_another_seed_other_scenes(tmp_path):
    progress = Counting()
    first = generate(tmp_path / "a", seed=7, sizes=SMALL, progress=progress)
    assert progress.done == progress.total == 130
    generate(tmp_path / "b", seed=7, sizes=SMALL)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    # An older world is not written over: somebody may have put files of theirs into it.
    with pytest.raises(UsageError, match="already exists"):
        generate(tmp_path / "b", seed=8, sizes=SMALL)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    second = generate(tmp_path / "c", seed=8, sizes=SMALL)
    assert first.num_scenes == second.num_scenes
    assert not set(sample_scenes(7, SMALL)["train"]) & set(sample_scenes(8, SMALL)["test"])
    assert tree(tmp_path / "a") != tree(tmp_path / "c")


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="already exists"):
        generate(tmp_path, sizes=SMALL)
    with pytest.raises(ClseaveError, match="is not a folder"):
        generate(tmp_path / "thesis.tex", sizes=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(dev_scenes=0), "dev_scenes is 0"),
        (Sizes(captions=-1), "captions is -1"),
        (Sizes(train_scenes=20, train_hypotheses=40), "20 train scenes are too few"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path, sizes, message):
    with pytest.raises(UsageError, match=message):
        generate(tmp_path / "world", sizes=sizes)
    assert not list(tmp_path.iterdir())
