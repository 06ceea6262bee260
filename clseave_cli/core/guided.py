"""Answer-guided pictures: drawn from the text, they supervise the photos in training only.

After "Bridging the Gap between Authentic and Answer-Guided Images" (CCL24-Eval task 9); the
equations are in docs/methods.md. Nothing of this is used once a model is trained.

Legend: N rows · U guided pictures · B rows of a batch · C classes · D embedding width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from clseave_cli.core.config import GuidedConfig, GuidedDistance, flag_of
from clseave_cli.core.data.images import ImageFolder, picture_name
from clseave_cli.core.data.records import distinct
from clseave_cli.core.features import Features, Photos
from clseave_cli.errors import DataError, UsageError
from clseave_cli.progress import Progress

#: Rows that the image-only classifier learns from and is measured on, at most.
_MOST_ROWS = 10_000
_ROWS_AT_ONCE = 256


class GuidedBatch(NamedTuple):
    """The guided pictures of B rows; a row without one has its photo there, and counts nothing.

    Attributes:
        pictures: (B, …) pixels or features.
        is_there: (B,) float32, 1 where there is a guided picture, otherwise 0.
    """

    pictures: Tensor
    is_there: Tensor

    def mean(self, losses: Tensor) -> Tensor:
        """(B,) losses of guided pictures as a part of the batch's mean loss."""
        return (losses * self.is_there).mean()


@dataclass(frozen=True, eq=False)
class GuidedPictures:
    """The guided pictures of N rows.

    Attributes:
        photos: U pictures.
        index: (N,) picture of each row; -1 where there is none.
    """

    photos: Photos
    index: npt.NDArray[np.intp]

    @classmethod
    def of(
        cls,
        config: GuidedConfig,
        seed: int,
        keys: Sequence[str],
        where: Callable[[int], str],
        progress: Progress,
    ) -> GuidedPictures | None:
        """Looks guided pictures up; None without `--guided`.

        Args:
            config: the options; with the control `shuffle`, each picture stands in another's place.
            seed: of that order.
            keys: (N,) what names the picture of each row.
            where: `file:line` of a row.
            progress: told how many rows have a picture.

        Raises:
            UsageError: other options of guided pictures were given, and no folder.
            DataError: the folder is missing, or holds a picture of no row.
        """
        if config.guided is None:
            _refuse_others(config)
            return None
        if not config.guided.is_dir():
            raise DataError(f"--guided {config.guided}: no such folder; `clseave illustrate` makes "
                            "one.")  # fmt: skip
        folder = ImageFolder(config.guided)
        names, name_of_row = distinct(keys)
        there = [number for number, name in enumerate(names) if folder.get(picture_name(name))]
        if not there:
            raise DataError(
                f"--guided {config.guided}: no picture of any of {len(keys)} rows; expected files "
                f"such as {picture_name(keys[0])}.png."
            )
        if config.guided_control == "shuffle" and len(there) < 2:
            raise UsageError("--guided-control shuffle: there is only one picture.")
        _, first = np.unique(name_of_row, return_index=True)
        photos = Photos.named(
            [picture_name(names[number]) for number in there],
            [where(int(first[number])) for number in there],
            folder,
        )
        picture_of_name = np.full(len(names), -1, dtype=np.intp)
        picture_of_name[there] = np.arange(len(there))
        if config.guided_control == "shuffle":
            order = np.array(there)[np.random.default_rng(seed).permutation(len(there))]
            picture_of_name[order] = picture_of_name[np.roll(order, 1)]
        index = picture_of_name[name_of_row]
        progress.note(
            f"{config.guided}: guided pictures of {(index >= 0).sum():,} of {len(keys):,} rows."
        )
        return cls(photos, index)


def _refuse_others(config: GuidedConfig) -> None:
    """Refuses options that mean nothing without guided pictures."""
    for part in dataclasses.fields(config):
        if part.name.startswith("guided_") and getattr(config, part.name) != part.default:
            raise UsageError(f"{flag_of(part)} goes with --guided DIR.")


def divergence(guided: Tensor, authentic: Tensor) -> Tensor:
    """(B,) KL(p_guided ‖ p_authentic) of two (B, C) rows of logits (eq. 9 and 13)."""
    p, q = guided.log_softmax(dim=1), authentic.log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1)


def gap(guided: Tensor, authentic: Tensor, distance: GuidedDistance) -> Tensor:
    """(B,) how far (B, D) embeddings of guided pictures are from those of the photos (eq. 8).

    `cosine` is 1 − cos; `l2`, the paper's ablation, is the squared distance over D. Both take the
    vectors as they are, for that of unit vectors is the cosine over again, times 2 / D.
    """
    if distance == "l2":
        return (guided - authentic).square().mean(dim=1)
    return 1 - functional.cosine_similarity(guided, authentic, dim=1)


def noise_like(pictures: Tensor) -> Tensor:
    """Noise vectors in place of (B, E) features, with the batch's mean and deviation of each."""
    values = pictures.float()
    noise = torch.randn_like(values) * values.std(dim=0, correction=0) + values.mean(dim=0)
    return noise.to(pictures.dtype)


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


def image_only_accuracy(
    images: Features,
    rows: npt.NDArray[np.intp],
    labels: npt.NDArray[np.int8],
    width: int,
    seed: int,
) -> float:
    """How often a classifier that sees nothing but the picture is right about a row's label.

    A logistic regression learns from one half of the pictures and is asked about the other.

    Args:
        images: features of N rows.
        rows: those to take.
        labels: (N,) label ids.
        width: D; of a picture's features, the first D are its embedding.
        seed: of the halves, and of the rows taken where there are very many.

    Returns:
        The share of rows of the other half; NaN where a half is empty.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    random = np.random.default_rng(seed)
    is_learnt = (random.permutation(len(images.vectors)) % 2 == 0)[images.index]
    rows = random.permutation(rows)[:_MOST_ROWS]
    learnt, asked = rows[is_learnt[rows]], rows[~is_learnt[rows]]
    if not len(learnt) or not len(asked):
        return float("nan")

    def embeddings(rows: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        # A few at a time: with its patches, a picture is thousands of numbers.
        parts = np.array_split(images.index[rows], 1 + len(rows) // _ROWS_AT_ONCE)
        vectors = [images.vectors.rows(part)[:, :width].float().numpy() for part in parts]
        return np.concatenate(vectors)

    if len(set(labels[learnt].tolist())) == 1:
        return float((labels[asked] == labels[learnt[0]]).mean())
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, tol=1e-3))
    model.fit(embeddings(learnt), labels[learnt])
    return float(model.score(embeddings(asked), labels[asked]))
