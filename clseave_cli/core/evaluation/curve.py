"""`curve`: how good students get from how many sentences: a loop over `align` and `evaluate`."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clseave_cli.core.alignment import align, count_sentences, student_languages
from clseave_cli.core.config import AlignConfig, CurveConfig, EvaluateConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.records import split_path
from clseave_cli.core.evaluation.figures import draw_lines
from clseave_cli.core.evaluation.run import evaluate, require_rows
from clseave_cli.core.files import atomic_file, file_digest, json_digest, read_json, write_json
from clseave_cli.core.models.clip_ve import fingerprint, source_language
from clseave_cli.errors import DataError, UsageError
from clseave_cli.progress import SILENT, Progress
from clseave_cli.version import __version__

# Options that a student does not depend on.
_WITHOUT_EFFECT = ("resume", "device", "checkpoint_minutes", "runs", "out", "tracker")


@dataclass(frozen=True)
class DataPoint:
    """One student in one of its `languages`, trained on `num_sentences` of each.

    `dev` holds the dev metrics of its weights in `lang`; `accuracy` is a fraction, on the test
    split. None: not measured.
    """

    lang: str
    languages: list[str]
    num_sentences: int
    dev: dict[str, float]
    seconds: float
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None


@dataclass(frozen=True)
class DataCurves:
    """All points; `english` is the teacher's accuracy in its own language, None: not measured."""

    split: str
    english: float | None
    points: list[DataPoint]
    signature: str

    @property
    def metric(self) -> str:
        """The most telling metric that every point has."""
        if all(point.accuracy is not None for point in self.points):
            return f"accuracy on {self.split}, %"
        if all("accuracy" in point.dev for point in self.points):
            return "dev accuracy, %"
        return "dev retrieval among the nearest ten, %"

    def lines(self) -> dict[str, list[tuple[int, float, float, float]]]:
        """Numbers of sentences with that metric and its interval's ends, in per cent.

        By `de`, or `de of de+nl` where a student reads several languages.
        """
        lines: dict[str, list[tuple[int, float, float, float]]] = {}
        key = "accuracy" if "accuracy" in self.metric else "recall_at_10"
        for p in sorted(self.points, key=lambda p: (len(p.languages), p.lang, p.num_sentences)):
            ends = (p.accuracy, p.accuracy_low, p.accuracy_high)
            value, low, high = (p.dev[key],) * 3 if self.metric.startswith("dev") else ends
            assert value is not None
            low, high = (value if end is None else end for end in (low, high))
            name = p.lang if len(p.languages) == 1 else f"{p.lang} of {'+'.join(p.languages)}"
            lines.setdefault(name, []).append((p.num_sentences, 100 * value, 100 * low, 100 * high))
        return lines


def data_curves(config: CurveConfig, progress: Progress = SILENT) -> DataCurves:
    """Trains a student for each language and each number of sentences, and measures it.

    Writes `curve.json` and `curve.png`. A point that was finished with the same options and data is
    kept, and an interrupted one goes on where it stopped. Test rows that cannot be measured are
    noted before anything is trained; the curve is then one of dev metrics.

    Raises:
        ClseaveError: as `align` and `evaluate`.
    """
    teacher, out = config.teacher or config.runs / "clip-ve", config.out or config.runs / "curve"
    student_languages(config)
    if teacher.name != "clip-ve":
        raise UsageError(f"--teacher {teacher}: evaluate finds it as clip-ve only.")
    if min(config.limits, default=1) < 1:
        raise UsageError(f"--limit {min(config.limits)}: expected at least 1.")
    languages = tuple(dict.fromkeys(config.lang))
    groups: list[tuple[str, ...]] = [(lang,) for lang in languages]
    groups += [languages] if config.together and len(languages) > 1 else []
    folder, source_lang = data_folder(config.data, progress), source_language(teacher)
    evaluation, english = _evaluation(config, teacher.parent, (source_lang,)), None
    try:
        require_rows(evaluation, languages, progress)
        english = evaluate(evaluation, progress).results[0].accuracy
    except DataError as error:
        progress.note(f"{error} Students are measured on dev alone.")
    inputs = {"teacher": fingerprint(teacher)} | {
        path.relative_to(folder).as_posix(): file_digest(path)
        for lang in (source_lang, *config.lang, *config.auxiliary)
        for split in (config.train_split, config.dev_split, config.split)
        if (path := split_path(folder, split, lang)) is not None
    }
    points = []
    for group in groups:
        counts = count_sentences(dataclasses.replace(config, lang=group), progress)
        limits = [limit for limit in sorted(set(config.limits)) if limit < max(counts.values())]
        for limit in (*limits, None):
            names = {part.name for part in dataclasses.fields(AlignConfig)} - {"limit", "out"}
            own: dict[str, Any] = {name: getattr(config, name) for name in names}
            own |= {"lang": group, "limit": limit}
            decisive = {k: str(v) for k, v in own.items() if k not in _WITHOUT_EFFECT}
            measured = [config.split, config.resamples, english is not None]
            digest = json_digest([decisive, inputs, measured])[:8]
            kept = out / f"{'+'.join(group)}-{limit or 'all'}-{digest}"
            if not (kept / "point.json").is_file():
                own |= {"out": kept / f"align-{'+'.join(group)}", "resume": kept.exists()}
                made = _measure(config, AlignConfig(**own), counts, english is not None, progress)
                write_json(kept / "point.json", [asdict(point) for point in made])
                if not config.keep_models:
                    shutil.rmtree(own["out"])
            else:
                progress.note(f"{kept}: already measured.")
            points += [DataPoint(**point) for point in read_json(kept / "point.json")]
    parts = [f"{name} {digest[:8]}" for name, digest in ({"clseave": __version__} | inputs).items()]
    parts += [f"seed {config.seed}", f"{config.resamples:,} resamples by photo"]
    signature = " · ".join(parts)
    curves = DataCurves(config.split, english, points, signature)
    write_json(out / "curve.json", asdict(curves))
    level = ("teacher", 100 * english) if english is not None else None
    with atomic_file(out / "curve.png") as stream:
        lines = curves.lines()
        stream.write(draw_lines(lines, "sentences", curves.metric, level, signature))
    return curves


def _evaluation(
    config: CurveConfig, runs: Path, lang: tuple[str, ...], students: Path | None = None
) -> EvaluateConfig:
    names = {part.name for part in dataclasses.fields(EvaluateConfig)} - {"batch_size"}
    given = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return EvaluateConfig(**given | {"runs": (runs,), "lang": lang, "students": students})


def _measure(
    config: CurveConfig,
    options: AlignConfig,
    counts: dict[str, int],
    on_test: bool,
    progress: Progress,
) -> list[DataPoint]:
    """Trains one student, and measures it in each of its languages."""
    model = align(options, progress).folder
    summary = read_json(model / "training" / "summary.json")
    teacher = options.teacher or options.runs / "clip-ve"
    asked = _evaluation(config, teacher.parent, options.lang, model.parent)
    results = evaluate(asked, progress).results if on_test else ()
    accuracies = {r.lang: (r.accuracy, r.accuracy_low, r.accuracy_high) for r in results}
    points = []
    for lang in options.lang:
        # Of several languages the dev metrics are recorded as `mse/de`; of one as `mse`.
        of_lang = {
            k.partition("/")[0]: v for k, v in summary["dev"].items() if k.endswith(f"/{lang}")
        }
        dev, seconds = of_lang or summary["dev"], summary["wall_seconds"]
        number = min(options.limit or counts[lang], counts[lang])
        scores = accuracies.get(lang, (None, None, None))
        points.append(DataPoint(lang, list(options.lang), number, dev, seconds, *scores))
    return points
