"""CLTEAVE, the token method (thesis 3.2): a student's words against the teacher's.

Words that translate each other are paired, each word stands for its first sub-token, and the
student's state there, coded to the teacher's width, is to be the teacher's state. The thesis's
faults are switches here (docs/methods.md, "Token alignment").

Legend: U training pairs, P different ones · B pairs of a batch · L token pairs · H width of the
student's states · K of the teacher's · D embedding width.
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
    """Refuses a file of links that nothing would read, or the wrong language would.

    Raises:
        UsageError: it is one.
    """
    if config.alignments is None:
        return
    if config.method == "sentence":
        raise UsageError(
            "--alignments: --method sentence compares no words; add --method token, or leave it "
            "out."
        )
    if len({*config.lang, *config.auxiliary}) > 1 and "{lang}" not in str(config.alignments):
        raise UsageError(
            f"--alignments {config.alignments}: one file for several languages; put {{lang}} in "
            "its name, which stands for the language."
        )


def token_student(
    config: StudentConfig, teacher: SentenceEncoder
) -> tuple[SentenceEncoder, dict[str, str]]:
    """The student that `--method token` trains, and fingerprints of what it starts from.

    Raises:
        UsageError: the options ask for another kind of student.
        ModelError: the encoder or the autoencoder is unusable.
    """
    if config.pooling != "terminal":
        raise UsageError(
            f"--method {config.method}: reads --sentence-token; --pooling is that of --method "
            "sentence."
        )
    if config.method == "token" and config.objective != "mse":
        raise UsageError(
            f"--method token: compares token pairs by squared error; --objective "
            f"{config.objective} needs --method sentence or sentence+token."
        )
    if config.token_reader == "decoder" and not config.pretrained_code:
        raise UsageError(
            "--token-reader decoder: reads through the decoder of a trained autoencoder; add "
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
    """The paired tokens of P different training pairs.

    Attributes:
        sources: tokens of the distinct source sentences, for the teacher.
        links: which token of the source sentence belongs to which of the target.
    """

    sources: TokenTable
    links: Links


@dataclass(eq=False)
class TokenCorpus:
    """Finds or reads word pairs, language by language, beside `Corpus`.

    Attributes:
        student: as it is before training; unless `--aligner` names another, it aligns words.
        teacher: the text tower to imitate.
        source_lang: its language.
        config: where word pairs come from.
        progress: shows how far the alignment is.
    """

    student: SentenceEncoder
    teacher: SentenceEncoder
    source_lang: str
    config: StudentConfig
    progress: Progress
    #: Of the linked words of each language: the training pairs they stand in, which of them, the
    #: first token of the target's word (or `NONE`), and the source's word.
    _parts: list[tuple[LanguagePairs, Rows, Rows, Rows]] = field(default_factory=list, init=False)

    def add(self, text: Parallel, part: LanguagePairs, sources: Sequence[str]) -> dict[str, str]:
        """Takes in the text of a language.

        Args:
            text: its rows.
            part: what `Corpus` made of them.
            sources: every source sentence that `part` counts through.

        Returns:
            Fingerprints of the file that was read, or of what aligned the words.

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
            # A pair that stands in several rows has the links of the first.
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
        """Takes in source sentences as their own translations: every word pairs with itself."""
        words = split_words(sources, self.source_lang)
        word = np.arange(len(words.starts)) - np.repeat(words.offsets[:-1], words.counts)
        every = np.ones(len(word), dtype=bool)
        self._take(Links(np.stack([word, word], axis=1), every, words.offsets), words, part)

    def pairs(self, sources: Sequence[str]) -> TokenPairs:
        """Everything taken in, in the order of `Corpus`'s pairs.

        Raises:
            DataError: there is not one token pair.
        """
        places = find_tokens(self.teacher, split_words(sources, self.source_lang))
        columns: list[tuple[Rows, Rows, Rows]] = []  # training pair, token of target and source
        num_pairs = 0
        for part, pair, target_token, source_word in self._parts:
            word = places.words.offsets[part.source_of_pair[pair]] + source_word
            columns.append((num_pairs + pair, target_token, places.first_token[word]))
            if self.config.terminal_pair:
                columns.append(
                    (
                        num_pairs + np.arange(len(part.counts)),
                        part.tokens.lengths(part.sentence_of_pair) - 1,
                        places.tokens.lengths(part.source_of_pair) - 1,
                    )
                )
            num_pairs += len(part.counts)
        pair, target, source = map(np.concatenate, zip(*columns, strict=True))
        kept = np.flatnonzero((target != NONE) & (source != NONE))
        if not len(kept):
            raise DataError("no words are linked; there is nothing for --method token to learn.")
        tokens = np.stack([source[kept], target[kept]], axis=1)
        return TokenPairs(places.tokens, Links.of(pair[kept], tokens, num_pairs))

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
    """B training pairs, made ready.

    Attributes:
        pairs: their sentences, with this process's shard of the targets packed.
        source: the distinct source sentences of that share, packed.
        target_place: (L,) int64 where in the flattened rows of the targets each paired token is.
        source_place: (L,) the same in those of `source`.
        owner: (L,) int64, which sentence of the shard it belongs to.
        num_tokens: (B,) paired tokens of every pair of the batch.
    """

    pairs: SentenceBatch
    source: PackedBatch
    target_place: Tensor
    source_place: Tensor
    owner: Tensor
    num_tokens: Tensor


@dataclass(frozen=True, eq=False)
class TokenObjective:
    """The codes of the student's paired tokens against the teacher's states (thesis 3.2.1).

    Attributes:
        student: what is trained; of `token_student`.
        teacher: the frozen text tower.
        tokens: the paired tokens.
        sentences: the sentences they stand in, and a loss on their embeddings.
        sentence_weight: of that loss; 0: embeddings are not computed.
        token_weight: of the token pairs' loss.
        target: which states of the teacher the codes imitate.
    """

    student: SentenceEncoder
    teacher: SentenceEncoder
    tokens: TokenPairs
    sentences: SentenceObjective
    sentence_weight: float
    token_weight: float
    target: TokenTarget = "normalised"

    def prepare(self, rows: Rows) -> TokenBatch:
        """Packs this process's shard of both sides; every source sentence once."""
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
        """Mean squared error of all token pairs of the batch, those of repeated pairs repeated."""
        weights = batch.pairs.weights
        gathered = processes().gather(lambda: self._errors(batch), len(weights))
        num_tokens = (weights * batch.num_tokens).sum()
        loss = (weights * gathered[:, 0].float()).sum() / num_tokens.clamp(min=1e-9)
        if not self.sentence_weight:
            return self.token_weight * loss
        sentence_loss = self.sentences.loss_of(gathered[:, 1:], batch.pairs)
        return self.sentence_weight * sentence_loss + self.token_weight * loss

    def _errors(self, batch: TokenBatch) -> Tensor:
        """For each pair of the shard the summed error of its tokens and, if asked, its embedding.

        Returns:
            (shard, 1) or (shard, 1 + D).
        """
        target = batch.pairs.sentences
        hidden = self.student.hidden_states(target)
        codes = _coded_state(self.student).coder(hidden.flatten(0, 1)[batch.target_place])  # (L, K)
        with torch.no_grad():
            layer = -1 if self.target == "encoder" else None
            states = self.teacher.hidden_states(batch.source, layer).flatten(0, 1)
        errors = (codes.float() - states[batch.source_place].float()).square().mean(dim=1)
        # A product with zeros and ones: adding at indices on a GPU gives other bits every time.
        sentences = torch.arange(len(target.terminals), device=hidden.device)
        belongs = (sentences[:, None] == batch.owner).float()  # (shard, L)
        with torch.autocast(hidden.device.type, enabled=False):
            summed: Tensor = belongs @ errors[:, None]
        if not self.sentence_weight:
            return summed
        embeddings = self.student.project(pool(hidden, target, self.student.pooling))
        return torch.cat([summed, embeddings.float()], dim=1)


def _coded_state(student: SentenceEncoder) -> CodedState:
    assert isinstance(student.norm, CodedState)
    return student.norm
