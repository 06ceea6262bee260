"""`align`: a multilingual student of the CLIP-VE text tower (thesis 3.3).

The student learns to give a translated hypothesis the embedding that the frozen teacher gives the
original. Teacher embeddings are computed once and then looked up.

`corpus` reads the parallel text, `sampling` draws each epoch's batches, `objectives` computes the
loss, `token` adds the token method, `transfer` initialises a student from another one, and `dev`
evaluates it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from clseave_cli.core.alignment.corpus import Corpus, ParallelReader, as_source, limited
from clseave_cli.core.alignment.dev import (
    CollapseWatch,
    DevRows,
    dev_sets,
    evaluate_student,
    scored_rows,
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
    initialised_student,
    new_translator,
    require_start_fits,
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
    name = "+".join(languages)
    out = config.out or config.runs / f"align-{name}"
    setup = set_up("align", config, config.data, out, progress)
    if setup is None:
        return StageResult(out, languages, None)
    for lang in _languages_read(config):
        require_split_path(setup.data, config.train_split, lang)
    teacher = ClipVE.from_folder(_teacher_folder(config)).to(setup.device)
    teacher.requires_grad_(False)
    require_fitting(config, teacher)

    student, lexicon, inputs = _new_student(config, teacher, progress)
    corpus, token_pairs, dev_rows, text_inputs, seen = _read(
        config, setup.data, student, teacher, lexicon, progress
    )
    with Run("align", out, config, inputs | text_inputs) as run:
        if config.trim_vocabulary:
            corpus.trim_vocabulary(config.student)
        translator = new_translator(config, student, lexicon)
        pairs = corpus.pairs(teacher, setup.autocast)
        dev = dev_sets(student, teacher, dev_rows, languages, setup.autocast, progress)
        select = selection(config, with_photos=dev[0].premises is not None)
        sentences = SentenceObjective(student, pairs, comparison(config, pairs))
        objective: SentenceObjective | TokenObjective = sentences
        if token_pairs is not None:
            both = config.method == "sentence+token"
            objective = TokenObjective(
                teacher.text,
                token_pairs,
                sentences,
                sentence_weight=1.0 if both else 0.0,
                token_weight=config.token_weight if both else 1.0,
                target=config.token_target,
            )
        del corpus, dev_rows, token_pairs, lexicon

        sampler = Sampler(pairs, config)
        # The token method need not train the sentence embedding (the thesis does not).
        watch = CollapseWatch(name, may_collapse=config.method == "token")
        stage = Stage(
            name="align",
            title=f"align {name}" + (f", {config.limit:,} sentences" if config.limit else ""),
            module=student,
            num_examples=sampler.num_examples,
            prepare=objective.prepare,
            loss=objective.loss,
            evaluate=lambda: watch.check(evaluate_student(student, teacher, dev)),
            selection=select,
            sample=sampler.batches,
            # The last epoch's metrics are enough: had a language collapsed, the run had ended.
            resumed=watch.check,
            trained_first=() if translator is None else tuple(translator.parameters()),
            freeze_epochs=1 if config.translator_epochs is None else config.translator_epochs,
        )
        tokens = [pairs.sentences.tokens, *(each.sentences.tokens for each in dev)]
        with reduced_vocabulary(student, *tokens, translator=translator):
            result = train(stage, config, device=setup.device, folder=run.folder, progress=progress)
        watch.check(result.dev, at_the_end=True)
        run.publish(
            lambda aside: save_student(
                student, aside, languages=languages, teacher=teacher.fingerprint, dev=result.dev
            ),
            _card(config, languages, teacher.source_lang, int(pairs.distinct[-1]) + 1, result),
            seen,
        )
        return StageResult(out, languages, result)


def _new_student(
    config: AlignConfig, teacher: ClipVE, progress: Progress
) -> tuple[SentenceEncoder, Lexicon | None, dict[str, str]]:
    """The untrained student, the lexicon for its translator, and fingerprints of their sources."""
    torch.manual_seed(config.seed)
    inputs, lexicon = {"teacher": teacher.fingerprint}, None
    if config.init_from is not None:
        student, lexicon = initialised_student(config.init_from, config, teacher, progress)
    elif config.method == "sentence":
        student = new_student(config.student, teacher.text.embedding_dim, config.pooling)
    else:
        student, fingerprints = token_student(config, teacher.text)
        inputs |= fingerprints
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
    """Reads one language after another, keeping only the tokens of its training rows.

    Returns:
        The training text of all languages, its token pairs (None for the sentence method), the dev
        rows of each language, fingerprints of every input, and the photos and pairs trained on.
    """
    source_lang = teacher.source_lang
    corpus = Corpus(student, progress)
    token_corpus = None
    if config.method != "sentence":
        token_corpus = TokenCorpus(student, teacher.text, source_lang, config, progress)
    reader = ParallelReader(folder, config, progress, source_lang)
    parallel_dev: dict[str, Parallel] = {}
    inputs: dict[str, str] = {}
    seen: list[SeenRows] = []
    if config.init_from is not None and (before := SeenRows.read(config.init_from)) is not None:
        seen.append(before)
    if lexicon is not None and config.lexicon is not None:
        inputs |= lexicon.read(config.lexicon)
    for lang in _languages_read(config):
        whole, dev = reader.read(lang)
        training = limited(whole, config.limit, config.seed, progress)
        if config.trim_vocabulary:
            # Words stay in the vocabulary even if --limit or held-out photos drop their sentences.
            texts = [dev] if training is whole else [dev, whole]
            if lang in reader.left_out:
                texts.append(reader.left_out[lang])
            for text in texts:
                corpus.keep_tokens(text.target.hypotheses)
                if config.include_english:
                    corpus.keep_tokens(text.sources)
        for kind, parallel in (("train", training), ("dev", dev)):
            inputs[parallel.target.path.name] = parallel.target.digest
            inputs[f"{kind}: {source_lang} of {lang}"] = json_digest(parallel.sources)
        part = corpus.add(training, config.auxiliary_weight if lang in config.auxiliary else 1.0)
        if token_corpus is not None:
            inputs |= token_corpus.add(training, part, corpus.sources)
        if lexicon is not None and config.lexicon is None and lang in config.lang:
            inputs |= lexicon.add(reader, training)
        parallel_dev[lang] = dev
        seen.append(SeenRows.of(training.target))
    if config.include_english:
        part = corpus.add_source(source_lang)
        if token_corpus is not None:
            token_corpus.add_source(part, corpus.sources)
        parallel_dev[source_lang] = as_source(parallel_dev[config.lang[0]], source_lang)
    token_pairs = None if token_corpus is None else token_corpus.pairs(corpus.sources)
    dev_rows = scored_rows(folder, config, parallel_dev, progress)
    for lang, (parallel, photos) in dev_rows.items():
        seen.append(SeenRows.of(parallel.target, None if photos is None else photos.keys))
        if photos is not None:
            inputs[f"photos: dev of {lang}"] = photos.digest()
    return corpus, token_pairs, dev_rows, inputs, seen


def _languages_read(config: AlignConfig) -> tuple[str, ...]:
    """The student's languages, then the auxiliary ones."""
    return tuple(dict.fromkeys([*config.lang, *config.auxiliary]))


def count_sentences(config: StudentConfig, progress: Progress = SILENT) -> dict[str, int]:
    """The number of distinct source sentences in the training text of each language."""
    folder = data_folder(config.data, progress)
    reader = ParallelReader(folder, config, progress, source_language(_teacher_folder(config)))
    return {lang: len(set(reader.read(lang)[0].sources)) for lang in config.lang}


def student_languages(config: StudentConfig) -> tuple[str, ...]:
    """The languages that the student will read; with --include-english, the source language last.

    Raises:
        UsageError: a language is missing or not allowed.
        ModelError: there is no teacher.
    """
    if not config.lang:
        raise UsageError("--lang is missing; for example --lang de.")
    for lang in config.lang:
        require_language(lang)
    source_lang = source_language(_teacher_folder(config))
    if source_lang in config.lang:
        raise UsageError(
            f"--lang {source_lang}: is the teacher's language; name another one, and add "
            "--include-english for a student that reads both."
        )
    for lang in config.auxiliary:
        require_language(lang, "--auxiliary")
        if lang == source_lang:
            raise UsageError(f"--auxiliary {lang}: use --include-english instead.")
        if lang in config.lang:
            raise UsageError(
                f"--auxiliary {lang}: is a --lang already; an auxiliary language only helps to "
                "train the others."
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
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in overall(result.dev).items())
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
`{model}`, trained on {num_pairs} distinct sentence pairs for {result.epochs} epochs; the
weights are those of epoch {result.best_epoch}: {metrics} on dev. Objective {config.objective},
pooling {config.pooling}.

    clseave predict image.jpg "…" --lang {languages[0]} --runs runs

It works only with the teacher named in `config.json`. `training/` records every option, version
and metric.
"""
