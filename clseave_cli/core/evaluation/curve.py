"""`curve`: how good students get from how many sentences: a loop over `align` and `evaluate`."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from clseave_cli.core import files
from clseave_cli.core.alignment import align, count_sentences, student_languages
from clseave_cli.core.config import AlignConfig, CurveConfig, EvaluateConfig, StudentConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.records import split_path
from clseave_cli.core.evaluation.figures import draw_lines
from clseave_cli.core.evaluation.run import evaluate, require_rows
from clseave_cli.core.files import read_json, write_json
from clseave_cli.core.models.clip_ve import fingerprint, source_language
from clseave_cli.errors import DataError, UsageError
from clseave_cli.progress import SILENT, Progress
from clseave_cli.version import __version__

#: The folder of `curve`, finished or not.
DATA_CURVE = files.Kind(
    "a data curve",
    r"curve\.(json|md|png)|[\w+-]+-(\d+|all)(-[0-9a-f]{8})?/.+|\..+\.clseave-[0-9a-f]{8}",
)

# Options that a student does not depend on.
_WITHOUT_EFFECT = ("resume", "device", "checkpoint_minutes", "runs", "out", "tracker")


@dataclass(frozen=True)
class DataPoint:
    """One student in one of its languages. None: not measured."""

    lang: str
    languages: list[str]  # all that it reads
    num_sentences: int  # of each language, that it was trained on
    dev: dict[str, float]  # dev metrics of its weights in `lang`
    seconds: float
    accuracy: float | None = None  # on the test split, with its 95 % interval
    accuracy_low: float | None = None
    accuracy_high: float | None = None


@dataclass(frozen=True)
class DataCurves:
    """All points, and the teacher's accuracy in its own language (`english`)."""

    split: str
    english: float | None
    points: list[DataPoint]
    signature: str

    @property
    def metric(self) -> str:
        """The most telling metric that every point has."""
        if all(point.accuracy is not None for point in self.points):
            return f"accuracy on {self.split}, %"
        has_accuracy = all("accuracy" in point.dev for point in self.points)
        return "dev accuracy, %" if has_accuracy else "dev retrieval among the nearest ten, %"

    def lines(self) -> dict[str, list[tuple[int, float, float, float]]]:
        """Numbers of sentences with that metric and its interval's ends, in per cent.

        By `de`, or `de of de+nl` where a student reads several languages.
        """
        lines: dict[str, list[tuple[int, float, float, float]]] = {}
        key = "accuracy" if "accuracy" in self.metric else "recall_at_10"
        for p in sorted(self.points, key=lambda p: (len(p.languages), p.lang, p.num_sentences)):
            ends = p.accuracy, p.accuracy_low, p.accuracy_high
            value, low, high = (p.dev[key],) * 3 if self.metric.startswith("dev") else ends
            assert value is not None
            low, high = (value if end is None else end for end in (low, high))
            name = p.lang if len(p.languages) == 1 else f"{p.lang} of {'+'.join(p.languages)}"
            line = lines.setdefault(name, [])
            line.append((p.num_sentences, 100 * value, 100 * low, 100 * high))
        return lines


def data_curves(config: CurveConfig, progress: Progress = SILENT) -> DataCurves:
    """Trains a student for each language and each number of sentences, and measures it.

    Writes `curve.json` and `curve.png`. A point that was finished with the same options and data is
    kept, and an interrupted one goes on where it stopped. Test rows that cannot be measured are
    noted before anything is trained; the curve is then one of dev metrics.

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
        return _draw(config, out, progress)


def _draw(config: CurveConfig, out: Path, progress: Progress) -> DataCurves:
    inputs, languages = _inputs(config, progress), tuple(dict.fromkeys(config.lang))
    english = None
    try:
        source = _evaluation(config, (source_language(config.runs / "clip-ve"),))
        require_rows(source, languages, progress)
        english = evaluate(source, progress).results[0].accuracy
    except DataError as error:
        progress.note(f"{error} Students are measured on dev alone.")
    together = [languages] if config.together and len(languages) > 1 else []
    points = []
    for group in [*((lang,) for lang in languages), *together]:
        counts = count_sentences(dataclasses.replace(config, lang=group), progress)
        limits = [limit for limit in sorted(set(config.limits)) if limit < max(counts.values())]
        for limit in (*limits, None):
            options = {f.name: getattr(config, f.name) for f in dataclasses.fields(StudentConfig)}
            options |= {"lang": group, "limit": limit}
            decisive = {k: str(v) for k, v in options.items() if k not in _WITHOUT_EFFECT}
            measured = [config.split, config.resamples, english is not None]
            name, digest = "+".join(group), files.json_digest([decisive, inputs, measured])[:8]
            kept = out / f"{name}-{limit or 'all'}-{digest}"
            if (kept / "point.json").is_file():
                progress.note(f"{kept}: already measured.")
            else:
                options |= {"out": kept / f"align-{name}", "resume": kept.exists()}
                asked = _evaluation(config, group, kept) if english is not None else None
                made = _measure(AlignConfig(**options), asked, counts, progress)
                write_json(kept / "point.json", [asdict(point) for point in made])
                if not config.keep_models:
                    shutil.rmtree(kept / f"align-{name}")
            points += [DataPoint(**point) for point in read_json(kept / "point.json")]
    parts = [f"{name} {digest[:8]}" for name, digest in ({"clseave": __version__} | inputs).items()]
    parts += [f"seed {config.seed}", f"{config.resamples:,} resamples by photo"]
    curves = DataCurves(config.split, english, points, " · ".join(parts))
    write_json(out / "curve.json", asdict(curves))
    level = ("teacher", 100 * english) if english is not None else None
    with files.atomic_file(out / "curve.png") as stream:
        lines = curves.lines()
        stream.write(draw_lines(lines, "sentences", curves.metric, level, curves.signature))
    return curves


def _inputs(config: CurveConfig, progress: Progress) -> dict[str, str]:
    """Fingerprints of everything that the points depend on."""
    folder, teacher = data_folder(config.data, progress), config.runs / "clip-ve"
    return {"teacher": fingerprint(teacher)} | {
        path.relative_to(folder).as_posix(): files.file_digest(path)
        for lang in (source_language(teacher), *config.lang, *config.auxiliary)
        for split in (config.train_split, config.dev_split, config.split)
        if (path := split_path(folder, split, lang)) is not None
    }


def _evaluation(
    config: CurveConfig, lang: tuple[str, ...], students: Path | None = None
) -> EvaluateConfig:
    names = {f.name for f in dataclasses.fields(EvaluateConfig)} - {"batch_size"}
    shared = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return EvaluateConfig(**shared | {"runs": (config.runs,), "lang": lang, "students": students})


def _measure(
    options: AlignConfig, asked: EvaluateConfig | None, counts: dict[str, int], progress: Progress
) -> list[DataPoint]:
    """Trains one student and measures it in each of its languages."""
    summary = read_json(align(options, progress).folder / "training" / "summary.json")
    results = evaluate(asked, progress).results if asked is not None else ()
    accuracies = {r.lang: (r.accuracy, r.accuracy_low, r.accuracy_high) for r in results}
    points = []
    for lang in options.lang:
        # Of several languages the dev metrics are recorded as `mse/de`; of one as `mse`.
        told = {k.partition("/")[0]: v for k, v in summary["dev"].items() if k.endswith(f"/{lang}")}
        number = min(options.limit or counts[lang], counts[lang])
        common = list(options.lang), number, told or summary["dev"], summary["wall_seconds"]
        points.append(DataPoint(lang, *common, *accuracies.get(lang, ())))
    return points
