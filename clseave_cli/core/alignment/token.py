"""CLTEAVE, the token method (thesis 3.2): trains a student's words on the teacher's.

Words that translate each other are paired and represented by their first sub-tokens. The student's
state there, mapped to the teacher's width (its code), is trained to equal the teacher's state. The
thesis's faults are options (docs/methods.md, "Token alignment").

Legend: P distinct training pairs · B pairs of a batch · L token pairs · K width of the teacher's
states · D embedding width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clseave_cli.core.alignment.corpus import LanguagePairs
from clseave_cli.core.alignment.links import Links, read_links
from clseave_cli.core.alignment.objectives import SentenceBatch, SentenceObjective
from clseave_cli.core.alignment.word_aligner import WordAligner, load_aligner
from clseave_cli.core.alignment.words import NONE, Words, find_tokens, split_words
from clseave_cli.core.config import StudentConfig, TokenTarget
from clseave_cli.core.data.records import Parallel, distinct
from clseave_cli.core.files import file_digest
from clseave_cli.core.models.encoders import SentenceEncoder, pool
from clseave_cli.core.models.packing import PackedBatch
from clseave_cli.core.models.student import (
    Autoencoder,
    CodedState,
    load_autoencoder,
    new_token_student,
)
from clseave_cli.core.models.tokens import TokenTable
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.loop import Rows
from clseave_cli.errors import DataError, UsageError
from clseave_cli.progress import Progress


def require_links_fit(config: StudentConfig) -> None:
    """Raises a UsageError if --alignments would go unused or serve several languages."""
    if config.alignments is None:
        return
    if config.method == "sentence":
        raise UsageError(
            "--alignments: --method sentence does not compare words; add --method token, or drop "
            "--alignments."
        )
    if len({*config.lang, *config.auxiliary}) > 1 and "{lang}" not in str(config.alignments):
        raise UsageError(
            f"--alignments {config.alignments}: one file for several languages; put {{lang}} in "
            "its name, in place of the language."
        )


def token_student(
    config: StudentConfig, teacher: SentenceEncoder
) -> tuple[SentenceEncoder, dict[str, str]]:
    """The untrained student of `--method token`, and fingerprints of what initialised it.

    Raises:
        UsageError: the options contradict each other.
        ModelError: the encoder or the autoencoder is unusable.
    """
    if config.pooling != "terminal":
        raise UsageError(
            f"--method {config.method}: use --sentence-token; --pooling belongs to --method "
            "sentence."
        )
    if config.method == "token" and config.objective != "mse":
        raise UsageError(
            f"--method token: compares token pairs by squared error; --objective "
            f"{config.objective} needs --method sentence or sentence+token."
        )
    if config.token_reader == "decoder" and not config.pretrained_code:
        raise UsageError(
            "--token-reader decoder: needs the decoder of a trained autoencoder; add "
            "--pretrained-code."
        )
    student = new_token_student(
        config.student,
        teacher,
        config.code,
        target=config.token_target,
        reader=config.token_reader,
        sentence_token=config.sentence_token,
    )
    if not config.pretrained_code:
        return student, {}
    coded = _coded_state(student)
    autoencoder, fingerprint = load_autoencoder(
        config.autoencoder or config.runs / "autoencoder",
        Autoencoder(student.state_width, coded.coding.width, config.code),
    )
    coded.coder.load_state_dict(autoencoder.encoder.state_dict())
    if config.token_reader == "decoder":
        coded.decoder.load_state_dict(autoencoder.decoder.state_dict())
    return student, {"autoencoder": fingerprint}


@dataclass(frozen=True, eq=False)
class TokenPairs:
    """The paired tokens of P distinct training pairs."""

    sources: TokenTable  # the distinct source sentences, for the teacher
    links: Links  # between tokens of the source and tokens of the target


@dataclass(eq=False)
class TokenCorpus:
    """Aligns the words of one language after another, or reads their links from a file."""

    student: SentenceEncoder  # untrained; it aligns words unless `--aligner` names another encoder
    teacher: SentenceEncoder  # the text tower to imitate
    source_lang: str
    config: StudentConfig
    progress: Progress
    #: For each language its pairs, and for each link: the pair, the first token of the target word
    #: (or `NONE`), and the source word.
    _parts: list[tuple[LanguagePairs, Rows, Rows, Rows]] = field(default_factory=list, init=False)

    def add(self, text: Parallel, part: LanguagePairs, sources: Sequence[str]) -> dict[str, str]:
        """Adds a language; returns the fingerprint of the links' file or of the aligner.

        Args:
            text: the rows of the language.
            part: what `Corpus.add` returned for them.
            sources: the source sentences that `part` refers to.

        Raises:
            DataError: the file of links is bad.
            ExtraMissing: the language needs a segmenter that is not installed.
        """
        lang = text.target.lang
        inputs = {}
        targets, target_of_row = distinct(text.target.hypotheses)
        numbers, source_of_pair = np.unique(part.source_of_pair, return_inverse=True)
        source_words = split_words([sources[number] for number in numbers], self.source_lang)
        words = split_words(targets, lang)
        pairs = np.stack([source_of_pair, part.sentence_of_pair])
        if self.config.alignments is not None:
            path = Path(str(self.config.alignments).replace("{lang}", lang))
            inputs[f"alignments: {lang}"] = file_digest(path)
            places = {source: place for place, source in enumerate(source_words.sentences)}
            source_of_row = np.array([places[source] for source in text.sources])
            links = read_links(
                path,
                np.stack([source_words.counts[source_of_row], words.counts[target_of_row]], axis=1),
                text=str(text.target.path),
                lines=text.target.lines,
                num_lines=text.target.num_lines,
                skip_bad=self.config.skip_bad,
                progress=self.progress,
            )
            # A pair that occurs in several rows gets the links of the first.
            _, row = np.unique(target_of_row * len(numbers) + source_of_row, return_index=True)
            links = links.take(row)
        else:
            inputs["aligner"] = self._aligner.digest
            links = self._aligner.align(
                source_words,
                words,
                pairs,
                description=f"{lang}: word alignment",
                progress=self.progress,
            )
        self._take(links, words, part)
        return inputs

    def add_source(self, part: LanguagePairs, sources: Sequence[str]) -> None:
        """Adds source sentences as their own translations: every word is linked with itself."""
        words = split_words(sources, self.source_lang)
        word = np.arange(len(words.starts)) - np.repeat(words.offsets[:-1], words.counts)
        is_sure = np.ones(len(word), dtype=bool)
        self._take(Links(np.stack([word, word], axis=1), is_sure, words.offsets), words, part)

    def pairs(self, sources: Sequence[str]) -> TokenPairs:
        """All token pairs in the order of `Corpus`'s pairs; a DataError if there are none."""
        source_tokens = find_tokens(self.teacher, split_words(sources, self.source_lang))
        columns: list[tuple[Rows, Rows, Rows]] = []  # training pair, token of target and source
        num_pairs = 0
        for part, pair, target_token, source_word in self._parts:
            word = source_tokens.words.offsets[part.source_of_pair[pair]] + source_word
            columns.append((num_pairs + pair, target_token, source_tokens.first_token[word]))
            if self.config.terminal_pair:
                terminals = (
                    part.tokens.lengths(part.sentence_of_pair) - 1,
                    source_tokens.tokens.lengths(part.source_of_pair) - 1,
                )
                columns.append((num_pairs + np.arange(len(part.counts)), *terminals))
            num_pairs += len(part.counts)
        pair, target, source = map(np.concatenate, zip(*columns, strict=True))
        kept = np.flatnonzero((target != NONE) & (source != NONE))
        if not len(kept):
            raise DataError("no words are linked; there is nothing for --method token to learn.")
        tokens = np.stack([source[kept], target[kept]], axis=1)
        return TokenPairs(source_tokens.tokens, Links.of(pair[kept], tokens, num_pairs))

    @functools.cached_property
    def _aligner(self) -> WordAligner:
        config = self.config
        if config.aligner is not None:
            return load_aligner(config, config.aligner, self.student.device, self.progress)
        return WordAligner(
            self.student,
            config.student,
            layer=config.aligner_layer,
            threshold=config.aligner_threshold,
        )

    def _take(self, links: Links, words: Words, part: LanguagePairs) -> None:
        word = words.offsets[part.sentence_of_pair[links.pairs]] + links.words[:, 1]
        target_token = find_tokens(self.student, words).first_token[word]
        self._parts.append((part, links.pairs, target_token, links.words[:, 0]))


class TokenBatch(NamedTuple):
    """B training pairs, prepared; token pairs are those of this process's shard."""

    pairs: SentenceBatch
    source: PackedBatch  # the distinct source sentences of the shard
    target_place: Tensor  # (L,) int64 position of the token in the flat rows of the targets
    source_place: Tensor  # (L,) int64 position of its partner in those of `source`
    owner: Tensor  # (L,) int64 sentence pair of the shard
    num_tokens: Tensor  # (B,) token pairs of each sentence pair of the batch


@dataclass(frozen=True, eq=False)
class TokenObjective:
    """Compares the codes of the student's paired tokens with teacher states (thesis 3.2.1)."""

    teacher: SentenceEncoder  # the frozen text tower
    tokens: TokenPairs
    sentences: SentenceObjective  # with the student, from `token_student`
    sentence_weight: float  # if 0, sentence embeddings are not computed
    token_weight: float
    target: TokenTarget = "normalised"  # which states of the teacher the codes imitate

    def prepare(self, rows: Rows) -> TokenBatch:
        """Packs this process's shard of both sides, with each source sentence once."""
        pairs, tokens, shard = self.sentences.pairs, self.tokens, processes().shard(rows)
        batch = self.sentences.prepare(rows)
        sources, source_of_pair = np.unique(pairs.teacher.index[shard], return_inverse=True)
        source = self.teacher.pack(tokens.sources, sources)
        links = tokens.links.take(pairs.distinct[shard])
        owner = links.pairs
        source_token, target_token = map(torch.from_numpy, links.words.T)
        return TokenBatch(
            batch,
            source,
            batch.sentences.starts[owner] + target_token,
            source.starts[source_of_pair[owner]] + source_token,
            torch.from_numpy(owner),
            torch.from_numpy(tokens.links.counts(pairs.distinct[rows])),
        )

    def loss(self, batch: TokenBatch) -> Tensor:
        """Mean squared error of the batch's token pairs, weighted like their sentence pairs."""
        weights = batch.pairs.weights
        gathered = processes().gather(lambda: self._errors(batch), len(weights))
        num_tokens = (weights * batch.num_tokens).sum()
        loss = (weights * gathered[:, 0].float()).sum() / num_tokens.clamp(min=1e-9)
        if not self.sentence_weight:
            return self.token_weight * loss
        sentence_loss = self.sentences.loss_of(gathered[:, 1:], batch.pairs)
        return self.sentence_weight * sentence_loss + self.token_weight * loss

    def _errors(self, batch: TokenBatch) -> Tensor:
        """(shard, 1) summed token errors of each pair, or (shard, 1 + D) with its embedding."""
        student, target = self.sentences.student, batch.pairs.sentences
        hidden = student.hidden_states(target)
        codes = _coded_state(student).coder(hidden.flatten(0, 1)[batch.target_place])  # (L, K)
        with torch.no_grad():
            layer = -1 if self.target == "encoder" else None
            states = self.teacher.hidden_states(batch.source, layer).flatten(0, 1)
        errors = (codes.float() - states[batch.source_place].float()).square().mean(dim=1)
        # A matrix product, because adding at indices is not deterministic on a GPU.
        sentences = torch.arange(len(target.terminals), device=hidden.device)
        belongs = (sentences[:, None] == batch.owner).float()  # (shard, L)
        with torch.autocast(hidden.device.type, enabled=False):
            summed: Tensor = belongs @ errors[:, None]
        if not self.sentence_weight:
            return summed
        embeddings = student.project(pool(hidden, target, student.pooling))
        return torch.cat([summed, embeddings.float()], dim=1)


def _coded_state(student: SentenceEncoder) -> CodedState:
    assert isinstance(student.norm, CodedState)
    return student.norm
