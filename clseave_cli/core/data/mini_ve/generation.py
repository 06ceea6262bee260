"""Samples the built-in world, balances its labels, and writes it as an SNLI-VE folder."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
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

#: Changes whenever the same seed gives another world.
VERSION = 2

SPLITS = ("train", "dev", "test")

#: The part of all rows that each form takes.
FORM_SHARES = {"presence": 0.31, "absence": 0.31, "count": 0.12, "conjunction": 0.26}

#: The part of the pairs of coloured shapes whose conjunction is said in the test split only,
#: where they make up half of the conjunctions.
HELD_OUT_SHARE = 0.2

#: How often there is a curtain. A neutral row needs one, an entailed count or absence none.
_CURTAIN_PROBABILITY = 0.5

#: How often a scene shows 1, 2, … shapes. There are only 400 scenes of one shape and no curtain,
#: and all splits must share them.
_SHOWN_WEIGHTS = {1: 8, 2: 23, 3: 23, 4: 23, 5: 23}

#: Width and height in cells. At least four cells, so that any conjunction could be behind it.
_CURTAIN_SIZES = ((1, GRID), (2, GRID), (GRID, 1), (GRID, 2), (2, 2), (2, 3), (3, 2))


@dataclass(frozen=True)
class Sizes:
    """How large a world to make.

    Attributes:
        train_scenes: Scenes, that is pictures, in the training split.
        dev_scenes: Scenes in the development split.
        test_scenes: Scenes in the test split.
        train_hypotheses: Hypotheses per training scene, on average.
        dev_hypotheses: Hypotheses per development scene, on average.
        test_hypotheses: Hypotheses per test scene, on average.
        captions: Captions per training and development scene.
    """

    train_scenes: int = 5000
    dev_scenes: int = 400
    test_scenes: int = 600
    train_hypotheses: int = 5
    dev_hypotheses: int = 6
    test_hypotheses: int = 6
    captions: int = 4

    def scenes(self, split: str) -> int:
        """Scenes in `split`."""
        return int(getattr(self, f"{split}_scenes"))

    def hypotheses(self, split: str) -> int:
        """Hypotheses per scene of `split`."""
        return int(getattr(self, f"{split}_hypotheses"))


@dataclass(frozen=True)
class MiniVE:
    """A world on disk, and what is in it.

    Attributes:
        folder: Where it was written.
        seed: What it was sampled with.
        num_scenes: Scenes by split.
        num_pairs: Rows by split, form and label.
        num_sentences: Distinct English hypotheses by split.
        num_unseen: Test rows whose conjunction no training or development row says.
        num_captions: Captions by split, where there are any.
    """

    folder: Path
    seed: int
    num_scenes: Mapping[str, int]
    num_pairs: Mapping[str, Mapping[str, Mapping[Label, int]]]
    num_sentences: Mapping[str, int]
    num_unseen: int
    num_captions: Mapping[str, int]


class _Saying(NamedTuple):
    """A hypothesis and the paraphrase in which it is said: one sentence of each language."""

    hypothesis: Hypothesis
    template: int


class _Row(NamedTuple):
    scene: int
    saying: _Saying
    label: Label


def generate(
    out: Path, *, seed: int = 0, sizes: Sizes = Sizes(), progress: Progress = SILENT
) -> MiniVE:
    """Makes a world and writes it to `out` as an SNLI-VE folder.

    The folder holds `images/`, `snli_ve_{split}.jsonl`, `snli_ve_{split}.{lang}.jsonl` in five
    languages, `captions_{split}.jsonl` and `captions_{split}.{lang}.jsonl` of the splits `train`
    and `dev`, and `world.json`. The same seed and sizes give the same bytes. In every split every
    sentence has each label equally often, so nothing can be learnt from the sentence alone.

    Args:
        out: The folder to write; new or empty.
        seed: Another seed gives other scenes.
        sizes: How many scenes, hypotheses and captions.
        progress: Told about every picture drawn.

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
    world = MiniVE(
        folder=out,
        seed=seed,
        num_scenes={split: len(scenes[split]) for split in SPLITS},
        num_pairs={split: _count_pairs(rows[split]) for split in SPLITS},
        num_sentences={split: len({row.saying for row in rows[split]}) for split in SPLITS},
        num_unseen=sum(_pair(row.saying.hypothesis) in held_out for row in rows["test"]),
        num_captions={
            split: len(scenes[split]) * sizes.captions for split in SPLITS if split != "test"
        },
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
                    # Hardly larger than at the best level, and written in half the time.
                    picture.save(folder / "images" / name, compress_level=1)
                    task.advance()
        for split in SPLITS:
            _write_split(folder, split, scenes[split], rows[split], seed, sizes)
        about = {"world": "mini-VE", "version": VERSION, "seed": seed, "sizes": asdict(sizes)}
        counts = {name: value for name, value in vars(world).items() if name.startswith("num_")}
        about |= {"languages": LANGUAGES, **counts}
        _write_lines(folder / "world.json", [about], indent=2)
    return world


def _random(seed: int, purpose: str) -> Random:
    # A generator per purpose: a change in one part of the world leaves the other parts alone.
    return Random(f"mini-VE/{VERSION}/{seed}/{purpose}")


# --- scenes -------------------------------------------------------------------------------------


def sample_scenes(seed: int, sizes: Sizes) -> dict[str, list[Scene]]:
    """Scenes by split, no two of them equal: the ones that `generate` draws."""
    rng = _random(seed, "scenes")
    seen: set[Scene] = set()
    scenes: dict[str, list[Scene]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        while len(scenes[split]) < sizes.scenes(split):
            scene = _sample_scene(rng)
            if scene not in seen:
                seen.add(scene)
                scenes[split].append(scene)
    return scenes


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
    # All different, so that a caption's list of things also says how many there are.
    return Scene(tuple(zip(cells, rng.sample(ITEMS, number), strict=True)), curtain)


def guided(scene: Scene, hypothesis: Hypothesis | None, rng: Random) -> Scene:
    """Another scene for which a hypothesis has the same label, for the same reason.

    What it is about stays in view (None: everything), in another place; other shapes give way to
    others that it is not about. There are as many of them, and a curtain of the same size, so that
    the scene alone says no more about the label than the first one does.
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


def asked_of(folder: Path, split: str, *, by_row: bool) -> dict[str, Any]:
    """Scene and hypothesis of each row of a world on disk, by `pairID`; or scenes, by image.

    Raises:
        DataError: not such a folder, or one of another version.
    """
    about = json_object(folder / "world.json")
    if about.get("world") != "mini-VE" or about.get("version") != VERSION or split not in SPLITS:
        raise DataError(f"{folder}: expected a mini-VE of this version, and one of its splits.")
    seed, sizes = about["seed"], Sizes(**about["sizes"])
    scenes = sample_scenes(seed, sizes)[split]
    if not by_row:
        return {f"{split}-{index:05d}": (scene, None) for index, scene in enumerate(scenes)}
    rows = _sample_rows(split, scenes, _held_out_pairs(seed), seed, sizes)
    ids = [record["pairID"] for record in _records(split, [[{"en": ""}]] * len(scenes), rows)]
    asked = ((scenes[row.scene], row.saying.hypothesis) for row in rows)
    return dict(zip(ids, asked, strict=True))


# --- hypotheses ---------------------------------------------------------------------------------


def _held_out_pairs(seed: int) -> set[frozenset[Item]]:
    pairs = ITEM_PAIRS
    chosen = _random(seed, "held out").sample(pairs, round(HELD_OUT_SHARE * len(pairs)))
    return {frozenset(pair) for pair in chosen}


def _pair(hypothesis: Hypothesis) -> frozenset[Item]:
    if isinstance(hypothesis, Conjunction):
        return frozenset((hypothesis.first, hypothesis.second))
    return frozenset()


def _pools(split: str, held_out: set[frozenset[Item]]) -> list[tuple[float, list[Hypothesis]]]:
    """The hypotheses that `split` may use, in groups with their part of the rows."""
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

    So every sentence is balanced exactly, whatever the scenes are.

    Raises:
        UsageError: there are too few scenes.
    """
    rng = _random(seed, f"hypotheses/{split}")
    num_triples = len(scenes) * sizes.hypotheses(split) // len(LABELS)
    turns: list[deque[_Saying]] = []
    for share, pool in _pools(split, held_out):
        turns += [_shuffled(pool, rng)] * round(share * num_triples)
    rng.shuffle(turns)
    # The scene used last is the last to be tried: all get about equally many hypotheses.
    queue = rng.sample(range(len(scenes)), len(scenes))
    asked: list[set[Hypothesis]] = [set() for _ in scenes]
    rows: list[_Row] = []
    for sayings in turns:
        triple: list[_Row] = []
        # A sentence whose scenes are used up passes its turn on to the next.
        for _ in range(len(sayings)):
            triple = _triple(sayings[0], scenes, queue, asked)
            sayings.rotate(-1)
            if triple:
                break
        else:
            raise UsageError(
                f"mini-VE: {len(scenes)} {split} scenes are too few to balance the labels of "
                f"{sizes.hypotheses(split)} hypotheses each; ask for more scenes or fewer "
                "hypotheses."
            )
        for row in triple:
            asked[row.scene].add(row.saying.hypothesis)
            queue.remove(row.scene)
            queue.append(row.scene)
        rows += triple
    rng.shuffle(rows)
    return sorted(rows, key=lambda row: row.scene)


def _shuffled(pool: list[Hypothesis], rng: Random) -> deque[_Saying]:
    """Every sentence about `pool`, to be used in turn: so all of them are equally frequent."""
    sayings = [_Saying(each, template) for each in pool for template in range(NUM_TEMPLATES)]
    return deque(rng.sample(sayings, len(sayings)))


def _triple(
    saying: _Saying, scenes: list[Scene], queue: list[int], asked: list[set[Hypothesis]]
) -> list[_Row]:
    """The first scene in `queue` for each label, or nothing if a label has no scene left."""
    found: dict[Label, _Row] = {}
    for index in queue:
        label = saying.hypothesis.judge(scenes[index])
        if label not in found and saying.hypothesis not in asked[index]:
            found[label] = _Row(index, saying, label)
            if len(found) == len(LABELS):
                return list(found.values())
    return []


def _count_pairs(rows: list[_Row]) -> dict[str, dict[Label, int]]:
    counts = Counter((row.saying.hypothesis.form, row.label) for row in rows)
    return {form: {label: counts[form, label] for label in LABELS} for form in FORMS}


# --- files --------------------------------------------------------------------------------------


def _image_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.png"


def _write_split(
    folder: Path, split: str, scenes: list[Scene], rows: list[_Row], seed: int, sizes: Sizes
) -> None:
    rng = _random(seed, f"captions/{split}")
    texts = [captions(scene, sizes.captions, rng) for scene in scenes]
    for language in LANGUAGES if split != "test" else ():
        said = (
            {"image": _image_name(split, index), "caption": caption[language]}
            for index, several in enumerate(texts)
            for caption in several
        )
        suffix = "" if language == LANGUAGES[0] else f".{language}"
        _write_lines(folder / f"captions_{split}{suffix}.jsonl", said)
    records = _records(split, texts, rows)
    _write_lines(folder / f"snli_ve_{split}.jsonl", records)
    for language in LANGUAGES[1:]:
        translated = (
            record | {"sentence2": say(*row.saying, language), "sentence2_en": record["sentence2"]}
            for record, row in zip(records, rows, strict=True)
        )
        _write_lines(folder / f"snli_ve_{split}.{language}.jsonl", translated)


def _records(
    split: str, texts: list[list[dict[str, str]]], rows: list[_Row]
) -> list[dict[str, str]]:
    records = []
    asked: Counter[int] = Counter()
    for row in rows:
        image = _image_name(split, row.scene)
        records.append(
            {
                "Flickr30K_ID": image,
                "sentence1": texts[row.scene][0]["en"],
                "sentence2": say(*row.saying, "en"),
                "gold_label": row.label,
                "pairID": f"{image}#0h{asked[row.scene]}",
                "captionID": f"{image}#0",
            }
        )
        asked[row.scene] += 1
    return records


def _write_lines(path: Path, values: Iterable[Any], indent: int | None = None) -> None:
    # One encoder for all lines: `json.dumps` with options would build one for each.
    encode = json.JSONEncoder(ensure_ascii=False, indent=indent).encode
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for value in values:
            stream.write(encode(value) + "\n")
