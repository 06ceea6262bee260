"""`retrieve`: how well images are found by their captions, and captions by their images.

I images · T distinct captions of a language · Q queries · D embedding width
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
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
from clseave_cli.core.evaluation.figures import draw_ranks, draw_recall
from clseave_cli.core.evaluation.metrics import accuracy_interval
from clseave_cli.core.evaluation.results import (
    RankScores,
    Retrieval,
    RetrievalResult,
    Signature,
)
from clseave_cli.core.features import Photos, embed_rows, image_features, tokenize_sentences
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
from clseave_cli.core.models.backbones import load_clip_image, load_clip_text
from clseave_cli.core.models.clip_ve import FORMAT, ClipVE
from clseave_cli.core.models.encoders import ImageEncoder, SentenceEncoder
from clseave_cli.core.models.listing import find_students
from clseave_cli.core.models.ranking import Ranks, rank_pairs
from clseave_cli.core.models.student import load_student
from clseave_cli.core.training.device import autocast, resolve_device, resolve_precision
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
        folder, device = data_folder(config.data, progress), resolve_device(config.device)
        langs = list(dict.fromkeys(config.lang)) or caption_languages(folder, config.split)
        captions = {lang: read_captions(folder, config.split, (lang,)) for lang in langs}
        images = ImageFolder.of(folder, config.images)
        photos = {k: Photos.named(c.images, c.where, images) for k, c in captions.items()}
        model, text, image, fingerprint, readers = _towers(config, device)
        trained, checkpoints = _languages(model), {public_name(str(model)): fingerprint}
        readers = {lang: readers.get(lang) for lang in langs}
        results: dict[str, RetrievalResult] = {}
        # One student in memory at a time, whatever the order of its languages.
        for student in dict.fromkeys(readers.values()):
            name, encoder = public_name(str(model)), text
            if student is not None:
                name, encoder = student.name, load_student(student, fingerprint).to(device)
                checkpoints[name] = encoder.fingerprint
            for lang in (lang for lang in langs if readers[lang] == student):
                scores = _measure(config, image, encoder, captions[lang], photos[lang], progress)
                results[lang] = RetrievalResult(
                    lang=lang,
                    split=config.split,
                    reader=name,
                    trained=(lang in trained if trained else None) if student is None else True,
                    **scores,
                )
        paths = {lang: captions[lang].paths[lang] for lang in langs}
        document = Retrieval(
            results=tuple(results[lang] for lang in langs),
            signature=Signature(
                version=__version__,
                data={path.name: file_digest(path) for path in paths.values()},
                checkpoints=checkpoints,
                seed=config.seed,
                resamples=config.resamples,
                num_examples=max(result.num_captions for result in results.values()),
                precision=resolve_precision(config.precision, device),
                device=device.type,
                dataset=config.data if config.data.startswith("hf:") else folder.resolve().name,
                date=datetime.datetime.now(datetime.UTC).date().isoformat(),
                seen={
                    paths[lang].name: count
                    for lang in langs
                    if (count := _num_seen([model, readers[lang]], captions[lang], photos[lang]))
                },
            ),
        )
        if seen := document.signature.seen:
            progress.note(
                f"{', '.join(seen)}: {max(seen.values())} images were trained on, or chose the "
                "checkpoint: what is measured on them is no test."
            )
        if config.report is not None:
            _write(config.report, document)
    return document


def _towers(
    config: RetrieveConfig, device: torch.device
) -> tuple[Path, SentenceEncoder, ImageEncoder, str, Mapping[str, Path | None]]:
    """The model that `--clip` names, or the CLIP-VE in `--runs` with its students.

    Returns:
        Its folder or hub id, its towers, their fingerprint, and the student of each language.
    """
    folder = Path(config.clip or config.runs / FORMAT)
    if config.clip is None or "format" in json_object(folder / "config.json"):
        model = ClipVE.from_folder(folder).to(device)
        model.image.patch_grid = 0  # one vector an image
        students = find_students(config.runs) if config.clip is None else {}
        readers = {**students, model.source_lang: None}
        return folder, model.text, model.image, model.fingerprint, readers
    text = load_clip_text(folder).to(device).eval()
    image = load_clip_image(folder).to(device).eval()
    return folder, text, image, json_digest([text.digest(), image.digest()]), {}


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


def _num_seen(models: Iterable[Path | None], captions: Captions, photos: Photos) -> int:
    """How many of the images any of the models was trained on, or chosen by."""
    records = [SeenRows.read(model) for model in models if model is not None]
    record = SeenRows.union([record for record in records if record is not None])
    return int(record.has(SeenRows.of_photos(captions.images, photos.keys)).sum())


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
    features = image_features(tower, config.split, photos, autocast=arithmetic, progress=progress)
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
    names = np.array(captions.images)
    of_images = rank_pairs(embeddings, images, text, image)
    of_captions = rank_pairs(images, embeddings, image, text)
    # Of the images, and of the distinct captions, how many are right for each of the others.
    right_images, right_captions = map(np.bincount, np.unique([text, image], axis=1))
    return {
        "num_images": len(names),
        "num_captions": len(text),
        "num_distinct": len(texts),
        "images": _scores(
            config,
            Ranks(*(x[text] for x in of_images)),
            names[image],
            right_images[text] / len(names),
        ),
        "captions": _scores(config, of_captions, names, right_captions / len(texts)),
    }


def _scores(
    config: RetrieveConfig,
    ranks: Ranks,
    images: npt.NDArray[np.str_],
    chance: npt.NDArray[np.float64],
) -> RankScores:
    """Recalls and ranks of Q queries, the (Q,) `images` of which are resampled; `chance` is how
    likely the first answer to each is right in a random order."""
    sampling = {"resamples": config.resamples, "seed": config.seed}
    lower, median, upper = np.percentile(ranks.mean, (25, 50, 75)).tolist()
    return RankScores(
        recall_at={k: accuracy_interval(ranks.within(k), images, **sampling) for k in (1, 5, 10)},
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
        write_json(unfinished / RETRIEVAL_FILE, asdict(document))
        require_replaceable(report, RETRIEVAL)
