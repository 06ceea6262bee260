"""`push`: models on the hub, with a card that says what they are and how good."""

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
    """What is on the hub now.

    Attributes:
        url: of the commit.
        languages: that the models read.
        num_files: how many files of the models were pushed, the card apart.
    """

    url: str
    languages: tuple[str, ...]
    num_files: int


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
    """Publishes models in one commit: the repository is laid out like `--runs`.

    What `config.json` lists is pushed, once it matches its digests, and the record of what the
    model saw, which holds digests only; other records of the training, which name local paths, are
    not.

    Args:
        folder: a student, a CLIP-VE, a folder of models, or an exported one.
        repository: `ORG/NAME`; made where there is none.
        license: its id on the hub.
        report: folder of an evaluation of these models; without it the card has no metrics.
        teacher: a student's CLIP-VE; None: `clip-ve` beside it.
        private: whether only the owner may see the repository.
        progress: told what is pushed.

    Raises:
        UsageError: no licence, no such name, or the repository holds other models or is public.
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
    models = {place: _Model.of(each) for place, each in _places(folder, teacher).items()}
    measured = None if report is None else _measured(report, list(models.values()))
    files = {
        f"{place}/{name}".removeprefix("/"): model.folder / name
        for place, model in models.items()
        for name in model.files
    }
    url = _commit(
        repository, files, _card(repository, license, models, measured), set(models), private,
        progress,
    )  # fmt: skip
    return Pushed(url, _languages(models), len(files))


@dataclass(frozen=True)
class _Model:
    """A model to push."""

    folder: Path
    files: list[str]
    kind: str
    languages: list[str]
    fingerprints: set[str]  # an exported model stands for those it was made from
    base: str  # the pretrained model it was trained from, and the data; empty: not recorded
    data: str

    @classmethod
    def of(cls, folder: Path) -> _Model:
        """Reads a folder and compares every file with its digest.

        Raises:
            ModelError: it is damaged, names a local path, or has a file that is never fetched.
        """
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
    """What a folder says that it holds; empty where it says nothing."""
    return str(json_object(folder / "config.json").get("format", ""))


def _languages(models: Mapping[str, _Model]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(lang for model in models.values() for lang in model.languages))


def _places(folder: Path, teacher: Path | None) -> dict[str, Path]:
    """The folders to push, by their place in the repository.

    Raises:
        ModelError: there is no model, or a student of another CLIP-VE.
    """
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


def _measured(report: Path, models: Sequence[_Model]) -> Results:
    """An evaluation's zero-shot results in the models' languages.

    Raises:
        DataError: it is of other models, of several trainings, or of the training split.
    """
    results = Results.read(report)
    if results.sources or results.signature.reader != "student":
        raise DataError(
            f"{report}: of several source languages, or of CLIP-VE reading them all; evaluate the "
            "models by themselves, and name that report."
        )
    if results.of_training_rows:
        raise DataError(f"{report}: of the training split, which says little; evaluate another.")
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
    repository: str, license: str, models: Mapping[str, _Model], measured: Results | None
) -> str:
    """The model card: metadata for the hub, and a page; neither names a local path."""
    from huggingface_hub import EvalResult, ModelCardData

    name, languages = repository.rpartition("/")[2], _languages(models)
    evaluations, rows = [], []
    for of in measured.results if measured else ():
        assert measured is not None
        data = (measured.signature.dataset or "SNLI-VE").removeprefix("hf:")
        interval = {"low": of.accuracy_low, "high": of.accuracy_high, "confidence": 0.95}
        evaluation = EvalResult(
            task_type="visual-entailment",
            dataset_type=data,
            dataset_name=data,
            dataset_config=of.lang,
            dataset_split=of.split,
            metric_type="accuracy",
            metric_name="Accuracy",
            metric_value=of.accuracy,
            metric_args=interval | {"rows": of.num_examples},
        )
        evaluations.append(evaluation)
        ends = f"{percent(of.accuracy_low)}–{percent(of.accuracy_high)}"
        blind = percent(measured.baselines.get(of.key, Baselines()).hypothesis_only)
        where = f"{of.num_examples:,} of {data}, {of.split}"
        rows.append((language_name(of.lang), percent(of.accuracy), ends, blind, where))
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
    """A Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _commit(
    repository: str,
    files: dict[str, Path],
    card: str,
    places: set[str],
    private: bool,
    progress: Progress,
) -> str:
    """Makes the repository hold these models; returns the commit's URL.

    Raises:
        UsageError: it holds others too, or is public though it is to be private.
        ClseaveError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if not hub.hub_answers():
        raise ClseaveError(f"{repository}: not pushed; {hub.hub_reason(ConnectionError())}.")
    progress.note(f"{repository}: pushing {len(files)} files")
    api = HfApi(library_name="clseave", library_version=__version__)
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        there = api.model_info(repository)
        if private and not there.private:
            raise UsageError(f"{repository}: is public already; make it private on the hub.")
        names = {sibling.rfilename for sibling in there.siblings or ()}
        configs = {name for name in names if re.fullmatch(r"([^/]+/)?config\.json", name)}
        if others := {name.rpartition("/")[0] for name in configs} - places:
            raise UsageError(
                f"{repository}: holds other models too ({', '.join(sorted(others)) or '.'}); "
                "push the folder of all of them, or choose another name."
            )
        inside = tuple(f"{place}/" for place in places if place)
        gone = sorted(name for name in names - set(files) if name.startswith(inside))
        added = [CommitOperationAdd(name, path) for name, path in files.items()]
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationDelete(name) for name in gone),
                *added,
                CommitOperationAdd("README.md", card.encode()),
            ],
            commit_message=f"Push from clseave {__version__}",
            parent_commit=there.sha,
        )
    except ClseaveError:
        raise
    except Exception as error:  # of the hub's client, of HTTP, or of the disk
        raise ClseaveError(f"{repository}: not pushed ({hub.hub_reason(error)}).") from None
    return str(commit.commit_url)
