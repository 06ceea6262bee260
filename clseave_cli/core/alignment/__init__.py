"""`align`: a multilingual student of the CLIP-VE text tower (thesis 3.3).

The student learns to give a translated hypothesis the embedding that the frozen teacher gives the
original. The teacher is asked once per sentence; after that it is a look-up.

The flow is here; `corpus` reads what is learnt from, `sampling` says what an epoch meets of it,
`objectives` what the loss is, `token` what the token method makes of both, `dev` how good the
student is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from clseave_cli.core.alignment.corpus import (
    Corpus,
    ParallelReader,
    TrainingPairs,
    as_source,
    limited,
)
from clseave_cli.core.alignment.dev import (
    DevText,
    SpreadWatch,
    dev_set,
    dev_text,
    evaluate_student,
    selection,
)
from clseave_cli.core.alignment.objectives import (
    Objective,
    SentenceObjective,
    comparison,
    require_fitting,
)
from clseave_cli.core.alignment.sampling import Sampler, require_possible
from clseave_cli.core.alignment.token import (
    TokenCorpus,
    TokenObjective,
    TokenPairs,
    require_links_fit,
    token_student,
)
from clseave_cli.core.config import AlignConfig, StudentConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.records import Parallel, require_language, require_split_path
from clseave_cli.core.features import Photos
from clseave_cli.core.files import json_digest, require_replaceable
from clseave_cli.core.models.clip_ve import ClipVE, source_language
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.student import new_student, save_student
from clseave_cli.core.models.trimming import trim_vocabulary
from clseave_cli.core.models.vocabulary import reduced_vocabulary
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.loop import Stage, TrainingResult, overall, train
from clseave_cli.core.training.precision import autocast, resolve_device
from clseave_cli.core.training.run import Run, finished_before, model_kind
from clseave_cli.errors import UsageError
from clseave_cli.progress import SILENT, Progress


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
    languages = student_languages(config)
    require_possible(config)
    require_links_fit(config)
    teacher_folder = _teacher_folder(config)
    out = config.out or config.runs / f"align-{'+'.join(languages)}"
    require_replaceable(out, model_kind("align"), config)
    if config.resume and finished_before(out, progress):
        return AlignResult(out, languages, None)
    device = resolve_device(config.device)
    with_autocast = autocast(config.precision, device)
    folder = processes().once(lambda: data_folder(config.data, progress))
    for lang in _translated(config):
        require_split_path(folder, config.train_split, lang)
    teacher = ClipVE.from_folder(teacher_folder).to(device)
    teacher.requires_grad_(False)
    require_fitting(config, teacher)

    student, inputs = _new_student(config, teacher, progress)
    text = _read(config, folder, student, teacher, progress)
    with Run("align", out, config, inputs | text.inputs) as run:
        if config.trim_vocabulary:
            corpus = text.corpus
            corpus.renumber_tokens(trim_vocabulary(student, corpus.token_ids(), config.student))
        pairs = text.corpus.pairs(teacher, text.photos, with_autocast, progress)
        dev_sets = [
            dev_set(
                student,
                teacher,
                parallel,
                None if text.dev.photos is None else text.dev.photos[lang],
                counts=lang in languages,
                with_autocast=with_autocast,
                progress=progress,
            )
            for lang, parallel in text.dev.rows.items()
        ]
        select = selection(config, text.dev)
        objective = _objective(config, student, teacher, pairs, text.token_pairs)
        del text

        sampler = Sampler(pairs, config)
        # The token method need not train what the head reads (the thesis does not); it shall show
        # that.
        may_collapse = config.method == "token"
        watch = SpreadWatch("+".join(languages), may_collapse=may_collapse)
        stage = Stage(
            name="align",
            title=f"align {'+'.join(languages)}"
            + (f", {config.limit:,} sentences" if config.limit else ""),
            module=objective.module,
            num_examples=sampler.num_examples,
            prepare=objective.prepare,
            loss=objective.loss,
            evaluate=lambda: watch.during(evaluate_student(student, teacher, dev_sets)),
            selection=select,
            sample=sampler.batches,
            # The last epoch shows all that ever spread: had some been lost, the run had ended.
            resumed=watch.during,
        )
        tokens = [pairs.sentences.tokens, *(dev.sentences.tokens for dev in dev_sets)]
        with reduced_vocabulary(student, *tokens):
            result = train(stage, config, device=device, folder=run.folder, progress=progress)
        watch.at_the_end(result.dev)
        run.publish(
            lambda aside: save_student(
                student, aside, languages=languages, teacher=teacher.fingerprint
            ),
            _card(config, languages, teacher.source_lang, pairs.num_distinct, result),
        )
        return AlignResult(out, languages, result)


def _new_student(
    config: AlignConfig, teacher: ClipVE, progress: Progress
) -> tuple[SentenceEncoder, dict[str, str]]:
    """The untrained student beside the teacher, and fingerprints of what it comes from."""
    torch.manual_seed(config.seed)
    inputs = {"teacher": teacher.fingerprint}
    if config.method == "sentence":
        student = new_student(
            config.student, teacher.text.embedding_dim, config.pooling, config.projection
        )
    else:
        student, begun_from = token_student(config, teacher.text)
        inputs |= begun_from
    student.to(teacher.text.device)
    student.verify_packing(config.student, progress)
    return student, inputs | {"student": student.digest()}


@dataclass(frozen=True, eq=False)
class _Text:
    """What a student is trained and judged on.

    Attributes:
        corpus: the training text of all languages.
        photos: what stands beside it, where the objective looks at images.
        token_pairs: its paired words, where the method needs them.
        dev: the dev text of each language, and its photos.
        inputs: fingerprints of all of it.
    """

    corpus: Corpus
    photos: Photos | None
    token_pairs: TokenPairs | None
    dev: DevText
    inputs: dict[str, str]


def _read(
    config: AlignConfig,
    folder: Path,
    student: SentenceEncoder,
    teacher: ClipVE,
    progress: Progress,
) -> _Text:
    """Reads language after language; of a language's training rows only tokens stay."""
    source_lang = teacher.source_lang
    images = None
    if config.objective == "head-aware":
        images = ImageFolder.of(folder, config.images)
    corpus = Corpus(student, progress, with_images=images is not None)
    words = None
    if config.method != "sentence":
        words = TokenCorpus(student, teacher.text, source_lang, config, progress)
    reader = ParallelReader(folder, config, progress, source_lang)
    dev_rows: dict[str, Parallel] = {}
    inputs: dict[str, str] = {}
    for lang in _translated(config):
        whole, dev = reader.read(lang)
        training = limited(whole, config.limit, config.seed, progress)
        if config.trim_vocabulary:
            corpus.keep_tokens(dev.target.hypotheses)
            corpus.keep_tokens(reader.left_out.get(lang, []))
            if training is not whole:  # sentences are taken away, not words of the language
                corpus.keep_tokens(whole.target.hypotheses)
        for kind, parallel in (("train", training), ("dev", dev)):
            inputs[parallel.target.path.name] = parallel.target.digest
            inputs[f"{kind}: {source_lang} of {lang}"] = json_digest(parallel.sources)
        part = corpus.add(training, config.auxiliary_weight if lang in config.auxiliary else 1.0)
        if words is not None:
            inputs |= words.add(training, part, corpus.sources)
        dev_rows[lang] = dev
    photos = None if images is None else corpus.photos(images)
    if config.include_english:
        part = corpus.add_source(source_lang)
        if words is not None:
            words.add_source(part, corpus.sources)
        dev_rows[source_lang] = as_source(dev_rows[config.lang[0]], source_lang)
    token_pairs = None if words is None else words.pairs(corpus.sources)
    judged = dev_text(folder, config, dev_rows, progress)
    used = {f"dev of {lang}": own for lang, own in (judged.photos or {}).items()}
    if photos is not None:
        used["train"] = photos
    inputs |= {f"photos: {what}": own.digest() for what, own in used.items()}
    return _Text(corpus, photos, token_pairs, judged, inputs)


def _translated(config: AlignConfig) -> tuple[str, ...]:
    """The languages whose text is read: those of the student, then the auxiliary ones."""
    return tuple(dict.fromkeys([*config.lang, *config.auxiliary]))


def _objective(
    config: AlignConfig,
    student: SentenceEncoder,
    teacher: ClipVE,
    pairs: TrainingPairs,
    token_pairs: TokenPairs | None,
) -> Objective:
    compare = comparison(config, teacher, pairs)
    sentences = SentenceObjective(student, pairs, compare, config.seed)
    if token_pairs is None:
        return sentences
    return TokenObjective(
        student,
        teacher.text,
        pairs,
        token_pairs,
        sentences=None if config.method == "token" else sentences,
        token_weight=config.token_weight,
    )


def count_sentences(config: StudentConfig, progress: Progress = SILENT) -> dict[str, int]:
    """How many distinct source sentences a student of all `--lang` has to learn each from.

    Raises:
        ClseaveError: bad data, or no teacher.
    """
    folder = data_folder(config.data, progress)
    reader = ParallelReader(folder, config, progress, source_language(_teacher_folder(config)))
    return {lang: len(set(reader.read(lang)[0].sources)) for lang in config.lang}


def student_languages(config: StudentConfig) -> tuple[str, ...]:
    """The languages the student will read: the source language last, if it is asked for.

    Raises:
        UsageError: none is named, or one cannot be.
        ModelError: there is no teacher.
    """
    if not config.lang:
        raise UsageError("--lang is missing; for example --lang de.")
    for lang in config.lang:
        require_language(lang)
    for lang in config.auxiliary:
        require_language(lang, "--auxiliary")
    source_lang = source_language(_teacher_folder(config))
    if source_lang in config.lang:
        raise UsageError(
            f"--lang {source_lang}: is the teacher's own language; name another, and "
            "--include-english for a student that reads it too."
        )
    for lang in config.auxiliary:
        if lang == source_lang:
            raise UsageError(f"--auxiliary {lang}: is what --include-english is for.")
        if lang in config.lang:
            raise UsageError(
                f"--auxiliary {lang}: is a --lang already; an auxiliary language is only trained "
                "along."
            )
    return tuple(dict.fromkeys([*config.lang, *([source_lang] if config.include_english else [])]))


def _teacher_folder(config: StudentConfig) -> Path:
    return config.teacher or config.runs / "clip-ve"


def _card(
    config: AlignConfig,
    languages: tuple[str, ...],
    source_lang: str,
    num_pairs: int,
    result: TrainingResult,
) -> str:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in overall(result.dev).items())
    return f"""---
library_name: clseave
tags: [visual-entailment, multilingual, sentence-embeddings]
language: [{", ".join(languages)}]
base_model: {config.student}
---

# Student of CLIP-VE for {", ".join(languages)}

Gives sentences in {", ".join(languages)} the embedding that the CLIP-VE teacher gives their
translation in {source_lang}, so that the teacher's image tower and head work unchanged.
`{config.student}`, trained on {num_pairs} distinct sentence pairs, {result.epochs} epochs, the
weights of epoch {result.best_epoch} kept: {figures} on dev. Objective {config.objective}, pooling
{config.pooling}, projection {config.projection}.

    clseave predict image.jpg "…" --lang {languages[0]} --runs {config.runs}

It works with the one teacher named in `config.json` only. `training/` records every option,
version and figure.
"""
