"""`align`: a multilingual student of the CLIP-VE text tower (thesis 3.3).

The student learns to give a translated hypothesis the embedding that the frozen teacher gives the
original. The teacher is asked once per sentence; after that it is a look-up.

The flow is here; `corpus` reads what is learnt from, `sampling` says what an epoch meets of it,
`objectives` what the loss is, `token` what the token method makes of both, `transfer` how a student
starts from another one, `dev` how good the student is.
"""

from __future__ import annotations

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
    CollapseWatch,
    DevRows,
    dev_sets,
    evaluate_student,
    judged_rows,
    selection,
)
from clseave_cli.core.alignment.objectives import SentenceObjective, comparison, require_fitting
from clseave_cli.core.alignment.sampling import Sampler
from clseave_cli.core.alignment.token import (
    TokenCorpus,
    TokenObjective,
    TokenPairs,
    require_links_fit,
    token_student,
)
from clseave_cli.core.alignment.transfer import (
    Lexicon,
    new_translator,
    require_start_fits,
    student_begun_from,
)
from clseave_cli.core.config import AlignConfig, StudentConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.records import Parallel, require_language, require_split_path
from clseave_cli.core.data.seen import SeenRows
from clseave_cli.core.files import json_digest
from clseave_cli.core.models.clip_ve import ClipVE, source_language
from clseave_cli.core.models.encoders import SentenceEncoder, backbone_digest
from clseave_cli.core.models.student import new_student, save_student
from clseave_cli.core.models.vocabulary import reduced_vocabulary
from clseave_cli.core.training.loop import Stage, TrainingResult, overall, train
from clseave_cli.core.training.run import Run, StageResult, public_name, set_up
from clseave_cli.errors import UsageError
from clseave_cli.progress import SILENT, Progress


def align(config: AlignConfig, progress: Progress = SILENT) -> StageResult:
    """Trains one student on the parallel text of one or several languages.

    Raises:
        ClseaveError: bad data, an unusable model, a full disk, a collapse, or an interruption.
    """
    languages = student_languages(config)
    require_links_fit(config)
    require_start_fits(config)
    teacher_folder = _teacher_folder(config)
    out = config.out or config.runs / f"align-{'+'.join(languages)}"
    setup = set_up("align", config, config.data, out, progress)
    if setup is None:
        return StageResult(out, languages, None)
    device, folder, with_autocast = setup.device, setup.data, setup.autocast
    for lang in _translated(config):
        require_split_path(folder, config.train_split, lang)
    teacher = ClipVE.from_folder(teacher_folder).to(device)
    teacher.requires_grad_(False)
    require_fitting(config, teacher)

    student, lexicon, inputs = _new_student(config, teacher, progress)
    corpus, token_pairs, dev, text_inputs, seen = _read(
        config, folder, student, teacher, lexicon, progress
    )
    with Run("align", out, config, inputs | text_inputs) as run:
        if config.trim_vocabulary:
            corpus.trim_vocabulary(config.student)
        translator = new_translator(config, student, lexicon)
        pairs = corpus.pairs(teacher, with_autocast)
        judged = dev_sets(student, teacher, dev, languages, with_autocast, progress)
        select = selection(config, with_photos=judged[0].premises is not None)
        objective = _objective(config, student, teacher, pairs, token_pairs)
        del corpus, dev, token_pairs, lexicon

        sampler = Sampler(pairs, config)
        # The token method need not train what the head reads (the thesis does not); it shall show
        # that.
        may_collapse = config.method == "token"
        watch = CollapseWatch("+".join(languages), may_collapse=may_collapse)
        stage = Stage(
            name="align",
            title=f"align {'+'.join(languages)}"
            + (f", {config.limit:,} sentences" if config.limit else ""),
            module=student,
            num_examples=sampler.num_examples,
            prepare=objective.prepare,
            loss=objective.loss,
            evaluate=lambda: watch.during(evaluate_student(student, teacher, judged)),
            selection=select,
            sample=sampler.batches,
            # The last epoch shows all that ever spread: had some been lost, the run had ended.
            resumed=watch.during,
            trained_first=() if translator is None else tuple(translator.parameters()),
            freeze_epochs=1 if config.translator_epochs is None else config.translator_epochs,
        )
        tokens = [pairs.sentences.tokens, *(each.sentences.tokens for each in judged)]
        with reduced_vocabulary(student, *tokens, translator=translator):
            result = train(stage, config, device=device, folder=run.folder, progress=progress)
        watch.during(result.dev, at_the_end=True)
        run.publish(
            lambda aside: save_student(
                student, aside, languages=languages, teacher=teacher.fingerprint, dev=result.dev
            ),
            _card(config, languages, teacher.source_lang, pairs.num_distinct, result),
            seen,
        )
        return StageResult(out, languages, result)


def _new_student(
    config: AlignConfig, teacher: ClipVE, progress: Progress
) -> tuple[SentenceEncoder, Lexicon | None, dict[str, str]]:
    """The student before training beside the teacher, what its translator is to be computed from,
    and fingerprints of what it comes from.
    """
    torch.manual_seed(config.seed)
    inputs, lexicon = {"teacher": teacher.fingerprint}, None
    if config.init_from is not None:
        student, lexicon = student_begun_from(config.init_from, config, teacher, progress)
    elif config.method == "sentence":
        student = new_student(config.student, teacher.text.embedding_dim, config.pooling)
    else:
        student, begun_from = token_student(config, teacher.text)
        inputs |= begun_from
    student.pretrained = student.pretrained or backbone_digest(student.backbone)
    student.to(teacher.text.device)
    student.verify_packing(config.student, progress)
    return student, lexicon, inputs | {"student": student.digest()}


def _read(
    config: AlignConfig,
    folder: Path,
    student: SentenceEncoder,
    teacher: ClipVE,
    lexicon: Lexicon | None,
    progress: Progress,
) -> tuple[Corpus, TokenPairs | None, dict[str, DevRows], dict[str, str], list[SeenRows]]:
    """Reads language after language; of a language's training rows only tokens stay.

    Returns:
        The training text of all languages, its paired words where the method needs them, the dev
        rows of each language, fingerprints of all of it, and the photos and pairs in it.
    """
    source_lang = teacher.source_lang
    corpus = Corpus(student, progress)
    words = None
    if config.method != "sentence":
        words = TokenCorpus(student, teacher.text, source_lang, config, progress)
    reader = ParallelReader(folder, config, progress, source_lang)
    dev_rows: dict[str, Parallel] = {}
    inputs: dict[str, str] = {}
    seen: list[SeenRows] = []
    if config.init_from is not None and (before := SeenRows.read(config.init_from)) is not None:
        seen.append(before)
    if lexicon is not None and config.lexicon is not None:
        inputs |= lexicon.read(config.lexicon)
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
        if lexicon is not None and config.lexicon is None and lang in config.lang:
            inputs |= lexicon.add(reader, training)
        dev_rows[lang] = dev
        seen.append(SeenRows.of(training.target))
    if config.include_english:
        part = corpus.add_source(source_lang)
        if words is not None:
            words.add_source(part, corpus.sources)
        dev_rows[source_lang] = as_source(dev_rows[config.lang[0]], source_lang)
    token_pairs = None if words is None else words.pairs(corpus.sources)
    judged = judged_rows(folder, config, dev_rows, progress)
    for lang, (parallel, photos) in judged.items():
        seen.append(SeenRows.of(parallel.target, None if photos is None else photos.keys))
        if photos is not None:
            inputs[f"photos: dev of {lang}"] = photos.digest()
    return corpus, token_pairs, judged, inputs, seen


def _translated(config: AlignConfig) -> tuple[str, ...]:
    """The languages whose text is read: those of the student, then the auxiliary ones."""
    return tuple(dict.fromkeys([*config.lang, *config.auxiliary]))


def _objective(
    config: AlignConfig,
    student: SentenceEncoder,
    teacher: ClipVE,
    pairs: TrainingPairs,
    token_pairs: TokenPairs | None,
) -> SentenceObjective | TokenObjective:
    sentences = SentenceObjective(student, pairs, comparison(config, pairs))
    if token_pairs is None:
        return sentences
    both = config.method == "sentence+token"
    return TokenObjective(
        student,
        teacher.text,
        token_pairs,
        sentences,
        sentence_weight=1.0 if both else 0.0,
        token_weight=config.token_weight if both else 1.0,
        target=config.token_target,
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
    source_lang = source_language(_teacher_folder(config))
    if source_lang in config.lang:
        raise UsageError(
            f"--lang {source_lang}: is the teacher's own language; name another, and "
            "--include-english for a student that reads it too."
        )
    for lang in config.auxiliary:
        require_language(lang, "--auxiliary")
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
    model = public_name(config.student)
    return f"""---
library_name: clseave
tags: [visual-entailment, multilingual, sentence-embeddings]
language: [{", ".join(languages)}]
base_model: {model}
---

# Student of CLIP-VE for {", ".join(languages)}

Gives sentences in {", ".join(languages)} the embedding that the CLIP-VE teacher gives their
translation in {source_lang}, so that the teacher's image tower and head work unchanged.
`{model}`, trained on {num_pairs} distinct sentence pairs, {result.epochs} epochs, the
weights of epoch {result.best_epoch} kept: {figures} on dev. Objective {config.objective}, pooling
{config.pooling}.

    clseave predict image.jpg "…" --lang {languages[0]} --runs runs

It works with the one teacher named in `config.json` only. `training/` records every option,
version and figure.
"""
