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
from clseave_cli.core.data.seen import PAIR_SEEN, PHOTO_SEEN, UNSEEN, SeenRows
from clseave_cli.core.evaluation import metrics
from clseave_cli.core.evaluation.baselines import Guesses, HypothesisOnly, Rows
from clseave_cli.core.evaluation.comparison import PredictedRows
from clseave_cli.core.evaluation.figures import read_learning_curve
from clseave_cli.core.evaluation.gallery import errors, examples
from clseave_cli.core.evaluation.metrics import Difference, Interval
from clseave_cli.core.evaluation.outputs import Outputs, System, run_systems, shared_rows
from clseave_cli.core.evaluation.report import REPORT, write_report
from clseave_cli.core.evaluation.results import (
    Abstention,
    Baselines,
    LanguageResult,
    Overlap,
    Results,
    Signature,
    across_seeds,
)
from clseave_cli.core.evaluation.summary import joined, leaks
from clseave_cli.core.evaluation.transfer import analyse_distances, measure_transfer
from clseave_cli.core.features import Photos
from clseave_cli.core.files import locked_target, require_replaceable
from clseave_cli.core.models.calibration import read_calibrations
from clseave_cli.core.models.clip_ve import fingerprint, source_language
from clseave_cli.core.models.folder import skip_other_versions
from clseave_cli.core.models.listing import find_students
from clseave_cli.core.models.student import require_teacher, student_fingerprint
from clseave_cli.core.training.device import resolve_device, resolve_precision
from clseave_cli.core.translation.corpus import translate_hypotheses
from clseave_cli.errors import DataError, ModelError, UsageError
from clseave_cli.labels import LABELS
from clseave_cli.progress import SILENT, Progress
from clseave_cli.version import __version__


def evaluate(config: EvaluateConfig, progress: Progress = SILENT) -> Results:
    """Evaluates CLIP-VE and the students under `config.runs`.

    Each language's rows are compared with those of the source language, which CLIP-VE itself reads,
    where they share a `pairID`; the source language is run for that even where `config.lang` leaves
    it out of the results.
    Several folders of models are the same training with several seeds: the results are those of
    the first, with mean and spread over all of them in `seeds`. If they have several source
    languages, the results are those of the first one, and `sources` has the accuracies of all.
    Where `config.report` is set, the report is written there.

    Raises:
        ClseaveError: bad data; a model that is missing, damaged, or of another teacher; hypotheses
            that cannot be translated, where they are to be; or a report folder that cannot be
            written. What can be known of these beforehand is refused before any model runs.
    """
    with ExitStack() as stack:
        if config.report is not None:
            require_replaceable(config.report, REPORT, config)
            stack.enter_context(locked_target(config.report))
        plans = [_Plan.of(replace(config, runs=runs), progress) for runs in _by_source(config.runs)]
        document, first = _results(plans[0], progress)
        for plan in plans[1:]:
            document = _with_source(document, _results(plan, progress)[0])
        if config.report is not None:
            _write(plans[0], config.report, document, first)
    return document


def _by_source(runs: Sequence[Path]) -> list[tuple[Path, ...]]:
    """The folders of models, those of one source language together."""
    by_lang: dict[str, tuple[Path, ...]] = {}
    for folder in runs:
        lang = source_language(folder / "clip-ve")
        by_lang[lang] = (*by_lang.get(lang, ()), folder)
    return list(by_lang.values())


def _with_source(document: Results, other: Results) -> Results:
    """The document with the accuracies of another source language's models, and with these."""
    lang, signature = other.source_lang, document.signature
    models = {f"{name} (source {lang})": d for name, d in other.signature.checkpoints.items()}
    sources = document.sources or {document.source_lang: document.accuracies}
    return replace(
        document,
        signature=replace(signature, checkpoints=signature.checkpoints | models),
        sources=sources | {lang: other.accuracies},
    )


def _results(plan: _Plan, progress: Progress) -> tuple[Results, dict[str, Outputs]]:
    """The results of the models of one source language, and what the first folder's models say."""
    documents, correct = [], []
    for number, runs in enumerate(plan.config.runs):
        systems, clip_ve = plan.systems[number], runs / "clip-ve"
        by_system = run_systems(plan.config, clip_ve, systems, plan.rows, progress)
        correct.append({key: outputs.correct for key, outputs in by_system.items()})
        correct[-1] |= {f"{key}/shuffled": o.shuffled_correct for key, o in by_system.items()}
        documents.append(_document(plan, number, by_system, correct[-1]))
        if number == 0:
            first = by_system
        # Of the others only right or wrong is needed: embeddings take a lot of memory.
        del by_system
    document = documents[0]
    for sentence in leaks(document):
        progress.note(sentence)
    if len(documents) > 1:
        document = _with_seeds(plan, documents, first, correct)
    return document, first


def require_rows(config: EvaluateConfig, langs: Iterable[str], progress: Progress) -> None:
    """Refuses rows of some languages that `evaluate` would refuse.

    Raises:
        DataError: no such file, a bad row, or a photo that is missing.
    """
    folder = data_folder(config.data, progress)
    images = ImageFolder.of(folder, config.images)
    for lang in langs:
        labelled_rows(config, folder, lang, images, progress)


def labelled_rows(
    config: EvaluateConfig, folder: Path, lang: str, images: ImageFolder, progress: Progress
) -> Split:
    """The rows of a split that have a label, all with their image."""
    split = read_split(folder, config.split, lang, skip_bad=config.skip_bad, progress=progress)
    return images.rows_with_image(split, config.skip_bad, progress)


def _with_photos(
    config: EvaluateConfig,
    splits: Mapping[str, Split],
    models: Iterable[Path],
    images: ImageFolder,
    progress: Progress,
) -> dict[str, Rows]:
    """The rows with their photos, and what of them any of the models saw in training.

    Raises:
        DataError: it saw photos, and neither --allow-leak nor --exclude-seen is given; or all.
        ModelError: --exclude-seen, and a model has no record of what it saw.
    """
    records = {model: SeenRows.read(model) for model in models}
    if without := [model for model, record in records.items() if record is None]:
        message = f"{joined(map(str, without))}: no record of the photos seen in training; "
        if config.exclude_seen:
            raise ModelError(f"{message}--exclude-seen needs one. Train such a model again.")
        progress.note(f"{message}only those of the data folder's training split are refused.")
    known = SeenRows.union([record for record in records.values() if record is not None])
    photos: dict[tuple[str, ...], Photos] = {}
    near: dict[tuple[str, ...], npt.NDArray[np.bool_]] = {}

    def compared(split: Split) -> Rows:
        names = tuple(split.image_names)
        if names not in photos:  # files of several languages name the same photos
            photos[names] = Photos.of(split, images)
            if config.near_duplicates is not None:
                paths = photos[names].paths
                near[names] = known.near_duplicates(paths, images, config.near_duplicates)
        seen = known.compare(split, photos[names].keys)
        if names in near:
            seen[near[names][split.image_index] & (seen == UNSEEN)] = PHOTO_SEEN
        return Rows(split, split.lang, split.hypotheses, photos[names], seen)

    rows: dict[str, Rows] = {}
    for lang, split in splits.items():
        rows[lang] = compared(split)
        if not (shared := rows[lang].seen_images):
            continue
        if config.exclude_seen:
            kept = np.flatnonzero(rows[lang].seen == UNSEEN)
            num_excluded = len(split) - len(kept)
            message = f"{split.path}: {num_excluded} of {len(split)} rows left out; a model saw "
            if not len(kept):
                raise DataError(f"{message}all photos in training.")
            progress.note(f"{message}their {len(shared)} photos in training.")
            rows[lang] = replace(compared(split.take(kept)), num_excluded=num_excluded)
        elif not config.allow_leak and config.split != config.train_split:
            raise DataError(
                f"{split.path}: {len(shared)} of its {len(split.image_names)} images are also in "
                "the rows that a model was trained on or that chose its checkpoint, such as "
                f"{shared[0]}; what is measured on them would not count. --exclude-seen leaves "
                "their rows out, --allow-leak permits them."
            )
    return rows


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
    rows: dict[str, Rows]  # by `System.key`
    hypothesis_only: HypothesisOnly  # the baseline that learns from the training rows

    @classmethod
    def of(cls, config: EvaluateConfig, progress: Progress) -> _Plan:
        """Checks options, models, rows, photos and training rows, then translates.

        Raises:
            ClseaveError: as `evaluate`.
        """
        if config.reader == "source" and (config.students or config.mode == "translate-test"):
            raise UsageError(
                "--reader source has CLIP-VE read the rows as they are; leave out --students and "
                "--mode translate-test."
            )
        folder = data_folder(config.data, progress)
        source_lang, along = source_language(config.runs[0] / "clip-ve"), None
        systems = [systems_of(config, runs, source_lang, folder, progress) for runs in config.runs]
        _check_models(config.runs, systems)
        resolve_device(config.device)
        images = ImageFolder.of(folder, config.images)
        every = {system.key: system for of_models in systems for system in of_models}
        splits: dict[str, Split] = {}
        for lang in dict.fromkeys(system.lang for system in every.values()):
            splits[lang] = labelled_rows(config, folder, lang, images, progress)
        if source_lang not in splits and split_path(folder, config.split, source_lang):
            try:
                splits[source_lang] = labelled_rows(config, folder, source_lang, images, progress)
                source = System(source_lang, "zero-shot", None)
                systems, along = [[source, *of_models] for of_models in systems], source.key
            except DataError as error:
                progress.note(f"{error} Nothing is compared with {source_lang}.")
        students = {s.student: None for s in every.values() if s.student is not None}
        read_by = [*(runs / "clip-ve" for runs in config.runs), *students]
        rows = _with_photos(config, splits, read_by, images, progress)
        clip_ve = config.runs[0] / "clip-ve"
        hypothesis_only = HypothesisOnly(config, folder, clip_ve, source_lang, progress)
        for key, system in every.items():
            translated_later = system.mode == "translate-test"
            unread = replace(rows[system.lang], lang=source_lang)
            hypothesis_only.require(unread if translated_later else rows[key])
        for key, system in every.items():
            if system.mode == "translate-test":
                split = rows[system.lang].split
                hypotheses, by = translate_hypotheses(config, split, source_lang, progress)
                rows[key] = replace(
                    rows[system.lang], lang=source_lang, hypotheses=hypotheses, translator=by
                )
        models = source_lang, along, systems
        return cls(config, folder, images, *models, rows, hypothesis_only)

    @property
    def sampling(self) -> dict[str, Any]:
        """How every interval resamples the photos."""
        return {"resamples": self.config.resamples, "seed": self.config.seed}


def systems_of(
    config: EvaluateConfig, runs: Path, source_lang: str, folder: Path, progress: Progress
) -> list[System]:
    """What to evaluate of one folder of models: the source language first, then the others."""
    zero_shot = config.mode != "translate-test"
    # The source language comes first, and CLIP-VE itself reads it.
    readers: dict[str, Path | None] = {source_lang: None}
    if config.reader == "source":
        readers |= dict.fromkeys((*config.lang, *languages(folder, config.split)))
    else:
        readers |= find_students(config.students or runs) | readers
    for lang in config.lang:
        require_language(lang)
        require_split_path(folder, config.split, lang)
        if zero_shot and lang not in readers:
            raise ModelError(
                f"{runs}: no student for {lang} (there are models for {', '.join(readers)}); "
                f"`clseave align --lang {lang}` makes one; --mode translate-test and --reader "
                "source need none."
            )
    wanted = list(dict.fromkeys(config.lang))
    if not wanted:
        require_split_path(folder, config.split, source_lang)
        wanted = sorted(languages(folder, config.split), key=lambda lang: lang != source_lang)
        without = [lang for lang in wanted if lang not in readers]
        if zero_shot:
            readers = {lang: readers[lang] for lang in wanted if lang in readers}
            skip_other_versions(readers, progress)
        if zero_shot and without:
            progress.note(
                f"{runs}: no student for {', '.join(without)}; `clseave align --lang "
                f"{without[0]}` makes one."
            )
    systems = []
    for lang in wanted:
        if lang == source_lang or (zero_shot and lang in readers):
            systems.append(System(lang, "zero-shot", readers[lang]))
        if lang != source_lang and config.mode != "zero-shot":
            systems.append(System(lang, "translate-test", None))
    return systems


def _check_models(runs: Sequence[Path], systems: Sequence[list[System]]) -> None:
    """Refuses students of another teacher, damaged calibrations, and the same models twice.

    The same models twice would pass for two trainings that agree.
    """
    seen: dict[tuple[str, ...], Path] = {}
    for folder, wanted in zip(runs, systems, strict=True):
        teacher = fingerprint(folder / "clip-ve")
        students = dict.fromkeys(s.student for s in wanted if s.student is not None)
        for student in students:
            require_teacher(student, teacher)
        for model in (folder / "clip-ve", *students):
            read_calibrations(model)
        models = teacher, *map(student_fingerprint, students)
        if models in seen:
            raise UsageError(
                f"--runs {seen[models]} and --runs {folder} hold the same models: one training, "
                "not two seeds."
            )
        seen[models] = folder


# --- one folder of models ---


def _document(
    plan: _Plan,
    number: int,
    by_system: Mapping[str, Outputs],
    correct: Mapping[str, npt.NDArray[np.bool_]],
) -> Results:
    """The results of one folder of models, the `number`-th."""
    config, source = plan.config, by_system.get(plan.source_lang)
    results, baselines, training = [], {}, {}
    for key, outputs in by_system.items():
        if key != plan.along:
            guesses = plan.hypothesis_only.guess(plan.rows[key])
            differences = _differences(plan, outputs, by_system, correct)
            results.append(_language_result(plan, outputs, source, guesses, differences))
            baselines[key] = _baselines(plan, outputs, guesses)
            if learnt := plan.hypothesis_only.learnt_from(plan.rows[key].lang):
                training[learnt[0]] = learnt[1]
    accuracies = {r.lang: r.accuracy for r in results if r.mode == "zero-shot"}
    if source is not None:
        accuracies[plan.source_lang] = float(source.correct.mean())
    device = resolve_device(config.device)
    by_file = {
        rows.split.path.relative_to(plan.folder).as_posix(): rows
        for rows in (plan.rows[key] for key in by_system)
    }
    return Results(
        results=tuple(results),
        baselines=baselines,
        signature=Signature(
            version=__version__,
            data={name: rows.split.digest for name, rows in by_file.items()},
            checkpoints=_checkpoints(config.runs, number, plan.systems[number]),
            seed=config.seed,
            resamples=config.resamples,
            num_examples=max(len(rows.split) for rows in by_file.values()),
            translators={r.split.lang: r.translator for r in plan.rows.values() if r.translator},
            source_lang=plan.source_lang,
            reader=config.reader,
            training=training,
            seen={name: len(rows.seen_images) for name, rows in by_file.items() if rows.seen.any()},
            excluded={name: r.num_excluded for name, r in by_file.items() if r.num_excluded},
            precision=resolve_precision(config.precision, device),
            device=device.type,
            dataset=config.data if config.data.startswith("hf:") else plan.folder.resolve().name,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        ),
        distances=analyse_distances(accuracies, plan.source_lang),
    )


def _checkpoints(runs: Sequence[Path], number: int, systems: Sequence[System]) -> dict[str, str]:
    """Fingerprints by name: of several trainings with their folder's, without any path before it;
    with a number where two folders have one name."""
    names = [folder.resolve().name for folder in runs]
    name = names[number] if len(set(names)) == len(names) else str(number + 1)
    prefix = f"{name}/" if len(runs) > 1 else ""
    return {f"{prefix}clip-ve": fingerprint(runs[number] / "clip-ve")} | {
        prefix + system.student.name: student_fingerprint(system.student)
        for system in systems
        if system.student is not None
    }


def _language_result(
    plan: _Plan,
    outputs: Outputs,
    source: Outputs | None,
    guesses: Guesses | None,
    differences: Mapping[str, Difference],
) -> LanguageResult:
    split, images = outputs.split, outputs.images
    more: dict[str, Any] = {"lang": split.lang, "split": split.name, "mode": outputs.system.mode}
    if guesses is not None:
        hard = ~outputs.is_gold(guesses.labels)
        more["num_hard"] = int(hard.sum())
        if hard.any():
            right = outputs.correct[hard]
            measured = metrics.accuracy_interval(right, images[hard], **plan.sampling)
            more |= {f"hard_accuracy{end}": value for end, value in measured.ends().items()}
    if source is not None:
        more |= _against_source(outputs, source)
    more |= differences
    more["seen"] = _overlap(plan.rows[outputs.system.key], outputs.correct)
    more["unsure"] = _abstention(plan, outputs)
    scores = metrics.score(split.labels, outputs.logits, images, **plan.sampling)
    if (temperature := outputs.calibration.temperature) != 1:
        before = metrics.score(split.labels, outputs.logits * temperature, images, resamples=1)
        more |= {"temperature": temperature, "ece_uncalibrated": before.ece}
        more |= {"loss_uncalibrated": before.loss}
    return LanguageResult(**vars(scores), **more)


def _abstention(plan: _Plan, outputs: Outputs) -> Abstention | None:
    """What comes of answering `unsure` below the thresholds; None: there are none."""
    thresholds, promised = outputs.calibration.thresholds, outputs.calibration.precision
    if promised is None:
        return None
    labels = [label for label in LABELS if label in thresholds]
    predicted = np.array(LABELS)[outputs.logits.argmax(axis=1)]
    answered = np.isin(predicted, labels) & ~outputs.unsure
    accuracy = None
    if answered.any():
        rows = outputs.correct[answered], outputs.images[answered]
        accuracy = metrics.accuracy_interval(*rows, **plan.sampling)
    counts = float(outputs.unsure.mean()), int(answered.sum())
    return Abstention(promised, tuple(labels), *counts, accuracy)


def _overlap(rows: Rows, correct: npt.NDArray[np.bool_]) -> Overlap | None:
    """The rows whose photo was seen in training apart from the others; None: there are none."""
    is_seen, is_pair = rows.seen != UNSEEN, rows.seen == PAIR_SEEN
    if not is_seen.any():
        return None
    pairs, unseen = (
        float(correct[part].mean()) if part.any() else None for part in (is_pair, ~is_seen)
    )
    counts = len(rows.seen_images), int(is_seen.sum()), int(is_pair.sum())
    return Overlap(*counts, float(is_seen.mean()), float(correct[is_seen].mean()), pairs, unseen)


def _against_source(outputs: Outputs, source: Outputs) -> dict[str, Any]:
    """Metrics on the rows that both languages have."""
    rows, source_rows = shared_rows(outputs, source)
    accuracy, source_accuracy = outputs.correct[rows].mean(), source.correct[source_rows].mean()
    share, kappa = metrics.agreement(outputs.logits[rows], source.logits[source_rows])
    measured: dict[str, Any] = {
        "ratio_to_english": float(accuracy / source_accuracy) if source_accuracy else None,
        "agreement_with_english": share,
        "kappa_with_english": kappa,
    }
    if outputs.system.mode == "zero-shot" and outputs.system.lang != source.system.lang:
        sentences = np.array(source.split.hypotheses)[source_rows]
        embeddings = outputs.embeddings[rows], source.embeddings[source_rows]
        measured["transfer"] = measure_transfer(*embeddings, sentences)
    return measured


def _differences(
    plan: _Plan,
    outputs: Outputs,
    by_system: Mapping[str, Outputs],
    correct: Mapping[str, npt.NDArray[Any]],
) -> dict[str, Difference]:
    """The paired differences to the source language, and of translations to the student.

    `correct` says by system which of its (N,) rows are right, or in what share of the trainings.
    """
    others = {
        "difference_to_english": plan.source_lang,
        "difference_to_zero_shot": outputs.system.lang,
    }
    measured = {}
    for name, key in others.items():
        if key in correct and key != outputs.system.key:
            rows, other_rows = shared_rows(outputs, by_system[key])
            pair = correct[outputs.system.key][rows], correct[key][other_rows]
            images = outputs.images[rows]
            measured[name] = metrics.compare_predictions(*pair, images, **plan.sampling)
    return measured


def _baselines(plan: _Plan, outputs: Outputs, guesses: Guesses | None) -> Baselines:
    """What the same rows give away without their photos, and how the system compares."""
    correct = _without_photo(outputs, guesses, outputs.shuffled_correct)
    measured: dict[str, Any] = {name: float(right.mean()) for name, right in correct.items()}
    measured |= _gains(plan, outputs.correct, correct, outputs.images)
    if guesses is not None:
        measured["train_labels"] = dict(zip(LABELS, guesses.counts, strict=True))
    return Baselines(**measured)


def _without_photo(
    outputs: Outputs, guesses: Guesses | None, shuffled: npt.NDArray[Any]
) -> dict[str, npt.NDArray[Any]]:
    """By baseline, (N,) which rows it gets right, or in what share of the trainings."""
    correct = {"shuffled_image": shuffled}
    if guesses is not None:
        correct["majority"] = outputs.is_gold(guesses.majority)
        correct["hypothesis_only"] = outputs.is_gold(guesses.labels)
    return correct


def _gains(
    plan: _Plan,
    correct: npt.NDArray[Any],
    without: Mapping[str, npt.NDArray[Any]],
    images: npt.NDArray[np.str_],
) -> dict[str, Difference]:
    """The paired differences to baselines."""
    return {
        f"difference_to_{name}": metrics.compare_predictions(
            correct, right, images, **plan.sampling
        )
        for name, right in without.items()
    }


# --- several folders of models, and the report ---


def _with_seeds(
    plan: _Plan,
    documents: Sequence[Results],
    first: Mapping[str, Outputs],
    correct: Sequence[Mapping[str, npt.NDArray[np.bool_]]],
) -> Results:
    """The first document, with what all of them say together.

    `first` are the first training's outputs, `correct` is which rows are right, of each training.
    """
    everywhere = [key for key in correct[0] if all(key in of_run for of_run in correct)]
    shares = {key: np.mean([of_run[key] for of_run in correct], axis=0) for key in everywhere}
    intervals: dict[str, dict[str, Interval]] = {}
    for key in (key for key in first if key in shares and key != plan.along):
        images = first[key].images
        accuracy = metrics.accuracy_interval(shares[key], images, **plan.sampling)
        guesses = plan.hypothesis_only.guess(plan.rows[key])
        without = _without_photo(first[key], guesses, shares[f"{key}/shuffled"])
        differences = _differences(plan, first[key], first, shares)
        differences |= _gains(plan, shares[key], without, images)
        intervals[key] = {"accuracy": accuracy, **differences}
    models = [item for d in documents for item in d.signature.checkpoints.items()]
    signature = replace(documents[0].signature, checkpoints=dict(models))
    return replace(documents[0], signature=signature, seeds=across_seeds(documents, intervals))


def _write(plan: _Plan, report: Path, document: Results, by_system: Mapping[str, Outputs]) -> None:
    """The report, with the predictions that `compare` reads."""
    runs, evaluated = plan.config.runs[0], [by_system[r.key] for r in document.results]
    # One reading of each language: its student's where it has one, which comes first.
    shown: dict[str, Outputs] = {}
    for outputs in evaluated:
        shown.setdefault(outputs.system.lang, outputs)
    students = [o.system.student for o in evaluated if o.system.student is not None]
    curves = map(read_learning_curve, dict.fromkeys([runs / "clip", runs / "clip-ve", *students]))
    predictions = [
        PredictedRows(
            lang=outputs.system.key,
            pair_ids=outputs.split.pair_ids,
            images=outputs.images.tolist(),
            labels=outputs.split.labels.astype(np.int64),
            probabilities=metrics.probabilities(outputs.logits),
        )
        for outputs in evaluated
    ]
    write_report(
        document,
        report,
        predictions=predictions,
        curves=[curve for curve in curves if curve is not None],
        galleries=[examples(shown, plan.images), errors(shown, plan.images)],
    )
