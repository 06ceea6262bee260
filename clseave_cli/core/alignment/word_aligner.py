"""A word aligner on top of any multilingual encoder, after awesome-align (Dou and Neubig 2021).

Legend: P sentence pairs · B pairs in a batch · S, T tokens of its longest source and target
sentence · H hidden width · L links.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save
from torch import Tensor

from clseave_cli.core.alignment.links import Links
from clseave_cli.core.alignment.words import NONE, Words, WordTokens, find_tokens
from clseave_cli.core.config import WordAlignerConfig
from clseave_cli.core.files import atomic_file, cache_root, file_digest, json_digest
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.student import new_student
from clseave_cli.core.training.distribution import processes
from clseave_cli.errors import UsageError
from clseave_cli.progress import SILENT, Progress, Task

#: The layer that aligns best in mBERT (Dou and Neubig 2021, section 4.2), and the thesis's.
_BEST_LAYER = 8

_BATCH_SIZE = 256
#: Lengths are padded to a multiple of this, so that a GPU sees few shapes.
_STEP = 8
_DIGEST_BYTES = 16


class WordAligner:
    """Links words that translate each other.

    Args:
        encoder: a multilingual encoder; it is not changed, and its projection is not used.
        name: its name, for messages.
        layer: the layer to compare, from 1; None: 8, or the last if there are fewer.
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
        threshold: float = 1e-3,
    ) -> None:
        num_layers = int(encoder.backbone.config.num_hidden_layers)
        if layer is not None and layer > num_layers:
            raise UsageError(
                f"--aligner-layer {layer}: {name} has {num_layers}; choose from 1 to {num_layers}."
            )
        self._encoder = encoder
        self._name = name
        self.layers = range(1, num_layers + 1)
        self.layer = min(_BEST_LAYER, num_layers) if layer is None else layer
        self.threshold = threshold

    def having(self, layer: int, threshold: float) -> WordAligner:
        """An aligner on the same encoder with another layer and threshold."""
        return WordAligner(self._encoder, self._name, layer=layer, threshold=threshold)

    @functools.cached_property
    def digest(self) -> str:
        """A digest of the current weights, the layer and the threshold."""
        return json_digest([self._encoder.states_digest(), self.layer, self.threshold])

    def align(
        self,
        source: Words,
        target: Words,
        pairs: npt.NDArray[np.intp],
        *,
        description: str = "word alignment",
        progress: Progress = SILENT,
    ) -> Links:
        """Links the words of P sentence pairs, or returns their cached links.

        `pairs` is (2, P), the index of the source and of the target sentence.
        """

        def compute() -> Links:
            with torch.no_grad(), progress.task(description, pairs.shape[1], "pairs") as task:
                return self._align(source, target, pairs, task)

        spans = [[w.sentences, w.starts.tolist(), w.offsets.tolist()] for w in (source, target)]
        return cached_links(json_digest([self.digest, *spans, pairs.tolist()]), compute)

    def _align(
        self, source: Words, target: Words, pairs: npt.NDArray[np.intp], task: Task
    ) -> Links:
        sides = find_tokens(self._encoder, source), find_tokens(self._encoder, target)
        was_training = self._encoder.training
        self._encoder.eval()
        parts: list[Tensor] = [torch.empty((0, 3), dtype=torch.int64)]
        # Similar lengths together, for less padding.
        lengths = [side.tokens.lengths(rows) for side, rows in zip(sides, pairs, strict=True)]
        order = np.lexsort(lengths[::-1])
        for start in range(0, len(order), _BATCH_SIZE):
            numbers = order[start : start + _BATCH_SIZE]
            (source_states, source_words), (target_states, target_words) = (
                self._states(side, sentences[numbers])
                for side, sentences in zip(sides, pairs, strict=True)
            )
            linked = link_words(
                source_states, target_states, source_words, target_words, self.threshold
            ).cpu()
            linked[:, 0] = torch.from_numpy(numbers)[linked[:, 0]]
            parts.append(linked)
            task.advance(len(numbers))
        self._encoder.train(was_training)
        links = torch.cat(parts).numpy()
        return Links.of(links[:, 0], links[:, 1:], pairs.shape[1])

    def _states(self, side: WordTokens, sentences: npt.NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """(B, T, H) float32 states of the sentences' tokens, and (B, T) their words."""
        batch = self._encoder.pack(side.tokens, sentences).to(self._encoder.device)
        states = self._encoder.hidden_states(batch, self.layer).flatten(0, 1)
        lengths = torch.from_numpy(side.tokens.lengths(sentences))[:, None]  # (B, 1)
        token = torch.arange(-(-int(lengths.max()) // _STEP) * _STEP)
        inside = token < lengths  # (B, T)
        offsets = torch.from_numpy(side.tokens.offsets[sentences])[:, None]
        words = torch.from_numpy(side.word_of_token)[torch.where(inside, offsets + token, 0)]
        words = words.masked_fill(~inside, NONE).to(states.device)
        places = batch.starts[:, None] + torch.where(inside, token, 0).to(states.device)
        # Twice as fast as indexing.
        states = states.index_select(0, places.flatten()).view(*places.shape, -1)
        return states.float(), words


def load_aligner(
    config: WordAlignerConfig, name: str, device: torch.device, progress: Progress
) -> WordAligner:
    """An aligner on the encoder `name`; raises a ModelError if it cannot be loaded."""
    # The projection is not used, so any width will do.
    encoder = new_student(name, embedding_dim=1).to(device)
    encoder.verify_packing(name, progress)
    return WordAligner(
        encoder, name, layer=config.aligner_layer, threshold=config.aligner_threshold
    )


def link_words(
    source: Tensor, target: Tensor, source_words: Tensor, target_words: Tensor, threshold: float
) -> Tensor:
    """Links the words of a batch of sentence pairs.

    The similarity of two sub-words is the dot product of their states. A softmax over the other
    sentence makes it a probability in each direction. Sub-words above the threshold in both are
    linked, and so are their words (Dou and Neubig 2021, sections 2.1 and 2.2).

    Args:
        source: (B, S, H) states, padded at will.
        target: (B, T, H) states.
        source_words: (B, S) int64 word of each token; -1 for tokens in no word, which are ignored.
        target_words: (B, T) int64 the same.
        threshold: least probability.

    Returns:
        (L, 3) int64 pair, source word and target word; distinct, in order.
    """
    is_source, is_target = source_words != NONE, target_words != NONE
    similarity = source @ target.transpose(1, 2)  # (B, S, T)
    # Not -inf, which would turn a row of padding into nan.
    lowest = torch.finfo(similarity.dtype).min
    similarity = similarity.masked_fill(~(is_source[:, :, None] & is_target[:, None, :]), lowest)
    linked = torch.softmax(similarity, dim=2) > threshold
    linked &= torch.softmax(similarity, dim=1) > threshold
    linked &= is_source[:, :, None] & is_target[:, None, :]
    pair, i, j = linked.nonzero(as_tuple=True)
    # Several sub-words may link the same words, so each link becomes one number.
    width = 1 + torch.maximum(source_words.max(), target_words.max())
    keys = torch.unique((pair * width + source_words[pair, i]) * width + target_words[pair, j])
    return torch.stack([keys // (width * width), keys // width % width, keys % width], dim=1)


def cached_links(key: str, compute: Callable[[], Links]) -> Links:
    """The links cached under `key`, a digest of all inputs, or else computed and cached.

    A damaged file is replaced. With several processes, rank 0 does the work.
    """

    def load_or_compute() -> Links:
        folder = cache_root() / "words"
        for path in folder.glob(f"{key}.*.safetensors"):
            if path.suffixes[0] == f".{file_digest(path, _DIGEST_BYTES)}":
                return Links(**load_file(path))
            path.unlink(missing_ok=True)
        links = compute()
        # safetensors ignores strides.
        words = np.ascontiguousarray(links.words)
        content = save({"words": words, "sure": links.sure, "offsets": links.offsets})
        digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()
        with atomic_file(folder / f"{key}.{digest}.safetensors") as stream:
            stream.write(content)
        return links

    return processes().once(load_or_compute)
