"""Checks texts against their pictures with a model, and texts alone by rules.

Legend: D embedding width · C labels (3).
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
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
from clseave_cli.core.prediction.inference import embed_in_batches, load_model, not_finite
from clseave_cli.errors import DataError, ExtraMissing, UsageError
from clseave_cli.labels import LABELS
from clseave_cli.progress import SILENT, Progress

Level = Literal["error", "warning"]

#: Level and description of every rule. `--fail-on unsure` counts warnings too.
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
#: Rules that leave no text for the model to judge.
_NO_TEXT = {"empty", "placeholder", "file-name", "unreadable"}

_AT_ONCE = 256
_BYTES_AT_ONCE = 128 << 20
#: Cached embeddings: 32,768 of 2 KiB, or fewer if they include patches or thumbnails.
_KEPT_BYTES, _LEAST_BYTES = 64 << 20, 2048
#: Smaller pictures are spacers and tracking pixels.
_LEAST_PIXELS = 16
_THUMBNAIL = (360, 360)
#: Below this confidence, the language that the page declares is used instead.
_SURE_LANGUAGE = 0.8
#: Needed for a verdict on a label without a calibrated threshold.
_DEFAULT_CONFIDENCE = 0.7

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
    """A rule of `RULES` that a text breaks; its fingerprint does not depend on the line."""

    rule: str
    message: str
    fingerprint: str

    @property
    def level(self) -> Level:
        return RULES[self.rule][0]


@dataclass
class Checked:
    """A text with its findings and verdict.

    Attributes:
        verdict: `fits`, `leaves open`, `contradicts` or `unsure`; None: not judged.
        lang: language of the model that judged it.
        probabilities: (C,) probabilities of the labels.
        skipped: why the picture was not judged.
        thumbnail: the picture as a small JPEG, for the report.
    """

    text: Text
    findings: list[Finding] = field(default_factory=list)
    verdict: str | None = None
    lang: str | None = None
    probabilities: tuple[float, ...] = ()
    skipped: str = ""
    thumbnail: bytes = b""

    @property
    def is_judgeable(self) -> bool:
        """Whether there is a text that a model can judge."""
        return bool(self.text.text) and all(f.rule not in _NO_TEXT for f in self.findings)

    def report(self, rule: str, message: str, digest: str = "") -> None:
        """Adds a finding; `digest` is the picture's, for findings that depend on its content."""
        text = self.text
        identity = [text.file, text.picture.name, text.text, rule, digest]
        self.findings.append(Finding(rule, message, json_digest(identity)[:32]))

    @property
    def rank(self) -> tuple[int, float]:
        """Sort key: the worst first."""
        order = [list(RULES).index(finding.rule) for finding in self.findings]
        contradiction = self.probabilities[2] if self.probabilities else 0.0
        return min(order, default=len(RULES)), -contradiction

    def to_json(self) -> dict[str, object]:
        """The object of this text in `--format json`."""
        return {
            "file": self.text.file,
            "line": self.text.place if isinstance(self.text.place, int) else None,
            "place": str(self.text.place),
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
    """All texts in the order they were read, and the number of findings the baseline accepts."""

    texts: list[Checked]
    num_accepted: int

    @property
    def flagged(self) -> list[Checked]:
        """The texts with findings."""
        return [checked for checked in self.texts if checked.findings]

    def fails(self, on: str) -> bool:
        """Whether there is an error or, with `unsure`, a warning."""
        levels = {finding.level for checked in self.flagged for finding in checked.findings}
        return "error" in levels or (on == "unsure" and "warning" in levels)

    def summary(self) -> dict[str, object]:
        """Counts of texts, verdicts, findings, reasons for skipping, and accepted findings."""
        readable = [checked for checked in self.texts if not checked.text.problem]
        skipped = Counter(c.skipped.partition(" (")[0] for c in readable if c.skipped)
        return {
            "texts": len(readable),
            "verdicts": dict(Counter(c.verdict for c in readable if c.verdict)),
            "findings": dict(Counter(f.rule for c in self.flagged for f in c.findings)),
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

    Requests remote pictures only with `fetching`, and keeps thumbnails only with `thumbnails`.

    Raises:
        ClseaveError: a path does not exist, or a model or an extra is missing.
    """
    accepted = read_baseline(config.baseline) if config.baseline else set()
    judge = _Judge(config, thumbnails, progress) if config.judge else None
    texts = read_texts(paths, config, fetching, progress)
    pictures_of: dict[str, set[str]] = {}
    results: list[Checked] = []
    num_accepted = 0
    with progress.task("check", unit="texts") as task:
        while chunk := _chunk(texts):
            for checked in chunk:
                _check_text(checked, config.max_characters)
                _check_repetition(checked, pictures_of, config.max_same)
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


def _check_text(checked: Checked, max_characters: int) -> None:
    """Applies the rules that need no model."""
    text, picture = checked.text.text, checked.text.picture
    words = re.sub(r"[\W\d_]+", " ", text.casefold()).strip()
    stem = picture.name.rpartition("/")[2].rpartition(".")[0]
    checked.skipped = picture.skipped if picture.source is None else ""
    if checked.text.problem:
        checked.report("unreadable", checked.text.problem)
    elif not text:
        if picture.skipped != "decorative":
            checked.report("empty", "no text; describe the picture")
    elif _FILE_NAME.fullmatch(text) or (
        text.casefold() == stem.casefold() and re.search(r"[\d_-]", text)
    ):
        checked.report("file-name", "the name of a file instead of a text; describe the picture")
    elif not words or _PLACEHOLDER.fullmatch(words) or _TEMPLATE.fullmatch(text):
        checked.report("placeholder", "a placeholder instead of a text; describe the picture")
    if len(text) > max_characters:
        checked.report("too-long", f"{len(text)} characters; expected at most {max_characters}")


def _check_repetition(checked: Checked, pictures_of: dict[str, set[str]], most: int) -> None:
    """Reports a text once, with the first picture beyond the `most` that it may have."""
    if not checked.is_judgeable:
        return
    keys = pictures_of.setdefault(checked.text.text.casefold(), set())
    if len(keys) <= most and checked.text.picture.key not in keys:
        keys.add(checked.text.picture.key)
        if len(keys) > most:
            checked.report("same-text", f"the same text as {most} other pictures; say what differs")


@dataclass(frozen=True)
class _Embedded:
    """A picture's digest and (D,) embedding, or why it cannot be judged."""

    vector: Floats | None
    digest: str = ""
    reason: str = ""
    thumbnail: bytes = b""

    @property
    def num_bytes(self) -> int:
        vector_bytes = 0 if self.vector is None else self.vector.nbytes
        return max(vector_bytes, _LEAST_BYTES) + len(self.thumbnail)


class _Judge:
    """Judges texts with the model; embeds each picture once."""

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
        self._pictures: dict[str, _Embedded] = {}
        self._identifier: LanguageIdentifier | None = None
        self._languages: dict[str, tuple[str, float]] = {}
        self._lang = config.lang
        if auto and len(self._model.sources) == 1:
            self._lang = next(iter(self._model.sources))
        elif auto:
            try:
                self._identifier = LanguageIdentifier(self._model.sources)
            except ExtraMissing as error:
                raise ExtraMissing(f"{error} Or name the language: --lang LANG.") from None

    def __call__(self, chunk: list[Checked]) -> None:
        """Sets verdicts, and reports contradictions and unsure answers."""
        with_picture = [
            checked
            for checked in chunk
            if checked.text.picture.source is not None
            and (checked.is_judgeable or (self._thumbnails and checked.findings))
        ]
        self._embed({c.text.picture.key: c.text.picture for c in with_picture})
        by_lang: dict[str, list[tuple[Checked, _Embedded]]] = {}
        for checked in with_picture:
            embedded = self._pictures[checked.text.picture.key]
            checked.thumbnail = embedded.thumbnail
            if not checked.is_judgeable:
                continue
            if embedded.vector is None:
                checked.skipped = embedded.reason
            else:
                checked.lang = self._language(checked.text)
                by_lang.setdefault(checked.lang, []).append((checked, embedded))
        for lang, rows in by_lang.items():
            self._judge(lang, rows)
        num_bytes = sum(embedded.num_bytes for embedded in self._pictures.values())
        while num_bytes > _KEPT_BYTES:
            num_bytes -= self._pictures.pop(next(iter(self._pictures))).num_bytes

    def _language(self, text: Text) -> str:
        if self._identifier is None:
            return self._lang
        if text.text not in self._languages:  # many pages repeat texts
            self._languages[text.text] = self._identifier.identify(text.text)
        lang, confidence = self._languages[text.text]
        declared = text.lang.lower().partition("-")[0]
        if confidence < _SURE_LANGUAGE and declared in self._model.sources:
            return declared
        return lang

    def _embed(self, pictures: dict[str, Picture]) -> None:
        """Embeds the pictures that are not cached."""
        new = [picture for key, picture in pictures.items() if key not in self._pictures]
        for picture, (vector, embedded) in embed_in_batches(self._model, new, self._load):
            self._pictures[picture.key] = replace(embedded, vector=vector)

    def _load(self, picture: Picture) -> tuple[Floats | None, _Embedded]:
        """(3, height, width) pixels, and everything else but the embedding."""
        try:
            content = picture.read()
            image = open_image(content, picture.name)
        except DataError as error:
            reason = str(error).removeprefix(f"{picture.name}: ").rstrip(".")
            return None, _Embedded(None, reason=reason)
        thumbnail = io.BytesIO()
        if self._thumbnails:
            small = image.copy()
            small.thumbnail(_THUMBNAIL)
            small.save(thumbnail, "JPEG", quality=80)
        if min(image.size) < _LEAST_PIXELS:
            return None, _Embedded(None, reason=f"smaller than {_LEAST_PIXELS} pixels")
        digest = replace(picture, source=content).key
        return self._model.prepare(image), _Embedded(None, digest, thumbnail=thumbnail.getvalue())

    def _judge(self, lang: str, rows: list[tuple[Checked, _Embedded]]) -> None:
        sentences = list(dict.fromkeys(checked.text.text for checked, _ in rows))
        embeddings, truncated = self._model.embed_sentences(lang, sentences)
        index_of = {sentence: index for index, sentence in enumerate(sentences)}
        order = [index_of[checked.text.text] for checked, _ in rows]
        premises = np.stack([embedded.vector for _, embedded in rows])  # type: ignore[misc]
        thresholds = self._model.calibrations[lang].thresholds
        probabilities = self._model.probabilities(lang, embeddings[order], premises)
        if not np.isfinite(probabilities).all():
            raise not_finite(self._model.sources[lang])
        for (checked, embedded), index, scores in zip(rows, order, probabilities, strict=True):
            checked.probabilities = tuple(scores.tolist())
            best = int(scores.argmax())
            threshold = self._config.min_confidence
            if threshold is None:
                threshold = thresholds.get(LABELS[best], _DEFAULT_CONFIDENCE)
            is_sure = checked.probabilities[best] >= threshold
            checked.verdict = _VERDICTS[best] if is_sure else "unsure"
            percent = f"{100 * checked.probabilities[best]:.0f} %"
            if checked.verdict == "contradicts":
                message = f"the picture contradicts it ({percent})"
                checked.report("contradicts", message, embedded.digest)
            elif checked.verdict == "unsure":
                message = f"most likely: {_VERDICTS[best]} ({percent})"
                checked.report("unsure", message, embedded.digest)
            if truncated[index] and all(f.rule != "too-long" for f in checked.findings):
                checked.report("too-long", "longer than the model can read; it was truncated")


def read_baseline(path: Path) -> set[str]:
    """The fingerprints that a report's decisions accept, or those in `--format json` output."""
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
