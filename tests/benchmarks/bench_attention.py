"""Does the patch head look at what a sentence mentions? Measured on mini-VE's test split.

    python tests/benchmarks/bench_attention.py DEMO_DIR

DEMO_DIR is a folder of `clseave demo` whose CLIP-VE has a head with patches and as many cells as a
scene. For every row whose sentence names shapes in view, the attention on their cells is compared
with their share of the area. A head with random weights, on the same features, is the control.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.mini_ve import Sizes, generation
from clseave_cli.core.data.mini_ve.world import GRID, Count, Description, Hypothesis, Scene
from clseave_cli.core.data.records import read_split
from clseave_cli.core.features import (
    Photos,
    by_rows,
    embed_rows,
    image_features,
    tokenize_sentences,
)
from clseave_cli.core.models.clip_ve import ClipVE, EntailmentHead
from clseave_cli.core.training.device import autocast


def mentioned(hypothesis: Hypothesis, scene: Scene) -> list[int]:
    """The cells whose shapes a hypothesis names; of a count none."""
    if isinstance(hypothesis, Count):
        return []
    if hypothesis.form == "conjunction":
        named = [Description(*hypothesis.first), Description(*hypothesis.second)]
    else:
        named = [hypothesis.what]
    return [cell for cell, item in scene.shown if any(what.fits(item) for what in named)]


def cells_of_rows(data: Path) -> np.ndarray:
    """(N, GRID²) whether each cell of a test row's photo is mentioned."""
    world = json.loads((data / "world.json").read_text())
    seed, sizes = world["seed"], Sizes(**world["sizes"])
    scenes = generation.sample_scenes(seed, sizes)["test"]
    held_out = generation._held_out_pairs(seed)
    rows = generation._sample_rows("test", scenes, held_out, seed, sizes)
    cells = np.zeros((len(rows), GRID**2), dtype=bool)
    for number, row in enumerate(rows):
        cells[number, mentioned(row.saying.hypothesis, scenes[row.scene])] = True
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path)
    folder = parser.parse_args().demo
    split = read_split(folder / "data", "test")
    cells = cells_of_rows(folder / "data")
    model = ClipVE.from_folder(folder / "runs" / "clip-ve")
    photos = Photos.of(split, ImageFolder.of(folder / "data", None))
    exact = autocast("fp32", torch.device("cpu"))
    features = image_features(model.image, split, photos, autocast=exact)
    torch.manual_seed(0)
    random = EntailmentHead(model.head.config).eval()
    named = cells.any(axis=1)
    area = cells[named].mean()
    print(f"{named.sum()} of {len(split)} rows name shapes in view: {area:.1%} of the area")
    with torch.no_grad():
        sentences = tokenize_sentences(model.text, split.hypotheses, split.where)
        hypotheses = embed_rows(model.text, sentences)
        for name, head in (("trained", model.head), ("random", random)):
            looks = by_rows(head.attention, hypotheses, features, 64).flatten(1).numpy()
            mass = (looks * cells)[named].sum(axis=1).mean()
            print(f"{name:<8} attention on them {mass:.1%}: {mass / area:.2f} × their area")


if __name__ == "__main__":
    main()
