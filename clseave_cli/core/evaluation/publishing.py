"""`push`: models on the hub, with a model card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from clseave_cli.core.data import hub
from clseave_cli.core.data.languages import language_name
from clseave_cli.core.data.seen import SEEN_FILE, SeenRows
from clseave_cli.core.evaluation.results import Baselines, Results
from clseave_cli.core.evaluation.summary import percent
from clseave_cli.core.files import json_object, read_json
from clseave_cli.core.models import clip_ve, student
from clseave_cli.core.models.calibration import CALIBRATION_FILE, read_calibrations
from clseave_cli.core.models.folder import unsealed
from clseave_cli.core.models.listing import find_students
from clseave_cli.core.training.run import public_name
from clseave_cli.errors import ClseaveError, DataError, ModelError, UsageError
from clseave_cli.progress import SILENT, Progress
from clseave_cli.version import __version__


@dataclass(frozen=True)
class Pushed:
    """The models on the hub."""

    url: str  # of the commit
    languages: tuple[str, ...]  # that the models read
    num_files: int  # without the card


def push(
    folder: Path,
    repository: str,
    *,
    license: str,
    report: Path | None = None,
    teacher: Path | None = None,
    private: bool = False,
    progress: Progress = SILENT,
) -> Pushed:
    """Publishes models in one commit, in a repository laid out like `--runs`.

    Pushes the files in `config.json`, after checking their digests, and the digests of seen photos.
    Other training records name local paths and stay here.

    Args:
        folder: a student, a CLIP-VE, a folder of models, or an exported model.
        repository: `ORG/NAME`; created if it does not exist.
        license: its id on the hub.
        report: folder of an evaluation of these models; without it, the card has no metrics.
        teacher: a student's CLIP-VE; None: `clip-ve` beside it.
        private: whether the repository is visible to its owner only.
        progress: notes the push.

    Raises:
        UsageError: no licence, a bad name, or the repository holds other models or is public.
        ModelError: a model is missing, damaged, or of another teacher.
        DataError: the report is of other models.
        ClseaveError: the hub cannot be reached, or refuses.
    """
    if not hub.is_repository(repository):
        raise UsageError(f"{repository}: not a name of a repository; expected ORG/NAME.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise UsageError(
            "--license: required, an id of the hub such as apache-2.0 or cc-by-4.0; those of the "
            "data and the pretrained models limit your choice."
        )
    models = {name: _Model.of(each) for name, each in _folders(folder, teacher).items()}
    results = None if report is None else _read_results(report, list(models.values()))
    files = {
        f"{name}/{file}".removeprefix("/"): model.folder / file
        for name, model in models.items()
        for file in model.files
    }
    card = _card(repository, license, models, results)
    url = _commit(repository, files, card, set(models), private, progress)
    return Pushed(url, _languages(models), len(files))


@dataclass(frozen=True)
class _Model:
    folder: Path
    files: list[str]
    kind: str
    languages: list[str]
    fingerprints: set[str]  # of an exported model: of its sources, too
    base: str  # the pretrained model and the data of the training; empty: not recorded
    data: str

    @classmethod
    def of(cls, folder: Path) -> _Model:
        """Checks a folder; ModelError if damaged, not fetchable, or naming a local path."""
        kind = _kind(folder)
        with unsealed(folder, kind) as config:
            files = ["config.json", *config["files"]]
            files += [CALIBRATION_FILE] if read_calibrations(folder) else []
            fingerprints = {config["fingerprint"], *config.get("sources", {}).values()}
            encoder = Path(config.get("vocabulary", {}).get("encoder", ""))
        if encoder.is_absolute():
            raise ModelError(
                f"{folder / 'config.json'}: names {encoder}, which would be public; align it again "
                "with --student as a hub id or a relative path."
            )
        for name in files:
            if not any(fnmatch(name, pattern) for pattern in hub.MODEL_FILES):
                raise ModelError(f"{folder / name}: not a file of a model; it cannot be shared.")
        if SeenRows.read(folder) is not None:
            files.append(SEEN_FILE)
        base = data = ""
        with suppress(ModelError, KeyError, TypeError):  # no record, or one edited by hand
            options = read_json(folder / "training" / "run.json")["options"]
            base = public_name(str(options.get("student") or options["clip"]))
            data = public_name(str(options["data"]))
        return cls(folder, files, kind, list(config["languages"]), fingerprints, base, data)


def _kind(folder: Path) -> str:
    return str(json_object(folder / "config.json").get("format", ""))


def _languages(models: Mapping[str, _Model]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(lang for model in models.values() for lang in model.languages))


def _folders(folder: Path, teacher: Path | None) -> dict[str, Path]:
    """The folders to push, by name in the repository."""
    kind = _kind(folder)
    if kind in ("onnx", clip_ve.FORMAT):
        return {"" if kind == "onnx" else kind: folder}
    if kind == student.FORMAT:
        teacher, students = teacher or folder.resolve().parent / "clip-ve", [folder]
    else:
        teacher = teacher or folder / "clip-ve"
        students = list(dict.fromkeys(find_students(folder).values()))
    fingerprint = clip_ve.fingerprint(teacher)
    for each in students:
        student.require_teacher(each, fingerprint)
    return {clip_ve.FORMAT: teacher, **{each.resolve().name: each for each in students}}


def _read_results(report: Path, models: Sequence[_Model]) -> Results:
    """The zero-shot results in the models' languages, of an evaluation of these models alone."""
    results = Results.read(report)
    if results.sources or results.signature.reader != "student":
        raise DataError(
            f"{report}: has several source languages, or CLIP-VE reads all; evaluate the models "
            "by themselves, and name that report."
        )
    if results.of_training_rows:
        raise DataError(f"{report}: of the training split; evaluate on another split.")
    evaluated = set(results.signature.checkpoints.values())
    kept = []
    for result in results.results:
        readers = [model for model in models if result.lang in model.languages]
        if not readers or result.mode != "zero-shot":
            continue
        if results.num_trainings > 1 or not any(m.fingerprints & evaluated for m in readers):
            raise DataError(
                f"{report}: its {result.lang} was not measured with these models alone; evaluate "
                "them again, and name that report."
            )
        kept.append(result)
    return replace(results, results=tuple(kept))


def _card(
    repository: str, license: str, models: Mapping[str, _Model], results: Results | None
) -> str:
    """The model card: metadata for the hub, and a page; neither names a local path."""
    from huggingface_hub import EvalResult, ModelCardData

    name, languages = repository.rpartition("/")[2], _languages(models)
    evaluations, rows = [], []
    for r in results.results if results else ():
        assert results is not None
        data = (results.signature.dataset or "SNLI-VE").removeprefix("hf:")
        interval = {"low": r.accuracy_low, "high": r.accuracy_high, "confidence": 0.95}
        evaluation = EvalResult(
            task_type="visual-entailment",
            dataset_type=data,
            dataset_name=data,
            dataset_config=r.lang,
            dataset_split=r.split,
            metric_type="accuracy",
            metric_name="Accuracy",
            metric_value=r.accuracy,
            metric_args=interval | {"rows": r.num_examples},
        )
        evaluations.append(evaluation)
        ends = f"{percent(r.accuracy_low)}–{percent(r.accuracy_high)}"
        blind = percent(results.baselines.get(r.key, Baselines()).hypothesis_only)
        where = f"{r.num_examples:,} of {data}, {r.split}"
        rows.append((language_name(r.lang), percent(r.accuracy), ends, blind, where))
    bases = {model.base for model in models.values() if hub.is_repository(model.base)}
    sets = {m.data.removeprefix("hf:") for m in models.values() if m.data.startswith("hf:")}
    metadata = ModelCardData(
        language=list(languages),
        license=license,
        library_name="clseave",
        tags=["visual-entailment", "cross-lingual"],
        base_model=sorted(bases) or None,
        datasets=sorted(sets) or None,
        metrics=["accuracy"] if rows else None,
        model_name=name if rows else None,
        eval_results=evaluations or None,
    )
    accuracy = "Not measured on held-out data."
    if rows:
        heads = ("language", "accuracy, %", "95 % interval", "hypothesis only, %", "rows")
        accuracy = _table(heads, *rows)
        accuracy += "\n\nThe hypothesis-only baseline never sees the photo."
    parts = [
        (f"`{place or '.'}`", m.kind, ", ".join(m.languages), m.base or "–", m.data or "–")
        for place, m in models.items()
    ]
    return f"""---
{metadata.to_yaml()}
---

# {name}

Does a photo entail a sentence, contradict it, or leave it open? For sentences in
{", ".join(map(language_name, languages))}.

    clseave predict photo.jpg "…" --lang {languages[-1]} --runs {repository}

## Accuracy

{accuracy}

## Models

{_table(("folder", "kind", "languages", "trained from", "data"), *parts)}
"""


def _table(*rows: Sequence[str]) -> str:
    """A Markdown table with a head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _commit(
    repository: str,
    files: dict[str, Path],
    card: str,
    folders: set[str],
    private: bool,
    progress: Progress,
) -> str:
    """Makes the repository hold these models; returns the commit's URL, or raises as `push`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if not hub.hub_answers():
        raise ClseaveError(f"{repository}: not pushed; {hub.hub_reason(ConnectionError())}.")
    progress.note(f"{repository}: pushing {len(files)} files")
    api = HfApi(library_name="clseave", library_version=__version__)
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        existing = api.model_info(repository)
        if private and not existing.private:
            raise UsageError(f"{repository}: is public already; make it private on the hub.")
        names = {sibling.rfilename for sibling in existing.siblings or ()}
        configs = {name for name in names if re.fullmatch(r"([^/]+/)?config\.json", name)}
        if others := {name.rpartition("/")[0] for name in configs} - folders:
            raise UsageError(
                f"{repository}: holds other models too ({', '.join(sorted(others)) or '.'}); "
                "push the folder of all of them, or choose another name."
            )
        replaced = tuple(f"{name}/" for name in folders if name)
        stale = sorted(name for name in names - set(files) if name.startswith(replaced))
        added = [CommitOperationAdd(name, path) for name, path in files.items()]
        added.append(CommitOperationAdd("README.md", card.encode()))
        commit = api.create_commit(
            repository,
            [*map(CommitOperationDelete, stale), *added],
            commit_message=f"Push from clseave {__version__}",
            parent_commit=existing.sha,
        )
    except ClseaveError:
        raise
    except Exception as error:  # of the hub's client, of HTTP, or of the disk
        raise ClseaveError(f"{repository}: not pushed ({hub.hub_reason(error)}).") from None
    return str(commit.commit_url)
