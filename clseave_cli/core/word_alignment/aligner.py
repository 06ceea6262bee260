"""A word aligner on any multilingual encoder, after awesome-align (Dou and Neubig 2021).

Legend: P sentence pairs · B pairs in a batch · T tokens of the longest sentence in it · H hidden
width · L links.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clseave_cli.core.config import WordAlignerConfig
from clseave_cli.core.files import json_digest
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.student import new_student
from clseave_cli.core.word_alignment.cache import cached_links
from clseave_cli.core.word_alignment.extraction import link_words, take_states
from clseave_cli.core.word_alignment.links import Links
from clseave_cli.core.word_alignment.places import NONE, WordTokens, find_tokens
from clseave_cli.core.word_alignment.words import Words
from clseave_cli.errors import UsageError
from clseave_cli.progress import SILENT, Progress

#: The layer that aligns best in mBERT (Dou and Neubig 2021, section 4.2), and the thesis's.
BEST_LAYER = 8
THRESHOLD = 1e-3

#: Pairs aligned at once.
_PAIRS = 256
#: Lengths are padded to a multiple of this, so that a GPU meets few shapes.
_STEP = 8


class WordAligner:
    """Finds the words that translate each other.

    Args:
        encoder: a multilingual encoder; its weights are not changed, its projection is not used.
        name: what the encoder is called, for messages.
        layer: whose states are compared, counted from 1; None: the eighth, or the last of an
            encoder with fewer.
        threshold: least probability in both directions.

    Raises:
        UsageError: the encoder has no such layer.
    """

    def __init__(
        self,
        encoder: SentenceEncoder,
        name: str,
        *,
        layer: int | None = None,
        threshold: float = THRESHOLD,
    ) -> None:
        num_layers = int(encoder.backbone.config.num_hidden_layers)
        if layer is not None and layer > num_layers:
            raise UsageError(
                f"--aligner-layer {layer}: {name} has {num_layers}; choose from 1 to {num_layers}."
            )
        self._encoder = encoder
        self._layer = min(BEST_LAYER, num_layers) if layer is None else layer
        self._threshold = threshold

    @functools.cached_property
    def digest(self) -> str:
        """Stands for everything but the text that decides links; of the weights as they are now."""
        return json_digest([self._encoder.states_digest(), self._layer, self._threshold])

    def align(
        self,
        source: Words,
        target: Words,
        pairs: npt.NDArray[np.intp],
        *,
        description: str = "word alignment",
        progress: Progress = SILENT,
    ) -> Links:
        """The links of sentence pairs.

        Args:
            source: distinct sentences.
            target: distinct sentences of the other language.
            pairs: (2, P) which sentence of the source and of the target.
            description: what the progress bar says.
            progress: told how far it is.

        Returns:
            The links, from the cache where the same was asked before.
        """
        spans = [[w.sentences, w.starts.tolist(), w.offsets.tolist()] for w in (source, target)]
        key = json_digest([self.digest, *spans, pairs.tolist()])
        return cached_links(key, lambda: self._align(source, target, pairs, description, progress))

    def _align(
        self,
        source: Words,
        target: Words,
        pairs: npt.NDArray[np.intp],
        description: str,
        progress: Progress,
    ) -> Links:
        sides = find_tokens(self._encoder, source), find_tokens(self._encoder, target)
        was_training = self._encoder.training
        self._encoder.eval()
        parts: list[Tensor] = [torch.empty((0, 3), dtype=torch.int64)]
        with torch.no_grad(), progress.task(description, pairs.shape[1], "pairs") as task:
            for numbers in _batches(sides, pairs):
                (source_states, source_words), (target_states, target_words) = (
                    self._states(side, sentences[numbers])
                    for side, sentences in zip(sides, pairs, strict=True)
                )
                links = link_words(
                    source_states, target_states, source_words, target_words, self._threshold
                ).cpu()
                links[:, 0] = torch.from_numpy(numbers)[links[:, 0]]
                parts.append(links)
                task.advance(len(numbers))
        self._encoder.train(was_training)
        return _in_order(torch.cat(parts).numpy(), pairs.shape[1])

    def _states(self, side: WordTokens, sentences: npt.NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """(B, T, H) float32 states and (B, T) words of the tokens of some sentences."""
        batch = self._encoder.pack(side.tokens, sentences).to(self._encoder.device)
        states = self._encoder.hidden_states(batch, self._layer).flatten(0, 1)
        lengths = torch.from_numpy(side.tokens.lengths(sentences))[:, None]  # (B, 1)
        token = torch.arange(-(-int(lengths.max()) // _STEP) * _STEP)
        inside = token < lengths  # (B, T)
        offsets = torch.from_numpy(side.tokens.offsets[sentences])[:, None]
        words = torch.from_numpy(side.word_of_token)[torch.where(inside, offsets + token, 0)]
        words = words.masked_fill(~inside, NONE).to(states.device)
        places = batch.starts[:, None] + torch.where(inside, token, 0).to(states.device)
        return take_states(states, places).float(), words


def load_aligner(
    config: WordAlignerConfig, name: str, device: torch.device, progress: Progress
) -> WordAligner:
    """An aligner on an encoder of its own.

    Raises:
        ModelError: the encoder cannot be loaded.
        UsageError: it has no such layer.
    """
    # A student's projection is the one part that is not needed: any width will do.
    encoder = new_student(name, embedding_dim=1).to(device)
    encoder.verify_packing(name, progress)
    return WordAligner(
        encoder, name, layer=config.aligner_layer, threshold=config.aligner_threshold
    )


def _batches(
    sides: tuple[WordTokens, WordTokens], pairs: npt.NDArray[np.intp]
) -> Iterator[npt.NDArray[np.intp]]:
    """The pairs in batches of like lengths: what is padded is computed for nothing."""
    source, target = (side.tokens.lengths(own) for side, own in zip(sides, pairs, strict=True))
    order = np.lexsort([target, source])
    for start in range(0, len(order), _PAIRS):
        yield order[start : start + _PAIRS]


def _in_order(links: npt.NDArray[np.int64], num_pairs: int) -> Links:
    links = links[np.argsort(links[:, 0], kind="stable")]
    offsets = np.searchsorted(links[:, 0], np.arange(num_pairs + 1))
    return Links(links[:, 1:], np.ones(len(links), dtype=bool), offsets)
