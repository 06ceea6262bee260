"""`autoencode`: the multilingual autoencoder of the token method (thesis 3.2.2).

It is trained to reconstruct the last hidden states of a frozen multilingual encoder, at the first
sub-token of every word, in all languages together.

Legend: L words in a batch of sentences · H width of a state.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clseave_cli.core.alignment.words import NONE, WordTokens, find_tokens, split_words
from clseave_cli.core.config import AutoencodeConfig
from clseave_cli.core.data.records import distinct, read_split, require_language, require_split_path
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.packing import PackedBatch
from clseave_cli.core.models.student import Autoencoder, new_student, save_autoencoder
from clseave_cli.core.models.tokens import TokenTable
from clseave_cli.core.training.device import on_device
from clseave_cli.core.training.loop import Rows, Selection, Stage, TrainingResult, train
from clseave_cli.core.training.run import Run, StageResult, public_name, set_up
from clseave_cli.errors import UsageError
from clseave_cli.progress import SILENT, Progress

_BATCH_SIZE = 512


class _Batch(NamedTuple):
    sentences: PackedBatch
    places: Tensor  # (L,) int64 position of each word's first token in the flat rows


class _States:
    """The states of a frozen encoder at the first token of every word."""

    def __init__(self, encoder: SentenceEncoder, sentences: list[WordTokens]) -> None:
        self._encoder = encoder
        self._tokens = TokenTable.concatenate([part.tokens for part in sentences])
        self._first_token = np.concatenate([part.first_token for part in sentences])
        self._offsets = np.cumsum([0, *np.concatenate([part.words.counts for part in sentences])])

    def __len__(self) -> int:
        return len(self._tokens)

    def prepare(self, sentences: Rows) -> _Batch:
        batch = self._encoder.pack(self._tokens, sentences)
        words = [
            self._first_token[self._offsets[number] : self._offsets[number + 1]]
            for number in sentences
        ]
        owner = np.repeat(np.arange(len(sentences)), list(map(len, words)))
        first = np.concatenate(words)
        has_token = first != NONE
        places = batch.starts[owner[has_token]] + torch.from_numpy(first[has_token])
        return _Batch(batch, places)

    def compute(self, batch: _Batch) -> Tensor:
        """Returns the (L, H) states."""
        with torch.no_grad():
            hidden = self._encoder.hidden_states(batch.sentences)
        return hidden.flatten(0, 1)[batch.places]


def autoencode(config: AutoencodeConfig, progress: Progress = SILENT) -> StageResult:
    """Trains the autoencoder on the text of one or several languages.

    Raises:
        ClseaveError: bad data, an unusable model, a full disk, or an interruption.
    """
    if not config.lang:
        raise UsageError("--lang is missing; for example --lang de --lang nl.")
    languages = tuple(dict.fromkeys(config.lang))
    for lang in languages:
        require_language(lang)
    out = config.out or config.runs / "autoencoder"
    setup = set_up("autoencode", config, config.data, out, progress)
    if setup is None:
        return StageResult(out, languages, None)
    splits = config.train_split, config.dev_split
    for lang, name in itertools.product(languages, splits):
        require_split_path(setup.data, name, lang)
    device = setup.device
    teacher = ClipVE.from_folder(config.teacher or config.runs / "clip-ve")
    torch.manual_seed(config.seed)
    encoder = new_student(config.student, embedding_dim=1).to(device).eval()
    encoder.requires_grad_(False)
    encoder.verify_packing(config.student, progress)
    inputs = {"teacher": teacher.fingerprint, "student": encoder.digest()}
    training_parts: list[WordTokens] = []
    dev_parts: list[WordTokens] = []
    for lang in languages:
        for name, parts in zip(splits, (training_parts, dev_parts), strict=True):
            split = read_split(
                setup.data,
                name,
                lang,
                labelled=False,
                with_images=False,
                skip_bad=config.skip_bad,
                progress=progress,
            )
            inputs[split.path.name] = split.digest
            words = split_words(distinct(split.hypotheses)[0], lang)
            parts.append(find_tokens(encoder, words))
    training, dev = _States(encoder, training_parts), _States(encoder, dev_parts)
    with Run("autoencode", out, config, inputs) as run:
        torch.manual_seed(config.seed)
        widths = encoder.state_width, teacher.text.state_width
        autoencoder = Autoencoder(*widths, config.code).to(device)

        def loss(batch: _Batch) -> Tensor:
            states = training.compute(batch)
            return functional.mse_loss(autoencoder(states).float(), states.float())

        stage = Stage(
            name="autoencode",
            title=f"autoencode {'+'.join(languages)}",
            module=autoencoder,
            num_examples=len(training),
            prepare=training.prepare,
            loss=loss,
            evaluate=lambda: _evaluate(autoencoder, dev, device),
            selection=Selection("mse", "lowest"),
        )
        result = train(stage, config, device=device, folder=run.folder, progress=progress)
        run.publish(
            lambda aside: save_autoencoder(autoencoder, aside, languages=languages),
            _card(config, languages, len(training), result),
        )
        return StageResult(out, languages, result)


def _evaluate(autoencoder: Autoencoder, dev: _States, device: torch.device) -> dict[str, float]:
    """Squared error per dimension, and the same as a share of the states' variance."""
    rows = np.arange(len(dev))
    states = torch.cat(
        [
            dev.compute(on_device(dev.prepare(rows[start : start + _BATCH_SIZE]), device)).float()
            for start in range(0, len(rows), _BATCH_SIZE)
        ]
    )
    error = functional.mse_loss(autoencoder(states).float(), states)
    return {"mse": error.item(), "unexplained": (error / states.var(dim=0).mean()).item()}


def _card(
    config: AutoencodeConfig, languages: tuple[str, ...], count: int, result: TrainingResult
) -> str:
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in result.dev.items())
    model = public_name(config.student)
    return f"""---
library_name: clseave
tags: [autoencoder, multilingual]
language: [{", ".join(languages)}]
base_model: {model}
---

# Multilingual autoencoder

Maps the last hidden states of `{model}` to the width of the teacher's, and back. Students of
`clseave align --method token --pretrained-code` start from it. Trained on {count} distinct
sentences in {", ".join(languages)} for {result.epochs} epochs; the weights are those of epoch
{result.best_epoch}: {metrics} on dev. `training/` records every option, version and metric.
"""
