"""`retrieve`: how well images are found by their captions, and captions by their images.

I images · T distinct captions of a language · Q queries · D embedding width
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clseave_cli.core.config import RetrieveConfig
from clseave_cli.core.data.captions import Captions, caption_languages, read_captions
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.records import ENGLISH, distinct
from clseave_cli.core.data.seen import SeenRows
from clseave_cli.core.evaluation import metrics
from clseave_cli.core.evaluation.figures import draw_ranks, draw_recall
from clseave_cli.core.evaluation.results import (
    CUTOFFS,
    RankScores,
    Retrieval,
    RetrievalResult,
    Signature,
)
from clseave_cli.core.features import Photos, embed_rows, photo_features, tokenize_sentences
from clseave_cli.core.files import (
    Kind,
    atomic_folder,
    file_digest,
    json_digest,
    json_object,
    locked_target,
    require_replaceable,
    write_json,
)
from clseave_cli.core.models import clip_ve
from clseave_cli.core.models.backbones import load_clip_image, load_clip_text
from clseave_cli.core.models.encoders import ImageEncoder, SentenceEncoder
from clseave_cli.core.models.listing import find_students
from clseave_cli.core.models.ranking import Ranks, rank_captions
from clseave_cli.core.models.student import load_student
from clseave_cli.core.training.precision import autocast, resolve_device, resolve_precision
from clseave_cli.core.training.run import public_name
from clseave_cli.errors import ModelError
from clseave_cli.progress import SILENT, Progress
from clseave_cli.version import __version__

RETRIEVAL_FILE = "retrieval.json"

#: A folder of `retrieve --report`, which a new one may replace.
RETRIEVAL = Kind(
    "a report of `retrieve`",
    r"retrieval\.json|(recall|ranks)\.png",
    RETRIEVAL_FILE,
    lambda document: "results" in document and "signature" in document,
)


@dataclass(frozen=True, eq=False)
class _Towers:
    """What encodes the images, and the captions of the languages that no student reads.

    Attributes:
        folder: of the model, or its hub id.
        name: of the model.
        text: its text tower.
        image: its image tower, which gives one vector an image.
        fingerprint: stands for both.
        trained: the languages they were trained in; None: unknown.
        students: by language, of a CLIP-VE.
    """

    folder: Path
    name: str
    text: SentenceEncoder
    image: ImageEncoder
    fingerprint: str
    trained: frozenset[str] | None
    students: Mapping[str, Path]


def retrieve(config: RetrieveConfig, progress: Progress = SILENT) -> Retrieval:
    """Ranks all images for each caption, and all captions for each image, in every language.

    Writes `retrieval.json`, `recall.png` and `ranks.png` where `config.report` is set.

    Raises:
        ClseaveError: bad captions, a missing image, a model that is missing or damaged, or a folder
            that cannot be written.
    """
    with ExitStack() as stack:
        if config.report is not None:
            require_replaceable(config.report, RETRIEVAL, config)
            stack.enter_context(locked_target(config.report))
        folder = data_folder(config.data, progress)
        langs = list(dict.fromkeys(config.lang)) or caption_languages(folder, config.split)
        captions = {lang: read_captions(folder, config.split, (lang,)) for lang in langs}
        images = ImageFolder.of(folder, config.images)
        photos = {k: Photos.named(c.images, c.where, images) for k, c in captions.items()}
        towers = _towers(config)
        students = [towers.students[lang] for lang in langs if lang in towers.students]
        seen = _seen([towers.folder, *students], captions, photos, progress)
        results: dict[str, RetrievalResult] = {}
        checkpoints = {towers.name: towers.fingerprint}
        # One student in memory at a time, whatever the order of its languages.
        for student in dict.fromkeys(towers.students.get(lang) for lang in langs):
            name, encoder = towers.name, towers.text
            if student is not None:
                name, encoder = student.name, load_student(student, towers.fingerprint)
                encoder.to(towers.text.device)
                checkpoints[name] = encoder.fingerprint
            for lang in (lang for lang in langs if towers.students.get(lang) == student):
                is_trained = None if towers.trained is None else lang in towers.trained
                results[lang] = RetrievalResult(
                    lang=lang,
                    split=config.split,
                    reader=name,
                    trained=is_trained if student is None else True,
                    **_measure(
                        config, towers.image, encoder, captions[lang], photos[lang], progress
                    ),
                )
        device = resolve_device(config.device)
        files = [c.paths[lang] for lang, c in captions.items()]
        document = Retrieval(
            results=tuple(results[lang] for lang in langs),
            signature=Signature(
                version=__version__,
                data={path.name: file_digest(path) for path in files},
                checkpoints=checkpoints,
                seed=config.seed,
                resamples=config.resamples,
                num_examples=max(result.num_captions for result in results.values()),
                precision=resolve_precision(config.precision, device),
                device=device.type,
                seen=seen,
                dataset=config.data if config.data.startswith("hf:") else folder.resolve().name,
                date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            ),
        )
        if config.report is not None:
            _write(config.report, document)
    return document


def _towers(config: RetrieveConfig) -> _Towers:
    """Loads the model that `--clip` names, or the CLIP-VE in `--runs` with its students.

    Raises:
        ModelError: it cannot be loaded, or its towers write into different spaces.
    """
    device, name = resolve_device(config.device), config.clip
    students: dict[str, Path] = {}
    if name is None:
        name, students = str(config.runs / clip_ve.FORMAT), find_students(config.runs)
    folder = Path(name)
    if config.clip is None or json_object(folder / "config.json").get("format") == clip_ve.FORMAT:
        model = clip_ve.ClipVE.from_folder(folder).to(device)
        model.image.patch_grid = 0  # one vector an image
        text, image, fingerprint = model.text, model.image, model.fingerprint
        students.pop(model.source_lang, None)
    else:
        text = load_clip_text(name).to(device).eval()
        image = load_clip_image(name).to(device).eval()
        fingerprint = json_digest([text.digest(), image.digest()])
    if text.embedding_dim != image.embedding_dim:
        raise ModelError(
            f"{name}: its text tower writes {text.embedding_dim} numbers and its image tower "
            f"{image.embedding_dim}; there is no common space to rank in."
        )
    trained = _languages(folder)
    return _Towers(folder, public_name(name), text, image, fingerprint, trained, students)


def _languages(model: Path) -> frozenset[str] | None:
    """The languages that a model of `pretrain` or `finetune-ve` was trained in; None: unknown."""
    record = json_object(model / "training" / "run.json")
    options = record.get("options", {})
    if record.get("stage") == "pretrain":
        return frozenset(options.get("lang") or [ENGLISH])
    if record.get("stage") == "finetune-ve":
        before = _languages(Path(options["clip"])) or ()
        return frozenset([options.get("source_lang", ENGLISH), *before])
    return None


def _seen(
    models: Iterable[Path],
    captions: Mapping[str, Captions],
    photos: Mapping[str, Photos],
    progress: Progress,
) -> dict[str, int]:
    """By file, how many of its images a model was trained on, or chosen by; says so."""
    records = [record for model in models if (record := SeenRows.read(model)) is not None]
    record, seen = SeenRows.union(records), {}
    for lang, of_language in captions.items():
        shown = SeenRows.of_photos(of_language.images, photos[lang].keys)
        if count := int(record.has(shown).sum()):
            seen[of_language.paths[lang].name] = count
    if seen:
        progress.note(
            f"{', '.join(seen)}: {max(seen.values())} images were trained on, or chose the "
            "checkpoint: what is measured on them is no test."
        )
    return seen


def _measure(
    config: RetrieveConfig,
    tower: ImageEncoder,
    encoder: SentenceEncoder,
    captions: Captions,
    photos: Photos,
    progress: Progress,
) -> dict[str, Any]:
    """What a `RetrievalResult` says of the captions of one language."""
    ((lang, by_image),) = captions.texts.items()
    arithmetic = autocast(config.precision, tower.device)
    features = photo_features(tower, config.split, photos, autocast=arithmetic, progress=progress)
    images = features.of_rows().numpy()
    texts, text = distinct([caption for of_image in by_image for caption in of_image])
    image = np.repeat(np.arange(len(by_image)), [len(of_image) for of_image in by_image])
    first = image[np.unique(text, return_index=True)[1]]  # an image that has the text
    sentences = tokenize_sentences(encoder, texts, lambda row: captions.where[first[row]], progress)
    with torch.no_grad(), arithmetic():
        embeddings = embed_rows(encoder, sentences).cpu().numpy()
    if not (np.isfinite(images).all() and np.isfinite(embeddings).all()):
        raise ModelError(
            f"{captions.paths[lang]}: embeddings of its images or captions are NaN or infinite; "
            "the model is damaged or its training diverged. If it was trained well, try "
            "--precision fp32."
        )
    pairs = np.unique(np.stack([text, image]), axis=1)
    images_of, captions_of = (np.bincount(side) for side in pairs)
    of_images, of_captions = rank_captions(images, embeddings, pairs)
    names = np.array(captions.images)
    return {
        "num_images": len(names),
        "num_captions": len(text),
        "num_distinct": len(texts),
        "images": _scores(config, of_images.take(text), names[image], images_of[text] / len(names)),
        "captions": _scores(config, of_captions, names, captions_of / len(texts)),
    }


def _scores(
    config: RetrieveConfig,
    ranks: Ranks,
    images: npt.NDArray[np.str_],
    chance: npt.NDArray[np.float64],
) -> RankScores:
    """Recalls and ranks of Q queries.

    Args:
        config: how the images are resampled.
        ranks: of the Q queries.
        images: (Q,) the image of each query: the unit of the bootstrap.
        chance: (Q,) how likely its first answer is right in a random order.
    """
    recalls: dict[str, Any] = {}
    for count in CUTOFFS:
        measured = metrics.accuracy_interval(
            ranks.within(count), images, resamples=config.resamples, seed=config.seed
        )
        recalls |= {f"recall_at_{count}{end}": value for end, value in measured.ends().items()}
    lower, median, upper = np.percentile(ranks.mean, (25, 50, 75)).tolist()
    return RankScores(
        **recalls,
        chance=float(chance.mean()),
        lower_quartile=lower,
        median_rank=median,
        upper_quartile=upper,
    )


def _write(report: Path, document: Retrieval) -> None:
    drawn = {"recall": draw_recall(document), "ranks": draw_ranks(document)}
    with atomic_folder(report) as unfinished:
        for name, png in drawn.items():
            (unfinished / f"{name}.png").write_bytes(png)
        write_json(unfinished / RETRIEVAL_FILE, document.to_json())
        require_replaceable(report, RETRIEVAL)
