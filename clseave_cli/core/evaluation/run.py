"""`evaluate`: how good the models are, in every language, and whether they look at the photo.

Legend: N rows · D embedding width · C labels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clseave_cli.core.config import EvaluateConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.records import (
    Split,
    check_leak,
    languages,
    read_split,
    require_language,
    require_split_path,
    split_path,
)
from clseave_cli.core.evaluation.distances import analyse_distances
from clseave_cli.core.evaluation.metrics.baselines import (
    majority_label,
    predict_from_hypotheses,
    shuffled_rows,
)
from clseave_cli.core.evaluation.metrics.bootstrap import (
    Difference,
    Interval,
    accuracy_interval,
    compare_predictions,
)
from clseave_cli.core.evaluation.metrics.classification import agreement, probabilities, score
from clseave_cli.core.evaluation.metrics.guesses import Guesses, kept_guesses
from clseave_cli.core.evaluation.metrics.seeds import (
    mean_accuracy_interval,
    mean_difference_interval,
)
from clseave_cli.core.evaluation.metrics.transfer import measure_transfer
from clseave_cli.core.evaluation.report.curves import read_learning_curve
from clseave_cli.core.evaluation.report.gallery import (
    Gallery,
    GalleryEntry,
    GalleryItem,
    most_confident_errors,
)
from clseave_cli.core.evaluation.report.names import language_name
from clseave_cli.core.evaluation.report.report import REPORT, write_report
from clseave_cli.core.evaluation.results import (
    TRAINING_ROWS,
    Baselines,
    LanguageResult,
    Mode,
    Results,
    Signature,
    across_seeds,
    result_key,
)
from clseave_cli.core.evaluation.rows import PredictedRows
from clseave_cli.core.features import Photos, image_features, tokenize_sentences
from clseave_cli.core.files import file_digest, locked_target, require_replaceable
from clseave_cli.core.models.clip_ve import ClipVE, fingerprint, source_language
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.student import find_students, load_student, student_fingerprint
from clseave_cli.core.training.precision import autocast, resolve_device, resolve_precision
from clseave_cli.core.translation.corpus import translate_hypotheses
from clseave_cli.errors import DataError, ModelError, UsageError
from clseave_cli.labels import LABELS
from clseave_cli.progress import SILENT, Progress
from clseave_cli.version import __version__

_EXAMPLES = 8

# Pictures of errors: of a language alone, or of each of several.
_ERRORS_ALONE = 12
_ERRORS_EACH = 3

#: Gives the training rows of a language.
_TrainingRows = Callable[[str], Split]


@dataclass(frozen=True)
class _System:
    """One thing to evaluate: a language, and how it is read.

    Attributes:
        lang: language code.
        mode: `zero-shot` for the source language, too.
        student: folder of the student; None: CLIP-VE itself reads it.
    """

    lang: str
    mode: Mode
    student: Path | None

    @property
    def key(self) -> str:
        return result_key(self.lang, self.mode)


@dataclass(frozen=True, eq=False)
class _Outputs:
    """What the models say of one language's rows.

    Attributes:
        system: what was evaluated.
        split: the rows.
        read: (N,) the hypotheses as they were read: translated, perhaps.
        embeddings: (N, D) of the hypotheses.
        premises: (N, D) of the images.
        logits: (N, C).
        row_of_pair: row number by `pairID`.
        translator: what translated the hypotheses, if something did.
    """

    system: _System
    split: Split
    read: list[str]
    embeddings: npt.NDArray[np.float32]
    premises: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]
    row_of_pair: dict[str, int]
    translator: str | None

    @functools.cached_property
    def images(self) -> npt.NDArray[np.str_]:
        """(N,) name of each row's image: the unit of the bootstrap."""
        return np.array(self.split.image_names)[self.split.image_index]

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """(N,) whether the row's label was found."""
        correct: npt.NDArray[np.bool_] = self.logits.argmax(axis=1) == self.split.labels
        return correct


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """One folder of models, evaluated.

    Attributes:
        document: the results, for the models of this folder alone.
        correct: (N,) bool by key of the result.
        outputs: by key of the result.
    """

    document: Results
    correct: dict[str, npt.NDArray[np.bool_]]
    outputs: dict[str, _Outputs]


def evaluate(config: EvaluateConfig, progress: Progress = SILENT) -> Results:
    """Evaluates CLIP-VE and the students under `config.runs`.

    Each language's rows are compared with those of the source language, which CLIP-VE itself reads,
    where they share a `pairID`.
    Several folders of models are the same training with several seeds: the results are those of
    the first, with mean and spread over all of them in `seeds`. Where `config.report` is set, the
    report is written there.

    Raises:
        ClseaveError: bad data, or a model that is missing, damaged, or of another teacher; or
            hypotheses that cannot be translated, where they are to be.
    """
    with ExitStack() as stack:
        if config.report is not None:
            require_replaceable(config.report, REPORT, config)
            stack.enter_context(locked_target(config.report))
        return _document(config, progress)


def _document(config: EvaluateConfig, progress: Progress) -> Results:
    folder = data_folder(config.data, progress)
    # A missing model is told before the first takes hours.
    source_lang = _source_language(config)
    systems = [_systems(config, runs, source_lang, folder, progress) for runs in config.runs]
    _check_distinct(config.runs, systems)
    names = _training_names(config.runs)
    images = ImageFolder.of(folder, config.images)

    # The source language, and the language at hand: half a million rows each.
    @functools.lru_cache(maxsize=2)
    def training_rows(lang: str) -> Split:
        return read_split(
            folder, config.train_split, lang, with_images=False, skip_bad=config.skip_bad
        )

    def evaluate_models(number: int) -> _Evaluation:
        runs, wanted, name = config.runs[number], systems[number], names[number]
        return _evaluate(config, runs, wanted, name, folder, images, training_rows, progress)

    first = evaluate_models(0)
    document = first.document
    if document.of_training_rows:
        progress.note(TRAINING_ROWS)
    if len(config.runs) > 1:
        # Of the others only figures are needed: embeddings take a lot of memory.
        others = [replace(evaluate_models(i), outputs={}) for i in range(1, len(config.runs))]
        document = _with_seeds(config, first, others)
    if config.report is not None:
        _write(config, document, first.outputs, images)
    return document


def _check_distinct(runs: Sequence[Path], systems: Sequence[list[_System]]) -> None:
    """Refuses the same models twice: they would pass for two trainings that agree."""
    known: dict[tuple[str, ...], Path] = {}
    for folder, wanted in zip(runs, systems, strict=True):
        students = [system.student for system in wanted if system.student is not None]
        models = fingerprint(folder / "clip-ve"), *map(student_fingerprint, students)
        if models in known:
            raise UsageError(
                f"--runs {known[models]} and --runs {folder} hold the same models: one training, "
                "not two seeds."
            )
        known[models] = folder


def _training_names(runs: Sequence[Path]) -> list[str]:
    """What distinguishes the checkpoints of several trainings, without anybody's home folder."""
    if len(runs) == 1:
        return [""]
    names = [folder.resolve().name for folder in runs]
    if len(set(names)) < len(names):
        names = [str(number) for number in range(1, len(names) + 1)]
    return [f"{name}/" for name in names]


def _source_language(config: EvaluateConfig) -> str:
    """The language that CLIP-VE reads in every folder of models."""
    found = {runs: source_language(runs / "clip-ve") for runs in config.runs}
    if len(set(found.values())) > 1:
        named = ", ".join(f"{runs} {lang}" for runs, lang in found.items())
        raise UsageError(f"--runs: models of several source languages ({named}).")
    return next(iter(found.values()))


def _write(
    config: EvaluateConfig, document: Results, outputs: dict[str, _Outputs], images: ImageFolder
) -> None:
    """The report, with the predictions that `compare` reads."""
    assert config.report is not None
    # One reading of each language, preferably its own.
    shown = {own.system.lang: own for own in reversed(outputs.values())}
    shown = {own.system.lang: shown[own.system.lang] for own in outputs.values()}
    write_report(
        document,
        config.report,
        predictions=[_predicted_rows(own) for own in outputs.values()],
        curves=[
            curve
            for model in _model_folders(config.runs[0], outputs.values())
            if (curve := read_learning_curve(model)) is not None
        ],
        galleries=[_examples(shown, images), _errors(shown, images)],
    )


def _model_folders(runs: Path, outputs: Iterable[_Outputs]) -> list[Path]:
    students = [own.system.student for own in outputs if own.system.student is not None]
    return list(dict.fromkeys([runs / "clip", runs / "clip-ve", *students]))


def _evaluate(
    config: EvaluateConfig,
    runs: Path,
    systems: list[_System],
    name: str,
    folder: Path,
    images: ImageFolder,
    training_rows: _TrainingRows,
    progress: Progress,
) -> _Evaluation:
    """Evaluates one folder of models; `name` stands before those of its checkpoints."""
    device = resolve_device(config.device)
    model = ClipVE.from_folder(runs / "clip-ve").to(device)
    premises = _Premises(config, model, images, progress)
    checkpoints = {f"{name}clip-ve": model.fingerprint}
    outputs: dict[str, _Outputs] = {}
    for system in systems:
        encoder = model.text
        if system.student is not None:
            encoder = load_student(system.student, model.fingerprint).to(model.text.device)
            checkpoints[name + system.student.name] = encoder.fingerprint
        outputs[system.key] = _run(config, model, encoder, system, folder, premises, progress)

    results, baselines = [], {}
    for key, own in outputs.items():
        baselines[key], guesses = _baselines(config, folder, model, own, training_rows, progress)
        source = outputs.get(model.source_lang)
        results.append(_language_result(config, own, source, outputs, guesses))
    splits = [own.split for own in outputs.values()]
    document = Results(
        results=tuple(results),
        baselines=baselines,
        signature=Signature(
            version=__version__,
            data={split.path.relative_to(folder).as_posix(): split.digest for split in splits},
            checkpoints=checkpoints,
            seed=config.seed,
            resamples=config.resamples,
            num_examples=max(map(len, splits)),
            translators={
                own.system.lang: own.translator
                for own in outputs.values()
                if own.translator is not None
            },
            source_lang=model.source_lang,
            training={
                path.relative_to(folder).as_posix(): file_digest(path)
                for lang in dict.fromkeys(
                    _training_language(model, own) for own in outputs.values()
                )
                if (path := split_path(folder, config.train_split, lang)) is not None
            },
            precision=resolve_precision(config.precision, device),
            device=device.type,
        ),
        distances=analyse_distances(
            {r.lang: r.accuracy for r in results if r.mode == "zero-shot"}, model.source_lang
        ),
    )
    return _Evaluation(document, {key: own.correct for key, own in outputs.items()}, outputs)


def _with_seeds(config: EvaluateConfig, first: _Evaluation, others: list[_Evaluation]) -> Results:
    """The first document, with what all of them say together."""
    runs = [first, *others]
    intervals = {
        key: _mean_intervals(config, own, first.outputs, runs)
        for key, own in first.outputs.items()
        if all(key in run.correct for run in runs)
    }
    checkpoints: dict[str, str] = {}
    for run in runs:
        checkpoints |= run.document.signature.checkpoints
    return replace(
        first.document,
        signature=replace(first.document.signature, checkpoints=checkpoints),
        seeds=across_seeds([run.document for run in runs], intervals),
    )


def _mean_intervals(
    config: EvaluateConfig, own: _Outputs, outputs: dict[str, _Outputs], runs: list[_Evaluation]
) -> dict[str, Interval]:
    """Intervals of one language's means over trainings, by figure."""
    correct = [run.correct[own.system.key] for run in runs]
    found = {
        "accuracy": mean_accuracy_interval(
            correct, own.images, resamples=config.resamples, seed=config.seed
        )
    }
    compared = {
        "difference_to_english": outputs.get(runs[0].document.source_lang),
        "difference_to_zero_shot": outputs.get(own.system.lang),
    }
    for name, other in compared.items():
        if other is None or other is own or any(other.system.key not in r.correct for r in runs):
            continue
        ours, theirs = _shared_rows(own, other)
        found[name] = mean_difference_interval(
            [right[ours] for right in correct],
            [run.correct[other.system.key][theirs] for run in runs],
            own.images[ours],
            resamples=config.resamples,
            seed=config.seed,
        )
    return found


def _systems(
    config: EvaluateConfig, runs: Path, source_lang: str, folder: Path, progress: Progress
) -> list[_System]:
    """What to evaluate of one folder of models: the source language first, then the others."""
    students = find_students(config.students or runs)
    zero_shot = config.mode != "translate-test"
    if config.lang:
        for lang in config.lang:
            require_language(lang)
            require_split_path(folder, config.split, lang)
            if zero_shot and lang != source_lang and lang not in students:
                known = ", ".join(dict.fromkeys([source_lang, *students]))
                raise ModelError(
                    f"{runs}: no student for {lang} (there are models for {known}); "
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
        if lang == source_lang:
            systems.append(_System(lang, "zero-shot", None))
            continue
        if zero_shot and lang in students:
            systems.append(_System(lang, "zero-shot", students[lang]))
        if config.mode != "zero-shot":
            systems.append(_System(lang, "translate-test", None))
    return systems


class _Premises:
    """The image embeddings of the rows, looked up once where several files name the same images."""

    def __init__(
        self, config: EvaluateConfig, model: ClipVE, images: ImageFolder, progress: Progress
    ) -> None:
        self._encoder, self._images, self._progress = model.image, images, progress
        self._autocast = autocast(config.precision, model.image.device)
        self._known: dict[tuple[tuple[str, ...], bytes], Tensor] = {}

    def of(self, split: Split) -> Tensor:
        """(N, D) on the CPU."""
        key = tuple(split.image_names), split.image_index.tobytes()
        if key not in self._known:
            features = image_features(
                self._encoder,
                split,
                Photos.of(split, self._images),
                autocast=self._autocast,
                progress=self._progress,
            )
            self._known[key] = features.of_rows()
        return self._known[key]


def _run(
    config: EvaluateConfig,
    model: ClipVE,
    encoder: SentenceEncoder,
    system: _System,
    folder: Path,
    premises_of: _Premises,
    progress: Progress,
) -> _Outputs:
    """Embeds each distinct sentence once, looks the images up, and scores the rows."""
    split = read_split(
        folder, config.split, system.lang, skip_bad=config.skip_bad, progress=progress
    )
    # Before anything is translated, which may cost money: are the images there?
    premises = premises_of.of(split).to(encoder.device)
    read, translator = split.hypotheses, None
    if system.mode == "translate-test":
        translated = translate_hypotheses(config, split, model.source_lang, progress)
        read, translator = translated.sentences, translated.translator
    sentences = tokenize_sentences(encoder, read, split.where, progress)
    embedded = []
    with (
        torch.no_grad(),
        autocast(config.precision, encoder.device)(),
        progress.task(f"{system.key}: sentences", len(sentences.tokens)) as task,
    ):
        for part in encoder.embed(sentences.tokens, config.batch_size):
            embedded.append(part.float())
            task.advance(len(part))
    embeddings = torch.cat(embedded)[torch.from_numpy(sentences.index)]
    with torch.no_grad():
        logits = model(embeddings, premises)
    return _Outputs(
        system,
        split,
        read,
        embeddings.cpu().numpy(),
        premises.cpu().numpy(),
        logits.cpu().numpy(),
        {pair_id: row for row, pair_id in enumerate(split.pair_ids)},
        translator,
    )


def _baselines(
    config: EvaluateConfig,
    folder: Path,
    model: ClipVE,
    own: _Outputs,
    training_rows: _TrainingRows,
    progress: Progress,
) -> tuple[Baselines, npt.NDArray[np.int64] | None]:
    """What is reached without looking, and what the hypothesis-only classifier says."""
    labels = own.split.labels
    shuffled = own.premises[shuffled_rows(own.images, config.seed)]
    device = model.text.device
    with torch.no_grad():
        logits = model(
            torch.from_numpy(own.embeddings).to(device), torch.from_numpy(shuffled).to(device)
        )
    shuffled_accuracy = float((logits.argmax(dim=1).cpu().numpy() == labels).mean())
    lang = _training_language(model, own)
    path = split_path(folder, config.train_split, lang)
    if path is None:
        return Baselines(shuffled_image=shuffled_accuracy), None
    must_not_leak = not config.allow_leak and config.train_split != config.split

    def learn() -> Guesses:
        training = training_rows(lang)
        if must_not_leak:
            check_leak(training, own.split)
        with progress.task(f"{lang}: hypothesis-only classifier", 1) as task:
            labels = predict_from_hypotheses(training.hypotheses, training.labels, own.read)
            task.advance()
        return Guesses(majority_label(training.labels), labels)

    asked = [own.read, own.split.image_names, config.skip_bad, must_not_leak]
    guesses = kept_guesses(path, asked, len(own.split), learn)
    return (
        Baselines(
            majority=float((labels == guesses.majority).mean()),
            hypothesis_only=float((guesses.labels == labels).mean()),
            shuffled_image=shuffled_accuracy,
        ),
        guesses.labels,
    )


def _training_language(model: ClipVE, own: _Outputs) -> str:
    """Whose rows the baselines learn from: those the model itself was given.

    They are the source language's where the hypotheses are translated into it.
    """
    return model.source_lang if own.translator is not None else own.split.lang


def _language_result(
    config: EvaluateConfig,
    own: _Outputs,
    source: _Outputs | None,
    outputs: dict[str, _Outputs],
    hypothesis_only: npt.NDArray[np.int64] | None,
) -> LanguageResult:
    more: dict[str, Any] = {}
    if hypothesis_only is not None:
        hard = hypothesis_only != own.split.labels
        more["num_hard"] = int(hard.sum())
        if hard.any():
            found = accuracy_interval(
                own.correct[hard], own.images[hard], resamples=config.resamples, seed=config.seed
            )
            more["hard_accuracy"] = found.value
            more["hard_accuracy_low"], more["hard_accuracy_high"] = found.low, found.high
    if source is not None:
        more |= _against_source(config, own, source)
    student = outputs.get(own.system.lang)
    if student is not None and student is not own:
        every = np.arange(len(own.split))
        more["difference_to_zero_shot"] = _difference(config, own, every, student, every)
    scores = score(
        own.split.labels, own.logits, own.images, resamples=config.resamples, seed=config.seed
    )
    return LanguageResult.from_scores(
        scores, lang=own.split.lang, split=own.split.name, mode=own.system.mode, **more
    )


def _difference(
    config: EvaluateConfig,
    own: _Outputs,
    ours: npt.NDArray[np.intp],
    other: _Outputs,
    theirs: npt.NDArray[np.intp],
) -> Difference:
    return compare_predictions(
        own.correct[ours],
        other.correct[theirs],
        own.images[ours],
        resamples=config.resamples,
        seed=config.seed,
    )


def _against_source(config: EvaluateConfig, own: _Outputs, source: _Outputs) -> dict[str, Any]:
    """Paired figures on the rows that both languages have."""
    ours, theirs = _shared_rows(own, source)
    accuracy, source_accuracy = own.correct[ours].mean(), source.correct[theirs].mean()
    figures: dict[str, Any] = {
        "ratio_to_english": float(accuracy / source_accuracy) if source_accuracy else None,
        "agreement_with_english": agreement(own.logits[ours], source.logits[theirs]),
    }
    if own is not source:
        figures["difference_to_english"] = _difference(config, own, ours, source, theirs)
    if own.system.student is not None:
        figures["transfer"] = measure_transfer(
            own.embeddings[ours],
            source.embeddings[theirs],
            np.array([source.split.hypotheses[row] for row in theirs]),
        )
    return figures


def _shared_rows(
    own: _Outputs, other: _Outputs
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The rows that both have, by number in the one and in the other."""
    shared = [pair_id for pair_id in own.split.pair_ids if pair_id in other.row_of_pair]
    if not shared:
        raise DataError(
            f"{own.split.path}: none of its pairIDs occurs in {other.split.path}; "
            "rows of two languages belong together by pairID."
        )
    return (
        np.array([own.row_of_pair[pair_id] for pair_id in shared]),
        np.array([other.row_of_pair[pair_id] for pair_id in shared]),
    )


def _predicted_rows(own: _Outputs) -> PredictedRows:
    return PredictedRows(
        lang=own.system.key,
        pair_ids=own.split.pair_ids,
        images=own.images.tolist(),
        labels=own.split.labels.astype(np.int64),
        probabilities=probabilities(own.logits),
    )


def _examples(outputs: dict[str, _Outputs], images: ImageFolder) -> Gallery:
    """A few rows with what every language's model says of them, all labels in turn."""
    first = next(iter(outputs.values()))
    everywhere = [
        row
        for row, pair_id in enumerate(first.split.pair_ids)
        if all(pair_id in own.row_of_pair for own in outputs.values())
    ]
    chosen: list[int] = []
    seen: set[str] = set()
    for row in sorted(everywhere, key=lambda r: (r * 2654435761) % 2**32):
        name, label = first.images[row], first.split.labels[row]
        if name not in seen and label == len(chosen) % len(LABELS):
            chosen.append(row)
            seen.add(name)
        if len(chosen) == _EXAMPLES:
            break
    items = [
        GalleryItem(
            str(first.images[row]),
            images.find(str(first.images[row]), first.split.where(row)),
            tuple(
                _entry(own, own.row_of_pair[first.split.pair_ids[row]]) for own in outputs.values()
            ),
        )
        for row in chosen
    ]
    return Gallery(
        "The same pictures in every language",
        "One hypothesis about each picture, in every language evaluated, with the verdicts.",
        tuple(items),
    )


def _errors(outputs: dict[str, _Outputs], images: ImageFolder) -> Gallery:
    """The most confident errors of every language."""
    count = _ERRORS_ALONE if len(outputs) == 1 else _ERRORS_EACH
    items = []
    for own in outputs.values():
        rows = most_confident_errors(own.split.labels, probabilities(own.logits), own.images, count)
        items += [
            GalleryItem(
                f"{language_name(own.split.lang)} · {own.images[row]}",
                images.find(str(own.images[row]), own.split.where(row)),
                (_entry(own, row),),
            )
            for row in rows.tolist()
        ]
    return Gallery(
        "The most confident errors",
        f"Where the model of each language is wrong and surest of it: at most {count} a language, "
        "one a picture.",
        tuple(items),
    )


def _entry(own: _Outputs, row: int) -> GalleryEntry:
    return GalleryEntry(
        lang=own.split.lang,
        hypothesis=own.split.hypotheses[row],
        label=LABELS[own.split.labels[row]],
        predicted=LABELS[int(own.logits[row].argmax())],
        probabilities=tuple(probabilities(own.logits[row : row + 1])[0].tolist()),
    )
