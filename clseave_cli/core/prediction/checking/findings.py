"""Verdicts on texts and their pictures, and what can be said of a text without a model.

Legend: B pictures at once · D embedding width · C labels (3).
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from clseave_cli.core.config import CheckConfig
from clseave_cli.core.data.images import open_image
from clseave_cli.core.data.languages import LanguageIdentifier
from clseave_cli.core.files import json_digest
from clseave_cli.core.prediction import Floats
from clseave_cli.core.prediction.checking.pictures import Picture
from clseave_cli.core.prediction.checking.reading import Text, read_texts
from clseave_cli.core.prediction.inference import load_model
from clseave_cli.errors import DataError, ExtraMissing, UsageError
from clseave_cli.labels import LABELS
from clseave_cli.processes import ahead, usable_cores
from clseave_cli.progress import SILENT, Progress

Level = Literal["error", "warning"]

#: What a finding can be: how bad, and what it means. `--fail-on unsure` counts the warnings too.
RULES: dict[str, tuple[Level, str]] = {
    "contradicts": ("error", "The picture contradicts the text."),
    "empty": ("error", "The picture has no text."),
    "placeholder": ("error", "The text is a placeholder."),
    "file-name": ("error", "The text is the name of a file."),
    "unreadable": ("error", "The file cannot be read here."),
    "unsure": ("warning", "The model is not sure whether the text fits the picture."),
    "too-long": ("warning", "The text is too long."),
    "same-text": ("warning", "The same text stands for many different pictures."),
}
_VERDICTS = ("fits", "leaves open", "contradicts")
#: Findings after which nothing is left to ask the model.
_NO_TEXT = {"empty", "placeholder", "file-name", "unreadable"}

_AT_ONCE = 256
_BYTES_AT_ONCE = 128 << 20
_IMAGE_BATCH = 32
_IMAGES_AHEAD = 64
#: Embeddings kept: 32,768 of 2 KiB, or fewer if they have those of patches with them.
_KEPT_BYTES, _LEAST_BYTES = 64 << 20, 2048
#: Smaller ones are spacers and tracking pixels.
_LEAST_PIXELS = 16
_THUMBNAIL = (360, 360)
#: A language that is less sure than this gives way to the one the page declares.
_SURE_LANGUAGE = 0.8

_PLACEHOLDER = re.compile(
    r"image|picture|photo|photograph|img|pic|graphic|figure|fig|alt|alt text|alternative text|text|"
    r"caption|description|image description|insert alt text here|placeholder|todo|tbd|fixme|"
    r"untitled|none|null|undefined|nan|n a|bild|foto|grafik|abbildung|platzhalter|afbeelding|"
    r"plaatje|imagen|imagem|immagine|画像|写真|图片|照片|图像|圖片|이미지|사진"
)
_TEMPLATE = re.compile(r"\{\{.*\}\}|\{%.*%\}|\$\{.*\}|<%.*%>|lorem ipsum\b.*", re.IGNORECASE)
_FILE_NAME = re.compile(
    r"\S+\.(jpe?g|png|gif|webp|svg|bmp|avif|tiff?|heic|ico)"
    r"|(img|imag|dscn?|dscf|pxl|p|screenshot|image|photo)[-_]?\d{3,}\S*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Finding:
    """What is wrong with a text: one of `RULES`, in words, and what stays the same of it.

    Attributes:
        rule: see above.
        message: a sentence without a full stop.
        fingerprint: the same as long as file, picture, text and rule are.
    """

    rule: str
    message: str
    fingerprint: str

    @property
    def level(self) -> Level:
        """How bad it is."""
        return RULES[self.rule][0]


@dataclass
class Checked:
    """A text and what became of it.

    Attributes:
        text: what was read.
        findings: what is wrong with it and not accepted.
        verdict: `fits`, `leaves open`, `contradicts`, `unsure`; None where none was asked for.
        lang: the language it was read in.
        probabilities: (C,) of the labels.
        skipped: why there is no verdict, though there is a text.
        thumbnail: the picture as a small JPEG, for the report.
    """

    text: Text
    findings: list[Finding] = field(default_factory=list)
    verdict: str | None = None
    lang: str | None = None
    probabilities: tuple[float, ...] = ()
    skipped: str = ""
    thumbnail: bytes = b""

    def find(self, rule: str, message: str, digest: str = "") -> None:
        """Adds a finding; `digest` is that of the picture where it matters."""
        text = self.text
        identity = [text.file, text.picture.name, text.text, rule, digest]
        self.findings.append(Finding(rule, message, json_digest(identity)[:32]))

    @property
    def rank(self) -> tuple[int, float]:
        """Sorts the worst first."""
        order = [list(RULES).index(finding.rule) for finding in self.findings]
        contradiction = self.probabilities[2] if self.probabilities else 0.0
        return min(order, default=len(RULES)), -contradiction

    def to_json(self) -> dict[str, object]:
        """The object that `--format json` has for each text."""
        return {
            "file": self.text.file,
            "line": self.text.where if isinstance(self.text.where, int) else None,
            "place": str(self.text.where),
            "image": self.text.picture.name,
            "text": self.text.text,
            "lang": self.lang,
            "verdict": self.verdict,
            "probabilities": dict(zip(LABELS, self.probabilities, strict=False)),
            "skipped": self.skipped,
            "findings": [asdict(f) | {"level": f.level} for f in self.findings],
        }


@dataclass(frozen=True)
class CheckResult:
    """All texts in the order they were read, and how many findings were accepted before."""

    texts: list[Checked]
    num_accepted: int

    @property
    def found(self) -> list[Checked]:
        """The texts with findings."""
        return [checked for checked in self.texts if checked.findings]

    def fails(self, on: str) -> bool:
        """Whether there are findings at or over a level: `contradicts` or `unsure`."""
        levels = {finding.level for checked in self.found for finding in checked.findings}
        return "error" in levels or (on == "unsure" and "warning" in levels)

    def summary(self) -> dict[str, object]:
        """Counts of texts, verdicts, findings, reasons to skip, and findings accepted before."""
        readable = [checked for checked in self.texts if not checked.text.problem]
        skipped = Counter(c.skipped.partition(" (")[0] for c in readable if c.skipped)
        return {
            "texts": len(readable),
            "verdicts": dict(Counter(c.verdict for c in readable if c.verdict)),
            "findings": dict(Counter(f.rule for c in self.found for f in c.findings)),
            "skipped": dict(skipped),
            "accepted": self.num_accepted,
        }


def check(
    paths: Sequence[Path],
    config: CheckConfig,
    progress: Progress = SILENT,
    *,
    fetching: bool = False,
    thumbnails: bool = False,
) -> CheckResult:
    """Checks every text in files and folders against its picture.

    Args:
        paths: files and folders.
        config: the model, the language, and what counts as a finding.
        progress: told of texts done and files skipped.
        fetching: whether remote pictures may be requested.
        thumbnails: whether to keep small pictures of the findings.

    Raises:
        ClseaveError: a path is not there, a model is missing, or an extra.
    """
    accepted = read_baseline(config.baseline) if config.baseline else set()
    judge = _Judge(config, thumbnails, progress) if config.judge else None
    texts = read_texts(paths, config, fetching, progress)
    seen: dict[str, set[str]] = {}
    results: list[Checked] = []
    num_accepted = 0
    with progress.task("check", unit="texts") as task:
        while chunk := _chunk(texts):
            for checked in chunk:
                _find_in_text(checked, config.max_characters)
                _find_same(checked, seen, config.max_same)
            if judge is not None:
                judge(chunk)
            for checked in chunk:
                kept = [f for f in checked.findings if f.fingerprint not in accepted]
                num_accepted += len(checked.findings) - len(kept)
                checked.findings = kept
                if not kept:
                    checked.thumbnail = b""
                picture = replace(checked.text.picture, source=None)  # may be megabytes
                checked.text = replace(checked.text, picture=picture)
            results += chunk
            task.advance(len(chunk))
    return CheckResult(results, num_accepted)


def _chunk(texts: Iterator[Text]) -> list[Checked]:
    chunk: list[Checked] = []
    size = 0
    for text in islice(texts, _AT_ONCE):
        chunk.append(Checked(text))
        size += len(text.picture.source) if isinstance(text.picture.source, bytes) else 0
        if size > _BYTES_AT_ONCE:
            break
    return chunk


def _find_in_text(checked: Checked, max_characters: int) -> None:
    """Findings that need the text alone."""
    text, picture = checked.text.text, checked.text.picture
    words = re.sub(r"[\W\d_]+", " ", text.casefold()).strip()
    stem = picture.name.rpartition("/")[2].rpartition(".")[0]
    checked.skipped = picture.skipped if picture.source is None else ""
    if checked.text.problem:
        checked.find("unreadable", checked.text.problem)
    elif not text:
        if picture.skipped != "decorative":
            checked.find("empty", "no text; describe the picture")
    elif _FILE_NAME.fullmatch(text) or (
        text.casefold() == stem.casefold() and re.search(r"[\d_-]", text)
    ):
        checked.find("file-name", "the name of a file instead of a text; describe the picture")
    elif not words or _PLACEHOLDER.fullmatch(words) or _TEMPLATE.fullmatch(text):
        checked.find("placeholder", "a placeholder instead of a text; describe the picture")
    if len(text) > max_characters:
        checked.find("too-long", f"{len(text)} characters; expected at most {max_characters}")


def _find_same(checked: Checked, seen: dict[str, set[str]], most: int) -> None:
    """A finding where a text is met with one picture more than it may have."""
    if not checked.text.text or any(f.rule in _NO_TEXT for f in checked.findings):
        return
    keys = seen.setdefault(checked.text.text.casefold(), set())
    if len(keys) <= most and checked.text.picture.key not in keys:
        keys.add(checked.text.picture.key)
        if len(keys) > most:
            checked.find("same-text", f"the same text as {most} other pictures; say what differs")


@dataclass(frozen=True)
class _Seen:
    """A picture that was looked at: its digest and (D,) embedding, or why it has none."""

    vector: Floats | None
    digest: str = ""
    reason: str = ""
    thumbnail: bytes = b""


class _Judge:
    """Asks the model about texts and pictures, each picture once."""

    def __init__(self, config: CheckConfig, thumbnails: bool, progress: Progress) -> None:
        auto = config.lang == "auto"
        self._model = load_model(
            config.runs,
            None if auto else (config.lang,),
            device=config.device,
            precision=config.precision,
            progress=progress,
        )
        self._config = config
        self._thumbnails = thumbnails
        self._pictures: dict[str, _Seen] = {}
        self._identifier: LanguageIdentifier | None = None
        self._languages: dict[str, tuple[str, float]] = {}
        self._only = config.lang
        if auto and len(self._model.sources) == 1:
            self._only = next(iter(self._model.sources))
        elif auto:
            try:
                self._identifier = LanguageIdentifier(self._model.sources)
            except ExtraMissing as error:
                raise ExtraMissing(f"{error} Or name the language: --lang LANG.") from None

    def __call__(self, chunk: list[Checked]) -> None:
        """Fills in verdicts, and findings where they are bad."""
        asked = []
        for checked in chunk:
            answerable = checked.text.text and not any(f.rule in _NO_TEXT for f in checked.findings)
            if checked.text.picture.source is None:
                continue
            if answerable or (self._thumbnails and checked.findings):
                asked.append((checked, answerable))
        self._look({c.text.picture.key: c.text.picture for c, _ in asked})
        by_lang: dict[str, list[tuple[Checked, _Seen]]] = {}
        for checked, answerable in asked:
            seen = self._pictures[checked.text.picture.key]
            checked.thumbnail = seen.thumbnail
            if answerable and seen.vector is None:
                checked.skipped = seen.reason
            elif answerable:
                checked.lang = self._language(checked.text)
                by_lang.setdefault(checked.lang, []).append((checked, seen))
        for lang, rows in by_lang.items():
            self._ask(lang, rows)
        sizes = (s.vector.nbytes for s in self._pictures.values() if s.vector is not None)
        each = max(next(sizes, 0), _LEAST_BYTES)
        while len(self._pictures) * each > _KEPT_BYTES:
            del self._pictures[next(iter(self._pictures))]

    def _language(self, text: Text) -> str:
        if self._identifier is None:
            return self._only
        if text.text not in self._languages:  # the same texts are on many pages
            self._languages[text.text] = self._identifier.identify(text.text)
        lang, confidence = self._languages[text.text]
        declared = text.lang.lower().partition("-")[0]
        if confidence < _SURE_LANGUAGE and declared in self._model.sources:
            return declared
        return lang

    def _look(self, pictures: dict[str, Picture]) -> None:
        """Embeds the pictures that were not met before."""
        new = [(key, picture) for key, picture in pictures.items() if key not in self._pictures]
        with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
            loaded = ahead(pool, self._load, [picture for _, picture in new], _IMAGES_AHEAD)
            items = zip(new, loaded, strict=True)
            while batch := list(islice(items, _IMAGE_BATCH)):
                pixels = [seen.vector for _, seen in batch if seen.vector is not None]
                vectors = iter(self._model.embed_images(np.stack(pixels)) if pixels else ())
                for (key, _), seen in batch:
                    vector = None if seen.vector is None else next(vectors)
                    self._pictures[key] = replace(seen, vector=vector)

    def _load(self, picture: Picture) -> _Seen:
        """The picture with its (3, height, width) pixels in the place of the embedding."""
        try:
            content = picture.read()
            image = open_image(content, picture.name)
        except DataError as error:
            return _Seen(None, reason=str(error).removeprefix(f"{picture.name}: ").rstrip("."))
        thumbnail = io.BytesIO()
        if self._thumbnails:
            small = image.copy()
            small.thumbnail(_THUMBNAIL)
            small.save(thumbnail, "JPEG", quality=80)
        if min(image.size) < _LEAST_PIXELS:
            return _Seen(None, reason=f"smaller than {_LEAST_PIXELS} pixels")
        digest = replace(picture, source=content).key
        return _Seen(self._model.prepare(image), digest, thumbnail=thumbnail.getvalue())

    def _ask(self, lang: str, rows: list[tuple[Checked, _Seen]]) -> None:
        sentences = list(dict.fromkeys(checked.text.text for checked, _ in rows))
        embeddings, truncated = self._model.embed_sentences(lang, sentences)
        number = {sentence: index for index, sentence in enumerate(sentences)}
        order = [number[checked.text.text] for checked, _ in rows]
        premises = np.stack([seen.vector for _, seen in rows if seen.vector is not None])
        thresholds = self._model.calibrations[lang].thresholds
        for (checked, seen), index, scores in zip(
            rows, order, self._model.probabilities(lang, embeddings[order], premises), strict=True
        ):
            checked.probabilities = tuple(scores.tolist())
            best = int(scores.argmax())
            asked, promised = self._config.min_confidence, thresholds.get(LABELS[best], 0.7)
            sure = checked.probabilities[best] >= (promised if asked is None else asked)
            checked.verdict = _VERDICTS[best] if sure else "unsure"
            percent = f"{100 * checked.probabilities[best]:.0f} %"
            if checked.verdict == "contradicts":
                checked.find("contradicts", f"the picture contradicts it ({percent})", seen.digest)
            elif checked.verdict == "unsure":
                message = f"most likely: {_VERDICTS[best]} ({percent})"
                checked.find("unsure", message, seen.digest)
            if truncated[index] and all(f.rule != "too-long" for f in checked.findings):
                checked.find("too-long", "longer than the model can read; it was cut")


def read_baseline(path: Path) -> set[str]:
    """The fingerprints that a file accepts: the decisions of a report, or a run's `--format json`.

    Raises:
        UsageError: it cannot be read or is neither.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if "decisions" in document:
            entries = [e for e in document["decisions"] if e["decision"] == "accept"]
        else:
            entries = [finding for text in document["texts"] for finding in text["findings"]]
        return {str(entry["fingerprint"]) for entry in entries}
    except OSError as error:
        raise UsageError(f"--baseline {path}: cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(
            f"--baseline {path}: not a baseline; expected the decisions that a report's page "
            "downloads, or the output of --format json."
        ) from None
