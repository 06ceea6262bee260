"""The models in a folder, and which of them reads which language. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clseave_cli.core.data.records import is_language
from clseave_cli.core.files import folder_bytes, json_object, read_json
from clseave_cli.core.models.folder import peek
from clseave_cli.errors import ModelError

_CLIP_VE, _STUDENT, _PRETRAINED = "clip-ve", "student", "pretrained"


def find_students(runs: Path) -> dict[str, Path]:
    """The student folder under `runs` for each language: the first of `student_candidates`."""
    return {language: folders[0] for language, folders in student_candidates(runs).items()}


def student_candidates(runs: Path) -> dict[str, list[Path]]:
    """The student folders under `runs` for each language; those with fewest languages first.

    A folder may have any name; its config counts. Unreadable ones (damaged, or of a newer version)
    come last, for the languages they name: loading one reports what is wrong, and the other
    languages remain usable.
    """
    ranked: dict[str, list[tuple[bool, int, Path]]] = {}
    languages: Any
    for config in sorted(runs.glob("[!.]*/config.json")):
        folder, content = config.parent, json_object(config)
        if not (folder.name.startswith("align-") or content.get("format") == _STUDENT):
            continue
        try:
            is_unreadable, languages = False, list(peek(folder, _STUDENT)["languages"])
        except ModelError:
            is_unreadable, languages = True, content.get("languages", ())
            if not isinstance(languages, list):
                languages = folder.name.removeprefix("align-").split("+")
        for language in filter(is_language, map(str, languages)):
            ranked.setdefault(language, []).append((is_unreadable, len(languages), folder))
    return {
        language: [folder for _, _, folder in sorted(ranks)]
        for language, ranks in sorted(ranked.items())
    }


@dataclass(frozen=True)
class ModelEntry:
    """A model folder."""

    name: str  # of the folder
    kind: str  # clip-ve, student, autoencoder, onnx; pretrained: a model of `pretrain`
    languages: tuple[str, ...]  # that it reads
    num_bytes: int  # of all its files
    fingerprint: str = ""  # of everything that determines its output; empty if it has none
    teacher: str | None = None  # of a student, the fingerprint of its CLIP-VE
    dev: dict[str, float] = field(default_factory=dict)  # the dev metrics of its training
    problem: str = ""  # why it cannot be used; empty if it can


@dataclass(frozen=True)
class Models:
    """The models in a folder."""

    entries: list[ModelEntry]  # by name
    predict: dict[str, tuple[str, str]]  # the model that `predict` takes for a language, and why


def list_models(runs: Path) -> Models:
    """Lists the models under `runs`, or the one in a folder that `clseave export` wrote.

    Weights are neither loaded nor compared with their digests.

    Raises:
        ModelError: there is no such folder.
    """
    if not runs.is_dir():
        raise ModelError(f"{runs}: no such folder; --runs names the folder of the models.")
    if (runs / "head.onnx").is_file():
        entry = _entry(runs, "")
        return Models([entry], {lang: (entry.name, "exported") for lang in entry.languages})
    try:
        config = peek(runs / _CLIP_VE, _CLIP_VE)
        source, fingerprint = str(config["languages"][0]), str(config["fingerprint"])
    except ModelError:
        source = fingerprint = ""
    folders = sorted(config.parent for config in runs.glob("[!.]*/config.json"))
    predict = {source: (_CLIP_VE, "the language it was trained in")} if source else {}
    for lang, (first, *others) in student_candidates(runs).items():
        names = ", ".join(folder.name for folder in others)
        why = f"before {names}: fewest languages, then by name" if others else "the only student"
        predict.setdefault(lang, (first.name, why))
    return Models([_entry(folder, fingerprint) for folder in folders], predict)


def _entry(folder: Path, teacher: str) -> ModelEntry:
    """Describes a folder; `teacher` is the fingerprint of the CLIP-VE beside it."""
    kind, problem = _PRETRAINED, ""
    try:
        config = read_json(folder / "config.json")
        kind = config.get("format", _PRETRAINED)
        config = {} if kind == _PRETRAINED else peek(folder, kind)
    except (ModelError, AttributeError, KeyError) as error:
        config, problem = {}, str(error)
    expected = config.get("teacher")
    if expected is not None and expected != teacher:
        problem = "belongs to another CLIP-VE" if teacher else "its CLIP-VE is not here"
    try:
        dev = read_json(folder / "training" / "summary.json")["dev"]
        # Metrics of single languages are named `metric/language`.
        dev = {name: float(value) for name, value in dev.items() if "/" not in name}
    except (ModelError, AttributeError, KeyError, TypeError, ValueError):
        dev = {}
    return ModelEntry(
        name=folder.resolve().name,
        kind=kind,
        languages=tuple(config.get("languages", ())),
        num_bytes=folder_bytes(folder),
        fingerprint=str(config.get("fingerprint", "")),
        teacher=expected,
        dev=dev,
        problem=problem,
    )
