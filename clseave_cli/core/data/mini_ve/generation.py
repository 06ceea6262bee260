"""Samples the built-in world with balanced labels, and writes it as an SNLI-VE folder."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from clseave_cli.core.data.mini_ve.captions import captions
from clseave_cli.core.data.mini_ve.drawing import draw
from clseave_cli.core.data.mini_ve.grammar import LANGUAGES, NUM_TEMPLATES, say
from clseave_cli.core.data.mini_ve.world import (
    COUNTS,
    DESCRIPTIONS,
    FORMS,
    GRID,
    ITEM_PAIRS,
    ITEMS,
    Absence,
    Conjunction,
    Count,
    Curtain,
    Hypothesis,
    Item,
    Presence,
    Scene,
)
from clseave_cli.core.files import atomic_folder, json_object, require_replaceable
from clseave_cli.errors import DataError, UsageError
from clseave_cli.labels import LABELS, Label
from clseave_cli.progress import SILENT, Progress

#: Changes when the same seed gives a different world.
VERSION = 2

SPLITS = ("train", "dev", "test")

#: Share of each form in the rows.
FORM_SHARES = {"presence": 0.31, "absence": 0.31, "count": 0.12, "conjunction": 0.26}

#: Share of the pairs of coloured shapes whose conjunctions are held out for the test split, where
#: they are half of the conjunctions.
HELD_OUT_SHARE = 0.2

#: A neutral row needs a curtain; an entailed count or absence needs a scene without one.
_CURTAIN_PROBABILITY = 0.5

#: Weights of scenes with 1, 2, … shapes. There are only 400 with one shape and no curtain, for all
#: splits together.
_SHOWN_WEIGHTS = {1: 8, 2: 23, 3: 23, 4: 23, 5: 23}

#: Width and height in cells. At least four cells, so that any conjunction could be behind it.
_CURTAIN_SIZES = ((1, GRID), (2, GRID), (GRID, 1), (GRID, 2), (2, 2), (2, 3), (3, 2))


@dataclass(frozen=True)
class Sizes:
    """Numbers of scenes (pictures), of hypotheses per scene on average, of captions per scene."""

    train_scenes: int = 5000
    dev_scenes: int = 400
    test_scenes: int = 600
    train_hypotheses: int = 5
    dev_hypotheses: int = 6
    test_hypotheses: int = 6
    captions: int = 4

    def of(self, split: str, what: str) -> int:
        """The number of `scenes` or `hypotheses` of a split."""
        return int(getattr(self, f"{split}_{what}"))


@dataclass(frozen=True)
class MiniVE:
    """A world on disk."""

    folder: Path
    seed: int
    num_scenes: Mapping[str, int]  # scenes by split
    num_pairs: Mapping[str, Mapping[str, Mapping[Label, int]]]  # rows by split, form and label
    num_sentences: Mapping[str, int]  # distinct English hypotheses by split
    num_unseen: int  # test rows whose conjunction is in no training or development row
    num_captions: Mapping[str, int]  # captions by split, except the test split


class _Sentence(NamedTuple):
    """A hypothesis in one paraphrase, in any language."""

    hypothesis: Hypothesis
    template: int


class _Row(NamedTuple):
    scene: int
    sentence: _Sentence
    label: Label


def generate(
    out: Path, *, seed: int = 0, sizes: Sizes = Sizes(), progress: Progress = SILENT
) -> MiniVE:
    """Generates a world and writes it to `out`, a new or empty folder.

    The folder has `images/`, `snli_ve_{split}.jsonl`, `snli_ve_{split}.{lang}.jsonl` in five
    languages, `captions_{split}.jsonl` and `captions_{split}.{lang}.jsonl` of the splits `train`
    and `dev`, and `world.json`. The same seed and sizes give the same bytes. In every split, every
    sentence has each label equally often, so nothing can be learnt from the sentence alone.

    Raises:
        UsageError: `out` is not empty, or `sizes` are not positive, or too small to balance the
            labels.
        ClseaveError: the disk is full or read-only.
    """
    for name, value in asdict(sizes).items():
        if value < 1:
            raise UsageError(f"mini-VE: {name} is {value}; it must be at least 1.")
    require_replaceable(out, None)
    scenes = sample_scenes(seed, sizes)
    held_out = _held_out_pairs(seed)
    rows = {split: _sample_rows(split, scenes[split], held_out, seed, sizes) for split in SPLITS}
    tested = [row.sentence.hypothesis for row in rows["test"]]
    world = MiniVE(
        folder=out,
        seed=seed,
        num_scenes={split: len(scenes[split]) for split in SPLITS},
        num_pairs={split: _count_pairs(rows[split]) for split in SPLITS},
        num_sentences={split: len({row.sentence for row in rows[split]}) for split in SPLITS},
        num_unseen=sum(
            isinstance(h, Conjunction) and {h.first, h.second} in held_out for h in tested
        ),
        num_captions={split: len(scenes[split]) * sizes.captions for split in ("train", "dev")},
    )
    require_replaceable(out, None)
    with atomic_folder(out) as folder:
        (folder / "images").mkdir()
        total = sum(world.num_scenes.values())
        with progress.task("drawing mini-VE", total=total, unit="scenes") as task:
            for split in SPLITS:
                for index, scene in enumerate(scenes[split]):
                    name = _image_name(split, index)
                    picture = draw(scene, _random(seed, f"drawing/{name}"))
                    # Hardly larger than at the highest level, in half the time.
                    picture.save(folder / "images" / name, compress_level=1)
                    task.advance()
        for split in SPLITS:
            _write_split(folder, split, scenes[split], rows[split], seed, sizes)
        record = {"world": "mini-VE", "version": VERSION, "seed": seed, "sizes": asdict(sizes)}
        counts = {name: value for name, value in vars(world).items() if name.startswith("num_")}
        _write_lines(folder / "world.json", [record | {"languages": LANGUAGES} | counts], indent=2)
    return world


def _random(seed: int, purpose: str) -> Random:
    # A generator per purpose: changing one part of the world leaves the others unchanged.
    return Random(f"mini-VE/{VERSION}/{seed}/{purpose}")


def sample_scenes(seed: int, sizes: Sizes) -> dict[str, list[Scene]]:
    """The scenes of each split, all different."""
    rng = _random(seed, "scenes")
    scenes: dict[Scene, None] = {}
    by_split = {}
    for split in SPLITS:
        start = len(scenes)
        while len(scenes) < start + sizes.of(split, "scenes"):
            scenes[_sample_scene(rng)] = None
        by_split[split] = list(scenes)[start:]
    return by_split


def _sample_scene(rng: Random) -> Scene:
    curtain = None
    if rng.random() < _CURTAIN_PROBABILITY:
        columns, rows = rng.choice(_CURTAIN_SIZES)
        column, row = rng.randint(0, GRID - columns), rng.randint(0, GRID - rows)
        curtain = Curtain(column, row, columns, rows)
    hidden = curtain.cells() if curtain else ()
    in_view = [cell for cell in range(GRID * GRID) if cell not in hidden]
    [number] = rng.choices(list(_SHOWN_WEIGHTS), list(_SHOWN_WEIGHTS.values()))
    cells = sorted(rng.sample(in_view, number))
    # All different, so that a list of things in a caption also gives their number.
    return Scene(tuple(zip(cells, rng.sample(ITEMS, number), strict=True)), curtain)


def guided(scene: Scene, hypothesis: Hypothesis | None, rng: Random) -> Scene:
    """Another scene for which a hypothesis has the same label, for the same reason.

    Shapes that the hypothesis mentions (None: all shapes) are kept in other places, and the rest
    are replaced by others that it does not mention. The number of shapes and the size of the
    curtain are the same, so that the scene alone reveals no more about the label than before.
    """

    def stays(item: Item) -> bool:
        match hypothesis:
            case Presence(what) | Absence(what):
                return what.fits(item)
            case Conjunction(first, second):
                return item in (first, second)
        return hypothesis is None

    def frame(scene: Scene) -> Any:
        return len(scene.shown), scene.curtain and (scene.curtain.columns, scene.curtain.rows)

    kept = [item for item in scene.items if stays(item)]
    others = [item for item in ITEMS if not stays(item)]
    items = kept + rng.sample(others, len(scene.items) - len(kept))
    place = _sample_scene(rng)
    while frame(place) != frame(scene):
        place = _sample_scene(rng)
    cells = [cell for cell, _ in place.shown]
    other = Scene(tuple(zip(cells, rng.sample(items, len(items)), strict=True)), place.curtain)
    assert hypothesis is None or hypothesis.judge(other) == hypothesis.judge(scene)
    return other


def scenes_of(
    folder: Path, split: str, *, by_row: bool
) -> dict[str, tuple[Scene, Hypothesis | None]]:
    """Scene and hypothesis of each row of a world on disk, by `pairID`; or scenes, by image.

    Raises:
        DataError: not a world of this version, or no such split.
    """
    record = json_object(folder / "world.json")
    try:
        seed, sizes = record["seed"], Sizes(**record["sizes"])
        if (record["world"], record["version"]) != ("mini-VE", VERSION) or split not in SPLITS:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        message = f"{folder}: expected a mini-VE of this version, and one of its splits."
        raise DataError(message) from None
    scenes = sample_scenes(seed, sizes)[split]
    if not by_row:
        return {Path(_image_name(split, i)).stem: (scene, None) for i, scene in enumerate(scenes)}
    rows = _sample_rows(split, scenes, _held_out_pairs(seed), seed, sizes)
    records = _records(split, [[{"en": ""}]] * len(scenes), rows)
    return {
        record["pairID"]: (scenes[row.scene], row.sentence.hypothesis)
        for record, row in zip(records, rows, strict=True)
    }


def _held_out_pairs(seed: int) -> set[frozenset[Item]]:
    pairs = ITEM_PAIRS
    chosen = _random(seed, "held out").sample(pairs, round(HELD_OUT_SHARE * len(pairs)))
    return {frozenset(pair) for pair in chosen}


def _pools(split: str, held_out: set[frozenset[Item]]) -> list[tuple[float, list[Hypothesis]]]:
    """Groups of hypotheses that a split may use, with their share of the rows."""
    seen: list[Hypothesis] = []
    unseen: list[Hypothesis] = []
    for one, other in ITEM_PAIRS:
        pool = unseen if frozenset((one, other)) in held_out else seen
        pool += [Conjunction(one, other), Conjunction(other, one)]
    pools: list[tuple[float, list[Hypothesis]]] = [
        (FORM_SHARES["presence"], [Presence(what) for what in DESCRIPTIONS]),
        (FORM_SHARES["absence"], [Absence(what) for what in DESCRIPTIONS]),
        (FORM_SHARES["count"], [Count(number) for number in COUNTS]),
    ]
    if split == "test":
        half = FORM_SHARES["conjunction"] / 2
        return [*pools, (half, seen), (half, unseen)]
    return [*pools, (FORM_SHARES["conjunction"], seen)]


def _sample_rows(
    split: str, scenes: list[Scene], held_out: set[frozenset[Item]], seed: int, sizes: Sizes
) -> list[_Row]:
    """Rows in threes: a sentence with an entailed, a neutral and a contradicted scene.

    So every sentence is balanced exactly, whatever the scenes.

    Raises:
        UsageError: there are too few scenes.
    """
    rng = _random(seed, f"hypotheses/{split}")
    num_triples = len(scenes) * sizes.of(split, "hypotheses") // len(LABELS)
    turns: list[deque[_Sentence]] = []
    for share, pool in _pools(split, held_out):
        sentences = [
            _Sentence(each, template) for each in pool for template in range(NUM_TEMPLATES)
        ]
        # One queue for all turns of a pool: its sentences are used equally often.
        turns += [deque(rng.sample(sentences, len(sentences)))] * round(share * num_triples)
    rng.shuffle(turns)
    # Scenes used last are tried last, so all get about equally many hypotheses.
    queue = rng.sample(range(len(scenes)), len(scenes))
    used: list[set[Hypothesis]] = [set() for _ in scenes]
    rows: list[_Row] = []
    for sentence_queue in turns:
        triple: list[_Row] = []
        # If a sentence has no scenes left, the next one takes its turn.
        for _ in range(len(sentence_queue)):
            triple = _triple(sentence_queue[0], scenes, queue, used)
            sentence_queue.rotate(-1)
            if triple:
                break
        else:
            raise UsageError(
                f"mini-VE: {len(scenes)} {split} scenes are too few to balance the labels of "
                f"{sizes.of(split, 'hypotheses')} hypotheses each; choose more scenes or fewer "
                "hypotheses."
            )
        for row in triple:
            used[row.scene].add(row.sentence.hypothesis)
            queue.remove(row.scene)
            queue.append(row.scene)
        rows += triple
    rng.shuffle(rows)
    return sorted(rows, key=lambda row: row.scene)


def _triple(
    sentence: _Sentence, scenes: list[Scene], queue: list[int], used: list[set[Hypothesis]]
) -> list[_Row]:
    """A row with the first scene in `queue` for each label; empty if a label has no scene left."""
    rows: dict[Label, _Row] = {}
    for index in queue:
        label = sentence.hypothesis.judge(scenes[index])
        if label not in rows and sentence.hypothesis not in used[index]:
            rows[label] = _Row(index, sentence, label)
            if len(rows) == len(LABELS):
                return list(rows.values())
    return []


def _count_pairs(rows: list[_Row]) -> dict[str, dict[Label, int]]:
    counts = Counter((row.sentence.hypothesis.form, row.label) for row in rows)
    return {form: {label: counts[form, label] for label in LABELS} for form in FORMS}


def _image_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.png"


def _write_split(
    folder: Path, split: str, scenes: list[Scene], rows: list[_Row], seed: int, sizes: Sizes
) -> None:
    rng = _random(seed, f"captions/{split}")
    texts = [captions(scene, sizes.captions, rng) for scene in scenes]
    for language in LANGUAGES if split != "test" else ():
        lines = (
            {"image": _image_name(split, index), "caption": caption[language]}
            for index, of_scene in enumerate(texts)
            for caption in of_scene
        )
        suffix = "" if language == LANGUAGES[0] else f".{language}"
        _write_lines(folder / f"captions_{split}{suffix}.jsonl", lines)
    records = _records(split, texts, rows)
    _write_lines(folder / f"snli_ve_{split}.jsonl", records)
    for language in LANGUAGES[1:]:
        lines = (
            record
            | {"sentence2": say(*row.sentence, language), "sentence2_en": record["sentence2"]}
            for record, row in zip(records, rows, strict=True)
        )
        _write_lines(folder / f"snli_ve_{split}.{language}.jsonl", lines)


def _records(
    split: str, texts: list[list[dict[str, str]]], rows: list[_Row]
) -> list[dict[str, str]]:
    return [
        {
            "Flickr30K_ID": _image_name(split, scene),
            "sentence1": texts[scene][0]["en"],
            "sentence2": say(*row.sentence, "en"),
            "gold_label": row.label,
            "pairID": f"{_image_name(split, scene)}#0h{number}",
            "captionID": f"{_image_name(split, scene)}#0",
        }
        for scene, of_scene in groupby(rows, key=lambda row: row.scene)
        for number, row in enumerate(of_scene)
    ]


def _write_lines(path: Path, values: Iterable[Any], indent: int | None = None) -> None:
    # `json.dumps` with options would create an encoder for each line.
    encode = json.JSONEncoder(ensure_ascii=False, indent=indent).encode
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for value in values:
            stream.write(encode(value) + "\n")
