"""What students gain if the head's BatchNorm statistics are those of their language.

    python tests/benchmarks/adapt_head_statistics.py --demo DIR [DIR …] [--students DIR]

DIR is what `clseave demo --out DIR` left. The running means and variances in the head are those of
English embeddings, since the head is trained on nothing else. Here they are computed anew from the
student's embeddings, of the dev rows and of the test rows themselves (which an evaluation that
leaves the head in training mode would do), and accuracy on test is printed for each.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.records import read_split
from clseave_cli.core.features import (
    Features,
    Photos,
    by_rows,
    embed_rows,
    image_features,
    tokenize_sentences,
)
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.listing import find_students
from clseave_cli.core.models.student import load_student
from clseave_cli.core.training.device import autocast

_BATCH = 512


def read(
    data: Path, name: str, lang: str, model: ClipVE, text: SentenceEncoder
) -> tuple[Tensor, Features, Tensor]:
    """(N, D) embeddings of a split's hypotheses, features of its photos, and (N,) labels."""
    split = read_split(data, name, lang)
    photos = Photos.of(split, ImageFolder.of(data, None))
    premises = image_features(model.image, split, photos, autocast=autocast("fp32", text.device))
    sentences = tokenize_sentences(text, split.hypotheses, split.where)
    return embed_rows(text, sentences), premises, torch.from_numpy(split.labels.astype(np.int64))


def with_statistics_of(model: ClipVE, hypotheses: Tensor, premises: Features) -> ClipVE:
    """The model with running statistics from these rows, in random batches; dropout stays off."""
    adapted = copy.deepcopy(model)
    for part in adapted.head.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.reset_running_stats()
            part.momentum = None  # the plain mean over all batches
            part.train()
    order = np.random.default_rng(0).permutation(len(hypotheses))
    for rows in np.array_split(order, -(-len(order) // _BATCH)):
        adapted(hypotheses[torch.from_numpy(rows)], premises.vectors.rows(premises.index[rows]))
    return adapted.eval()


def accuracy(model: ClipVE, hypotheses: Tensor, premises: Features, labels: Tensor) -> float:
    logits = by_rows(model, hypotheses, premises, model.rows_at_once)
    return (logits.argmax(dim=1) == labels).float().mean().item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, nargs="+", required=True)
    parser.add_argument("--students", type=Path, help="students from this folder alone")
    given = parser.parse_args()
    print("| demo | language | statistics of English | of its dev rows | of its test rows |")
    print("|---|---|---|---|---|")
    for demo in given.demo:
        model = ClipVE.from_folder(demo / "runs" / "clip-ve")
        students = find_students(given.students or demo / "runs")
        readers = students if given.students else {"en": None, **students}
        for lang, folder in readers.items():
            text = model.text if folder is None else load_student(folder, model.fingerprint)
            dev, test = (read(demo / "data", name, lang, model, text) for name in ("dev", "test"))
            models = [model, *(with_statistics_of(model, *rows[:2]) for rows in (dev, test))]
            cells = [f"{100 * accuracy(each, *test):.1f}" for each in models]
            print(f"| {demo.name} | {lang} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
