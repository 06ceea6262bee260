"""How well links agree with links that people made (Och and Ney 2003, equations 17 to 19)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clseave_cli.core.word_alignment.links import Links
from clseave_cli.errors import DataError


@dataclass(frozen=True)
class AlignmentScore:
    """Agreement of found links A with the sure links S and the possible ones P, of which S is part.

    Attributes:
        precision: |A ∩ P| / |A|, the share of found links that are possible; 0 of none.
        recall: |A ∩ S| / |S|, the share of sure links that are found.
        error_rate: the alignment error rate, 1 − (|A ∩ S| + |A ∩ P|) / (|A| + |S|).
        num_pairs: sentence pairs.
        num_found: |A|.
        num_sure: |S|.
        num_possible: |P|.
    """

    precision: float
    recall: float
    error_rate: float
    num_pairs: int
    num_found: int
    num_sure: int
    num_possible: int


def score(found: Links, gold: Links) -> AlignmentScore:
    """Compares found links with gold ones of the same P pairs; one given twice counts once.

    Raises:
        DataError: there is no sure gold link, so nothing can be recalled.
    """
    width = 1 + max(
        (int(links.words.max()) for links in (found, gold) if links.words.size), default=0
    )
    links = _keys(found, width)
    possible = _keys(gold, width)
    sure = _keys(gold, width, gold.sure)
    if not len(sure):
        raise DataError("the gold links hold no sure link (i-j); nothing can be scored.")
    found_sure = len(np.intersect1d(links, sure, assume_unique=True))
    found_possible = len(np.intersect1d(links, possible, assume_unique=True))
    return AlignmentScore(
        precision=found_possible / len(links) if len(links) else 0.0,
        recall=found_sure / len(sure),
        error_rate=1 - (found_sure + found_possible) / (len(links) + len(sure)),
        num_pairs=len(gold),
        num_found=len(links),
        num_sure=len(sure),
        num_possible=len(possible),
    )


def _keys(
    links: Links, width: int, which: npt.NDArray[np.bool_] | slice = slice(None)
) -> npt.NDArray[np.int64]:
    """A number for each distinct link; words are numbered below `width`."""
    source, target = links.words.T
    return np.unique(((links.pairs * width + source) * width + target)[which])
