"""`align`: a multilingual student of the CLIP-VE text tower (thesis 3.3).

The student learns to give a translated hypothesis the embedding that the frozen English teacher
gives the original. The teacher is asked once per sentence; after that it is a look-up.

The flow is here; `corpus` reads what is learnt from, `objectives` says what the loss is, `dev` how
good the student is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from clseave_cli.core.alignment.corpus import Corpus, ParallelReader
from clseave_cli.core.alignment.dev import dev_set, evaluate_student, images_for_accuracy
from clseave_cli.core.alignment.objectives import SentenceObjective
from clseave_cli.core.config import AlignConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.records import ENGLISH, require_language, require_split_path
from clseave_cli.core.files import json_digest
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.student import new_student, save_student
from clseave_cli.core.models.vocabulary import reduced_vocabulary
from clseave_cli.core.progress import SILENT, Progress
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.loop import Selection, Stage, TrainingResult, train
from clseave_cli.core.training.precision import autocast, resolve_device
from clseave_cli.core.training.run import Run, is_complete, require_writable
from clseave_cli.errors import UsageError


@dataclass(frozen=True)
class AlignResult:
    """A finished student.

    Attributes:
        folder: the model.
        languages: what it reads.
        training: how the run went; None if it had been finished before.
    """

    folder: Path
    languages: tuple[str, ...]
    training: TrainingResult | None


def align(config: AlignConfig, progress: Progress = SILENT) -> AlignResult:
    """Trains one student on the parallel text of one or several languages.

    Raises:
        ClseaveError: bad data, an unusable model, a full disk, a collapse, or an interruption.
    """
    languages = _languages(config)
    out = config.out or config.runs / f"align-{'+'.join(languages)}"
    require_writable(out)
    if config.resume and is_complete(out):
        progress.note(f"{out}: already complete.")
        return AlignResult(out, languages, None)
    device = resolve_device(config.device)
    with_autocast = autocast(config.precision, device)
    folder = processes().once(lambda: data_folder(config.data, progress))
    for lang in languages:
        require_split_path(folder, config.train_split, lang)

    teacher = ClipVE.from_folder(config.teacher or config.runs / "clip-ve").to(device)
    teacher.requires_grad_(False)
    torch.manual_seed(config.seed)
    student = new_student(config.student, teacher.text.embedding_dim).to(device)
    if not student.verify_packing():
        progress.note(f"{config.student}: packing is not exact for this encoder; padding instead.")
    inputs = {"teacher": teacher.fingerprint, "student": student.digest()}
    corpus, dev_text = Corpus(student), []
    reader = ParallelReader(folder, config, progress)
    for lang in languages:
        training, dev = reader.read(lang)
        for kind, parallel in (("train", training), ("dev", dev)):
            inputs[parallel.target.path.name] = parallel.target.digest
            inputs[f"{kind}: English of {lang}"] = json_digest(parallel.sources)
        corpus.add(training, progress)
        dev_text.append(dev)
    del reader, training, parallel
    images = images_for_accuracy(folder, config, dev_text)
    run = Run("align", out, config, inputs)

    pairs = corpus.pairs(teacher, with_autocast, progress)
    del corpus
    dev_sets = [
        dev_set(student, teacher, parallel, images, with_autocast, progress)
        for parallel in dev_text
    ]
    objective = SentenceObjective(student, pairs)
    stage = Stage(
        name="align",
        title=f"align {'+'.join(languages)}",
        module=objective.module,
        num_examples=len(pairs),
        prepare=objective.prepare,
        loss=objective.loss,
        evaluate=lambda: evaluate_student(student, teacher, dev_sets),
        selection=(
            Selection("accuracy", "highest") if images is not None else Selection("mse", "lowest")
        ),
    )
    tokens = [pairs.sentences.tokens, *(dev.sentences.tokens for dev in dev_sets)]
    with reduced_vocabulary(student, *tokens):
        result = train(stage, config, device=device, folder=run.folder, progress=progress)
    run.publish(
        lambda aside: save_student(
            student, aside, languages=languages, teacher=teacher.fingerprint
        ),
        _card(config, languages, len(pairs), result),
    )
    return AlignResult(out, languages, result)


def _languages(config: AlignConfig) -> tuple[str, ...]:
    if not config.lang:
        raise UsageError("--lang is missing; for example --lang de.")
    for lang in config.lang:
        require_language(lang)
        if lang == ENGLISH:
            raise UsageError(f"--lang {ENGLISH}: is the teacher's own language; name another.")
    return tuple(dict.fromkeys(config.lang))


def _card(
    config: AlignConfig, languages: tuple[str, ...], num_pairs: int, result: TrainingResult
) -> str:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in result.dev.items())
    return f"""---
library_name: clseave
tags: [visual-entailment, multilingual, sentence-embeddings]
language: [{", ".join(languages)}]
base_model: {config.student}
---

# Student of CLIP-VE for {", ".join(languages)}

Gives sentences in {", ".join(languages)} the embedding that the English CLIP-VE teacher gives
their translation, so that the teacher's image tower and head work unchanged. `{config.student}`,
trained on {num_pairs} distinct sentence pairs, {result.epochs} epochs, the weights of epoch
{result.best_epoch} kept: {figures} on dev.

    clseave predict image.jpg "…" --lang {languages[0]} --runs {config.runs}

It works with the one teacher named in `config.json` only. `training/` records every option,
version and figure.
"""
