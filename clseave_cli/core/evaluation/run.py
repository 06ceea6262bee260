"""`evaluate`: how good the models are, in every language, and whether they look at the photo.

What can be refused is refused first (`_Plan.of`); then `outputs` runs the models, `baselines` says
what is reached without the photo, and this file puts the numbers together.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clseave_cli.core.config import EvaluateConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.records import (
    Split,
    languages,
    read_split,
    require_language,
    require_split_path,
    split_path,
)
from clseave_cli.core.evaluation import metrics
from clseave_cli.core.evaluation.baselines import Guesses, HypothesisOnly
from clseave_cli.core.evaluation.comparison import PredictedRows
from clseave_cli.core.evaluation.figures import read_learning_curve
from clseave_cli.core.evaluation.gallery import errors, examples
from clseave_cli.core.evaluation.metrics import Difference, Interval
from clseave_cli.core.evaluation.outputs import Outputs, System, run_systems, shared_rows
from clseave_cli.core.evaluation.report import REPORT, write_report
from clseave_cli.core.evaluation.results import (
    TRAINING_ROWS,
    Baselines,
    LanguageResult,
    Results,
    Signature,
    across_seeds,
)
from clseave_cli.core.evaluation.transfer import analyse_distances, measure_transfer
from clseave_cli.core.files import file_digest, locked_target, require_replaceable
from clseave_cli.core.models.clip_ve import fingerprint, source_language
from clseave_cli.core.models.listing import find_students
from clseave_cli.core.models.student import require_teacher, student_fingerprint
from clseave_cli.core.training.precision import resolve_device, resolve_precision
from clseave_cli.core.translation.corpus import TranslatedHypotheses, translate_hypotheses
from clseave_cli.errors import DataError, ModelError, UsageError
from clseave_cli.progress import SILENT, Progress
from clseave_cli.version import __version__


def evaluate(config: EvaluateConfig, progress: Progress = SILENT) -> Results:
    """Evaluates CLIP-VE and the students under `config.runs`.

    Each language's rows are compared with those of the source language, which CLIP-VE itself reads,
    where they share a `pairID`; the source language is run for that even where `config.lang` leaves
    it out of the results.
    Several folders of models are the same training with several seeds: the results are those of
    the first, with mean and spread over all of them in `seeds`. Where `config.report` is set, the
    report is written there.

    Raises:
        ClseaveError: bad data; a model that is missing, damaged, or of another teacher; hypotheses
            that cannot be translated, where they are to be; or a report folder that cannot be
            written. What can be known of these beforehand is refused before any model runs.
    """
    with ExitStack() as stack:
        if config.report is not None:
            require_replaceable(config.report, REPORT, config)
            stack.enter_context(locked_target(config.report))
        return _evaluate(_Plan.of(config, progress), progress)


def _evaluate(plan: _Plan, progress: Progress) -> Results:
    config = plan.config
    documents, correct = [], []
    read = plan.splits, plan.translations, plan.images
    for number, runs in enumerate(config.runs):
        outputs = run_systems(config, runs / "clip-ve", plan.systems[number], *read, progress)
        documents.append(_document(plan, number, outputs))
        correct.append({key: own.correct for key, own in outputs.items()})
        if number == 0:
            first = outputs
        # Of the others only right or wrong is needed: embeddings take a lot of memory.
        del outputs
    document = documents[0]
    if document.of_training_rows:
        progress.note(TRAINING_ROWS)
    if len(documents) > 1:
        document = _with_seeds(config, documents, first, correct)
    if config.report is not None:
        _write(plan, document, {r.key: first[r.key] for r in document.results})
    return document


def require_rows(config: EvaluateConfig, langs: Iterable[str], progress: Progress) -> None:
    """Refuses rows of some languages that `evaluate` would refuse.

    Raises:
        DataError: no such file, a bad row, or a photo that is missing.
    """
    folder = data_folder(config.data, progress)
    images = ImageFolder.of(folder, config.images)
    for lang in langs:
        _read_rows(config, folder, lang, images, progress)


def _read_rows(
    config: EvaluateConfig, folder: Path, lang: str, images: ImageFolder, progress: Progress
) -> Split:
    split = read_split(folder, config.split, lang, skip_bad=config.skip_bad, progress=progress)
    return images.rows_with_image(split, config.skip_bad, progress)


# --- what is evaluated ---


@dataclass(frozen=True, eq=False)
class _Plan:
    """Everything an evaluation starts from, checked."""

    config: EvaluateConfig  # the options
    folder: Path  # of the data
    images: ImageFolder  # the photos
    source_lang: str  # the language that CLIP-VE reads
    along: str | None  # key of a system that is run for comparison only, and gets no result
    systems: list[list[System]]  # what to run, for each folder of models
    splits: dict[str, Split]  # rows by language
    # Hypotheses in the source language, by language, for translate-test.
    translations: dict[str, TranslatedHypotheses]
    hypothesis_only: HypothesisOnly  # the baseline that learns from the training rows

    @classmethod
    def of(cls, config: EvaluateConfig, progress: Progress) -> _Plan:
        """Checks options, models, rows, photos and training rows, then translates.

        Raises:
            ClseaveError: as `evaluate`.
        """
        folder = data_folder(config.data, progress)
        source_lang, along = _source_language(config), None
        systems = [_systems(config, runs, source_lang, folder, progress) for runs in config.runs]
        _check_models(config.runs, systems)
        resolve_device(config.device)
        images = ImageFolder.of(folder, config.images)
        every = dict.fromkeys((s.lang, s.mode) for of_models in systems for s in of_models)
        splits: dict[str, Split] = {}
        for lang in dict.fromkeys(lang for lang, _ in every):
            splits[lang] = _read_rows(config, folder, lang, images, progress)
        if source_lang not in splits and split_path(folder, config.split, source_lang):
            try:
                splits[source_lang] = _read_rows(config, folder, source_lang, images, progress)
                source = System(source_lang, "zero-shot", None)
                systems, along = [[source, *of_models] for of_models in systems], source.key
            except DataError as error:
                progress.note(f"{error} Nothing is compared with {source_lang}.")
        hypothesis_only = HypothesisOnly(config, folder, progress)
        for lang, mode in every:
            if mode == "zero-shot":
                hypothesis_only.require(lang, splits[lang], splits[lang].hypotheses)
        translations = {
            lang: translate_hypotheses(config, splits[lang], source_lang, progress)
            for lang, mode in every
            if mode == "translate-test"
        }
        models = source_lang, along, systems
        return cls(config, folder, images, *models, splits, translations, hypothesis_only)

    def training_language(self, system: System) -> str:
        """Whose training rows the baselines learn from: those of the language the model reads."""
        return self.source_lang if system.mode == "translate-test" else system.lang

    def guess(self, system: System) -> Guesses | None:
        """What the hypothesis-only baseline says of a system's rows."""
        split = self.splits[system.lang]
        translated = system.mode == "translate-test"
        read = self.translations[system.lang].sentences if translated else split.hypotheses
        return self.hypothesis_only.guess(self.training_language(system), split, read)


def _source_language(config: EvaluateConfig) -> str:
    """The language that CLIP-VE reads in every folder of models."""
    langs = {runs: source_language(runs / "clip-ve") for runs in config.runs}
    if len(set(langs.values())) > 1:
        named = ", ".join(f"{runs} {lang}" for runs, lang in langs.items())
        raise UsageError(f"--runs: models of several source languages ({named}).")
    return next(iter(langs.values()))


def _systems(
    config: EvaluateConfig, runs: Path, source_lang: str, folder: Path, progress: Progress
) -> list[System]:
    """What to evaluate of one folder of models: the source language first, then the others."""
    students = find_students(config.students or runs)
    zero_shot = config.mode != "translate-test"
    if config.lang:
        for lang in config.lang:
            require_language(lang)
            require_split_path(folder, config.split, lang)
            if zero_shot and lang != source_lang and lang not in students:
                there = ", ".join(dict.fromkeys([source_lang, *students]))
                raise ModelError(
                    f"{runs}: no student for {lang} (there are models for {there}); "
                    f"`clseave align --lang {lang}` makes one; --mode translate-test needs none."
                )
        wanted = list(dict.fromkeys(config.lang))
    else:
        require_split_path(folder, config.split, source_lang)
        wanted = sorted(languages(folder, config.split), key=lambda lang: lang != source_lang)
        without = [lang for lang in wanted if lang != source_lang and lang not in students]
        if zero_shot and without:
            progress.note(
                f"{runs}: no student for {', '.join(without)}; `clseave align --lang "
                f"{without[0]}` makes one."
            )
    systems = []
    for lang in wanted:
        if lang == source_lang or (zero_shot and lang in students):
            student = None if lang == source_lang else students[lang]
            systems.append(System(lang, "zero-shot", student))
        if lang != source_lang and config.mode != "zero-shot":
            systems.append(System(lang, "translate-test", None))
    return systems


def _check_models(runs: Sequence[Path], systems: Sequence[list[System]]) -> None:
    """Refuses students of another teacher, and the same models twice.

    The same models twice would pass for two trainings that agree.
    """
    seen: dict[tuple[str, ...], Path] = {}
    for folder, wanted in zip(runs, systems, strict=True):
        teacher = fingerprint(folder / "clip-ve")
        students = dict.fromkeys(s.student for s in wanted if s.student is not None)
        for student in students:
            require_teacher(student, teacher)
        models = teacher, *map(student_fingerprint, students)
        if models in seen:
            raise UsageError(
                f"--runs {seen[models]} and --runs {folder} hold the same models: one training, "
                "not two seeds."
            )
        seen[models] = folder


# --- one folder of models ---


def _document(plan: _Plan, number: int, outputs: dict[str, Outputs]) -> Results:
    """The results of one folder of models, the `number`-th."""
    config, source = plan.config, outputs.get(plan.source_lang)
    results, baselines, training = [], {}, {}
    for key, own in outputs.items():
        if key != plan.along:
            guesses = plan.guess(own.system)
            results.append(_language_result(config, own, source, outputs, guesses))
            baselines[key] = _baselines(config, own, guesses)
            path = plan.hypothesis_only.training_file(plan.training_language(own.system))
            if path is not None:
                training[path.relative_to(plan.folder).as_posix()] = file_digest(path)
    accuracies = {r.lang: r.accuracy for r in results if r.mode == "zero-shot"}
    if source is not None:
        accuracies[plan.source_lang] = float(source.correct.mean())
    device = resolve_device(config.device)
    splits = [own.split for own in outputs.values()]
    return Results(
        results=tuple(results),
        baselines=baselines,
        signature=Signature(
            version=__version__,
            data={split.path.relative_to(plan.folder).as_posix(): split.digest for split in splits},
            checkpoints=_checkpoints(config.runs, number, outputs),
            seed=config.seed,
            resamples=config.resamples,
            num_examples=max(map(len, splits)),
            translators={lang: t.translator for lang, t in plan.translations.items()},
            source_lang=plan.source_lang,
            training=training,
            precision=resolve_precision(config.precision, device),
            device=device.type,
            dataset=config.data if config.data.startswith("hf:") else plan.folder.resolve().name,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        ),
        distances=analyse_distances(accuracies, plan.source_lang),
    )


def _checkpoints(
    runs: Sequence[Path], number: int, outputs: Mapping[str, Outputs]
) -> dict[str, str]:
    """Fingerprints by name: of several trainings with their folder's, without any path before it;
    with a number where two folders have one name."""
    names = [folder.resolve().name for folder in runs]
    name = names[number] if len(set(names)) == len(names) else str(number + 1)
    prefix = f"{name}/" if len(runs) > 1 else ""
    students = [own.system.student for own in outputs.values() if own.system.student is not None]
    return {f"{prefix}clip-ve": fingerprint(runs[number] / "clip-ve")} | {
        prefix + student.name: student_fingerprint(student) for student in students
    }


def _language_result(
    config: EvaluateConfig,
    own: Outputs,
    source: Outputs | None,
    outputs: Mapping[str, Outputs],
    guesses: Guesses | None,
) -> LanguageResult:
    sampling: dict[str, Any] = {"resamples": config.resamples, "seed": config.seed}
    more: dict[str, Any] = {
        "lang": own.split.lang,
        "split": own.split.name,
        "mode": own.system.mode,
    }
    if guesses is not None:
        hard = ~own.is_gold(guesses.labels)
        more["num_hard"] = int(hard.sum())
        if hard.any():
            measured = metrics.accuracy_interval(own.correct[hard], own.images[hard], **sampling)
            more |= {f"hard_accuracy{end}": value for end, value in measured.ends().items()}
    if source is not None:
        more |= _against_source(config, own, source)
    student = outputs.get(own.system.lang)
    if student is not None and student is not own:
        more["difference_to_zero_shot"] = _difference(config, own, student.correct)
    scores = metrics.score(own.split.labels, own.logits, own.images, **sampling)
    return LanguageResult.from_scores(scores, **more)


def _against_source(config: EvaluateConfig, own: Outputs, source: Outputs) -> dict[str, Any]:
    """Paired metrics on the rows that both languages have."""
    ours, theirs = shared_rows(own, source)
    accuracy, source_accuracy = own.correct[ours].mean(), source.correct[theirs].mean()
    share, kappa = metrics.agreement(own.logits[ours], source.logits[theirs])
    measured: dict[str, Any] = {
        "ratio_to_english": float(accuracy / source_accuracy) if source_accuracy else None,
        "agreement_with_english": share,
        "kappa_with_english": kappa,
    }
    if own is not source:
        measured["difference_to_english"] = _difference(config, own, source.correct[theirs], ours)
    if own.system.student is not None:
        sentences = np.array(source.split.hypotheses)[theirs]
        embeddings = own.embeddings[ours], source.embeddings[theirs]
        measured["transfer"] = measure_transfer(*embeddings, sentences)
    return measured


def _difference(
    config: EvaluateConfig,
    own: Outputs,
    other_correct: npt.NDArray[np.bool_],
    rows: npt.NDArray[np.intp] | slice = slice(None),
) -> Difference:
    """The paired difference to another system that is right in `other_correct`, on some rows."""
    correct, images = own.correct[rows], own.images[rows]
    sampling: dict[str, Any] = {"resamples": config.resamples, "seed": config.seed}
    return metrics.compare_predictions(correct, other_correct, images, **sampling)


def _baselines(config: EvaluateConfig, own: Outputs, guesses: Guesses | None) -> Baselines:
    """What the same rows give away without their photos, and how the system compares."""
    correct = {"shuffled_image": own.is_gold(own.shuffled_logits.argmax(axis=1))}
    if guesses is not None:
        correct["majority"] = own.is_gold(guesses.majority)
        correct["hypothesis_only"] = own.is_gold(guesses.labels)
    measured: dict[str, Any] = {name: float(right.mean()) for name, right in correct.items()}
    for name, right in correct.items():
        measured[f"difference_to_{name}"] = _difference(config, own, right)
    return Baselines(**measured)


# --- several folders of models, and the report ---


def _with_seeds(
    config: EvaluateConfig,
    documents: Sequence[Results],
    first: Mapping[str, Outputs],
    correct: Sequence[Mapping[str, npt.NDArray[np.bool_]]],
) -> Results:
    """The first document, with what all of them say together.

    `first` are the first training's outputs, `correct` is which rows are right, of each training.
    """
    intervals = {
        r.key: _mean_intervals(config, first[r.key], first, documents[0].source_lang, correct)
        for r in documents[0].results
        if all(r.key in of_run for of_run in correct)
    }
    models = [item for d in documents for item in d.signature.checkpoints.items()]
    signature = replace(documents[0].signature, checkpoints=dict(models))
    return replace(documents[0], signature=signature, seeds=across_seeds(documents, intervals))


def _mean_intervals(
    config: EvaluateConfig,
    own: Outputs,
    first: Mapping[str, Outputs],
    source_lang: str,
    correct: Sequence[Mapping[str, npt.NDArray[np.bool_]]],
) -> dict[str, Interval]:
    """Intervals of one system's means over trainings, by metric."""
    sampling: dict[str, Any] = {"resamples": config.resamples, "seed": config.seed}
    right = [of_run[own.system.key] for of_run in correct]
    shares = np.mean(right, axis=0)
    intervals = {"accuracy": metrics.accuracy_interval(shares, own.images, **sampling)}
    compared = {
        "difference_to_english": first.get(source_lang),
        "difference_to_zero_shot": first.get(own.system.lang),
    }
    for name, other in compared.items():
        if other is None or other is own or any(other.system.key not in c for c in correct):
            continue
        ours, theirs = shared_rows(own, other)
        pair = [of[ours] for of in right], [of[other.system.key][theirs] for of in correct]
        intervals[name] = metrics.mean_difference_interval(*pair, own.images[ours], **sampling)
    return intervals


def _write(plan: _Plan, document: Results, outputs: Mapping[str, Outputs]) -> None:
    """The report, with the predictions that `compare` reads."""
    report, runs = plan.config.report, plan.config.runs[0]
    assert report is not None
    # One reading of each language: its student's where it has one, which comes first.
    shown: dict[str, Outputs] = {}
    for own in outputs.values():
        shown.setdefault(own.system.lang, own)
    students = [own.system.student for own in outputs.values() if own.system.student is not None]
    curves = map(read_learning_curve, dict.fromkeys([runs / "clip", runs / "clip-ve", *students]))
    predictions = [
        PredictedRows(
            lang=own.system.key,
            pair_ids=own.split.pair_ids,
            images=own.images.tolist(),
            labels=own.split.labels.astype(np.int64),
            probabilities=metrics.probabilities(own.logits),
        )
        for own in outputs.values()
    ]
    write_report(
        document,
        report,
        predictions=predictions,
        curves=[curve for curve in curves if curve is not None],
        galleries=[examples(shown, plan.images), errors(shown, plan.images)],
    )
