"""Initialises a student from one of another language, and translates between their word vectors.

"All for one" and the Translator of visually grounded cross-lingual transfer (Liu, Lebret and
Aberer; docs/methods.md, "Starting from another student").

Legend: N word pairs · V vocabulary · H width of word vectors.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from clseave_cli.core.alignment.corpus import ParallelReader
from clseave_cli.core.alignment.links import read_lines
from clseave_cli.core.alignment.word_aligner import WordAligner, load_aligner
from clseave_cli.core.alignment.words import NONE, Words, find_tokens, split_words
from clseave_cli.core.config import StudentConfig
from clseave_cli.core.data.records import Parallel, distinct
from clseave_cli.core.files import file_digest, json_digest
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.folder import peek
from clseave_cli.core.models.student import FORMAT, init_student
from clseave_cli.errors import DataError, ModelError, UsageError
from clseave_cli.progress import Progress

#: The token ids of a word.
Word = tuple[int, ...]

#: The most frequent word pairs to fit a translator to, as many as in Joulin et al. 2018.
_MOST_PAIRS = 5000
#: RCSLS: neighbours, steps, and the size of the first step.
_NEIGHBOURS, _STEPS, _RATE = 10, 10, 1.0


def require_start_fits(config: StudentConfig) -> None:
    """Raises a UsageError if the options of a start from a student conflict or are incomplete."""
    has_translator = config.translator != "none"
    for is_set, flag, lacks_other, other in (
        (config.keep_embeddings, "--keep-embeddings", not config.init_from, "--init-from DIR"),
        (has_translator, "--translator", not config.init_from, "--init-from DIR"),
        (config.translator_epochs is not None, "--translator-epochs", not has_translator,
         "--translator random or lexicon"),
        (config.lexicon, "--lexicon", config.translator != "lexicon", "--translator lexicon"),
        (config.init_from, "--init-from", config.method != "sentence", "--method sentence"),
    ):  # fmt: skip
        if is_set and lacks_other:
            raise UsageError(f"{flag}: needs {other}; add that, or drop {flag}.")
    if config.trim_vocabulary and (has_translator or config.keep_embeddings):
        raise UsageError(
            "--trim-vocabulary: the word vectors it removes could not be restored from --student "
            "after --translator or --keep-embeddings; drop one of these options."
        )
    if (config.translator_epochs or 0) > config.epochs:
        raise UsageError(
            f"--translator-epochs {config.translator_epochs}: more than --epochs {config.epochs}."
        )


def initialised_student(
    folder: Path, config: StudentConfig, teacher: ClipVE, progress: Progress
) -> tuple[SentenceEncoder, Lexicon | None]:
    """A student initialised from the one in `folder`, and the empty lexicon for its translator.

    Raises:
        ModelError: as `init_student`, or the encoder's word vectors allow no translator.
        UsageError: the trained student has another pooling.
    """
    student, vectors = init_student(
        folder, config.student, teacher=teacher.fingerprint, keep_words=config.keep_embeddings
    )
    if student.pooling != config.pooling:
        raise UsageError(
            f"--pooling {config.pooling}: {folder} was trained with {student.pooling}; use that."
        )
    table = student.backbone.get_input_embeddings()
    if config.translator != "none" and type(table) is not nn.Embedding:
        raise ModelError(
            f"{config.student}: --translator needs a plain table of word vectors, not a "
            f"{type(table).__name__}."
        )
    if config.translator != "lexicon":
        return student, None
    languages = peek(folder, FORMAT)["languages"]
    return student, Lexicon(student, vectors, languages, config, progress)


def new_translator(
    config: StudentConfig, student: SentenceEncoder, lexicon: Lexicon | None
) -> nn.Linear | None:
    """The untrained matrix behind the student's word vectors; None without --translator."""
    if config.translator == "none":
        return None
    width = student.backbone.get_input_embeddings().embedding_dim
    if lexicon is None:
        generator = torch.Generator().manual_seed(config.seed)
        matrix = nn.init.orthogonal_(torch.empty(width, width), generator=generator)
    else:
        matrix = lexicon.matrix()
    translator = nn.Linear(width, width, bias=False)
    translator.weight = nn.Parameter(matrix)
    return translator.to(student.device)


@dataclass(eq=False)
class Lexicon:
    """Words of a trained student's languages, with their translations."""

    student: SentenceEncoder  # the new student, which tokenises the words
    vectors: Tensor  # (V, H) word vectors of the trained student
    languages: Sequence[str]  # languages of the trained student
    config: StudentConfig
    progress: Progress
    _counts: Counter[tuple[Word, Word]] = field(default_factory=Counter, init=False)

    def read(self, path: Path) -> dict[str, str]:
        """Adds a file of word pairs; returns its fingerprint, or raises a DataError."""
        backend = self.student.tokenizer.backend_tokenizer
        for number, line in enumerate(read_lines(path, "a word and its translation"), start=1):
            words = line.split()
            if len(words) != 2:
                raise DataError.at(
                    path, number, f"{line[:60]!r} is no word pair; expected a word of "
                    f"{'+'.join(self.languages)}, a space, and its translation."
                )  # fmt: skip
            encodings = (backend.encode(word, add_special_tokens=False) for word in words)
            source, target = (tuple(encoding.ids) for encoding in encodings)
            if source and target:
                self._counts[source, target] += 1
        return {"lexicon": file_digest(path)}

    def add(self, reader: ParallelReader, training: Parallel) -> dict[str, str]:
        """Adds the linked words of a training text; returns fingerprints of text and aligner.

        Raises:
            UsageError: no language of the trained student has this text.
            ExtraMissing: a language needs a segmenter that is not installed.
        """
        inputs: dict[str, str] = {}
        for lang in self.languages:
            text = reader.with_source(training, lang)
            if text is None:
                continue
            sources, source_of_row = distinct(text.sources)
            targets, target_of_row = distinct(text.target.hypotheses)
            pairs = np.unique(np.stack([source_of_row, target_of_row]), axis=1)
            sides = split_words(sources, lang), split_words(targets, text.target.lang)
            name = f"{lang}-{text.target.lang}"
            links = self._aligner.align(
                *sides, pairs, description=f"{name}: word alignment", progress=self.progress
            )
            words = [_words(self.student, side) for side in sides]
            numbers = [
                side.offsets[sentences[links.pairs]] + place
                for side, sentences, place in zip(sides, pairs, links.words.T, strict=True)
            ]
            for source, target in np.stack(numbers, axis=1).tolist():
                if source in words[0] and target in words[1]:
                    self._counts[words[0][source], words[1][target]] += 1
            inputs["aligner"] = self._aligner.digest
            inputs[f"lexicon: {name}"] = json_digest(text.sources)
        if not inputs:
            raise UsageError(
                f"--translator lexicon: {reader.folder} has no training text in "
                f"{' or '.join(self.languages)}, which {self.config.init_from} reads; "
                "add --lexicon FILE."
            )
        return inputs

    @functools.cached_property
    def _aligner(self) -> WordAligner:
        name = self.config.aligner or self.config.student
        return load_aligner(self.config, name, self.student.device, self.progress)

    def pairs(self) -> list[tuple[Word, Word]]:
        """Words that are each other's most frequent translation, most frequent first.

        The special tokens of a sentence follow, each as its own translation.
        """
        targets: dict[Word, Word] = {}
        sources: dict[Word, Word] = {}
        for (source, target), _ in self._counts.most_common():
            targets.setdefault(source, target)
            sources.setdefault(target, source)
        pairs = [(s, t) for s, t in targets.items() if sources[t] == s][:_MOST_PAIRS]
        special = dict.fromkeys(self.student.tokenize([""]).ids.tolist())
        return pairs + [((token,), (token,)) for token in special]

    def matrix(self) -> Tensor:
        """Fits the (H, H) translator; raises a DataError if there are no word pairs."""
        pairs = self.pairs()
        num_words = sum(source != target for source, target in pairs)
        if not num_words:
            raise DataError("no words are linked, so --translator has no lexicon to fit.")
        self.progress.note(f"translator: fitted to {num_words:,} word pairs.")
        table = self.student.backbone.get_input_embeddings().weight.detach()
        sources, targets = zip(*pairs, strict=True)
        x, y = _vectors(table, targets), _vectors(self.vectors, sources)
        return rcsls(x, y, procrustes(x, y)).to(table.dtype)


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """The (H, H) orthogonal T that brings (N, H) T·x nearest to y: UVᵀ, with UΣVᵀ = SVD(YᵀX)."""
    u, _, vh = torch.linalg.svd(y.T @ x)
    matrix: Tensor = u @ vh
    return matrix


def rcsls_loss(x: Tensor, y: Tensor, matrix: Tensor) -> Tensor:
    """The relaxed CSLS loss of (N, H) unit vectors and those of their translations.

    A scalar, convex in the (H, H) matrix (Joulin et al. 2018, eq. 4).
    """
    similarity = x @ matrix.T @ y.T  # (N, N)
    nearest = min(_NEIGHBOURS, len(x))
    neighbours = [similarity.topk(nearest, dim=dim).values.mean() for dim in (0, 1)]
    loss: Tensor = neighbours[0] + neighbours[1] - 2 * similarity.diagonal().mean()
    return loss


def rcsls(x: Tensor, y: Tensor, matrix: Tensor) -> Tensor:
    """Refines T by projected subgradient descent of `rcsls_loss`.

    T stays in the convex hull of orthogonal matrices, whose singular values are at most 1. A step
    that does not lower the loss is undone, and the next one halved.
    """
    best, lowest, slope, rate = matrix, torch.inf, torch.zeros_like(matrix), _RATE
    for _ in range(_STEPS):
        candidate = matrix.requires_grad_()
        loss = rcsls_loss(x, y, candidate)
        if loss.item() < lowest:
            best, lowest = candidate.detach(), loss.item()
            (slope,) = torch.autograd.grad(loss, candidate)
        else:
            rate /= 2
        u, sizes, vh = torch.linalg.svd(best - rate * slope)
        matrix = u @ torch.diag(sizes.clamp(max=1)) @ vh
    return best


def _words(student: SentenceEncoder, words: Words) -> dict[int, Word]:
    """The tokens of every word that has any, by its number among all words."""
    aligned = find_tokens(student, words)
    sentence = np.repeat(np.arange(len(words)), np.diff(aligned.tokens.offsets))
    inside = aligned.word_of_token != NONE
    word = (words.offsets[sentence] + aligned.word_of_token)[inside]
    numbers, starts = np.unique(word, return_index=True)  # a word's tokens are adjacent
    pieces = np.split(aligned.tokens.ids[inside], starts[1:])
    return {n: tuple(piece.tolist()) for n, piece in zip(numbers.tolist(), pieces, strict=False)}


def _vectors(table: Tensor, words: Sequence[Word]) -> Tensor:
    """(N, H) float64 unit vectors of words, each the mean over its tokens, on the CPU."""
    rows = table.double().cpu()
    means = torch.stack([rows[list(word)].mean(dim=0) for word in words])
    return functional.normalize(means, dim=1)
