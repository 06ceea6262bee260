"""Answer-guided pictures: drawn from the text to supervise the photos during training.

From "Bridging the Gap between Authentic and Answer-Guided Images" (CCL24-Eval, task 9); the
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

#: Guided pictures give labels away if they predict them this much better than photos do.
_LEAK_MARGIN = 0.05


@dataclass(frozen=True, eq=False)
class GuidedPictures:
    """The guided pictures of N rows."""

    photos: Photos  # U pictures
    index: npt.NDArray[np.int32]  # (N,) into the U; -1: none

    @classmethod
    def of(
        cls, config: FinetuneConfig | PretrainConfig, keys: Sequence[str], progress: Progress
    ) -> GuidedPictures | None:
        """Finds the pictures of N rows by their keys; None without `--guided`.

        The control `shuffle` exchanges them.

        Raises:
            UsageError: an option of guided pictures comes without `--guided`.
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
    """(B,) distances of (B, D) embeddings of guided pictures and photos (eq. 8)."""
    if distance == "l2":  # not normalised: for unit vectors, it is equivalent to the cosine
        return (guided - authentic).square().mean(dim=1)
    return 1 - functional.cosine_similarity(guided, authentic, dim=1)


@contextmanager
def fixed_running_statistics(module: nn.Module) -> Iterator[None]:
    """Within the block, batch normalisation does not update its running statistics."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm1d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def leak(guided: Features, photos: Features, labels: npt.NDArray[np.int8], width: int) -> str:
    """Reports how well guided pictures (index -1: none) and photos alone predict (N,) labels."""
    of_guided, of_photos = (image_only_accuracy(i, labels, width) for i in (guided, photos))
    report = (
        "A classifier that sees only the picture predicts the label of "
        f"{of_guided:.1%} of guided pictures and {of_photos:.1%} of photos."
    )
    if of_guided > of_photos + _LEAK_MARGIN:
        report += " Guided pictures give labels away: the head can learn to read them there."
    return report


def image_only_accuracy(images: Features, labels: npt.NDArray[np.int8], width: int) -> float:
    """The accuracy of a logistic regression that sees only the picture.

    It reads the first D = `width` features, the embedding. It is trained on one half of the
    pictures and measured on the other; NaN if a half is empty.
    """
    from sklearn.linear_model import LogisticRegression

    def embeddings(rows: npt.NDArray[np.intp]) -> Any:
        # In small parts: with its patches, a picture has thousands of features.
        parts = np.array_split(images.index[rows], 1 + len(rows) // 256)
        vectors = torch.cat([images.vectors.rows(part)[:, :width].float() for part in parts])
        return (functional.normalize(vectors, dim=1) * width**0.5).numpy()

    random = np.random.default_rng(0)
    in_train = (random.permutation(len(images.vectors)) % 2 == 0)[images.index]
    rows = random.permutation(np.flatnonzero(images.index >= 0))[:10_000]  # enough for the margin
    train, test = rows[in_train[rows]], rows[~in_train[rows]]
    if not len(train) or not len(test):
        return float("nan")
    if len(set(labels[train].tolist())) == 1:
        return float((labels[test] == labels[train[0]]).mean())
    model = LogisticRegression(max_iter=1000, tol=1e-3).fit(embeddings(train), labels[train])
    return float(model.score(embeddings(test), labels[test]))
