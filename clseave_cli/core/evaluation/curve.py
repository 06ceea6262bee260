"""`curve`: accuracy by number of training sentences, a loop over `align` and `evaluate`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from clseave_cli.core import files
from clseave_cli.core.alignment import align, count_sentences, student_languages
from clseave_cli.core.config import AlignConfig, CurveConfig, EvaluateConfig, StudentConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.records import split_path
from clseave_cli.core.evaluation.figures import DataCurves, DataPoint, draw_data_curves
from clseave_cli.core.evaluation.results import LanguageResult
from clseave_cli.core.evaluation.run import evaluate, labelled_rows
from clseave_cli.core.models.clip_ve import fingerprint, source_language
from clseave_cli.core.models.student import student_fingerprint
from clseave_cli.errors import DataError, UsageError
from clseave_cli.progress import SILENT, Progress
from clseave_cli.version import __version__

#: The folder of `curve`, finished or not.
DATA_CURVE = files.Kind(
    "a data curve",
    r"curve\.(json|md|png)|[\w+-]+-(\d+|all)(-[0-9a-f]{8})?/.+|\..+\.clseave-[0-9a-f]{8}",
)

# Options that do not change a student.
_WITHOUT_EFFECT = ("resume", "device", "checkpoint_minutes", "runs", "out", "tracker")


def data_curves(config: CurveConfig, progress: Progress = SILENT) -> DataCurves:
    """Trains and evaluates a student for each language and each number of sentences.

    Writes `curve.json` and `curve.png`. Points finished with the same options and data are kept,
    and an interrupted one resumes. If the test rows are unusable, the curve shows dev metrics.

    Raises:
        ClseaveError: as `align` and `evaluate`.
    """
    if config.teacher not in (None, config.runs / "clip-ve"):
        raise UsageError(f"--teacher {config.teacher}: curve takes the clip-ve in --runs.")
    if min(config.limits, default=1) < 1:
        raise UsageError(f"--limit {min(config.limits)}: expected at least 1.")
    student_languages(config)
    out = config.out or config.runs / "curve"
    files.require_replaceable(out, DATA_CURVE, config)
    with files.locked_target(out):
        curves = _measured(config, out, progress)
        files.write_json(out / "curve.json", asdict(curves))
        with files.atomic_file(out / "curve.png") as stream:
            stream.write(draw_data_curves(curves))
    return curves


def _measured(config: CurveConfig, out: Path, progress: Progress) -> DataCurves:
    folder, teacher = data_folder(config.data, progress), config.runs / "clip-ve"
    source_lang, languages = source_language(teacher), tuple(dict.fromkeys(config.lang))
    inputs = {"teacher": fingerprint(teacher)} | {
        path.relative_to(folder).as_posix(): files.file_digest(path)
        for lang in (source_lang, *config.lang, *config.auxiliary)
        for split in (config.train_split, config.dev_split, config.split)
        if (path := split_path(folder, split, lang)) is not None
    }
    if config.init_from is not None:
        inputs["init_from"] = student_fingerprint(config.init_from)
    names = {f.name for f in fields(EvaluateConfig)} - {"batch_size"}
    options = {name: value for name, value in vars(config).items() if name in names}
    source = EvaluateConfig(**options | {"runs": (config.runs,), "lang": (source_lang,)})
    english = None
    try:
        images = ImageFolder.of(folder, config.images)
        for lang in languages:
            labelled_rows(source, folder, lang, images, progress)
        english = evaluate(source, progress).results[0].accuracy
    except DataError as error:
        progress.note(f"{error} Students are measured on dev alone.")
    points = []
    together = [languages] if config.together and len(languages) > 1 else []
    for group in [*((lang,) for lang in languages), *together]:
        counts = count_sentences(replace(config, lang=group), progress)
        limits = [limit for limit in sorted(set(config.limits)) if limit < max(counts.values())]
        for limit in (*limits, None):
            options = {f.name: getattr(config, f.name) for f in fields(StudentConfig)}
            options |= {"lang": group, "limit": limit}
            decisive = {k: str(v) for k, v in options.items() if k not in _WITHOUT_EFFECT}
            measured = [config.split, config.resamples, english is not None]
            name, digest = "+".join(group), files.json_digest([decisive, inputs, measured])[:8]
            place = out / f"{name}-{limit or 'all'}-{digest}"
            if (place / "point.json").is_file():
                progress.note(f"{place}: already measured.")
            else:
                options |= {"out": place / f"align-{name}", "resume": place.exists()}
                evaluation = replace(source, lang=group, students=place)
                summary = align(AlignConfig(**options), progress).folder / "training/summary.json"
                results = evaluate(evaluation, progress).results if english is not None else ()
                new = _points(counts, limit, files.read_json(summary), results)
                files.write_json(place / "point.json", [asdict(point) for point in new])
                if not config.keep_models:
                    shutil.rmtree(place / f"align-{name}")
            points += [DataPoint(**point) for point in files.read_json(place / "point.json")]
    parts = [f"{name} {digest[:8]}" for name, digest in ({"clseave": __version__} | inputs).items()]
    parts += [f"seed {config.seed}", f"{config.resamples:,} resamples by photo"]
    return DataCurves(config.split, english, points, " · ".join(parts))


def _points(
    counts: Mapping[str, int],
    limit: int | None,
    summary: dict[str, Any],
    results: Sequence[LanguageResult],
) -> list[DataPoint]:
    """The points of one student, one a language."""
    accuracies = {r.lang: (r.accuracy, r.accuracy_low, r.accuracy_high) for r in results}
    points = []
    for lang, count in counts.items():
        # A student of several languages has the dev metric `mse/de`, of one `mse`.
        dev = {k.partition("/")[0]: v for k, v in summary["dev"].items() if k.endswith(f"/{lang}")}
        common = list(counts), min(limit or count, count), dev or summary["dev"]
        points.append(DataPoint(lang, *common, summary["wall_seconds"], *accuracies.get(lang, ())))
    return points
