"""Answer-guided pictures: drawn from the text, they supervise the photos in training only.

After "Bridging the Gap between Authentic and Answer-Guided Images" (CCL24-Eval, task 9); the
equations are in docs/methods.md.

Legend: N rows · U guided pictures · B rows of a batch · C classes · D embedding width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from clseave_cli.core.config import FinetuneConfig, PretrainConfig, flag_of
from clseave_cli.core.data.images import ImageFolder, picture_name
from clseave_cli.core.data.records import distinct
from clseave_cli.core.features import Features, Photos
from clseave_cli.errors import DataError, UsageError
from clseave_cli.progress import Progress

#: Guided pictures that tell so much more of a label than photos do give it away.
_LEAK = 0.05


@dataclass(frozen=True, eq=False)
class GuidedPictures:
    """The guided pictures of N rows."""

    photos: Photos  # U of them
    index: npt.NDArray[np.int32]  # (N,) which of them a row has; -1: none

    @classmethod
    def of(
        cls,
        config: FinetuneConfig | PretrainConfig,
        keys: Sequence[str],
        progress: Progress,
    ) -> GuidedPictures | None:
        """Looks the pictures of N rows up by their keys; None without `--guided`.

        With the control `shuffle`, each stands in another's place.

        Raises:
            UsageError: options of guided pictures were given, and no folder.
            DataError: the folder is missing, or has no picture of any row.
        """
        if config.guided is None:
            for part in dataclasses.fields(config):
                if part.name.startswith("guided_") and getattr(config, part.name) != part.default:
                    raise UsageError(f"{flag_of(part)} goes with --guided DIR.")
            return None
        shown = f"--guided {config.guided}"
        if not config.guided.is_dir():
            raise DataError(f"{shown}: no such folder; `clseave illustrate` makes one.")
        folder = ImageFolder(config.guided)
        files = [folder.get(picture_name(key)) for key in keys]
        rows = np.array([row for row, file in enumerate(files) if file], dtype=np.intp)
        if not len(rows):
            raise DataError(
                f"{shown}: no picture of any of {len(keys)} rows; expected files such as "
                f"{picture_name(keys[0])}.png."
            )
        names, picture = distinct([file.name for file in files if file])
        photos = Photos.named(names, [shown] * len(names), folder)
        if config.guided_control == "shuffle":
            if len(names) < 2:
                raise UsageError(f"--guided-control shuffle: {config.guided} has one picture only.")
            order = np.random.default_rng(config.seed).permutation(len(names))
            picture = order[np.argsort(order) - 1][picture]
        index = np.full(len(keys), -1, dtype=np.int32)
        index[rows] = picture
        progress.note(f"{shown}: guided pictures of {len(rows):,} of {len(keys):,} rows.")
        return cls(photos, index)


def divergence(guided: Tensor, authentic: Tensor) -> Tensor:
    """(B,) KL(p_guided ‖ p_authentic) of two (B, C) rows of logits (eq. 9 and 13)."""
    p, q = guided.log_softmax(dim=1), authentic.log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1)


def gap(guided: Tensor, authentic: Tensor, distance: str) -> Tensor:
    """(B,) how far (B, D) embeddings of guided pictures are from those of the photos (eq. 8)."""
    if distance == "l2":  # as they are: of unit vectors, it is the cosine over again
        return (guided - authentic).square().mean(dim=1)
    return 1 - functional.cosine_similarity(guided, authentic, dim=1)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """In the block, batch normalisation uses the batch's statistics and records none of them."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm1d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def leak(guided: Features, photos: Features, labels: npt.NDArray[np.int8], width: int) -> str:
    """Says how much guided pictures (index -1: none) and photos of N rows tell of (N,) labels."""
    of_guided, of_photos = (image_only_accuracy(i, labels, width) for i in (guided, photos))
    said = (
        "A classifier that sees nothing but the picture is right about the label of "
        f"{of_guided:.1%} of guided pictures and {of_photos:.1%} of photos."
    )
    if of_guided > of_photos + _LEAK:
        said += " Guided pictures give labels away: the head can learn to read them there instead."
    return said


def image_only_accuracy(images: Features, labels: npt.NDArray[np.int8], width: int) -> float:
    """How often a logistic regression that sees nothing but the picture is right about the label.

    It reads the first D = `width` features, the embedding, of one half of the pictures to learn
    from, and of the other; NaN where a half is empty.
    """
    from sklearn.linear_model import LogisticRegression

    def embeddings(rows: npt.NDArray[np.intp]) -> Any:
        # A few at a time: with its patches, a picture is thousands of numbers.
        parts = np.array_split(images.index[rows], 1 + len(rows) // 256)
        vectors = torch.cat([images.vectors.rows(part)[:, :width].float() for part in parts])
        return (functional.normalize(vectors, dim=1) * width**0.5).numpy()

    random = np.random.default_rng(0)
    is_learnt = (random.permutation(len(images.vectors)) % 2 == 0)[images.index]
    rows = random.permutation(np.flatnonzero(images.index >= 0))[:10_000]  # more tell no more
    learnt, asked = rows[is_learnt[rows]], rows[~is_learnt[rows]]
    if not len(learnt) or not len(asked):
        return float("nan")
    if len(set(labels[learnt].tolist())) == 1:
        return float((labels[asked] == labels[learnt[0]]).mean())
    model = LogisticRegression(max_iter=1000, tol=1e-3).fit(embeddings(learnt), labels[learnt])
    return float(model.score(embeddings(asked), labels[asked]))
