"""`clseave curve`: how good a student gets from how many sentences."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clseave_cli.commands import terminal
from clseave_cli.core.config import AlignConfig, CurveConfig, EvaluateConfig, StudentConfig
from clseave_cli.errors import DataError, UsageError
from clseave_cli.progress import Progress
from clseave_cli.version import __version__

if TYPE_CHECKING:
    from clseave_cli.core.evaluation.report.data_curves import DataPoint
    from clseave_cli.core.evaluation.results import LanguageResult

#: Options that `curve` passes on to the training of every student.
_SHARED = [field.name for field in dataclasses.fields(StudentConfig)]


def run(
    config: CurveConfig,
    *,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train students on 100, 300, … all sentences and measure each.

    One student a language and number of sentences; --together adds one of
    all the languages. Options of align apply to each. Writes curve.json,
    curve.md and curve.png. Points that were finished before are kept, and
    an interrupted one goes on where it stopped.
    """
    from clseave_cli.core.evaluation.report.data_curves import DATA_CURVE
    from clseave_cli.core.files import locked_target, require_replaceable

    require_replaceable(_out(config), DATA_CURVE, config)
    with locked_target(_out(config)):
        _run(config, json)


def _run(config: CurveConfig, json: bool) -> None:
    from clseave_cli.commands.tables import data_curves_table
    from clseave_cli.core.alignment import count_sentences, student_languages
    from clseave_cli.core.evaluation.report.data_curves import DataCurves
    from clseave_cli.core.files import file_digest
    from clseave_cli.core.models.clip_ve import source_language

    progress = terminal.TerminalProgress()
    if config.teacher is not None and config.teacher.name != "clip-ve":
        raise UsageError(f"--teacher {config.teacher}: evaluate finds it as clip-ve only.")
    student_languages(config)
    if min(config.limits, default=1) < 1:
        raise UsageError(f"--limit {min(config.limits)}: expected at least 1.")
    sizes = {
        languages: count_sentences(dataclasses.replace(config, lang=languages), progress)
        for languages in _students(config)
    }
    measured = _measured(config, progress)
    points: list[DataPoint] = []
    inputs: dict[str, str] = {}
    digest = functools.cache(file_digest)
    for languages, limit in _planned(config, sizes):
        student = _Student(config, languages, limit, measured, digest, progress)
        points += student.points(sizes[languages])
        inputs |= student.inputs()
    points.sort(key=lambda point: (point.num_sentences, point.languages))
    source_lang = source_language(_teacher(config))
    own = _accuracies(config, [source_lang], None, progress) if measured else {}
    curves = DataCurves(
        tuple(points),
        config.split,
        own[source_lang].accuracy if own else None,
        _signature(config, inputs),
    )
    curves.write(_out(config))
    if json:
        terminal.print_json(curves.to_json())
        return
    terminal.stdout().print(data_curves_table(curves))
    terminal.stdout().print(f"figure: {_out(config) / 'curve.png'}", soft_wrap=True)


def _signature(config: CurveConfig, inputs: dict[str, str]) -> str:
    """One line for the foot of the figure."""
    from clseave_cli.core.training.precision import resolve_device, resolve_precision

    device = resolve_device(config.device)
    parts = [f"{name} {digest[:8]}" for name, digest in inputs.items()]
    parts.append(f"{resolve_precision(config.precision, device)} on {device.type}")
    parts += [f"seed {config.seed}", f"{config.resamples:,} resamples by photo"]
    return " · ".join([f"clseave {__version__}", *parts])


def _teacher(config: CurveConfig) -> Path:
    return config.teacher or config.runs / "clip-ve"


def _out(config: CurveConfig) -> Path:
    return config.out or config.runs / "curve"


def _students(config: CurveConfig) -> list[tuple[str, ...]]:
    """The languages of each student."""
    languages = tuple(dict.fromkeys(config.lang))
    together = [languages] if config.together and len(languages) > 1 else []
    return [*((lang,) for lang in languages), *together]


def _planned(
    config: CurveConfig, sizes: dict[tuple[str, ...], dict[str, int]]
) -> Iterator[tuple[tuple[str, ...], int | None]]:
    """The students to train: languages, and how many sentences of each; None: all."""
    for languages, own in sizes.items():
        for limit in sorted(set(config.limits)):
            if limit < max(own.values()):
                yield languages, limit
        yield languages, None


def _measured(config: CurveConfig, progress: Progress) -> list[str]:
    """The languages whose students can be measured on the split: those of text alone cannot."""
    from clseave_cli.core.data.hub import data_folder
    from clseave_cli.core.data.images import ImageFolder
    from clseave_cli.core.data.records import split_path
    from clseave_cli.core.models.clip_ve import source_language

    folder = data_folder(config.data, progress)
    languages = [lang for lang in config.lang if split_path(folder, config.split, lang)]
    try:
        ImageFolder.of(folder, config.images)
    except DataError:
        languages = []
    if not languages or not split_path(folder, config.split, source_language(_teacher(config))):
        progress.note(f"{folder}: no {config.split} rows with images; dev figures alone.")
        return []
    return languages


class _Student:
    """One student of the curve: trained and measured, or what is kept of it."""

    def __init__(
        self,
        config: CurveConfig,
        languages: tuple[str, ...],
        limit: int | None,
        measured: list[str],
        digest: Callable[[Path], str],
        progress: Progress,
    ) -> None:
        self._digest = digest
        self._config = config
        self._languages = languages
        self._limit = limit
        self._measured = [lang for lang in languages if lang in measured]
        self._progress = progress
        self._folder = _out(config) / f"{'+'.join(languages)}-{limit or 'all'}"
        own = {name: getattr(config, name) for name in _SHARED}
        self._options = AlignConfig(
            # Whatever was begun of it is gone on with.
            **own | {"lang": languages, "resume": self._folder.exists()},
            limit=limit,
            out=self._folder / f"align-{'+'.join(languages)}",
        )

    def points(self, sizes: dict[str, int]) -> list[DataPoint]:
        """A point for each of its languages.

        Args:
            sizes: how many sentences there are to learn each language from.

        Raises:
            UsageError: what is kept was made with other options or data.
        """
        from clseave_cli.core.evaluation.report.data_curves import DataPoint
        from clseave_cli.core.files import read_json, write_json
        from clseave_cli.core.training.run import plain_options, require_same

        path = self._folder / "point.json"
        options = plain_options(self._options)
        measuring = {"split": self._config.split, "resamples": self._config.resamples}
        record = {"options": options | measuring, "inputs": self.inputs()}
        if path.is_file():
            kept = read_json(path)
            require_same(kept, record, self._folder)
            self._progress.note(f"{self._folder}: already measured.")
            return [DataPoint.from_json(point) for point in kept["points"]]
        points = self._train_and_measure(options, sizes)
        write_json(path, record | {"points": [dataclasses.asdict(point) for point in points]})
        if not self._config.keep_models:
            shutil.rmtree(str(self._options.out))
        return points

    def _train_and_measure(self, options: dict[str, Any], sizes: dict[str, int]) -> list[DataPoint]:
        from clseave_cli.core.alignment import align
        from clseave_cli.core.evaluation.report.data_curves import DataPoint
        from clseave_cli.core.files import read_json
        from clseave_cli.core.training.run import require_same

        result = align(self._options, self._progress)
        # One that was finished, but not measured, when the command was killed.
        made = read_json(result.folder / "training" / "run.json")
        require_same(made, {"options": options, "inputs": {}}, self._folder)
        summary = read_json(result.folder / "training" / "summary.json")
        found = _accuracies(self._config, self._measured, self._folder, self._progress)
        points = []
        for lang in self._languages:
            own = found.get(lang)
            points.append(
                DataPoint(
                    lang,
                    self._languages,
                    min(self._limit or sizes[lang], sizes[lang]),
                    _dev_figures(summary["dev"], lang),
                    summary["wall_seconds"],
                    *((own.accuracy, own.accuracy_low, own.accuracy_high) if own else ()),
                )
            )
        return points

    def inputs(self) -> dict[str, str]:
        """Fingerprints of what the point depends on."""
        from clseave_cli.core.data.hub import data_folder
        from clseave_cli.core.data.records import split_path
        from clseave_cli.core.models.clip_ve import fingerprint, source_language

        config = self._options
        folder = data_folder(config.data, self._progress)
        teacher = _teacher(self._config)
        inputs = {"teacher": fingerprint(teacher)}
        for lang in (source_language(teacher), *config.lang, *config.auxiliary):
            for split in (config.train_split, config.dev_split, self._config.split):
                if (path := split_path(folder, split, lang)) is not None:
                    inputs[path.relative_to(folder).as_posix()] = self._digest(path)
        return inputs


def _dev_figures(dev: dict[str, float], lang: str) -> dict[str, float]:
    """The dev figures of a language: those told by language, or, of a single one, all there are."""
    by_language = {
        name.partition("/")[0]: value for name, value in dev.items() if name.endswith(f"/{lang}")
    }
    return by_language or dev


def _accuracies(
    config: CurveConfig, languages: list[str], students: Path | None, progress: Progress
) -> dict[str, LanguageResult]:
    """What the students in a folder reach on the split."""
    from clseave_cli.core.evaluation.run import evaluate

    if not languages:
        return {}
    evaluation = EvaluateConfig(
        data=config.data,
        images=config.images,
        skip_bad=config.skip_bad,
        runs=(_teacher(config).parent,),
        students=students,
        lang=tuple(languages),
        split=config.split,
        train_split=config.train_split,
        allow_leak=config.allow_leak,
        resamples=config.resamples,
        seed=config.seed,
        device=config.device,
        precision=config.precision,
    )
    return {result.lang: result for result in evaluate(evaluation, progress).results}
