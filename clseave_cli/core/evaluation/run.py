"""`evaluate`: how good the models are in every language, and whether they look at the photo.

`_Plan.of` refuses bad input; then `outputs` runs the models, `baselines` guesses without the photo,
and this module puts the numbers together.
"""

from __future__ import annotations

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
from clseave_cli.core.evaluation.outputs import Outputs, System, run_systems, shared_rows, signature
from clseave_cli.core.evaluation.report import REPORT, write_report
from clseave_cli.core.evaluation.results import (
    Abstention,
    Baselines,
    LanguageResult,
    Overlap,
    Results,
    across_seeds,
)
from clseave_cli.core.evaluation.summary import joined, leaks
from clseave_cli.core.evaluation.transfer import analyse_distances, measure_transfer
from clseave_cli.core.features import Photos
from clseave_cli.core.files import locked_target, require_replaceable
from clseave_cli.core.models.calibration import Calibration, read_calibrations
from clseave_cli.core.models.clip_ve import fingerprint, source_language
from clseave_cli.core.models.folder import skip_other_versions
from clseave_cli.core.models.listing import find_students
from clseave_cli.core.models.student import require_teacher, student_fingerprint
from clseave_cli.core.training.device import resolve_device
from clseave_cli.core.translation.corpus import translate_hypotheses
from clseave_cli.errors import DataError, ModelError, UsageError
from clseave_cli.labels import LABELS
from clseave_cli.progress import SILENT, Progress


def evaluate(config: EvaluateConfig, progress: Progress = SILENT) -> Results:
    """Evaluates CLIP-VE and the students under `config.runs`.

    Each language is compared with the source language, which CLIP-VE itself reads, on the rows that
    share a `pairID`. The source language is run for that even if `config.lang` leaves it out.

    Several folders of models are trainings with several seeds: the results are those of the first,
    and `seeds` summarises all. If their source languages differ, the results are those of the first
    one, and `sources` has the accuracies of all. Writes a report to `config.report`, if set.

    Raises:
        ClseaveError: bad data; a model that is missing, damaged, or of another teacher; hypotheses
            that cannot be translated; or a report folder that cannot be written. Bad input is
            refused before any model runs.
    """
    with ExitStack() as stack:
        if config.report is not None:
            require_replaceable(config.report, REPORT, config)
            stack.enter_context(locked_target(config.report))
        by_source: dict[str, tuple[Path, ...]] = {}
        for folder in config.runs:
            lang = source_language(folder / "clip-ve")
            by_source[lang] = (*by_source.get(lang, ()), folder)
        plans = [_Plan.of(replace(config, runs=runs), progress) for runs in by_source.values()]
        document, first = _results(plans[0], progress)
        for plan in plans[1:]:
            document = _with_source(document, _results(plan, progress)[0])
        if config.report is not None:
            _write(plans[0], config.report, document, first)
    return document


def _with_source(document: Results, other: Results) -> Results:
    """The document with models and accuracies of another source language."""
    lang, models = other.source_lang, dict(document.signature.checkpoints)
    models |= {f"{name} (source {lang})": d for name, d in other.signature.checkpoints.items()}
    sources = document.sources or {document.source_lang: document.accuracies}
    return replace(
        document,
        signature=replace(document.signature, checkpoints=models),
        sources=sources | {lang: other.accuracies},
    )


def _results(plan: _Plan, progress: Progress) -> tuple[Results, dict[str, Outputs]]:
    """The results of one source language, and the outputs of the first folder's models."""
    keys = dict.fromkeys(system.key for systems in plan.systems for system in systems)
    guesses = {k: plan.hypothesis_only.guess(plan.rows[k]) for k in keys if k != plan.along}
    documents, correct = [], []
    for number, runs in enumerate(plan.config.runs):
        models = runs / "clip-ve", plan.systems[number], plan.calibrations
        by_system = run_systems(plan.config, *models, plan.rows, progress)
        correct.append({key: outputs.correct for key, outputs in by_system.items()})
        correct[-1] |= {f"{key}/shuffled": o.shuffled_correct for key, o in by_system.items()}
        documents.append(_document(plan, number, by_system, correct[-1], guesses))
        if number == 0:
            first = by_system
        # Embeddings take a lot of memory; seeds need only `correct`.
        del by_system
    document = documents[0]
    for sentence in leaks(document):
        progress.note(sentence)
    if len(documents) > 1:
        document = _with_seeds(plan, documents, first, correct, guesses)
    return document, first


def labelled_rows(
    config: EvaluateConfig, folder: Path, lang: str, images: ImageFolder, progress: Progress
) -> Split:
    """The labelled rows of a split, each with an image that exists."""
    split = read_split(folder, config.split, lang, skip_bad=config.skip_bad, progress=progress)
    return images.rows_with_image(split, config.skip_bad, progress)


def _with_photos(
    config: EvaluateConfig,
    splits: Mapping[str, Split],
    models: Iterable[Path],
    images: ImageFolder,
    progress: Progress,
) -> dict[str, Rows]:
    """The rows with their photos, and whether any of the models saw them in training."""
    records = {model: SeenRows.read(model) for model in models}
    if without := [model for model, record in records.items() if record is None]:
        message = f"{joined(map(str, without))}: no record of the photos seen in training; "
        if config.exclude_seen:
            raise ModelError(f"{message}--exclude-seen needs one. Train such a model again.")
        progress.note(f"{message}only those of the data folder's training split are refused.")
    record = SeenRows.union([record for record in records.values() if record is not None])
    photos: dict[tuple[str, ...], Photos] = {}
    near: dict[tuple[str, ...], npt.NDArray[np.bool_]] = {}

    def compared(split: Split) -> Rows:
        names = tuple(split.image_names)
        if names not in photos:  # files of several languages name the same photos
            photos[names] = Photos.of(split, images)
            if config.near_duplicates is not None:
                paths = photos[names].paths
                near[names] = record.near_duplicates(paths, images, config.near_duplicates)
        seen = record.compare(split, photos[names].keys)
        if names in near:
            seen[near[names][split.image_index] & (seen == UNSEEN)] = PHOTO_SEEN
        return Rows(split, split.lang, split.hypotheses, photos[names], seen)

    rows: dict[str, Rows] = {}
    for lang, split in splits.items():
        rows[lang] = compared(split)
        if not (seen_images := rows[lang].seen_images):
            continue
        if config.exclude_seen:
            kept = np.flatnonzero(rows[lang].seen == UNSEEN)
            num_excluded = len(split) - len(kept)
            message = f"{split.path}: {num_excluded} of {len(split)} rows left out; a model saw "
            if not len(kept):
                raise DataError(f"{message}all photos in training.")
            progress.note(f"{message}their {len(seen_images)} photos in training.")
            rows[lang] = replace(compared(split.take(kept)), num_excluded=num_excluded)
        elif not config.allow_leak and config.split != config.train_split:
            raise DataError(
                f"{split.path}: {len(seen_images)} of its {len(split.image_names)} images are also "
                f"in the train or dev rows of a model, such as {seen_images[0]}; metrics on them "
                "would not count. --exclude-seen leaves their rows out, --allow-leak permits them."
            )
    return rows


@dataclass(frozen=True, eq=False)
class _Plan:
    """The checked input of an evaluation of one source language."""

    config: EvaluateConfig
    folder: Path  # of the data
    images: ImageFolder
    source_lang: str  # the language that CLIP-VE reads
    along: str | None  # key of a system that is run for comparison only, and gets no result
    systems: list[list[System]]  # for each folder of models
    calibrations: dict[Path, dict[str, Calibration]]  # by model and language
    rows: dict[str, Rows]  # by `System.key`
    hypothesis_only: HypothesisOnly

    @classmethod
    def of(cls, config: EvaluateConfig, progress: Progress) -> _Plan:
        """Checks options, models, rows, photos and training rows, then translates."""
        if config.reader == "source" and (config.students or config.mode == "translate-test"):
            raise UsageError(
                "--reader source has CLIP-VE read the rows as they are; leave out --students and "
                "--mode translate-test."
            )
        folder = data_folder(config.data, progress)
        source_lang, along = source_language(config.runs[0] / "clip-ve"), None
        systems = [systems_of(config, runs, source_lang, folder, progress) for runs in config.runs]
        calibrations = check_models(config.runs, systems)
        trainings: dict[tuple[str, ...], Path] = {}
        for number, runs in enumerate(config.runs):
            models = tuple(_checkpoints(config.runs, number, systems[number]).values())
            if models in trainings:
                raise UsageError(
                    f"--runs {trainings[models]} and --runs {runs} hold the same models: one "
                    "training, not two seeds."
                )
            trainings[models] = runs
        resolve_device(config.device)
        images = ImageFolder.of(folder, config.images)
        by_key = {system.key: system for of_folder in systems for system in of_folder}
        splits: dict[str, Split] = {}
        for lang in dict.fromkeys(system.lang for system in by_key.values()):
            splits[lang] = labelled_rows(config, folder, lang, images, progress)
        if source_lang not in splits and split_path(folder, config.split, source_lang):
            try:
                splits[source_lang] = labelled_rows(config, folder, source_lang, images, progress)
                source = System(source_lang, "zero-shot", None)
                systems, along = [[source, *of_folder] for of_folder in systems], source.key
            except DataError as error:
                progress.note(f"{error} Nothing is compared with {source_lang}.")
        rows = _with_photos(config, splits, calibrations, images, progress)
        clip_ve = config.runs[0] / "clip-ve"
        hypothesis_only = HypothesisOnly(config, folder, clip_ve, source_lang, progress)
        translated = [key for key, system in by_key.items() if system.mode == "translate-test"]
        for key, system in by_key.items():
            unread = replace(rows[system.lang], lang=source_lang)
            hypothesis_only.require(unread if key in translated else rows[key])
        for key in translated:
            untranslated = rows[by_key[key].lang]
            hypotheses, translator = translate_hypotheses(
                config, untranslated.split, source_lang, progress
            )
            rows[key] = replace(
                untranslated, lang=source_lang, hypotheses=hypotheses, translator=translator
            )
        models_read = source_lang, along, systems, calibrations
        return cls(config, folder, images, *models_read, rows, hypothesis_only)

    @property
    def sampling(self) -> dict[str, Any]:
        """How every interval resamples the photos."""
        return {"resamples": self.config.resamples, "seed": self.config.seed}


def systems_of(
    config: EvaluateConfig, runs: Path, source_lang: str, folder: Path, progress: Progress
) -> list[System]:
    """The systems of one folder; ClseaveError for a language without rows or a student."""
    zero_shot = config.mode != "translate-test"
    readers: dict[str, Path | None] = {source_lang: None}  # None: CLIP-VE itself
    if config.reader == "source":
        readers |= dict.fromkeys((*config.lang, *languages(folder, config.split)))
    else:
        readers |= find_students(config.students or runs) | readers
    for lang in config.lang or (source_lang,):
        require_language(lang)
        require_split_path(folder, config.split, lang)
    langs = list(dict.fromkeys(config.lang))
    if not langs:
        langs = sorted(languages(folder, config.split), key=lambda lang: lang != source_lang)
    if zero_shot and (without := [lang for lang in langs if lang not in readers]):
        advice = f"`clseave align --lang {without[0]}` makes one"
        if config.lang:
            raise ModelError(
                f"{runs}: no student for {', '.join(without)} (there are models for "
                f"{', '.join(readers)}); {advice}; --mode translate-test and --reader source need "
                "none."
            )
        progress.note(f"{runs}: no student for {', '.join(without)}; {advice}.")
    if zero_shot and not config.lang:
        readers = {lang: readers[lang] for lang in langs if lang in readers}
        skip_other_versions(readers, progress)
    systems = []
    for lang in langs:
        if lang == source_lang or (zero_shot and lang in readers):
            systems.append(System(lang, "zero-shot", readers[lang]))
        if lang != source_lang and config.mode != "zero-shot":
            systems.append(System(lang, "translate-test", None))
    return systems


def check_models(
    runs: Sequence[Path], systems: Sequence[Sequence[System]]
) -> dict[Path, dict[str, Calibration]]:
    """The calibrations of all models, by folder and language.

    Raises:
        ModelError: a student is of another teacher, or a calibration is damaged.
    """
    calibrations: dict[Path, dict[str, Calibration]] = {}
    for folder, of_folder in zip(runs, systems, strict=True):
        teacher = fingerprint(folder / "clip-ve")
        students = dict.fromkeys(s.student for s in of_folder if s.student is not None)
        for student in students:
            require_teacher(student, teacher)
        calibrations |= {m: read_calibrations(m) for m in (folder / "clip-ve", *students)}
    return calibrations


def _document(
    plan: _Plan,
    number: int,
    by_system: Mapping[str, Outputs],
    correct: Mapping[str, npt.NDArray[np.bool_]],
    guesses: Mapping[str, Guesses | None],
) -> Results:
    """The results of the `number`-th folder of models."""
    config, source = plan.config, by_system.get(plan.source_lang)
    results, baselines, training = [], {}, {}
    for key in (key for key in by_system if key != plan.along):
        outputs, guess = by_system[key], guesses[key]
        without_photo = _without_photo(outputs, guess)
        differences = _differences(plan, key, by_system, correct, without_photo)
        results.append(_language_result(plan, outputs, source, guess, differences))
        measured: dict[str, Any] = {name: float(r.mean()) for name, r in without_photo.items()}
        measured["shuffled_image"] = float(outputs.shuffled_correct.mean())
        measured |= {name: d for name, d in differences.items() if hasattr(Baselines, name)}
        if guess is not None:
            measured["train_labels"] = dict(zip(LABELS, guess.counts, strict=True))
        baselines[key] = Baselines(**measured)
        if learnt := plan.hypothesis_only.learnt_from(plan.rows[key].lang):
            training[learnt[0]] = learnt[1]
    accuracies = {r.lang: r.accuracy for r in results if r.mode == "zero-shot"}
    if source is not None:
        accuracies[plan.source_lang] = float(source.correct.mean())
    by_file = {
        rows.split.path.relative_to(plan.folder).as_posix(): rows
        for rows in (plan.rows[key] for key in by_system)
    }
    return Results(
        results=tuple(results),
        baselines=baselines,
        signature=signature(
            config,
            plan.folder,
            data={name: rows.split.digest for name, rows in by_file.items()},
            checkpoints=_checkpoints(config.runs, number, plan.systems[number]),
            num_examples=max(len(rows.split) for rows in by_file.values()),
            translators={r.split.lang: r.translator for r in plan.rows.values() if r.translator},
            source_lang=plan.source_lang,
            reader=config.reader,
            training=training,
            seen={name: len(rows.seen_images) for name, rows in by_file.items() if rows.seen.any()},
            excluded={name: r.num_excluded for name, r in by_file.items() if r.num_excluded},
        ),
        distances=analyse_distances(accuracies, plan.source_lang),
    )


def _checkpoints(runs: Sequence[Path], number: int, systems: Sequence[System]) -> dict[str, str]:
    """Fingerprints by model; of several trainings, with the name or the number of the folder."""
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
            more |= measured.keyed("hard_accuracy")
    if source is not None:
        more |= _against_source(outputs, source)
    more |= {name: d for name, d in differences.items() if hasattr(LanguageResult, name)}
    more["seen"] = _overlap(plan.rows[outputs.system.key], outputs.correct)
    more["unsure"] = _abstention(plan, outputs)
    scores = metrics.score(split.labels, outputs.logits, images, **plan.sampling)
    if (temperature := outputs.calibration.temperature) != 1:
        before = metrics.score(split.labels, outputs.logits * temperature, images, resamples=1)
        more |= {"temperature": temperature, "ece_uncalibrated": before.ece}
        more |= {"loss_uncalibrated": before.loss}
    return LanguageResult(**vars(scores), **more)


def _abstention(plan: _Plan, outputs: Outputs) -> Abstention | None:
    """The effect of the thresholds; None without any."""
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
    """The rows of photos seen in training; None if there are none."""
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


def _without_photo(outputs: Outputs, guesses: Guesses | None) -> dict[str, npt.NDArray[np.bool_]]:
    """(N,) which rows each baseline without a photo gets right."""
    if guesses is None:
        return {}
    is_gold = outputs.is_gold
    return {"majority": is_gold(guesses.majority), "hypothesis_only": is_gold(guesses.labels)}


def _differences(
    plan: _Plan,
    key: str,
    by_system: Mapping[str, Outputs],
    correct: Mapping[str, npt.NDArray[Any]],
    without_photo: Mapping[str, npt.NDArray[np.bool_]],
) -> dict[str, Difference]:
    """The paired differences to the source language, to this language's student, and to baselines.

    `correct` has for each system (N,) whether rows are right, or in what share of the trainings.
    """
    outputs, right = by_system[key], correct[key]
    pairs = {
        f"difference_to_{name}": (right, other, outputs.images)
        for name, other in {**without_photo, "shuffled_image": correct[f"{key}/shuffled"]}.items()
    }
    systems = {"english": plan.source_lang, "zero_shot": outputs.system.lang}
    for name, other_key in systems.items():
        if other_key in correct and other_key != key:
            rows, other_rows = shared_rows(outputs, by_system[other_key])
            other = correct[other_key][other_rows]
            pairs[f"difference_to_{name}"] = right[rows], other, outputs.images[rows]
    return {name: metrics.compare_predictions(*p, **plan.sampling) for name, p in pairs.items()}


def _with_seeds(
    plan: _Plan,
    documents: Sequence[Results],
    first: Mapping[str, Outputs],
    correct: Sequence[Mapping[str, npt.NDArray[np.bool_]]],
    guesses: Mapping[str, Guesses | None],
) -> Results:
    """The first document, of the `first` outputs, with a summary of all."""
    shared = [key for key in correct[0] if all(key in of_run for of_run in correct)]
    shares = {key: np.mean([of_run[key] for of_run in correct], axis=0) for key in shared}
    intervals: dict[str, dict[str, Interval]] = {}
    for key in (key for key in first if key in shares and key != plan.along):
        outputs = first[key]
        accuracy = metrics.accuracy_interval(shares[key], outputs.images, **plan.sampling)
        without_photo = _without_photo(outputs, guesses[key])
        differences = _differences(plan, key, first, shares, without_photo)
        intervals[key] = {"accuracy": accuracy, **differences}
    models = {k: v for d in documents for k, v in d.signature.checkpoints.items()}
    of_all = replace(documents[0].signature, checkpoints=models)
    return replace(documents[0], signature=of_all, seeds=across_seeds(documents, intervals))


def _write(plan: _Plan, report: Path, document: Results, by_system: Mapping[str, Outputs]) -> None:
    """Writes the report, with the predictions that `compare` reads."""
    runs, evaluated = plan.config.runs[0], [by_system[r.key] for r in document.results]
    # One reading of each language; zero-shot comes first.
    by_lang: dict[str, Outputs] = {}
    for outputs in evaluated:
        by_lang.setdefault(outputs.system.lang, outputs)
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
        galleries=[examples(by_lang, plan.images), errors(by_lang, plan.images)],
    )
