"""Model folders that list every file with its digest.

`config.json` has the format's name and version, what is needed to rebuild the model, a digest of
each weight and tokenizer file, and the fingerprint of all that, so that a flipped byte is noticed
before it becomes a wrong answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clseave_cli.core.files import file_digest, json_digest, json_object, read_json, write_json
from clseave_cli.core.models.calibration import CALIBRATION_FILE
from clseave_cli.errors import ModelError
from clseave_cli.progress import Progress
from clseave_cli.version import __version__

FORMAT_VERSION = 1
_CONFIG = "config.json"
_NOT_CONTENT = ("fingerprint", "clseave_version")


def seal(folder: Path, format_name: str, config: dict[str, Any]) -> str:
    """Writes `config.json` with the digests of all model files already in `folder`.

    Returns the fingerprint: a digest of everything that determines the model's output.
    """
    # Model card, training record and calibration do not.
    others = ("training", _CONFIG, CALIBRATION_FILE, "README.md")
    files = {
        path.relative_to(folder).as_posix(): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in others
    }
    content = {"format": format_name, "format_version": FORMAT_VERSION, **config, "files": files}
    fingerprint = json_digest(content)
    write_json(
        folder / _CONFIG,
        {**content, "fingerprint": fingerprint, "clseave_version": __version__},
    )
    return fingerprint


@contextmanager
def unsealed(
    folder: Path, format_name: str, without: str | None = None
) -> Iterator[dict[str, Any]]:
    """Reads `config.json` and checks every listed file; weights are hashed while the block runs.

    Hashing weights takes as long as loading them, but costs no time on another core. The other
    files determine how weights are loaded, so they are checked first. A sub-folder that the block
    does not read (`without`) is not checked.

    Raises:
        ModelError: another format or a newer version, or a file is missing or changed, even if the
            block failed because of it.
    """
    config = peek(folder, format_name)
    files = {name: d for name, d in config["files"].items() if Path(name).parts[0] != without}
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelError(f"{folder / _CONFIG}: names a file outside its folder: {name!r}.")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name}: missing; copy the whole model folder again.")
    weights = [name for name in files if name.endswith((".safetensors", ".onnx.data"))]
    for name, digest in files.items():
        if name not in weights:
            _require_digest(folder / name, digest, file_digest(folder / name))
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_digest, (folder / name for name in weights))
        try:
            yield config
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ModelError(
                f"{folder / _CONFIG}: not a valid {format_name} configuration ({error!r}); train "
                "the model again."
            ) from None
        finally:
            for name, digest in zip(weights, digests, strict=True):
                _require_digest(folder / name, files[name], digest)


def _require_digest(path: Path, expected: Any, digest: str) -> None:
    if digest != expected:
        raise ModelError(
            f"{path}: damaged, its content is not what was saved; "
            "copy it again or train the model again."
        )


def peek(folder: Path, format_name: str) -> dict[str, Any]:
    """Reads `config.json` without checking the other files.

    Raises:
        ModelError: not a folder of this format, of a newer version, or changed by hand.
    """
    if not folder.is_dir():
        stage = {
            "clip-ve": "finetune-ve",
            "student": "align --lang LANG",
            "onnx": "export --out DIR",
            "autoencoder": "autoencode --lang LANG",
        }[format_name]
        raise ModelError(f"{folder}: no such model folder; `clseave {stage}` creates it.")
    config = read_json(folder / _CONFIG)
    if not isinstance(config, dict) or config.get("format") != format_name:
        raise ModelError(f"{folder}: not a {format_name} folder of clseave.")
    if config.get("format_version") != FORMAT_VERSION:
        raise ModelError(
            f"{folder}: format version {config.get('format_version')}, "
            f"this clseave reads {FORMAT_VERSION}; update clseave."
        )
    content = {key: value for key, value in config.items() if key not in _NOT_CONTENT}
    _require_digest(folder / _CONFIG, config.get("fingerprint"), json_digest(content))
    kind = dict if format_name == "onnx" else list  # an exported folder maps each to its encoder
    langs = config.get("languages")
    if not isinstance(langs, kind) or not langs or not all(isinstance(x, str) for x in langs):
        raise ModelError(f"{folder / _CONFIG}: damaged, it names no languages; copy it again.")
    return config


def skip_other_versions(folders: dict[str, Any], progress: Progress) -> None:
    """Removes model folders of another format version, by language, with a note about each."""
    for lang, folder in list(folders.items()):
        config = json_object(Path(folder) / _CONFIG) if folder else {}
        if (version := config.get("format_version", FORMAT_VERSION)) != FORMAT_VERSION:
            del folders[lang]
            progress.note(
                f"{folder}: format version {version}, this clseave reads {FORMAT_VERSION}; "
                f"{lang} is skipped. Update clseave to read it."
            )
